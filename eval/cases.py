"""Names of cases, and the small tables and JSON files that commands leave for each other."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MASK_SUFFIX = ".nii.gz"
CHANNEL_SUFFIX = "_0000"  # a scan's file is X_0000.nii.gz, its mask's X.nii.gz
SCAN_SUFFIX = f"{CHANNEL_SUFFIX}{MASK_SUFFIX}"


def case_of(name: str) -> str:
    """`X_0000.nii.gz` and `X.nii.gz` → `X`."""
    return Path(name).name.removesuffix(MASK_SUFFIX).removesuffix(CHANNEL_SUFFIX)


def files_by_case(folder: Path, kind: str) -> dict[str, Path]:
    """The .nii.gz files of a folder by case, sorted.

    ValueError where there is none, two are of one case, or one is no file or called by no text.

    kind: what they are, for the message: "scan", "prediction" or "reference".
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder: name the folder of {kind}s")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{MASK_SUFFIX}")):
        if path.name.startswith("."):
            continue
        check_file(path, kind)
        other = found.setdefault(case_of(path.name), path)
        if other != path:
            raise ValueError(f"{path}: the same case as {other.name}: keep one of them")
    if not found:
        raise ValueError(f"{folder}: holds no {kind}: put X{MASK_SUFFIX} there")
    return found


def check_file(path: Path, kind: str) -> None:
    """ValueError where it is none, or where tables cannot name it."""
    if printable(path.name) != path.name:
        raise ValueError(f"{path.parent}: the name {printable(path.name)} is not UTF-8: rename the {kind}")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no ordinary file"
        raise ValueError(f"{path}: is {what}, though called like a {kind}: remove it, or put the {kind} there")


def printable(name: str) -> str:
    """A file's name as UTF-8, with � in place of what is not."""
    return os.fsencode(name).decode(errors="replace")


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file, or leave it as it was where that fails. ValueError where it is there and no file."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no ordinary file: name another to write to")
    target = Path(os.path.realpath(path))  # a link stays one
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(content)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """Write a CSV with these columns, whole; a value of None becomes an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, tuple(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def read_table(path: Path, wanted: Iterable[str]) -> list[dict[str, str]]:
    """Read a CSV as one dict a row. ValueError where it cannot be read, or has two of a wanted column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin theirs with a mark
            table = csv.DictReader(file)
            rows, columns = list(table), table.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error}): make it again") from error
    for column in wanted:
        if columns.count(column) > 1:
            raise ValueError(f"{path}: has two columns {column}: keep one of them")
    return rows


def write_json(path: Path, values: Any) -> None:
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """ValueError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}): make it again") from error
