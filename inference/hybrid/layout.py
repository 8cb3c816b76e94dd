"""Operations on maps that are written twice: for torch, which is fast channels-last, and for a graph, which is not.

Maps are (N, planes, channels, height, width). In torch their memory is channels-last, and permuting axes costs nothing
as long as it stays so; ONNX Runtime lays every map out by its axes, and each permutation is a copy. Both forms give the
same values; `graph` tells which is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS_LAST, CHANNELS_THIRD = (0, 1, 3, 4, 2), (0, 1, 4, 2, 3)  # orders of axes, one the other's inverse


def graph() -> bool:
    """Whether the network is being exported."""
    return torch.onnx.is_in_onnx_export()


def stacked(planes: Tensor, stacks: int) -> Tensor:
    """Planes of all stacks (N·D, …) → (N, D, …)."""
    return planes.reshape(stacks, -1, *planes.shape[1:])  # not `unflatten`, which an export writes with D as it is now


def cut_planes(x: Tensor, first: int, count: int) -> Tensor:
    """Planes of maps; like their gradients, they stay channels-last, where a plain slice's do not."""
    if count == x.shape[1]:
        return x
    if graph():
        return x[:, first : first + count]
    return x.permute(CHANNELS_LAST)[:, first : first + count].permute(CHANNELS_THIRD)


def centre(x: Tensor, depth: int) -> Tensor:
    """The middle `depth` planes of maps."""
    return cut_planes(x, (x.shape[1] - depth) // 2, depth)


def join(maps: Sequence[Tensor], axis: int) -> Tensor:
    """Maps put together along their planes (1) or channels (2), and still channels-last."""
    if graph():
        return torch.cat(list(maps), dim=axis)
    joined = torch.cat([x.permute(CHANNELS_LAST) for x in maps], dim=CHANNELS_LAST.index(axis))
    return joined.permute(CHANNELS_THIRD)


def plane_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, C). In torch this and the next are products, many times as fast as `mean` in bfloat16.

    In a graph first the rows', which ONNX Runtime takes in any layout, and then theirs: one sum of 65,536 values after
    another would lose a hundred times as much to float32.
    """
    if graph():
        return F.avg_pool2d(x, (1, int(x.shape[-1]))).mean(dim=(2, 3))
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    return (pixels.new_full((1, pixels.shape[1]), 1 / pixels.shape[1]) @ pixels)[:, 0]


def channel_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, 1, H, W)."""
    if graph():
        return x.mean(dim=1, keepdim=True)
    return F.linear(x.permute(0, 2, 3, 1), x.new_full((1, x.shape[1]), 1 / x.shape[1])).permute(0, 3, 1, 2)


def double_size(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Transposed convolution by 2 in the plane: (N, C, H, W), weight (C, C_out, 2, 2) → (N, C_out, 2 H, 2 W).

    In torch a product that makes 2×2 pixels of each.
    """
    if graph():
        return F.conv_transpose2d(x, weight, bias, stride=2)
    _, _, height, width = x.shape
    bias = None if bias is None else bias.repeat_interleave(4)
    blocks = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1).T, bias)
    blocks = blocks.reshape(-1, height, width, weight.shape[1], 2, 2).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(-1, 2 * height, 2 * width, weight.shape[1]).permute(0, 3, 1, 2)


def dot(vector: Tensor, x: Tensor) -> Tensor:
    """Of each slice's vector (N, C) with every pixel of its map (N, C, H, W) → (N, H, W)."""
    if graph():
        return (vector[:, None] @ x.flatten(2)).reshape(-1, *x.shape[2:])
    return (x.permute(0, 2, 3, 1).flatten(1, 2) @ vector[..., None]).reshape(-1, *x.shape[2:])


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Each head's features times its own matrix: (N, T, heads, C), weight (heads, C, D) → (N, T, heads, D).

    In a graph one product with all matrices along the diagonal of a large one: more multiply-adds, but no copies that
    put heads first and last again.
    """
    if not graph():
        return torch.einsum("nthc,hcd->nthd", x, weight)
    heads, width, out = weight.shape
    diagonal = torch.eye(heads)[:, None, :, None] * weight[:, :, None]
    return (x.flatten(2) @ diagonal.reshape(heads * width, heads * out)).reshape(*x.shape[:2], heads, out)
