"""The sarcoma scans of a `data` folder (sts/images, sts/labels, splits.json) as a FLARE folder.

    python training/recipes/sts.py DATA OUT [train|val] [CROPS]

The training scans were cut 5 cm around each tumour, so that the borders tell where it is. With CROPS, each comes so
many times, of each of its six margins another random share cut away, as it was done to the validation scans.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from training.data import Entry, link, write_rows

FOLDERS = ("imagesTr", "labelsTr")


def entry(folder: Path, name: str) -> Entry:
    return Entry(name, folder / "images" / f"{name}_0000.nii.gz", folder / "labels" / f"{name}.nii.gz", None)


def crop(case: Entry, out: Path, name: str, seed: tuple[int, ...]) -> Entry:
    """Write the scan and its label cut by the same random box, which holds all of the tumour."""
    scan, label = nib.Nifti1Image.from_filename(case.scan), nib.Nifti1Image.from_filename(case.label)
    box = random_box(np.asanyarray(label.dataobj), np.random.default_rng(seed))
    made = Entry(name, out / FOLDERS[0] / f"{name}_0000.nii.gz", out / FOLDERS[1] / f"{name}.nii.gz", None)
    nib.save(scan.slicer[box], made.scan)
    nib.save(label.slicer[box], made.label)
    return Entry(name, made.scan, made.label, None, patient=case.name)


def random_box(label: np.ndarray, rng: np.random.Generator) -> tuple[slice, ...]:
    """A box of a mask's array around all of the mask, with a random share of each margin."""
    box = []
    for axis in range(label.ndim):
        used = np.flatnonzero(label.any(axis=tuple(other for other in range(label.ndim) if other != axis)))
        low = rng.integers(0, used[0], endpoint=True)
        high = rng.integers(used[-1] + 1, label.shape[axis], endpoint=True)
        box.append(slice(int(low), int(high)))
    return tuple(box)


def main(data: Path, out: Path, part: str = "train", crops: int = 0) -> None:
    cases = [entry(data / "sts", name) for name in json.loads((data / "splits.json").read_text())["sts"][part]]
    if not crops:
        link(cases, out)
        return
    for folder in FOLDERS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    made = [
        crop(case, out, f"{case.name}_{number}", (index, number))
        for index, case in enumerate(tqdm(cases, unit="case"))
        for number in range(crops)
    ]
    write_rows(out, made)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:5]))
