"""Reading and writing: geometry survives exactly, values become HU. Independent readers: nibabel and SimpleITK."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.volume import body_box, canonical_axes, case_name, is_scan, read_label, read_volume, write_mask


def rotation(seed: int, angle: float) -> np.ndarray:
    """A rotation about a random axis (Rodrigues' formula), angle in radians."""
    axis = np.random.default_rng(seed).normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def signed_permutation(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


geometries = st.tuples(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)).filter(lambda s: np.prod(s) > 1),
    st.tuples(*[st.floats(0.3, 10)] * 3),
    st.integers(0, 2**31),
    st.floats(0, 0.6),
)
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(geometries)
def test_random_geometry_survives_the_round_trip(tmp_path, geometry) -> None:
    """Each voxel of the mask lies where that voxel of the scan lay, by nibabel's reading; the header is the same."""
    shape, spacing, seed, angle = geometry
    affine = np.eye(4)
    affine[:3, :3] = rotation(seed, angle) @ signed_permutation(seed) @ np.diag(spacing)
    affine[:3, 3] = np.random.default_rng(seed).normal(0, 200, 3)
    hu = np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape).astype(np.int16)
    path = write_nifti(tmp_path / "x_0000.nii.gz", hu, affine)
    read = read_volume(path)
    write_mask(read.hu % 2, read.geometry, tmp_path / "x.nii.gz")
    scan, mask = nib.load(path), nib.load(tmp_path / "x.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.get_fdata(), hu % 2)
    np.testing.assert_array_equal(mask.affine, scan.affine)
    for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "pixdim", "sform_code", "qform_code"):
        np.testing.assert_array_equal(mask.header[field], scan.header[field])


@relaxed
@given(geometries)
def test_canonical_is_itks_lps(tmp_path, geometry) -> None:
    shape, spacing, seed, angle = geometry
    image = SimpleITK.GetImageFromArray(np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16))
    image.SetSpacing(spacing)
    image.SetDirection((rotation(seed, angle) @ signed_permutation(seed)).ravel())
    if np.unique(SimpleITK.GetArrayFromImage(image)).size == 1:
        return
    expected = SimpleITK.DICOMOrient(image, "LPS")
    direction = np.reshape(expected.GetDirection(), (3, 3))
    if np.linalg.det(direction) < 0 or np.abs(np.diag(direction)).min() < 0.75:
        return  # ITK's greedy choice and ours may differ near 45°
    path = tmp_path / "x.nrrd"
    SimpleITK.WriteImage(image, str(path))
    read = read_volume(path)
    np.testing.assert_array_equal(read.hu, SimpleITK.GetArrayFromImage(expected))
    np.testing.assert_allclose(read.spacing_mm, expected.GetSpacing()[::-1], rtol=1e-5)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_every_format_keeps_size_origin_spacing_and_direction(tmp_path, suffix) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((0.7, 0.8, 5.0))
    image.SetOrigin((-120.5, 33.0, 710.25))
    image.SetDirection(rotation(3, 0.2).ravel())
    SimpleITK.WriteImage(image, str(tmp_path / f"x_0000{suffix}"))
    read = read_volume(tmp_path / f"x_0000{suffix}")
    np.testing.assert_array_equal(read.hu, array)
    write_mask(read.hu > 0, read.geometry, tmp_path / "x.nii.gz")
    mask = SimpleITK.ReadImage(str(tmp_path / "x.nii.gz"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(mask), array > 0)
    assert mask.GetSize() == image.GetSize()
    for ours, theirs in zip(
        (mask.GetSpacing(), mask.GetOrigin(), mask.GetDirection()),
        (image.GetSpacing(), image.GetOrigin(), image.GetDirection()),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("scan", ["crlm", "abdomen"])
def test_real_scans_keep_their_grid(data_dir, tmp_path, scan) -> None:
    for path in sorted((data_dir / scan / "images").glob("*.nii.gz")):
        read = read_volume(path)
        write_mask(read.hu > 100, read.geometry, tmp_path / "mask.nii.gz")
        image, mask = SimpleITK.ReadImage(str(path)), SimpleITK.ReadImage(str(tmp_path / "mask.nii.gz"))
        for name in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
            assert getattr(mask, name)() == getattr(image, name)()
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(mask), SimpleITK.GetArrayFromImage(image) > 100)
        body = SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(image, "LPS"))[read.box]
        np.testing.assert_array_equal(read.body, body)


