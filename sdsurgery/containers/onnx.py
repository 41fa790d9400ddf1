"""An ONNX graph as a container of weights: its initializers, wherever their bytes lie.

They lie within the graph, in a file of data beside it, or in the safetensors file that diffusers reads. Nothing of the
graph is run, and what it says of files is believed only as far as the folder goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise

from ..checkpoint import Checkpoint, Origin, Tensor
from ..dtypes import BY_NAME, DType
from ..errors import CorruptError, HostileError
from ..sources import Data, FileSlice, InMemory, SourceFile
from .folders import ONNX, opener
from .onnx_fields import (
    ATTRIBUTE_INT,
    ATTRIBUTE_INTS,
    ATTRIBUTE_NAME,
    ATTRIBUTE_TENSOR,
    ENTRY_KEY,
    ENTRY_VALUE,
    EXTERNAL,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    MODEL_GRAPH,
    MODEL_METADATA,
    NODE_ATTRIBUTE,
    NODE_DOMAIN,
    NODE_INPUT,
    NODE_METADATA,
    NODE_NAME,
    NODE_OP,
    NODE_OUTPUT,
    TENSOR_DIMS,
    TENSOR_EXTERNAL,
    TENSOR_INT32,
    TENSOR_LOCATION,
    TENSOR_NAME,
    TENSOR_RAW,
    TENSOR_TYPE,
)
from .safetensors import MAX_HEADER
from .wire import BYTES, FIXED32, FIXED64, VARINT, Field, Wire

DATA = "model.onnx_data"
STYLE = "sdsurgery.style"
"""The metadata entry that tells how a graph was drawn."""

LINKS = "sdsurgery.weights"
"""The metadata entry that holds, by file, the hashes of the headers that a graph was linked to."""

_BY_ONNX = {dtype.onnx: dtype for dtype in BY_NAME.values() if dtype.onnx is not None}
_MOST_DIMENSIONS = 16
_MOST_PARTS = 1 << 18
"""More nodes and initializers than any graph has: each takes two bytes of a file and many of memory."""

_REMEDY = "download or export it again"

_TENSOR_TYPED = {"F32": 4, "C64": 4, "F64": 10, "C128": 10, "I64": 7, "U32": 11, "U64": 11}
"""The field of values of a type: float, double, int64 and uint64 data; all else is int32 data."""
_FIXED = {4: (FIXED32, 4), 10: (FIXED64, 8)}
"""Fields of values that are no varints: how one stands alone, and its bytes."""
_TENSOR_WIRES = {
    TENSOR_DIMS: (VARINT, BYTES),
    TENSOR_TYPE: (VARINT,),
    TENSOR_NAME: (BYTES,),
    TENSOR_RAW: (BYTES,),
    TENSOR_EXTERNAL: (BYTES,),
    TENSOR_LOCATION: (VARINT,),
}
"""How the fields of a tensor are encoded; what is encoded otherwise, protocol buffers don't know."""
_MOST_ENTRIES = 64
_LONGEST_NAME = 255
"""Bytes of a file's name, on all common systems."""

_WITH_ATTRIBUTES = {"Constant", "Gemm", "Transpose"}
"""Operators whose attributes say something about weights."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph.

    Attributes:
        op: Its operator.
        name: Its name, which legacy exporters make of the module's path.
        inputs: Names of values.
        outputs: Names of values.
        metadata: What newer exporters say of it, such as the module's path.
        domain: Where its operator comes from; empty for ONNX's own.
        integers: Attributes that are integers, of operators for which they tell how a weight lies.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    domain: str = ""
    integers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph as it was read.

    Attributes:
        file: Where it lies.
        initializers: By name, in their order.
        nodes: In their order.
        metadata: What it says of itself.
        external: Names of the files beside it in which weights lie.
        constants: Floating-point tensors in nodes of their own, by the name of the value.
    """

    file: SourceFile
    initializers: Mapping[str, Tensor]
    nodes: tuple[Node, ...]
    metadata: Mapping[str, str]
    external: tuple[str, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)


