"""All slices of a scan through the hybrid network, in batches that fit the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..slices import TISSUE_WINDOW_HU, SliceGrid
from .config import IMAGE_SIZE
from .model import Hybrid

logger = logging.getLogger(__name__)

MAX_TARGETS = 16  # slices a batch: more bring no speed
CONTEXT_MIB = 700  # of a device, taken before the first tensor
LIVE_MAPS = 16  # full-resolution maps of the CNN alive at the peak, counted in `cnn_width` channels


class NotFiniteError(ValueError):
    """The network gave infinities or worse."""


class SlicePredictions(NamedTuple):
    """probability: float16 (S, 256, 256) of lesion a pixel; presence: float32 (S,) probability of any lesion."""

    probability: NDArray[np.float16]
    presence: NDArray[np.float32]


def targets_for(model: Hybrid, memory_mib: int) -> int:
    """Slices a batch that `memory_mib` of a device hold beside the weights in float16."""
    config = model.config
    planes = config.slices if config.planes_kept else 1
    slice_mib = LIVE_MAPS * config.cnn_width * planes * IMAGE_SIZE**2 * 2 / 2**20
    weights_mib = sum(parameter.numel() for parameter in model.parameters()) * 2 / 2**20
    return int(np.clip((memory_mib - weights_mib) / slice_mib, 1, MAX_TARGETS))


def predict_slices(
    model: Hybrid,
    grid: SliceGrid,
    hu: NDArray[np.int16],
    window_hu: tuple[float, float] = TISSUE_WINDOW_HU,
    targets: int = MAX_TARGETS,
    progress: Callable[[int], object] = lambda _: None,
) -> SlicePredictions:
    """Run every slice of `hu` (z, y, x) as the target of its window; `progress` is told how many more are done.

    Where the device runs out of memory the batch halves; at one slice the rest goes to the CPU. Where float16 is too
    narrow for a scan, the network goes on in float32, in later scans too. NotFiniteError where that is not enough.
    """
    count = len(grid)
    probability = np.empty((count, IMAGE_SIZE, IMAGE_SIZE), np.float16)
    presence = np.empty(count, np.float32)
    start = 0
    while start < count:
        stop = min(start + targets, count)
        images = torch.from_numpy(grid.cut(hu, start - model.config.radius, stop + model.config.radius, window_hu))
        try:
            result = _try_stack(model, images)
        except NotFiniteError:
            if next(model.parameters()).dtype == torch.float32:
                raise
            logger.warning("values too large for float16: the hybrid network goes on in float32")
            model.float()
            continue
        if result is None:
            model, targets = _retreat(model, targets)
            continue
        logits, present = result
        probability[start:stop] = logits.sigmoid().half().numpy()
        presence[start:stop] = present.numpy()
        progress(stop - start)
        start = stop
    return SlicePredictions(probability, presence)


def _try_stack(model: Hybrid, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """`run_stack`, or None where the device runs out of memory; by then nothing holds what had been computed."""
    try:
        return run_stack(model, images)
    except torch.OutOfMemoryError:
        return None


@torch.inference_mode()
def run_stack(model: Hybrid, images: Tensor) -> tuple[Tensor, Tensor]:
    """(S + 2 · radius, 256, 256) in [0, 1] → logits (S, 256, 256) and presence probability (S,), float32 on the CPU."""
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    if model.config.planes_kept:  # S windows of five slices instead of one stack
        images = images.unfold(0, model.config.slices, 1).permute(0, 3, 1, 2)
        output = model(images)
        logits, presence = output.logits[:, 0], output.presence[:, 0]
    else:
        output = model(images[None])
        logits, presence = output.logits[0], output.presence[0]
    logits, presence = logits.float().cpu(), presence.float().softmax(dim=-1)[:, 1].cpu()
    if not (logits.isfinite().all() and presence.isfinite().all()):
        raise NotFiniteError("the hybrid network gave values that are not finite: run it with --device cpu")
    return logits, presence


def _retreat(model: Hybrid, targets: int) -> tuple[Hybrid, int]:
    torch.cuda.empty_cache()
    if targets > 1:
        logger.warning("out of device memory: %d instead of %d slices a batch", targets // 2, targets)
        return model, targets // 2
    logger.warning("out of device memory with one slice: the hybrid network goes on without the GPU")
    return model.cpu().float(), MAX_TARGETS
