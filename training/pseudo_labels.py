"""Complete partial labels: each fold's lesions are sought by a network that was trained on the other folds.

    python -m training pseudo-labels --data FLARE_FOLDER --out WORK --minutes 60

Called again with the same `out`, it goes on where it stopped. Source: SAMCancer (five folds, then training on the
completed labels); the rules of what is added are ours.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import cc3d
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.ndimage import binary_dilation
from tqdm import tqdm

from inference.atomic import write_whole
from inference.hybrid.model import Hybrid, channels_last
from inference.hybrid.predict import predict_slices
from inference.hybrid.torch_engine import TorchHybrid
from inference.pipeline import slice_source
from inference.slices import SliceGrid
from inference.volume import read_volume, write_label
from training import hybrid_training
from training.data import PSEUDO, Entry, link, read_folder, read_lesions

TOUCH = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Settings(hybrid_training.Settings):
    """Of the fold's trainings, whose budget `minutes` or `steps` is each fold's; OUT/completed is the new folder."""

    folds: int = 5
    voxel: float = 0.5  # probability of a candidate's voxels
    confidence: float = 0.9  # mean probability that a candidate needs
    min_volume_ml: float = 0.1  # that it needs, too

    def of_fold(self, fold: int) -> hybrid_training.Settings:
        own = {field.name: getattr(self, field.name) for field in fields(hybrid_training.Settings)}
        folder = self.out / f"fold_{fold}"
        return replace(hybrid_training.Settings(**own), data=(folder / "data",), out=folder, cache=self.cache_folder)


def fold_of(entries: list[Entry], folds: int, seed: int) -> dict[str, int]:
    """Fold of each case: patients are drawn by the seed, and those of all folds are as many, but for one."""
    patients = sorted({entry.patient or entry.name for entry in entries})
    order = np.random.default_rng(seed).permutation(len(patients))
    fold = {patients[index]: place % folds for place, index in enumerate(order)}
    return {entry.name: fold[entry.patient or entry.name] for entry in entries}


def complete(
    label: NDArray[np.uint8], probability: NDArray[np.floating], voxel_ml: float, settings: Settings
) -> NDArray[np.uint8]:
    """The label with confident lesions added as `PSEUDO`; nothing given is ever removed. Arrays are (z, y, x).

    A lesion is added where it touches no given one, is large enough, and its mean probability is high.
    """
    parts, count = cc3d.connected_components(probability >= settings.voxel, connectivity=26, return_N=True)
    size = np.bincount(parts.ravel(), minlength=count + 1)
    mean = np.bincount(parts.ravel(), probability.ravel().astype(float), count + 1) / np.maximum(size, 1)
    add = (mean >= settings.confidence) & (size * voxel_ml >= settings.min_volume_ml)
    add[np.unique(parts[binary_dilation(label > 0, TOUCH)])] = False
    add[0] = False
    completed = label.copy()
    completed[add[parts]] = PSEUDO
    return completed


def write_completed(network: Hybrid, entry: Entry, settings: Settings, path: Path) -> None:
    """Write the completed label of a scan, on its own grid."""
    volume = read_volume(entry.scan)
    label = np.zeros(volume.hu.shape, np.uint8)
    if entry.label:
        label = (read_lesions(entry.label, volume.geometry) > 0).astype(np.uint8)
    grid = SliceGrid(volume.body.shape, volume.spacing_mm, settings.plane, settings.resize)
    predictions = predict_slices(TorchHybrid(network), grid, volume.body)
    source = slice_source(predictions, grid, np.eye(len(grid), dtype=np.float32))
    probability = np.stack([source(z).astype(np.float16) for z in range(len(volume.body))])
    label[volume.box] = complete(label[volume.box], probability, volume.geometry.voxel_ml, settings)
    write_label(label, volume.geometry, path)


def is_older(completed: Path, entry: Entry) -> bool:
    """Whether a completed label is still to be made: it is not there, or what was given has been changed since."""
    if not completed.exists():
        return True
    return entry.label is not None and entry.label.stat().st_mtime > completed.stat().st_mtime


def train_fold(entries: list[Entry], settings: hybrid_training.Settings) -> Hybrid:
    """The network of one fold, trained on these cases unless it was before."""
    (folder,) = settings.data
    link(entries, folder)
    hybrid_training.main(settings)
    network = Hybrid(settings.config)
    network.load_state_dict(load_file(settings.out / "hybrid.safetensors"))
    return channels_last(network).eval()


def main(settings: Settings) -> None:
    """Complete partial labels by what networks of the other folds find; the result is OUT/completed."""
    if len(settings.data) != 1:
        raise ValueError("--data: pseudo labels are of one FLARE folder: call it once for each")
    if "WORLD_SIZE" in os.environ:
        raise ValueError("pseudo-labels trains in one process: call it without torchrun")
    if settings.folds < 2:
        raise ValueError(f"--folds {settings.folds}: two folds are the fewest")
    if settings.out.resolve() in (own := settings.data[0].resolve(), *own.parents):
        raise ValueError(
            f"--data {settings.data[0]} lies in --out {settings.out}, which is written anew: name another --out"
        )
    entries = read_folder(settings.data[0])
    if any(entry.pseudo for entry in entries):
        raise ValueError(f"--data {settings.data[0]}: is completed already: name the folder that it was made of")
    folds = fold_of(entries, settings.folds, settings.seed)
    added = settings.out / "labels"
    added.mkdir(parents=True, exist_ok=True)
    drawn, told = settings.out / "folds.json", {"folds": settings.folds, "seed": settings.seed}
    if drawn.exists() and json.loads(drawn.read_text()) != told:
        raise ValueError(f"{settings.out}: was begun with other --folds or another --seed: name another --out")
    write_whole(drawn, json.dumps(told).encode())
    for fold in range(settings.folds):
        held_out = [e for e in entries if folds[e.name] == fold and not e.complete]
        missing = [entry for entry in held_out if is_older(added / f"{entry.name}.nii.gz", entry)]
        if not missing:
            continue
        others = [entry for entry in entries if folds[entry.name] != fold and entry.teaches]
        network = train_fold(others, settings.of_fold(fold))
        for entry in tqdm(missing, desc=f"fold {fold}", unit="case"):
            write_completed(network, entry, settings, added / f"{entry.name}.nii.gz")
    completed = [
        entry
        if entry.complete
        else replace(entry, label=added / f"{entry.name}.nii.gz", annotated="partial", pseudo=True)
        for entry in entries
    ]
    link(completed, settings.out / "completed")
