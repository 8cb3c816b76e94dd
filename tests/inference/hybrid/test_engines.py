"""Both engines of the hybrid give the same, from one set of weights, for any number of slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from inference.hybrid.config import HybridConfig
from inference.hybrid.model import Hybrid
from inference.hybrid.onnx_engine import OnnxHybrid
from inference.hybrid.predict import NotFiniteError, batch_for, even_batch, predict_slices, sigmoid
from inference.hybrid.torch_engine import TorchHybrid
from inference.pipeline import open_hybrid
from inference.slices import SliceGrid
from inference.weights import Gate, read_manifest
from training.release import Recipe, release

TINY = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16)


def trained(config: HybridConfig) -> Hybrid:
    """Random weights, and batch norms that would show if they were left out."""
    torch.manual_seed(0)
    network = Hybrid(config)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return network


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, norm="batch"),
        replace(TINY, planes_kept=True, vit_window=8),
        replace(TINY, slices=1, exchanges=False),
        replace(TINY, vit=False),  # and so weights that no graph asks for
        replace(TINY, cnn=False, gate=False),
    ],
    ids=["stacked", "windowed", "one slice", "no ViT", "no CNN, no gate"],
)
def test_engines_agree(random_weights: Path, tmp_path: Path, config: HybridConfig) -> None:
    network = trained(config)
    recipe = Recipe("x", config, unet=read_manifest(random_weights).unet, gate=Gate(0.0))
    release(network.state_dict(), (random_weights / "unet.onnx").read_bytes(), recipe, tmp_path)
    manifest = read_manifest(tmp_path)
    engines = OnnxHybrid(manifest), TorchHybrid.load(manifest)
    rng = np.random.default_rng(0)
    for targets in (2, 5):
        images = rng.random((targets + 2 * config.radius, 256, 256), np.float32)
        for threshold in (0.0, 0.5, 1.1):
            said = []
            for engine in engines:
                engine.slice_threshold = threshold
                said.append(engine.run(images))
            (ours, presence), (expected, present) = said
            assert ours.shape == (targets, 256, 256)
            np.testing.assert_allclose(ours, expected, atol=1e-3 * max(1, np.abs(expected).max()))
            np.testing.assert_allclose(presence, present, atol=1e-4)


def test_sides_of_maps_are_not_asked_for_in_use(random_weights: Path) -> None:
    """Without `write_out_sizes` a graph asks some 400 times."""
    graph = onnx.load(random_weights / "hybrid.onnx", load_external_data=False).graph
    assert sum(node.op_type == "Shape" for node in graph.node) < 40


def test_the_threshold_withholds_prompts(random_weights: Path) -> None:
    engine = OnnxHybrid(read_manifest(random_weights))
    images = np.random.default_rng(0).random((5, 256, 256), np.float32)
    said = []
    for threshold in (0.0, 1.1):
        engine.slice_threshold = threshold
        said.append(engine.run(images)[0])
    assert np.abs(said[0] - said[1]).max() > 1e-3


def test_an_unknown_set_of_weights_is_refused(random_weights: Path, tmp_path: Path) -> None:
    """A graph of one network and the weights of another."""
    manifest = replace(read_manifest(random_weights), unused=("mask_decoder.detail.weight",))
    with pytest.raises(ValueError, match="the hybrid's ONNX file cannot be used"):
        OnnxHybrid(manifest)


def test_values_that_are_not_finite_are_refused(random_weights: Path) -> None:
    engine = open_hybrid("onnx", read_manifest(random_weights), "cpu", 0)
    said = np.full((3, 256, 256), np.nan, np.float32), np.zeros(3, np.float32)
    engine.run = lambda *_, **__: said
    with pytest.raises(NotFiniteError, match="run it with --device cpu"):
        predict_slices(engine, SliceGrid((3, 20, 20), (3.0, 2.0, 2.0)), np.zeros((3, 20, 20), np.int16))


class Cramped:
    """A session on a GPU with room for so many planes at once."""

    def __init__(self, planes: int) -> None:
        self.planes, self.tried = planes, list[int]()

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def run(self, _: None, inputs: dict[str, np.ndarray], __: None) -> list[np.ndarray]:
        self.tried.append(len(inputs["slices"]))
        if self.tried[-1] > self.planes:
            raise RuntimeError("BFCArena: failed to allocate memory")
        return [np.zeros((self.tried[-1] - 4, 256, 256), np.float32), np.zeros(self.tried[-1] - 4, np.float32)]


@pytest.mark.parametrize(("planes", "tried", "batch"), [(8, [12, 8], 4), (4, [12, 8, 6, 5], 8)])
def test_a_cramped_gpu_gets_smaller_batches_and_is_left_at_last(
    random_weights: Path, caplog, planes: int, tried: list[int], batch: int
) -> None:
    """Eight target slices, and halves of it; four of them fit, or not even one."""
    engine = OnnxHybrid(read_manifest(random_weights))
    cramped = engine.session.inner = Cramped(planes)
    hu = np.full((16, 20, 20), -300, np.int16)
    found = predict_slices(engine, SliceGrid(hu.shape, (3.0, 2.0, 2.0)), hu)
    assert cramped.tried[: len(tried)] == tried
    assert engine.batch == batch
    assert engine.session.on_cpu == (planes == 4)
    assert "BFCArena" in caplog.text
    assert found.probability.shape == (16, 256, 256)


def test_sigmoid_by_hand() -> None:
    with np.errstate(all="raise"):
        found = sigmoid(np.array([-1000, -np.log(3), 0, np.log(3), 1000], np.float32))
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 1], atol=1e-7)


def test_batches_by_hand() -> None:
    """16 maps of 4 channels of 256² numbers are 16 MiB a slice in float32; the weights take 4 MiB."""
    assert batch_for(TINY, 2**20, 4 + 5 * 16, 4) == 5
    assert batch_for(TINY, 2**20, 1, 4) == 1
    assert batch_for(TINY, 2**20, 4000, 4) == 8
    assert batch_for(TINY, 2**20, float("inf"), 4) == 8
    assert batch_for(replace(TINY, planes_kept=True), 2**20, 4 + 5 * 16, 4) == 1


@pytest.mark.parametrize(
    ("count", "most", "size"), [(1, 8, 1), (8, 8, 8), (9, 8, 5), (16, 8, 8), (17, 8, 6), (100, 8, 8), (5, 1, 1)]
)
def test_batches_are_equal_and_few(count: int, most: int, size: int) -> None:
    assert even_batch(count, most) == size
