"""Losses of both networks, and the Dice they stand for.

Source: SAMCancer Table 2 (Dice + cross-entropy; the classifier's × 0.1).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

CLASSIFIER_WEIGHT = 0.1
LESION_WEIGHT = 10.0  # of a lesion's pixel in the cross-entropy, at first: being 0.3 % of all, they would not be heard
SMOOTH = 1.0  # voxels


def dice(mask: NDArray[Any], label: NDArray[Any]) -> float:
    """1 where both are empty, 0 where exactly one is, as FLARE grades; any shape."""
    mask, label = mask > 0, label > 0
    total = int(mask.sum()) + int(label.sum())
    return 2 * int((mask & label).sum()) / total if total else 1.0


def soft_dice_loss(logits: Tensor, target: Tensor, source: Tensor | None = None) -> Tensor:
    """1 − Dice over the whole batch, so that slices without a lesion count by their false positives. (N, …).

    source: one-hot (N, folders); the mean of the Dice of each folder's members. Where several processes share the
    batch, it is the Dice of all of it, as in one process.
    """
    if source is None:
        source = logits.new_ones(len(logits), 1)
    probability = logits.sigmoid()
    each = [part.reshape(len(part), -1).sum(1, keepdim=True) for part in (probability * target, probability, target)]
    # no matrix product, which mixed precision would round
    overlap, predicted, true, members = total(torch.stack([(part * source).sum(0) for part in each] + [source.sum(0)]))
    dice = (2 * overlap + SMOOTH) / (predicted + true + SMOOTH)
    return 1 - dice[members > 0].mean()


def total(values: Tensor) -> Tensor:
    """Sum over all processes, through which gradients flow; `values` itself where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    return all_reduce(values)


def annealed_weight(share: float, first: float = LESION_WEIGHT) -> float:
    """`first` at the start of the budget, 1 at its end: a network that ends there is not biased to lesions."""
    return float(first ** (1 - share))


def mask_loss(logits: Tensor, target: Tensor, lesion_weight: float = 1.0, source: Tensor | None = None) -> Tensor:
    """Dice, by source, + weighted cross-entropy, in float32. (N, …)."""
    logits = logits.float()
    weight = torch.tensor(lesion_weight, device=logits.device)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    return soft_dice_loss(logits, target, source) + cross_entropy


def hybrid_loss(
    logits: Tensor,
    presence: Tensor,
    target: Tensor,
    present: Tensor,
    known: Tensor | None = None,
    classifier_weight: float = CLASSIFIER_WEIGHT,
    lesion_weight: float = 1.0,
    source: Tensor | None = None,
) -> Tensor:
    """logits, target: (N, S, H, W); presence: logits (N, S, 2); present: (N, S) bool; source: as `soft_dice_loss`'s.

    known: (N, S) bool; the classifier learns from these slices only, where some are not known to hold a lesion or none.
    """
    known = torch.ones_like(present) if known is None else known
    each = F.cross_entropy(presence.float().flatten(0, 1), present.flatten().long(), reduction="none")
    classifier = (each * known.flatten()).sum() / known.numel()
    return mask_loss(logits, target, lesion_weight, source) + classifier_weight * classifier
