"""Masks land where the lesion is: the pipeline with networks that see a threshold, on scans that lie in every way.

The stub hybrid calls a pixel lesion where the window's centre slice is bright there, and a slice diseased where any is;
the stub UNet calls nothing. So the mask has to be the bright voxels of the file itself, in the file's own order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inference import pipeline as pipeline_module
from inference.fusion import FusionThresholds
from inference.hybrid.config import HybridConfig
from inference.hybrid.model import Hybrid, HybridOutput
from inference.hybrid.predict import predict_slices
from inference.hybrid.torch_engine import TorchHybrid
from inference.pipeline import Pipeline
from inference.slices import SliceGrid
from inference.unet import GridProbability
from inference.volume import write_mask
from inference.weights import Gate

BRIGHT_HU, WINDOW_HU = 200, (100.0, 300.0)  # not the window of any weights: the manifest's has to be used


class BrightIsLesion(nn.Module):
    """Logit 10 where the slice is above half of the window, −10 elsewhere."""

    def __init__(self, planes_kept: bool) -> None:
        super().__init__()
        self.config = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16, planes_kept=planes_kept)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, stack: Tensor) -> HybridOutput:
        logits = 20 * (stack[:, 2:-2] > 0.5).float() - 10
        present = logits.flatten(2).amax(dim=2)
        return HybridOutput(logits, torch.stack([-present, present], dim=-1))


class NothingIsLesion:
    device = "cpu"

    def probabilities(self, hu, spacing_mm, *_) -> GridProbability:
        return GridProbability(np.zeros((2, 2, 2), np.float32), hu.shape, spacing_mm, tuple(np.array(hu.shape) / 2))


def scan(path: Path, affine: np.ndarray) -> np.ndarray:
    """An off-centre body with a bright block that is nowhere symmetric, by file axes; returns where the block is."""
    hu = np.full((60, 52, 44), -1000, np.int16)
    hu[6:48, 10:50, 4:42] = 40
    lesion = np.zeros(hu.shape, bool)
    lesion[12:22, 30:44, 8:16] = lesion[12:16, 30:34, 16:28] = True
    hu[lesion] = BRIGHT_HU + 80
    nib.save(nib.Nifti1Image(hu, affine), path)
    return lesion


def affine(order: tuple[int, int, int], signs: tuple[int, int, int], tilt: float = 0.0) -> np.ndarray:
    """Axes permuted and flipped, 4×4 mm in the body's plane, then turned about x by `tilt` degrees."""
    matrix = np.eye(3)[:, list(order)] * np.array(signs) * np.array([4.0, 4.0, 4.0])
    angle = np.deg2rad(tilt)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    result = np.eye(4)
    result[:3, :3] = turn @ matrix
    result[:3, 3] = (-30, 12, 500)
    return result


