"""What the program writes of a scan, and what each network by itself would have written at its own thresholds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.fusion import SliceSource, fuse
from inference.pipeline import Pipeline, Report
from inference.volume import output_names, read_label, read_volume
from inference.weights import MANIFEST, find_weights
from training.calibration import Operating

FUSED = "fused"


def operating_points(manifest: dict[str, Any]) -> dict[str, Operating]:
    """The calibrated thresholds of each network by itself; those of the manifest where it was not calibrated."""
    alone = manifest["training"].get("calibration", {})
    return {network: Operating.from_manifest(alone.get(network, manifest)) for network in ("hybrid", "unet")}


class Recorder(Pipeline):
    """The program's own pipeline, which also keeps what each network said."""

    def __init__(self, weights: str) -> None:
        """weights: name under weights/, or a folder."""
        super().__init__(find_weights(weights))
        self.operating = operating_points(json.loads((self.manifest.folder / MANIFEST).read_text()))

    def predict_hybrid(self, *arguments: Any) -> tuple[SliceSource, float]:
        self.hybrid_said = super().predict_hybrid(*arguments)
        return self.hybrid_said

    def predict_unet(self, *arguments: Any) -> SliceSource:
        self.unet_said = super().predict_unet(*arguments)
        return self.unet_said

    def masks(self, scan: Path, folder: Path) -> tuple[Report, dict[str, NDArray[np.uint8]]]:
        """Masks (z, y, x) by network, of `FUSED` what the program wrote into the folder; and its report."""
        report = self.run(scan, folder)
        volume = read_volume(scan)
        written = read_label(folder / output_names(report.case)[0], volume.geometry)
        masks = {network: np.zeros_like(written) for network in self.operating}
        hybrid, score = self.hybrid_said
        for network, point in self.operating.items():
            speaking = point.speaking(network, hybrid, self.unet_said, score)
            masks[network][volume.box] = fuse(*speaking, volume.body.shape, volume.geometry.voxel_ml, point.fusion)
        return report, {FUSED: written, **masks}
