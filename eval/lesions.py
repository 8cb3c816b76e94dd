"""Lesion-wise detection: which lesions of the reference were found, which of the prediction are false.

Lesions are connected components by 26 neighbours. As in detection scores of the field (autoPET, MSD), any overlap of a
voxel counts: a reference lesion is found where the prediction touches it, and a predicted lesion is a false positive
where it touches no reference lesion. Overlap does not pair lesions one to one: a predicted one may find several.
"""

from __future__ import annotations

from typing import NamedTuple

import cc3d
import numpy as np
from numpy.typing import NDArray

from .surface import bounding_box


class Detection(NamedTuple):
    """Counts of components: `lesions` in the reference, `found` of them; `predicted`, `false` of them."""

    lesions: int
    found: int
    predicted: int
    false: int


def detect(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Detection:
    """Compare two masks of equal shape (i, j, k)."""
    box = bounding_box(prediction | reference)
    if box is None:
        return Detection(0, 0, 0, 0)
    prediction, reference = prediction[box], reference[box]
    lesions, found = _touched(reference, prediction)
    predicted, true = _touched(prediction, reference)
    return Detection(lesions, found, predicted, predicted - true)


def _touched(mask: NDArray[np.bool_], by: NDArray[np.bool_]) -> tuple[int, int]:
    """Components of `mask`, and how many of them share a voxel with `by`."""
    # uint8: given bools, cc3d 4.1.1 reserves too few labels for volumes of odd size and fails
    labels, count = cc3d.connected_components(mask.astype(np.uint8), connectivity=26, return_N=True)
    return int(count), len(np.setdiff1d(np.unique(labels[by]), [0]))