@pytest.mark.parametrize("planes_kept", [False, True])
@pytest.mark.parametrize(
    ("plane", "order", "signs", "tilt"),
    [
        ("axial", (0, 1, 2), (-1, -1, 1), 0),
        ("axial", (2, 0, 1), (1, -1, -1), 20),
        ("axial", (1, 2, 0), (-1, 1, -1), 0),
        ("coronal", (0, 1, 2), (1, -1, 1), 0),
        ("coronal", (1, 0, 2), (-1, 1, -1), 10),
        ("sagittal", (2, 1, 0), (-1, -1, -1), 0),
    ],
)
def test_the_mask_is_the_bright_block(
    random_weights: Path, tmp_path: Path, plane, order, signs, tilt, planes_kept
) -> None:
    lesion = scan(tmp_path / "x_0000.nii.gz", affine(order, signs, tilt))
    pipeline = Pipeline(random_weights)
    only_hybrid = FusionThresholds(weight=1.0, voxel=0.5, both_hybrid=2.0, both_unet=2.0, sure_hybrid=0.9)
    pipeline.manifest = replace(pipeline.manifest, plane=plane, window_hu=WINDOW_HU, gate=Gate(0.5), fusion=only_hybrid)
    batch = 1 if planes_kept else 3
    pipeline.hybrid, pipeline.unet = TorchHybrid(BrightIsLesion(planes_kept), batch), NothingIsLesion()
    report = pipeline.run(tmp_path / "x_0000.nii.gz", tmp_path)
    mask = np.asarray(nib.load(tmp_path / "x.nii.gz").dataobj) > 0
    overlap = 2 * (mask & lesion).sum() / (mask.sum() + lesion.sum())
    assert overlap > 0.9  # 4 mm voxels on pixels of 300/256 mm and back: edges may move by less than a voxel
    assert not report.healthy
    assert report.lesions == 1
    assert report.volume_ml == pytest.approx(mask.sum() * 0.064)
    near = np.argwhere(mask).mean(axis=0) - np.argwhere(lesion).mean(axis=0)
    assert np.abs(near).max() < 0.2


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_thin_slices_bring_the_block_back_to_its_place(random_weights: Path, tmp_path: Path, plane: str) -> None:
    """Voxels of 1 mm: four slices are looked at as one, so ends may move by half of that, and an arm of four may go."""
    matrix = affine((0, 1, 2), (-1, 1, 1))
    matrix[:3, :3] /= 4
    lesion = scan(tmp_path / "x_0000.nii.gz", matrix)
    pipeline = Pipeline(random_weights)
    only_hybrid = FusionThresholds(weight=1.0, voxel=0.5, both_hybrid=2.0, both_unet=2.0, sure_hybrid=0.9)
    pipeline.manifest = replace(pipeline.manifest, plane=plane, window_hu=WINDOW_HU, gate=Gate(0.5), fusion=only_hybrid)
    pipeline.hybrid, pipeline.unet = TorchHybrid(BrightIsLesion(False), 3), NothingIsLesion()
    pipeline.run(tmp_path / "x_0000.nii.gz", tmp_path)
    mask = np.asarray(nib.load(tmp_path / "x.nii.gz").dataobj) > 0
    assert 2 * (mask & lesion).sum() / (mask.sum() + lesion.sum()) > 0.7
    assert np.abs(np.argwhere(mask).mean(axis=0) - np.argwhere(lesion).mean(axis=0)).max() < 2


@pytest.mark.parametrize(("offset", "warned"), [(0, 0), (1024, 1)])
def test_a_scan_without_its_rescale_intercept_is_told(
    random_weights: Path, tmp_path: Path, caplog, offset: int, warned: int
) -> None:
    scan(tmp_path / "x_0000.nii.gz", affine((0, 1, 2), (-1, -1, 1)))
    image = nib.load(tmp_path / "x_0000.nii.gz")
    stored = np.asarray(image.dataobj) + np.int16(offset)
    nib.save(nib.Nifti1Image(stored, image.affine), tmp_path / "x_0000.nii.gz")
    Pipeline(random_weights).run(tmp_path / "x_0000.nii.gz", tmp_path)
    assert sum(message.startswith("x_0000.nii.gz: holds hardly anything") for message in caplog.messages) == warned


@pytest.mark.parametrize("shear", [0.0, 3.0])
def test_lesions_and_volume_are_those_of_the_file(
    random_weights: Path, tmp_path: Path, monkeypatch, shear: float
) -> None:
    """Two lumps of 8 and 4 voxels of 0.064 ml, written instead of what the networks found; a tilted gantry moves slices
    along each other, which changes no volume.
    """
    sheared = affine((0, 1, 2), (-1, -1, 1))
    sheared[1, 2] = shear
    scan(tmp_path / "x_0000.nii.gz", sheared)

    def write_others(mask: np.ndarray, *place: object) -> None:
        other = np.zeros_like(mask)
        other[2:4, 2:4, 2:4] = other[8:12, 20, 20] = 1
        write_mask(other, *place)

    monkeypatch.setattr(pipeline_module, "write_mask", write_others)
    report = Pipeline(random_weights).run(tmp_path / "x_0000.nii.gz", tmp_path)
    assert report.lesions == 2
    assert report.volume_ml == pytest.approx(12 * 0.064)


def test_a_scan_without_anything_bright_is_healthy(random_weights: Path, tmp_path: Path) -> None:
    hu = np.full((40, 40, 10), -1000, np.int16)
    hu[5:35, 5:35] = 40
    nib.save(nib.Nifti1Image(hu, np.diag([-5.0, -5.0, 5.0, 1.0])), tmp_path / "x_0000.nii.gz")
    pipeline = Pipeline(random_weights)
    pipeline.manifest = replace(pipeline.manifest, window_hu=WINDOW_HU, gate=Gate(0.5))
    pipeline.hybrid, pipeline.unet = TorchHybrid(BrightIsLesion(False)), NothingIsLesion()
    assert pipeline.run(tmp_path / "x_0000.nii.gz", tmp_path).healthy


