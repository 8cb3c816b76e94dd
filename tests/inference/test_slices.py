import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.resampling import axis_matrix
from inference.slices import SliceGrid, thick_grid, thicken, thin_matrix, window


def test_window_by_hand() -> None:
    hu = np.array([-1024, -200, 50, 300, 2000], np.int16)
    np.testing.assert_allclose(window(hu), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(window(hu, (-1300, 300)), [276 / 1600, 1100 / 1600, 1350 / 1600, 1, 1], rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_edge_matrix_is_torchs_antialiased_bilinear(size_in: int, size_out: int, seed: int) -> None:
    signal = np.random.default_rng(seed).normal(size=size_in).astype(np.float32)
    expected = F.interpolate(
        torch.from_numpy(signal)[None, None, None], size=(1, size_out), mode="bilinear", antialias=True
    )[0, 0, 0].numpy()
    matrix = axis_matrix(size_in, 1.0, size_out, size_in / size_out)
    np.testing.assert_allclose(matrix @ signal, expected, atol=2e-5)


def test_zero_matrix_lets_the_signal_fade_at_the_border_of_its_field() -> None:
    # Two voxels in a field of six, all of 1 mm: they land on outputs 2 and 3, everything else is outside.
    np.testing.assert_array_equal(axis_matrix(2, 1.0, 6, 1.0, "zero"), np.eye(6, 2, -2, dtype=np.float32))
    # Output voxels of 2 mm see 1/4, 1/2, 1/4 of three input voxels; the one beyond the field counts as zero.
    np.testing.assert_allclose(axis_matrix(3, 1.0, 1, 2.0, "zero"), [[0.25, 0.5, 0.25]])
    assert axis_matrix(1, 1.0, 1, 2.0, "zero").sum() == pytest.approx(0.5)


def test_stretch_is_torchs_resize_of_each_slice() -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (3, 300, 40)).astype(np.int16)
    grid = SliceGrid(hu.shape, (5.0, 0.7, 0.7), "axial", "stretch")
    expected = F.interpolate(torch.from_numpy(window(hu))[None], size=(256, 256), mode="bilinear", antialias=True)[0]
    np.testing.assert_allclose(grid.cut(hu, 0, 3), expected.numpy(), atol=2e-5)


def test_square_keeps_the_aspect_and_pads_with_air() -> None:
    # 40 × 100 voxels of 2 mm: 80 × 200 mm in a field of 300 mm, so the body spans 80/300 and 200/300 of 256 pixels.
    hu = np.full((1, 40, 100), 300, np.int16)
    image = SliceGrid(hu.shape, (3.0, 2.0, 2.0), "axial", "square").cut(hu, 0, 1)[0]
    assert image.sum() == pytest.approx(256 * 256 * 80 * 200 / 300**2, rel=5e-3)
    rows, columns = np.flatnonzero(image.max(1) > 0.5), np.flatnonzero(image.max(0) > 0.5)
    assert rows[0] + rows[-1] == columns[0] + columns[-1] == 255  # centred
    assert len(rows) == pytest.approx(80 / 300 * 256, abs=1)
    assert len(columns) == pytest.approx(200 / 300 * 256, abs=1)


def test_a_wide_field_is_not_cut() -> None:
    hu = np.full((1, 100, 250), 300, np.int16)  # 200 × 500 mm
    image = SliceGrid(hu.shape, (3.0, 2.0, 2.0)).cut(hu, 0, 1)[0]
    assert image.sum() == pytest.approx(256 * 256 * 200 / 500, rel=1e-2)


def test_edges_are_repeated() -> None:
    hu = np.random.default_rng(1).integers(-200, 300, (2, 16, 16)).astype(np.int16)
    stack = SliceGrid(hu.shape, (1.0, 20.0, 20.0)).cut(hu, -2, 4)
    for index, slice_number in enumerate([0, 0, 0, 1, 1, 1]):
        np.testing.assert_array_equal(stack[index], stack[2 + slice_number])
    assert not np.array_equal(stack[2], stack[3])


@pytest.mark.parametrize("resize", ["stretch", "square"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_restore_brings_a_smooth_image_back_to_the_grid(plane, resize) -> None:
    shape = (60, 90, 110)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    volume = np.exp(-(z**2 + y**2 + x**2) / 0.3).astype(np.float32)
    grid = SliceGrid(shape, (4.0, 2.5, 2.0), plane, resize)
    images = np.stack([grid.resample(volume[grid[i]]) for i in range(len(grid))])
    for index in (10, len(grid) // 2):
        np.testing.assert_allclose(grid.restore(images[index]), volume[grid[index]], atol=0.02)
    if plane != "axial":
        for z_index in (5, 30):
            np.testing.assert_allclose(grid.restore_axial(images, z_index), volume[z_index], atol=0.02)


def test_a_voxel_survives_where_it_is() -> None:
    """One bright voxel off the centre comes back with its maximum at the same place, in every plane."""
    volume = np.zeros((40, 50, 60), np.float32)
    volume[7, 33, 12] = 1
    for plane, where in (("axial", (33, 12)), ("coronal", (7, 12)), ("sagittal", (7, 33))):
        grid = SliceGrid(volume.shape, (5.0, 3.0, 3.0), plane)
        restored = grid.restore(grid.resample(volume[grid[(7, 33, 12)[grid.axis]]]))
        assert np.unravel_index(restored.argmax(), restored.shape) == where


def test_unknown_plane_is_refused() -> None:
    with pytest.raises(ValueError, match="oblique"):
        SliceGrid((1, 1, 1), (1.0, 1.0, 1.0), "oblique")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spacing", "step"), [(0.7, 5), (1.0, 4), (1.25, 3), (1.5, 3), (2.0, 2), (2.5, 2), (3.0, 1), (3.27, 1), (5.0, 1)]
)
def test_thin_slices_make_one_of_about_the_least_distance(spacing: float, step: int) -> None:
    """At least 3.3 mm, that is 3.5 less a fifth of a slice, and never more slices than that takes."""
    grid, found = thick_grid((101, 30, 20), (spacing, 0.9, 0.8), "axial", "square", 3.5)
    assert found == step
    assert grid.shape == (-(-101 // step), 30, 20)
    assert grid.spacing_mm == pytest.approx((step * spacing, 0.9, 0.8))
    sideways, found = thick_grid((30, 101, 20), (5.0, spacing, 0.8), "coronal", "square", 3.5)
    assert (found, sideways.shape[1]) == (step, grid.shape[0])


def test_thick_slices_by_hand() -> None:
    hu = np.array([10, 20, 31, 40, 7], np.int16).reshape(1, 5, 1)
    np.testing.assert_array_equal(thicken(hu, 1, 2).ravel(), [15, 36, 7])  # 35.5 is rounded to even
    assert thicken(hu, 1, 1) is hu


def test_back_to_thin_slices_by_hand() -> None:
    """Centres of two slices each lie at 0.5, 2.5 and 4.5 of the thin ones; beyond them the last value holds."""
    expected = [[1, 0, 0], [0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0.75, 0.25], [0, 0.25, 0.75]]
    np.testing.assert_allclose(thin_matrix(5, 2), expected)
    np.testing.assert_array_equal(thin_matrix(4, 1), np.eye(4))
