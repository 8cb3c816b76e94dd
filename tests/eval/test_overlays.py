"""Slices the right way round, and limits where they belong."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib import colors, image

from eval import figures
from eval.overlays import cut_overlay

SHAPE = (20, 16, 6)


def mask(path: Path, *box: slice) -> Path:
    """A mask of 2 × 2 × 5 mm voxels, 1 in the box, empty without one."""
    voxels = np.zeros(SHAPE, np.uint8)
    if box:
        voxels[box] = 1
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 5.0, 1.0])), path)
    return path


@pytest.mark.parametrize("left_first", [True, False])
def test_slices_lie_as_a_radiologist_sees_them(left_first: bool, tmp_path: Path) -> None:
    """Axes stored as (front, right, head) with either sign; one voxel at the patient's right, in front, in slice 3."""
    voxels = np.zeros((4, 6, 5), np.uint8)  # front-back, left-right, feet-head
    voxels[3, 5, 2] = 1
    affine = np.array([[0, 2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 1]])
    if not left_first:  # the same anatomy, both axes stored the other way round
        voxels, affine = voxels[::-1, ::-1], affine @ np.diag([-1.0, -1.0, 1.0, 1.0])
    scan = voxels.astype(np.int16) * 1000
    for name, stored in (("truth", voxels), ("found", voxels), ("scan", scan)):
        nib.save(nib.Nifti1Image(stored, affine), tmp_path / f"{name}.nii.gz")
    drawn = cut_overlay(tmp_path / "found.nii.gz", tmp_path / "truth.nii.gz", tmp_path / "scan.nii.gz")
    assert (drawn.slice_number, drawn.slices) == (3, 5)
    assert drawn.reference.shape == (4, 6)  # rows from front to back, columns from right to left
    assert drawn.spacing_mm == (3.0, 2.0)
    expected = np.zeros((4, 6), bool)
    expected[0, 0] = True
    np.testing.assert_array_equal(drawn.reference, expected)
    np.testing.assert_array_equal(drawn.prediction, expected)
    assert drawn.hu is not None
    np.testing.assert_array_equal(drawn.hu, 1000 * expected)


def test_the_slice_with_the_largest_union_is_cut(tmp_path: Path) -> None:
    truth = mask(tmp_path / "truth.nii.gz", slice(0, 3), slice(0, 3), slice(1, 2))  # 9 voxels in slice 2
    found = mask(tmp_path / "found.nii.gz", slice(8, 12), slice(8, 12), slice(4, 5))  # 16 in slice 5
    drawn = cut_overlay(found, truth, None)
    assert (drawn.slice_number, drawn.reference.sum(), drawn.prediction.sum()) == (5, 0, 16)
    assert drawn.hu is None
    # 4 × 4 voxels of 2 mm: 8 mm and twice 15 mm are less than the least square of 60 mm. Columns count from the
    # patient's right: voxels 8 … 11 of 20 lie 16 to 24 mm from it; rows from the front: 8 … 11 of 16, 8 to 16 mm.
    assert figures.zoom_mm(drawn) == pytest.approx((20 - 30, 12 - 30, 60))


def test_empty_masks_are_told(tmp_path: Path) -> None:
    truth, found = mask(tmp_path / "truth.nii.gz"), mask(tmp_path / "found.nii.gz")
    with pytest.raises(ValueError, match="neither it nor its reference holds a lesion"):
        cut_overlay(found, truth, None)


def lines(png: bytes) -> tuple[float, float]:
    """The longest share of a row, and of a column, that has the limits' colour."""
    picture = image.imread(io.BytesIO(png))[..., :3]
    marked = np.abs(picture - np.array(colors.to_rgb(figures.VERMILION))).max(axis=-1) < 0.15
    return float(marked.mean(axis=1).max()), float(marked.mean(axis=0).max())


def test_limits_are_drawn_into_the_curves() -> None:
    samples = [[step / 10, 3000.0, 9000.0, 50.0] for step in range(100)]
    across, down = lines(figures.curve(samples, True, (45.0, 4096.0), (54.0, 4915.0)))
    assert (across > 0.3, down > 0.3) == (True, True)
    across, down = lines(figures.curve(samples, False, (45.0, 4096.0), (54.0, 10800.0)))  # the GPU's limit is not RAM's
    assert (across < 0.1, down > 0.3) == (True, True)


def test_axes_without_a_direction(tmp_path: Path) -> None:
    """As headers with an sform of zeros have them."""
    image = nib.Nifti1Image(np.ones(SHAPE, np.uint8), None)
    image.header.set_sform(np.zeros((4, 4)), code=1)
    nib.save(image, tmp_path / "zero.nii.gz")
    with pytest.raises(ValueError, match=r"zero\.nii\.gz: its affine gives its axes no direction"):
        cut_overlay(tmp_path / "zero.nii.gz", tmp_path / "zero.nii.gz", None)
