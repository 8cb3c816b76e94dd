"""A random checkpoint in SAM's own layout, 1024-pixel positions included, loads into both ViT-B presets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from segment_anything import sam_model_registry

from inference.hybrid.config import PRESETS
from inference.hybrid.model import Hybrid
from training.sam_checkpoint import UNUSED, load_sam


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    model = sam_model_registry["vit_b"]()
    for name, parameter in model.named_parameters():
        if "pos" in name:  # zeros in a fresh model
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ["base", "paper"])
def test_every_weight_finds_its_place(sam, name: str) -> None:
    model = Hybrid(PRESETS[name])
    state = sam.state_dict()
    assert state["image_encoder.pos_embed"].shape == (1, 64, 64, 768)
    loaded = load_sam(model, state)
    used = [key for key in state if not key.startswith(UNUSED)]
    assert len(loaded) == len(used) > 150
    own = model.state_dict()
    for ours, theirs in (
        ("vit.blocks.7.mlp.lin2.weight", "image_encoder.blocks.7.mlp.lin2.weight"),
        ("vit.neck.2.weight", "image_encoder.neck.2.weight"),
        ("prompt_encoder.sam.point_embeddings.1.weight", "prompt_encoder.point_embeddings.1.weight"),
        (
            "mask_decoder.transformer.layers.1.cross_attn_image_to_token.v_proj.bias",
            "mask_decoder.transformer.layers.1.cross_attn_image_to_token.v_proj.bias",
        ),
    ):
        torch.testing.assert_close(own[ours], state[theirs])
    torch.testing.assert_close(own["mask_decoder.mask_tokens.weight"][0], state["mask_decoder.mask_tokens.weight"][0])
    # 4×4 tokens of 1024 pixels become one of 256; a linear ramp stays one
    ramp = state | {"image_encoder.pos_embed": torch.linspace(0, 1, 64)[None, :, None, None].expand(1, 64, 64, 768)}
    load_sam(model, ramp)
    rows = model.state_dict()["vit.pos_embed"][0, 4:12, 3, 5]
    torch.testing.assert_close(rows, (torch.arange(4, 12) * 4 + 1.5) / 63, atol=1e-5, rtol=0)
    # windowed: the same distance in tokens keeps its entry; global: ends meet ends
    table = state["image_encoder.blocks.0.attn.rel_pos_h"]
    torch.testing.assert_close(own["vit.blocks.0.attn.rel_pos_h"], table[6:21])
    whole = state["image_encoder.blocks.2.attn.rel_pos_w"]
    assert own["vit.blocks.2.attn.rel_pos_w"].shape == (31, 64)
    torch.testing.assert_close(own["vit.blocks.2.attn.rel_pos_w"][15], whole[63], atol=1e-5, rtol=0)


def test_patch_embedding_sees_what_sams_saw(sam) -> None:
    model = Hybrid(PRESETS["base"])
    load_sam(model, sam.state_dict())
    slices = torch.rand(1, 256, 256)
    colour = (255 * slices[:, None].expand(-1, 3, -1, -1) - sam.pixel_mean) / sam.pixel_std
    expected = F.conv2d(colour, sam.image_encoder.patch_embed.proj.weight, sam.image_encoder.patch_embed.proj.bias, 16)
    embedded = model.vit.embed(slices) - model.vit.pos_embed
    torch.testing.assert_close(embedded.permute(0, 3, 1, 2), expected, atol=2e-3, rtol=1e-3)


def test_another_model_is_refused(sam) -> None:
    with pytest.raises(ValueError, match="sam_vit_b"):
        load_sam(Hybrid(PRESETS["small"]), sam.state_dict())
    with pytest.raises(ValueError, match="no place"):
        load_sam(Hybrid(PRESETS["base"]), {"encoder.layer.0": torch.zeros(1)})
    whole = sam.state_dict()
    for lacking in ("image_encoder.patch_embed.proj.weight", "image_encoder.blocks.7.mlp.lin1.bias"):
        with pytest.raises(ValueError, match="is not in it: give an official sam_vit_b checkpoint"):
            load_sam(Hybrid(PRESETS["base"]), {name: value for name, value in whole.items() if name != lacking})
