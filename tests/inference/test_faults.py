"""Masks are whole or absent, whatever happens to the process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from benchmarks.kills import command, survive, write_scans
from inference import atomic
from inference.atomic import write_whole
from inference.command_line import write_report


def test_kills_leave_whole_masks_only(random_weights: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    told = survive(tmp_path / "scans", tmp_path, str(random_weights), kills=4, seed=1)
    assert told["met_at_work"] >= 2
    assert 0 < told["masks_before_kills"] < 40


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_is_replaced_whole_and_readable_by_all(tmp_path: Path, monkeypatch, nameless: bool) -> None:
    if not nameless:
        monkeypatch.setattr(atomic, "_write_nameless", _refuse)
    path, mask = tmp_path / "x.nii.gz", os.umask(0o077)
    try:
        for content in (b"a" * 100_000, b"", b"other"):
            write_whole(path, content)
            assert path.read_bytes() == content
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    finally:
        os.umask(mask)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("nameless", [True, False])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch, nameless: bool) -> None:
    if not nameless:
        monkeypatch.setattr(atomic, "_write_nameless", _refuse)
    path = tmp_path / "x.nii.gz"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", _refuse)  # where a full disk is met, at the latest
    with pytest.raises(OSError, match="refused"):
        write_whole(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x.nii.gz": b"old"}
    (tmp_path / "folder").mkdir()
    monkeypatch.undo()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "folder", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x.nii.gz"]


def test_a_report_that_cannot_be_written_in_the_end_is_told(tmp_path: Path, capsys) -> None:
    """It could be when it was tried at the start; its folder went meanwhile."""
    assert not write_report(tmp_path / "gone" / "r.json", {})
    told = capsys.readouterr().err
    assert told == f"--report {tmp_path}/gone/r.json: cannot be written (No such file or directory): make room there\n"


def test_sigterm_ends_the_program_as_the_shell_expects(tmp_path: Path, random_weights: Path) -> None:
    write_scans(tmp_path / "scans")
    process = subprocess.Popen(
        command(tmp_path / "scans", tmp_path / "out", str(random_weights)), stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith(b"case=c0 status=done")
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


DRIVER = "int cuInit(unsigned flags) { return 0; } int cuDeviceGetCount(int *count) { *count = 1; return 0; }"


def test_a_gpu_that_cannot_be_used_is_told_and_the_cpu_goes_on(tmp_path: Path, random_weights: Path) -> None:
    """A driver that promises a GPU and has nothing else, found by the real program, with the real ONNX Runtime."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    (tmp_path / "driver.c").write_text(DRIVER)
    built = [compiler, "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "driver.c")]
    subprocess.run(built, check=True)
    write_scans(tmp_path / "scans", [(40, 36, 4)])
    call = command(tmp_path / "scans", tmp_path / "out", str(random_weights))
    subprocess.run(call, check=True, capture_output=True)
    call = [*command(tmp_path / "scans", tmp_path / "auto", str(random_weights)), "--device", "auto"]
    search = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(call, env=search, capture_output=True, text=True, check=True)
    hybrid, unet, case = done.stderr.splitlines()
    for name, told in (("hybrid", hybrid), ("UNet", unet)):
        assert re.fullmatch(rf'level=warning message="cuda:0 cannot take the {name} \(.*\): it runs on the CPU"', told)
    assert case.startswith("case=c0 status=done")
    assert (tmp_path / "auto" / "c0.nii.gz").read_bytes() == (tmp_path / "out" / "c0.nii.gz").read_bytes()


def test_a_log_that_cannot_be_written_costs_no_mask(tmp_path: Path, random_weights: Path) -> None:
    write_scans(tmp_path / "scans", [(40, 36, 4)] * 2)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(tmp_path / "scans", tmp_path / "out", str(random_weights)), stderr=full, check=False
        )
    assert done.returncode == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_rerun_adds_the_probabilities_that_are_missing(tmp_path: Path, random_weights: Path) -> None:
    write_scans(tmp_path / "scans", [(40, 36, 4)])
    call = command(tmp_path / "scans", tmp_path / "out", str(random_weights))
    subprocess.run(call, check=True, capture_output=True)
    subprocess.run([*call, "--skip-existing", "--save-probabilities"], check=True, capture_output=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c0.nii.gz", "c0_probability.nii.gz"]


def _refuse(*_: object) -> None:
    raise OSError(28, "refused")
