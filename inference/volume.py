"""A CT scan and its geometry: read, orient, crop to the body, write a mask back onto the very same grid.

Arrays are (z, y, x) in canonical orientation: z feet to head, y anterior to posterior, x right to left (LPS, the
identity direction of ITK). Orienting permutes and flips axes and never resamples. A NIfTI file's header goes back bit
for bit, so that directions which are not quite orthonormal (ITK refuses them) are kept as they were; for MHA and NRRD
one is made.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cc3d
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .atomic import write_whole
from .files import HEADER_BYTES, LPS_TO_RAS, MAX_VOXELS, Image, open_nifti
from .limits import room_mib

AIR_HU = -1024  # padding below this is clipped
LEAST_BELOW_WATER = 0.01  # of a scan's voxels: fat, lung, air; without its rescale intercept, noise has a few
LEAST_RANGE_HU = 50  # of a scan: fat and muscle alone are further apart
BODY_HU = -500  # between air and fat
NIFTI_SUFFIXES = (".nii.gz", ".nii")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".nrrd")
CHANNEL_SUFFIX = "_0000"
TEXTS = ("data_type", "db_name", "intent_name", "descrip", "aux_file")  # of a NIfTI header
GZIP_BITS = 31  # zlib's largest window, in gzip's wrapping
SINGULAR = 1e-4  # of the volume of the unit cell over the product of its edges
SPATIAL_UNIT = 0b111  # the bits of NIfTI's xyzt_units that say metres, millimetres or microns
UNIT_MM = {1: 1000.0, 3: 0.001}  # metres and microns; all else counts as mm, as in ITK
Voxel = TypeVar("Voxel", bound=np.generic)
LARGEST_FIELD_MM, LARGEST_WIDTH_MM = 2500.0, 1000.0  # of the longest side, and of the next: a body and its scanner
SPACING_MM = (0.01, 25.0)  # what lies beyond is a wrong one, too; the networks' time and memory go by millimetres


class MaskError(OSError):
    """A mask cannot be written: one sentence that names it and the mend."""


@dataclass(frozen=True)
class Geometry:
    """The grid of a scan, and how its file lays it out.

    shape: voxels (z, y, x), canonical; spacing_mm: (z, y, x). voxel_ml: less than their product where the axes are not
    perpendicular, as of a tilted gantry.
    axes: for each canonical axis z, y, x, the file's axis; flips: whether it runs the other way there.
    header: the NIfTI header that masks are written with (the input's own, where it is NIfTI).
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    voxel_ml: float
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    header: nib.Nifti1Header

    def to_canonical(self, array: NDArray[Any]) -> NDArray[Any]:
        """File axes (i, j, k) → canonical (z, y, x); a view."""
        return array.transpose(self.axes)[self._flips]

    def to_file(self, array: NDArray[Any]) -> NDArray[Any]:
        """Canonical (z, y, x) → file axes (i, j, k); a view."""
        return array[self._flips].transpose(np.argsort(self.axes))

    @property
    def _flips(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)


@dataclass(frozen=True)
class Volume:
    """hu: int16 (z, y, x), canonical, contiguous; box: where the body is in it."""

    hu: NDArray[np.int16]
    geometry: Geometry
    box: tuple[slice, slice, slice]

    @property
    def body(self) -> NDArray[np.int16]:
        return self.hu[self.box]

    @property
    def doubt(self) -> str:
        """Why these are hardly HU of a body, and the mend; "" where they may be. Looked at as `body_box` does."""
        looked_at = _coarse(self.hu)
        if np.mean((looked_at > AIR_HU) & (looked_at < 0)) < LEAST_BELOW_WATER:
            return "holds hardly anything from -1023 to -1, as HU of lung and fat: export it with its rescale intercept"
        if np.ptp(looked_at) < LEAST_RANGE_HU:
            return f"holds {looked_at.min()} to {looked_at.max()}, which are no HU of a body: export it again"
        return ""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return self.geometry.spacing_mm


def voxel_volume_ml(spacing_mm: tuple[float, float, float]) -> float:
    """Of a voxel whose edges are perpendicular; `Geometry.voxel_ml` knows of any."""
    return math.prod(spacing_mm) / 1000


def is_scan(path: Path) -> bool:
    """Whether the name ends as a scan's does; hidden files are none."""
    return path.name.lower().endswith(SCAN_SUFFIXES) and not path.name.startswith(".")


def case_name(path: Path) -> str:
    """`X_0000.nii.gz` → `X`; the same for the other suffixes, and without `_0000`."""
    suffix = next((s for s in SCAN_SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)].removesuffix(CHANNEL_SUFFIX)


def output_names(case: str) -> tuple[str, str]:
    """File names of a case's mask and probability."""
    return f"{case}.nii.gz", f"{case}_probability.nii.gz"


def read_volume(path: Path, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read a CT scan of HU. ValueError with one sentence that names the file and the mend."""
    hu, geometry = _read(path, np.int16, _to_hu, max_voxels)
    if hu.min() == hu.max():
        raise ValueError(f"{path}: every voxel is {hu.flat[0]}, so it holds no HU: export the scan again")
    return Volume(hu, geometry, body_box(hu))


def read_label(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """Read labels, whole numbers from 0 to 255 or ValueError, on the grid of their scan, canonical (z, y, x)."""
    max_voxels = max(MAX_VOXELS, math.prod(geometry.shape))
    label, own = _read(path, np.uint8, _to_labels, max_voxels)
    if own.shape != geometry.shape or not np.allclose(
        own.header.get_best_affine(), geometry.header.get_best_affine(), atol=1e-3
    ):
        raise ValueError(f"{path}: not on the grid of its scan: resample it to the scan's")
    return label


def _to_labels(path: Path, block: NDArray[Any]) -> NDArray[np.uint8]:
    with np.errstate(invalid="ignore"):  # what is not finite is found by the comparison
        labels = block.astype(np.uint8)
    if not np.array_equal(labels, block):
        raise ValueError(
            f"{path}: holds labels that are no whole numbers from 0 to 255: write the mask anew, as 0 and 1"
        )
    return labels


def _read(
    path: Path,
    data_type: type[Voxel],
    convert: Callable[[Path, NDArray[Any]], NDArray[Any]],
    max_voxels: int = MAX_VOXELS,
) -> tuple[NDArray[Voxel], Geometry]:
    """Voxels (z, y, x), canonical and contiguous, each block of the file converted as it is read; their geometry."""
    with _opener(path)(path, max_voxels) as image:
        geometry = _geometry(path, image.header, image.shape)
        room_mib(path, geometry.shape)  # refuses what no memory is there for
        voxels = np.empty(geometry.shape, data_type)
        by_file = geometry.to_file(voxels)  # a view
        for place, block in image.blocks:
            by_file[place] = convert(path, block)
    return voxels, geometry


def _opener(path: Path) -> Callable[[Path, int], AbstractContextManager[Image]]:
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return open_nifti
    if is_scan(path):
        from .text_headers import open_mha_or_nrrd  # only where it is needed: start-up time counts

        return open_mha_or_nrrd
    raise ValueError(f"{path}: not a scan by its name: use one of {', '.join(SCAN_SUFFIXES)}")


# --- geometry and voxels --------------------------------------------------------------------------------------------


def _geometry(path: Path, header: nib.Nifti1Header, shape: tuple[int, int, int]) -> Geometry:
    zooms = np.asarray(header["pixdim"][1:4], float)
    if not np.all(np.isfinite(zooms)) or zooms.min() <= 0:
        raise ValueError(f"{path}: its spacing {tuple(zooms.tolist())} mm is not positive: correct the header")
    unit_mm = UNIT_MM.get(int(header["xyzt_units"]) & SPATIAL_UNIT, 1.0)
    best = np.asarray(header.get_best_affine(), float)
    affine = unit_mm * best[:3, :3]
    lengths = np.linalg.norm(affine, axis=0)
    if not np.all(np.isfinite(affine)) or abs(np.linalg.det(affine)) <= SINGULAR * np.prod(lengths):
        raise ValueError(f"{path}: its direction is singular: correct the header")
    if not np.all(np.isfinite(best)):
        raise ValueError(f"{path}: its origin is not a finite number: correct the header")
    if min(lengths) < SPACING_MM[0] or max(lengths) > SPACING_MM[1]:
        raise ValueError(f"{path}: its spacing {tuple(lengths.tolist())} mm is none of a CT: correct the header")
    narrow, wide, long = sorted(lengths * shape)
    if long > LARGEST_FIELD_MM or wide > LARGEST_WIDTH_MM:
        size = " × ".join(f"{side / 1000:.3g}" for side in (narrow, wide, long))
        raise ValueError(f"{path}: would be {size} m large: correct its spacing")
    axes, flips = canonical_axes(affine / lengths)
    spacing = tuple(float(lengths[axis]) for axis in axes)
    z, y, x = (shape[axis] for axis in axes)
    voxel_ml = float(abs(np.linalg.det(affine))) / 1000
    return Geometry((z, y, x), (spacing[0], spacing[1], spacing[2]), voxel_ml, axes, flips, header)


def canonical_axes(direction_ras: NDArray[np.float64]) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Permutation and flips that bring file axes closest to canonical z, y, x.

    direction_ras: 3×3, unit columns, one a file axis, as NIfTI counts (x to the left is negative). The nearest rotation
    (polar decomposition) decides, so that slightly skewed axes count fairly.
    """
    left, _, right = np.linalg.svd(direction_ras)
    lps = LPS_TO_RAS @ left @ right
    best = max(itertools.permutations(range(3)), key=lambda p: sum(abs(lps[2 - row, p[row]]) for row in range(3)))
    flips = tuple(bool(lps[2 - row, best[row]] < 0) for row in range(3))
    return (best[0], best[1], best[2]), (flips[0], flips[1], flips[2])


def _to_hu(path: Path, block: NDArray[Any]) -> NDArray[Any]:
    """Voxels rounded to HU within int16, −1024 at least."""
    if block.dtype.kind == "f":
        if not np.isfinite(block).all():
            raise ValueError(f"{path}: holds voxels that are NaN or infinite: replace them by -1024")
        block = np.rint(block)
    return np.clip(block, AIR_HU, np.iinfo(np.int16).max)


def _steps(hu: NDArray[np.int16]) -> list[int]:
    """How many voxels along each axis may be passed over where a rough look is enough."""
    return [max(1, n // 128) for n in hu.shape]


def _coarse(hu: NDArray[np.int16]) -> NDArray[np.int16]:
    return hu[tuple(slice(None, None, step) for step in _steps(hu))]


def body_box(hu: NDArray[np.int16]) -> tuple[slice, slice, slice]:
    """Where the patient is in (z, y, x): what is denser than air, with a margin; never empty.

    Connected things of less than a hundredth of the largest (wires, noise) do not count. Looked at in steps, which is
    enough for a box; z is left whole, since every slice of a scan shows the patient.
    """
    step = _steps(hu)
    coarse = _coarse(hu) > BODY_HU
    if not coarse.any():
        return slice(0, hu.shape[0]), slice(0, hu.shape[1]), slice(0, hu.shape[2])
    # uint8: given bools, cc3d 4.1.1 reserves too few labels for volumes of odd size and fails
    labels = cc3d.connected_components(coarse.astype(np.uint8), connectivity=26)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    body = np.isin(labels, np.flatnonzero(sizes >= sizes.max() / 100))  # an arm beside the trunk, no wires
    box = [slice(0, hu.shape[0])]
    for axis in (1, 2):
        used = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis))).tolist()
        margin = 2 * step[axis]
        box.append(
            slice(max(0, used[0] * step[axis] - margin), min(hu.shape[axis], (used[-1] + 1) * step[axis] + margin))
        )
    return box[0], box[1], box[2]


# --- writing --------------------------------------------------------------------------------------------------------


def write_mask(mask: NDArray[Any], geometry: Geometry, path: Path) -> None:
    """Write a mask (z, y, x), canonical and of the full scan, as uint8 {0, 1} on the input's own grid; atomic."""
    _write(mask, geometry, path, lambda plane: plane > 0)


def write_label(label: NDArray[np.uint8], geometry: Geometry, path: Path) -> None:
    """Write labels (z, y, x), 0 … 255, likewise."""
    _write(label, geometry, path)


def write_probability(probability: NDArray[np.uint8], geometry: Geometry, path: Path) -> None:
    """Write a probability (z, y, x), given as 0 … 255, which the header's slope scales to 0 … 1; atomic."""
    _write(probability, geometry, path, slope=1 / 255)


def _write(
    array: NDArray[Any],
    geometry: Geometry,
    path: Path,
    convert: Callable[[NDArray[Any]], NDArray[Any]] = lambda plane: plane,
    slope: float = 1.0,
) -> None:
    if array.shape != geometry.shape:
        raise ValueError(f"{path}: a mask of {array.shape} does not fit the scan's {geometry.shape}")
    by_file = geometry.to_file(array)
    planes = (convert(by_file[:, :, k]).astype(np.uint8).tobytes(order="F") for k in range(by_file.shape[2]))
    content = _gzip(itertools.chain([_file_header(geometry, by_file.shape, slope)], planes))
    try:
        write_whole(path, content)
    except OSError as error:
        raise MaskError(f"{path}: cannot be written ({error.strerror}): make room or remove it") from error


def _file_header(geometry: Geometry, shape: tuple[int, ...], slope: float) -> bytes:
    """The scan's header as a mask's, and no extensions. Texts stay behind: they may name the patient."""
    header = geometry.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    header.set_slope_inter(slope, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    for text in TEXTS:
        header[text] = b""
    return bytes(header.binaryblock) + b"\0" * (header.single_vox_offset - HEADER_BYTES)


def _gzip(parts: Iterator[bytes]) -> bytes:
    """The same mask gives the same bytes: no time stamp, no name; level 1 is five times as fast as 9."""
    packer = zlib.compressobj(1, wbits=GZIP_BITS)
    return b"".join([*(packer.compress(part) for part in parts), packer.flush()])
