"""What a hybrid network is made of: one frozen dataclass, three presets, saved with the weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

IMAGE_SIZE = 256  # pixels a side of every slice that the network sees
PATCH_SIZE = 16  # pixels a side of one ViT token
TOKENS = IMAGE_SIZE // PATCH_SIZE  # tokens a side
LEVELS = 4  # CNN down levels, each with one exchange
Norm = Literal["layer", "batch"]


@dataclass(frozen=True)
class HybridConfig:
    """Numbers of one hybrid network.

    vit_width, vit_depth, vit_heads: embedding channels, blocks (a multiple of 4) and heads of the ViT.
    vit_window: tokens a side of windowed attention, 0 for full attention; the exchange blocks are always full.
    cnn_width: channels of the CNN at full resolution; they double at each of the four levels.
    prompt_dim: channels of the prompts and of the mask decoder (SAM: 256).
    slices: 5 as the paper, or 1 for its ablation.
    planes_kept: True computes every window by itself with all its planes (the paper's form); False lets the depth
        shrink 5 → 3 → 1 in the first two down levels, so that a whole stack goes through in one pass.
    norm: of the CNN: "layer", over the channels of each pixel, with GELU, as the paper's; "batch", with ReLU, which
        keeps the HU of flat regions, learns faster and is folded into the convolutions for use.
    exchanges, gate, vit, cnn: switches of the ablations: cross-branch exchanges; the classifier's hold on positive
        prompts; what the prompts and the mask decoder see of either branch (nothing: zeros, and no exchanges).
    """

    vit_width: int
    vit_depth: int
    vit_heads: int
    vit_window: int
    cnn_width: int
    prompt_dim: int
    slices: int = 5
    planes_kept: bool = False
    norm: Norm = "layer"
    exchanges: bool = True
    gate: bool = True
    vit: bool = True
    cnn: bool = True

    def __post_init__(self) -> None:
        if self.slices not in (1, 5):
            raise ValueError(f"slices must be 1 or 5, not {self.slices}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {self.norm!r}")
        if not (self.vit or self.cnn):
            raise ValueError("vit and cnn cannot both be off: nothing would be left")
        if self.vit_depth % LEVELS:
            raise ValueError(f"vit_depth must be a multiple of {LEVELS}, not {self.vit_depth}")

    @property
    def radius(self) -> int:
        """Neighbouring slices needed on each side of a target slice."""
        return self.slices // 2

    @property
    def exchange_blocks(self) -> tuple[int, ...]:
        """Indices of the ViT blocks that an exchange follows: 2, 5, 8, 11 of 12."""
        step = self.vit_depth // LEVELS
        return tuple(range(step - 1, self.vit_depth, step))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HybridConfig:
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown hybrid settings {sorted(unknown)}: the weights are newer than this program")
        return cls(**values)


PRESETS = {
    "paper": HybridConfig(768, 12, 12, 8, cnn_width=48, prompt_dim=256, planes_kept=True),
    "base": HybridConfig(768, 12, 12, 8, cnn_width=48, prompt_dim=256),
    "small": HybridConfig(192, 8, 6, 0, cnn_width=16, prompt_dim=128, norm="batch"),
}
