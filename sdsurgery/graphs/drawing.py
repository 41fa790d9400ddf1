"""A graph as it is drawn: nodes one after another, weights by name, and the few ways in which opsets differ.

Weights are initializers under their names and shapes in diffusers' layout, without bytes: whoever writes the graph says
where those lie. What is computed of sizes is computed from the inputs, so that batch, height, width and sequence are
free.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..checkpoint import Tensor
from ..dtypes import F32, I64, DType
from . import encoding
from .encoding import Graph, Node, Weight

FUSED_ATTENTION: Final = 23
GROUP_NORM: Final = 21
GELU: Final = 20
OLDEST: Final = 17
NEWEST: Final = 23
"""The first opsets with Attention, GroupNormalization (as it is now), Gelu, and LayerNormalization; the last used."""

NORMAL_NOISE: Final = 21
"""The last opset whose RandomNormalLike ONNX Runtime implements, as of 1.32."""

NEAREST: Final = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
"""What torch calls nearest."""


@dataclass(frozen=True, slots=True)
class Heads:
    """How attention divides its width.

    Attributes:
        count: How many heads.
        width: Of all of them.
        wide: Whether scores are computed in fp32 whatever the rest is in.
    """

    count: int
    width: int
    wide: bool = False


class Drawing:
    """A graph that grows.

    Attributes:
        opset: Of the default domain.
        compute: The dtype that is computed in, and of the float inputs and outputs.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor], *, compute: DType, opset: int) -> None:
        self.name, self.opset, self.compute = name, opset, compute
        self._tensors = tensors
        self._nodes: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []
        self._initializers: dict[str, Weight | bytes] = {}
        self._cast: dict[str, str] = {}
        self._domains: dict[str, None] = {}

    # ------------------------------------------------------------ inputs, outputs, weights

    def input(self, name: str, dtype: DType, shape: Sequence[int | str]) -> str:
        """An input; a size by a name is free."""
        self._inputs.append(encoding.graph_input(name, dtype, shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str]) -> None:
        """An output in the dtype that is computed in."""
        self.add("Identity", value, output=name)
        self._outputs.append(encoding.graph_output(name, self.compute, shape))

    def weight(self, name: str) -> str:
        """A weight as the graph computes with it."""
        tensor = self._tensors[name]
        if name not in self._initializers:
            self._initializers[name] = Weight(name, tensor.dtype, tensor.shape)
        if tensor.dtype is self.compute:
            return name
        if name not in self._cast:
            self._cast[name] = self.cast(name, self.compute)
        return self._cast[name]

    def has(self, name: str) -> bool:
        """Whether the model has a weight of that name."""
        return name in self._tensors

    # ------------------------------------------------------------ constants

    def ints(self, *values: int) -> str:
        """A list of integers, such as axes or a shape."""
        return self._constant("ints", I64, [len(values)], struct.pack(f"<{len(values)}q", *values), values)

    def scalar(self, value: float, dtype: DType | None = None) -> str:
        """A number."""
        dtype = dtype or self.compute
        return self._constant(f"scalar_{dtype.name}", dtype, [], _packed(value, dtype), (value,))

    def floats(self, name: str, values: Sequence[float]) -> str:
        """A list of numbers in fp32."""
        return self._constant(name, F32, [len(values)], struct.pack(f"<{len(values)}f", *values), ())

    def _constant(self, kind: str, dtype: DType, dims: Sequence[int], raw: bytes, values: Sequence[float]) -> str:
        name = "/".join(["const", kind, *map(_label, values)])
        if name not in self._initializers:
            self._initializers[name] = encoding.constant(name, dtype, dims, raw)
        return name

    # ------------------------------------------------------------ nodes

    def add(self, op: str, *inputs: str, output: str = "", name: str = "", **attributes: Any) -> str:
        """A node with one output."""
        return self._node(op, inputs, attributes, output, name)

    def _node(
        self, op: str, inputs: Sequence[str], attributes: Mapping[str, Any], output: str = "", name: str = ""
    ) -> str:
        name = name or f"{op}_{len(self._nodes)}"
        return self._put(Node(op, name, inputs, [output or name], attributes))[0]

    def _put(self, node: Node) -> Sequence[str]:
        self._nodes.append(node.encoded())
        if node.domain:
            self._domains[node.domain] = None
        return node.outputs

    def split(self, value: str, axis: int) -> tuple[str, str]:
        """Two halves."""
        name = f"Split_{len(self._nodes)}"
        attributes = {"axis": axis} | ({"num_outputs": 2} if self.opset >= 18 else {})
        first, second = self._put(Node("Split", name, [value], [f"{name}_0", f"{name}_1"], attributes))
        return first, second

    def cast(self, value: str, dtype: DType) -> str:
        """In another dtype."""
        return self.add("Cast", value, to=dtype.onnx)

    def reshape(self, value: str, *shape: int) -> str:
        """With this shape; 0 keeps a size, -1 takes what is left."""
        return self.add("Reshape", value, self.ints(*shape))

    def linear(self, value: str, name: str, *, bias: bool = True) -> str:
        """A linear layer, whose weight has a row for each output."""
        turned = self.add("Transpose", self.weight(f"{name}.weight"), perm=[1, 0])
        result = self.add("MatMul", value, turned, name=name)
        return self.add("Add", result, self.weight(f"{name}.bias")) if bias else result

    def conv(self, value: str, name: str, *, stride: int = 1, pads: Sequence[int] = (1, 1, 1, 1)) -> str:
        """A convolution."""
        kernel = list(self._tensors[f"{name}.weight"].shape[2:])
        pads = pads if kernel != [1, 1] else (0, 0, 0, 0)
        inputs = (value, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))
        return self.add("Conv", *inputs, name=name, kernel_shape=kernel, pads=list(pads), strides=[stride, stride])

    def silu(self, value: str) -> str:
        """``x * sigmoid(x)``."""
        return self.add("Mul", value, self.add("Sigmoid", value))

    def quick_gelu(self, value: str) -> str:
        """``x * sigmoid(1.702 x)``."""
        return self.add("Mul", value, self.add("Sigmoid", self.add("Mul", value, self.scalar(1.702))))

    def gelu(self, value: str) -> str:
        """``x / 2 * (1 + erf(x / sqrt(2)))``."""
        if self.opset >= GELU:
            return self.add("Gelu", value)
        erf = self.add("Erf", self.add("Div", value, self.scalar(math.sqrt(2))))
        return self.add("Mul", self.add("Mul", value, self.scalar(0.5)), self.add("Add", erf, self.scalar(1)))

    def doubled(self, value: str) -> str:
        """Every pixel four times."""
        return self.add("Resize", value, "", self.floats("double", (1, 1, 2, 2)), **NEAREST)

    def layer_norm(self, value: str, name: str, epsilon: float) -> str:
        """Over the last axis."""
        inputs = (value, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))
        return self.add("LayerNormalization", *inputs, name=name, axis=-1, epsilon=float(epsilon))

    def added_norm(self, value: str, residual: str, name: str, epsilon: float) -> tuple[str, str]:
        """Two values added; their sum, and its layer norm."""
        summed = self.add("Add", value, residual)
        return summed, self.layer_norm(summed, name, epsilon)

    def group_norm(self, value: str, name: str, groups: int, epsilon: float) -> str:
        """Over groups of channels."""
        weight, bias, epsilon = self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), float(epsilon)
        if self.opset >= GROUP_NORM:
            return self.add("GroupNormalization", value, weight, bias, name=name, num_groups=groups, epsilon=epsilon)
        ones, zeros = (self._filled(number, groups) for number in (1.0, 0.0))
        flat = self.reshape(value, 0, groups, -1)
        normal = self.add("InstanceNormalization", flat, ones, zeros, name=name, epsilon=epsilon)
        back = self.add("Reshape", normal, self.add("Shape", value))
        axes = self.ints(1, 2)
        scaled = self.add("Mul", back, self.add("Unsqueeze", weight, axes))
        return self.add("Add", scaled, self.add("Unsqueeze", bias, axes))

    def _filled(self, value: float, count: int) -> str:
        return self._constant(
            f"filled_{value:g}", self.compute, [count], _packed(value, self.compute) * count, (count,)
        )

    def attention(self, query: str, key: str, value: str, heads: Heads, *, causal: bool = False) -> str:
        """Scaled dot-product attention on ``[batch, sequence, width]``."""
        if self.opset >= FUSED_ATTENTION and not heads.wide:
            counts = {"q_num_heads": heads.count, "kv_num_heads": heads.count}
            attributes = counts | ({"is_causal": 1} if causal else {})
            return self._node("Attention", (query, key, value), attributes)
        dtype = F32 if heads.wide else self.compute
        q = self._as(self._heads(query, heads.count, [0, 2, 1, 3]), dtype)
        k = self._as(self._heads(key, heads.count, [0, 2, 3, 1]), dtype)
        v = self._heads(value, heads.count, [0, 2, 1, 3])
        scores = self.add("MatMul", self.add("Mul", q, self.scalar((heads.width // heads.count) ** -0.5, dtype)), k)
        if causal:
            scores = self.add("Add", scores, self._causal_mask(query, dtype))
        shares = self.add("Softmax", scores, axis=-1)
        shares = shares if dtype is self.compute else self.cast(shares, self.compute)
        mixed = self.add("Transpose", self.add("MatMul", shares, v), perm=[0, 2, 1, 3])
        return self.reshape(mixed, 0, 0, heads.width)

    def _as(self, value: str, dtype: DType) -> str:
        """In a dtype, if it is in the one that is computed in."""
        return value if dtype is self.compute else self.cast(value, dtype)

    def _heads(self, value: str, heads: int, perm: list[int]) -> str:
        return self.add("Transpose", self.reshape(value, 0, 0, heads, -1), perm=perm)

    def _causal_mask(self, value: str, dtype: DType) -> str:
        """What keeps a position from looking ahead: minus infinity above the diagonal."""
        length = self.add("Shape", value, start=1, end=2)
        square = self.add("Concat", length, length, axis=0)
        full = self.add("Expand", self.scalar(float("-inf"), dtype), square)
        return self.add("Trilu", full, self.scalar(1, I64), upper=1)

    def graph(self) -> Graph:
        """What has been drawn."""
        nodes, values = b"".join(self._nodes), b"".join([*self._inputs, *self._outputs])
        return Graph(self.name, self.opset, tuple(self._domains), nodes, tuple(self._initializers.values()), values)


def _packed(value: float, dtype: DType) -> bytes:
    """A number's bytes."""
    code = {"F32": "f", "F16": "e", "I32": "i", "I64": "q", "F64": "d"}.get(dtype.name)
    return struct.pack(f"<{code}", value) if code else struct.pack("<f", value)[2:]  # the upper half of an F32


def _label(value: float) -> str:
    """A number as a name tells it: no two are called the same."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
