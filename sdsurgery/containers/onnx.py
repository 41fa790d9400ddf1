"""An ONNX graph as a container of weights: its initializers, wherever their bytes lie.

They lie within the graph, in a file of data beside it, or in the safetensors file that diffusers reads. Nothing of the
graph is run, and what it says of files is believed only as far as the folder goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from ..checkpoint import Checkpoint, Origin, Tensor
from ..dtypes import BY_NAME, DType
from ..errors import CorruptError, HostileError
from ..sources import Data, FileSlice, InMemory, SourceFile
from .wire import Field, Wire

NAME = "onnx"

GRAPH = "model.onnx"
DATA = "model.onnx_data"
STYLE = "sdsurgery.style"
"""The metadata entry that tells how a graph was drawn."""

LINKS = "sdsurgery.weights"
"""The metadata entry that holds, by file, the hashes of the headers that a graph was linked to."""

_BY_ONNX = {dtype.onnx: dtype for dtype in BY_NAME.values() if dtype.onnx is not None}
_MOST_DIMENSIONS = 16
_REMEDY = "download or export it again"

# Numbers of fields: ModelProto, GraphProto, NodeProto, TensorProto, StringStringEntryProto.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_METADATA = 1, 2, 3, 4, 9
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_TENSOR_TYPED = {4: 4, 5: 0, 7: 0, 10: 8, 11: 0}
"""float, int32, int64, double and uint64 data: the bytes of an element, 0 for varints."""
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_EXTERNAL = 1


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph.

    Attributes:
        op: Its operator.
        name: Its name, which legacy exporters make of the module's path.
        inputs: Names of values.
        outputs: Names of values.
        metadata: What newer exporters say of it, such as the module's path.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph as it was read.

    Attributes:
        file: Where it lies.
        initializers: By name, in their order.
        nodes: In their order.
        metadata: What it says of itself.
        external: Names of the files beside it in which weights lie.
    """

    file: SourceFile
    initializers: Mapping[str, Tensor]
    nodes: tuple[Node, ...]
    metadata: Mapping[str, str]
    external: tuple[str, ...]


def looks_like(head: bytes, name: str) -> bool:
    """Whether a file is meant to be an ONNX graph: by its suffix, for the format has no mark of its own."""
    return name.lower().endswith(".onnx") and head[:1] in (b"\x08", b"\x12", b"\x3a")


def read(file: SourceFile) -> Checkpoint:
    """A lone graph: its initializers, by their names.

    Raises:
        CorruptError: If it is no graph, or contradicts itself.
        HostileError: If it names a file outside its folder.
    """
    graph = read_graph(file, lambda name: SourceFile(file.path.parent / name))
    return Checkpoint(graph.initializers, origin=Origin(NAME, file.path, file))


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

    def metadata(self) -> dict[str, str]:
        parts = self._wire.fields(0, self._file.size)
        return dict(self._entry(part) for part in parts if part.number == _MODEL_METADATA)

    def graph(self) -> Graph:
        nodes: list[Node] = []
        tensors: dict[str, Tensor] = {}
        metadata = self.metadata()
        graphs = 0
        for part in self._wire.fields(0, self._file.size):
            if part.number == _MODEL_GRAPH:
                graphs += 1
                for inner in self._wire.fields(part.start, part.end):
                    if inner.number == _GRAPH_NODE:
                        nodes.append(self._node(inner))
                    elif inner.number == _GRAPH_INITIALIZER:
                        name, tensor = self._tensor(inner)
                        if name in tensors:
                            raise self._corrupt(f"it has {name[:200]!r} twice", name)
                        tensors[name] = tensor
        if not graphs:
            raise self._corrupt("it holds no graph")
        self._check_overlaps(tensors)
        return Graph(self._file, tensors, tuple(nodes), metadata, tuple(self._opened))

    def _entry(self, part: Field) -> tuple[str, str]:
        found = {_ENTRY_KEY: "", _ENTRY_VALUE: ""}
        for inner in self._wire.fields(part.start, part.end):
            if inner.number in found:
                found[inner.number] = self._wire.text(inner)
        return found[_ENTRY_KEY], found[_ENTRY_VALUE]

    def _node(self, part: Field) -> Node:
        texts: dict[int, list[str]] = {number: [] for number in (_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP)}
        metadata: dict[str, str] = {}
        for inner in self._wire.fields(part.start, part.end):
            if inner.number in texts:
                texts[inner.number].append(self._wire.text(inner))
            elif inner.number == _NODE_METADATA:
                metadata |= dict([self._entry(inner)])
        op, name = "".join(texts[_NODE_OP]), "".join(texts[_NODE_NAME])
        return Node(op, name, tuple(texts[_NODE_INPUT]), tuple(texts[_NODE_OUTPUT]), metadata)

    def _tensor(self, part: Field) -> tuple[str, Tensor]:
        found: dict[int, list[Field]] = {}
        for inner in self._wire.fields(part.start, part.end):
            found.setdefault(inner.number, []).append(inner)
        name = "".join(self._wire.text(inner) for inner in found.get(_TENSOR_NAME, ()))
        dims = [size for inner in found.get(_TENSOR_DIMS, ()) for size in self._wire.numbers(inner)]
        dtype = self._dtype(_last(found, _TENSOR_TYPE), dims, name)
        wanted = dtype.nbytes(tuple(dims))
        if _last(found, _TENSOR_LOCATION) == _EXTERNAL:
            content: Data = self._external(dict(map(self._entry, found.get(_TENSOR_EXTERNAL, ()))), wanted, name)
        elif _TENSOR_RAW in found:
            raw = found[_TENSOR_RAW][-1]
            content = FileSlice(self._file, raw.start, raw.end - raw.start)
        else:
            content = self._typed([each for number in _TENSOR_TYPED for each in found.get(number, ())], dtype)
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
        if len(dims) > _MOST_DIMENSIONS or count >= 1 << 48:
            raise self._corrupt(f"the shape of {name[:200]!r} is absurd", name)
        return dtype

    def _typed(self, fields: list[Field], dtype: DType) -> Data:
        """Values in a field of their own type; varints are few, and made bytes at once."""
        if fields and fields[0].wire == 2 and _TENSOR_TYPED[fields[0].number] and len(fields) == 1:
            return FileSlice(self._file, fields[0].start, fields[0].end - fields[0].start)
        raw = bytearray()
        for part in fields:
            size = _TENSOR_TYPED[part.number]
            if size:
                raw += part.value.to_bytes(size, "little")
            else:
                mask = (1 << dtype.bits) - 1
                raw += b"".join((value & mask).to_bytes(dtype.itemsize, "little") for value in self._wire.numbers(part))
        return InMemory(bytes(raw))

    def _external(self, entries: Mapping[str, str], wanted: int, name: str) -> FileSlice:
        location = entries.get("location", "")
        if not location or any(letter in location for letter in "/\\:\0") or location in {".", ".."}:
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
        if digest(name) != recorded:
            message = f"{name[:200]} was written anew since this graph was linked to it"
            raise CorruptError(message, file=file.path, remedy=remedy)
