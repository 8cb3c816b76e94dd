"""The voxels and the grid of a MHA or NRRD file, read by SimpleITK once its header is known to be harmless.

ITK follows headers that name other files, takes a file for any format that it knows, and prints; so the header is
looked at first, strictly (what two readers could understand in two ways is refused), the format is told to ITK, and the
file is given to it as it was opened, whatever its name or a link of that name has become.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from .files import LPS_TO_RAS, MAX_VOXELS, Image, open_regular, three_axes
from .limits import room_mib

HEADER_BYTES = 2**20  # at most
HU_BYTES = (
    2  # a voxel, beside what ITK holds while it is converted; while it reads, it holds packed voxels beside unpacked
)
DIMENSIONS = (b"2", b"3", b"4", b"5")  # ITK writes beyond its own memory where a header claims many more
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")


@contextmanager
def open_itk(path: Path, max_voxels: int = MAX_VOXELS) -> Iterator[Image]:
    """A MHA or NRRD file; ITK reads it whole. ValueError with the mend."""
    import SimpleITK  # only where it is needed: start-up time counts

    with open_regular(path) as file:
        image = _read(path, file, max_voxels)
    try:
        header = _nifti_header(image)
    except HeaderDataError as error:
        raise ValueError(f"{path}: too large for a mask in NIfTI-1 ({error}): crop the scan") from error
    voxels = np.asarray(SimpleITK.GetArrayViewFromImage(image)).T
    i, j, k = voxels.shape
    yield Image(header, (i, j, k), (((slice(None), slice(None), z), voxels[:, :, z]) for z in range(k)))


def _read(path: Path, file: IO[bytes], max_voxels: int) -> Any:
    """The 3-D SimpleITK image of an opened file."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(_checked_format(path, file.read(HEADER_BYTES)))
    reader.SetFileName(f"/proc/self/fd/{file.fileno()}")
    try:
        with _silent_libraries():
            reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1 or "complex" in SimpleITK.GetPixelIDValueAsString(reader.GetPixelID()):
            raise ValueError(f"{path}: colour or complex voxels are no HU: export the scan as one grey channel")
        shape = three_axes(path, reader.GetSize(), max_voxels)
        stored_bytes = SimpleITK.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
        copies = 2 if len(reader.GetSize()) == 3 else 3  # ITK unpacks beside what was packed, and cuts out of a copy
        room_mib(path, shape, max(copies * stored_bytes, stored_bytes + HU_BYTES))
        if len(reader.GetSize()) > 3:
            reader.SetExtractSize([*shape, *[0] * (len(reader.GetSize()) - 3)])
        with _silent_libraries():
            return reader.Execute()
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read as an image (data cut short, spacing or direction unusable): "
                         "export the scan again") from error  # fmt: skip


def _checked_format(path: Path, head: bytes) -> str:
    """ITK's name of the format of a file that starts so. ValueError where the header cannot be trusted."""
    nrrd = head.startswith(b"NRRD000")
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"(?m)^ElementDataFile *= *LOCAL\r?\n", head)
    header = head[: end.end()] if end else head
    pointers = re.findall(rb"(?i)data ?file *:" if nrrd else rb"(?i)elementdatafile", header)
    if len(pointers) > (0 if nrrd or not end else 1):
        raise ValueError(f"{path}: has its voxels in another file: export the scan as one file")
    if not end:
        raise ValueError(f"{path}: cannot be read as an image (its header has no end): export the scan again")
    if CONTROL.search(header):
        raise ValueError(f"{path}: cannot be read as an image (its header is no text): export the scan again")
    said = re.findall(rb"(?im)^ *dimension *:([^\r\n]*)" if nrrd else rb"(?im)^ *ndims *[=:]([^\r\n]*)", header)
    if not said or any(count.strip() not in DIMENSIONS for count in said):
        raise ValueError(f"{path}: cannot be read as an image (its number of dimensions): export the scan again")
    return "NrrdImageIO" if nrrd else "MetaImageIO"


def _nifti_header(image: Any) -> nib.Nifti1Header:
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
