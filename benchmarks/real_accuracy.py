"""How well weights do on real scans of a `data` folder that nothing is trained or calibrated on: each network and both.

    python -m benchmarks.real_accuracy --data DATA --out benchmarks/results/real.json

The folders and cases are those of splits.json's "val". Beside them stands the best that one can do without looking: an
ellipsoid in the middle of the scan, of the one size that suits all of a folder's scans best. The picture shows each
case where its lesions are largest.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.command_line import run_main
from benchmarks.networks import FUSED, Recorder
from benchmarks.results_file import check_out, write_results
from eval.lesions import detect
from eval.scores import score
from inference.pipeline import Spacing
from inference.volume import Volume, read_label, read_volume, voxel_volume_ml
from training.losses import dice
from training.splits import read_splits, scans_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ELLIPSOID = "ellipsoid"
SIZES = np.linspace(0.3, 1.0, 36)  # of the ellipsoid's axes, as shares of the scan's sides
COLOURS = {"truth": "#ffd24d", "hybrid": "#ff6fb5", "unet": "#6fe08c", FUSED: "#4dd2ff"}
Masks = dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Settings:
    data: Path  # folder with splits.json
    weights: str = "small"  # name under weights/, or a folder
    out: Path = Path("benchmarks/results/real.json")  # and a picture beside it


def ellipsoid(shape: tuple[int, ...], size: float) -> NDArray[np.uint8]:
    """In the middle of an array, its axes this share of the array's sides."""
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    radii = sum(((axis + 0.5 - n / 2) / (size * n / 2)) ** 2 for axis, n in zip(axes, shape, strict=True))
    return (radii <= 1).astype(np.uint8)


def blind(labels: Masks) -> tuple[float, Masks]:
    """The size of the ellipsoid that suits all of these best by their mean Dice, and its mask for each."""

    def mean_dice(size: float) -> float:
        return float(np.mean([dice(ellipsoid(label.shape, size), label) for label in labels.values()]))

    best = max(SIZES, key=mean_dice)
    return float(best), {case: ellipsoid(label.shape, best) for case, label in labels.items()}


def figures(mask: NDArray[np.uint8], label: NDArray[np.uint8], spacing_mm: Spacing) -> dict[str, Any]:
    """DSC and NSD as FLARE grades; lesions by any overlap; outside_ml: of the mask beyond the label."""
    graded, detection = score(mask, label, spacing_mm), detect(mask > 0, label > 0)
    return {
        "dsc": graded.dsc,
        "nsd": graded.nsd,
        "lesions": detection.lesions,
        "found": detection.found,
        "false": detection.false,
        "outside_ml": round(float((mask > label).sum()) * voxel_volume_ml(spacing_mm), 2),
    }


def summary(cases: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Means over a folder's cases by network, and sums of lesions."""
    networks = next(iter(cases.values()))
    told = {}
    for network in networks:
        rows = [case[network] for case in cases.values()]
        told[network] = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in ("dsc", "nsd")}
        told[network] |= {key: sum(row[key] for row in rows) for key in ("lesions", "found")}
        told[network] |= {
            f"{key}_a_scan": round(float(np.mean([row[key] for row in rows])), 2) for key in ("false", "outside_ml")
        }
    return told


def draw(drawn: dict[str, tuple[Volume, Masks]], path: Path) -> None:
    """Each case's slice with the largest lesions, tissue window, with the contours of the label and of all masks."""
    columns = 5
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.2 * rows), facecolor="black", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (case, (volume, masks)) in zip(axes.flat, drawn.items(), strict=False):
        z = int(masks["truth"].sum(axis=(1, 2)).argmax())
        _, row_mm, column_mm = volume.spacing_mm
        axis.imshow(volume.hu[z], cmap="gray", vmin=-200, vmax=300, aspect=row_mm / column_mm)
        for name, colour in COLOURS.items():
            if masks[name][z].any():
                axis.contour(masks[name][z], [0.5], colors=colour, linewidths=1)
        axis.set_title(f"{case}, slice {z}", color="white", fontsize=8)
    lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=lines, loc="lower center", ncols=len(lines), frameon=False, labelcolor="white")
    figure.subplots_adjust(0.01, 0.06, 0.99, 0.95, 0.02, 0.12)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def judge_folder(
    pipeline: Recorder, folder: Path, names: list[str]
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, tuple[Volume, Masks]], float]:
    """Figures by case and network, what to draw, and the size of the ellipsoid."""
    scans = {name: folder / "images" / f"{name}_0000.nii.gz" for name in names}
    volumes = {name: read_volume(scan) for name, scan in scans.items()}
    labels = {
        name: (read_label(folder / "labels" / f"{name}.nii.gz", volume.geometry) > 0).astype(np.uint8)
        for name, volume in volumes.items()
    }
    size, guesses = blind(labels)
    cases, drawn = {}, {}
    with tempfile.TemporaryDirectory() as out:
        for name, label in tqdm(labels.items(), desc=folder.name, unit="case"):
            volume = volumes[name]
            _, masks = pipeline.masks(scans[name], Path(out))
            masks[ELLIPSOID] = guesses[name]
            cases[name] = {network: figures(mask, label, volume.spacing_mm) for network, mask in masks.items()}
            drawn[name] = volume, {"truth": label, **masks}
    return cases, drawn, size


def main(settings: Settings) -> None:
    check_out(settings.out)
    names = {folder: scans_of(settings.data, folder, "val") for folder in read_splits(settings.data)}
    pipeline = Recorder(settings.weights)
    told: dict[str, Any] = {
        "command": "python -m benchmarks.real_accuracy --data DATA",
        "hybrid": pipeline.manifest.files["hybrid"]["sha256"],
        "unet": pipeline.manifest.files["unet"]["sha256"],
    }
    drawn: dict[str, tuple[Volume, Masks]] = {}
    for folder, scans in names.items():
        cases, pictures, size = judge_folder(pipeline, settings.data / folder, scans)
        drawn |= pictures
        told[folder] = {"ellipsoid_size": round(size, 2), **summary(cases), "cases": cases}
        for network, row in summary(cases).items():
            print(folder, network, row)
    write_results(settings.out, told)
    draw(drawn, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
