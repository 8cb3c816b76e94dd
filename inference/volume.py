"""A CT scan and its geometry: read, orient, crop to the body, write a mask back onto the very same grid.

Arrays are (z, y, x) in canonical orientation: z feet to head, y anterior to posterior, x right to left (LPS, the
identity direction of ITK). Orienting permutes and flips axes and never resamples. NIfTI is read and every mask is
written by nibabel, whose header goes back bit for bit, so that directions which are not quite orthonormal (ITK refuses
them) are kept as they were; MHA and NRRD are read by SimpleITK.
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

AIR_HU = -1024  # padding below this is clipped
BODY_HU = -500  # between air and fat
MAX_VOXELS = 2**31
HEADER_BYTES = 348  # of NIfTI-1
MAGIC = slice(344, 348)
NIFTI_SUFFIXES = (".nii.gz", ".nii")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".nrrd")
CHANNEL_SUFFIX = "_0000"
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
SINGULAR = 1e-4  # of the volume of the unit cell over the product of its edges
SPATIAL_UNIT = 0b111  # the bits of NIfTI's xyzt_units that say metres, millimetres or microns
UNIT_MM = {1: 1000.0, 3: 0.001}  # metres and microns; all else counts as mm, as in ITK
LARGEST_FIELD_MM = 5000.0  # a longer side is a wrong spacing, whose resampled grid would not fit any memory


@dataclass(frozen=True)
class Geometry:
    """The grid of a scan, and how its file lays it out.

    shape: voxels (z, y, x), canonical; spacing_mm: (z, y, x).
    axes: for each canonical axis z, y, x, the file's axis; flips: whether it runs the other way there.
    header: the NIfTI header that masks are written with (the input's own, where it is NIfTI).
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
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
    def spacing_mm(self) -> tuple[float, float, float]:
        return self.geometry.spacing_mm


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


def read_volume(path: Path) -> Volume:
    """Read a CT scan of HU. ValueError with one sentence that names the file and the mend."""
    array, geometry = _read(path)
    hu = np.ascontiguousarray(geometry.to_canonical(_to_hu(path, array)))
    if hu.min() == hu.max():
        raise ValueError(f"{path}: every voxel is {hu.flat[0]}, so it holds no HU: export the scan again")
    return Volume(hu, geometry, body_box(hu))


def read_label(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """Read labels (0 … 255) on the grid `geometry` of their scan, canonical (z, y, x)."""
    array, own = _read(path)
    if own.shape != geometry.shape or not np.allclose(
        own.header.get_best_affine(), geometry.header.get_best_affine(), atol=1e-3
    ):
        raise ValueError(f"{path}: not on the grid of its scan: resample it to the scan's")
    return np.ascontiguousarray(geometry.to_canonical(array[:].astype(np.uint8)))


def _read(path: Path) -> tuple[Any, Geometry]:
    """Voxels by file axes (i, j, k), an array or nibabel's proxy of one, and their geometry."""
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return _read_nifti(path)
    if is_scan(path):
        return _read_itk(path)
    raise ValueError(f"{path}: not a scan by its name: use one of {', '.join(SCAN_SUFFIXES)}")


# --- NIfTI ---------------------------------------------------------------------------------------------------------


def _read_nifti(path: Path) -> tuple[Any, Geometry]:
    content = _content(path)
    if content[MAGIC] != b"n+1\0":
        raise ValueError(f"{path}: holds no NIfTI-1 image: export the scan again as NIfTI-1")
    try:
        # the bare header, without extensions: they may hold private text and sizes that lie;
        # unchecked, since nibabel would silently mend zero and negative spacings
        header = nib.Nifti1Header(content[:HEADER_BYTES], check=False)
        shape = _checked_shape(path, header)
        geometry = _geometry(path, header, shape)
        slope, offset = header.get_slope_inter()
        data_type = header.get_data_dtype()
        # some writers leave 0; no voxel can lie within the header
        start = max(int(header["vox_offset"]), header.single_vox_offset)
        size = int(np.prod(shape)) * data_type.itemsize
    except (HeaderDataError, ImageFileError, KeyError, OverflowError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: its header cannot be read ({error}): export the scan again") from error
    if len(content) < start + size:
        raise ValueError(f"{path}: ends before its last voxel: copy it again")
    array = np.frombuffer(content, data_type, int(np.prod(shape)), start).reshape(shape, order="F")
    return _Scaled(array, 1.0 if slope is None else float(slope), float(offset or 0.0)), geometry


def _content(path: Path) -> bytes:
    """The file's bytes, unpacked where they are gzip-ed, whatever its name says."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: its gzip data is damaged or cut short: copy it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the file and its rights") from error


def _checked_shape(path: Path, header: nib.Nifti1Header) -> tuple[int, int, int]:
    if int(header["datatype"]) == 0:
        raise ValueError(f"{path}: its header names no type of voxels: export the scan again")
    data_type = header.get_data_dtype()
    if data_type.kind not in "iuf":
        raise ValueError(f"{path}: colour or complex voxels are no HU: export the scan as one grey channel")
    shape = tuple(int(n) for n in header.get_data_shape())
    return _three(path, shape)


def _three(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A 3-D shape, axes of one voxel beyond the third dropped."""
    if len(shape) < 3:
        raise ValueError(f"{path}: has {len(shape)} dimensions: give a volume, of one slice at least, with three")
    if any(n != 1 for n in shape[3:]):
        raise ValueError(f"{path}: holds more than one volume {shape}: split it, one file a volume")
    if min(shape) < 1:
        raise ValueError(f"{path}: has no voxels {shape}: export the scan again")
    if int(np.prod(shape[:3], dtype=object)) > MAX_VOXELS:
        raise ValueError(f"{path}: claims {shape} voxels, more than {MAX_VOXELS}: crop the scan")
    return shape[0], shape[1], shape[2]


@dataclass(frozen=True)
class _Scaled:
    """Stored voxels and their linear scaling, applied only to the slabs that are asked for."""

    stored: NDArray[Any]
    slope: float
    offset: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def __getitem__(self, index: Any) -> NDArray[Any]:
        slab = self.stored[index]
        if self.slope == 1 and self.offset == 0:
            return slab
        with np.errstate(all="ignore"):  # what is not finite afterwards is refused with a sentence
            return slab.astype(np.float32) * np.float32(self.slope) + np.float32(self.offset)


# --- other formats --------------------------------------------------------------------------------------------------


def _read_itk(path: Path) -> tuple[Any, Geometry]:
    import SimpleITK  # only where it is needed: start-up time counts

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with _silent_libraries():
            reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1 or "complex" in SimpleITK.GetPixelIDValueAsString(reader.GetPixelID()):
            raise ValueError(f"{path}: colour or complex voxels are no HU: export the scan as one grey channel")
        shape = _three(path, reader.GetSize())
        if len(reader.GetSize()) > 3:
            reader.SetExtractSize([*shape, *[0] * (len(reader.GetSize()) - 3)])
        with _silent_libraries():
            image = reader.Execute()
        header = _itk_header(image)
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read as an image (data cut short, spacing or direction unusable): "
                         "export the scan again") from error  # fmt: skip
    except HeaderDataError as error:
        raise ValueError(f"{path}: too large for a mask in NIfTI-1 ({error}): crop the scan") from error
    return _Scaled(SimpleITK.GetArrayFromImage(image).T, 1.0, 0.0), _geometry(path, header, shape)


def _itk_header(image: Any) -> nib.Nifti1Header:
    """The NIfTI header of a 3-D SimpleITK image's grid."""
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = LPS_TO_RAS @ image.GetOrigin()
    header = nib.Nifti1Header()
    header.set_data_shape(image.GetSize())
    header.set_zooms(image.GetSpacing())
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    header.set_xyzt_units("mm")
    return header


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """What C++ libraries print to stderr of a bad file goes nowhere: the error that follows says it in one line."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


# --- geometry and voxels --------------------------------------------------------------------------------------------


def _geometry(path: Path, header: nib.Nifti1Header, shape: tuple[int, int, int]) -> Geometry:
    zooms = np.asarray(header["pixdim"][1:4], float)
    if not np.all(np.isfinite(zooms)) or zooms.min() <= 0:
        raise ValueError(f"{path}: its spacing {tuple(zooms.tolist())} mm is not positive: correct the header")
    unit_mm = UNIT_MM.get(int(header["xyzt_units"]) & SPATIAL_UNIT, 1.0)
    affine = unit_mm * np.asarray(header.get_best_affine(), float)[:3, :3]
    lengths = np.linalg.norm(affine, axis=0)
    if not np.all(np.isfinite(affine)) or abs(np.linalg.det(affine)) <= SINGULAR * np.prod(lengths):
        raise ValueError(f"{path}: its direction is singular: correct the header")
    if max(lengths * shape) > LARGEST_FIELD_MM:
        raise ValueError(f"{path}: would be {max(lengths * shape) / 1000:.3g} m long: correct its spacing")
    axes, flips = canonical_axes(affine / lengths)
    spacing = tuple(float(lengths[axis]) for axis in axes)
    z, y, x = (shape[axis] for axis in axes)
    return Geometry((z, y, x), (spacing[0], spacing[1], spacing[2]), axes, flips, header)


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


def _to_hu(path: Path, array: Any) -> NDArray[np.int16]:
    """Voxels rounded to int16 HU, −1024 at least, slab by slab, so that no float volume of full size is held."""
    hu = np.empty(array.shape, np.int16, order="F")
    for k in range(array.shape[2]):
        slab = array[:, :, k]
        if slab.dtype.kind == "f":
            if not np.isfinite(slab).all():
                raise ValueError(f"{path}: holds voxels that are NaN or infinite: replace them by -1024")
            slab = np.rint(slab)
        hu[:, :, k] = np.clip(slab, AIR_HU, np.iinfo(np.int16).max)
    return hu


def body_box(hu: NDArray[np.int16]) -> tuple[slice, slice, slice]:
    """Where the patient is in (z, y, x): what is denser than air, with a margin; never empty.

    Connected things of less than a hundredth of the largest (wires, noise) do not count. Looked at in steps, which is
    enough for a box; z is left whole, since every slice of a scan shows the patient.
    """
    step = [max(1, n // 128) for n in hu.shape]
    coarse = hu[:: step[0], :: step[1], :: step[2]] > BODY_HU
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
    write_label((mask > 0).astype(np.uint8), geometry, path)


def write_label(label: NDArray[np.uint8], geometry: Geometry, path: Path) -> None:
    """Write labels (z, y, x), 0 … 255, likewise."""
    _write(label, geometry, path, slope=1.0)


def write_probability(probability: NDArray[np.uint8], geometry: Geometry, path: Path) -> None:
    """Write a probability (z, y, x), given as 0 … 255, which the header's slope scales to 0 … 1; atomic."""
    _write(probability, geometry, path, slope=1 / 255)


def _write(array: NDArray[np.uint8], geometry: Geometry, path: Path, slope: float) -> None:
    if array.shape != geometry.shape:
        raise ValueError(f"{path}: a mask of {array.shape} does not fit the scan's {geometry.shape}")
    header = geometry.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(geometry.to_file(array).shape)
    header.set_slope_inter(slope, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    voxels = geometry.to_file(array).tobytes(order="F")
    no_extensions = b"\0" * (header.single_vox_offset - HEADER_BYTES)
    # the same mask gives the same bytes: no time stamp, no name; level 1 is five times as fast as 9
    content = gzip.compress(header.binaryblock + no_extensions + voxels, compresslevel=1, mtime=0)
    try:
        with _replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror}): make room or remove it") from error


@contextmanager
def _replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes its name only when it is whole, and leaves nothing behind otherwise."""
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp's 0600 would keep a grader's user out
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
