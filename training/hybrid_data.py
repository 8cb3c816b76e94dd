"""Slice stacks for the hybrid's training: each case cut once into 8-bit slices on disk, sampled in balance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from inference.slices import Plane, Resize, SliceGrid
from training.augmentation import RandomInPlane, RandomIntensity
from training.data import Case, case_names, load_case

LESION, LESION_FREE, HEALTHY = "lesion", "lesion_free", "healthy"
SHARES = {LESION: 0.55, LESION_FREE: 0.25, HEALTHY: 0.2}


@dataclass(frozen=True)
class SliceCase:
    """uint8 (slices, 256, 256), memory-mapped: image 0 … 255 over the window, label {0, 1}, organs as `Case`'s."""

    name: str
    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    organs: NDArray[np.uint8]
    lesion_slices: NDArray[np.intp]


def cut_case(case: Case, plane: Plane, resize: Resize) -> NDArray[np.uint8]:
    """Image, label and organs, uint8 (3, slices, 256, 256)."""
    grid = SliceGrid(case.hu.shape, case.spacing_mm, plane, resize)
    image = np.rint(grid.cut(case.hu, 0, len(grid)) * 255).astype(np.uint8)
    label = np.stack([grid.resample(case.label[grid[i]].astype(np.float32)) >= 0.5 for i in range(len(grid))])
    organs = np.stack([grid.resample_labels(case.organs[grid[i]]) for i in range(len(grid))])
    return np.stack([image, label.astype(np.uint8), organs])


def prepare(folder: Path, cache: Path, plane: Plane, resize: Resize) -> list[SliceCase]:
    """Cut every case of a FLARE folder, once; what the cache holds already is reused."""
    cache.mkdir(parents=True, exist_ok=True)
    cases = []
    for name in tqdm(case_names(folder), desc="slices", unit="case"):
        path = cache / f"{name}_{plane}_{resize}.npy"
        if not path.exists():
            temporary = path.with_name(f".{path.name}")
            np.save(temporary, cut_case(load_case(folder, name), plane, resize))
            temporary.rename(path)
        image, label, organs = np.load(path, mmap_mode="r")
        cases.append(SliceCase(name, image, label, organs, np.flatnonzero(label.any(axis=(1, 2)))))
    return cases


class Stacks(NamedTuple):
    """image: float in [0, 1]; label: float {0, 1}; organs: uint8; shapes as `StackSampler.batch` says."""

    image: Tensor
    label: Tensor
    organs: Tensor


class StackSampler:
    """Draws stacks of `targets` slices with their neighbours: lesion, lesion-free and healthy ones in fixed shares."""

    def __init__(self, cases: list[SliceCase], targets: int, radius: int, seed: int) -> None:
        self.with_lesion = [case for case in cases if len(case.lesion_slices)]
        self.healthy = [case for case in cases if not len(case.lesion_slices)]
        if not self.with_lesion:
            raise ValueError("no case has a lesion: nothing can be learnt")
        self.targets, self.radius = targets, radius
        self.rng = np.random.default_rng(seed)
        self.intensity, self.in_plane = RandomIntensity(), RandomInPlane()

    def batch(self, stacks: int, crop: int = 0) -> Stacks:
        """Images (stacks, targets + 2·radius, 256, 256) in [0, 1]; labels and organs (stacks, targets, 256, 256).

        crop: pixels a side to cut out instead, around a lesion where there is one.
        """
        drawn = [self._stack() for _ in range(stacks)]
        if crop:
            drawn = [self._crop(stack, crop) for stack in drawn]
        return Stacks(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _stack(self) -> Stacks:
        case, start = self._place()
        around = np.clip(np.arange(start - self.radius, start + self.targets + self.radius), 0, len(case.image) - 1)
        image = torch.from_numpy(case.image[around]).float() / 255
        targets = around[self.radius : self.radius + self.targets]
        label, organs = (torch.from_numpy(array[targets]).float() for array in (case.label, case.organs))
        move = self.in_plane.draw(self.rng)
        image = self.intensity.draw(self.rng)(move(image))
        return Stacks(image, (move(label) >= 0.5).float(), move(organs, "nearest").byte())

    def _crop(self, stack: Stacks, side: int) -> Stacks:
        image, label, _ = stack
        places = label.any(dim=0).nonzero() if label.any() else (image[self.radius] > 0).nonzero()
        limit = image.shape[-1] - side
        if len(places):
            jitter = self.rng.integers(-side // 3, side // 3 + 1, 2)
            corner = places[self.rng.integers(len(places))].numpy() - side // 2 + jitter
        else:
            corner = self.rng.integers(0, limit + 1, 2)
        row, column = np.clip(corner, 0, limit)
        part = (slice(None), slice(row, row + side), slice(column, column + side))
        return Stacks(*(tensor[part] for tensor in stack))

    def _place(self) -> tuple[SliceCase, int]:
        """A case and the first target slice in it."""
        kind = self.rng.choice(list(SHARES), p=list(SHARES.values()))
        if kind == HEALTHY and self.healthy:
            case = self.healthy[self.rng.integers(len(self.healthy))]
        else:
            case = self.with_lesion[self.rng.integers(len(self.with_lesion))]
        if kind == LESION:
            centre = int(self.rng.choice(case.lesion_slices)) - int(self.rng.integers(self.targets))
        else:
            centre = int(self.rng.integers(len(case.image)))
        return case, int(np.clip(centre, 0, max(len(case.image) - self.targets, 0)))
