"""Train the 3-D UNet on a FLARE folder within a budget of minutes, and export it to ONNX.

    python -m training.unet_training --data FLARE_FOLDER --out RUN_DIR --minutes 40
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from monai.networks.nets import DynUNet
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from inference.unet import UNetConfig, channels
from training.loop import Budget, averaged, load_checkpoint, log_line, save_checkpoint, set_learning_rate
from training.losses import soft_dice_loss
from training.unet import build_unet, export_onnx
from training.unet_data import GridCase, PatchSampler, cut, prepare

SUPERVISION = (1.0, 0.5, 0.25)  # weights of the finest level and the two below


@dataclass(frozen=True)
class Settings:
    """Of one run; a run is resumed by calling it again with the same `out`."""

    data: Path  # FLARE folder: imagesTr, labelsTr
    out: Path  # run folder: cache, checkpoint, log, unet.onnx
    minutes: float = 40.0  # wall-clock budget, over which the learning rate falls to zero
    features: int = 16
    patch: tuple[int, int, int] = (64, 96, 96)
    batch: int = 2
    learning_rate: float = 2e-3
    decay: float = 0.99  # of the averaged weights
    validation: int = 12  # cases kept out, the last ones by name
    every_minutes: float = 8.0  # between validations
    device: str = "cpu"
    seed: int = 0


@dataclass
class Run:
    """State that a checkpoint holds."""

    model: DynUNet
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    budget: Budget
    step: int = 0

    def save(self, path: Path) -> None:
        save_checkpoint(
            path,
            model=self.model.state_dict(),
            average=self.average.state_dict(),
            optimizer=self.optimizer.state_dict(),
            spent_s=self.budget.seconds,
            step=self.step,
        )

    def load(self, path: Path) -> None:
        state = load_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.budget.spent_s, self.step = state["spent_s"], state["step"]


def start(settings: Settings) -> Run:
    torch.manual_seed(settings.seed)
    model = build_unet(UNetConfig(features=settings.features)).to(memory_format=torch.channels_last_3d)
    model = model.to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=1e-3)
    run = Run(model, averaged(model, settings.decay), optimizer, Budget(settings.minutes))
    if (settings.out / "checkpoint.pt").exists():
        run.load(settings.out / "checkpoint.pt")
    return run


def supervised_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Dice + cross-entropy of each supervised level. outputs: (N, levels, 1, z, y, x); target: (N, 1, z, y, x)."""
    losses = [
        soft_dice_loss(logits, target) + F.binary_cross_entropy_with_logits(logits, target)
        for logits in outputs.float().unbind(1)
    ]
    return torch.stack([w * loss for w, loss in zip(SUPERVISION, losses, strict=True)]).sum() / sum(SUPERVISION)


def train_step(run: Run, image: Tensor, label: Tensor) -> float:
    device = next(run.model.parameters()).device
    image = image.to(device, memory_format=torch.channels_last_3d)
    with torch.autocast(device.type, torch.bfloat16):
        outputs = run.model(image)
    loss = supervised_loss(outputs, label.to(device))
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 12.0)
    run.optimizer.step()
    run.average.update_parameters(run.model)
    run.step += 1
    return float(loss.detach())


@torch.no_grad()
def validate(model: torch.nn.Module, case: GridCase, config: UNetConfig, patch: tuple[int, int, int]) -> float:
    """Dice in one patch about the largest lesion, or about the centre of a healthy case."""
    centre = np.array(case.hu.shape) // 2
    if case.lesions:
        centre = max(case.lesions, key=len).mean(axis=0).astype(int)
    image = torch.from_numpy(channels(cut(case.hu, centre, patch, -1024).astype(np.float32), config))[None]
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        mask = model(image.to(device))[0, 0].cpu().numpy() > 0
    label = cut(case.label, centre, patch, 0) > 0
    total = mask.sum() + label.sum()
    return float(2 * (mask & label).sum() / total) if total else 1.0


def check(run: Run, cases: list[GridCase], settings: Settings) -> None:
    """Validate the averaged weights, log, save and export."""
    config = UNetConfig(features=settings.features)
    run.average.eval()
    dice = float(np.mean([validate(run.average, case, config, settings.patch) for case in cases]))
    difference = export_onnx(run.average.module, config, settings.out / "unet.onnx")
    minutes = round(run.budget.seconds / 60, 1)
    log_line(settings.out / "log.jsonl", step=run.step, minutes=minutes, dice=dice, onnx_difference=difference)
    tqdm.write(f"step {run.step}, {minutes} min: validation Dice {dice:.3f}")
    run.save(settings.out / "checkpoint.pt")


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    config = UNetConfig(features=settings.features)
    cases = prepare(settings.data, settings.out / "cache", config)
    training, held_out = cases[: -settings.validation], cases[-settings.validation :]
    run = start(settings)
    sampler = PatchSampler(training, config, settings.patch, settings.seed + run.step)
    known = {key: value for key, value in asdict(settings).items() if key not in ("data", "out")}
    log_line(settings.out / "log.jsonl", start=known, cases=len(training))
    checked = run.budget.seconds
    bar_format = "{l_bar}{bar}| {n:.1f}/{total} min {postfix}"
    with tqdm(total=round(settings.minutes), unit="min", bar_format=bar_format) as bar:
        while run.budget.share < 1:
            set_learning_rate(run.optimizer, settings.learning_rate * run.budget.learning_rate_factor)
            loss = train_step(run, *sampler.batch(settings.batch))
            bar.n = run.budget.seconds / 60
            bar.set_postfix(step=run.step, loss=f"{loss:.3f}")
            if run.budget.seconds - checked > 60 * settings.every_minutes:
                check(run, held_out, settings)
                checked = run.budget.seconds
    check(run, held_out, settings)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
