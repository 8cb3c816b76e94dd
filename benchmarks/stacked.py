"""What it saves to run a stack of slices once, instead of a window of five for each of them.

    python -m benchmarks.stacked --presets small base

Three ways to the same number of target slices, with random weights, in torch and float32, by turns: one stack; windows
of which each computes no more than its target needs, which give the same logits; five full passes a window, the paper's
form (another network: its planes are kept). Windows go one by one or several at once (`--window-batch`).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.command_line import refuse_unknown, run_main
from benchmarks.results_file import check_out, write_results
from inference.hybrid.cnn_unet import fold_batch_norms
from inference.hybrid.config import IMAGE_SIZE, PRESETS, HybridConfig
from inference.hybrid.model import Hybrid, channels_last
from inference.limits import cores
from training.cost import size
from training.settings import refuse_less

STACK, WINDOWS, FIVE_PASSES = "stack", "windows", "five passes"
AGREE = 1e-3  # largest difference of logits of a stack and its windows, relative to the largest one


@dataclass(frozen=True)
class Settings:
    presets: tuple[str, ...] = ("small", "base")
    targets: int = 16
    window_batch: int = 1
    rounds: int = 5
    out: Path = Path("benchmarks/results/stacked.json")

    def __post_init__(self) -> None:
        refuse_unknown("presets", self.presets, PRESETS)
        refuse_less(self, {"targets": 1, "window_batch": 1, "rounds": 1})


@dataclass(frozen=True)
class Way:
    """A network, and what it is given one after the other: stacks (N, D, 256, 256) of all targets together."""

    network: Hybrid
    parts: tuple[Tensor, ...]

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Logits (targets, 256, 256)."""
        return torch.cat([self.network(part).logits.flatten(0, 1) for part in self.parts])

    def gmac(self) -> float:
        """10⁹ multiply-adds for all targets."""
        return round(sum(len(part) * size(self.network, part[:1])["gmac"] for part in self.parts), 2)


def build(config: HybridConfig) -> Hybrid:
    torch.manual_seed(0)
    network = Hybrid(config).eval().requires_grad_(False)
    network.prompt_encoder.presence_threshold = 0.0  # random weights lie at any other
    fold_batch_norms(network)
    return channels_last(network)


def ways(config: HybridConfig, settings: Settings) -> dict[str, Way]:
    slices = torch.rand(settings.targets + 2 * config.radius, IMAGE_SIZE, IMAGE_SIZE)
    windows = slices.unfold(0, config.slices, 1).movedim(-1, 1).contiguous().split(settings.window_batch)
    stacked = build(replace(config, planes_kept=False))
    return {
        STACK: Way(stacked, (slices[None],)),
        WINDOWS: Way(stacked, windows),
        FIVE_PASSES: Way(build(replace(config, planes_kept=True)), windows),
    }


def measure(config: HybridConfig, settings: Settings) -> dict[str, dict[str, float]]:
    """Seconds (medians), how many times those of the stack, and multiply-adds. RuntimeError where results differ."""
    found = ways(config, settings)
    first = {name: way.run() for name, way in found.items()}  # also what a first run costs
    difference = float((first[STACK] - first[WINDOWS]).abs().max() / first[STACK].abs().max())
    if not difference < AGREE:
        raise RuntimeError(f"a stack and its windows differ by {difference:.1e} of the largest logit")
    medians = by_turns(found, settings.rounds)
    return {
        name: {
            "seconds": round(medians[name], 2),
            "times_the_stack": round(medians[name] / medians[STACK], 2),
            "gmac": way.gmac(),
        }
        for name, way in found.items()
    }


def by_turns(found: dict[str, Way], rounds: int) -> dict[str, float]:
    """Median seconds of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in tqdm(range(rounds), unit="round"):
        for name, way in found.items():
            began = time.perf_counter()
            way.run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(settings: Settings) -> None:
    check_out(settings.out)
    torch.set_num_threads(cores())
    told: dict[str, Any] = {
        "command": f"python -m benchmarks.stacked --presets {' '.join(settings.presets)} --targets {settings.targets} "
        f"--window-batch {settings.window_batch} --rounds {settings.rounds}",
        "presets": {preset: measure(PRESETS[preset], settings) for preset in settings.presets},
    }
    write_results(settings.out, told)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
