"""Several folders in one training: shares of a batch, a Dice loss each, figures each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inference.unet import UNetConfig
from training import unet_training
from training.data import read_folder, split
from training.losses import soft_dice_loss
from training.sources import Sources, scores_by_source, short_names
from training.unet_data import PatchSampler, grid_cases


@dataclass(frozen=True)
class Scored:
    source: Path
    score: float = 0.0


CASES = [Scored(Path("a"), 0.2), Scored(Path("b"), 0.9), Scored(Path("b"), 0.5), Scored(Path("b"), 0.1)]


def drawn(sources: Sources, batch: int, steps: int) -> np.ndarray:
    """How many of each folder are in each batch, (steps, folders)."""
    made = []
    for step in range(steps):
        rng = np.random.default_rng(step)
        made.append(np.bincount([sources.draw(rng, m, batch) for m in range(batch)], minlength=len(sources.groups)))
    return np.array(made)


def test_a_batch_holds_each_folder_in_its_share() -> None:
    counts = drawn(Sources(CASES, (3.0, 1.0)), 4, 50)
    assert (counts == (3, 1)).all()
    counts = drawn(Sources(CASES, (0.6, 0.4)), 3, 3000)
    assert set(counts[:, 0]) == {1, 2}
    assert counts[:, 0].mean() == pytest.approx(1.8, abs=0.05)
    counts = drawn(Sources(CASES), 4, 50)  # as many as there are cases
    assert (counts == (1, 3)).all()


def test_folders_of_one_name_are_told_apart() -> None:
    assert short_names([Path("a/held_out"), Path("b/held_out"), Path("b/more")]) == {
        Path("a/held_out"): "a/held_out", Path("b/held_out"): "b/held_out", Path("b/more"): "more"
    }  # fmt: skip


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.0), (1.0, 1.0, 1.0)])
def test_shares_that_do_not_fit_are_refused(shares) -> None:
    with pytest.raises(ValueError, match="one positive number for each of the 2 folders"):
        Sources(CASES, shares)


def test_dice_loss_of_folders_by_hand() -> None:
    """A large lesion found, a small one in another folder missed: (2·4 + 1) / (4 + 4 + 1) and 1 / (0 + 1 + 1)."""
    target = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    logits = torch.tensor([[100.0] * 4, [-100.0] * 4])
    source = torch.eye(3)[[0, 2]]  # none of the folder between
    assert soft_dice_loss(logits, target, source) == pytest.approx(1 - (1 + 1 / 2) / 2)
    assert soft_dice_loss(logits, target) == pytest.approx(1 - 9 / 10)


def test_scores_by_source_by_hand() -> None:
    run = SimpleNamespace(own=lambda cases: cases, mean=lambda rows, width: np.array(rows).reshape(-1, width).mean(0))
    scores = scores_by_source(run, CASES, ("dice", "one"), lambda case: (case.score, 1.0))
    expected = {"dice": 0.35, "one": 1, "dice_a": 0.2, "one_a": 1, "dice_b": 0.5, "one_b": 1}
    assert scores == pytest.approx(expected)
    assert scores_by_source(run, CASES[:1], ("dice",), lambda case: (case.score,)) == pytest.approx({"dice": 0.2})


def test_a_run_on_two_folders_tells_both(folder, tmp_path) -> None:
    """The second is of one patient, so that all of it is trained on."""
    one, two = tmp_path / "one", tmp_path / "two"
    for place, names in ((one, ("c0",)), (two, ("c1", "c2", "c3"))):
        for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            (place / part).mkdir(parents=True)
            for name in names:
                shutil.copy(folder / part / f"{name}{end}", place / part)
    training, held_out = split((one, two), 2)
    assert [entry.name for entry in training] == ["c0", "c1", "c2"]
    assert [entry.name for entry in held_out] == ["c3"]
    with pytest.raises(ValueError, match="cannot be trained and validated on"):
        split((one,), 2)
    cases = grid_cases(training, tmp_path / "cache", UNetConfig(features=4))
    batch = PatchSampler(cases, UNetConfig(features=4), 0, (1.0, 3.0)).batch(0, range(4), (16, 16, 16))
    assert batch.source.tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    both = unet_training.Settings(
        (two, folder), tmp_path / "run", steps=2, validation=2, validations=1, batch=2, features=4, patch=(16, 16, 16),
        device="cpu",
    )  # fmt: skip
    unet_training.main(both)
    assert f"dice_{folder.name}" in (both.out / "log.jsonl").read_text()


def test_norms_measure_no_more_at_the_end(folder, tmp_path) -> None:
    settings = unet_training.Settings(
        (folder,), tmp_path / "run", steps=4, frozen_norms=0.5, features=4, patch=(16, 16, 16), device="cpu"
    )
    settings.out.mkdir()
    config = UNetConfig(features=4)
    sampler = PatchSampler(grid_cases(read_folder(folder), tmp_path / "cache", config), config, 0)
    run = unet_training.start(settings)
    measured = []
    for step in range(4):
        run.advance(sampler.batch(step, range(2), settings.patch))
        measured.append(run.network.input_block.norm1.running_mean.clone())
    assert not torch.equal(measured[0], measured[1])
    assert not torch.equal(measured[1], measured[2])  # half of the budget is spent after the second step
    assert torch.equal(measured[2], measured[3])
