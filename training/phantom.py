"""Procedural abdominal CTs with lesions: seeded, versioned, free of patients.

`make_phantom` draws a patient (`anatomy.py`, `skeleton.py`, `viscera.py`; for a scan of the chest `thorax.py`), lesions
(`lesions.py`) and a scanner, renders the scene on the scanner's grid (`scene.py`) and adds noise. Axis order is
(z, y, x): z feet to head, y anterior to posterior, x right to left, which is LPS.

    python -m training phantoms --out DIR --count 100 --seed 0 --jobs 4
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

from inference.atomic import write_whole
from training import anatomy, skeleton, thorax, viscera
from training.anatomy import Patient
from training.data import Annotated, Entry, finished, list_scans, refuse_others, unlisted
from training.grid import HOST, Array, Axes, Numpy, computer
from training.lesions import SITE_CODE, Lesion, add_lesions
from training.scene import Canvas, render

PHANTOM_VERSION = 2
"""Rises whenever the same seed gives another picture."""
HEALTHY_SHARE = 0.25
MAP_MM = 4.0
"""Grid of the organ map in which lesions are placed; fixed, so that the scene depends on no scanner's voxels."""
SLICES_MM = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.75, 5.0)
"""How thick clinical scanners' slices are."""
NOISE_VOXEL_MM = (3.0, 0.8, 0.8)
"""Voxel for which `Scanner.noise_hu` is stated."""

PARTS = (anatomy.add_table, anatomy.add_wall, anatomy.add_chest, anatomy.add_back_muscles, viscera.add_viscera,
         skeleton.add_spine, skeleton.add_ribs, skeleton.add_pelvis)  # fmt: skip
CHEST_PARTS = (anatomy.add_table, anatomy.add_wall, thorax.add_wall, anatomy.add_chest, thorax.add_lungs,
               anatomy.add_back_muscles, viscera.add_viscera, thorax.add_mediastinum,
               skeleton.add_spine, skeleton.add_ribs, thorax.add_bones)  # fmt: skip


def refuse_thinnest(thinnest_mm: float) -> None:
    """ValueError where every slice is thinner."""
    if thinnest_mm > max(SLICES_MM):
        raise ValueError(f"--thinnest-mm {thinnest_mm:g}: no slice is thicker than {max(SLICES_MM):g} mm")


@dataclass(frozen=True)
class Scanner:
    """How the scene is scanned: grid, noise and sharpness."""

    shape: tuple[int, int, int]
    """Voxels (z, y, x)."""
    spacing_mm: tuple[float, float, float]
    """Distance of voxels (z, y, x); slices are as thick as they are apart."""
    noise_hu: float = 14.0
    """Standard deviation in a voxel of 3×0.8×0.8 mm in the middle of an average patient."""
    kernel_mm: float = 1.0
    """Full width at half maximum of the in-plane blur, which also correlates the noise."""
    top_mm: float | None = None
    """Height of the uppermost slice; None draws it. 130 is the top of the liver, 0 the kidneys, -90 the iliac crest."""
    round_field: bool = False
    """Whether voxels outside the inscribed circle are padded with -1024 HU."""

    @property
    def field_mm(self) -> tuple[float, float, float]:
        """Extent (z, y, x)."""
        z, y, x = (n * s for n, s in zip(self.shape, self.spacing_mm, strict=True))
        return z, y, x

    @classmethod
    def random(cls, rng: np.random.Generator, thinnest_mm: float = 0.0) -> Scanner:
        """A clinical scan: 512×512 over 300 to 450 mm, slices of 1 to 5 mm, 150 to 400 mm of the trunk.

        Drawn again while its slices are thinner than `thinnest_mm`. ValueError where all are.
        """
        refuse_thinnest(thinnest_mm)
        drawn = cls._random(rng)
        while drawn.spacing_mm[0] < thinnest_mm:
            drawn = cls._random(rng)
        return drawn

    @classmethod
    def _random(cls, rng: np.random.Generator) -> Scanner:
        field = rng.uniform(307, 450)
        thick = float(rng.choice(SLICES_MM))
        side = 512 if rng.random() < 0.85 or field > 430 else int(field / rng.uniform(0.8, 0.98))
        spacing = (thick, field / side, field / side)
        return cls((int(rng.uniform(150, 400) / thick), side, side), spacing, *_draw_quality(rng))

    @classmethod
    def training(cls, rng: np.random.Generator) -> Scanner:
        """A scan at the network's own resolution: 256×256 over 300 to 450 mm, 48 to 96 slices of 2 to 5 mm."""
        spacing = rng.uniform(300, 450) / 256
        shape = (int(rng.integers(48, 97)), 256, 256)
        return cls(shape, (float(rng.uniform(2, 5)), spacing, spacing), *_draw_quality(rng))

    def of_chest(self, rng: np.random.Generator) -> Scanner:
        """The same from the neck or the shoulders down, 220 to 350 mm."""
        count = round(rng.uniform(220, 350) / self.spacing_mm[0])
        return replace(self, shape=(count, *self.shape[1:]), top_mm=float(rng.uniform(330, 400)))

    @classmethod
    def demo(cls) -> Scanner:
        """512×512×100 voxels of 0.8×0.8×3 mm from the lung bases down."""
        return cls((100, 512, 512), (3.0, 0.8, 0.8), noise_hu=13.0, kernel_mm=1.0, top_mm=150.0)


