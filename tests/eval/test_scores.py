"""Every official rule, in its order, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eval.lesions import detect
from eval.scores import score

MM = (1.0, 1.0, 1.0)


def line(*voxels: int, length: int = 20) -> np.ndarray:
    """A row of voxels along the first axis, those named set to 1."""
    array = np.zeros((length, 1, 1), np.uint8)
    array[list(voxels)] = 1
    return array


def test_a_label_above_one_scores_nothing_even_where_the_rest_is_right() -> None:
    truth = line(3, 4, 5)
    assert score(truth, truth, MM) == (1, 1)
    wrong = truth.copy()
    wrong[19] = 2
    assert score(wrong, truth, MM) == (0, 0)
    assert score(2 * line(3), line(), MM) == (0, 0)  # rule 1 comes before those on empty masks


def test_empty_masks() -> None:
    assert score(line(), line(), MM) == (1, 1)
    assert score(line(3), line(), MM) == (0, 0)
    assert score(line(), line(3), MM) == (0, 0)


def test_dsc_by_hand_and_rounded() -> None:
    # |A| = 3, |B| = 4, |A∩B| = 2: 4/7 = 0.571428…
    assert score(line(3, 4, 5), line(4, 5, 6, 7), MM).dsc == 0.5714
    # 2·1/(1 + 5) = 0.3333…
    assert score(line(3), line(3, 4, 5, 6, 7), MM).dsc == 0.3333


def test_nsd_is_not_measured_below_a_dsc_of_a_fifth() -> None:
    # 2·1/(1 + 9) = 0.2 exactly is not below: measured, and every surfel is within 8 mm
    assert score(line(5), line(*range(5, 14)), MM, tolerance_mm=10) == (0.2, 1.0)
    # 2·1/(1 + 10) = 0.1818: within the same tolerance, yet 0
    assert score(line(5), line(*range(5, 15)), MM, tolerance_mm=10) == (0.1818, 0.0)
    # just below 0.2 though it rounds to 0.2000: the unrounded value decides
    truth = np.zeros((45001, 1, 1), np.uint8)
    truth[:40001] = 1  # with 5000 predicted, all of them right: 2·5000/45001 = 0.22…; with 4445: 0.20000…
    prediction = np.zeros_like(truth)
    prediction[:4444] = 1
    unrounded = 2 * 4444 / (4444 + 40001)
    assert unrounded < 0.2
    assert round(unrounded, 4) == 0.2
    assert score(prediction, truth, MM, tolerance_mm=1e5 / 2) == (0.2, 0.0)


def test_nsd_by_hand() -> None:
    """Rods of 1 mm² along x, from 0 to 4 and from 0 to 8 mm, tolerance 2 mm.

    The surface cuts the edges of the voxel grid in half (marching cubes). At each end, a corner of the voxel is cut off
    by a triangle with sides of √2/2 mm: √3/8 mm². Along the rod, each of its four edges is cut by a strip √2/2 mm wide.
    Of every 1 mm of a strip, the area is counted at the grid corner in its middle: at 1, 2, … mm, not at the ends.
    """
    end, strip = np.sqrt(3) / 8, np.sqrt(2) / 2
    short, long = line(*range(4)), line(*range(8))
    areas = [2 * end + (n - 1) * strip for n in (4, 8)]
    # the corners of the short rod are all corners of the long one's; of the latter's, 0 to 6 are within 2 mm of 4
    near = areas[0] + end + 6 * strip
    found = score(short, long, MM)
    assert found.dsc == round(8 / 12, 4)
    assert found.nsd == round(near / sum(areas), 4)


def test_rounding_is_to_four_decimals() -> None:
    found = score(line(3, 4, 5), line(4, 5, 6, 7), MM)
    assert all(value == round(value, 4) for value in found)
    # |A| = |B| = 160, |A∩B| = 37: 0.23125, which NumPy rounds to even and Python up
    assert score(line(*range(160), length=300), line(*range(123, 283), length=300), MM).dsc == 0.2312


def test_detection_by_hand() -> None:
    """Reference: lesions at 1-2, 5, 9. Prediction: 2 (finds the first), 13 and 16 (false)."""
    prediction, reference = line(2, 13, 16) == 1, line(1, 2, 5, 9) == 1
    assert detect(prediction, reference) == (3, 1, 3, 2)
    assert detect(prediction, line() == 1) == (0, 0, 3, 3)
    assert detect(line() == 1, reference) == (3, 0, 0, 0)
    assert detect(line() == 1, line() == 1) == (0, 0, 0, 0)


def test_one_component_may_find_several_lesions() -> None:
    assert detect(line(*range(1, 10)) == 1, line(1, 5, 9) == 1) == (3, 3, 1, 0)


def test_lesions_touch_over_corners() -> None:
    reference = np.zeros((2, 2, 2), bool)
    reference[0, 0, 0] = reference[1, 1, 1] = True
    assert detect(reference, reference) == (1, 1, 1, 0)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.8, 0.7, 5.0)])
def test_a_perfect_mask_scores_one_at_any_spacing(spacing_mm) -> None:
    mask = (np.random.default_rng(1).random((9, 8, 7)) < 0.3).astype(np.uint8)
    assert score(mask, mask, spacing_mm, tolerance_mm=0) == (1, 1)
