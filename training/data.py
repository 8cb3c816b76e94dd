"""A folder in FLARE layout: `imagesTr/X_0000.nii.gz`, `labelsTr/X.nii.gz`, and of phantoms also `organsTr/X.nii.gz`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inference.volume import case_name, is_scan, read_label, read_volume
from training.organs import UNKNOWN


@dataclass(frozen=True)
class Case:
    """An annotated scan, cropped to the body; arrays are (z, y, x) as `volume.py` orients.

    hu: int16; label: uint8 {0, 1}; organs: uint8 `anatomy.Organ`, `organs.UNKNOWN` all over where nobody knows.
    """

    name: str
    hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    organs: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


def case_names(folder: Path) -> list[str]:
    """Names of the scans that have a label, sorted. ValueError where there is none."""
    scans = {case_name(path): path for path in sorted((folder / "imagesTr").glob("*")) if is_scan(path)}
    names = [name for name in scans if (folder / "labelsTr" / f"{name}.nii.gz").exists()]
    if not names:
        raise ValueError(f"{folder}: no scan in imagesTr has a mask in labelsTr: name a folder in FLARE layout")
    return names


def load_case(folder: Path, name: str) -> Case:
    """Read scan, label and, where there are any, organs of a case, which must lie on the same grid."""
    volume = read_volume(folder / "imagesTr" / f"{name}_0000.nii.gz")
    label = read_label(folder / "labelsTr" / f"{name}.nii.gz", volume.geometry)[volume.box]
    organs = np.full_like(label, UNKNOWN)
    if (path := folder / "organsTr" / f"{name}.nii.gz").exists():
        organs = read_label(path, volume.geometry)[volume.box]
    return Case(name, volume.body, (label > 0).astype(np.uint8), organs, volume.spacing_mm)
