"""Files that were made to do harm, or damaged at random: read no more than they say, and nothing but themselves."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from benchmarks import fuzz
from inference.volume import read_volume

HU = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
SCAN = nib.Nifti1Image(HU, np.eye(4)).to_bytes()
VOX_OFFSET, DIM = 108, 40


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


def test_dimensions_that_crash_itk_are_refused(tmp_path) -> None:
    path = tmp_path / "many.mha"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(HU), str(path))
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", b"NDims =99999999999"))
    with pytest.raises(ValueError, match="number of dimensions"):
        read_volume(path)


def test_a_thousand_damaged_headers(tmp_path) -> None:
    seen = fuzz.run(1000, 1, tmp_path)
    assert sum(seen.values()) == 1000
    for suffix in fuzz.SUFFIXES:
        assert seen[suffix, "refused"] > 30
        assert seen[suffix, "read"] > 5
