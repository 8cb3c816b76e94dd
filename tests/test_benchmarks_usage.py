"""What the benchmarks say of a user's mistakes: every script, with options that make no sense."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest

from benchmarks.command_line import run_main
from benchmarks.results_file import write_results

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
ELSEWHERE = "nnunet_"  # run in an environment of their own, with nnU-Net
SCRIPTS = sorted(
    path.stem for path in FOLDER.glob("*.py") if not path.name.startswith(ELSEWHERE) and "__main__" in path.read_text()
)
ABLATION = "--data a --held-out b --unet c"
WRITERS = (
    *("cold_start", "int8", "nsd", "peers", "phantom_accuracy", "scaling", "soak", "stacked", f"ablation {ABLATION}"),
    *("nnunet --data nowhere --work {folder}", "real_accuracy --data nowhere", "reproducibility --data nowhere"),
)
MISTAKES = [
    (f"ablation {ABLATION} --variants foo", "--variants foo: unknown: use some of full, one slice"),
    (f"ablation {ABLATION} --seeds", "--seeds: give 0 or more"),
    (f"ablation {ABLATION}", "No such file or directory: c"),
    ("cold_start --slices 0", "--slices 0: give 1 or more"),
    ("cold_start --runs -1", "--runs -1: give 1 or more"),
    ("cold_start --device tpu", "--device tpu: unknown"),
    ("cold_start --weights nope", "nope: no weights there"),
    *((f"{call} --out {{folder}}", "cannot be written: name a file in a folder of yours") for call in WRITERS),
    *((f"{call} --out {{file}}/out.json", "its folder cannot be made") for call in WRITERS),
    ("demo --out {file}", "File exists"),
    ("fuzz --count 0", "--count 0: give 1 or more"),
    ("int8 --rounds 0", "--rounds 0: give 1 or more"),
    ("int8 --weights nope", "nope: no weights there"),
    ("kills --kills 0", "--kills 0: give 1 or more"),
    ("kills --weights nope", "nope: no weights there"),
    ("nnunet --data nowhere --work {folder} --minutes 0", "--minutes 0: give more than 0"),
    ("nnunet --data nowhere --work {folder} --configurations", "--configurations: name one at least"),
    ("nnunet --data nowhere --work {folder} --configurations 4d", "--configurations 4d: unknown: use some of 2d"),
    ("nsd --runs 0", "--runs 0: give 1 or more"),
    ("papers_way nope cpu in out", "nope/manifest.json: cannot be read"),
    ("peers --contestants foo", "--contestants foo: unknown: use some of small, base"),
    ("peers --contestants nnU-Net", "python is not there: run `make peers`"),
    ("peers --slices 0", "--slices 0: give 1 or more"),
    ("peers --timeout-s 0", "--timeout-s 0: give seconds above 0"),
    ("peers --slow-slices 60", "--slow-slices 60: has to be less than half of --slices"),
    ("phantom_accuracy --count 0", "--count 0: give 1 or more"),
    ("phantom_accuracy --first-seed -1", "--first-seed -1: give 0 or more"),
    ("phantom_accuracy --weights nope", "nope: no weights there"),
    ("phantom_accuracy --out {file}", "a file: cannot be read as JSON"),
    ("real_accuracy --data nowhere", "nowhere/splits.json: cannot be read"),
    ("real_accuracy --data {data}", "names no scan of sts under val"),
    ("reproducibility --data nowhere", "nowhere/splits.json: cannot be read"),
    ("reproducibility --data nowhere --cases 0", "--cases 0: give 1 or more"),
    ("sam_slices tpu in out", "--device tpu: unknown"),
    ("scaling --slices 50 0", "--slices 50 0: give 1 or more"),
    ("scaling --cases", "--cases: give 1 or more"),
    ("scaling --weights nope", "nope: no weights there"),
    ("soak --cases 0", "--cases 0: too few"),
    ("soak --weights nope", "nope: no weights there"),
    ("stacked --presets foo", "--presets foo: unknown: use some of paper, base, small"),
    ("stacked --window-batch 0", "--window-batch 0: give 1 or more"),
]


def call(name: str, *words: str) -> int:
    """Exit code of `python -m benchmarks.NAME WORDS`."""
    path = FOLDER / f"{name}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(path), *words])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(path), run_name="__main__")
    return int(stopped.value.code or 0)


def said(captured: str) -> str:
    """Without a box around it, in one line."""
    return " ".join(captured.replace("│", " ").split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_a_usage(name: str, capsys) -> None:
    assert call(name, "--help") == 0
    assert f"usage: python -m benchmarks.{name} " in capsys.readouterr().out


@pytest.mark.parametrize(("line", "told"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes_are_told_in_a_sentence(line: str, told: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "a file").write_text("no JSON")
    (tmp_path / "splits.json").write_text(json.dumps({"sts": {"train": ["A"]}}))
    monkeypatch.setattr("benchmarks.nnunet.PEERS", tmp_path)  # where `make peers` has not been called
    places = {"file": tmp_path / "a file", "folder": tmp_path, "data": tmp_path}
    name, *words = (word.format(**places) for word in line.split(" "))
    assert call(name, *words) == 2
    assert told in said(capsys.readouterr().err)


def test_scans_that_the_splits_name_in_vain(tmp_path: Path, capsys) -> None:
    (tmp_path / "splits.json").write_text(json.dumps({"sts": {"train": ["A"], "val": ["B"]}}))
    assert call("real_accuracy", "--data", str(tmp_path)) == 2
    assert "B_0000.nii.gz" in capsys.readouterr().err


def test_an_interrupt_is_one_line(monkeypatch, capsys) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["soak"])
    assert run_main(interrupted, None) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_results_name_day_and_machine_even_where_its_gpu_cannot_be_read(tmp_path: Path) -> None:
    write_results(tmp_path / "told.json", {"seconds": 1.5}, "cuda:99")
    told = json.loads((tmp_path / "told.json").read_text())
    assert list(told) == ["date", "machine", "seconds"]
    assert (told["machine"]["cores"], told["machine"]["gpu"]) == (len(os.sched_getaffinity(0)), None)
