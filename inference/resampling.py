"""Linear resampling of one axis as a small dense matrix; images and volumes are resampled axis by axis with it.

A matrix product says exactly what happens to a voxel, runs on any device, and its size is that of one slice.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray


def axis_matrix(
    size_in: int, spacing_in: float, size_out: int, spacing_out: float, outside: Literal["edge", "zero"] = "edge"
) -> NDArray[np.float32]:
    """(size_out, size_in) matrix that resamples an axis; both grids share the centre of their fields.

    spacing_in, spacing_out: voxel sizes in the same unit. Where the output is coarser, the triangle filter is widened
    to the output's spacing (antialiasing, as torch's and PIL's "bilinear"), else it is plain linear interpolation.
    outside: "edge" repeats the border voxel's value, "zero" counts what lies beyond the input's field as 0.
    """
    ratio = spacing_out / spacing_in
    position = (np.arange(size_out, dtype=float) + 0.5 - size_out / 2) * ratio + size_in / 2 - 0.5
    if outside == "edge":
        position = np.clip(position, 0, size_in - 1)
    reach = max(ratio, 1.0)
    weights = np.abs(position[:, None] - np.arange(size_in))  # in place from here on: of a long axis it is large
    weights /= reach
    np.subtract(1, weights, out=weights)
    np.maximum(0.0, weights, out=weights)
    total = weights.sum(axis=1, keepdims=True) if outside == "edge" else _full_weight(position, reach)
    weights /= total
    return weights.astype(np.float32)


def nearest(size_in: int, spacing_in: float, size_out: int, spacing_out: float) -> NDArray[np.intp]:
    """For each output voxel the nearest input voxel, (size_out,): what labels are resampled with."""
    return axis_matrix(size_in, spacing_in, size_out, spacing_out).argmax(axis=1)


def _full_weight(position: NDArray[np.floating], reach: float) -> NDArray[np.floating]:
    """Sum of each row's filter over all integers, those beyond the input included; shape (rows, 1)."""
    span = np.arange(-int(np.ceil(reach)) - 1, int(np.ceil(reach)) + 2)
    offset = position[:, None] - np.round(position)[:, None]
    return np.maximum(0.0, 1 - np.abs(offset - span) / reach).sum(axis=1, keepdims=True)
