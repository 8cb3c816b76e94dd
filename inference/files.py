"""The voxels and the header of a file, whatever it claims: nothing more than it says, nothing outside of it, is read.

Axes are the file's own (i, j, k). NIfTI is read by its bare header (extensions may hold private text, and sizes that
lie), as many bytes as it says and no more; MHA and NRRD by SimpleITK, once their header names no other file.
"""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

MAX_VOXELS = 2**30  # of a scan; 512×512×4096
HEADER_BYTES = 348  # of NIfTI-1
MAX_EXTENSIONS = 2**24  # bytes between header and voxels
MAGIC = slice(344, 348)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
DIMENSIONS = (b"2", b"3", b"4", b"5")  # ITK writes beyond its own memory where a header claims many more
TEXT_HEADER_BYTES = 2**20  # of MHA and NRRD, at most


@dataclass(frozen=True)
class Scaled:
    """Stored voxels and their linear scaling, applied only to the slabs that are asked for."""

    stored: NDArray[Any]
    slope: float
    offset: float

    @property
    def shape(self) -> tuple[int, int, int]:
        i, j, k = self.stored.shape
        return i, j, k

    def __getitem__(self, index: Any) -> NDArray[Any]:
        slab = self.stored[index]
        if self.slope == 1 and self.offset == 0:
            return slab
        with np.errstate(all="ignore"):  # what is not finite afterwards is refused with a sentence
            return slab.astype(np.float32) * np.float32(self.slope) + np.float32(self.offset)


# --- NIfTI ---------------------------------------------------------------------------------------------------------


def read_nifti(path: Path, max_voxels: int = MAX_VOXELS) -> tuple[Scaled, nib.Nifti1Header]:
    """Voxels and header of a NIfTI-1 file, gzip-ed or not, whatever its name says. ValueError with the mend."""
    try:
        with _opened(path) as file:
            header, shape, start = _nifti_header(path, file.read(HEADER_BYTES), max_voxels)
            file.read(start - HEADER_BYTES)
            data_type, (slope, offset) = header.get_data_dtype(), header.get_slope_inter()
            size = int(np.prod(shape)) * data_type.itemsize
            content = file.read(size)
            file.read(1)  # at its end gzip compares checksums; what follows the voxels is left alone, however long
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: its gzip data is damaged or cut short: copy it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the file and its rights") from error
    if len(content) < size:
        raise ValueError(f"{path}: ends before its last voxel: copy it again")
    stored = np.frombuffer(content, data_type).reshape(shape, order="F")
    return Scaled(stored, 1.0 if slope is None else float(slope), float(offset or 0.0)), header


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where they are gzip-ed."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not zipped:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]  # GzipFile reads as IO does


def _nifti_header(path: Path, content: bytes, max_voxels: int) -> tuple[nib.Nifti1Header, tuple[int, int, int], int]:
    """The header, the shape, and where the voxels start."""
    if content[MAGIC] != b"n+1\0":
        raise ValueError(f"{path}: holds no NIfTI-1 image: export the scan again as NIfTI-1")
    try:
        # unchecked, since nibabel would silently mend zero and negative spacings
        header = nib.Nifti1Header(content, check=False)
        shape = _checked_shape(path, header, max_voxels)
        header.get_slope_inter()
        # some writers leave 0; no voxel can lie within the header
        start = max(int(header["vox_offset"]), header.single_vox_offset)
        header.get_best_affine()
    except (HeaderDataError, ImageFileError, KeyError, OverflowError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: its header cannot be read ({error}): export the scan again") from error
    if start > MAX_EXTENSIONS:
        raise ValueError(f"{path}: claims that its voxels start at byte {start}: export the scan again")
    return header, shape, start


def _checked_shape(path: Path, header: nib.Nifti1Header, max_voxels: int) -> tuple[int, int, int]:
    if int(header["datatype"]) == 0:
        raise ValueError(f"{path}: its header names no type of voxels: export the scan again")
    if header.get_data_dtype().kind not in "iuf":
        raise ValueError(f"{path}: colour or complex voxels are no HU: export the scan as one grey channel")
    return _three(path, tuple(int(n) for n in header.get_data_shape()), max_voxels)


def _three(path: Path, shape: tuple[int, ...], max_voxels: int) -> tuple[int, int, int]:
    """A 3-D shape, axes of one voxel beyond the third dropped."""
    if len(shape) < 3:
        raise ValueError(f"{path}: has {len(shape)} dimensions: give a volume, of one slice at least, with three")
    if any(n != 1 for n in shape[3:]):
        raise ValueError(f"{path}: holds more than one volume {shape}: split it, one file a volume")
    if min(shape) < 1:
        raise ValueError(f"{path}: has no voxels {shape}: export the scan again")
    if int(np.prod(shape[:3], dtype=object)) > max_voxels:
        raise ValueError(f"{path}: claims {shape} voxels, more than {max_voxels}: crop it, or raise --max-voxels")
    return shape[0], shape[1], shape[2]


# --- other formats --------------------------------------------------------------------------------------------------


def read_itk(path: Path, max_voxels: int = MAX_VOXELS) -> tuple[Scaled, nib.Nifti1Header]:
    """Voxels of an MHA or NRRD file, and a NIfTI header of its grid. ValueError with the mend."""
    import SimpleITK  # only where it is needed: start-up time counts

    check_text_header(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with _silent_libraries():
            reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1 or "complex" in SimpleITK.GetPixelIDValueAsString(reader.GetPixelID()):
            raise ValueError(f"{path}: colour or complex voxels are no HU: export the scan as one grey channel")
        shape = _three(path, reader.GetSize(), max_voxels)
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
    return Scaled(SimpleITK.GetArrayFromImage(image).T, 1.0, 0.0), header


def check_text_header(path: Path) -> None:
    """ValueError where an MHA or NRRD header has its voxels in another file, or would crash ITK by its dimensions."""
    try:
        with path.open("rb") as file:
            head = file.read(TEXT_HEADER_BYTES)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the file and its rights") from error
    nrrd = head.startswith(b"NRRD")
    for line in head.splitlines():
        if nrrd and not line.strip():
            return  # a blank line ends the header of a NRRD file
        key, _, value = line.partition(b":" if nrrd else b"=")
        key = key.replace(b" ", b"").strip().lower()
        if key in (b"dimension", b"ndims") and value.strip() not in DIMENSIONS:
            raise ValueError(f"{path}: cannot be read as an image (its number of dimensions): export the scan again")
        if key in (b"datafile", b"elementdatafile"):
            if not nrrd and value.strip().upper() == b"LOCAL":
                return
            raise ValueError(f"{path}: has its voxels in another file: export the scan as one file")
    raise ValueError(f"{path}: cannot be read as an image (its header has no end): export the scan again")


def _itk_header(image: Any) -> nib.Nifti1Header:
    """The NIfTI header of a 3-D SimpleITK image's grid."""
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = LPS_TO_RAS @ image.GetOrigin()
    header = nib.Nifti1Header()
    header.set_data_shape(image.GetSize())
    header.set_zooms(image.GetSpacing())
    with np.errstate(over="ignore"):  # an origin beyond float32 becomes infinite, which is refused later
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
