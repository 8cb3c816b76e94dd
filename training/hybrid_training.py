"""Train the hybrid network on a FLARE folder within a budget of minutes.

    python -m training.hybrid_training --data FLARE_FOLDER --out RUN_DIR --minutes 60

Source: SAMCancer Table 2: Adam 5e-4, batch 16 windows, Dice + cross-entropy; ours: stacks, so that each slice is
encoded once; a cosine over the budget; averaged weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from inference.hybrid.config import PRESETS
from inference.hybrid.model import Hybrid, channels_last
from inference.slices import Plane, Resize
from training.hybrid_data import SliceCase, Stacks, StackSampler, prepare
from training.loop import Common, Run, train
from training.losses import CLASSIFIER_WEIGHT, hybrid_loss, mask_loss
from training.organs import OrganHeads

VALIDATION_STACK = 16  # slices


@dataclass(frozen=True)
class Settings(Common):
    preset: str = "small"
    plane: Plane = "axial"
    resize: Resize = "square"
    stacks: int = 4  # a batch is stacks × targets windows
    targets: int = 4
    crop_share: float = 0.0  # of the budget, at first: the CNN alone on crops around lesions, many times as fast
    crop: int = 96  # pixels a side of those
    crop_stacks: int = 6
    classifier_weight: float = CLASSIFIER_WEIGHT  # of its cross-entropy; the paper's suits the paper's 80 epochs


def start(settings: Settings) -> Run:
    torch.manual_seed(settings.seed)
    model = channels_last(Hybrid(PRESETS[settings.preset])).to(settings.device)
    widths = [2 * PRESETS[settings.preset].cnn_width, PRESETS[settings.preset].prompt_dim]
    run = Run(model, OrganHeads(widths), torch.optim.Adam, settings)
    run.heads.watch([model.cnn.ups[-2], model.vit.neck])
    return run


def train_step(run: Run, stacks: Stacks) -> float:
    """One step on stacks of whole slices; gated by the true class."""
    image, label, organs = (tensor.to(run.device) for tensor in stacks)
    present = label.flatten(2).any(dim=2)
    with torch.autocast(run.device.type, torch.bfloat16):
        output = run.model(image, present)
        organ_loss = run.heads.loss(organs)
    weight = cast(Settings, run.settings).classifier_weight
    return run.update(hybrid_loss(output.logits, output.presence, label, present, weight) + organ_loss)


def crop_step(run: Run, stacks: Stacks) -> float:
    """One step of the CNN alone on crops."""
    image, label, organs = (tensor.to(run.device) for tensor in stacks)
    with torch.autocast(run.device.type, torch.bfloat16):
        logits = cast(Hybrid, run.model).cnn_alone(image)
        organ_loss = run.heads.loss(organs)
    return run.update(mask_loss(logits, label) + organ_loss)


def validate(run: Run, case: SliceCase, radius: int) -> tuple[float, float]:
    """Dice of a case's slices around its largest lesion slice, and the accuracy of the presence classifier there."""
    area = case.label.sum(axis=(1, 2), dtype=np.int64)
    first = int(np.clip(area.argmax() - VALIDATION_STACK // 2, 0, max(len(area) - VALIDATION_STACK, 0)))
    around = np.clip(np.arange(first - radius, first + VALIDATION_STACK + radius), 0, len(area) - 1)
    with torch.autocast(run.device.type, torch.bfloat16):
        output = run.average((torch.from_numpy(case.image[around]).float() / 255)[None].to(run.device))
    label = torch.from_numpy(case.label[around[radius : radius + VALIDATION_STACK]]).bool()
    mask = output.logits[0].cpu() > 0
    total = int(mask.sum() + label.sum())
    correct = output.presence[0].cpu().float().argmax(dim=1) == label.flatten(1).any(dim=1)
    return (2 * int((mask & label).sum()) / total if total else 1.0), float(correct.float().mean())


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    cases = prepare(settings.data, settings.out / "cache", settings.plane, settings.resize)
    run = start(settings)
    radius = PRESETS[settings.preset].radius
    sampler = StackSampler(cases[: -settings.validation], settings.targets, radius, settings.seed + run.step)

    def scores() -> dict[str, float]:
        pairs = np.array([validate(run, case, radius) for case in cases[-settings.validation :]])
        return dict(zip(("dice", "presence"), pairs.mean(axis=0).tolist(), strict=True))

    def step() -> float:
        if run.budget.share < settings.crop_share:
            return crop_step(run, sampler.batch(settings.crop_stacks, settings.crop))
        return train_step(run, sampler.batch(settings.stacks))

    def keep() -> None:
        state = {name: value.contiguous() for name, value in run.average.module.state_dict().items()}
        save_file(state, settings.out / "hybrid.safetensors")

    train(run, step, scores, keep)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
