"""Partial labels are completed with care, fold by fold, and a run that was cut off goes on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from inference.hybrid.config import PRESETS, HybridConfig
from inference.hybrid.model import Hybrid
from inference.hybrid.predict import SlicePredictions
from inference.slices import SliceGrid
from training import hybrid_training, pseudo_labels
from training.data import PSEUDO, Entry, link, load_case, read_folder
from training.loop import save_weights
from training.pseudo_labels import Settings, complete, fold_of

TINY = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16, norm="batch")
SETTINGS = Settings((Path(),), Path(), voxel=0.5, confidence=0.8, min_volume_ml=0.002)


def test_what_is_added_by_hand() -> None:
    """Voxels of 1 mm³ in a row of lesions, each two voxels: only the first is sure, apart from the label, and large."""
    label = np.zeros((1, 3, 20), np.uint8)
    label[0, 1, 10:12] = 1
    probability = np.zeros(label.shape, np.float16)
    probability[0, 1, 1:3] = 0.9
    probability[0, 1, 5:7] = 0.7  # unsure
    probability[0, 1, 8:10] = 0.9  # touches the label by a face
    probability[0, 2, 12] = 0.9  # by a corner
    probability[0, 1, 15] = 0.9  # too small
    expected = label.copy()
    expected[0, 1, 1:3] = PSEUDO
    np.testing.assert_array_equal(complete(label, probability, 0.001, SETTINGS), expected)
    everywhere = complete(label, np.ones_like(probability), 0.001, SETTINGS)
    np.testing.assert_array_equal(everywhere, label)  # one component, which touches the label


def test_what_it_cannot_do_is_told(monkeypatch) -> None:
    with pytest.raises(ValueError, match="one FLARE folder"):
        pseudo_labels.main(replace(SETTINGS, data=(Path(), Path())))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        pseudo_labels.main(SETTINGS)


def test_folds_are_even_and_drawn_by_the_seed(folder) -> None:
    entries = read_folder(folder)
    folds = fold_of(entries, 4, seed=0)
    assert sorted(np.bincount(list(folds.values()))) == [1, 1, 2, 2]
    assert folds == fold_of(entries, 4, seed=0)
    assert folds != fold_of(entries, 4, seed=1)
    twins = [replace(entry, patient="twin") for entry in entries[:3]] + entries[3:]
    assert fold_of(twins, 4, seed=0).keys() == {"twin", "c3", "c4", "c5"}


def test_the_command_completes_a_folder_and_goes_on_where_it_stopped(folder, tmp_path, monkeypatch) -> None:
    """c0 … c3 are partly labelled, c4 is healthy, c5 unlabelled; whatever is found may be added."""
    monkeypatch.setitem(PRESETS, "small", TINY)
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    (own / "labelsTr" / "c5.nii.gz").unlink()
    rows = [*(f"c{i},partial,0,liver" for i in range(4)), "c4,none,1,none", "c5,none,0,"]
    (own / "cases.csv").write_text("\n".join(["case,annotated,healthy,lesion_type", *rows]) + "\n")
    settings = Settings(
        (own,), tmp_path / "out", folds=2, steps=2, stacks=1, targets=2, validation=1, validations=1, device="cpu",
        voxel=0.0, confidence=0.0, min_volume_ml=0.0,
    )  # fmt: skip
    trained = []
    train = hybrid_training.main

    def cut_off(fold: hybrid_training.Settings) -> None:
        trained.append(sorted(path.name[:2] for path in (fold.data[0] / "imagesTr").iterdir()))
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(fold)

    monkeypatch.setattr(hybrid_training, "main", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pseudo_labels.main(settings)
    pseudo_labels.main(settings)
    assert len(trained) == 3
    assert trained[1] == trained[2]
    folds = fold_of(read_folder(own), 2, 0)
    for fold, names in zip((0, 1), trained[:2], strict=True):
        assert names == sorted(name for name in folds if folds[name] != fold and name != "c5")
    completed = {entry.name: entry for entry in read_folder(tmp_path / "out" / "completed")}
    assert [completed[f"c{i}"].annotated for i in range(6)] == ["partial"] * 4 + ["none", "partial"]
    assert not load_case(completed["c4"]).label.any()
    assert (load_case(completed["c5"]).label == PSEUDO).all()
    with pytest.raises(ValueError, match="is completed already: name the folder that it was made of"):
        pseudo_labels.main(replace(settings, data=(tmp_path / "out" / "completed",), out=tmp_path / "again"))
    for name in ("c0", "c5"):  # every voxel is a candidate: one component, which touches c0's label
        given = np.asarray(nib.load(folder / "labelsTr" / f"{name}.nii.gz").dataobj)
        now = np.asarray(nib.load(completed[name].label).dataobj)
        assert (now[given > 0] == 1).all()
        assert set(np.unique(now)) == ({0, 1} if name == "c0" else {PSEUDO})


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """The six scans, all with a label, all partly labelled."""
    copy = Path(shutil.copytree(folder, tmp_path / "own"))
    write_rows(copy, {f"c{i}": "partial" for i in range(6)})
    return copy


def write_rows(folder: Path, annotated: dict[str, str], patients: dict[str, str] | None = None) -> None:
    rows = [f"{name},{told},0,,{(patients or {}).get(name, '')}" for name, told in annotated.items()]
    (folder / "cases.csv").write_text("\n".join(["case,annotated,healthy,lesion_type,patient", *rows]) + "\n")


class CutOffError(Exception):
    """Stands for an interrupt, which would end the tests too where one fails."""


class Work:
    """Stands in for training and seeking: what was trained on, by fold, and the cases that were completed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 100) -> None:
        self.trained: dict[str, list[str]] = {}
        self.completed: list[str] = []
        self.most = most  # cases, before it is interrupted
        monkeypatch.setattr(pseudo_labels, "train_fold", self.train)
        monkeypatch.setattr(pseudo_labels, "write_completed", self.write)

    def train(self, entries: list[Entry], settings: hybrid_training.Settings) -> None:
        settings.out.mkdir(exist_ok=True)
        self.trained[settings.out.name] = [entry.name for entry in entries]

    def write(self, _network: object, entry: Entry, _settings: Settings, path: Path) -> None:
        if len(self.completed) == self.most:
            raise CutOffError
        self.completed.append(entry.name)
        path.write_bytes(b"completed")

    def cut_off(self, settings: Settings) -> None:
        """A call that comes to more cases than it is given."""
        with pytest.raises(CutOffError):
            pseudo_labels.main(settings)

    def again(self, settings: Settings) -> list[str]:
        """The cases that one more call completes."""
        before = len(self.completed)
        pseudo_labels.main(settings)
        return sorted(self.completed[before:])


