"""The recipe of the real scans on eight small ones laid out as its data folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from training.anatomy import Organ
from training.data import load_case, read_folder, split
from training.organs import UNKNOWN

RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "real.py"
AFFINE = np.array([[-2, 0, 0, 9], [0, -2, 0, 8], [0, 0, 3, -7], [0, 0, 0, 1.0]])


def test_crops_hold_the_tumour_and_stay_where_they_were_in_space(tmp_path) -> None:
    """Each scan's HU tell their own place, so that a crop can be checked against the affine that it is written with."""
    data, out = tmp_path / "data", tmp_path / "out"
    for folder in ("sts/images", "sts/labels", "abdomen/images", "abdomen/organs"):
        (data / folder).mkdir(parents=True)
    i, j, k = np.indices((20, 24, 12))
    hu, label = (i + 20 * j + 480 * k - 1000).astype(np.int16), np.zeros(i.shape, np.uint8)
    label[6:11, 8:20, 5] = 1
    hu[7:11] = -100  # fat, behind the first voxel of any crop that holds the tumour
    for name in "ABCDEFGH":
        nib.save(nib.Nifti1Image(hu, AFFINE), data / "sts" / "images" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, AFFINE), data / "sts" / "labels" / f"{name}.nii.gz")
    trunk = np.random.default_rng(0).normal(50, 10, (40, 40, 30)).astype(np.int16)
    trunk[:, ::10] = -100  # fat, in every crop
    nib.save(nib.Nifti1Image(trunk, AFFINE), data / "abdomen" / "images" / "X_0000.nii.gz")
    codes = np.full(trunk.shape, 5, np.uint8)  # liver
    codes[:10], codes[-10:] = 22, 89  # a prostate, which no phantom has, and a muscle
    nib.save(nib.Nifti1Image(codes, AFFINE), data / "abdomen" / "organs" / "X.nii.gz")
    (data / "splits.json").write_text(json.dumps({"sts": {"train": list("ABCDEFGH"), "val": []}}))
    (out / "sarcomas" / "imagesTr").mkdir(parents=True)
    shutil.copy(data / "sts" / "images" / "A_0000.nii.gz", out / "sarcomas" / "imagesTr" / "old_0000.nii.gz")
    command = [sys.executable, str(RECIPE), str(data), str(out), "--crops", "4"]
    subprocess.run(command, check=True, cwd=RECIPE.parents[2], env={"PYTHONPATH": "."}, capture_output=True)
    shapes = set()
    for entry in read_folder(out / "sarcomas") + read_folder(out / "sarcomas_held_out"):
        scan = nib.Nifti1Image.from_filename(entry.scan)
        shapes.add(scan.shape)
        place = np.linalg.inv(AFFINE) @ scan.affine[:, 3]  # of the crop's first voxel in the whole scan
        assert scan.get_fdata().flat[0] == pytest.approx(np.dot(place[:3], (1, 20, 480)) - 1000)
        assert load_case(entry).label.sum() == label.sum()
    assert len(shapes) > 12  # of 26
    training, held_out = split((out / "sarcomas",), 6)
    assert [entry.patient for entry in training] == [*"AAAABBBB"]
    assert [entry.patient for entry in held_out] == [*"CDEFGH"]
    assert [entry.patient for entry in read_folder(out / "sarcomas_held_out")] == [*"CCDDEEFFGGHH"]
    assert sorted({entry.patient for entry in read_folder(out / "implants")}) == ["A", "B"]
    abdomen, held_out = split((out / "abdomen", out / "sarcomas"), 2)
    drawn = [entry for entry in abdomen if entry.patient == "X"]
    assert "X" not in {entry.patient for entry in held_out}  # one patient is wholly trained on
    assert len(drawn) == 20
    assert all(entry.annotated == "partial" for entry in drawn)
    cases = [load_case(entry) for entry in drawn]
    assert any(case.label.any() for case in cases)
    assert all(set(np.unique(case.organs)) == {Organ.LIVER, Organ.MUSCLE, UNKNOWN} for case in cases)
    middle = cases[0].organs[:, :, cases[0].organs.shape[2] // 2]
    assert (middle == Organ.LIVER).all()
