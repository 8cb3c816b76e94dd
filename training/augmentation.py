"""Augmentation of slice stacks and patches: random classes draw, deterministic classes apply, so that any draw can be
replayed.

Source: SAMCancer Table 2 (contrast, gamma, rotation, scaling); the split follows torchio. Organs enhanced at random are
after SynthSeg (Billot et al. 2023): a network that has seen an organ at many densities should not take it for a lesion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.anatomy import Organ

ENHANCED = sorted(set(Organ) - {Organ.AIR, Organ.FAT, Organ.CAVITY, Organ.LUNG, Organ.BONE, Organ.TABLE})
NOISE_REACH = 3  # pixels
FLUID_HU = 25.0  # what is no denser is water, bile or fat, which no contrast agent reaches


@dataclass(frozen=True)
class Enhancement:
    """What each organ has above fluid's density, times a factor; a lesion has the code of its organ in the map.

    Nothing crosses `FLUID_HU`: a cyst, which its density alone tells from a lesion, stays one.
    """

    factors: tuple[float, ...] = (1.0,) * len(ENHANCED)

    def __call__(self, hu: Tensor, organs: Tensor) -> Tensor:
        """float HU and uint8 codes, both (D, H, W) → HU; factors fade over one pixel in-plane, as edges do."""
        table = torch.ones(256)
        table[ENHANCED] = torch.tensor(self.factors)
        factor = F.avg_pool2d(table[organs.long()], 3, stride=1, padding=1, count_include_pad=False)
        return hu + (hu - FLUID_HU).clamp(min=0) * (factor - 1)


@dataclass(frozen=True)
class RandomEnhancement:
    """share: of the draws; the others change nothing. spread: standard deviation of a factor's logarithm."""

    share: float = 0.5
    spread: float = 0.35

    def draw(self, rng: np.random.Generator) -> Enhancement:
        factors = np.exp(rng.normal(0, self.spread, len(ENHANCED)))
        return Enhancement(tuple(factors.tolist())) if rng.random() < self.share else Enhancement()


@dataclass(frozen=True)
class Noise:
    """A scanner's noise: its standard deviation, and how far neighbours share it, as a Gaussian's pixels (y, x).

    Slices are independent.
    """

    sd_hu: float = 0.0
    shared: tuple[float, float] = (0.5, 0.5)
    seed: int = 0

    def __call__(self, hu: Tensor) -> Tensor:
        """float HU (D, H, W)."""
        if not self.sd_hu:
            return hu
        noise = torch.randn(hu.shape, generator=torch.Generator().manual_seed(self.seed))[:, None]
        for axis, width in zip((2, 3), self.shared, strict=True):
            taps = torch.exp(-(torch.arange(-NOISE_REACH, NOISE_REACH + 1) ** 2) / (2 * width**2))
            shape = [1, 1, 1, 1]
            shape[axis] = -1
            # independent taps: dividing by their norm keeps the standard deviation
            noise = F.conv2d(noise, (taps / taps.norm()).view(shape), padding="same")
        return hu + self.sd_hu * noise[:, 0]


@dataclass(frozen=True)
class RandomNoise:
    """share: of the draws; the others add nothing.

    What is drawn covers what scans show at the networks' resolution: 7 to 20 HU, neighbours' correlation 0.1 to 0.7,
    more often across than down, for streaks run from side to side. Data of one kind alone with such noise would teach
    that noise means a lesion.
    """

    share: float = 0.6
    largest_hu: float = 20.0
    shared: tuple[float, float] = (0.3, 0.9)

    def draw(self, rng: np.random.Generator) -> Noise:
        down, across = rng.uniform(*self.shared, 2)
        if rng.random() < 0.5:
            down, across = min(down, across), max(down, across)
        noise = Noise(float(rng.uniform(0, self.largest_hu)), (float(down), float(across)), int(rng.integers(2**31)))
        return noise if rng.random() < self.share else Noise()


@dataclass(frozen=True)
class Intensity:
    """contrast about 0.5, an offset, gamma; values stay in [0, 1]."""

    contrast: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0

    def __call__(self, image: Tensor) -> Tensor:
        air = image <= 0  # outside the patient and the window's floor stay what they are
        changed = ((image - 0.5) * self.contrast + 0.5 + self.offset).clamp(0, 1) ** self.gamma
        return changed.masked_fill(air, 0)


@dataclass(frozen=True)
class InPlane:
    """Rotation in radians, scaling (> 1 magnifies), shift as a share of the side, flips; the same for every slice."""

    rotation: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    flip: tuple[bool, bool] = (False, False)

    def matrix(self) -> Tensor:
        """(2, 3) affine of `F.affine_grid`: output to input coordinates in [−1, 1], (x, y)."""
        cos, sin = math.cos(self.rotation) / self.scale, math.sin(self.rotation) / self.scale
        x, y = (-1.0 if f else 1.0 for f in self.flip)
        return torch.tensor([[cos * x, -sin * y, 2 * self.shift[0]], [sin * x, cos * y, 2 * self.shift[1]]])

    def __call__(self, image: Tensor, mode: str = "bilinear", margin: int = 0) -> Tensor:
        """(D, H, W), a square → the same without `margin` pixels at each side; what comes from outside is 0."""
        depth, side, width = image.shape
        assert side == width
        matrix, kept = self.matrix(), side - 2 * margin
        matrix[:, :2] *= kept / side
        grid = F.affine_grid(matrix[None], [1, depth, kept, kept], align_corners=False)
        return F.grid_sample(image[None], grid, mode=mode, align_corners=False)[0]


@dataclass(frozen=True)
class RandomIntensity:
    contrast: float = 0.25
    offset: float = 0.08
    gamma: float = 0.3

    def draw(self, rng: np.random.Generator) -> Intensity:
        return Intensity(
            float(np.exp(rng.uniform(-self.contrast, self.contrast))),
            float(rng.uniform(-self.offset, self.offset)),
            float(np.exp(rng.uniform(-self.gamma, self.gamma))),
        )


@dataclass(frozen=True)
class RandomInPlane:
    rotation: float = 0.35
    scale: float = 0.25
    shift: float = 0.08
    upside_down: float = 0.2  # share that is flipped front to back; of left to right it is half

    def draw(self, rng: np.random.Generator) -> InPlane:
        shift = rng.uniform(-self.shift, self.shift, 2)
        return InPlane(
            float(rng.uniform(-self.rotation, self.rotation)),
            float(np.exp(rng.uniform(-self.scale, self.scale))),
            (float(shift[0]), float(shift[1])),
            (bool(rng.random() < 0.5), bool(rng.random() < self.upside_down)),
        )
