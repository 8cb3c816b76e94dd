"""The JSON file that a benchmark leaves."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.machine import describe, open_gpu
from inference.atomic import write_whole
from inference.limits import cores


def check_out(path: Path) -> None:
    """ValueError where no file can be written to `path`, before hours of work are lost to it. Its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path}: its folder cannot be made ({error.strerror}): name another") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path}: cannot be written: name a file in a folder of yours")


def machine(device: str = "cpu") -> dict[str, Any]:
    """`describe`, with the cores that this process may use, and the GPU where `device` is one that can be read."""
    gpu = None
    if device.startswith("cuda"):
        with suppress(ValueError):  # which would lose what was measured
            gpu = open_gpu(int(device.partition(":")[2] or 0))
    return {**describe(gpu), "cores": cores()}


def write_results(path: Path, told: dict[str, Any], device: str = "cpu") -> None:
    """Write `told`, below the date of today and what the machine is; the file is whole at any moment.

    device: what was measured, "cpu" or "cuda…", whose GPU is then named.
    """
    dated = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(device), **told}
    write_whole(path, (json.dumps(dated, indent=1) + "\n").encode())
