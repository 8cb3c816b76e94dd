"""The voxels and the grid of a MHA or NRRD file: a header of text, then the voxels, packed or not.

Both formats can keep voxels in other files, and both leave much open. So the header is read strictly: what two readers
could understand in two ways is refused, and so is what hardly any writer writes (voxels as text, bytes to be skipped).
The rest means what ITK takes it for (tests compare): axes point to the left, to the back and to the head where nothing
is said. Sources: MetaIO's tags, and Teem's definition of NRRD.
"""

from __future__ import annotations

import io
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

from .files import LPS_TO_RAS, MAX_VOXELS, Image, damage_told, open_regular, read_blocks, three_axes, too_flat

LONGEST_HEADER = 2**22  # bytes
PACKED_BYTES = 2**16  # that are read at once
ANY_WRAPPING = zlib.MAX_WBITS | 32  # zlib's own or gzip's
GZIP_MAGIC = b"\x1f\x8b"
DIMENSIONS = (2, 3, 4, 5)
LARGEST_NUMBER = 1e9  # of mm; what is beyond is a wrong one, and overflows
LARGEST_SIDE = 2**15 - 1  # of NIfTI-1
INTEGER = re.compile(r"\d{1,18}")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan", re.IGNORECASE)
VECTOR = re.compile(r"none|\([^()]*\)")
BOOLEAN = {"true": True, "false": False}
MHA_END = re.compile(rb"(?m)^[ \t]*ElementDataFile[ \t]*[=:][ \t]*(?i:local)[ \t]*\r?\n")
MHA_POINTER = re.compile(rb"(?i)elementdatafile")
MHA_NAMES = (
    *("ObjectType", "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "HeaderSize"),
    *("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData"),
    *("ElementSize", "ElementSpacing", "TransformMatrix", "Rotation", "Orientation"),
    *("Offset", "Position", "Origin"),
)
MHA_TYPES = {
    **{"MET_CHAR": "i1", "MET_SHORT": "i2", "MET_INT": "i4", "MET_LONG": "i4", "MET_LONG_LONG": "i8"},
    **{"MET_UCHAR": "u1", "MET_USHORT": "u2", "MET_UINT": "u4", "MET_ULONG": "u4", "MET_ULONG_LONG": "u8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
NRRD_MAGIC = re.compile(rb"NRRD000[1-5]\r?\n")
NRRD_END = re.compile(rb"\r?\n\r?\n")
NRRD_POINTER = re.compile(rb"(?mi)^data ?file:(?!=)")
NRRD_NAMES = {  # without spaces, in lower case, since Teem takes them so as well
    name.replace(" ", ""): name
    for name in (
        *("type", "dimension", "sizes", "encoding", "endian", "line skip", "byte skip", "kinds"),
        *("space", "space dimension", "space directions", "space origin", "spacings", "axis mins", "axis maxs"),
    )
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
NRRD_SPACES = {  # numbers of a vector, and what makes the first two point to the left and to the back
    **dict.fromkeys(("left-posterior-superior", "lps"), (3, 1, 1)),
    **dict.fromkeys(("scanner-xyz", "3d-right-handed", "3d-left-handed"), (3, 1, 1)),  # as ITK takes them
    **dict.fromkeys(("right-anterior-superior", "ras"), (3, -1, -1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (3, 1, -1)),
    **dict.fromkeys(("left-posterior-superior-time", "lpst"), (4, 1, 1)),
}
SPATIAL_KINDS = ("domain", "space", "time", "none", "???")  # along axes of other kinds lie the parts of a voxel


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
    """A MHA or NRRD file, whichever of them its name says. ValueError with the mend, then or as planes are read."""
    with damage_told(path), open_regular(path) as file:
        fields, start = read_fields(path, file.read(LONGEST_HEADER))
        layout = nrrd_layout(fields) if fields.nrrd else mha_layout(fields)
        shape = three_axes(path, layout.sizes, max_voxels)
        header = _grid_header(path, shape, layout.affine)
        file.seek(start)
        source = Unpacked(file) if layout.packed else file
        yield Image(header, shape, read_blocks(path, source.read, layout.data_type, shape))


class Unpacked:
    """The bytes of a zlib or gzip stream, of all its members, unpacked no further than they are asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._unpacker = file, zlib.decompressobj(ANY_WRAPPING)

    def read(self, count: int) -> bytes:
        """So many bytes, fewer at the end. EOFError where the stream is cut short, zlib.error where it is damaged."""
        parts = []
        while count:
            if self._unpacker.eof:
                packed = self._unpacker.unused_data
                if len(packed) < len(GZIP_MAGIC):  # a member may start anywhere in what is read at once
                    packed += self._file.read(PACKED_BYTES)
                if not packed.startswith(GZIP_MAGIC):
                    break
                self._unpacker = zlib.decompressobj(ANY_WRAPPING)
            else:
                packed = self._unpacker.unconsumed_tail or self._file.read(PACKED_BYTES)
            part = self._unpacker.decompress(packed, count)
            if not (packed or part):
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


# --- fields ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """Those fields of a header that matter here, by the names of their format, each with all that is said of it."""

    path: Path
    nrrd: bool
    said: dict[str, list[str]]

    def text(self, *names: str, default: str | None = None) -> str:
        """What is said of a field, which may have several names. ValueError where that is nothing, or two things."""
        values = [value for name in names for value in self.said.get(name, [])]
        if len(values) > 1 or (not values and default is None):
            raise self.unusable(f"{'no' if not values else 'more than one'} “{names[0]}”")
        return values[0] if values else str(default)

    def numbers(self, *names: str, count: int, default: NDArray[np.float64]) -> NDArray[np.float64]:
        """So many numbers. ValueError where there are others."""
        if not any(name in self.said for name in names):
            return default
        return self.parse(names[0], self.text(*names).split(), count)

    def parse(self, name: str, parts: list[str], count: int) -> NDArray[np.float64]:
        """Words as so many numbers."""
        if len(parts) != count or not all(NUMBER.fullmatch(part) for part in parts):
            raise self.unusable(f"its “{name}” is not {count} numbers")
        numbers = np.array([float(part) for part in parts])
        if (np.abs(numbers) > LARGEST_NUMBER).any():
            raise self.unusable(f"its “{name}” is far too large")
        return numbers

    def sizes(self, dimension: str, sizes: str) -> tuple[int, ...]:
        """Voxels along each axis, of the fields of these names."""
        said, parts = self.text(dimension), self.text(sizes).split()
        if not INTEGER.fullmatch(said) or int(said) not in DIMENSIONS:
            raise self.unusable("its number of dimensions")
        if len(parts) != int(said) or not all(INTEGER.fullmatch(part) for part in parts):
            raise self.unusable(f"its “{sizes}” is not {said} whole numbers")
        if len(parts) < 3:
            raise too_flat(self.path, len(parts))
        return tuple(int(part) for part in parts)

    def data_type(self, name: str, types: dict[str, str], big_endian: bool) -> np.dtype[Any]:
        """That of the voxels, from the field of this name."""
        code = types.get(self.text(name))
        if code is None:
            raise self.unusable(f"its “{name}” is no type of voxels that is known here")
        return np.dtype(code).newbyteorder(">" if big_endian else "<")

    def choice(self, *names: str, of: dict[str, bool], default: str | None = None) -> bool:
        """Which of those that a field can say. ValueError where it says something else."""
        said = self.text(*names, default=default).lower()
        if said not in of:
            raise self.unusable(f"its “{names[0]}” is none of {', '.join(of)}")
        return of[said]

    def unusable(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: cannot be read as an image ({what}): export the scan again")

    def colour(self) -> ValueError:
        return ValueError(f"{self.path}: colour or complex voxels are no HU: export the scan as one grey channel")


def read_fields(path: Path, head: bytes) -> tuple[Fields, int]:
    """The fields of a file that starts so, and where its voxels start. ValueError where they are in another file."""
    nrrd = NRRD_MAGIC.match(head) is not None
    end = (NRRD_END if nrrd else MHA_END).search(head)
    header = head[: end.end()] if end else head
    pointers = (NRRD_POINTER if nrrd else MHA_POINTER).findall(header)
    if len(pointers) > (0 if nrrd or not end else 1):
        raise ValueError(f"{path}: has its voxels in another file: export the scan as one file")
    fields = Fields(path, nrrd, {})
    if not end:
        raise fields.unusable(f"its header has no end within {LONGEST_HEADER // 2**20} MiB")
    for line in io.BytesIO(header):
        name, value = _nrrd_field(line) if nrrd else _mha_field(line)
        if name is not None:
            fields.said.setdefault(name, []).append(value.decode("latin-1").strip())
    return fields, len(header)


def _mha_field(line: bytes) -> tuple[str | None, bytes]:
    """Name and value of a line; None for a name that does not matter."""
    said, _, value = min(line.partition(b":"), line.partition(b"="), key=lambda parts: len(parts[0]))
    name = said.strip(b" \t").decode("latin-1")
    return name if name in MHA_NAMES else None, value


def _nrrd_field(line: bytes) -> tuple[str | None, bytes]:
    """Likewise; `name:=value` is a key of somebody's own, and `#` starts a remark."""
    name, _, value = line.partition(b":")
    if value.startswith(b"="):
        return None, value
    return NRRD_NAMES.get(name.decode("latin-1").replace(" ", "").lower()), value


# --- layouts --------------------------------------------------------------------------------------------------------


def mha_layout(fields: Fields) -> Layout:
    """What MetaIO's tags say. ValueError where they cannot be used."""
    if fields.text("ObjectType") != "Image":
        raise fields.unusable("it is no image")
    sizes = fields.sizes("NDims", "DimSize")
    if fields.text("ElementNumberOfChannels", default="1") != "1":
        raise fields.colour()
    if fields.text("HeaderSize", default="0") != "0":
        raise fields.unusable("it skips a part of the file")
    if not fields.choice("BinaryData", of=BOOLEAN, default="true"):
        raise fields.unusable("its voxels are written as text")
    order = fields.choice("BinaryDataByteOrderMSB", "ElementByteOrderMSB", of=BOOLEAN, default="false")
    count = len(sizes)
    thick = fields.numbers("ElementSize", count=count, default=np.ones(count))
    spacing = fields.numbers("ElementSpacing", count=count, default=thick)
    turn = ("TransformMatrix", "Rotation", "Orientation")
    axes = fields.numbers(*turn, count=count**2, default=np.eye(count).ravel()).reshape(count, count)
    origin = fields.numbers("Offset", "Position", "Origin", count=count, default=np.zeros(count))
    affine = np.column_stack([(axes * spacing[:, None])[:3, :3].T, origin[:3]])  # a row of MHA's is an axis
    packed = fields.choice("CompressedData", of=BOOLEAN, default="false")
    return Layout(sizes, affine, fields.data_type("ElementType", MHA_TYPES, order), packed)


def nrrd_layout(fields: Fields) -> Layout:
    """What NRRD's fields say. ValueError where they cannot be used."""
    sizes = fields.sizes("dimension", "sizes")
    for skipped in ("line skip", "byte skip"):
        if fields.text(skipped, default="0") != "0":
            raise fields.unusable("it skips a part of the file")
    for corner in ("axis mins", "axis maxs"):
        if set(fields.text(corner, default="nan").lower().split()) != {"nan"}:
            raise fields.unusable("it places its axes one by one, and not in a space")
    axes, origin = _nrrd_grid(fields, len(sizes))
    if any(axis is None and size != 1 for axis, size in zip(axes, sizes, strict=True)):
        raise fields.colour()
    spatial = [(size, axis) for size, axis in zip(sizes, axes, strict=True) if axis is not None]
    affine = np.zeros((3, 4))
    for index, (_, axis) in enumerate(spatial[:3]):
        affine[:, index] = axis
    affine[:, 3] = origin
    one_byte = NRRD_TYPES.get(fields.text("type"), "")[-1:] == "1"
    order = fields.choice("endian", of={"little": False, "big": True}, default="little" if one_byte else None)
    packed = fields.choice("encoding", of={"raw": False, "gzip": True, "gz": True})
    return Layout(tuple(size for size, _ in spatial), affine, fields.data_type("type", NRRD_TYPES, order), packed)


def _nrrd_grid(fields: Fields, count: int) -> tuple[list[NDArray[np.float64] | None], NDArray[np.float64]]:
    """One voxel along each axis, None for an axis that is none of space; the first voxel. In mm in LPS."""
    kinds = fields.text("kinds", default="domain " * count).lower().split()
    if len(kinds) != count:
        raise fields.unusable(f"its “kinds” are not {count}")
    of_space = [kind in SPATIAL_KINDS for kind in kinds]
    if not {"space", "space dimension", "space directions", "space origin"} & fields.said.keys():
        return _nrrd_spacings(fields, of_space), np.zeros(3)
    said = fields.text("space directions")
    vectors = VECTOR.findall(said)
    if len(vectors) != count or VECTOR.sub("", said).strip() or "spacings" in fields.said:
        raise fields.unusable(f"its “space directions” are not {count}, or not all that is said of spacing")
    axes = [
        _nrrd_vector(fields, "space directions", vector) if spatial and vector != "none" else None
        for spatial, vector in zip(of_space, vectors, strict=True)
    ]
    origin = "space origin"
    return axes, _nrrd_vector(fields, origin, fields.text(origin)) if origin in fields.said else np.zeros(3)


def _nrrd_spacings(fields: Fields, of_space: list[bool]) -> list[NDArray[np.float64] | None]:
    """Where no space is named: to the left, to the back, to the head, and nowhere for a fourth axis."""
    steps = fields.numbers("spacings", count=len(of_space), default=np.ones(len(of_space)))
    beside = np.eye(3, len(of_space))
    return [
        step * beside[:, sum(of_space[:index])] if spatial else None
        for index, (step, spatial) in enumerate(zip(steps, of_space, strict=True))
    ]


def _nrrd_vector(fields: Fields, name: str, text: str) -> NDArray[np.float64]:
    """`(x,y,z)` of the header's space → LPS."""
    count, left, back = _nrrd_space(fields)
    if not VECTOR.fullmatch(text):
        raise fields.unusable(f"its “{name}” is no vector")
    numbers = fields.parse(name, [part.strip() for part in text[1:-1].split(",")], count)
    return numbers[:3] * (left, back, 1)


def _nrrd_space(fields: Fields) -> tuple[int, int, int]:
    """As in `NRRD_SPACES`."""
    if "space" not in fields.said:
        dimension = fields.text("space dimension")
        known = (int(dimension), 1, 1) if dimension in ("3", "4", "5") else None
    else:
        known = None if "space dimension" in fields.said else NRRD_SPACES.get(fields.text("space").lower())
    if known is None:
        raise fields.unusable("its “space” is none that is known here, or said twice")
    return known


def _grid_header(path: Path, shape: tuple[int, int, int], affine_lps: NDArray[np.float64]) -> nib.Nifti1Header:
    """The NIfTI header of a grid; affine_lps: (3, 4). ValueError where there is none."""
    spacing_mm = np.linalg.norm(affine_lps[:, :3], axis=0)
    if not np.isfinite(affine_lps).all() or not spacing_mm.all():
        raise ValueError(f"{path}: its spacing, direction or origin cannot be used: correct the header")
    if max(shape) > LARGEST_SIDE:
        raise ValueError(f"{path}: {max(shape)} voxels in a row are too many for a mask in NIfTI-1: crop the scan")
    affine = np.eye(4)
    affine[:3] = LPS_TO_RAS @ affine_lps
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_zooms(spacing_mm)
    header.set_sform(affine, code=1)
    try:
        header.set_qform(affine, code=1, strip_shears=True)
    except HeaderDataError as error:
        raise ValueError(f"{path}: its direction cannot be used ({error}): correct the header") from error
    header.set_xyzt_units("mm")
    return header
