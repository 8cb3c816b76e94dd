"""ONNX files that reach for other files, bring operators of their own, or are damaged: refused by name.

Files are made, and understood, by the `onnx` package, which the check does without.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper, numpy_helper

from inference import onnx_session
from inference.onnx_check import check_onnx
from inference.onnx_session import Session
from inference.weights import WEIGHTS_FOLDER

REFUSED = r"^the UNet's ONNX file cannot be used \(.*\): copy the weights again$"
PLACES = ["/etc/hostname", "../secret.bin", "secret.bin", "*/_ORT_MEM_ADDR_/*"]  # the last: ONNX Runtime's own memory


def check(content: bytes | onnx.ModelProto, *supplied: str) -> None:
    check_onnx(content if isinstance(content, bytes) else content.SerializeToString(), supplied, "UNet")


def refuse(content: bytes | onnx.ModelProto, *supplied: str) -> str:
    with pytest.raises(ValueError, match=REFUSED) as caught:
        check(content, *supplied)
    return str(caught.value)


def inside(name: str = "w") -> TensorProto:
    return numpy_helper.from_array(np.ones(2, np.float32), name)


def outside(place: str = "/etc/hostname", name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"offset": "0", "location": place, "length": "8"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph(*nodes: onnx.NodeProto, tensors: list[TensorProto] | None = None) -> onnx.GraphProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    return helper.make_graph(list(nodes), "g", [x], [y], tensors)


def model(*nodes: onnx.NodeProto, tensors: list[TensorProto] | None = None, **others: Any) -> onnx.ModelProto:
    adds = helper.make_node("Add", ["x", "w"], ["y"])
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph(adds, *nodes, tensors=tensors), opset_imports=opsets, ir_version=8, **others)


def branches(name: str, inner: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["c"], ["z"], name=name, then_branch=graph(), else_branch=inner)


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[9])


def sparse_initializer(tensor: TensorProto) -> onnx.ModelProto:
    whole = model()
    whole.graph.sparse_initializer.append(sparse(inside(), tensor))
    return whole


def training(tensor: TensorProto) -> onnx.ModelProto:
    whole = model()
    whole.training_info.add().algorithm.CopyFrom(graph(tensors=[tensor]))
    return whole


def attribute(value: Any) -> onnx.ModelProto:
    return model(helper.make_node("Constant", [], ["k"], value=value))


NESTED: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "constant": attribute,
    "list of constants": lambda tensor: attribute([inside(), tensor]),
    "sparse constant": lambda tensor: attribute(sparse(tensor, inside())),
    "list of sparse constants": lambda tensor: attribute([sparse(inside(), tensor)]),
    "sparse initializer": sparse_initializer,
    "branch": lambda tensor: model(branches("if", graph(tensors=[tensor]))),
    "constant of a branch": lambda tensor: model(branches("if", attribute(tensor).graph)),
    "branch of a branch": lambda tensor: model(branches("if", graph(branches("inner", graph(tensors=[tensor]))))),
    "list of graphs": lambda tensor: attribute([graph(), graph(tensors=[tensor])]),
    "training": training,
}


def test_the_shipped_networks_pass() -> None:
    for path in sorted(WEIGHTS_FOLDER.glob("*/*.onnx")):
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        supplied = [tensor.name for tensor in tensors if tensor.external_data]
        assert bool(supplied) == (path.name == "hybrid.onnx")
        check(path.read_bytes(), *supplied)
        if supplied:
            assert repr(supplied[7]) in refuse(path.read_bytes(), *supplied[:7], *supplied[8:])


@pytest.mark.parametrize("place", PLACES)
def test_another_file_is_refused_with_the_tensor_and_the_place(place: str) -> None:
    check(model(tensors=[inside()]))
    assert f"its tensor 'w' is stored elsewhere, in '{place}'" in refuse(model(tensors=[outside(place)]), "v")


@pytest.mark.parametrize("where", NESTED)
@pytest.mark.parametrize("place", PLACES[:2])
def test_another_file_is_refused_wherever_it_is_named(where: str, place: str) -> None:
    """Even where a tensor has a name that is supplied: ONNX Runtime takes only the main graph's."""
    check(NESTED[where](inside()))
    assert f"its tensor 'w' is stored elsewhere, in '{place}'" in refuse(NESTED[where](outside(place)), "w")


