"""Both networks learn a toy task in a few steps, resume where they stopped, and ship what they averaged."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from inference.hybrid.config import PRESETS, HybridConfig
from inference.unet import UNetConfig
from training import hybrid_training, unet_training
from training.anatomy import Organ
from training.augmentation import InPlane, Intensity, RandomInPlane, RandomIntensity
from training.calibration import CHOICES, SEARCHED, Operating, Predicted, calibrate, dice, predict
from training.data import Case, case_names, load_case
from training.hybrid_data import StackSampler, prepare
from training.loop import Budget, train
from training.losses import hybrid_loss, mask_loss, soft_dice_loss
from training.organs import UNKNOWN, WEIGHT, OrganHeads
from training.unet_data import PatchSampler, cut
from training.unet_data import prepare as prepare_grids

TINY = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six scans of 150×150×60 mm, four with a bright cube; the organs of all but the last are known."""
    root = tmp_path_factory.mktemp("flare")
    for part in ("imagesTr", "labelsTr", "organsTr"):
        (root / part).mkdir()
    for index in range(6):
        rng = np.random.default_rng(index)
        hu = rng.normal(0, 10, (50, 50, 20))
        label = np.zeros(hu.shape, np.uint8)
        if index < 4:
            i, j, k = rng.integers(5, 25, 3) // np.array([1, 1, 3])
            label[i : i + 15, j : j + 15, k : k + 8] = 1
        hu[label > 0] += 150
        affine = np.diag([-3.0, -3.0, 3.0, 1.0])
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), root / "imagesTr" / f"c{index}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), root / "labelsTr" / f"c{index}.nii.gz")
        if index < 5:
            organs = np.where(label, Organ.LIVER, Organ.SPLEEN).astype(np.uint8)
            nib.save(nib.Nifti1Image(organs, affine), root / "organsTr" / f"c{index}.nii.gz")
    return root


def test_cases_are_found_and_aligned(folder) -> None:
    assert case_names(folder) == [f"c{i}" for i in range(6)]
    case = load_case(folder, "c1")
    assert case.hu[case.label > 0].min() > 90 > case.hu[case.label == 0].max()
    with pytest.raises(ValueError, match="imagesTr"):
        case_names(folder / "labelsTr")


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch) -> None:
    monkeypatch.setitem(PRESETS, "small", TINY)


def hybrid_settings(folder: Path, out: Path) -> hybrid_training.Settings:
    out.mkdir(exist_ok=True)
    return hybrid_training.Settings(folder, out, stacks=1, targets=3, learning_rate=3e-3, decay=0.5)


def test_hybrid_learns_and_resumes(folder, tmp_path) -> None:
    settings = hybrid_settings(folder, tmp_path / "run")
    sampler = StackSampler(prepare(folder, tmp_path / "cache", "axial", "square"), 3, 2, seed=0)
    batch = sampler.batch(1)
    run = hybrid_training.start(settings)
    run.budget.spent_s = 30 * 60  # past the warm-up
    losses = [hybrid_training.train_step(run, batch) for _ in range(25)]
    assert min(losses[-5:]) < 0.8 * losses[0]
    run.save()
    again = hybrid_training.start(settings)
    assert again.step == 25
    assert again.budget.seconds == pytest.approx(run.budget.seconds, abs=5)
    torch.manual_seed(1)
    following = hybrid_training.train_step(run, batch)
    torch.manual_seed(1)
    assert hybrid_training.train_step(again, batch) == pytest.approx(following, rel=1e-2)


@pytest.mark.parametrize("patch", [(8, 32, 32), (20, 32, 32)])
def test_unet_refuses_patches_that_vanish(folder, tmp_path, patch) -> None:
    with pytest.raises(ValueError, match="multiples of 8 from 16"):
        unet_training.Settings(folder, tmp_path, patch=patch)


def test_the_thinnest_patch_has_float32s_gradients(folder, tmp_path) -> None:
    """Two voxels deep at the coarsest level, where oneDNN's own bfloat16 gradients are garbage."""
    config = UNetConfig(features=4)
    (tmp_path / "run").mkdir()
    settings = unet_training.Settings(folder, tmp_path / "run", features=4, patch=(16, 32, 32))
    run = unet_training.start(settings)
    batch = PatchSampler(prepare_grids(folder, tmp_path / "cache", config), config, seed=0).batch(2, settings.patch)
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        run.model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            outputs = run.model(batch.image)
        unet_training.supervised_loss(outputs, batch.label).backward()
        norms.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]).norm())
    assert norms[1] == pytest.approx(norms[0].item(), rel=0.1)


