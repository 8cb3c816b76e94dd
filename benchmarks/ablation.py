"""What each part of the method is worth: the hybrid trained without it, on the same data for the same time.

    python -m benchmarks.ablation --data phantoms --held-out held_out --unet runs/unet/unet.onnx --minutes 20

Thresholds are chosen on every other held-out case, figures are those of the rest. A variant that is done is not done
again. Differences to the full method are means over cases and seeds, with a bootstrap interval over cases.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from inference.pipeline import Pipeline
from training import hybrid_training, release
from training.calibration import SEARCHED, Predicted, calibrate, predict
from training.data import load_case, read_folder

FULL = "full"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "one slice": {"slices": 1},
    "no exchanges": {"exchanges": False},
    "no gate": {"gate": False},
    "coronal": {"plane": "coronal"},
    "stretch": {"resize": "stretch"},
}
RESAMPLINGS = 10_000


@dataclass(frozen=True)
class Settings:
    data: tuple[Path, ...]  # FLARE folders to train on
    held_out: Path  # FLARE folder to choose thresholds and to judge on
    unet: Path  # unet.onnx, for the fused figures
    work: Path = Path("runs/ablation")
    out: Path = Path("benchmarks/results/ablation.json")
    minutes: float = 20.0  # a training
    steps: int = 0  # a training, instead
    validation: int = 12  # cases kept out of each training
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = tuple(VARIANTS)
    partial: Path | None = None  # the same scans with partial labels, as one more variant
    completed: Path | None = None  # the same with pseudo-completed labels, as one more


def figures(settings: Settings, changes: dict[str, Any], folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Dice of each judged case, by network; trained unless it was before."""
    done = folder / "figures.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    own: dict[str, Any] = {name: getattr(settings, name) for name in ("data", "minutes", "steps", "validation")}
    cache = settings.work / "cache"
    hybrid_training.main(hybrid_training.Settings(**{**own, "out": folder, "cache": cache, "seed": seed, **changes}))
    release.main(release.Settings(folder / "hybrid.safetensors", settings.unet, folder / "weights"))
    pipeline = Pipeline(folder / "weights")
    entries = [entry for entry in read_folder(settings.held_out) if entry.complete]
    cases = [predict(pipeline, load_case(entry)) for entry in tqdm(entries, desc=folder.name, unit="case")]
    judged = {entry.name: case for entry, case in zip(entries[1::2], cases[1::2], strict=True)}
    result = {network: dice_of(cases[::2], judged, network) for network in SEARCHED}
    done.write_text(json.dumps(result))
    return result


def dice_of(chosen_on: list[Predicted], judged: dict[str, Predicted], network: str) -> dict[str, float]:
    operating, _ = calibrate(chosen_on, network)
    return {name: case.dice(operating, network) for name, case in judged.items()}


def compare(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, float]:
    """Mean of ours − theirs, (seeds, cases) each, and its 95 % interval over resampled cases."""
    difference = (ours - theirs).mean(axis=0)
    drawn = np.random.default_rng(0).integers(len(difference), size=(RESAMPLINGS, len(difference)))
    low, high = np.percentile(difference[drawn].mean(axis=1), (2.5, 97.5))
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high)}


def table(results: dict[str, dict[str, NDArray[np.float64]]]) -> dict[str, Any]:
    """For each variant and network its mean Dice, and what it is above (+) or below (−) the full method."""
    return {
        variant: {
            network: {"dice": float(scores.mean()), **compare(scores, results[FULL][network])}
            for network, scores in networks.items()
        }
        for variant, networks in results.items()
    }


def main(settings: Settings) -> None:
    wanted = {name: VARIANTS[name] for name in dict.fromkeys((FULL, *settings.variants))}
    for name, folder in (("partial labels", settings.partial), ("pseudo-completed labels", settings.completed)):
        if folder:
            wanted[name] = {"data": (folder,)}
    results = {}
    for name, changes in wanted.items():
        runs = [figures(settings, changes, settings.work / f"{name} {seed}", seed) for seed in settings.seeds]
        results[name] = {network: np.array([list(run[network].values()) for run in runs]) for network in SEARCHED}
    told = {
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": settings.minutes,
        "steps": settings.steps,
        "seeds": len(settings.seeds),
        "judged_cases": int(results[FULL]["fused"].shape[1]),
        "variants": table(results),
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(told, indent=1) + "\n")
    for name, networks in told["variants"].items():
        print(name, *(f"{n} {v['dice']:.3f} ({v['low']:+.3f} … {v['high']:+.3f})" for n, v in networks.items()))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
