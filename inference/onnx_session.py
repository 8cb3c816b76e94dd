"""A network in ONNX Runtime, on the GPU or the CPU."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .devices import DeviceError, first_line
from .limits import cores
from .onnx_check import check_onnx

logger = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
FAILURE = re.compile(r"(?:CUDA|CUDNN|CUBLAS|CUFFT) failure [^;]*[^; ]")  # the heart of what ONNX Runtime says of a GPU
ort.set_default_logger_severity(4)  # what fails is told here, in one line
GIVE_BACK = ort.RunOptions()
GIVE_BACK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")


class Session:
    """One network; where its device is not to be had, it is on the CPU, with a warning."""

    def __init__(
        self,
        name: str,
        content: bytes,
        device: str = "cpu",
        gpu_memory_mib: int = 2048,
        threads: int = 0,
        weights: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """name: for what is told of it; content: of its .onnx file; device: "cpu" or "cuda:N"; threads: 0 for one a
        core that this process may use; weights: of a graph that is stored without them, by name.

        ValueError where the file cannot be used.
        """
        self.name, self.content = name, content
        self.weights = {key: np.ascontiguousarray(value) for key, value in (weights or {}).items()}  # not copied again
        self.threads, self.asked = threads or cores(), device
        check_onnx(content, self.weights, name)
        self.inner = self._start(device, gpu_memory_mib)

    @property
    def device(self) -> str:
        """Where it runs: "cpu" or "cuda:N"."""
        return "cpu" if self.on_cpu else self.asked

    @property
    def on_cpu(self) -> bool:
        return bool(self.inner.get_providers()[0] == CPU)

    def run(self, inputs: dict[str, NDArray[Any]], last: bool = False) -> list[NDArray[Any]]:
        """All outputs. DeviceError where the GPU cannot, MemoryError or ValueError where the CPU cannot.

        last: the CPU's memory for intermediate results, which is otherwise kept for the next run, is given back.
        """
        try:
            return list(self.inner.run(None, inputs, GIVE_BACK if last and self.on_cpu else None))
        except Exception as error:  # as above
            said = _heart(error)
            if self.on_cpu and "alloc" in said:
                raise MemoryError(said) from error
            if self.on_cpu:
                raise ValueError(
                    f"the {self.name}'s ONNX file cannot be run: {said}: copy the weights again"
                ) from error
            raise DeviceError(said) from error

    def to_cpu(self) -> None:
        """Leave the GPU for good."""
        self.inner = self._open("cpu", 0)

    def _start(self, device: str, gpu_memory_mib: int) -> ort.InferenceSession:
        """On the device, or on the CPU where that cannot be had."""
        if device != "cpu":
            why = "ONNX Runtime cannot use it"
            try:
                inner = self._open(device, gpu_memory_mib)
                if inner.get_providers()[0] != CPU:
                    return inner
            except Exception as error:  # ONNX Runtime's own classes are not public
                why = _heart(error)
            logger.warning("%s cannot take the %s (%s): it runs on the CPU", device, self.name, why)
        try:
            return self._open("cpu", 0)
        except Exception as error:  # as above
            said = first_line(error)
            raise ValueError(f"the {self.name}'s ONNX file cannot be used ({said}): copy the weights again") from error

    def _open(self, device: str, gpu_memory_mib: int) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # lays a second copy of all intermediate results beside the first run's
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in self.weights.values()]
        options.add_external_initializers(list(self.weights), values)
        providers: list[Any] = [CPU]
        if device != "cpu":
            ort.preload_dlls()
            cuda = {
                "device_id": int(device.partition(":")[2] or 0),
                "gpu_mem_limit": gpu_memory_mib * 2**20,
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "HEURISTIC",
            }
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        # what happens where a provider fails is decided here, not by ONNX Runtime, which would print
        return ort.InferenceSession(self.content, options, providers=providers, enable_fallback=0)


def _heart(error: BaseException) -> str:
    """What an error says, without the place in ONNX Runtime's source where it arose."""
    said = first_line(error)
    found = FAILURE.search(said)
    return found.group() if found else said
