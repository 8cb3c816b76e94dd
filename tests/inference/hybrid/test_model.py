"""The hybrid network: sizes, the stacked form against the windowed one, and that each part matters."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from inference.hybrid.config import PRESETS, HybridConfig
from inference.hybrid.model import Hybrid

TINY = HybridConfig(64, 4, 4, 0, cnn_width=8, prompt_dim=32)


def build(config: HybridConfig, seed: int = 0) -> Hybrid:
    torch.manual_seed(seed)
    model = Hybrid(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # zero-initialised parts (relative positions) must take part too
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def windows(stack: Tensor, slices: int = 5) -> Tensor:
    """(D, H, W) → (D − slices + 1, slices, H, W), written without unfold."""
    return torch.stack([stack[i : i + slices] for i in range(len(stack) - slices + 1)])


def parameters(model: Hybrid) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_paper_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert parameters(Hybrid(PRESETS["paper"])) == pytest.approx(153.53e6, rel=0.01)


def test_base_has_about_the_planned_number_of_parameters() -> None:
    with torch.device("meta"):
        assert parameters(Hybrid(PRESETS["base"])) == pytest.approx(125e6, rel=0.03)


def test_small_is_small() -> None:
    model = build(PRESETS["small"])
    assert parameters(model) <= 14e6
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 20, 256, 256))
    assert counter.get_total_flops() / 2 / 16 <= 6e9  # multiply-adds a slice, in batches of 16


@pytest.mark.parametrize("config", [TINY, PRESETS["small"], replace(TINY, slices=1), replace(TINY, vit_window=8)])
def test_stack_equals_windows_in_float64(config: HybridConfig) -> None:
    model = build(config).double()
    stack = torch.rand(7, 256, 256, dtype=torch.float64)
    together, single = model(stack[None]), model(windows(stack, config.slices))
    assert together.logits.shape == (1, 8 - config.slices, 256, 256)
    torch.testing.assert_close(together.logits[0], single.logits[:, 0], rtol=0, atol=1e-9)
    torch.testing.assert_close(together.presence[0], single.presence[:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["small", "base"])
def test_stack_equals_windows_in_float32(name: str) -> None:
    model = build(PRESETS[name])
    stack = torch.rand(6, 256, 256)
    together, single = model(stack[None]).logits[0], model(windows(stack)).logits[:, 0]
    assert (together - single).abs().max() <= 1e-5 * single.abs().max()


def test_paper_takes_one_window_at_a_time() -> None:
    model = build(replace(TINY, planes_kept=True))
    assert model(torch.rand(2, 5, 256, 256)).logits.shape == (2, 1, 256, 256)
    with pytest.raises(ValueError, match="exactly 5 slices"):
        model(torch.rand(1, 6, 256, 256))
    with pytest.raises(ValueError, match="at least 5 slices"):
        build(TINY)(torch.rand(1, 4, 256, 256))


@pytest.mark.parametrize("planes_kept", [False, True])
def test_reach_is_two_slices(planes_kept: bool) -> None:
    model = build(replace(TINY, planes_kept=planes_kept)).double()
    stack = torch.rand(7, 256, 256, dtype=torch.float64)

    def logits(x: Tensor) -> Tensor:  # of slice 3, whose window is 1 … 5
        return model(windows(x)).logits[1, 0] if planes_kept else model(x[None]).logits[0, 1]

    before = logits(stack)
    for neighbour in (0, 6):
        changed = stack.clone()
        changed[neighbour] = torch.rand(256, 256)
        torch.testing.assert_close(logits(changed), before, rtol=0, atol=1e-12)
    for neighbour in (1, 2, 4, 5):
        changed = stack.clone()
        changed[neighbour] = torch.rand(256, 256)
        assert (logits(changed) - before).abs().max() > 1e-6


def test_one_slice_sees_no_neighbour() -> None:
    model = build(replace(TINY, slices=1)).double()
    stack = torch.rand(1, 3, 256, 256, dtype=torch.float64)
    before = model(stack).logits[0, 1]
    stack[0, [0, 2]] = 0
    torch.testing.assert_close(model(stack).logits[0, 1], before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", range(4))
def test_each_exchange_changes_both_branches(level: int) -> None:
    model = build(TINY)
    exchange = model.exchanges[level]
    side, channels = 256 >> (level + 1), model.cnn.widths[level + 1]
    tokens, maps = torch.randn(2, 3, 16, 16, TINY.vit_width), torch.randn(2, 3, channels, side, side)
    changed_tokens, changed_maps = exchange(tokens, maps)
    assert changed_tokens.shape == tokens.shape
    assert changed_maps.shape == maps.shape
    other_tokens, other_maps = exchange(tokens + torch.randn_like(tokens), maps + torch.randn_like(maps))
    assert (changed_tokens - tokens).abs().amax(dim=(2, 3, 4)).min() > 1e-3
    assert (changed_maps - maps).abs().amax(dim=(2, 3, 4)).min() > 1e-3
    # what crosses over depends on the other branch
    assert (exchange(tokens, maps * 0.5)[0] - changed_tokens).abs().max() > 1e-4
    assert (exchange(tokens * 0.5, maps)[1] - changed_maps).abs().max() > 1e-4
    assert not torch.equal(other_tokens, changed_tokens)
    assert not torch.equal(other_maps, changed_maps)


def test_exchanges_can_be_switched_off() -> None:
    stack = torch.rand(1, 5, 256, 256)
    on = build(TINY)
    off = build(replace(TINY, exchanges=False))
    off.load_state_dict(on.state_dict())
    assert (on(stack).logits - off(stack).logits).abs().max() > 1e-5
    # without exchanges the ViT sees the target alone: its neighbours reach the logits through the CNN only
    image = off.vit(stack[0, 2:3])
    torch.testing.assert_close(off._encode(stack, 1)[0], image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", ["vit", "cnn"])
def test_a_branch_can_be_switched_off(branch: str) -> None:
    """Then its weights change nothing any more, and the other's still do."""
    model, stack = build(replace(TINY, **{branch: False})), torch.rand(1, 5, 256, 256)
    before, present = model(stack), torch.ones(1, 1, dtype=torch.bool)
    shown = model(stack, present).logits
    for name, matters in ((branch, False), ("cnn" if branch == "vit" else "vit", True)):
        for parameter in getattr(model, name).parameters():
            parameter.mul_(1.5)
        assert ((model(stack, present).logits - shown).abs().max() > 1e-5) == matters
        assert ((model(stack).presence - before.presence).abs().max() > 1e-6) == matters
    with pytest.raises(ValueError, match="cannot both be off"):
        replace(TINY, vit=False, cnn=False)


