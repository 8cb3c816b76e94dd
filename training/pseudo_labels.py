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

from inference.hybrid.model import Hybrid, channels_last
from inference.hybrid.predict import predict_slices
from inference.hybrid.torch_engine import TorchHybrid
from inference.pipeline import slice_source
from inference.slices import thick_grid, thicken, thin_matrix
from inference.volume import case_name, read_volume, write_label
from training import hybrid_training
from training.cache import place
from training.data import PSEUDO, Entry, link, read_folder, read_lesions
from training.loop import CHECKPOINT, make_fabric, write_file
from training.resume import differing, list_changes, recorded
from training.settings import refuse_beyond, refuse_less

TOUCH = np.ones((3, 3, 3), bool)
DRAW = ("folds", "seed")  # what the folds are drawn by
BUDGET = ("minutes", "steps")  # which may change until every label is there


@dataclass(frozen=True)
class Settings(hybrid_training.Settings):
    """Of the fold's trainings, whose budget `minutes` or `steps` is each fold's; OUT/completed is the new folder."""

    folds: int = 5
    voxel: float = 0.5  # probability of a candidate's voxels
    confidence: float = 0.9  # mean probability that a candidate needs
    min_volume_ml: float = 0.1  # that it needs, too

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_beyond(self, ("voxel", "confidence"))
        refuse_less(self, {"min_volume_ml": 0})

    @property
    def labels(self) -> Path:
        """Folder of the labels that were completed, and of what each was made of."""
        return self.out / "labels"

    def label_of(self, entry: Entry) -> Path:
        return self.labels / f"{entry.name}.nii.gz"

    def source_of(self, entry: Entry) -> Path:
        return self.labels / f"{entry.name}.source"

    @property
    def decisive(self) -> dict[str, str]:
        """The settings that decide the labels, by name."""
        told = recorded(self) | {"validation": str(self.validation)}
        if self.steps:
            del told["minutes"]  # which are not looked at
        return told

    def of_fold(self, fold: int) -> hybrid_training.Settings:
        own = {field.name: getattr(self, field.name) for field in fields(hybrid_training.Settings)}
        folder = self.out / f"fold_{fold}"
        return replace(hybrid_training.Settings(**own), data=(folder / "data",), out=folder, cache=self.cache_folder)


def patient_of(entry: Entry) -> str:
    return entry.patient or entry.name


def fold_of(entries: list[Entry], folds: int, seed: int) -> dict[str, int]:
    """Fold of each patient: they are drawn by the seed, and those of all folds are as many, but for one."""
    patients = sorted({patient_of(entry) for entry in entries})
    order = np.random.default_rng(seed).permutation(len(patients))
    return {patients[index]: turn % folds for turn, index in enumerate(order)}


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
    """Write the completed label of a scan, on its own grid. ValueError where the scan is hardly one of HU."""
    volume = read_volume(entry.scan)
    if doubt := volume.doubt:
        raise ValueError(f"{entry.scan}: {doubt}")
    label = np.zeros(volume.hu.shape, np.uint8)
    if entry.label and entry.annotated != "none":  # else nobody vouches for what the file holds
        label = (read_lesions(entry.label, volume.geometry) > 0).astype(np.uint8)
    grid, step = thick_grid(volume.body.shape, volume.spacing_mm, *settings.look)
    predictions = predict_slices(TorchHybrid(network), grid, thicken(volume.body, grid.axis, step))
    source = slice_source(predictions, grid, thin_matrix(volume.body.shape[grid.axis], step))
    probability = np.stack([source(z).astype(np.float16) for z in range(len(volume.body))])
    label[volume.box] = complete(label[volume.box], probability, volume.geometry.voxel_ml, settings)
    write_label(label, volume.geometry, path)


def fingerprint(entry: Entry) -> str:
    """Of what a completed label is made of; another one as soon as one of the case's files or its row changes."""
    return place(Path(), entry).name


def is_made(entry: Entry, settings: Settings) -> bool:
    """Whether a label was completed of what is given now; not where nothing tells what it was made of."""
    source = settings.source_of(entry)
    return settings.label_of(entry).exists() and source.exists() and source.read_text() == fingerprint(entry)


def make(network: Hybrid, entry: Entry, settings: Settings) -> None:
    """Complete a label, and keep beside it what it was made of."""
    source = fingerprint(entry)  # before it is read: what changes meanwhile is read once more in the next call
    write_completed(network, entry, settings, settings.label_of(entry))
    write_file(settings.source_of(entry), source.encode())


