"""One walk a component: every weight with its name and shape in ldm's layout and in diffusers', and the way between.

A walk takes its widths as arguments. They are integers for a model at hand, and :class:`Width` symbols when the
widths of a model are still to be found: see :func:`solve`. A walk adds and multiplies them and asks whether two
are equal, nothing else, so the same lines serve both.

The structures are those of CompVis' ``ldm`` (``openaimodel.UNetModel``, ``model.Encoder`` and ``Decoder``), of
Stability's ``sgm``, of ``open_clip``, of diffusers' ``UNet2DConditionModel`` and ``AutoencoderKL`` and of
transformers' ``CLIPTextModel``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Final, Literal, Self

Size = Any
"""An ``int``, or a :class:`Width` while the widths are unknown."""

Layout = Literal["ldm", "diffusers"]

Transform = Literal["same", "squeeze", "transpose", "split"]
"""From ldm to diffusers: as it is; without the last two dimensions of 1; transposed; in equal parts by rows."""


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
    """A weight that a component has, as one layout has it.

    Attributes:
        name: Within the component.
        shape: Its shape.
        optional: Whether published models go without it.
    """

    name: str
    shape: tuple[Size, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A weight of ldm's layout and what diffusers has for it.

    Attributes:
        ldm: In ldm's layout.
        diffusers: In diffusers' layout: one weight, three where ldm keeps them in one, none where diffusers has none.
        how: What leads from the first to the second, and back.
    """

    ldm: Weight
    diffusers: tuple[Weight, ...]
    how: Transform = "same"


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
        layers: How many.
        penultimate: Whether the model uses the last layer but one, as SD2 does: diffusers leaves the last one and
            the projection out, and some single files were published without them.
        width: Of its states.
        inner: Of the layers' feed-forward part.
        vocabulary: Tokens.
        positions: The longest sequence.
        projection: Width of the projected state.
    """

    layers: int = 24
    penultimate: bool = False
    width: Size = 0
    inner: Size = 0
    vocabulary: Size = 0
    positions: Size = 0
    projection: Size = 0


def _link(ldm: str, diffusers: str, shape: tuple[Size, ...], *, bias: bool = True) -> Iterator[Link]:
    for kind, extent in (("weight", shape), ("bias", shape[:1])):
        if bias or kind == "weight":
            yield Link(Weight(f"{ldm}.{kind}", extent), (Weight(f"{diffusers}.{kind}", extent),))


def _conv(ldm: str, diffusers: str, inputs: Size, outputs: Size, kernel: int) -> Iterator[Link]:
    yield from _link(ldm, diffusers, (outputs, inputs, kernel, kernel))


def walk_unet(config: UNetConfig) -> Iterator[Link]:
    """Every weight of a UNet, in the order of the forward pass."""
    channels, time = config.channels, config.time
    base = channels[0]
    yield from _link("time_embed.0", "time_embedding.linear_1", (time, base))
    yield from _link("time_embed.2", "time_embedding.linear_2", (time, time))
    if config.vector:
        yield from _link("label_emb.0.0", "add_embedding.linear_1", (time, config.conditions))
        yield from _link("label_emb.0.2", "add_embedding.linear_2", (time, time))
    yield from _conv("input_blocks.0.0", "conv_in", config.inputs, base, 3)
    skips, width, index = [base], base, 1
    for level, depth in enumerate(config.depths):
        block = f"down_blocks.{level}"
        for position in range(config.residual):
            ldm = f"input_blocks.{index}"
            yield from _unet_residual(f"{ldm}.0", f"{block}.resnets.{position}", width, channels[level], time)
            width = channels[level]
            yield from _transformer(f"{ldm}.1", f"{block}.attentions.{position}", width, depth, config)
            skips.append(width)
            index += 1
        if level < len(config.depths) - 1:
            yield from _conv(f"input_blocks.{index}.0.op", f"{block}.downsamplers.0.conv", width, width, 3)
            skips.append(width)
            index += 1
    yield from _unet_residual("middle_block.0", "mid_block.resnets.0", width, width, time)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", width, config.middle, config)
    yield from _unet_residual("middle_block.2", "mid_block.resnets.1", width, width, time)
    yield from _unet_up(config, skips)
    yield from _link("out.0", "conv_norm_out", (base,))
    yield from _conv("out.2", "conv_out", base, config.outputs, 3)


def _unet_up(config: UNetConfig, skips: list[Size]) -> Iterator[Link]:
    width, index = config.channels[-1], 0
    for up, level in enumerate(reversed(range(len(config.depths)))):
        depth, block = config.depths[level], f"up_blocks.{up}"
        for position in range(config.residual + 1):
            ldm, target = f"output_blocks.{index}", config.channels[level]
            yield from _unet_residual(
                f"{ldm}.0", f"{block}.resnets.{position}", width + skips.pop(), target, config.time
            )
            width = target
            yield from _transformer(f"{ldm}.1", f"{block}.attentions.{position}", width, depth, config)
            if level and position == config.residual:
                # It follows the attention where there is one, hence its index.
                yield from _conv(f"{ldm}.{2 if depth else 1}.conv", f"{block}.upsamplers.0.conv", width, width, 3)
            index += 1


def _unet_residual(ldm: str, diffusers: str, inputs: Size, outputs: Size, time: Size) -> Iterator[Link]:
    yield from _link(f"{ldm}.in_layers.0", f"{diffusers}.norm1", (inputs,))
    yield from _conv(f"{ldm}.in_layers.2", f"{diffusers}.conv1", inputs, outputs, 3)
    yield from _link(f"{ldm}.emb_layers.1", f"{diffusers}.time_emb_proj", (outputs, time))
    yield from _link(f"{ldm}.out_layers.0", f"{diffusers}.norm2", (outputs,))
    yield from _conv(f"{ldm}.out_layers.3", f"{diffusers}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{ldm}.skip_connection", f"{diffusers}.conv_shortcut", inputs, outputs, 1)


def _transformer(ldm: str, diffusers: str, width: Size, depth: int, config: UNetConfig) -> Iterator[Link]:
    if not depth:
        return
    projection = (width, width) if config.linear else (width, width, 1, 1)
    yield from _link(f"{ldm}.norm", f"{diffusers}.norm", (width,))
    yield from _link(f"{ldm}.proj_in", f"{diffusers}.proj_in", projection)
    for index in range(depth):
        ours, theirs = f"{ldm}.transformer_blocks.{index}", f"{diffusers}.transformer_blocks.{index}"
        for name, shape, bias in _transformer_block(width, config.context):
            yield from _link(f"{ours}.{name}", f"{theirs}.{name}", shape, bias=bias)
    yield from _link(f"{ldm}.proj_out", f"{diffusers}.proj_out", projection)


def _transformer_block(width: Size, context: Size) -> Iterator[tuple[str, tuple[Size, ...], bool]]:
    """Name, shape and whether there is a bias; both layouts have the same names."""
    for attention, source in (("attn1", width), ("attn2", context)):
        yield f"{attention}.to_q", (width, width), False
        yield f"{attention}.to_k", (width, source), False
        yield f"{attention}.to_v", (width, source), False
        yield f"{attention}.to_out.0", (width, width), True
    yield "ff.net.0.proj", (8 * width, width), True
    yield "ff.net.2", (width, 4 * width), True
    for norm in ("norm1", "norm2", "norm3"):
        yield norm, (width,), True


def walk_vae(config: VaeConfig) -> Iterator[Link]:
    """Every weight of an AutoencoderKL."""
    channels, latent = config.channels, config.latent
    inner, last = channels[-1], len(channels) - 1
    yield from _conv("encoder.conv_in", "encoder.conv_in", config.pixels, channels[0], 3)
    width = channels[0]
    for level, target in enumerate(channels):
        ldm, block = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for position in range(config.residual):
            yield from _vae_residual(f"{ldm}.block.{position}", f"{block}.resnets.{position}", width, target)
            width = target
        if level < last:
            yield from _conv(f"{ldm}.downsample.conv", f"{block}.downsamplers.0.conv", width, width, 3)
    yield from _vae_middle("encoder", inner)
    yield from _link("encoder.norm_out", "encoder.conv_norm_out", (inner,))
    yield from _conv("encoder.conv_out", "encoder.conv_out", inner, 2 * latent, 3)
    yield from _conv("decoder.conv_in", "decoder.conv_in", latent, inner, 3)
    yield from _vae_middle("decoder", inner)
    width = inner
    for level in reversed(range(len(channels))):
        # ldm counts the decoder's levels from the pixels, diffusers from the latents.
        ldm, block = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        for position in range(config.residual + 1):
            yield from _vae_residual(f"{ldm}.block.{position}", f"{block}.resnets.{position}", width, channels[level])
            width = channels[level]
        if level:
            yield from _conv(f"{ldm}.upsample.conv", f"{block}.upsamplers.0.conv", width, width, 3)
    yield from _link("decoder.norm_out", "decoder.conv_norm_out", (channels[0],))
    yield from _conv("decoder.conv_out", "decoder.conv_out", channels[0], config.pixels, 3)
    yield from _conv("quant_conv", "quant_conv", 2 * latent, 2 * latent, 1)
    yield from _conv("post_quant_conv", "post_quant_conv", latent, latent, 1)


VAE_ATTENTION: Final = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
"""The VAE's attention: ldm's 1 x 1 convolutions are diffusers' linear layers."""


