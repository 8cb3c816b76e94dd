"""The same scan, run again and run otherwise: in other batches, on one core, with little memory, in the other engine.

    python -m benchmarks.reproducibility --data DATA

A rerun has to give the same bytes. What changes the order of sums may change last digits, and with them a voxel at a
lesion's edge: the Dice between the two masks tells how many. Scans are some of the sarcoma validation split, whose
tumours the weights find, and a phantom; a GPU is compared where there is one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.command_line import run_main
from benchmarks.demo import NAME, prepare
from benchmarks.results_file import check_out, write_results
from inference import limits
from inference.devices import cuda_devices
from inference.pipeline import Pipeline
from inference.volume import case_name, output_names, read_label, read_volume
from inference.weights import find_weights
from training.losses import dice
from training.settings import refuse_less
from training.splits import scans_of

PLAIN, RERUN = "plain", "rerun"


@dataclass(frozen=True)
class Settings:
    data: Path  # folder with splits.json and sts
    cases: int = 4  # of its validation split, from the first on
    weights: str = "small"  # name under weights/, or a folder
    out: Path = Path("benchmarks/results/reproducibility.json")

    def __post_init__(self) -> None:
        refuse_less(self, {"cases": 1})


@contextmanager
def cores(count: int) -> Iterator[None]:
    """The process on so many cores only."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Starved(Pipeline):
    """With no more memory than any scan needs at least: batches of a few slices, small patches."""

    def predict_hybrid(self, *arguments: Any) -> Any:
        return super().predict_hybrid(*arguments[:-1], limits.LEAST_MIB)

    def predict_unet(self, *arguments: Any) -> Any:
        return super().predict_unet(*arguments[:-1], limits.LEAST_MIB)


def in_batches_of_five(weights: Path) -> Pipeline:
    pipeline = Pipeline(weights)
    pipeline.hybrid.batch = 5
    return pipeline


def on_one_core(weights: Path) -> Pipeline:
    with cores(1):
        return Pipeline(weights)


def variants() -> dict[str, Callable[[Path], Pipeline]]:
    found: dict[str, Callable[[Path], Pipeline]] = {
        PLAIN: Pipeline,
        RERUN: Pipeline,
        "batches of 5 slices": in_batches_of_five,
        "one core": on_one_core,
        "least memory": Starved,
        "torch": partial(Pipeline, engine="torch"),
    }
    if cuda_devices():
        found["GPU"] = partial(Pipeline, device="cuda:0")
        found["GPU, torch in float16"] = partial(Pipeline, device="cuda:0", engine="torch")
    return found


def masks(make: Callable[[Path], Pipeline], weights: Path, scans: list[Path], folder: Path) -> list[Path]:
    """What a pipeline writes of the scans."""
    pipeline = make(weights)
    folder.mkdir()
    for scan in scans:
        pipeline.run(scan, folder)
    return [folder / output_names(case_name(scan))[0] for scan in scans]


def voxels(mask: Path, scan: Path) -> NDArray[np.uint8]:
    return read_label(mask, read_volume(scan).geometry)


def compare(scans: list[Path], plain: list[Path], other: list[Path]) -> dict[str, Any]:
    """How many masks are the same bytes, the least Dice between two, and how many voxels differ in all."""
    same = [ours.read_bytes() == theirs.read_bytes() for ours, theirs in zip(plain, other, strict=True)]
    pairs = [(voxels(a, scan), voxels(b, scan)) for a, b, scan in zip(plain, other, scans, strict=True)]
    return {
        "same_bytes": sum(same),
        "least_dsc": round(min(dice(a, b) for a, b in pairs), 6),
        "voxels": int(sum((a != b).sum() for a, b in pairs)),
        "of": int(sum(a.sum() for a, _ in pairs)),
    }


def main(settings: Settings) -> None:
    check_out(settings.out)
    cases = scans_of(settings.data, "sts", "val")[: settings.cases]
    scans = [settings.data / "sts" / "images" / f"{case}_0000.nii.gz" for case in cases]
    weights, found = find_weights(settings.weights), {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        scans.append(folder / "imagesTr" / f"{NAME}_0000.nii.gz")
        for variant, make in tqdm(variants().items(), unit="variant"):
            found[variant] = masks(make, weights, scans, folder / variant)
        told = {
            "command": f"python -m benchmarks.reproducibility --data DATA --cases {settings.cases}",
            "scans": len(scans),
            **{
                variant: compare(scans, found[PLAIN], written) for variant, written in found.items() if variant != PLAIN
            },
        }
    write_results(settings.out, told)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
