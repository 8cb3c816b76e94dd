"""What a traced graph computes of sizes, and need not.

A trace asks every map for its sides and computes with them; of the hybrid's graph that is two thirds, and most of the
time that ONNX Runtime needs to load it. What is found to be the same for two numbers of slices is written out as a
constant. And maps go from planes to stacks and back between any two steps of the network; in ONNX Runtime each turn
keeps one convolution from taking the other's result in the layout that both prefer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Feed = Mapping[str, NDArray[np.float32]]
Found = dict[str, NDArray[np.generic]]
VARYING = -1  # as `Reshape` has it


def write_out_sizes(model: onnx.ModelProto, examples: Sequence[Feed]) -> None:
    """Change `model` in place, which gives the same as before. ValueError where it holds branches or loops.

    examples: inputs for which all that depends on their size differs: not all of even or of odd sizes, say.
    """
    if any(attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute):
        raise ValueError("a graph with branches or loops: what they ask for is not looked into")
    sizes, reshaped = _sizes(model), [node for node in model.graph.node if node.op_type == "Reshape"]
    reshaped = [node for node in reshaped if node.output[0] not in sizes]
    asked = {_shape_name(value): value for node in reshaped for value in (node.input[0], node.output[0])}
    found = [_values(model, sizes, asked, feed) for feed in examples]
    first, *others = found
    known = {name: first[name] for name in sizes if all(_equal(first[name], other[name]) for other in others)}
    written = []
    for node in reshaped:
        name = _shape_name(node.output[0])
        varies = np.any([first[name] != other[name] for other in others], axis=0)
        if varies.sum() <= 1:
            known[name] = np.where(varies, VARYING, first[name]).astype(np.int64)
            node.input[1] = name
            written.append(node)
    _skip_round_trips(model, written, found)
    _replace(model, known)


def _skip_round_trips(model: onnx.ModelProto, reshaped: Sequence[onnx.NodeProto], found: Sequence[Found]) -> None:
    """What is reshaped to the shape that it once had is not reshaped; `found` tells the shapes, of each example.

    reshaped: to shapes that are constants without zeros, which would copy a side of what is reshaped.
    """
    origin: dict[str, str] = {}  # of what was reshaped, however often
    for node in reshaped:
        node.input[0] = origin[node.output[0]] = origin.get(node.input[0], node.input[0])
    same = {
        made: before
        for made, before in origin.items()
        if all(_equal(values[_shape_name(made)], values[_shape_name(before)]) for values in found)
    }
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]


def _sizes(model: onnx.ModelProto) -> list[str]:
    """Whatever is computed from shapes and constants alone."""
    known, sizes = set[str](), list[str]()
    for node in model.graph.node:
        if node.op_type in ("Shape", "Constant") or (node.input and known.issuperset(filter(None, node.input))):
            known.update(node.output)
            sizes += [] if node.op_type == "Constant" else node.output
    return sizes


def _values(model: onnx.ModelProto, sizes: Sequence[str], shapes_of: Mapping[str, str], feed: Feed) -> Found:
    """Of one run: the values of `sizes`, and the shapes of values, under the names that `shapes_of` gives them."""
    asking = onnx.ModelProto()
    asking.CopyFrom(model)
    names = [*sizes, *shapes_of]
    asking.graph.node.extend(helper.make_node("Shape", [value], [name]) for name, value in shapes_of.items())
    del asking.graph.output[:]
    asking.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(asking.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def _shape_name(value: str) -> str:
    return f"{value}.shape"


def _equal(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _replace(model: onnx.ModelProto, known: Mapping[str, NDArray[np.generic]]) -> None:
    """Constants for what is known; nodes whose results nobody asks for go."""
    asked, kept = {output.name for output in model.graph.output}, []
    for node in reversed(model.graph.node):
        if asked.intersection(node.output) and not known.keys() >= set(node.output):
            asked.update(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    made = {name for node in kept for name in node.output}
    constants = [name for name in known if name in asked and name not in made]
    model.graph.initializer.extend(numpy_helper.from_array(known[name], name) for name in constants)
