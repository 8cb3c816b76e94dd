"""Shapes in millimetres: each answers with its signed distance, negative inside, on any voxel grid.

Axis order is (z, y, x) everywhere: z feet to head, y anterior to posterior, x right to left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Array = np.ndarray
Vector = Sequence[float] | Array
Axes = tuple[Array, Array, Array]
"""Voxel centres in mm along z, y and x: three 1-D float32 arrays."""
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

    def sample(self, axes: Axes) -> Array:
        """Values at the grid of `axes`: float32 (z, y, x)."""
        values = self.knots
        for k in range(3):
            values = self._along(values, k, (axes[k] - self.origin_mm[k]) / self.step_mm + self.offset[k])
        return values

    def _along(self, values: Array, axis: int, position: Array) -> Array:
        # Four taps, not a matrix product: BLAS starts threads, which stall where many phantoms are made at once.
        cell = np.floor(position).astype(int)
        t = position - cell
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        shape = [1, 1, 1]
        shape[axis] = -1
        taps = (
            np.take(values, (cell + k) % self.size, axis) * (weight / 6).astype(np.float32).reshape(shape)
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

    def distance(self, axes: Axes) -> Array:
        """Signed distance in mm, negative inside, float32 (z, y, x)."""
        ...


def _open(axes: Axes, centre: Vector) -> Axes:
    z, y, x = (a - np.float32(c) for a, c in zip(axes, centre, strict=True))
    return z[:, None, None], y[None, :, None], x[None, None, :]


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
        reach = np.maximum(self.start_radii, self.end_radii)[:, None] + pad
        low, high = np.minimum(self.starts, self.ends) - reach, np.maximum(self.starts, self.ends) + reach
        first = np.stack([np.searchsorted(a, low[:, k]) for k, a in enumerate(axes)], 1)
        stop = np.stack([np.searchsorted(a, high[:, k], side="right") for k, a in enumerate(axes)], 1)
        for k in np.flatnonzero((stop > first).all(1)):
            z, y, x = (slice(i, j) for i, j in zip(first[k], stop[k], strict=True))
            box = (axes[0][z], axes[1][y], axes[2][x])
            part = _capsule(box, self.starts[k], self.ends[k], self.start_radii[k], self.end_radii[k])
            np.minimum(out[z, y, x], part, out=out[z, y, x])
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

    def distance(self, axes: Axes) -> Array:
        y, x = axes[1][:, None], axes[2][None, :]
        level = np.float32(self.y) - x**2 / np.float32(2 * self.radius_mm)
        plane = np.maximum(np.abs(y - level) - np.float32(self.half_thickness), np.abs(x) - np.float32(self.half_width))
        return np.repeat(plane[None].astype(np.float32), len(axes[0]), 0)


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
