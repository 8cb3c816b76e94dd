"""The U-shaped CNN beside the ViT: detail in the plane and context from neighbouring slices.

Maps are (N, channels, depth, height, width). Convolutions look across slices only where their `Depth` says so; every
pooling, norm and gate acts, in use, on each slice by itself, so a slice's features do not depend on which stack holds
it. Source: SAMCancer §2 and SAMCT's CNN encoder (bias-free convolutions, layer norm over channels, GELU). With
`config.norm` "batch", batch norm and ReLU take the place of layer norm and GELU: a layer norm over the channels takes
away how strong they all are, and so the HU of every region without an edge.
"""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .config import LEVELS, HybridConfig, Norm

GATE_REDUCTION = 4
SPATIAL_GATE_KERNEL = 7


class Depth(Enum):
    """What a pair of convolutions does along the slice axis."""

    NONE = 0  # 1×3×3 twice
    SHRINK = 1  # 3×3×3 without padding in depth, then 1×3×3: two planes fewer
    KEEP = 2  # 3×3×3 twice, padded: as many planes as before


def cut_planes(x: Tensor, first: int, count: int) -> Tensor:
    """Planes of maps (N, C, D, H, W); cut so that the gradient of channels-last maps is channels-last too."""
    return x if count == x.shape[2] else x.movedim(1, -1).narrow(1, first, count).movedim(-1, 1)


def centre(x: Tensor, depth: int) -> Tensor:
    """The middle `depth` planes of maps (N, C, D, H, W)."""
    return cut_planes(x, (x.shape[2] - depth) // 2, depth)


def plane_mean(x: Tensor) -> Tensor:
    """(N, C, D, H, W) → (N, D, C). These two are products of matrices, many times as fast as `mean` in bfloat16."""
    pixels = x.movedim(1, -1).flatten(2, 3)
    return (pixels.new_full((1, pixels.shape[2]), 1 / pixels.shape[2]) @ pixels)[:, :, 0]


def channel_mean(x: Tensor) -> Tensor:
    """(N, C, D, H, W) → (N, 1, D, H, W)."""
    return F.linear(x.movedim(1, -1), x.new_full((1, x.shape[1]), 1 / x.shape[1])).movedim(-1, 1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, D, H, W); fused where the memory format is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Conv(nn.Sequential):
    """Bias-free convolution, norm, activation."""

    def __init__(
        self, c_in: int, c_out: int, norm: Norm, size: int = 3, dilation: int = 1, depth: Depth = Depth.NONE
    ) -> None:
        planes = 1 if depth is Depth.NONE else 3
        padding = (1 if depth is Depth.KEEP else 0, dilation * (size // 2), dilation * (size // 2))
        conv = nn.Conv3d(
            c_in, c_out, (planes, size, size), padding=padding, dilation=(1, dilation, dilation), bias=False
        )
        if norm == "batch":
            super().__init__(conv, nn.BatchNorm3d(c_out), nn.ReLU(inplace=True))
        else:
            super().__init__(conv, ChannelNorm(c_out), nn.GELU())


def fold_batch_norms(model: nn.Module) -> None:
    """Put every batch norm of a model that will not be trained into the convolution before it: the same result."""
    for conv in model.modules():
        if isinstance(conv, Conv) and isinstance(conv[0], nn.Conv3d) and isinstance(conv[1], nn.BatchNorm3d):
            conv[0], conv[1] = fuse_conv_bn_eval(conv[0], conv[1]), nn.Identity()


def double_conv(c_in: int, c_out: int, norm: Norm, depth: Depth) -> nn.Sequential:
    second = Depth.KEEP if depth is Depth.KEEP else Depth.NONE
    return nn.Sequential(Conv(c_in, c_out, norm, depth=depth), Conv(c_out, c_out, norm, depth=second))


class AttentionStem(nn.Module):
    """Two branches (3×3 dilated by 3; 5×5), a gate over channels, then a gate over space, both slice by slice."""

    def __init__(self, channels: int, norm: Norm, depth: Depth) -> None:
        super().__init__()
        self.wide = Conv(1, channels, norm, size=3, dilation=3, depth=depth)
        self.near = Conv(1, channels, norm, size=5, depth=depth)
        hidden = max(channels // GATE_REDUCTION, 4)
        self.channel_gate = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        self.spatial_gate = nn.Conv3d(
            2, 1, (1, SPATIAL_GATE_KERNEL, SPATIAL_GATE_KERNEL), padding=(0, *(SPATIAL_GATE_KERNEL // 2,) * 2)
        )
        self.mix = Conv(channels, channels, norm, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) → (N, C, D, H, W)."""
        x = self.wide(x) + self.near(x)
        weights = self.channel_gate(plane_mean(x))
        x = x * torch.sigmoid(weights).transpose(1, 2)[..., None, None]
        strongest = x.max(dim=1, keepdim=True).values  # `amax` takes three times as long to train
        summary = torch.cat([channel_mean(x), strongest], dim=1)
        return self.mix(x * torch.sigmoid(self.spatial_gate(summary)))


class Down(nn.Module):
    """Max-pool 2 in the plane and a double convolution."""

    def __init__(self, c_in: int, c_out: int, norm: Norm, depth: Depth) -> None:
        super().__init__()
        self.convs = double_conv(c_in, c_out, norm, depth)

    def forward(self, x: Tensor) -> Tensor:
        n, _, depth, _, _ = x.shape
        slices = x.transpose(1, 2).flatten(0, 1)  # in 3-D, autocast on a CPU would pool in float32
        return self.convs(F.max_pool2d(slices, 2).unflatten(0, (n, depth)).transpose(1, 2))


class Up(nn.Module):
    """Transposed convolution 2 in the plane, the skip beside it, a double convolution."""

    def __init__(self, c_in: int, c_out: int, norm: Norm, depth: Depth) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose3d(c_in, c_out, (1, 2, 2), stride=(1, 2, 2))
        self.convs = double_conv(2 * c_out, c_out, norm, depth)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.upsample(x)
        return self.convs(torch.cat([x, centre(skip, x.shape[2])], dim=1))


class CnnUNet(nn.Module):
    """Stem, four down levels (run one by one, for the exchanges between them) and a decoder with skips."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        widths = [config.cnn_width * 2**level for level in range(LEVELS + 1)]
        across = Depth.KEEP if config.planes_kept and config.slices > 1 else Depth.NONE
        shrink = Depth.SHRINK if config.slices > 1 and not config.planes_kept else across
        downs = [shrink, shrink, across, across]
        ups = [across, across, Depth.NONE, Depth.NONE]
        norm = config.norm
        self.stem = AttentionStem(widths[0], norm, across)
        self.downs = nn.ModuleList(Down(a, b, norm, d) for a, b, d in zip(widths, widths[1:], downs, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.ups = nn.ModuleList(Up(a, b, norm, d) for (a, b), d in zip(pairs, ups, strict=True))
        self.widths = widths

    def decode(self, maps: list[Tensor], depth: int) -> list[Tensor]:
        """Maps of the five levels, finest first → decoder maps, coarsest first, each with `depth` target planes."""
        x = maps[-1]
        decoded = [x]
        for index, (up, skip) in enumerate(zip(self.ups, maps[-2::-1], strict=True)):
            if index >= LEVELS // 2:  # the paper's form drops the neighbours' planes here
                x = centre(x, depth)
            x = up(x, skip)
            decoded.append(x)
        return [centre(x, depth) for x in decoded]
