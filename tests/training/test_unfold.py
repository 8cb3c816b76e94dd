"""A UNet out of its ONNX file: the same output, and batch norms as if they had measured the images themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from inference.unet import UNetConfig
from training.unet import build_unet, export_onnx
from training.unfold import load_onnx

CONFIG = UNetConfig(features=4)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return [torch.rand(2, 2, 16, 16, 24) * scale for scale in (1.0, 0.5, 2.0)]


@pytest.fixture(scope="module")
def trained(images):
    """Norms far from where they start."""
    torch.manual_seed(1)
    network = build_unet(CONFIG)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    network.train()
    with torch.no_grad():
        for image in 20 * images:
            network(image)
    return network.eval().requires_grad_(False)  # what training keeps, too


@pytest.fixture(scope="module")
def unfolded(trained, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "unet.onnx"
    export_onnx(trained, CONFIG, path)
    network = build_unet(CONFIG)
    load_onnx(network, path, images)
    return network.eval()


@torch.no_grad()
def test_gives_what_the_file_gives(trained, unfolded, images) -> None:
    for image in images:
        torch.testing.assert_close(unfolded(image), trained(image), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_norm_sees_what_it_measured(unfolded, images) -> None:
    seen: dict[nn.Module, list[torch.Tensor]] = {}
    network = copy.deepcopy(unfolded)
    norms = [module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, inputs: seen.setdefault(norm, []).append(inputs[0]))
    for image in images:
        network(image)
    assert len(seen) == 14  # two in each of the four levels down and the three up
    for norm, inputs in seen.items():
        values = torch.cat([part.transpose(0, 1).flatten(1) for part in inputs], 1)
        torch.testing.assert_close(norm.running_mean, values.mean(1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(norm.running_var, values.var(1, correction=0), atol=1e-2, rtol=1e-2)


def test_another_network_is_refused(trained, images, tmp_path) -> None:
    path = tmp_path / "unet.onnx"
    export_onnx(trained, CONFIG, path)
    with pytest.raises(ValueError, match="another network than the settings ask for"):
        load_onnx(build_unet(UNetConfig(features=8)), path, images)
