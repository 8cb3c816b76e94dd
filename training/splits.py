"""Which scans of a `data` folder are there to train on and which to validate on: its splits.json."""

from __future__ import annotations

import json
from pathlib import Path

SPLITS = "splits.json"


def read_splits(data: Path) -> dict[str, dict[str, list[str]]]:
    """Names of scans by folder, then by "train" and "val". ValueError where the file cannot be read."""
    path = data / SPLITS
    try:
        splits = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): name the folder that holds it") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}): copy the data again") from error
    if not isinstance(splits, dict) or not all(isinstance(parts, dict) for parts in splits.values()):
        raise ValueError(f"{path}: names no scans by folder and split: copy the data again")
    return splits


def scans_of(data: Path, folder: str, split: str) -> list[str]:
    """Names of a folder's scans of one split. ValueError where there are none."""
    names = read_splits(data).get(folder, {}).get(split)
    if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{data / SPLITS}: names no scan of {folder} under {split}: copy the data again")
    return names
