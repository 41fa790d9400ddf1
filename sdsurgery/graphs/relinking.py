"""Graphs linked anew to the safetensors files beside them, which somebody wrote again since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..containers import safetensors
from ..containers.folders import GRAPH
from ..containers.onnx import LINKS, metadata_of
from ..containers.onnx_fields import (
    ENTRY_KEY,
    EXTERNAL,
    GRAPH_INITIALIZER,
    MODEL_GRAPH,
    MODEL_METADATA,
    TENSOR_DIMS,
    TENSOR_EXTERNAL,
    TENSOR_LOCATION,
    TENSOR_NAME,
)
from ..containers.wire import Field, Wire, content
from ..containers.writing import AtomicFile
from ..errors import CorruptError, UnsupportedError
from ..sources import FileSlice, SourceFile
from .encoding import Place, metadata_entry, place_entries
from .files import header_places, recorded

_LARGEST = 256 << 20
"""Bytes of a graph whose weights lie beside it, and more: SDXL's UNet takes half a megabyte."""

Shapes = Mapping[str, tuple[int, ...]]


def relink(folder: Path, *, dry_run: bool = False) -> list[str]:
    """Link a folder's graphs to the safetensors files beside them as those are now; the graphs that weren't.

    Raises:
        UnsupportedError: If there is no graph of ours in it.
        CorruptError: If the weights aren't those that a graph was drawn for.
    """
    parts = [path.parent for path in sorted(folder.glob(f"*/{GRAPH}")) if not path.parent.name.startswith(".")]
    ours = [part for part in parts if _is_linked(part / GRAPH)]
    if not ours:
        message = "no graph in it was linked to shared weights by sdsurgery"
        raise UnsupportedError(message, file=folder, remedy="make one: sdsurgery convert --to onnx")
    graphs = {part / GRAPH: _relinked(part) for part in ours}
    changed = {path: after for path, after in graphs.items() if path.read_bytes() != after}
    for path, after in changed.items() if not dry_run else ():
        with AtomicFile(path, replace=True, size=len(after), advance=lambda _count: None) as out:
            out.write(after)
    return [f"{path.parent.name}/{GRAPH}" for path in changed]


def _is_linked(path: Path) -> bool:
    file = SourceFile(path)
    try:
        linked = LINKS in metadata_of(file)
        if linked and file.size > _LARGEST:
            message = f"{file.size:,} bytes are too many for a graph whose weights lie beside it"
            raise CorruptError(message, file=path, remedy="convert the model again")
        return linked
    finally:
        file.close()


def _relinked(part: Path) -> bytes:
    """One graph, whose weights must all be there as it has them."""
    places: dict[str, Place] = {}
    headers: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(part.glob("*.safetensors")):
        file = SourceFile(path)
        shapes |= {key: tensor.shape for key, tensor in safetensors.read(file).items()}
        found, headers[path.name] = header_places(FileSlice(file, 0, file.size), path.name)
        places |= found
        file.close()
    file = SourceFile(part / GRAPH)
    try:
        wire = Wire(file)
        return b"".join(_model(wire, places, shapes)) + metadata_entry(LINKS, recorded(headers))
    finally:
        file.close()


def _model(wire: Wire, places: Mapping[str, Place], shapes: Shapes) -> Iterator[bytes]:
    """The model's fields, without its record of links."""
    for field in wire.fields(0, wire.file.size):
        if field.number == MODEL_GRAPH:
            yield content(MODEL_GRAPH, b"".join(_graph(wire, field, places, shapes)))
        elif field.number != MODEL_METADATA or LINKS not in _texts(wire, field, ENTRY_KEY):
            yield wire.encoded(field)


def _graph(wire: Wire, graph: Field, places: Mapping[str, Place], shapes: Shapes) -> Iterator[bytes]:
    for field in wire.fields(graph.start, graph.end):
        if field.number == GRAPH_INITIALIZER:
            yield content(GRAPH_INITIALIZER, _tensor(wire, field, places, shapes))
        else:
            yield wire.encoded(field)


def _tensor(wire: Wire, tensor: Field, places: Mapping[str, Place], shapes: Shapes) -> bytes:
    """A tensor with its place, if its bytes lie in another file."""
    fields = list(wire.fields(tensor.start, tensor.end))
    if not any(field.number == TENSOR_LOCATION and field.value == EXTERNAL for field in fields):
        return wire.read(tensor.start, tensor.end)
    name = "".join(_texts(wire, tensor, TENSOR_NAME)[-1:])
    dims = tuple(size for field in fields if field.number == TENSOR_DIMS for size in wire.numbers(field))
    if shapes.get(name) != dims:
        message = f"the weights beside it have no {name} of the shape {list(dims)}"
        remedy = "convert the model again: its graph was drawn for other weights"
        raise CorruptError(message, file=wire.file.path, key=name, remedy=remedy)
    kept = [field for field in fields if field.number != TENSOR_EXTERNAL]
    before = b"".join(wire.encoded(field) for field in kept if field.number < TENSOR_EXTERNAL)
    after = b"".join(wire.encoded(field) for field in kept if field.number > TENSOR_EXTERNAL)
    return before + place_entries(places[name]) + after


def _texts(wire: Wire, message: Field, number: int) -> list[str]:
    return [wire.text(field) for field in wire.fields(message.start, message.end) if field.number == number]
