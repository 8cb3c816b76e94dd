"""One phantom CT through `sh predict.sh`: mask, picture and Dice.

python -m benchmarks.demo --out demo
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from benchmarks.command_line import run_main
from training.losses import dice
from training.phantom import Phantom, Scanner, make_phantom, write_flare

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

REPOSITORY = Path(__file__).resolve().parent.parent
NAME = "phantom"
SEED = 3004  # none of those that were trained or calibrated on
TRUTH, PREDICTION = "#ffd24d", "#4dd2ff"


def read_mask(path: Path) -> NDArray[np.uint8]:
    """A mask written for a phantom, (z, y, x): phantoms are LPS, whose NIfTI axes only need to be turned round."""
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj).transpose(2, 1, 0)


def slices_to_show(truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> list[int]:
    """Three slices: through the middle of the largest truth, and the quarters of its extent."""
    area = (truth if truth.any() else prediction).sum(axis=(1, 2))
    used = np.flatnonzero(area) if area.any() else np.arange(len(area))
    middle = int(area.argmax()) if area.any() else len(area) // 2
    return sorted([int(np.quantile(used, 0.15)), middle, int(np.quantile(used, 0.85))])


def draw(hu: NDArray[np.int16], truth: NDArray[np.uint8], prediction: NDArray[np.uint8], path: Path) -> None:
    """Three axial slices in the tissue window with both contours."""
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 5.5), facecolor="black", layout="constrained")
    for axis, z in zip(axes, slices_to_show(truth, prediction), strict=True):
        axis.imshow(hu[z], cmap="gray", vmin=-200, vmax=300)
        for mask, colour in ((truth, TRUTH), (prediction, PREDICTION)):
            if mask[z].any():
                axis.contour(mask[z], [0.5], colors=colour, linewidths=1)
        axis.set_title(f"slice {z}", color="white")
        axis.axis("off")
    lines = [Line2D([], [], color=TRUTH, label="truth"), Line2D([], [], color=PREDICTION, label="prediction")]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, labelcolor="white")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def prepare(folder: Path) -> Phantom:
    """Write the phantom as a FLARE folder."""
    phantom = make_phantom(SEED, healthy=False, scanner=Scanner.demo())
    write_flare(phantom, folder, NAME)
    return phantom


def main(out: Path = Path("demo")) -> int:
    """Segment one phantom CT.

    Args:
        out: folder to write
    """
    out.mkdir(parents=True, exist_ok=True)
    print(f"generating a phantom CT in {out}/imagesTr …", flush=True)
    phantom = prepare(out)
    ran = subprocess.run(["sh", str(REPOSITORY / "predict.sh"), str(out / "imagesTr"), str(out / "masks")], check=False)
    if ran.returncode:
        return ran.returncode
    prediction = read_mask(out / "masks" / f"{NAME}.nii.gz")
    draw(phantom.hu, phantom.lesions, prediction, out / "demo.png")
    print(f"mask: {out}/masks/{NAME}.nii.gz, picture: {out}/demo.png")
    print(f"DSC against the known lesions: {dice(prediction, phantom.lesions):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
