"""Lesions: drawn by site, placed where they fit among the organs, shaped irregularly, filled by phase."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from training.anatomy import Organ, Patient
from training.grid import Array, Axes, Grid
from training.scene import Canvas, Material, Part
from training.shapes import Blend, Ellipsoid, Shape, SmoothField, Wobble, rotation

VOLUME_ML = (0.1, 200.0)


@dataclass(frozen=True)
class Site:
    """Where a kind of lesion grows."""

    name: str
    share: float
    """Share of the patients with this kind."""
    homes: tuple[Organ, ...]
    """Organs whose voxels may be its centre."""
    over: tuple[Organ, ...]
    """Organs that it replaces."""
    within: tuple[float, float]
    """Least and greatest share of it that lies in its home."""
    tissue: str
    """Tissue that its contrast is measured against."""
    largest_ml: float
    least_free: float = 0.9
    """Least share of it that lies in organs it replaces; what lies in others is not painted."""


SITES = (
    Site("liver", 0.30, (Organ.LIVER,), (Organ.LIVER, Organ.VESSEL, Organ.CAVITY), (0.7, 1.0), "liver", 200),
    Site("kidney", 0.15, (Organ.KIDNEY,), (Organ.KIDNEY, Organ.CAVITY), (0.35, 1.0), "kidney_cortex", 200),
    Site("pancreas", 0.12, (Organ.PANCREAS,), (Organ.PANCREAS, Organ.CAVITY, Organ.BOWEL), (0.2, 1), "pancreas", 60),
    Site("colon", 0.10, (Organ.COLON,), (Organ.COLON, Organ.CAVITY), (0.3, 0.85), "bowel_wall", 120),
    Site("stomach", 0.07, (Organ.STOMACH,), (Organ.STOMACH, Organ.CAVITY), (0.3, 0.85), "bowel_wall", 120),
    Site("lung", 0.10, (Organ.LUNG,), (Organ.LUNG,), (0.8, 1.0), "node", 60),
    Site("node", 0.07, (Organ.CAVITY,), (Organ.CAVITY,), (0.85, 1.0), "node", 40),
    Site("peritoneum", 0.05, (Organ.CAVITY,), (Organ.CAVITY, Organ.BOWEL), (0.5, 0.95), "node", 150),
    Site("muscle", 0.04, (Organ.MUSCLE,), (Organ.MUSCLE, Organ.FAT, Organ.CAVITY), (0.4, 1.0), "muscle", 200),
)
CHEST_CHANGES: dict[str, dict[str, Any]] = {
    "lung": {"share": 0.62, "over": (Organ.LUNG, Organ.CAVITY), "within": (0.35, 1.0), "least_free": 0.6},
    **{"node": {"share": 0.16}, "muscle": {"share": 0.08}, "liver": {"share": 0.08}},
    **{"kidney": {"share": 0.03}, "peritoneum": {"share": 0.03}},
}
CHEST_SITES = tuple(replace(site, **CHEST_CHANGES[site.name]) for site in SITES if site.name in CHEST_CHANGES)
"""Of the patients whose chest is scanned: lesions of the lung may lie on the ribs or grow out of the mediastinum."""
SITE_CODE = {site.name: code for code, site in enumerate(SITES, start=1)}


@dataclass(frozen=True)
class Lesion:
    """What was drawn for one lesion; its centre is (z, y, x) in mm of the scene."""

    site: str
    centre_mm: tuple[float, float, float]
    volume_ml: float
    hu: float


def add_lesions(p: Patient, organs: Canvas, chest: bool = False) -> tuple[Lesion, ...]:
    """Append 1 to 6 lesions to the patient's parts, placed by the coarse organ map of the scanned region."""
    rng = p.rng
    sites = CHEST_SITES if chest else SITES
    shares = np.array([s.share for s in sites])
    main = sites[int(rng.choice(len(sites), p=shares / shares.sum()))]
    single_kind = rng.random() < 0.65
    count = int(rng.choice((1, 2, 3, 4, 5, 6), p=(0.34, 0.22, 0.16, 0.12, 0.09, 0.07)))
    found: list[Lesion] = []
    for attempt in range(60):
        if len(found) == count:
            break
        site = main
        if (not single_kind and found) or (attempt > 20 and not found):
            site = sites[int(rng.choice(len(sites), p=shares / shares.sum()))]
        volume = draw_volume(rng, site.largest_ml) * 0.9**attempt
        lesion = _place(p, site, max(volume, VOLUME_ML[0] * 1.3), organs, found)
        if lesion is not None:
            found.append(lesion)
            p.parts.append(_part(p, site, lesion))
    return tuple(found)


