"""One walk a component: every weight with its ldm name and its shape.

A walk takes its widths as arguments. They are integers for a model at hand, and :class:`Width` symbols when the
widths of a model are still to be found: see :func:`solve`. A walk adds and multiplies them and asks whether two
are equal, nothing else, so the same lines serve both.

The structures are those of CompVis' ``ldm`` (``openaimodel.UNetModel``, ``model.Encoder`` and ``Decoder``), of
Stability's ``sgm``, of ``open_clip`` and of transformers' ``CLIPTextModel``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

Size = Any
"""An ``int``, or a :class:`Width` while the widths are unknown."""


@dataclass(frozen=True, slots=True)
class Width:
    """An unknown size: a sum of named sizes with factors."""

    terms: tuple[tuple[str, int], ...]

    @classmethod
    def named(cls, name: str) -> Self:
        """The unknown of this name."""
        return cls(((name, 1),))

    def __add__(self, other: Width) -> Width:
        total: Counter[str] = Counter(dict(self.terms))
        total.update(dict(other.terms))
        return Width(tuple(sorted(total.items())))

    def __mul__(self, factor: int) -> Width:
        return Width(tuple((name, count * factor) for name, count in self.terms))

    __rmul__ = __mul__


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that a component has.

    Attributes:
        name: Its ldm name within the component.
        shape: Its shape.
        optional: Whether published models go without it.
    """

    name: str
    shape: tuple[Size, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """A UNet: what its keys tell (structure), then what its shapes tell (widths).

    Attributes:
        depths: Transformer blocks in each attention of a level, from the outermost level in; 0 for none.
        middle: Transformer blocks in the middle.
        linear: Whether ``proj_in`` and ``proj_out`` are linear (2-D) and not convolutions (4-D).
        vector: Whether it takes a vector beside the text (``label_emb``; SDXL's size and crop conditions).
        residual: Residual blocks a level.
        channels: Widths of the levels.
        inputs: Latent channels in, 4 and what a variant adds.
        outputs: Latent channels out.
        time: Width of the time embedding.
        context: Width of the text encoder's states.
        conditions: Width of the vector.
    """

    depths: tuple[int, ...]
    middle: int
    linear: bool
    vector: bool = False
    residual: int = 2
    channels: tuple[Size, ...] = ()
    inputs: Size = 4
    outputs: Size = 4
    time: Size = 0
    context: Size = 0
    conditions: Size = 0


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """An AutoencoderKL.

    Attributes:
        residual: Residual blocks of a level in the encoder; the decoder has one more.
        channels: Widths of the levels, from the pixels in.
        pixels: Image channels.
        latent: Latent channels.
    """

    residual: int = 2
    channels: tuple[Size, ...] = (0, 0, 0, 0)
    pixels: Size = 3
    latent: Size = 4


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """CLIP's text transformer as transformers names it.

    Attributes:
        layers: How many.
        width: Of its states.
        inner: Of the layers' feed-forward part.
        vocabulary: Tokens.
        positions: The longest sequence; 77 for all that OpenAI published.
        projected: Whether a projection follows, as in transformers' ``CLIPTextModelWithProjection``.
        projection: Width of the projected state.
    """

    layers: int = 12
    projected: bool = False
    width: Size = 0
    inner: Size = 0
    vocabulary: Size = 0
    positions: Size = 0
    projection: Size = 0


@dataclass(frozen=True, slots=True)
class OpenClipConfig:
    """CLIP's text transformer as open_clip names it.

    Attributes:
        layers: How many; SD2 uses the last but one, and some models were published without the last.
        last_optional: Whether the last layer and the projection may be missing.
        width: Of its states.
        inner: Of the layers' feed-forward part.
        vocabulary: Tokens.
        positions: The longest sequence.
        projection: Width of the projected state.
    """

    layers: int = 24
    last_optional: bool = False
    width: Size = 0
    inner: Size = 0
    vocabulary: Size = 0
    positions: Size = 0
    projection: Size = 0


def _pair(name: str, shape: tuple[Size, ...], *, bias: bool = True) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", shape)
    if bias:
        yield Weight(f"{name}.bias", shape[:1])


def _conv(name: str, inputs: Size, outputs: Size, kernel: int) -> Iterator[Weight]:
    yield from _pair(name, (outputs, inputs, kernel, kernel))


def walk_unet(config: UNetConfig) -> Iterator[Weight]:
    """Every weight of a UNet, in the order of the forward pass."""
    channels, time = config.channels, config.time
    base = channels[0]
    for name, width in (("time_embed", base), ("label_emb.0", config.conditions)):
        if name == "time_embed" or config.vector:
            yield from _pair(f"{name}.0", (time, width))
            yield from _pair(f"{name}.2", (time, time))
    yield from _conv("input_blocks.0.0", config.inputs, base, 3)
    skips, width, index = [base], base, 1
    for level, depth in enumerate(config.depths):
        for _ in range(config.residual):
            yield from _unet_residual(f"input_blocks.{index}.0", width, channels[level], time)
            width = channels[level]
            yield from _transformer(f"input_blocks.{index}.1", width, depth, config)
            skips.append(width)
            index += 1
        if level < len(config.depths) - 1:
            yield from _conv(f"input_blocks.{index}.0.op", width, width, 3)
            skips.append(width)
            index += 1
    yield from _unet_residual("middle_block.0", width, width, time)
    yield from _transformer("middle_block.1", width, config.middle, config)
    yield from _unet_residual("middle_block.2", width, width, time)
    index = 0
    for level in reversed(range(len(config.depths))):
        depth = config.depths[level]
        for position in range(config.residual + 1):
            yield from _unet_residual(f"output_blocks.{index}.0", width + skips.pop(), channels[level], time)
            width = channels[level]
            yield from _transformer(f"output_blocks.{index}.1", width, depth, config)
            if level and position == config.residual:
                yield from _conv(f"output_blocks.{index}.{2 if depth else 1}.conv", width, width, 3)
            index += 1
    yield from _pair("out.0", (base,))
    yield from _conv("out.2", base, config.outputs, 3)


def _unet_residual(name: str, inputs: Size, outputs: Size, time: Size) -> Iterator[Weight]:
    yield from _pair(f"{name}.in_layers.0", (inputs,))
    yield from _conv(f"{name}.in_layers.2", inputs, outputs, 3)
    yield from _pair(f"{name}.emb_layers.1", (outputs, time))
    yield from _pair(f"{name}.out_layers.0", (outputs,))
    yield from _conv(f"{name}.out_layers.3", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{name}.skip_connection", inputs, outputs, 1)


def _transformer(name: str, width: Size, depth: int, config: UNetConfig) -> Iterator[Weight]:
    if not depth:
        return
    projection = (width, width) if config.linear else (width, width, 1, 1)
    yield from _pair(f"{name}.norm", (width,))
    yield from _pair(f"{name}.proj_in", projection)
    for block in (f"{name}.transformer_blocks.{index}" for index in range(depth)):
        for attention, source in (("attn1", width), ("attn2", config.context)):
            yield from _pair(f"{block}.{attention}.to_q", (width, width), bias=False)
            yield from _pair(f"{block}.{attention}.to_k", (width, source), bias=False)
            yield from _pair(f"{block}.{attention}.to_v", (width, source), bias=False)
            yield from _pair(f"{block}.{attention}.to_out.0", (width, width))
        yield from _pair(f"{block}.ff.net.0.proj", (8 * width, width))
        yield from _pair(f"{block}.ff.net.2", (width, 4 * width))
        for norm in ("norm1", "norm2", "norm3"):
            yield from _pair(f"{block}.{norm}", (width,))
    yield from _pair(f"{name}.proj_out", projection)


def walk_vae(config: VaeConfig) -> Iterator[Weight]:
    """Every weight of an AutoencoderKL."""
    channels, latent = config.channels, config.latent
    inner = channels[-1]
    yield from _conv("encoder.conv_in", config.pixels, channels[0], 3)
    width = channels[0]
    for level, target in enumerate(channels):
        for block in range(config.residual):
            yield from _vae_residual(f"encoder.down.{level}.block.{block}", width, target)
            width = target
        if level < len(channels) - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    yield from _vae_middle("encoder", inner)
    yield from _pair("encoder.norm_out", (inner,))
    yield from _conv("encoder.conv_out", inner, 2 * latent, 3)
    yield from _conv("decoder.conv_in", latent, inner, 3)
    yield from _vae_middle("decoder", inner)
    width = inner
    for level in reversed(range(len(channels))):
        for block in range(config.residual + 1):
            yield from _vae_residual(f"decoder.up.{level}.block.{block}", width, channels[level])
            width = channels[level]
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    yield from _pair("decoder.norm_out", (channels[0],))
    yield from _conv("decoder.conv_out", channels[0], config.pixels, 3)
    yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    yield from _conv("post_quant_conv", latent, latent, 1)


def _vae_middle(part: str, width: Size) -> Iterator[Weight]:
    yield from _vae_residual(f"{part}.mid.block_1", width, width)
    yield from _pair(f"{part}.mid.attn_1.norm", (width,))
    for name in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{part}.mid.attn_1.{name}", width, width, 1)
    yield from _vae_residual(f"{part}.mid.block_2", width, width)


def _vae_residual(name: str, inputs: Size, outputs: Size) -> Iterator[Weight]:
    yield from _pair(f"{name}.norm1", (inputs,))
    yield from _conv(f"{name}.conv1", inputs, outputs, 3)
    yield from _pair(f"{name}.norm2", (outputs,))
    yield from _conv(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{name}.nin_shortcut", inputs, outputs, 1)


def walk_clip(config: ClipConfig) -> Iterator[Weight]:
    """Every weight of CLIP's text transformer, without the buffer of position ids."""
    width = config.width
    yield Weight("text_model.embeddings.token_embedding.weight", (config.vocabulary, width))
    yield Weight("text_model.embeddings.position_embedding.weight", (config.positions, width))
    for layer in (f"text_model.encoder.layers.{index}" for index in range(config.layers)):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _pair(f"{layer}.self_attn.{name}", (width, width))
        yield from _pair(f"{layer}.layer_norm1", (width,))
        yield from _pair(f"{layer}.mlp.fc1", (config.inner, width))
        yield from _pair(f"{layer}.mlp.fc2", (width, config.inner))
        yield from _pair(f"{layer}.layer_norm2", (width,))
    yield from _pair("text_model.final_layer_norm", (width,))
    if config.projected:
        yield Weight("text_projection.weight", (config.projection, width))


def walk_open_clip(config: OpenClipConfig) -> Iterator[Weight]:
    """Every weight of open_clip's text transformer."""
    width = config.width
    yield Weight("positional_embedding", (config.positions, width))
    yield Weight("token_embedding.weight", (config.vocabulary, width))
    for index in range(config.layers):
        optional = config.last_optional and index == config.layers - 1
        for weight in _open_clip_layer(f"transformer.resblocks.{index}", width, config.inner):
            yield replace(weight, optional=optional)
    yield from _pair("ln_final", (width,))
    yield Weight("text_projection", (width, config.projection), optional=config.last_optional)
    yield Weight("logit_scale", (), optional=True)


def _open_clip_layer(layer: str, width: Size, inner: Size) -> Iterator[Weight]:
    yield Weight(f"{layer}.attn.in_proj_weight", (3 * width, width))
    yield Weight(f"{layer}.attn.in_proj_bias", (3 * width,))
    yield from _pair(f"{layer}.attn.out_proj", (width, width))
    yield from _pair(f"{layer}.ln_1", (width,))
    yield from _pair(f"{layer}.mlp.c_fc", (inner, width))
    yield from _pair(f"{layer}.mlp.c_proj", (width, inner))
    yield from _pair(f"{layer}.ln_2", (width,))


Config = UNetConfig | VaeConfig | ClipConfig | OpenClipConfig

_WALKS: Final[dict[type[Any], Callable[[Any], Iterator[Weight]]]] = {
    UNetConfig: walk_unet,
    VaeConfig: walk_vae,
    ClipConfig: walk_clip,
    OpenClipConfig: walk_open_clip,
}

_STRUCTURE: Final = frozenset(
    {"depths", "middle", "linear", "vector", "residual", "layers", "last_optional", "projected"}
)


def walk(config: Config) -> Iterator[Weight]:
    """Every weight of the component that a config describes."""
    return _WALKS[type(config)](config)


def symbolic(config: Config) -> Config:
    """The config with a symbol for every width: a walk over it yields all keys that the structure can have."""
    unknown: dict[str, Any] = {}
    for field in fields(config):
        if field.name == "channels":
            count = len(config.depths) if isinstance(config, UNetConfig) else 4
            unknown[field.name] = tuple(Width.named(f"channels.{level}") for level in range(count))
        elif field.name not in _STRUCTURE:
            unknown[field.name] = Width.named(field.name)
    return replace(config, **unknown)


def solve(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The config with the widths that these shapes tell.

    Every dimension that is a multiple of one unknown casts a vote, and the majority wins, so that a few missing or
    misshapen weights don't spoil the table. An unknown that no shape speaks of keeps the config's own value.

    Args:
        config: The structure.
        shapes: Shapes by name within the component.
    """
    votes: dict[str, Counter[int]] = {}
    for weight in walk(symbolic(config)):
        shape = shapes.get(weight.name, ())
        if len(shape) == len(weight.shape):
            for size, width in zip(shape, weight.shape, strict=True):
                _vote(votes, size, width)
    found = {name: max(sorted(counts), key=counts.__getitem__) for name, counts in votes.items()}
    known: dict[str, Any] = {name: size for name, size in found.items() if "." not in name}
    if isinstance(config, UNetConfig | VaeConfig):
        count = len(config.depths) if isinstance(config, UNetConfig) else len(config.channels)
        known["channels"] = tuple(found.get(f"channels.{level}", 0) for level in range(count))
    return replace(config, **known)


def _vote(votes: dict[str, Counter[int]], size: int, width: Size) -> None:
    if isinstance(width, Width) and len(width.terms) == 1:
        ((name, factor),) = width.terms
        if size % factor == 0:
            votes.setdefault(name, Counter())[size // factor] += 1


def parameters(weights: Iterable[Weight]) -> int:
    """Elements of all these weights together; their widths must be known."""
    total = 0
    for weight in weights:
        count = 1
        for size in weight.shape:
            count *= size
        total += count
    return total
