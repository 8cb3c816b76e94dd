"""When stages begin and how long they take, so that those which overlap can be told and drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """began: seconds since the epoch, by stage; seconds: how long each took."""

    began: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, if it ends well."""
        began, start = time.time(), time.perf_counter()
        yield
        self.began[name], self.seconds[name] = round(began, 3), round(time.perf_counter() - start, 3)
