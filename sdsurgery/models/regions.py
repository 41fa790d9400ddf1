"""Where in a network a weight sits: which block of the data's flow, and which kind of layer.

Names are canonical ones, diffusers' where both layouts hold the weight. A bias belongs to its layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of layer.

    Attributes:
        id: What it is called here.
        group: What kinds it stands beside; empty where it stands alone.
        label: What it is called within the group.
        words: What it is called anywhere.
    """

    id: str
    group: str
    label: str
    words: str


_LIST = (
    Kind("token", "embed", "token", "token embedding"),
    Kind("position", "embed", "position", "position embedding and ids"),
    Kind("embed", "residual", "embed", "embedding of time or conditions"),
    Kind("norm", "residual", "norm", "norms"),
    Kind("conv", "residual", "conv", "convolutions"),
    Kind("skip", "residual", "skip", "skip connection"),
    Kind("transformer.norm", "transformer", "norm", "the transformer's norms"),
    Kind("transformer.in", "transformer", "in", "projection into the transformer"),
    Kind("transformer.out", "transformer", "out", "projection out of the transformer"),
    Kind("self.q", "self attention", "q", "self attention q"),
    Kind("self.k", "self attention", "k", "self attention k"),
    Kind("self.v", "self attention", "v", "self attention v"),
    Kind("self.qkv", "self attention", "q k v", "self attention q, k and v in one"),
    Kind("self.out", "self attention", "out", "self attention out"),
    Kind("cross.q", "cross attention", "q", "cross attention q"),
    Kind("cross.k", "cross attention", "k", "cross attention k"),
    Kind("cross.v", "cross attention", "v", "cross attention v"),
    Kind("cross.out", "cross attention", "out", "cross attention out"),
    Kind("feed.in", "feed-fwd", "in", "feed-forward in"),
    Kind("feed.out", "feed-fwd", "out", "feed-forward out"),
    Kind("resample", "", "resample", "resampler"),
    Kind("quant", "", "quant", "convolution around the latents"),
    Kind("projection", "", "projection", "text projection"),
    Kind("scale", "", "scale", "logit scale"),
    Kind("other", "", "other", "a tensor that the network doesn't have"),
)

KINDS: Final[Mapping[str, Kind]] = {kind.id: kind for kind in _LIST}
"""Every kind of layer by its id, in the order in which they are shown."""


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """A part of a network that the data flows through as a whole.

    Attributes:
        order: Stage, level and place within the level; sorts blocks in the order of the flow.
        label: What it is called in short: ``IN 04`` as block merging tools call it, ``layer 3``, ``enc 0``.
        name: What diffusers calls it.
    """

    order: tuple[int, int, int]
    label: str
    name: str


OTHER: Final = Block((99, 0, 0), "other", "other")
"""Where what the network doesn't have is put."""


@dataclass(frozen=True, slots=True)
class Region:
    """A block and the kind of a layer in it."""

    block: Block
    kind: Kind


def regions(component: str, names: Iterable[str]) -> dict[str, Region]:
    """Where each of a component's weights sits; :data:`OTHER` for names that no network of that kind has.

    Args:
        component: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``.
        names: Canonical names of all of its weights: how blocks are counted depends on how many a level has.
    """
    listed = list(names)
    if component == "unet":
        return _unet(listed)
    place = _vae if component == "vae" else _text
    return {name: place(_layer(name)) or _NOWHERE for name in listed}


_NOWHERE = Region(OTHER, KINDS["other"])

