"""The paper's way through a scan: `paper` in torch and float32, one window of five slices after the other.

python -m benchmarks.papers_way WEIGHTS DEVICE INPUTS OUTPUTS
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from inference.hybrid.torch_engine import TorchHybrid
from inference.pipeline import Pipeline


def main(weights: str, device: str, inputs: str, outputs: str) -> None:
    pipeline = Pipeline(Path(weights), device, engine="torch")
    pipeline.manifest = replace(pipeline.manifest, resize="stretch", slice_mm=0.0)  # no slices put together
    assert isinstance(pipeline.hybrid, TorchHybrid)
    pipeline.hybrid.model.float()
    pipeline.hybrid.batch = 1
    for scan in sorted(Path(inputs).iterdir()):
        pipeline.run(scan, Path(outputs))


if __name__ == "__main__":
    main(*sys.argv[1:])
