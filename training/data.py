"""A folder of scans in FLARE layout, and what is annotated in it.

`imagesTr/X_0000.nii.gz`, `labelsTr/X.nii.gz` where there is one, of phantoms also `organsTr/X.nii.gz`; and `cases.csv`
(case, annotated, healthy, lesion_type and, where a patient has several scans, patient; pseudo, where `pseudo-labels`
wrote it), without which every label counts as complete and every scan as another patient.
"""

from __future__ import annotations

import csv
import io
import itertools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from inference.atomic import write_whole
from inference.volume import Geometry, case_name, is_scan, read_label, read_volume
from training.anatomy import Organ
from training.organs import UNKNOWN

Annotated = Literal["complete", "partial", "none"]
SHORT: dict[str, Annotated] = {"1": "complete", "0": "none"}
COLUMNS = ("case", "annotated", "healthy", "lesion_type")
PSEUDO = 255  # in a label: a lesion that a network added, not an annotator


@dataclass(frozen=True)
class Entry:
    """What is known of a scan before it is read.

    annotated: whether the label holds every lesion, only some, or there is none. healthy: the scan is free of lesions,
    with or without a label that says so. lesion_type: the site of the lesions, "" where nobody said. patient: "" where
    the scan is the only one. pseudo: `pseudo-labels` completed the label, which may hold `PSEUDO`.
    """

    name: str
    scan: Path
    label: Path | None
    organs: Path | None
    annotated: Annotated = "complete"
    healthy: bool = False
    lesion_type: str = ""
    patient: str = ""
    pseudo: bool = False

    @property
    def source(self) -> Path:
        """FLARE folder that it is read from."""
        return self.scan.parent.parent

    @property
    def complete(self) -> bool:
        """Whether what its label leaves out is known to be free of lesions."""
        return self.healthy or self.annotated == "complete"

    @property
    def teaches(self) -> bool:
        """Whether its lesions, or that it has none, can be learnt."""
        return self.healthy or self.annotated != "none"


@dataclass(frozen=True)
class Case:
    """An annotated scan, cropped to the body; arrays are (z, y, x) as `volume.py` orients.

    hu: int16; label: uint8, 0, 1 or `PSEUDO`; organs: uint8 `anatomy.Organ`, `organs.UNKNOWN` all over where nobody
    knows them.
    """

    entry: Entry
    hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    organs: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


def read_folder(folder: Path) -> list[Entry]:
    """The scans of a folder, by name. ValueError that lists every case whose files and `cases.csv` do not agree."""
    problems: list[str] = []
    scans: dict[str, Path] = {}
    for path in sorted((folder / "imagesTr").glob("*")):
        if is_scan(path) and scans.setdefault(case_name(path), path) != path:
            problems.append(f"{case_name(path)}: twice in imagesTr, as {scans[case_name(path)].name} and {path.name}")
    rows = _rows(folder / "cases.csv", problems)
    problems += [f"{name}: in cases.csv, but imagesTr has no such scan" for name in rows if name not in scans]
    labels = {path.name for path in (folder / "labelsTr").glob("*") if is_scan(path)}
    strange = sorted(labels - {f"{name}.nii.gz" for name in scans})
    problems += [f"labelsTr/{name}: no scan in imagesTr has a mask of this name (X.nii.gz)" for name in strange]
    entries = []
    for name, scan in scans.items():
        try:
            entries.append(_entry(folder, name, scan, rows.get(name)))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    refuse(problems, folder)
    if not any(entry.teaches for entry in entries):
        raise ValueError(f"{folder}: no scan in imagesTr has a mask in labelsTr: name a folder in FLARE layout")
    return entries