def test_a_direction_that_itk_refuses_is_kept_bit_for_bit(tmp_path) -> None:
    affine = np.array([[-0.8, 0.004, 0, 90], [0.001, -0.8, 0.003, 80], [0, 0, 3, -500], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), affine)
    image.set_qform(None, code=0)  # ITK falls back on the qform where there is one
    nib.save(image, tmp_path / "x_0000.nii.gz")
    with pytest.raises(RuntimeError, match="orthonormal"):
        SimpleITK.ReadImage(str(tmp_path / "x_0000.nii.gz"))
    read = read_volume(tmp_path / "x_0000.nii.gz")
    assert (read.geometry.axes, read.geometry.flips) == ((2, 1, 0), (False, False, False))
    write_mask(read.hu > 11, read.geometry, tmp_path / "x.nii.gz")
    mask, scan = nib.load(tmp_path / "x.nii.gz"), nib.load(tmp_path / "x_0000.nii.gz")
    for row in ("srow_x", "srow_y", "srow_z"):
        assert mask.header[row].tobytes() == scan.header[row].tobytes()
    np.testing.assert_array_equal(mask.get_fdata(), np.arange(24).reshape(2, 3, 4) > 11)


def test_canonical_axes_by_hand() -> None:
    # NIfTI's own RAS identity: i to the right-left axis backwards of LPS x, j backwards of y, k upwards.
    assert canonical_axes(np.eye(3)) == ((2, 1, 0), (False, True, True))
    # file axes k, i, j of an LPS scan
    assert canonical_axes(np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0.0]])) == ((0, 2, 1), (False, False, False))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_every_voxel_type_becomes_hu(tmp_path, dtype) -> None:
    values = np.array([[[0, 1, 100]]]).astype(dtype)
    np.testing.assert_array_equal(read_volume(write_nifti(tmp_path / "x.nii", values, np.eye(4))).hu.max(), 100)


