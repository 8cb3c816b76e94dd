"""The voxels and the grid of a MHA or NRRD file: a header of text, then the voxels, packed or not.

Both formats can keep voxels in other files, and both leave much open. So the header is read strictly: what two readers
could understand in two ways is refused, and so is what hardly any writer writes (voxels as text, bytes to be skipped).
The rest means what ITK takes it for (tests compare): axes point to the left, to the back and to the head where nothing
is said. Sources: MetaIO's tags, and Teem's definition of NRRD.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from .files import BLOCK_BYTES, LPS_TO_RAS, MAX_VOXELS, Image, open_regular, read_blocks, three_axes, too_flat

HEADER_BYTES = 2**20  # at most
DIMENSIONS = (2, 3, 4, 5)
ANY_WRAPPING = zlib.MAX_WBITS | 32  # zlib's own or gzip's
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")
INTEGER = re.compile(r"\d{1,18}")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan", re.IGNORECASE)
VECTOR = re.compile(r"none|\([^()]*\)")
BOOLEAN = {"true": True, "false": False}
MET_TYPES = {
    **{"met_char": "i1", "met_short": "i2", "met_int": "i4", "met_long": "i4", "met_long_long": "i8"},
    **{"met_uchar": "u1", "met_ushort": "u2", "met_uint": "u4", "met_ulong": "u4", "met_ulong_long": "u8"},
    **{"met_float": "f4", "met_double": "f8"},
}
NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}
SPACES = {  # of NRRD, by what makes its first two axes point to the left and to the back
    **dict.fromkeys(("left-posterior-superior", "lps", "scanner-xyz", "3d-right-handed", "3d-left-handed"), (1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1, -1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1, -1)),
}
SPATIAL_KINDS = ("domain", "space", "time", "none", "???")  # of NRRD; along the others lie parts of a voxel


@dataclass(frozen=True)
class Layout:
    """What a header says of its voxels.

    sizes: of each axis, the fastest first; affine: (3, 4), voxels to mm in LPS; packed: as zlib or gzip do.
    """

    sizes: tuple[int, ...]
    affine: NDArray[np.float64]
    data_type: np.dtype[Any]
    packed: bool


@contextmanager
def open_mha_or_nrrd(path: Path, max_voxels: int = MAX_VOXELS) -> Iterator[Image]:
    """A MHA or NRRD file, whichever its name says. ValueError with the mend, then or as planes are read."""
    with open_regular(path) as file:
        fields, start = read_fields(path, file.read(HEADER_BYTES))
        layout = nrrd_layout(fields) if fields.nrrd else mha_layout(fields)
        shape = three_axes(path, layout.sizes, max_voxels)
        header = _nifti_header(path, shape, layout.affine)
        file.seek(start)
        source = Unpacked(file) if layout.packed else file
        try:
            yield Image(header, shape, read_blocks(path, source.read, layout.data_type, shape))
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{path}: its packed data is damaged or cut short: copy it again") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}): check the file and its rights") from error


class Unpacked:
    """The bytes of a zlib or gzip stream, unpacked no further than they are asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._unpacker = file, zlib.decompressobj(ANY_WRAPPING)

    def read(self, count: int) -> bytes:
        """So many bytes, fewer at the end. EOFError where the stream is cut short, zlib.error where it is damaged."""
        parts = []
        while count and not self._unpacker.eof:
            packed = self._unpacker.unconsumed_tail or self._file.read(BLOCK_BYTES)
            part = self._unpacker.decompress(packed, count)
            if not (packed or part):
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


