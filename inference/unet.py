"""The 3-D UNet through ONNX Runtime: the scan at 3×2×2 mm, overlapping patches, a Gaussian blend.

Source: the FLARE 2024 winner's class of network (4 levels, 3×2×2 mm, patches 96×128×128); patch positions and Gaussian
weights as nnU-Net, but patches only as large as a scan needs. Arrays are (z, y, x).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .devices import DeviceError
from .onnx_session import Session
from .resampling import axis_matrix
from .slices import LUNG_WINDOW_HU, TISSUE_WINDOW_HU, window

logger = logging.getLogger(__name__)

AIR_HU = -1024
BLEND_SIGMA = 1 / 8  # of a patch side, as nnU-Net
STRIDE = 8  # of the coarsest level: sides of patches are its multiples
SMALLEST = 32  # voxels a side: thinner patches than training's would be mostly border
LIVE_MAPS = 8  # of full resolution, counted in `features` channels, alive at the peak
EMPTY_HU = -900.0  # a patch with nothing denser than this is air: probability 0, not computed
Progress = Callable[[int, int], object]
RunPatch = Callable[[NDArray[np.float32], bool], NDArray[np.float32]]  # HU of a patch, whether it is the last


@dataclass(frozen=True)
class UNetConfig:
    """spacing_mm, patch: (z, y, x); features of the first level; windows_hu: one input channel each.

    patch: how many voxels may be computed at once, and how few patches along an axis suffice; see `patch_layout`.
    """

    features: int = 16
    spacing_mm: tuple[float, float, float] = (3.0, 2.0, 2.0)
    patch: tuple[int, int, int] = (96, 128, 128)
    overlap: float = 0.5
    windows_hu: tuple[tuple[float, float], ...] = (TISSUE_WINDOW_HU, LUNG_WINDOW_HU)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown UNet settings {sorted(unknown)}: the weights are newer than this program")
        spacing, patch, windows = values["spacing_mm"], values["patch"], values["windows_hu"]
        return cls(
            values["features"],
            (spacing[0], spacing[1], spacing[2]),
            (patch[0], patch[1], patch[2]),
            values["overlap"],
            tuple((low, high) for low, high in windows),
        )


def grid_shape(shape: tuple[int, ...], spacing_mm: tuple[float, ...], config: UNetConfig) -> tuple[int, ...]:
    """Voxels of the network's grid that cover a scan."""
    return tuple(max(1, round(n * s / t)) for n, s, t in zip(shape, spacing_mm, config.spacing_mm, strict=True))


def resample(volume: NDArray[Any], spacing_mm: tuple[float, ...], config: UNetConfig) -> NDArray[np.float32]:
    """A scan (HU) or a mask on the network's grid, antialiased; first in-plane, slice by slice, then along z."""
    depth, height, width = grid_shape(volume.shape, spacing_mm, config)
    slabs = axis_matrix(volume.shape[0], spacing_mm[0], depth, config.spacing_mm[0])
    rows = axis_matrix(volume.shape[1], spacing_mm[1], height, config.spacing_mm[1])
    columns = axis_matrix(volume.shape[2], spacing_mm[2], width, config.spacing_mm[2]).T
    grid = np.zeros((depth, height, width), np.float32)
    for z in range(volume.shape[0]):
        plane = rows @ volume[z].astype(np.float32) @ columns
        for k in np.flatnonzero(slabs[:, z]):
            grid[k] += slabs[k, z] * plane
    return grid


def channels(grid_hu: NDArray[np.float32], config: UNetConfig) -> NDArray[np.float32]:
    """HU (z, y, x) → network input (windows, z, y, x) in [0, 1]."""
    return np.stack([window(grid_hu, low_high) for low_high in config.windows_hu])


class Axis(NamedTuple):
    """How many patches lie along an axis, and voxels of each."""

    patches: int
    side: int

    def starts(self, size: int) -> list[int]:
        """Evenly over `size` voxels."""
        steps = max(1, self.patches - 1)
        return [round(i * max(0, size - self.side) / steps) for i in range(self.patches)]


def patch_layout(shape: tuple[int, ...], config: UNetConfig) -> tuple[Axis, ...]:
    """Patches that cover a grid at the least cost, none of more voxels than `config.patch`.

    nnU-Net pads a scan to its patch and puts as many along an axis as overlap by the share `config.overlap` at least.
    Here a patch is as long as its share of the axis, and where the other axes leave room, fewer and longer ones do.
    """
    limit = math.prod(_whole(side) for side in config.patch)
    fits = [
        axes
        for axes in itertools.product(
            *(_choices(n, p, config.overlap) for n, p in zip(shape, config.patch, strict=True))
        )
        if math.prod(axis.side for axis in axes) <= limit
    ]
    return min(fits, key=lambda axes: math.prod(axis.patches * axis.side for axis in axes))


def patch_within(config: UNetConfig, memory_mib: float) -> UNetConfig:
    """The same with a patch that `memory_mib` hold, its longest side halved as often as needed; with a warning."""
    patch = list(config.patch)
    while patch_mib(patch, config.features) > memory_mib and max(patch) > SMALLEST:
        patch[patch.index(max(patch))] //= 2
    if tuple(patch) == config.patch:
        return config
    logger.warning("little memory: patches of %s voxels instead of %s: the mask may differ", patch, config.patch)
    return dataclasses.replace(config, patch=(patch[0], patch[1], patch[2]))


def patch_mib(patch: Sequence[int], features: int) -> float:
    """Memory for the intermediate results of a patch, in float32."""
    return LIVE_MAPS * features * math.prod(patch) * 4 / 2**20


