"""3-D convolutions whose weight gradients avoid oneDNN's 3-D kernels, for training in bfloat16 on CPUs with AMX.

There, the 3-D weight gradient of oneDNN 3.7 (torch 2.10) is garbage or a crash, depending on the shape and the CPU. Its
2-D one is right and fast, and a 3-D weight gradient is nothing but one 2-D gradient for each plane of the kernel. A
transposed convolution whose stride is its kernel is a matrix product.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Three = tuple[int, int, int]
Model = TypeVar("Model", bound=nn.Module)


class PlanarConv3d(nn.Conv3d):
    """`nn.Conv3d` with the same result and gradients, the weight's computed in 2-D; groups are not supported."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):  # which cannot look into an autograd function
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _Convolution.apply(x, weight, bias, self.stride, self.padding, self.dilation)


class MatrixConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` for strides equal to the kernel: each voxel becomes a block of its own."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert self.stride == self.kernel_size
        assert output_size is None
        blocks = nn.functional.linear(x.movedim(1, -1), self.weight.flatten(1).T)  # N, D, H, W, C_out · k
        blocks = blocks.unflatten(-1, self.weight.shape[1:]).permute(0, 1, 5, 2, 6, 3, 7, 4)
        n, *sides, channels = blocks.shape
        spatial = [size * k for size, k in zip(sides[::2], sides[1::2], strict=True)]
        out = blocks.reshape(n, *spatial, channels)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.movedim(-1, 1)  # channels-last, as what it will be joined with


def planar(model: Model) -> Model:
    """Replace the 3-D convolutions of `model` by those of this module, parameters kept; changes and returns it."""
    for module in model.modules():
        if type(module) is nn.Conv3d and max(module.kernel_size) > 1:
            module.__class__ = PlanarConv3d
        elif type(module) is nn.ConvTranspose3d:
            module.__class__ = MatrixConvTranspose3d
    return model


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Three, padding: Three, dilation: Three
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)  # once: every plane of the kernel cuts slices from it
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.placing = bias is not None, (stride, padding, dilation)
        return nn.functional.conv3d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous(memory_format=torch.channels_last_3d)
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.placing
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, padding, dilation, False, [0, 0, 0], 1, [True, False, False]
            )[0]
        to_weight = _weight_gradient(gradient, x, weight, stride, padding, dilation)
        to_bias = gradient.sum(dim=(0, 2, 3, 4)) if ctx.has_bias else None
        return to_x, to_weight, to_bias, None, None, None


def _weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Three, padding: Three, dilation: Three
) -> Tensor:
    """gradient: (N, C_out, D', H', W'); x: (N, C_in, D, H, W); weight: (C_out, C_in, k_d, k_h, k_w), as the result."""
    result = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    for plane in range(weight.shape[2]):
        first = plane * dilation[0] - padding[0]  # plane of x that the kernel's plane meets for output plane 0
        low = max(0, -(first // stride[0]))
        high = min(gradient.shape[2], (x.shape[2] - 1 - first) // stride[0] + 1)
        if high <= low:
            continue  # it only ever met the padding
        start = first + low * stride[0]
        stop = start + (high - low - 1) * stride[0] + 1
        for sample, changes in zip(x, gradient, strict=True):  # one by one: slices of the batch would be copied
            result[:, :, plane] += torch.ops.aten.convolution_backward(
                _planes(changes[:, low:high]), _planes(sample[:, start : stop : stride[0]]), weight[:, :, plane],
                None, stride[1:], padding[1:], dilation[1:], False, [0, 0], 1, [False, True, False],
            )[1]  # fmt: skip
    return result.to(weight.dtype)


def _planes(volume: Tensor) -> Tensor:
    """(C, D, H, W) → (D, C, H, W), channels-last; a view where it was so."""
    return volume.transpose(0, 1).contiguous(memory_format=torch.channels_last)
