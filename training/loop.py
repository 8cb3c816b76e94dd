"""What both networks' training shares: a time budget that anneals the learning rate, averaged weights, checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

WARM_UP = 0.02  # share of the budget


@dataclass
class Budget:
    """Wall-clock minutes of a run; `spent_s` is carried over restarts."""

    minutes: float
    spent_s: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.spent_s + time.monotonic() - self._started

    @property
    def share(self) -> float:
        """0 at the start, 1 at the end."""
        return min(self.seconds / (60 * self.minutes), 1.0)

    @property
    def learning_rate_factor(self) -> float:
        """Linear warm-up, then half a cosine to zero at the end of the budget, however many steps fit in it."""
        return min(self.share / WARM_UP, 0.5 * (1 + math.cos(math.pi * self.share)))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, which validates and ships."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_checkpoint(path: Path, **parts: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(parts, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def log_line(path: Path, **values: Any) -> None:
    """Append one dated JSON line."""
    line = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **values}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
