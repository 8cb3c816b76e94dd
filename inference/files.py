"""What is common to all files of scans, and the voxels and the header of a NIfTI file, whatever it claims.

Axes are the file's own (i, j, k). A file is read by its bare header (NIfTI's extensions may hold private text, and
sizes that lie), as many bytes as it says and no more, block by block.
"""

from __future__ import annotations

import gzip
import itertools
import os
import stat
import zlib
from collections.abc import Callable, Iterator
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
BLOCK_BYTES = 2**22  # that are read at once
MAX_EXTENSIONS = 2**24  # bytes between header and voxels
MAGIC = slice(344, 348)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
Place = tuple[slice, slice, int]


@dataclass(frozen=True)
class Image:
    """An opened image: the NIfTI header of its grid, its shape (i, j, k), and its voxels in blocks, once.

    Each block comes with its place, `array[place]`, and is a part of a plane k: read one after the other, no more than
    one has to be held in the file's own type.
    """

    header: nib.Nifti1Header
    shape: tuple[int, int, int]
    blocks: Iterator[tuple[Place, NDArray[Any]]]


@contextmanager
def open_nifti(path: Path, max_voxels: int = MAX_VOXELS) -> Iterator[Image]:
    """A NIfTI-1 file, gzip-ed or not, whatever its name says. ValueError with the mend, then or as planes are read."""
    with damage_told(path), _opened(path) as file:
        header, shape, start = _nifti_header(path, file.read(HEADER_BYTES), max_voxels)
        file.read(start - HEADER_BYTES)
        slope, offset = header.get_slope_inter()
        scale = 1.0 if slope is None else float(slope), float(offset or 0.0)
        yield Image(header, shape, read_blocks(path, file.read, header.get_data_dtype(), shape, *scale))


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """What goes wrong with a file's bytes as one sentence: ValueError."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: its packed data is damaged or cut short: copy it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the file and its rights") from error


def read_blocks(
    path: Path,
    read: Callable[[int], bytes],
    data_type: np.dtype[Any],
    shape: tuple[int, int, int],
    slope: float = 1.0,
    offset: float = 0.0,
) -> Iterator[tuple[Place, NDArray[Any]]]:
    """The blocks of an `Image`, from what `read` gives: the voxels one after the other, i first."""
    rows = max(1, BLOCK_BYTES // (shape[0] * data_type.itemsize))
    for k, first in itertools.product(range(shape[2]), range(0, shape[1], rows)):
        count = min(rows, shape[1] - first)
        content = read(shape[0] * count * data_type.itemsize)
        if len(content) < shape[0] * count * data_type.itemsize:
            raise ValueError(f"{path}: ends before its last voxel: copy it again")
        stored = np.frombuffer(content, data_type).reshape((shape[0], count), order="F")
        place = slice(None), slice(first, first + count), k
        yield place, _scaled(stored, slope, offset)
    read(1)  # at its end gzip compares checksums; what follows the voxels is left alone, however long


def _scaled(stored: NDArray[Any], slope: float, offset: float) -> NDArray[Any]:
    if slope == 1 and offset == 0:
        return stored
    with np.errstate(all="ignore"):  # what is not finite afterwards is refused with a sentence
        return stored.astype(np.float32) * np.float32(slope) + np.float32(offset)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where they are gzip-ed."""
    with open_regular(path) as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not zipped:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]  # GzipFile reads as IO does


@contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """ValueError where it is one that gives bytes without end or none at all (a device, a pipe)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a pipe would be waited for
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: is no regular file: put the scan itself there")
    with os.fdopen(descriptor, "rb") as file:
        yield file


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
    return three_axes(path, tuple(int(n) for n in header.get_data_shape()), max_voxels)


def too_flat(path: Path, dimensions: int) -> ValueError:
    return ValueError(f"{path}: has {dimensions} dimensions: give a volume, of one slice at least, with three")


def three_axes(path: Path, shape: tuple[int, ...], max_voxels: int) -> tuple[int, int, int]:
    """A 3-D shape, axes of one voxel beyond the third dropped."""
    if len(shape) < 3:
        raise too_flat(path, len(shape))
    if any(n != 1 for n in shape[3:]):
        raise ValueError(f"{path}: holds more than one volume {shape}: split it, one file a volume")
    if min(shape) < 1:
        raise ValueError(f"{path}: has no voxels {shape}: export the scan again")
    if int(np.prod(shape[:3], dtype=object)) > max_voxels:
        raise ValueError(f"{path}: claims {shape} voxels, more than {max_voxels}: crop it, or raise --max-voxels")
    return shape[0], shape[1], shape[2]
