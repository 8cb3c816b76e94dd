"""Organs as a second task while training: phantoms know the organ of every voxel.

Lesions are one voxel in hundreds, and teach a network little a step; every voxel teaches it to tell organs apart. How
much that speeds up the lesions is not measured yet. Linear heads look at maps within the network; they do not ship.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from training.anatomy import Organ

UNKNOWN = 255
WEIGHT = 0.5  # of the organs' cross-entropy in the loss


def beyond(organs: NDArray[np.uint8]) -> int:
    """What lies beyond the edge of an organ map: air, unless nobody knows the organs of that scan."""
    return UNKNOWN if organs.flat[0] == UNKNOWN else Organ.AIR


class OrganHeads(nn.Module):
    """One linear classifier for each watched map of a network."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(Organ)) for width in widths)
        self._seen: dict[int, Tensor] = {}

    def watch(self, modules: Sequence[nn.Module]) -> None:
        """Keep what these modules give in each training step, (N, width, d, h, w) or (N·D, width, h, w)."""
        for index, module in enumerate(modules):
            module.register_forward_hook(partial(self._keep, index))

    def _keep(self, index: int, module: nn.Module, _: object, output: Tensor) -> None:
        if module.training:
            self._seen[index] = output

    def loss(self, organs: Tensor) -> Tensor:
        """Weighted cross-entropy, averaged over the maps of the last forward pass, which are let go.

        organs: uint8 (N, D, H, W); maps are coarser by whole numbers. Voxels of `UNKNOWN` do not count.
        """
        losses = [self._cross_entropy(index, seen, organs) for index, seen in self._seen.items()]
        self._seen.clear()
        return WEIGHT * torch.stack(losses).mean()

    def _cross_entropy(self, index: int, seen: Tensor, organs: Tensor) -> Tensor:
        depth = organs.shape[1] // seen.shape[2] if seen.ndim == 5 else 1
        rows, columns = (organs.shape[axis] // seen.shape[axis] for axis in (-2, -1))
        target = organs[:, depth // 2 :: depth, rows // 2 :: rows, columns // 2 :: columns].flatten().long()
        logits = self.heads[index](seen.movedim(1, -1).flatten(0, -2)).float()
        total = F.cross_entropy(logits, target, ignore_index=UNKNOWN, reduction="sum")
        return total / (target != UNKNOWN).sum().clamp(min=1)