def _vae_middle(part: str, width: Size) -> Iterator[Link]:
    ldm, diffusers = f"{part}.mid", f"{part}.mid_block"
    yield from _vae_residual(f"{ldm}.block_1", f"{diffusers}.resnets.0", width, width)
    yield from _link(f"{ldm}.attn_1.norm", f"{diffusers}.attentions.0.group_norm", (width,))
    for ours, theirs in VAE_ATTENTION.items():
        conv, linear = f"{ldm}.attn_1.{ours}", f"{diffusers}.attentions.0.{theirs}"
        flat = Weight(f"{linear}.weight", (width, width))
        yield Link(Weight(f"{conv}.weight", (width, width, 1, 1)), (flat,), "squeeze")
        yield Link(Weight(f"{conv}.bias", (width,)), (Weight(f"{linear}.bias", (width,)),))
    yield from _vae_residual(f"{ldm}.block_2", f"{diffusers}.resnets.1", width, width)


def _vae_residual(ldm: str, diffusers: str, inputs: Size, outputs: Size) -> Iterator[Link]:
    yield from _link(f"{ldm}.norm1", f"{diffusers}.norm1", (inputs,))
    yield from _conv(f"{ldm}.conv1", f"{diffusers}.conv1", inputs, outputs, 3)
    yield from _link(f"{ldm}.norm2", f"{diffusers}.norm2", (outputs,))
    yield from _conv(f"{ldm}.conv2", f"{diffusers}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{ldm}.nin_shortcut", f"{diffusers}.conv_shortcut", inputs, outputs, 1)