# --- fields ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """A header's fields by name, in lower case and without spaces, each with all that is said of it."""

    path: Path
    nrrd: bool
    said: dict[str, list[str]]

    def text(self, *names: str, default: str | None = None) -> str:
        """What is said of a field, which may have several names. ValueError where that is nothing, or two things."""
        values = [value for name in names for value in self.said.get(name, [])]
        if len(values) > 1 or (not values and default is None):
            raise self.unusable(f"{'no' if not values else 'more than one'} “{names[0]}”")
        return values[0] if values else str(default)

    def numbers(self, *names: str, count: int, default: list[float]) -> NDArray[np.float64]:
        """So many numbers. ValueError where there are others."""
        if not any(name in self.said for name in names):
            return np.array(default)
        parts = self.text(*names).split()
        if len(parts) != count or not all(NUMBER.fullmatch(part) for part in parts):
            raise self.unusable(f"its “{names[0]}” is not {count} numbers")
        return np.array([float(part) for part in parts])

    def sizes(self, of_axes: str, sizes: str) -> tuple[int, ...]:
        """Voxels along each axis."""
        said = self.text(of_axes)
        parts = self.text(sizes).split()
        if not INTEGER.fullmatch(said) or int(said) not in DIMENSIONS:
            raise self.unusable("its number of dimensions")
        if len(parts) != int(said) or not all(INTEGER.fullmatch(part) for part in parts):
            raise self.unusable(f"its “{sizes}” is not {said} whole numbers")
        if len(parts) < 3:
            raise too_flat(self.path, len(parts))
        return tuple(int(part) for part in parts)

    def data_type(self, name: str, types: dict[str, str], big_endian: bool) -> np.dtype[Any]:
        code = types.get(self.text(name).lower())
        if code is None:
            raise self.unusable("its type of voxels")
        return np.dtype(code).newbyteorder(">" if big_endian else "<")

    def choice(self, *names: str, of: dict[str, bool], default: str | None = None) -> bool:
        """Which of the two that a field can say. ValueError where it says something else."""
        said = self.text(*names, default=default).lower()
        if said not in of:
            raise self.unusable(f"its “{names[0]}” is “{said[:20]}”, none of {', '.join(of)}")
        return of[said]

    def unusable(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: cannot be read as an image ({what}): export the scan again")

    def colour(self) -> ValueError:
        return ValueError(f"{self.path}: colour or complex voxels are no HU: export the scan as one grey channel")


def read_fields(path: Path, head: bytes) -> tuple[Fields, int]:
    """The fields of a file that starts so, and where its voxels start. ValueError where it cannot be trusted."""
    nrrd = head.startswith(b"NRRD000")
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"(?m)^ElementDataFile *= *LOCAL\r?\n", head)
    header = head[: end.end()] if end else head
    pointers = re.findall(rb"(?i)data ?file *:" if nrrd else rb"(?i)elementdatafile", header)
    if len(pointers) > (0 if nrrd or not end else 1):
        raise ValueError(f"{path}: has its voxels in another file: export the scan as one file")
    fields = Fields(path, nrrd, {})
    if not end:
        raise fields.unusable("its header has no end")
    if CONTROL.search(header):
        raise fields.unusable("its header is no text")
    for line in header.decode("latin-1").split("\n")[nrrd:]:  # the first of a NRRD is its name
        name, _, value = line.partition(":") if nrrd else _split_at_either(line)
        if not (nrrd and (line.startswith("#") or value.startswith("="))):  # a remark; a key of somebody's own
            fields.said.setdefault("".join(name.lower().split()), []).append(value.strip())
    return fields, len(header)


def _split_at_either(line: str) -> tuple[str, str, str]:
    """A line of MHA at its first “=” or “:”; MetaIO takes either."""
    colon, equals = line.partition(":"), line.partition("=")
    return min(colon, equals, key=lambda parts: len(parts[0]))


# --- layouts --------------------------------------------------------------------------------------------------------


def mha_layout(fields: Fields) -> Layout:
    """ValueError where the fields of a MHA file cannot be used."""
    if fields.text("objecttype").lower() != "image":
        raise fields.unusable("it is no image")
    sizes = fields.sizes("ndims", "dimsize")
    if fields.text("elementnumberofchannels", default="1") != "1":
        raise fields.colour()
    if fields.text("headersize", default="0") != "0":
        raise fields.unusable("it skips a part of the file")
    if not fields.choice("binarydata", of=BOOLEAN, default="true"):
        raise fields.unusable("its voxels are written as text")
    order = fields.choice("binarydatabyteordermsb", "elementbyteordermsb", of=BOOLEAN, default="false")
    count = len(sizes)
    thick = fields.numbers("elementsize", count=count, default=[1.0] * count).tolist()
    spacing = fields.numbers("elementspacing", count=count, default=thick)
    turn = ("transformmatrix", "rotation", "orientation")
    axes = fields.numbers(*turn, count=count**2, default=np.eye(count).ravel().tolist()).reshape(count, count)
    origin = fields.numbers("offset", "position", "origin", count=count, default=[0.0] * count)
    return Layout(
        sizes,
        np.column_stack([(axes * spacing[:, None])[:3, :3].T, origin[:3]]),  # a row of MHA's is an axis
        fields.data_type("elementtype", MET_TYPES, order),
        fields.choice("compresseddata", of=BOOLEAN, default="false"),
    )


