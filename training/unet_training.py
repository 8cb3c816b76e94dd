"""Train the 3-D UNet on a FLARE folder within a budget of minutes or steps, and export it to ONNX.

python -m training unet --data FLARE_FOLDER --out RUN_DIR --minutes 40
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.unet import UNetConfig, blend_patches, channels
from training.data import split
from training.loop import Common, Run, Task, load_weights, save_weights, train
from training.losses import annealed_weight, dice, mask_loss
from training.organs import OrganHeads
from training.settings import refuse_beyond
from training.sources import scores_by_source
from training.unet import build_unet, export_onnx
from training.unet_data import GridCase, Patch, Patches, PatchSampler, check_sides, grid_cases

SUPERVISION = (1.0, 0.5, 0.25)  # weights of the finest level and the two below


@dataclass(frozen=True)
class Settings(Common):
    learning_rate: float = 5e-3
    clip: float = 12.0
    features: int = 16
    patch: Patch = (64, 96, 96)
    batch: int = 2
    small_share: float = 0.0  # of the budget, at first: patches of `small`, several times as many a minute
    small: Patch = (32, 64, 64)
    weights: Path | None = None  # unet.safetensors of another run to start from

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.features, self.batch) < 1:
            raise ValueError("--features and --batch must be 1 or more")
        refuse_beyond(self, ("small_share",))
        check_sides(self.patch)
        check_sides(self.small)


class UNetTask(Task):
    def __init__(self, config: UNetConfig, weights: Path | None, lesion_weight: float) -> None:
        network = build_unet(config)
        if weights:
            load_weights(network, weights)
        network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        heads = OrganHeads([4 * config.features, 2 * config.features])
        heads.watch(list(network.upsamples)[-3:-1])  # a quarter and half of the resolution
        super().__init__(network, heads, (1, len(config.windows_hu), *config.patch))
        self.lesion_weight = lesion_weight

    def forward(self, patches: Patches, share: float) -> Tensor:
        image, label, organs, source = patches
        outputs = self.network(image.contiguous(memory_format=torch.channels_last_3d))
        weight = annealed_weight(share, self.lesion_weight)
        return supervised_loss(outputs, label, weight, source) + self.heads.loss(organs)


def start(settings: Settings) -> Run:
    torch.manual_seed(settings.seed)
    optimizer = partial(torch.optim.AdamW, weight_decay=1e-3)
    task = UNetTask(UNetConfig(features=settings.features), settings.weights, settings.lesion_weight)
    return Run(task, optimizer, settings)


def supervised_loss(outputs: Tensor, target: Tensor, weight: float = 1.0, source: Tensor | None = None) -> Tensor:
    """Dice + cross-entropy of each supervised level, lesions weighted.

    outputs: (N, levels, 1, z, y, x); target: (N, 1, z, y, x); source: as `soft_dice_loss`'s.
    """
    levels = zip(SUPERVISION, outputs.unbind(1), strict=True)
    losses = [share * mask_loss(logits, target, weight, source) for share, logits in levels]
    return torch.stack(losses).sum() / sum(SUPERVISION)


def validate(run: Run, case: GridCase, config: UNetConfig) -> float:
    """Dice of a whole scan, from the inference's patches."""

    def run_patch(patch_hu: NDArray[np.float32], _: bool) -> NDArray[np.float32]:
        image = torch.from_numpy(channels(patch_hu, config))[None].to(run.fabric.device)
        with run.fabric.autocast():
            logits = run.average(image)
        return logits[0, 0].float().sigmoid().cpu().numpy()

    return dice(blend_patches(case.hu.astype(np.float32), config, run_patch) >= 0.5, case.label)


def main(settings: Settings) -> None:
    """Train; the best averaged weights are RUN_DIR/unet.onnx, which ships, and unet.safetensors, to train on from."""
    settings.out.mkdir(parents=True, exist_ok=True)
    config = UNetConfig(features=settings.features)
    entries, held_out = split(settings.data, settings.validation)
    cases = grid_cases(entries + held_out, settings.cache_folder, config, settings.jobs)
    run = start(settings)
    sampler = PatchSampler(cases[: len(entries)], config, settings.seed, settings.shares)

    def batch(step: int) -> Patches:
        patch = settings.small if run.budget.share(step) < settings.small_share else settings.patch
        return sampler.batch(step, run.members(settings.batch), patch)

    def scores() -> dict[str, float]:
        return scores_by_source(run, cases[len(entries) :], ("dice",), lambda case: (validate(run, case, config),))

    def keep() -> None:
        save_weights(run.average.module, settings.out / "unet.safetensors")
        export_onnx(run.average.module, config, settings.out / "unet.onnx")

    train(run, batch, scores, keep)
