"""segment-anything's parts come without the rest of its package, and the rest can still be had."""

import subprocess
import sys

STARTED = """
import sys
import inference.pipeline
print(*sorted({"torchvision", "torch._dynamo", "segment_anything"} & set(sys.modules)))
import segment_anything
from inference.hybrid.sam import MaskDecoder
print(type(segment_anything.sam_model_registry["vit_b"]().mask_decoder) is MaskDecoder)
"""


def test_a_start_imports_neither_torchvision_nor_a_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", "True", ""]
