"""The voxel grid that phantoms are painted on, and what computes its volumes: numpy, or torch on a device.

Both give the same picture (`tests/training/test_grid.py`): the few functions that differ by name or by type are here,
the rest is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray
Axes = tuple[Array, Array, Array]
"""Voxel centres in mm along z, y and x: three 1-D float32 arrays of numpy."""
Volume = Any
"""An array (z, y, x), or one that broadcasts to it, of whatever computes it."""
FLOAT, LABEL = "float32", "uint8"
"""Types of volumes, by the names that numpy and torch share."""


class Numpy:
    """On the host. Numbers and arrays of numpy come in by `number` and `put`, results leave by `fetch`.

    number: of 32 bits, so that it leaves the type of the volumes that it meets as it is. full: (shape, value, type).
    take: (volume, indices of numpy, axis). lookup: table[label] of each label. The rest is as numpy's.
    """

    def __init__(self) -> None:
        self.number: Callable[[Any], Any] = np.float32
        self.full: Callable[..., Volume] = np.full
        self.take: Callable[..., Volume] = np.take
        self.sqrt: Callable[..., Volume] = np.sqrt
        self.abs: Callable[..., Volume] = np.abs
        self.minimum: Callable[..., Volume] = np.minimum
        self.maximum: Callable[..., Volume] = np.maximum
        self.clip: Callable[..., Volume] = np.clip
        self.where: Callable[..., Volume] = np.where

    def put(self, array: Array) -> Volume:
        return array

    def fetch(self, volume: Volume) -> Array:
        return np.asarray(volume)

    def lookup(self, table: Array, labels: Volume) -> Volume:
        return table[labels]


class Torch(Numpy):
    """The same on a device of torch, which is imported for it."""

    def __init__(self, device: str) -> None:
        """device: as torch names it, "cuda:0". ValueError where it cannot be used."""
        import torch

        self.torch = torch
        try:
            self.device = torch.zeros(1, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device} cannot be used: take cpu, or see that torch finds it") from error
        for name in ("sqrt", "abs", "minimum", "maximum", "clip", "where"):
            setattr(self, name, getattr(torch, name))
        self.number = lambda value: float(np.float32(value))
        self.full = lambda shape, value, dtype: torch.full(
            tuple(shape), value, dtype=getattr(torch, dtype), device=self.device
        )
        self.take = lambda volume, indices, axis: volume.index_select(axis, self.put(indices))

    def put(self, array: Array) -> Volume:
        volume = self.torch.from_numpy(np.ascontiguousarray(array))
        return volume.to(self.device, self.torch.float32 if volume.is_floating_point() else None)

    def fetch(self, volume: Volume) -> Array:
        return np.asarray(volume.cpu())

    def lookup(self, table: Array, labels: Volume) -> Volume:
        return self.put(table)[labels.long()]


HOST = Numpy()


@cache
def computer(device: str) -> Numpy:
    """Numpy for "cpu", on one core; torch for "cuda" or "cuda:N". ValueError where the device cannot be used."""
    return HOST if device == "cpu" else Torch(device)


@dataclass(frozen=True)
class Grid:
    """Where voxels lie, and what computes their values."""

    axes: Axes
    on: Numpy = HOST

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = (len(axis) for axis in self.axes)
        return z, y, x

    def part(self, box: Sequence[slice]) -> Grid:
        """Of the voxels in a box (z, y, x)."""
        z, y, x = (axis[cut] for axis, cut in zip(self.axes, box, strict=True))
        return Grid((z, y, x), self.on)

    def open(self, centre: Sequence[float] | Array = (0, 0, 0)) -> tuple[Volume, Volume, Volume]:
        """Distance in mm of the voxels from a centre along z, y and x, each of a shape that broadcasts."""
        z, y, x = (self.on.put(a - np.float32(c)) for a, c in zip(self.axes, centre, strict=True))
        return z[:, None, None], y[None, :, None], x[None, None, :]
