"""From HU to the slices that the hybrid network sees, and its probabilities back to the scan's grid.

Arrays are (z, y, x) in canonical orientation. Plane and resizing are properties of the weights.
Source: SAMCancer §2 (window, 256×256, five-slice windows); `square` is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .hybrid.config import IMAGE_SIZE
from .resampling import axis_matrix

Plane = Literal["axial", "coronal", "sagittal"]
Resize = Literal["stretch", "square"]

TISSUE_WINDOW_HU = (-200.0, 300.0)
LUNG_WINDOW_HU = (-1300.0, 300.0)
SLICE_MM = 3.5  # thinner slices are put together to about that, unless a training asks for others
SQUARE_FIELD_MM = 300.0  # the least field of a `square` slice, so that a limb and an abdomen have like scales


def window(hu: NDArray, low_high_hu: tuple[float, float] = TISSUE_WINDOW_HU) -> NDArray[np.float32]:
    """HU → [0, 1], linear between the window's ends and clipped outside; any shape."""
    low, high = low_high_hu
    return np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1)


def thicken(hu: NDArray[np.int16], axis: int, step: int) -> NDArray[np.int16]:
    """Means of `step` neighbouring slices along an axis; the last one of what is left."""
    if step == 1:
        return hu
    slices, shape = np.moveaxis(hu, axis, 0), list(hu.shape)
    shape[axis] = -(-shape[axis] // step)
    thick = np.empty(shape, np.int16)
    for index, mean in enumerate(np.moveaxis(thick, axis, 0)):
        mean[:] = np.rint(slices[index * step : (index + 1) * step].mean(axis=0))
    return thick


def thin_matrix(count: int, step: int) -> NDArray[np.float32]:
    """(count, ⌈count / step⌉) matrix that interpolates linearly from the means of `thicken` back to the slices."""
    thick = -(-count // step)
    position = np.clip((np.arange(count) + 0.5) / step - 0.5, 0, thick - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(thick))).astype(np.float32)


@dataclass(frozen=True)
class SliceGrid:
    """Where the 256×256 slices of one scan lie.

    shape, spacing_mm: of the scan, (z, y, x). `stretch` maps each slice's own field onto 256×256 (the paper's);
    `square` keeps the physical aspect: the longer side of the field, at least 300 mm, spans 256 pixels, and air fills
    the rest.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    plane: Plane = "axial"
    resize: Resize = "square"

    def __post_init__(self) -> None:
        if self.plane not in get_args(Plane) or self.resize not in get_args(Resize):
            raise ValueError(f"unknown plane or resizing: {self.plane}, {self.resize}")

    @property
    def axis(self) -> int:
        """The array axis that counts the slices."""
        return get_args(Plane).index(self.plane)

    def __len__(self) -> int:
        return self.shape[self.axis]

    def __getitem__(self, index: int) -> tuple[slice | int, ...]:
        """Array index of one slice of the scan."""
        return tuple(index if axis == self.axis else slice(None) for axis in range(3))

    @cached_property
    def _matrices(self) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """For rows and columns: the matrix to 256 pixels and the one back."""
        sizes = [self.shape[axis] for axis in range(3) if axis != self.axis]
        spacings = [self.spacing_mm[axis] for axis in range(3) if axis != self.axis]
        fields = [size * spacing for size, spacing in zip(sizes, spacings, strict=True)]
        if self.resize == "square":
            fields = [max(*fields, SQUARE_FIELD_MM)] * 2
        pairs = []
        for size, spacing, field in zip(sizes, spacings, fields, strict=True):
            pixel = field / IMAGE_SIZE
            there = axis_matrix(size, spacing, IMAGE_SIZE, pixel, "zero" if self.resize == "square" else "edge")
            pairs.append((there, axis_matrix(IMAGE_SIZE, pixel, size, spacing)))
        return pairs

    def cut(
        self, hu: NDArray[np.int16], start: int, stop: int, low_high_hu: tuple[float, float] = TISSUE_WINDOW_HU
    ) -> NDArray[np.float32]:
        """Slices start … stop − 1 in [0, 1], shape (stop − start, 256, 256); beyond the scan its edge is repeated."""
        indices = np.clip(np.arange(start, stop), 0, len(self) - 1)
        return np.stack([self.resample(window(hu[self[i]], low_high_hu)) for i in indices])

    def resample(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """One slice on the scan's grid → (256, 256); air (0) outside the field where the resizing is `square`."""
        (rows, _), (columns, _) = self._matrices
        return np.asarray(rows @ image @ columns.T)

    def resample_labels(self, labels: NDArray[np.uint8], outside: int = 0) -> NDArray[np.uint8]:
        """As `resample`, but each pixel takes the label of its nearest voxel, or `outside` the field that one."""
        (rows, _), (columns, _) = self._matrices
        inside = np.logical_and.outer(rows.any(axis=1), columns.any(axis=1))
        return np.where(inside, labels[np.ix_(rows.argmax(axis=1), columns.argmax(axis=1))], outside).astype(np.uint8)

    def restore(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """(256, 256) → one slice on the scan's own grid."""
        (_, rows), (_, columns) = self._matrices
        return np.asarray(rows @ image @ columns.T)

    def restore_axial(self, images: NDArray[np.float16], z: int) -> NDArray[np.float32]:
        """Axial slice z (y, x) of images (slices, 256, 256) cut along another plane, in which z runs down the rows."""
        (_, rows), (_, columns) = self._matrices
        used = np.flatnonzero(rows[z])  # two rows of each image at most
        lines = np.einsum("r,src->sc", rows[z, used], images[:, used].astype(np.float32)) @ columns.T
        return lines if self.plane == "coronal" else lines.T


def thick_grid(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], plane: Plane, resize: Resize, least_mm: float
) -> tuple[SliceGrid, int]:
    """The grid of a scan (z, y, x) whose slices are put together to `least_mm`, or hardly less, and how many make one.

    Slices that are as far apart already stay as they are.
    """
    axis = get_args(Plane).index(plane)
    step = max(1, math.ceil(least_mm / spacing_mm[axis] - 0.2))
    thick, apart = list(shape), list(spacing_mm)
    thick[axis], apart[axis] = -(-shape[axis] // step), step * spacing_mm[axis]
    return SliceGrid((thick[0], thick[1], thick[2]), (apart[0], apart[1], apart[2]), plane, resize), step
