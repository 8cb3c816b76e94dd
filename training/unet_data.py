"""Patches for the UNet's training: each case resampled once to 3×2×2 mm, sampled around its lesions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from inference.resampling import nearest
from inference.unet import AIR_HU, UNetConfig, channels, resample
from training.anatomy import Organ
from training.data import Case, case_names, load_case

FOREGROUND_SHARE = 0.67  # of the patches are centred near a lesion; nnU-Net's rule is 1/3, over whole batches


@dataclass(frozen=True)
class GridCase:
    """On the network's grid, (z, y, x): hu int16, label uint8 {0, 1}, organs as `Case`'s.

    lesions: voxels of each component, (n, 3).
    """

    name: str
    hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    organs: NDArray[np.uint8]
    lesions: list[NDArray[np.intp]]


def prepare(folder: Path, cache: Path, config: UNetConfig) -> list[GridCase]:
    """Resample every case of a FLARE folder, once; what the cache holds already is reused."""
    cache.mkdir(parents=True, exist_ok=True)
    cases = []
    for name in tqdm(case_names(folder), desc="grids", unit="case"):
        path = cache / f"{name}.npz"
        if not path.exists():
            temporary = path.with_name(f".{path.name}")
            hu, label, organs = resample_case(load_case(folder, name), config)
            np.savez_compressed(temporary, hu=hu, label=label, organs=organs)
            temporary.rename(path)
        with np.load(path) as arrays:
            hu, label, organs = arrays["hu"], arrays["label"], arrays["organs"]
        components, count = cc3d.connected_components(label, connectivity=26, return_N=True)
        cases.append(GridCase(name, hu, label, organs, [np.argwhere(components == i + 1) for i in range(count)]))
    return cases


def resample_case(case: Case, config: UNetConfig) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint8]]:
    """hu, label and organs of a case on the network's grid."""
    hu = np.rint(resample(case.hu, case.spacing_mm, config)).astype(np.int16)
    label = (resample(case.label, case.spacing_mm, config) >= 0.5).astype(np.uint8)
    grids = zip(case.hu.shape, case.spacing_mm, hu.shape, config.spacing_mm, strict=True)
    return hu, label, case.organs[np.ix_(*(nearest(*grid) for grid in grids))]


class Patches(NamedTuple):
    """image: float in [0, 1]; label: float {0, 1}; organs: uint8; shapes as `PatchSampler.batch` says."""

    image: Tensor
    label: Tensor
    organs: Tensor


class PatchSampler:
    """Draws augmented patches; in two of three a random lesion is near the centre."""

    def __init__(self, cases: list[GridCase], config: UNetConfig, seed: int) -> None:
        self.cases = cases
        self.with_lesion = [case for case in cases if case.lesions]
        if not self.with_lesion:
            raise ValueError("no case has a lesion: nothing can be learnt")
        self.config = config
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int, patch: tuple[int, int, int]) -> Patches:
        """Images (size, channels, *patch) in [0, 1], labels (size, 1, *patch) and organs (size, *patch)."""
        drawn = [self._patch(patch) for _ in range(size)]
        return Patches(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _patch(self, patch: tuple[int, int, int]) -> Patches:
        if self.rng.random() < FOREGROUND_SHARE:
            case = self.with_lesion[self.rng.integers(len(self.with_lesion))]
            lesion = self._lesion(case)
            centre = lesion[self.rng.integers(len(lesion))] + self.rng.integers(-12, 13, 3)
        else:
            case = self.cases[self.rng.integers(len(self.cases))]
            centre = self.rng.integers(0, case.hu.shape)
        hu, label, organs = (
            cut(array, centre, patch, outside)
            for array, outside in ((case.hu, AIR_HU), (case.label, 0), (case.organs, Organ.AIR))
        )
        if self.rng.random() < 0.5:  # left-right alone: the other flips cost a short training more than they give
            hu, label, organs = (np.flip(array, 2) for array in (hu, label, organs))
        image = channels(self._intensity(hu.astype(np.float32)), self.config)
        return Patches(
            torch.from_numpy(image),
            torch.from_numpy(label[None].astype(np.float32)),
            torch.from_numpy(np.ascontiguousarray(organs)),
        )

    def _lesion(self, case: GridCase) -> NDArray[np.intp]:
        """One of the case's lesions, drawn by the cube root of its volume: by its diameter."""
        diameters = np.cbrt([len(lesion) for lesion in case.lesions])
        return case.lesions[self.rng.choice(len(case.lesions), p=diameters / diameters.sum())]

    def _intensity(self, hu: NDArray[np.float32]) -> NDArray[np.float32]:
        """Another contrast about 50 HU, an offset, noise."""
        changed = (hu - 50) * np.exp(self.rng.uniform(-0.2, 0.2)) + 50 + self.rng.uniform(-20, 20)
        if self.rng.random() < 0.3:
            changed += self.rng.normal(0, self.rng.uniform(0, 15), hu.shape)
        return changed.astype(np.float32)


def cut(array: NDArray, centre: NDArray, patch: tuple[int, int, int], outside: int) -> NDArray:
    """The patch around `centre`, moved inside the array where it fits, else padded with `outside` at the far end."""
    starts = [int(np.clip(c - p // 2, 0, max(n - p, 0))) for c, p, n in zip(centre, patch, array.shape, strict=True)]
    inside = array[tuple(slice(s, s + p) for s, p in zip(starts, patch, strict=True))]
    margins = [(0, p - n) for p, n in zip(patch, inside.shape, strict=True)]
    return np.pad(inside, margins, constant_values=outside)
