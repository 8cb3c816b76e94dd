"""This program beside others on one scan, each in a process of its own from a cold start: time, memory, memory × time.

    make peers && python -m benchmarks.peers --slices 100 --work runs/peers

Ours in its three sizes (`base` and `paper` with random weights: nobody trained them), the paper's way (`paper` in
float32, window by window), nnU-Net v2's predictor with the plan of the FLARE 2024 winner's class and SAM ViT-B slice by
slice, both with random weights. What would take hours on a CPU can be given fewer slices (`--slow-slices`), once so
many and once twice as many; its time is then continued to all of them, and told so.
"""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from benchmarks.cold_start import write_scan
from benchmarks.command_line import refuse_unknown, run_main
from benchmarks.demo import REPOSITORY
from benchmarks.nnunet import PEERS, peers_python
from benchmarks.results_file import check_out, write_results
from benchmarks.scaling import COUNTING, peak_mib
from eval.containers import local_command, run_case
from eval.efficiency import check_timeout
from eval.machine import find_gpu
from eval.sampler import system_readers
from eval.usage import area_above, usage_of
from inference.devices import choose_device
from inference.hybrid.config import PRESETS, HybridConfig
from inference.hybrid.model import Hybrid
from inference.unet import UNetConfig
from training.release import Recipe, release
from training.settings import refuse_less
from training.unet import build_unet, export_onnx

OURS = "small"
SLOW = ("paper", "paper's way", "SAM ViT-B")  # on a CPU
MOST_OF_ONE_THICKNESS = 250  # of the scans of `write_scan`; thinner slices are put together, so time bends there
DEVICE = {"cpu": "cpu", "cuda": "cuda:0"}


@dataclass(frozen=True)
class Settings:
    slices: int = 100
    slow_slices: int = 0  # for those of SLOW, and twice as many; 0 for all
    device: Literal["cpu", "cuda"] = "cpu"
    work: Path = Path("runs/peers")  # random weights are kept there
    contestants: tuple[str, ...] = ()  # all, unless they are named
    timeout_s: float = 7200.0
    out: Path = Path("benchmarks/results/peers.json")

    def __post_init__(self) -> None:
        refuse_less(self, {"slices": 1, "slow_slices": 0})
        check_timeout(self.timeout_s)
        choose_device(self.device)
        few = self.slow_slices
        if few and (2 * few >= self.slices or self.slices > MOST_OF_ONE_THICKNESS):
            raise ValueError(
                f"--slow-slices {few}: has to be less than half of --slices, and these {MOST_OF_ONE_THICKNESS} at "
                "most: give 0 for all"
            )


@dataclass(frozen=True)
class Contestant:
    """A program that takes a folder of inputs and one of outputs; peer: not ours, so not installed with it."""

    command: str
    peer: bool = False


def contestants(settings: Settings) -> dict[str, Contestant]:
    device = DEVICE[settings.device]
    ours = f"sh {REPOSITORY / 'predict.sh'} --device {device} --weights"
    module = f"env PYTHONPATH={REPOSITORY} {sys.executable} -m benchmarks."
    weights, peer = (settings.work / "weights").resolve(), PEERS / "python"
    found = {
        OURS: Contestant(f"{ours} small"),
        "base": Contestant(f"{ours} {weights / 'base'}"),
        "paper": Contestant(f"{ours} {weights / 'paper'}"),
        "paper's way": Contestant(f"{module}papers_way {weights / 'paper'} {device}"),
        "nnU-Net": Contestant(
            f"{peer} {REPOSITORY / 'benchmarks' / 'nnunet_predicting.py'} {settings.device}", peer=True
        ),
        "SAM ViT-B": Contestant(f"{module}sam_slices {device}"),
    }
    refuse_unknown("contestants", settings.contestants, found)
    chosen = {name: one for name, one in found.items() if name in (settings.contestants or tuple(found))}
    if any(one.peer for one in chosen.values()):
        peers_python()
    return chosen


