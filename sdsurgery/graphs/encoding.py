"""ONNX's messages, encoded: nodes, values and constants as they come, weights once it is known where they lie.

A graph is some thousand small messages that are written once and never looked at again, so they are bytes from the
start, without the onnx package. Fields are in the order of their numbers, as protocol buffers' own writers have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint import Tensor
from ..containers.onnx_fields import (
    ATTRIBUTE_FLOAT,
    ATTRIBUTE_INT,
    ATTRIBUTE_INTS,
    ATTRIBUTE_NAME,
    ATTRIBUTE_STRING,
    ATTRIBUTE_TYPE,
    ENTRY_KEY,
    ENTRY_VALUE,
    EXTERNAL,
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NAME,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    MODEL_IR,
    MODEL_METADATA,
    MODEL_OPSET,
    MODEL_PRODUCER,
    NODE_ATTRIBUTE,
    NODE_DOMAIN,
    NODE_INPUT,
    NODE_NAME,
    NODE_OP,
    NODE_OUTPUT,
    OPSET_DOMAIN,
    OPSET_VERSION,
    SHAPE_SIZE,
    SIZE_NAME,
    SIZE_NUMBER,
    TENSOR_DIMS,
    TENSOR_EXTERNAL,
    TENSOR_LOCATION,
    TENSOR_NAME,
    TENSOR_RAW,
    TENSOR_TYPE,
    TENSOR_TYPE_ELEMENT,
    TENSOR_TYPE_SHAPE,
    TYPE_TENSOR,
    VALUE_NAME,
    VALUE_TYPE,
)
from ..containers.wire import content, heading, integer, real, text
from ..dtypes import DType
from ..errors import UnsupportedError
from ..sources import Data, InMemory

_FLOAT, _INT, _STRING, _INTS = 1, 2, 3, 7
"""Types of attributes."""

_IR = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
"""The IR version that came with an opset."""

_LARGEST = (1 << 31) - 1
"""Bytes of the largest message that protocol buffers can hold."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight lies: a file beside the graph, and a run of its bytes."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Weight:
    """An initializer whose bytes are elsewhere."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph whose weights don't lie anywhere yet.

    Attributes:
        name: What it calls itself.
        opset: Of ONNX's own operators.
        domains: Of other operators that it has, all of their first version.
        nodes: Encoded fields of a ``GraphProto``.
        initializers: In their order: weights, and constants as encoded fields.
        values: The inputs and then the outputs, encoded fields.
    """

    name: str
    opset: int
    domains: tuple[str, ...]
    nodes: bytes
    initializers: tuple[Weight | bytes, ...]
    values: bytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weights, in their order."""
        return tuple(entry for entry in self.initializers if isinstance(entry, Weight))

    def linked(self, places: Mapping[str, Place], metadata: Mapping[str, str]) -> InMemory:
        """A model of the graph, with its weights where they lie."""
        parts = [
            _linked(entry, places[entry.name]) if isinstance(entry, Weight) else entry for entry in self.initializers
        ]
        body = b"".join([self.nodes, text(GRAPH_NAME, self.name), *parts, self.values])
        return InMemory(self._front() + content(MODEL_GRAPH, body) + self._back(metadata))

    def embedding(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[Data, ...]:
        """A model of the graph with its weights within it, as pieces: no weight is read.

        Raises:
            UnsupportedError: If protocol buffers can't hold as much.
        """
        pieces: list[Data] = [InMemory(self.nodes + text(GRAPH_NAME, self.name))]
        for entry in self.initializers:
            if isinstance(entry, Weight):
                data = tensors[entry.name].data
                head = _bare(entry) + heading(TENSOR_RAW, data.nbytes)
                pieces += [InMemory(heading(GRAPH_INITIALIZER, len(head) + data.nbytes) + head), data]
            else:
                pieces.append(InMemory(entry))
        pieces.append(InMemory(self.values))
        size = sum(piece.nbytes for piece in pieces)
        if size > _LARGEST:
            remedy = "keep the weights beside it: --weights external"
            raise UnsupportedError(f"{size:,} bytes are more than a graph can hold", remedy=remedy)
        front, back = self._front() + heading(MODEL_GRAPH, size), self._back(metadata)
        return InMemory(front), *pieces, InMemory(back)

    def _front(self) -> bytes:
        return integer(MODEL_IR, _IR[self.opset]) + text(MODEL_PRODUCER, "sdsurgery")

    def _back(self, metadata: Mapping[str, str]) -> bytes:
        versions = {"": self.opset} | dict.fromkeys(self.domains, 1)
        opsets = [text(OPSET_DOMAIN, domain) + integer(OPSET_VERSION, number) for domain, number in versions.items()]
        return b"".join(content(MODEL_OPSET, opset) for opset in opsets) + b"".join(
            metadata_entry(key, value) for key, value in metadata.items()
        )


def metadata_entry(key: str, value: str) -> bytes:
    """What a model says of itself, a field of it."""
    return content(MODEL_METADATA, _pair(key, value))


def _pair(key: str, value: str) -> bytes:
    return text(ENTRY_KEY, key) + text(ENTRY_VALUE, value)


def place_entries(place: Place) -> bytes:
    """The fields of a tensor that say where its bytes lie."""
    told = (("location", place.file), ("offset", str(place.offset)), ("length", str(place.nbytes)))
    return b"".join(content(TENSOR_EXTERNAL, _pair(key, value)) for key, value in told)


def _bare(weight: Weight) -> bytes:
    return _dims(weight.shape) + integer(TENSOR_TYPE, weight.dtype.onnx or 0) + text(TENSOR_NAME, weight.name)


def _linked(weight: Weight, place: Place) -> bytes:
    where = place_entries(place) + integer(TENSOR_LOCATION, EXTERNAL)
    return content(GRAPH_INITIALIZER, _bare(weight) + where)


def _dims(shape: Sequence[int]) -> bytes:
    return b"".join(integer(TENSOR_DIMS, size) for size in shape)


def constant(name: str, dtype: DType, shape: Sequence[int], raw: bytes) -> bytes:
    """An initializer that the graph holds itself."""
    head = _dims(shape) + integer(TENSOR_TYPE, dtype.onnx or 0) + text(TENSOR_NAME, name)
    return content(GRAPH_INITIALIZER, head + content(TENSOR_RAW, raw))


@dataclass(frozen=True, slots=True)
class Node:
    """A node; its attributes are integers, floats, texts, or lists of integers."""

    op: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Any]
    domain: str = ""

    def encoded(self) -> bytes:
        """A field of a ``GraphProto``."""
        parts = [text(NODE_INPUT, value) for value in self.inputs]
        parts += [text(NODE_OUTPUT, value) for value in self.outputs]
        parts += [text(NODE_NAME, self.name), text(NODE_OP, self.op)]
        parts += [content(NODE_ATTRIBUTE, _attribute(key, value)) for key, value in self.attributes.items()]
        if self.domain:
            parts.append(text(NODE_DOMAIN, self.domain))
        return content(GRAPH_NODE, b"".join(parts))


def _attribute(key: str, value: Any) -> bytes:
    name = text(ATTRIBUTE_NAME, key)
    if isinstance(value, float):
        return name + real(ATTRIBUTE_FLOAT, value) + integer(ATTRIBUTE_TYPE, _FLOAT)
    if isinstance(value, int):
        return name + integer(ATTRIBUTE_INT, value) + integer(ATTRIBUTE_TYPE, _INT)
    if isinstance(value, str):
        return name + text(ATTRIBUTE_STRING, value) + integer(ATTRIBUTE_TYPE, _STRING)
    return name + b"".join(integer(ATTRIBUTE_INTS, each) for each in value) + integer(ATTRIBUTE_TYPE, _INTS)


def graph_input(name: str, dtype: DType, shape: Sequence[int | str]) -> bytes:
    """An input; a size by a name is free."""
    return content(GRAPH_INPUT, _value(name, dtype, shape))


def graph_output(name: str, dtype: DType, shape: Sequence[int | str]) -> bytes:
    """An output."""
    return content(GRAPH_OUTPUT, _value(name, dtype, shape))


def _value(name: str, dtype: DType, shape: Sequence[int | str]) -> bytes:
    sizes = [integer(SIZE_NUMBER, size) if isinstance(size, int) else text(SIZE_NAME, size) for size in shape]
    dims = b"".join(content(SHAPE_SIZE, size) for size in sizes)
    kind = integer(TENSOR_TYPE_ELEMENT, dtype.onnx or 0) + content(TENSOR_TYPE_SHAPE, dims)
    return text(VALUE_NAME, name) + content(VALUE_TYPE, content(TYPE_TENSOR, kind))
