"""Which device to use, and what is raised where it fails."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

Engine = Literal["onnx", "torch"]
"""What the hybrid network can run in; the first is the default."""


class DeviceError(Exception):
    """A device cannot do what was asked of it, most often for want of memory: ask for less, or the CPU."""


def first_line(error: BaseException) -> str:
    """What an error says, without the trace that some libraries put behind it."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@cache
def cuda_devices() -> int:
    """How many GPUs this process may use. The driver itself is asked: no framework is imported, no GPU is touched."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def choose_device(wanted: str) -> str:
    """ "auto", "cpu", "cuda" or "cuda:N" → "cpu" or "cuda:N". ValueError where there is no such device."""
    if wanted == "cpu" or (wanted == "auto" and not cuda_devices()):
        return "cpu"
    kind, _, index = wanted.replace("auto", "cuda").partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise ValueError(f"--device {wanted}: unknown: use auto, cpu, cuda or cuda:N")
    if int(index or 0) >= cuda_devices():
        raise ValueError(f"--device {wanted}: {cuda_devices()} GPUs are visible here: use auto or cpu")
    return f"cuda:{int(index or 0)}"
