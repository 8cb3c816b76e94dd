"""What both networks' training shares: processes, a budget that anneals the learning rate, averages, checkpoints.

The budget is wall-clock time, so that a run ends annealed whatever the machine, or a number of steps, so that it is the
same run on any machine. `torchrun --nproc-per-node N -m training …` trains with N processes, each on its share of the
batch.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from lightning_fabric.strategies import DDPStrategy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from inference.atomic import write_whole
from training.convolution import planar
from training.cost import metered, size
from training.data import split
from training.losses import LESION_WEIGHT, total
from training.organs import OrganHeads
from training.resume import recorded, tell_changes
from training.settings import refuse_beyond, refuse_less
from training.sources import refuse_shares

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WARM_UP = 0.02  # share of the budget
STEP_DECAYS = 4  # of the `step` schedule, each by half
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
PARTS = ("task", "average", "optimizer")  # of a run, in its checkpoint
T = TypeVar("T")


@dataclass(frozen=True)
class Common:
    """Settings of any run; a run is resumed by calling it again with the same `out`."""

    data: tuple[Path, ...]  # FLARE folders: imagesTr, labelsTr
    out: Path  # run folder: checkpoint, log, weights
    shares: tuple[float, ...] = ()  # of a batch, of each folder of `data`; by their numbers of cases where not given
    cache: Path | None = None  # of the preprocessed cases, which runs may share; in the run folder where not given
    minutes: float = 60.0  # wall-clock budget, over which the learning rate falls
    steps: int = 0  # the budget in steps instead
    schedule: Literal["cosine", "step"] = "cosine"  # to zero, or by half four times (the paper's "periodic decay")
    learning_rate: float = 5e-4
    decay: float = 0.99  # of the averaged weights
    clip: float = 1.0  # of the gradient's norm
    lesion_weight: float = LESION_WEIGHT  # at first; less where a trained network goes on, which sees lesions already
    validation: int = 12  # cases kept out, of the last patients by name
    validations: int = 7  # checks of the averaged weights, evenly over the budget; the best are kept
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16-mixed", "16-mixed", "32-true"] = "auto"  # bfloat16 where a CPU or GPU has it
    g_per_kwh: float = 445.0  # of CO₂ equivalent; the world's electricity in 2024
    frozen_norms: float = 0.0  # share of the budget, the last, in which batch norms act as they will in use
    workers: int = 2  # threads that draw the next batches
    jobs: int = 1  # processes that fill the cache
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError where a number makes no sense."""
        refuse_less(self, {"steps": 0, "validation": 1, "validations": 1, "workers": 0, "jobs": 1, "seed": 0})
        refuse_less(self, {"lesion_weight": 0, "learning_rate": 0, "clip": 0, "g_per_kwh": 0})
        refuse_beyond(self, ("frozen_norms",))
        if self.shares:
            refuse_shares(self.shares, len(set(self.data)))
        if self.minutes <= 0 or not 0 <= self.decay < 1:
            raise ValueError("--minutes must be more than 0, --decay from 0 to less than 1")

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.out / "cache"


@dataclass
class Budget:
    """Minutes or, where there are any, steps; `spent_s` and `step` are carried over restarts."""

    minutes: float
    steps: int = 0
    spent_s: float = 0.0
    step: int = 0
    _started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.spent_s + time.monotonic() - self._started

    def share(self, step: int | None = None) -> float:
        """0 at the start, 1 at the end; of the present step, or of another where steps are counted."""
        if self.steps:
            return min((self.step if step is None else step) / self.steps, 1.0)
        return min(self.seconds / (60 * self.minutes), 1.0)


def learning_rate_factor(share: float, schedule: str) -> float:
    """Linear warm-up, then half a cosine to zero, or halves, by the end of the budget."""
    after = 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "step":
        after = 0.5 ** min(int(share * (STEP_DECAYS + 1)), STEP_DECAYS)
    return min((share + 1e-9) / WARM_UP, after)


class Task(nn.Module):
    """A network, the heads of its second task, and `forward(batch, share of the budget)`, which gives the loss.

    The heads are trained along and saved, never shipped.
    """

    def __init__(self, network: nn.Module, heads: OrganHeads, example: tuple[int, ...]) -> None:
        """example: shape of an input of the network, whose multiply-adds are told at the start."""
        super().__init__()
        self.network, self.heads, self.example = network, heads, example


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once: the modules of MONAI's UNet have several names."""
    return dict(itertools.chain(network.named_parameters(), network.named_buffers()))


