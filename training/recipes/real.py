"""The real scans of a `data` folder (sts, abdomen, splits.json) as FLARE folders to train and to calibrate on.

    python training/recipes/real.py DATA OUT

OUT/sarcomas: the training scans. They were cut 5 cm around each tumour, so that the borders tell where it is: each
comes several times, of each of its six margins another random share cut away, as it was done to the validation scans;
but the last six patients once, since those are what a training validates on. OUT/sarcomas_held_out: those six again, to
choose thresholds on.
OUT/implants: drawn lesions in the other sarcoma scans, for a real scanner's texture, and in the abdomen, whose name is
the last, so that a training validates on it: what it finds in a region of the body that it knows from phantoms only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import tyro
from tqdm import tqdm
from tyro.conf import Positional

from inference.fusion import bounding_box
from training import implant
from training.data import Entry, write_rows

PARTS = ("imagesTr", "labelsTr")
HELD_OUT = 6  # patients


def entry(folder: Path, name: str) -> Entry:
    return Entry(name, folder / "images" / f"{name}_0000.nii.gz", folder / "labels" / f"{name}.nii.gz", None)


def crop(case: Entry, out: Path, name: str, seed: tuple[int, ...]) -> Entry:
    """Write the scan and its label cut by the same random box, which holds all of the tumour."""
    assert case.label is not None
    scan, label = (nib.Nifti1Image.from_filename(path) for path in (case.scan, case.label))
    box = random_box(np.asanyarray(label.dataobj), np.random.default_rng(seed))
    scan_path, label_path = out / PARTS[0] / f"{name}_0000.nii.gz", out / PARTS[1] / f"{name}.nii.gz"
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


def write_crops(cases: list[Entry], out: Path, counts: list[int], seed: int) -> None:
    """A FLARE folder with so many random crops of each case."""
    fresh(out)
    wanted = [(case, index, number) for index, case in enumerate(cases) for number in range(counts[index])]
    bar = tqdm(wanted, desc=out.name, unit="crop")
    write_rows(out, [crop(case, out, f"{case.name}_{n}", (seed, index, n)) for case, index, n in bar])


def write_implants(cases: list[Entry], out: Path, each: int, first: int = 0) -> list[Entry]:
    """So many scans of each case with drawn lesions, in a FLARE folder whose rows are yet to be written."""
    settings = implant.Settings(Path(), out, each * len(cases), seed=first)
    return [implant.make(cases, settings, n) for n in tqdm(range(settings.count), desc=out.name, unit="scan")]


def fresh(folder: Path) -> None:
    """Empty, without `cases.csv`, which is written last, when all is there."""
    (folder / "cases.csv").unlink(missing_ok=True)
    for part in PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)


def main(data: Positional[Path], out: Positional[Path], crops: int = 8) -> None:
    names = json.loads((data / "splits.json").read_text())["sts"]["train"]
    cases = [entry(data / "sts", name) for name in names]
    learnt, kept = cases[:-HELD_OUT], cases[-HELD_OUT:]
    write_crops(cases, out / "sarcomas", [crops] * len(learnt) + [1] * len(kept), seed=0)
    write_crops(kept, out / "sarcomas_held_out", [2] * len(kept), seed=1)
    fresh(out / "implants")
    abdomen = [
        # a lesion that nobody looked for may be in it: what is drawn is not all there is to know
        Entry(path.name.removesuffix("_0000.nii.gz"), path, None, None, "partial")
        for path in sorted((data / "abdomen" / "images").glob("*_0000.nii.gz"))
    ]
    made = [
        *write_implants(abdomen, out / "implants", each=5 * crops),
        *write_implants(learnt, out / "implants", each=2, first=1),
    ]
    write_rows(out / "implants", made)


if __name__ == "__main__":
    tyro.cli(main)
