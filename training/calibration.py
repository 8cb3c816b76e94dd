"""Choose the thresholds of gate and fusion on annotated cases, and write them into the manifest.

    python -m training.calibration --data FLARE_FOLDER --weights weights/NAME

The mean Dice over the cases decides (both empty counts 1, exactly one empty 0, as FLARE grades). Each network by itself
is calibrated too, for the record and for fair comparisons; the program uses the fused thresholds only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from inference.fusion import FusionThresholds, SliceSource, bounding_box, fuse
from inference.pipeline import Pipeline, voxel_volume_ml
from inference.weights import MANIFEST, Gate
from training.data import Case, case_names, load_case
from training.release import write_manifest

ROUNDS = 2  # of the search, one threshold at a time
SURE = (0.95, 0.5, 0.7, 0.9, 0.98, 0.99, 1.01)  # above 1: never sure alone
VOXEL = (0.5, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
CHOICES: dict[str, tuple[float, ...]] = {
    "scan_threshold": (0.5, 0.0, 0.3, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99),
    "weight": (0.5, 0.2, 0.35, 0.65, 0.8),
    "voxel": VOXEL,
    "both_hybrid": (0.5, 0.3, 0.7, 0.85),
    "both_unet": (0.5, 0.3, 0.7, 0.85),
    "sure_hybrid": SURE,
    "sure_unet": SURE,
    "unet_voxel": VOXEL,
    "min_volume_ml": (0.0, 0.05, 0.1, 0.2, 0.5),
}
SEARCHED: dict[str, tuple[str, ...]] = {  # by which network speaks; the thresholds that matter then
    "hybrid": ("scan_threshold", "voxel", "sure_hybrid", "min_volume_ml"),
    "unet": ("unet_voxel", "sure_unet", "min_volume_ml"),
    "fused": tuple(CHOICES),
}


@dataclass(frozen=True)
class Operating:
    """Thresholds at which one network, or both fused, are judged."""

    gate: Gate = field(default_factory=lambda: Gate(0.5))
    fusion: FusionThresholds = field(default_factory=FusionThresholds)

    def change(self, name: str, value: float) -> Operating:
        if name == "scan_threshold":
            return replace(self, gate=replace(self.gate, scan_threshold=value))
        return replace(self, fusion=replace(self.fusion, **{name: value}))

    def speaking(
        self, network: str, hybrid: SliceSource, unet: SliceSource, score: float
    ) -> tuple[SliceSource | None, SliceSource | None]:
        """Hybrid and UNet, None where the network or the gate silences them; network: "hybrid", "unet" or "fused"."""
        silent = network == "unet" or score < self.gate.scan_threshold
        return None if silent else hybrid, None if network == "hybrid" else unet

    @classmethod
    def from_manifest(cls, values: dict[str, Any]) -> Operating:
        return cls(Gate(**values["gate"]), FusionThresholds.from_dict(values["fusion"]))


@dataclass(frozen=True)
class Predicted:
    """What both networks say of a case, before any threshold: its score, and probabilities (z, y, x) on its grid.

    Cut to the box that holds the label and all that could be called a lesion.
    """

    label: NDArray[np.uint8]
    voxel_ml: float
    hybrid: NDArray[np.float16]
    unet: NDArray[np.float16]
    score: float

    def dice(self, operating: Operating, network: str) -> float:
        """network: "hybrid", "unet" or "fused"."""
        speaking = operating.speaking(network, slices_of(self.hybrid), slices_of(self.unet), self.score)
        return dice(fuse(*speaking, self.label.shape, self.voxel_ml, operating.fusion), self.label)


def slices_of(probability: NDArray[np.float16]) -> SliceSource:
    return lambda z: probability[z].astype(np.float32)


def dice(mask: NDArray[Any], label: NDArray[Any]) -> float:
    """1 where both are empty, 0 where exactly one is."""
    mask, label = mask > 0, label > 0
    total = int(mask.sum()) + int(label.sum())
    return 2 * int((mask & label).sum()) / total if total else 1.0


def predict(pipeline: Pipeline, case: Case) -> Predicted:
    """Both networks' probabilities, brought to the scan's grid once: the search looks at them hundreds of times."""
    source, score = pipeline.predict_hybrid(case.hu, case.spacing_mm)
    hybrid, unet = (
        np.stack([source(z).astype(np.float16) for z in range(len(case.hu))])
        for source in (source, pipeline.predict_unet(case.hu, case.spacing_mm))
    )
    # no threshold lets a voxel outside this box into a mask, so the search need not look there
    anywhere = (case.label > 0) | (hybrid >= min(VOXEL)) | (unet >= min(VOXEL))
    box = bounding_box(anywhere) or (slice(0, 1),) * 3
    return Predicted(case.label[box], voxel_volume_ml(case.spacing_mm), hybrid[box].copy(), unet[box].copy(), score)


def calibrate(cases: list[Predicted], network: str) -> tuple[Operating, float]:
    """One threshold after the other, twice over, each where the mean Dice is highest; and that mean."""

    def mean(operating: Operating) -> float:
        return float(np.mean([case.dice(operating, network) for case in cases]))

    chosen = Operating()
    best = mean(chosen)
    for name in tqdm(SEARCHED[network] * ROUNDS, desc=f"{network} thresholds"):
        for value in CHOICES[name]:
            other = chosen.change(name, value)
            score = mean(other)
            if score > best + 1e-4:
                best, chosen = score, other
    return chosen, best


@dataclass(frozen=True)
class Settings:
    data: Path  # FLARE folder of cases that were not trained on
    weights: Path  # folder of weights, whose manifest is rewritten


def main(settings: Settings) -> None:
    pipeline = Pipeline(settings.weights)
    names = case_names(settings.data)
    cases = [predict(pipeline, load_case(settings.data, name)) for name in tqdm(names, desc="cases", unit="case")]
    manifest = json.loads((settings.weights / MANIFEST).read_text())
    record: dict[str, Any] = {"cases": len(cases)}
    for network in SEARCHED:
        chosen, best = calibrate(cases, network)
        record[network] = {**asdict(chosen), "mean_dice": round(best, 4)}
        print(f"{network}: mean Dice {best:.3f} on {len(cases)} cases, {chosen}")
    manifest["gate"], manifest["fusion"] = record["fused"].pop("gate"), record["fused"].pop("fusion")
    manifest["training"]["calibration"] = record
    write_manifest(settings.weights, manifest)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