def draw_volume(rng: np.random.Generator, largest_ml: float) -> float:
    """Millilitres: most lesions between 1 and 60, some over the whole range."""
    low, high = (1.0, 60.0) if rng.random() < 0.75 else (VOLUME_ML[0] * 1.3, VOLUME_ML[1] * 0.95)
    return min(float(np.exp(rng.uniform(np.log(low), np.log(high)))), largest_ml * 0.95)


def radius_of(volume_ml: float) -> float:
    """Radius in mm of the ball with this volume."""
    return float((volume_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3))


def _place(p: Patient, site: Site, volume_ml: float, organs: Canvas, others: list[Lesion]) -> Lesion | None:
    """A centre where most of the ball may be painted and enough of it lies in the site's organ, if there is one."""
    inside = np.flatnonzero(np.isin(organs.organs, site.homes))
    if inside.size < 20:
        return None
    radius = radius_of(volume_ml)
    index = np.stack(np.unravel_index(p.rng.choice(inside, 400), organs.organs.shape), 1)
    centres = np.stack([a[i] for a, i in zip(organs.axes, index.T, strict=True)], 1) + p.rng.uniform(-2, 2, (400, 3))
    around = _look_around(p.rng, organs, centres, radius)
    home = np.isin(around, site.homes).mean(1)
    free = np.isin(around, site.over).mean(1)
    good = (free >= site.least_free) & (home >= site.within[0]) & (home <= site.within[1])
    good &= _inside_scan(organs.axes, centres, radius)
    if site.name == "node":
        good &= _near_aorta(organs, centres)
    for other in others:
        gap = np.linalg.norm(centres - other.centre_mm, axis=1) - radius - radius_of(other.volume_ml)
        good &= gap > 4
    if not good.any():
        return None
    z, y, x = centres[np.argmax(good)]
    return Lesion(site.name, (float(z), float(y), float(x)), volume_ml, _draw_hu(p, site))


def _look_around(rng: np.random.Generator, organs: Canvas, centres: Array, radius: float) -> Array:
    """Organs at 48 random points of the ball around each centre: uint8 (n, 48); outside the map: air."""
    offsets = rng.standard_normal((48, 3))
    offsets *= 1.1 * radius * rng.uniform(0.2, 1, (48, 1)) ** (1 / 3) / np.linalg.norm(offsets, axis=1, keepdims=True)
    points = centres[:, None] + offsets
    index = [np.round((points[..., k] - a[0]) / (a[1] - a[0])).astype(int) for k, a in enumerate(organs.axes)]
    valid = np.all([(i >= 0) & (i < n) for i, n in zip(index, organs.organs.shape, strict=True)], 0)
    clipped = tuple(np.clip(i, 0, n - 1) for i, n in zip(index, organs.organs.shape, strict=True))
    return np.where(valid, organs.organs[clipped], 0)


def _inside_scan(axes: Axes, centres: Array, radius: float) -> Array:
    low = np.array([a[0] for a in axes]) + 0.8 * radius
    high = np.array([a[-1] for a in axes]) - 0.8 * radius
    return np.all((centres > low) & (centres < high), 1)


def _near_aorta(organs: Canvas, centres: Array) -> Array:
    """Whether the aorta or an iliac artery lies within about 4 cm, in the centre's own slice."""
    z_index = np.searchsorted(organs.axes[0], centres[:, 0]).clip(0, len(organs.axes[0]) - 1)
    near = np.zeros(len(centres), bool)
    for k, (z, centre) in enumerate(zip(z_index, centres, strict=True)):
        y, x = np.nonzero(organs.organs[z] == Organ.AORTA)
        gap = np.hypot(organs.axes[1][y] - centre[1], organs.axes[2][x] - centre[2])
        near[k] = gap.size > 0 and float(gap.min()) < 38
    return near


