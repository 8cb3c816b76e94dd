"""Scripts that stand for a team's program, and what is left of their processes."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path

import psutil


def write_scans(folder: Path, *cases: str) -> Path:
    """Files called as scans; local commands here do not look into them."""
    folder.mkdir()
    for case in cases:
        (folder / f"{case}_0000.nii.gz").write_bytes(f"scan {case}".encode())
    return folder


def script(folder: Path, text: str) -> str:
    """A command line that runs `text` as a shell script, $1 inputs and $2 outputs."""
    file = folder / "a script.sh"
    file.write_text(text)
    return f"sh {shlex.quote(str(file))}"


def wait_for_group(tmp_path: Path) -> int:
    """The process group that a started script wrote down."""
    group = tmp_path / "group"
    while not (group.exists() and group.read_text().endswith("\n")):  # it is there before it is written
        time.sleep(0.01)
    return int(group.read_text())


def assert_all_gone(group: int) -> None:
    """No process of the group lives on; the kernel may take a moment."""
    deadline = time.monotonic() + 30
    while living := [p for p in psutil.process_iter() if _group(p) == group and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, living
        time.sleep(0.05)


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except OSError:
        return -1
