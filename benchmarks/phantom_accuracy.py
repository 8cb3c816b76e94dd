"""How well weights do on phantoms that they were never trained on: hybrid, UNet and both fused.

    python -m benchmarks.phantom_accuracy --out benchmarks/results/phantoms.json

Twenty clinical scans, the first five healthy; Dice as FLARE grades it (both empty 1, exactly one empty 0). A lesion
is found where the mask touches it. Every scan is written down when it is judged: the same weights and `--out` again,
with other seeds or after an interruption, judge those that are not there yet, and sum up all.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from tqdm import tqdm

from benchmarks.command_line import run_main
from benchmarks.networks import Recorder
from benchmarks.results_file import check_out, machine
from eval.cases import read_json
from eval.lesions import detect
from inference.atomic import write_whole
from inference.volume import voxel_volume_ml
from inference.weights import MANIFEST
from training.losses import dice
from training.phantom import PHANTOM_VERSION, Scanner, make_phantom, write_flare
from training.settings import refuse_less

NAME = "phantom"
LARGE_ML = 1.0  # from here on, a lesion should be found


@dataclass(frozen=True)
class Settings:
    weights: str = "small"  # name under weights/, or a folder
    out: Path = Path("benchmarks/results/phantoms.json")
    first_seed: int = 3000  # of the phantoms; 3000 to 3999 are never trained on, nor are thresholds chosen on them
    count: int = 20  # phantoms
    healthy: int = 5  # of them, the first so many

    def __post_init__(self) -> None:
        refuse_less(self, {"first_seed": 0, "count": 1, "healthy": 0})


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
    told = read_json(path) if path.exists() else {}
    wanted = identity(weights)
    if told and {key: told.get(key) for key in wanted} != wanted:
        raise ValueError(f"{path} is of other weights or phantoms: name another --out, or remove it")
    return {**wanted, "runs": told.get("runs", []), "cases": {case["seed"]: case for case in told.get("cases", [])}}


def write(told: dict[str, Any], path: Path) -> dict[str, Any]:
    """The results as they lie on disk then, but for the cases; the file is whole at any moment."""
    cases = [told["cases"][seed] for seed in sorted(told["cases"])]
    result = {**told, **summary(cases), "cases": cases}
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    return {key: value for key, value in result.items() if key != "cases"}


def main(settings: Settings) -> None:
    check_out(settings.out)
    pipeline = Recorder(settings.weights)
    told = resume(settings.out, pipeline.manifest.folder)
    wanted = {settings.first_seed + i: i < settings.healthy for i in range(settings.count)}
    if other := [seed for seed in wanted if seed in told["cases"] and told["cases"][seed]["healthy"] != wanted[seed]]:
        raise ValueError(f"{settings.out} has seed {other[0]} with another --healthy: name another --out")
    command = f"--first-seed {settings.first_seed} --count {settings.count} --healthy {settings.healthy}"
    run = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m benchmarks.phantom_accuracy {command}",
        "machine": machine(),
    }
    if run not in told["runs"]:
        told["runs"].append(run)
    with tempfile.TemporaryDirectory() as folder:
        for seed, healthy in tqdm(wanted.items(), unit="scan"):
            if seed not in told["cases"]:
                told["cases"][seed] = judge(pipeline, seed, healthy, Path(folder))
                write(told, settings.out)
    print(json.dumps(write(told, settings.out), indent=1))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
