"""Patches for the UNet's training: each case resampled once to 3×2×2 mm, sampled around its lesions."""

from __future__ import annotations

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
from training.augmentation import RandomEnhancement, RandomInPlane, RandomNoise
from training.cache import Arrays, prepare
from training.data import Case, Entry
from training.organs import beyond
from training.sources import Sources

FOREGROUND_SHARE = 0.5  # of the patches are centred near a lesion; nnU-Net's rule is 1/3, over whole batches
ROTATION, SCALE = 0.3, 0.2  # radians; logarithm of the magnification: largest of a patch, in-plane
NEAR = 12  # voxels: how far from a voxel of the lesion the patch's centre may lie, along each axis

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class GridCase:
    """On the network's grid, (z, y, x), memory-mapped: hu int16, label uint8 {0, 1}, organs as `Case`'s.

    lesions: voxels of each component, (n, 3). source: its FLARE folder.
    """

    source: Path
    hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    organs: NDArray[np.uint8]
    lesions: list[NDArray[np.int32]]


def grid_cases(entries: list[Entry], cache: Path, config: UNetConfig, jobs: int = 1) -> list[GridCase]:
    """Every case on the network's grid, resampled once; what the cache holds already is reused."""
    cache = cache / "grid_{}x{}x{}mm".format(*config.spacing_mm)
    made = prepare(entries, cache, partial(resample_case, config=config), jobs)
    return [_grid_case(entry.source, arrays) for entry, arrays in made]


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


def _grid_case(source: Path, arrays: Arrays) -> GridCase:
    component, voxels = arrays["lesions"][:, 0], arrays["lesions"][:, 1:]
    parts = np.split(voxels, np.flatnonzero(np.diff(component)) + 1) if len(voxels) else []
    return GridCase(source, arrays["hu"], arrays["label"], arrays["organs"], parts)


class Patches(NamedTuple):
    """image: float (N, channels, *patch) in [0, 1]; label: float {0, 1} (N, 1, *patch); organs: uint8 (N, *patch).

    source: the folder that each comes from, one-hot (N, folders).
    """

    image: Tensor
    label: Tensor
    organs: Tensor
    source: Tensor


def check_sides(patch: Patch) -> None:
    """ValueError where the network, which halves a patch three times, or what turns it in-plane cannot take it."""
    if min(patch) < 16 or any(side % 8 for side in patch) or patch[1] != patch[2]:
        raise ValueError(f"patch sides must be multiples of 8 from 16 on, the last two alike, not {patch}")


class PatchSampler:
    """Draws augmented patches, of each folder in its share; in every other one a random lesion is near the centre."""

    def __init__(self, cases: list[GridCase], config: UNetConfig, seed: int, shares: tuple[float, ...] = ()) -> None:
        """shares: as `Sources`'."""
        self.sources = Sources(cases, shares)
        self.with_lesion = [[case for case in group if case.lesions] for group in self.sources.groups]
        if not any(self.with_lesion):
            raise ValueError("no case has a lesion: nothing can be learnt")
        self.config, self.seed = config, seed
        # left-right alone: the other flips cost a short training more than they give
        self.in_plane = RandomInPlane(ROTATION, SCALE, shift=0, upside_down=0)
        self.enhancement, self.noise = RandomEnhancement(), RandomNoise()

    def batch(self, step: int, members: range, patch: Patch) -> Patches:
        """Members of the batch of a step: the same ones whenever, and by whichever process, they are asked for.

        members: of `members.stop` in all.
        """
        drawn = [self._patch(step, member, members.stop, patch) for member in members]
        return Patches(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _patch(self, step: int, member: int, batch: int, patch: Patch) -> Patches:
        rng = np.random.default_rng((self.seed, step, member))
        source = self.sources.draw(rng, member, batch)
        case, centre = self._place(rng, source)
        move, margin = self.in_plane.draw(rng), patch[1] // 4  # turned and scaled, a patch sees what lies beside it

        def moved(array: NDArray, outside: int, mode: str) -> Tensor:
            values = cut(array, centre, patch, outside, margin).astype(np.float32) - np.float32(outside)
            return move(torch.from_numpy(values), mode, margin) + outside  # where nothing is, there is `outside`

        label = (moved(case.label, 0, "bilinear")[None] >= 0.5).float()
        organs = moved(case.organs, beyond(case.organs), "nearest").byte()
        hu = self.enhancement.draw(rng)(moved(case.hu, AIR_HU, "bilinear"), organs)
        image = channels(_intensity(rng, self.noise.draw(rng)(hu).numpy()), self.config)
        return Patches(torch.from_numpy(image), label, organs, self.sources.one_hot(source))

    def _place(self, rng: np.random.Generator, source: int) -> tuple[GridCase, NDArray[np.int64]]:
        """A case of the folder, and the centre of a patch in it."""
        cases, with_lesion = self.sources.groups[source], self.with_lesion[source]
        if rng.random() >= FOREGROUND_SHARE or not with_lesion:
            case = cases[rng.integers(len(cases))]
            return case, rng.integers(0, case.hu.shape)
        case = with_lesion[rng.integers(len(with_lesion))]
        diameters = np.cbrt([len(lesion) for lesion in case.lesions])
        lesion = case.lesions[rng.choice(len(case.lesions), p=diameters / diameters.sum())]
        return case, lesion[rng.integers(len(lesion))] + rng.integers(-NEAR, NEAR + 1, 3)


def _intensity(rng: np.random.Generator, hu: NDArray[np.float32]) -> NDArray[np.float32]:
    """Another contrast about 50 HU, and an offset."""
    changed = (hu - 50) * np.exp(rng.uniform(-0.2, 0.2)) + 50 + rng.uniform(-20, 20)
    return np.asarray(changed, np.float32)


def cut(array: NDArray, centre: NDArray, patch: Patch, outside: int, margin: int = 0) -> NDArray:
    """The patch around `centre`, moved inside the array where it fits, else padded with `outside` at the far end.

    With `margin` voxels more at each side in-plane, `outside` where the array ends.
    """
    starts = [int(np.clip(c - p // 2, 0, max(n - p, 0))) for c, p, n in zip(centre, patch, array.shape, strict=True)]
    places, around = [], []
    for start, side, size, more in zip(starts, patch, array.shape, (0, margin, margin), strict=True):
        low, high = start - more, start + side + more
        places.append(slice(max(low, 0), min(high, size)))
        around.append((max(-low, 0), max(high - size, 0)))
    return np.pad(array[tuple(places)], around, constant_values=outside)
