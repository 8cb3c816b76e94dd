"""Names of cases, and the small tables and JSON files that commands leave for each other."""

from __future__ import annotations

import csv
import json
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
    """The .nii.gz files of a folder by case, sorted. ValueError where there is none, or two of one case.

    kind: what they are, for the message: "scan", "prediction" or "reference".
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder: name the folder of {kind}s")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{MASK_SUFFIX}")):
        if path.name.startswith("."):
            continue
        other = found.setdefault(case_of(path.name), path)
        if other != path:
            raise ValueError(f"{path}: the same case as {other.name}: keep one of them")
    if not found:
        raise ValueError(f"{folder}: holds no {kind}: put X{MASK_SUFFIX} there")
    return found


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """Write a CSV with these columns; a value of None becomes an empty field."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, tuple(columns), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV as one dict a row. ValueError where it cannot be read."""
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error}): make it again") from error


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """ValueError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}): make it again") from error
