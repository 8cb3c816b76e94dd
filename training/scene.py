"""A scene is a list of parts, painted in order on any voxel grid.

Axis order is (z, y, x). Distances in mm make edges fade over the voxel size and the scanner's blur, and make layers
(cortex, wall, rim) mere insets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from training.grid import FLOAT, HOST, LABEL, Axes, Grid, Numpy, Volume
from training.shapes import Shape, SmoothField, span

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

    grid: Grid
    psf_mm: float
    hu: Volume = field(init=False)
    organs: Volume = field(init=False)
    lesions: Volume = field(init=False)

    def __post_init__(self) -> None:
        shape, on = self.grid.shape, self.grid.on
        self.hu = on.full(shape, -1000, FLOAT)
        self.organs = on.full(shape, 0, LABEL)
        self.lesions = on.full(shape, 0, LABEL)
        _, y, x = self.axes
        in_plane = max(float(y[1] - y[0]), float(x[1] - x[0]))
        self.edge_mm = float(np.hypot(in_plane, self.psf_mm))

    @property
    def axes(self) -> Axes:
        return self.grid.axes

    def paint(self, part: Part, grain: Callable[..., Volume], blotch: Callable[..., Volume]) -> None:
        """Blend `part` over what is there; `grain` and `blotch` give the texture of a box (three slices)."""
        low, high = part.shape.bounds_mm
        pad = self.edge_mm + part.blur_mm / 2
        box = span(self.axes, np.asarray(low) - pad, np.asarray(high) + pad)
        if any(s.stop <= s.start for s in box):
            return
        grid, on = self.grid.part(box), self.grid.on
        d = part.shape.distance(grid)
        allowed = None
        if part.only_over is not None:
            table = np.zeros(256, bool)
            table[list(part.only_over)] = True
            allowed = on.lookup(table, self.organs[box])
        width = self._edge_width(d, part.blur_mm)
        for inset, material in part.layers:
            alpha = on.clip(0.5 - (d + on.number(inset)) / width, 0, 1)
            if allowed is not None:
                alpha *= allowed
            self.hu[box] += alpha * (_values(material, grid, box, grain, blotch) - self.hu[box])
        inside = d < 0 if allowed is None else (d < 0) & allowed
        self.organs[box][inside] = part.organ
        if part.lesion:
            self.lesions[box][inside] = part.lesion

    def _edge_width(self, d: Volume, blur_mm: float) -> Volume:
        """Width in mm over which an edge fades: a slanting surface fades over the slice thickness."""
        on, flat = self.grid.on, np.float32(max(self.edge_mm, blur_mm))
        if len(d) < 2:
            return on.number(flat)
        rise = 0 * d
        rise[1:-1] = (d[2:] - d[:-2]) / 2
        rise[0], rise[-1] = d[1] - d[0], d[-1] - d[-2]
        # A distance rises by at most the slice spacing; more is a tube's jump to FAR_MM beyond its reach.
        spacing = np.float32(self.axes[0][1] - self.axes[0][0])
        return on.sqrt(on.clip(rise**2, None, on.number(spacing**2)) + on.number(flat**2))


def _values(
    material: Material, grid: Grid, box: tuple[slice, ...], grain: Callable[..., Volume], blotch: Callable[..., Volume]
) -> Volume:
    on = grid.on
    value = on.number(material.hu)
    if material.grain_hu:
        value = value + on.number(material.grain_hu) * grain(box)
    if material.blotch_hu:
        value = value + on.number(material.blotch_hu) * blotch(box)
    if material.bubbles:
        # Around the threshold the bubble fills part of the voxel.
        threshold = on.number(1.6 - 3 * material.bubbles)
        share = on.clip((grain(box) - threshold) * 2, 0, 0.9)
        value = value + share * (on.number(GAS_HU) - value)
    if material.gas_above_mm is not None:
        _, y, _ = grid.open()
        value = on.where(y < material.gas_above_mm, on.number(GAS_HU), value)
    return value


def render(
    parts: Sequence[Part],
    axes: Axes,
    psf_mm: float,
    texture_seed: int,
    slab_voxels: int = 3_000_000,
    on: Numpy = HOST,
) -> Canvas:
    """Paint `parts` in order on the grid of `axes`, slab by slab along z to keep memory small.

    The canvas lies on the host, whatever paints.
    """
    rng = np.random.default_rng(texture_seed)
    grain_field, blotch_field = SmoothField(rng, 2.6, 40), SmoothField(rng, 12.0, 36)
    whole = Canvas(Grid(axes), psf_mm)
    step = max(4, slab_voxels // (len(axes[1]) * len(axes[2])))
    for start in range(0, len(axes[0]), step):
        slab = Canvas(Grid((axes[0][start : start + step], axes[1], axes[2]), on), psf_mm)
        grain = grain_field.sample(slab.grid)
        blotch = blotch_field.sample(slab.grid)
        for part in parts:
            slab.paint(part, grain.__getitem__, blotch.__getitem__)
        for name in ("hu", "organs", "lesions"):
            getattr(whole, name)[start : start + step] = on.fetch(getattr(slab, name))
    return whole