def walk_clip(config: ClipConfig) -> Iterator[Link]:
    """Every weight of CLIP's text transformer, without the buffer of position ids; both layouts name them alike."""
    width = config.width
    yield _alike("text_model.embeddings.token_embedding.weight", (config.vocabulary, width))
    yield _alike("text_model.embeddings.position_embedding.weight", (config.positions, width))
    for layer in (f"text_model.encoder.layers.{index}" for index in range(config.layers)):
        for name, shape in _clip_layer(width, config.inner):
            yield from _link(f"{layer}.{name}", f"{layer}.{name}", shape)
    yield from _link("text_model.final_layer_norm", "text_model.final_layer_norm", (width,))
    if config.projected:
        yield _alike("text_projection.weight", (config.projection, width))


def _alike(name: str, shape: tuple[Size, ...]) -> Link:
    weight = Weight(name, shape)
    return Link(weight, (weight,))


def _clip_layer(width: Size, inner: Size) -> Iterator[tuple[str, tuple[Size, ...]]]:
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield f"self_attn.{name}", (width, width)
    yield "layer_norm1", (width,)
    yield "mlp.fc1", (inner, width)
    yield "mlp.fc2", (width, inner)
    yield "layer_norm2", (width,)


def walk_open_clip(config: OpenClipConfig) -> Iterator[Link]:
    """Every weight of open_clip's text transformer; what diffusers has no place for is linked to nothing."""
    width = config.width
    text = "text_model."
    positions = Weight(f"{text}embeddings.position_embedding.weight", (config.positions, width))
    yield Link(Weight("positional_embedding", positions.shape), (positions,))
    tokens = Weight(f"{text}embeddings.token_embedding.weight", (config.vocabulary, width))
    yield Link(Weight("token_embedding.weight", tokens.shape), (tokens,))
    for index in range(config.layers):
        ldm, layer = f"transformer.resblocks.{index}", f"{text}encoder.layers.{index}"
        unused = config.penultimate and index == config.layers - 1
        for link in _open_clip_layer(ldm, layer, width, config.inner):
            yield Link(replace(link.ldm, optional=True), ()) if unused else link
    yield from _link("ln_final", f"{text}final_layer_norm", (width,))
    projection = Weight("text_projection", (width, config.projection), optional=config.penultimate)
    turned = Weight("text_projection.weight", (config.projection, width))
    yield Link(projection, () if config.penultimate else (turned,), "transpose")
    yield Link(Weight("logit_scale", (), optional=True), ())


