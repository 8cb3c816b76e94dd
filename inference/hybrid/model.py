"""SAMCancer's hybrid network: SAM beside a U-shaped CNN over five-slice windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cnn_unet import CnnUNet
from .config import LEVELS, HybridConfig
from .cross_branch import Exchange
from .indicator_prompt import IndicatorPromptEncoder
from .layout import stacked
from .mask_decoder import BatchMaskDecoder
from .vision_transformer import StagedViT, initialise


class HybridOutput(NamedTuple):
    """logits: (N, S, 256, 256), lesion where > 0; presence: logits (N, S, 2), absent and present."""

    logits: Tensor
    presence: Tensor


class Hybrid(nn.Module):
    """The definition is windowed: N windows of five slices, each giving its centre slice (D = 5, S = 1).

    Where `config.planes_kept` is False, the same call on a stack of S + 4 slices gives exactly what its S windows
    would give one by one, for 70 % of the multiply-adds: nothing but the two depth-shrinking convolutions looks
    across slices.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = StagedViT(config)
        self.cnn = CnnUNet(config)
        widths = self.cnn.widths
        self.exchanges = nn.ModuleList(Exchange(config.vit_width, width) for width in widths[1:])
        self.prompt_encoder = IndicatorPromptEncoder(config, widths[::-1])
        self.mask_decoder = BatchMaskDecoder(config, widths[0])
        self._initialise()

    def forward(self, stack: Tensor, present: Tensor | None = None) -> HybridOutput:
        """Segment every slice of a stack that has its neighbours.

        stack: (N, D, 256, 256) in [0, 1], D = S + 2 · radius (D = 5 where planes are kept).
        present: (N, S) bool, the truth that gates positive prompts in training; None trusts the classifier.
        """
        targets = self._targets(stack)
        image, maps = self._encode(stack, targets)
        decoded = [x.flatten(0, 1) for x in self.cnn.decode(maps, targets)]
        if not self.config.vit:
            image = torch.zeros_like(image)
        if not self.config.cnn:
            decoded = [torch.zeros_like(x) for x in decoded]
        prompts = self.prompt_encoder([*decoded, image], None if present is None else present.flatten())
        no_mask, position = self.prompt_encoder.dense()
        logits = self.mask_decoder(image, position, prompts.sparse, no_mask, decoded[-1])
        shape = (stack.shape[0], -1)
        return HybridOutput(logits.view(*shape, *logits.shape[1:]), prompts.presence.view(*shape, 2))

    def cnn_alone(self, stack: Tensor) -> Tensor:
        """Logits (N, S, H, W) of the CNN without the ViT and its prompts, for crops of any size that 16 divides.

        What the mask decoder starts from (see `_initialise`): its linear head on the CNN's finest map.
        """
        maps = [self.cnn.stem(stack[:, :, None])]
        for down in self.cnn.downs:
            maps.append(down(maps[-1]))
        detail = self.cnn.decode(maps, self._targets(stack))[-1].flatten(0, 1)
        start = torch.ones_like(self.mask_decoder.detail.bias).expand(len(detail), -1)
        return self.mask_decoder.fine(start, detail).unflatten(0, (len(stack), -1))

    def _targets(self, stack: Tensor) -> int:
        targets = stack.shape[1] - 2 * self.config.radius
        if targets < 1 or (self.config.planes_kept and targets != 1):
            need = "exactly" if self.config.planes_kept else "at least"
            raise ValueError(f"this network needs {need} {self.config.slices} slices, not {stack.shape[1]}")
        return targets

    def _encode(self, stack: Tensor, targets: int) -> tuple[Tensor, list[Tensor]]:
        """Both encoders with their exchanges → image embedding (N·S, dim, 16, 16) and the CNN's five maps."""
        maps = [self.cnn.stem(stack[:, :, None])]
        exchanges = self.config.exchanges and self.config.vit and self.config.cnn
        tokens = stack  # (N, planes, 256, 256), from the first stage on (N, planes, 16, 16, E)
        for level in range(LEVELS):
            maps.append(self.cnn.downs[level](maps[-1]))
            planes = targets if self.config.planes_kept else maps[-1].shape[1]
            first = (tokens.shape[1] - planes) // 2
            flat = tokens[:, first : first + planes].flatten(0, 1)
            flat = self.vit.stage(level, self.vit.embed(flat) if level == 0 else flat)
            tokens = stacked(flat, stack.shape[0])
            if exchanges:
                tokens, maps[-1] = self.exchanges[level](tokens, maps[-1])
        return self.vit.finish(tokens.flatten(0, 1)), maps

    def _initialise(self) -> None:
        """He initialisation of the convolutions (SAMCancer Table 2); linear layers keep torch's own.

        The hypernetwork starts at a vector of ones, so that the mask is at first an ordinary linear head on the CNN's
        map; from torch's near-zero vector neither side of the dot product gets a gradient for hundreds of steps.
        """
        nn.init.ones_(self.mask_decoder.output_hypernetworks_mlps[0].layers[-1].bias)
        for module in self.cnn.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        initialise(self.vit)


def channels_last(model: Hybrid) -> Hybrid:
    """Lay out the convolutions' weights channels-last: three times as fast on a CPU, and what tensor cores want."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return model
