"""The weights of a graph that another program made, under diffusers' names and in diffusers' shapes.

Exporters fold: a linear layer's weight is stored transposed under a number, a group norm's gets two more dimensions,
equal tensors are stored once. What is left of a weight's name is where it is used: the path of the module stands in
the node's name, or in its metadata. Bytes stay what they are, and nothing is computed but transposes.

A constant that no module can be named for is no weight: masks, scales, frequencies of the time step. Whether all
weights of a family are there isn't asked here, except where a runtime's optimizer packed some into one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..checkpoint import Tensor
from ..errors import UnsupportedError
from ..sources import transposed
from ..wording import listed
from .onnx import STYLE, Graph, Node

_SCOPES = "pkg.torch.onnx.name_scopes"
_SCOPE = re.compile(r"'([^']*)'|\"([^\"]*)\"")

_WEIGHT_NAME = re.compile(r"(?:\w+\.)+(?:weight|bias|position_ids)|(?:special_care|concept)_embeds(?:_weights)?")
"""A name that an exporter left alone."""

_LEAF = re.compile(
    r"(?:^|\.)(?:conv\w*|(?:post_)?quant_conv|linear_\d|time_emb_proj|proj(?:_in|_out|_attn)?|to_[qkv]|to_out\.0|net\.2"
    r"|query|key|value|[qkv]_proj|out_proj|fc\d|\w+_projection|\w*norm\w*|\w+_embedding)$"
)
"""How the path of a module ends that has weights."""

_NORM = re.compile(r"(?:^|\.)\w*norm\w*$")
_POSITIONS = re.compile(r"(?:^|\.)embeddings(?:\.position_embedding)?$")

_KEEPS_BYTES = {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten"}
_MOST_STEPS = 16
"""More nodes than stand between a weight and its use."""

_PACKING = "com.microsoft"
_QUANTIZED = {"DequantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"}

_LONGEST = 500
"""Letters of a path; no model has longer ones, and patterns take their time."""

_SHOWN = 12
"""Names that an error lists."""

_CLIP = r"(?:text_model\.)?(?P<clip>(?:embeddings\.(?:token|position)_|encoder\.layers\.|final_layer_norm\.).*)"
_HALVES = r"(?:conv_in|conv_norm_out|conv_out|down_blocks|mid_block|up_blocks)\."
_PLACED = re.compile(
    rf"(?P<wrapper>(?:.*?\.)??)(?:{_CLIP}|(?P<half>{_HALVES}.*)|(?P<plain>(?:encoder|decoder)\.{_HALVES}.*"
    r"|(?:text_projection|time_embedding|add_embedding|quant_conv|post_quant_conv)\..*))",
    re.DOTALL,
)
"""A weight's name: what wrappers put in front, and what each family's names begin with."""


def _both(*modules: str) -> tuple[str, ...]:
    return tuple(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


def _attention(module: str) -> tuple[str, ...]:
    return (*(f"{module}.to_{name}.weight" for name in "qkv"), *_both(f"{module}.to_out.0"))


_BLOCKS = (
    (
        re.compile(r".*?encoder\.layers\.\d+"),
        _both(*(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")), "layer_norm1", "mlp.fc1", "mlp.fc2")
        + _both("layer_norm2"),
    ),
    (
        re.compile(r".*?\.transformer_blocks\.\d+"),
        _attention("attn1") + _attention("attn2") + _both("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
    ),
    (re.compile(r".*?\.resnets\.\d+"), _both("norm1", "conv1", "norm2", "conv2")),
    (
        re.compile(r"(?:en|de)coder\.mid_block\.attentions\.\d+"),
        _both("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    ),
)
"""What a block has, by its path: where a graph is fused, what of it is missing was packed."""


@dataclass(frozen=True, slots=True)
class _Use:
    """A tensor where a node uses it.

    Attributes:
        name: What the weight is called by the module's path; ``None`` where that tells nothing.
        values: Names of values from the node to the tensor, the tensor's own last.
        tensor: The tensor, in diffusers' shape.
    """

    name: str | None
    values: tuple[str, ...]
    tensor: Tensor


CONSTANTS = "const/"
"""What the names of our own constants begin with, which are no weights."""


def weights(graph: Graph) -> dict[str, Tensor]:
    """The weights of any graph, as diffusers names them.

    Raises:
        UnsupportedError: If another program made it, and packed them for a runtime.
    """
    if STYLE not in graph.metadata:
        return recovered(graph)
    return {name: tensor for name, tensor in graph.initializers.items() if not name.startswith(CONSTANTS)}


def recovered(graph: Graph) -> dict[str, Tensor]:
    """The weights that a graph holds, by diffusers' names within the component.

    Raises:
        UnsupportedError: If weights were packed for a runtime, or quantized; or if nothing can be named.
    """
    return _Names(graph).named()


def module_path(node: Node) -> str:
    """The path of the module that a node belongs to; empty where nothing tells."""
    scopes = node.metadata.get(_SCOPES)
    if scopes:
        names = [one or other for one, other in _SCOPE.findall(scopes)]
        path = names[-2] if len(names) > 1 else ""
    else:
        path = ".".join(node.name.split("/")[1:-1])
    return path if len(path) <= _LONGEST else ""


class _Names:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._tensors: Mapping[str, Tensor] = {**graph.constants, **graph.initializers}
        self._makers = {value: node for node in graph.nodes for value in node.outputs}
        self._paths = {id(node): module_path(node) for node in graph.nodes}

    def named(self) -> dict[str, Tensor]:
        uses = [use for node in self._graph.nodes for use in self._uses(node)]
        told = {use.name: use.tensor for use in reversed(uses) if use.name is not None}
        # Paths may lack a wrapper that names have: it isn't in them where only a method of what it wraps is called.
        left_alone = self._left_alone(uses)
        half = _half([*told, *left_alone])
        by_path = _Renaming(told, half)
        named = _renamed(told, by_path) | _renamed(left_alone, _Renaming(left_alone, half))
        self._check_fused(named, by_path)
        if not named:
            raise self._unsupported("none of its weights can be told by name, nor by the names of its nodes")
        return named

    def _left_alone(self, uses: Iterable[_Use]) -> dict[str, Tensor]:
        """What still has its name; of equal weights that were merged, a node that copies nothing has it."""
        by_name: dict[str, Tensor] = {}
        nearest: dict[str, Tensor] = {}
        for use in uses:
            named = next((value for value in use.values if _WEIGHT_NAME.fullmatch(value)), None)
            if named is not None:
                nearest.setdefault(named, use.tensor)
            if use.name is not None and use.name in use.values:
                by_name.setdefault(use.name, use.tensor)
        aliases = [value for node in self._graph.nodes if node.op == "Identity" for value in node.outputs]
        found: dict[str, Tensor] = {}
        for name in (*self._graph.initializers, *aliases):
            values, _ = self._source(name)
            if _WEIGHT_NAME.fullmatch(name) and values:
                tensor = by_name.get(name) or nearest.get(name)
                found.setdefault(name, self._tensors[values[-1]] if tensor is None else tensor)
        return found

    def _source(self, value: str) -> tuple[tuple[str, ...], bool]:
        """The values between a use and the tensor that it comes from, and whether that is transposed on the way."""
        values, turned = [value], False
        while value not in self._tensors:
            node = self._makers.get(value)
            if node is None or not node.inputs or len(values) > _MOST_STEPS:
                return (), False
            if node.op == "Transpose" and node.integers.get("perm", (1, 0)) == (1, 0):
                turned = not turned
            elif node.op not in _KEEPS_BYTES:
                return (), False
            value = node.inputs[0]
            values.append(value)
        return tuple(values), turned

    def _uses(self, node: Node) -> Iterator[_Use]:
        """The weights that a node uses."""
        path = self._paths[id(node)]
        if node.op in {"Conv", "ConvTranspose", "LayerNormalization", "GroupNormalization", "Gemm", "MatMul"}:
            for value, kind in zip(node.inputs[1:], ("weight", "bias"), strict=False):
                yield from self._use(node, value, path, kind)
        elif node.op == "Gather" and node.inputs:
            yield from self._use(node, node.inputs[0], path, "weight")
        elif node.op in {"Mul", "Add"} and len(node.inputs) == 2:
            for value, other in (node.inputs, node.inputs[::-1]):
                if node.op == "Add" and _POSITIONS.search(path):
                    module = path.removesuffix(".position_embedding") + ".position_embedding"
                    yield from self._use(node, value, module, "weight")
                elif _NORM.search(path):
                    yield from self._use(node, value, path, "weight" if node.op == "Mul" else "bias")
                elif node.op == "Add" and self._is_product_of(path, other):
                    yield from self._use(node, value, path, "bias")

    def _is_product_of(self, path: str, value: str) -> bool:
        """Whether a value is what a module's weight was multiplied with, so that its bias is what is added."""
        maker = self._makers.get(value)
        return maker is not None and maker.op == "MatMul" and self._paths[id(maker)] == path

    def _use(self, node: Node, value: str, path: str, kind: str) -> Iterator[_Use]:
        values, turned = self._source(value)
        if not values or self._tensors[values[-1]].dtype.kind != "float":
            return
        tensor = _shaped(node, self._tensors[values[-1]], kind, turned=turned)
        if tensor is not None:
            yield _Use(f"{path}.{kind}" if _LEAF.search(path) else None, values, tensor)

    def _check_fused(self, named: Mapping[str, Tensor], rename: _Renaming) -> None:
        fused = [node for node in self._graph.nodes if node.domain.startswith(_PACKING) or node.op in _QUANTIZED]
        if not fused:
            return
        held = list(dict.fromkeys(name for node in fused for name in self._held(node)))
        missing = self._missing(named, rename)
        if held or missing:
            kinds = ", ".join(f"{count} {op}" for op, count in Counter(node.op for node in fused).most_common())
            parts = [f"it was fused or quantized for a runtime ({kinds}), and isn't taken apart"]
            parts += [f"not found: {listed((name[:200] for name in missing), _SHOWN)}"] if missing else []
            parts += [f"held by such nodes: {listed((name[:200] for name in held), _SHOWN)}"] if held else []
            raise self._unsupported("; ".join(parts))

    def _held(self, node: Node) -> Iterator[str]:
        for value in node.inputs:
            values, _ = self._source(value)
            if values and self._tensors[values[-1]].numel > 1:
                yield values[-1]

    def _missing(self, named: Mapping[str, Tensor], rename: _Renaming) -> list[str]:
        """What blocks should have that the graph shows, by the names in them."""
        paths = [*named, *(rename(path + ".") for path in self._paths.values() if path)]
        missing: dict[str, None] = {}
        for pattern, names in _BLOCKS:
            blocks = dict.fromkeys(found[0] for path in paths if (found := pattern.match(path)))
            missing |= dict.fromkeys(f"{block}.{name}" for block in blocks for name in names)
        return [name for name in missing if name not in named]

    def _unsupported(self, message: str) -> UnsupportedError:
        return UnsupportedError(
            message,
            file=self._graph.file.path,
            remedy="fetch the safetensors files, or the graph as it was before it was optimized",
        )


