"""`sh predict.sh` as users call it, in a process of its own, and the pipeline behind it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from inference.command_line import Reader, Run, Warned, doubled, missing, replacing
from inference.pipeline import Pipeline, scan_score
from inference.volume import read_volume

WEIGHTS = {"hybrid": "hybrid.safetensors", "graph": "hybrid.onnx", "unet": "unet.onnx"}
REPOSITORY = Path(__file__).resolve().parents[2]


def write_scan(path: Path, shape: tuple[int, int, int] = (48, 40, 12), seed: int = 0) -> None:
    """An ellipsoid of soft tissue in air, 3×3×5 mm, oblique."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.where(sum(a**2 for a in axes) < 0.8, 40, -1000) + np.random.default_rng(seed).normal(0, 10, shape)
    affine = np.array([[-2.9, 0.5, 0, 70], [-0.5, -2.9, 0, 60], [0, 0, 5, -300], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), path)


def predict(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = f"{REPOSITORY / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", str(REPOSITORY / "predict.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder or REPOSITORY,
        env={**os.environ, "PATH": path},
        timeout=300,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    write_scan(tmp_path / "in" / "a_0000.nii.gz")
    return tmp_path / "in"


def test_folder_with_good_and_bad_scans(inputs: Path, random_weights: Path, tmp_path: Path) -> None:
    image = SimpleITK.ReadImage(str(inputs / "a_0000.nii.gz"))
    SimpleITK.WriteImage(image, str(inputs / "b_0000.nrrd"))
    (inputs / "bad_0000.nii.gz").write_text("not a scan")
    (inputs / "notes.txt").write_text("ignored")
    done = predict(inputs, tmp_path / "out", "--weights", random_weights, "--report", tmp_path / "report.json")
    assert done.returncode == 1, done.stderr
    assert names(tmp_path / "out") == ["a.nii.gz", "b.nii.gz"]
    assert done.stdout == ""
    a, b, bad = done.stderr.splitlines()
    assert a.startswith("case=a status=done size=48×40×12 spacing_mm=2.94×2.94×5 lesions=")
    assert b.startswith("case=b status=done ")
    assert bad.startswith(f'case=bad status=failed error="{inputs / "bad_0000.nii.gz"}: holds no NIfTI-1 image: export')
    for case in "ab":
        mask = SimpleITK.ReadImage(str(tmp_path / "out" / f"{case}.nii.gz"))
        assert mask.GetSize() == image.GetSize()
        np.testing.assert_allclose(mask.GetDirection(), image.GetDirection(), atol=1e-6)
        assert set(np.unique(SimpleITK.GetArrayFromImage(mask))) <= {0, 1}
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["versions"]["nibabel"] == nib.__version__
    assert told["engine"] == "onnx"
    sums = {part: hashlib.sha256((random_weights / name).read_bytes()).hexdigest() for part, name in WEIGHTS.items()}
    assert told["weights"] == {"name": "random", **sums}
    assert set(told["start"]["seconds"]) == {"imports", "weights", "read ahead"}
    report = {case["case"]: case for case in told["cases"]}
    assert report["a"]["size"] == [12, 40, 48]
    assert report["a"]["warnings"] == []
    assert set(report["a"]["seconds"]) == {"read", "hybrid", "unet", "fuse", "write"}
    written = nib.load(tmp_path / "out" / "a.nii.gz")
    voxel_ml = abs(np.linalg.det(written.affine[:3, :3])) / 1000
    assert report["a"]["volume_ml"] == pytest.approx(written.get_fdata().sum() * voxel_ml, rel=1e-4)
    assert report["bad"]["error"].endswith("export the scan again as NIfTI-1")


def test_one_file_relative_paths_and_probabilities(inputs: Path, random_weights: Path, tmp_path: Path) -> None:
    done = predict("in/a_0000.nii.gz", "out", "--weights", random_weights, "--save-probabilities", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "out") == ["a.nii.gz", "a_probability.nii.gz"]
    probability = nib.load(tmp_path / "out" / "a_probability.nii.gz").get_fdata()
    assert 0 <= probability.min() < probability.max() <= 1


def test_skip_existing_leaves_masks_alone(inputs: Path, random_weights: Path, tmp_path: Path) -> None:
    write_scan(inputs / "b_0000.nii.gz", seed=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"mine")
    done = predict(inputs, tmp_path / "out", "--weights", random_weights, "--skip-existing")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"mine"
    assert names(tmp_path / "out") == ["a.nii.gz", "b.nii.gz"]


def test_the_same_scan_gives_the_same_bytes_whatever_lies_beside_it(
    inputs: Path, random_weights: Path, tmp_path: Path
) -> None:
    alone = predict(inputs, tmp_path / "alone", "--weights", random_weights, "--save-probabilities")
    write_scan(inputs / "0_0000.nii.gz", (30, 50, 21), seed=1)
    write_scan(inputs / "b_0000.nii.gz", (64, 20, 3), seed=2)
    beside = predict(inputs, tmp_path / "beside", "--weights", random_weights, "--save-probabilities")
    assert (alone.returncode, beside.returncode) == (0, 0)
    for name in ("a.nii.gz", "a_probability.nii.gz"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()
    assert len(set(np.unique(nib.load(tmp_path / "alone" / "a_probability.nii.gz").dataobj))) > 20


def test_no_inputs_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (("empty", "holds no scan"), ("gone", "no such folder")):
        done = predict(tmp_path / folder, tmp_path / "out")
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert folder in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_outputs_that_cannot_be_written_are_told_before_any_work(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = predict(inputs, tmp_path / "file")
    assert done.returncode == 2
    assert "file: cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_scans_of_one_name_cost_the_second_only(inputs: Path, random_weights: Path, tmp_path: Path) -> None:
    write_scan(inputs / "a.nii.gz", seed=1)
    write_scan(inputs / "b.nii.gz")
    done = predict(inputs, tmp_path / "out", "--weights", random_weights)
    assert done.returncode == 1
    assert names(tmp_path / "out") == ["a.nii.gz", "b.nii.gz"]
    (line,) = [line for line in done.stderr.splitlines() if "status=failed" in line]
    assert line.startswith(
        f'case=a status=failed error="{inputs / "a_0000.nii.gz"}: would write the same mask as a.nii.gz: rename'
    )


def test_a_scan_is_never_replaced_by_a_mask(inputs: Path, random_weights: Path) -> None:
    write_scan(inputs / "b.nii.gz")
    before = (inputs / "b.nii.gz").read_bytes()
    done = predict(inputs, inputs, "--weights", random_weights)
    assert done.returncode == 1
    assert (inputs / "b.nii.gz").read_bytes() == before
    assert f"{inputs / 'b.nii.gz'}: would replace the scan b.nii.gz" in done.stderr
    assert names(inputs) == ["a.nii.gz", "a_0000.nii.gz", "b.nii.gz"]


def test_a_scan_under_another_name_is_never_replaced(inputs: Path, tmp_path: Path) -> None:
    """Two names of one file, as where one folder is mounted twice."""
    write_scan(inputs / "b.nii.gz")
    (tmp_path / "out").mkdir()
    os.link(inputs / "b.nii.gz", tmp_path / "out" / "b.nii.gz")
    scans = [inputs / "a_0000.nii.gz", inputs / "b.nii.gz"]
    told = replacing(scans, tmp_path / "out", save_probabilities=False)
    assert list(told) == [inputs / "b.nii.gz"]
    assert told[inputs / "b.nii.gz"].startswith(f"{inputs / 'b.nii.gz'}: would replace the scan b.nii.gz: rename")


def test_a_probability_stands_in_the_way_of_a_mask_only_where_it_is_written(tmp_path: Path) -> None:
    scans = [tmp_path / "a_0000.nii.gz", tmp_path / "a_probability_0000.nii.gz"]
    assert doubled(scans, tmp_path / "out", save_probabilities=False) == {}
    assert list(doubled(scans, tmp_path / "out", save_probabilities=True)) == scans[1:]


def test_masks_that_are_one_file_are_still_two(tmp_path: Path) -> None:
    """As tools leave them that link files of the same bytes."""
    (tmp_path / "a.nii.gz").write_bytes(b"a mask")
    os.link(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    scans = [tmp_path / "in" / "a_0000.nii.gz", tmp_path / "in" / "b_0000.nii.gz"]
    assert doubled(scans, tmp_path, save_probabilities=False) == {}


def test_what_was_refused_for_anothers_mask_is_not_skipped(inputs: Path, random_weights: Path, tmp_path: Path) -> None:
    write_scan(inputs / "a.nii.gz", seed=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"of a.nii.gz")
    done = predict(inputs, tmp_path / "out", "--weights", random_weights, "--skip-existing")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "a_0000.nii.gz: would write the same mask as a.nii.gz" in line
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"of a.nii.gz"


def test_an_empty_file_or_a_folder_is_no_mask(inputs: Path, tmp_path: Path) -> None:
    scan, mask = inputs / "a_0000.nii.gz", tmp_path / "a.nii.gz"
    assert missing(scan, tmp_path, save_probabilities=False)
    mask.mkdir()
    assert missing(scan, tmp_path, save_probabilities=False)
    mask.rmdir()
    mask.touch()
    assert missing(scan, tmp_path, save_probabilities=False)
    mask.write_bytes(b"a mask")
    assert not missing(scan, tmp_path, save_probabilities=False)
    assert missing(scan, tmp_path, save_probabilities=True)


def test_a_report_replaces_neither_scan_nor_mask_nor_pipe(inputs: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(inputs / "a_0000.nii.gz")
    for report, words in (
        (inputs / "a_0000.nii.gz", "would replace a scan or its mask"),
        (tmp_path / "link", "would replace a scan or its mask"),
        (tmp_path / "out" / "a.nii.gz", "would replace a scan or its mask"),
        (tmp_path / "pipe", "is no ordinary file"),
    ):
        done = predict(inputs, tmp_path / "out", "--report", report)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [f"--report {report}: {words}: name another{' file' * ('scan' in words)}"]


def test_a_name_with_a_line_break_does_not_hide_what_failed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "two\nlines_0000.nii.gz").write_text("not a scan")
    done = predict(tmp_path / "in", tmp_path / "out")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "two\\nlines_0000.nii.gz: holds no NIfTI-1 image: export the scan again" in line


def test_a_closed_stderr_costs_no_mask(inputs: Path, random_weights: Path, tmp_path: Path) -> None:
    script = f'sh "{REPOSITORY}/predict.sh" "$@" 2>&-'
    done = subprocess.run(
        ["sh", "-c", script, "sh", inputs, tmp_path / "out", "--weights", random_weights], check=False
    )
    assert done.returncode == 0
    assert nib.load(tmp_path / "out" / "a.nii.gz").shape == (48, 40, 12)


def test_predict_is_found_through_a_link(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "predict").symlink_to(REPOSITORY / "predict.sh")
    done = subprocess.run(["sh", tmp_path / "predict", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_modules_are_imported(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import os, runpy, signal, sys

class Finder:
    def find_spec(name, *_):
        if name == "inference.command_line":
            os.kill(os.getpid(), {int(number)})

sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("inference", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_a_report_that_cannot_be_written_is_told_before_any_work(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for report, words in ((tmp_path / "file" / "r.json", "file: cannot be written"), (tmp_path, "is a folder")):
        done = predict(inputs, tmp_path / "out", "--report", report)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_any_failure_costs_its_own_case_only(inputs: Path, random_weights: Path, tmp_path: Path, capsys) -> None:
    """Errors of libraries that share no class with ours, and a mask's name that a folder holds."""
    write_scan(inputs / "b_0000.nii.gz")
    (tmp_path / "out" / "a.nii.gz").mkdir(parents=True)
    run = Run(Pipeline(random_weights), tmp_path / "out", save_probabilities=True)
    run.case(inputs / "a_0000.nii.gz")
    run.pipeline.unet.session = None  # type: ignore[assignment]
    run.case(inputs / "b_0000.nii.gz")
    written, failed = capsys.readouterr().err.splitlines()
    assert written.startswith(f'case=a status=failed error="{tmp_path}/out/a.nii.gz: cannot be written (')
    assert str(inputs / "b_0000.nii.gz") in failed
    assert names(tmp_path / "out") == ["a.nii.gz"]
    assert all(report.error for report in run.reports)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--weights", "gone", "no weights there"),
        ("--device", "tpu", "unknown"),
        ("--device", "cuda:99", "GPUs are"),
        ("--gpu-memory-mib", "-5", "no whole number above 0"),
        ("--unheard-of", "1", "unrecognized arguments"),
    ],
)
def test_wrong_options(inputs: Path, tmp_path: Path, option: str, value: str, words: str) -> None:
    done = predict(inputs, tmp_path / "out", option, value)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_scan_score_by_hand() -> None:
    assert scan_score(np.float32([0, 0, 1, 0, 0])) == pytest.approx(1 / 3)
    assert scan_score(np.float32([0, 0.9, 0.6, 0.9, 0])) == pytest.approx(0.8)
    assert scan_score(np.float32([0.2, 0.4])) == pytest.approx(0.3)
    assert scan_score(np.float32([0.7])) == pytest.approx(0.7)


def test_a_healthy_verdict_silences_the_hybrid(inputs: Path, random_weights: Path, tmp_path: Path) -> None:
    """The random networks call everything a lesion; the verdict leaves only what the UNet is sure of: nothing."""
    from dataclasses import replace

    from inference.fusion import FusionThresholds
    from inference.weights import Gate

    pipeline = Pipeline(random_weights)
    permissive = FusionThresholds(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, sure_unet=2.0)
    for threshold, skip, lesions in ((0.0, False, True), (1.1, False, False), (1.1, True, False)):
        pipeline.manifest = replace(pipeline.manifest, gate=Gate(threshold, skip), fusion=permissive)
        report = pipeline.run(inputs / "a_0000.nii.gz", tmp_path)
        assert report.healthy is not lesions
        assert (report.lesions > 0) is lesions
        assert ("unet" in report.seconds) is not skip
        assert nib.load(tmp_path / "a.nii.gz").get_fdata().any() == lesions


@pytest.mark.parametrize("shape", [(40, 40, 1), (3, 40, 20), (2, 2, 2)])
def test_tiny_scans(random_weights: Path, tmp_path: Path, shape: tuple[int, int, int]) -> None:
    write_scan(tmp_path / "tiny_0000.nii.gz", shape)
    if shape == (2, 2, 2):
        nib.save(nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(shape), np.eye(4)), tmp_path / "tiny_0000.nii.gz")
    Pipeline(random_weights).run(tmp_path / "tiny_0000.nii.gz", tmp_path)
    assert nib.load(tmp_path / "tiny.nii.gz").shape == shape


def test_real_scans_give_masks_on_their_grid(data_dir: Path, random_weights: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(random_weights)
    scans = [path for folder in ("abdomen", "crlm") for path in sorted((data_dir / folder / "images").glob("*.nii.gz"))]
    assert len(scans) >= 3
    for path in scans:
        report = pipeline.run(path, tmp_path)
        mask, scan = SimpleITK.ReadImage(str(tmp_path / f"{report.case}.nii.gz")), SimpleITK.ReadImage(str(path))
        for name in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
            assert getattr(mask, name)() == getattr(scan, name)()
        assert set(np.unique(SimpleITK.GetArrayFromImage(mask))) <= {0, 1}


def test_a_report_holds_the_warnings_of_its_case(inputs: Path, random_weights: Path, tmp_path: Path) -> None:
    logger, warned = logging.getLogger("inference"), Warned()
    logger.addHandler(warned)
    try:
        logger.warning("at start")
        run = Run(Pipeline(random_weights), tmp_path / "out", save_probabilities=False, warned=warned)
        logging.getLogger("inference.unet").warning("of %s", "a case")
        run.case(inputs / "a_0000.nii.gz")
        run.case(inputs / "a_0000.nii.gz")
    finally:
        logger.removeHandler(warned)
    told = run.to_dict()
    assert told["start"]["warnings"] == ["at start"]
    assert [case["warnings"] for case in told["cases"]] == [["of a case"], []]


def test_the_first_scan_is_read_ahead_once(inputs: Path, tmp_path: Path) -> None:
    scan, broken = inputs / "a_0000.nii.gz", tmp_path / "broken_0000.nii.gz"
    expected = read_volume(scan).hu
    read = Reader(scan)
    assert read.ahead is not None
    read.ahead.result()
    scan.rename(inputs / "moved.nii.gz")  # whoever reads only now finds nothing
    np.testing.assert_array_equal(read(scan).hu, expected)
    assert read.ahead is None
    with pytest.raises(ValueError, match=r"a_0000\.nii\.gz"):
        read(scan)
    broken.write_text("no scan")
    with pytest.raises(ValueError, match=r"broken_0000\.nii\.gz"):
        Reader(broken)(broken)
    np.testing.assert_array_equal(Reader(broken)(inputs / "moved.nii.gz").hu, expected)


def test_an_engine_that_is_not_installed_is_told(tmp_path: Path, random_weights: Path, monkeypatch) -> None:
    """As in the image, which has no torch: one sentence, before any work."""
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("inference.hybrid.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="--engine torch: torch is not installed: use --engine onnx"):
        Pipeline(random_weights, engine="torch")