def _draw_hu(p: Patient, site: Site) -> float:
    """HU of the solid part: apart from its organ, and never watery as a cyst."""
    rng, base = p.rng, p.hu(site.tissue)
    if site.tissue in ("node", "bowel_wall"):  # seen against fat, gas or lung: any soft tissue will do
        return float(np.clip(base + rng.normal(0, 14), 28, 150))
    up = {"arterial": 0.5, "none": 0.15}.get(p.phase, 0.12)
    if site.name == "kidney":  # as dense as plain cortex, but nothing outshines enhanced cortex
        up = 0.9 if p.phase == "none" else 0.03
    for _ in range(50):
        contrast = rng.uniform(12, 20) if rng.random() < 0.2 else rng.uniform(20, 80)
        hu = base + (contrast if rng.random() < up else -contrast)
        if 26 <= hu <= 260:
            return float(hu)
    return float(base + 20)


def lesion_shape(rng: np.random.Generator, lesion: Lesion) -> Shape:
    """One or a few blended ellipsoids with an uneven surface, of exactly the lesion's volume."""
    radius = radius_of(lesion.volume_ml)
    lumps: list[Shape] = []
    for k in range(int(rng.choice((1, 2, 3), p=(0.55, 0.3, 0.15)))):
        offset = rng.normal(0, 0.45 * radius, 3) * (k > 0)
        radii = radius * rng.uniform(0.75, 1.25, 3) * (1.0 if k == 0 else rng.uniform(0.5, 0.9))
        lumps.append(Ellipsoid(offset, radii, rotation(rng, 90)))
    rough = rng.uniform(0.05, 0.16) * radius
    surface = SmoothField(rng, radius * rng.uniform(0.45, 0.9), 10)
    raw = Wobble(Blend(lumps, 0.4 * radius), surface, rough)
    ratio = float((lesion.volume_ml / _volume_ml(raw)) ** (1 / 3))
    moved = [
        Ellipsoid(np.asarray(s.centre) * ratio + np.asarray(lesion.centre_mm), np.asarray(s.radii) * ratio, s.turn)
        for s in lumps
        if isinstance(s, Ellipsoid)
    ]
    surface.step_mm *= ratio
    surface.origin_mm = np.asarray(lesion.centre_mm)
    return Wobble(Blend(moved, 0.4 * radius * ratio), surface, rough * ratio)


def _volume_ml(shape: Shape, samples: int = 36) -> float:
    low, high = shape.bounds_mm
    z, y, x = (np.linspace(lo, hi, samples, dtype=np.float32) for lo, hi in zip(low, high, strict=True))
    cell = np.prod([(hi - lo) / (samples - 1) for lo, hi in zip(low, high, strict=True)])
    share = np.mean(shape.distance(Grid((z, y, x))) < 0)
    return float(share * samples**3 * cell / 1000)


def _part(p: Patient, site: Site, lesion: Lesion) -> Part:
    """Solid tissue, at times with an enhancing rim or a necrotic core."""
    rng, radius = p.rng, radius_of(lesion.volume_ml)
    body = Material(lesion.hu, rng.uniform(2, 6), rng.uniform(2, 9))
    layers = [(0.0, body)]
    if radius > 6 and p.phase != "none" and rng.random() < 0.3:
        rim = replace(body, hu=lesion.hu + rng.uniform(18, 45))
        layers = [(0.0, rim), (rng.uniform(1.5, 0.25 * radius + 1), body)]
    if radius > 8 and rng.random() < 0.4:
        layers.append((rng.uniform(0.35, 0.65) * radius, Material(min(rng.uniform(12, 32), lesion.hu - 8), 3, 5)))
    blur = 0.0 if rng.random() < 0.5 else rng.uniform(1.5, 5.0)
    over = frozenset(int(o) for o in (*site.over, *site.homes))
    return Part(
        lesion_shape(rng, lesion), layers, int(site.homes[0]), over, min(blur, 0.5 * radius), SITE_CODE[site.name]
    )