def _draw_quality(rng: np.random.Generator) -> tuple[float, float, None, bool]:
    """Noise, kernel, and whether the field is round; sharp kernels are noisier."""
    kernel = float(rng.uniform(0.6, 1.6))
    return float(rng.uniform(7, 22) / kernel**0.7), kernel, None, bool(rng.random() < 0.25)


@dataclass
class Phantom:
    """A rendered scan with its truth. All arrays are (z, y, x)."""

    hu: Array
    """int16 HU."""
    lesions: Array
    """uint8: 1 in lesions, else 0."""
    organs: Array
    """uint8 `anatomy.Organ`."""
    sites: Array
    """uint8: 0, or the `lesions.SITE_CODE` of the lesion there."""
    spacing_mm: tuple[float, float, float]
    healthy: bool
    drawn: tuple[Lesion, ...]
    """The lesions as drawn."""
    phase: str
    seed: int

    @property
    def lesion_type(self) -> str:
        """The site of all lesions, "mixed", or "none"."""
        names = {lesion.site for lesion in self.drawn}
        return "none" if not names else names.pop() if len(names) == 1 else "mixed"

    def annotated_by_site(self, *sites: str) -> Array:
        """The label that annotators of only these sites would draw, uint8 {0, 1}: for partly labelled training sets."""
        return np.isin(self.sites, [SITE_CODE[s] for s in sites]).astype(np.uint8)


def is_healthy(seed: int, share: float = HEALTHY_SHARE) -> bool:
    """Whether `make_phantom` draws this seed's patient without lesions, as a `share` of them are."""
    return bool(np.random.default_rng((PHANTOM_VERSION, seed, 9)).random() < share)


def make_phantom(
    seed: int,
    *,
    healthy: bool | None = None,
    scanner: Scanner | None = None,
    chest: bool = False,
    thinnest_mm: float = 0.0,
    on: Numpy = HOST,
) -> Phantom:
    """The phantom of `seed`; `healthy` and `scanner` are drawn where not given. chest: drawn up to the neck.

    on: what paints the scan; lesions are placed, and noise is added, on the host, so that a seed means the same patient
    and the same noise. Patient and lesions depend on the seed and on the region scanned in mm, not on the voxels.
    """
    scan_rng, scene_rng, noise_rng = (np.random.default_rng((PHANTOM_VERSION, seed, k)) for k in range(3))
    healthy = is_healthy(seed) if healthy is None else healthy
    scanner = Scanner.random(scan_rng, thinnest_mm) if scanner is None else scanner
    patient = anatomy.draw_patient(scene_rng, 0.97 * scanner.field_mm[2])
    top = _draw_top(scene_rng, scanner)
    shift = scene_rng.normal(0, 4, 2)
    for add in CHEST_PARTS if chest else PARTS:
        add(patient)
    found: tuple[Lesion, ...] = ()
    if not healthy:
        region = _axes(scanner.field_mm, (MAP_MM,) * 3, top, shift)
        found = add_lesions(patient, render(patient.parts, region, 1.0, seed), chest)
    axes = _axes(scanner.field_mm, scanner.spacing_mm, top, shift)
    canvas = render(patient.parts, axes, scanner.kernel_mm, seed, on=on)
    hu = _scan(noise_rng, canvas, scanner, patient)
    labels = (canvas.lesions > 0).astype(np.uint8)
    return Phantom(hu, labels, canvas.organs, canvas.lesions, scanner.spacing_mm, healthy, found, patient.phase, seed)


def _draw_top(rng: np.random.Generator, scanner: Scanner) -> float:
    """Height of the scan's upper end: mostly above the liver, at times a pelvic scan."""
    long = rng.uniform(120, 215)
    pelvic = rng.random() < 0.12
    drawn = rng.uniform(-60, 60) if pelvic and scanner.field_mm[0] < 260 else long
    return float(drawn if scanner.top_mm is None else scanner.top_mm)


