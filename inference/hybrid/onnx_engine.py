"""The hybrid network in ONNX Runtime: a graph without weights, which it shares with torch's safetensors file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from ..onnx_session import Session
from ..weights import Manifest
from .predict import MAX_BATCH, batch_for


class OnnxHybrid:
    """`SliceNetwork` of a graph that `training.graph` made: in float32 on any device (TF32 where a GPU has it)."""

    def __init__(self, manifest: Manifest, device: str = "cpu", gpu_memory_mib: int = 2048) -> None:
        """device: "cpu" or "cuda:N". ValueError where graph and weights do not fit each other."""
        try:
            stored = load(manifest.read("hybrid"))
        except (SafetensorError, KeyError) as error:  # KeyError: a type that numpy lacks
            raise ValueError(
                f"{manifest.folder}: the hybrid weights cannot be read ({error}): copy them again"
            ) from error
        asked = [name for name, value in stored.items() if value.dtype.kind == "f" and name not in manifest.unused]
        weights = {name: stored[name].astype(np.float32) for name in asked}
        self.session = Session("hybrid", manifest.read("graph"), device, gpu_memory_mib, weights=weights)
        self.radius, self.slice_threshold = manifest.hybrid.radius, manifest.gate.slice_threshold
        self.batch = MAX_BATCH
        if not self.session.on_cpu:
            count = sum(value.size for value in weights.values())
            self.batch = batch_for(manifest.hybrid, count, gpu_memory_mib, value_bytes=4)

    def run(self, images: NDArray[np.float32], last: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `SliceNetwork.run`."""
        threshold = np.array(self.slice_threshold, np.float32)
        logits, presence = self.session.run({"slices": images, "slice_threshold": threshold}, last)
        targets = len(images) - 2 * self.radius
        if logits.shape != (targets, *images.shape[1:]) or presence.shape != (targets,):
            raise ValueError(f"the hybrid gave {logits.shape} and {presence.shape} for {targets} slices: "
                             "copy the weights again")  # fmt: skip
        return logits, presence

    @property
    def device(self) -> str:
        return self.session.device

    def to_cpu(self) -> None:
        self.session.to_cpu()
