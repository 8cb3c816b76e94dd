"""segment-anything's building blocks, unchanged, without the package's front door.

`import segment_anything` also brings its demo's predictor and mask generator, and with them torchvision and torch's
compiler: none of that is used here, and it would cost every start a second. So the package is put in place without
running its `__init__` while the parts are imported; whoever imports it later runs that, and gets these same parts
(by `from segment_anything.modeling import …`; as an attribute, `modeling` is missing then).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec

PACKAGE = "segment_anything"


@contextmanager
def without_front_door() -> Iterator[None]:
    """Within, submodules of the package can be imported, and its `__init__` has not run."""
    if PACKAGE in sys.modules:
        yield
        return
    spec = find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: pip install -r requirements-torch.txt", name=PACKAGE)
    sys.modules[PACKAGE] = module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[PACKAGE]


with without_front_door():
    from segment_anything.modeling.common import MLPBlock
    from segment_anything.modeling.image_encoder import Attention as SelfAttention
    from segment_anything.modeling.image_encoder import ImageEncoderViT, get_rel_pos
    from segment_anything.modeling.mask_decoder import MaskDecoder
    from segment_anything.modeling.prompt_encoder import PromptEncoder
    from segment_anything.modeling.transformer import Attention, TwoWayTransformer

__all__ = [
    "Attention",
    "ImageEncoderViT",
    "MLPBlock",
    "MaskDecoder",
    "PromptEncoder",
    "SelfAttention",
    "TwoWayTransformer",
    "get_rel_pos",
]
