"""Thresholds are found where they separate, and judged as FLARE grades."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from inference.fusion import find_components
from inference.hybrid.predict import SlicePredictions
from inference.weights import Gate
from training import calibration
from training.calibration import (
    CHOICES,
    SEARCHED,
    Operating,
    Predicted,
    alone,
    calibrate,
    calibrate_all,
    choose_slice_gate,
    judge,
    predict,
)
from training.data import Case, Entry


class Said:
    """A pipeline that says what it was given."""

    def __init__(self, hybrid: np.ndarray, unet: np.ndarray) -> None:
        self.hybrid, self.unet = hybrid, unet

    def predict_hybrid(self, *_: object) -> tuple:
        return self.hybrid.__getitem__, 0.8

    def predict_unet(self, *_: object):
        return self.unet.__getitem__


def predicted(
    label: np.ndarray, spacing_mm: tuple, hybrid: np.ndarray, unet: np.ndarray, score: float, source: Path = Path()
) -> Predicted:
    """Of arrays as they are, so that `predict`'s own way to keep them is not what it is compared with."""
    return Predicted(label, spacing_mm, hybrid.__getitem__, unet.__getitem__, score, source)


def test_the_box_of_a_prediction_changes_no_dice() -> None:
    rng = np.random.default_rng(0)
    hybrid, unet = np.zeros((2, 12, 30, 30), np.float32)
    hybrid[4:7, 5:12, 8:15], unet[5:8, 6:14, 9:13] = rng.random((3, 7, 7)), rng.random((3, 8, 4))
    hybrid[11, 29, 29] = 0.29  # which no threshold takes for a lesion
    label = np.zeros(hybrid.shape, np.uint8)
    label[5:7, 6:11, 9:14] = 1
    case = Case(Entry("x", Path("x"), None, None), label.astype(np.int16), label, label, (3.0, 1.0, 1.0))
    found = predict(Said(hybrid, unet), case)
    assert found.label.shape == (4, 9, 7)
    whole = predicted(label, case.spacing_mm, hybrid.astype(np.float32), unet.astype(np.float32), 0.8)
    for network, values in SEARCHED.items():
        for name in values:
            for value in CHOICES[name]:
                operating = Operating().change(name, value)
                assert found.dice(operating, network) == pytest.approx(whole.dice(operating, network))


def test_masks_of_the_same_components_are_measured_alike() -> None:
    """Whatever threshold is moved, and in whatever order: as the mask itself, measured afresh, says."""
    rng = np.random.default_rng(1)
    hybrid, unet = rng.choice(np.float32([0, 0.35, 0.6, 0.9, 0.9993, 0.99996]), (2, 6, 12, 12), p=[0.9, *[0.02] * 5])
    case = predicted((hybrid + unet > 1.3).astype(np.uint8), (2.0, 5.0, 5.0), hybrid, unet, 0.8)
    moves = [(name, value) for names in SEARCHED.values() for name in names for value in CHOICES[name]]
    operating, told = Operating(), set()
    for index in rng.permutation(len(moves)):
        operating = operating.change(*moves[index])
        for network in SEARCHED:
            for measure in (Predicted.dice, Predicted.dice_and_nsd):
                told.add(case.measured(operating, network, measure))
                assert case.measured(operating, network, measure) == measure(case, operating, network)
    assert len(told) > 20


@pytest.mark.parametrize(("lowest", "expected"), [(0.1, 0.12), (0.6, 0.5)])
def test_the_slices_gate_withholds_one_lesion_slice_in_twenty(monkeypatch, lowest: float, expected: float) -> None:
    """21 slices with a lesion, the presence 0.02 apart: the second lowest is the 5 % quantile. Others do not count."""
    label = np.zeros((30, 8, 8), np.uint8)
    label[5:26, 2:4, 2:4] = 1
    presence = np.full(30, 0.01, np.float32)
    presence[5:26] = lowest + 0.02 * np.arange(21)
    monkeypatch.setattr(calibration, "predict_slices", lambda *_: SlicePredictions(np.zeros(0), presence))
    hybrid = SimpleNamespace(slice_threshold=0.5)
    manifest = SimpleNamespace(plane="axial", resize="square", window_hu=(-200, 300), slice_mm=3.0)
    pipeline = SimpleNamespace(manifest=manifest, hybrid=hybrid)
    case = Case(Entry("x", Path("x"), None, None), label.astype(np.int16), label, label, (3.0, 1.0, 1.0))
    healthy = replace(case, label=0 * label)
    gate = choose_slice_gate(pipeline, [case, healthy])
    assert gate.slice_threshold == hybrid.slice_threshold == pytest.approx(expected)


@pytest.mark.parametrize("network", ["hybrid", "unet", "fused"])
def test_calibration_finds_what_separates(network: str) -> None:
    """Healthy cases score 0.6 and would get false positives, diseased ones 0.9: a threshold must fall between."""
    lump = np.zeros((3, 6, 6), np.float32)
    lump[1, 2:4, 2:4] = 0.97
    sick = [predicted((lump > 0).astype(np.uint8), (10.0,) * 3, lump, lump, 0.9)] * 2
    healthy = [predicted(np.zeros(lump.shape, np.uint8), (10.0,) * 3, lump, np.float32(0.6) * lump, 0.6)] * 2
    operating, best = calibrate([*sick, *healthy], network)
    assert best == pytest.approx(1)
    if network == "unet":
        assert 0.58 < operating.fusion.unet_voxel <= 0.97 or 0.58 < operating.fusion.sure_unet <= 0.97
    else:
        assert 0.6 < operating.gate.scan_threshold <= 0.9


