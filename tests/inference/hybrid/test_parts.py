"""Factored forms against the plain ones that they replace, and the CNN's two norms."""

import pytest
import torch
import torch.nn.functional as F

from inference.hybrid import layout
from inference.hybrid.cnn_unet import (
    AttentionStem,
    Conv,
    Depth,
    PlaneConv,
    PlaneUp,
    fold_batch_norms,
)
from inference.hybrid.config import HybridConfig
from inference.hybrid.cross_branch import HEADS, CnnToVit, VitToCnn, unwindow, windows
from inference.hybrid.layout import channel_mean, cut_planes, dot, double_size, join, per_head, plane_mean
from inference.hybrid.mask_decoder import BatchMaskDecoder
from inference.hybrid.sam import SelfAttention
from inference.hybrid.vision_transformer import PlacedAttention

CONFIG = HybridConfig(64, 4, 4, 0, cnn_width=8, prompt_dim=32)


def test_windows_holds_the_pixels_under_each_token() -> None:
    image = torch.arange(64 * 64.0).reshape(1, 64, 64, 1)
    cut = windows(image)
    # token (row 2, column 3) covers rows 8 … 11 and columns 12 … 15
    torch.testing.assert_close(cut[0, 2 * 16 + 3, :, 0].reshape(4, 4), image[0, 8:12, 12:16, 0])
    torch.testing.assert_close(unwindow(cut[..., 0]), image[..., 0])


def test_attention_is_sams() -> None:
    """Of a token grid that is no square, so that rows and columns cannot change places."""
    torch.manual_seed(0)
    ours = PlacedAttention(64, 4, use_rel_pos=True, input_size=(4, 6)).double()
    for table in (ours.rel_pos_h, ours.rel_pos_w):
        torch.nn.init.normal_(table)
    sams = SelfAttention(64, 4, use_rel_pos=True, input_size=(4, 6)).double()
    sams.load_state_dict(ours.state_dict())
    tokens = torch.randn(3, 4, 6, 64).double()
    torch.testing.assert_close(ours(tokens), sams(tokens))


@pytest.mark.parametrize("count", [16, 1])
def test_token_attention_is_multi_head_attention_over_projected_pixels(count: int) -> None:
    torch.manual_seed(0)
    layer = CnnToVit(64, 24).double()
    tokens, pixels = torch.randn(2, 256, 64).double(), torch.randn(2, 256, count, 24).double()

    def split(x: torch.Tensor) -> torch.Tensor:  # (2, 256, n, 64) → (2, 256, heads, n, 8)
        return x.unflatten(-1, (HEADS, -1)).transpose(2, 3)

    query = split(layer.query(layer.norm(tokens))[:, :, None])
    attended = F.scaled_dot_product_attention(query, split(layer.key(pixels)), split(layer.value(pixels)))
    plain = layer.out(attended.transpose(2, 3).flatten(2))
    torch.testing.assert_close(layer(tokens, pixels), plain + 0.5 * layer.adapter(plain))


@pytest.mark.parametrize("count", [16, 1])
def test_pixel_gate_matches_its_definition(count: int) -> None:
    torch.manual_seed(0)
    layer = VitToCnn(64, 24).double()
    tokens, pixels = torch.randn(2, 256, 64).double(), torch.randn(2, 256, count, 24).double()
    match = (layer.pixel(pixels) * tokens[:, :, None]).sum(-1) / 64**0.5
    weight = 0.5 + torch.sigmoid(match.softmax(-1) - 1 / count)
    summary = torch.stack([tokens.mean(-1), tokens.max(-1).values], 1).reshape(2, 2, 16, 16)
    scalar = torch.sigmoid(layer.token_gate(summary)).reshape(2, 256, 1)
    torch.testing.assert_close(layer(tokens, pixels), scalar * weight)


def test_mask_decoder_adds_the_detail_before_the_dot_product() -> None:
    torch.manual_seed(0)
    decoder = BatchMaskDecoder(CONFIG, 8).double()
    image, prompts = torch.randn(3, 32, 16, 16).double(), torch.randn(3, 4, 32).double()
    position, no_mask = torch.randn(1, 32, 16, 16).double(), torch.randn(1, 32, 1, 1).double()
    detail = torch.randn(3, 8, 256, 256).double()
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(3, -1, -1)
    tokens, context = decoder.transformer(
        image + no_mask, position.expand(3, -1, -1, -1), torch.cat([own, prompts], dim=1)
    )
    upscaled = decoder.output_upscaling(context.transpose(1, 2).reshape(3, 32, 16, 16))
    full = F.interpolate(upscaled, size=256, mode="bilinear") + decoder.detail(detail.permute(0, 2, 3, 1)).permute(
        0, 3, 1, 2
    )
    vector = decoder.output_hypernetworks_mlps[0](tokens[:, 1])
    expected = (vector[:, :, None, None] * full).sum(1)
    torch.testing.assert_close(decoder(image, position, prompts, no_mask, detail), expected)


