"""Train one configuration of nnU-Net v2 for so many minutes, then predict imagesTs. Runs where nnU-Net is installed.

    python benchmarks/nnunet_training.py CONFIGURATION DATASET MINUTES DEVICE PRECISION OUT

nnU-Net's own trainer, data augmentation and loss. Two things differ: its polynomial learning rate falls over the time
and not over 1000 epochs, so that a short training ends annealed; and on a CPU it computes with channels last and in the
precision that it is told, which is this project's own training's.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tqdm import tqdm


def cast(device: torch.device, precision: str) -> Any:
    """precision: "bf16-mixed" or "32-true", of a CPU; on a GPU the trainer has its own float16."""
    mixed = device.type == "cpu" and precision == "bf16-mixed"
    return torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()


def train(trainer: nnUNetTrainer, minutes: float, precision: str) -> int:
    """Iterations done within the minutes, preprocessing not counted."""
    trainer.on_train_start()
    flat = len(trainer.configuration_manager.patch_size) == 2
    layout: Any = torch.channels_last if flat else torch.channels_last_3d
    trainer.network.to(memory_format=layout).train()
    began, done, share = time.monotonic(), 0, 0.0
    with tqdm(total=1.0, bar_format="{l_bar}{bar}| {n:.3f} of the budget, {elapsed} {postfix}") as bar:
        while share < 1:
            for group in trainer.optimizer.param_groups:
                group["lr"] = trainer.initial_lr * (1 - share) ** 0.9
            batch = next(trainer.dataloader_train)
            batch["data"] = batch["data"].contiguous(memory_format=layout)
            with cast(trainer.device, precision):
                loss = float(trainer.train_step(batch)["loss"])
            done += 1
            share = min(1.0, (time.monotonic() - began) / (60 * minutes))
            bar.set_postfix(iteration=done, loss=f"{loss:.3f}", refresh=False)
            bar.update(share - bar.n)
    trainer.on_train_end()
    return done


def predict(trainer: nnUNetTrainer, images: Path, masks: Path, precision: str) -> None:
    """As nnU-Net does by default: half-overlapping tiles, blended, mirrored along every axis."""
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(device=trainer.device, perform_everything_on_device=trainer.device.type == "cuda")
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    masks.mkdir(parents=True, exist_ok=True)
    with cast(trainer.device, precision):
        predictor.predict_from_files_sequential(str(images), str(masks))


def main(configuration: str, dataset: str, minutes: str, device: str, precision: str, out: str) -> None:
    plans, described = (
        json.loads((Path(nnUNet_preprocessed) / dataset / name).read_text())
        for name in ("nnUNetPlans.json", "dataset.json")
    )
    torch.manual_seed(0)
    trainer = nnUNetTrainer(plans, configuration, "all", described, device=torch.device(device))
    done = train(trainer, float(minutes), precision)
    predict(trainer, Path(nnUNet_raw) / dataset / "imagesTs", Path(out) / "masks", precision)
    told = {
        "minutes": float(minutes),
        "precision": precision if device == "cpu" else "nnU-Net's own",
        "iterations": done,
        "epochs": round(done / trainer.num_iterations_per_epoch, 2),  # of nnU-Net's 250 iterations
        "batch": trainer.batch_size,
        "patch": list(trainer.configuration_manager.patch_size),
        "parameters": sum(part.numel() for part in trainer.network.parameters()),
    }
    (Path(out) / "training.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
