"""The UNet's graph, computed as diffusers' ``UNet2DConditionModel`` computes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..dtypes import F32
from ..models.walks import UNetConfig
from .drawing import NEAREST, Drawing, Heads

_TRANSFORMER_EPSILON = 1e-6
_LAYER_EPSILON = 1e-5
_LONGEST_PERIOD = 10000


def draw_unet(
    drawing: Drawing, config: UNetConfig, document: Mapping[str, Any], *, numbers: int = 6, steps: bool = False
) -> None:
    """Draw it.

    Args:
        drawing: An empty one that has the weights' shapes.
        config: The structure.
        document: The ``config.json``.
        numbers: How many numbers of size and crop SDXL's ``time_ids`` holds: 6, and 5 in the refiner.
        steps: Whether the time step is a list, as diffusers' ONNX pipeline gives it, and not a number.
    """
    _UNet(drawing, config, document, numbers).draw(steps=steps)


class _UNet:
    def __init__(self, drawing: Drawing, config: UNetConfig, document: Mapping[str, Any], numbers: int) -> None:
        self.d, self.config = drawing, config
        self.groups, self.epsilon = document.get("norm_num_groups", 32), document.get("norm_eps", 1e-5)
        heads = document.get("num_attention_heads") or document.get("attention_head_dim", 8)
        self.heads = [heads] * len(config.channels) if isinstance(heads, int) else list(heads)
        self.flip, self.shift = document.get("flip_sin_to_cos", True), document.get("freq_shift", 0)
        self.wide = bool(document.get("upcast_attention"))
        self.addition = int(document.get("addition_time_embed_dim") or 0)
        self.numbers = numbers
        self.centered = bool(document.get("center_input_sample"))

    def draw(self, *, steps: bool) -> None:
        d, config = self.d, self.config
        sample = d.input("sample", d.compute, ["batch", config.inputs, "height", "width"])
        timestep = d.input("timestep", d.compute, ["steps"] if steps else [])
        self.text = d.input("encoder_hidden_states", d.compute, ["batch", "sequence", config.context])
        self.time = d.silu(self._time(timestep))
        if self.centered:
            sample = d.add("Sub", d.add("Mul", sample, d.scalar(2)), d.scalar(1))
        value = d.conv(sample, "conv_in")
        value, skips = self._down(value)
        value = self._residual(value, "mid_block.resnets.0")
        value = self._transformer(value, "mid_block.attentions.0", len(config.channels) - 1, config.middle)
        value = self._residual(value, "mid_block.resnets.1")
        value = self._up(value, skips)
        value = d.silu(d.group_norm(value, "conv_norm_out", self.groups, self.epsilon))
        d.output("out_sample", d.conv(value, "conv_out"), ["batch", config.outputs, "height", "width"])

    def _time(self, timestep: str) -> str:
        """The embedding of the time step, and of SDXL's conditions beside the text."""
        d = self.d
        steps = d.reshape(timestep, -1)
        time = self._embedded("time_embedding", self._sinusoids(steps, self.config.channels[0]))
        if not self.config.vector:
            return time
        pooled = self.config.conditions - self.numbers * self.addition
        text = d.input("text_embeds", d.compute, ["batch", pooled])
        ids = d.input("time_ids", d.compute, ["batch", self.numbers])
        waves = d.reshape(self._sinusoids(d.reshape(ids, -1), self.addition), -1, self.numbers * self.addition)
        return d.add("Add", time, self._embedded("add_embedding", d.add("Concat", text, waves, axis=-1)))

    def _sinusoids(self, values: str, width: int) -> str:
        """Sines and cosines of numbers, ``[count, width]``; computed in fp32 whatever the rest is in."""
        d, half = self.d, width // 2
        rates = [math.exp(-math.log(_LONGEST_PERIOD) * index / (half - self.shift)) for index in range(half)]
        column = d.add("Unsqueeze", d.cast(values, F32), d.ints(1))
        angles = d.add("Mul", column, d.floats(f"rates/{width}", rates))
        waves = [d.add("Sin", angles), d.add("Cos", angles)]
        joined = d.add("Concat", *(reversed(waves) if self.flip else waves), axis=-1)
        return joined if d.compute is F32 else d.cast(joined, d.compute)

    def _embedded(self, name: str, value: str) -> str:
        return self.d.linear(self.d.silu(self.d.linear(value, f"{name}.linear_1")), f"{name}.linear_2")

    def _down(self, value: str) -> tuple[str, list[str]]:
        skips, config = [value], self.config
        for level, depth in enumerate(config.depths):
            block = f"down_blocks.{level}"
            for position in range(config.residual):
                value = self._residual(value, f"{block}.resnets.{position}")
                value = self._transformer(value, f"{block}.attentions.{position}", level, depth)
                skips.append(value)
            if level < len(config.depths) - 1:
                value = self.d.conv(value, f"{block}.downsamplers.0.conv", stride=2)
                skips.append(value)
        return value, skips

    def _up(self, value: str, skips: list[str]) -> str:
        config = self.config
        for up, level in enumerate(reversed(range(len(config.depths)))):
            block = f"up_blocks.{up}"
            for position in range(config.residual + 1):
                value = self.d.add("Concat", value, skips.pop(), axis=1)
                value = self._residual(value, f"{block}.resnets.{position}")
                value = self._transformer(value, f"{block}.attentions.{position}", level, config.depths[level])
            if level:
                value = self.d.conv(self._enlarged(value, skips[-1]), f"{block}.upsamplers.0.conv")
        return value

    def _enlarged(self, value: str, like: str) -> str:
        """To the height and width of what it will be joined with, which is twice as much or one less."""
        d = self.d
        sizes = d.add("Concat", d.add("Shape", value, start=0, end=2), d.add("Shape", like, start=2, end=4), axis=0)
        return d.add("Resize", value, "", "", sizes, **NEAREST)

    def _residual(self, value: str, name: str) -> str:
        d = self.d
        inner = d.conv(d.silu(d.group_norm(value, f"{name}.norm1", self.groups, self.epsilon)), f"{name}.conv1")
        time = d.add("Unsqueeze", d.linear(self.time, f"{name}.time_emb_proj"), d.ints(2, 3))
        inner = d.add("Add", inner, time)
        inner = d.conv(d.silu(d.group_norm(inner, f"{name}.norm2", self.groups, self.epsilon)), f"{name}.conv2")
        if d.has(f"{name}.conv_shortcut.weight"):
            value = d.conv(value, f"{name}.conv_shortcut")
        return d.add("Add", value, inner)

    def _transformer(self, value: str, name: str, level: int, depth: int) -> str:
        if not depth:
            return value
        d, width = self.d, self.config.channels[level]
        shape = d.add("Shape", value)
        inner = d.group_norm(value, f"{name}.norm", self.groups, _TRANSFORMER_EPSILON)
        if not self.config.linear:
            inner = d.conv(inner, f"{name}.proj_in")
        inner = d.add("Transpose", d.reshape(inner, 0, width, -1), perm=[0, 2, 1])
        if self.config.linear:
            inner = d.linear(inner, f"{name}.proj_in")
        for index in range(depth):
            inner = self._block(inner, f"{name}.transformer_blocks.{index}", level)
        if self.config.linear:
            inner = d.linear(inner, f"{name}.proj_out")
        inner = d.add("Reshape", d.add("Transpose", inner, perm=[0, 2, 1]), shape)
        if not self.config.linear:
            inner = d.conv(inner, f"{name}.proj_out")
        return d.add("Add", inner, value)

    def _block(self, value: str, name: str, level: int) -> str:
        d = self.d
        normal = d.layer_norm(value, f"{name}.norm1", _LAYER_EPSILON)
        mixed = self._attention(normal, normal, f"{name}.attn1", level)
        value, normal = d.added_norm(mixed, value, f"{name}.norm2", _LAYER_EPSILON)
        mixed = self._attention(normal, self.text, f"{name}.attn2", level)
        value, normal = d.added_norm(mixed, value, f"{name}.norm3", _LAYER_EPSILON)
        gated = d.linear(normal, f"{name}.ff.net.0.proj")
        inner, gate = d.split(gated, -1)
        return d.add("Add", d.linear(d.add("Mul", inner, d.gelu(gate)), f"{name}.ff.net.2"), value)

    def _attention(self, value: str, source: str, name: str, level: int) -> str:
        d = self.d
        query = d.linear(value, f"{name}.to_q", bias=False)
        key, held = (d.linear(source, f"{name}.{part}", bias=False) for part in ("to_k", "to_v"))
        mixed = d.attention(query, key, held, Heads(self.heads[level], self.config.channels[level], self.wide))
        return d.linear(mixed, f"{name}.to_out.0")
