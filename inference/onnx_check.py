"""Whether an .onnx file keeps to itself: no values from other files, no operators but ONNX's own.

A folder of weights may come from anywhere, and its checksums from the same hand as its files. What decides is in few
fields, so protobuf's wire format is walked for these (the image holds no `onnx`); ONNX Runtime judges the rest. What
it could understand in another way than the walk does is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping

VARINT, BYTES = 0, 2  # wire types: a number; a length and as many bytes, of text or of a message
FIXED_BYTES = {1: 8, 5: 4}  # of the other wire types; ONNX has no groups
VARINT_BYTES, LEAST_TAG, TAGS = 10, 8, 2**32  # protobuf's limits: past them its readers differ
DEEPEST = 100  # messages within each other, as in protobuf
TOLD = 200  # characters of what is wrong: names in the file may be long
ORT_FORMAT = b"ORTM"  # after four bytes: ONNX Runtime would take the file for one of its own format
Span = tuple[int, int]  # where a message or another value starts and ends


def _tags(parts: Mapping[int, str], wire: int = BYTES) -> dict[int, str]:
    return {number << 3 | wire: part for number, part in parts.items()}


# Fields that lead to tensors and operators, by their numbers in onnx.proto, and what is in them. ONNX Runtime is given
# values for initializers of the main graph alone: for one of a subgraph it would look into the file that is named.
FIELDS = {
    "model": _tags({7: "main graph", 20: "training", 25: "function"}),
    "main graph": _tags({1: "node", 5: "initializer", 15: "sparse"}),
    "graph": _tags({1: "node", 5: "tensor", 15: "sparse"}),
    "training": _tags({1: "graph", 2: "graph"}),
    "node": _tags({5: "attribute", 7: "domain"}),
    "attribute": _tags({5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"}),
    "sparse": _tags({1: "tensor", 2: "tensor"}),
    "tensor": _tags({13: "elsewhere"}) | _tags({14: "elsewhere"}, VARINT),
    "initializer": _tags({13: "elsewhere or supplied"}) | _tags({14: "elsewhere or supplied"}, VARINT),
}
GRAPH, FUNCTION_NAME, OPERATOR, DOMAIN, TENSOR_NAME, EXTERNAL_DATA, KEY, VALUE = 7, 1, 4, 7, 8, 13, 1, 2


def check_onnx(content: bytes, supplied: Collection[str], name: str) -> None:
    """content: of the .onnx file; supplied: initializers that ONNX Runtime is given, by name; name: of the network.

    ValueError where the bytes are no model, where a tensor that is not supplied is stored outside of them, and where
    an operator is none of ONNX's own.
    """
    try:
        _check(content, set(supplied))
    except (ValueError, LookupError) as error:
        said = str(error)[:TOLD] if isinstance(error, ValueError) else "it is damaged or cut short"
        raise ValueError(f"the {name}'s ONNX file cannot be used ({said}): copy the weights again") from error


def _check(content: bytes, awaited: set[str]) -> None:
    """ValueError, or LookupError where the bytes cannot be walked. A tensor is awaited once."""
    whole, met = (0, len(content)), None
    if content[4:8] == ORT_FORMAT or not any(_fields(content, whole, _tags({GRAPH: "it"}))):
        raise ValueError("it holds no graph in ONNX's format")
    for part, value, message in _fields(content, whole, FIELDS["model"]):
        if part == "function":
            raise ValueError(f"it defines an operator of its own, {_text(content, value, FUNCTION_NAME)!r}")
        if part == "domain" and value[0] < value[1]:
            operator, domain = _text(content, message, OPERATOR), _text(content, message, DOMAIN)
            raise ValueError(f"its operator {operator!r} is of {domain!r}, not of ONNX")
        # several fields of a tensor tell it; a data location of 0 tells that it is here
        if part.startswith("elsewhere") and message != met and content[slice(*value)] != b"\0":
            tensor = _text(content, message, TENSOR_NAME)
            if part == "elsewhere" or tensor not in awaited:
                entries = [entry for _, entry, _ in _fields(content, message, _tags({EXTERNAL_DATA: "it"}))]
                places = {_text(content, entry, KEY): _text(content, entry, VALUE) for entry in entries}
                raise ValueError(f"its tensor {tensor!r} is stored elsewhere, in {places.get('location')!r}")
            awaited.remove(tensor)  # of a second one, ONNX Runtime would look into the file
            met = message


def _text(content: bytes, message: Span, number: int) -> str:
    """A text in a message; of several, protobuf takes the last. Other bytes give another text, UTF-8 or not."""
    for _, (start, end), _ in deque(_fields(content, message, _tags({number: "it"})), maxlen=1):
        return content[start:end].decode(errors="surrogateescape")
    return ""


def _fields(content: bytes, message: Span, parts: Mapping[int, str]) -> Iterator[tuple[str, Span, Span]]:
    """What parts of a message are, their values, and their messages; instead of a part that `FIELDS` has, its parts."""
    at, outer = message[0], [(message, parts)]
    while outer:
        message, parts = outer.pop()
        end = message[1]
        while at < end:  # no calls where it can be: a graph has some ten thousand fields
            tag, at = content[at], at + 1
            if tag > 127:
                tag, at = _varint(content, at - 1)
            if tag & 7 == BYTES:
                size, at = content[at], at + 1
                if size > 127:
                    size, at = _varint(content, at - 1)
                after = at + size
            elif tag & 7 == VARINT:
                after = at + 1 if content[at] < 128 else _varint(content, at)[1]
            else:
                after = at + FIXED_BYTES[tag & 7]
            if after > end or not LEAST_TAG <= tag < TAGS or len(outer) > DEEPEST:
                raise LookupError
            if tag in parts and parts[tag] in FIELDS:
                outer += [(message, parts), ((at, after), FIELDS[parts[tag]])]
                break
            if tag in parts:
                yield parts[tag], (at, after), message
            at = after


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number, of seven bits a byte, and where it ends."""
    value = 0
    for index, byte in enumerate(content[at : at + VARINT_BYTES]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise LookupError
