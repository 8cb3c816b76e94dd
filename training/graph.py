"""The hybrid network as an ONNX graph without weights: in use it takes those of the safetensors file, by their names.

So both engines run the same numbers, and a release holds them once.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inference.hybrid.config import IMAGE_SIZE, HybridConfig
from inference.hybrid.model import Hybrid
from inference.hybrid.torch_engine import run_stack
from inference.onnx_session import Session
from training.graph_sizes import write_out_sizes
from training.unet import OPSET

TARGETS = 3  # of the example that is traced; any number goes through the graph
PARITY = 1e-3  # largest difference that the graph may show, of logits relative to the largest one
NOWHERE = "given-when-loaded"  # no file: ONNX Runtime is given the values


class Deployed(nn.Module):
    """The network as it ships: what `SliceNetwork.run` says, of tensors."""

    def __init__(self, network: Hybrid) -> None:
        super().__init__()
        self.network = network

    def forward(self, slices: Tensor, slice_threshold: Tensor) -> tuple[Tensor, Tensor]:
        self.network.prompt_encoder.presence_threshold = slice_threshold
        return run_stack(self.network, slices)


class Graph(NamedTuple):
    """content: of the .onnx file; unused: weights that nothing in it asks for, as in an ablation's network."""

    content: bytes
    unused: list[str]


def export_graph(state: Mapping[str, Tensor], config: HybridConfig) -> Graph:
    """The graph for weights of `config`, for any number of slices. RuntimeError where it differs from torch."""
    network = Hybrid(config)
    network.load_state_dict({name: value.float() for name, value in state.items()})
    module = Deployed(network.eval().requires_grad_(False))
    model = _trace(module)
    write_out_sizes(model, [_example(network.config, targets) for targets in (TARGETS - 2, TARGETS + 1)])
    graph = _without_weights(model, _weights(network))
    check_parity(module, graph)
    return graph


def _example(config: HybridConfig, targets: int) -> dict[str, NDArray[np.float32]]:
    slices = np.random.default_rng(0).random((targets + 2 * config.radius, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    return {"slices": slices, "slice_threshold": np.array(0.5, np.float32)}


@torch.no_grad()
def _trace(module: Deployed) -> onnx.ModelProto:
    example = [torch.from_numpy(value) for value in _example(module.network.config, TARGETS).values()]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = Path(folder) / "graph.onnx"
        # what is taken for constant are sides of maps, which are
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            module,
            tuple(example),
            str(path),
            input_names=["slices", "slice_threshold"],
            output_names=["logits", "presence"],
            dynamic_axes={"slices": {0: "planes"}, "logits": {0: "targets"}, "presence": {0: "targets"}},
            opset_version=OPSET,
            do_constant_folding=False,  # every weight stays as it is stored; ONNX Runtime folds when it loads
            training=torch.onnx.TrainingMode.PRESERVE,  # as do the batch norms
            dynamo=False,
        )
        return onnx.load(path)


def _without_weights(model: onnx.ModelProto, weights: Mapping[str, Tensor]) -> Graph:
    """Weights become references, under the names that they have in the network."""
    prefix, used = "network.", set[str]()
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name.removeprefix(prefix) in weights:
                node.input[index] = name.removeprefix(prefix)
                used.add(node.input[index])
    others = [tensor for tensor in model.graph.initializer if tensor.name.removeprefix(prefix) not in weights]
    del model.graph.initializer[:]
    model.graph.initializer.extend(others + [_reference(name, weights[name].shape) for name in sorted(used)])
    return Graph(bytes(model.SerializeToString()), sorted(set(weights) - used))


def _reference(name: str, shape: torch.Size) -> onnx.TensorProto:
    """A float32 tensor that is elsewhere."""
    tensor = onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    places = {"location": NOWHERE, "offset": "0", "length": str(4 * shape.numel())}
    for key, value in places.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _weights(network: Hybrid) -> dict[str, Tensor]:
    """All that is stored of a network, but for counters."""
    return {name: value for name, value in network.state_dict().items() if value.is_floating_point()}


@torch.inference_mode()
def check_parity(module: Deployed, graph: Graph) -> float:
    """The largest difference of the graph, at another number of slices. RuntimeError where it exceeds 1e-3."""
    weights = {name: value.numpy() for name, value in _weights(module.network).items() if name not in graph.unused}
    session = Session("hybrid", graph.content, weights=weights)
    slices, worst = torch.rand(2 * TARGETS + 1 + 2 * module.network.config.radius, IMAGE_SIZE, IMAGE_SIZE), 0.0
    for threshold in (0.0, 1.1):  # all slices with positive prompts, and none
        expected = module(slices, torch.tensor(threshold))
        found = session.run({"slices": slices.numpy(), "slice_threshold": np.array(threshold, np.float32)})
        for one, other in zip(expected, found, strict=True):
            scale = max(1.0, float(one.abs().max()))
            worst = max(worst, float(np.abs(one.numpy() - other).max()) / scale)
    if not worst <= PARITY:
        raise RuntimeError(f"the hybrid's ONNX graph and torch differ by {worst:.2e}, more than {PARITY}")
    return worst
