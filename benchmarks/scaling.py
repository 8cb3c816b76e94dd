"""Time and memory of a cold start against the number of slices, and of a process against its number of cases.

    python -m benchmarks.scaling

Scans are those of `benchmarks.cold_start`: 512×512 voxels a slice, a trunk of 750 mm at most, so that many slices are
thinner ones, and the networks' work grows more slowly than their number. Peak memory is the kernel's count.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from tqdm import tqdm

from benchmarks.cold_start import write_scan
from benchmarks.command_line import run_main
from benchmarks.kills import command
from benchmarks.results_file import check_out, write_results
from inference.weights import find_weights
from training.settings import refuse_less

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOUR = "#2a78b5"
# Runs a program and prints its peak memory in KiB. Such a peak counts from before a process became its program, when it
# was a copy of the one that started it: of this one with its phantoms. So a small one starts it.
COUNTING = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code if code >= 0 else 128 - code)"""  # as a shell tells a signal


@dataclass(frozen=True)
class Settings:
    slices: tuple[int, ...] = (50, 100, 200, 500, 1059)
    cases: tuple[int, ...] = (1, 2, 4)  # a process, of the fewest slices
    weights: str = "small"
    out: Path = Path("benchmarks/results/scaling.json")  # and a picture beside it

    def __post_init__(self) -> None:
        refuse_less(self, {"slices": 1, "cases": 1})
        find_weights(self.weights)


def peak_mib(printed: str) -> int:
    """Of what a program printed under `COUNTING`."""
    return int(printed.split()[-1]) // 2**10


def measure(scans: Path, out: Path, weights: str) -> dict[str, float]:
    """Wall time and peak memory of one process. RuntimeError where it fails."""
    start = time.monotonic()
    counted = [sys.executable, "-S", "-c", COUNTING, *command(scans, out, weights)]
    done = subprocess.run(counted, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
        raise RuntimeError(f"{scans}: the program ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"seconds": round(seconds, 1), "peak_mib": peak_mib(done.stdout)}


def by_slices(settings: Settings, folder: Path) -> dict[int, dict[str, float]]:
    found = {}
    for slices in tqdm(settings.slices, unit="scan"):
        scan = write_scan(folder / str(slices), slices)
        found[slices] = measure(scan.parent, folder / f"out {slices}", settings.weights)
    return found


def by_cases(settings: Settings, folder: Path) -> dict[int, dict[str, float]]:
    found, scan = {}, write_scan(folder / "one", min(settings.slices))
    for count in tqdm(settings.cases, unit="process"):
        scans = folder / f"{count} cases"
        scans.mkdir()
        for case in range(count):
            shutil.copy(scan, scans / f"{case}_0000.nii.gz")
        found[count] = measure(scans, folder / f"out {count} cases", settings.weights)
    return found


def draw(told: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(9, 5), layout="constrained", sharex="col")
    for column, (kind, label) in enumerate((("slices", "slices"), ("cases", "cases a process"))):
        counts = list(told[kind])
        for row, (value, unit) in enumerate((("seconds", "s"), ("peak_mib", "peak memory, MiB"))):
            panel, values = panels[row][column], [told[kind][count][value] for count in counts]
            panel.plot(counts, values, "o-", color=COLOUR)
            panel.set(ylabel=unit, ylim=(0, 1.1 * max(values)), xlim=(0, None))
            panel.spines[["top", "right"]].set_visible(False)
        panels[1][column].set_xlabel(label)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(settings: Settings) -> None:
    check_out(settings.out)
    with tempfile.TemporaryDirectory() as folder:
        found = {"slices": by_slices(settings, Path(folder)), "cases": by_cases(settings, Path(folder))}
    told: dict[str, Any] = {
        "command": "python -m benchmarks.scaling",
        "slices_of_the_cases": min(settings.slices),
        **found,
    }
    write_results(settings.out, told)
    draw(told, settings.out.with_suffix(".png"))
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