def nrrd_layout(fields: Fields) -> Layout:
    """ValueError where the fields of a NRRD file cannot be used."""
    sizes = fields.sizes("dimension", "sizes")
    for skipped in ("lineskip", "byteskip"):
        if fields.text(skipped, default="0") != "0":
            raise fields.unusable("it skips a part of the file")
    for corner in ("axismins", "axismaxs"):
        if corner in fields.said:
            raise fields.unusable("it places its axes one by one, and not in a space")
    packed = fields.choice("encoding", of={"raw": False, "gzip": True, "gz": True})
    one_byte = NRRD_TYPES.get(fields.text("type"), "")[-1:] == "1"
    order = fields.choice("endian", of={"little": False, "big": True}, default="little" if one_byte else None)
    columns = _nrrd_axes(fields, len(sizes))
    if any(column is None and size != 1 for column, size in zip(columns, sizes, strict=True)):
        raise fields.colour()
    spatial = [(size, column) for size, column in zip(sizes, columns, strict=True) if column is not None]
    affine = np.zeros((3, 4))
    for index, (_, column) in enumerate(spatial[:3]):
        affine[:, index] = column
    if "spaceorigin" in fields.said:
        affine[:, 3] = _nrrd_vector(fields, fields.text("spaceorigin"))
    return Layout(tuple(size for size, _ in spatial), affine, fields.data_type("type", NRRD_TYPES, order), packed)


def _nrrd_axes(fields: Fields, count: int) -> list[NDArray[np.float64] | None]:
    """One voxel along each axis, in mm in LPS; None for an axis that is none of space."""
    kinds = fields.text("kinds", default="domain " * count).lower().split()
    spacing = fields.numbers("spacings", count=count, default=[1.0] * count)
    vectors = VECTOR.findall(fields.text("spacedirections", default="() " * count))
    if len(kinds) != count or len(vectors) != count:
        raise fields.unusable(f"its “kinds” or “space directions” are not {count}")
    if "spacedirections" in fields.said and "spacings" in fields.said:
        raise fields.unusable("its spacing is said twice")
    axes: list[NDArray[np.float64] | None] = []
    beside = np.eye(3, count)  # where no directions are said: left, back, head, and nothing for a fourth
    for kind, vector, step in zip(kinds, vectors, spacing, strict=True):
        if kind not in SPATIAL_KINDS or vector == "none":
            axes.append(None)
        elif "spacedirections" in fields.said:
            axes.append(_nrrd_vector(fields, vector))
        else:
            axes.append(step * beside[:, sum(axis is not None for axis in axes)])
    return axes


def _nrrd_vector(fields: Fields, text: str) -> NDArray[np.float64]:
    """`(x,y,z)` of the header's space → LPS."""
    parts = [part.strip() for part in text.strip("()").split(",")]
    if len(parts) != 3 or not all(NUMBER.fullmatch(part) for part in parts):
        raise fields.unusable(f"“{text[:40]}” is no vector of three numbers")
    if "space" not in fields.said:
        flips: tuple[int, int] | None = (1, 1) if fields.text("spacedimension") == "3" else None
    else:
        flips = SPACES.get(fields.text("space").lower())
    if flips is None:
        raise fields.unusable("its space")
    return np.array([float(part) for part in parts]) * (*flips, 1)


def _nifti_header(path: Path, shape: tuple[int, int, int], affine_lps: NDArray[np.float64]) -> nib.Nifti1Header:
    """The NIfTI header of a grid."""
    spacing_mm = np.linalg.norm(affine_lps[:, :3], axis=0)
    if not np.isfinite(affine_lps).all() or not spacing_mm.all():
        raise ValueError(f"{path}: its spacing, direction or origin cannot be used: correct the header")
    affine = np.eye(4)
    affine[:3] = LPS_TO_RAS @ affine_lps
    header = nib.Nifti1Header()
    try:
        header.set_data_shape(shape)
        header.set_zooms(spacing_mm)
        with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which is refused later
            header.set_sform(affine, code=1)
            header.set_qform(affine, code=1, strip_shears=True)
    except HeaderDataError as error:
        raise ValueError(f"{path}: too large for a mask in NIfTI-1 ({error}): crop the scan") from error
    header.set_xyzt_units("mm")
    return header
