"""What each part of the method is worth: the hybrid trained without it, on the same data for the same time.

    python -m benchmarks.ablation --data phantoms --held-out held_out real --unet runs/unet/unet.onnx --minutes 20

Thresholds are chosen on every other held-out patient, figures are those of the rest, folder by folder. A variant that
is done is not done again. Differences to the full method are means over cases and seeds, with a bootstrap interval over
cases.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.command_line import refuse_unknown, run_main
from benchmarks.results_file import check_out, write_results
from inference.pipeline import Pipeline
from training import hybrid_training, release
from training.calibration import SEARCHED, calibrate_all, choose_slice_gate, predict
from training.data import Entry, load_case, read_folder
from training.settings import refuse_less
from training.sources import by_source, short_names

FULL, HEALTHY = "full", "healthy"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "one slice": {"slices": 1},
    "no exchanges": {"exchanges": False},
    "no gate": {"gate": False},
    "ViT alone": {"cnn": False, "crop_share": 0.0},  # which trains the CNN alone
    "CNN alone": {"vit": False},
    "layer norm": {"norm": "layer"},
    "coronal": {"plane": "coronal"},
    "stretch": {"resize": "stretch"},
}
RESAMPLINGS = 10_000
Scores = dict[str, NDArray[np.float64]]
Figures = dict[str, dict[str, float]]
Runs = list[Figures]
RECIPE = ("learning_rate", "crop_share", "crop_stacks", "stacks", "classifier_weight")
TRAINING = ("data", "minutes", "steps", "validation", *RECIPE)


@dataclass(frozen=True)
class Settings:
    data: tuple[Path, ...]  # FLARE folders to train on
    held_out: tuple[Path, ...]  # FLARE folders to choose thresholds and to judge on
    unet: Path  # unet.onnx, for the fused figures
    work: Path = Path("runs/ablation")
    out: Path = Path("benchmarks/results/ablation.json")
    minutes: float = 20.0  # a training
    steps: int = 0  # a training, instead
    validation: int = 12  # cases kept out of each training
    learning_rate: float = 2e-3  # this and the next four as in recipes/small.sh
    crop_share: float = 0.5
    crop_stacks: int = 6
    stacks: int = 2
    classifier_weight: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = tuple(VARIANTS)
    partial: Path | None = None  # the same scans with partial labels, as one more variant
    completed: Path | None = None  # the same with pseudo-completed labels, as one more

    def __post_init__(self) -> None:
        refuse_unknown("variants", self.variants, VARIANTS)
        refuse_less(self, {"seeds": 0})


def halves(entries: list[Entry]) -> tuple[list[int], list[int]]:
    """Which cases to choose on and which to judge: the patients of each folder take turns."""
    of_turn: tuple[list[int], list[int]] = ([], [])
    seen: dict[Path, list[str]] = {}
    for index, entry in enumerate(entries):
        patients = seen.setdefault(entry.source, [])
        patient = entry.patient or entry.name
        if patient not in patients:
            patients.append(patient)
        of_turn[patients.index(patient) % 2].append(index)
    return of_turn


def judged_entries(settings: Settings) -> list[Entry]:
    return [entry for held_out in settings.held_out for entry in read_folder(held_out) if entry.complete]


def check_files(settings: Settings) -> None:
    """ValueError or OSError where a file that is asked for after a training would stop it."""
    release.metadata(settings.unet)
    for folder in (*settings.data, settings.partial, settings.completed):
        if folder:
            read_folder(folder)
    if not halves(judged_entries(settings))[1]:
        raise ValueError(
            f"--held-out {' '.join(map(str, settings.held_out))}: one patient at most is annotated completely in each, "
            "but thresholds are chosen on some and judged on others: add scans of others"
        )


def figures(settings: Settings, changes: dict[str, Any], folder: Path, seed: int) -> Figures:
    """Dice of each judged FOLDER/CASE, by network, and 1 for each `HEALTHY` one; trained unless it was before."""
    done = folder / "figures.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    own: dict[str, Any] = {name: getattr(settings, name) for name in TRAINING}
    cache = settings.work / "cache"
    hybrid_training.main(hybrid_training.Settings(**{**own, "out": folder, "cache": cache, "seed": seed, **changes}))
    release.main(release.Settings(folder / "hybrid.safetensors", settings.unet, folder / "weights"))
    pipeline = Pipeline(folder / "weights")
    entries = judged_entries(settings)
    chosen_on, judged_on = halves(entries)
    gate = choose_slice_gate(pipeline, (load_case(entries[i]) for i in chosen_on))
    cases = [predict(pipeline, load_case(entry)) for entry in tqdm(entries, desc=folder.name, unit="case")]
    short = short_names(by_source(entries))
    judged = {f"{short[entries[i].source]}/{entries[i].name}": cases[i] for i in judged_on}
    result = {
        network: {name: case.dice(operating, network) for name, case in judged.items()}
        for network, (operating, _) in calibrate_all([cases[i] for i in chosen_on], gate).items()
    }
    result[HEALTHY] = {name: float(not case.label.any()) for name, case in judged.items()}
    done.write_text(json.dumps(result))
    return result


def compare(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, float]:
    """Mean of ours − theirs, (seeds, cases) each, and its 95 % interval over resampled cases."""
    difference = (ours - theirs).mean(axis=0)
    drawn = np.random.default_rng(0).integers(len(difference), size=(RESAMPLINGS, len(difference)))
    low, high = np.percentile(difference[drawn].mean(axis=1), (2.5, 97.5))
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high)}


def row(ours: Scores, full: Scores) -> dict[str, dict[str, float | None]]:
    """A variant's mean Dice by network, what it is above (+) or below (−) the full method's, and its false positives.

    Both are (seeds, cases) by network, and by `HEALTHY`; false positives are the share of healthy cases with any, None
    where no case is healthy.
    """
    healthy = full[HEALTHY] == 1
    return {
        network: {
            "dice": float(ours[network].mean()),
            **compare(ours[network], full[network]),
            "healthy_false_positives": float((ours[network][healthy] == 0).mean()) if healthy.any() else None,
        }
        for network in SEARCHED
    }


def rows(ours: Runs, full: Runs) -> dict[str, dict[str, dict[str, float | None]]]:
    """`row` of each folder of judged cases; ours, full: of each seed what `figures` gives."""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in full[0][HEALTHY])

    def of(runs: Runs, folder: str) -> Scores:
        return {
            kind: np.array([[v for name, v in run[kind].items() if name.rpartition("/")[0] == folder] for run in runs])
            for kind in (*SEARCHED, HEALTHY)
        }

    return {folder: row(of(ours, folder), of(full, folder)) for folder in folders}


def main(settings: Settings) -> None:
    check_out(settings.out)
    check_files(settings)
    wanted = {name: VARIANTS[name] for name in dict.fromkeys((FULL, *settings.variants))}
    for name, folder in (("partial labels", settings.partial), ("pseudo-completed labels", settings.completed)):
        if folder:
            wanted[name] = {"data": (folder,)}
    results = {
        name: [figures(settings, changes, settings.work / f"{name} {seed}", seed) for seed in settings.seeds]
        for name, changes in wanted.items()
    }
    variants = {name: rows(runs, results[FULL]) for name, runs in results.items()}
    told = {
        "minutes": settings.minutes,
        "steps": settings.steps,
        "seeds": len(settings.seeds),
        "judged_cases": len(results[FULL][0][HEALTHY]),
        "variants": variants,
    }
    write_results(settings.out, told)
    for name, folders in variants.items():
        for short, networks in folders.items():
            said = (f"{n} {v['dice']:.3f} ({v['low']:+.3f} … {v['high']:+.3f})" for n, v in networks.items())
            print(f"{name}, {short}:", *said)


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