def read(file: SourceFile) -> Checkpoint:
    """A lone graph: the initializers of our own by their names, the weights of others' as diffusers names them.

    Raises:
        CorruptError: If it is no graph, or contradicts itself.
        HostileError: If it names a file outside its folder.
        UnsupportedError: If its weights were packed for a runtime.
    """
    from . import onnx_names  # which needs this module

    beside = opener(file.path.parent)
    check_links(file, metadata_of(file), lambda name: header_digest(beside(name)))
    return Checkpoint(onnx_names.weights(read_graph(file, beside)), origin=Origin(ONNX, file.path, file))


def read_graph(file: SourceFile, beside: Callable[[str], SourceFile]) -> Graph:
    """Read a graph.

    Args:
        file: The graph.
        beside: Opens a file beside it, by a plain name; refuses what leads out of the model's folder.

    Raises:
        CorruptError: If it is no graph, or contradicts itself.
        HostileError: If it names a file outside its folder.
    """
    return _Reader(file, beside).graph()


def metadata_of(file: SourceFile) -> dict[str, str]:
    """What a graph says of itself; its tensors aren't looked at.

    Raises:
        CorruptError: If it is no graph.
    """
    return _Reader(file, lambda _name: file).metadata()


def _last(found: Mapping[int, list[Field]], number: int) -> int:
    """The value of a field that should be there once."""
    return found[number][-1].value if number in found else 0


