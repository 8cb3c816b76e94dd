"""The real scans of a `data` folder (sts, abdomen, splits.json) as FLARE folders to train and to calibrate on.

    python training/recipes/real.py DATA OUT

OUT/sarcomas: the training scans. They were cut 5 cm around each tumour, so that the borders tell where it is: each
comes several times, of each of its six margins another random share cut away, as it was done to the validation scans;
but the last six patients once, since those are what a training validates on. OUT/sarcomas_held_out: those six again, to
choose thresholds on.
OUT/implants: drawn lesions in the other sarcoma scans, for a real scanner's texture. OUT/abdomen: the same in the one
scan of an abdomen, with its organs, which a network has to tell from lesions; one patient, so that a training learns
from all of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import tyro
from tqdm import tqdm
from tyro.conf import Positional

from inference.fusion import bounding_box
from training import implant
from training.anatomy import Organ
from training.data import Entry, list_scans, unlisted
from training.organs import UNKNOWN
from training.splits import scans_of

PARTS = ("imagesTr", "labelsTr", "organsTr")
HELD_OUT = 6  # patients
ORGANS: dict[Organ, tuple[int, ...]] = {  # what the scan shows, in TotalSegmentator's codes (`total`, version 2)
    Organ.SPLEEN: (1,),
    Organ.KIDNEY: (2, 3),
    Organ.GALLBLADDER: (4,),
    Organ.LIVER: (5,),
    Organ.STOMACH: (6,),
    Organ.PANCREAS: (7,),
    Organ.ADRENAL: (8, 9),
    Organ.LUNG: (10, 11, 14),
    Organ.BOWEL: (18, 19),
    Organ.COLON: (20,),
    Organ.BLADDER: (21,),
    Organ.AORTA: (52, 65, 66),  # as in a phantom, with its large branches
    Organ.VESSEL: (63, 64, 67, 68),
    Organ.BONE: (*range(25, 34), *range(75, 79), *range(98, 104), *range(110, 116), 117),
    Organ.CANAL: (79,),
    Organ.MUSCLE: tuple(range(80, 90)),
}


def entry(folder: Path, name: str) -> Entry:
    return Entry(name, folder / "images" / f"{name}_0000.nii.gz", folder / "labels" / f"{name}.nii.gz", None)


def crop(case: Entry, out: Path, name: str, seed: tuple[int, ...]) -> Entry:
    """Write the scan and its label cut by the same random box, which holds all of the tumour."""
    assert case.label is not None
    scan, label = (nib.Nifti1Image.from_filename(path) for path in (case.scan, case.label))
    box = random_box(np.asanyarray(label.dataobj), np.random.default_rng(seed))
    scan_path, label_path = out / PARTS[0] / f"{name}_0000.nii.gz", out / PARTS[1] / f"{name}.nii.gz"
    nib.save(scan.slicer[box], unlisted(scan_path))
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
    made = [crop(case, out, f"{case.name}_{n}", (seed, index, n)) for case, index, n in bar]
    list_scans(out, made, made)


def write_implants(cases: list[Entry], out: Path, each: int, seed: int) -> None:
    """A FLARE folder with so many scans of each case, with drawn lesions."""
    fresh(out)
    settings = implant.Settings(Path(), out, each * len(cases), seed)
    bar = tqdm(range(settings.count), desc=out.name, unit="scan")
    made = [implant.make(cases, settings, number) for number in bar]
    list_scans(out, made, made)


def abdomen_entry(scan: Path, out: Path) -> Entry:
    """The scan with its organs in phantoms' codes. It may hold lesions that nobody looked for."""
    name = scan.name.removesuffix("_0000.nii.gz")
    named = nib.Nifti1Image.from_filename(scan.parents[1] / "organs" / f"{name}.nii.gz")
    organs = out / f"{name}_organs.nii.gz"
    out.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(renamed(np.asanyarray(named.dataobj)), named.affine, named.header), organs)
    return Entry(name, scan, None, organs, "partial")


def renamed(codes: np.ndarray) -> np.ndarray:
    """TotalSegmentator's codes → `Organ`, uint8; `UNKNOWN` where it named nothing that phantoms have."""
    table = np.full(256, UNKNOWN, np.uint8)
    for organ, theirs in ORGANS.items():
        table[list(theirs)] = organ
    return table[codes]


def fresh(folder: Path) -> None:
    """Empty, without `cases.csv`, which is written last, when all is there."""
    (folder / "cases.csv").unlink(missing_ok=True)
    for part in PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)


def main(data: Positional[Path], out: Positional[Path], crops: int = 8) -> None:
    cases = [entry(data / "sts", name) for name in scans_of(data, "sts", "train")]
    learnt, kept = cases[:-HELD_OUT], cases[-HELD_OUT:]
    write_crops(cases, out / "sarcomas", [crops] * len(learnt) + [1] * len(kept), seed=0)
    write_crops(kept, out / "sarcomas_held_out", [2] * len(kept), seed=1)
    write_implants(learnt, out / "implants", each=2, seed=1)
    scans = sorted((data / "abdomen" / "images").glob("*_0000.nii.gz"))
    write_implants([abdomen_entry(scan, out) for scan in scans], out / "abdomen", each=5 * crops, seed=0)


if __name__ == "__main__":
    tyro.cli(main)