def test_values_are_rounded_scaled_and_clipped(tmp_path) -> None:
    floats = np.array([-3024.0, -0.6, 0.4, 41.5, 1e9]).reshape(5, 1, 1)
    read = read_volume(write_nifti(tmp_path / "a.nii.gz", floats, np.diag([-1, -1, 1, 1.0])))
    assert read.hu.ravel().tolist() == [-1024, -1, 0, 42, 32767]
    big = np.array([0, 40000, 65535], np.uint16).reshape(3, 1, 1)
    assert read_volume(write_nifti(tmp_path / "b.nii", big, np.diag([-1, -1, 1, 1.0]))).hu.max() == 32767
    image = nib.Nifti1Image(np.array([0, 1000], np.int16).reshape(2, 1, 1), np.diag([-1, -1, 1, 1.0]))
    image.header.set_slope_inter(2, -1000)
    nib.save(image, tmp_path / "c.nii")
    stored = nib.load(tmp_path / "c.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "c.nii").hu.ravel(), stored.get_fdata().ravel())


def test_one_volume_of_a_4d_file_is_read(tmp_path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    write_nifti(tmp_path / "x.nii.gz", array, np.diag([-1, -1, 1, 1.0]))
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii.gz").hu, array[..., 0].T)


@pytest.mark.parametrize("shape", [(40, 40, 1), (3, 40, 40), (1, 1, 2)])
@pytest.mark.parametrize("thickness", [0.3, 10.0])
def test_thin_volumes_are_read(tmp_path, shape, thickness) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, shape).astype(np.int16)
    read = read_volume(write_nifti(tmp_path / "x.nii.gz", hu, np.diag([-1, -1, thickness, 1.0])))
    assert read.spacing_mm == pytest.approx((thickness, 1, 1), rel=1e-6)
    assert read.body.size


def test_body_box_holds_trunk_and_arm_and_drops_air_and_a_wire() -> None:
    hu = np.full((20, 256, 256), -1000, np.int16)
    hu[:, 60:180, 40:200] = 40  # trunk
    hu[:, 90:110, 4:20] = 40  # an arm apart from it
    hu[3, 230:250, 240:242] = 500  # a wire
    _, rows, columns = body_box(hu)
    assert rows.start <= 60
    assert 180 <= rows.stop < 240
    assert columns.start <= 4
    assert 200 <= columns.stop < 230
    assert body_box(np.full((2, 3, 4), -1000, np.int16)) == (slice(0, 2), slice(0, 3), slice(0, 4))


@relaxed
@given(st.integers(0, 2**31))
def test_body_box_never_loses_a_voxel_of_the_largest_thing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hu = np.full((6, 300, 280), -1000, np.int16)
    start, size = rng.integers(0, 150, 2), rng.integers(30, 120, 2)
    body = (slice(None), slice(start[0], start[0] + size[0]), slice(start[1], start[1] + size[1]))
    hu[body] = 30
    box = body_box(hu)
    assert (hu[box] > 0).sum() == (hu > 0).sum()


def test_equal_masks_are_equal_bytes(tmp_path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (9, 8, 7)).astype(np.int16)
    read = read_volume(write_nifti(tmp_path / "x_0000.nii.gz", hu, np.eye(4)))
    write_mask(read.hu > 0, read.geometry, tmp_path / "a.nii.gz")
    write_mask(read.hu > 0, read.geometry, tmp_path / "b.nii.gz")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing_and_spares_the_old_mask(tmp_path, monkeypatch, broken) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (9, 8, 7)).astype(np.int16)
    read = read_volume(write_nifti(tmp_path / "x_0000.nii.gz", hu, np.eye(4)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.nii.gz").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if broken == "fsync" else Path, broken, fail)
    with pytest.raises(OSError, match="No space"):
        write_mask(read.hu > 0, read.geometry, tmp_path / "out" / "x.nii.gz")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.nii.gz"]
    assert (tmp_path / "out" / "x.nii.gz").read_bytes() == b"old"


def test_a_label_is_read_on_its_scans_grid_or_refused(tmp_path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (5, 6, 7)).astype(np.int16)
    read = read_volume(write_nifti(tmp_path / "x_0000.nii.gz", hu, np.diag([1, -1, 2, 1.0])))
    path = write_nifti(tmp_path / "x.nii.gz", (hu > 0).astype(np.uint8), np.diag([1, -1, 2, 1.0]))
    np.testing.assert_array_equal(read_label(path, read.geometry), read.hu > 0)
    for name, array, spacing in (("shape", hu[:4], 2.0), ("spacing", hu, 3.0)):
        other = write_nifti(tmp_path / f"{name}.nii.gz", (array > 0).astype(np.uint8), np.diag([1, -1, spacing, 1.0]))
        with pytest.raises(ValueError, match=f"{name}.nii.gz: not on the grid"):
            read_label(other, read.geometry)


@pytest.mark.parametrize(("code", "unit_mm"), [(0, 1.0), (2, 1.0), (1, 1000.0), (3, 0.001), (8, 1.0), (11, 0.001)])
def test_units_of_length_are_minded(tmp_path, code: int, unit_mm: float) -> None:
    """xyzt_units: 1 m, 2 mm, 3 µm; 8 adds seconds."""
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([0.8, 0.9, 3, 1.0]) / unit_mm)
    image.header["xyzt_units"] = code
    nib.save(image, tmp_path / "x.nii")
    assert read_volume(tmp_path / "x.nii").spacing_mm == pytest.approx((3, 0.9, 0.8), rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 100.0, 352.0])
def test_voxels_never_start_within_the_header(tmp_path, offset: float) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (5, 6, 7)).astype(np.int16)
    content = bytearray(nib.Nifti1Image(hu, np.eye(4)).to_bytes())
    content[108:112] = np.float32(offset).tobytes()
    (tmp_path / "x.nii").write_bytes(bytes(content))
    read = read_volume(tmp_path / "x.nii")
    np.testing.assert_array_equal(read.geometry.to_file(read.hu), hu)


def test_names() -> None:
    names = ("a_0000.nii.gz", "a.b_0000.nii", "a.mha", "FLARE_0001_0000.nrrd", "x_0000_0000.nii.gz")
    assert [case_name(Path(n)) for n in names] == ["a", "a.b", "a", "FLARE_0001", "x_0000"]
    assert not is_scan(Path(".x.nii.gz.part"))
    assert not is_scan(Path(".hidden.nii.gz"))
    assert not is_scan(Path("notes.txt"))