def prompts(model: Hybrid, present: bool) -> Tensor:
    sides = (16, 32, 64, 128, 256)
    maps = [torch.rand(1, width, side, side) for width, side in zip(model.cnn.widths[::-1], sides, strict=True)]
    torch.manual_seed(1)
    return model.prompt_encoder([*maps, torch.rand(1, TINY.prompt_dim, 16, 16)], torch.tensor([present])).sparse[0]


def test_absent_replaces_exactly_the_positive_point_and_the_box() -> None:
    model = build(TINY)
    torch.manual_seed(3)
    shown = prompts(model, True)
    torch.manual_seed(3)
    withheld = prompts(model, False)
    not_a_point = model.prompt_encoder.sam.not_a_point_embed.weight[0]
    for index in (0, 2, 3):  # positive point, two corners
        torch.testing.assert_close(withheld[index], not_a_point)
        assert (shown[index] - not_a_point).abs().max() > 1e-3
    torch.testing.assert_close(withheld[1], shown[1])  # the negative point stays


def test_classifier_gates_where_no_truth_is_given() -> None:
    model = build(TINY)
    stack = torch.rand(1, 5, 256, 256)
    truth = {present: model(stack, torch.tensor([[present]])).logits for present in (False, True)}
    assert (truth[True] - truth[False]).abs().max() > 1e-5
    for present in (False, True):
        model.prompt_encoder.classifier.bias.copy_(torch.tensor([0.0, 100.0 if present else -100.0]))
        torch.testing.assert_close(model(stack).logits, truth[present])


def test_the_gates_threshold_is_a_probability() -> None:
    model = build(TINY)
    stack = torch.rand(1, 5, 256, 256)
    presence = float(model(stack).presence.softmax(dim=-1)[0, 0, 1])
    truth = {present: model(stack, torch.tensor([[present]])).logits for present in (False, True)}
    for threshold, shown in ((presence - 0.01, True), (presence + 0.01, False)):
        model.prompt_encoder.presence_threshold = threshold
        torch.testing.assert_close(model(stack).logits, truth[shown])


def test_gate_can_be_switched_off() -> None:
    model = build(replace(TINY, gate=False))
    stack = torch.rand(1, 5, 256, 256)
    absent, present = (model(stack, torch.tensor([[truth]])).logits for truth in (False, True))
    torch.testing.assert_close(absent, present)


def test_presets_survive_the_manifest() -> None:
    for config in PRESETS.values():
        assert HybridConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="brand_new"):
        HybridConfig.from_dict({**TINY.to_dict(), "brand_new": 1})
    with pytest.raises(ValueError, match="norm must be one of layer, batch, not 'group'"):
        HybridConfig.from_dict({**TINY.to_dict(), "norm": "group"})


def test_exchanges_follow_blocks_2_5_8_11() -> None:
    assert PRESETS["paper"].exchange_blocks == (2, 5, 8, 11)
    assert PRESETS["small"].exchange_blocks == (1, 3, 5, 7)


def test_cnn_alone_is_the_networks_start() -> None:
    """At first the hypernetwork's vector is near one, so whole network and CNN alone differ by the ViT's share only."""
    model = build(TINY)
    hypernetwork = model.mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    hypernetwork.weight.zero_()  # exactly one
    model.mask_decoder.output_upscaling[-2].weight.zero_()  # the ViT's share: GELU(0) = 0
    model.mask_decoder.output_upscaling[-2].bias.zero_()
    off = replace(TINY, exchanges=False)
    alone = Hybrid(off).eval().requires_grad_(False)
    alone.load_state_dict(model.state_dict())
    stack = torch.rand(2, 6, 256, 256)
    torch.testing.assert_close(alone.cnn_alone(stack), alone(stack).logits, atol=1e-5, rtol=1e-4)
    assert alone.cnn_alone(torch.rand(1, 5, 96, 64)).shape == (1, 1, 96, 64)