_RESIDUAL: Final = {
    "time_emb_proj": "embed", "norm1": "norm", "norm2": "norm", "conv1": "conv", "conv2": "conv",
    "conv_shortcut": "skip",
}  # fmt: skip
_ATTENTION: Final = {
    "norm": "transformer.norm", "proj_in": "transformer.in", "proj_out": "transformer.out",
    # The VAE's attention stands alone, without a transformer around it.
    "group_norm": "norm", "to_q": "self.q", "to_k": "self.k", "to_v": "self.v", "to_out.0": "self.out",
}  # fmt: skip
_TRANSFORMER: Final = {
    "attn1.to_q": "self.q", "attn1.to_k": "self.k", "attn1.to_v": "self.v", "attn1.to_out.0": "self.out",
    "attn2.to_q": "cross.q", "attn2.to_k": "cross.k", "attn2.to_v": "cross.v", "attn2.to_out.0": "cross.out",
    "ff.net.0.proj": "feed.in", "ff.net.2": "feed.out",
    "norm1": "transformer.norm", "norm2": "transformer.norm", "norm3": "transformer.norm",
}  # fmt: skip
_TEXT_LAYER: Final = {
    "self_attn.q_proj": "self.q", "self_attn.k_proj": "self.k", "self_attn.v_proj": "self.v",
    "self_attn.out_proj": "self.out", "mlp.fc1": "feed.in", "mlp.fc2": "feed.out",
    "layer_norm1": "norm", "layer_norm2": "norm",
    # open_clip's last layer keeps its names where diffusers has no place for it.
    "attn.in_proj": "self.qkv", "attn.out_proj": "self.out", "mlp.c_fc": "feed.in", "mlp.c_proj": "feed.out",
    "ln_1": "norm", "ln_2": "norm",
}  # fmt: skip

_LEVEL = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,3})\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.\d{1,3}\.(.+)")
_BLOCK = re.compile(r"transformer_blocks\.\d{1,3}\.(.+)")
_TEXT = re.compile(r"(?:text_model\.encoder\.layers|transformer\.resblocks)\.(\d{1,3})\.(.+)")


def _layer(name: str) -> str:
    """The layer that a weight or a bias is of."""
    return re.sub(r"[._](?:weight|bias)\Z", "", name)


def _kind(part: str, rest: str) -> str | None:
    """The kind of a layer in a residual block, an attention or a resampler."""
    if part == "resnets":
        return _RESIDUAL.get(rest)
    if part == "attentions":
        inner = _BLOCK.fullmatch(rest)
        return _TRANSFORMER.get(inner[1]) if inner else _ATTENTION.get(rest)
    return "resample" if rest == "conv" else None


def _region(order: tuple[int, int, int], label: str, name: str, kind: str | None) -> Region | None:
    return Region(Block(order, label, name), KINDS[kind]) if kind else None


# ---------------------------------------------------------------- UNet

_UNET_ENDS: Final = {
    "time_embedding.linear_1": ((0, 0, 0), "time", "time_embedding", "embed"),
    "time_embedding.linear_2": ((0, 0, 0), "time", "time_embedding", "embed"),
    "add_embedding.linear_1": ((0, 0, 1), "vector", "add_embedding", "embed"),
    "add_embedding.linear_2": ((0, 0, 1), "vector", "add_embedding", "embed"),
    "conv_in": ((1, 0, 0), "IN 00", "conv_in", "conv"),
    "conv_norm_out": ((5, 0, 0), "final", "conv_norm_out, conv_out", "norm"),
    "conv_out": ((5, 0, 0), "final", "conv_norm_out, conv_out", "conv"),
}


def _unet(names: list[str]) -> dict[str, Region]:
    down, up = _blocks_a_level("down", names), _blocks_a_level("up", names)
    return {name: _unet_region(_layer(name), down, up) or _NOWHERE for name in names}


def _blocks_a_level(side: str, names: Iterable[str]) -> int:
    """Residual blocks of a level, as most levels have them: a stray name alone doesn't renumber the others."""
    most: dict[str, int] = {}
    for name in names:
        match = _LEVEL.fullmatch(name)
        if match and match[1] == side and match[3] == "resnets":
            most[match[2]] = max(most.get(match[2], 0), int(match[4]) + 1)
    return Counter(most.values()).most_common(1)[0][0] if most else 0