class _Reader:
    def __init__(self, file: SourceFile, beside: Callable[[str], SourceFile]) -> None:
        self._file, self._wire, self._beside = file, Wire(file), beside
        self._opened: dict[str, SourceFile] = {}
        self._constants: dict[str, Tensor] = {}

    def metadata(self) -> dict[str, str]:
        parts = self._wire.fields(0, self._file.size)
        return dict(self._entry(part) for part in parts if part.number == MODEL_METADATA)

    def graph(self) -> Graph:
        nodes: list[Node] = []
        tensors: dict[str, Tensor] = {}
        metadata = self.metadata()
        graphs = 0
        for part in self._wire.fields(0, self._file.size):
            if part.number == MODEL_GRAPH:
                graphs += 1
                for inner in self._wire.fields(part.start, part.end):
                    if inner.number == GRAPH_NODE:
                        nodes.append(self._node(inner))
                    elif inner.number == GRAPH_INITIALIZER:
                        name, tensor = self._tensor(inner)
                        if name in tensors:
                            raise self._corrupt(f"it has {name[:200]!r} twice", name)
                        tensors[name] = tensor
                    if len(nodes) + len(tensors) > _MOST_PARTS:
                        raise self._corrupt("it has more nodes than any graph")
        if not graphs:
            raise self._corrupt("it holds no graph")
        if not tensors and not self._constants:
            raise self._corrupt("it holds no weights")
        self._check_overlaps(tensors)
        return Graph(self._file, tensors, tuple(nodes), metadata, tuple(self._opened), self._constants)

    def _entry(self, part: Field) -> tuple[str, str]:
        found = {ENTRY_KEY: "", ENTRY_VALUE: ""}
        for inner in self._wire.fields(part.start, part.end):
            if inner.number in found:
                found[inner.number] = self._wire.text(inner)
        return found[ENTRY_KEY], found[ENTRY_VALUE]

    def _node(self, part: Field) -> Node:
        numbers = (NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP, NODE_DOMAIN)
        texts: dict[int, list[str]] = {number: [] for number in numbers}
        metadata: dict[str, str] = {}
        attributes: list[Field] = []
        for inner in self._wire.fields(part.start, part.end):
            if inner.number in texts:
                texts[inner.number].append(self._wire.text(inner))
            elif inner.number == NODE_METADATA:
                metadata |= dict([self._entry(inner)])
            elif inner.number == NODE_ATTRIBUTE:
                attributes.append(inner)
        op, name, domain = ("".join(texts[number][-1:]) for number in (NODE_OP, NODE_NAME, NODE_DOMAIN))
        outputs = tuple(texts[NODE_OUTPUT])
        integers: dict[str, tuple[int, ...]] = {}
        for inner in attributes if op in _WITH_ATTRIBUTES else ():
            integers |= self._attribute(inner, outputs if op == "Constant" else ())
        return Node(op, name, tuple(texts[NODE_INPUT]), outputs, metadata, domain, integers)

    def _attribute(self, part: Field, outputs: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """An attribute's integers; a constant's tensor is kept under the name of its output."""
        name = ""
        integers: list[int] = []
        for inner in self._wire.fields(part.start, part.end):
            if inner.number == ATTRIBUTE_NAME:
                name += self._wire.text(inner)
            elif inner.number in {ATTRIBUTE_INT, ATTRIBUTE_INTS}:
                integers += self._wire.numbers(inner)
            elif inner.number == ATTRIBUTE_TENSOR and outputs and self._is_float(inner):
                self._constants[outputs[0]] = self._tensor(inner)[1]
        return {name: tuple(integers)}

    def _is_float(self, part: Field) -> bool:
        kinds = [inner.value for inner in self._wire.fields(part.start, part.end) if inner.number == TENSOR_TYPE]
        dtype = _BY_ONNX.get(kinds[-1]) if kinds else None
        return dtype is not None and dtype.kind == "float"

    def _tensor(self, part: Field) -> tuple[str, Tensor]:
        found: dict[int, list[Field]] = {}
        for inner in self._wire.fields(part.start, part.end):
            if inner.wire in _TENSOR_WIRES.get(inner.number, ()):
                found.setdefault(inner.number, []).append(inner)
                if len(found[inner.number]) > _MOST_ENTRIES:
                    raise self._corrupt("a tensor of it has too many entries")
        name = self._wire.text(found[TENSOR_NAME][-1]) if TENSOR_NAME in found else ""
        sizes = (size for inner in found.get(TENSOR_DIMS, ()) for size in self._wire.numbers(inner))
        dims = list(islice(sizes, _MOST_DIMENSIONS + 1))
        dtype = self._dtype(_last(found, TENSOR_TYPE), dims, name)
        wanted = dtype.nbytes(tuple(dims))
        if _last(found, TENSOR_LOCATION) == EXTERNAL:
            content: Data = self._external(dict(map(self._entry, found.get(TENSOR_EXTERNAL, ()))), wanted, name)
        elif TENSOR_RAW in found:
            raw = found[TENSOR_RAW][-1]
            content = FileSlice(self._file, raw.start, raw.end - raw.start)
        else:
            content = self._typed(part, dtype, wanted)
        if content.nbytes != wanted:
            raise self._corrupt(f"{name[:200]!r} has {content.nbytes} bytes, but {dtype}{dims} takes {wanted}", name)
        return name, Tensor(dtype, tuple(dims), content)

    def _dtype(self, kind: int, dims: list[int], name: str) -> DType:
        dtype = _BY_ONNX.get(kind)
        if dtype is None:
            raise self._corrupt(f"{name[:200]!r} is of a type that no weight has ({kind})", name)
        count = 1
        for size in dims:
            count *= size
        if len(dims) > _MOST_DIMENSIONS or max([count, *dims]) >= 1 << 48:
            raise self._corrupt(f"the shape of {name[:200]!r} is absurd", name)
        if count * dtype.bits % 8:
            raise self._corrupt(f"{name[:200]!r} doesn't end on a byte", name)
        return dtype

    def _typed(self, part: Field, dtype: DType, wanted: int) -> Data:
        """Values in the field of their type: one run of the file, or else few, and made bytes at once."""
        number = _TENSOR_TYPED.get(dtype.name, TENSOR_INT32)
        alone, size = _FIXED.get(number, (VARINT, max(1, dtype.bits // 8)))
        mask, raw, run = (1 << 8 * size) - 1, bytearray(), None
        for inner in self._wire.fields(part.start, part.end):
            if inner.number != number or inner.wire not in {alone, BYTES}:
                continue
            if inner.wire == BYTES and alone != VARINT:
                if inner.end - inner.start == wanted and not raw and run is None:
                    run = inner
                    continue
                pieces = iter([self._wire.read(inner.start, min(inner.end, inner.start + wanted + 1))])
            else:
                pieces = ((value & mask).to_bytes(size, "little") for value in self._wire.numbers(inner, alone))
            for piece in pieces:
                raw += piece
                if len(raw) > (wanted if run is None else 0):
                    raise self._corrupt("a tensor of it has more values than its shape")
        return InMemory(bytes(raw)) if run is None else FileSlice(self._file, run.start, wanted)

    def _external(self, entries: Mapping[str, str], wanted: int, name: str) -> FileSlice:
        location = entries.get("location", "")
        plain = location not in {"", ".", ".."} and not any(letter in location for letter in "/\\:\0")
        if not plain or len(location.encode()) > _LONGEST_NAME:
            raise HostileError(
                f"the bytes of {name[:200]!r} should lie in {location[:200]!r}, which is no name of a file beside it",
                file=self._file.path,
                key=name[:200],
                remedy="don't use it, or mend the graph if you trust where it came from",
            )
        try:
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(wanted)))
        except ValueError as error:
            raise self._corrupt(f"the place of {name[:200]!r} is no number", name) from error
        if location not in self._opened:
            self._opened[location] = self._beside(location)
        file = self._opened[location]
        if offset < 0 or length < 0 or offset + length > file.size:
            raise self._corrupt(f"{name[:200]!r} lies beyond the end of {location}", name)
        return FileSlice(file, offset, length)

    def _check_overlaps(self, tensors: Mapping[str, Tensor]) -> None:
        """Two weights may be one, but no weight a part of another."""
        runs = sorted(
            (str(data.file.path), data.offset, data.nbytes, name)
            for name, tensor in tensors.items()
            if isinstance(data := tensor.data, FileSlice) and data.nbytes
        )
        for (path, offset, nbytes, _), (other, begin, count, name) in pairwise(runs):
            if path == other and begin < offset + nbytes and (offset, nbytes) != (begin, count):
                raise self._corrupt(f"{name[:200]!r} overlaps another tensor", name)

    def _corrupt(self, message: str, key: str | None = None) -> CorruptError:
        return CorruptError(message, file=self._file.path, key=key and key[:200], remedy=_REMEDY)


def check_links(file: SourceFile, metadata: Mapping[str, str], digest: Callable[[str], str]) -> None:
    """Whether the files that a graph points into still have the headers that it was linked to.

    Raises:
        CorruptError: If one hasn't: the graph would read other bytes than its weights.
    """
    try:
        links = json.loads(metadata.get(LINKS, "{}"))
    except (ValueError, RecursionError):
        links = None
    remedy = f"link it again: sdsurgery convert --relink {file.path.parent.parent}"
    if not isinstance(links, dict):
        raise CorruptError("its record of linked files makes no sense", file=file.path, remedy=remedy)
    for name, recorded in links.items():
        if not name or any(letter in name for letter in "/\\:\0") or name in {".", ".."}:
            message = f"it was linked to {name[:200]!r}, which is no name of a file beside it"
            raise HostileError(message, file=file.path, remedy="don't use it, or mend the graph")
        if digest(name) != recorded:
            message = f"{name[:200]} was written anew since this graph was linked to it"
            raise CorruptError(message, file=file.path, remedy=remedy)


def header_digest(file: SourceFile) -> str:
    """The hash of a safetensors file's header, by which a graph knows the file again; closes it."""
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    header = file.read(0, min(file.size, 8 + length, MAX_HEADER))
    file.close()
    return hashlib.sha256(header).hexdigest()
