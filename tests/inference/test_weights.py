"""Weights: checksums, foreign files, settings that do not fit; and the way back from a release."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from inference.hybrid.onnx_engine import OnnxHybrid
from inference.hybrid.torch_engine import load_hybrid
from inference.unet import UNet
from inference.weights import WEIGHTS_FOLDER, Manifest, find_weights, read_manifest


@pytest.fixture
def weights(random_weights: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(random_weights, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_file(folder: Path, part: str, content: bytes) -> None:
    """With its checksum, as whoever makes a folder of weights can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / manifest[part]["file"]).write_bytes(content)
    edit(folder, lambda m: m[part].update(sha256=hashlib.sha256(content).hexdigest()))


def test_a_release_loads_as_it_was(weights: Path) -> None:
    from inference.hybrid.model import Hybrid

    manifest = read_manifest(weights)
    torch.manual_seed(0)
    model = load_hybrid(manifest)
    assert not model.training
    reference = Hybrid(manifest.hybrid)
    assert {n: p.shape for n, p in model.state_dict().items()} == {
        n: p.shape for n, p in reference.state_dict().items()
    }
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.state_dict().values())
    stack = torch.rand(1, 5, 256, 256)
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(stack).logits, reference.eval()(stack).logits)


def test_the_hybrids_matrices_are_stored_in_float16(weights: Path) -> None:
    with safe_open(weights / "hybrid.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors if tensor.ndim > 1} == {torch.float16}
    assert {tensor.dtype for tensor in tensors if tensor.ndim < 2} == {torch.float32}


def test_batch_norms_load_folded_and_the_slices_gate_as_the_manifest_says(weights: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from inference.hybrid.model import Hybrid
    from inference.weights import Gate
    from training.release import Recipe, release

    torch.manual_seed(0)
    config = replace(read_manifest(weights).hybrid, norm="batch")
    trained = Hybrid(config)
    for module in trained.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(1e5)  # which float16 cannot hold
            module.weight.data.fill_(300.0)
    recipe = Recipe("batch", config, unet=read_manifest(weights).unet, gate=Gate(0.0, slice_threshold=0.25))
    release(trained.state_dict(), (weights / "unet.onnx").read_bytes(), recipe, tmp_path / "batch")
    loaded = load_hybrid(read_manifest(tmp_path / "batch"))
    assert loaded.prompt_encoder.presence_threshold == 0.25
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in loaded.modules())
    stack = torch.rand(1, 6, 256, 256)
    present = torch.ones(1, 2, dtype=torch.bool)
    exact, found = trained.eval()(stack, present).logits, loaded(stack, present).logits
    assert (found - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize(
    ("part", "file"), [("hybrid", "hybrid.safetensors"), ("graph", "hybrid.onnx"), ("unet", "unet.onnx")]
)
def test_one_changed_byte_is_found(weights: Path, part: str, file: str) -> None:
    content = bytearray((weights / file).read_bytes())
    content[len(content) // 2] ^= 1
    (weights / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: the checksum differs"):
        read_manifest(weights).read(part)


def test_pickle_is_refused_by_name_and_by_content(weights: Path) -> None:
    torch.save({"x": torch.zeros(1)}, weights / "hybrid.pt")
    checksum = hashlib.sha256((weights / "hybrid.pt").read_bytes()).hexdigest()
    edit(weights, lambda m: m["hybrid"].update(file="hybrid.pt", sha256=checksum))
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        load_hybrid(read_manifest(weights))
    (weights / "hybrid.pt").rename(weights / "disguised.safetensors")
    edit(weights, lambda m: m["hybrid"].update(file="disguised.safetensors"))
    with pytest.raises(ValueError, match="do not fit"):
        load_hybrid(read_manifest(weights))


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_weights_are_refused(weights: Path, size: int) -> None:
    replace_file(weights, "hybrid", (weights / "hybrid.safetensors").read_bytes()[:size])
    with pytest.raises(ValueError, match=r"the hybrid weights cannot be read \(.*\): copy them again"):
        OnnxHybrid(read_manifest(weights))
    with pytest.raises(ValueError, match="the hybrid weights do not fit their settings"):
        load_hybrid(read_manifest(weights))


CHANGED = "mask_decoder.detail.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(CHANGED), f"its tensor '{CHANGED}' is stored elsewhere"),
        (lambda state: state.update({CHANGED: state[CHANGED].to(torch.uint8)}), f"its tensor '{CHANGED}' is stored"),
        (lambda state: state.update({CHANGED: state[CHANGED].flatten()}), "dimensions do not match"),
        (lambda state: state.update({CHANGED: state[CHANGED][:-1].clone()}), "dimensions do not match"),
        (lambda state: state.update(spare=torch.zeros(3)), "spare"),
    ],
    ids=["missing", "another type", "another rank", "another shape", "one too many"],
)
def test_weights_that_do_not_fit_the_graph_are_refused(
    weights: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    state = load((weights / "hybrid.safetensors").read_bytes())
    change(state)
    replace_file(weights, "hybrid", save(state))
    with pytest.raises(ValueError, match=rf"^the hybrid's ONNX file cannot be used \(.*{words}.*\): copy the weights"):
        OnnxHybrid(read_manifest(weights))


def test_weights_of_a_type_that_numpy_lacks_are_refused(weights: Path) -> None:
    state = load((weights / "hybrid.safetensors").read_bytes())
    replace_file(weights, "hybrid", save(state | {CHANGED: state[CHANGED].bfloat16()}))
    with pytest.raises(ValueError, match=r"the hybrid weights cannot be read \(.*BF16.*\): copy them again"):
        OnnxHybrid(read_manifest(weights))


OPEN: dict[str, Callable[[Manifest], object]] = {
    "graph": OnnxHybrid,
    "unet": lambda manifest: UNet(manifest.read("unet"), manifest.unet),
}


@pytest.mark.parametrize("place", ["/etc/hostname", "../secret.bin", "hybrid.safetensors"])
@pytest.mark.parametrize("part", OPEN)
def test_a_network_that_reads_another_file_is_refused(weights: Path, part: str, place: str) -> None:
    import onnx

    model = onnx.load_from_string(read_manifest(weights).read(part))
    tensor = model.graph.initializer.add(name="mine", dims=[1], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    replace_file(weights, part, model.SerializeToString())
    with pytest.raises(ValueError, match=f"its tensor 'mine' is stored elsewhere, in '{place}'"):
        OPEN[part](read_manifest(weights))


def test_a_file_outside_the_folder_is_refused(weights: Path) -> None:
    edit(weights, lambda m: m["unet"].update(file="../unet.onnx"))
    with pytest.raises(ValueError, match="beside the manifest"):
        read_manifest(weights).read("unet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=99), "format 99 is unknown"),
        (lambda m: m.pop("fusion"), "'fusion' is missing"),
        (lambda m: m["fusion"].update(typo=1), "typo"),
        (lambda m: m["hybrid"]["config"].update(slices=4), "slices must be 1 or 5"),
        (lambda m: m["hybrid"]["config"].update(future=4), "future"),
        (lambda m: m["unet"]["config"].update(future=4), "future"),
        (lambda m: m["hybrid"].update(plane="oblique"), "plane 'oblique' is none of axial, coronal, sagittal"),
        (lambda m: m["hybrid"].update(resize="shrink"), "resize 'shrink' is none of stretch, square"),
        (lambda m: m["hybrid"].update(window_hu=[300, 300]), "the window 300 to 300 HU is empty"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(weights: Path, change: Callable, words: str) -> None:
    edit(weights, change)
    with pytest.raises(ValueError, match=words) as caught:
        read_manifest(weights)
    assert "manifest.json" in str(caught.value)


def test_weights_of_another_size_are_refused(weights: Path) -> None:
    edit(weights, lambda m: m["hybrid"]["config"].update(cnn_width=8))
    with pytest.raises(ValueError, match="do not fit"):
        load_hybrid(read_manifest(weights))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["gate"].update(scan_threshold="x"),
        lambda m: m["unet"]["config"].update(spacing_mm=[3]),
        lambda m: m.update(hybrid=3),
        lambda m: m.update(fusion=[1]),
    ],
    ids=["a threshold that is no number", "one spacing", "a part that is a number", "a list"],
)
def test_a_manifest_of_wrong_types_is_refused(weights: Path, change: Callable) -> None:
    edit(weights, change)
    with pytest.raises(ValueError, match=r"manifest\.json: is no manifest of weights"):
        read_manifest(weights)


def test_a_unet_that_gives_another_shape_is_refused(weights: Path) -> None:
    """Its values would be spread over the patch."""
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 2, None, None, None])
    small = helper.make_tensor_value_info("probability", TensorProto.FLOAT, None)
    mean = helper.make_node("ReduceMean", ["image"], ["probability"], keepdims=1)
    model = helper.make_model(
        helper.make_graph([mean], "g", [image], [small]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    replace_file(weights, "unet", model.SerializeToString())
    manifest = read_manifest(weights)
    unet = UNet(manifest.read("unet"), manifest.unet)
    with pytest.raises(ValueError, match=r"the UNet gave \(1, 1, 1, 1, 1\) for a patch of"):
        unet.probabilities(np.full((16, 32, 32), 40, np.int16), manifest.unet.spacing_mm)


def test_names_that_no_file_system_takes(weights: Path) -> None:
    (weights / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        read_manifest(weights)
    with pytest.raises(ValueError, match="no weights there"):
        find_weights("w" * 300)


def test_a_manifest_that_is_no_json(weights: Path) -> None:
    (weights / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_manifest(weights)


def test_names_and_folders_are_found(random_weights: Path) -> None:
    assert find_weights(str(random_weights)) == random_weights
    with pytest.raises(ValueError, match="no weights there"):
        find_weights("unheard-of")


def test_a_name_is_never_that_of_a_folder_which_happens_to_lie_there(random_weights: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(random_weights, tmp_path / "small")
    shutil.copytree(random_weights, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert find_weights("small") == WEIGHTS_FOLDER / "small"
    assert find_weights("./small") == find_weights("small/") == Path("small")
    assert find_weights("mine") == Path("mine")
