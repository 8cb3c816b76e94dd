"""Both networks' probabilities → one mask on the scan's own grid, slice by slice.

Rule: voxels where the weighted mean or the UNet is high enough form 26-connected components; a component stays where
both networks support it, or where one is sure of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cc3d
import numpy as np
from numpy.typing import NDArray

ProbabilityPlane = NDArray[np.float32]
SliceSource = Callable[[int], ProbabilityPlane]
"""z → lesion probability (y, x) on the scan's grid."""
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class FusionThresholds:
    """All are probabilities but `weight`, the hybrid's share of the mean, and `min_volume_ml`.

    voxel: of the mean, for a voxel to be a candidate; unet_voxel: of the UNet, which suffices for that: a hybrid that
    overlooks a lesion costs no voxel of it. both_*: the component's maximum needed from each network; sure_*: the
    maximum at which one network alone suffices.
    """

    weight: float = 0.5
    voxel: float = 0.5
    unet_voxel: float = 0.5
    both_hybrid: float = 0.5
    both_unet: float = 0.5
    sure_hybrid: float = 0.95
    sure_unet: float = 0.95
    min_volume_ml: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FusionThresholds:
        return cls(**values)


@dataclass(frozen=True)
class Evidence:
    """What is known of each component, by its label; what stands at 0, the background, means nothing.

    voxels: its size. hybrid, unet: the network's highest probability in it, −1 where the network is silent.
    """

    voxels: NDArray[np.int64]
    hybrid: NDArray[np.float32]
    unet: NDArray[np.float32]

    def kept(self, voxel_ml: float, thresholds: FusionThresholds) -> NDArray[np.bool_]:
        """Whether each label stays; the background does not."""
        both = (self.hybrid >= thresholds.both_hybrid) & (self.unet >= thresholds.both_unet)
        sure = (self.hybrid >= thresholds.sure_hybrid) | (self.unet >= thresholds.sure_unet)
        keep = (both | sure) & (self.voxels * voxel_ml >= thresholds.min_volume_ml)
        keep[0] = False
        return keep


class Components(NamedTuple):
    """labels: 0 or a component's, (z, y, x), within the box of the scan that holds all of them."""

    box: Box
    labels: NDArray[Any]
    evidence: Evidence


def fuse(
    hybrid: SliceSource | None,
    unet: SliceSource | None,
    shape: tuple[int, ...],
    voxel_ml: float,
    thresholds: FusionThresholds,
) -> NDArray[np.uint8]:
    """Mask (z, y, x) in {0, 1}. hybrid is None where the scan was judged healthy, unet where it was not run."""
    found = find_components(hybrid, unet, shape, thresholds)
    mask = np.zeros(shape, np.uint8)
    if found:
        keep = found.evidence.kept(voxel_ml, thresholds)
        for plane, label in zip(mask[found.box], found.labels, strict=True):
            plane[:] = keep[label]
    return mask


def find_components(
    hybrid: SliceSource | None, unet: SliceSource | None, shape: tuple[int, ...], thresholds: FusionThresholds
) -> Components | None:
    """All that could be lesions, None where nothing could; asks for the thresholds of voxels, and weight, only."""
    if hybrid is None and unet is None:
        return None
    candidates = np.zeros(shape, np.uint8)
    for z in range(shape[0]):
        candidates[z] = _candidates(hybrid, unet, z, thresholds)
    box = bounding_box(candidates)
    if box is None:
        return None
    labels, count = cc3d.connected_components(candidates[box], connectivity=26, return_N=True)
    strongest = (_strongest(source, labels, count, box) for source in (hybrid, unet))
    return Components(box, labels, Evidence(_sizes(labels, count), *strongest))


def mean_probability(hybrid: ProbabilityPlane | None, unet: ProbabilityPlane | None, weight: float) -> ProbabilityPlane:
    """Weighted mean of a slice's probabilities (y, x), of the networks that speak."""
    if hybrid is None or unet is None:
        spoken = unet if hybrid is None else hybrid
        assert spoken is not None
        return spoken
    return weight * hybrid + (1 - weight) * unet


def _candidates(
    hybrid: SliceSource | None, unet: SliceSource | None, z: int, thresholds: FusionThresholds
) -> NDArray[np.bool_]:
    by_hybrid, by_unet = hybrid and hybrid(z), unet and unet(z)
    mean = mean_probability(by_hybrid, by_unet, thresholds.weight)
    if not np.isfinite(mean).all():
        raise ValueError("a network gave probabilities that are not finite: run with --device cpu")
    found = np.zeros(mean.shape, bool) if by_unet is None else by_unet >= thresholds.unet_voxel
    return found if by_hybrid is None else found | (mean >= thresholds.voxel)


def bounding_box(mask: NDArray[Any]) -> Box | None:
    """The smallest box (z, y, x) that holds all of a mask; None where it is empty."""
    box = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(used):
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return box[0], box[1], box[2]


def _sizes(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Voxels of each label; slice by slice, since numpy counts in a copy of eight bytes a voxel."""
    sizes = np.zeros(count + 1, np.int64)
    for plane in labels:
        found = np.bincount(plane.ravel())
        sizes[: len(found)] += found
    return sizes


def _strongest(source: SliceSource | None, labels: NDArray[Any], count: int, box: Box) -> NDArray[np.float32]:
    """Highest probability within each component, slice by slice; −1 where the network is silent."""
    strongest = np.full(count + 1, -1, np.float32)
    if source is None:
        return strongest
    for z, plane in enumerate(labels, box[0].start):
        inside = plane > 0
        if inside.any():
            np.maximum.at(strongest, plane[inside], source(z)[box[1:]][inside])
    return strongest
