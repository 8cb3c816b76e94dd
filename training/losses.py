"""Losses of the hybrid network. Source: SAMCancer Table 2 (Dice + cross-entropy; the classifier's × 0.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

CLASSIFIER_WEIGHT = 0.1
SMOOTH = 1.0  # voxels


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 − Dice over the whole batch, so that slices without a lesion count by their false positives. Any shape."""
    probability = logits.sigmoid()
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + SMOOTH) / (probability.sum() + target.sum() + SMOOTH)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + cross-entropy, in float32; any shape."""
    logits = logits.float()
    return soft_dice_loss(logits, target) + F.binary_cross_entropy_with_logits(logits, target)


def hybrid_loss(logits: Tensor, presence: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """logits, target: (N, S, H, W); presence: logits (N, S, 2); present: (N, S) bool."""
    classifier = F.cross_entropy(presence.float().flatten(0, 1), present.flatten().long())
    return mask_loss(logits, target) + CLASSIFIER_WEIGHT * classifier
