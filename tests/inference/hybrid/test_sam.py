"""segment-anything's parts come without the rest of its package, and the rest can still be had."""

import os
import subprocess
import sys
from pathlib import Path

STARTED = """
import sys
from pathlib import Path
import torch
from inference.hybrid.predict import run_stack
from inference.pipeline import Pipeline
pipeline = Pipeline(Path(sys.argv[1]))
run_stack(pipeline.hybrid, torch.rand(5, 256, 256))
print(*sorted({"torchvision", "torch._dynamo", "segment_anything"} & set(sys.modules)))
import segment_anything
from inference.hybrid.sam import MaskDecoder
print(type(segment_anything.sam_model_registry["vit_b"]().mask_decoder) is MaskDecoder)
"""


def test_neither_torchvision_nor_a_compiler_is_imported(random_weights: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, str(random_weights)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env=os.environ,
    )
    assert done.stdout.split("\n") == ["", "True", ""]