@pytest.mark.parametrize("planes_kept", [False, True])
def test_batches_do_not_change_what_a_slice_gets(planes_kept: bool) -> None:
    """Slices one by one, by three and all at once; the first and last ones see their edge repeated."""
    torch.manual_seed(0)
    config = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16, planes_kept=planes_kept)
    model = Hybrid(config).eval()
    hu = np.random.default_rng(0).integers(-300, 400, (7, 50, 60)).astype(np.int16)
    grid = SliceGrid(hu.shape, (3.0, 2.0, 2.0))
    window = torch.from_numpy(grid.cut(hu, -2, 9)).unfold(0, 5, 1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = torch.stack([model(one[None]).logits[0, 0] for one in window]).sigmoid()
    for batch in (1, 3, 16)[: 1 if planes_kept else 3]:
        told: list[int] = []
        found = predict_slices(TorchHybrid(model, batch), grid, hu, progress=told.append)
        assert sum(told) == 7
        np.testing.assert_allclose(found.probability, expected, atol=1e-3)  # kept in float16


class Overflowing(BrightIsLesion):
    """Values that float16 cannot hold, for the second batch of slices; or none that any type could."""

    def __init__(self, beyond: float) -> None:
        super().__init__(planes_kept=False)
        self.beyond, self.calls = beyond, 0

    def forward(self, stack: Tensor) -> HybridOutput:
        self.calls += 1
        output = super().forward(stack)
        large = output.logits.to(stack.dtype) * self.beyond
        return output if self.calls == 1 else HybridOutput(large / self.beyond, output.presence)


def test_what_float16_cannot_hold_is_done_again_in_float32(caplog) -> None:
    hu = np.full((5, 50, 60), -300, np.int16)
    hu[:, 10:30, 20:50] = 400
    grid = SliceGrid(hu.shape, (3.0, 2.0, 2.0))
    model = Overflowing(1e30).half()
    found = predict_slices(TorchHybrid(model, 2), grid, hu)
    expected = predict_slices(TorchHybrid(BrightIsLesion(False)), grid, hu)
    np.testing.assert_allclose(found.probability, expected.probability, atol=1e-3)
    assert caplog.messages == ["values too large for float16: the hybrid network goes on in float32"]
    assert model.calls == 4  # of three batches, one twice
    for beyond in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="not finite"):
            predict_slices(TorchHybrid(Overflowing(beyond), 2), grid, hu)


class Cramped(BrightIsLesion):
    """On a device with room for so many target slices at once; on the CPU, where it was moved, for any number."""

    def __init__(self, room: int) -> None:
        super().__init__(planes_kept=False)
        self.room, self.tried = room, list[int]()

    def forward(self, stack: Tensor) -> HybridOutput:
        self.tried.append(stack.shape[1] - 4)
        if self.tried[-1] > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(stack)

    def cpu(self) -> Cramped:
        self.room = 1000
        return self


@pytest.mark.parametrize(
    ("room", "tried", "told"),
    [
        (8, [5, 5], []),
        (3, [5, 2, 2, 2, 2, 2], ["2 instead of 5 slices"]),
        (0, [5, 2, 1, 5, 5], ["2 instead of 5", "1 instead of 2", "goes on without the GPU"]),
    ],
)
def test_out_of_memory_halves_the_batch_and_leads_to_the_cpu(caplog, room: int, tried: list, told: list) -> None:
    """Nine slices, eight at most at once: two batches of five, the last of which reaches beyond the scan."""
    hu = np.full((9, 50, 60), -300, np.int16)
    hu[:, 10:30, 20:50] = 400
    grid, model = SliceGrid(hu.shape, (3.0, 2.0, 2.0)), Cramped(room)
    found = predict_slices(TorchHybrid(model, 8), grid, hu)
    assert model.tried == tried
    assert len(caplog.messages) == len(told)
    assert all(words in message for words, message in zip(told, caplog.messages, strict=True))
    expected = predict_slices(TorchHybrid(BrightIsLesion(False)), grid, hu)
    np.testing.assert_allclose(found.probability, expected.probability, atol=1e-3)
