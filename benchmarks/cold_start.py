"""From nothing to a mask on disk: when each stage of a cold start begins and ends, as a picture and as JSON.

    python -m benchmarks.cold_start --slices 100 --runs 3

One process a run, as a grader starts one container a case; the run of median length is drawn. The scan is a phantom of
512×512 voxels, stretched by repeating it along z where more slices are asked for than a body has.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
from tqdm import tqdm

from benchmarks.command_line import run_main
from benchmarks.demo import NAME, REPOSITORY, prepare
from benchmarks.results_file import check_out, write_results
from inference.devices import Engine, choose_device
from inference.weights import find_weights
from training.settings import refuse_less

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Spans = dict[str, tuple[float, float]]  # stage → begin and end, seconds since the process was started
TRUNK_MM = 750.0
SIDE, TRIES = 3072, 5  # of the matrices whose product is a floor; times that each floor is measured
COLOURS = {"start": "#8c8c8c", "case": "#2a78b5"}


@dataclass(frozen=True)
class Settings:
    slices: int = 100
    runs: int = 3
    device: str = "cpu"
    engine: Engine = "onnx"
    weights: str = "small"
    out: Path = Path("benchmarks/results/cold_start.json")  # and a picture beside it

    def __post_init__(self) -> None:
        refuse_less(self, {"slices": 1, "runs": 1})
        choose_device(self.device)
        find_weights(self.weights)


def write_scan(folder: Path, slices: int) -> Path:
    """A phantom of 512×512×100 voxels, cut or repeated to so many slices, which lie within the length of a trunk."""
    prepare(folder)
    path = folder / "imagesTr" / f"{NAME}_0000.nii.gz"
    scan = nib.Nifti1Image.from_filename(path)
    hu = np.asanyarray(scan.dataobj)
    repeated = np.take(hu, np.arange(slices) % hu.shape[2], axis=2)
    affine = scan.affine.copy()
    affine[:3, 2] *= min(1.0, TRUNK_MM / (slices * scan.header.get_zooms()[2]))
    nib.save(nib.Nifti1Image(repeated, affine), path)
    return path


def start_cold(scan: Path, folder: Path, settings: Settings) -> tuple[Spans, Spans]:
    """Spans of the start and of the case, of one process. RuntimeError with what it said where it failed."""
    report = folder / "report.json"
    command = ["sh", str(REPOSITORY / "predict.sh"), str(scan), str(folder / "out"), "--report", str(report)]
    command += ["--device", settings.device, "--weights", settings.weights, "--engine", settings.engine]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ended = time.time()
    if done.returncode:
        raise RuntimeError(done.stderr)
    told = json.loads(report.read_text())
    start, case = (spans(part, began) for part in (told["start"], told["cases"][0]))
    start["interpreter"] = (0.0, min(begin for begin, _ in start.values()))
    start["exit"] = (case["write"][1], ended - began)
    return start, case


def spans(part: dict[str, dict[str, float]], began: float) -> Spans:
    return {stage: (moment - began, moment - began + part["seconds"][stage]) for stage, moment in part["began"].items()}


def draw(start: Spans, case: Spans, path: Path) -> None:
    """One bar a stage, in the order in which they begin."""
    rows = [(stage, span, kind) for kind, part in (("start", start), ("case", case)) for stage, span in part.items()]
    rows.sort(key=lambda row: row[1])
    figure, axis = plt.subplots(figsize=(9, 0.4 * len(rows) + 1), layout="constrained")
    for place, (_, (begin, end), kind) in enumerate(rows):
        axis.barh(place, end - begin, left=begin, color=COLOURS[kind])
        axis.annotate(f"{end - begin:.2f} s", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [stage for stage, _, _ in rows])
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds since the process was started")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def floors(scan: Path) -> dict[str, float]:
    """What no stage can be faster than: multiply-adds of a large product of matrices in float32, and unpacking a scan.

    Each the best of `TRIES`, by numpy (10⁹ a second, on all cores) and by Python's gzip (seconds).
    """
    matrix, packed = np.random.default_rng(0).random((SIDE, SIDE), np.float32), scan.read_bytes()
    product_s = min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=TRIES))
    unpack_s = min(timeit.repeat(lambda: gzip.decompress(packed), number=1, repeat=TRIES))
    return {"matrix_product_gmac_s": round(SIDE**3 / 1e9 / product_s, 1), "unpack_s": round(unpack_s, 2)}


def main(settings: Settings) -> None:
    check_out(settings.out)
    with tempfile.TemporaryDirectory() as folder:
        scan = write_scan(Path(folder), settings.slices)
        floor = floors(scan)
        runs = [start_cold(scan, Path(folder), settings) for _ in tqdm(range(settings.runs), unit="start")]
    runs.sort(key=lambda run: run[0]["exit"][1])
    start, case = runs[len(runs) // 2]
    told: dict[str, Any] = {
        "command": f"python -m benchmarks.cold_start --slices {settings.slices} --runs {settings.runs} "
        f"--device {settings.device} --engine {settings.engine} --weights {settings.weights}",
        "scan": [512, 512, settings.slices],
        "floors": floor,
        "total_s": [round(run[0]["exit"][1], 2) for run in runs],
        "spans_s": {stage: [round(moment, 3) for moment in span] for stage, span in {**start, **case}.items()},
    }
    write_results(settings.out, told, settings.device)
    draw(start, case, settings.out.with_suffix(".png"))
    print(f"cold start to mask: {told['total_s']} s, picture: {settings.out.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
