"""What both networks' training shares: a time budget that anneals the learning rate, averaged weights, checkpoints.

The budget is wall-clock time, so that a run ends annealed whatever the machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from training.convolution import planar
from training.organs import OrganHeads

WARM_UP = 0.02  # share of the budget
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
PARTS = ("model", "average", "heads", "optimizer")  # of a run, in its checkpoint


@dataclass(frozen=True)
class Common:
    """Settings of any run; a run is resumed by calling it again with the same `out`."""

    data: Path  # FLARE folder: imagesTr, labelsTr
    out: Path  # run folder: cache, checkpoint, log, weights
    minutes: float = 60.0  # wall-clock budget, over which the learning rate falls to zero
    learning_rate: float = 5e-4
    decay: float = 0.99  # of the averaged weights
    clip: float = 1.0  # of the gradient's norm
    validation: int = 12  # cases kept out, the last ones by name
    every_minutes: float = 8.0  # between validations
    device: str = "cpu"
    seed: int = 0


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


class Run:
    """A network in training: its averaged weights, which validate and ship, its optimizer and its checkpoint.

    heads: of the second task, trained along and saved, never shipped.
    """

    def __init__(
        self, model: nn.Module, heads: OrganHeads, optimizer: Callable[..., torch.optim.Optimizer], settings: Common
    ) -> None:
        self.model, self.heads, self.settings = model, heads.to(settings.device), settings
        self.parameters = [*model.parameters(), *heads.parameters()]
        self.optimizer = optimizer(self.parameters, lr=settings.learning_rate)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.decay))  # a plain copy
        if settings.device == "cpu":
            planar(model)
        self.budget = Budget(settings.minutes)
        self.step, self.best = 0, -1.0
        if (settings.out / CHECKPOINT).exists():
            self._load(settings.out / CHECKPOINT)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def update(self, loss: Tensor) -> float:
        """One optimizer step at the budget's learning rate; left out where the gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.budget.learning_rate_factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        if norm.isfinite():
            self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return float(loss.detach())

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        path = self.settings.out / CHECKPOINT
        temporary = path.with_name(f".{path.name}.tmp")
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        torch.save({**parts, "spent_s": self.budget.seconds, "step": self.step, "best": self.best}, temporary)
        temporary.replace(path)

    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.budget.spent_s, self.step, self.best = state["spent_s"], state["step"], state["best"]


def train(
    run: Run, step: Callable[[], float], validate: Callable[[], dict[str, float]], keep: Callable[[], object]
) -> None:
    """Step until the budget is spent; validate now and then, and `keep` the averaged weights of the best Dice."""
    checked = run.budget.seconds
    settings = {key: value for key, value in asdict(run.settings).items() if key not in ("data", "out")}
    log(run, start=settings)
    bar_format = "{l_bar}{bar}| {n:.1f}/{total} min {postfix}"
    with tqdm(total=round(run.settings.minutes), unit="min", bar_format=bar_format) as bar:
        while run.budget.share < 1:
            bar.set_postfix(step=run.step, loss=f"{step():.3f}")
            bar.n = run.budget.seconds / 60
            if run.budget.seconds - checked > 60 * run.settings.every_minutes or run.budget.share == 1:
                check(run, validate, keep)
                checked = run.budget.seconds


@torch.no_grad()
def check(run: Run, validate: Callable[[], dict[str, float]], keep: Callable[[], object]) -> None:
    run.average.eval()
    scores = validate()
    log(run, step=run.step, minutes=round(run.budget.seconds / 60, 1), **scores)
    tqdm.write(f"step {run.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    if scores["dice"] >= run.best:
        run.best = scores["dice"]
        keep()
    run.save()


def log(run: Run, **values: Any) -> None:
    """Append one dated JSON line."""
    line = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **values}
    with (run.settings.out / LOG).open("a") as file:
        file.write(json.dumps(line) + "\n")