def _shaped(node: Node, tensor: Tensor, kind: str, *, turned: bool) -> Tensor | None:
    """A tensor in the shape that diffusers has it in, as the operator that uses it tells."""
    if node.op in {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"} and kind == "weight":
        lies_turned = node.op == "MatMul" or (node.op == "Gemm" and node.integers.get("transB", (0,)) != (1,))
        return _turned(tensor) if turned != lies_turned else tensor
    if kind == "weight" and node.op == "Add":
        wide = len(tensor.shape) >= 2 and all(size == 1 for size in tensor.shape[:-2])
        return replace(tensor, shape=tensor.shape[-2:]) if wide else None
    smallest = 2 if node.op in {"Add", "Mul"} else 1  # a lone number is a scale there, or what keeps roots from zero
    is_vector = tensor.shape and max(tensor.shape) == tensor.numel >= smallest
    return replace(tensor, shape=(tensor.numel,)) if is_vector else None


def _turned(tensor: Tensor) -> Tensor | None:
    if len(tensor.shape) != 2 or tensor.dtype.bits % 8:
        return None
    rows, columns = tensor.shape
    data = transposed(tensor.data, (rows, columns), tensor.dtype.itemsize)
    return Tensor(tensor.dtype, (columns, rows), data)


class _Renaming:
    """From the exported module's names to the component's: wrappers come off, and what they took off comes back."""

    def __init__(self, names: Iterable[str], half: str) -> None:
        wrappers = Counter(match["wrapper"] for name in names if (match := _PLACED.fullmatch(name)))
        self._wrapper = max(wrappers, key=wrappers.__getitem__, default="")
        self._half = half
        self._leave = any("vision_model." in wrapper for wrapper in wrappers)

    def __call__(self, name: str) -> str:
        """A weight's name, or the path of a module with a dot behind it."""
        match = None if self._leave else _PLACED.fullmatch(name)
        if match is None or match["wrapper"] != self._wrapper:
            return name
        if match["clip"] is not None:
            return f"text_model.{match['clip']}"
        return match["plain"] or self._half + match["half"]


def _renamed(found: Mapping[str, Tensor], rename: _Renaming) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in found.items()}


def _half(names: Iterable[str]) -> str:
    """What a VAE's encoder or decoder lacks before its names that was exported alone."""
    matches = [match for name in names if (match := _PLACED.fullmatch(name))]
    tops = {(match["half"] or match["plain"] or "").partition(".")[0] for match in matches}
    if "mid_block" not in tops or "time_embedding" in tops or {"down_blocks", "up_blocks"} <= tops:
        return ""
    return "encoder." if "down_blocks" in tops else "decoder."
