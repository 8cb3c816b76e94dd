"""SAM's mask decoder for batches, with the CNN's detail added before the dot product.

Source: SAM's `MaskDecoder` (two-way transformer, upscaling, hypernetwork), which repeats image embeddings for every
prompt and so cannot take a batch of slices; mask token 0 only, no quality head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import IMAGE_SIZE, HybridConfig
from .layout import dot
from .sam import MaskDecoder, TwoWayTransformer

MLP_RATIO = 8  # SAM: 2048 for 256 channels


class BatchMaskDecoder(MaskDecoder):
    """One mask a slice; parameter names are SAM's, so that its weights load."""

    def __init__(self, config: HybridConfig, detail_channels: int) -> None:
        dim = config.prompt_dim
        transformer = TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=8, mlp_dim=MLP_RATIO * dim)
        super().__init__(transformer_dim=dim, transformer=transformer, num_multimask_outputs=0)
        del self.iou_prediction_head
        self.detail = nn.Linear(detail_channels, dim // 8)

    def forward(self, image: Tensor, position: Tensor, prompts: Tensor, no_mask: Tensor, detail: Tensor) -> Tensor:
        """Logits (N, 256, 256) of N slices.

        image: (N, dim, 16, 16); position: (1, dim, 16, 16); prompts: (N, 4, dim); no_mask: (1, dim, 1, 1);
        detail: the CNN's finest decoder map (N, C, 256, 256).
        """
        n, dim, height, width = image.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.to(prompts.dtype).expand(n, -1, -1), prompts], dim=1)
        tokens, image = self.transformer(image + no_mask, position.expand(n, -1, -1, -1), tokens)
        vector = self.output_hypernetworks_mlps[0](tokens[:, 1])  # N, dim/8: the first token is SAM's quality token
        image = self.output_upscaling(image.transpose(1, 2).reshape(n, dim, height, width))
        return self._coarse(vector, image) + self.fine(vector, detail)

    def _coarse(self, vector: Tensor, image: Tensor) -> Tensor:
        """The dot product at 64², then one channel is resized instead of dim/8: the two commute."""
        coarse = torch.einsum("nc,nchw->nhw", vector, image)[:, None]
        return F.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)[:, 0]

    def fine(self, vector: Tensor, detail: Tensor) -> Tensor:
        """vector · (W detail + b) = (Wᵀ vector) · detail + b · vector, without projecting a pixel."""
        weights = vector @ self.detail.weight
        bias = vector @ self.detail.bias
        return dot(weights, detail) + bias[:, None, None]
