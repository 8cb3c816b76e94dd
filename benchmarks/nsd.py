"""How fast the NSD is against DeepMind's package, on one 512×512×300 case with three lesions, in one run.

python -m benchmarks.nsd --out benchmarks/results/nsd.json
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.command_line import run_main
from benchmarks.results_file import check_out, write_results
from eval.surface import Spacing, surface_dice
from training.settings import refuse_less

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance

SHAPE, SPACING_MM, TOLERANCE_MM = (512, 512, 300), (0.8, 0.8, 1.5), 2.0
CENTRES_RADII_MM = (((150, 200, 120), 25.0), ((250, 180, 300), 12.0), ((330, 260, 380), 6.0))
"""Of three lesions spread over the trunk, (i, j, k) in mm."""


@dataclass(frozen=True)
class Settings:
    out: Path = Path("benchmarks/results/nsd.json")
    runs: int = 5  # of each, in turn

    def __post_init__(self) -> None:
        refuse_less(self, {"runs": 1})


def lesions(shift_mm: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Three balls with uneven surfaces, moved along the first axis; bool (i, j, k)."""
    mask = np.zeros(SHAPE, bool)
    for centre, radius in CENTRES_RADII_MM:
        low = [int((c - 2 * radius) / s) for c, s in zip(centre, SPACING_MM, strict=True)]
        size = [int(4 * radius / s) for s in SPACING_MM]
        axes = np.meshgrid(*[np.arange(n) + start for n, start in zip(size, low, strict=True)], indexing="ij")
        moved = np.array(centre) + np.array([shift_mm, 0, 0])
        distance = np.sqrt(sum((a * s - c) ** 2 for a, s, c in zip(axes, SPACING_MM, moved, strict=True)))
        rough = gaussian_filter(rng.standard_normal(size), 2)
        box = tuple(slice(start, start + n) for start, n in zip(low, size, strict=True))
        mask[box] |= distance + 0.15 * radius * rough / rough.std() < radius
    return mask


def peer(a: NDArray[np.bool_], b: NDArray[np.bool_], spacing_mm: Spacing, tolerance_mm: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distances = surface_distance.compute_surface_distances(a, b, spacing_mm)
    return float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm))


def timed(function: Callable[..., float], *arguments: Any) -> tuple[float, float]:
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


def main(settings: Settings) -> None:
    check_out(settings.out)
    rng = np.random.default_rng(0)
    case = (lesions(0.0, rng), lesions(1.5, rng), SPACING_MM, TOLERANCE_MM)
    pairs = [(timed(surface_dice, *case), timed(peer, *case)) for _ in range(settings.runs)]
    result = {
        "command": "python -m benchmarks.nsd",
        "shape": SHAPE,
        "ours_s": median(ours for (ours, _), _ in pairs),
        "surface_distance_s": median(theirs for _, (theirs, _) in pairs),
        "ratio": median(theirs / ours for (ours, _), (theirs, _) in pairs),
        "nsd": pairs[0][0][1],
        "difference": abs(pairs[0][0][1] - pairs[0][1][1]),
    }
    write_results(settings.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
