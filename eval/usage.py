"""What the samples of one case come to: the official columns, and the figures beside them. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .sampler import PERIOD_S, Sample

TIME_LIMIT_S = 45.0  # tolerated in 2024
HARD_STOP_S = 60.0  # of 2026
MEMORY_LIMIT_MIB = 4096.0  # tolerated in 2024
NOTICEABLE_MIB = 32.0  # above the idle baseline counts as use: less than a CUDA context, more than a driver's own drift

OFFICIAL_COLUMNS = (
    "Name",
    "Time",
    "MaxGPU_Mem",
    "AUC_GPU_Time",
    "MaxCPU_Utilization",
    "AUC_CPU_Time",
    "MaxRAM",
    "AUC_RAM_Time",
)


@dataclass(frozen=True)
class Usage:
    """Unrounded figures of one case; those of the GPU are None where none was read.

    `auc_*` are official, sum·0.1; `auc_gpu_trapezoid_mib_s` is the integral over the samples' own times.
    """

    max_gpu_mib: float | None
    auc_gpu_mib_s: float | None
    auc_gpu_trapezoid_mib_s: float | None
    max_cpu_percent: float
    auc_cpu: float
    max_ram_mib: float
    auc_ram_mib_s: float
    over_gpu_mib: float | None
    auc_gpu_over_mib_s: float | None
    first_gpu_s: float | None


def usage_of(samples: Sequence[Sample], idle_gpu_mib: float | None) -> Usage:
    """The figures of one case from its samples, at least one."""
    times_s = [sample.t_s for sample in samples]
    gpu_mib = [sample.gpu_mib for sample in samples if sample.gpu_mib is not None]
    cpu, ram_mib = [sample.cpu_percent for sample in samples], [sample.ram_mib for sample in samples]
    measured = idle_gpu_mib is not None and len(gpu_mib) == len(samples)
    return Usage(
        max_gpu_mib=max(gpu_mib) if measured else None,
        auc_gpu_mib_s=official_area(gpu_mib) if measured else None,
        auc_gpu_trapezoid_mib_s=area_above(times_s, gpu_mib, 0) if measured else None,
        max_cpu_percent=max(cpu),
        auc_cpu=official_area(cpu),
        max_ram_mib=max(ram_mib),
        auc_ram_mib_s=official_area(ram_mib),
        over_gpu_mib=max(0.0, max(gpu_mib) - MEMORY_LIMIT_MIB) if measured else None,
        auc_gpu_over_mib_s=area_above(times_s, gpu_mib, MEMORY_LIMIT_MIB) if measured else None,
        first_gpu_s=first_use_s(times_s, gpu_mib, idle_gpu_mib) if measured and idle_gpu_mib is not None else None,
    )


def official_area(values: Sequence[float]) -> float:
    """Sum·0.1, whatever the samples' true distance: the official script's "area"."""
    return sum(values) * PERIOD_S


def area_above(times_s: Sequence[float], values: Sequence[float], threshold: float) -> float:
    """The integral of max(0, value − threshold) over time, values taken as straight lines between the samples."""
    steps_s = np.diff(times_s)
    above = np.asarray(values, float) - threshold
    high, low = np.maximum(above[:-1], above[1:]), np.minimum(above[:-1], above[1:])
    crossing = np.where(low < 0, high**2 / np.where(high > low, 2 * (high - low), 1), (high + low) / 2)
    return float(np.sum(np.where(high > 0, crossing, 0) * steps_s))


def first_use_s(times_s: Sequence[float], gpu_mib: Sequence[float], idle_gpu_mib: float) -> float | None:
    """When the device first held NOTICEABLE_MIB more than before the start; None where it never did."""
    used = (t_s for t_s, mib in zip(times_s, gpu_mib, strict=True) if mib - idle_gpu_mib >= NOTICEABLE_MIB)
    return next(used, None)


def official_row(name: str, time_s: float, usage: Usage) -> dict[str, Any]:
    """The official table's row: two decimals or none, rounded as NumPy does; `name`: the scan's file, `_0000` kept."""
    values = (
        name,
        _rounded(time_s, 2),
        _rounded(usage.max_gpu_mib),
        _rounded(usage.auc_gpu_mib_s),
        _rounded(usage.max_cpu_percent, 2),
        _rounded(usage.auc_cpu, 2),
        _rounded(usage.max_ram_mib, 2),
        _rounded(usage.auc_ram_mib_s),
    )
    return dict(zip(OFFICIAL_COLUMNS, values, strict=True))


def _rounded(value: float | None, decimals: int = 0) -> float | int | None:
    if value is None:
        return None
    rounded = float(np.round(value, decimals))  # not Python's round: np.round(2.675, 2) is 2.68, round gives 2.67
    return rounded if decimals else int(rounded)