def test_unet_learns(folder, tmp_path) -> None:
    config = UNetConfig(features=4)
    settings = unet_training.Settings(folder, tmp_path / "run", features=4, learning_rate=1e-2)
    (tmp_path / "run").mkdir()
    sampler = PatchSampler(prepare_grids(folder, tmp_path / "cache", config), config, seed=0)
    run = unet_training.start(settings)
    run.budget.spent_s = 30 * 60
    losses = [unet_training.train_step(run, sampler.batch(2, (32, 32, 32))) for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])


@pytest.mark.parametrize("module", ["hybrid", "unet"])
def test_a_whole_run_writes_its_weights(folder, tmp_path, module) -> None:
    if module == "hybrid":
        hybrid_training.main(
            hybrid_training.Settings(folder, tmp_path, 0.05, every_minutes=0.02, validation=2, stacks=1, targets=2)
        )
        assert (tmp_path / "hybrid.safetensors").exists()
    else:
        unet_training.main(
            unet_training.Settings(folder, tmp_path, 0.05, validation=2, features=4, patch=(32, 32, 32), batch=1)
        )
        assert (tmp_path / "unet.onnx").exists()
    assert "dice" in (tmp_path / "log.jsonl").read_text()


def test_best_average_is_kept(folder, tmp_path) -> None:
    run = hybrid_training.start(hybrid_settings(folder, tmp_path))
    kept = []
    scores = iter([0.3, 0.5, 0.4])

    def step() -> float:
        run.step += 1
        run.budget.spent_s += 60 * 21  # a third of the hour
        return 0.0

    object.__setattr__(run.settings, "every_minutes", 1.0)
    train(run, step, lambda: {"dice": next(scores)}, lambda: kept.append(run.step))
    assert kept == [1, 2]


def test_cnn_alone_learns_on_crops(folder, tmp_path) -> None:
    run = hybrid_training.start(hybrid_settings(folder, tmp_path / "run"))
    run.budget.spent_s = 30 * 60
    sampler = StackSampler(prepare(folder, tmp_path / "cache", "axial", "square"), 3, 2, seed=0)
    batch = sampler.batch(6, crop=64)
    assert batch.image.shape == (6, 7, 64, 64)
    assert batch.organs.shape == batch.label.shape == (6, 3, 64, 64)
    inside = batch.label.flatten(1).any(1)
    assert inside.float().mean() > 0.3

    @torch.no_grad()
    def loss() -> float:
        return float(mask_loss(run.model.cnn_alone(batch.image), batch.label))

    before = loss()
    both = [hybrid_training.crop_step(run, batch) for _ in range(60)]
    assert loss() < 0.8 * before
    assert min(both[-5:]) < 0.8 * both[0]  # lesions and organs together


def test_stacks_keep_slices_and_labels_together(folder, tmp_path) -> None:
    sampler = StackSampler(prepare(folder, tmp_path, "axial", "square"), 4, 2, seed=3)
    images, labels, organs = sampler.batch(12)
    assert images.shape == (12, 8, 256, 256)
    assert labels.shape == organs.shape == (12, 4, 256, 256)
    assert set(organs.unique().tolist()) == {Organ.AIR, Organ.LIVER, Organ.SPLEEN, UNKNOWN}
    assert images.min() >= 0
    assert images.max() <= 1
    targets = images[:, 2:6]
    inside, body = targets[labels > 0], targets[(labels == 0) & (targets > 0)]
    assert inside.mean() > body.mean() + 0.1
    assert 0.2 < float(labels.flatten(2).any(2).float().mean()) < 0.95


def test_cut_pads_and_moves_inside() -> None:
    array = np.arange(10).reshape(10, 1, 1)
    assert cut(array, np.array([0, 0, 0]), (4, 1, 1), -1).ravel().tolist() == [0, 1, 2, 3]
    assert cut(array, np.array([9, 0, 0]), (4, 1, 1), -1).ravel().tolist() == [6, 7, 8, 9]
    assert cut(array[:2], np.array([1, 0, 0]), (4, 1, 1), -1).ravel().tolist() == [0, 1, -1, -1]


