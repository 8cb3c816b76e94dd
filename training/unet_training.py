"""Train the 3-D UNet on a FLARE folder within a budget of minutes, and export it to ONNX.

python -m training.unet_training --data FLARE_FOLDER --out RUN_DIR --minutes 40
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import tyro
from torch import Tensor

from inference.unet import AIR_HU, UNetConfig, channels
from training.loop import Common, Run, train
from training.losses import mask_loss
from training.organs import OrganHeads
from training.unet import build_unet, export_onnx
from training.unet_data import GridCase, Patches, PatchSampler, cut, prepare

SUPERVISION = (1.0, 0.5, 0.25)  # weights of the finest level and the two below


@dataclass(frozen=True)
class Settings(Common):
    learning_rate: float = 1e-2
    clip: float = 12.0
    features: int = 16
    patch: tuple[int, int, int] = (64, 96, 96)
    batch: int = 2
    small_share: float = 0.0  # of the budget, at first: patches of `small`, several times as many a minute
    small: tuple[int, int, int] = (32, 64, 64)

    def __post_init__(self) -> None:
        for patch in (self.patch, self.small):  # halved three times, and instance norm needs more than one voxel
            if min(patch) < 16 or any(side % 8 for side in patch):
                raise ValueError(f"patch sides must be multiples of 8 from 16 on, not {patch}")


def start(settings: Settings) -> Run:
    torch.manual_seed(settings.seed)
    model = build_unet(UNetConfig(features=settings.features)).to(settings.device)
    model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = partial(torch.optim.AdamW, weight_decay=1e-3)
    run = Run(model, OrganHeads([4 * settings.features, 2 * settings.features]), optimizer, settings)
    run.heads.watch(list(model.upsamples)[-3:-1])  # a quarter and half of the resolution
    return run


def supervised_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Dice + cross-entropy of each supervised level. outputs: (N, levels, 1, z, y, x); target: (N, 1, z, y, x)."""
    losses = [w * mask_loss(logits, target) for w, logits in zip(SUPERVISION, outputs.unbind(1), strict=True)]
    return torch.stack(losses).sum() / sum(SUPERVISION)


def train_step(run: Run, patches: Patches) -> float:
    image, label, organs = (tensor.to(run.device) for tensor in patches)
    image = image.contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast(run.device.type, torch.bfloat16):
        outputs = run.model(image)
        organ_loss = run.heads.loss(organs)
    return run.update(supervised_loss(outputs, label) + organ_loss)


def validate(run: Run, case: GridCase, config: UNetConfig, patch: tuple[int, int, int]) -> float:
    """Dice in one patch about the largest lesion, or about the centre of a healthy case."""
    centre = np.array(case.hu.shape) // 2
    if case.lesions:
        centre = max(case.lesions, key=len).mean(axis=0).astype(int)
    image = torch.from_numpy(channels(cut(case.hu, centre, patch, AIR_HU).astype(np.float32), config))[None]
    with torch.autocast(run.device.type, torch.bfloat16):
        mask = (run.average(image.to(run.device))[0, 0] > 0).cpu().numpy()
    label = cut(case.label, centre, patch, 0) > 0
    total = mask.sum() + label.sum()
    return float(2 * (mask & label).sum() / total) if total else 1.0


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    config = UNetConfig(features=settings.features)
    cases = prepare(settings.data, settings.out / "cache", config)
    run = start(settings)
    sampler = PatchSampler(cases[: -settings.validation], config, settings.seed + run.step)

    def step() -> float:
        patch = settings.small if run.budget.share < settings.small_share else settings.patch
        return train_step(run, sampler.batch(settings.batch, patch))

    def scores() -> dict[str, float]:
        return {
            "dice": float(np.mean([validate(run, c, config, settings.patch) for c in cases[-settings.validation :]]))
        }

    def keep() -> None:
        export_onnx(run.average.module, config, settings.out / "unet.onnx")

    train(run, step, scores, keep)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
