"""The official arithmetic on a recorded list of samples, and the figures beside it, derived by hand."""

from __future__ import annotations

import pytest

from eval.sampler import Sample
from eval.usage import area_above, first_use_s, official_row, usage_of

# A recorded list, by hand: GPU from idle 400 up over 4096 and back, samples a little further apart than 0.1 s.
RECORDED = [
    Sample(0.0, 400.0, 8000.004, 20.0),
    Sample(0.125, 400.0, 8100.0, 50.0),
    Sample(0.25, 2000.0, 8200.0, 99.996),
    Sample(0.375, 5096.0, 8300.006, 75.0),
    Sample(0.5, 4596.0, 8000.0, 30.012),
]


def test_official_row_of_a_recorded_list() -> None:
    row = official_row("a_0000.nii.gz", 2.675, usage_of(RECORDED, 400.0))
    # GPU: 400 + 400 + 2000 + 5096 + 4596 = 12492, ·0.1 = 1249.2; CPU: 275.008·0.1 = 27.5008
    # RAM: 8000.004 + 8100 + 8200 + 8300.006 + 8000 = 40600.01, ·0.1 = 4060.001
    assert row == {
        "Name": "a_0000.nii.gz",
        "Time": 2.68,  # NumPy's rounding, as the official script's; Python's gives 2.67
        "MaxGPU_Mem": 5096,
        "AUC_GPU_Time": 1249,
        "MaxCPU_Utilization": 100.0,
        "AUC_CPU_Time": 27.5,
        "MaxRAM": 8300.01,
        "AUC_RAM_Time": 4060,
    }
    assert ",".join(row) == "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"
    assert isinstance(row["MaxGPU_Mem"], int)


def test_integers_round_half_to_even() -> None:
    samples = [Sample(0.0, 1778.5, 25.0, 0.0)]  # area 177.85 and 2.5
    row = official_row("a_0000.nii.gz", 1.0, usage_of(samples, 0.0))
    assert (row["MaxGPU_Mem"], row["AUC_GPU_Time"], row["AUC_RAM_Time"]) == (1778, 178, 2)


def test_figures_beside_the_official_ones() -> None:
    usage = usage_of(RECORDED, 400.0)
    # 0.125·(400/2 + 400 + 2000 + 5096 + 4596/2) = 0.125·9994
    assert usage.auc_gpu_trapezoid_mib_s == pytest.approx(1249.25)
    assert usage.over_gpu_mib == 1000
    # From 2000 to 5096 the line is above 4096 for 1000/3096 of 0.125 s, by 500 on average; then for 0.125 s by 750.
    assert usage.auc_gpu_over_mib_s == pytest.approx(0.125 * 1000 / 3096 * 500 + 0.125 * 750)
    assert usage.first_gpu_s == 0.25


def test_without_a_gpu_its_figures_are_none() -> None:
    usage = usage_of([Sample(0.0, None, 1.0, 1.0)], None)
    assert usage.max_gpu_mib is usage.auc_gpu_mib_s is usage.auc_gpu_trapezoid_mib_s is usage.first_gpu_s is None
    assert usage.over_gpu_mib is usage.auc_gpu_over_mib_s is None
    row = official_row("a_0000.nii.gz", 1.0, usage)
    assert (row["MaxGPU_Mem"], row["AUC_GPU_Time"], row["MaxRAM"]) == (None, None, 1.0)


@pytest.mark.parametrize(
    ("values", "threshold", "area"),
    [
        ([3, 3, 3], 0, 9),  # over 0, 1 and 3 s
        ([3, 3, 3], 3, 0),  # at the threshold, never above
        ([0, 4, 0], 2, 0.5 * 0.5 * 2 + 0.5 * 1.0 * 2),  # a tent: crossed half-way up and half-way down
        ([2, 4, 1], 1, 2.0 + 3.0),  # always above: (1 + 3)/2·1 + (3 + 0)/2·2
        ([7], 0, 0),  # one sample spans no time
    ],
)
def test_area_above(values: list[float], threshold: float, area: float) -> None:
    assert area_above([0, 1, 3][: len(values)], values, threshold) == pytest.approx(area)


def test_first_use() -> None:
    assert first_use_s([0.0, 0.1, 0.2], [300.0, 331.9, 332.0], 300.0) == 0.2  # 32 MiB above the baseline
    assert first_use_s([0.0, 0.1], [300.0, 299.0], 300.0) is None
