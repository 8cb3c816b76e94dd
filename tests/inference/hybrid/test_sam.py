"""Each engine imports what it needs: by default no torch; with torch, segment-anything's parts and not its rest."""

import os
import subprocess
import sys
from pathlib import Path

STARTED = """
import sys
from pathlib import Path
import numpy as np
from inference.pipeline import Pipeline
for engine in ("onnx", "torch"):
    pipeline = Pipeline(Path(sys.argv[1]), engine=engine)
    pipeline.hybrid.run(np.zeros((5, 256, 256), np.float32))
    print(*sorted({"torch", "torchvision", "torch._dynamo", "segment_anything"} & set(sys.modules)))
import segment_anything
from inference.hybrid.sam import MaskDecoder
print(type(segment_anything.sam_model_registry["vit_b"]().mask_decoder) is MaskDecoder)
"""


def test_no_engine_imports_more_than_it_needs(random_weights: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, str(random_weights)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env=os.environ,
    )
    assert done.stdout.split("\n") == ["", "torch", "True", ""]
