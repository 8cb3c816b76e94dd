"""The sliding window against MONAI's, resampling against torch's, the session's choice of device."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from onnx import load as load_model
from scipy.ndimage import gaussian_filter

from inference.onnx_session import Session
from inference.slices import window
from inference.unet import UNet, UNetConfig, channels, gaussian, patch_layout, patch_within, resample
from training.unet import PlanesConvTranspose3d, Probability, build_unet, check_parity, export_onnx

CONFIG = UNetConfig(4, patch=(16, 32, 32))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_unet(CONFIG).eval()


@pytest.fixture(scope="module")
def onnx(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "unet.onnx"
    assert export_onnx(network, CONFIG, path) < 1e-4
    return path


@torch.inference_mode()
def test_a_transposed_convolution_plane_by_plane_is_torchs() -> None:
    plain = torch.nn.ConvTranspose3d(3, 5, 2, stride=2)
    planes = PlanesConvTranspose3d(3, 5, 2, stride=2)
    planes.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 5, 6)
    torch.testing.assert_close(planes(x), plain(x))


def test_no_transposed_convolution_of_a_file_is_in_3d(onnx) -> None:
    graph = load_model(onnx).graph
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    assert [ranks[node.input[1]] for node in graph.node if node.op_type == "ConvTranspose"] == [4] * 6


def scan(shape=(40, 50, 60), seed=0) -> np.ndarray:
    """Smooth random HU."""
    return gaussian_filter(np.random.default_rng(seed).normal(0, 1500, shape), 1).astype(np.int16)


@pytest.mark.parametrize(
    ("shape", "overlap", "starts", "side"),
    [
        ((16, 32, 32), 0.5, ([0], [0], [0]), (16, 32, 32)),
        ((10, 3, 20), 0.5, ([0], [0], [0]), (16, 32, 32)),  # never thinner than these
        # 40 = 16 · (1 + 3 · 0.5) takes four; one of 40 would leave no room for the others' 32 × 32
        ((40, 32, 32), 0.5, ([0, 8, 16, 24], [0], [0]), (16, 32, 32)),
        ((41, 32, 32), 0.5, ([0, 6, 12, 19, 25], [0], [0]), (16, 32, 32)),  # a fifth for the last slice
        ((16, 40, 40), 0.25, ([0], [0, 8], [0, 8]), (16, 32, 32)),
        ((16, 57, 32), 0.25, ([0], [0, 12, 25], [0]), (16, 32, 32)),
    ],
)
def test_patch_positions_by_hand(shape, overlap, starts, side) -> None:
    layout = patch_layout(shape, replace(CONFIG, overlap=overlap))
    assert tuple(axis.side for axis in layout) == side
    assert tuple(axis.starts(n) for axis, n in zip(layout, shape, strict=True)) == starts


def test_a_patch_is_as_long_as_needed_and_fewer_are_longer() -> None:
    """512×512×100 voxels of 0.8×0.8×3 mm: nnU-Net's 2 × 3 × 3 patches of 96×128×128 would compute 28 million."""
    config = UNetConfig(overlap=0.25)
    assert patch_layout((100, 205, 205), config) == ((1, 104), (2, 120), (2, 120))  # 6.0 million; 205 / 1.75 → 118
    assert patch_layout((100, 288, 20), replace(config, patch=(100, 160, 20), overlap=0.2))[1] == (2, 160)
    for shape in ((500, 205, 205), (353, 150, 220), (30, 300, 300)):
        layout = patch_layout(shape, config)
        assert np.prod([axis.side for axis in layout]) <= np.prod(config.patch)
        for size, axis in zip(shape, layout, strict=True):
            assert axis.starts(size)[0] == 0
            assert axis.starts(size)[-1] + axis.side >= size
            overlaps = axis.side - np.diff(axis.starts(size))
            assert (overlaps >= 0.25 * axis.side - 1).all()  # starts are whole voxels


def test_gaussian_is_monais() -> None:
    from monai.data.utils import compute_importance_map

    expected = compute_importance_map((16, 32, 24), mode="gaussian", sigma_scale=0.125)
    np.testing.assert_allclose(gaussian((16, 32, 24)), expected.numpy(), atol=1e-6)


def test_blend_is_monais_sliding_window(network, onnx) -> None:
    hu = scan((24, 48, 64))  # patches of both at the same places: every step divides
    unet = UNet(onnx.read_bytes(), CONFIG)
    ours = unet.probabilities(hu, CONFIG.spacing_mm).grid
    with torch.inference_mode():
        expected = sliding_window_inference(
            torch.from_numpy(channels(hu.astype(np.float32), CONFIG))[None],
            CONFIG.patch,
            1,
            Probability(network),
            overlap=0.5,
            mode="gaussian",
        )
    np.testing.assert_allclose(ours, expected[0, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 200, 3), (40, 33, 100)])
def test_small_and_odd_volumes(onnx, shape) -> None:
    probability = UNet(onnx.read_bytes(), CONFIG).probabilities(scan(shape), (5.0, 0.9, 0.7))
    plane = probability.slice(shape[0] - 1)
    assert plane.shape == shape[1:]
    assert plane.min() >= 0
    assert plane.max() <= 1


def test_air_is_skipped_and_healthy(onnx) -> None:
    unet = UNet(onnx.read_bytes(), CONFIG)
    unet.session.inner.run = None  # would fail if it were called
    assert not unet.probabilities(np.full((8, 8, 8), -1000, np.int16), CONFIG.spacing_mm).grid.any()


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [((30, 60, 50), (2.0, 1.0, 0.8), (20, 30, 20)), ((6, 20, 32), (9.0, 4.0, 2.5), (18, 40, 40))],
)
def test_resampling_is_torchs_axis_by_axis(shape, spacing, size) -> None:
    hu = scan(shape)
    expected = torch.from_numpy(hu.astype(np.float32))
    for axis in range(3):
        lines = expected.movedim(axis, -1)[None]
        resized = F.interpolate(lines, (lines.shape[2], size[axis]), mode="bilinear", antialias=True)
        expected = resized[0].movedim(-1, axis)
    np.testing.assert_allclose(resample(hu, spacing, UNetConfig()), expected.numpy(), atol=0.05)


