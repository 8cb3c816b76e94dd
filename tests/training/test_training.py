"""Both networks learn a toy task in a few steps, resume where they stopped, and ship what they averaged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.hybrid.config import PRESETS, HybridConfig
from inference.unet import UNetConfig
from training import hybrid_training, unet_training
from training.anatomy import Organ
from training.augmentation import (
    ENHANCED,
    Enhancement,
    InPlane,
    Intensity,
    RandomEnhancement,
    RandomInPlane,
    RandomIntensity,
)
from training.data import read_folder
from training.hybrid_data import StackSampler, slice_cases
from training.loop import Budget, Run, fast_precision, learning_rate_factor, train
from training.losses import annealed_weight, dice, hybrid_loss, mask_loss, soft_dice_loss
from training.organs import UNKNOWN, WEIGHT, OrganHeads
from training.unet_data import PatchSampler, cut, grid_cases

TINY = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16, norm="batch")


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch) -> None:
    monkeypatch.setitem(PRESETS, "small", TINY)


def hybrid_settings(folder: Path, out: Path) -> hybrid_training.Settings:
    out.mkdir(exist_ok=True)
    return hybrid_training.Settings(
        (folder,), out, stacks=1, targets=3, learning_rate=3e-3, decay=0.5, validation=2, device="cpu"
    )


def stack_sampler(folder: Path, cache: Path, targets: int, seed: int = 0) -> StackSampler:
    return StackSampler(slice_cases(read_folder(folder), cache, ("axial", "square", 0)), targets, 2, seed)


def patch_sampler(folder: Path, cache: Path, config: UNetConfig) -> PatchSampler:
    return PatchSampler(grid_cases(read_folder(folder), cache, config), config, seed=0)


def test_hybrid_learns(folder, tmp_path) -> None:
    batch = stack_sampler(folder, tmp_path / "cache", 3).batch(1, range(1))
    run = hybrid_training.start(hybrid_settings(folder, tmp_path / "run"))
    run.budget.spent_s = 30 * 60  # past the warm-up
    losses = [run.advance(batch) for _ in range(25)]
    assert min(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.parametrize("module", [hybrid_training, unet_training])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(folder, tmp_path, module) -> None:
    """In steps: four, then a new process would do the last four; or eight at once."""
    sizes = {"stacks": 2, "targets": 2} if module is hybrid_training else {"features": 4, "patch": (16, 32, 32)}
    losses: dict[str, list[float]] = {"whole": [], "parts": []}
    advance = Run.advance
    for name, breaks in (("whole", [8]), ("parts", [4, 8])):
        for stop in breaks:
            run = replace(
                module.Settings((folder,), tmp_path / name, **sizes), steps=8, validations=2, validation=2, device="cpu"
            )
            with pytest.MonkeyPatch.context() as patch:

                def recorded(self: Run, batch, name=name, stop=stop) -> float:
                    if self.step == stop:
                        raise KeyboardInterrupt
                    losses[name].append(advance(self, batch))
                    return losses[name][-1]

                patch.setattr(Run, "advance", recorded)
                try:
                    module.main(run)
                except KeyboardInterrupt:
                    assert stop == 4
    assert len(losses["parts"]) == 8
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-3)


@pytest.mark.parametrize("module", [hybrid_training, unet_training])
def test_a_run_sets_out_from_the_weights_of_another(folder, tmp_path, module) -> None:
    sizes = {"stacks": 1, "targets": 1} if module is hybrid_training else {"features": 4, "patch": (16, 16, 16)}
    first = module.Settings((folder,), tmp_path / "first", **sizes, steps=1, validations=1, validation=2, device="cpu")
    module.main(first)
    name = "hybrid" if module is hybrid_training else "unet"
    second = replace(first, out=tmp_path / "second", weights=first.out / f"{name}.safetensors", seed=1)
    kept = torch.load(first.out / "checkpoint.pt", weights_only=True)["average"]
    for key, value in module.start(second).network.state_dict().items():
        assert torch.equal(value, kept[f"module.{key}"]), key
    other = {"norm": "layer"} if module is hybrid_training else {"features": 8}
    with pytest.raises(ValueError, match="weights of another network"):
        module.start(replace(second, **other))
    with pytest.raises(ValueError, match="name the safetensors file of a run"):
        module.start(replace(second, weights=first.out / "log.jsonl"))


@pytest.mark.parametrize("patch", [(8, 32, 32), (20, 32, 32)])
def test_unet_refuses_patches_that_vanish(folder, tmp_path, patch) -> None:
    with pytest.raises(ValueError, match="multiples of 8 from 16"):
        unet_training.Settings((folder,), tmp_path, patch=patch)


def test_the_thinnest_patch_has_float32s_gradients(folder, tmp_path) -> None:
    """Two voxels deep at the coarsest level, where oneDNN's own bfloat16 gradients are garbage."""
    config = UNetConfig(features=4)
    (tmp_path / "run").mkdir()
    settings = unet_training.Settings((folder,), tmp_path / "run", features=4, patch=(16, 32, 32))
    run = unet_training.start(settings)
    batch = patch_sampler(folder, tmp_path / "cache", config).batch(0, range(2), settings.patch)
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        run.network.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            outputs = run.network(batch.image)
        unet_training.supervised_loss(outputs, batch.label).backward()
        norms.append(torch.cat([p.grad.flatten() for p in run.network.parameters() if p.grad is not None]).norm())
    assert norms[1] == pytest.approx(norms[0].item(), rel=0.1)


