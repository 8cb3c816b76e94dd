"""The accuracy command on folders of masks, in a process of its own."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from eval.accuracy import Settings

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def write(folder: Path, case: str, voxels: list[int], label: int = 1, affine: np.ndarray = AFFINE) -> None:
    folder.mkdir(exist_ok=True)
    array = np.zeros((20, 2, 2), np.uint8)
    array[voxels, 0, 0] = label
    nib.save(nib.Nifti1Image(array, affine), folder / f"{case}.nii.gz")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Four scans: one half right, one perfect healthy, one healthy with a false lesion, one without a prediction."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    write(references, "half", [3, 4, 5, 6])
    write(predictions, "half", [5, 6, 12])
    for case, found in (("healthy", []), ("alarmed", [9])):
        write(references, case, [])
        write(predictions, case, found)
    write(references, "missing", [2])
    return predictions, references, tmp_path / "out"


def test_tables_and_summary_by_hand(folders) -> None:
    predictions, references, out = folders
    write(predictions, "extra", [1])
    assert Settings(predictions, references, out=out, jobs=2).run() == 1
    assert (out / "accuracy.csv").read_text().splitlines()[0] == "Name,Lesion_DSC,Lesion_NSD"
    official = rows(out / "accuracy.csv")
    assert [row["Name"] for row in official] == [f"{c}.nii.gz" for c in ("alarmed", "half", "healthy", "missing")]
    dsc = [float(row["Lesion_DSC"]) for row in official]
    assert dsc == [0, 0.5714, 1, 0]  # 2·2 / (3 + 4)
    assert [float(row["Lesion_NSD"]) for row in official][::2] == [0, 1]
    values = json.loads((out / "accuracy.json").read_text())
    assert values["missing"] == ["missing.nii.gz"]
    assert values["errors"] == {}
    summary = values["summary"]
    assert summary["dsc"]["mean"] == pytest.approx(np.mean(dsc))
    assert summary["dsc"]["sd"] == pytest.approx(np.std(dsc, ddof=1))
    assert summary["dsc"]["low"] <= summary["dsc"]["mean"] <= summary["dsc"]["high"]
    # lesions: one in `half`, found; one in `missing`, not. Predicted: 5-6 (true), 12 (false), 9 (false)
    assert summary["lesion_sensitivity"] == 0.5
    assert summary["lesion_precision"] == pytest.approx(1 / 3, abs=1e-4)
    assert summary["false_positives_per_scan"] == 2 / 4
    assert (summary["healthy_scans"], summary["healthy_false_positive_rate"]) == (2, 0.5)
    half = {case["case"]: case for case in values["cases"]}["half"]
    assert (half["reference_ml"], half["prediction_ml"], half["error_ml"]) == (0.008, 0.006, -0.002)
    assert (half["lesions"], half["found"], half["predicted_lesions"], half["false_positives"]) == (1, 1, 2, 1)
    assert len(rows(out / "accuracy_details.csv")) == 4


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eval", "accuracy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_mismatches_name_both_files_and_keep_the_rest(folders) -> None:
    predictions, references, out = folders
    write(references, "moved", [3])
    write(predictions, "moved", [3], affine=np.diag([1.0, 1, 2, 1]))
    (predictions / "healthy.nii.gz").write_text("not a mask")
    done = run(predictions, references, "--out", out, "--jobs", 1)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if "predictions/moved.nii.gz" in line and "references/moved.nii.gz" in line]
    assert [line for line in lines if "predictions/healthy.nii.gz: cannot be read" in line]
    assert [line for line in lines if line.startswith("missing.nii.gz: no prediction")]
    assert [row["Name"] for row in rows(out / "accuracy.csv")] == ["alarmed.nii.gz", "half.nii.gz", "missing.nii.gz"]
    assert set(json.loads((out / "accuracy.json").read_text())["errors"]) == {"moved", "healthy"}


def test_by_index_where_asked(folders) -> None:
    predictions, references, out = folders
    write(references, "moved", [3])
    write(predictions, "moved", [3], affine=np.diag([1.0, 1, 2, 1]))
    Settings(predictions, references, out=out, jobs=1, ignore_geometry=True).run()
    by_name = {row["Name"]: row for row in rows(out / "accuracy.csv")}
    assert float(by_name["moved.nii.gz"]["Lesion_DSC"]) == 1


def test_labels_above_one_score_nothing_and_are_told(folders, capsys) -> None:
    predictions, references, out = folders
    write(predictions, "half", [3, 4, 5, 6], label=2)
    Settings(predictions, references, out=out, jobs=1).run()
    assert {row["Name"]: row["Lesion_DSC"] for row in rows(out / "accuracy.csv")}["half.nii.gz"] == "0.0"
    assert "half.nii.gz: labels above 1 (up to 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "code"),
    [
        (np.array([0, 1], np.uint8), 0),
        (np.array([0, 1], np.float32), 0),  # told, but read as it was meant
        (np.array([0, 0.9999], np.float32), 1),
        (np.array([0, 2], np.uint8), 1),
        (np.array([0, -1], np.int8), 1),
        (np.array([0, np.nan], np.float32), 1),
    ],
    ids=["mask", "whole floats", "fractions", "label 2", "negative", "no number"],
)
def test_what_costs_points_is_told_by_the_exit_code(tmp_path: Path, stored: np.ndarray, code: int) -> None:
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    write(references, "a", [3])
    predictions.mkdir()
    array = np.full((20, 2, 2), stored[0])
    array[3, 0, 0] = stored[1]
    nib.save(nib.Nifti1Image(array, AFFINE), predictions / "a.nii.gz")
    assert Settings(predictions, references, out=tmp_path / "out", jobs=1).run() == code
    write(references, "a", [3], label=2)
    assert Settings(references, references, out=tmp_path / "out", jobs=1).run() == 1
    write(predictions, "a", [3])
    assert Settings(predictions, references, out=tmp_path / "out", jobs=1).run() == 0  # the reference's are no fault


def test_a_mask_of_another_format_is_told(folders, capsys) -> None:
    predictions, references, out = folders
    (predictions / "missing.mha").touch()
    Settings(predictions, references, out=out, jobs=1).run()
    said = capsys.readouterr().err
    assert "missing.nii.gz: no prediction, counted as 0 (missing.mha is there, but graders read .nii.gz alone)" in said


@pytest.mark.parametrize(("tolerance_mm", "higher"), [(0.0, False), (50.0, True)])
def test_the_tolerance_is_a_setting(folders, tolerance_mm, higher) -> None:
    predictions, references, out = folders
    Settings(predictions, references, tolerance_mm, out, 1).run()
    nsd = float({row["Name"]: row for row in rows(out / "accuracy.csv")}["half.nii.gz"]["Lesion_NSD"])
    assert (nsd == 1) is higher


def test_wrong_usage_is_one_sentence(tmp_path: Path, folders) -> None:
    predictions, references, _ = folders
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((tmp_path / "gone", references), "gone: no such folder"),
        ((predictions, tmp_path / "empty"), "empty: holds no reference"),
        ((predictions, references, "--tolerance-mm", -1), "--tolerance-mm -1: give a distance from 0 to 1000 mm"),
        ((predictions, references, "--tolerance-mm", "inf"), "--tolerance-mm inf: give a distance"),
        ((predictions, references, "--jobs", -1), "--jobs -1: give 1 or more"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