def save_weights(network: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a network's tensors as safetensors."""
    content = {name: tensor.detach().contiguous() for name, tensor in tensors(network).items()}
    write_file(path, safetensors(content, metadata))


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a run, whole or not at all. OSError with the mend where that cannot be."""
    try:
        write_whole(path, content)
    except OSError as error:
        mend = "make room there" if error.errno in NO_ROOM else "make that folder writable"
        raise OSError(f"{path}: cannot be written ({error.strerror}): {mend}, and call again") from error


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network with what `save_weights` wrote of one alike. ValueError where it is not."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder: name the safetensors file of a run")
    try:
        state, own = load_file(path), tensors(network)
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read ({error}): name the safetensors file of a run") from error
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in own.items()}:
        raise ValueError(f"{path}: weights of another network than the settings ask for: give those that made it")
    network.load_state_dict(state, strict=False)  # the other names of a module are filled with it


def fast_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """bfloat16 but on CPUs without instructions for it (AVX512_BF16, which those with AMX have too).

    A CPU with AVX2 alone emulates it: a 3-D convolution took 77 times as long so. Others were not measured.
    """
    emulated = accelerator == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return "32-true" if emulated else "bf16-mixed"


def make_fabric(settings: Common) -> Fabric:
    """One process, or those that torchrun started."""
    local, world = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    strategy = DDPStrategy(find_unused_parameters=True) if world > 1 else "auto"
    accelerator = settings.device
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU: take cpu")
    logger = TensorBoardLogger(settings.out, name="", version="")
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        precision=fast_precision(accelerator) if settings.precision == "auto" else settings.precision,
        loggers=logger,
    )
    fabric.launch()
    return fabric


def freeze_norms(module: nn.Module) -> None:
    """Batch norms use what they measured so far, and measure no more."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            part.eval()


class Run:
    """A task in training: its averaged network, which validates and ships, its optimizer and its checkpoint."""

    def __init__(self, task: Task, optimizer: Callable[..., torch.optim.Optimizer], settings: Common) -> None:
        self.settings, self.network, self.example = settings, task.network, task.example
        self.fabric = make_fabric(settings)
        average = AveragedModel(task.network, multi_avg_fn=get_ema_multi_avg_fn(settings.decay))  # a plain copy
        self.average = average.to(self.fabric.device).requires_grad_(False)
        if self.fabric.device.type == "cpu":
            planar(task.network)
        elif self.fabric.world_size > 1:  # batch norm of the whole batch, as in one process; not to be had on a CPU
            task = nn.SyncBatchNorm.convert_sync_batchnorm(task)
        self.task, self.optimizer = self.fabric.setup(task, optimizer(task.parameters(), lr=settings.learning_rate))
        self.budget, self.best = Budget(settings.minutes, settings.steps), -1.0
        if (settings.out / CHECKPOINT).exists():
            self._load(settings.out / CHECKPOINT)

    @property
    def step(self) -> int:
        return self.budget.step

    @cached_property
    def held_out(self) -> dict[str, int]:
        """What the best Dice is measured on: FOLDER/CASE, and the bytes of each scan: another may have its name."""
        _, kept = split(self.settings.data, self.settings.validation)
        return {f"{entry.source.name}/{entry.name}": entry.scan.stat().st_size for entry in kept}

    def share(self) -> float:
        """Of the budget, the same in all processes."""
        share = self.budget.share()
        return share if self.fabric.world_size == 1 else float(self.fabric.broadcast(share))

    def members(self, batch: int) -> range:
        """This process's members of a batch. ValueError where they cannot be shared out evenly."""
        if batch % self.fabric.world_size:
            raise ValueError(f"a batch of {batch} cannot be shared by {self.fabric.world_size} processes")
        return range(self.fabric.global_rank, batch, self.fabric.world_size)

    def own(self, cases: list[T]) -> list[T]:
        """This process's share of the cases to validate on."""
        return cases[self.fabric.global_rank :: self.fabric.world_size]

    def mean(self, rows: list[tuple[float, ...]], width: int) -> NDArray[np.float64]:
        """Mean of the rows, each `width` numbers, of all processes."""
        own = np.array(rows, float).reshape(-1, width)
        sums = total(torch.tensor([*own.sum(axis=0), len(own)], dtype=torch.float32, device=self.fabric.device))
        return (sums[:-1] / sums[-1]).cpu().numpy()

    def advance(self, batch: NamedTuple) -> float:
        """One step of the optimizer on this process's part of a batch; left out where the gradient is not finite."""
        share = self.share()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * learning_rate_factor(share, self.settings.schedule)
        self.task.train()
        if share > 1 - self.settings.frozen_norms:
            freeze_norms(self.task)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task(self.fabric.to_device(batch), share)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.task, self.optimizer, max_norm=self.settings.clip, error_if_nonfinite=False
        )
        scaled = self.settings.precision == "16-mixed"  # whose scaler leaves such a step out itself, and learns from it
        if scaled or norm is None or norm.isfinite():
            self.optimizer.step()
        self.average.update_parameters(self.network)
        self.budget.step += 1
        return float(loss.detach())

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.fabric.is_global_zero:
            content = io.BytesIO()
            parts = {name: getattr(self, name).state_dict() for name in PARTS}
            state = {
                "spent_s": self.budget.seconds,
                "step": self.step,
                "best": self.best,
                "held_out": self.held_out,
                "settings": recorded(self.settings),
            }
            torch.save({**parts, **state}, content)
            write_file(self.settings.out / CHECKPOINT, content.getvalue())
        self.fabric.barrier()

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True, map_location=self.fabric.device)
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.budget.spent_s, self.budget.step, self.best = state["spent_s"], state["step"], state["best"]
        except Exception as error:  # the bytes of a damaged pickle can lead to any
            raise ValueError(
                f"{path}: damaged, or of a run with other settings: name another --out, or remove it to start anew"
            ) from error
        before, now = state.get("held_out", self.held_out), self.held_out
        if before != now:
            others = sorted(name for name in before if before[name] != now.get(name)) or sorted(now.keys() - before)
            raise ValueError(
                f"{path}: of a run on other data: the cases that judge its weights were others "
                f"({', '.join(others[:3])}): name another --out"
            )
        if self.fabric.is_global_zero:
            for sentence in tell_changes(path, state.get("settings", {}), recorded(self.settings)):
                print(sentence, file=sys.stderr)