def _axes(field_mm: tuple[float, ...], spacing_mm: tuple[float, ...], top_mm: float, shift_mm: Array) -> Axes:
    """Voxel centres of a grid that fills the field, whose upper end lies at `top_mm`."""
    starts = (top_mm - field_mm[0], shift_mm[0] - field_mm[1] / 2, shift_mm[1] - field_mm[2] / 2)
    z, y, x = (
        (start + (np.arange(round(f / s)) + 0.5) * s).astype(np.float32)
        for start, f, s in zip(starts, field_mm, spacing_mm, strict=True)
    )
    return z, y, x


def noise_sd(scanner: Scanner) -> float:
    """Standard deviation of the noise in this scanner's voxels.

    The noise is white in the raw data and blurred in-plane by the kernel; a voxel averages it over its box, so 2×2
    averaging of a fine scan and scanning at twice the spacing give the same. Across slices it falls with √thickness.
    """
    kernel2 = (scanner.kernel_mm / 2.355) ** 2
    width2 = [kernel2 + s**2 / 12 for s in (NOISE_VOXEL_MM[1], scanner.spacing_mm[1], scanner.spacing_mm[2])]
    in_plane = np.sqrt(width2[0] / np.sqrt(width2[1] * width2[2]))
    return float(scanner.noise_hu * in_plane * np.sqrt(NOISE_VOXEL_MM[0] / scanner.spacing_mm[0]))


def _scan(rng: np.random.Generator, canvas: Canvas, scanner: Scanner, patient: Patient) -> Array:
    """Add noise, strongest in the middle of large patients, and quantise to int16."""
    y, x = canvas.axes[1], canvas.axes[2]
    half = 130 * patient.scale + patient.fat_mm[1]
    falloff = 0.6 + 0.45 * np.exp(-((y[:, None] / 110) ** 2) - (x[None, :] / 140) ** 2)
    level = noise_sd(scanner) * np.sqrt(half / 160) * falloff.astype(np.float32)
    sigma = [scanner.kernel_mm / 2.355 / s for s in scanner.spacing_mm[1:]]
    out = np.empty(canvas.hu.shape, np.int16)
    for k, plane in enumerate(canvas.hu):
        noise = rng.standard_normal(plane.shape, np.float32)
        if min(sigma) > 0.3:  # narrower, voxels hardly share noise
            for axis, width in enumerate(sigma):
                noise = gaussian_filter1d(noise, width, axis, mode="wrap", truncate=3)
            noise /= noise.std()
        out[k] = np.clip(np.rint(plane + level * noise), -1024, 3071)
    if scanner.round_field:
        radius = scanner.field_mm[2] / 2
        out[:, np.hypot(y[:, None] - y.mean(), x[None, :] - x.mean()) > radius] = -1024
    return out


def write_flare(phantom: Phantom, folder: Path | str, name: str) -> None:
    """Write `imagesTr/NAME_0000.nii.gz` (int16 HU) and `NAME.nii.gz` in labelsTr, completeTr and organsTr (uint8)."""
    _write(phantom, _files(Path(folder), name))


def _write(phantom: Phantom, paths: list[Path]) -> None:
    """The four of `_files`."""
    arrays = (phantom.hu, phantom.lesions, phantom.lesions, phantom.organs)
    for path, array in zip(paths, arrays, strict=True):
        write_nifti(array, phantom.spacing_mm, path)


def remove_flare(folder: Path, name: str) -> None:
    """Take away what was written of a case, or had begun to be."""
    files = _files(folder, name)
    for path in (*files, unlisted(files[0])):
        path.unlink(missing_ok=True)


def _files(folder: Path, name: str) -> list[Path]:
    """Of the scan, its label, the complete one and the organs."""
    places = (f"imagesTr/{name}_0000", f"labelsTr/{name}", f"completeTr/{name}", f"organsTr/{name}")
    return [folder / f"{place}.nii.gz" for place in places]


