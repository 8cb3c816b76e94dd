"""MHA and NRRD: what ITK reads of a file is what we read, or the file is refused in one sentence."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.text_headers import PACKED_BYTES, Unpacked, read_fields
from inference.volume import read_volume

pytestmark = pytest.mark.filterwarnings("error")  # what a library prints is no sentence
HU = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype("<i2")  # (z, y, x)
MHA = "ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\n"
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\nencoding: raw\nendian: little\n"
SCALED = "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)"
SLICER = "space directions: (2,0,0) (0,3,0) (0,0,4) none\nspace origin: (1,2,3)\nkinds: domain domain domain list"


def mha(path: Path, more: str = "", content: bytes = HU.tobytes(), start: str = MHA) -> Path:
    path.write_bytes((start + more + "\nElementDataFile = LOCAL\n").encode() + content)
    return path


def nrrd(path: Path, more: str = "", content: bytes = HU.tobytes(), start: str = NRRD) -> Path:
    path.write_bytes(f"{start}{more}{more and chr(10)}\n".encode() + content)
    return path


def assert_like_itk(path: Path) -> None:
    """The same HU at the same places of the patient: our grid's corners, written as NIfTI counts, are ITK's."""
    image, read = SimpleITK.ReadImage(str(path)), read_volume(path)
    if image.GetDimension() == 4:
        image = image[..., 0]
    if image.GetNumberOfComponentsPerPixel() == 1 and "vector" in image.GetPixelIDTypeAsString():
        image = SimpleITK.VectorIndexSelectionCast(image, 0)
    by_file = SimpleITK.GetArrayFromImage(image).T
    np.testing.assert_array_equal(read.geometry.to_file(read.hu), np.clip(np.rint(by_file), -1024, 32767))
    affine = read.geometry.header.get_best_affine()
    for corner in np.ndindex(2, 2, 2):
        index = [int(n) for n in (np.array(by_file.shape) - 1) * corner]
        ours = (affine @ [*index, 1])[:3] * (-1, -1, 1)
        np.testing.assert_allclose(ours, image.TransformIndexToPhysicalPoint(index), atol=1e-3)


TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3).filter(lambda shape: np.prod(shape) > 1),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    origin=st.tuples(*[st.floats(-900, 900)] * 3),
    data_type=st.sampled_from(TYPES),
    suffix=st.sampled_from([".mha", ".nrrd"]),
    packed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_itk_writes(tmp_path, shape, spacing, origin, data_type, suffix, packed, seed) -> None:
    """Any type of voxels, any turned grid, packed or not."""
    rng = np.random.default_rng(seed)
    values = rng.permutation(np.arange(np.prod(shape)) % 120).reshape(shape).astype(data_type)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(turn.ravel())
    path = tmp_path / f"x{suffix}"
    SimpleITK.WriteImage(image, str(path), packed)
    assert_like_itk(path)


@pytest.mark.parametrize(
    "more",
    [
        *("ElementSize = 2 3 4", "ElementSpacing = 2 3 4\nElementSize = 5 6 7", "ElementSpacing = 2 3 -4"),
        *("Offset: 1 2 3", "Position = 1 2 3", "Origin = -1e1 .5 3."),
        *(f"{name} = 0 1 0 -1 0 0 0 0 1" for name in ("TransformMatrix", "Rotation", "Orientation")),
        "AnatomicalOrientation = LPS\nDistanceUnits = cm",  # ITK makes nothing of them
        "ElementToIntensityFunctionSlope = 2\nElementToIntensityFunctionOffset = 5",  # nor of these
        "ElementNumberOfChannels = 1\nHeaderSize = 0\nBinaryData = True\nComment = a: b = c",
        "elementspacing = 2 3 4\noffset = 1 2 3\nbinarydatabyteordermsb = True",  # other names to MetaIO
        "PatientName = \x1b$B;3ED\x1b(B\nother = \x07\xa0\x85",  # what DICOM texts look like
    ],
)
def test_mha_as_itk_understands_it(tmp_path, more: str) -> None:
    assert_like_itk(mha(tmp_path / "x.mha", more))


@pytest.mark.parametrize(
    "more",
    [
        *(f"space: {name}\n{SCALED}" for name in ("left-posterior-superior", "LPS", "RAS", "left-anterior-superior")),
        *(f"space: {name}\n{SCALED}" for name in ("scanner-xyz", "3D-right-handed", "right-anterior-superior")),
        *(f"space dimension: 3\n{SCALED}", "spacings: 2 3 4", "spacings: 2 3 -4", "kinds: domain space domain"),
        "space: LPS\nspace directions: (2,0.1,0) (0, 3, 0) (0,5e-1,4)",  # askew, and nothing said of the origin
        f'space: 3D-left-handed\n{SCALED}\nmeasurement frame: (1,0,0) (0,1,0) (0,0,1)\nspace units: "mm" "mm" "mm"',
        "SPACE: lps\nSpaceDirections: (2,0,0) (0,3,0) (0,0,4)\naxis mins: nan nan nan\nData File:=x",
        "# a remark: more\nkey:=value\nold min: 0\nold max: 100\nthicknesses: 1 1 1\nline skip: 0",
    ],
)
def test_nrrd_as_itk_understands_it(tmp_path, more: str) -> None:
    assert_like_itk(nrrd(tmp_path / "x.nrrd", more))


@pytest.mark.parametrize(
    ("more", "dimension", "sizes"),
    [
        (f"space: LPS\n{SLICER}", 4, "6 5 4 1"),
        ("kinds: vector domain domain domain\nspacings: nan 2 3 4", 4, "1 6 5 4"),
        ("", 4, "6 5 4 1"),
        ("space: LPST\nspace directions: (2,0,0,0) (0,3,0,0) (0,0,4,0) (0,0,0,5)", 4, "6 5 4 1"),
    ],
)
def test_an_axis_of_one_that_is_none_of_space(tmp_path, more: str, dimension: int, sizes: str) -> None:
    start = NRRD.replace("dimension: 3", f"dimension: {dimension}").replace("6 5 4", sizes)
    assert_like_itk(nrrd(tmp_path / "x.nrrd", more, start=start))


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("more_axes", [1, 2])
def test_one_volume_of_more_axes_as_itk_writes_it(tmp_path, suffix: str, more_axes: int) -> None:
    image = SimpleITK.GetImageFromArray(HU[(None,) * more_axes], isVector=False)
    image.SetSpacing((2, 3, 4, *[1] * more_axes))
    image.SetOrigin((10, 20, 30, *[0] * more_axes))
    SimpleITK.WriteImage(image, str(tmp_path / f"x{suffix}"))
    read = read_volume(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(read.hu, HU)
    expected = [[-2, 0, 0, -10], [0, -3, 0, -20], [0, 0, 4, 30], [0, 0, 0, 1]]
    np.testing.assert_array_equal(read.geometry.header.get_best_affine(), expected)


@pytest.mark.parametrize("end", ["ElementDataFile = LOCAL", " ElementDataFile: local ", "ElementDataFile\t=\tLocal\t"])
def test_where_a_header_of_mha_ends(tmp_path, end: str) -> None:
    path = tmp_path / "x.mha"
    for line_end in ("\n", "\r\n"):
        path.write_bytes((MHA + end + "\n").replace("\n", line_end).encode() + HU.tobytes())
        assert_like_itk(path)


def test_lines_that_end_as_on_windows(tmp_path) -> None:
    path = nrrd(tmp_path / "x.nrrd", f"space: RAS\n{SCALED}", b"")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + HU.tobytes())
    assert_like_itk(path)


def test_members_of_gzip_one_after_the_other(tmp_path) -> None:
    content = HU.tobytes()
    packed = gzip.compress(b"") + gzip.compress(content[:77]) + gzip.compress(content[77:]) + b"and something else"
    assert_like_itk(nrrd(tmp_path / "x.nrrd", content=packed, start=NRRD.replace("raw", "gzip")))


@pytest.mark.parametrize("at_hand", [0, 1, 2])
def test_a_member_that_starts_where_the_file_is_read_on(tmp_path, at_hand: int) -> None:
    """So many of its bytes are read together with the end of the member before."""
    first = member(PACKED_BYTES - at_hand)
    assert len(first) == PACKED_BYTES - at_hand
    (tmp_path / "two").write_bytes(first + gzip.compress(b"second"))
    with (tmp_path / "two").open("rb") as file:
        assert Unpacked(file).read(PACKED_BYTES + 10).endswith(b"second")


def member(length: int) -> bytes:
    """One of gzip, unpacked in one block: 18 bytes about it, and 5 at its start."""
    return gzip.compress(bytes(length - 23), 0)


def test_four_axes_of_mha(tmp_path) -> None:
    start = MHA.replace("NDims = 3", "NDims = 4").replace("6 5 4", "6 5 4 1")
    assert_like_itk(mha(tmp_path / "x.mha", "ElementSpacing = 2 3 4 1\nOffset = 1 2 3 0", start=start))


@pytest.mark.parametrize("name", ["MET_LONG", "MET_ULONG"])
def test_a_long_of_mha_has_four_bytes(tmp_path, name: str) -> None:
    assert_like_itk(mha(tmp_path / "x.mha", content=HU.astype("<i4").tobytes(), start=MHA.replace("MET_SHORT", name)))


def test_the_other_order_of_bytes(tmp_path) -> None:
    swapped = HU.astype(">i2").tobytes()
    assert_like_itk(mha(tmp_path / "x.mha", "BinaryDataByteOrderMSB = True", swapped))
    assert_like_itk(mha(tmp_path / "x.mha", "ElementByteOrderMSB = True", swapped))
    assert_like_itk(nrrd(tmp_path / "x.nrrd", content=swapped, start=NRRD.replace("little", "big")))


def test_names_of_types_as_itk_knows_them(tmp_path) -> None:
    names = ("signed char", "uint8_t", "short int", "unsigned short int", "int32_t", "uint", "long long", "ulonglong")
    for name, code in zip(names, ("i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8"), strict=True):
        content = (HU & 63).astype(code).tobytes()
        assert_like_itk(nrrd(tmp_path / "x.nrrd", content=content, start=NRRD.replace("short", name)))


REFUSED = {  # what is said, and the words of the refusal
    "two spacings": ("ElementSpacing = 1 1 1\nElementSpacing = 2 2 2", "more than one “ElementSpacing”"),
    "two origins": ("Offset = 1 1 1\nOrigin = 2 2 2", "more than one “Offset”"),
    "two numbers": ("ElementSpacing = 1 1", "“ElementSpacing” is not 3 numbers"),
    "no numbers": ("ElementSpacing =", "“ElementSpacing” is not 3 numbers"),
    "underscores": ("ElementSpacing = 1_0 1 1", "“ElementSpacing” is not 3 numbers"),
    "not finite": ("Offset = nan 0 0", "spacing, direction or origin cannot be used"),
    "infinite": ("Offset = 1e999 0 0", "“Offset” is far too large"),
    "beyond float32": ("ElementSpacing = 1e39 1 1", "“ElementSpacing” is far too large"),
    "turned too far": ("TransformMatrix = 1e200 0 0 0 1 0 0 0 1", "“TransformMatrix” is far too large"),
    "too small": ("ElementSpacing = 1e-300 1 1", "spacing, direction or origin cannot be used"),
    "flat": ("ElementSpacing = 1 0 1", "spacing, direction or origin cannot be used"),
    "singular": ("TransformMatrix = 1 0 0 1 0 0 0 0 1", "direction is singular"),
    "text": ("BinaryData = False", "its voxels are written as text"),
    "skipped": ("HeaderSize = -1", "it skips a part of the file"),
    "maybe": ("CompressedData = may\x85be", "“CompressedData” is none of true, false\\): export"),
    "colour": ("ElementNumberOfChannels = 3", "colour or complex"),
}
REFUSED_NRRD = {
    "no space": (SCALED, "no “space dimension”"),
    "another space": (f"space: elsewhere\n{SCALED}", "its “space” is none"),
    "a space and its dimension": (f"space: LPS\nspace dimension: 3\n{SCALED}", "its “space” is none .*, or said twice"),
    "a space without directions": ("space: RAS\nspacings: 2 3 4\nspace origin: (1,2,3)", "no “space directions”"),
    "an origin without a space": ("spacings: 2 3 4\nspace origin: (1,2,3)", "no “space directions”"),
    "time": (f"space: LPST\n{SCALED}", "“space directions” is not 4 numbers"),
    "RAS with time": ("space: RAST\nspace directions: (1,0,0,0) (0,1,0,0) (0,0,1,0)", "its “space” is none"),
    "twice": ("type: short", "more than one “type”"),
    "spaced twice": (f"space: LPS\n{SCALED}\nspacings: 1 1 1", "not all that is said of spacing"),
    "two vectors": ("space: LPS\nspace directions: (1,0,0) (0,1,0)", "“space directions” are not 3"),
    "signs before vectors": ("space: LPS\nspace directions: -(2,0,0) (0,3,0) (0,0,4)", "not all that is said"),
    "two brackets": (f"space: LPS\n{SCALED.replace('(10,20,30)', '((10,20,30))')}", "“space origin” is no vector"),
    "no brackets": (f"space: LPS\n{SCALED.replace('(10,20,30)', '10,20,30')}", "“space origin” is no vector"),
    "placed": ("axis mins: 1 2 3", "places its axes one by one"),
    "skipped": ("byte skip: -1", "it skips a part of the file"),
    "skipped lines": ("line skip: 1", "it skips a part of the file"),
    "list": ("kinds: domain domain list", "colour or complex"),
    "two kinds": ("kinds: domain domain", "“kinds” are not 3"),
    "not finite": ("spacings: 1 nan 1", "spacing, direction or origin cannot be used"),
    "infinite": ("spacings: 1e999 1 1", "“spacings” is far too large"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_mha_that_leaves_doubts(tmp_path, kind: str) -> None:
    more, words = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"x\.mha: .*{words}"):
        read_volume(mha(tmp_path / "x.mha", more))


@pytest.mark.parametrize("kind", REFUSED_NRRD)
def test_nrrd_that_leaves_doubts(tmp_path, kind: str) -> None:
    more, words = REFUSED_NRRD[kind]
    with pytest.raises(ValueError, match=rf"x\.nrrd: .*{words}"):
        read_volume(nrrd(tmp_path / "x.nrrd", more))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("endian: little\n", "", "no “endian”"),
        ("endian: little", "endian: middle", "“endian” is none of little, big"),
        ("encoding: raw", "encoding: hex", "“encoding” is none of raw, gzip, gz"),
        ("type: short", "type: block", "“type” is no type of voxels"),
        ("6 5 4", "6 5", "“sizes” is not 3 whole numbers"),
        ("6 5 4", "6 5 -4", "“sizes” is not 3 whole numbers"),
    ],
)
def test_nrrd_without_what_it_needs(tmp_path, old: str, new: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_volume(nrrd(tmp_path / "x.nrrd", start=NRRD.replace(old, new)))


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_cut_short_or_damaged(tmp_path, suffix: str, packed: bool) -> None:
    path = tmp_path / f"short{suffix}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(HU), str(path), packed)
    whole = path.read_bytes()
    for missing in (1, 60):
        path.write_bytes(whole[:-missing])
        with pytest.raises(ValueError, match=f"short{suffix}: .*(ends before|damaged or cut short).*copy it again"):
            read_volume(path)
    if packed:  # the last bytes are the checksum's
        path.write_bytes(whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])
        with pytest.raises(ValueError, match="damaged or cut short"):
            read_volume(path)


def test_a_packed_stream_is_unpacked_as_far_as_is_asked(tmp_path) -> None:
    """2²⁸ zeros in 256 KiB: neither a part of them nor the end takes the memory of all."""
    (tmp_path / "zeros").write_bytes(zlib.compress(bytes(2**28), 1))
    tracemalloc.start()
    with (tmp_path / "zeros").open("rb") as file:
        stream = Unpacked(file)
        assert [len(stream.read(count)) for count in (1, 2**20, 0, 3)] == [1, 2**20, 0, 3]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_what_was_held_back_comes_at_the_end_of_the_file(tmp_path) -> None:
    """zlib keeps unpacked bytes after it took the last packed one."""
    (tmp_path / "zeros").write_bytes(zlib.compress(bytes(100_000)))
    with (tmp_path / "zeros").open("rb") as file:
        stream = Unpacked(file)
        assert sum(len(stream.read(1000)) for _ in range(100)) == 100_000
        assert stream.read(1) == b""


@pytest.mark.parametrize("part", [" ", "9", "9e", "(", "=", ":", "none", "data file "])
def test_a_header_of_half_a_mebibyte_is_refused_like_a_short_one(tmp_path, part: str) -> None:
    """No pattern may look at it again from each of its letters: these few would take minutes."""
    line = part * (2**19 // len(part)) + "x"
    with pytest.raises(ValueError, match="“ElementSpacing” is not 3 numbers"):
        read_volume(mha(tmp_path / "x.mha", f"ElementSpacing = {line}"))
    with pytest.raises(ValueError, match="“spacings” is not 3 numbers"):
        read_volume(nrrd(tmp_path / "x.nrrd", f"spacings: {line}"))
    with pytest.raises(ValueError, match=r"are not 3"):
        read_volume(nrrd(tmp_path / "x.nrrd", f"space: LPS\nspace directions: {line}"))


def test_fields_are_told_apart(tmp_path) -> None:
    content = NRRD.encode() + b"spacedirections: (1,0,0)\nkey:=a: b\n# type: int\nother: 1\n\n\x00\x01"
    fields, start = read_fields(tmp_path / "x", content)
    assert content[start:] == b"\x00\x01"
    assert fields.said["space directions"] == ["(1,0,0)"]
    assert fields.said["type"] == ["short"]
    assert len(fields.said) == 6  # type, dimension, sizes, encoding, endian, and the directions


def test_a_header_without_end_names_the_limit(tmp_path) -> None:
    path = tmp_path / "x.nrrd"
    path.write_bytes(NRRD.encode() + b"key:=value\n" * 2**19)
    with pytest.raises(ValueError, match="its header has no end within 4 MiB"):
        read_volume(path)
