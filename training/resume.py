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
FIRST_STEP = ("weights", "sam_checkpoint")  # a run sets out from these, and never looks at them again


def recorded(settings: Common) -> dict[str, str]:
    """The settings that make a run what it is, by name, as its checkpoint keeps them."""
    return {name: str(value) for name, value in asdict(settings).items() if name not in INDIFFERENT}


def tell_changes(checkpoint: Path, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A sentence on settings that are followed from now on, and one on those that come too late."""
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    sentences = (
        ([name for name in changed if name not in FIRST_STEP], "the run goes on with what is given now"),
        ([name for name in changed if name in FIRST_STEP], "the run goes on from what it has learnt, without that"),
    )
    return [f"{checkpoint}: {_list(names, before, now)}: {used}" for names, used in sentences if names]


def _list(names: list[str], before: Mapping[str, str], now: Mapping[str, str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')} was {before[name]} and is {now[name]}" for name in names)
