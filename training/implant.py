"""Drawn lesions in real scans: what phantoms lack in texture and anatomy, the scan has.

    python -m training implant --data FLARE_FOLDER --out FOLDER --count 60

Each case is a scan of the folder, cropped at random (a crop around a tumour must not tell where it lies), with lesions
drawn into soft tissue or lung away from the annotated ones. They take over the noise and the edges of what lay there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from inference.fusion import bounding_box
from training.data import Annotated, Case, Entry, list_scans, load_case, read_folder, refuse_others, unlisted
from training.grid import Grid
from training.lesions import VOLUME_ML, Lesion, draw_volume, lesion_shape, radius_of
from training.phantom import remove_flare, write_nifti
from training.shapes import span

SOFT_HU = (-20.0, 140.0)  # of tissue in which lesions are drawn
LUNG_HU = (-970.0, -650.0)
LUNG_SHARE = 0.3  # of the lesions, where there is lung
HOME_SHARE = 0.75  # of a lesion's ball must lie in such tissue
GAP_MM = 8.0  # between lesions
COUNTS = (0, 1, 2, 3, 4)  # lesions a case
SMOOTH_MM = 3.0  # tissue is told apart, and texture taken from what is left, at this scale
LARGEST_ML, LARGEST_SHARE = 80.0, 0.02  # of a lesion, and of the scan's volume
TRIES = 200


@dataclass(frozen=True)
class Settings:
    data: Path  # FLARE folder of real scans
    out: Path  # FLARE folder to write
    count: int  # cases
    seed: int = 0


def main(settings: Settings) -> None:
    """Write real scans, cropped at random, with drawn lesions in them."""
    entries = read_folder(settings.data)
    names = [case_name_of(entries, index) for index in range(settings.count)]
    refuse_others(settings.out, names)
    for name in names:  # without its row, an older one would count as another patient
        remove_flare(settings.out, name)
    write_made(settings.out, (make(entries, settings, index) for index in tqdm(range(settings.count), unit="case")))


def write_made(out: Path, made: Iterable[Entry]) -> None:
    """Let each case be seen as soon as it is whole."""
    entries: list[Entry] = []
    for entry in made:
        entries.append(entry)
        list_scans(out, entries, [entry])


def case_name_of(entries: list[Entry], index: int) -> str:
    """Of the case that `make` writes."""
    return f"{entries[index % len(entries)].name}_{index:04d}"


def make(entries: list[Entry], settings: Settings, index: int) -> Entry:
    """Write one case, its scan where it is not seen yet; what is known of it."""
    rng = np.random.default_rng((settings.seed, index))
    case = random_crop(rng, load_case(entries[index % len(entries)]))
    hu, label = implant(rng, case)
    name = case_name_of(entries, index)
    scan, mask = (settings.out / f"{part}.nii.gz" for part in (f"imagesTr/{name}_0000", f"labelsTr/{name}"))
    write_nifti(hu, case.spacing_mm, unlisted(scan))
    write_nifti(label, case.spacing_mm, mask)
    organs = None
    if case.entry.organs:
        organs = settings.out / f"organsTr/{name}.nii.gz"
        write_nifti(case.organs, case.spacing_mm, organs)
    annotated: Annotated = "complete" if case.entry.complete else "partial"
    healthy = case.entry.healthy and not label.any()
    patient = case.entry.patient or case.entry.name
    return Entry(name, scan, mask, organs, annotated, healthy, case.entry.lesion_type, patient, case.entry.pseudo)


def random_crop(rng: np.random.Generator, case: Case) -> Case:
    """Cut a random share of each of the six margins around the lesions, or a third of the scan at most."""
    shape = np.array(case.label.shape)
    box = bounding_box(case.label)
    before, after = shape / 6, shape / 6
    if box is not None:
        before = np.array([part.start for part in box])
        after = shape - np.array([part.stop for part in box])
    low = (before * rng.random(3)).astype(int)
    high = shape - (after * rng.random(3)).astype(int)
    part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return Case(case.entry, case.hu[part], case.label[part], case.organs[part], case.spacing_mm)


def implant(rng: np.random.Generator, case: Case) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """HU and label (z, y, x) with up to four more lesions."""
    hu, label = case.hu.astype(np.float32), case.label.copy()
    smooth = gaussian_filter(hu, [SMOOTH_MM / spacing for spacing in case.spacing_mm])
    soft, lung = ((smooth > low) & (smooth < high) for low, high in (SOFT_HU, LUNG_HU))
    largest_ml = LARGEST_SHARE * hu.size * float(np.prod(case.spacing_mm)) / 1000
    for _ in range(int(rng.choice(COUNTS))):
        home = lung if lung.mean() > 0.02 and rng.random() < LUNG_SHARE else soft
        volume_ml = float(np.clip(draw_volume(rng, LARGEST_ML), VOLUME_ML[0], max(largest_ml, VOLUME_ML[0])))
        centre = _place(rng, home, label, case.spacing_mm, radius_of(volume_ml))
        if centre is not None:
            _draw(rng, hu, label, smooth, centre, volume_ml, case.spacing_mm)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), label


def _place(
    rng: np.random.Generator,
    home: NDArray[np.bool_],
    label: NDArray[np.uint8],
    spacing_mm: tuple[float, float, float],
    radius_mm: float,
) -> NDArray[np.int64] | None:
    """A voxel around which a ball lies inside the scan, mostly in `home`, and apart from every lesion."""
    places = np.flatnonzero(home)
    reach = np.ceil(np.array(radius_mm / np.array(spacing_mm))).astype(int)
    ball = np.argwhere(_ball(reach)) - reach
    gap = np.argwhere(_ball(np.ceil((radius_mm + GAP_MM) / np.array(spacing_mm)).astype(int)))
    gap -= gap.max(axis=0) // 2
    for _ in range(TRIES if len(places) else 0):
        centre = np.array(np.unravel_index(rng.choice(places), home.shape))
        if (centre < reach).any() or (centre + reach >= home.shape).any():
            continue
        near = np.clip(centre + gap, 0, np.array(home.shape) - 1)
        if home[tuple((centre + ball).T)].mean() >= HOME_SHARE and not label[tuple(near.T)].any():
            return centre
    return None


def _ball(reach: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The ellipsoid of these half axes in voxels, in the box that holds it."""
    z, y, x = np.ogrid[tuple(slice(-r, r + 1) for r in reach)]
    a, b, c = np.maximum(reach, 1)
    return np.asarray((z / a) ** 2 + (y / b) ** 2 + (x / c) ** 2 <= 1)


