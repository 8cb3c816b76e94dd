"""Shapes in millimetres and the renderer that paints them, in order, on any voxel grid.

Axis order is (z, y, x) everywhere: z feet to head, y anterior to posterior, x right to left.
A shape answers with its signed distance (negative inside), so that edges are anti-aliased by the voxel size and
layers (cortex, wall, rim) are mere insets of one distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Array = np.ndarray
Vector = Sequence[float]
Axes = tuple[Array, Array, Array]
"""Voxel centres in mm along z, y and x: three 1-D float32 arrays."""
Bounds = tuple[Array, Array]
"""Lowest and highest corner (z, y, x) in mm."""

FAR_MM = 1e3
GAS_HU = -960.0


class SmoothField:
    """A random field with unit standard deviation, smooth on the scale of `step_mm`, defined everywhere (periodic).

    Cubic B-splines over a cube of random numbers: the field is separable, so a whole box costs three small matrix
    products, and it has the same values in mm on every grid.
    """

    def __init__(self, rng: np.random.Generator, step_mm: float, size: int = 12) -> None:
        self.step_mm = step_mm
        self.size = size
        self.offset = rng.uniform(0, size, 3)
        # 0.479 is the mean of the summed squared B-spline weights along one axis.
        self.knots = rng.standard_normal((size,) * 3).astype(np.float32) / 0.479**1.5

    def _weights(self, axis_mm: Array, offset: float) -> Array:
        position = axis_mm / self.step_mm + offset
        cell = np.floor(position).astype(int)
        t = position - cell
        weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
        matrix = np.zeros((len(axis_mm), self.size), np.float32)
        rows = np.arange(len(axis_mm))
        for k in range(4):
            matrix[rows, (cell + k) % self.size] += weights[:, k]
        return matrix

    def sample(self, axes: Axes) -> Array:
        """Values at the grid of `axes`: float32 (z, y, x)."""
        wz, wy, wx = (self._weights(a, o) for a, o in zip(axes, self.offset, strict=True))
        planes = np.tensordot(wz, self.knots, 1)  # (nz, size, size)
        rows = np.matmul(wy, planes)  # (nz, ny, size)
        return rows @ wx.T


class Shape(Protocol):
    """What can be painted."""

    @property
    def bounds_mm(self) -> Bounds: ...

    def distance(self, axes: Axes) -> Array:
        """Signed distance in mm, negative inside, float32 (z, y, x)."""
        ...


def _open(axes: Axes, centre: Vector) -> Axes:
    z, y, x = (a - np.float32(c) for a, c in zip(axes, centre, strict=True))
    return z[:, None, None], y[None, :, None], x[None, None, :]


def _span(axes: Axes, low: Array, high: Array) -> tuple[slice, slice, slice]:
    z, y, x = (
        slice(int(np.searchsorted(a, lo)), int(np.searchsorted(a, hi, side="right")))
        for a, lo, hi in zip(axes, low, high, strict=True)
    )
    return z, y, x


def rotation(rng: np.random.Generator, degrees: float) -> Array:
    """A random rotation matrix by up to `degrees` about each axis, 3×3."""
    matrix = np.eye(3)
    for axis in range(3):
        angle = np.deg2rad(rng.uniform(-degrees, degrees))
        i, j = (k for k in range(3) if k != axis)
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


@dataclass(frozen=True)
class Ellipsoid:
    """Centre and radii in mm (z, y, x), turned by an optional 3×3 rotation."""

    centre: Vector
    radii: Vector
    turn: Array | None = None

    @property
    def bounds_mm(self) -> Bounds:
        reach = np.asarray(self.radii, float) if self.turn is None else np.full(3, max(self.radii))
        return np.asarray(self.centre) - reach, np.asarray(self.centre) + reach

    def distance(self, axes: Axes) -> Array:
        p: Sequence[Array] = _open(axes, self.centre)
        if self.turn is not None:
            rows = self.turn.astype(np.float32)
            p = [r[0] * p[0] + r[1] * p[1] + r[2] * p[2] for r in rows]
        unit = [a / np.float32(r) for a, r in zip(p, self.radii, strict=True)]
        k0 = np.sqrt(unit[0] ** 2 + unit[1] ** 2 + unit[2] ** 2)
        steep = [u / np.float32(r) for u, r in zip(unit, self.radii, strict=True)]
        k1 = np.sqrt(steep[0] ** 2 + steep[1] ** 2 + steep[2] ** 2)
        return k0 * (k0 - 1) / np.maximum(k1, np.float32(1e-6))


@dataclass(frozen=True)
class Column:
    """A stack of (squarish) ellipses along z, given at knots: centre y, x and half-axes y, x, all in mm.

    `square` 0 is an ellipse, 0.7 nearly a rounded rectangle.
    """

    z: Vector
    cy: Vector
    cx: Vector
    ay: Vector
    ax: Vector
    square: float = 0.0

    @property
    def bounds_mm(self) -> Bounds:
        cy, cx, ay, ax = (np.asarray(v, float) for v in (self.cy, self.cx, self.ay, self.ax))
        low = [min(self.z), (cy - ay).min(), (cx - ax).min()]
        return np.array(low), np.array([max(self.z), (cy + ay).max(), (cx + ax).max()])

    def _knots(self, values: Vector, z: Array) -> Array:
        return np.interp(z, self.z, values).astype(np.float32)[:, None, None]

    def distance(self, axes: Axes) -> Array:
        cy, cx, ay, ax = (self._knots(v, axes[0]) for v in (self.cy, self.cx, self.ay, self.ax))
        u2 = ((axes[1][None, :, None] - cy) / ay) ** 2
        v2 = ((axes[2][None, None, :] - cx) / ax) ** 2
        q = u2 + v2
        steep = np.sqrt(u2 / ay**2 + v2 / ax**2)
        if self.square:
            q -= np.float32(self.square) * np.minimum(u2, 1.7) * np.minimum(v2, 1.7)
        k0 = np.sqrt(np.maximum(q, 0))
        d = k0 * (k0 - 1) / np.maximum(steep, np.float32(1e-6))
        ends = np.maximum(min(self.z) - axes[0], axes[0] - max(self.z))[:, None, None]
        return np.maximum(d, ends)


@dataclass(frozen=True)
class Tube:
    """Capsules from `starts` to `ends` (n, 3) with radii (n,) at both ends, united."""

    starts: Array
    ends: Array
    start_radii: Array
    end_radii: Array

    @classmethod
    def along(cls, points: Sequence[Vector] | Array, radii: Vector | float) -> Tube:
        """A tube through `points` (n, 3), its radius one number or one per point."""
        p = np.asarray(points, float)
        r = np.broadcast_to(np.asarray(radii, float), len(p))
        return cls(p[:-1], p[1:], r[:-1], r[1:])

    @property
    def bounds_mm(self) -> Bounds:
        r = np.maximum(self.start_radii, self.end_radii)[:, None]
        low = np.minimum(self.starts, self.ends) - r
        return low.min(0), (np.maximum(self.starts, self.ends) + r).max(0)

    def distance(self, axes: Axes) -> Array:
        out = np.full([len(a) for a in axes], FAR_MM, np.float32)
        pad = 4 + 1.5 * max(float(a[1] - a[0]) if len(a) > 1 else 0.0 for a in axes)
        for a, b, ra, rb in zip(self.starts, self.ends, self.start_radii, self.end_radii, strict=True):
            reach = max(ra, rb) + pad
            box = _span(axes, np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            if all(s.stop > s.start for s in box):
                part = _capsule((axes[0][box[0]], axes[1][box[1]], axes[2][box[2]]), a, b, ra, rb)
                np.minimum(out[box], part, out=out[box])
        return out


def _capsule(axes: Axes, a: Array, b: Array, ra: float, rb: float) -> Array:
    z, y, x = _open(axes, a)
    step = (b - a).astype(np.float32)
    length2 = max(float(step @ step), 1e-6)
    dot = z * step[0] + (y * step[1] + x * step[2])
    t = np.clip(dot / np.float32(length2), 0, 1)
    square = z**2 + (y**2 + x**2) + t * (t * np.float32(length2) - 2 * dot)
    return np.sqrt(np.maximum(square, 0)) - (np.float32(ra) + t * np.float32(rb - ra))


@dataclass(frozen=True)
class Blend:
    """The union of shapes, their seams rounded over about `round_mm`."""

    shapes: Sequence[Shape]
    round_mm: float

    @property
    def bounds_mm(self) -> Bounds:
        low, high = zip(*(s.bounds_mm for s in self.shapes), strict=True)
        return np.min(low, 0) - self.round_mm / 4, np.max(high, 0) + self.round_mm / 4

    def distance(self, axes: Axes) -> Array:
        out = self.shapes[0].distance(axes)
        for shape in self.shapes[1:]:
            other = shape.distance(axes)
            near = np.maximum(self.round_mm - np.abs(out - other), 0)
            out = np.minimum(out, other) - near**2 / np.float32(4 * self.round_mm)
        return out


@dataclass(frozen=True)
class Cut:
    """`shape` without `away`, or, with `keep`, only what lies in it too."""

    shape: Shape
    away: Shape | None = None
    keep: Shape | None = None

    @property
    def bounds_mm(self) -> Bounds:
        return self.shape.bounds_mm

    def distance(self, axes: Axes) -> Array:
        d = self.shape.distance(axes)
        if self.keep is not None:
            d = np.maximum(d, self.keep.distance(axes))
        return d if self.away is None else np.maximum(d, -self.away.distance(axes))


@dataclass(frozen=True)
class Wobble:
    """`shape` with its surface moved in and out by a smooth field of `amplitude_mm` (one standard deviation)."""

    shape: Shape
    field: SmoothField
    amplitude_mm: float

    @property
    def bounds_mm(self) -> Bounds:
        low, high = self.shape.bounds_mm
        return low - 2.5 * self.amplitude_mm, high + 2.5 * self.amplitude_mm

    def distance(self, axes: Axes) -> Array:
        return self.shape.distance(axes) + np.float32(self.amplitude_mm) * self.field.sample(axes)


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
        box = _span(self.axes, np.asarray(low) - pad, np.asarray(high) + pad)
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
        # Beyond the reach of its segments a tube's distance is FAR_MM: no slope there.
        return np.sqrt(np.minimum(rise**2, 100) + flat**2)


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