def test_unet_learns(folder, tmp_path) -> None:
    config = UNetConfig(features=4)
    settings = unet_training.Settings((folder,), tmp_path / "run", features=4, learning_rate=1e-2)
    (tmp_path / "run").mkdir()
    sampler = patch_sampler(folder, tmp_path / "cache", config)
    run = unet_training.start(settings)
    run.budget.spent_s = 30 * 60
    losses = [run.advance(sampler.batch(step, range(2), (32, 32, 32))) for step in range(30)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])


@pytest.mark.parametrize("module", ["hybrid", "unet"])
def test_a_whole_run_writes_its_weights(folder, tmp_path, module) -> None:
    if module == "hybrid":
        hybrid_training.main(
            hybrid_training.Settings(
                (folder,), tmp_path, minutes=0.05, validations=2, validation=2, stacks=1, targets=2
            )
        )
        assert (tmp_path / "hybrid.safetensors").exists()
    else:
        unet_training.main(
            unet_training.Settings(
                (folder,), tmp_path, minutes=0.05, validation=2, features=4, patch=(32, 32, 32), batch=1
            )
        )
        assert (tmp_path / "unet.onnx").exists()
    assert "dice" in (tmp_path / "log.jsonl").read_text()


def test_best_average_is_kept(folder, tmp_path) -> None:
    """Three checks in six steps, of which the second is the best."""
    run = hybrid_training.start(replace(hybrid_settings(folder, tmp_path), steps=6, validations=3, workers=0))
    batch = stack_sampler(folder, tmp_path / "cache", 2).batch(0, range(1))
    kept = []
    scores = iter([0.3, 0.5, 0.4])
    train(run, lambda _: batch, lambda: {"dice": next(scores)}, lambda: kept.append(run.step))
    assert kept == [2, 4]


def test_cnn_alone_learns_on_crops(folder, tmp_path) -> None:
    run = hybrid_training.start(hybrid_settings(folder, tmp_path / "run"))
    run.budget.spent_s = 30 * 60
    batch = stack_sampler(folder, tmp_path / "cache", 3).batch(0, range(6), crop=64)
    assert batch.image.shape == (6, 7, 64, 64)
    assert batch.organs.shape == batch.label.shape == (6, 3, 64, 64)
    inside = batch.label.flatten(1).any(1)
    assert inside.float().mean() > 0.3

    @torch.no_grad()
    def loss() -> float:
        return float(mask_loss(run.network.cnn_alone(batch.image), batch.label))

    before = loss()
    both = [run.advance(batch) for _ in range(60)]
    assert loss() < 0.8 * before
    assert min(both[-5:]) < 0.8 * both[0]  # lesions and organs together


def test_stacks_keep_slices_and_labels_together(folder, tmp_path) -> None:
    stacks = stack_sampler(folder, tmp_path, 4, seed=3).batch(0, range(12))
    images, labels, organs, known, shown = stacks[:5]
    assert images.shape == (12, 8, 256, 256)
    assert labels.shape == organs.shape == (12, 4, 256, 256)
    assert set(organs.unique().tolist()) == {Organ.AIR, Organ.LIVER, Organ.SPLEEN, UNKNOWN}
    assert images.min() >= 0
    assert images.max() <= 1
    targets = images[:, 2:6]
    inside, body = targets[labels > 0], targets[(labels == 0) & (targets > 0)]
    assert inside.mean() > body.mean() + 0.1
    present = labels.flatten(2).any(2)
    assert 0.2 < float(present.float().mean()) < 0.95
    assert known.all()
    assert shown[present].all()
    assert 0.3 < float(shown[~present].float().mean()) < 0.7