def _unet_region(layer: str, down: int, up: int) -> Region | None:
    """A weight's region where ``down`` and ``up`` are the residual blocks of a level on the way down and up.

    The numbers are ldm's: a downsampler is a block of its own, an upsampler belongs to the block before it.
    """
    if layer in _UNET_ENDS:
        return _region(*_UNET_ENDS[layer])
    middle = _MIDDLE.fullmatch(layer)
    if middle:
        return _region((3, 0, 0), "MID", "mid_block", _kind(middle[1], middle[2]))
    match = _LEVEL.fullmatch(layer)
    if not match:
        return None
    side, level, part, kind = match[1], int(match[2]), match[3], _kind(match[3], match[5])
    position = int(match[4])
    if part == "downsamplers":
        position = down
    elif part == "upsamplers":
        position = max(0, up - 1)
    name = f"{side}_blocks.{level}.{part}.0" if part == "downsamplers" else f"{side}_blocks.{level}, {position}"
    if side == "down":
        return _region((2, level, position), f"IN {1 + level * (down + 1) + position:02}", name, kind)
    return _region((4, level, position), f"OUT {level * up + position:02}", name, kind)


# ---------------------------------------------------------------- VAE

_VAE_ENDS: Final = {
    "encoder.conv_in": ((0, 0, 0), "enc in", "encoder.conv_in", "conv"),
    "encoder.conv_norm_out": ((3, 0, 0), "enc out", "encoder.conv_out, quant_conv", "norm"),
    "encoder.conv_out": ((3, 0, 0), "enc out", "encoder.conv_out, quant_conv", "conv"),
    "quant_conv": ((3, 0, 0), "enc out", "encoder.conv_out, quant_conv", "quant"),
    "post_quant_conv": ((4, 0, 0), "dec in", "post_quant_conv, decoder.conv_in", "quant"),
    "decoder.conv_in": ((4, 0, 0), "dec in", "post_quant_conv, decoder.conv_in", "conv"),
    "decoder.conv_norm_out": ((7, 0, 0), "dec out", "decoder.conv_out", "norm"),
    "decoder.conv_out": ((7, 0, 0), "dec out", "decoder.conv_out", "conv"),
}


def _vae(layer: str) -> Region | None:
    if layer in _VAE_ENDS:
        return _region(*_VAE_ENDS[layer])
    side, _, rest = layer.partition(".")
    if side not in {"encoder", "decoder"}:
        return None
    short, middle, levels = ("enc", 2, 1) if side == "encoder" else ("dec", 5, 6)
    match = _MIDDLE.fullmatch(rest)
    if match:
        return _region((middle, 0, 0), f"{short} mid", f"{side}.mid_block", _kind(match[1], match[2]))
    match = _LEVEL.fullmatch(rest)
    if not match:
        return None
    level = int(match[2])
    return _region(
        (levels, 0, level), f"{short} {level}", f"{side}.{match[1]}_blocks.{level}", _kind(match[3], match[5])
    )


# ---------------------------------------------------------------- text encoders

_TEXT_ENDS: Final = {
    "text_model.embeddings.token_embedding": ((0, 0, 0), "embed", "embed", "token"),
    "text_model.embeddings.position_embedding": ((0, 0, 0), "embed", "embed", "position"),
    "text_model.embeddings.position_ids": ((0, 0, 0), "embed", "embed", "position"),
    "text_model.final_layer_norm": ((2, 0, 0), "final", "final_layer_norm", "norm"),
    "text_projection": ((3, 0, 0), "project", "text_projection", "projection"),
    "logit_scale": ((3, 0, 0), "project", "text_projection", "scale"),
}


def _text(layer: str) -> Region | None:
    if layer in _TEXT_ENDS:
        return _region(*_TEXT_ENDS[layer])
    match = _TEXT.fullmatch(layer)
    if not match:
        return None
    index = int(match[1])
    return _region((1, 0, index), f"layer {index}", f"encoder.layers.{index}", _TEXT_LAYER.get(match[2]))
