"""Partial labels are completed with care, fold by fold, and a run that was cut off goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from inference.hybrid.config import PRESETS, HybridConfig
from training import hybrid_training, pseudo_labels
from training.data import PSEUDO, load_case, read_folder
from training.pseudo_labels import Settings, complete, fold_of

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
    assert len({fold_of(twins, 4, seed=0)[entry.name] for entry in entries[:3]}) == 1


def test_the_command_completes_a_folder_and_goes_on_where_it_stopped(folder, tmp_path, monkeypatch) -> None:
    """c0 … c3 are partly labelled, c4 is healthy, c5 unlabelled; whatever is found may be added."""
    monkeypatch.setitem(PRESETS, "small", HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16, norm="batch"))
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
