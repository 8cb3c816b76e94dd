"""NSD against DeepMind's package on random masks, and by hand on small ones."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from eval.surface import bounding_box, surface_dice

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance

# 0.1 · 20, 0.2 · 10, 0.25 · 8, 0.4 · 5, 0.5 · 4, 1 · 2 and 2 · 1 are ties with a tolerance of 2 mm
SPACING_MM = st.sampled_from([0.1, 0.2, 0.25, 0.4, 0.5, 0.7421875, 1.0, 2.0, 3.27, 5.0]) | st.floats(0.3, 6)


def peer(a: np.ndarray, b: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float) -> float:
    with warnings.catch_warnings():  # it calls functions that scipy has since moved
        warnings.simplefilter("ignore")
        distances = surface_distance.compute_surface_distances(a, b, spacing_mm)
    return surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm)


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """Two masks that are not empty: noise, or one moved against the other; borders are touched."""
    shape = draw(array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9))
    masks = arrays(bool, shape, elements=st.booleans(), fill=st.just(draw(st.booleans())))
    a = draw(masks)
    b = draw(masks) if draw(st.booleans()) else np.roll(a, draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    for mask in (a, b):
        mask[tuple(draw(st.integers(0, n - 1)) for n in shape)] = True
    return a, b


@settings(deadline=None, max_examples=300)
@given(pairs(), st.tuples(SPACING_MM, SPACING_MM, SPACING_MM), st.sampled_from([0.0, 1.0, 2.0, 3.5]))
def test_equals_the_package(masks, spacing_mm, tolerance_mm) -> None:
    expected = peer(*masks, spacing_mm, tolerance_mm)
    assert surface_dice(*masks, spacing_mm, tolerance_mm) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spacing_mm", [0.1, 0.2, 0.25, 0.4, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_exact_ties_count_as_near(spacing_mm: float, axis: int) -> None:
    """Two single voxels 2.000 mm apart: all of the surface is within 2 mm, and nearly none within a hair less."""
    steps = round(2 / spacing_mm)
    a, b = np.zeros((2, *(1 + steps * (axis == k) for k in range(3))), bool)
    a[0, 0, 0] = b[tuple(steps * (axis == k) for k in range(3))] = True
    spacing = (spacing_mm,) * 3
    assert surface_dice(a, b, spacing, 2.0) == 1.0 == peer(a, b, spacing, 2.0)
    # just below, a corner's nearest lies a voxel side nearer on the far face alone: half of the corners are left
    assert surface_dice(a, b, spacing, 2.0 - 1e-9) == pytest.approx(0.5)


def test_one_voxel_by_hand() -> None:
    """A voxel and its neighbour two along: corners 0, 1 and 2, 3. Within 1 side: corners 1 and 2, half of each."""
    a, b = np.zeros((2, 4, 3, 3), bool)
    a[0, 1, 1] = b[2, 1, 1] = True
    assert surface_dice(a, b, (1.0, 1.0, 1.0), 1.0) == pytest.approx(0.5)
    assert surface_dice(a, b, (1.0, 1.0, 1.0), 0.99) == 0
    assert surface_dice(a, b, (1.0, 1.0, 1.0), 2.0) == 1
    assert surface_dice(a, b, (3.0, 1.0, 1.0), 2.0) == 0


def test_empty_masks() -> None:
    empty, full = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    assert np.isnan(surface_dice(empty, empty, (1.0, 1.0, 1.0), 2.0))
    assert surface_dice(empty, full, (1.0, 1.0, 1.0), 2.0) == 0 == surface_dice(full, empty, (1.0, 1.0, 1.0), 2.0)


def test_the_crop_changes_nothing() -> None:
    """A mask that touches the border scores as the same mask within air."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 6, 7, 8)) < 0.5
    air = [(9, 4), (3, 11), (0, 5)]
    inside = surface_dice(np.pad(a, air), np.pad(b, air), (0.8, 0.8, 3.0), 2.0)
    assert surface_dice(a, b, (0.8, 0.8, 3.0), 2.0) == inside


def test_bounding_box() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert bounding_box(mask) is None
    mask[1, 2, 3] = mask[3, 2, 6] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 3), slice(3, 7))
