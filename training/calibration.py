"""Choose the thresholds of gate and fusion on annotated cases, and write them into the manifest.

    python -m training calibrate --data FLARE_FOLDER [FLARE_FOLDER …] --weights weights/NAME

First the gate of the slices: a half, or lower, so that it withholds the prompts of at most `WITHHELD` of the slices
that hold a lesion. Then the rest. What decides is the mean over the cases (both empty counts 1, exactly one
empty 0, as FLARE grades), less the share of healthy cases with any false voxel beyond `HEALTHY_LIMIT`: the mean Dice at
first, in the last round that of Dice and NSD, which costs ten times as much. Several folders count alike, however many
cases each has. Each network by itself is calibrated first. The program uses the fused thresholds only: voxels are
candidates where the mean of both networks is a half, or as the UNet found for itself, and the search decides which
components stay, since one over everything at once fits a few dozen cases alone. Where one network alone is judged
better than both by more than `MARGIN`, it speaks alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.surface import surface_dice
from inference.fusion import Evidence, FusionThresholds, SliceSource, bounding_box, find_components, fuse
from inference.hybrid.predict import predict_slices
from inference.pipeline import Pipeline
from inference.slices import thick_grid, thicken
from inference.volume import voxel_volume_ml
from inference.weights import MANIFEST, Gate
from training.data import Case, Entry, load_case, read_folder, refuse
from training.hybrid_data import cut_label
from training.losses import dice
from training.release import write_manifest
from training.sources import by_source, short_names

TOLERANCE_MM = 2.0  # of the NSD, as FLARE grades
WITHHELD = 0.05  # of the slices with a lesion may be taken for free of any
HEALTHY_LIMIT = 0.05  # of the healthy cases may have a false positive
MARGIN = 0.02  # one network must be so much better than both fused to be heard alone: a few dozen cases tell no less
NEVER = 1.01  # no probability reaches it
ROUNDS = 2  # of the search, one threshold at a time
STARTS = (0.5, 0.7, 0.9)  # voxel thresholds from which the search sets out, so that an empty mask cannot trap it
SURE = (0.95, 0.5, 0.7, 0.9, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)
BOTH = (0.5, 0.1, 0.3, 0.7, 0.85, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)  # the other network tells most
VOXEL = (0.5, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)
CHOICES: dict[str, tuple[float, ...]] = {
    "scan_threshold": (0.5, 0.0, 0.3, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99),
    "voxel": VOXEL,
    "both_hybrid": BOTH,
    "both_unet": BOTH,
    "sure_hybrid": (*SURE, 0.9999, NEVER),  # its probabilities are float16, which has nothing between 0.9995 and 1
    "sure_unet": (*SURE, 0.9998, 0.9999, 0.99995, NEVER),
    "unet_voxel": VOXEL,
    "min_volume_ml": (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0),
}
SEARCHED: dict[str, tuple[str, ...]] = {  # by which network speaks
    "hybrid": ("scan_threshold", "voxel", "sure_hybrid", "min_volume_ml"),
    "unet": ("unet_voxel", "sure_unet", "min_volume_ml"),
    "fused": ("scan_threshold", "both_hybrid", "both_unet", "sure_hybrid", "sure_unet", "min_volume_ml"),
}
OPEN = Gate(0.5)  # before calibration


@dataclass(frozen=True)
class Operating:
    """Thresholds at which one network, or both fused, are judged."""

    gate: Gate = OPEN
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
    """What both networks say of a case, before any threshold: its score, and their probabilities on its grid.

    All cut to the box that holds the label (z, y, x) and all that could be called a lesion. source: its FLARE folder.
    """

    label: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    hybrid: SliceSource
    unet: SliceSource
    score: float
    source: Path = Path()
    _evidence: dict[Hashable, Evidence | None] = field(default_factory=dict, init=False, repr=False)
    _measured: dict[Hashable, float] = field(default_factory=dict, init=False, repr=False)

    def mask(self, operating: Operating, network: str) -> NDArray[np.uint8]:
        """network: "hybrid", "unet" or "fused"."""
        speaking = self._speaking(operating, network)
        return fuse(*speaking, self.label.shape, voxel_volume_ml(self.spacing_mm), operating.fusion)

    def measured(self, operating: Operating, network: str, measure: Measure) -> float:
        """What `measure` says of the mask; masks of the same components, which most thresholds give, are made once."""
        fusion, (hybrid, unet) = operating.fusion, self._speaking(operating, network)
        candidates = (hybrid and fusion.voxel, unet and fusion.unet_voxel, hybrid and unet and fusion.weight)
        if candidates not in self._evidence:
            found = find_components(hybrid, unet, self.label.shape, fusion)
            self._evidence[candidates] = found and found.evidence
        evidence = self._evidence[candidates]
        kept = evidence.kept(voxel_volume_ml(self.spacing_mm), fusion) if evidence else np.zeros(0, bool)
        asked = (measure, candidates, kept.tobytes())
        if asked not in self._measured:
            self._measured[asked] = measure(self, operating, network)
        return self._measured[asked]

    def _speaking(self, operating: Operating, network: str) -> tuple[SliceSource | None, SliceSource | None]:
        return operating.speaking(network, self.hybrid, self.unet, self.score)

    def dice(self, operating: Operating, network: str) -> float:
        return dice(self.mask(operating, network), self.label)

    def dice_and_nsd(self, operating: Operating, network: str) -> float:
        """Their mean, as FLARE grades both: 1 where both masks are empty, 0 where exactly one is."""
        mask = self.mask(operating, network)
        both = dice(mask, self.label)
        if not (mask.any() and self.label.any()):
            return both
        return (both + surface_dice(mask > 0, self.label > 0, self.spacing_mm, TOLERANCE_MM)) / 2


Measure = Callable[[Predicted, Operating, str], float]


def sparse(volume: NDArray[np.float32]) -> SliceSource:
    """z → volume[z] (y, x), of a volume (z, y, x) that is mostly 0: what is not takes 8 bytes a voxel, 0 nothing."""
    places = [np.flatnonzero(plane).astype(np.int32) for plane in volume]
    values = [plane.ravel()[place] for plane, place in zip(volume, places, strict=True)]
    shape = volume.shape[1:]

    def plane(z: int) -> NDArray[np.float32]:
        filled = np.zeros(shape, np.float32)
        filled.ravel()[places[z]] = values[z]
        return filled

    return plane


def predict_unet(pipeline: Pipeline, case: Case) -> NDArray[np.float32]:
    """The UNet's probabilities on the scan's grid (z, y, x)."""
    source = pipeline.predict_unet(case.hu, case.spacing_mm)
    return np.stack([source(z) for z in range(len(case.hu))])


def predict(pipeline: Pipeline, case: Case, unet: NDArray[np.float32] | None = None) -> Predicted:
    """Both networks' probabilities, brought to the scan's grid once: the search looks at them hundreds of times.

    unet: what `predict_unet` gives, where it is known already.
    """
    source, score = pipeline.predict_hybrid(case.hu, case.spacing_mm)
    hybrid = np.stack([source(z) for z in range(len(case.hu))])
    unet = predict_unet(pipeline, case) if unet is None else unet
    # no threshold lets another voxel into a mask, so the search need not know what is said of it
    anywhere = (hybrid >= min(VOXEL)) | (unet >= min(VOXEL))
    box = bounding_box(anywhere | (case.label > 0)) or (slice(0, 1),) * 3
    by_hybrid, by_unet = (sparse(np.where(anywhere, of, np.float32(0))[box]) for of in (hybrid, unet))
    return Predicted(case.label[box].copy(), case.spacing_mm, by_hybrid, by_unet, score, case.entry.source)


def choose_slice_gate(pipeline: Pipeline, cases: Iterable[Case]) -> Gate:
    """The presence that all but `WITHHELD` of the slices with a lesion reach, at most a half; the pipeline follows it.

    A slice holds a lesion where the classifier was taught so: when some of it is left at the network's resolution.
    """
    manifest, reached = pipeline.manifest, list[float]()
    look = (manifest.plane, manifest.resize, manifest.slice_mm)
    for case in cases:
        grid, step = thick_grid(case.hu.shape, case.spacing_mm, *look)
        present = cut_label(case.label > 0, grid, step).any(axis=(1, 2))
        if present.any():
            hu = thicken(case.hu, grid.axis, step)
            said = predict_slices(pipeline.hybrid, grid, hu, manifest.window_hu)
            reached.extend(said.presence[present])
    threshold = min(0.5, float(np.quantile(reached, WITHHELD, method="lower"))) if reached else 0.5
    pipeline.hybrid.slice_threshold = threshold
    return Gate(0.5, slice_threshold=threshold)


def judge(cases: list[Predicted], operating: Operating, network: str, measure: Measure = Predicted.dice) -> float:
    """Mean over the folders of what `judge_folder` says of each."""
    return float(np.mean([judge_folder(group, operating, network, measure) for group in by_source(cases).values()]))


def judge_folder(cases: list[Predicted], operating: Operating, network: str, measure: Measure) -> float:
    """Mean of the measure, less the share of healthy cases with a false positive that is beyond the limit."""
    scores = np.array([case.measured(operating, network, measure) for case in cases])
    healthy = np.array([not case.label.any() for case in cases])
    false_positive = float(np.mean(scores[healthy] == 0)) if healthy.any() else 0.0
    return float(scores.mean()) - max(0.0, false_positive - HEALTHY_LIMIT)


def improve(network: str, chosen: Operating, judged: Callable[[Operating], float]) -> tuple[float, Operating]:
    """Each threshold in turn moved to where `judged` is best; what it says, and the thresholds."""
    best = judged(chosen)
    for name in SEARCHED[network]:
        for value in CHOICES[name]:
            other = chosen.change(name, value)
            score = judged(other)
            if score > best + 1e-4:
                best, chosen = score, other
    return best, chosen


def starting_points(network: str, first: Operating) -> list[Operating]:
    """`first` with each of `STARTS` for the network's voxels, where these are searched."""
    voxels = [name for name in ("voxel", "unet_voxel") if name in SEARCHED[network]]
    return [first.change(name, start) for name in voxels for start in STARTS] or [first]