def test_what_is_supplied_may_be_elsewhere_once() -> None:
    check(model(tensors=[outside(), outside(name="v"), inside("u")]), "w", "v")
    assert "its tensor 'w'" in refuse(model(tensors=[outside(), outside()]), "w")


@pytest.mark.parametrize("put", [lambda tensor: model(tensors=[tensor]), NESTED["branch"]], ids=["main", "branch"])
def test_either_sign_of_another_file_suffices(put: Callable[[TensorProto], onnx.ModelProto]) -> None:
    """A place without a data location, a data location without a place; a location that says "here" is none."""
    tensor = outside()
    tensor.ClearField("data_location")
    assert "in '/etc/hostname'" in refuse(put(tensor))
    tensor = outside()
    tensor.ClearField("external_data")
    assert "in None" in refuse(put(tensor))
    tensor = inside()
    tensor.data_location = TensorProto.DEFAULT
    check(put(tensor))


def field(number: int, content: bytes, size: int | None = None) -> bytes:
    """A field of a message; protobuf merges what comes twice. size: what it claims to be."""
    return varint(number << 3 | 2) + varint(len(content) if size is None else size) + content


def varint(value: int) -> bytes:
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


def with_initializer(tensor: bytes) -> bytes:
    return model().SerializeToString() + field(7, field(5, tensor))


def test_of_two_names_the_last_counts() -> None:
    """Otherwise a supplied name would cover a file."""
    twice = outside(name="w").SerializeToString() + field(8, b"v")
    assert onnx.load_from_string(with_initializer(twice)).graph.initializer[0].name == "v"
    check(with_initializer(twice), "v")
    assert "its tensor 'v'" in refuse(with_initializer(twice), "w")


def test_a_name_is_not_taken_for_another_by_bytes_that_are_no_text() -> None:
    named = outside(name="").SerializeToString() + field(8, b"\xff")
    assert r"its tensor '\udcff'" in refuse(with_initializer(named), "\ufffd", "?", "")


def test_a_long_name_is_told_in_short() -> None:
    assert len(refuse(model(tensors=[outside("/" * 10**6, "\n" * 50)]))) < 400


FOREIGN = helper.make_node("EPContext", ["x"], ["z"], domain="com.microsoft")


@pytest.mark.parametrize(
    "whole",
    [model(FOREIGN), model(branches("if", graph(FOREIGN))), attribute([graph(FOREIGN)])],
    ids=["main graph", "branch", "list of graphs"],
)
def test_an_operator_that_is_not_of_onnx_is_refused(whole: onnx.ModelProto) -> None:
    assert "its operator 'EPContext' is of 'com.microsoft', not of ONNX" in refuse(whole)


