"""What users do by mistake costs one sentence that names the file and the mend, and never a file of theirs."""

from __future__ import annotations

import csv
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.training.small_scans import SHAPE, a_label, files, write, write_folder
from training import __main__ as command_line
from training import cache, calibration, hybrid_training, pseudo_labels, release
from training.data import Entry, load_case, read_folder
from training.loop import Common, save_weights
from training.unet_training import Settings
from training.unet_training import main as train_unet
from training.unet_training import start as start_unet

TINY = {"steps": 1, "validation": 1, "validations": 1, "device": "cpu", "workers": 0, "features": 4, "batch": 1,
        "patch": (16, 32, 32), "small": (16, 32, 32)}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "flare")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda label: label.astype(np.int16) - 1, "no whole numbers from 0 to 255"),
        (lambda label: label.astype(np.int16) * 256, "no whole numbers from 0 to 255"),
        (lambda label: label.astype(np.float32) * 0.9999, "no whole numbers from 0 to 255"),
        (lambda label: np.where(label, 1, np.nan).astype(np.float32), "no whole numbers from 0 to 255"),
        (lambda label: label * 2, "holds the labels 2: write a mask of the lesions alone, as 1$"),
        (lambda label: label * 255, "holds the labels 255: write a mask of the lesions alone, as 1, or call pseudo"),
    ],
    ids=["negative", "256", "fraction", "nan", "two", "as a picture"],
)
def test_labels_that_are_none(folder: Path, change, told: str) -> None:
    write(folder / "labelsTr/b.nii.gz", change(a_label()))
    entries = {entry.name: entry for entry in read_folder(folder)}
    with pytest.raises(ValueError, match=told) as error:
        load_case(entries["b"])
    assert "b.nii.gz" in str(error.value)
    assert load_case(entries["a"]).label.sum() == a_label().sum()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("minutes", -1),
        ("minutes", 0),
        ("steps", -5),
        ("validation", 0),
        ("validations", 0),
        ("workers", -1),
        ("decay", 1),
    ],
)
def test_budgets_that_make_no_sense(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    for settings in (Common, Settings):
        with pytest.raises(ValueError, match=f"--{name}"):
            settings((folder,), tmp_path / "run", **{name: value})


def test_a_run_goes_on_with_its_own_data_and_checkpoint(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    train_unet(Settings((folder,), out, **TINY))
    trained = files(out)
    train_unet(Settings((folder,), out, **TINY))
    assert "budget is spent already" in capsys.readouterr().out
    other = folder.rename(tmp_path / "other")
    with pytest.raises(ValueError, match=r"checkpoint.pt: of a run on other data: .* \(flare/d\): name another"):
        train_unet(Settings((other,), out, **TINY))
    other.rename(folder)
    with pytest.raises(ValueError, match=r"checkpoint.pt: damaged, or of a run with other settings"):
        train_unet(Settings((folder,), out, **{**TINY, "features": 8}))
    whole = (out / "checkpoint.pt").read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        (out / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint.pt: damaged"):
            train_unet(Settings((folder,), out, **TINY))
    now = files(out)
    assert {name: now[name] for name in ("unet.onnx", "unet.safetensors")} == {
        name: trained[name] for name in ("unet.onnx", "unet.safetensors")
    }
    assert not [name for name in now if "tmp" in name or "part" in name]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (-1.0,), (0.0,), (float("inf"),)])
def test_shares_are_refused_before_the_cache_is_filled(folder: Path, tmp_path: Path, shares: tuple) -> None:
    for settings in (Settings, hybrid_training.Settings):
        with pytest.raises(ValueError, match="--shares: give one positive number for each of the 1 folders"):
            settings((folder,), tmp_path / "run", shares=shares)
    with pytest.raises(ValueError, match="each of the 2 folders"):
        Settings((folder, tmp_path), tmp_path / "run", shares=(1.0,))


def test_a_run_that_goes_on_otherwise_says_so(folder: Path, tmp_path: Path, capsys) -> None:
    begun = Settings((folder,), tmp_path / "run", **{**TINY, "steps": 2})
    train_unet(begun)
    capsys.readouterr()
    train_unet(replace(begun, workers=1, g_per_kwh=1.0))  # which change nothing
    assert "goes on" not in capsys.readouterr().err
    weights = begun.out / "unet.safetensors"
    train_unet(replace(begun, steps=3, seed=7, learning_rate=1e-3, weights=weights))
    told = [line for line in capsys.readouterr().err.splitlines() if "goes on" in line]
    checkpoint = f"{begun.out}/checkpoint.pt: "
    assert told == [
        f"{checkpoint}--steps was 2 and is 3, --learning-rate was 0.005 and is 0.001, --seed was 0 and is 7: "
        "the run goes on with what is given now",
        f"{checkpoint}--weights was None and is {weights}: the run goes on from what it has learnt, without that",
    ]
    train_unet(replace(begun, steps=3, seed=7, learning_rate=1e-3, weights=weights))  # what was told is the run's own
    assert "goes on" not in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    settings = Settings((folder,), tmp_path / "run", **TINY)
    train_unet(settings)
    before, run = files(settings.out), start_unet(settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # of a file; as little as a full disk takes
    try:
        with pytest.raises(OSError, match=r"checkpoint.pt: cannot be written .*: make room there"):
            run.save()
        with pytest.raises(OSError, match=r"unet.safetensors: cannot be written .*: make room there"):
            save_weights(run.network, settings.out / "unet.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(settings.out) == before


def test_tables_as_spreadsheets_write_them(folder: Path) -> None:
    def table(text: str, encoding: str) -> None:
        (folder / "cases.csv").write_bytes(text.encode(encoding))

    rows = "case, annotated, healthy, lesion_type\r\n" + "".join(f"{name},partial,0,liver\r\n" for name in "abcd")
    table(rows, "utf-8-sig")
    assert next((e.name, e.annotated) for e in read_folder(folder)) == ("a", "partial")
    table(rows.replace("liver", "Nière"), "latin-1")
    with pytest.raises(ValueError, match=r"cases.csv: not in UTF-8: save it as CSV in UTF-8"):
        read_folder(folder)
    table(
        "Case,Annotated ,HEALTHY,lesion_type,Patient\n" + "".join(f"{name} ,partial,0,, p \n" for name in "abcd"),
        "utf-8",
    )
    assert {(e.annotated, e.patient) for e in read_folder(folder)} == {("partial", "p")}
    table(rows.replace("a,partial,0,liver", "a,partial,0,liver, left"), "utf-8")
    with pytest.raises(ValueError, match=r"a: 5 cells in its row of cases.csv, which has 4 columns"):
        read_folder(folder)
    table(rows.replace("a,partial,0,liver", 'a,partial,0,"liver'), "utf-8")  # swallows the rows behind it
    with pytest.raises(ValueError, match=r"cases.csv: cannot be read as a table \(.*\): close its quotes"):
        read_folder(folder)
    table(rows.replace("liver", "l" * 200_000), "utf-8")
    with pytest.raises(ValueError, match=r"cases.csv: cannot be read as a table \(field larger"):
        read_folder(folder)
    table(rows.replace(",", ";"), "utf-8")
    with pytest.raises(ValueError, match=r"cases.csv: no column .* with commas between them"):
        read_folder(folder)


def test_files_that_do_not_belong_together_are_listed(folder: Path) -> None:
    """All in one error; without a table, scans need no label."""
    (folder / "labelsTr/d.nii.gz").unlink()
    assert [entry.label is None for entry in read_folder(folder)] == [False, False, False, True]
    write(folder / "labelsTr/d.nii", a_label())
    write(folder / "labelsTr/e.nii.gz", a_label())
    write(folder / "imagesTr/c.nii.gz", a_label())
    (folder / "cases.csv").write_text("case,annotated,healthy,lesion_type\na,complete,0,\nc,complete,0,\nf,none,0,\n")
    with pytest.raises(ValueError, match="mend or remove these cases") as error:
        read_folder(folder)
    told = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in told] == ["c", "f", "labelsTr/d.nii", "labelsTr/e.nii.gz"]


@pytest.mark.parametrize("unit", [1000, 3000], ids=["thousandths", "less"])
def test_scans_that_are_no_hu(folder: Path, unit: int) -> None:
    scan = folder / "imagesTr/a_0000.nii.gz"
    write(scan, (np.asarray(nib.load(scan).dataobj) / unit).astype(np.float32))
    entry = next(iter(read_folder(folder)))
    with pytest.raises(ValueError, match=r"a_0000.nii.gz: holds -?\d+ to \d+, which are no HU|holds no HU"):
        load_case(entry)


def test_scans_without_their_rescale_intercept(folder: Path) -> None:
    scan = folder / "imagesTr/a_0000.nii.gz"
    stored = np.asarray(nib.load(scan).dataobj).astype(np.int16) + 1024
    stored[0] = -2000  # the padding around a scanner's round field
    write(scan, stored)
    entry = next(iter(read_folder(folder)))
    with pytest.raises(ValueError, match=r"a_0000.nii.gz: holds hardly anything from .* rescale intercept"):
        load_case(entry)


def test_completed_labels_follow_the_given_ones(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A label that is changed is completed anew; folds are not drawn otherwise in the middle of the work."""
    (folder / "cases.csv").write_text(
        "case,annotated,healthy,lesion_type\n" + "".join(f"{name},partial,0,\n" for name in "abcd")
    )
    asked = []

    def write_completed(network: object, entry: Entry, settings: object, path: Path) -> None:
        asked.append(entry.name)
        assert entry.label
        path.write_bytes(entry.label.read_bytes())

    monkeypatch.setattr(pseudo_labels, "train_fold", lambda *_: None)
    monkeypatch.setattr(pseudo_labels, "write_completed", write_completed)
    settings = pseudo_labels.Settings((folder,), tmp_path / "out", folds=2)
    pseudo_labels.main(settings)
    pseudo_labels.main(settings)
    assert sorted(asked) == list("abcd")
    later = (tmp_path / "out/labels/b.nii.gz").stat().st_mtime + 5
    write(folder / "labelsTr/b.nii.gz", 0 * a_label())
    os.utime(folder / "labelsTr/b.nii.gz", (later, later))
    pseudo_labels.main(settings)
    assert asked[4:] == ["b"]
    assert (tmp_path / "out/completed/labelsTr/b.nii.gz").read_bytes() == (folder / "labelsTr/b.nii.gz").read_bytes()
    for change in ({"folds": 3}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"was begun with other --folds or another --seed"):
            pseudo_labels.main(replace(settings, **change))


@pytest.mark.parametrize(
    "change",
    [
        *({"stacks": 0}, {"targets": 0}, {"crop": 50}, {"crop": 272}, {"crop_stacks": 0}, {"crop_share": 2.0}),
        *({"classifier_weight": -1.0}, {"lesion_weight": -1.0}, {"frozen_norms": 7.0}, {"clip": -1.0}),
    ],
)
def test_settings_of_the_hybrid_that_make_no_sense(folder: Path, tmp_path: Path, change: dict) -> None:
    with pytest.raises(ValueError, match="--"):
        hybrid_training.Settings((folder,), tmp_path / "run", **change)


@pytest.mark.parametrize("patch", [(16, 32, 48), (16, 36, 36), (8, 32, 32)])
def test_patches_that_no_network_takes(folder: Path, tmp_path: Path, patch: tuple) -> None:
    with pytest.raises(ValueError, match="patch sides must be multiples of 8 from 16 on, the last two alike"):
        Settings((folder,), tmp_path / "run", patch=patch)


def test_a_run_does_not_go_on_with_other_scans_of_the_same_names(folder: Path, tmp_path: Path) -> None:
    settings = Settings((folder,), tmp_path / "run", **TINY)
    train_unet(settings)
    scan = folder / "imagesTr/d_0000.nii.gz"  # the one that judges
    write(scan, np.asarray(nib.load(scan).dataobj)[::-1] + np.int16(7))
    with pytest.raises(ValueError, match=r"checkpoint.pt: of a run on other data: .* \(flare/d\): name another --out"):
        train_unet(settings)


def test_a_full_disk_leaves_no_half_of_a_case_in_the_cache(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError("12 requested and 0 written")  # as numpy tells it

    monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(OSError, match=r"cannot be written \(12 requested and 0 written\): make room there"):
        list(cache.prepare(read_folder(folder), tmp_path / "cache", lambda case: {"hu": case.hu}))
    assert list((tmp_path / "cache").iterdir()) == []


def test_organs_of_another_code(folder: Path) -> None:
    write(folder / "organsTr/a.nii.gz", np.full(SHAPE, 104, np.uint8))
    with pytest.raises(ValueError, match=r"organsTr/a.nii.gz: 104 is the code of no organ"):
        load_case(read_folder(folder)[0])


def test_files_of_another_kind(folder: Path, tmp_path: Path, random_weights: Path) -> None:
    wrong, other = random_weights / "unet.onnx", tmp_path / "other.pth"
    torch.save({"encoder": torch.zeros(1)}, other)
    for checkpoint, told in (
        (wrong, r"unet.onnx: cannot be read as a checkpoint"),
        (other, r"other.pth: encoder has no"),
    ):
        settings = hybrid_training.Settings(
            (folder,), tmp_path / "run", sam_checkpoint=checkpoint, steps=1, validation=1
        )
        with pytest.raises(ValueError, match=told):
            hybrid_training.main(settings)
    with pytest.raises(ValueError, match=r"name hybrid.safetensors and unet.onnx"):
        release.main(release.Settings(wrong, wrong, tmp_path / "weights"))
    graph = random_weights / "hybrid.onnx"
    with pytest.raises(ValueError, match=r"hybrid.onnx: says nothing of its network"):
        release.metadata(graph)


def test_calibration_lists_every_bad_case(folder: Path) -> None:
    for name in "ac":
        write(folder / f"labelsTr/{name}.nii.gz", 7 * a_label())
    with pytest.raises(ValueError, match="mend or remove these cases") as error:
        list(calibration.load_all(read_folder(folder)))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == ["a", "c"]


def test_thresholds_are_not_chosen_on_nothing(folder: Path, random_weights: Path) -> None:
    manifest = (random_weights / "manifest.json").read_bytes()
    for annotated, healthy, told in (("partial", 0, "annotated completely"), ("complete", 1, "no scan has a lesion")):
        with (folder / "cases.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "annotated", "healthy", "lesion_type"])
            writer.writerows([name, annotated, healthy, ""] for name in "abcd")
        if healthy:
            for name in "abcd":
                write(folder / f"labelsTr/{name}.nii.gz", 0 * a_label())
        with pytest.raises(ValueError, match=told):
            calibration.main(calibration.Settings((folder,), random_weights))
    assert (random_weights / "manifest.json").read_bytes() == manifest


def test_an_interrupt_is_one_line(monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line.tyro.extras, "subcommand_cli_from_dict", interrupted)
    monkeypatch.setattr(sys, "argv", ["training", "phantoms"])
    assert command_line.main() == 130
    assert capsys.readouterr().err.count("\n") == 1
