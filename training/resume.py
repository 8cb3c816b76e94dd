"""What is told where a run goes on with other settings than it had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.loop import Common

# neither what is learnt nor what is kept follows from these, or, of `data` and `validation`, other ones are refused
INDIFFERENT = ("data", "out", "cache", "validation", "workers", "jobs", "device", "g_per_kwh")
NOT_RECORDED = {"slice_mm": "0.0"}  # what runs that told the plane of their slices had before they told this
FIRST_STEP = ("weights", "sam_checkpoint")  # a run sets out from these, and never looks at them again


def recorded(settings: Common) -> dict[str, str]:
    """The settings that make a run what it is, by name, as its checkpoint keeps them."""
    return {name: str(value) for name, value in asdict(settings).items() if name not in INDIFFERENT}


def tell_changes(checkpoint: Path, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A sentence on settings that are followed from now on, and one on those that come too late."""
    changed = differing(before, now)
    sentences = (
        ([name for name in changed if name not in FIRST_STEP], "the run goes on with what is given now"),
        ([name for name in changed if name in FIRST_STEP], "the run goes on from what it has learnt, without that"),
    )
    return [f"{checkpoint}: {list_changes(names, before, now)}: {used}" for names, used in sentences if names]


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the settings that are others than they were, as far as that is known."""
    return [name for name in now if _value(name, before, now[name]) != now[name]]


def list_changes(names: list[str], before: Mapping[str, str], now: Mapping[str, str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')} was {_value(name, before, '')} and is {now[name]}" for name in names)


def _value(name: str, before: Mapping[str, str], unknown: str) -> str:
    return before.get(name, NOT_RECORDED.get(name, unknown) if "plane" in before else unknown)
