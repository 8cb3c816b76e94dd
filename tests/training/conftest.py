"""A small folder of scans for the training's tests."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from training.anatomy import Organ


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six scans of 150×150×60 mm, four with a bright cube; the organs of all but the last are known."""
    root = tmp_path_factory.mktemp("flare")
    for part in ("imagesTr", "labelsTr", "organsTr"):
        (root / part).mkdir()
    for index in range(6):
        rng = np.random.default_rng(index)
        hu = rng.normal(0, 10, (50, 50, 20))
        label = np.zeros(hu.shape, np.uint8)
        if index < 4:
            i, j, k = rng.integers(5, 25, 3) // np.array([1, 1, 3])
            label[i : i + 15, j : j + 15, k : k + 8] = 1
        hu[label > 0] += 150
        affine = np.diag([-3.0, -3.0, 3.0, 1.0])
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), root / "imagesTr" / f"c{index}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), root / "labelsTr" / f"c{index}.nii.gz")
        if index < 5:
            organs = np.where(label, Organ.LIVER, Organ.SPLEEN).astype(np.uint8)
            nib.save(nib.Nifti1Image(organs, affine), root / "organsTr" / f"c{index}.nii.gz")
    return root
