"""The VAE's two graphs, computed as diffusers' ``AutoencoderKL`` computes them; the latent scale stays outside.

The sizes of an output are named as terms of those of the input: optimum's pipelines compute them before a run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dtypes import F32
from ..models.walks import VaeConfig
from .drawing import Drawing, Heads

_EPSILON = 1e-6


def draw_encoder(drawing: Drawing, config: VaeConfig, document: Mapping[str, Any], *, sampled: bool) -> None:
    """From pixels to latents.

    Args:
        drawing: An empty one that has the weights.
        config: The structure.
        document: The ``config.json``.
        sampled: Whether the latents are drawn within the graph, as diffusers' ONNX pipeline wants it; else the output
            is their mean and log variance, one after the other by channels.
    """
    d, vae = drawing, _Vae(drawing, config, document)
    value = d.input("sample", d.compute, ["batch", config.pixels, "height", "width"])
    value = d.conv(value, "encoder.conv_in")
    last = len(config.channels) - 1
    for level in range(len(config.channels)):
        block = f"encoder.down_blocks.{level}"
        for position in range(config.residual):
            value = vae.residual(value, f"{block}.resnets.{position}")
        if level < last:
            value = d.conv(value, f"{block}.downsamplers.0.conv", stride=2, pads=(0, 0, 1, 1))
    value = vae.ending(vae.middle(value, "encoder"), "encoder")
    value = d.conv(value, "quant_conv")
    sizes = [f"{size} / {1 << last}" for size in ("height", "width")]
    if sampled:
        d.output("latent_sample", _sampled(d, value), ["batch", config.latent, *sizes])
    else:
        d.output("latent_parameters", value, ["batch", 2 * config.latent, *sizes])


_LEAST, _MOST = -30.0, 20.0
"""What diffusers' ``DiagonalGaussianDistribution`` clamps the log variance to."""


def _sampled(d: Drawing, parameters: str) -> str:
    mean, log_variance = d.split(parameters, 1)
    clamped = d.add("Clip", log_variance, d.scalar(_LEAST), d.scalar(_MOST))
    deviation = d.add("Exp", d.add("Mul", clamped, d.scalar(0.5)))
    if d.compute is F32:
        noise = d.add("RandomNormalLike", mean)
    else:  # which knows no bf16 in the opsets that are run
        noise = d.cast(d.add("RandomNormalLike", d.cast(mean, F32)), d.compute)
    return d.add("Add", mean, d.add("Mul", deviation, noise))


def draw_decoder(drawing: Drawing, config: VaeConfig, document: Mapping[str, Any]) -> None:
    """From latents to pixels."""
    d, vae = drawing, _Vae(drawing, config, document)
    value = d.input("latent_sample", d.compute, ["batch", config.latent, "latent_height", "latent_width"])
    value = vae.middle(d.conv(d.conv(value, "post_quant_conv"), "decoder.conv_in"), "decoder")
    for level in range(len(config.channels)):
        block = f"decoder.up_blocks.{level}"
        for position in range(config.residual + 1):
            value = vae.residual(value, f"{block}.resnets.{position}")
        if level < len(config.channels) - 1:
            value = d.conv(d.doubled(value), f"{block}.upsamplers.0.conv")
    value = vae.ending(value, "decoder")
    sizes = [f"{size} * {1 << len(config.channels) - 1}" for size in ("latent_height", "latent_width")]
    d.output("sample", value, ["batch", config.pixels, *sizes])


class _Vae:
    def __init__(self, drawing: Drawing, config: VaeConfig, document: Mapping[str, Any]) -> None:
        self.d, self.groups, self.width = drawing, document.get("norm_num_groups", 32), config.channels[-1]

    def residual(self, value: str, name: str) -> str:
        d, inner = self.d, value
        for index in (1, 2):
            inner = d.silu(d.group_norm(inner, f"{name}.norm{index}", self.groups, _EPSILON))
            inner = d.conv(inner, f"{name}.conv{index}")
        if d.has(f"{name}.conv_shortcut.weight"):
            value = d.conv(value, f"{name}.conv_shortcut")
        return d.add("Add", value, inner)

    def middle(self, value: str, part: str) -> str:
        value = self.residual(value, f"{part}.mid_block.resnets.0")
        value = self.attention(value, f"{part}.mid_block.attentions.0")
        return self.residual(value, f"{part}.mid_block.resnets.1")

    def attention(self, value: str, name: str) -> str:
        """One head over all positions."""
        d = self.d
        normal = d.reshape(d.group_norm(value, f"{name}.group_norm", self.groups, _EPSILON), 0, self.width, -1)
        normal = d.add("Transpose", normal, perm=[0, 2, 1])
        query, key, held = (d.linear(normal, f"{name}.{part}") for part in ("to_q", "to_k", "to_v"))
        mixed = d.linear(d.attention(query, key, held, Heads(1, self.width)), f"{name}.to_out.0")
        back = d.add("Reshape", d.add("Transpose", mixed, perm=[0, 2, 1]), d.add("Shape", value))
        return d.add("Add", back, value)

    def ending(self, value: str, part: str) -> str:
        d = self.d
        normal = d.silu(d.group_norm(value, f"{part}.conv_norm_out", self.groups, _EPSILON))
        return d.conv(normal, f"{part}.conv_out")
