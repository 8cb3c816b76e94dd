"""Sizes written out: the same results for any number of rows, and nothing left of what computed them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from training.graph_sizes import write_out_sizes


def constant(name: str, values: list[int]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64)))


def model_of(nodes: list[onnx.NodeProto], x: list[str | int], **outputs: int) -> onnx.ModelProto:
    """Of an input x of these sides and of outputs, by name, of these types."""
    graph = helper.make_graph(
        nodes,
        "traced",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def traced() -> onnx.ModelProto:
    """x (N, 6) → its rows but the last one as (N − 1, 2, 3), and where each row is greatest, as a trace writes them."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sides"]),
        constant("zero", [0]),
        constant("one", [1]),
        constant("two", [2]),
        helper.make_node("Slice", ["sides", "zero", "one"], ["rows"]),
        helper.make_node("Sub", ["rows", "one"], ["last"]),  # varies, and is no side of a map
        helper.make_node("Slice", ["x", "zero", "last", "zero"], ["most"]),
        helper.make_node("Shape", ["most"], ["sides of most"]),
        helper.make_node("Slice", ["sides of most", "zero", "one"], ["count"]),
        helper.make_node("Slice", ["sides", "one", "two"], ["columns"]),
        helper.make_node("Div", ["columns", "two"], ["half"]),
        helper.make_node("Concat", ["count", "two", "half"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["most", "wanted"], ["y"]),
        helper.make_node("ArgMax", ["x"], ["greatest"], axis=1),  # a whole number, but no size
    ]
    return model_of(nodes, ["n", 6], y=TensorProto.FLOAT, greatest=TensorProto.INT64)


def test_sizes_become_constants_and_results_stay() -> None:
    model = traced()
    rising = np.arange(6, dtype=np.float32)
    write_out_sizes(model, [{"x": np.tile(rising, (rows, 1))} for rows in (4, 7)])
    assert [node.op_type for node in model.graph.node if node.op_type != "Constant"] == [
        "Shape", "Slice", "Sub", "Slice", "Reshape", "ArgMax",
    ]  # fmt: skip
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (reshape,) = [node for node in model.graph.node if node.op_type == "Reshape"]
    assert constants[reshape.input[1]].tolist() == [-1, 2, 3]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((11, 6), np.float32)
    y, greatest = session.run(None, {"x": x})
    np.testing.assert_array_equal(y, x[:10].reshape(10, 2, 3))
    np.testing.assert_array_equal(greatest[:, 0], x.argmax(axis=1))


def test_what_a_kept_node_gives_is_not_written_twice() -> None:
    """Of (N, 6) both sides by one node, of which only the second is the same for all N."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sides"]),
        helper.make_node("Split", ["sides"], ["rows", "columns"]),
        helper.make_node("Concat", ["columns", "rows"], ["y"], axis=0),
    ]
    model = model_of(nodes, ["n", 6], y=TensorProto.INT64)
    write_out_sizes(model, [{"x": np.zeros((rows, 6), np.float32)} for rows in (1, 4)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros((7, 6), np.float32)})[0].tolist() == [6, 7]


def test_what_goes_back_to_its_shape_is_not_reshaped() -> None:
    """x (N, 6) → (1, N, 6) → (1, N, 2, 3) → (N, 6), then the greatest of each row; and once to (N, 3, 2) on the way."""
    nodes = [
        constant("stack", [1, -1, 6]),
        constant("halves", [1, -1, 2, 3]),
        constant("rows", [-1, 6]),
        constant("thirds", [-1, 3, 2]),
        helper.make_node("Reshape", ["x", "stack"], ["stacked"]),
        helper.make_node("Reshape", ["stacked", "halves"], ["halved"]),
        helper.make_node("Reshape", ["halved", "rows"], ["back"]),
        helper.make_node("Reshape", ["halved", "thirds"], ["y"]),
        helper.make_node("ArgMax", ["back"], ["greatest"], axis=1),
    ]
    model = model_of(nodes, ["n", 6], y=TensorProto.FLOAT, greatest=TensorProto.INT64)
    write_out_sizes(model, [{"x": np.zeros((rows, 6), np.float32)} for rows in (1, 4)])
    kept = [node for node in model.graph.node if node.op_type != "Constant"]
    assert [(node.op_type, node.input[0]) for node in kept] == [("Reshape", "x"), ("ArgMax", "x")]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((7, 6), np.float32)
    y, greatest = session.run(None, {"x": x})
    np.testing.assert_array_equal(y, x.reshape(7, 3, 2))
    np.testing.assert_array_equal(greatest[:, 0], x.argmax(axis=1))


def test_a_shape_that_copies_a_side_keeps_what_it_copies_from() -> None:
    """x (n, m) → (1, n·m) → (0, n, −1), where 0 is the side of what is reshaped, 1, and two others vary."""
    nodes = [
        constant("flat", [1, -1]),
        constant("zero", [0]),
        constant("one", [1]),
        constant("rest", [-1]),
        helper.make_node("Reshape", ["x", "flat"], ["row"]),
        helper.make_node("Shape", ["x"], ["sides"]),
        helper.make_node("Slice", ["sides", "zero", "one"], ["count"]),
        helper.make_node("Concat", ["zero", "count", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["row", "wanted"], ["y"]),
    ]
    model = model_of(nodes, ["n", "m"], y=TensorProto.FLOAT)
    write_out_sizes(model, [{"x": np.zeros(shape, np.float32)} for shape in ((2, 3), (5, 7))])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((3, 4), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x[None])


def test_branches_are_refused() -> None:
    inner = helper.make_graph([], "inner", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    model = helper.make_model(helper.make_graph([node], "outer", [], []))
    with pytest.raises(ValueError, match="branches"):
        write_out_sizes(model, [])
