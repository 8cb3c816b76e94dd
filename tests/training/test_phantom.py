"""Phantoms: reproducible, plausible in HU, and with labels that lie where the lesions were painted."""

import csv
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from training.anatomy import Organ
from training.grid import Grid
from training.lesions import SITE_CODE, VOLUME_ML
from training.phantom import Phantom, Scanner, Settings, is_healthy, main, make_phantom, noise_sd, write_flare
from training.scene import Material, Part, render
from training.shapes import Ellipsoid, SmoothField, Tube

SMALL = Scanner((40, 77, 77), (6.0, 5.0, 5.0), noise_hu=8.0, kernel_mm=1.0, top_mm=140.0)
"""240×385×385 mm from the lung bases to the pelvis, in a fraction of a second."""


@pytest.fixture(scope="module")
def diseased() -> list[Phantom]:
    return [make_phantom(seed, healthy=False, scanner=SMALL) for seed in range(6)]


def voxel_ml(spacing_mm: tuple[float, float, float]) -> float:
    return float(np.prod(spacing_mm)) / 1000


def test_same_seed_same_phantom() -> None:
    one, two, other = (make_phantom(seed, scanner=SMALL) for seed in (7, 7, 8))
    for name in ("hu", "lesions", "organs", "sites"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.drawn == two.drawn
    assert (one.hu != other.hu).mean() > 0.5


def test_types_and_shapes(diseased: list[Phantom]) -> None:
    phantom = diseased[0]
    assert phantom.hu.dtype == np.int16
    assert phantom.hu.shape == phantom.lesions.shape == phantom.organs.shape == SMALL.shape
    assert phantom.lesions.dtype == phantom.organs.dtype == phantom.sites.dtype == np.uint8
    assert set(np.unique(phantom.lesions)) == {0, 1}
    assert phantom.hu.min() >= -1024
    assert phantom.hu.max() <= 3071


def test_healthy_has_no_label() -> None:
    phantom = make_phantom(3, healthy=True, scanner=SMALL)
    assert phantom.healthy
    assert not phantom.lesions.any()
    assert phantom.drawn == ()
    assert phantom.lesion_type == "none"


def test_about_a_quarter_is_healthy() -> None:
    assert 0.2 < np.mean([is_healthy(seed) for seed in range(500)]) < 0.3
    drawn = [make_phantom(seed, scanner=SMALL) for seed in (0, 1, 2)]
    assert [p.healthy for p in drawn] == [is_healthy(seed) for seed in (0, 1, 2)]


def test_lesions_have_their_volumes(diseased: list[Phantom]) -> None:
    for phantom in diseased:
        assert 1 <= len(phantom.drawn) <= 6
        assert all(VOLUME_ML[0] <= lesion.volume_ml <= VOLUME_ML[1] for lesion in phantom.drawn)
        painted = phantom.lesions.sum() * voxel_ml(phantom.spacing_mm)
        drawn = sum(lesion.volume_ml for lesion in phantom.drawn)
        # Bone, wall or air may cut a lesion's edge; voxels of 150 µl round small ones.
        assert 0.6 * drawn - 0.4 <= painted <= 1.15 * drawn + 0.4


def test_lesions_are_painted_where_labelled() -> None:
    """The same patient without lesions differs inside the label, and hardly anywhere else."""
    quiet = replace(SMALL, noise_hu=0.0)
    for seed in range(4):
        ill, well = (make_phantom(seed, healthy=h, scanner=quiet) for h in (False, True))
        difference = np.abs(ill.hu.astype(float) - well.hu)
        inside = ill.lesions > 0
        assert np.median(difference[inside]) > 8
        assert (difference[~inside] > 5).mean() < 0.01


def test_solid_lesions_are_not_watery(diseased: list[Phantom]) -> None:
    assert all(lesion.hu >= 25 for phantom in diseased for lesion in phantom.drawn)


def test_label_by_site(diseased: list[Phantom]) -> None:
    for phantom in diseased:
        everything = phantom.annotated_by_site(*SITE_CODE)
        np.testing.assert_array_equal(everything, phantom.lesions)
        drawn = {lesion.site for lesion in phantom.drawn}
        absent = [site for site in SITE_CODE if site not in drawn]
        assert not phantom.annotated_by_site(*absent).any()


@pytest.mark.parametrize(
    ("organ", "low", "high"),
    [
        (Organ.AIR, -1010, -940),
        (Organ.FAT, -125, -70),
        (Organ.LUNG, -900, -700),
        (Organ.MUSCLE, 25, 90),
        (Organ.LIVER, 5, 150),
        (Organ.BONE, 150, 700),
    ],
)
def test_hu_of_organs(diseased: list[Phantom], organ: Organ, low: float, high: float) -> None:
    for phantom in diseased:
        values = phantom.hu[(phantom.organs == organ) & (phantom.lesions == 0)]
        assert values.size > 100
        assert low < np.median(values) < high


def test_lesion_volume_does_not_depend_on_the_grid() -> None:
    fine = Scanner((120, 192, 192), (2.0, 2.0, 2.0), noise_hu=0.0, top_mm=140.0)
    coarse = Scanner((48, 128, 128), (5.0, 3.0, 3.0), noise_hu=0.0, top_mm=140.0)
    for seed in (1, 2):
        one, two = (make_phantom(seed, healthy=False, scanner=s) for s in (fine, coarse))
        assert one.drawn == two.drawn
        volumes = [p.lesions.sum() * voxel_ml(p.spacing_mm) for p in (one, two)]
        assert volumes[1] == pytest.approx(volumes[0], rel=0.12, abs=0.15)


def test_noise_of_a_coarse_scan_is_that_of_an_averaged_fine_one() -> None:
    fine = Scanner((4, 512, 512), (3.0, 0.8, 0.8), noise_hu=14.0, kernel_mm=0.1)
    coarse = replace(fine, shape=(4, 256, 256), spacing_mm=(3.0, 1.6, 1.6))
    assert noise_sd(fine) == pytest.approx(14.0)
    assert noise_sd(coarse) == pytest.approx(7.0, rel=0.05)  # white noise: 2×2 averaging halves it
    thin = replace(fine, spacing_mm=(0.75, 0.8, 0.8))
    assert noise_sd(thin) == pytest.approx(28.0)
    smooth = replace(coarse, kernel_mm=2.0)
    assert 7.0 < noise_sd(smooth) < 14.0  # shared noise averages out less


def test_a_painted_ball_has_its_volume_and_soft_edges() -> None:
    axes = tuple(np.arange(-20, 20, s, dtype=np.float32) + s / 2 for s in (2.5, 1.0, 1.0))
    ball = Part(Ellipsoid((0, 0, 0), (12, 12, 12)), [(0.0, Material(100.0))], organ=6)
    canvas = render([ball], (axes[0], axes[1], axes[2]), psf_mm=0.5, texture_seed=0)
    volume = 4 / 3 * np.pi * 12**3
    assert (canvas.organs == 6).sum() * 2.5 == pytest.approx(volume, rel=0.03)
    assert ((canvas.hu + 1000) / 1100).sum() * 2.5 == pytest.approx(volume, rel=0.04)
    assert ((canvas.hu > -900) & (canvas.hu < 0)).any()


def test_distances_are_in_mm() -> None:
    line = np.linspace(-30, 30, 61, dtype=np.float32)
    axes = (np.zeros(1, np.float32), np.zeros(1, np.float32), line)
    ball = Ellipsoid((0, 0, 0), (5, 8, 10)).distance(Grid(axes))[0, 0]
    tube = Tube.along([(-50, 0, 0), (50, 0, 0)], 10.0).distance(Grid(axes))[0, 0]
    near = np.abs(np.abs(line) - 10) <= 3
    np.testing.assert_allclose(ball[near], np.abs(line[near]) - 10, atol=1e-3)
    np.testing.assert_allclose(tube[near], np.abs(line[near]) - 10, atol=1e-3)


def test_smooth_field_is_the_same_on_every_grid() -> None:
    field = SmoothField(np.random.default_rng(0), step_mm=10.0)
    axis = np.arange(-60, 60, 1.0, dtype=np.float32)
    fine = field.sample(Grid((axis, axis, axis)))
    coarse = field.sample(Grid((axis[::3], axis[::2], axis)))
    np.testing.assert_allclose(coarse[5, 7], fine[15, 14], atol=1e-5)
    assert fine.std() == pytest.approx(1.0, rel=0.25)


def test_drawn_scanners_are_clinical() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scanner, small = Scanner.random(rng), Scanner.training(rng)
        assert scanner.shape[1] == scanner.shape[2] <= 512
        assert 0.59 <= scanner.spacing_mm[1] <= 0.99
        assert 1 <= scanner.spacing_mm[0] <= 5
        assert 140 <= scanner.field_mm[0] <= 400
        assert small.shape[1:] == (256, 256)
        assert 48 <= small.shape[0] <= 96
        assert 300 <= small.field_mm[2] <= 450
    assert Scanner.demo().shape == (100, 512, 512)


def test_thin_slices_can_be_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    drawn = [Scanner.random(rng) for _ in range(40)]
    thick = [scanner for scanner in drawn if scanner.spacing_mm[0] >= 2.5]
    assert drawn[0] not in thick
    assert Scanner.random(np.random.default_rng(3), thinnest_mm=2.5) == thick[0]
    with pytest.raises(ValueError, match="--thinnest-mm 6: no slice is thicker than 5 mm"):
        main(Settings(tmp_path, 1, thinnest_mm=6.0))
    with pytest.raises(ValueError, match="leave --thinnest-mm out"):
        main(Settings(tmp_path, 1, thinnest_mm=3.0, network_grid=True))
    assert not any(tmp_path.iterdir())  # nothing is touched before what was asked for is known to make sense
    main(Settings(tmp_path, 1, seed=2, healthy_share=1.0, thinnest_mm=5.0))
    (scan,) = (tmp_path / "imagesTr").iterdir()
    assert nib.load(scan).header.get_zooms()[2] == 5


def test_flare_files(tmp_path: Path, diseased: list[Phantom]) -> None:
    phantom = diseased[0]
    write_flare(phantom, tmp_path, "case")
    image = nib.load(tmp_path / "imagesTr" / "case_0000.nii.gz")
    label = nib.load(tmp_path / "labelsTr" / "case.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), phantom.hu)
    np.testing.assert_array_equal(np.asarray(label.dataobj).transpose(2, 1, 0), phantom.lesions)
    for file in (image, label):
        # LPS identity: NIfTI's RAS affine with x and y negated is spacing times the identity.
        lps = np.diag([-1.0, -1.0, 1.0]) @ file.affine[:3, :3]
        np.testing.assert_allclose(lps, np.diag(phantom.spacing_mm[::-1]), atol=1e-6)


def test_dataset_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scanner, "random", classmethod(lambda *_: SMALL))
    main(Settings(tmp_path, count=3, seed=5, healthy_share=0.5, partial_share=1.0))
    with (tmp_path / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["phantom_000005", "phantom_000006", "phantom_000007"]
    for row in rows:
        assert set(row) == {"case", "annotated", "healthy", "lesion_type", "patient", "pseudo"}
        assert row["pseudo"] == "0"
        assert row["annotated"] == ("complete" if row["healthy"] == "1" else "partial")
        assert (tmp_path / "imagesTr" / f"{row['case']}_0000.nii.gz").exists()
        label, complete = (
            np.asarray(nib.load(tmp_path / part / f"{row['case']}.nii.gz").dataobj)
            for part in ("labelsTr", "completeTr")
        )
        assert complete[label > 0].all()
        assert (label != complete).any() == (row["lesion_type"] == "mixed")
        assert label.any() == (row["healthy"] == "0") == (row["lesion_type"] != "none")
