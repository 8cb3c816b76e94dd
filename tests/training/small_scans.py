"""A FLARE folder of four small scans, to make mistakes with."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (24, 20, 8)  # x, y, z of the file


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([4.0, 4.0, 6.0, 1.0])), path)


def a_label() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[8:14, 8:12, 3:6] = 1
    return label


def write_folder(folder: Path) -> Path:
    """Scans a, b, c and d: noise in a body, all with a lesion."""
    rng = np.random.default_rng(0)
    for name in "abcd":
        hu = np.full(SHAPE, -1000, np.int16)
        hu[2:-2, 2:-2] = rng.normal(40, 10, (20, 16, 8))
        write(folder / f"imagesTr/{name}_0000.nii.gz", hu)
        write(folder / f"labelsTr/{name}.nii.gz", a_label())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
