"""All slices of a scan through the hybrid network, in batches that fit the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..devices import DeviceError
from ..slices import TISSUE_WINDOW_HU, SliceGrid
from .config import IMAGE_SIZE, HybridConfig

logger = logging.getLogger(__name__)

MAX_BATCH = 8  # target slices: on two cores more take memory and bring no speed
LIVE_MAPS = 16  # full-resolution maps of the CNN alive at the peak, counted in `cnn_width` channels
Float = NDArray[np.float32]


class NotFiniteError(ValueError):
    """The network gave infinities or worse."""


class SliceNetwork(Protocol):
    """The hybrid network in one engine.

    device: where it runs now, "cpu" or "cuda:N". radius: neighbouring slices needed on each side. batch: target slices
    that a call takes at most. slice_threshold: a slice whose probability of holding a lesion lies below gets no
    positive prompts.
    """

    radius: int
    batch: int
    slice_threshold: float

    @property
    def device(self) -> str: ...

    def run(self, images: Float, last: bool = False) -> tuple[Float, Float]:
        """Slices (S + 2 · radius, 256, 256) in [0, 1] → logits (S, 256, 256) and probability of any lesion (S,).

        last: of a scan, so that memory taken for the next one may be given back. DeviceError where the device has no
        room for so many.
        """

    def to_cpu(self) -> None:
        """Leave the device for good."""


class SlicePredictions(NamedTuple):
    """probability: float16 (S, 256, 256) of lesion a pixel; presence: float32 (S,) probability of any lesion."""

    probability: NDArray[np.float16]
    presence: Float


def batch_for(config: HybridConfig, parameters: int, memory_mib: float, value_bytes: int) -> int:
    """Target slices that `memory_mib` of a device hold beside the weights; value_bytes: of a number there."""
    planes = config.slices if config.planes_kept else 1
    slice_mib = LIVE_MAPS * config.cnn_width * planes * IMAGE_SIZE**2 * value_bytes / 2**20
    weights_mib = parameters * value_bytes / 2**20
    return int(np.clip((memory_mib - weights_mib) / slice_mib, 1, MAX_BATCH))


def even_batch(count: int, most: int) -> int:
    """Slices of each of the fewest equal batches; the last one may reach beyond `count`."""
    return math.ceil(count / math.ceil(count / most))


def predict_slices(
    network: SliceNetwork,
    grid: SliceGrid,
    hu: NDArray[np.int16],
    window_hu: tuple[float, float] = TISSUE_WINDOW_HU,
    progress: Callable[[int], object] = lambda _: None,
    most: int = MAX_BATCH,
) -> SlicePredictions:
    """Run every slice of `hu` (z, y, x) as the target of its window; `progress` is told how many more are done.

    All batches are of one size, `most` at most and as many as the network takes: shapes, and with them the last digits,
    do not depend on what was run before, unless a device ran out of memory. Where it does, the batch halves; at one
    slice the network leaves it for the CPU. NotFiniteError where the network gives no numbers.
    """
    count = len(grid)
    probability = np.empty((count, IMAGE_SIZE, IMAGE_SIZE), np.float16)
    presence = np.empty(count, np.float32)
    start, size = 0, even_batch(count, min(network.batch, most))
    while start < count:
        stop = min(start + size, count)
        images = grid.cut(hu, start - network.radius, start + size + network.radius, window_hu)
        try:
            logits, found = (part[: stop - start] for part in network.run(images, last=stop == count))
        except DeviceError as error:
            _retreat(network, size, error)
            size = even_batch(count - start, min(network.batch, most))
            continue
        if not (np.isfinite(logits).all() and np.isfinite(found).all()):
            raise NotFiniteError("the hybrid network gave values that are not finite: run it with --device cpu")
        probability[start:stop], presence[start:stop] = sigmoid(logits), found
        progress(stop - start)
        start = stop
    return SlicePredictions(probability, presence)


def sigmoid(logits: Float) -> Float:
    """1 / (1 + e⁻ˣ), without an overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), np.float32)


def _retreat(network: SliceNetwork, tried: int, error: DeviceError) -> None:
    if tried > 1:
        network.batch = tried // 2
        logger.warning("%s: %d instead of %d slices a batch", error, network.batch, tried)
        return
    logger.warning("the hybrid network goes on without the GPU, which cannot run one slice (%s)", error)
    network.to_cpu()
    network.batch = MAX_BATCH