def split(folders: tuple[Path, ...], validation: int) -> tuple[list[Entry], list[Entry]]:
    """Cases to train and to validate on: at least so many of the latter, the last patients by name of each folder.

    Only cases that teach something. A folder of one patient keeps none. Who is kept out of one folder is not trained on
    in another, where `cases.csv` tells patients (as `implant` writes it): equal names may be different ones. ValueError
    where one of several has too few patients, or where none is kept.
    """
    training: list[Entry] = []
    held_out: list[Entry] = []
    for folder in folders:
        entries = [entry for entry in read_folder(folder) if entry.teaches]
        patients = {entry.patient or entry.name: 0 for entry in entries}
        for entry in entries:
            patients[entry.patient or entry.name] += 1
        kept: set[str] = set()
        while len(patients) > 1 and sum(patients[name] for name in kept) < -(-validation // len(folders)):
            if len(kept) + 1 >= len(patients):
                raise ValueError(f"{folder}: {len(entries)} cases are too few to keep {validation} for validation")
            kept.add(list(patients)[-1 - len(kept)])
        training += [entry for entry in entries if (entry.patient or entry.name) not in kept]
        held_out += [entry for entry in entries if (entry.patient or entry.name) in kept]
    if not held_out:
        raise ValueError(f"{folders[0]}: one patient cannot be trained and validated on: add scans of others")
    return [entry for entry in training if not any(_same_patient(entry, kept) for kept in held_out)], held_out


def _same_patient(one: Entry, other: Entry) -> bool:
    """Whether `cases.csv` says so of at least one of them."""
    told = one.patient or other.patient
    return bool(told) and (one.patient or one.name) == (other.patient or other.name)


def refuse(problems: list[str], folder: Path | None = None) -> None:
    """ValueError that lists all problems of cases, if there are any."""
    if problems:
        where = f"{folder}: " if folder else ""
        raise ValueError(f"{where}mend or remove these cases:\n  " + "\n  ".join(problems))


def _rows(path: Path, problems: list[str]) -> dict[str, dict[str, str]]:
    """Rows of `cases.csv` by case; none where there is no such file."""
    rows: dict[str, dict[str, str]] = {}
    heads, cells = _cells(path) if path.exists() else ([], [])
    for row in filter(any, cells):
        told = dict(itertools.zip_longest(heads, map(str.strip, row[: len(heads)]), fillvalue=""))
        name = told["case"]
        if len(row) > len(heads):
            problems.append(f"{name}: {len(row)} cells in its row of cases.csv, which has {len(heads)} columns")
        elif name in rows:
            problems.append(f"{name}: twice in cases.csv")
        else:
            rows[name] = told
    return rows


def _cells(path: Path) -> tuple[list[str], list[list[str]]]:
    """Headings, in small letters, and rows of a table. ValueError where it cannot be read, or lacks a column."""
    try:
        text = path.read_text("utf-8-sig")  # as Excel writes it, too
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not in UTF-8: save it as CSV in UTF-8") from error
    try:
        heads, *cells = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error}): close its quotes, or save it anew") from error
    heads = [head.strip().lower() for head in heads]
    missing = [column for column in COLUMNS if column not in heads]
    if missing:
        columns = ", ".join(COLUMNS)
        raise ValueError(f"{path}: no column {', '.join(missing)}: the columns are {columns}, with commas between them")
    return heads, cells


def _entry(folder: Path, name: str, scan: Path, row: dict[str, str] | None) -> Entry:
    label, organs = (_existing(folder / part / f"{name}.nii.gz") for part in ("labelsTr", "organsTr"))
    if row is None:
        return Entry(name, scan, label, organs, "complete" if label else "none")
    annotated = SHORT.get(row["annotated"], row["annotated"])
    if annotated not in get_args(Annotated):
        raise ValueError(f"annotated is {row['annotated']!r}, not one of {', '.join(get_args(Annotated))}")
    if row["healthy"] not in ("0", "1"):
        raise ValueError(f"healthy is {row['healthy']!r}, not 0 or 1")
    healthy = row["healthy"] == "1"
    if annotated != "none" and not healthy and label is None:
        raise ValueError("said to be annotated, but labelsTr has no mask of it")
    if healthy and annotated == "partial":
        raise ValueError("healthy, and partly annotated: a healthy scan is complete")
    pseudo = row.get("pseudo") or "0"
    if pseudo not in ("0", "1"):
        raise ValueError(f"pseudo is {pseudo!r}, not 0 or 1")
    known = row["lesion_type"], row.get("patient", ""), pseudo == "1"
    return Entry(name, scan, label, organs, annotated, healthy, *known)  # type: ignore[arg-type]


