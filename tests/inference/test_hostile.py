"""Files that were made to do harm, or damaged at random: read no more than they say, and nothing but themselves."""

from __future__ import annotations

import gzip
import os
import subprocess
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from inference.volume import read_volume

HU = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
SCAN = nib.Nifti1Image(HU, np.eye(4)).to_bytes()
VOX_OFFSET, DIM = 108, 40
HEADS = (
    SCAN[:348],
    b"NRRD0004\ntype: short\ndimension: 3\n",
    b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\n",
)
REPOSITORY = Path(__file__).resolve().parents[2]


def predict(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(REPOSITORY / "predict.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def with_field(offset: int, value: np.ndarray) -> bytes:
    content = bytearray(SCAN)
    content[offset : offset + value.nbytes] = value.tobytes()
    return bytes(content)


def peak_mib(path: Path, words: str | None) -> float:
    """Memory that reading takes at most; words: of the refusal, None where it is read."""
    tracemalloc.start()
    try:
        if words is None:
            read_volume(path)
        else:
            with pytest.raises(ValueError, match=words):
                read_volume(path)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_a_gzip_that_never_ends_is_read_as_far_as_its_header_says(tmp_path) -> None:
    """256 MiB of zeros after the voxels, in a file of 256 KiB."""
    path = tmp_path / "bomb_0000.nii.gz"
    path.write_bytes(gzip.compress(SCAN + bytes(2**28), 1))
    assert peak_mib(path, None) < 4
    np.testing.assert_array_equal(read_volume(path).geometry.to_file(read_volume(path).hu), HU)


def test_voxels_that_start_far_away_are_refused_unread(tmp_path) -> None:
    path = tmp_path / "far_0000.nii.gz"
    for start in (1e30, 2**28):
        path.write_bytes(gzip.compress(with_field(VOX_OFFSET, np.float32(start)) + bytes(2**28), 1))
        assert peak_mib(path, "voxels start at byte") < 4


def test_a_header_that_claims_terabytes_takes_no_memory(tmp_path) -> None:
    path = tmp_path / "huge_0000.nii"
    path.write_bytes(with_field(DIM, np.int16([3, 30000, 30000, 30000])))
    assert peak_mib(path, "more than 1073741824") < 4
    path.write_bytes(SCAN)
    with pytest.raises(ValueError, match="more than 100: crop it, or raise --max-voxels"):
        read_volume(path, max_voxels=100)


@pytest.mark.parametrize("place", ["secret.raw", "/etc/hostname", "../secret.raw", "LIST"])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_no_header_makes_us_read_another_file(tmp_path, suffix: str, place: str) -> None:
    (tmp_path / "secret.raw").write_bytes(HU.tobytes())
    if suffix == ".mha":
        head = f"ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\nElementDataFile = {place}\n"
    else:
        head = (
            f"NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\nendian: little\nencoding: raw\ndata file: {place}\n\n"
        )
    path = tmp_path / f"pointer{suffix}"
    path.write_text(head)
    if place == "secret.raw":  # it would be read otherwise
        assert SimpleITK.ReadImage(str(path)).GetSize() == (6, 5, 4)
    with pytest.raises(ValueError, match=f"pointer{suffix}: has its voxels in another file"):
        read_volume(path)


def test_links_out_of_the_inputs_are_not_followed(tmp_path, random_weights: Path) -> None:
    """Neither a link to a scan elsewhere, nor one by way of a linked folder; one within the inputs is a scan."""
    home, elsewhere, out = tmp_path / "in", tmp_path / "elsewhere", tmp_path / "out"
    for folder in (home, elsewhere):
        folder.mkdir()
        (folder / "real_0000.nii").write_bytes(SCAN)
    (home / "inner_0000.nii").symlink_to("real_0000.nii")
    (home / "linked_0000.nii").symlink_to("../elsewhere/real_0000.nii")
    options = ["--weights", str(random_weights), "--device", "cpu"]
    done = predict(str(home), str(out), *options)
    assert done.returncode == 1
    assert sorted(path.name for path in out.iterdir()) == ["inner.nii.gz", "real.nii.gz"]
    (told,) = [line for line in done.stderr.splitlines() if "failed" in line]
    assert "linked_0000.nii: is a link that leads out of" in told
    assert predict(str(home), str(out), *options, "--follow-links", "--skip-existing").returncode == 0
    assert (out / "linked.nii.gz").exists()


def test_a_mask_never_goes_through_a_link(tmp_path, random_weights: Path) -> None:
    """A link that lies where the mask belongs is replaced, and what it points to left alone."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.nii.gz").symlink_to(precious)
    (tmp_path / "x_0000.nii").write_bytes(SCAN)
    assert (
        predict(str(tmp_path / "x_0000.nii"), str(tmp_path / "out"), "--weights", str(random_weights)).returncode == 0
    )
    assert precious.read_text() == "mine"
    assert not (tmp_path / "out" / "x.nii.gz").is_symlink()


@pytest.mark.parametrize("name", ["pipe_0000.nii.gz", "pipe.mha"])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: is no regular file"):
        read_volume(tmp_path / name)


PRIVATE = "DOE^JANE 1970-01-01"


def private_nifti(path: Path) -> None:
    image = nib.Nifti1Image(HU, np.eye(4))
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = PRIVATE[: image.header[field].dtype.itemsize]
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", PRIVATE.encode()))
    nib.save(image, path)


def private_itk(path: Path) -> None:
    image = SimpleITK.GetImageFromArray(HU)
    image.SetMetaData("PatientName", PRIVATE)
    SimpleITK.WriteImage(image, str(path))


def test_private_text_of_a_header_stays_in_the_scan(tmp_path, random_weights: Path) -> None:
    (tmp_path / "in").mkdir()
    private_nifti(tmp_path / "in" / "a_0000.nii")
    private_itk(tmp_path / "in" / "b.mha")
    private_itk(tmp_path / "in" / "c.nrrd")
    for scan in (tmp_path / "in").iterdir():
        assert b"DOE^JANE" in scan.read_bytes()
    done = predict(
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--weights",
        str(random_weights),
        "--report",
        str(tmp_path / "r.json"),
    )
    assert done.returncode == 0, done.stderr
    masks = [gzip.decompress(mask.read_bytes()) for mask in (tmp_path / "out").iterdir()]
    assert len(masks) == 3
    for left in (*masks, done.stderr.encode(), done.stdout.encode(), (tmp_path / "r.json").read_bytes()):
        assert b"DOE" not in left
        assert b"1970" not in left


MHA = "ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\n"
DISGUISED = (
    "ElementDataFile: {place}\nElementDataFile = LOCAL\n",
    "Comment = x\rElementDataFile = LOCAL\nElementDataFile = {place}\n",
    "ElementDataFile\0x = {place}\nElementDataFile = LOCAL\n",
    "elementdatafile = {place}\nElementDataFile = LOCAL\n",
)


@pytest.mark.parametrize("place", ["secret.raw", "../secret.raw"])
@pytest.mark.parametrize("pointer", DISGUISED)
def test_no_disguise_makes_us_read_another_file(tmp_path, pointer: str, place: str) -> None:
    """What another reader of MHA may understand as a pointer."""
    (tmp_path / "secret.raw").write_bytes(HU.tobytes())
    path = tmp_path / "pointer.mha"
    path.write_bytes((MHA + pointer.format(place=place)).encode() + HU.tobytes())
    with pytest.raises(ValueError, match=r"pointer\.mha: (has its voxels in another file|cannot be read as an image)"):
        read_volume(path)


def test_another_format_does_not_pass_as_mha(tmp_path) -> None:
    """A DICOM file whose preamble holds the line that ends a MHA header."""
    path = tmp_path / "dicom.mha"
    preamble = b"ElementDataFile = LOCAL\n".ljust(128, b"\0")
    path.write_bytes(preamble + b"DICM" + bytes(400))
    with pytest.raises(ValueError, match=r"dicom\.mha: cannot be read as an image"):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_name_that_is_no_text_is_read_like_any_other(tmp_path, suffix: str, compressed: bool) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(HU), str(tmp_path / f"x{suffix}"), compressed)
    odd = tmp_path / os.fsdecode(b"caf\xe9" + suffix.encode())
    (tmp_path / f"x{suffix}").rename(odd)
    assert read_volume(odd).hu.shape == HU.shape


@pytest.mark.parametrize("spacing", [1e-6, 1249.0])
def test_spacings_that_would_take_any_memory_are_refused(tmp_path, spacing: float) -> None:
    path = tmp_path / "x_0000.nii"
    path.write_bytes(nib.Nifti1Image(HU[:2, :2, :2], np.diag([spacing, spacing, spacing, 1.0])).to_bytes())
    assert peak_mib(path, "is none of a CT: correct the header") < 4


def test_links_in_circles_and_long_names_cost_their_own_case(tmp_path, random_weights: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop.nii.gz").symlink_to("loop.nii.gz")
    for name in ("b" * 250 + ".nii", "_0000.nii", "good_0000.nii"):
        (tmp_path / "in" / name).write_bytes(SCAN)
    options = ["--weights", str(random_weights), "--skip-existing"]
    done = predict(str(tmp_path / "in"), str(tmp_path / "out"), *options)
    assert done.returncode == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.nii.gz"]
    assert [line.split(" ")[1] for line in done.stderr.splitlines()].count("status=failed") == 3
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_large_voxels_take_no_more_memory_than_hu(tmp_path, suffix: str) -> None:
    """2²² voxels of 8 bytes, packed: 8 MiB of HU, not the 32 of the voxels; a few copies of a block of 4 MiB beside."""
    path = tmp_path / f"x_0000{suffix}"
    values = np.arange(2.0**22).reshape(64, 256, 256) % 500
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), path, useCompression=True)
    assert peak_mib(path, None) < 8 + 20


def test_dimensions_that_crash_itk_are_refused(tmp_path) -> None:
    path = tmp_path / "many.mha"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(HU), str(path))
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", b"NDims =99999999999"))
    with pytest.raises(ValueError, match="number of dimensions"):
        read_volume(path)


@given(content=st.binary(max_size=700), suffix=st.sampled_from(fuzz.SUFFIXES), head=st.sampled_from([*HEADS, b""]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused_in_one_sentence(
    tmp_path_factory, content: bytes, suffix: str, head: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(head + content)
    fuzz.look(path)


def test_a_thousand_damaged_headers(tmp_path) -> None:
    seen = fuzz.run(1000, 1, tmp_path)
    assert sum(seen.values()) == 1000
    for suffix in fuzz.SUFFIXES:
        assert seen[suffix, "refused"] > 30
        assert seen[suffix, "read"] > 5
