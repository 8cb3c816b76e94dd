"""Train the hybrid network on a FLARE folder within a budget of minutes.

    python -m training.hybrid_training --data FLARE_FOLDER --out RUN_DIR --minutes 60

Source: SAMCancer Table 2: Adam 5e-4, batch 16 windows, Dice + cross-entropy; ours: stacks, so that each slice is
encoded once; a cosine over the budget; averaged weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from inference.hybrid.config import PRESETS
from inference.hybrid.model import Hybrid, channels_last
from inference.slices import Plane, Resize
from training.hybrid_data import SliceCase, StackSampler, prepare
from training.loop import Budget, averaged, load_checkpoint, log_line, save_checkpoint, set_learning_rate
from training.losses import hybrid_loss

VALIDATION_STACK = 16


@dataclass(frozen=True)
class Settings:
    """Of one run; a run is resumed by calling it again with the same `out`."""

    data: Path  # FLARE folder: imagesTr, labelsTr
    out: Path  # run folder: cache, checkpoint, log, weights
    minutes: float = 60.0  # wall-clock budget, over which the learning rate falls to zero
    preset: str = "small"
    plane: Plane = "axial"
    resize: Resize = "square"
    stacks: int = 4  # a batch is stacks × targets windows
    targets: int = 4
    learning_rate: float = 5e-4
    decay: float = 0.99  # of the averaged weights
    validation: int = 12  # cases kept out, the last ones by name
    every_minutes: float = 8.0  # between validations
    device: str = "cpu"
    seed: int = 0


@dataclass
class Run:
    """State that a checkpoint holds."""

    model: Hybrid
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    budget: Budget
    step: int = 0
    best: float = -1.0

    def save(self, path: Path) -> None:
        save_checkpoint(
            path,
            model=self.model.state_dict(),
            average=self.average.state_dict(),
            optimizer=self.optimizer.state_dict(),
            spent_s=self.budget.seconds,
            step=self.step,
            best=self.best,
        )

    def load(self, path: Path) -> None:
        state = load_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.budget.spent_s, self.step, self.best = state["spent_s"], state["step"], state["best"]


def start(settings: Settings) -> Run:
    torch.manual_seed(settings.seed)
    model = channels_last(Hybrid(PRESETS[settings.preset])).to(settings.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    run = Run(model, averaged(model, settings.decay), optimizer, Budget(settings.minutes))
    if (settings.out / "checkpoint.pt").exists():
        run.load(settings.out / "checkpoint.pt")
    return run


def train_step(run: Run, image: Tensor, label: Tensor) -> float:
    """One step on (N, D, 256, 256) images and (N, S, 256, 256) labels; gated by the true class."""
    device = next(run.model.parameters()).device
    image, label = image.to(device), label.to(device)
    present = label.flatten(2).any(dim=2)
    with torch.autocast(device.type, torch.bfloat16):
        output = run.model(image, present)
    loss = hybrid_loss(output.logits, output.presence, label, present)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.average.update_parameters(run.model)
    run.step += 1
    return float(loss.detach())


@torch.no_grad()
def validate(model: torch.nn.Module, case: SliceCase, radius: int) -> tuple[float, float]:
    """Dice of a case's slices around its largest lesion slice, and the accuracy of the presence classifier there."""
    area = case.label.sum(axis=(1, 2), dtype=np.int64)
    first = int(np.clip(area.argmax() - VALIDATION_STACK // 2, 0, max(len(area) - VALIDATION_STACK, 0)))
    around = np.clip(np.arange(first - radius, first + VALIDATION_STACK + radius), 0, len(area) - 1)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        output = model((torch.from_numpy(case.image[around]).float() / 255)[None].to(device))
    label = torch.from_numpy(case.label[around[radius : radius + VALIDATION_STACK]]).bool()
    mask = output.logits[0].cpu() > 0
    dice = 1.0 if not (mask | label).any() else float(2 * (mask & label).sum() / (mask.sum() + label.sum()))
    present = output.presence[0].cpu().float().argmax(dim=1) == label.flatten(1).any(dim=1)
    return dice, float(present.float().mean())


def check(run: Run, cases: list[SliceCase], settings: Settings) -> None:
    """Validate the averaged weights, log, and keep them where they are the best so far."""
    run.average.eval()
    scores = np.array([validate(run.average, case, run.model.config.radius) for case in cases])
    dice, accuracy = scores.mean(axis=0)
    minutes = round(run.budget.seconds / 60, 1)
    log_line(settings.out / "log.jsonl", step=run.step, minutes=minutes, dice=float(dice), presence=float(accuracy))
    tqdm.write(f"step {run.step}, {minutes} min: validation Dice {dice:.3f}, presence accuracy {accuracy:.3f}")
    if dice >= run.best:
        run.best = float(dice)
        state = {name: value.contiguous() for name, value in run.average.module.state_dict().items()}
        save_file(state, settings.out / "hybrid.safetensors")
    run.save(settings.out / "checkpoint.pt")


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    cases = prepare(settings.data, settings.out / "cache", settings.plane, settings.resize)
    training, held_out = cases[: -settings.validation], cases[-settings.validation :]
    run = start(settings)
    sampler = StackSampler(training, settings.targets, run.model.config.radius, settings.seed + run.step)
    known = {key: value for key, value in asdict(settings).items() if key not in ("data", "out")}
    log_line(settings.out / "log.jsonl", start=known, cases=len(training))
    checked = run.budget.seconds
    with tqdm(total=round(settings.minutes), unit="min", bar_format="{l_bar}{bar}| {n:.1f}/{total} min {postfix}") as bar:
        while run.budget.share < 1:
            set_learning_rate(run.optimizer, settings.learning_rate * run.budget.learning_rate_factor)
            loss = train_step(run, *sampler.batch(settings.stacks))
            bar.n = run.budget.seconds / 60
            bar.set_postfix(step=run.step, loss=f"{loss:.3f}")
            if run.budget.seconds - checked > 60 * settings.every_minutes:
                check(run, held_out, settings)
                checked = run.budget.seconds
    check(run, held_out, settings)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
