"""The axial slice of a case in which its masks are largest, cut from the files for drawing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray

from .masks import UNREADABLE, check_same_shape, read_mask


@dataclass(frozen=True)
class Overlay:
    """Arrays are (rows, columns): front at the top, the patient's right on the left; spacing_mm (row, column).

    hu is None where there is no usable scan. slice_number counts from 1 at the feet, out of `slices`.
    """

    hu: NDArray[np.float32] | None
    reference: NDArray[np.bool_]
    prediction: NDArray[np.bool_]
    spacing_mm: tuple[float, float]
    slice_number: int
    slices: int


def cut_overlay(prediction: Path, reference: Path, scan: Path | None) -> Overlay:
    """Cut the slice where the union of both masks is largest.

    ValueError where a mask cannot be read, both are empty, or the reference's axes have no direction.
    A scan that is not there, cannot be read or has another shape is left out: the masks alone say where they differ.
    """
    found, truth = read_mask(prediction), read_mask(reference)
    check_same_shape(found, truth)
    if np.isnan(io_orientation(truth.affine)).any():
        raise ValueError(f"{reference}: its affine gives its axes no direction: correct the header")
    first, second = _canonical(truth.voxels, truth.affine) == 1, _canonical(found.voxels, truth.affine) > 0
    area = (first | second).sum(axis=(0, 1))
    if not area.any():
        raise ValueError(f"{prediction}: neither it nor its reference holds a lesion")
    k = int(area.argmax())
    voxels = None if scan is None else _read_scan(scan, truth.voxels.shape)
    hu = None if voxels is None else _axial(_canonical(voxels, truth.affine), k).astype(np.float32)
    # Canonical axes are i, j, k of the file in another order, and so are their spacings.
    order = np.argsort(io_orientation(truth.affine)[:, 0])
    spacing = np.array(truth.spacing_mm)[order]
    return Overlay(hu, _axial(first, k), _axial(second, k), (spacing[1], spacing[0]), k + 1, len(area))


def image_size(*paths: Path) -> tuple[int, ...] | None:
    """Voxels by file axes of the first of these images that can be read, from its header alone."""
    for path in paths:
        try:
            return tuple(int(size) for size in nib.Nifti1Image.from_filename(path).shape[:3])
        except UNREADABLE:
            continue
    return None


def _read_scan(path: Path, shape: tuple[int, ...]) -> NDArray[Any] | None:
    try:
        image = nib.Nifti1Image.from_filename(path)
        return np.asanyarray(image.dataobj) if image.shape == shape else None
    except UNREADABLE:
        return None


def _canonical(voxels: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """Axes flipped and swapped so that they run to the patient's right, front and head."""
    return apply_orientation(voxels, io_orientation(affine))


def _axial(voxels: NDArray[Any], k: int) -> NDArray[Any]:
    return voxels[::-1, ::-1, k].T
