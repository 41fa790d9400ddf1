"""Values inside an ONNX graph: which of them are what a module gives, and how to have them as outputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..containers.onnx import Graph, Node, read_graph
from ..containers.onnx_names import module_path, weights
from ..sources import SourceFile
from .runtimes import bare

_PART_OF_A_MODULE = {"InstanceNormalization"}
"""Operators that are named like a module of which they are only a part."""

SHAPE = "shape of "
"""What stands before a value's name in that of its shape."""


def module_values(path: Path) -> dict[str, str]:
    """By module that has weights of its own, the name of the value that it gives, in the order of the graph."""
    file = SourceFile(path)
    try:
        graph = read_graph(file, lambda name: SourceFile(path.parent / name))
    finally:
        file.close()
    return _values(graph)


def _values(graph: Graph) -> dict[str, str]:
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    modules = {bare(name).rpartition(".")[0] for name in weights(graph)}
    found: dict[str, str] = {}
    cast = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.op == "Cast" and node.outputs}
    for node in graph.nodes:
        module = module_path(node) or node.name
        if node.outputs and node.op not in _PART_OF_A_MODULE and bare(module) in modules:
            found.pop(bare(module), None)  # its last node gives it
            found[bare(module)] = _biased(node, f"{module}.bias", readers, cast) or node.outputs[0]
    return found


def _biased(node: Node, bias: str, readers: dict[str, list[Node]], cast: dict[str, str]) -> str | None:
    """What comes of it once the module's own bias is added, which is an operator behind it."""
    for after in readers.get(node.outputs[0], ()):
        if after.op == "Add" and bias in {cast.get(value, value) for value in after.inputs}:
            return after.outputs[0]
    return None


def with_outputs(path: Path, values: Iterable[str], *, shapes: Iterable[str] = ()) -> bytes:
    """The graph with further outputs; its weights stay where they are.

    Args:
        path: The graph.
        values: Names of values that become outputs.
        shapes: Names of values whose shapes become outputs, under ``SHAPE`` and the name.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    there = {value.name for value in model.graph.output}
    for name in values:
        if name not in there:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
            there.add(name)
    for name in shapes:
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [SHAPE + name]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(SHAPE + name, onnx.TensorProto.INT64, None))
    content: bytes = model.SerializeToString()
    return content
