"""SAM's image encoder at 256×256, cut into stages so that exchanges can happen between them.

Everything but the adapters, and the order in which attention is computed, is segment-anything's own code. Source: SAM
(Kirillov et al. 2023); the adapter beside each MLP follows SAMCT (2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import IMAGE_SIZE, LEVELS, PATCH_SIZE, TOKENS, HybridConfig
from .sam import ImageEncoderViT, MLPBlock, SelfAttention, get_rel_pos

ADAPTER_REDUCTION = 4
ADAPTER_SCALE = 0.5


class Adapter(nn.Sequential):
    """Bottleneck: width → width/4 → GELU → width, on the last axis."""

    def __init__(self, width: int) -> None:
        hidden = width // ADAPTER_REDUCTION
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class AdaptedMLP(MLPBlock):
    """SAM's MLP with an adapter in parallel; takes the place of `Block.mlp`, so SAM's own parameter names stay."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.adapter = Adapter(width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + ADAPTER_SCALE * self.adapter(x)


class PlacedAttention(SelfAttention):
    """SAM's self-attention, in which a key's place relative to the query is part of their product.

    SAM adds q · r(y_q - y_k) and q · r(x_q - x_k) to each score q · k, in two passes over scores of all pairs. Here the
    query brings its products with the embedding of every row and column along, and the key ones where it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, height, width, E) → the same."""
        n, height, width, channels = x.shape
        qkv = self.qkv(x).reshape(n, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(3, n * self.num_heads, height * width, -1).unbind(0)
        scores = self._from(query, height, width) @ self._at(key, height, width).transpose(1, 2)
        seen = (scores.softmax(dim=-1) @ value).reshape(n, self.num_heads, height * width, -1).transpose(1, 2)
        return self.proj(seen.reshape(n, height, width, channels))

    def _from(self, query: Tensor, height: int, width: int) -> Tensor:
        """(N · heads, tokens, C) → (N · heads, tokens, C + height + width)."""
        placed = query.reshape(-1, height, width, query.shape[-1])
        rows = torch.einsum("nhwc,hkc->nhwk", placed, get_rel_pos(height, height, self.rel_pos_h))
        columns = torch.einsum("nhwc,wkc->nhwk", placed, get_rel_pos(width, width, self.rel_pos_w))
        return torch.cat([query * self.scale, rows.flatten(1, 2), columns.flatten(1, 2)], dim=-1)

    def _at(self, key: Tensor, height: int, width: int) -> Tensor:
        """(N · heads, tokens, C) → (N · heads, tokens, C + height + width)."""
        row, column = (torch.eye(side, dtype=key.dtype, device=key.device) for side in (height, width))
        place = torch.cat([row.repeat_interleave(width, 0), column.repeat(height, 1)], dim=1)
        return torch.cat([key, place.expand(key.shape[0], -1, -1)], dim=-1)


class StagedViT(ImageEncoderViT):
    """ViT whose blocks run in four stages; tokens are (slices, 16, 16, width) throughout."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(
            img_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            embed_dim=config.vit_width,
            depth=config.vit_depth,
            num_heads=config.vit_heads,
            out_chans=config.prompt_dim,
            use_rel_pos=True,
            window_size=config.vit_window,
            global_attn_indexes=config.exchange_blocks,
        )
        for block in self.blocks:
            block.attn.__class__ = PlacedAttention  # nothing is added to it: a new one would be initialised for nothing
            block.mlp = AdaptedMLP(config.vit_width, block.mlp.lin1.out_features)
        self.blocks_a_stage = config.vit_depth // LEVELS

    def embed(self, slices: Tensor) -> Tensor:
        """(N, 256, 256) in [0, 1] → tokens (N, 16, 16, width).

        SAM's `patch_embed` of three equal colours: one whose weights are their sum. A convolution whose stride is its
        kernel is a product with patches.
        """
        projection = self.patch_embed.proj
        patches = slices.reshape(-1, TOKENS, PATCH_SIZE, TOKENS, PATCH_SIZE).transpose(2, 3)
        return F.linear(patches.flatten(3), projection.weight.sum(dim=1).flatten(1), projection.bias) + self.pos_embed

    def stage(self, level: int, tokens: Tensor) -> Tensor:
        """The blocks up to the exchange of `level` (0 … 3); tokens (N, 16, 16, width) → the same shape."""
        first = level * self.blocks_a_stage
        for block in self.blocks[first : first + self.blocks_a_stage]:
            tokens = block(tokens)
        return tokens

    def finish(self, tokens: Tensor) -> Tensor:
        """Tokens (N, 16, 16, width) → image embedding (N, prompt_dim, 16, 16)."""
        return self.neck(tokens.permute(0, 3, 1, 2))

    def forward(self, slices: Tensor) -> Tensor:
        """The ViT alone, without exchanges: (N, 256, 256) → (N, prompt_dim, 16, 16)."""
        tokens = self.embed(slices)
        for level in range(LEVELS):
            tokens = self.stage(level, tokens)
        return self.finish(tokens)


def initialise(vit: StagedViT) -> None:
    """Small random position embedding: SAM leaves zeros, meant to be loaded over."""
    with torch.no_grad():
        nn.init.trunc_normal_(vit.pos_embed, std=0.02)
