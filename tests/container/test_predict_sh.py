"""predict.sh, from a checkout and without an image: which Python it starts, how, and what it leaves alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from container_engine import REPOSITORY

SPY = """#!/bin/sh
pwd; echo "$PYTHONPATH"; echo "${CUDA_VISIBLE_DEVICES-unset}"
for argument; do echo "<$argument>"; done
exit 7
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a blank in its name that holds predict.sh, and beside it a `python` that only reports."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    shutil.copy(REPOSITORY / "predict.sh", folder)
    spy = tmp_path / "bin" / "python"
    spy.parent.mkdir()
    spy.write_text(SPY)
    spy.chmod(0o755)
    return folder


def predict(script: str, *arguments: str, here: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs `sh SCRIPT ARGUMENTS` in the folder `here`, with `path` first on PATH."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "CUDA_VISIBLE_DEVICES"}
    }
    environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        ["sh", script, *arguments], cwd=here, env=environment, capture_output=True, text=True, check=False
    )


def test_arguments_folder_and_exit_code_pass_through(checkout: Path) -> None:
    elsewhere = checkout.parent
    script = str(checkout / "predict.sh")
    ran = predict(script, "in", "out put", "--device", "cpu", here=elsewhere, path=elsewhere / "bin")
    arguments = ["-P", "-m", "inference", "in", "out put", "--device", "cpu"]
    expected = [str(elsewhere), str(checkout), "unset", *(f"<{argument}>" for argument in arguments)]
    assert ran.stdout.splitlines() == expected, ran.stderr
    assert ran.returncode == 7


def test_as_graders_call_it(checkout: Path) -> None:
    ran = predict("predict.sh", here=checkout, path=checkout.parent / "bin")
    assert ran.stdout.splitlines() == [str(checkout), str(checkout), "unset", "<-P>", "<-m>", "<inference>"], ran.stderr