def recall(path: Path) -> tuple[dict[str, str], dict[str, int]]:
    """The settings and each patient's fold that `folds.json` tells of earlier calls; nothing where there were none.

    What older versions wrote tells --folds and --seed alone.
    """
    if not path.exists():
        return {}, {}
    try:
        told = json.loads(path.read_text())
        settings = {name: str(told[name]) for name in DRAW if name in told} | told.get("settings", {})
        return settings, dict(told.get("patients", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, so that nothing tells what was drawn: name another --out") from error


def refuse_changes(entries: list[Entry], settings: Settings, before: dict[str, str]) -> None:
    """ValueError where a setting that decided what is in OUT is another one now."""
    now, there = settings.decisive, [settings.label_of(entry).exists() for entry in entries if not entry.complete]
    begun = any(settings.labels.glob("*.nii.gz")) or any(settings.out.glob(f"fold_*/{CHECKPOINT}"))
    whole = begun and all(there)
    bound = {name: name in DRAW or (whole if name in BUDGET else begun) for name in now}
    changed = [name for name in differing(before, now) if bound[name]]
    if changed:
        others = "other --folds or another --seed" if set(changed) & set(DRAW) else "other settings"
        mend = "give what it was, or name another --out"
        raise ValueError(f"{settings.out}: was begun with {others} ({list_changes(changed, before, now)}): {mend}")


def settle_folds(entries: list[Entry], settings: Settings) -> dict[str, int]:
    """Fold of each patient, as it was in earlier calls. ValueError where what is given does not fit those.

    A network that was trained before would seek in patients that it was trained on, if folds were drawn anew.
    """
    record = settings.out / "folds.json"
    before, known = recall(record)
    refuse_changes(entries, settings, before)
    folds = fold_of(entries, settings.folds, settings.seed)
    if known.keys() == folds.keys():
        folds = known
    elif known and any(settings.out.glob("fold_*")):
        groups = (("new", folds.keys() - known.keys()), ("gone", known.keys() - folds.keys()))
        told = "; ".join(f"{what}: {', '.join(sorted(names)[:3])}" for what, names in groups if names)
        mend = "give the same patients, or name another --out"
        raise ValueError(f"{settings.out}: its folds are of other patients ({told}): {mend}")
    settings.labels.mkdir(parents=True, exist_ok=True)
    write_file(record, json.dumps({"settings": settings.decisive, "patients": folds}, indent=1).encode())
    return folds


def train_fold(entries: list[Entry], settings: hybrid_training.Settings) -> Hybrid:
    """The network of one fold, trained on these cases unless it was before, on the device that the settings ask for."""
    (folder,) = settings.data
    link(entries, folder)
    hybrid_training.main(settings)
    network = Hybrid(settings.config)
    network.load_state_dict(load_file(settings.out / "hybrid.safetensors"))
    return channels_last(network).eval().to(make_fabric(settings).device)


def refuse_trained_on(held_out: list[Entry], fold: hybrid_training.Settings) -> None:
    """ValueError where a fold's network was trained on what it is to seek in, as where a case's patient is another now.

    Nothing else tells it of what older versions drew.
    """
    (folder,) = fold.data
    trained_on = {case_name(path) for path in (folder / "imagesTr").glob("*")}
    names = [entry.name for entry in held_out if entry.name in trained_on]
    if names and (fold.out / CHECKPOINT).exists():
        told = ", ".join(names[:3])
        raise ValueError(f"{fold.out}: was trained on {told}, which it is to seek lesions in: name another --out")


def refuse_misuse(settings: Settings) -> None:
    """ValueError where this cannot be done with such settings, or would cost somebody's files."""
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


def main(settings: Settings) -> None:
    """Complete partial labels by what networks of the other folds find; the result is OUT/completed."""
    refuse_misuse(settings)
    entries = read_folder(settings.data[0])
    if any(entry.pseudo for entry in entries):
        raise ValueError(f"--data {settings.data[0]}: is completed already: name the folder that it was made of")
    folds = settle_folds(entries, settings)
    for fold in range(settings.folds):
        held_out = [entry for entry in entries if folds[patient_of(entry)] == fold and not entry.complete]
        missing = [entry for entry in held_out if not is_made(entry, settings)]
        if not missing:
            continue
        refuse_trained_on(missing, settings.of_fold(fold))
        others = [entry for entry in entries if folds[patient_of(entry)] != fold and entry.teaches]
        network = train_fold(others, settings.of_fold(fold))
        for entry in tqdm(missing, desc=f"fold {fold}", unit="case"):
            make(network, entry, settings)
    link([_completed(entry, settings) for entry in entries], settings.out / "completed")


def _completed(entry: Entry, settings: Settings) -> Entry:
    if entry.complete:
        return entry
    return replace(entry, label=settings.label_of(entry), annotated="partial", pseudo=True)
