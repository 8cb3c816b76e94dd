"""Published results of earlier FLARE entries, to be shown beside a run. Different sets are not interchangeable."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedAccuracy:
    """Scores as published, in percent, over the cases of `cases`; empty where nothing was published."""

    system: str
    cases: str
    dsc: str
    nsd: str
    healthy: str = ""


@dataclass(frozen=True)
class PublishedEfficiency:
    """Means a case as published: seconds, MiB, MiB·s; empty where nothing was published."""

    system: str
    time_s: str
    memory_mib: str
    area_mib_s: str
    note: str = ""


ACCURACY = (
    PublishedAccuracy("SAMCancer (FLARE 2024)", "public validation", "27.19 ± 21.20", "15.07 ± 15.79", "0.04 ± 0.05"),
    PublishedAccuracy("SAMCancer (FLARE 2024)", "online validation", "29.92", "21.92"),
    PublishedAccuracy("SAMCancer (FLARE 2024)", "test", "25.21", "15.72"),
    PublishedAccuracy("SAMCancer, one slice instead of five", "public validation", "26.72", "14.25"),
    PublishedAccuracy("SAMCancer, one slice instead of five", "online validation", "27.96", "18.91"),
    PublishedAccuracy("FLARE 2024 winner", "public validation", "25.3", "24.4"),
    PublishedAccuracy("FLARE 2023 winner", "test", "64.9", "54.3 (runner-up's)"),
    PublishedAccuracy("FLARE 2025 best", "public validation, 50 cases", "53.5", "43.8"),
    PublishedAccuracy("FLARE 2026 best", "hidden validation", "81.2", "76.4"),
    PublishedAccuracy("FLARE 2026 efficiency award", "public validation, 50 cases", "49.2", ""),
)
EFFICIENCY = (
    PublishedEfficiency("SAMCancer (FLARE 2024)", "18.05", "3563", "38960"),
    PublishedEfficiency("FLARE 2024 winner", "2.6", "1779", "", "measured on an L40S, container of 2025"),
    PublishedEfficiency("FLARE 2023 winner", "11.9", "below 2 GB", "", "time of a profiled entry"),
    PublishedEfficiency("FLARE 2026 efficiency award", "4.1", "1403", "", "measured on an L40S"),
)
