"""Sampling: the official CPU formula, recorded readings, what it costs, and machines without NVML."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import psutil
import pynvml
import pytest

from eval.machine import Gpu, describe, find_gpu, open_gpu
from eval.sampler import PERIOD_S, Readers, Sampler, cpu_percent, system_readers


def has_nvml() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


T = TypeVar("T")


def repeated(*values: T) -> Callable[[], T]:
    """A reader that gives `values` one after the other, then the last one for ever."""
    stream = chain(values, repeat(values[-1]))
    return lambda: next(stream)


def wait_for(sampler: Sampler, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(sampler.samples) < count:
        assert time.monotonic() < deadline, "the sampler stands still"
        time.sleep(0.001)


def test_cpu_formula() -> None:
    # Δuser 0.1, Δsystem 0.1, Δidle 0.1: 100 − 100·0.1 / (0.1 + 0.1 + 0.1 + 0.1) = 75
    assert cpu_percent((1.0, 2.0, 3.0), (1.1, 2.1, 3.1)) == pytest.approx(75)
    # wholly idle for 0.4 s: 100 − 100·0.4 / 0.5 = 20, though nothing ran
    assert cpu_percent((0.0, 0.0, 5.0), (0.0, 0.0, 5.4)) == pytest.approx(20)
    # no time at all: nothing over 0.1
    assert cpu_percent((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)) == 100


def test_recorded_readings() -> None:
    readers = Readers(
        gpu_mib=repeated(300.0, 310.0, 2000.0),  # the first is the idle baseline
        ram_mib=repeated(1000.0, 1500.0),
        cpu_times=repeated((0.0, 0.0, 0.0), (0.1, 0.0, 0.2), (0.3, 0.1, 0.2)),
        clock_s=repeated(50.0, 50.0, 50.25),
    )
    seen_s: list[float] = []
    with Sampler(readers, period_s=0.001, watch=seen_s.append) as sampler:
        wait_for(sampler, 3)
    assert sampler.idle_gpu_mib == 300
    first, second = sampler.samples[:2]
    assert (first.t_s, first.gpu_mib, first.ram_mib) == (0, 310, 1000)
    assert first.cpu_percent == pytest.approx(50)  # 100 − 100·0.2 / 0.4
    assert (second.t_s, second.gpu_mib, second.ram_mib) == (0.25, 2000, 1500)
    assert second.cpu_percent == pytest.approx(100)  # Δidle 0
    assert seen_s == [sample.t_s for sample in sampler.samples]


def test_a_body_shorter_than_the_period_has_a_sample() -> None:
    with Sampler(system_readers(None), period_s=60) as sampler:
        pass
    assert len(sampler.samples) == 1
    assert sampler.samples[0].gpu_mib is None
    assert sampler.idle_gpu_mib is None


def test_a_reader_that_fails_is_heard_of() -> None:
    def lost() -> float:
        raise OSError("GPU 0: is lost")

    readers = Readers(None, lost, lambda: (0.0, 0.0, 0.0))
    with pytest.raises(OSError, match="GPU 0: is lost"), Sampler(readers):
        pass


def test_the_bodys_own_error_goes_first() -> None:
    def lost() -> float:
        raise OSError("GPU 0: is lost")

    with pytest.raises(KeyError, match="body"), Sampler(Readers(None, lost, lambda: (0.0, 0.0, 0.0))):
        raise KeyError("body")


def test_this_machine_is_read_as_the_official_script_reads_it() -> None:
    with Sampler(system_readers(None)) as sampler:
        official_mib = psutil.virtual_memory().used / 1048576
        wait_for(sampler, 3)
    assert sampler.samples[0].ram_mib == pytest.approx(official_mib, rel=0.2)
    gaps_s = [b.t_s - a.t_s for a, b in zip(sampler.samples, sampler.samples[1:], strict=False)]
    assert min(gaps_s) >= PERIOD_S - 0.005  # sleeps the whole period after each query


def test_sampling_costs_at_most_two_percent_of_a_core() -> None:
    start_s = time.monotonic()
    with Sampler(system_readers(find_gpu(None))) as sampler:
        time.sleep(2)
    share = sampler.cost_s / (time.monotonic() - start_s)  # CPU time of the thread: other load does not count
    print(f"sampling took {100 * share:.2f} % of a core")
    assert 0 < share <= 0.02


def test_device_memory_is_total_minus_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=16 * 2**30, free=12 * 2**30, used=3 * 2**30)  # the driver keeps 1 GiB for itself
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: memory)
    assert Gpu(0, object(), "a GPU", "a driver", 16384).used_mib() == 4096


def test_a_gpu_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(handle: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    with pytest.raises(OSError, match="GPU 3: its memory can no longer be read"):
        Gpu(3, object(), "a GPU", "a driver", 16384).used_mib()


def test_no_such_gpu() -> None:
    with pytest.raises(ValueError, match=r"GPU 4711: NVML cannot read it .*--cpu-only"):
        open_gpu(4711)


@pytest.mark.skipif(has_nvml(), reason="this machine has NVML")
def test_without_nvml(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_gpu(None) is None
    assert len(caplog.records) == 1
    assert "its columns stay empty" in caplog.text
    with pytest.raises(ValueError, match="GPU 0: NVML cannot read it"):
        find_gpu(0)
    assert describe(None)["gpu"] is None


def test_processors_of_one_name_are_told_apart() -> None:
    family = re.search(r"^cpu family\s*:\s*(\d+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if family is None:
        pytest.skip("this processor has no family")
    assert f"(family {family[1]}, model " in describe(None)["cpu"]


@pytest.mark.skipif(not has_nvml(), reason="this machine has no NVML")
def test_with_nvml() -> None:
    gpu = find_gpu(None)
    assert gpu is not None
    assert 0 < gpu.used_mib() < gpu.total_mib
    assert describe(gpu)["gpu"] == gpu.name
