"""How well weights do on phantoms that they were never trained on: hybrid, UNet and both fused.

    python -m benchmarks.phantom_accuracy --out benchmarks/results/phantoms.json

Twenty clinical scans, the first five healthy; Dice as FLARE grades it (both empty 1, exactly one empty 0). A lesion
is found where the mask touches it. Every scan is written down when it is judged: the same weights and `--out` again,
with other seeds or after an interruption, judge those that are not there yet, and sum up all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from tqdm import tqdm

from benchmarks.networks import Recorder
from eval.lesions import detect
from inference.pipeline import voxel_volume_ml
from inference.weights import MANIFEST
from training.losses import dice
from training.phantom import PHANTOM_VERSION, Scanner, make_phantom, write_flare

FIRST_SEED, COUNT, HEALTHY = 3000, 20, 5  # seeds from 3000 to 3999 are never trained or calibrated on
NAME = "phantom"
LARGE_ML = 1.0  # from here on, a lesion should be found


def scanner(seed: int) -> Scanner:
    """A clinical scanner; slices of 2.5 mm at least, so that twenty scans take minutes and not an hour."""
    return Scanner.random(np.random.default_rng((PHANTOM_VERSION, seed, 5)), thinnest_mm=2.5)


def judge(pipeline: Recorder, seed: int, healthy: bool, folder: Path) -> dict[str, Any]:
    """Dice on one phantom: of the mask that the program writes, and of each network alone."""
    phantom = make_phantom(seed, healthy=healthy, scanner=scanner(seed))
    write_flare(phantom, folder, NAME)
    report, masks = pipeline.masks(folder / "imagesTr" / f"{NAME}_0000.nii.gz", folder)
    voxel_ml = voxel_volume_ml(phantom.spacing_mm)
    large = cc3d.dust(phantom.lesions, threshold=int(np.ceil(LARGE_ML / voxel_ml)), connectivity=26) > 0
    found = {network: detect(mask > 0, large) for network, mask in masks.items()}
    return {
        "seed": seed,
        "healthy": phantom.healthy,
        "type": phantom.lesion_type,
        "ml": round(float(phantom.lesions.sum()) * voxel_ml, 2),
        "found_ml": round(report.volume_ml, 2),
        "size": list(phantom.hu.shape),
        "scan_score": round(report.scan_score, 3),
        "seconds": report.seconds,
        "dice": {network: round(dice(mask, phantom.lesions), 4) for network, mask in masks.items()},
        "large": next(iter(found.values())).lesions,
        "large_found": {network: told.found for network, told in found.items()},
    }


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    names = cases[0]["dice"]

    def mean_dice(of: list[dict[str, Any]]) -> dict[str, float | None]:
        return {name: round(float(np.mean([c["dice"][name] for c in of])), 4) if of else None for name in names}

    return {
        "mean_dice": mean_dice(cases),
        "mean_dice_diseased": mean_dice([case for case in cases if not case["healthy"]]),
        "healthy_with_false_positive": {
            name: sum(case["healthy"] and case["dice"][name] == 0 for case in cases) for name in names
        },
        "large_lesions": sum(case["large"] for case in cases),
        "large_found": {name: sum(case["large_found"][name] for case in cases) for name in names},
    }


def identity(weights: Path) -> dict[str, Any]:
    """What results must share to be summed up: the phantoms, and the manifest, which has the networks' checksums."""
    return {
        "phantom_version": PHANTOM_VERSION,
        "manifest": hashlib.sha256((weights / MANIFEST).read_bytes()).hexdigest(),
    }


def resume(path: Path, weights: Path) -> dict[str, Any]:
    """What `path` holds of these weights: runs, and cases by their seeds. Other weights' results are an error."""
    told = json.loads(path.read_text()) if path.exists() else {}
    wanted = identity(weights)
    if told and {key: told.get(key) for key in wanted} != wanted:
        raise SystemExit(f"{path} is of other weights or phantoms: name another --out, or remove it")
    return {**wanted, "runs": told.get("runs", []), "cases": {case["seed"]: case for case in told.get("cases", [])}}


def write(told: dict[str, Any], path: Path) -> dict[str, Any]:
    """The results as they lie on disk then, but for the cases; the file is whole at any moment."""
    cases = [told["cases"][seed] for seed in sorted(told["cases"])]
    result = {**told, **summary(cases), "cases": cases}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return {key: value for key, value in result.items() if key != "cases"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phantom_accuracy")
    parser.add_argument("--weights", default="small", help="name under weights/, or a folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/phantoms.json"), help="JSON to write")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="of the phantoms; 3000 to 3980")
    parser.add_argument("--count", type=int, default=COUNT, help="phantoms")
    parser.add_argument("--healthy", type=int, default=HEALTHY, help="of them, the first so many")
    options = parser.parse_args()
    pipeline = Recorder(options.weights)
    told = resume(options.out, pipeline.manifest.folder)
    wanted = {options.first_seed + i: i < options.healthy for i in range(options.count)}
    if other := [seed for seed in wanted if seed in told["cases"] and told["cases"][seed]["healthy"] != wanted[seed]]:
        raise SystemExit(f"{options.out} has seed {other[0]} with another --healthy: name another --out")
    command = f"--first-seed {options.first_seed} --count {options.count} --healthy {options.healthy}"
    run = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m benchmarks.phantom_accuracy {command}",
        "machine": f"{platform.machine()}, CPU",
    }
    if run not in told["runs"]:
        told["runs"].append(run)
    with tempfile.TemporaryDirectory() as folder:
        for seed, healthy in tqdm(wanted.items(), unit="scan"):
            if seed not in told["cases"]:
                told["cases"][seed] = judge(pipeline, seed, healthy, Path(folder))
                write(told, options.out)
    print(json.dumps(write(told, options.out), indent=1))


if __name__ == "__main__":
    main()