def test_cut_pads_and_moves_inside() -> None:
    array = np.arange(10).reshape(10, 1, 1)
    assert cut(array, np.array([0, 0, 0]), (4, 1, 1), -1).ravel().tolist() == [0, 1, 2, 3]
    assert cut(array, np.array([9, 0, 0]), (4, 1, 1), -1).ravel().tolist() == [6, 7, 8, 9]
    assert cut(array[:2], np.array([1, 0, 0]), (4, 1, 1), -1).ravel().tolist() == [0, 1, -1, -1]
    row = array.reshape(1, 10, 1)
    assert cut(row, np.array([0, 2, 0]), (1, 4, 1), -1, margin=1)[0, :, 1].tolist() == [-1, 0, 1, 2, 3, 4]
    assert cut(row, np.array([0, 9, 0]), (1, 4, 1), -1, margin=2)[0, :, 2].tolist() == [4, 5, 6, 7, 8, 9, -1, -1]
    assert (cut(row, np.array([0, 9, 0]), (1, 4, 1), -1, margin=2)[0, :, 0] == -1).all()


def test_patches_keep_image_label_and_organs_together(folder, tmp_path) -> None:
    """Turned and scaled, the cube 150 HU above the rest is still what the label and the liver's organ map say."""
    batch = patch_sampler(folder, tmp_path, UNetConfig(features=4)).batch(0, range(24), (16, 32, 32))
    tissue, inside = batch.image[:, 0], batch.label[:, 0] > 0
    body = (batch.organs == Organ.SPLEEN) & ~inside
    assert inside.any()
    assert body.any()
    assert tissue[inside].mean() > tissue[body].mean() + 0.2
    assert batch.organs[inside & (batch.organs != UNKNOWN)].eq(Organ.LIVER).float().mean() > 0.9


def test_augmentation_by_hand() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 1, 2] = 1.0
    assert InPlane(flip=(True, False))(image)[0, 1, 5] == pytest.approx(1, abs=1e-5)
    assert InPlane(flip=(False, True))(image)[0, 6, 2] == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(InPlane()(image), image, atol=1e-5, rtol=0)
    turned = InPlane(rotation=math.pi / 2)(image)
    torch.testing.assert_close(InPlane(rotation=math.pi / 2)(image, margin=1), turned[:, 1:7, 1:7], atol=1e-5, rtol=0)
    assert turned[0, 5, 1] == pytest.approx(1, abs=1e-5)  # a quarter to the left: (row, column) → (7 − column, row)
    values = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(Intensity(2.0, 0.1, 1.0)(values), torch.tensor([0.0, 0.1, 1.0]))
    torch.testing.assert_close(Intensity(gamma=2.0)(values), torch.tensor([0.0, 0.0625, 1.0]))


def test_enhancement_by_hand() -> None:
    """A liver of 85 HU, 60 above fluid, enhanced by half more: 115, a third of that beside a straight edge; a cyst in
    it and the fat beside it stay what they are."""
    organs = torch.full((2, 6, 6), int(Organ.FAT), dtype=torch.uint8)
    organs[0, :, 3:] = Organ.LIVER
    hu = torch.full(organs.shape, 85.0)
    hu[0, 4, 5], hu[0, :, 0] = 10, -100
    changed = Enhancement(tuple(1 + 0.5 * (organ == Organ.LIVER) for organ in ENHANCED))(hu, organs)
    torch.testing.assert_close(changed[0, 2], torch.tensor([-100.0, 85, 95, 105, 115, 115]))
    assert changed[0, 4, 5] == 10
    assert torch.equal(changed[1], hu[1])
    drawn = [RandomEnhancement(0.5, 0.2).draw(np.random.default_rng(seed)) for seed in range(400)]
    changed = [each.factors for each in drawn if each != Enhancement()]
    assert 160 < len(changed) < 240
    assert np.log(changed).std() == pytest.approx(0.2, rel=0.1)
    assert Organ.FAT not in ENHANCED


def test_stacks_show_organs_more_or_less_enhanced(folder, tmp_path) -> None:
    """Lesions lie in a liver 125 HU above fluid: their means spread with the factors, not without; air is air."""
    sampler = stack_sampler(folder, tmp_path, 4, seed=3)
    sampler.intensity = RandomIntensity(0, 0, 0)

    def livers(kind: RandomEnhancement) -> list[float]:
        sampler.enhancement = kind
        batch = sampler.batch(0, range(40))
        targets = batch.image[:, 2:6]
        inside = (batch.organs == Organ.LIVER) & (batch.label > 0) & (targets > 0)
        assert (targets[batch.organs == Organ.AIR] == 0).float().mean() > 0.9
        return [float(part[own].mean() * 500) for part, own in zip(targets, inside, strict=True) if own.sum() > 50]

    assert np.std(livers(RandomEnhancement(share=0))) < 10
    assert np.std(livers(RandomEnhancement(share=1, spread=0.2))) == pytest.approx(25, rel=0.5)