def test_a_lump_comes_back_where_it_was(onnx) -> None:
    """Resample a smooth lump to the network's grid and back to the scan's: it hardly changes."""
    from inference.unet import GridProbability

    shape, spacing = (40, 90, 70), (2.5, 0.9, 1.1)
    z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    lump = np.exp(-((z - 40) ** 2 + (y - 30) ** 2 + (x - 50) ** 2) / (2 * 12**2)).astype(np.float32)
    back = GridProbability(resample(lump, spacing, CONFIG), shape, spacing, CONFIG.spacing_mm)
    for index in (0, 16, 39):
        np.testing.assert_allclose(back.slice(index), lump[index], atol=0.03)


def test_channels_are_tissue_and_lung() -> None:
    hu = np.array([[[-1300.0, -200.0, 300.0]]], np.float32)
    np.testing.assert_allclose(channels(hu, CONFIG), [window(hu), window(hu, (-1300, 300))])


def test_cuda_that_is_not_there_is_told(onnx, caplog) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with caplog.at_level(logging.WARNING):
        unet = UNet(onnx.read_bytes(), CONFIG, "cuda:0")
    assert unet.session.on_cpu
    assert "runs on the CPU" in caplog.text


def test_a_device_that_fails_in_the_middle_is_left_for_the_cpu(onnx, caplog) -> None:
    """A session that fails as CUDA's would, once: the patch is computed again, to the same result."""

    class Failing:
        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def run(self, *_: object) -> None:
            raise RuntimeError("BFCArena: failed to allocate memory\nand more")

    hu = np.random.default_rng(0).integers(-100, 300, (20, 40, 40)).astype(np.int16)
    unet = UNet(onnx.read_bytes(), CONFIG)
    expected = unet.probabilities(hu, (3.0, 2.0, 2.0)).grid
    unet.session.inner = Failing()
    np.testing.assert_array_equal(unet.probabilities(hu, (3.0, 2.0, 2.0)).grid, expected)
    assert "failed on its device (BFCArena: failed to allocate memory) and goes on" in caplog.text


def test_a_network_that_cannot_run_its_patch_is_told(onnx) -> None:
    unet = UNet(onnx.read_bytes(), replace(CONFIG, windows_hu=CONFIG.windows_hu[:1]))
    with pytest.raises(ValueError, match="ONNX file cannot be run"):
        unet.probabilities(np.zeros((20, 40, 40), np.int16), (3.0, 2.0, 2.0))


def test_a_file_that_is_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="ONNX file cannot be used"):
        UNet(b"nonsense", CONFIG)


def test_an_export_that_differs_is_refused(network, onnx) -> None:
    other = Probability(build_unet(CONFIG)).eval()
    with pytest.raises(RuntimeError, match="differ"):
        check_parity(other, onnx, torch.rand(1, 2, 16, 16, 16))


@pytest.mark.parametrize(("features", "millions"), [(32, 5.6), (16, 1.4)])
def test_size_is_the_winners(features, millions) -> None:
    model = build_unet(UNetConfig(features))
    heads = sum(p.numel() for n, p in model.named_parameters() if "deep_supervision" in n or "heads" in n)
    total = sum(p.numel() for p in model.parameters()) - heads
    assert total / 1e6 == pytest.approx(millions, rel=0.02)


def test_patches_shrink_to_the_memory_there_is(onnx, caplog) -> None:
    """8 maps of 16 channels of 96×128×128 float32 are 768 MiB; each halving of the longest side halves that."""
    config = UNetConfig(16)
    assert patch_within(config, 768) == config
    assert patch_within(config, 767).patch == (96, 64, 128)
    assert patch_within(config, 200).patch == (96, 64, 64)
    assert patch_within(config, 0).patch == (24, 32, 32)
    assert caplog.messages[0].startswith("little memory: patches of [96, 64, 128] voxels instead of (96, 128, 128)")


def test_smaller_patches_say_nearly_the_same(onnx) -> None:
    hu = np.random.default_rng(0).integers(-100, 300, (40, 70, 70)).astype(np.int16)
    unet = UNet(onnx.read_bytes(), UNetConfig(CONFIG.features, patch=(32, 64, 64)))
    whole = unet.probabilities(hu, (3.0, 2.0, 2.0)).grid
    parts = unet.probabilities(hu, (3.0, 2.0, 2.0), memory_mib=1).grid
    assert 0 < np.abs(parts - whole).mean() < 0.02


def test_config_survives_the_manifest() -> None:
    assert UNetConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_a_device_without_room_for_the_network_is_left_for_the_cpu(onnx, caplog, monkeypatch) -> None:
    """As where another process holds all of a GPU's memory: the session cannot even be made there."""
    make = Session._open

    def no_room(session: Session, device: str, gpu_memory_mib: int):
        if device != "cpu":
            raise RuntimeError("CUDA failure 2: out of memory\nand more")
        return make(session, device, gpu_memory_mib)

    monkeypatch.setattr(Session, "_open", no_room)
    unet = UNet(onnx.read_bytes(), CONFIG, "cuda:0")
    assert unet.session.on_cpu
    assert caplog.messages == ["cuda:0 cannot take the UNet (CUDA failure 2: out of memory): it runs on the CPU"]
