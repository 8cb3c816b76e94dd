"""The 3-D UNet as a torch network, for training, and its export to ONNX."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from inference.atomic import write_whole
from inference.unet import UNetConfig

LEVELS = 4
OPSET = 17
CONFIG = "config"  # key of the settings in a file's metadata
PARITY = 1e-4  # largest difference of probabilities that an export may show


def build_unet(config: UNetConfig) -> DynUNet:
    """Four levels, 3×3×3 convolutions, batch norm, leaky ReLU; 5.6 M parameters at 32 features.

    Batch norm where nnU-Net has instance norm: the network may then learn on smaller patches than it is used on, which
    instance norm takes for another picture, and the export folds it into the convolutions.
    In training mode it gives (N, 3, 1, z, y, x): logits of the three finest levels, for deep supervision.
    """
    return DynUNet(
        spatial_dims=3,
        in_channels=len(config.windows_hu),
        out_channels=1,
        kernel_size=[3] * LEVELS,
        strides=[1] + [2] * (LEVELS - 1),
        upsample_kernel_size=[2] * (LEVELS - 1),
        filters=[config.features * 2**level for level in range(LEVELS)],
        norm_name="BATCH",
        deep_supervision=True,
        deep_supr_num=2,
    )


class Probability(nn.Module):
    """The network as it ships: input (N, channels, z, y, x) in [0, 1] → lesion probability (N, 1, z, y, x)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).sigmoid()


class PlanesConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` by 2 as two in 2-D, one for each plane that a plane becomes.

    On a CPU ONNX Runtime is several times as fast at these.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert self.stride == self.kernel_size == (2, 2, 2)
        assert output_size is None
        n, channels, depth, height, width = x.shape
        planes = x.transpose(1, 2).reshape(-1, channels, height, width)
        pairs = [F.conv_transpose2d(planes, self.weight[:, :, place], self.bias, stride=2) for place in range(2)]
        return torch.stack(pairs, 1).reshape(n, 2 * depth, -1, 2 * height, 2 * width).transpose(1, 2)


def export_onnx(network: nn.Module, config: UNetConfig, path: Path) -> float:
    """Write one ONNX file for any patch size that the strides divide, its config in the metadata.

    The largest difference from torch is returned. RuntimeError where it exceeds 1e-4.
    """
    module = Probability(copy.deepcopy(network)).eval().float().cpu()  # training goes on with the network as it is
    deployed = copy.deepcopy(module)
    for part in deployed.modules():
        if isinstance(part, nn.ConvTranspose3d):
            part.__class__ = PlanesConvTranspose3d
    example = torch.rand(1, len(config.windows_hu), 16, 16, 16)
    spatial = {axis: name for axis, name in enumerate(("batch", None, "depth", "height", "width")) if name}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        torch.onnx.export(
            deployed,
            (example,),
            str(written),
            input_names=["image"],
            output_names=["probability"],
            dynamic_axes={"image": spatial, "probability": spatial},
            opset_version=OPSET,
            dynamo=False,
        )
        model = onnx.load(written)
    onnx.helper.set_model_props(model, {CONFIG: json.dumps(config.to_dict())})
    write_whole(path, model.SerializeToString())
    return check_parity(module, path, torch.rand(1, len(config.windows_hu), 16, 24, 40))


@torch.inference_mode()
def check_parity(module: nn.Module, path: Path, image: Tensor) -> float:
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    exported = session.run(None, {"image": image.numpy()})[0]
    difference = float(np.abs(exported - module(image).numpy()).max())
    if not difference <= PARITY:
        raise RuntimeError(f"{path}: ONNX and torch differ by {difference:.2e}, more than {PARITY}")
    return difference