def test_mask_decoder_treats_each_slice_by_itself() -> None:
    torch.manual_seed(0)
    decoder = BatchMaskDecoder(CONFIG, 8)
    image, prompts, detail = torch.randn(3, 32, 16, 16), torch.randn(3, 4, 32), torch.randn(3, 8, 256, 256)
    position, no_mask = torch.randn(1, 32, 16, 16), torch.randn(1, 32, 1, 1)
    together = decoder(image, position, prompts, no_mask, detail)
    for i in range(3):
        alone = decoder(image[i : i + 1], position, prompts[i : i + 1], no_mask, detail[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_means_as_products_are_means(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    torch.testing.assert_close(plane_mean(x), x.mean(dim=(2, 3)))
    torch.testing.assert_close(channel_mean(x), x.mean(dim=1, keepdim=True))


def test_a_graphs_forms_are_torchs(monkeypatch) -> None:
    """Both ways of each operation, on the same maps."""
    torch.manual_seed(0)
    maps, planes = torch.randn(2, 5, 6, 4, 8).double(), torch.randn(3, 6, 4, 8).double()
    weight, bias, vector = torch.randn(6, 4, 2, 2).double(), torch.randn(4).double(), torch.randn(3, 6).double()
    matrices = torch.randn(4, 8, 5).double()
    said = []
    for exporting in (False, True):
        monkeypatch.setattr(layout, "graph", lambda exporting=exporting: exporting)
        said.append(
            [
                cut_planes(maps, 1, 3),
                join([maps, maps[:, :, :2]], 2),
                join([maps, maps[:, 2:]], 1),
                plane_mean(planes),
                channel_mean(planes),
                double_size(planes, weight, bias),
                per_head(planes, matrices),
                dot(vector, planes),
            ]
        )
    for ours, graphs in zip(*said, strict=True):
        torch.testing.assert_close(ours, graphs)
    torch.testing.assert_close(said[0][-2][:, :, 2], planes[:, :, 2] @ matrices[2])
    torch.testing.assert_close(said[0][-1], (vector[:, :, None, None] * planes).sum(dim=1))


@pytest.mark.parametrize(("size", "dilation", "depth"), [(3, 1, Depth.NONE), (3, 3, Depth.SHRINK), (5, 1, Depth.KEEP)])
def test_planes_are_convolved_as_in_3d(size: int, dilation: int, depth: Depth) -> None:
    torch.manual_seed(0)
    layer = PlaneConv(3, 4, size, dilation, depth, bias=True).double()
    x = torch.randn(2, 5, 3, 12, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x).transpose(1, 2), torch.nn.Conv3d.forward(layer, x.transpose(1, 2)))


def test_planes_are_doubled_as_in_3d() -> None:
    torch.manual_seed(0)
    layer = PlaneUp(6, 4).double()
    x = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x).transpose(1, 2), torch.nn.ConvTranspose3d.forward(layer, x.transpose(1, 2)))


def test_cut_planes_have_the_gradient_of_a_cut_in_their_own_layout() -> None:
    maps = torch.randn(5, 6, 3, 7).to(memory_format=torch.channels_last)[None].requires_grad_()
    cut = cut_planes(maps, 1, 2)
    torch.testing.assert_close(cut, maps[:, 1:3])
    (gradient,) = torch.autograd.grad((cut**2).sum(), maps)
    torch.testing.assert_close(gradient[:, 1:3], 2 * maps[:, 1:3])
    assert not gradient[:, [0, 3, 4]].any()
    assert gradient[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("axis", [1, 2])
def test_joined_maps_stay_channels_last(axis: int) -> None:
    maps = [torch.randn(5, 6, 3, 7).to(memory_format=torch.channels_last)[None] for _ in range(2)]
    joined = join(maps, axis)
    torch.testing.assert_close(joined, torch.cat(maps, dim=axis))
    assert joined[0].is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_keeps_the_hu_of_flat_regions_and_layer_norm_does_not() -> None:
    """Two images without an edge, muscle and fat say, far from the border."""
    torch.manual_seed(0)
    change = {}
    for norm in ("layer", "batch"):
        stem = AttentionStem(8, norm, Depth.NONE).eval()
        dark, bright = (stem.near(torch.full((1, 1, 1, 32, 32), grey))[..., 16, 16] for grey in (0.2, 0.5))
        change[norm] = float((bright - dark).abs().max())
    assert change["layer"] < 0.01
    assert change["batch"] > 0.1


def test_folded_batch_norms_change_nothing() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Conv(3, 5, "batch"), Conv(5, 4, "batch", depth=Depth.SHRINK)).double()
    for _ in range(3):
        model(torch.randn(2, 5, 3, 8, 8, dtype=torch.float64) * 4 + 1)  # statistics other than 0 and 1
    x = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    before = model.eval()(x)
    fold_batch_norms(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
