"""Masks are whole or absent, whatever happens to the process."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from benchmarks.kills import survive, write_scans
from inference import atomic
from inference.atomic import write_whole


def test_kills_leave_whole_masks_only(random_weights: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    told = survive(tmp_path / "scans", tmp_path, str(random_weights), kills=4, seed=1)
    assert told["met_at_work"] >= 2
    assert 0 < told["masks_before_kills"] < 40


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_is_replaced_whole_and_readable_by_all(tmp_path: Path, monkeypatch, nameless: bool) -> None:
    if not nameless:
        monkeypatch.setattr(atomic, "_write_nameless", _refuse)
    path, mask = tmp_path / "x.nii.gz", os.umask(0o077)
    try:
        for content in (b"a" * 100_000, b"", b"other"):
            write_whole(path, content)
            assert path.read_bytes() == content
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    finally:
        os.umask(mask)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("nameless", [True, False])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch, nameless: bool) -> None:
    if not nameless:
        monkeypatch.setattr(atomic, "_write_nameless", _refuse)
    path = tmp_path / "x.nii.gz"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", _refuse)  # where a full disk is met, at the latest
    with pytest.raises(OSError, match="refused"):
        write_whole(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x.nii.gz": b"old"}
    (tmp_path / "folder").mkdir()
    monkeypatch.undo()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "folder", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x.nii.gz"]


def _refuse(*_: object) -> None:
    raise OSError(28, "refused")
