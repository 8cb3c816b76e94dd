"""Finding and reading what `accuracy` and `efficiency` wrote, for the commands that build on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .cases import case_of, read_json, read_table

ACCURACY, EFFICIENCY = "accuracy", "efficiency"
DONE = "done"
_ACCURACY_KEYS = ("predictions", "references", "tolerance_mm", "date", "summary", "missing", "errors", "cases")
_EFFICIENCY_KEYS = (
    *("name", "inputs", "date", "machine", "gpu", "period_s", "timeout_s"),
    *("memory_limit_mib", "time_limit_s", "cases"),
)


def check_folder(folder: Path) -> None:
    """ValueError where there is no such folder, or nothing in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder: name one that accuracy or efficiency wrote")
    if not any(folder.iterdir()):
        raise ValueError(f"{folder}: is empty: let accuracy or efficiency write into it with --out")


def find(folder: Path, subfolder: str, pattern: str) -> Path | None:
    """The one file of this pattern in `folder`, or else in `folder`/`subfolder`; ValueError where there are several."""
    for place in (folder, folder / subfolder):
        found = sorted(place.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{place}: holds several tables of one kind ({names}): keep one of them")
        if found:
            return found[0]
    return None


def read_accuracy(folder: Path) -> dict[str, Any] | None:
    """accuracy.json of a folder, None where it has none."""
    path = find(folder, ACCURACY, "accuracy.json")
    values = _read(path, _ACCURACY_KEYS, {"case"}, ACCURACY)
    named = values is None or _is_list(values["missing"], lambda name: isinstance(name, str))
    if values and not (named and isinstance(values["errors"], dict)):
        raise _not_written(path, ACCURACY)
    return values


def read_efficiency(folder: Path) -> dict[str, Any] | None:
    """efficiency.json of a folder, None where it has none."""
    return _read(find(folder, EFFICIENCY, "efficiency.json"), _EFFICIENCY_KEYS, {"case", "status"}, EFFICIENCY)


def _read(path: Path | None, keys: Iterable[str], of_case: set[str], command: str) -> dict[str, Any] | None:
    """The JSON of a command, with at least these keys, and these in each of its cases."""
    if path is None:
        return None
    values = read_json(path)
    if not _has(values, keys) or not _is_list(values["cases"], lambda case: _has(case, of_case)):
        raise _not_written(path, command)
    return values


def _not_written(path: Path | None, command: str) -> ValueError:
    return ValueError(f"{path}: is not what `python -m eval {command}` writes: make it again")


def _has(values: Any, keys: Iterable[str]) -> bool:
    return isinstance(values, dict) and set(keys) <= set(values)


def _is_list(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(fits, values))


def without_mask(accuracy: dict[str, Any] | None, efficiency: dict[str, Any] | None) -> set[str]:
    """Cases that are known to have no mask."""
    missing = {case_of(name) for name in accuracy["missing"]} if accuracy else set()
    for case in efficiency["cases"] if efficiency else ():
        if case["status"] != DONE:
            missing.add(case["case"])
    return missing


def not_scored(accuracy: dict[str, Any] | None) -> set[str]:
    """Cases whose mask or reference could not be measured."""
    return set(accuracy["errors"]) if accuracy else set()


def read_column(path: Path, column: str, highest: float = math.inf) -> dict[str, float]:
    """One column of a table by case; an empty field leaves its case out.

    ValueError where the column is not there, a case is there twice, or a value is no number from 0 to `highest`.
    """
    values: dict[str, float] = {}
    seen: set[str] = set()
    for row in read_table(path, ("Name", column)):
        if row.get("Name") is None or row.get(column) is None:
            raise ValueError(
                f"{path}: has no full columns Name and {column}, separated by commas: make the table again"
            )
        case, field = case_of(row["Name"]), row[column].strip()
        if case in seen:
            raise ValueError(f"{path}: names the case {case} twice: keep one of the rows")
        seen.add(case)
        if field:
            values[case] = _number(field, path, case, column, highest)
    if not seen:
        raise ValueError(f"{path}: holds no case: make the table again")
    return values


def _number(field: str, path: Path, case: str, column: str, highest: float) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not 0 <= value <= highest or math.isinf(value):
        wanted = "0 or more" if math.isinf(highest) else f"from 0 to {highest:g}"
        raise ValueError(f"{path}: {column} of {case} is {field}: it must be a number, {wanted}")
    return value
