"""Graphs with ONNX Runtime's own operators, those that its transformer optimizer fuses others into.

They are drawn where that optimizer would find them, and nothing is packed: a graph keeps its weights under their names
and in their shapes, and can be read back like any other. Operators that ONNX Runtime (as of 1.31) has for GPUs alone,
such as group norms and convolutions with channels last, aren't drawn.
"""

from __future__ import annotations

from typing import Final

from .drawing import Drawing, Heads
from .encoding import Node

DOMAIN: Final = "com.microsoft"


class FusedDrawing(Drawing):
    """A graph for ONNX Runtime alone, and older ones, too: attention is one operator with every opset."""

    def _own(self, op: str, *inputs: str, **attributes: float) -> str:
        name = f"{op}_{len(self._nodes)}"
        return self._put(Node(op, name, inputs, [name], attributes, DOMAIN))[0]

    def quick_gelu(self, value: str) -> str:
        """``x * sigmoid(1.702 x)``."""
        return self._own("QuickGelu", value, alpha=1.702)

    def gelu(self, value: str) -> str:
        """``x / 2 * (1 + erf(x / sqrt(2)))``."""
        return self._own("Gelu", value)

    def added_norm(self, value: str, residual: str, name: str, epsilon: float) -> tuple[str, str]:
        """Two values added, and the layer norm of the sum, at once."""
        inputs = (value, residual, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))
        summed = f"{name}/sum"
        node = Node("SkipLayerNormalization", name, inputs, [name, "", "", summed], {"epsilon": float(epsilon)}, DOMAIN)
        self._put(node)
        return summed, name

    def attention(self, query: str, key: str, value: str, heads: Heads, *, causal: bool = False) -> str:
        """Scaled dot-product attention; where scores are wanted in fp32, it is drawn step by step."""
        if heads.wide:
            return super().attention(query, key, value, heads, causal=causal)
        attributes = {"num_heads": heads.count} | ({"unidirectional": 1} if causal else {})
        return self._own("MultiHeadAttention", query, key, value, **attributes)
