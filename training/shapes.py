"""Shapes in millimetres: each answers with its signed distance, negative inside, on any voxel grid (`grid.py`).

Axis order is (z, y, x) everywhere: z feet to head, y anterior to posterior, x right to left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from training.grid import FLOAT, Array, Axes, Grid, Numpy, Volume

Vector = Sequence[float] | Array
Bounds = tuple[Array, Array]
"""Lowest and highest corner (z, y, x) in mm."""

FAR_MM = 1e3


class SmoothField:
    """A random field with unit standard deviation, smooth on the scale of `step_mm`, defined everywhere (periodic).

    Cubic B-splines over a cube of random numbers: separable, so a voxel costs four taps or so, and with the same
    values in mm on every grid.
    """

    def __init__(self, rng: np.random.Generator, step_mm: float, size: int = 12) -> None:
        self.step_mm = step_mm
        self.size = size
        self.offset = rng.uniform(0, size, 3)
        self.origin_mm = np.zeros(3)
        # 0.479 is the mean of the summed squared B-spline weights along one axis.
        self.knots = rng.standard_normal((size,) * 3).astype(np.float32) / 0.479**1.5

    def sample(self, grid: Grid) -> Volume:
        """Values at the voxels: float32 (z, y, x)."""
        values = grid.on.put(self.knots)
        for k, axis in enumerate(grid.axes):
            position = (axis - self.origin_mm[k]) / self.step_mm + self.offset[k]
            values = self._along(values, k, position, grid.on)
        return values

    def _along(self, values: Volume, axis: int, position: Array, on: Numpy) -> Volume:
        # Four taps, not a matrix product: BLAS starts threads, which stall where many phantoms are made at once.
        cell = np.floor(position).astype(int)
        t = position - cell
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        shape = [1, 1, 1]
        shape[axis] = -1
        taps = (
            on.take(values, (cell + k) % self.size, axis) * on.put((weight / 6).astype(np.float32).reshape(shape))
            for k, weight in enumerate(weights)
        )
        out = next(taps)
        for tap in taps:
            out += tap
        return out


class Shape(Protocol):
    """What can be painted."""

    @property
    def bounds_mm(self) -> Bounds: ...

    def distance(self, grid: Grid) -> Volume:
        """Signed distance in mm, negative inside, float32 (z, y, x)."""
        ...


def span(axes: Axes, low: Array, high: Array) -> tuple[slice, slice, slice]:
    """Slices (z, y, x) of the voxels between two corners in mm."""
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

    def distance(self, grid: Grid) -> Volume:
        on = grid.on
        p: Sequence[Volume] = grid.open(self.centre)
        if self.turn is not None:
            rows = [[on.number(value) for value in row] for row in self.turn]
            p = [r[0] * p[0] + r[1] * p[1] + r[2] * p[2] for r in rows]
        unit = [a / on.number(r) for a, r in zip(p, self.radii, strict=True)]
        k0 = on.sqrt(unit[0] ** 2 + unit[1] ** 2 + unit[2] ** 2)
        steep = [u / on.number(r) for u, r in zip(unit, self.radii, strict=True)]
        k1 = on.sqrt(steep[0] ** 2 + steep[1] ** 2 + steep[2] ** 2)
        return k0 * (k0 - 1) / on.clip(k1, 1e-6, None)


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

    def distance(self, grid: Grid) -> Volume:
        on, z = grid.on, grid.axes[0]
        cy, cx, ay, ax = (
            on.put(np.interp(z, self.z, values).astype(np.float32)[:, None, None])
            for values in (self.cy, self.cx, self.ay, self.ax)
        )
        _, y, x = grid.open()
        u2 = ((y - cy) / ay) ** 2
        v2 = ((x - cx) / ax) ** 2
        q = u2 + v2
        steep = on.sqrt(u2 / ay**2 + v2 / ax**2)
        if self.square:
            q -= on.number(self.square) * on.clip(u2, None, 1.7) * on.clip(v2, None, 1.7)
        k0 = on.sqrt(on.clip(q, 0, None))
        d = k0 * (k0 - 1) / on.clip(steep, 1e-6, None)
        ends = np.maximum(min(self.z) - z, z - max(self.z))
        return on.maximum(d, on.put(ends[:, None, None]))


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

    def distance(self, grid: Grid) -> Volume:
        axes, on = grid.axes, grid.on
        out = on.full(grid.shape, FAR_MM, FLOAT)
        pad = 4 + 1.5 * max(float(a[1] - a[0]) if len(a) > 1 else 0.0 for a in axes)
        reach = np.maximum(self.start_radii, self.end_radii)[:, None] + pad
        low, high = np.minimum(self.starts, self.ends) - reach, np.maximum(self.starts, self.ends) + reach
        first = np.stack([np.searchsorted(a, low[:, k]) for k, a in enumerate(axes)], 1)
        stop = np.stack([np.searchsorted(a, high[:, k], side="right") for k, a in enumerate(axes)], 1)
        for k in np.flatnonzero((stop > first).all(1)):
            z, y, x = (slice(i, j) for i, j in zip(first[k], stop[k], strict=True))
            capsule = _capsule(
                grid.part((z, y, x)), self.starts[k], self.ends[k], self.start_radii[k], self.end_radii[k]
            )
            out[z, y, x] = on.minimum(out[z, y, x], capsule)
        return out


def _capsule(grid: Grid, a: Array, b: Array, ra: float, rb: float) -> Volume:
    on = grid.on
    z, y, x = grid.open(a)
    along = (b - a).astype(np.float32)
    length2 = on.number(max(float(along @ along), 1e-6))
    step = [on.number(value) for value in along]
    dot = z * step[0] + (y * step[1] + x * step[2])
    t = on.clip(dot / length2, 0, 1)
    square = z**2 + (y**2 + x**2) + t * (t * length2 - 2 * dot)
    return on.sqrt(on.clip(square, 0, None)) - (on.number(ra) + t * on.number(rb - ra))


@dataclass(frozen=True)
class Sheet:
    """A sheet along z at depth `y`, sagging by a circle of `radius_mm`; half width along x, half thickness along y."""

    y: float
    radius_mm: float
    half_width: float
    half_thickness: float

    @property
    def bounds_mm(self) -> Bounds:
        rise = self.half_width**2 / (2 * self.radius_mm)
        low = [-1e4, self.y - rise - self.half_thickness, -self.half_width]
        return np.array(low), np.array([1e4, self.y + self.half_thickness, self.half_width])

    def distance(self, grid: Grid) -> Volume:
        on = grid.on
        _, y, x = grid.open()
        level = on.number(self.y) - x**2 / on.number(2 * self.radius_mm)
        beyond = on.abs(y - level) - on.number(self.half_thickness)
        plane = on.maximum(beyond, on.abs(x) - on.number(self.half_width))
        return plane + on.full((grid.shape[0], 1, 1), 0, FLOAT)


@dataclass(frozen=True)
class Blend:
    """The union of shapes, their seams rounded over about `round_mm`."""

    shapes: Sequence[Shape]
    round_mm: float

    @property
    def bounds_mm(self) -> Bounds:
        low, high = zip(*(s.bounds_mm for s in self.shapes), strict=True)
        return np.min(low, 0) - self.round_mm / 4, np.max(high, 0) + self.round_mm / 4

    def distance(self, grid: Grid) -> Volume:
        on = grid.on
        out = self.shapes[0].distance(grid)
        for shape in self.shapes[1:]:
            other = shape.distance(grid)
            near = on.clip(self.round_mm - on.abs(out - other), 0, None)
            out = on.minimum(out, other) - near**2 / on.number(4 * self.round_mm)
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

    def distance(self, grid: Grid) -> Volume:
        d = self.shape.distance(grid)
        if self.keep is not None:
            d = grid.on.maximum(d, self.keep.distance(grid))
        return d if self.away is None else grid.on.maximum(d, -self.away.distance(grid))


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

    def distance(self, grid: Grid) -> Volume:
        return self.shape.distance(grid) + grid.on.number(self.amplitude_mm) * self.field.sample(grid)
