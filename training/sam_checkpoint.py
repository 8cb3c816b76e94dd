"""An official SAM ViT-B checkpoint as an optional start of `base` and `paper`.

Position tables are brought from 1024 to 256 pixels: the absolute one and the global blocks' relative ones by
interpolation (the image spans fewer tokens), the windowed blocks' by their middle (a window spans fewer tokens, but one
token further means the same). SAM's pixel normalisation is folded into the patch embedding, since slices are [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.hybrid.model import Hybrid

PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53])  # of SAM, for 0 … 255
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375])
PLACES = {"image_encoder.": "vit.", "prompt_encoder.": "prompt_encoder.sam.", "mask_decoder.": "mask_decoder."}
OURS = ".adapter."  # in SAM's ViT, and not of it
UNUSED = (  # no mask prompts, no quality head, mask token 0 only
    "prompt_encoder.mask_downscaling.",
    "mask_decoder.iou_prediction_head.",
    *(f"mask_decoder.output_hypernetworks_mlps.{i}." for i in (1, 2, 3)),
)


def read_sam(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint file. ValueError where it is none."""
    try:
        return dict(torch.load(path, weights_only=True, map_location="cpu"))
    except FileNotFoundError:
        raise
    except Exception as error:  # the bytes of another file can lead to any
        raise ValueError(f"{path}: cannot be read as a checkpoint: give an official sam_vit_b checkpoint") from error


def load_sam(model: Hybrid, sam: Mapping[str, Tensor]) -> list[str]:
    """Copy SAM's weights into `model`; the names of the parameters set. ValueError where the checkpoint is no ViT-B."""
    own = model.state_dict()
    blocks = model.config.exchange_blocks
    new = {}
    for name, value in sam.items():
        if name.startswith(UNUSED):
            continue
        prefix = next((p for p in PLACES if name.startswith(p)), None)
        target = PLACES[prefix] + name.removeprefix(prefix) if prefix else name
        if target not in own:
            raise ValueError(f"{name} has no place in this network: give an official sam_vit_b checkpoint")
        new[target] = fit(target, value.float(), own[target].shape, blocks)
    lacking = sorted(name for name in own if name.startswith("vit.") and OURS not in name and name not in new)
    if lacking:
        raise ValueError(f"{lacking[0]} is not in it: give an official sam_vit_b checkpoint")
    fold_normalisation(new)
    model.load_state_dict(new, strict=False)
    return sorted(new)


def fit(name: str, value: Tensor, shape: torch.Size, global_blocks: tuple[int, ...]) -> Tensor:
    """`value` in `shape`; only position tables and mask tokens may differ."""
    if value.shape == shape:
        return value
    if name == "vit.pos_embed":
        return F.interpolate(value.permute(0, 3, 1, 2), shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
    if ".rel_pos_" in name and int(name.split(".")[2]) in global_blocks:
        return F.interpolate(value.T[None], shape[0], mode="linear")[0].T
    if ".rel_pos_" in name and value.shape[0] > shape[0]:
        margin = (value.shape[0] - shape[0]) // 2
        return value[margin : margin + shape[0]]
    if name == "mask_decoder.mask_tokens.weight":
        return value[:1]
    raise ValueError(f"{name}: {tuple(value.shape)} does not fit {tuple(shape)}: give an official sam_vit_b checkpoint")


def fold_normalisation(state: dict[str, Tensor]) -> None:
    """Make the patch embedding of a [0, 1] image what SAM's is of (255 · image − mean) / std."""
    weight = state["vit.patch_embed.proj.weight"]
    shift = (weight.sum(dim=(2, 3)) * (PIXEL_MEAN / PIXEL_STD)).sum(dim=1)
    state["vit.patch_embed.proj.bias"] = state["vit.patch_embed.proj.bias"] - shift
    state["vit.patch_embed.proj.weight"] = weight * (255 / PIXEL_STD)[:, None, None]