@pytest.mark.parametrize("change", [{"voxel": -0.1}, {"voxel": 1.5}, {"confidence": 2.0}, {"confidence": float("nan")}])
def test_probabilities_that_are_none(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"^--{name} .*: give a share from 0 to 1$"):
        replace(SETTINGS, **change)


def test_a_volume_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"^--min-volume-ml -1.0: give 0 or more$"):
        replace(SETTINGS, min_volume_ml=-1.0)


def test_settings_that_decide_the_labels_stay_as_they_were(own, tmp_path, monkeypatch) -> None:
    work, settings = Work(monkeypatch), Settings((own,), tmp_path / "out", folds=2, steps=2)
    assert len(work.again(settings)) == 6
    begun = (tmp_path / "out/folds.json").read_bytes()
    for name, was, now in (
        *(("voxel", 0.5, 0.01), ("confidence", 0.9, 0.99), ("min_volume_ml", 0.1, 0.2), ("preset", "small", "base")),
        *(("plane", "axial", "coronal"), ("steps", 2, 3), ("validation", 12, 2), ("learning_rate", 0.0005, 0.1)),
    ):
        told = rf"/out: was begun with other settings \(--{name.replace('_', '-')} was {was} and is {now}\): give what"
        with pytest.raises(ValueError, match=told):
            pseudo_labels.main(replace(settings, **{name: now}))
    with pytest.raises(
        ValueError, match=r"other --folds or another --seed \(--seed was 0 and is 1\): .* another --out"
    ):
        pseudo_labels.main(replace(settings, seed=1))
    with pytest.raises(ValueError, match=r"\(--steps was 2 and is 0\)"):
        pseudo_labels.main(replace(settings, steps=0))
    assert (tmp_path / "out/folds.json").read_bytes() == begun
    assert work.again(replace(settings, device="cpu", workers=0, jobs=2, minutes=1.0)) == []  # which decide nothing


def test_a_budget_may_change_until_all_is_done_and_all_else_until_something_is(own, tmp_path, monkeypatch) -> None:
    """The first call ends before anything was made, the second with four of six labels."""
    work, settings = Work(monkeypatch, most=0), Settings((own,), tmp_path / "out", folds=2, steps=2, voxel=0.3)
    work.cut_off(settings)
    with pytest.raises(ValueError, match=r"--folds was 2 and is 3"):
        pseudo_labels.main(replace(settings, folds=3))
    work.most, settings = 4, replace(settings, voxel=0.4)
    work.cut_off(settings)
    with pytest.raises(ValueError, match=r"--voxel was 0.4 and is 0.3"):
        pseudo_labels.main(replace(settings, voxel=0.3))
    work.most = 6
    assert len(work.again(replace(settings, steps=4))) == 2
    with pytest.raises(ValueError, match=r"--steps was 4 and is 2"):
        pseudo_labels.main(settings)


