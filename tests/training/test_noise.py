"""A scanner's noise as augmentation: what it was asked for, and the same whenever it is replayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.augmentation import Noise, RandomNoise


@pytest.mark.parametrize("shared", [(0.3, 0.9), (0.8, 0.5)])
def test_neighbours_share_it_as_a_gaussian_says(shared: tuple[float, float]) -> None:
    """White noise blurred with a standard deviation of s pixels has a correlation of exp(−d² / 4s²) at a distance d.

    Sampled at whole pixels that holds for s well above a half; for s = 0.3 it is that of its taps.
    """
    noise = Noise(12.0, shared, seed=1)(torch.zeros(40, 128, 160)).numpy()
    inside = noise[:, 4:-4, 4:-4]
    assert inside.std() == pytest.approx(12, rel=0.02)
    for axis, width in ((1, shared[0]), (2, shared[1])):
        tap = np.exp(-(np.arange(-3, 4) ** 2) / (2 * width**2))
        expected = (tap[1:] * tap[:-1]).sum() / (tap**2).sum()
        lagged = np.moveaxis(inside, axis, 0)
        found = (lagged[1:] * lagged[:-1]).mean() / (inside**2).mean()
        assert found == pytest.approx(expected, abs=0.01)
        if width > 0.7:
            assert found == pytest.approx(np.exp(-1 / (4 * width**2)), abs=0.02)
    assert abs((inside[1:] * inside[:-1]).mean() / (inside**2).mean()) < 0.01  # slices share none


def test_it_can_be_replayed() -> None:
    hu = torch.arange(2 * 8 * 8.0).view(2, 8, 8)
    drawn = RandomNoise(share=1).draw(np.random.default_rng(0))
    assert torch.equal(drawn(hu), drawn(hu))
    assert not torch.equal(drawn(hu), hu)
    assert torch.equal(Noise()(hu), hu)


def test_what_is_drawn() -> None:
    """In so many of the draws, up to so many HU, and across more often than down."""
    rng = np.random.default_rng(0)
    drawn = [RandomNoise(share=0.6, largest_hu=20).draw(rng) for _ in range(2000)]
    some = [noise for noise in drawn if noise.sd_hu]
    assert len(some) / len(drawn) == pytest.approx(0.6, abs=0.04)
    assert 19 < max(noise.sd_hu for noise in some) <= 20
    assert np.mean([noise.shared[1] >= noise.shared[0] for noise in some]) == pytest.approx(0.75, abs=0.04)
    assert all(0.3 <= width <= 0.9 for noise in some for width in noise.shared)
