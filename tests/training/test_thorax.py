"""Phantoms of the chest: what is where, and that the upper chest joins what lies below."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from training.anatomy import Organ
from training.data import read_folder
from training.phantom import Phantom, Scanner, Settings, main, make_phantom

COARSE = Scanner((1, 110, 110), (5.0, 4.0, 4.0), noise_hu=4.0)
SEEDS = range(5)


def chest_scanner(seed: int) -> Scanner:
    return COARSE.of_chest(np.random.default_rng(seed))


@pytest.fixture(scope="module")
def chests() -> list[Phantom]:
    return [make_phantom(seed, healthy=False, scanner=chest_scanner(seed), chest=True) for seed in SEEDS]


def test_the_scan_reaches_from_the_shoulders_down(chests: list[Phantom]) -> None:
    for seed, phantom in zip(SEEDS, chests, strict=True):
        scanner = chest_scanner(seed)
        assert scanner.field_mm[0] == pytest.approx(285, abs=65 + 2.5)  # a slice is 5 mm
        assert scanner.top_mm is not None
        assert 330 <= scanner.top_mm <= 400
        assert phantom.hu.shape == scanner.shape


def test_the_same_seed_gives_the_same_chest(chests: list[Phantom]) -> None:
    again = make_phantom(0, healthy=False, scanner=chest_scanner(0), chest=True)
    np.testing.assert_array_equal(again.hu, chests[0].hu)
    np.testing.assert_array_equal(again.lesions, chests[0].lesions)


def test_lungs_are_lung_all_the_way_up(chests: list[Phantom]) -> None:
    """No band of half-filled voxels where the upper lung joins the lower: its median stays that of air in tissue."""
    for phantom in chests:
        for hu, organs in zip(phantom.hu, phantom.organs, strict=True):
            lung = hu[organs == Organ.LUNG]
            if lung.size > 300:
                assert -930 < np.median(lung) < -780
                assert np.mean(lung > -600) < 0.35  # vessels, edges


@pytest.mark.parametrize(
    ("organ", "low", "high"),
    [(Organ.BONE, 150, 800), (Organ.MUSCLE, 20, 90), (Organ.FAT, -125, -70)],
)
def test_hu_of_organs_above_the_heart(chests: list[Phantom], organ: Organ, low: float, high: float) -> None:
    """The uppermost 8 cm, which nothing but the thorax's own parts fills."""
    for phantom in chests:
        upper = slice(len(phantom.hu) - 16, None)
        found = phantom.hu[upper][phantom.organs[upper] == organ]
        assert found.size
        assert low < np.median(found) < high


def test_the_arch_is_as_bright_as_the_aorta_below(chests: list[Phantom]) -> None:
    for phantom in chests:
        aorta = np.where(phantom.organs == Organ.AORTA, phantom.hu, -1000)
        half = len(aorta) // 2
        bright = [np.quantile(part[part > -1000], 0.8) for part in (aorta[:half], aorta[half:])]
        assert bright[1] == pytest.approx(bright[0], abs=25)


def test_the_windpipe_is_gas_in_the_midline(chests: list[Phantom]) -> None:
    """Within 3 cm of the middle from side to side, in every slice of the uppermost 8 cm."""
    for phantom in chests:
        middle = phantom.hu.shape[2] // 2
        near = phantom.hu[-16:, 30:80, middle - 7 : middle + 8]
        lung = phantom.organs[-16:, 30:80, middle - 7 : middle + 8] == Organ.LUNG
        assert (np.where(lung, 0, near).min(axis=(1, 2)) < -600).all()


def test_most_lesions_of_a_chest_are_in_the_lungs() -> None:
    drawn = [make_phantom(seed, healthy=False, scanner=chest_scanner(seed), chest=True).drawn for seed in range(20, 32)]
    sites = Counter(lesion.site for lesions in drawn for lesion in lesions)
    assert sites["lung"] > sum(sites.values()) / 2
    assert all(drawn)


def test_a_folder_of_chests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scanner, "training", lambda _: COARSE)
    main(Settings(tmp_path, count=3, seed=5, network_grid=True, chest_share=1.0))
    entries = read_folder(tmp_path)
    assert len(entries) == 3
    assert all(entry.complete for entry in entries)
