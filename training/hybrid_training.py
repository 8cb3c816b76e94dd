"""Train the hybrid network on a FLARE folder within a budget of minutes or steps.

    python -m training hybrid --data FLARE_FOLDER --out RUN_DIR --minutes 60

Source: SAMCancer Table 2: He initialisation, Adam 5e-4, batch 16 windows, Dice + cross-entropy; ours: stacks, so that
each slice is encoded once; averaged weights; positive prompts for some slices without a lesion.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from inference.hybrid.config import IMAGE_SIZE, PRESETS, HybridConfig, Norm
from inference.hybrid.model import Hybrid, channels_last
from inference.hybrid.torch_engine import run_stack
from inference.slices import SLICE_MM, Plane, Resize
from inference.volume import SPACING_MM
from training.data import split
from training.hybrid_data import Look, SliceCase, Stacks, StackSampler, known_absent, slice_cases
from training.loop import Common, Run, Task, load_weights, save_weights, train
from training.losses import CLASSIFIER_WEIGHT, annealed_weight, dice, hybrid_loss, mask_loss
from training.organs import OrganHeads
from training.sam_checkpoint import load_sam, read_sam
from training.settings import refuse_beyond, refuse_less
from training.sources import scores_by_source
from training.unet import CONFIG

VALIDATION_STACK = 16  # slices
NEVER_ABSENT = (
    "no slice is known to hold no lesion: the classifier will find one in every slice and the gate withhold nothing: "
    "add healthy or completely annotated scans, or give --no-gate"
)
CROP_STEP = 16  # pixels, which the CNN halves four times


@dataclass(frozen=True)
class Settings(Common):
    preset: Literal["paper", "base", "small"] = "small"
    slices: Literal[1, 5] = 5  # of a window; this and the next five are for ablations
    exchanges: bool = True  # between the branches
    gate: bool = True  # whether the classifier withholds positive prompts
    vit: bool = True  # whether the ViT is heard
    cnn: bool = True  # whether the CNN is heard
    norm: Norm | None = None  # of the CNN, instead of the preset's
    plane: Plane = "axial"
    resize: Resize = "square"
    slice_mm: float = SLICE_MM  # thinner slices are put together to about that, in training as in use; 0: none are
    stacks: int = 4  # a batch is stacks × targets windows
    targets: int = 4
    crop_share: float = 0.0  # of the budget, at first: the CNN alone on crops around lesions, many times as fast
    crop: int = 96  # pixels a side of those
    crop_stacks: int = 6
    classifier_weight: float = CLASSIFIER_WEIGHT  # of its cross-entropy; the paper's suits the paper's 80 epochs
    sam_checkpoint: Path | None = None  # official sam_vit_b weights to start from, for `base` and `paper`
    weights: Path | None = None  # hybrid.safetensors of another run to start from

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.stacks, self.targets, self.crop_stacks) < 1:
            raise ValueError("--stacks, --targets and --crop-stacks must be 1 or more")
        refuse_beyond(self, ("crop_share",))
        refuse_less(self, {"classifier_weight": 0, "slice_mm": 0})
        if self.slice_mm > SPACING_MM[1]:
            raise ValueError(f"--slice-mm {self.slice_mm}: give {SPACING_MM[1]} or less")
        if self.crop % CROP_STEP or not CROP_STEP <= self.crop <= IMAGE_SIZE:
            raise ValueError(f"--crop {self.crop}: give a multiple of {CROP_STEP} up to {IMAGE_SIZE}")

    @property
    def look(self) -> Look:
        return self.plane, self.resize, self.slice_mm

    @property
    def config(self) -> HybridConfig:
        preset = PRESETS[self.preset]
        return replace(
            preset,
            norm=self.norm or preset.norm,
            **{name: getattr(self, name) for name in ("slices", "exchanges", "gate", "vit", "cnn")},
        )


class HybridTask(Task):
    """Gated by the true class, but for a share of the slices without a lesion."""

    network: Hybrid

    def __init__(self, network: Hybrid, classifier_weight: float, lesion_weight: float) -> None:
        heads = OrganHeads([2 * network.config.cnn_width, network.config.prompt_dim])
        last_activation = list(network.cnn.ups[-2].modules())[-1]  # which sees planes as images
        heads.watch([last_activation, network.vit.neck])
        super().__init__(network, heads, (1, network.config.slices, IMAGE_SIZE, IMAGE_SIZE))  # one window
        self.classifier_weight, self.lesion_weight = classifier_weight, lesion_weight

    def forward(self, stacks: Stacks, share: float) -> Tensor:
        """Loss of whole slices, or of the CNN alone where they are crops."""
        image, label, organs, known, shown, source = stacks
        lesions = annealed_weight(share, self.lesion_weight)
        if image.shape[-1] < IMAGE_SIZE:
            return mask_loss(self.network.cnn_alone(image), label, lesions, source) + self.heads.loss(organs)
        output = self.network(image, shown)
        present = label.flatten(2).any(dim=2)
        weights = (self.classifier_weight, lesions)
        loss = hybrid_loss(output.logits, output.presence, label, present, known, *weights, source)
        return loss + self.heads.loss(organs)


def start(settings: Settings) -> Run:
    torch.manual_seed(settings.seed)
    network = channels_last(Hybrid(settings.config))
    if settings.sam_checkpoint:
        sam = read_sam(settings.sam_checkpoint)
        try:
            load_sam(network, sam)
        except ValueError as error:
            raise ValueError(f"{settings.sam_checkpoint}: {error}") from error
    if settings.weights:
        load_weights(network, settings.weights)
    task = HybridTask(network, settings.classifier_weight, settings.lesion_weight)
    return Run(task, torch.optim.Adam, settings)


def validate(run: Run, case: SliceCase) -> tuple[float, float]:
    """Dice of a whole scan, and the accuracy of the presence classifier over its slices whose truth is known.

    Over all where no annotator told it of any.
    """
    network = cast(Hybrid, run.average.module)
    radius, masks, presence = network.config.radius, [], []
    for first in range(0, len(case), VALIDATION_STACK):
        last = min(first + VALIDATION_STACK, len(case))
        around = np.clip(np.arange(first - radius, last + radius), 0, len(case) - 1)
        with run.fabric.autocast():
            images = torch.from_numpy(case.tissue[around]).to(run.fabric.device).float() / 255
            logits, present = run_stack(network, images)
        masks.append(logits.cpu().numpy() > 0)
        presence.append(present.cpu().numpy() > 0.5)
    correct = np.concatenate(presence) == case.label.any(axis=(1, 2))
    return dice(np.concatenate(masks), case.label), float(correct[case.known | ~case.known.any()].mean())


def main(settings: Settings) -> None:
    """Train; the best averaged weights are RUN_DIR/hybrid.safetensors."""
    if settings.crop_share and not settings.cnn:
        raise ValueError("--crop-share trains the CNN alone, which --no-cnn leaves out: give one of them")
    settings.out.mkdir(parents=True, exist_ok=True)
    entries, held_out = split(settings.data, settings.validation)
    cases = slice_cases(entries + held_out, settings.cache_folder, settings.look, settings.jobs)
    run = start(settings)
    if settings.gate and run.fabric.is_global_zero and not any(map(known_absent, cases[: len(entries)])):
        print(NEVER_ABSENT, file=sys.stderr)
    radius, shares = settings.config.radius, settings.shares
    sampler = StackSampler(cases[: len(entries)], settings.targets, radius, settings.seed, shares)

    def batch(step: int) -> Stacks:
        if run.budget.share(step) < settings.crop_share:
            return sampler.batch(step, run.members(settings.crop_stacks), settings.crop)
        return sampler.batch(step, run.members(settings.stacks))

    def scores() -> dict[str, float]:
        return scores_by_source(run, cases[len(entries) :], ("dice", "presence"), lambda case: validate(run, case))

    look = {"plane": settings.plane, "resize": settings.resize, "slice_mm": str(settings.slice_mm)}
    metadata = {CONFIG: json.dumps(settings.config.to_dict()), **look}

    def keep() -> None:
        save_weights(run.average.module, settings.out / "hybrid.safetensors", metadata)

    train(run, batch, scores, keep)