def _draw(
    rng: np.random.Generator,
    hu: NDArray[np.float32],
    label: NDArray[np.uint8],
    smooth: NDArray[np.float32],
    centre: NDArray[np.int64],
    volume_ml: float,
    spacing_mm: tuple[float, float, float],
) -> None:
    """Blend a lesion over `hu` and `label`, in place."""
    z, y, x = (
        (np.arange(n, dtype=np.float32) * s).astype(np.float32) for n, s in zip(hu.shape, spacing_mm, strict=True)
    )
    grid = Grid((z, y, x))
    base = float(smooth[tuple(centre)])
    contrast = rng.uniform(15, 60) * rng.choice((-1, 1), p=(0.7, 0.3))
    target = base + contrast if base > SOFT_HU[0] else rng.uniform(0, 70)
    at_mm = tuple(float(c * s) for c, s in zip(centre, spacing_mm, strict=True))
    shape = lesion_shape(rng, Lesion("real", at_mm, volume_ml, target))  # type: ignore[arg-type]
    width = max(spacing_mm[1], float(rng.uniform(1.0, 5.0)))
    low, high = shape.bounds_mm
    box = span(grid.axes, np.asarray(low) - width, np.asarray(high) + width)
    distance = shape.distance(grid.part(box))
    alpha = np.clip(0.5 - distance / width, 0, 1)
    texture = hu[box] - smooth[box]
    limit = np.percentile(np.abs(texture), 75)  # edges and vessels of what lay there must not show through
    hu[box] += alpha * (target + np.clip(texture, -2 * limit, 2 * limit) - hu[box])
    label[box][distance < 0] = 1
