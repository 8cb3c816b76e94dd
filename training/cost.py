"""What a training costs: the network's size, and a run's energy and CO₂ equivalent. Source: SAMCancer, Table 2."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

MEASURE_S = 15  # between two readings of the power


@torch.no_grad()
def size(network: nn.Module, example: Tensor) -> dict[str, float]:
    """Millions of parameters, and 10⁹ multiply-adds on `example`, of a network whose parameters need no gradient."""
    was_training = network.training
    with FlopCounterMode(display=False) as counter:
        network.eval()(example)
    network.train(was_training)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters_m": round(parameters / 1e6, 2), "gmac": round(counter.get_total_flops() / 2e9, 2)}


@contextmanager
def metered(g_per_kwh: float) -> Iterator[dict[str, float]]:
    """A dict that at the end holds the machine's energy (kWh) and CO₂ equivalent (kg) meanwhile, by codecarbon.

    Of a CPU whose counters cannot be read codecarbon estimates the power from its model and its load.
    """
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    from codecarbon import OfflineEmissionsTracker  # half a second, and only a training needs it

    tracker = OfflineEmissionsTracker(
        country_iso_code="DEU",  # must be a country, whose intensity is not used
        force_carbon_intensity_g_co2e_kwh=g_per_kwh,
        measure_power_secs=MEASURE_S,
        save_to_file=False,
        log_level="error",
        allow_multiple_runs=True,
    )
    spent: dict[str, float] = {}
    tracker.start()
    try:
        yield spent
    finally:
        kg = tracker.stop()
        spent["kwh"] = round(tracker.final_emissions_data.energy_consumed, 5)
        spent["co2eq_kg"] = round(kg or 0.0, 5)