def test_a_draw_can_be_replayed() -> None:
    for kind in (RandomInPlane(), RandomIntensity(), RandomEnhancement(share=1)):
        first, second = (kind.draw(np.random.default_rng(5)) for _ in range(2))
        assert first == second
        assert first != kind.draw(np.random.default_rng(6))


def test_losses_by_hand() -> None:
    sure = torch.full((1, 1, 2, 2), 100.0)
    assert soft_dice_loss(sure, torch.ones(1, 1, 2, 2)) == pytest.approx(0)
    # half of it predicted: Dice (2·2 + 1) / (2 + 4 + 1)
    half = torch.tensor([100.0, 100.0, -100.0, -100.0])
    assert soft_dice_loss(half, torch.ones(4)) == pytest.approx(1 - 5 / 7)
    present = torch.tensor([[True]])
    bare = mask_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    heavy = mask_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), 3.0)
    assert heavy - bare == pytest.approx(2 * np.log(2) / 2)  # the lesion's voxel counts twice more in the mean
    assert [annealed_weight(share) for share in (0, 0.5, 1)] == pytest.approx([10, 10**0.5, 1])
    assert [annealed_weight(share, first=4) for share in (0, 0.5, 1)] == pytest.approx([4, 2, 1])
    wrong = hybrid_loss(sure, torch.tensor([[[10.0, 0.0]]]), torch.ones(1, 1, 2, 2), present)
    assert wrong == pytest.approx(0.1 * 10, abs=1e-3)


def test_organ_loss_by_hand() -> None:
    """A head of zeros is unsure among all organs: log n. Unknown voxels do not count; maps are met at their stride."""
    heads, network = OrganHeads([2]), torch.nn.Conv3d(1, 2, 1, stride=(1, 2, 2))
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        heads.heads[0].bias[Organ.LIVER] = 3.0
    heads.watch([network])
    organs = torch.full((1, 2, 4, 4), UNKNOWN, dtype=torch.uint8)
    organs[:, :, 1::2, 1::2] = Organ.LIVER
    organs[0, 0, 1, 1] = UNKNOWN
    network(torch.zeros(1, 1, 2, 4, 4))
    expected = np.log(len(Organ) - 1 + np.exp(3)) - 3
    assert heads.loss(organs).item() == pytest.approx(WEIGHT * expected, rel=1e-6)
    network(torch.zeros(1, 1, 2, 4, 4))
    assert heads.loss(torch.full_like(organs, UNKNOWN)).item() == 0
    network.eval()
    network(torch.zeros(1, 1, 2, 4, 4))
    assert not heads._seen


def test_budget_counts_time_or_steps() -> None:
    assert Budget(60.0, spent_s=30 * 60).share() == pytest.approx(0.5, abs=1e-3)
    assert Budget(60.0, spent_s=61 * 60).share() == 1
    counted = Budget(60.0, steps=40, spent_s=61 * 60, step=10)
    assert [counted.share(), counted.share(20), counted.share(50)] == [0.25, 0.5, 1]


def test_bfloat16_only_where_the_machine_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert (fast_precision("cpu") == "bf16-mixed") == ("avx512_bf16" in flags)
    for has, expected in ((False, "32-true"), (True, "bf16-mixed")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda said=has: said)
        assert fast_precision("cpu") == expected
        assert fast_precision("cuda") == "bf16-mixed"


def test_learning_rate_by_hand() -> None:
    cosine = [learning_rate_factor(share, "cosine") for share in (0, 0.01, 0.5, 1)]
    assert cosine == pytest.approx([0, 0.5, 0.5, 0], abs=1e-6)
    steps = [learning_rate_factor(share, "step") for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1)]
    assert steps == [1, 0.5, 0.25, 0.125, 0.0625, 0.0625]


def test_dice_of_empty_masks_is_flares() -> None:
    empty, full = np.zeros(8), np.ones(8)
    assert [dice(empty, empty), dice(full, empty), dice(empty, full), dice(full, full)] == [1, 0, 0, 1]
    assert dice(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])) == pytest.approx(2 / 3)
