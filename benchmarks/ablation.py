"""What each part of the method is worth: the hybrid trained without it, on the same data for the same time.

    python -m benchmarks.ablation --data phantoms --held-out held_out real --unet runs/unet/unet.onnx --minutes 20

Held-out patients are halved, folder by folder, and each half is judged at thresholds that were chosen on the other; the
gate of the slices is chosen on the cases that the training keeps out. A variant that is done is not done again.
Differences to the full method are means over cases and seeds, with a bootstrap interval over cases.

With `--weights hybrid.safetensors` every variant, the full method too, goes on from a trained network, and what is
measured is how well training mends the loss of a part: hours less, and kind to the full method. "layer norm" cannot go
on from batch norm: name the other `--variants`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from tqdm import tqdm

from benchmarks.command_line import refuse_unknown, run_main
from benchmarks.results_file import check_out, write_results
from inference.atomic import write_whole
from inference.hybrid.model import Hybrid
from inference.pipeline import Pipeline
from inference.slices import SLICE_MM
from training import hybrid_training, release
from training.calibration import calibrate_all, choose_slice_gate, predict, predict_unet
from training.data import Entry, load_case, read_folder, split
from training.loop import load_weights
from training.losses import LESION_WEIGHT
from training.resume import recorded
from training.settings import refuse_less
from training.sources import by_source, short_names

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
COLOURS = {"hybrid": "#e07b39", "fused": "#2a78b5"}  # of the networks that a variant changes
NETWORKS = tuple(COLOURS)
DONE = "figures.json"  # in the folder of a variant and seed
RESAMPLINGS = 10_000
Scores = dict[str, NDArray[np.float64]]
Figures = dict[str, dict[str, float]]
Runs = list[Figures]
RECIPE = ("learning_rate", "crop_share", "crop_stacks", "stacks", "classifier_weight", "lesion_weight", "frozen_norms")
TRAINING = ("data", "shares", "slice_mm", "minutes", "steps", "validation", "validations", *RECIPE)


@dataclass(frozen=True)
class Settings:
    data: tuple[Path, ...]  # FLARE folders to train on
    held_out: tuple[Path, ...]  # FLARE folders to choose thresholds and to judge on
    unet: Path  # unet.onnx, for the fused figures
    work: Path = Path("runs/ablation")
    out: Path = Path("benchmarks/results/ablation.json")
    minutes: float = 20.0  # a training
    steps: int = 0  # a training, instead
    shares: tuple[float, ...] = ()  # this and the next three as a training's
    slice_mm: float = SLICE_MM
    validation: int = 12
    validations: int = 7
    weights: Path | None = None  # hybrid.safetensors for every variant to go on from
    learning_rate: float = 2e-3  # this and the next six as in recipes/small.sh
    crop_share: float = 0.5
    crop_stacks: int = 6
    stacks: int = 2
    classifier_weight: float = 1.0
    lesion_weight: float = LESION_WEIGHT
    frozen_norms: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = tuple(VARIANTS)
    partial: Path | None = None  # the same scans with partial labels, as one more variant
    completed: Path | None = None  # the same with pseudo-completed labels, as one more

    def __post_init__(self) -> None:
        refuse_unknown("variants", self.variants, VARIANTS)
        refuse_less(self, {"seeds": 0})


def halves(entries: list[Entry]) -> tuple[list[int], list[int]]:
    """Two halves of the cases, by index: the patients of each folder take turns."""
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


def variants(settings: Settings) -> dict[str, dict[str, Any]]:
    """What each asked variant changes in a training's settings; the full method first."""
    wanted = {name: VARIANTS[name] for name in dict.fromkeys((FULL, *settings.variants))}
    for name, folder in (("partial labels", settings.partial), ("pseudo-completed labels", settings.completed)):
        if folder:
            wanted[name] = {"data": (folder,), "shares": ()}
    return wanted


def training_settings(
    settings: Settings, changes: dict[str, Any], folder: Path, seed: int = 0
) -> hybrid_training.Settings:
    own: dict[str, Any] = {name: getattr(settings, name) for name in TRAINING}
    cache, weights = settings.work / "cache", start_file(settings, changes)
    return hybrid_training.Settings(
        **{**own, "out": folder, "cache": cache, "weights": weights, "seed": seed, **changes}
    )


def start_file(settings: Settings, changes: dict[str, Any]) -> Path | None:
    """What a variant starts from; where windows are of one slice, `one_slice` of it."""
    if settings.weights is None or changes.get("slices") != 1:
        return settings.weights
    path = settings.work / "one_slice.safetensors"
    write_whole(path, save(one_slice(load_file(settings.weights))))
    return path


