"""Reading masks: casts and notes as the official script would have it, and refusals."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from eval.cases import case_of, files_by_case, read_table, write_json, write_table
from eval.masks import check_same_grid, check_same_shape, grid_distance_mm, read_mask

AFFINE = np.array([[0.8, 0, 0.1, -10], [0, -0.8, 0, 20], [0, 0.2, 3, 5], [0, 0, 0, 1.0]])


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, dtype: type | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, affine, dtype=dtype), path)
    return path


NO_NUMBERS = "values that are no number, which count as 0"


def test_fractions_are_cut_off_and_told(tmp_path: Path) -> None:
    mask = read_mask(write(tmp_path / "x.nii.gz", np.array([[[0.0, 0.9999, 1.0]]], np.float32)))
    assert mask.voxels.tolist() == [[[0, 0, 1]]]
    assert mask.voxels.dtype == np.uint8
    assert mask.notes == ("fractions, which are cut off (0.9999 counts as 0)",)


@pytest.mark.parametrize(
    ("values", "dtype", "voxels", "note"),
    [
        ([0, 1, 2], np.uint8, [0, 1, 2], "labels above 1 (up to 2)"),
        ([0, 1, 1], np.float32, [0, 1, 1], "stored as floats"),
        ([0, 1, np.nan], np.float32, [0, 1, 0], f"{NO_NUMBERS}; stored as floats"),
        ([0, 2, np.nan], np.float32, [0, 2, 0], f"{NO_NUMBERS}; labels above 1 (up to 2); stored as floats"),
        ([0, 1, 300], np.int16, [0, 1, 44], "labels above 1 (up to 300)"),  # 300 − 256, as numpy casts
        ([0, 1, -1], np.int8, [0, 1, 255], "negative labels (down to -1)"),
        ([1, 256, 301], np.float32, [1, 0, 45], "labels above 1 (up to 301); stored as floats"),
        ([1, np.inf], np.float32, [1, 0], "labels above 1 (up to inf); stored as floats"),
        ([1, -1], np.float32, [1, 255], "negative labels (down to -1); stored as floats"),
        ([0, 1, 1], np.int16, [0, 1, 1], ""),
    ],
)
def test_odd_labels_are_told(tmp_path: Path, values, dtype, voxels, note) -> None:
    mask = read_mask(write(tmp_path / "x.nii.gz", np.array([[values]], dtype)))
    assert mask.voxels.ravel().tolist() == voxels
    assert "; ".join(mask.notes) == note


def test_spacing_and_a_fourth_axis_of_one(tmp_path: Path) -> None:
    mask = read_mask(write(tmp_path / "x.nii.gz", np.zeros((2, 3, 4, 1), np.uint8), np.diag([0.5, 0.5, 4, 1.0])))
    assert mask.voxels.shape == (2, 3, 4)
    assert mask.spacing_mm == (0.5, 0.5, 4)
    assert mask.voxel_ml == pytest.approx(0.001)
    assert mask.notes == ("a fourth axis, at which the official script fails",)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.nii.gz", np.random.default_rng(0).integers(0, 2, (20, 20, 20)).astype(np.uint8))
    (tmp_path / "cut.nii.gz").write_bytes(whole.read_bytes()[:400])
    (tmp_path / "text.nii.gz").write_text("not a mask")
    write(tmp_path / "flat.nii.gz", np.zeros((4, 4), np.uint8))
    write(tmp_path / "four.nii.gz", np.zeros((4, 4, 2, 2), np.uint8))
    write(tmp_path / "complex.nii.gz", np.zeros((2, 2, 2), np.complex64))
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(whole.read_bytes()[:100]))
    infinite = bytearray(gzip.decompress(whole.read_bytes()))
    infinite[108:112] = np.float32([np.inf]).tobytes()  # where the voxels begin
    (tmp_path / "infinite.nii.gz").write_bytes(gzip.compress(bytes(infinite)))
    wide = bytearray(gzip.decompress(whole.read_bytes()))
    wide[84:88] = np.float32([np.inf]).tobytes()  # pixdim[2], the spacing of j
    (tmp_path / "wide.nii.gz").write_bytes(gzip.compress(bytes(wide)))
    for name in ("cut", "text", "flat", "four", "complex", "gone", "empty", "short", "infinite", "wide"):
        with pytest.raises(ValueError, match=rf"{name}\.nii\.gz: .*: ") as refused:
            read_mask(tmp_path / f"{name}.nii.gz")
        assert "\n" not in str(refused.value)


def test_grids_are_compared_by_their_corners(tmp_path: Path) -> None:
    shape = (11, 21, 31)
    reference = read_mask(write(tmp_path / "r.nii.gz", np.zeros(shape, np.uint8)))
    same = AFFINE.copy()
    same[0, 3] += 0.004
    check_same_grid(read_mask(write(tmp_path / "same.nii.gz", np.zeros(shape, np.uint8), same)), reference)
    turned = AFFINE.copy()
    turned[:, 1] *= -1  # the last of 21 rows lies 2 · 20 · √(0.8² + 0.2²) mm away
    other = read_mask(write(tmp_path / "turned.nii.gz", np.zeros(shape, np.uint8), turned))
    assert grid_distance_mm(turned, AFFINE, shape) == pytest.approx(40 * np.hypot(0.8, 0.2))
    with pytest.raises(
        ValueError, match=r"turned\.nii\.gz: its grid differs from that of .*r\.nii\.gz by up to 32\.98"
    ):
        check_same_grid(other, reference)
    check_same_shape(other, reference)
    small = read_mask(write(tmp_path / "small.nii.gz", np.zeros((11, 21, 30), np.uint8)))
    with pytest.raises(ValueError, match=r"small\.nii\.gz: \(11, 21, 30\) voxels, but .*r\.nii\.gz has \(11, 21, 31\)"):
        check_same_shape(small, reference)


def test_cases_and_their_files(tmp_path: Path) -> None:
    assert [case_of(name) for name in ("x_0000.nii.gz", "x.nii.gz", "a/b.c_0000.nii.gz")] == ["x", "x", "b.c"]
    for name in ("b.nii.gz", "a_0000.nii.gz", ".hidden.nii.gz", "notes.txt"):
        (tmp_path / name).write_text("")
    assert list(files_by_case(tmp_path, "mask")) == ["a", "b"]
    (tmp_path / "a.nii.gz").write_text("")
    with pytest.raises(ValueError, match=r"a_0000\.nii\.gz: the same case as a\.nii\.gz|the same case as a_0000"):
        files_by_case(tmp_path, "mask")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no reference"):
        files_by_case(tmp_path / "empty", "reference")
    with pytest.raises(ValueError, match="no such folder"):
        files_by_case(tmp_path / "gone", "reference")


def test_what_is_called_like_a_mask_but_is_none(tmp_path: Path) -> None:
    for name in ("folder", "link", "bytes"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "x.nii.gz").mkdir()
    (tmp_path / "link" / "x.nii.gz").symlink_to("nowhere")
    Path(os.fsdecode(bytes(tmp_path / "bytes") + b"/x\xff.nii.gz")).touch()
    for name, sentence in (
        ("folder", r"x\.nii\.gz: is a folder, though called like a mask"),
        ("link", r"x\.nii\.gz: is a link to nothing"),
        ("bytes", r"bytes: the name x\ufffd\.nii\.gz is not UTF-8: rename the mask"),
    ):
        with pytest.raises(ValueError, match=sentence):
            files_by_case(tmp_path / name, "mask")


def test_tables_and_json_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, values = tmp_path / "a.csv", tmp_path / "a.json"
    write_table(table, [{"Name": "é"}], ["Name"])
    write_json(values, [1])
    before = table.read_bytes(), values.read_bytes()

    def full(path: Path, content: bytes) -> None:
        path.open("wb").write(content[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_table(table, [{"Name": "half"}], ["Name"])
    with pytest.raises(OSError, match="No space"):
        write_json(values, {"half": 1})
    monkeypatch.undo()
    assert (table.read_bytes(), values.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]
    assert read_table(table, ["Name"]) == [{"Name": "é"}]
    (tmp_path / "link.json").symlink_to(values)
    write_json(tmp_path / "link.json", [2])
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads(values.read_text()) == [2]
    with pytest.raises(ValueError, match="/dev/null: is no ordinary file"):
        write_json(Path("/dev/null"), [2])


def test_tables_of_spreadsheets(tmp_path: Path) -> None:
    (tmp_path / "mark.csv").write_bytes("\ufeffName,Time\nx,1\n".encode())
    assert read_table(tmp_path / "mark.csv", ["Name", "Time"]) == [{"Name": "x", "Time": "1"}]
    (tmp_path / "twice.csv").write_text("Name,Time,Time,,\nx,1,2,,\n")
    assert read_table(tmp_path / "twice.csv", ["Name"])[0]["Name"] == "x"
    with pytest.raises(ValueError, match=r"twice\.csv: has two columns Time"):
        read_table(tmp_path / "twice.csv", ["Name", "Time"])