def test_a_network_alone_binds_its_settings(own, tmp_path, monkeypatch) -> None:
    work, settings = Work(monkeypatch, most=0), Settings((own,), tmp_path / "out", folds=2)
    work.cut_off(settings)
    (tmp_path / "out/fold_0/checkpoint.pt").touch()
    with pytest.raises(ValueError, match="--preset was small and is base"):
        pseudo_labels.main(replace(settings, preset="base"))
    work.most = 6
    assert len(work.again(replace(settings, minutes=90.0))) == 6


def test_what_older_versions_wrote_is_done_anew_and_what_is_damaged_is_told(own, tmp_path, monkeypatch) -> None:
    """They kept neither the settings nor what a label was made of."""
    work, settings = Work(monkeypatch), Settings((own,), tmp_path / "out", folds=2, voxel=0.3)
    record = tmp_path / "out/folds.json"
    (tmp_path / "out/labels").mkdir(parents=True)
    for name in ("c0", "c1"):
        (tmp_path / f"out/labels/{name}.nii.gz").touch()
    record.write_text('{"folds": 2, "seed": 1}')
    with pytest.raises(ValueError, match="--seed was 1 and is 0"):
        pseudo_labels.main(settings)
    record.write_text('{"folds": 2, "seed": 0}')
    assert len(work.again(settings)) == 6
    with pytest.raises(ValueError, match=r"--voxel was 0.3 and is 0.4"):
        pseudo_labels.main(replace(settings, voxel=0.4))
    for damaged in ("", "[]", "7", '{"settings": 1}', '{"patients": [1]}'):
        record.write_text(damaged)
        with pytest.raises(ValueError, match=r"out/folds.json: damaged, .*: name another --out"):
            pseudo_labels.main(settings)


def test_patients_stay_in_their_folds(own, tmp_path, monkeypatch) -> None:
    """Whatever would be drawn now: the recorded folds are changed by hand. Another scan of a patient follows it."""
    work, settings = Work(monkeypatch, most=0), Settings((own,), tmp_path / "out", folds=2)
    work.cut_off(settings)
    record = tmp_path / "out/folds.json"
    told = json.loads(record.read_text())
    assert told["patients"] == fold_of(read_folder(own), 2, 0)
    told["patients"] = {"c0": 1, "c1": 0, "c2": 0, "c3": 0, "c4": 0, "c5": 0}
    record.write_text(json.dumps(told))
    for part, end in (("imagesTr", "_0000"), ("labelsTr", "")):
        shutil.copy(own / part / f"c0{end}.nii.gz", own / part / f"d{end}.nii.gz")
    write_rows(own, {**{f"c{i}": "partial" for i in range(6)}, "d": "partial"}, {"d": "c0"})
    work.most = 7
    work.again(settings)
    assert work.trained == {"fold_0": ["c0", "d"], "fold_1": ["c1", "c2", "c3", "c4", "c5"]}
    assert work.completed == ["c1", "c2", "c3", "c4", "c5", "c0", "d"]


def test_other_patients_are_refused_once_a_network_was_trained(own, tmp_path, monkeypatch) -> None:
    work, settings = Work(monkeypatch), Settings((own,), tmp_path / "out", folds=2)
    work.again(settings)
    begun = (tmp_path / "out/folds.json").read_bytes()
    for place in ("imagesTr/c2_0000.nii.gz", "labelsTr/c2.nii.gz"):
        (own / place).rename(own / place.replace("c2", "e"))
    write_rows(own, dict.fromkeys(("c0", "c1", "c3", "c4", "c5", "e"), "partial"))
    with pytest.raises(
        ValueError, match=r"/out: its folds are of other patients \(new: e; gone: c2\): .* another --out"
    ):
        pseudo_labels.main(settings)
    assert (tmp_path / "out/folds.json").read_bytes() == begun
    for fold in range(2):
        (tmp_path / f"out/fold_{fold}").rmdir()
    assert work.again(settings) == ["e"]  # drawn anew, and by a network that is trained anew
    assert json.loads((tmp_path / "out/folds.json").read_text())["patients"] == fold_of(read_folder(own), 2, 0)


