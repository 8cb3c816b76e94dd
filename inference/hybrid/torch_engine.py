"""The hybrid network in torch: what training uses, and one of inference's two engines."""

from __future__ import annotations

import logging
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..devices import DeviceError, first_line
from ..weights import Manifest
from .cnn_unet import fold_batch_norms
from .config import HybridConfig
from .model import Hybrid, channels_last
from .predict import MAX_BATCH, batch_for

logger = logging.getLogger(__name__)


def load_hybrid(manifest: Manifest) -> Hybrid:
    """The hybrid network for use: in float32, on the CPU, batch norms folded, the gate as the manifest says."""
    try:
        state = load(manifest.read("hybrid"))
        model = Hybrid(manifest.hybrid)  # not on the meta device, which would bring in torch's compiler
        model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except (RuntimeError, TypeError, SafetensorError) as error:
        said = first_line(error)
        raise ValueError(f"{manifest.folder}: the hybrid weights do not fit their settings: {said}") from error
    model.prompt_encoder.presence_threshold = manifest.gate.slice_threshold
    fold_batch_norms(model.eval().requires_grad_(False))
    return channels_last(model)


def stacks(images: Tensor, config: HybridConfig) -> Tensor:
    """Slices (S + 2 · radius, 256, 256) → what the network takes: them as one stack, or S windows of five."""
    if not config.planes_kept:
        return images[None]
    targets = images.shape[0] - 2 * config.radius
    return torch.stack([images[first : first + targets] for first in range(config.slices)], dim=1)


def run_stack(model: Hybrid, images: Tensor) -> tuple[Tensor, Tensor]:
    """(S + 2 · radius, 256, 256) in [0, 1] → logits (S, 256, 256) and presence probability (S,), in float32."""
    output = model(stacks(images, model.config))
    return output.logits.flatten(0, 1).float(), output.presence.flatten(0, 1).float().softmax(dim=-1)[:, 1]


class TorchHybrid:
    """`SliceNetwork` of a torch model: in float16 on a GPU, in float32 on the CPU."""

    def __init__(self, model: Hybrid, batch: int = MAX_BATCH, manifest: Manifest | None = None) -> None:
        """manifest: what to load the network from again where the device takes it along."""
        self.model, self.batch, self.radius, self.manifest = model, batch, model.config.radius, manifest

    @classmethod
    def load(cls, manifest: Manifest, device: str = "cpu", gpu_memory_mib: int = 2048) -> TorchHybrid:
        """The manifest's network on "cpu" or "cuda:N", or on the CPU where that has no room for it."""
        network = cls(load_hybrid(manifest), manifest=manifest)
        if device != "cpu":
            network._to_device(device, gpu_memory_mib)
        return network

    @property
    def slice_threshold(self) -> float:
        return float(self.model.prompt_encoder.presence_threshold)

    @slice_threshold.setter
    def slice_threshold(self, threshold: float) -> None:
        self.model.prompt_encoder.presence_threshold = threshold

    @torch.inference_mode()
    def run(self, images: NDArray[np.float32], last: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `SliceNetwork.run`. Where float16 is too narrow, the network goes on in float32, in later scans too."""
        parameter, crowded = next(self.model.parameters()), False
        try:
            on_device = torch.from_numpy(images).to(parameter.device, parameter.dtype)
            logits, presence = (part.cpu() for part in run_stack(self.model, on_device))
        except torch.OutOfMemoryError:
            crowded = True
        except RuntimeError as error:
            if parameter.device.type == "cpu":
                raise
            raise DeviceError(first_line(error)) from error
        if crowded:  # not raised above: the error's trace would keep all that had been computed
            torch.cuda.empty_cache()
            raise DeviceError("out of device memory")
        if parameter.dtype == torch.float16 and not (logits.isfinite().all() and presence.isfinite().all()):
            logger.warning("values too large for float16: the hybrid network goes on in float32")
            self.model.float()
            return self.run(images, last)
        if last:
            torch.cuda.empty_cache()  # to the UNet; nothing without a GPU
        return logits.numpy(), presence.numpy()

    @property
    def device(self) -> str:
        return str(next(self.model.parameters()).device)

    def to_cpu(self) -> None:
        if self.manifest is None:
            self.model.cpu().float()
        else:  # nothing is asked of the device, which may be gone
            threshold, self.model = self.slice_threshold, load_hybrid(self.manifest)
            self.slice_threshold = threshold
        with suppress(RuntimeError):
            torch.cuda.empty_cache()

    def _to_device(self, device: str, gpu_memory_mib: int) -> None:
        try:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory_mib * 2**20 / total), device)
            self.model.half().to(device)
        except (RuntimeError, AssertionError) as error:  # no room, a busy device, an old driver, a torch without CUDA
            logger.warning("%s cannot take the hybrid (%s): it runs on the CPU", device, first_line(error))
            self.model.cpu().float()
            return
        count = sum(parameter.numel() for parameter in self.model.parameters())
        self.batch = batch_for(self.model.config, count, gpu_memory_mib, value_bytes=2)
