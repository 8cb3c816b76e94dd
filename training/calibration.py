"""Choose the thresholds of gate and fusion on annotated cases, and write them into the manifest.

    python -m training.calibration --data FLARE_FOLDER --weights weights/NAME

The mean Dice over the cases decides (both empty counts 1, exactly one empty 0, as FLARE grades).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from inference.fusion import FusionThresholds, SliceSource, fuse
from inference.hybrid.predict import predict_slices
from inference.pipeline import Pipeline, scan_score, slice_source
from inference.slices import SliceGrid
from inference.weights import MANIFEST, Gate
from training.data import case_names, load_case
from training.release import write_manifest

ROUNDS = 2  # of the search, one threshold at a time
CHOICES: dict[str, tuple[float, ...]] = {
    "weight": (0.5, 0.35, 0.65, 0.2, 0.8),
    "voxel": (0.5, 0.4, 0.3, 0.6),
    "both_hybrid": (0.5, 0.3, 0.7),
    "both_unet": (0.5, 0.3, 0.7, 0.85),
    "sure_hybrid": (0.95, 0.9, 0.98, 0.99, 1.01),  # above 1: never sure alone
    "sure_unet": (0.95, 0.9, 0.98, 0.99, 1.01),
    "unet_voxel": (0.5, 0.3, 0.7),
    "min_volume_ml": (0.0, 0.05, 0.1, 0.2),
}
SCAN_THRESHOLDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)


@dataclass(frozen=True)
class Predicted:
    """What both networks say of a case, before any threshold."""

    label: NDArray[np.uint8]
    voxel_ml: float
    hybrid: SliceSource
    unet: SliceSource
    score: float

    def mask(self, gate: Gate, thresholds: FusionThresholds) -> NDArray[np.uint8]:
        hybrid = None if self.score < gate.scan_threshold else self.hybrid
        return fuse(hybrid, self.unet, self.label.shape, self.voxel_ml, thresholds)


def dice(mask: NDArray[Any], label: NDArray[Any]) -> float:
    """1 where both are empty, 0 where exactly one is."""
    mask, label = mask > 0, label > 0
    total = int(mask.sum()) + int(label.sum())
    return 2 * int((mask & label).sum()) / total if total else 1.0


def predict(pipeline: Pipeline, folder: Path, name: str) -> Predicted:
    case, manifest = load_case(folder, name), pipeline.manifest
    grid = SliceGrid(case.hu.shape, case.spacing_mm, manifest.plane, manifest.resize)
    slices = predict_slices(pipeline.hybrid, grid, case.hu, manifest.window_hu, pipeline.targets)
    unet = pipeline.unet.probabilities(case.hu, case.spacing_mm)
    voxel_ml = float(np.prod(case.spacing_mm)) / 1000
    return Predicted(case.label, voxel_ml, slice_source(slices, grid), unet.slice, scan_score(slices.presence))


def mean_dice(cases: list[Predicted], gate: Gate, thresholds: FusionThresholds) -> float:
    return float(np.mean([dice(case.mask(gate, thresholds), case.label) for case in cases]))


def calibrate(cases: list[Predicted]) -> tuple[Gate, FusionThresholds, float]:
    """One threshold after the other, twice over, each where the mean Dice is highest."""
    gate, thresholds = Gate(0.5), FusionThresholds()
    best = mean_dice(cases, gate, thresholds)
    steps: Iterable[tuple[str, tuple[float, ...]]] = [("scan", SCAN_THRESHOLDS), *CHOICES.items()]
    for name, choices in tqdm([*steps] * ROUNDS, desc="thresholds"):
        for value in choices:
            other = (Gate(value), thresholds) if name == "scan" else (gate, replace(thresholds, **{name: value}))
            score = mean_dice(cases, *other)
            if score > best + 1e-4:
                best, (gate, thresholds) = score, other
    return gate, thresholds, best


@dataclass(frozen=True)
class Settings:
    data: Path  # FLARE folder of cases that were not trained on
    weights: Path  # folder of weights, whose manifest is rewritten


def main(settings: Settings) -> None:
    pipeline = Pipeline(settings.weights)
    names = case_names(settings.data)
    cases = [predict(pipeline, settings.data, name) for name in tqdm(names, desc="cases", unit="case")]
    gate, thresholds, best = calibrate(cases)
    manifest = json.loads((settings.weights / MANIFEST).read_text())
    manifest["gate"] = {"scan_threshold": gate.scan_threshold, "skip_unet": gate.skip_unet}
    manifest["fusion"] = thresholds.to_dict()
    manifest["training"]["calibration"] = {"cases": len(cases), "mean_dice": round(best, 4)}
    write_manifest(settings.weights, manifest)
    print(f"mean Dice {best:.3f} on {len(cases)} cases: {gate}, {thresholds}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
