"""Kill the program at random moments: whatever lies in outputs afterwards must be whole and right.

    python -m benchmarks.kills --kills 50

Ten tiny scans, each time from an empty folder; then the same call with `--skip-existing` has to finish the rest. What
counts as right is what an undisturbed run wrote, byte for byte.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from benchmarks.command_line import run_main
from inference.weights import find_weights
from training.settings import refuse_less

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPES = [(40, 36, 4)] * 10
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


@dataclass(frozen=True)
class Settings:
    kills: int = 50
    seed: int = 0
    weights: str = "small"

    def __post_init__(self) -> None:
        refuse_less(self, {"kills": 1, "seed": 0})
        find_weights(self.weights)


def write_scans(folder: Path, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> None:
    """Bodies of 40 HU with noise, so many voxels (i, j, k) of 3×3×5 mm each."""
    folder.mkdir(parents=True)
    digits = len(str(len(shapes) - 1))  # in the order of their names, too
    for case, shape in enumerate(shapes):
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        body = np.where(sum(a**2 for a in axes) < 0.8, 40, -1000)
        hu = body + np.random.default_rng(case).normal(0, 10, shape)
        nib.save(
            nib.Nifti1Image(hu.astype(np.int16), np.diag([3.0, 3, 5, 1])), folder / f"c{case:0{digits}}_0000.nii.gz"
        )


def command(scans: Path, out: Path, weights: str, *options: str) -> list[str]:
    program = ["sh", str(REPOSITORY / "predict.sh"), str(scans), str(out)]
    return [*program, "--weights", weights, "--device", "cpu", *options]


def content(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def kill_once(call: Sequence[str], moment_s: float, kind: signal.Signals) -> bool:
    """Start the program and kill it after so many seconds; False where it had ended by then."""
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(moment_s)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, kind)
        process.wait(30)
        return True


def survive(scans: Path, folder: Path, weights: str, kills: int, seed: int) -> dict[str, int]:
    """How many kills met the program at work, and how many masks had been written by then. RuntimeError at a flaw."""
    start = time.monotonic()
    subprocess.run(command(scans, folder / "whole", weights), check=True, capture_output=True)
    lasts_s, expected = time.monotonic() - start, content(folder / "whole")
    rng, met, written = np.random.default_rng(seed), 0, 0
    for number in tqdm(range(kills), unit="kill"):
        out = folder / str(number)
        met += kill_once(command(scans, out, weights), rng.uniform(0.2, 1) * lasts_s, SIGNALS[number % 2])
        left = content(out)
        wrong = [name for name, found in left.items() if expected.get(name) != found]
        if wrong:
            raise RuntimeError(f"kill {number} of seed {seed} left {wrong} in {out}")
        written += len(left)
        subprocess.run(command(scans, out, weights, "--skip-existing"), check=True, capture_output=True)
        if content(out) != expected:
            raise RuntimeError(f"after kill {number} of seed {seed} a second run did not finish what was left")
    return {"kills": kills, "met_at_work": met, "masks_before_kills": written}


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_scans(Path(folder) / "scans")
        print(survive(Path(folder) / "scans", Path(folder), settings.weights, settings.kills, settings.seed))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