def test_fusion_finds_that_only_agreement_separates() -> None:
    """Two healthy scans, in each of which one network is surer of something than of the lesion that both see."""
    lump = np.zeros((3, 6, 6), np.float32)
    lump[1, 2:4, 2:4] = 1
    sick = predicted(lump.astype(np.uint8), (10.0,) * 3, np.float32(0.9996) * lump, np.float32(0.9996) * lump, 0.7)
    nothing = np.zeros(lump.shape, np.uint8)
    only_unet = predicted(nothing, (10.0,) * 3, 0 * lump, np.float32(0.99996) * lump, 0.7)
    only_hybrid = predicted(nothing, (10.0,) * 3, np.float32(0.9999) * lump, np.float32(0.2) * lump, 0.7)
    told = calibrate_all([sick, only_unet, only_hybrid], Gate(0.5))
    assert told["fused"][1] == pytest.approx(1)
    assert max(told["hybrid"][1], told["unet"][1]) < 0.9


def test_a_network_that_is_right_alone_is_heard_alone() -> None:
    """The UNet, as sure in healthy scans, finds a block of 48 voxels around the lesion of 4 that the hybrid finds."""
    lump, block = np.zeros((2, 5, 8, 8), np.float32)
    lump[2, 3:5, 3:5] = 0.97
    block[1:4, 2:6, 2:6] = 0.97
    nothing = np.zeros(lump.shape, np.uint8)
    sick = predicted((lump > 0).astype(np.uint8), (10.0,) * 3, lump, block, 0.9)
    healthy = predicted(nothing, (10.0,) * 3, 0 * lump, block, 0.9)
    told = calibrate_all([sick, sick, healthy, healthy], Gate(0.5))
    assert told["unet"][1] < 0.6
    assert [case.dice(told["fused"][0], "fused") for case in (sick, healthy)] == [1, 1]


@pytest.mark.parametrize("network", ["hybrid", "unet"])
def test_fused_is_what_one_network_alone_finds(network: str) -> None:
    """Whatever its thresholds, and whatever the other says, in a scan with a high score and one with a low score."""
    rng = np.random.default_rng(2)
    said = rng.choice(np.float32([0, 0.35, 0.6, 0.9, 0.9993, 0.99996]), (2, 6, 12, 12), p=[0.9, *[0.02] * 5])
    cases = [predicted((said[0] > 0).astype(np.uint8), (2.0, 5.0, 5.0), *said, score) for score in (0.2, 0.8)]
    found = 0
    for name in SEARCHED[network]:
        for value in CHOICES[name]:
            operating = Operating().change(name, value)
            for case in cases:
                mask = case.mask(operating, network)
                np.testing.assert_array_equal(case.mask(alone(network, operating), "fused"), mask)
                found += mask.any()
    assert found > 20


def test_masks_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds of the UNet's sureness that keep both of two components, one or none: three masks, one search."""
    said = np.zeros((1, 1, 5), np.float32)
    said[0, 0, 0], said[0, 0, 4] = 0.9997, 0.99996
    case = predicted((said > 0).astype(np.uint8), (10.0,) * 3, 0 * said, said, 0.9)
    searched, measured = [], []
    monkeypatch.setattr(calibration, "find_components", lambda *a: searched.append(a) or find_components(*a))

    def measure(one: Predicted, operating: Operating, network: str) -> float:
        measured.append(operating)
        return one.dice(operating, network)

    values = CHOICES["sure_unet"]
    told = [case.measured(Operating().change("sure_unet", value), "unet", measure) for value in values]
    expected = [1 if value <= 0.9997 else pytest.approx(2 / 3) if value <= 0.99996 else 0 for value in values]
    assert told == expected
    assert (len(searched), len(measured)) == (1, 3)
    assert {0.9998, 0.9999, 0.99995} < set(values)


def test_dice_and_nsd_by_hand() -> None:
    """The mask lacks the last of the label's three voxels of 10 mm in a row: Dice 2·2 / (2 + 3).

    Surfels of a row lie in fours, at each voxel's face: at the ends a triangle each, between two voxels a rectangle.
    Of the mask 2 and 1 (times four), all of them on the label's; of the label 2 and 2, one end's triangle far off.
    """
    label = np.zeros((1, 1, 5), np.uint8)
    label[0, 0, 1:4] = 1
    said = np.zeros(label.shape, np.float32)
    said[0, 0, 1:3] = 0.97
    case = predicted(label, (10.0,) * 3, said, said, 0.9)
    assert case.dice(Operating(), "fused") == pytest.approx(0.8)
    triangle, rectangle = 3**0.5 / 4 * 50, 10 * 50**0.5
    nsd = (3 * triangle + 3 * rectangle) / (4 * triangle + 3 * rectangle)
    assert case.dice_and_nsd(Operating(), "fused") == pytest.approx((0.8 + nsd) / 2)
    never = Operating().change("voxel", 1.0).change("unet_voxel", 1.0)
    assert case.dice_and_nsd(never, "fused") == 0
    assert predicted(0 * label, (10.0,) * 3, said, said, 0.9).dice_and_nsd(never, "fused") == 1


def test_folders_count_alike() -> None:
    """Of three phantoms two right, a healthy one false; a sarcoma missed: ((2/3 − 0.95) + 0) / 2."""
    lump = np.zeros((3, 6, 6), np.float32)
    lump[1, 2:4, 2:4] = 0.97
    sick = predicted((lump > 0).astype(np.uint8), (10.0,) * 3, lump, lump, 0.9, Path("phantoms"))
    healthy = replace(sick, label=0 * sick.label)
    missed = predicted(sick.label, (10.0,) * 3, 0 * lump, 0 * lump, 0.9, Path("sarcomas"))
    said = judge([sick, missed, sick, healthy], Operating(), "fused")
    assert said == pytest.approx((2 / 3 - (1 - calibration.HEALTHY_LIMIT)) / 2)
