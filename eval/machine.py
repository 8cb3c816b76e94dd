"""What the machine is, and the GPU that NVML knows by an index."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

logger = logging.getLogger(__name__)

MIB = 1048576


@dataclass(frozen=True)
class Gpu:
    """A device by NVML's index (the order of PCI buses); `total_mib` of memory."""

    index: int
    handle: Any
    name: str
    driver: str
    total_mib: float

    def used_mib(self) -> float:
        """Memory of the whole device that is not free, as the official script reads it. OSError where NVML fails.

        Total − free also counts what the driver keeps for itself; no process is told apart, because inside a
        container NVML reports the host's process numbers.
        """
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(self.handle)
        except pynvml.NVMLError as error:
            raise OSError(f"GPU {self.index}: its memory can no longer be read ({error}): run nvidia-smi") from error
        return (memory.total - memory.free) / MIB


def open_gpu(index: int) -> Gpu:
    """The GPU with this index. ValueError where NVML or the device is missing."""
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        total = pynvml.nvmlDeviceGetMemoryInfo(handle).total
        return Gpu(index, handle, pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion(), total / MIB)
    except pynvml.NVMLError as error:
        raise ValueError(
            f"GPU {index}: NVML cannot read it ({error}): name another --gpu, or use --cpu-only"
        ) from error


def find_gpu(asked: int | None) -> Gpu | None:
    """The GPU asked for; without a wish, GPU 0 where there is one, or None, which a warning tells.

    ValueError where the GPU asked for is missing.
    """
    if asked is not None:
        return open_gpu(asked)
    try:
        return open_gpu(0)
    except ValueError as error:
        logger.warning("no GPU is measured: its columns stay empty (%s)", error.__cause__)
        return None


def describe(gpu: Gpu | None) -> dict[str, Any]:
    """What a reader of the figures needs to know of this machine."""
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "ram_mib": round(psutil.virtual_memory().total / MIB),
        "gpu": gpu and gpu.name,
        "gpu_mib": gpu and round(gpu.total_mib),
        "driver": gpu and gpu.driver,
    }


def _cpu_model() -> str:
    """Its name, and the family and model that tell apart what a virtual machine calls by one name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    first = dict(reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]))
    if "model name" not in first:
        return platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {first[key]}" for key in ("cpu family", "model") if key in first]
    return f"{first['model name']} ({', '.join(numbers)})" if numbers else first["model name"]
