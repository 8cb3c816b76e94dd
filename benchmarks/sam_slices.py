"""SAM ViT-B, slice by slice: the image encoder on 1024×1024 pixels, the mask decoder asked with one point.

    python -m benchmarks.sam_slices DEVICE INPUTS OUTPUTS

The least that a SAM for every slice costs; its weights are random, so its masks mean nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor, sam_model_registry
from tyro.conf import Positional

from benchmarks.command_line import run_main
from inference.devices import choose_device
from inference.slices import window
from inference.volume import case_name, output_names, read_volume, write_mask

MIDDLE = np.array([1])  # a label: the point is of what is sought


def segment(predictor: SamPredictor, plane: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The mask (y, x) of a slice in [0, 1], for a point in its middle."""
    predictor.set_image(np.repeat(np.uint8(255 * plane)[..., None], 3, axis=2))
    point = np.array([[plane.shape[1] / 2, plane.shape[0] / 2]])
    return np.asarray(predictor.predict(point, MIDDLE, multimask_output=False)[0][0])


def main(device: Positional[str], inputs: Positional[Path], outputs: Positional[Path]) -> None:
    place = choose_device(device)
    torch.manual_seed(0)
    predictor = SamPredictor(sam_model_registry["vit_b"]().eval().to(place))
    for scan in sorted(inputs.iterdir()):
        volume = read_volume(scan)
        mask = np.stack([segment(predictor, window(plane)) for plane in volume.hu])
        write_mask(mask, volume.geometry, outputs / output_names(case_name(scan))[0])


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
