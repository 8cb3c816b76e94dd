"""Device memory, host memory and CPU load, read every 0.1 s beside whatever runs meanwhile.

with Sampler(system_readers(find_gpu(None))) as sampler:
    work()
print(max(sample.ram_mib for sample in sampler.samples))
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

from .machine import MIB, Gpu

PERIOD_S = 0.1  # the official script sleeps so long after each query

CpuTimes = tuple[float, float, float]  # user, system, idle: seconds since boot, summed over the cores


@dataclass(frozen=True)
class Sample:
    """t_s: since the sampler's start, by the monotonic clock; gpu_mib: None where no GPU is read."""

    t_s: float
    gpu_mib: float | None
    ram_mib: float
    cpu_percent: float


@dataclass(frozen=True)
class Readers:
    """Where the figures come from; tests put recorded ones here."""

    gpu_mib: Callable[[], float] | None
    ram_mib: Callable[[], float]
    cpu_times: Callable[[], CpuTimes]
    clock_s: Callable[[], float] = time.monotonic


def system_readers(gpu: Gpu | None) -> Readers:
    """This machine, and `gpu` where there is one."""
    return Readers(gpu.used_mib if gpu else None, _ram_mib, _cpu_times)


def _ram_mib() -> float:
    return psutil.virtual_memory().used / MIB


def _cpu_times() -> CpuTimes:
    times = psutil.cpu_times()
    return times.user, times.system, times.idle


def cpu_percent(before: CpuTimes, now: CpuTimes) -> float:
    """The official load of all cores between two readings: 100 − 100·Δidle / (Δuser + Δsystem + Δidle + 0.1).

    The 0.1 s guards against a division by 0 and makes a wholly idle machine look busy by some percent.
    """
    user, system, idle = (after - earlier for earlier, after in zip(before, now, strict=True))
    return 100 - 100 * idle / (user + system + idle + 0.1)


class Sampler:
    """A context that samples from a thread while its body runs.

    `samples` grow meanwhile; there is always at least one. `idle_gpu_mib` is the device's memory before the start, and
    `cost_s` the CPU time that the sampling itself took, known afterwards. `watch` is called with the seconds since the
    start after each sample. A reader that fails ends the sampling, and its error leaves the context.
    """

    def __init__(
        self, readers: Readers, period_s: float = PERIOD_S, watch: Callable[[float], object] | None = None
    ) -> None:
        self.readers, self.period_s, self.watch = readers, period_s, watch
        self.samples: list[Sample] = []
        self.idle_gpu_mib: float | None = None
        self.cost_s = 0.0
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self.idle_gpu_mib = self.readers.gpu_mib() if self.readers.gpu_mib else None
        self._before = self.readers.cpu_times()
        self._start_s = self.readers.clock_s()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            while True:
                self._sample()
                if self._stop.wait(self.period_s):
                    break
        except Exception as error:  # handed on to the thread that opened the context
            self._error = error
        self.cost_s = time.thread_time()

    def _sample(self) -> None:
        t_s = self.readers.clock_s() - self._start_s
        gpu_mib = self.readers.gpu_mib() if self.readers.gpu_mib else None
        now = self.readers.cpu_times()
        self.samples.append(Sample(t_s, gpu_mib, self.readers.ram_mib(), cpu_percent(self._before, now)))
        self._before = now
        if self.watch is not None:
            self.watch(t_s)
