"""Slice stacks for the hybrid's training: each case cut once into 8-bit slices on disk, sampled in balance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """image, label: uint8 (slices, 256, 256), memory-mapped; image is 0 … 255 over the tissue window, label {0, 1}."""

    name: str
    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    lesion_slices: NDArray[np.intp]


def cut_case(case: Case, plane: Plane, resize: Resize) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    grid = SliceGrid(case.hu.shape, case.spacing_mm, plane, resize)
    image = np.rint(grid.cut(case.hu, 0, len(grid)) * 255).astype(np.uint8)
    label = np.stack([grid.resample(case.label[grid[i]].astype(np.float32)) >= 0.5 for i in range(len(grid))])
    return image, label.astype(np.uint8)


def prepare(folder: Path, cache: Path, plane: Plane, resize: Resize) -> list[SliceCase]:
    """Cut every case of a FLARE folder, once; what the cache holds already is reused."""
    cache.mkdir(parents=True, exist_ok=True)
    cases = []
    for name in tqdm(case_names(folder), desc="slices", unit="case"):
        path = cache / f"{name}_{plane}_{resize}.npy"
        if not path.exists():
            temporary = path.with_name(f".{path.name}")
            np.save(temporary, np.stack(cut_case(load_case(folder, name), plane, resize)))
            temporary.rename(path)
        image, label = np.load(path, mmap_mode="r")
        cases.append(SliceCase(name, image, label, np.flatnonzero(label.any(axis=(1, 2)))))
    return cases


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

    def batch(self, stacks: int, crop: int = 0) -> tuple[Tensor, Tensor]:
        """Images (stacks, targets + 2·radius, 256, 256) in [0, 1] and labels (stacks, targets, 256, 256).

        crop: pixels a side to cut out instead, around a lesion where there is one.
        """
        pairs = [self._stack() for _ in range(stacks)]
        if crop:
            pairs = [self._crop(image, label, crop) for image, label in pairs]
        return torch.stack([image for image, _ in pairs]), torch.stack([label for _, label in pairs])

    def _stack(self) -> tuple[Tensor, Tensor]:
        case, start = self._place()
        around = np.clip(np.arange(start - self.radius, start + self.targets + self.radius), 0, len(case.image) - 1)
        image = torch.from_numpy(case.image[around]).float() / 255
        label = torch.from_numpy(case.label[around[self.radius : self.radius + self.targets]]).float()
        move = self.in_plane.draw(self.rng)
        image = self.intensity.draw(self.rng)(move(image))
        return image, (move(label) >= 0.5).float()

    def _crop(self, image: Tensor, label: Tensor, side: int) -> tuple[Tensor, Tensor]:
        places = label.any(dim=0).nonzero() if label.any() else (image[self.radius] > 0).nonzero()
        limit = image.shape[-1] - side
        if len(places):
            jitter = self.rng.integers(-side // 3, side // 3 + 1, 2)
            corner = places[self.rng.integers(len(places))].numpy() - side // 2 + jitter
        else:
            corner = self.rng.integers(0, limit + 1, 2)
        row, column = np.clip(corner, 0, limit)
        part = (slice(None), slice(row, row + side), slice(column, column + side))
        return image[part], label[part]

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