def one_slice(state: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Weights of the network for windows of one slice that says of it what `state` says of five times the same slice.

    Kernels (out, in, 3, height, width) across slices become their sums (out, in, 1, height, width). Exact but where
    convolutions are padded in depth (`planes_kept`).
    """
    return {
        name: value.astype(np.float32).sum(axis=2, keepdims=True) if value.ndim == 5 and value.shape[2] == 3 else value
        for name, value in state.items()
    }


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
    for name, changes in variants(settings).items():
        own = training_settings(settings, changes, settings.work)
        try:
            if own.weights:
                load_weights(Hybrid(own.config), own.weights)
        except ValueError as error:
            raise ValueError(f"--weights: no start for {name!r} ({error}): name others, or other --variants") from error
        for seed in settings.seeds:
            done, now = folder_of(settings, name, seed) / DONE, conditions(settings, changes, seed)
            if done.exists() and json.loads(done.read_text()).get("conditions") != now:
                raise ValueError(f"{done}: of other settings or held-out cases: name another --work, or remove it")


def folder_of(settings: Settings, name: str, seed: int) -> Path:
    return settings.work / f"{name} {seed}"


def conditions(settings: Settings, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """What the figures of a variant hold for: how it is trained, on what, from what, and the cases that judge it."""
    own = training_settings(settings, changes, settings.work, seed)
    start = own.weights and hashlib.sha256(own.weights.read_bytes()).hexdigest()
    return {
        **recorded(own),
        "weights": start,
        "unet": hashlib.sha256(settings.unet.read_bytes()).hexdigest(),
        "validation": own.validation,
        "data": list(map(str, own.data)),
        "judged": names_of(judged_entries(settings)),
    }


def names_of(entries: list[Entry]) -> list[str]:
    """FOLDER/CASE of each."""
    short = short_names(by_source(entries))
    return [f"{short[entry.source]}/{entry.name}" for entry in entries]


def figures(settings: Settings, changes: dict[str, Any], name: str, seed: int, said: Path) -> Figures:
    """Dice of each judged FOLDER/CASE, by network, and 1 for each `HEALTHY` one; trained unless it was before.

    said: see `judge`.
    """
    folder = folder_of(settings, name, seed)
    done = folder / DONE
    if done.exists():
        return dict(json.loads(done.read_text())["figures"])
    own = training_settings(settings, changes, folder, seed)
    hybrid_training.main(own)
    release.main(release.Settings(folder / "hybrid.safetensors", settings.unet, folder / "weights"))
    result = judge(Pipeline(folder / "weights"), split(own.data, own.validation)[1], judged_entries(settings), said)
    told = {"conditions": conditions(settings, changes, seed), "figures": result}
    write_whole(done, json.dumps(told).encode())
    return result


def judge(pipeline: Pipeline, kept_out: list[Entry], entries: list[Entry], said: Path) -> Figures:
    """What `figures` gives; the gate of the slices is chosen on the cases that the training kept out.

    said: folder for what the UNet, the same in all variants, says of each entry.
    """
    gate, cases = choose_slice_gate(pipeline, map(load_case, kept_out)), []
    for i, entry in enumerate(tqdm(entries, desc="judged", unit="case")):
        case, by_unet = load_case(entry), said / f"{i}.npy"
        if not by_unet.exists():
            np.save(by_unet, predict_unet(pipeline, case))
        cases.append(predict(pipeline, case, np.load(by_unet, mmap_mode="r")))
    names = names_of(entries)
    result: Figures = {kind: dict.fromkeys(names, 0.0) for kind in NETWORKS}
    first, second = halves(entries)
    for chosen_on, judged_on in ((first, second), (second, first)):
        chosen = calibrate_all([cases[i] for i in chosen_on], gate)
        for network in NETWORKS:
            for i in judged_on:
                result[network][names[i]] = cases[i].dice(chosen[network][0], network)
    result[HEALTHY] = {name: float(not case.label.any()) for name, case in zip(names, cases, strict=True)}
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
        for network in NETWORKS
    }


def rows(ours: Runs, full: Runs) -> dict[str, dict[str, dict[str, float | None]]]:
    """`row` of each folder of judged cases; ours, full: of each seed what `figures` gives."""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in full[0][HEALTHY])

    def of(runs: Runs, folder: str) -> Scores:
        return {
            kind: np.array([[v for name, v in run[kind].items() if name.rpartition("/")[0] == folder] for run in runs])
            for kind in (*NETWORKS, HEALTHY)
        }

    return {folder: row(of(ours, folder), of(full, folder)) for folder in folders}


def draw(told: dict[str, Any], path: Path) -> None:
    """Each variant's difference to the full method with its interval, a panel a folder."""
    names = [name for name in told["variants"] if name != FULL]
    folders = list(told["variants"][FULL])
    figure, panels = plt.subplots(
        1, len(folders), figsize=(4.5 * len(folders), 1.2 + 0.4 * len(names)), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for panel, folder in zip(panels[0], folders, strict=True):
        for offset, (network, colour) in zip((-0.12, 0.12), COLOURS.items(), strict=True):
            rows = [told["variants"][name][folder][network] for name in names]
            means = np.array([row["difference"] for row in rows])
            reach = np.abs([[row[end] - row["difference"] for row in rows] for end in ("low", "high")])
            places = np.arange(len(names)) + offset
            panel.errorbar(means, places, xerr=reach, fmt="o", color=colour, capsize=3, label=network)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set(title=folder, xlabel="Dice above (+) or below (−) the full method's")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(settings: Settings) -> None:
    check_out(settings.out)
    said = settings.work / "by_unet"
    shutil.rmtree(said, ignore_errors=True)  # of another call's cases
    said.mkdir(parents=True)
    check_files(settings)
    results = {
        name: [figures(settings, changes, name, seed, said) for seed in settings.seeds]
        for name, changes in variants(settings).items()
    }
    told = {
        "minutes": settings.minutes,
        "steps": settings.steps,
        "seeds": len(settings.seeds),
        "goes_on_from": settings.weights and str(settings.weights),
        "judged_cases": len(results[FULL][0][HEALTHY]),
        "variants": {name: rows(runs, results[FULL]) for name, runs in results.items()},
    }
    write_results(settings.out, told)
    draw(told, settings.out.with_suffix(".png"))
    for name, folders in told["variants"].items():
        for short, networks in folders.items():
            said = (f"{n} {v['dice']:.3f} ({v['low']:+.3f} … {v['high']:+.3f})" for n, v in networks.items())
            print(f"{name}, {short}:", *said)


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
