"""Patches for the UNet's training: each case resampled once to 3×2×2 mm, sampled around its lesions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.resampling import nearest
from inference.unet import AIR_HU, UNetConfig, channels, resample
from training.anatomy import Organ
from training.cache import Arrays, prepare
from training.data import Case, Entry

FOREGROUND_SHARE = 0.5  # of the patches are centred near a lesion; nnU-Net's rule is 1/3, over whole batches
NEAR = 12  # voxels: how far from a voxel of the lesion the patch's centre may lie, along each axis

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class GridCase:
    """On the network's grid, (z, y, x), memory-mapped: hu int16, label uint8 {0, 1}, organs as `Case`'s.

    lesions: voxels of each component, (n, 3).
    """

    name: str
    hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    organs: NDArray[np.uint8]
    lesions: list[NDArray[np.int32]]


def grid_cases(entries: list[Entry], cache: Path, config: UNetConfig, jobs: int = 1) -> list[GridCase]:
    """Every case on the network's grid, resampled once; what the cache holds already is reused."""
    cache = cache / "grid_{}x{}x{}mm".format(*config.spacing_mm)
    made = prepare(entries, cache, partial(resample_case, config=config), jobs)
    return [_grid_case(entry.name, arrays) for entry, arrays in made]


def resample_case(case: Case, config: UNetConfig) -> Arrays:
    """hu, label and organs of a case on the network's grid; lesions: int32 (n, 4), component and its voxel z, y, x."""
    hu = np.rint(resample(case.hu, case.spacing_mm, config)).astype(np.int16)
    label = (resample(case.label > 0, case.spacing_mm, config) >= 0.5).astype(np.uint8)
    grids = zip(case.hu.shape, case.spacing_mm, hu.shape, config.spacing_mm, strict=True)
    organs = case.organs[np.ix_(*(nearest(*grid) for grid in grids))]
    components = cc3d.connected_components(label, connectivity=26)
    voxels = np.argwhere(components)
    lesions = np.column_stack([components[tuple(voxels.T)], voxels]).astype(np.int32)
    return {"hu": hu, "label": label, "organs": organs, "lesions": lesions[np.argsort(lesions[:, 0], kind="stable")]}


def _grid_case(name: str, arrays: Arrays) -> GridCase:
    component, voxels = arrays["lesions"][:, 0], arrays["lesions"][:, 1:]
    parts = np.split(voxels, np.flatnonzero(np.diff(component)) + 1) if len(voxels) else []
    return GridCase(name, arrays["hu"], arrays["label"], arrays["organs"], parts)


class Patches(NamedTuple):
    """image: float (N, channels, *patch) in [0, 1]; label: float {0, 1} (N, 1, *patch); organs: uint8 (N, *patch)."""

    image: Tensor
    label: Tensor
    organs: Tensor


class PatchSampler:
    """Draws augmented patches; in every other one a random lesion is near the centre."""

    def __init__(self, cases: list[GridCase], config: UNetConfig, seed: int) -> None:
        self.cases = cases
        self.with_lesion = [case for case in cases if case.lesions]
        if not self.with_lesion:
            raise ValueError("no case has a lesion: nothing can be learnt")
        self.config, self.seed = config, seed

    def batch(self, step: int, members: Iterable[int], patch: Patch) -> Patches:
        """Members of the batch of a step: the same ones whenever, and by whichever process, they are asked for."""
        drawn = [self._patch(np.random.default_rng((self.seed, step, member)), patch) for member in members]
        return Patches(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _patch(self, rng: np.random.Generator, patch: Patch) -> Patches:
        case, centre = self._place(rng)
        hu, label, organs = (
            cut(array, centre, patch, outside)
            for array, outside in ((case.hu, AIR_HU), (case.label, 0), (case.organs, Organ.AIR))
        )
        if rng.random() < 0.5:  # left-right alone: the other flips cost a short training more than they give
            hu, label, organs = (np.flip(array, 2) for array in (hu, label, organs))
        image = channels(_intensity(rng, hu.astype(np.float32)), self.config)
        return Patches(
            torch.from_numpy(image),
            torch.from_numpy(label[None].astype(np.float32)),
            torch.from_numpy(np.ascontiguousarray(organs)),
        )

    def _place(self, rng: np.random.Generator) -> tuple[GridCase, NDArray[np.int64]]:
        """A case, and the centre of a patch in it."""
        if rng.random() >= FOREGROUND_SHARE:
            case = self.cases[rng.integers(len(self.cases))]
            return case, rng.integers(0, case.hu.shape)
        case = self.with_lesion[rng.integers(len(self.with_lesion))]
        diameters = np.cbrt([len(lesion) for lesion in case.lesions])
        lesion = case.lesions[rng.choice(len(case.lesions), p=diameters / diameters.sum())]
        return case, lesion[rng.integers(len(lesion))] + rng.integers(-NEAR, NEAR + 1, 3)


def _intensity(rng: np.random.Generator, hu: NDArray[np.float32]) -> NDArray[np.float32]:
    """Another contrast about 50 HU, an offset, noise."""
    changed = (hu - 50) * np.exp(rng.uniform(-0.2, 0.2)) + 50 + rng.uniform(-20, 20)
    if rng.random() < 0.3:
        changed += rng.normal(0, rng.uniform(0, 15), hu.shape)
    return changed.astype(np.float32)


def cut(array: NDArray, centre: NDArray, patch: Patch, outside: int) -> NDArray:
    """The patch around `centre`, moved inside the array where it fits, else padded with `outside` at the far end."""
    starts = [int(np.clip(c - p // 2, 0, max(n - p, 0))) for c, p, n in zip(centre, patch, array.shape, strict=True)]
    inside = array[tuple(slice(s, s + p) for s, p in zip(starts, patch, strict=True))]
    margins = [(0, p - n) for p, n in zip(patch, inside.shape, strict=True)]
    return np.pad(inside, margins, constant_values=outside)
