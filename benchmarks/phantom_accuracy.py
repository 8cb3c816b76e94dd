"""How well weights do on phantoms that they were never trained on: hybrid, UNet and both fused.

    python -m benchmarks.phantom_accuracy --out benchmarks/results/phantoms.json

Twenty clinical scans, the first five healthy; Dice as FLARE grades it (both empty 1, exactly one empty 0).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from inference.fusion import FusionThresholds, SliceSource, fuse
from inference.hybrid.predict import predict_slices
from inference.pipeline import Pipeline, scan_score, slice_source, voxel_ml
from inference.slices import SliceGrid
from inference.volume import read_label, read_volume
from inference.weights import find_weights
from training.calibration import dice
from training.phantom import PHANTOM_VERSION, Scanner, make_phantom, write_flare

FIRST_SEED, COUNT, HEALTHY = 3000, 20, 5  # seeds from 3000 on are never trained or calibrated on
ALONE = FusionThresholds(sure_hybrid=0.0, sure_unet=0.0)  # a network by itself: every voxel from 0.5 on


def scanner(seed: int) -> Scanner:
    """A clinical scanner; slices of 2.5 mm at least, so that twenty scans take minutes and not an hour."""
    rng = np.random.default_rng((PHANTOM_VERSION, seed, 5))
    drawn = Scanner.random(rng)
    while drawn.spacing_mm[0] < 2.5:
        drawn = Scanner.random(rng)
    return drawn


def judge(pipeline: Pipeline, seed: int, folder: Path) -> dict[str, Any]:
    """Dice of hybrid, UNet and fused mask on one phantom, written as a file and read back."""
    phantom = make_phantom(seed, healthy=seed < FIRST_SEED + HEALTHY, scanner=scanner(seed))
    write_flare(phantom, folder, "x")
    started = time.perf_counter()
    volume = read_volume(folder / "imagesTr" / "x_0000.nii.gz")
    manifest = pipeline.manifest
    grid = SliceGrid(volume.body.shape, volume.spacing_mm, manifest.plane, manifest.resize)
    slices = predict_slices(pipeline.hybrid, grid, volume.body, manifest.window_hu, pipeline.targets)
    score = scan_score(slices.presence)
    hybrid = slice_source(slices, grid) if score >= manifest.gate.scan_threshold else None
    unet = pipeline.unet.probabilities(volume.body, volume.spacing_mm).slice
    masks = {
        "hybrid": mask(hybrid, None, volume.body.shape, voxel_ml(volume), ALONE),
        "unet": mask(None, unet, volume.body.shape, voxel_ml(volume), ALONE),
        "fused": mask(hybrid, unet, volume.body.shape, voxel_ml(volume), manifest.fusion),
    }
    seconds = time.perf_counter() - started
    label = read_label(folder / "labelsTr" / "x.nii.gz", volume.geometry)[volume.box]
    return {
        "seed": seed,
        "healthy": phantom.healthy,
        "type": phantom.lesion_type,
        "ml": round(float(label.sum() * voxel_ml(volume)), 2),
        "size": list(volume.hu.shape),
        "scan_score": round(score, 3),
        "seconds": round(seconds, 1),
        "dice": {name: round(dice(found, label), 4) for name, found in masks.items()},
        "false_positive": bool(phantom.healthy and masks["fused"].any()),
    }


def mask(
    hybrid: SliceSource | None,
    unet: SliceSource | None,
    shape: tuple[int, ...],
    ml: float,
    thresholds: FusionThresholds,
) -> np.ndarray:
    return fuse(hybrid, unet, shape, ml, thresholds)


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    diseased = [case for case in cases if not case["healthy"]]
    names = ("hybrid", "unet", "fused")
    return {
        "mean_dice": {name: round(float(np.mean([c["dice"][name] for c in cases])), 4) for name in names},
        "mean_dice_diseased": {name: round(float(np.mean([c["dice"][name] for c in diseased])), 4) for name in names},
        "healthy_with_false_positive": sum(case["false_positive"] for case in cases),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phantom_accuracy")
    parser.add_argument("--weights", default="small", help="name under weights/, or a folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/phantoms.json"), help="JSON to write")
    options = parser.parse_args()
    pipeline = Pipeline(find_weights(options.weights))
    with tempfile.TemporaryDirectory() as folder:
        seeds = tqdm(range(FIRST_SEED, FIRST_SEED + COUNT), unit="scan")
        cases = [judge(pipeline, seed, Path(folder)) for seed in seeds]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python -m benchmarks.phantom_accuracy",
        "machine": f"{platform.machine()}, CPU",
        "phantom_version": PHANTOM_VERSION,
        **summary(cases),
        "cases": cases,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=1))


if __name__ == "__main__":
    main()
