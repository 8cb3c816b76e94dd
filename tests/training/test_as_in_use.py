"""Training sees slices as they are put together in use, and judges networks as the program runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.hybrid.config import PRESETS, HybridConfig
from inference.slices import thick_grid, thicken
from inference.unet import UNet, UNetConfig
from training import hybrid_training, release, unet_training
from training.anatomy import Organ
from training.data import Case, Entry, read_folder
from training.hybrid_data import SliceCase, StackSampler, cut_case, known_absent
from training.resume import differing, list_changes
from training.unet import export_onnx
from training.unet_data import GridCase

TINY = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16, norm="batch")
CENTRE = 128


def thin_case() -> Case:
    """22 slices of 1 mm, 60×60 pixels of 5 mm: HU 10·z, lesion at the centre of slices 4, 5 and 8, given by halves."""
    hu = np.broadcast_to((10 * np.arange(22, dtype=np.int16))[:, None, None], (22, 60, 60)).copy()
    label = np.zeros(hu.shape, np.uint8)
    label[[4, 5, 8], 20:40, 20:40] = 1
    organs = np.full(hu.shape, Organ.LIVER, np.uint8)
    organs[14] = Organ.SPLEEN
    entry = Entry("thin", Path("imagesTr/thin_0000.nii.gz"), None, None, annotated="partial")
    return Case(entry, hu, label, organs, (1.0, 5.0, 5.0))


def test_thin_slices_are_put_together_as_in_use() -> None:
    """By four: ⌈3.5 − 0.2⌉; the mean of 0, 10, 20, 30 HU is 15, that of the last two slices 205.

    Half of the second thick slice is lesion, and a quarter of the third, which is neither lesion nor free of it.
    """
    case = thin_case()
    made = cut_case(case, ("axial", "square", 3.5))
    means = np.array([15, 55, 95, 135, 175, 205])
    np.testing.assert_array_equal(made["tissue"][:, CENTRE, CENTRE], np.rint((means + 200) / 500 * 255))
    assert made["label"][:, CENTRE, CENTRE].tolist() == [0, 1, 0, 0, 0, 0]
    assert made["lesion_slices"].tolist() == [1]
    assert made["known"].tolist() == [False, True, False, False, False, False]
    liver, spleen = Organ.LIVER, Organ.SPLEEN  # of slices 2, 6, 10, 14, 18 and 21
    assert made["organs"][:, CENTRE, CENTRE].tolist() == [liver, liver, liver, spleen, liver, liver]
    grid, step = thick_grid(case.hu.shape, case.spacing_mm, "axial", "square", 3.5)  # as the pipeline
    used = grid.cut(thicken(case.hu, grid.axis, step), 0, len(grid))
    np.testing.assert_array_equal(made["tissue"], np.rint(used * 255))


def test_slices_stay_as_they_are_where_asked() -> None:
    made = cut_case(thin_case(), ("axial", "square", 0))
    assert made["label"].any(axis=(1, 2)).nonzero()[0].tolist() == [4, 5, 8]
    assert len(made["tissue"]) == 22


@pytest.mark.parametrize("slice_mm", [3.5, 0.0])
def test_weights_are_used_as_they_were_trained(folder, tmp_path, monkeypatch, slice_mm) -> None:
    monkeypatch.setitem(PRESETS, "small", TINY)
    budget = {"steps": 1, "validation": 1, "validations": 1, "device": "cpu"}
    settings = hybrid_training.Settings((folder,), tmp_path / "run", stacks=1, targets=1, slice_mm=slice_mm, **budget)
    hybrid_training.main(settings)
    assert [path.name for path in settings.cache_folder.iterdir()] == [f"axial_square_{slice_mm:g}mm"]
    unet_training.main(unet_training.Settings((folder,), tmp_path / "unet", features=4, patch=(16, 16, 16), **budget))
    parts = (settings.out / "hybrid.safetensors", tmp_path / "unet" / "unet.onnx")
    release.main(release.Settings(*parts, tmp_path / "mine"))
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["hybrid"]["slice_mm"] == slice_mm


def in_use(network: torch.nn.Module, config: UNetConfig, folder: Path) -> UNet:
    export_onnx(network, config, folder / "unet.onnx")
    return UNet((folder / "unet.onnx").read_bytes(), config, threads=1)


@pytest.mark.parametrize("shape", [(40, 70, 100), (20, 50, 130)])
def test_unet_is_judged_by_what_it_gives_in_use(folder, tmp_path, shape) -> None:
    """Scans that are larger than a patch along some axes and smaller along others; the label is the mask in use."""
    config = UNetConfig(features=4, patch=(32, 64, 64))
    settings = unet_training.Settings((folder,), tmp_path, features=4, device="cpu", precision="32-true")
    run = unet_training.start(settings)
    network = run.average.eval().module
    hu = (100 * np.random.default_rng(0).standard_normal(shape)).astype(np.int16)
    middle = np.median(in_use(network, config, tmp_path).probabilities(hu, config.spacing_mm).grid)
    for part in network.modules():  # untrained, it would call all of the scan a lesion, or nothing
        if isinstance(part, torch.nn.Conv3d) and part.out_channels == 1:
            part.bias -= float(np.log(middle / (1 - middle)))
    label = in_use(network, config, tmp_path).probabilities(hu, config.spacing_mm).grid >= 0.5
    assert 0.2 < label.mean() < 0.8
    case = GridCase(folder, hu, label.astype(np.uint8), np.zeros(shape, np.uint8), [])
    assert unet_training.validate(run, case, config) > 0.999


def test_what_the_window_cut_off_has_no_noise() -> None:
    """Metal all over, turned and magnified by interpolation, whose ones are not quite one."""
    metal, label = np.full((8, 256, 256), 255, np.uint8), np.zeros((8, 256, 256), np.uint8)
    label[4, 100:156, 100:156] = 1
    case = SliceCase(Path("own"), metal, metal, label, label, np.array([4]), np.ones(8, bool), "")
    images = StackSampler([case], 2, 2, seed=0).batch(0, range(12)).image[..., 100:156, 100:156]
    assert float(images.std(dim=(2, 3)).max()) < 1e-5


@pytest.mark.parametrize("slice_mm", [-1.0, float("nan"), float("inf"), 1e30])
def test_slices_of_no_thickness_are_refused(folder, tmp_path, slice_mm) -> None:
    with pytest.raises(ValueError, match=r"--slice-mm .*: give .* or (more|less)"):
        hybrid_training.Settings((folder,), tmp_path, slice_mm=slice_mm)


def test_a_run_of_before_had_slices_as_they_were() -> None:
    now, before = {"plane": "axial", "slice_mm": "3.5"}, {"plane": "axial"}
    assert differing(before, now) == ["slice_mm"]
    assert list_changes(["slice_mm"], before, now) == "--slice-mm was 0.0 and is 3.5"
    assert differing(before, now | {"slice_mm": "0.0"}) == []
    assert differing({}, now) == []  # nothing is known of it


def slice_case(known: list[bool], lesion_slices: list[int]) -> SliceCase:
    empty = np.zeros((len(known), 1, 1), np.uint8)
    label = empty.copy()
    label[lesion_slices] = 1
    return SliceCase(Path("own"), empty, empty, label, empty, np.array(lesion_slices, int), np.array(known), "")


def test_whether_a_slice_is_known_to_be_free() -> None:
    assert known_absent(slice_case([True, True, False], [0]))
    assert not known_absent(slice_case([True, False, False], [0, 1]))  # the second one's lesion is a network's
    assert known_absent(slice_case([True, True], []))


@pytest.mark.parametrize(
    ("annotated", "gate", "told"), [("partial", True, True), ("partial", False, False), ("complete", True, False)]
)
def test_a_classifier_that_cannot_learn_to_say_no_is_told(
    folder, tmp_path, monkeypatch, capsys, annotated, gate, told
) -> None:
    monkeypatch.setitem(PRESETS, "small", TINY)
    monkeypatch.setattr(hybrid_training, "train", lambda *_: None)
    entries = [replace(entry, annotated=annotated) for entry in read_folder(folder)[:4]]
    monkeypatch.setattr(hybrid_training, "split", lambda *_: (entries[:3], entries[3:]))
    hybrid_training.main(hybrid_training.Settings((folder,), tmp_path / "run", gate=gate, device="cpu"))
    assert ("give --no-gate" in capsys.readouterr().err) == told


def test_presence_is_judged_where_it_is_known(folder, tmp_path, monkeypatch) -> None:
    """A classifier that always finds one is right in the two slices that are known, and in three of four of all."""
    monkeypatch.setitem(PRESETS, "small", TINY)
    (tmp_path / "run").mkdir()
    run = hybrid_training.start(hybrid_training.Settings((folder,), tmp_path / "run", device="cpu"))
    always = lambda _, images: (torch.zeros(len(images) - 4, 256, 256), torch.ones(len(images) - 4))  # noqa: E731
    monkeypatch.setattr(hybrid_training, "run_stack", always)
    image = np.zeros((4, 256, 256), np.uint8)
    label = image.copy()
    label[:3] = 1
    for known, right in (([True, True, False, False], 1.0), ([True, True, True, True], 0.75), ([False] * 4, 0.75)):
        case = SliceCase(folder, image, image, label, image, np.arange(3), np.array(known), "")
        assert hybrid_training.validate(run, case)[1] == right
