"""The text encoders' graphs, computed as transformers' ``CLIPTextModel`` computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dtypes import I64, DType
from .drawing import Drawing, Heads

_OLD_END = 2
"""Configs from before transformers knew the end token's id: the end is then where the largest id stands."""


def draw_text_encoder(
    drawing: Drawing, document: Mapping[str, Any], *, projected: bool, states: bool, ids: DType = I64
) -> None:
    """Draw it.

    Args:
        drawing: An empty one that has the weights' shapes.
        document: The ``config.json``.
        projected: Whether the pooled state is projected (``text_embeds``) and nothing else is pooled.
        states: Whether the states of all layers are outputs.
        ids: Dtype of the token ids.
    """
    d, width, layers = drawing, document["hidden_size"], document["num_hidden_layers"]
    epsilon, heads = document.get("layer_norm_eps", 1e-5), document["num_attention_heads"]
    activation = d.quick_gelu if document.get("hidden_act", "quick_gelu") == "quick_gelu" else d.gelu
    tokens = d.input("input_ids", ids, ["batch", "sequence"])
    words, at = (f"{_ROOT}embeddings.{part}_embedding" for part in ("token", "position"))
    value = d.add("Gather", d.weight(f"{words}.weight"), tokens, name=words, axis=0)
    length = d.add("Shape", tokens, start=1, end=2)
    places = d.add("Slice", d.weight(f"{at}.weight"), d.ints(0), length, d.ints(0), name=at)
    value = d.add("Add", value, places)
    passed = [value]
    names = [f"{_ROOT}encoder.layers.{index}" for index in range(layers)]
    after = [*(f"{name}.layer_norm1" for name in names[1:]), f"{_ROOT}final_layer_norm"]
    normal = d.layer_norm(value, f"{names[0]}.layer_norm1" if names else after[0], epsilon)
    for name, following in zip(names, after, strict=False):
        query, key, held = (d.linear(normal, f"{name}.self_attn.{part}_proj") for part in "qkv")
        mixed = d.attention(query, key, held, Heads(heads, width), causal=True)
        mixed = d.linear(mixed, f"{name}.self_attn.out_proj")
        value, normal = d.added_norm(mixed, value, f"{name}.layer_norm2", epsilon)
        inner = d.linear(activation(d.linear(normal, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        value, normal = d.added_norm(inner, value, following, epsilon)
        passed.append(value)
    final = normal
    pooled = _pooled(d, final, tokens, document.get("eos_token_id", 49407), ids)
    if projected:
        embeds = d.linear(pooled, "text_projection", bias=False)
        d.output("text_embeds", embeds, ["batch", document["projection_dim"]])
    d.output("last_hidden_state", final, ["batch", "sequence", width])
    if not projected:
        d.output("pooler_output", pooled, ["batch", width])
    for index, value in enumerate(passed) if states else ():
        d.output(f"hidden_states.{index}", value, ["batch", "sequence", width])


_ROOT = "text_model."


def _pooled(d: Drawing, final: str, tokens: str, end: int, ids: DType) -> str:
    """The state at the end token, the first of them."""
    marks = tokens if end == _OLD_END else d.cast(d.add("Equal", tokens, d.scalar(end, ids)), I64)
    places = d.add("ArgMax", marks, axis=-1, keepdims=1)
    return d.add("GatherND", final, places, batch_dims=1)
