"""The sarcoma scans of a `data` folder (sts/images, sts/labels, splits.json) as a FLARE folder.

    python training/recipes/sts.py DATA OUT [--part val] [--crops 8]

The training scans were cut 5 cm around each tumour, so that the borders tell where it is. With `--crops`, each comes so
many times, of each of its six margins another random share cut away, as it was done to the validation scans; but the
last four patients once, since those are what a training validates on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import tyro
from tqdm import tqdm
from tyro.conf import Positional

from inference.fusion import bounding_box
from training.data import Entry, link, write_rows

FOLDERS = ("imagesTr", "labelsTr")
HELD_OUT = 4  # patients


def entry(folder: Path, name: str) -> Entry:
    return Entry(name, folder / "images" / f"{name}_0000.nii.gz", folder / "labels" / f"{name}.nii.gz", None)


def crop(case: Entry, out: Path, name: str, seed: tuple[int, ...]) -> Entry:
    """Write the scan and its label cut by the same random box, which holds all of the tumour."""
    assert case.label is not None
    scan, label = (nib.Nifti1Image.from_filename(path) for path in (case.scan, case.label))
    box = random_box(np.asanyarray(label.dataobj), np.random.default_rng(seed))
    scan_path, label_path = out / FOLDERS[0] / f"{name}_0000.nii.gz", out / FOLDERS[1] / f"{name}.nii.gz"
    nib.save(scan.slicer[box], scan_path)
    nib.save(label.slicer[box], label_path)
    return Entry(name, scan_path, label_path, None, patient=case.name)


def random_box(label: np.ndarray, rng: np.random.Generator) -> tuple[slice, ...]:
    """A box of a mask's array around all of the mask, with a random share of each margin."""
    around = bounding_box(label)
    assert around is not None
    return tuple(
        slice(int(rng.integers(0, used.start, endpoint=True)), int(rng.integers(used.stop, size, endpoint=True)))
        for used, size in zip(around, label.shape, strict=True)
    )


def main(
    data: Positional[Path], out: Positional[Path], part: Literal["train", "val"] = "train", crops: int = 0
) -> None:
    cases = [entry(data / "sts", name) for name in json.loads((data / "splits.json").read_text())["sts"][part]]
    if not crops:
        link(cases, out)
        return
    (out / "cases.csv").unlink(missing_ok=True)  # written last, when all is there
    for folder in FOLDERS:
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    made = [
        crop(case, out, f"{case.name}_{number}", (index, number))
        for index, case in enumerate(tqdm(cases, unit="case"))
        for number in range(crops if index < len(cases) - HELD_OUT else 1)
    ]
    write_rows(out, made)


if __name__ == "__main__":
    tyro.cli(main)
