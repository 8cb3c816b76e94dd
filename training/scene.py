"""A scene is a list of parts, painted in order on any voxel grid.

Axis order is (z, y, x). Distances in mm make edges fade over the voxel size and the scanner's blur, and make layers
(cortex, wall, rim) mere insets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from training.shapes import Array, Axes, Shape, SmoothField, span

GAS_HU = -960.0


@dataclass(frozen=True)
class Material:
    """What a shape is filled with: HU, and how it varies inside."""

    hu: float
    grain_hu: float = 0.0
    """Standard deviation of the fine texture (a few mm)."""
    blotch_hu: float = 0.0
    """Standard deviation of the coarse texture (centimetres)."""
    gas_above_mm: float | None = None
    """A fluid level: in front of this y lies gas, for the patient lies on the back."""
    bubbles: float = 0.0
    """Share of small gas bubbles, as in stool."""


@dataclass(frozen=True)
class Part:
    """A shape, its layers from outside in as (inset in mm, material), and the organ label it leaves."""

    shape: Shape
    layers: Sequence[tuple[float, Material]]
    organ: int
    only_over: frozenset[int] | None = None
    """Painted over these organs only; None: over everything."""
    blur_mm: float = 0.0
    lesion: int = 0
    """Lesion label; 0 is none."""


@dataclass
class Canvas:
    """A grid being painted. HU float32, organs and lesions uint8, all (z, y, x)."""

    axes: Axes
    psf_mm: float
    hu: Array = field(init=False)
    organs: Array = field(init=False)
    lesions: Array = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(len(a) for a in self.axes)
        self.hu = np.full(shape, -1000, np.float32)
        self.organs = np.zeros(shape, np.uint8)
        self.lesions = np.zeros(shape, np.uint8)
        y, x = self.axes[1], self.axes[2]
        in_plane = max(float(y[1] - y[0]), float(x[1] - x[0]))
        self.edge_mm = float(np.hypot(in_plane, self.psf_mm))

    def paint(self, part: Part, grain: Callable[..., Array], blotch: Callable[..., Array]) -> None:
        """Blend `part` over what is there; `grain` and `blotch` give the texture of a box (three slices)."""
        low, high = part.shape.bounds_mm
        pad = self.edge_mm + part.blur_mm / 2
        box = span(self.axes, np.asarray(low) - pad, np.asarray(high) + pad)
        if any(s.stop <= s.start for s in box):
            return
        d = part.shape.distance((self.axes[0][box[0]], self.axes[1][box[1]], self.axes[2][box[2]]))
        allowed = None
        if part.only_over is not None:
            table = np.zeros(256, bool)
            table[list(part.only_over)] = True
            allowed = table[self.organs[box]]
        width = self._edge_width(d, part.blur_mm)
        for inset, material in part.layers:
            alpha = np.clip(0.5 - (d + np.float32(inset)) / width, 0, 1)
            if allowed is not None:
                alpha *= allowed
            self.hu[box] += alpha * (_values(material, self.axes[1][box[1]], box, grain, blotch) - self.hu[box])
        inside = d < 0 if allowed is None else (d < 0) & allowed
        self.organs[box][inside] = part.organ
        if part.lesion:
            self.lesions[box][inside] = part.lesion

    def _edge_width(self, d: Array, blur_mm: float) -> Array | np.float32:
        """Width in mm over which an edge fades: a slanting surface fades over the slice thickness."""
        flat = np.float32(max(self.edge_mm, blur_mm))
        if len(d) < 2:
            return flat
        rise = np.empty_like(d)
        rise[1:-1] = (d[2:] - d[:-2]) / 2
        rise[0], rise[-1] = d[1] - d[0], d[-1] - d[-2]
        # A distance rises by at most the slice spacing; more is a tube's jump to FAR_MM beyond its reach.
        spacing = np.float32(self.axes[0][1] - self.axes[0][0])
        return np.sqrt(np.minimum(rise**2, spacing**2) + flat**2)


def _values(
    material: Material, y_mm: Array, box: tuple[slice, ...], grain: Callable[..., Array], blotch: Callable[..., Array]
) -> Array | np.float32:
    value: Array | np.float32 = np.float32(material.hu)
    if material.grain_hu:
        value = value + np.float32(material.grain_hu) * grain(box)
    if material.blotch_hu:
        value = value + np.float32(material.blotch_hu) * blotch(box)
    if material.bubbles:
        # Around the threshold the bubble fills part of the voxel.
        threshold = np.float32(1.6 - 3 * material.bubbles)
        share = np.clip((grain(box) - threshold) * 2, 0, 0.9)
        value = value + share * (np.float32(GAS_HU) - value)
    if material.gas_above_mm is not None:
        value = np.where(y_mm[None, :, None] < material.gas_above_mm, np.float32(GAS_HU), value)
    return value


def render(parts: Sequence[Part], axes: Axes, psf_mm: float, texture_seed: int, slab_voxels: int = 3_000_000) -> Canvas:
    """Paint `parts` in order on the grid of `axes`, slab by slab along z to keep memory small."""
    rng = np.random.default_rng(texture_seed)
    grain_field, blotch_field = SmoothField(rng, 2.6, 40), SmoothField(rng, 12.0, 36)
    whole = Canvas(axes, psf_mm)
    step = max(4, slab_voxels // (len(axes[1]) * len(axes[2])))
    for start in range(0, len(axes[0]), step):
        z = axes[0][start : start + step]
        slab = Canvas((z, axes[1], axes[2]), psf_mm)
        grain = grain_field.sample(slab.axes)
        blotch = blotch_field.sample(slab.axes)
        for part in parts:
            slab.paint(part, grain.__getitem__, blotch.__getitem__)
        for name in ("hu", "organs", "lesions"):
            getattr(whole, name)[start : start + step] = getattr(slab, name)
    return whole
