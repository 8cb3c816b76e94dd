"""Losses of the hybrid network. Source: SAMCancer Table 2 (Dice + cross-entropy; the classifier's × 0.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSIFIER_WEIGHT = 0.1
LESION_WEIGHT = 10.0  # of a lesion's pixel in the cross-entropy: they are 0.3 % of all, and alone would not be heard
SMOOTH = 1.0  # voxels


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 − Dice over the whole batch, so that slices without a lesion count by their false positives. Any shape."""
    probability = logits.sigmoid()
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + SMOOTH) / (probability.sum() + target.sum() + SMOOTH)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + weighted cross-entropy, in float32; any shape."""
    logits = logits.float()
    weight = torch.tensor(LESION_WEIGHT, device=logits.device)
    return soft_dice_loss(logits, target) + F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)


def hybrid_loss(
    logits: Tensor, presence: Tensor, target: Tensor, present: Tensor, classifier_weight: float = CLASSIFIER_WEIGHT
) -> Tensor:
    """logits, target: (N, S, H, W); presence: logits (N, S, 2); present: (N, S) bool."""
    classifier = F.cross_entropy(presence.float().flatten(0, 1), present.flatten().long())
    return mask_loss(logits, target) + classifier_weight * classifier
