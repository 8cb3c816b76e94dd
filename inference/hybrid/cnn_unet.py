"""The U-shaped CNN beside the ViT: detail in the plane and context from neighbouring slices.

Maps are (N, planes, channels, height, width): the planes of all stacks are, without a copy, images of a 2-D network.
Convolutions look across planes only where their `Depth` says so; every pooling, norm and gate acts, in use, on each
plane by itself, so a slice's features do not depend on which stack holds it. Source: SAMCancer §2 and SAMCT's CNN
encoder (bias-free convolutions, layer norm over channels, GELU). With `config.norm` "batch", batch norm and ReLU take
the place of layer norm and GELU: a layer norm over the channels takes away how strong they all are, and so the HU of
every region without an edge.
"""

from __future__ import annotations

from enum import Enum
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .config import LEVELS, HybridConfig, Norm
from .layout import centre, channel_mean, cut_planes, double_size, join, plane_mean, stacked

GATE_REDUCTION = 4
SPATIAL_GATE_KERNEL = 7


class Depth(Enum):
    """What a pair of convolutions does along the slice axis."""

    NONE = 0  # 1×3×3 twice
    SHRINK = 1  # 3×3×3 without padding in depth, then 1×3×3: two planes fewer
    KEEP = 2  # 3×3×3 twice, padded: as many planes as before


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W); fused where the memory format is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlaneConv(nn.Conv3d):
    """`nn.Conv3d` of maps (N, D, C, H, W), as large in the plane as before, computed in 2-D.

    Where the kernel is three planes deep, a plane and its neighbours are three times the channels of one image.
    """

    def __init__(self, c_in: int, c_out: int, size: int, dilation: int, depth: Depth, bias: bool = False) -> None:
        self.planes, self.margin = 1 if depth is Depth.NONE else 3, 1 if depth is Depth.KEEP else 0
        padding, dilations = (self.margin, *(dilation * (size // 2),) * 2), (1, dilation, dilation)
        super().__init__(c_in, c_out, (self.planes, size, size), 1, padding, dilations, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return stacked(self.flat(x), x.shape[0])

    def flat(self, x: Tensor) -> Tensor:
        """Maps (N, D, C, H, W) → planes (N·D, C, H, W)."""
        weight, depth = self.weight, x.shape[1] + 2 * self.margin - self.planes + 1
        if self.margin:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, self.margin, self.margin))
        if self.planes > 1:
            x = join([cut_planes(x, first, depth) for first in range(self.planes)], 2)
            weight = weight.transpose(1, 2)
        weight = weight.reshape(len(weight), -1, *self.kernel_size[1:])
        return F.conv2d(x.flatten(0, 1), weight, self.bias, 1, self.padding[1:], self.dilation[1:])


class PlaneUp(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` of maps (N, D, C, H, W) by 2 in the plane."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        return stacked(double_size(x.flatten(0, 1), self.weight[:, :, 0], self.bias), x.shape[0])


class Conv(nn.Sequential):
    """Bias-free convolution, norm, activation."""

    def __init__(
        self, c_in: int, c_out: int, norm: Norm, size: int = 3, dilation: int = 1, depth: Depth = Depth.NONE
    ) -> None:
        conv = PlaneConv(c_in, c_out, size, dilation, depth)
        if norm == "batch":
            super().__init__(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        else:
            super().__init__(conv, ChannelNorm(c_out), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, C, H, W) → the same."""
        return stacked(self.flat(x), x.shape[0])

    def flat(self, x: Tensor) -> Tensor:
        """Maps (N, D, C, H, W) → planes (N·D, C, H, W)."""
        convolution = cast(PlaneConv, self[0])
        return self[2](self[1](convolution.flat(x)))


def fold_batch_norms(model: nn.Module) -> None:
    """Put every batch norm of a model that will not be trained into the convolution before it: the same result."""
    for conv in model.modules():
        if isinstance(conv, Conv) and isinstance(conv[0], nn.Conv3d) and isinstance(conv[1], nn.BatchNorm2d):
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
        self.spatial_gate = PlaneConv(2, 1, SPATIAL_GATE_KERNEL, 1, Depth.NONE, bias=True)
        self.mix = Conv(channels, channels, norm, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, 1, H, W) → (N, D, C, H, W)."""
        stacks = x.shape[0]
        x = self.wide.flat(x) + self.near.flat(x)
        x = x * torch.sigmoid(self.channel_gate(plane_mean(x)))[..., None, None]
        strongest = x.max(dim=1, keepdim=True).values  # the gradient of `amax` shares out ties, and is slower
        summary = torch.cat([channel_mean(x), strongest], dim=1)
        gate = torch.sigmoid(self.spatial_gate(stacked(summary, stacks)))
        return self.mix(stacked(x, stacks) * gate)


class Down(nn.Module):
    """Max-pool 2 in the plane and a double convolution."""

    def __init__(self, c_in: int, c_out: int, norm: Norm, depth: Depth) -> None:
        super().__init__()
        self.convs = double_conv(c_in, c_out, norm, depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(stacked(F.max_pool2d(x.flatten(0, 1), 2), x.shape[0]))


class Up(nn.Module):
    """Transposed convolution 2 in the plane, the skip beside it, a double convolution."""

    def __init__(self, c_in: int, c_out: int, norm: Norm, depth: Depth) -> None:
        super().__init__()
        self.upsample = PlaneUp(c_in, c_out)
        self.convs = double_conv(2 * c_out, c_out, norm, depth)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.upsample(x)
        return self.convs(join([x, centre(skip, x.shape[1])], 2))


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
