"""Ctrl-C and a request to end, at various moments: nothing is left running, and nothing passes for whole."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest

from eval.containers import LocalCommand, run_case
from eval.sampler import system_readers
from tests.eval.processes import assert_all_gone, script, wait_for_group, write_scans

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `python -m eval`, even where the tests run in a shell's background job or under nohup, in which some are ignored
INTERRUPTIBLE = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL);"
    "runpy.run_module('eval', run_name='__main__', alter_sys=True)"
)


def start(folder: Path, *options: object) -> subprocess.Popen[str]:
    """The program, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *map(str, options)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def interruptible() -> Iterator[None]:
    """The signals raise KeyboardInterrupt; a shell's background job, as which the tests may run, would ignore one."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in INTERRUPTS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupt_ends_what_was_started(tmp_path: Path, number: signal.Signals) -> None:
    work, scans = tmp_path / "work", write_scans(tmp_path / "inputs", "a")
    work.mkdir()
    runner = LocalCommand(tuple(shlex.split(script(tmp_path, f'echo $$ > "{tmp_path}/group"; sleep 600'))), None)

    def interrupt() -> None:
        wait_for_group(tmp_path)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_case(runner, scans / "a_0000.nii.gz", work, system_readers(None), 60)
    assert_all_gone(int((tmp_path / "group").read_text()))


@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupt_amid_imports_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    waiting = "print(flush=True); import time; time.sleep(60)"
    (tmp_path / "nibabel.py").write_text(waiting)  # which `python -m eval` imports at once
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "report", "."],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout
    program.stdout.readline()
    program.send_signal(number)
    _, said = program.communicate(timeout=60)
    assert (program.returncode, said) == (130, "interrupted\n")


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupted_program_says_so(tmp_path: Path, number: signal.Signals, times: int) -> None:
    write_scans(tmp_path / "inputs", "a")
    command = script(tmp_path, f'echo $$ > "{tmp_path}/group"; sleep 600')
    options = ["--inputs", "inputs", "--out", "out", "--cpu-only", "--command", command]
    program = start(tmp_path, "efficiency", *options)
    group = wait_for_group(tmp_path)
    for _ in range(times):
        for one in (number, *INTERRUPTS)[:times]:
            program.send_signal(one)
        time.sleep(0.02)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130
    assert [line for line in said.splitlines() if "no GPU" not in line] == ["interrupted"]
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []
    assert_all_gone(group)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupt_as_it_starts_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The child runs, and its parent does not know of it yet."""
    started = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self.pid)
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # a signal's handler runs between two steps of Python

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    work, scans = tmp_path / "work", write_scans(tmp_path / "inputs", "a")
    work.mkdir()
    runner = LocalCommand(tuple(shlex.split(script(tmp_path, "sleep 600"))), None)
    with pytest.raises(KeyboardInterrupt):
        run_case(runner, scans / "a_0000.nii.gz", work, system_readers(None), 60)
    assert len(started) == 1
    assert_all_gone(started[0])
    assert signal.getsignal(number) is signal.default_int_handler


def test_an_interrupt_as_the_pool_starts_ends_it_all(tmp_path: Path) -> None:
    """Ctrl-C in a terminal, right after a process was forked: it has not yet said that it leaves that to its parent."""
    (tmp_path / "masks").mkdir()
    for case in range(8):
        nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.uint8), np.eye(4)), tmp_path / "masks" / f"{case}.nii.gz")
    hook = "import os, signal; os.register_at_fork(after_in_parent=lambda: os.killpg(0, signal.SIGINT))"
    program = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{hook};{INTERRUPTIBLE}",
            *["accuracy", "masks", "masks", "--out", "out", "--jobs", "4"],
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert_all_gone(program.pid)


@pytest.mark.parametrize("number", INTERRUPTS)
@pytest.mark.parametrize("times", [1, 2])
def test_accuracy_stops_at_once_and_tells_what_was_not_measured(
    tmp_path: Path, number: signal.Signals, times: int
) -> None:
    """Sixty masks of noise take a minute and more, one second each."""
    (tmp_path / "masks").mkdir()
    noise = (np.random.default_rng(0).random((200, 200, 60)) < 0.5).astype(np.uint8)
    nib.save(nib.Nifti1Image(noise, np.eye(4)), tmp_path / "masks" / "0.nii.gz")
    for case in range(1, 60):
        os.link(tmp_path / "masks" / "0.nii.gz", tmp_path / "masks" / f"{case}.nii.gz")
    program = start(tmp_path, "accuracy", "masks", "masks", "--out", "out", "--jobs", "2")
    while not (workers := psutil.Process(program.pid).children()):
        time.sleep(0.1)
    time.sleep(2)
    begun = time.monotonic()
    for _ in range(times):
        program.send_signal(number)
        time.sleep(0.3)
    _, said = program.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert program.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    told = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert len(told["cases"]) + len(told["errors"]) == 60
    assert len(told["errors"]) > 30
    assert {error.partition(": ")[2] for error in told["errors"].values()} == {
        "not measured, as the run was broken off: run it again"
    }
