"""Drawn lesions in a scan: where they may lie, what they look like, and that nothing annotated is harmed."""

from __future__ import annotations

from pathlib import Path

import cc3d
import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from training.anatomy import Organ
from training.data import Case, Entry, load_case, read_folder
from training.implant import GAP_MM, Settings, implant, main, random_crop
from training.organs import UNKNOWN

SPACING_MM = (3.0, 1.5, 1.5)


def scan(lung: bool = False) -> Case:
    """Muscle of 50 ± 12 HU with one annotated cube, in fat; or all lung of −850 HU."""
    rng = np.random.default_rng(0)
    hu = np.full((40, 80, 80), -850.0 if lung else -100.0)
    label = np.zeros(hu.shape, np.uint8)
    if not lung:
        hu[:, 10:70, 10:70] = 50
        label[15:20, 20:30, 20:30] = 1
    hu += rng.normal(0, 12, hu.shape)
    return Case(Entry("x", Path("x"), None, None), hu.astype(np.int16), label, label, SPACING_MM)


def test_lesions_lie_in_soft_tissue_and_apart() -> None:
    case, drawn = scan(), 0
    for seed in range(12):
        hu, label = implant(np.random.default_rng(seed), case)
        assert label[case.label > 0].all()
        added = (label > 0) & (case.label == 0)
        parts, count = cc3d.connected_components(added, connectivity=26, return_N=True)
        assert count <= 4
        drawn += count
        for part in range(1, count + 1):
            inside = parts == part
            assert (case.hu[inside] > -40).mean() > 0.6
            others = (label > 0) & ~inside
            gap = distance_transform_edt(~others, sampling=SPACING_MM)[inside].min()
            assert gap > GAP_MM / 2  # the shape bulges out of the ball that was placed
        far = distance_transform_edt(~added, sampling=SPACING_MM) > 15  # distances to a drawn shape are not exact
        np.testing.assert_array_equal(hu[far], case.hu[far])
    assert drawn > 12


def test_a_lesion_has_another_hu_and_the_scans_noise() -> None:
    case = scan()
    contrasts = []
    for seed in range(12):
        hu, label = implant(np.random.default_rng(seed), case)
        core = distance_transform_edt((label > 0) & (case.label == 0), sampling=SPACING_MM) > 5
        parts, count = cc3d.connected_components(core, connectivity=26, return_N=True)
        for inside in (parts == part for part in range(1, count + 1)):
            if inside.sum() > 100:
                contrasts.append(float(hu[inside].mean() - 50))
                assert 5 < hu[inside].std() < 20
    assert min(np.abs(contrasts)) > 10
    assert min(contrasts) < 0 < max(contrasts)


def test_nodules_of_soft_tissue_in_lung() -> None:
    found = [implant(np.random.default_rng(seed), scan(lung=True)) for seed in range(12)]
    cores = [hu[distance_transform_edt(label, sampling=SPACING_MM) > 5] for hu, label in found if label.any()]
    values = np.concatenate(cores)
    assert len(values) > 0
    assert -60 < values.mean() < 120


def test_a_crop_keeps_the_lesion_and_hides_where_it_lay() -> None:
    case = scan()
    starts = set()
    for seed in range(20):
        cropped = random_crop(np.random.default_rng(seed), case)
        assert cropped.label.sum() == case.label.sum()
        assert cropped.hu.shape == cropped.label.shape
        starts.add(int(np.argwhere(cropped.label)[:, 1].min()))
    assert len(starts) > 8
    whole = random_crop(np.random.default_rng(0), scan(lung=True))
    assert min(np.array(whole.hu.shape) / (40, 80, 80)) > 0.6


def test_the_command_writes_a_folder_that_is_read_again(folder, tmp_path) -> None:
    main(Settings(folder, tmp_path / "out", count=7, seed=3))
    entries = read_folder(tmp_path / "out")
    assert [entry.name for entry in entries] == [
        "c0_0000", "c0_0006", "c1_0001", "c2_0002", "c3_0003", "c4_0004", "c5_0005"
    ]  # fmt: skip
    cases = [load_case(entry) for entry in entries]
    assert all(case.spacing_mm == pytest.approx((3, 3, 3)) for case in cases)
    given = np.asarray(nib.load(folder / "labelsTr" / "c1.nii.gz").dataobj)
    assert cases[2].label.sum() >= given.sum()
    assert (cases[2].organs == Organ.LIVER).sum() == given.sum()
    assert (cases[-1].organs == UNKNOWN).all()
    main(Settings(folder, tmp_path / "again", count=1, seed=3))
    again = load_case(read_folder(tmp_path / "again")[0])
    np.testing.assert_array_equal(again.hu, cases[0].hu)
