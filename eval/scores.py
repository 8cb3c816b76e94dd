"""DSC and NSD of one case by the official rules, in the official order and rounding.

Source: the FLARE organisers' evaluation script for task 1, label 1 = lesion.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .surface import Spacing, surface_dice

TOLERANCE_MM = 2.0
LEAST_DSC = 0.2  # below it, the NSD is not measured but 0
DECIMALS = 4


class Score(NamedTuple):
    """Both in 0 … 1, rounded to four decimals."""

    dsc: float
    nsd: float


def score(
    prediction: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    spacing_mm: Spacing,
    tolerance_mm: float = TOLERANCE_MM,
) -> Score:
    """Score two label arrays of equal shape (i, j, k); spacing_mm: the reference's, of the same axes."""
    if prediction.size and prediction.max() > 1:
        return Score(0.0, 0.0)
    found, true = prediction == 1, reference == 1
    if not found.any() and not true.any():
        return Score(1.0, 1.0)
    if not found.any() or not true.any():
        return Score(0.0, 0.0)
    dsc = dice(found, true)
    nsd = 0.0 if dsc < LEAST_DSC else surface_dice(found, true, spacing_mm, tolerance_mm)
    # not Python's round, which looks at the digits beyond a float's: half-way cases differ
    return Score(float(np.round(dsc, DECIMALS)), float(np.round(nsd, DECIMALS)))


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """2|A∩B| / (|A| + |B|); NaN where both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else float("nan")
