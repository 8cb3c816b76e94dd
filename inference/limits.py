"""What this process may use of the machine: cores and memory, the limits of its container among them.

Linux tells a container's limits in control groups, version 1 or 2; the machine's own figures know nothing of them.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

BASE_MIB = 350  # interpreter, libraries, both networks of the weights `small`, without torch
LEAST_MIB = 200  # for the networks' intermediate results: one slice, the smallest patch
NETWORK_BYTES = 3  # a voxel while networks run: HU take two, thin slices put together about one at most
FUSION_BYTES = 6  # a voxel afterwards, when HU are gone: the mask, a copy of what is found, components of up to four

THREADS_SHARE = 4
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """Threads that can run at once: the cores that the process may use, or as many as its share of time fills.

    No more than a part of the threads that it may have: each network has so many, and so may numpy.
    """
    quotas = [math.ceil(quota) for quota in _core_quotas()]
    threads = [int(text) // THREADS_SHARE for text in _read_all("pids", "pids.max") if text.isdecimal()]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas, *threads]))


def memory_mib() -> int:
    """Memory that the process may use in all: the machine's, or a lower limit of its control groups."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [int(text) for text in _read_all("memory", "memory.max", "memory.limit_in_bytes") if text.isdecimal()]
    return min([machine, *limits]) // 2**20


def room_mib(path: Path, shape: tuple[int, ...], beside_mib: int = 0) -> int:
    """Memory left beside a scan for the networks' intermediate results. ValueError where that is too little.

    beside_mib: for the networks' probabilities.
    """
    there, voxels = memory_mib(), math.prod(shape)
    base = BASE_MIB + beside_mib
    beside_networks = base + _mib(NETWORK_BYTES * voxels)
    needed = max(base + _mib(FUSION_BYTES * voxels), beside_networks + LEAST_MIB)
    if there < needed:
        size = "×".join(map(str, reversed(shape)))
        raise ValueError(
            f"{path}: its {size} voxels need {needed} MiB of memory, {there} are there: "
            "give the container more, or crop the scan"
        )
    return there - beside_networks


def _mib(count_bytes: int) -> int:
    return math.ceil(count_bytes / 2**20)


def give_back() -> None:
    """Hand freed memory back to the system: glibc keeps it otherwise, in pieces that later scans may not fit."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _core_quotas() -> Iterator[float]:
    """Shares of one core's time."""
    for text in _read_all("cpu", "cpu.max"):  # "200000 100000", or "max 100000"
        yield from _quota(*text.split(" ")[:2])
    for quota, period in zip(_read_all("cpu", "cpu.cfs_quota_us"), _read_all("cpu", "cpu.cfs_period_us"), strict=False):
        yield from _quota(quota, period)  # -1: no limit


def _quota(quota: str, period: str = "") -> Iterator[float]:
    """Their ratio; nothing where they are no numbers, as where there is no limit."""
    if quota.isdecimal() and period.isdecimal() and int(period):
        yield int(quota) / int(period)


def _read_all(controller: str, *names: str) -> list[str]:
    """What the files of these names say, of the process's own control group of a controller and of all above it."""
    said = []
    for folder in _groups(controller):
        for name in names:
            with suppress(OSError, ValueError):  # most are not there
                said.append((folder / name).read_text(errors="replace").strip())
    return said


def _groups(controller: str) -> Iterator[Path]:
    try:
        lines = os.fsdecode(OWN_GROUPS.read_bytes()).splitlines()
    except OSError:
        return
    for line in lines:
        _, _, told = line.partition(":")
        controllers, _, own = told.partition(":")
        if not own.startswith("/") or (controllers and controller not in controllers.split(",")):
            continue
        root = CGROUPS / controller if controllers else CGROUPS  # version 2 names none
        # a container often sees its own group as the root, while the path is that of the host
        for group in (Path(own), *Path(own).parents):
            yield root / group.relative_to("/")
