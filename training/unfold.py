"""A UNet to train on from, out of the ONNX file that ships, whose export has folded the batch norms into convolutions.

python -m training unfold --data FLARE_FOLDER --unet weights/small/unet.onnx --out RUN_DIR/start.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from tqdm import tqdm

from inference.unet import UNetConfig
from training.data import read_folder
from training.loop import save_weights
from training.release import metadata
from training.unet import CONFIG, Probability, build_unet, check_parity
from training.unet_data import Patch, PatchSampler, check_sides, grid_cases

CONVOLUTIONS = ("Conv", "ConvTranspose")
EXTRA = "deep_supervision_heads"  # used in training alone: not in the file
Weights = tuple[Tensor, Tensor | None]
Convolution = nn.Conv3d | nn.ConvTranspose3d
Pair = tuple[Convolution, nn.BatchNorm3d | None]


@torch.no_grad()
def load_onnx(network: nn.Module, path: Path, images: Iterable[Tensor]) -> None:
    """Fill `network` so that it gives what the file gives, with batch norms that measured what they see in `images`.

    A network that trained without them would not start from where its norms stood. images: batches of
    (N, channels, z, y, x). ValueError where the file holds another network than `network`.
    """
    batches = iter(images)
    first = next(batches)
    network.eval()
    pairs, stored = _pairs(network, first), _stored(path)
    own = [tuple(convolution.weight.shape) for convolution, _ in pairs]
    if own != [tuple(weight.shape) for weight, _ in stored]:
        raise ValueError(f"{path}: another network than the settings ask for: give the features that it was made with")
    for (convolution, norm), (weight, bias) in zip(pairs, stored, strict=True):
        _put(convolution, norm, weight, bias)
    _measure(network, [(convolution, norm) for convolution, norm in pairs if norm is not None], [first, *batches])


def _stored(path: Path) -> list[Weights]:
    """Weight and bias of each convolution, in the order in which they run."""
    graph = onnx.load(path, load_external_data=False).graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    found: list[Weights] = []
    halves: list[Tensor] = []  # of a transposed convolution that is two in 2-D, as `PlanesConvTranspose3d`
    for node in graph.node:
        if node.op_type in CONVOLUTIONS:
            arrays = [torch.from_numpy(np.array(numpy_helper.to_array(values[name]))) for name in node.input[1:]]
            weight, bias = arrays[0], arrays[1] if len(arrays) > 1 else None
            if weight.ndim == 4:
                halves.append(weight)
                if len(halves) < 2:
                    continue
                weight, halves = torch.stack(halves, 2), []
            found.append((weight, bias))
    return found


def _pairs(network: nn.Module, image: Tensor) -> list[Pair]:
    """Each convolution with the batch norm behind it, in the order in which they run."""
    order: list[Convolution | nn.BatchNorm3d] = []
    kinds = (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d)
    hooks = [
        module.register_forward_pre_hook(lambda module, _: order.append(module))
        for name, module in network.named_modules()
        if isinstance(module, kinds) and EXTRA not in name
    ]
    network(image)
    for hook in hooks:
        hook.remove()
    behind = [*order[1:], None]
    return [
        (module, after if isinstance(after, nn.BatchNorm3d) else None)
        for module, after in zip(order, behind, strict=True)
        if not isinstance(module, nn.BatchNorm3d)
    ]


def _put(convolution: Convolution, norm: nn.BatchNorm3d | None, weight: Tensor, bias: Tensor | None) -> None:
    """The folded convolution, and a norm that does no more than add its bias."""
    convolution.weight.copy_(weight)
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    if norm is None:
        if convolution.bias is not None:
            convolution.bias.copy_(bias)
        return
    _set_statistics(norm, torch.zeros(norm.num_features), 1 - norm.eps)
    norm.weight.fill_(1)
    norm.bias.copy_(bias)


def _set_statistics(norm: nn.BatchNorm3d, mean: Tensor, variance: float) -> None:
    assert norm.running_mean is not None  # tracked, as torch's default
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.fill_(variance)


def _measure(network: nn.Module, pairs: list[tuple[Convolution, nn.BatchNorm3d]], batches: list[Tensor]) -> None:
    """Mean and deviation of what each norm sees move from its own scale and shift into its statistics."""
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for _, norm in pairs}

    def add(norm: nn.BatchNorm3d, inputs: tuple[Tensor]) -> None:
        values = inputs[0].double().transpose(0, 1).flatten(1)
        sums[norm] += torch.stack([torch.ones(len(values)) * values.shape[1], values.sum(1), (values**2).sum(1)])

    hooks = [norm.register_forward_pre_hook(add) for _, norm in pairs]
    for image in batches:
        network(image)
    for hook in hooks:
        hook.remove()
    for convolution, norm in pairs:
        count, total, squares = sums[norm]
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=1e-8).sqrt()
        convolution.weight.div_(deviation.view(-1, *[1] * 4))
        _set_statistics(norm, mean / deviation, 1)
        norm.bias.add_(mean)
        norm.weight.copy_(deviation * (1 + norm.eps) ** 0.5)


@dataclass(frozen=True)
class Settings:
    data: tuple[Path, ...]  # FLARE folders: imagesTr, labelsTr
    unet: Path  # unet.onnx of a release
    out: Path  # safetensors file, for the `weights` of a training
    cache: Path | None = None  # of the preprocessed cases; beside `out` where not given
    scans: int = 24  # evenly out of the folders
    patch: Patch = (48, 96, 96)
    batches: int = 24
    jobs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_sides(self.patch)
        if min(self.scans, self.batches) < 1:
            raise ValueError("--scans and --batches: from 1 on")


def main(settings: Settings) -> None:
    """Make a UNet that ships ready to be trained on: batch norms put back, as measured on the data's patches."""
    config = UNetConfig.from_dict(json.loads(metadata(settings.unet)[CONFIG]))
    entries = [entry for folder in settings.data for entry in read_folder(folder) if entry.teaches]
    chosen = [entries[i] for i in np.linspace(0, len(entries) - 1, min(settings.scans, len(entries))).astype(int)]
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    cases = grid_cases(chosen, settings.cache or settings.out.parent / "cache", config, settings.jobs)
    sampler = PatchSampler(cases, config, settings.seed)
    network = build_unet(config)
    steps = tqdm(range(settings.batches), unit="batch", disable=None)
    load_onnx(network, settings.unet, (sampler.batch(step, range(3), settings.patch).image for step in steps))
    image = sampler.batch(0, range(1), settings.patch).image
    difference = check_parity(Probability(network).eval(), settings.unet, image)
    save_weights(network, settings.out)
    print(f"{settings.out}: the file's probabilities to {difference:.0e}")
