"""Cross-branch interaction: each ViT token and the k×k CNN pixels that it covers inform each other.

Projections are folded into the query side, q·(W x) = (Wᵀq)·x, so that no pixel is ever projected: the same result
as attention over projected pixels, for a fraction of the multiply-adds. Key biases would cancel in the softmax and are
left out. Source: SAMCancer §2, details of SAMCT's cross-branch interaction (with √d divided, not multiplied).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TOKENS
from .layout import centre, cut_planes, join, per_head
from .vision_transformer import ADAPTER_SCALE, Adapter

HEADS = 8
GATE_KERNEL = 7


def windows(pixels: Tensor) -> Tensor:
    """(N, H, W, C) → (N, 256, k², C): the pixels under each token, tokens and pixels in row order, k = H / 16."""
    n, height, _, channels = pixels.shape
    k = height // TOKENS
    split = pixels.reshape(n, TOKENS, k, TOKENS, k, channels).transpose(2, 3)
    return split.reshape(n, TOKENS**2, k * k, channels)


def unwindow(values: Tensor) -> Tensor:
    """(N, 256, k²) → (N, H, W): the inverse of `windows` for one channel."""
    n, _, pixels = values.shape
    k = math.isqrt(int(pixels))
    return values.reshape(n, TOKENS, TOKENS, k, k).transpose(2, 3).reshape(n, TOKENS * k, TOKENS * k)


class CnnToVit(nn.Module):
    """Each token attends to its own pixels; the result goes through an adapter and is added to the token."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(channels, width, bias=False)
        self.value = nn.Linear(channels, width)
        self.out = nn.Linear(width, width)
        self.adapter = Adapter(width)

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Tokens (N, 256, E), pixels (N, 256, k², C) → change of the tokens (N, 256, E)."""
        attended = self.out(self._context(tokens, pixels) + self.value.bias)
        return attended + ADAPTER_SCALE * self.adapter(attended)

    def _context(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """The values (N, 256, E) that the heads see, still without their bias."""
        if pixels.shape[2] == 1:  # nothing to choose from
            return F.linear(pixels[:, :, 0], self.value.weight)
        n, count, width = tokens.shape
        key, value = (part.weight.view(HEADS, width // HEADS, -1) for part in (self.key, self.value))
        query = self.query(self.norm(tokens)).view(n, count, HEADS, -1) * (width // HEADS) ** -0.5
        attention = (per_head(query, key) @ pixels.transpose(2, 3)).softmax(dim=-1)  # n t h p
        return per_head(attention @ pixels, value.transpose(1, 2)).flatten(2)


class VitToCnn(nn.Module):
    """A gate for each pixel: how much its token matters, times how well the pixel matches its token."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.pixel = nn.Linear(channels, width, bias=False)
        self.token_gate = nn.Conv2d(2, 1, GATE_KERNEL, padding=GATE_KERNEL // 2)

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Tokens (N, 256, E), pixels (N, 256, k², C) → gate (N, 256, k²), in 0 … 1.5."""
        n, _, width = tokens.shape
        summary = torch.stack([tokens.mean(dim=-1), tokens.amax(dim=-1)], dim=1)
        token_gate = torch.sigmoid(self.token_gate(summary.view(n, 2, TOKENS, TOKENS))).view(n, -1, 1)
        if pixels.shape[2] == 1:  # the best match of its token, whatever it is
            return token_gate
        projected = tokens @ self.pixel.weight * width**-0.5  # n t c
        match = (pixels @ projected[..., None])[..., 0].softmax(dim=-1)
        return token_gate * (0.5 + torch.sigmoid(match - 1 / pixels.shape[2]))


class Exchange(nn.Module):
    """One exchange, both ways; both read the features from before it."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.to_vit = CnnToVit(width, channels)
        self.to_cnn = VitToCnn(width, channels)

    def forward(self, tokens: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, S, 16, 16, E) and maps (N, D ≥ S, C, H, W), whose middle S planes take part → both, changed."""
        n, planes, _, _, width = tokens.shape
        middle = centre(maps, planes)
        pixels = windows(middle.flatten(0, 1).permute(0, 2, 3, 1))
        flat = tokens.reshape(n * planes, TOKENS**2, width)
        gate = unwindow(self.to_cnn(flat, pixels)).view(n, planes, 1, *maps.shape[3:])
        changed = middle + middle * gate
        tokens = tokens + self.to_vit(flat, pixels).view(tokens.shape)
        if planes < maps.shape[1]:
            margin = (maps.shape[1] - planes) // 2
            before, after = (cut_planes(maps, first, margin) for first in (0, margin + planes))
            changed = join([before, changed, after], 1)
        return tokens, changed