def link(entries: list[Entry], folder: Path) -> None:
    """Write a folder in FLARE layout of links to the files of these cases, and its `cases.csv`; older links go.

    ValueError where the folder holds anything else, which is somebody's own.
    """
    parts = ("imagesTr", "labelsTr", "organsTr")
    own = [path for part in parts for path in (folder / part).glob("*") if not path.is_symlink()]
    if own:
        raise ValueError(f"{own[0]} would be lost: name another --out, or move that file")
    linked = [
        (part, path.name, path.resolve())
        for entry in entries
        for part, path in zip(parts, (entry.scan, entry.label, entry.organs), strict=True)
        if path
    ]
    for part in parts:
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
    for part, name, path in linked:
        (folder / part / name).symlink_to(path)
    write_rows(folder, entries)


def refuse_others(folder: Path, names: Iterable[str]) -> None:
    """ValueError where a folder to write these cases into holds others, whose rows of `cases.csv` would be lost."""
    wanted = set(names)
    there = [case_name(path) for path in sorted((folder / "imagesTr").glob("*")) if is_scan(path)]
    others = [name for name in there if name not in wanted]
    if others:
        raise ValueError(f"{folder}: holds other scans already ({others[0]}): name another --out")


def write_rows(folder: Path, entries: Iterable[Entry]) -> None:
    """Write `cases.csv`, whole or not at all."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow([*COLUMNS, "patient", "pseudo"])
    writer.writerows([e.name, e.annotated, int(e.healthy), e.lesion_type, e.patient, int(e.pseudo)] for e in entries)
    write_whole(folder / "cases.csv", file.getvalue().encode())


def unlisted(scan: Path) -> Path:
    """Where a scan is written: nothing that reads the folder sees it there.

    Without its row in `cases.csv` a partial label would count as complete, and a patient as another one.
    """
    return scan.with_name(f".{scan.name}")


def list_scans(folder: Path, entries: Iterable[Entry], new: Iterable[Entry]) -> None:
    """Write a folder's rows, and then let the scans of new ones be seen: none lacks its row, whenever a kill comes."""
    write_rows(folder, entries)
    for entry in new:
        unlisted(entry.scan).replace(entry.scan)


def finished(folder: Path) -> dict[str, Entry]:
    """By name, the scans that are there and have a row in `cases.csv`.

    ValueError where a row is not as this program writes it.
    """
    scans = {case_name(path): path for path in (folder / "imagesTr").glob("*") if is_scan(path)}
    problems: list[str] = []
    rows = _rows(folder / "cases.csv", problems)
    refuse(problems, folder)
    return {name: _entry(folder, name, scans[name], row) for name, row in rows.items() if name in scans}


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def read_lesions(path: Path, geometry: Geometry, pseudo: bool = False) -> NDArray[np.uint8]:
    """A label of 0 and 1, canonical (z, y, x). ValueError for others: which structures are lesions?

    pseudo: whether it may hold `PSEUDO` too. An annotator's mask of 0 and 255 must not pass for a network's.
    """
    label = read_label(path, geometry)
    others = np.unique(label[(label > 1) & ~(pseudo & (label == PSEUDO))])
    if len(others):
        told = ", ".join(str(value) for value in others[:5])
        again = ", or call pseudo-labels again if it wrote this" if PSEUDO in others else ""
        raise ValueError(f"{path}: holds the labels {told}: write a mask of the lesions alone, as 1{again}")
    return label


def load_case(entry: Entry) -> Case:
    """Read scan, label and organs, which must lie on the same grid. ValueError, also where the label is not as said."""
    volume = read_volume(entry.scan)
    if doubt := volume.doubt:
        raise ValueError(f"{entry.scan}: {doubt}")
    label = np.zeros(volume.hu.shape, np.uint8)
    if entry.label:
        label = read_lesions(entry.label, volume.geometry, entry.pseudo)
    if entry.healthy and label.any():
        count = np.count_nonzero(label)
        raise ValueError(f"{entry.label}: {count} voxels of lesion in a scan that cases.csv calls healthy")
    organs = np.full_like(label, UNKNOWN)
    if entry.organs:
        organs = read_label(entry.organs, volume.geometry)
        strange = np.setdiff1d(organs, [*Organ, UNKNOWN])
        if len(strange):
            raise ValueError(f"{entry.organs}: {strange[0]} is the code of no organ: write training.anatomy.Organ's")
    return Case(entry, volume.body, label[volume.box], organs[volume.box], volume.spacing_mm)