def test_a_function_of_the_file_is_refused() -> None:
    opsets = [helper.make_opsetid("", 17)]
    own = helper.make_function("", "Relu", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
    assert "it defines an operator of its own, 'Relu'" in refuse(model(functions=[own]))


@pytest.mark.parametrize("tag", [b"\x3a", b"\xba\x00", b"\xba\x80\x80\x80\x00"], ids=["short", "long", "longest"])
def test_a_tag_may_be_longer_than_it_need_be(tag: bytes) -> None:
    node = field(4, b"Relu") + tag + b"\x03own"
    assert onnx.NodeProto.FromString(node).domain == "own"
    assert "its operator 'Relu' is of 'own'" in refuse(model().SerializeToString() + field(7, field(1, node)))


def test_bytes_that_readers_understand_differently_are_refused() -> None:
    good = model(tensors=[inside()]).SerializeToString()
    check(good + field(1000, b"of a later version"))
    for tail in (
        b"\xba\x80\x80\x80\x10\x03own",  # the tag of a domain, and a bit beyond its 32
        b"\x00\x00",  # field 0
        b"\x23\x24",  # a group
        b"\x08" + b"\x80" * 10 + b"\x00",  # a number of 11 bytes
    ):
        assert "it is damaged or cut short" in refuse(good + tail)


def test_a_file_that_onnx_runtime_takes_for_its_own_format_is_refused(tmp_path: Path) -> None:
    options = onnx_session.ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.log_severity_level = 3
    onnx_session.ort.InferenceSession(model(tensors=[inside()]).SerializeToString(), options)
    assert "no graph in ONNX's format" in refuse((tmp_path / "model.ort").read_bytes())
    disguised = b"\x12\xff\x00\x00ORTM" + bytes(300)
    assert "no graph in ONNX's format" in refuse(disguised)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x08", bytes(100), b"\x80" * 100])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    refuse(content)


def test_a_claimed_size_takes_no_memory() -> None:
    good = model(tensors=[inside()]).SerializeToString()
    tracemalloc.start()
    try:
        for size in (2**31 - 1, 2**40, 2**69):
            assert "damaged or cut short" in refuse(good + field(7, field(5, b"w", size)))
            assert "damaged or cut short" in refuse(good + field(7, b"", size))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_graphs_within_graphs_end_somewhere() -> None:
    depths = {}
    for depth in (20, 20000):
        inner = b""
        for _ in range(depth):
            inner = field(1, field(5, field(6, inner)))
        depths[depth] = model().SerializeToString() + field(7, inner)
    check(depths[20])
    refuse(depths[20000])


# --- damage ---------------------------------------------------------------------------------------------------------


def keeps_to_itself(message: Message) -> bool:
    """The check, by the `onnx` package: of all messages within a message."""
    if isinstance(message, TensorProto):
        return not message.external_data and message.data_location == TensorProto.DEFAULT
    if isinstance(message, onnx.FunctionProto) or (isinstance(message, onnx.NodeProto) and message.domain):
        return False
    return all(keeps_to_itself(part) for part in parts(message))


def parts(message: Message) -> Iterator[Message]:
    for description, value in message.ListFields():
        if description.message_type:
            yield from [value] if isinstance(value, Message) else value


def judge(content: bytes) -> str:
    """Refused by a sentence, or accepted; never what the `onnx` package finds to reach out, nor any other error."""
    said = None
    try:
        check(content)
    except ValueError as error:
        said = str(error)
    if said is not None:
        assert said.startswith("the UNet's ONNX file cannot be used (")
        return "refused"
    try:
        assert keeps_to_itself(onnx.ModelProto.FromString(content))
    except DecodeError:
        return "left to ONNX Runtime"
    return "accepted"


UNET = (WEIGHTS_FOLDER / "small" / "unet.onnx").read_bytes()
SPOILT = {
    "clean": model(branches("if", attribute([inside(), inside()]).graph), tensors=[inside()]),
    "foreign": model(branches("if", graph(FOREIGN))),
    "elsewhere": model(branches("if", attribute([inside(), outside()]).graph), tensors=[inside()]),
}


@pytest.mark.parametrize("content", [UNET, SPOILT["clean"].SerializeToString()], ids=["UNet", "small"])
def test_a_file_that_is_cut_short_is_refused(content: bytes) -> None:
    """Wherever its graph is cut; what follows the graph tells the version."""
    assert judge(content) == "accepted"
    end = content.rindex(onnx.ModelProto.FromString(content).graph.output[-1].SerializeToString())
    for cut in [0, 1, end, *np.random.default_rng(0).integers(0, end, 300)]:
        assert judge(content[:cut]) == "refused"


@pytest.mark.parametrize("name", SPOILT)
def test_a_thousand_damaged_files(name: str) -> None:
    random, seen = np.random.default_rng(len(name)), Counter[str]()
    original = SPOILT[name].SerializeToString()
    for _ in range(1000):
        content = bytearray(original)
        for place in random.integers(0, len(content), random.integers(1, 4)):
            content[place] ^= 1 << random.integers(8) if random.random() < 0.5 else random.integers(1, 256)
        seen[judge(bytes(content))] += 1
    assert seen["refused"] > 100
    assert seen["accepted"] > (100 if name == "clean" else 0)


# --- where it is asked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [model(tensors=[outside()]), model(FOREIGN, tensors=[inside()])])
def test_onnx_runtime_never_sees_what_is_refused(whole: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Session("UNet", model(tensors=[inside()]).SerializeToString()).on_cpu
    monkeypatch.setattr(onnx_session.ort, "InferenceSession", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match=REFUSED):
        Session("UNet", whole.SerializeToString())


def test_a_session_may_be_supplied_with_values() -> None:
    content = model(tensors=[outside()]).SerializeToString()
    session = Session("UNet", content, weights={"w": np.float32([3, 4])})
    np.testing.assert_array_equal(session.run({"x": np.float32([1, 1])})[0], [4, 5])
    for values in (np.ones(3, np.float32), np.ones((1, 2), np.float32), np.ones(2, np.float64), np.ones(2, np.int32)):
        with pytest.raises(ValueError, match=REFUSED):
            Session("UNet", content, weights={"w": values})