def _choices(size: int, patch: int, overlap: float) -> list[Axis]:
    """From one patch to nnU-Net's number of them, each overlapping the next by its share of `overlap`."""
    most = max(1, math.ceil((size - patch) / (patch * (1 - overlap))) + 1)
    needed = [math.ceil(size / (1 + (count - 1) * (1 - overlap))) for count in range(1, most + 1)]
    needed[-1] = min(needed[-1], patch)  # it is no more, but for the last digit of a float
    return [Axis(count, _whole(max(side, min(SMALLEST, patch)))) for count, side in enumerate(needed, 1)]


def _whole(side: int) -> int:
    """The next multiple of the coarsest level's stride."""
    return STRIDE * math.ceil(side / STRIDE)


def gaussian(patch: tuple[int, ...]) -> NDArray[np.float32]:
    """Blending weights of a patch, 1 at the centre; at least 1e-3, as MONAI, so that every voxel has a weight."""
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n * BLEND_SIGMA)) ** 2) for n in patch]
    weights = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return np.maximum(weights, 1e-3).astype(np.float32)


def blend_patches(
    grid_hu: NDArray[np.float32], config: UNetConfig, run: RunPatch, progress: Progress = lambda *_: None
) -> NDArray[np.float32]:
    """Lesion probability on the network's grid (z, y, x) of HU on it, air beyond its far ends."""
    layout = patch_layout(grid_hu.shape, config)
    margins = [max(0, axis.side - n) for axis, n in zip(layout, grid_hu.shape, strict=True)]
    padded = np.pad(grid_hu, [(0, m) for m in margins], constant_values=AIR_HU)
    total, weight = np.zeros_like(padded), np.zeros_like(padded)
    blend = gaussian(tuple(axis.side for axis in layout))
    starts = [axis.starts(n) for axis, n in zip(layout, padded.shape, strict=True)]
    places = [
        tuple(slice(start, start + axis.side) for start, axis in zip(corner, layout, strict=True))
        for corner in itertools.product(*starts)
    ]
    for place in places:
        weight[place] += blend
    filled = [place for place in places if padded[place].max() > EMPTY_HU]
    for done, place in enumerate(filled, 1):
        total[place] += blend * run(padded[place], done == len(filled))
        progress(done, len(filled))
    z, y, x = grid_hu.shape
    return np.ascontiguousarray(np.divide(total, weight, out=total)[:z, :y, :x])


@dataclass(frozen=True)
class GridProbability:
    """Lesion probability on the network's grid, readable slice by slice on the scan's own."""

    grid: NDArray[np.float32]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    grid_spacing_mm: tuple[float, float, float]

    def __post_init__(self) -> None:
        matrices = [
            axis_matrix(n_grid, s_grid, n, s)
            for n_grid, s_grid, n, s in zip(
                self.grid.shape, self.grid_spacing_mm, self.shape, self.spacing_mm, strict=True
            )
        ]
        object.__setattr__(self, "_matrices", matrices)

    def slice(self, z: int) -> NDArray[np.float32]:
        """Probability (y, x) of slice z of the scan: two planes of the grid at most are touched."""
        slabs, rows, columns = self._matrices  # type: ignore[attr-defined]
        used = np.flatnonzero(slabs[z])
        plane = np.tensordot(slabs[z, used], self.grid[used], axes=1)
        return rows @ plane @ columns.T


class UNet:
    """The UNet of one folder of weights."""

    def __init__(
        self, content: bytes, config: UNetConfig, device: str = "cpu", gpu_memory_mib: int = 2048, threads: int = 0
    ) -> None:
        """content: of the .onnx file; threads: 0 for one a core that this process may use."""
        self.config = config
        self.session = Session("UNet", content, device, gpu_memory_mib, threads)

    @property
    def device(self) -> str:
        """Where it runs now: "cpu" or "cuda:N"."""
        return self.session.device

    def probabilities(
        self,
        hu: NDArray[np.int16],
        spacing_mm: tuple[float, float, float],
        progress: Progress = lambda *_: None,
        memory_mib: float = math.inf,
    ) -> GridProbability:
        """Lesion probability of a scan (z, y, x) of HU; memory_mib: for one patch on the CPU."""
        try:
            return self._probabilities(hu, spacing_mm, progress, memory_mib)
        except DeviceError as error:
            logger.warning("the UNet failed on its device (%s) and goes on without it", error)
            self.session.to_cpu()
            return self._probabilities(hu, spacing_mm, progress, memory_mib)

    def _probabilities(
        self, hu: NDArray[np.int16], spacing_mm: tuple[float, float, float], progress: Progress, memory_mib: float
    ) -> GridProbability:
        config = patch_within(self.config, memory_mib) if self.session.on_cpu else self.config
        blended = blend_patches(resample(hu, spacing_mm, config), config, self._run, progress)
        shape = (hu.shape[0], hu.shape[1], hu.shape[2])
        return GridProbability(blended, shape, spacing_mm, config.spacing_mm)

    def _run(self, patch_hu: NDArray[np.float32], last: bool) -> NDArray[np.float32]:
        (found,) = self.session.run({"image": channels(patch_hu, self.config)[None]}, last)
        if found.shape != (1, 1, *patch_hu.shape):
            raise ValueError(f"the UNet gave {found.shape} for a patch of {patch_hu.shape}: copy the weights again")
        probability = found[0, 0]
        if not np.isfinite(probability).all():
            raise ValueError("the UNet gave values that are not finite: run it with --device cpu")
        return probability
