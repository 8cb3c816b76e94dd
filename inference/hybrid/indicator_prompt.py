"""Task-indicator prompt encoder: makes the prompts itself and withholds the positive ones from healthy slices.

Source: SAMCancer §2; prototypes, poolings and heads after SAMCT. SAM's own PromptEncoder supplies the type embeddings,
"not a point", "no mask" and the dense position encoding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import IMAGE_SIZE, TOKENS, HybridConfig
from .layout import plane_mean
from .sam import Attention, PromptEncoder

HEADS = 8
NEGATIVE, POSITIVE, CORNER_1, CORNER_2 = range(4)  # SAM's order of point-type embeddings


class Prompts(NamedTuple):
    """sparse: (N, 4, dim): positive point, negative point, two box corners; presence: logits (N, 2) absent, present."""

    sparse: Tensor
    presence: Tensor


def head(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))


class IndicatorPromptEncoder(nn.Module):
    """Pools the CNN decoder's maps and the ViT's map, and asks two prototypes what they see in them.

    The layer norm behind each prototype is ours.
    """

    def __init__(self, config: HybridConfig, map_widths: list[int]) -> None:
        super().__init__()
        dim = config.prompt_dim
        self.sam = PromptEncoder(dim, (TOKENS, TOKENS), (IMAGE_SIZE, IMAGE_SIZE), mask_in_chans=16)
        del self.sam.mask_downscaling  # no mask prompts here
        self.project = nn.ModuleList(nn.Linear(width, dim) for width in [*map_widths, dim])
        self.positive_prototype = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.negative_prototype = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.positive_attention = Attention(dim, HEADS)
        self.negative_attention = Attention(dim, HEADS)
        self.positive_norm = nn.LayerNorm(dim)
        self.negative_norm = nn.LayerNorm(dim)
        self.point_head = head(dim)
        self.corner_heads = nn.ModuleList([head(dim), head(dim)])
        self.background_head = head(dim)
        self.classifier = nn.Linear(dim, 2)
        self.gate = config.gate
        # of the classifier's probability, for a slice to get positive prompts
        self.presence_threshold: float | Tensor = 0.5

    def forward(self, maps: list[Tensor], present: Tensor | None = None) -> Prompts:
        """Maps: six (N, C_i, H_i, W_i); present: (N,) bool, the truth in training, or None to trust the classifier."""
        strongest, average = self._pool(maps)
        positive = self.positive_norm(self._ask(self.positive_prototype, self.positive_attention, strongest))
        negative = self.negative_norm(self._ask(self.negative_prototype, self.negative_attention, average))
        presence = self.classifier(positive)
        if present is None:
            present = presence.float().softmax(dim=1)[:, 1] >= self.presence_threshold
        if not self.gate:
            present = torch.ones_like(present)
        return Prompts(self._prompts(positive, negative, present), presence)

    def _pool(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Six tokens by global maximum and six by global mean, each (N, 6, dim).

        Fine maps are max-pooled to the token grid before they are projected (not after: 16 to 256 times the work for
        a maximum over nearly the same pixels); the mean commutes with the projection.
        """
        strongest, average = [], []
        for project, x in zip(self.project, maps, strict=True):
            coarse = F.max_pool2d(x, x.shape[-1] // TOKENS).flatten(2).transpose(1, 2)
            strongest.append(project(coarse).amax(dim=1))
            average.append(project(plane_mean(x)))
        return torch.stack(strongest, dim=1), torch.stack(average, dim=1)

    def _ask(self, prototype: Tensor, attention: Attention, tokens: Tensor) -> Tensor:
        query = prototype.expand(tokens.shape[0], -1, -1)
        return (query + attention(q=query, k=tokens, v=tokens))[:, 0]

    def _prompts(self, positive: Tensor, negative: Tensor, present: Tensor) -> Tensor:
        kinds = [embedding.weight for embedding in self.sam.point_embeddings]
        shown = torch.stack(
            [
                self.point_head(positive) + kinds[POSITIVE],
                self.corner_heads[0](positive) + kinds[CORNER_1],
                self.corner_heads[1](positive) + kinds[CORNER_2],
            ],
            dim=1,
        )
        withheld = self.sam.not_a_point_embed.weight.to(shown.dtype)
        shown = torch.where(present[:, None, None], shown, withheld)
        background = self.background_head(negative) + kinds[NEGATIVE]
        return torch.cat([shown[:, :1], background[:, None], shown[:, 1:]], dim=1)

    def dense(self) -> tuple[Tensor, Tensor]:
        """SAM's "no mask" embedding (1, dim, 1, 1) and dense position encoding (1, dim, 16, 16).

        SAM's `get_dense_pe` makes its grid in float32 whatever the network's precision; this one follows the weights.
        """
        no_mask = self.sam.no_mask_embed.weight.reshape(1, -1, 1, 1)
        pe_layer = self.sam.pe_layer
        axis = (torch.arange(TOKENS, device=no_mask.device) + 0.5) / TOKENS
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # rows y, columns x, last axis (x, y)
        encoding = pe_layer._pe_encoding(grid.to(pe_layer.positional_encoding_gaussian_matrix.dtype))
        return no_mask, encoding.permute(2, 0, 1)[None]
