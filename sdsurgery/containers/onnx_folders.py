"""The graphs in a model's folder: weights where they hold some, and otherwise whether they still fit the weights.

A folder with graphs is laid out as optimum-onnx and diffusers' ONNX pipelines have it: ``<part>/model.onnx``, the VAE
in two parts. What the graphs of this package hold is named as diffusers names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import Checkpoint, Origin, WeightFile
from ..errors import UnsupportedError
from ..sources import Data, FileSlice, SourceFile
from . import onnx_names
from .folders import GRAPH, ONNX, VAE_GRAPHS
from .onnx import STYLE, Graph, check_links, header_digest, metadata_of, read_graph


@dataclass(frozen=True)
class StoredGraphs:
    """The graphs that a folder was opened with, to be drawn anew when it is written.

    Attributes:
        style: How they were drawn, as they tell themselves; ``None`` where another program made them.
        files: The graphs, and what lies beside them for them alone, by name.
    """

    style: Mapping[str, Any] | None
    files: Mapping[str, Data] = field(default_factory=dict)

    def add_to(self, plan: Any, checkpoint: Checkpoint) -> None:
        """Add them to what is planned.

        Raises:
            UnsupportedError: If they aren't ours.
        """
        if self.style is None:
            raise UnsupportedError(
                "its graphs were made by another program, and can't be drawn anew",
                file=checkpoint.path,
                remedy="convert it to a diffusers folder or a single file",
            )
        from ..graphs.files import stored  # the one way up: who opened the folder needn't know of graphs

        stored(self.style).add_to(plan, checkpoint)


def component_of(part: str) -> str:
    """The component that a part of a folder with graphs is of."""
    return "vae" if part in VAE_GRAPHS else part


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a graph tells how it was drawn."""
    return STYLE in metadata


def weights_of(graph: Graph, part: str) -> WeightFile:
    """The weights that a graph holds, under its component's keys.

    Raises:
        UnsupportedError: If there are none, or another program made it, and its weights can't be told.
    """
    name, tensors = f"{part}/{GRAPH}", onnx_names.weights(graph)
    origin = Origin(ONNX, graph.file.path, graph.file)
    return WeightFile(name, Checkpoint(tensors, origin=origin), f"{component_of(part)}/")


def told(root_source: Callable[[str], SourceFile], part: str) -> dict[str, str]:
    """What a part's graph says of itself."""
    file = root_source(f"{part}/{GRAPH}")
    try:
        return metadata_of(file)
    finally:
        file.close()


def read(root_source: Callable[[str], SourceFile], part: str, metadata: Mapping[str, str]) -> Graph:
    """A part's graph; whatever it names is opened through the folder, and its descriptor closed.

    Raises:
        CorruptError: If the safetensors files that it points into aren't those that it was linked to.
    """
    file = root_source(f"{part}/{GRAPH}")
    try:
        check_links(file, metadata, lambda name: header_digest(root_source(f"{part}/{name}")))
        return read_graph(file, lambda name: root_source(f"{part}/{name}"))
    finally:
        file.close()


def style_of(graphs: Mapping[str, Graph]) -> Mapping[str, Any] | None:
    """How a folder's graphs were drawn, if all of them tell."""
    told = []
    for graph in graphs.values():
        try:
            told.append(json.loads(graph.metadata[STYLE]))
        except (KeyError, ValueError, RecursionError):
            return None
    return next((style for style in told if isinstance(style, dict)), None)


def files_of(root_source: Callable[[str], SourceFile], graphs: Mapping[str, Graph]) -> dict[str, Data]:
    """The files that are a graph's own, by name: itself, and what lies beside it for it alone."""
    found: dict[str, Data] = {}
    for part, graph in graphs.items():
        beside = [name for name in graph.external if part in VAE_GRAPHS or not name.endswith(".safetensors")]
        for name in (GRAPH, *beside):
            file = root_source(f"{part}/{name}")
            found[f"{part}/{name}"] = FileSlice(file, 0, file.size)
    return found
