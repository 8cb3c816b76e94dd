"""Masks of lesions as files: voxels with their grid, compared before anything is measured."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    OverflowError,
    ImageFileError,
    HeaderDataError,
    WrapStructError,
)  # nibabel, of a file
WHOLE_FLOATS = "stored as floats"  # the one note of a mask that is read as it was meant
FOURTH_AXIS = "a fourth axis, at which the official script fails"
GRID_TOLERANCE_MM = 1e-2  # of any corner of the volume; headers keep float32


@dataclass(frozen=True)
class Mask:
    """voxels: uint8 by file axes (i, j, k), as the official script casts them; spacing_mm of the same axes.

    affine: (4, 4), voxel indices to RAS mm. notes: what was odd about the stored values, in words.
    """

    path: Path
    voxels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64]
    notes: tuple[str, ...] = ()

    @property
    def voxel_ml(self) -> float:
        return float(np.prod(self.spacing_mm)) / 1000


def read_mask(path: Path) -> Mask:
    """Read a mask. ValueError with one sentence that names the file and the mend.

    Stored values are cast by truncation, as the official script does (0.9999 → 0), which the notes tell.
    """
    try:
        image = nib.Nifti1Image.from_filename(path)
        stored = np.asanyarray(image.dataobj)
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read as a NIfTI mask: write it again") from error
    shape = stored.shape
    if len(shape) > 3 and all(n == 1 for n in shape[3:]):
        stored = stored.reshape(shape[:3])
    if stored.ndim != 3:
        raise ValueError(f"{path}: has the shape {stored.shape}: a mask must have three dimensions")
    if stored.dtype.kind not in "iufb":
        raise ValueError(f"{path}: holds {stored.dtype} voxels: a mask must hold numbers")
    spacing = [float(zoom) for zoom in image.header.get_zooms()[:3]]
    if not all(0 < length < np.inf for length in spacing):
        raise ValueError(f"{path}: its spacing {spacing} mm is not positive and finite: correct the header")
    notes = (*((FOURTH_AXIS,) if len(shape) > 3 else ()), *_notes(stored))
    return Mask(path, _cast(stored), (spacing[0], spacing[1], spacing[2]), np.asarray(image.affine, float), notes)


def _cast(stored: NDArray[Any]) -> NDArray[np.uint8]:
    """Truncation to uint8, in which 256 is 0 again and -1 is 255; what is not finite counts as 0."""
    if stored.dtype.kind == "f":
        stored = np.trunc(np.where(np.isfinite(stored), stored, 0)) % 256
    return np.ascontiguousarray(stored.astype(np.uint8))


def _notes(stored: NDArray[Any]) -> tuple[str, ...]:
    notes, unknown = [], np.isnan(stored)
    stored = np.where(unknown, 0, stored) if unknown.any() else stored
    if unknown.any():
        notes.append("values that are no number, which count as 0")
    if stored.size and stored.max() > 1:
        notes.append(f"labels above 1 (up to {stored.max():g})")
    if stored.size and stored.min() < 0:
        notes.append(f"negative labels (down to {stored.min():g})")
    if stored.dtype.kind == "f":
        whole = stored == np.trunc(stored)
        notes.append(WHOLE_FLOATS if whole.all() else "fractions, which are cut off (0.9999 counts as 0)")
    return tuple(notes)


def check_same_shape(prediction: Mask, reference: Mask) -> None:
    """ValueError that names both files where their arrays differ in shape."""
    if prediction.voxels.shape != reference.voxels.shape:
        raise ValueError(
            f"{prediction.path}: {prediction.voxels.shape} voxels, but {reference.path} has "
            f"{reference.voxels.shape}: write the mask on the scan's own grid"
        )


def check_same_grid(prediction: Mask, reference: Mask) -> None:
    """ValueError that names both files where shape or geometry differ: some corner lies elsewhere by over 0.01 mm."""
    check_same_shape(prediction, reference)
    apart = grid_distance_mm(prediction.affine, reference.affine, reference.voxels.shape)
    if not apart <= GRID_TOLERANCE_MM:
        raise ValueError(
            f"{prediction.path}: its grid differs from that of {reference.path} by up to {apart:.2f} mm: write the "
            "mask with the scan's own geometry (or compare by index with --ignore-geometry)"
        )


def grid_distance_mm(a: NDArray[np.float64], b: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """How far apart two affines place a corner voxel of a volume of `shape`, at most."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    difference = (a - b)[:3]
    return float(np.linalg.norm(difference[:, :3] @ corners + difference[:, 3:], axis=0).max())