def calibrate(cases: list[Predicted], network: str, first: Operating | None = None) -> tuple[Operating, float]:
    """Twice over from each start by Dice, then from the best of these once more by Dice and NSD.

    first: where to set out from, but for the voxel thresholds; those that the network does not search stay.
    """
    found: list[tuple[float, Operating]] = []
    # rounds and starts come by the same thresholds again and again
    by_dice, by_both = (
        cache(partial(judge, cases, network=network, measure=measure))
        for measure in (Predicted.dice, Predicted.dice_and_nsd)
    )
    starts = starting_points(network, first or Operating())
    with tqdm(total=len(starts) * ROUNDS + 1, desc=f"{network} thresholds", unit="round") as bar:
        for chosen in starts:
            for _ in range(ROUNDS):
                best, chosen = improve(network, chosen, by_dice)
                bar.update()
            found.append((best, chosen))
        _, chosen = max(found, key=lambda pair: pair[0])
        best, chosen = improve(network, chosen, by_both)
        bar.update()
    return chosen, best


def calibrate_all(cases: list[Predicted], gate: Gate) -> dict[str, tuple[Operating, float]]:
    """Thresholds, and what `judge` says of them, of the hybrid, of the UNet, and of both fused, which builds on these.

    gate: whose threshold of the slices stays. What is fused may be one network `alone`.
    """
    found = {network: calibrate(cases, network, Operating(gate)) for network in ("hybrid", "unet")}
    (hybrid, _), (unet, _) = found["hybrid"], found["unet"]
    both = Operating(hybrid.gate, replace(unet.fusion, sure_hybrid=hybrid.fusion.sure_hybrid))
    surest = {"both_hybrid": max(BOTH), "both_unet": max(BOTH), "sure_hybrid": NEVER, "sure_unet": NEVER}
    agreed = Operating(replace(hybrid.gate, scan_threshold=0.0), replace(both.fusion, **surest))
    starts = (both, agreed)  # one network's word in scans with a high score, or both networks' in any scan
    fused = max((calibrate(cases, "fused", start) for start in starts), key=lambda pair: pair[1])
    best = max(found, key=lambda network: found[network][1])
    operating, score = found[best]
    if score > fused[1] + MARGIN:
        fused = alone(best, operating), score
    return {**found, "fused": fused}


