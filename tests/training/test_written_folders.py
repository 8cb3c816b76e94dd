"""Folders that commands write: nobody's files are lost, whole cases keep their rows, and what broke off goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.training.small_scans import a_label, files, write, write_folder
from training import data, implant, phantom, pseudo_labels
from training.data import Entry, link, read_folder, unlisted, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "flare")


def test_scans_are_never_replaced_by_links(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    with pytest.raises(ValueError, match="would be lost"):
        link(read_folder(folder), folder)
    for out in (tmp_path, folder):
        with pytest.raises(ValueError, match="name another --out"):
            pseudo_labels.main(pseudo_labels.Settings((folder,), out))
    with pytest.raises(ValueError, match="two folds are the fewest"):
        pseudo_labels.main(pseudo_labels.Settings((folder,), tmp_path / "out", folds=1))
    assert files(folder) == before
    for _ in range(2):  # links of an earlier time are replaced
        link(read_folder(folder), tmp_path / "linked")
    assert files(tmp_path / "linked").keys() == before.keys() | {"cases.csv"}


def test_rows_of_other_scans_are_not_lost(folder: Path) -> None:
    before = files(folder)
    with pytest.raises(ValueError, match=r"holds other scans already \(a\): name another --out"):
        phantom.main(phantom.Settings(folder, 1, network_grid=True))
    with pytest.raises(ValueError, match=r"holds other scans already \(a\)"):
        implant.main(implant.Settings(folder, folder, 1))
    assert files(folder) == before
    for wrong in ({"count": 0}, {"count": 1, "seed": -1}, {"count": 1, "jobs": 0}):
        with pytest.raises(ValueError, match="must be"):
            phantom.main(phantom.Settings(folder.parent / "new", **wrong))


def write_case(seed: int, settings: phantom.Settings) -> Entry:
    name = phantom.name_of(seed)
    scan, label = (settings.out / f"{place}.nii.gz" for place in (f"imagesTr/{name}_0000", f"labelsTr/{name}"))
    for path in (unlisted(scan), label):
        write(path, a_label())
    if seed == 7:
        raise KeyboardInterrupt
    return Entry(name, scan, label, None, "partial")


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_folder_of_phantoms_is_whole(tmp_path: Path, monkeypatch, jobs: int) -> None:
    """Two scans are done, another one is half-written, when the third comes to an end that is none."""

    monkeypatch.setattr(phantom, "_write_case", write_case)
    with pytest.raises(KeyboardInterrupt):
        phantom.main(phantom.Settings(tmp_path, 8, seed=5, jobs=jobs))
    assert [(entry.name, entry.annotated) for entry in read_folder(tmp_path)] == [
        ("phantom_000005", "partial"),
        ("phantom_000006", "partial"),
    ]
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 4


def test_phantoms_go_on_and_lose_none(tmp_path: Path, monkeypatch) -> None:
    """Two of three are there; a call that breaks off at once leaves them, the next makes what lacks, and no more."""
    made = []

    def make(seed: int, settings: phantom.Settings) -> Entry:
        made.append(seed)
        return write_case(seed, settings)

    monkeypatch.setattr(phantom, "_write_case", make)
    phantom.main(phantom.Settings(tmp_path, 2, seed=5))
    before = files(tmp_path)
    for count, redone in ((3, [7]), (3, [7])):  # seed 7 is interrupted, as often as it is called
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            phantom.main(phantom.Settings(tmp_path, count, seed=5))
        assert made == redone
        assert files(tmp_path) == before
    made.clear()
    phantom.main(phantom.Settings(tmp_path, 2, seed=5))
    assert made == []
    assert files(tmp_path) == before


@pytest.mark.parametrize("moment", ["written", "listed"])
def test_a_killed_run_leaves_no_partial_label_that_passes_for_complete(
    tmp_path: Path, monkeypatch, moment: str
) -> None:
    """Killed where the second scan is written, or its row is: a scan without one would count as complete."""
    settings = phantom.Settings(tmp_path, 3, seed=1)
    monkeypatch.setattr(phantom, "_write_case", write_case)

    def killed(*arguments: Any, **settings: Any) -> Any:
        done = {"written": write_case, "listed": write_rows}[moment](*arguments, **settings)
        if (tmp_path / "labelsTr" / "phantom_000002.nii.gz").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def run() -> None:
        if moment == "written":
            monkeypatch.setattr(phantom, "_write_case", killed)
        else:
            monkeypatch.setattr(data, "write_rows", killed)
        phantom.main(settings)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "imagesTr").glob("[!.]*")] == ["phantom_000001_0000.nii.gz"]
    with pytest.raises(
        ValueError, match=r"phantom_000002(\.nii\.gz: no scan|: in cases\.csv, but imagesTr has no such scan)"
    ):
        read_folder(tmp_path)
    phantom.main(settings)
    assert [(entry.name, entry.annotated) for entry in read_folder(tmp_path)] == [
        (f"phantom_{seed:06d}", "partial") for seed in (1, 2, 3)
    ]


@pytest.mark.parametrize("change", [{"partial_share": 1.0}, {"network_grid": True}, {"thinnest_mm": 2.5}])
def test_phantoms_of_other_settings_are_not_mixed(tmp_path: Path, monkeypatch, change: dict) -> None:
    monkeypatch.setattr(phantom, "_write_case", write_case)
    phantom.main(phantom.Settings(tmp_path, 1, seed=5))
    before = files(tmp_path)
    for damage in (None, b"", b"[1]"):  # as where an older version made them, or a disk failed
        if damage is not None:
            (tmp_path / "phantoms.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"its phantoms were made with other settings .*: name another --out"):
            phantom.main(phantom.Settings(tmp_path, 2, seed=5, **change))
        assert {name: text for name, text in files(tmp_path).items() if name != "phantoms.json"} == {
            name: text for name, text in before.items() if name != "phantoms.json"
        }


def test_an_interrupted_implant_keeps_what_is_told_of_whole_cases(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Made before, and again until the third case: what is there has its row, with its patient."""
    settings, make = implant.Settings(folder, tmp_path / "out", 4), implant.make
    implant.main(settings)

    def interrupted(entries: list[Entry], settings: implant.Settings, index: int) -> Entry:
        if index == 2:
            raise KeyboardInterrupt
        return make(entries, settings, index)

    monkeypatch.setattr(implant, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        implant.main(settings)
    assert [(entry.name, entry.patient) for entry in read_folder(tmp_path / "out")] == [
        ("a_0000", "a"),
        ("b_0001", "b"),
    ]
