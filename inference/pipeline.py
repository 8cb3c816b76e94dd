"""One case from file to file: the map of the house."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from .devices import Engine
from .fusion import SliceSource, bounding_box, fuse, mean_probability
from .hybrid.config import IMAGE_SIZE
from .hybrid.predict import SliceNetwork, SlicePredictions, batch_for, predict_slices
from .limits import room_mib
from .log import line
from .slices import SliceGrid, thick_grid, thicken, thin_matrix
from .stopwatch import Stopwatch
from .unet import UNet, grid_shape
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
from .weights import Manifest, read_manifest

logger = logging.getLogger(__name__)

CONTEXT_MIB = 700  # of a device, taken before the first tensor
HYBRID_SLICE_BYTES = 2 * IMAGE_SIZE**2  # float16
UNET_VOXEL_BYTES = 5 * 4  # of its grid: HU, padded HU, sum, weight, result
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
    devices: dict[str, str] = field(default_factory=dict)  # where each network ran at last
    lesions: int = 0
    volume_ml: float = 0.0
    error: str | None = None
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line for a log."""
        if self.error:
            return line(case=self.case, status="failed", error=self.error)
        z, y, x = self.size
        return line(
            case=self.case,
            status="done",
            size=f"{x}×{y}×{z}",
            spacing_mm="×".join(f"{mm:.3g}" for mm in reversed(self.spacing_mm)),
            lesions=self.lesions,
            volume_ml=round(self.volume_ml, 3),
            healthy=str(self.healthy).lower(),
            device=",".join(sorted(set(self.devices.values()))),
            **{f"{stage}_s": seconds for stage, seconds in self.seconds.items()},
            warnings=len(self.warnings),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_hybrid(engine: Engine, manifest: Manifest, device: str, gpu_memory_mib: int) -> SliceNetwork:
    """The hybrid network in an engine, of which only that one is imported. ValueError where it is not installed."""
    if engine == "onnx":
        from .hybrid.onnx_engine import OnnxHybrid

        return OnnxHybrid(manifest, device, gpu_memory_mib)
    try:
        from .hybrid.torch_engine import TorchHybrid
    except ModuleNotFoundError as error:
        raise ValueError(f"--engine torch: {error.name} is not installed: use --engine onnx, or install it") from error
    return TorchHybrid.load(manifest, device, gpu_memory_mib)


class Pipeline:
    """Both networks, loaded once for all cases."""

    def __init__(self, weights: Path, device: str = "cpu", gpu_memory_mib: int = 4096, engine: Engine = "onnx") -> None:
        """device: "cpu" or "cuda:N"; gpu_memory_mib: for everything on the device, its context included.

        engine: of the hybrid; the UNet is always ONNX Runtime's.
        """
        self.manifest: Manifest = read_manifest(weights)
        self.device, self.engine = device, engine
        # after the context each network gets half: both keep what they took until the process ends
        share_mib = max(1, (gpu_memory_mib - CONTEXT_MIB) // 2)
        self.hybrid = open_hybrid(engine, self.manifest, device, share_mib)
        self.unet = UNet(self.manifest.read("unet"), self.manifest.unet, device, share_mib)

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
        if doubt := volume.doubt:
            logger.warning("%s: %s; its mask may be worth nothing", source.name, doubt)
        geometry, box = volume.geometry, volume.box
        report.size, report.spacing_mm = geometry.shape, geometry.spacing_mm
        room = room_mib(source, geometry.shape, beside_mib=self._beside_mib(volume))
        hybrid, unet = self._ask(volume.body, report, progress, room)
        report.devices = {"hybrid": self.hybrid.device, "unet": self.unet.device}
        del volume  # HU are not needed any more, and large
        with report.stage("fuse"):
            mask = np.zeros(geometry.shape, np.uint8)
            body = mask[box]
            body[:] = fuse(hybrid, unet, body.shape, geometry.voxel_ml, self.manifest.fusion)
        with report.stage("write"):
            mask_name, probability_name = output_names(report.case)
            write_mask(mask, geometry, outputs / mask_name)
            del mask, body
            report.lesions, report.volume_ml = measure(outputs / mask_name, geometry)
            if save_probabilities:
                write_probability(self._probability(geometry, box, hybrid, unet), geometry, outputs / probability_name)
        return report

    def _beside_mib(self, volume: Volume) -> int:
        """Memory for probabilities of a scan: the hybrid's slices, and five grids of the UNet while it works."""
        grid, _ = self._thick_grid(volume.body.shape, volume.spacing_mm)
        voxels = math.prod(grid_shape(volume.body.shape, volume.spacing_mm, self.manifest.unet))
        return (len(grid) * HYBRID_SLICE_BYTES + voxels * UNET_VOXEL_BYTES) // 2**20

    def _thick_grid(self, shape: tuple[int, ...], spacing_mm: Spacing) -> tuple[SliceGrid, int]:
        z, y, x = shape
        manifest = self.manifest
        return thick_grid((z, y, x), spacing_mm, manifest.plane, manifest.resize, manifest.slice_mm)

    def _ask(
        self, hu: NDArray[np.int16], report: Report, progress: Progress, memory_mib: float
    ) -> tuple[SliceSource | None, SliceSource | None]:
        """What the hybrid and the UNet say of a body; None of one that has no say."""
        with report.stage("hybrid"):
            hybrid, report.scan_score = self.predict_hybrid(
                hu, report.spacing_mm, partial(progress, "hybrid"), memory_mib
            )
        report.healthy = report.scan_score < self.manifest.gate.scan_threshold
        unet = None
        if not (report.healthy and self.manifest.gate.skip_unet):
            with report.stage("unet"):
                unet = self.predict_unet(hu, report.spacing_mm, partial(progress, "unet"), memory_mib)
        return None if report.healthy else hybrid, unet

    def predict_hybrid(
        self,
        hu: NDArray[np.int16],
        spacing_mm: Spacing,
        progress: StageProgress = lambda *_: None,
        memory_mib: float = math.inf,
    ) -> tuple[SliceSource, float]:
        """The hybrid's probability slice by slice of a body (z, y, x) of HU, and the scan's score."""
        manifest, done = self.manifest, 0
        grid, step = self._thick_grid(hu.shape, spacing_mm)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, len(grid))

        most = batch_for(manifest.hybrid, 0, memory_mib, value_bytes=4)
        predictions = predict_slices(self.hybrid, grid, thicken(hu, grid.axis, step), manifest.window_hu, advance, most)
        source = slice_source(predictions, grid, thin_matrix(hu.shape[grid.axis], step))
        return source, scan_score(predictions.presence)

    def predict_unet(
        self,
        hu: NDArray[np.int16],
        spacing_mm: Spacing,
        progress: StageProgress = lambda *_: None,
        memory_mib: float = math.inf,
    ) -> SliceSource:
        """The UNet's probability slice by slice of a body (z, y, x) of HU."""
        return self.unet.probabilities(hu, spacing_mm, progress, memory_mib).slice

    def _probability(
        self, geometry: Geometry, box: tuple[slice, ...], hybrid: SliceSource | None, unet: SliceSource | None
    ) -> NDArray[np.uint8]:
        """The fused probability on the scan's grid, 0 … 255 for 0 … 1."""
        whole = np.zeros(geometry.shape, np.uint8)
        if hybrid is None and unet is None:
            return whole
        body = whole[box]
        for z in range(len(body)):
            mean = mean_probability(hybrid and hybrid(z), unet and unet(z), self.manifest.fusion.weight)
            body[z] = np.rint(255 * np.clip(mean, 0, 1))
        return whole


def slice_source(predictions: SlicePredictions, grid: SliceGrid, thin: NDArray[np.float32]) -> SliceSource:
    """z → the hybrid's probability (y, x) on the scan's grid, whatever plane the network looks along.

    thin: (slices of the scan, those of `grid`), see `thin_matrix`.
    """
    probability = predictions.probability
    if grid.axis == 0:

        def axial(z: int) -> NDArray[np.float32]:
            used = np.flatnonzero(thin[z])  # two at most
            return grid.restore(np.tensordot(thin[z, used], probability[used].astype(np.float32), axes=1))

        return axial
    if grid.axis == 1:
        return lambda z: thin @ grid.restore_axial(probability, z)
    return lambda z: grid.restore_axial(probability, z) @ thin.T


def measure(path: Path, geometry: Geometry) -> tuple[int, float]:
    """How many lesions a mask holds as it lies on disk, and their ml: what is told is what a reader of it finds."""
    mask = read_label(path, geometry)
    box = bounding_box(mask)
    if box is None:
        return 0, 0.0
    lesions = int(cc3d.connected_components(mask[box], connectivity=26, return_N=True)[1])
    return lesions, float(mask[box].sum(dtype=np.int64) * geometry.voxel_ml)
