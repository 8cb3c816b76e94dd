"""The component rule, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from inference.fusion import FusionThresholds, fuse

RULE = FusionThresholds(
    weight=0.5, voxel=0.5, unet_voxel=0.5, both_hybrid=0.5, both_unet=0.5, sure_hybrid=0.9, sure_unet=0.95
)
SHAPE = (3, 8, 8)


def volume(*blobs: tuple[tuple[int, int, int], float]) -> np.ndarray:
    """One voxel a blob."""
    array = np.zeros(SHAPE, np.float32)
    for place, value in blobs:
        array[place] = value
    return array


def run(hybrid: np.ndarray | None, unet: np.ndarray | None, rule: FusionThresholds = RULE, voxel_ml: float = 1.0):
    return fuse(
        None if hybrid is None else lambda z: hybrid[z],
        None if unet is None else lambda z: unet[z],
        SHAPE,
        voxel_ml,
        rule,
    )


@pytest.mark.parametrize(
    ("hybrid", "unet", "stays"),
    [
        (0.6, 0.6, True),  # both support it
        (0.4, 0.8, False),  # mean 0.6, but the hybrid does not support it and the UNet is not sure
        (0.8, 0.4, False),
        (0.92, 0.1, True),  # the hybrid is sure, mean 0.51
        (0.05, 0.96, True),  # the UNet is sure, mean 0.505
        (0.92, 0.05, False),  # sure, but the mean 0.485 is no candidate
        (0.0, 0.96, True),  # the mean 0.48 is none either, but what the UNet finds needs no help
        (0.55, 0.4, False),  # mean below 0.5
    ],
)
def test_rule(hybrid: float, unet: float, stays: bool) -> None:
    mask = run(volume(((1, 4, 4), hybrid)), volume(((1, 4, 4), unet)))
    assert mask.dtype == np.uint8
    assert mask[1, 4, 4] == stays
    assert mask.sum() == stays


def test_support_may_come_from_different_voxels_of_a_component() -> None:
    # touching over a corner, across slices: one component by 26 neighbours
    hybrid = volume(((0, 3, 3), 0.8), ((1, 4, 4), 0.3))
    unet = volume(((0, 3, 3), 0.3), ((1, 4, 4), 0.8))
    assert run(hybrid, unet).sum() == 2
    apart = (volume(((0, 3, 3), 0.8), ((2, 4, 4), 0.3)), volume(((0, 3, 3), 0.3), ((2, 4, 4), 0.8)))
    assert run(*apart).sum() == 0


def test_a_healthy_verdict_leaves_what_the_unet_is_sure_of() -> None:
    unet = volume(((0, 1, 1), 0.94), ((1, 5, 5), 0.96), ((1, 5, 6), 0.6), ((1, 5, 7), 0.4))
    mask = run(None, unet)
    assert [tuple(v) for v in np.argwhere(mask)] == [(1, 5, 5), (1, 5, 6)]
    assert run(None, None).sum() == 0


def test_the_hybrid_alone() -> None:
    mask = run(volume(((0, 1, 1), 0.8), ((1, 5, 5), 0.95)), None)
    assert [tuple(v) for v in np.argwhere(mask)] == [(1, 5, 5)]


def test_small_components_go() -> None:
    both = volume(((0, 1, 1), 0.99), ((2, 5, 5), 0.99), ((2, 5, 6), 0.99))
    kept = run(both, both, replace(RULE, min_volume_ml=0.5), voxel_ml=0.3)
    assert [tuple(v) for v in np.argwhere(kept)] == [(2, 5, 5), (2, 5, 6)]


def test_weight_is_the_hybrids() -> None:
    hybrid, unet = volume(((1, 1, 1), 0.95)), volume(((1, 1, 1), 0.0))
    assert run(hybrid, unet, replace(RULE, weight=0.8)).sum() == 1
    assert run(hybrid, unet, replace(RULE, weight=0.2)).sum() == 0


def test_values_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        run(volume(((0, 0, 0), np.nan)), volume())


def test_thresholds_survive_the_manifest() -> None:
    assert FusionThresholds.from_dict(RULE.to_dict()) == RULE
