"""One case from file to file: the map of the house."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray

from .fusion import SliceSource, bounding_box, fuse, mean_probability
from .hybrid.model import Hybrid
from .hybrid.predict import CONTEXT_MIB, MAX_TARGETS, SlicePredictions, predict_slices, targets_for
from .slices import SliceGrid
from .stopwatch import Stopwatch
from .unet import UNet
from .volume import (
    Geometry,
    Volume,
    case_name,
    output_names,
    read_label,
    read_volume,
    write_mask,
    write_probability,
)
from .weights import Manifest, load_hybrid, read_manifest

logger = logging.getLogger(__name__)

PRESENCE_SLICES = 3  # a scan's score averages so many neighbouring slices
Progress = Callable[[str, int, int], object]  # stage, done, total
StageProgress = Callable[[int, int], object]
Reader = Callable[[Path], Volume]
Spacing = tuple[float, float, float]


def scan_score(presence: NDArray[np.float32]) -> float:
    """How sure the network is of any lesion in the scan: the highest mean presence of three neighbouring slices.

    One slice alone would make a long healthy scan fail by chance; scans of fewer slices are averaged whole.
    """
    width = min(PRESENCE_SLICES, len(presence))
    return float(np.convolve(presence, np.full(width, 1 / width), mode="valid").max())


@dataclass(kw_only=True)
class Report(Stopwatch):
    """What is known of a case afterwards; sizes are (z, y, x)."""

    case: str
    input: str
    size: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: Spacing = (0.0, 0.0, 0.0)
    scan_score: float = 0.0
    healthy: bool = False
    lesions: int = 0
    volume_ml: float = 0.0
    error: str | None = None
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        z, y, x = self.size
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        found = "no lesion" if not self.lesions else f"{self.lesions} lesion{'s'[: self.lesions > 1]}"
        return f"{self.case}: {x}×{y}×{z}, {stages}; {found}, {self.volume_ml:.1f} ml"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Pipeline:
    """Both networks, loaded once for all cases."""

    def __init__(self, weights: Path, device: str = "cpu", gpu_memory_mib: int = 4096) -> None:
        """device: "cpu" or "cuda:N"; gpu_memory_mib: for everything on the device, its context included."""
        self.manifest: Manifest = read_manifest(weights)
        self.device = device
        self.hybrid = load_hybrid(self.manifest)
        self.targets, share_mib = MAX_TARGETS, 0
        if device != "cpu":
            # after the context each network gets half: both keep what they took until the process ends
            share_mib = max(1, (gpu_memory_mib - CONTEXT_MIB) // 2)
            self.targets = targets_for(self.hybrid, share_mib)
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share_mib * 2**20 / total), device)
            self.hybrid = self._on_device()
        self.unet = UNet(self.manifest.read("unet"), self.manifest.unet, device, share_mib)

    def _on_device(self) -> Hybrid:
        """The hybrid in float16 on the device, or as it is where the device has no room."""
        try:
            return self.hybrid.half().to(self.device)
        except RuntimeError as error:  # torch's own out-of-memory, and whatever else CUDA says of a busy device
            logger.warning("%s cannot take the hybrid network (%s): it runs on the CPU", self.device, first_line(error))
            return self.hybrid.cpu().float()

    def run(
        self,
        source: Path,
        outputs: Path,
        save_probabilities: bool = False,
        progress: Progress = lambda *_: None,
        read: Reader = read_volume,
    ) -> Report:
        """Segment `source` into `outputs`/X.nii.gz. ValueError where the input cannot be used."""
        report = Report(case=case_name(source), input=source.name)
        with report.stage("read"):
            volume = read(source)
        report.size, report.spacing_mm = volume.geometry.shape, volume.spacing_mm
        with report.stage("hybrid"):
            hybrid, report.scan_score = self.predict_hybrid(volume.body, volume.spacing_mm, partial(progress, "hybrid"))
        report.healthy = report.scan_score < self.manifest.gate.scan_threshold
        unet = None
        if not (report.healthy and self.manifest.gate.skip_unet):
            with report.stage("unet"):
                unet = self.predict_unet(volume.body, volume.spacing_mm, partial(progress, "unet"))
        said = None if report.healthy else hybrid
        with report.stage("fuse"):
            voxel_ml = voxel_volume_ml(volume.spacing_mm)
            body = fuse(said, unet, volume.body.shape, voxel_ml, self.manifest.fusion)
            mask = np.zeros(volume.hu.shape, np.uint8)
            mask[volume.box] = body
        with report.stage("write"):
            mask_name, probability_name = output_names(report.case)
            write_mask(mask, volume.geometry, outputs / mask_name)
            report.lesions, report.volume_ml = measure(outputs / mask_name, volume.geometry)
            if save_probabilities:
                probability = self._probability(volume, said, unet)
                write_probability(probability, volume.geometry, outputs / probability_name)
        return report

    def predict_hybrid(
        self, hu: NDArray[np.int16], spacing_mm: Spacing, progress: StageProgress = lambda *_: None
    ) -> tuple[SliceSource, float]:
        """The hybrid's probability slice by slice of a body (z, y, x) of HU, and the scan's score."""
        manifest, done = self.manifest, 0
        grid = SliceGrid(hu.shape, spacing_mm, manifest.plane, manifest.resize)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, len(grid))

        predictions = predict_slices(self.hybrid, grid, hu, manifest.window_hu, self.targets, advance)
        return slice_source(predictions, grid), scan_score(predictions.presence)

    def predict_unet(
        self, hu: NDArray[np.int16], spacing_mm: Spacing, progress: StageProgress = lambda *_: None
    ) -> SliceSource:
        """The UNet's probability slice by slice of a body (z, y, x) of HU."""
        return self.unet.probabilities(hu, spacing_mm, progress).slice

    def _probability(self, volume: Volume, hybrid: SliceSource | None, unet: SliceSource | None) -> NDArray[np.uint8]:
        """The fused probability on the scan's grid, 0 … 255 for 0 … 1."""
        whole = np.zeros(volume.hu.shape, np.uint8)
        if hybrid is None and unet is None:
            return whole
        body = whole[volume.box]
        for z in range(len(body)):
            mean = mean_probability(hybrid and hybrid(z), unet and unet(z), self.manifest.fusion.weight)
            body[z] = np.rint(255 * np.clip(mean, 0, 1))
        return whole


def slice_source(predictions: SlicePredictions, grid: SliceGrid) -> SliceSource:
    """z → the hybrid's probability (y, x) on the scan's grid, whatever plane the network looks along."""
    if grid.axis == 0:
        return lambda z: grid.restore(predictions.probability[z].astype(np.float32))
    return lambda z: grid.restore_axial(predictions.probability, z)


def measure(path: Path, geometry: Geometry) -> tuple[int, float]:
    """How many lesions a mask holds as it lies on disk, and their ml: what is told is what a reader of it finds."""
    mask = read_label(path, geometry)
    box = bounding_box(mask)
    if box is None:
        return 0, 0.0
    lesions = int(cc3d.connected_components(mask[box], connectivity=26, return_N=True)[1])
    return lesions, float(mask[box].sum(dtype=np.int64) * voxel_volume_ml(geometry.spacing_mm))


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def voxel_volume_ml(spacing_mm: Spacing) -> float:
    return float(np.prod(spacing_mm)) / 1000