def random_weights(name: str, config: HybridConfig, folder: Path) -> None:
    """A folder of weights of a preset that know nothing, unless it is there."""
    if (folder / "manifest.json").exists():
        return
    torch.manual_seed(0)
    unet = UNetConfig()
    folder.mkdir(parents=True, exist_ok=True)
    export_onnx(build_unet(unet).eval(), unet, folder / "unet.onnx")
    recipe = Recipe(name, config, unet=unet)
    release(Hybrid(config).eval().state_dict(), (folder / "unet.onnx").read_bytes(), recipe, folder)


def measure(contestant: Contestant, scan: Path, work: Path, settings: Settings) -> dict[str, Any]:
    """Wall time, peaks and areas of one cold start. RuntimeError with what it said where it left no mask."""
    gpu = find_gpu(0) if settings.device == "cuda" else None
    work.mkdir(parents=True)
    counted = f"{shlex.join([sys.executable, '-S', '-c', COUNTING])} {contestant.command}"
    run = run_case(local_command(counted, gpu and 0), scan, work, system_readers(gpu), settings.timeout_s)
    if run.status != "done":
        raise RuntimeError(f"{contestant.command}: {run.status}: {run.output[-2000:]}")
    usage, ram_mib = usage_of(run.samples, run.idle_gpu_mib), [sample.ram_mib for sample in run.samples]
    told: dict[str, float] = {
        "seconds": run.time_s,
        "peak_mib": peak_mib(run.output),
        "ram_mib_s": area_above([sample.t_s for sample in run.samples], ram_mib, ram_mib[0]),  # the machine's
    }
    if usage.max_gpu_mib is not None and usage.auc_gpu_mib_s is not None:
        told |= {"gpu_mib": usage.max_gpu_mib, "gpu_mib_s": usage.auc_gpu_mib_s}
    return {name: round(value, 1) for name, value in told.items()}


def continued(few: dict[str, Any], more: dict[str, Any], slices: int, all_slices: int) -> dict[str, Any]:
    """Seconds of all slices, on the line through those of a few and of twice as many; the latter's peak, named so."""
    seconds = few["seconds"] + (more["seconds"] - few["seconds"]) * (all_slices / slices - 1)
    return {"seconds": round(seconds, 1), "peak_mib_of_few": more["peak_mib"]}


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as much each takes as ours."""
    ours = found.get(OURS)
    if ours is None:
        return {}
    return {
        name: {kind: round(value / ours[kind], 2) for kind, value in figures.items() if ours.get(kind)}
        for name, figures in found.items()
    }


def main(settings: Settings) -> None:
    check_out(settings.out)
    entered, scans = contestants(settings), settings.work / "scans"
    makers: dict[str, Callable[[], None]] = {
        name: lambda name=name: random_weights(name, PRESETS[name], settings.work / "weights" / name)  # type: ignore[misc]
        for name in ("base", "paper")
    }
    for name in entered:
        makers.get(name.removesuffix("'s way"), lambda: None)()
    few = settings.slow_slices
    shares = {name: (few, 2 * few) if few and name in SLOW else (settings.slices,) for name in entered}
    scan_of = {count: write_scan(scans / str(count), count) for count in {*itertools.chain(*shares.values())}}
    found: dict[str, dict[str, Any]] = {}
    for name, contestant in tqdm(entered.items(), unit="program"):
        folder = settings.work / f"{datetime.now(UTC):%Y%m%dT%H%M%S} {name}"
        runs = [measure(contestant, scan_of[count], folder / str(count), settings) for count in shares[name]]
        found[name] = continued(*runs, few, settings.slices) if len(runs) == 2 else runs[0]
        tqdm.write(f"{name}: {found[name]}")
    told = {
        "command": f"python -m benchmarks.peers --slices {settings.slices} --slow-slices {settings.slow_slices}"
        f" --device {settings.device}",
        "continued_from_slices": {name: counts for name, counts in shares.items() if len(counts) == 2},
        "figures": found,
        "times_ours": ratios(found),
    }
    write_results(settings.out, told, settings.device)


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