def test_a_network_never_seeks_in_what_it_was_trained_on(own, tmp_path, monkeypatch) -> None:
    """An older version kept no patients; c0 was in another fold, so that this one's network saw it."""
    work, settings = Work(monkeypatch), Settings((own,), tmp_path / "out", folds=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/folds.json").write_text('{"folds": 2, "seed": 0}')
    fold = fold_of(read_folder(own), 2, 0)["c0"]
    trained = settings.of_fold(fold)
    link(read_folder(own)[:1], trained.data[0])
    (trained.out / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match=rf"out/fold_{fold}: was trained on c0, which it is to seek .* another --out"):
        pseudo_labels.main(settings)
    (trained.out / "checkpoint.pt").unlink()  # then it is trained anew
    work.again(settings)
    assert sorted(work.completed) == [f"c{i}" for i in range(6)]


def test_what_is_changed_is_completed_anew_whatever_its_date(own, tmp_path, monkeypatch) -> None:
    work, settings = Work(monkeypatch), Settings((own,), tmp_path / "out", folds=2)
    work.again(settings)
    assert work.again(settings) == []
    for place in ("labelsTr/c1.nii.gz", "imagesTr/c3_0000.nii.gz"):
        shutil.copy(own / place.replace("c1", "c2").replace("c3", "c4"), own / place)
        os.utime(own / place, (10**9, 10**9))  # long before it was completed
    write_rows(own, {**{f"c{i}": "partial" for i in range(5)}, "c5": "none"})
    assert work.again(settings) == ["c1", "c3", "c5"]
    (tmp_path / "out/labels/c0.source").unlink()  # as where it was cut off in between
    assert work.again(settings) == ["c0"]
    assert work.again(settings) == []


def test_labels_that_nobody_vouches_for_are_not_read(own, tmp_path, monkeypatch) -> None:
    """The network finds nothing, so that what is written is what was given."""
    monkeypatch.setattr(pseudo_labels, "TorchHybrid", lambda network: network)
    monkeypatch.setattr(
        pseudo_labels,
        "predict_slices",
        lambda _, grid, _hu: SlicePredictions(np.zeros((len(grid), 256, 256), np.float16), np.zeros(len(grid))),
    )
    entry = read_folder(own)[0]
    given = np.asarray(nib.load(entry.label).dataobj)
    assert given.any()
    for annotated, expected in (("partial", given), ("none", 0 * given)):
        pseudo_labels.write_completed(
            None, replace(entry, annotated=annotated), SETTINGS, tmp_path / "completed.nii.gz"
        )
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "completed.nii.gz").dataobj), expected)


@pytest.mark.parametrize(("slice_mm", "slices"), [(12.0, 5), (0.0, 20)])
def test_a_fold_seeks_in_slices_as_it_learned(own, tmp_path, monkeypatch, slice_mm, slices) -> None:
    """Twenty of 3 mm, by fours or as they are; a lesion in all of the first four."""
    seen = []

    def predict(_network: object, grid: SliceGrid, hu: np.ndarray) -> SlicePredictions:
        seen.append((len(grid), len(hu)))
        probability = np.zeros((len(grid), 256, 256), np.float16)
        probability[: len(grid) // 5] = 1
        return SlicePredictions(probability, np.ones(len(grid)))

    monkeypatch.setattr(pseudo_labels, "TorchHybrid", lambda network: network)
    monkeypatch.setattr(pseudo_labels, "predict_slices", predict)
    entry = replace(read_folder(own)[0], annotated="none")
    settings = replace(SETTINGS, slice_mm=slice_mm, confidence=0.0)
    pseudo_labels.write_completed(None, entry, settings, tmp_path / "completed.nii.gz")
    assert seen == [(slices, slices)]
    added = np.asarray(nib.load(tmp_path / "completed.nii.gz").dataobj).any(axis=(0, 1))
    assert added.tolist() == [True] * 4 + [False] * 16


def test_scans_that_are_no_hu_are_not_sought_through(own, tmp_path) -> None:
    scan = nib.load(own / "imagesTr/c0_0000.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj) + np.int16(1024), scan.affine), own / "imagesTr/c0_0000.nii.gz")
    with pytest.raises(ValueError, match=r"c0_0000.nii.gz: holds hardly anything from .* rescale intercept"):
        pseudo_labels.write_completed(None, read_folder(own)[0], SETTINGS, tmp_path / "completed.nii.gz")
    assert not (tmp_path / "completed.nii.gz").exists()


def test_a_fold_seeks_on_the_device_that_was_asked_for(own, tmp_path, monkeypatch) -> None:
    """Of which none is at hand: torch's "meta", whose tensors hold nothing, stands for it."""
    monkeypatch.setitem(PRESETS, "small", TINY)
    monkeypatch.setattr(
        hybrid_training, "main", lambda fold: save_weights(Hybrid(TINY), fold.out / "hybrid.safetensors")
    )
    asked = []

    def make_fabric(settings: hybrid_training.Settings) -> SimpleNamespace:
        asked.append(settings.device)
        return SimpleNamespace(device=torch.device("meta"))

    monkeypatch.setattr(pseudo_labels, "make_fabric", make_fabric)
    fold = Settings((own,), tmp_path / "out", device="cuda").of_fold(0)
    network = pseudo_labels.train_fold(read_folder(own), fold)
    assert asked == ["cuda"]
    assert {tensor.device.type for tensor in network.parameters()} == {"meta"}
