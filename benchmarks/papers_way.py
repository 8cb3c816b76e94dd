"""The paper's way through a scan: `paper` in torch and float32, one window of five slices after the other.

python -m benchmarks.papers_way WEIGHTS DEVICE INPUTS OUTPUTS
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tyro.conf import Positional

from benchmarks.command_line import run_main
from inference.devices import choose_device
from inference.hybrid.torch_engine import TorchHybrid
from inference.pipeline import Pipeline


def main(
    weights: Positional[Path], device: Positional[str], inputs: Positional[Path], outputs: Positional[Path]
) -> None:
    pipeline = Pipeline(weights, choose_device(device), engine="torch")
    pipeline.manifest = replace(pipeline.manifest, resize="stretch", slice_mm=0.0)  # no slices put together
    assert isinstance(pipeline.hybrid, TorchHybrid)
    pipeline.hybrid.model.float()
    pipeline.hybrid.batch = 1
    for scan in sorted(inputs.iterdir()):
        pipeline.run(scan, outputs)


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