def alone(network: str, chosen: Operating) -> Operating:
    """Thresholds at which what is fused is what this network finds by itself."""
    fusion = replace(chosen.fusion, both_hybrid=NEVER, both_unet=NEVER)
    if network == "hybrid":
        return replace(chosen, fusion=replace(fusion, weight=1.0, unet_voxel=NEVER, sure_unet=NEVER))
    return replace(chosen, fusion=replace(fusion, weight=0.0, voxel=fusion.unet_voxel, sure_hybrid=NEVER))


@dataclass(frozen=True)
class Settings:
    data: tuple[Path, ...]  # FLARE folders of cases that were not trained on
    weights: Path  # folder of weights, whose manifest is rewritten


def load_all(entries: list[Entry]) -> Iterator[Case]:
    """Each case that can be read; after the last, ValueError that lists those that cannot."""
    problems = []
    for entry in entries:
        try:
            yield load_case(entry)
        except ValueError as error:
            problems.append(f"{entry.name}: {error}")
    refuse(problems)


def main(settings: Settings) -> None:
    """Choose the thresholds of gate and fusion on cases whose every lesion is annotated."""
    pipeline = Pipeline(settings.weights)
    entries = [entry for folder in settings.data for entry in read_folder(folder) if entry.complete]
    if not entries:
        raise ValueError(f"{settings.data[0]}: no scan is annotated completely, which calibration asks for")
    gate = choose_slice_gate(pipeline, tqdm(load_all(entries), desc="slices", unit="case", total=len(entries)))
    cases = [predict(pipeline, load_case(entry)) for entry in tqdm(entries, desc="cases", unit="case")]
    if not any(case.label.any() for case in cases):
        raise ValueError(
            f"{settings.data[0]}: no scan has a lesion, by which thresholds are chosen: add some that have"
        )
    manifest = json.loads((settings.weights / MANIFEST).read_text())
    record: dict[str, Any] = {"cases": len(cases)}
    groups = by_source(cases)
    short = short_names(groups)
    for network, (chosen, best) in calibrate_all(cases, gate).items():
        means = {
            short[source]: round(float(np.mean([case.dice(chosen, network) for case in group])), 4)
            for source, group in groups.items()
        }
        record[network] = {**asdict(chosen), "mean_dice": means, "judged": round(best, 4)}
        print(f"{network}: {best:.3f}, mean Dice {means} of {len(cases)} cases, {chosen}")
    manifest["gate"], manifest["fusion"] = record["fused"].pop("gate"), record["fused"].pop("fusion")
    manifest["training"]["calibration"] = record
    write_manifest(settings.weights, manifest)
