"""Normalised surface Dice (NSD) in the surface-element form of DeepMind's `surface-distance`, exact and fast.

A surface element (surfel) sits at each corner of the voxel grid whose 2×2×2 voxels are not all alike; its area comes
from the package's own table. NSD = (area of the reference's surfels within the tolerance of the prediction's + the
converse) / (area of both). The package measures distances by two distance transforms of the whole box; here only the
offsets within the tolerance are looked at, only from surfels, nearest first. Whether an offset is within the tolerance
is decided by the same float64 arithmetic as the package's, so exact ties (2.000 mm) fall alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from surface_distance.lookup_tables import ENCODE_NEIGHBOURHOOD_3D_KERNEL, create_table_neighbour_code_to_surface_area

FULL = 255  # the code of eight voxels inside

Box = tuple[slice, slice, slice]
Spacing = tuple[float, float, float]


def surface_dice(a: NDArray[np.bool_], b: NDArray[np.bool_], spacing_mm: Spacing, tolerance_mm: float) -> float:
    """NSD of two masks of equal shape (i, j, k), spacing_mm of the same axes. NaN where both are empty; 0 where one is.

    Source: Nikolov et al. 2018 (arXiv:1809.04430), `compute_surface_dice_at_tolerance`.
    """
    box = bounding_box(a | b)
    if box is None:
        return float("nan")
    offsets = _offsets(spacing_mm, tolerance_mm)
    margin = np.abs(offsets).max(axis=0)
    area = create_table_neighbour_code_to_surface_area(spacing_mm)
    surfaces = [_Surface.of(mask[box], margin, area) for mask in (a, b)]
    first, second = surfaces
    near = first.area_near(second, offsets) + second.area_near(first, offsets)
    return float(near / (first.area.sum() + second.area.sum()))


def bounding_box(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest box that holds all of `mask`; None where it is empty."""
    sides = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(used):
            return None
        sides.append(slice(int(used[0]), int(used[-1]) + 1))
    return sides[0], sides[1], sides[2]


@dataclass(frozen=True)
class _Surface:
    """Surfels of one mask. grid: where they are (bool), with a margin; index: their places in `grid`'s flat order."""

    grid: NDArray[np.bool_]
    index: NDArray[np.intp]
    area: NDArray[np.float64]

    @classmethod
    def of(cls, mask: NDArray[np.bool_], margin: NDArray[np.intp], area: NDArray[np.float64]) -> _Surface:
        codes = _codes(mask)
        padded = np.pad(codes, [(m, m) for m in margin])
        grid = (padded != 0) & (padded != FULL)
        index = np.flatnonzero(grid)
        return cls(grid, index, area[padded.ravel()[index]])

    def area_near(self, other: _Surface, offsets: NDArray[np.intp]) -> float:
        """Area of the surfels that have one of `other` at some offset; each is looked at until one is found."""
        steps = offsets @ (np.array(self.grid.strides) // self.grid.itemsize)
        there = other.grid.ravel()
        waiting = np.arange(len(self.index))
        for step in steps:
            waiting = waiting[~there[self.index[waiting] + step]]
            if not len(waiting):
                break
        near = np.ones(len(self.index), bool)
        near[waiting] = False
        return float(self.area[near].sum())


def _codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Which of the eight voxels about each corner are inside, as bits; one corner more than voxels along each axis."""
    padded = np.pad(mask, 1).astype(np.uint8)
    sides = [n - 1 for n in padded.shape]
    codes = np.zeros(sides, np.uint8)
    for place, bit in np.ndenumerate(ENCODE_NEIGHBOURHOOD_3D_KERNEL):
        codes |= padded[tuple(slice(p, p + n) for p, n in zip(place, sides, strict=True))] * np.uint8(bit)
    return codes


def _offsets(spacing_mm: Spacing, tolerance_mm: float) -> NDArray[np.intp]:
    """All voxel offsets (n, 3) within the tolerance, nearest first."""
    reach = [int(tolerance_mm / spacing) + 1 for spacing in spacing_mm]
    offsets = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij"), -1).reshape(-1, 3)
    distance = np.sqrt(np.add.reduce((offsets * np.asarray(spacing_mm, float)) ** 2, axis=1))
    near = distance <= tolerance_mm
    return offsets[near][np.argsort(distance[near], kind="stable")]