def write_nifti(array: Array, spacing_mm: tuple[float, float, float], path: Path) -> None:
    """Write an array (z, y, x) of LPS axes; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    z, y, x = spacing_mm
    affine = np.diag([-x, -y, z, 1.0])  # NIfTI counts in RAS: x and y point the other way than in LPS
    image = nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), affine)
    image.set_data_dtype(array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)


@dataclass(frozen=True)
class Settings:
    out: Path  # FLARE folder to write
    count: int  # scans
    seed: int = 0  # of the first scan; the next ones count up
    jobs: int = 1  # processes
    healthy_share: float = HEALTHY_SHARE  # of the scans are free of lesions
    chest_share: float = 0.0  # of the scans are of the chest, up to the neck
    partial_share: float = 0.0  # of the diseased scans: only the lesions of one site are annotated
    network_grid: bool = False  # 256×256 scans as the networks see them, at a fifth of the time and space
    thinnest_mm: float = 0.0  # slices are at least so thick; not together with --network-grid, whose are 2 to 5 mm
    device: str = "cpu"  # what paints: "cpu", one core a job, or "cuda" or "cuda:N", by torch


DECISIVE = ("healthy_share", "chest_share", "partial_share", "network_grid", "thinnest_mm")  # with the seed, for a scan
RECORD = "phantoms.json"


def name_of(seed: int) -> str:
    """Of the case that is written of a phantom."""
    return f"phantom_{seed:06d}"


def _write_case(seed: int, settings: Settings) -> Entry:
    """Write one phantom, its scan where it is not seen yet; what is known of it."""
    rng = np.random.default_rng((PHANTOM_VERSION, seed, 7))
    scanner = Scanner.training(rng) if settings.network_grid else None
    chest = settings.chest_share > 0 and rng.random() < settings.chest_share  # without chests, no draw: seeds stay true
    if chest:
        scanner = (scanner or Scanner.random(rng, settings.thinnest_mm)).of_chest(rng)
    healthy = is_healthy(seed, settings.healthy_share)
    phantom = make_phantom(
        seed,
        healthy=healthy,
        scanner=scanner,
        chest=chest,
        thinnest_mm=settings.thinnest_mm,
        on=computer(settings.device),
    )
    name = name_of(seed)
    scan, label, *others = _files(settings.out, name)
    _write(phantom, [unlisted(scan), label, *others])
    annotated: Annotated = "complete"
    if not phantom.healthy and rng.random() < settings.partial_share:
        site = str(rng.choice(sorted({lesion.site for lesion in phantom.drawn})))
        write_nifti(phantom.annotated_by_site(site), phantom.spacing_mm, label)
        annotated = "partial"
    return Entry(name, scan, label, None, annotated, phantom.healthy, phantom.lesion_type)


def main(settings: Settings) -> None:
    """Write procedural CTs with lesions as a FLARE folder, and `cases.csv`.

    labelsTr is what annotators left, completeTr all lesions, organsTr the organ of every voxel. A scan is seen when it
    is whole and has its row. Called again, it makes those that are not there.
    """
    computer(settings.device)
    if settings.count < 1 or settings.seed < 0 or settings.jobs < 1:
        raise ValueError("--count and --jobs must be 1 or more, --seed 0 or more")
    refuse_thinnest(settings.thinnest_mm)
    if settings.network_grid and settings.thinnest_mm:
        raise ValueError("--network-grid has slices of its own: leave --thinnest-mm out")
    seeds = range(settings.seed, settings.seed + settings.count)
    refuse_others(settings.out, map(name_of, seeds))
    done = resume(settings)
    missing = [seed for seed in seeds if name_of(seed) not in done]
    try:
        with closing(_written(settings, missing)) as written:
            for entry in tqdm(written, total=settings.count, initial=settings.count - len(missing), unit="scan"):
                done[entry.name] = entry
                list_scans(settings.out, (done[name] for name in sorted(done)), [entry])
    finally:
        for seed in missing:
            if name_of(seed) not in done:
                remove_flare(settings.out, name_of(seed))


def resume(settings: Settings) -> dict[str, Entry]:
    """What the folder holds already, by name. ValueError where that was made with other settings.

    Which they were is told by `phantoms.json` beside it.
    """
    now = {name: getattr(settings, name) for name in DECISIVE} | {"version": PHANTOM_VERSION}
    record, there = settings.out / RECORD, finished(settings.out)
    before = read_record(record) if record.exists() else {}
    changed = [name for name in now if before.get(name) != now[name]]
    if there and changed:
        told = ", ".join(f"{name} {before.get(name, 'unknown')}, now {now[name]}" for name in changed)
        raise ValueError(f"{settings.out}: its phantoms were made with other settings ({told}): name another --out")
    settings.out.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps(now).encode())
    return there


def read_record(path: Path) -> dict[str, Any]:
    """What `phantoms.json` holds; nothing where it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        return {}


def _written(settings: Settings, seeds: list[int]) -> Generator[Entry]:
    """Every phantom as it is written, by as many processes as asked for, which have ended when this has."""
    work = partial(_write_case, settings=settings)
    if settings.jobs == 1:
        yield from map(work, seeds)
        return
    # a process that was forked cannot use a device that its parent has touched
    start = multiprocessing.get_context("fork" if settings.device == "cpu" else "spawn")
    with ProcessPoolExecutor(settings.jobs, start) as pool:
        yield from pool.map(work, seeds)
