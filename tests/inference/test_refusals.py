"""Each kind of bad input: one sentence that names the file, and no mask."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from inference.volume import read_volume

HU = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)


def save(path: Path, array: np.ndarray, spacing_mm: float = 1, **fields: object) -> None:
    image = nib.Nifti1Image(array, np.diag([spacing_mm, spacing_mm, spacing_mm, 1]))
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)


def patch(path: Path, offset: int, values: np.ndarray) -> None:
    """Overwrite header bytes, which nibabel would not write like that."""
    content = bytearray(nib.Nifti1Image(HU, np.eye(4)).to_bytes())
    content[offset : offset + values.nbytes] = values.tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


PIXDIM, DIM, SROW, DATATYPE, QFORM_CODE, SFORM_CODE, VOX_OFFSET, QUATERN = 76, 40, 280, 70, 252, 254, 108, 256


def truncated_gzip(path: Path) -> None:
    save(path, HU)
    path.write_bytes(path.read_bytes()[:-20])


def truncated_data(path: Path) -> None:
    path.write_bytes(gzip.compress(nib.Nifti1Image(HU, np.eye(4)).to_bytes()[:-20]))


def with_voxel(value: float) -> Callable[[Path], None]:
    array = HU.astype(np.float32)
    array[2, 2, 2] = value
    return lambda path: save(path, array)


def broken_quaternion(path: Path) -> None:
    """A direction by quaternion alone, longer than one."""
    patch(path, QFORM_CODE, np.int16([1, 0]))
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[QUATERN : QUATERN + 12] = np.float32([7, 3, 5]).tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


def colour(path: Path) -> None:
    save(path, np.zeros(HU.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (lambda path: path.write_text("not a scan"), "holds no NIfTI-1 image"),
    "empty": (lambda path: path.write_bytes(b""), "holds no NIfTI-1 image"),
    "gzipped text": (lambda path: path.write_bytes(gzip.compress(b"hello" * 100)), "holds no NIfTI-1 image"),
    "truncated gzip": (truncated_gzip, "damaged or cut short"),
    "truncated data": (truncated_data, "ends before its last voxel"),
    "2-D": (lambda path: save(path, HU[:, :, 0]), "has 2 dimensions"),
    "4-D": (lambda path: save(path, np.stack([HU, HU], axis=-1)), "more than one volume"),
    "NaN": (with_voxel(np.nan), "NaN or infinite"),
    "infinite": (with_voxel(np.inf), "NaN or infinite"),
    "zero spacing": (lambda path: patch(path, PIXDIM + 4, np.float32([0])), "not positive"),
    "negative spacing": (lambda path: patch(path, PIXDIM + 8, np.float32([-1])), "not positive"),
    "NaN spacing": (lambda path: patch(path, PIXDIM + 8, np.float32([np.nan])), "not positive"),
    "singular": (lambda path: patch(path, SROW, np.float32([0, 1, 0, 0])), "singular"),
    "infinite origin": (lambda path: patch(path, SROW + 12, np.float32([np.inf])), "origin is not a finite number"),
    "NaN direction": (lambda path: patch(path, SROW, np.float32([np.nan, 1, 0, 0])), "singular"),
    "colour": (colour, "colour"),
    "complex": (lambda path: save(path, HU.astype(np.complex64)), "complex"),
    "unknown type": (lambda path: patch(path, DATATYPE, np.int16([4242])), "header cannot be read"),
    "no type": (lambda path: patch(path, DATATYPE, np.int16([0])), "names no type"),
    "a trunk of 12 m": (lambda path: save(path, np.tile(HU, (100, 1, 1)), 20), r"would be 0\.08 × 0\.1 × 12 m large"),
    "2 m wide": (lambda path: save(path, np.tile(HU, (17, 20, 1)), 20), r"would be 0\.08 × 2 × 2\.04 m large"),
    "voxels of 30 mm": (lambda path: save(path, HU, 30), "is none of a CT: correct the header"),
    "a broken quaternion": (broken_quaternion, "header cannot be read"),
    "NaN offset": (lambda path: patch(path, VOX_OFFSET, np.float32([np.nan])), "header cannot be read"),
    "constant": (lambda path: save(path, np.zeros_like(HU)), "no HU"),
    "no voxels": (lambda path: patch(path, DIM, np.int16([3, 0, 5, 4])), "no voxels"),
    "huge": (lambda path: patch(path, DIM, np.int16([3, 32767, 32767, 32767])), "crop it, or raise --max-voxels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused_with_one_sentence(tmp_path: Path, kind: str) -> None:
    make, words = BAD[kind]
    path = tmp_path / "bad_0000.nii.gz"
    make(path)
    with pytest.raises(ValueError, match=words) as caught:
        read_volume(path)
    message = str(caught.value)
    assert "bad_0000.nii.gz" in message
    assert "\n" not in message


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone_0000.nii.gz: cannot be read \(No such file"):
        read_volume(tmp_path / "gone_0000.nii.gz")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_other_formats_are_refused_alike(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(b"NRRD0004\nnonsense" if suffix == ".nrrd" else b"ObjectType = nonsense")
    with pytest.raises(ValueError, match=f"bad{suffix}: cannot be read as an image"):
        read_volume(path)
    colours = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(colours, str(path))
    with pytest.raises(ValueError, match="colour"):
        read_volume(path)
    flat = SimpleITK.GetImageFromArray(np.arange(20, dtype=np.int16).reshape(4, 5))
    SimpleITK.WriteImage(flat, str(path))
    with pytest.raises(ValueError, match="2 dimensions"):
        read_volume(path)
    notes = SimpleITK.GetImageFromArray(np.full((4, 5, 6), np.nan, np.float32))
    SimpleITK.WriteImage(notes, str(path))
    with pytest.raises(ValueError, match="NaN"):
        read_volume(path)


def test_sides_beyond_nifti_are_refused(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(np.arange(40000, dtype=np.int16).reshape(1, 1, 40000))
    SimpleITK.WriteImage(image, str(tmp_path / "long.nrrd"))
    with pytest.raises(ValueError, match=r"long.nrrd: 40000 voxels in a row are too many"):
        read_volume(tmp_path / "long.nrrd")


def test_a_name_that_is_no_scans_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"scan.png: not a scan by its name"):
        read_volume(tmp_path / "scan.png")