def ahead(make: Callable[[int], T], first: int, workers: int) -> Iterator[T]:
    """make(first), make(first + 1), …, drawn by threads while the network computes; without threads where 0."""
    if not workers:
        yield from map(make, itertools.count(first))
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(make, first + offset) for offset in range(workers))
        for step in itertools.count(first + workers):
            yield waiting.popleft().result()
            waiting.append(pool.submit(make, step))


def train(
    run: Run, batch: Callable[[int], Any], validate: Callable[[], dict[str, float]], keep: Callable[[], object]
) -> None:
    """Step until the budget is spent; validate now and then, and `keep` the averaged weights of the best Dice.

    batch: of a step; this process's members of it.
    """
    if run.share() == 1:
        if run.fabric.is_global_zero:
            print(f"{run.settings.out}: this run's budget is spent already: nothing was done")
        return
    log(
        run,
        start=asdict(run.settings),
        processes=run.fabric.world_size,
        **size(run.average.module, torch.zeros(run.example, device=run.fabric.device)),
    )
    with metered(run.settings.g_per_kwh) as spent:
        _until_spent(run, batch, validate, keep)
    log(run, **spent)


def _until_spent(
    run: Run, batch: Callable[[int], Any], validate: Callable[[], dict[str, float]], keep: Callable[[], object]
) -> None:
    every = 1 / run.settings.validations
    due = every * (1 + int(run.share() / every + 1e-9))
    bar_format = "{l_bar}{bar}| {n:.3f} of the budget, {elapsed} {postfix}"
    hidden = not run.fabric.is_global_zero
    with tqdm(total=1, bar_format=bar_format, disable=hidden, miniters=0, mininterval=1) as bar:
        for drawn in ahead(batch, run.step, run.settings.workers):
            loss = run.advance(drawn)
            share = run.share()
            run.fabric.log("loss", loss, run.step)
            bar.set_postfix(step=run.step, loss=f"{loss:.3f}", refresh=False)
            bar.update(share - bar.n)
            if share >= due - 1e-9 or share == 1:
                check(run, validate, keep)
                due = every * (1 + int(share / every + 1e-9))
            if share == 1:
                return


@torch.no_grad()
def check(run: Run, validate: Callable[[], dict[str, float]], keep: Callable[[], object]) -> None:
    run.average.eval()
    for buffer in run.average.buffers():  # of a batch norm, which on a CPU sees each process's part of a batch alone
        buffer.copy_(run.fabric.broadcast(buffer))
    scores = validate()
    rounded = {name: round(value, 4) for name, value in scores.items()}
    log(run, step=run.step, minutes=round(run.budget.seconds / 60, 1), **rounded)
    run.fabric.log_dict(scores, run.step)
    if scores["dice"] >= run.best:
        run.best = scores["dice"]
        if run.fabric.is_global_zero:
            keep()
    run.save()


def log(run: Run, **values: Any) -> None:
    """Append one dated JSON line, and say it."""
    if run.fabric.is_global_zero:
        tqdm.write(", ".join(f"{name} {value}" for name, value in values.items() if not isinstance(value, dict)))
        line = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **values}
        with (run.settings.out / LOG).open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