def test_augmentation_by_hand() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 1, 2] = 1.0
    assert InPlane(flip=(True, False))(image)[0, 1, 5] == pytest.approx(1, abs=1e-5)
    assert InPlane(flip=(False, True))(image)[0, 6, 2] == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(InPlane()(image), image, atol=1e-5, rtol=0)
    values = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(Intensity(2.0, 0.1, 1.0)(values), torch.tensor([0.0, 0.1, 1.0]))
    torch.testing.assert_close(Intensity(gamma=2.0)(values), torch.tensor([0.0, 0.0625, 1.0]))


def test_a_draw_can_be_replayed() -> None:
    for kind in (RandomInPlane(), RandomIntensity()):
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


def test_organs_are_known_or_said_not_to_be(folder) -> None:
    assert set(np.unique(load_case(folder, "c1").organs)) == {Organ.LIVER, Organ.SPLEEN}
    assert set(np.unique(load_case(folder, "c5").organs)) == {UNKNOWN}


def test_budget_anneals_by_time() -> None:
    budget = Budget(60.0, spent_s=30 * 60)
    assert budget.share == pytest.approx(0.5, abs=1e-3)
    assert budget.learning_rate_factor == pytest.approx(0.5, abs=1e-2)
    assert Budget(60.0, 61 * 60).learning_rate_factor == pytest.approx(0)
    assert Budget(60.0).learning_rate_factor == pytest.approx(0, abs=1e-2)


def test_dice_of_empty_masks_is_flares() -> None:
    empty, full = np.zeros(8), np.ones(8)
    assert [dice(empty, empty), dice(full, empty), dice(empty, full), dice(full, full)] == [1, 0, 0, 1]
    assert dice(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])) == pytest.approx(2 / 3)


class Said:
    """A pipeline that says what it was given."""

    def __init__(self, hybrid: np.ndarray, unet: np.ndarray) -> None:
        self.hybrid, self.unet = hybrid, unet

    def predict_hybrid(self, *_: object) -> tuple:
        return self.hybrid.__getitem__, 0.8

    def predict_unet(self, *_: object):
        return self.unet.__getitem__


def test_the_box_of_a_prediction_changes_no_dice() -> None:
    rng = np.random.default_rng(0)
    hybrid, unet = np.zeros((2, 12, 30, 30), np.float32)
    hybrid[4:7, 5:12, 8:15], unet[5:8, 6:14, 9:13] = rng.random((3, 7, 7)), rng.random((3, 8, 4))
    label = np.zeros(hybrid.shape, np.uint8)
    label[5:7, 6:11, 9:14] = 1
    case = Case("x", label.astype(np.int16), label, label, (3.0, 1.0, 1.0))
    found = predict(Said(hybrid, unet), case)
    assert found.label.shape == (4, 9, 7)
    whole = Predicted(label, 0.003, hybrid.astype(np.float16), unet.astype(np.float16), 0.8)
    assert found.voxel_ml == pytest.approx(0.003)
    for network, values in SEARCHED.items():
        for name in values:
            for value in CHOICES[name]:
                operating = Operating().change(name, value)
                assert found.dice(operating, network) == pytest.approx(whole.dice(operating, network))


@pytest.mark.parametrize("network", ["hybrid", "unet", "fused"])
def test_calibration_finds_what_separates(network: str) -> None:
    """Healthy cases score 0.6 and would get false positives, diseased ones 0.9: a threshold must fall between."""
    lump = np.zeros((3, 6, 6), np.float16)
    lump[1, 2:4, 2:4] = 0.97
    sick = [Predicted((lump > 0).astype(np.uint8), 1.0, lump, lump, 0.9)] * 2
    healthy = [Predicted(np.zeros(lump.shape, np.uint8), 1.0, lump, np.float16(0.6) * lump, 0.6)] * 2
    operating, best = calibrate([*sick, *healthy], network)
    assert best == pytest.approx(1)
    if network == "unet":
        assert 0.58 < operating.fusion.unet_voxel <= 0.97 or 0.58 < operating.fusion.sure_unet <= 0.97
    else:
        assert 0.6 < operating.gate.scan_threshold <= 0.9
