"""Slice stacks for the hybrid's training: each case cut once into 8-bit slices on disk, sampled in balance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.slices import LUNG_WINDOW_HU, TISSUE_WINDOW_HU, Plane, Resize, SliceGrid, thick_grid, thicken
from training.augmentation import RandomEnhancement, RandomInPlane, RandomIntensity, RandomNoise
from training.cache import Arrays, prepare
from training.data import Case, Entry
from training.organs import beyond
from training.sources import Sources, by_source

LESION, LESION_FREE, HEALTHY = "lesion", "lesion_free", "healthy"
SHARES = {LESION: 0.5, LESION_FREE: 0.25, HEALTHY: 0.25}
LUNG = "lung"  # the lesion type that is also seen in the lung window, which inference never uses
WINDOWS = {"tissue": TISSUE_WINDOW_HU, LUNG: LUNG_WINDOW_HU}
PER_MILLE = np.int16(1000)  # of a lesion's voxel: how much of a thick slice's voxel is lesion
Look = tuple[Plane, Resize, float]  # how a scan is cut into slices: plane, resize and least_mm of `thick_grid`
ROUNDING = 1e-6  # of an image that was moved: where 1 is, it has 1 − 6e-8
SHOWN_ANYWAY = 0.5  # of the slices without a lesion: the classifier errs, and then the decoder alone must say no


@dataclass(frozen=True)
class SliceCase:
    """uint8 (slices, 256, 256), memory-mapped: tissue and lung 0 … 255 over their windows, label {0, 1}, organs.

    lesion_slices: indices; known: bool (slices,), whether an annotator said if a lesion is present. source: its FLARE
    folder.
    """

    source: Path
    tissue: NDArray[np.uint8]
    lung: NDArray[np.uint8]
    label: NDArray[np.uint8]
    organs: NDArray[np.uint8]
    lesion_slices: NDArray[np.int64]
    known: NDArray[np.bool_]
    lesion_type: str

    def __len__(self) -> int:
        return len(self.label)


def cut_case(case: Case, look: Look) -> Arrays:
    """The images and labels of `SliceCase`, slices put together as in use."""
    grid, step = thick_grid(case.hu.shape, case.spacing_mm, *look)
    hu = thicken(case.hu, grid.axis, step)
    images = {
        name: np.rint(grid.cut(hu, 0, len(grid), window) * 255).astype(np.uint8) for name, window in WINDOWS.items()
    }
    label = cut_label(case.label > 0, grid, step)
    middle = np.minimum(np.arange(len(grid)) * step + step // 2, case.organs.shape[grid.axis] - 1)
    organs, outside = case.organs.take(middle, grid.axis), beyond(case.organs)
    organs = np.stack([grid.resample_labels(organs[grid[i]], outside) for i in range(len(grid))])
    lesion_slices = np.flatnonzero(label.any(axis=(1, 2)))
    given = thicken(PER_MILLE * (case.label == 1), grid.axis, step)
    told = np.array([given[grid[i]].any() for i in range(len(grid))]) & label.any(axis=(1, 2))
    known = told | case.entry.complete
    return {
        **images, "label": label.astype(np.uint8), "organs": organs, "lesion_slices": lesion_slices, "known": known
    }  # fmt: skip


def cut_label(lesion: NDArray[np.bool_], grid: SliceGrid, step: int) -> NDArray[np.bool_]:
    """Where half or more of a pixel is lesion: (slices, 256, 256) of a scan's (z, y, x).

    grid, step: as `thick_grid` gives them.
    """
    per_mille = thicken(PER_MILLE * lesion, grid.axis, step)
    slices = (grid.resample(per_mille[grid[i]].astype(np.float32)) for i in range(len(grid)))
    return np.stack([part >= PER_MILLE / 2 for part in slices])


def slice_cases(entries: list[Entry], cache: Path, look: Look, jobs: int = 1) -> list[SliceCase]:
    """Every case in slices, cut once; what the cache holds already is reused."""
    plane, resize, slice_mm = look
    made = prepare(entries, cache / f"{plane}_{resize}_{slice_mm:g}mm", partial(cut_case, look=look), jobs)
    return [SliceCase(entry.source, **arrays, lesion_type=entry.lesion_type) for entry, arrays in made]


def known_absent(case: SliceCase) -> bool:
    """Whether an annotator said of one of its slices that it holds no lesion."""
    return int(case.known.sum()) > int(case.known[case.lesion_slices].sum())


def lesion_or_healthy(case: SliceCase) -> bool:
    """Whether it holds a lesion, or an annotator said that it holds none."""
    return bool(len(case.lesion_slices) or case.known.all())


class Stacks(NamedTuple):
    """Of N stacks with S targets and a margin of `radius` slices around them.

    image: float (N, S + 2·radius, H, W) in [0, 1]; label: float {0, 1} and organs: uint8, both (N, S, H, W);
    known: bool (N, S), whether the label tells if a lesion is present; shown: bool (N, S), whether positive prompts
    are given: where there is a lesion, and in a share of the other slices; source: the folder that each comes from,
    one-hot (N, folders).
    """

    image: Tensor
    label: Tensor
    organs: Tensor
    known: Tensor
    shown: Tensor
    source: Tensor


class StackSampler:
    """Draws stacks of `targets` slices with their neighbours: lesion, lesion-free and healthy ones in fixed shares.

    So are the folders, and in each of them the three kinds.
    """

    def __init__(
        self, cases: list[SliceCase], targets: int, radius: int, seed: int, shares: tuple[float, ...] = ()
    ) -> None:
        """shares: as `Sources`'."""
        useful = list(filter(lesion_or_healthy, cases))
        for source in by_source(cases).keys() - by_source(useful).keys():
            raise ValueError(f"{source}: no scan has a lesion, or is known to have none: leave this folder out")
        self.sources = Sources(useful, shares)
        groups = self.sources.groups
        self.with_lesion = [[case for case in group if len(case.lesion_slices)] for group in groups]
        self.healthy = [[case for case in group if not len(case.lesion_slices)] for group in groups]
        if not any(self.with_lesion):
            raise ValueError("no case has a lesion: nothing can be learnt")
        self.targets, self.radius, self.seed = targets, radius, seed
        self.intensity, self.in_plane = RandomIntensity(), RandomInPlane()
        self.enhancement, self.noise = RandomEnhancement(), RandomNoise()

    def batch(self, step: int, members: range, crop: int = 0) -> Stacks:
        """Members of the batch of a step: the same ones whenever, and by whichever process, they are asked for.

        members: of `members.stop` in all. crop: pixels a side to cut out of the 256, around a lesion where there is
        one; 0 for whole slices.
        """
        drawn = [self._member(step, member, members.stop, crop) for member in members]
        return Stacks(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _member(self, step: int, member: int, batch: int, crop: int) -> Stacks:
        rng = np.random.default_rng((self.seed, step, member))
        stack = self._stack(rng, self.sources.draw(rng, member, batch))
        return self._crop(rng, stack, crop) if crop else stack

    def _stack(self, rng: np.random.Generator, source: int) -> Stacks:
        case, start = self._place(rng, source)
        around = np.clip(np.arange(start - self.radius, start + self.targets + self.radius), 0, len(case) - 1)
        own = slice(self.radius, self.radius + self.targets)
        targets = around[own]
        move = self.in_plane.draw(rng)
        label = (move(torch.from_numpy(case.label[targets]).float()) >= 0.5).float()
        outside = beyond(case.organs)
        organs = (move(torch.from_numpy(case.organs[around]).float() - outside, "nearest") + outside).byte()
        kind = LUNG if case.lesion_type == LUNG and rng.random() < 0.5 else "tissue"
        image = move(torch.from_numpy(getattr(case, kind)[around]).float() / 255)
        image = self.intensity.draw(rng)(self._scanned(rng, image, organs, WINDOWS[kind]))
        present = label.flatten(1).any(dim=1)
        shown = present | torch.from_numpy(rng.random(self.targets) < SHOWN_ANYWAY)
        known = torch.from_numpy(case.known[targets])
        return Stacks(image, label, organs[own], known, shown, self.sources.one_hot(source))

    def _scanned(
        self, rng: np.random.Generator, image: Tensor, organs: Tensor, window_hu: tuple[float, float]
    ) -> Tensor:
        """Organs enhanced more or less, and noise; what the window cut off stays cut off."""
        low, high = window_hu
        hu = self.enhancement.draw(rng)(image * (high - low) + low, organs)
        changed = (self.noise.draw(rng)(hu) - low) / (high - low)
        cut_off = (image <= 0) | (image >= 1 - ROUNDING)
        return torch.where(cut_off, image, changed.clamp(0, 1))

    def _crop(self, rng: np.random.Generator, stack: Stacks, side: int) -> Stacks:
        image, label = stack.image, stack.label
        places = label.any(dim=0).nonzero() if label.any() else (image[self.radius] > 0).nonzero()
        limit = image.shape[-1] - side
        if len(places):
            jitter = rng.integers(-side // 3, side // 3 + 1, 2)
            corner = places[rng.integers(len(places))].numpy() - side // 2 + jitter
        else:
            corner = rng.integers(0, limit + 1, 2)
        row, column = np.clip(corner, 0, limit)
        part = (slice(None), slice(row, row + side), slice(column, column + side))
        return stack._replace(image=image[part], label=label[part], organs=stack.organs[part])

    def _place(self, rng: np.random.Generator, source: int) -> tuple[SliceCase, int]:
        """A case of the folder and the first target slice in it."""
        kind = rng.choice(list(SHARES), p=list(SHARES.values()))
        with_lesion, healthy = self.with_lesion[source], self.healthy[source]
        cases = healthy if (kind == HEALTHY and healthy) or not with_lesion else with_lesion
        case = cases[rng.integers(len(cases))]
        if kind == LESION and len(case.lesion_slices):
            first = int(rng.choice(case.lesion_slices)) - int(rng.integers(self.targets))
        else:
            first = int(rng.integers(len(case)))
        return case, int(np.clip(first, 0, max(len(case) - self.targets, 0)))
