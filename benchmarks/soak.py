"""Many cases in one process: its memory and its open files must not grow.

    python -m benchmarks.soak --cases 300

The scans are of ten sizes, in turn. Memory is looked at from outside while the program works; the drift is that of the
last cases' mean peak over that of the first ones after twenty.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import psutil
from tqdm import tqdm

from benchmarks.command_line import run_main
from benchmarks.kills import command, write_scans
from benchmarks.results_file import check_out, write_results
from inference.weights import find_weights

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = [(40 + 8 * n, 36 + 4 * n, 3 + n) for n in range(10)]  # voxels (i, j, k)
WARM_UP = 20  # cases
PERIOD_S = 0.02


@dataclass(frozen=True)
class Settings:
    cases: int = 300
    weights: str = "small"
    out: Path = Path("benchmarks/results/soak.json")  # and a picture beside it

    def __post_init__(self) -> None:
        compared(self.cases)
        find_weights(self.weights)


class Look(NamedTuple):
    """done: cases; mib: resident memory; files: open ones."""

    done: int
    mib: float
    files: int


def watch(call: list[str], out: Path, cases: int) -> list[Look]:
    """Run the program and look at it until it ends. RuntimeError where it fails or a mask is missing."""
    looks: list[Look] = []
    with (
        subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process,
        tqdm(total=cases, unit="case") as bar,
    ):
        program = psutil.Process(process.pid)
        while process.poll() is None:
            done = len(list(out.glob("*.nii.gz")))
            try:
                looks.append(Look(done, program.memory_info().rss / 2**20, program.num_fds()))
            except psutil.Error:  # it ended meanwhile
                break
            bar.update(done - bar.n)
            time.sleep(PERIOD_S)
        said = process.communicate()[1]
    if process.returncode or len(list(out.glob("*.nii.gz"))) != cases:
        raise RuntimeError(f"the program ended with {process.returncode}: {said.decode().strip()}")
    return looks


def compared(cases: int) -> int:
    """How many of the first and of the last cases are compared: a multiple of the sizes, about a tenth of all.

    ValueError where that is more than there are.
    """
    share = max(1, (cases - WARM_UP) // 10 // len(SIZES)) * len(SIZES)
    if WARM_UP + 2 * share > cases:
        raise ValueError(f"--cases {cases}: too few to tell a drift after the first {WARM_UP}: give 100 or more")
    return share


def drift(looks: list[Look], cases: int) -> dict[str, float]:
    """Growth of memory and of open files from the first cases after the warm-up to the last ones.

    Of each case its peak counts, whatever time it took. RuntimeError where too little was looked at.
    """
    share = compared(cases)
    early = [look for look in looks if WARM_UP <= look.done < WARM_UP + share]
    late = [look for look in looks if cases - share <= look.done < cases]
    if not early or not late:
        raise RuntimeError("the program was not looked at among its first or its last cases")
    mib = [mean_peak(part) for part in (early, late)]
    files = [max(look.files for look in part) for part in (early, late)]
    return {
        "early_mib": round(mib[0], 1),
        "late_mib": round(mib[1], 1),
        "drift_percent": round(100 * (mib[1] / mib[0] - 1), 2),
        "more_files": files[1] - files[0],
    }


def mean_peak(looks: list[Look]) -> float:
    """Over the cases."""
    peaks: dict[int, float] = {}
    for look in looks:
        peaks[look.done] = max(look.mib, peaks.get(look.done, 0.0))
    return float(np.mean(list(peaks.values())))


def draw(looks: list[Look], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axis.plot([look.done for look in looks], [look.mib for look in looks], ".", color="#2a78b5", markersize=3)
    axis.set(xlabel="cases done", ylabel="resident memory (MiB)", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(settings: Settings) -> None:
    check_out(settings.out)
    with tempfile.TemporaryDirectory() as folder:
        scans, out = Path(folder) / "scans", Path(folder) / "out"
        write_scans(scans, [SIZES[case % len(SIZES)] for case in range(settings.cases)])
        began = time.monotonic()
        looks = watch(command(scans, out, settings.weights), out, settings.cases)
    told: dict[str, Any] = {
        "command": f"python -m benchmarks.soak --cases {settings.cases}",
        "cases": settings.cases,
        "seconds": round(time.monotonic() - began, 1),
        **drift(looks, settings.cases),
    }
    write_results(settings.out, told)
    draw(looks, settings.out.with_suffix(".png"))
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
