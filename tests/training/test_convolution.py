"""Planar weight gradients against torch's own in float64, where those are right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training.convolution import MatrixConvTranspose3d, PlanarConv3d, planar


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "depth"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 5),
        ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 7),
        ((3, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 3),
        ((1, 3, 3), (1, 1, 1), (0, 3, 3), (1, 3, 3), 4),
        ((3, 3, 3), (3, 1, 2), (2, 0, 1), (2, 1, 1), 8),
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),  # the outer planes meet only padding
    ],
)
def test_gradients_are_torchs(kernel, stride, padding, dilation, depth) -> None:
    torch.manual_seed(0)
    plain = nn.Conv3d(3, 4, kernel, stride, padding, dilation).double()
    assert type(planar(copy.deepcopy(plain))) is PlanarConv3d
    assert_same(plain, torch.randn(2, 3, depth, 9, 10, dtype=torch.float64))


@pytest.mark.parametrize(("kernel", "bias"), [((1, 2, 2), True), ((2, 2, 2), False), ((3, 1, 2), True)])
def test_transposed_gradients_are_torchs(kernel, bias) -> None:
    torch.manual_seed(0)
    plain = nn.ConvTranspose3d(3, 4, kernel, kernel, bias=bias).double()
    assert type(planar(copy.deepcopy(plain))) is MatrixConvTranspose3d
    assert_same(plain, torch.randn(2, 3, 4, 5, 6, dtype=torch.float64))


def assert_same(plain: nn.Module, x: torch.Tensor) -> None:
    """Output and all gradients of `plain` and of its replacement."""
    results = []
    for conv in (plain, planar(copy.deepcopy(plain))):
        own = x.clone().requires_grad_()
        out = conv(own)
        out.square().sum().backward()
        results.append((out, own.grad, *(parameter.grad for parameter in conv.parameters())))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_bfloat16_gradients_are_close_to_float32s(depth: int) -> None:
    """oneDNN's own 3-D weight gradient is garbage or a crash at these shapes on CPUs with AMX."""
    torch.manual_seed(0)
    conv = planar(nn.Conv3d(16, 16, 3, padding=1, bias=False).to(memory_format=torch.channels_last_3d))
    x = torch.randn(2, 16, depth, 64, 64).to(memory_format=torch.channels_last_3d)
    weights = torch.randn(2, 16, depth, 64, 64)
    (conv(x) * weights).sum().backward()
    exact, conv.weight.grad = conv.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(x)
    assert found.dtype == torch.bfloat16
    (found.float() * weights).sum().backward()
    assert (conv.weight.grad - exact).norm() < 0.01 * exact.norm()


def test_point_convolutions_and_the_state_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 3))
    before = model.state_dict()
    assert planar(model) is model
    assert [type(module) for module in model] == [nn.Conv3d, PlanarConv3d]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