def _open_clip_layer(ldm: str, layer: str, width: Size, inner: Size) -> Iterator[Link]:
    for kind, rest in (("weight", (width,)), ("bias", ())):
        parts = tuple(Weight(f"{layer}.self_attn.{name}_proj.{kind}", (width, *rest)) for name in "qkv")
        yield Link(Weight(f"{ldm}.attn.in_proj_{kind}", (3 * width, *rest)), parts, "split")
    yield from _link(f"{ldm}.attn.out_proj", f"{layer}.self_attn.out_proj", (width, width))
    yield from _link(f"{ldm}.ln_1", f"{layer}.layer_norm1", (width,))
    yield from _link(f"{ldm}.mlp.c_fc", f"{layer}.mlp.fc1", (inner, width))
    yield from _link(f"{ldm}.mlp.c_proj", f"{layer}.mlp.fc2", (width, inner))
    yield from _link(f"{ldm}.ln_2", f"{layer}.layer_norm2", (width,))


Config = UNetConfig | VaeConfig | ClipConfig | OpenClipConfig

_WALKS: Final[dict[type[Any], Callable[[Any], Iterator[Link]]]] = {
    UNetConfig: walk_unet,
    VaeConfig: walk_vae,
    ClipConfig: walk_clip,
    OpenClipConfig: walk_open_clip,
}

_STRUCTURE: Final = frozenset(
    {"depths", "middle", "linear", "vector", "residual", "layers", "penultimate", "projected"}
)


@lru_cache(maxsize=64)
def links(config: Config) -> tuple[Link, ...]:
    """Every weight of the component that a config describes, in both layouts.

    Raises:
        ValueError: If two weights had one name in either layout; the map must be one-to-one.
    """
    found = tuple(_WALKS[type(config)](config))
    for names in ([link.ldm.name for link in found], [weight.name for link in found for weight in link.diffusers]):
        if len(set(names)) != len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ValueError(f"two weights of one component are called {twice}")
    return found


def walk(config: Config, layout: Layout = "ldm") -> Iterator[Weight]:
    """Every weight of the component that a config describes, under the names and in the shapes of one layout."""
    for link in links(config):
        yield from (link.ldm,) if layout == "ldm" else link.diffusers


def symbolic(config: Config) -> Config:
    """The config with a symbol for every width: a walk over it yields all keys that the structure can have."""
    unknown: dict[str, Any] = {}
    for field in fields(config):
        if field.name == "channels":
            count = len(config.depths if isinstance(config, UNetConfig) else config.channels)  # type: ignore[union-attr]
            unknown[field.name] = tuple(Width.named(f"channels.{level}") for level in range(count))
        elif field.name not in _STRUCTURE:
            unknown[field.name] = Width.named(field.name)
    return replace(config, **unknown)


def solve(config: Config, shapes: Mapping[str, tuple[int, ...]], layout: Layout = "ldm") -> Config:
    """The config with the widths that these shapes tell.

    Every dimension that is a multiple of one unknown casts a vote, and the majority wins, so that a few missing or
    misshapen weights don't spoil the table. An unknown that no shape speaks of keeps the config's own value.

    Args:
        config: The structure.
        shapes: Shapes by name within the component.
        layout: Whose names they are.
    """
    votes: dict[str, Counter[int]] = {}
    for weight in walk(symbolic(config), layout):
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
