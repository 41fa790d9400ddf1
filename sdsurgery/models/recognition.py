"""What one component is: its structure told by keys and ranks, its widths by shapes, in either layout.

A config that somebody states is taken at its word, so that what isn't there is missing. Without one the published
structures come first, measured generously; any other regular structure counts only where it explains every key, or
a damaged model would look like a smaller one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint
from .components import POSITION_IDS, Component
from .configs import as_open_clip
from .walks import VAE_ATTENTION, ClipConfig, Config, Layout, OpenClipConfig, UNetConfig, VaeConfig, solve, walk

UNETS: Mapping[str, UNetConfig] = {
    "sd1": UNetConfig(depths=(1, 1, 1, 0), middle=1, linear=False, channels=(320, 640, 1280, 1280)),
    "sd2": UNetConfig(depths=(1, 1, 1, 0), middle=1, linear=True, channels=(320, 640, 1280, 1280)),
    "sdxl": UNetConfig(depths=(0, 2, 10), middle=10, linear=True, vector=True, channels=(320, 640, 1280)),
    "sdxl-refiner": UNetConfig(
        depths=(0, 4, 4, 0), middle=4, linear=True, vector=True, channels=(384, 768, 1536, 1536)
    ),
}
"""The structure of each family's UNet, with its published widths."""

STOCK_CLIP = ClipConfig(layers=12, width=768)
STOCK_OPEN_CLIP_H = OpenClipConfig(layers=24, penultimate=True, width=1024)
STOCK_OPEN_CLIP_G = OpenClipConfig(layers=32, width=1280)

ENOUGH = 0.25
"""The share of a component's keys that must be there for a file without prefixes to count as that component."""

_STRANGERS = 0.1
"""The share of a UNet's own keys beyond which a family that doesn't know them isn't its family."""

_MOST_LAYERS = 64
_MOST_LEVELS = 16
_MOST_BLOCKS = 16
"""More than any model has: what claims more is no model, and isn't walked."""

_CLIP_NAME = re.compile(r"(?P<path>(?:.*?\.)?)(?P<name>(?:embeddings|encoder\.layers|final_layer_norm)\..+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _UNetNames:
    """How a layout calls what tells UNets apart.

    Attributes:
        own: What its names begin with.
        parts: What every family's UNet has. A ControlNet has no output blocks, SSD-1B no attention in the middle.
        vector: Where the vector beside the text goes in.
        deep: What only four levels have.
    """

    own: re.Pattern[str]
    parts: tuple[str, str, str]
    vector: str
    deep: str


_UNET_NAMES: Mapping[Layout, _UNetNames] = {
    "ldm": _UNetNames(
        re.compile(r"(?:time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\."),
        ("input_blocks.", "middle_block.1.", "output_blocks."),
        "label_emb.",
        "input_blocks.9.",
    ),
    "diffusers": _UNetNames(
        re.compile(
            r"(?:time_embedding|add_embedding|conv_in|down_blocks|mid_block|up_blocks|conv_norm_out|conv_out)\."
        ),
        ("down_blocks.", "mid_block.attentions.", "up_blocks."),
        "add_embedding.",
        "down_blocks.3.",
    ),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a checkpoint a component may be.

    Attributes:
        checkpoint: The checkpoint.
        prefix: What stands before the component's own names.
        names: Own name to key.
        layout: Whose names they are.
        told: What a config says that it is, if there is one.
    """

    checkpoint: Checkpoint
    prefix: str
    names: Mapping[str, str]
    layout: Layout = "ldm"
    told: Config | None = None

    def component(self, name: str, config: Config, names: Mapping[str, str] | None = None) -> Component:
        """The component of that structure; what its table doesn't know is stray."""
        names = self.names if names is None else names
        config = self.told or self._solved(config, names)
        table = {weight.name: weight for weight in walk(config, self.layout)}
        known = {local: key for local, key in names.items() if local in table or self._is_ids(local, config)}
        owned = set(known.values())
        stray = tuple(key for key in self.names.values() if key not in owned)
        return Component(name, self.prefix, known, table, stray, config, self.layout)

    def unknown(self, name: str) -> Component:
        """A component of a kind that isn't known: no table, and nobody touches it."""
        return Component(name, self.prefix, self.names, {}, layout=self.layout)

    def explains(self, config: Config, names: Mapping[str, str] | None = None, also: Collection[str] = ()) -> bool:
        """Whether a structure has just the names that are there, but for optional ones and ``also``."""
        names = self.names if names is None else names
        weights = {weight.name: weight for weight in walk(self._solved(config, names), self.layout)}
        lacking = [name for name, weight in weights.items() if name not in names and not weight.optional]
        return not lacking and not names.keys() - weights.keys() - set(also)

    def _solved(self, config: Config, names: Mapping[str, str]) -> Config:
        shapes = {local: self.checkpoint[key].shape for local, key in names.items()}
        return solve(config, shapes, self.layout)

    @staticmethod
    def _is_ids(local: str, config: Config) -> bool:
        return local == POSITION_IDS and isinstance(config, ClipConfig)


# ---------------------------------------------------------------- UNet


def unet(place: Place, evidence: list[str]) -> Component:
    """The UNet; without a table where it is no family's."""
    if place.told:
        return place.component("unet", place.told)
    config = unet_structure(place, evidence)
    return place.component("unet", config) if config else place.unknown("unet")


def unet_structure(place: Place, evidence: list[str]) -> UNetConfig | None:
    """Which family's UNet it is, by the rank of its projections, its vector embedding and its depth."""
    told = _UNET_NAMES[place.layout]
    own = [name for name in place.names if told.own.match(name)]
    lacking = [part for part in told.parts if not any(name.startswith(part) for name in own)]
    if lacking:
        evidence.append(f"no family's UNet: it has no {lacking[0].rstrip('.')}")
        return None
    projections = (place.names[name] for name in own if name.endswith(".proj_in.weight"))
    ranks = Counter(len(place.checkpoint[key].shape) for key in projections)
    rank = ranks.most_common(1)[0][0] if ranks else 0
    if rank not in {2, 4}:
        evidence.append(f"no family's UNet: its attention projections have the rank {rank}")
        return None
    linear = rank == 2
    vector = any(name.startswith(told.vector) for name in own)
    deep = any(name.startswith(told.deep) for name in own)
    family = {
        (False, False, True): "sd1",
        (True, False, True): "sd2",
        (True, True, False): "sdxl",
        (True, True, True): "sdxl-refiner",
    }.get((linear, vector, deep))
    kind = "linear" if linear else "convolutional"
    facts = f"{kind} projections, {'a' if vector else 'no'} vector embedding, {'four' if deep else 'less than four'}"
    refusal = f"no family's UNet has {facts} levels"
    own_names = {name: place.names[name] for name in own}
    regular = None
    if family is None or not place.explains(UNETS[family], own_names):
        regular = _regular_unet(place, linear=linear, vector=vector)
    if regular:
        evidence.append(f"a UNet of {len(regular.depths)} levels, no published one, that explains every key")
        return regular
    if family:
        table = {weight.name for weight in walk(UNETS[family], place.layout)}
        hits = sum(name in table for name in own)
        if hits >= ENOUGH * len(table) and len(own) - hits <= _STRANGERS * len(own):
            evidence.append(f"the UNet of {family}: {facts} levels; {hits} of {len(table)} keys")
            return UNETS[family]
        refusal = (
            f"no family's UNet: {facts} levels, as in {family}, but {len(own) - hits} keys that it doesn't know, and "
            f"{hits} of its {len(table)}"
        )
    evidence.append(refusal)
    return None


def _regular_unet(place: Place, *, linear: bool, vector: bool) -> UNetConfig | None:
    """A UNet of other depths than the published ones, if its levels are regular and it has no other key."""
    depths = _attention_depths(place.names)
    levels = list(_ldm_levels(place.names) if place.layout == "ldm" else _diffusers_levels(place.names))
    paths = [[depths.get(path, 0) for path in level] for level in levels]
    middle = depths.get("middle_block.1." if place.layout == "ldm" else "mid_block.attentions.0.", 0)
    if not paths or any(len(level) != len(paths[0]) or len(set(level)) != 1 for level in paths):
        return None
    if len(paths) > _MOST_LEVELS or len(paths[0]) > _MOST_BLOCKS or max(*depths.values(), middle) > _MOST_LAYERS:
        return None
    config = UNetConfig(
        depths=tuple(level[0] for level in paths), middle=middle, linear=linear, vector=vector, residual=len(paths[0])
    )
    # A vector goes with SDXL's outermost level alone, and diffusers has one depth for the last level and the middle.
    if config.depths[-1] not in {0, middle} or (vector and (config.depths[0] or not linear)):
        return None
    return config if place.explains(config) else None


def _attention_depths(names: Mapping[str, str]) -> dict[str, int]:
    """Transformer blocks of each attention, by what its names begin with."""
    found: dict[str, int] = {}
    for name in names:
        path, block, rest = name.partition("transformer_blocks.")
        index = rest.partition(".")[0]
        if block and index.isdecimal() and len(index) < 4:
            found[path] = max(found.get(path, 0), int(index) + 1)
    return found


def _ldm_levels(names: Mapping[str, str]) -> Iterator[list[str]]:
    """For each level, where the attentions behind its residual blocks would be."""
    level: list[str] = []
    for index in range(1, len(names)):
        if f"input_blocks.{index}.0.op.weight" in names:
            yield level
            level = []
        elif f"input_blocks.{index}.0.in_layers.0.weight" in names:
            level.append(f"input_blocks.{index}.1.")
        else:
            break
    if level:
        yield level


def _diffusers_levels(names: Mapping[str, str]) -> Iterator[list[str]]:
    for index in range(len(names)):
        block = f"down_blocks.{index}"
        count = next(i for i in range(len(names) + 1) if f"{block}.resnets.{i}.norm1.weight" not in names)
        if not count:
            return
        yield [f"{block}.attentions.{position}." for position in range(count)]


# ---------------------------------------------------------------- VAE

# What diffusers before 0.17 called the VAE's attention, by what it is called since.
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def vae(place: Place) -> Component:
    """The VAE that these names are of, however many of its weights are there."""
    names = _without_old_names(place.names) if place.layout == "diffusers" else place.names
    stock = VaeConfig()
    if not place.explains(stock, names):
        stem, block = ("encoder.down", "block") if place.layout == "ldm" else ("encoder.down_blocks", "resnets")
        levels = _count(names, stem + ".{}." + block + ".0.norm1.weight")
        residual = _count(names, f"{stem}.0.{block}." + "{}.norm1.weight")
        regular = VaeConfig(residual=residual, channels=(0,) * levels)
        if 0 < levels <= _MOST_LEVELS and 0 < residual <= _MOST_BLOCKS and place.explains(regular, names):
            stock = regular
    return place.component("vae", stock, names)


def _count(names: Mapping[str, str], pattern: str) -> int:
    return next(index for index in range(len(names) + 1) if pattern.format(index) not in names)


def _without_old_names(names: Mapping[str, str]) -> dict[str, str]:
    """Names of today, for the attention that diffusers renamed; whole segments only. Where both are there, today's."""
    today = {old: new for new, old in _OLD_VAE_ATTENTION.items()}
    result: dict[str, str] = {}
    for name, key in names.items():
        head, attention, tail = name.partition(".mid_block.attentions.0.")
        segment, _, kind = tail.partition(".")
        if attention and segment in today:
            result.setdefault(f"{head}{attention}{today[segment]}.{kind}", key)
        else:
            result[name] = key
    return result


assert set(VAE_ATTENTION.values()) == set(_OLD_VAE_ATTENTION)  # noqa: S101 - two tables of one fact


# ---------------------------------------------------------------- text encoders


def open_clip(place: Place, *, penultimate: bool | None) -> Component:
    """OpenCLIP's text encoder under its own names.

    Of 24 layers it is H, of 32 it is G; a file that lacks some is measured against the next larger one. SD2 uses H's
    last layer but one, and some models were published without the last; SDXL needs all of G.

    Args:
        place: Where it may be.
        penultimate: Whether the model is one that uses the last layer but one; ``None`` if that isn't known.
    """
    layers = _layers(place.names, r"transformer\.resblocks\.(\d{1,4})\.")
    stock = STOCK_OPEN_CLIP_G if layers > STOCK_OPEN_CLIP_H.layers else STOCK_OPEN_CLIP_H
    # The last layer and the projection are left out together.
    left_out = penultimate is not False and "text_projection" not in place.names
    odd = OpenClipConfig(layers=layers + left_out, penultimate=bool(penultimate) or left_out)
    config = odd if layers < stock.layers and _is_narrow(place, odd, stock) and place.explains(odd) else stock
    return place.component("text_encoder" if config.penultimate else "text_encoder_2", config)


def _layers(names: Mapping[str, str], pattern: str) -> int:
    matches = (re.match(pattern, name) for name in names)
    return min(_MOST_LAYERS, max((int(match.group(1)) + 1 for match in matches if match), default=0))


def _is_narrow(place: Place, config: Config, stock: ClipConfig | OpenClipConfig) -> bool:
    """Whether it has another width than the published one: then other depths may be meant, and not be damage."""
    found = place._solved(config, place.names)
    return isinstance(found, ClipConfig | OpenClipConfig) and found.width not in {0, stock.width}


def clip(
    place: Place,
    path: str,
    paths: Collection[str] | None = None,
    *,
    second: bool = False,
    penultimate: bool | None = None,
) -> Component | None:
    """A text encoder under CLIP's names, whatever stands before them; ``None`` where there is no such thing.

    Args:
        place: Where it may be, the prefix being what stands before ``text_model.`` where the names are right.
        path: What stands between the root and CLIP's own names where they are right.
        paths: What else may stand there; anything unless given.
        second: Whether it is the second text encoder of its model, which in diffusers' layout is an OpenCLIP.
        penultimate: Whether the model is SD2, whose OpenCLIP has CLIP's names in diffusers' layout; ``None`` if that
            isn't known.
    """
    found_at = _text_paths(place.names)
    chosen = (found for found in found_at if paths is None or found in paths)
    # The right place comes first, so that a second copy elsewhere is the stray one.
    places = sorted(chosen, key=lambda found: found != path)
    canonical: dict[str, str] = {}
    for found in places:
        for local, key in found_at[found].items():
            canonical.setdefault(local, key)
    in_ldm = path.startswith("transformer.")
    if "text_projection.weight" in place.names and not in_ldm:
        canonical["text_projection.weight"] = place.names["text_projection.weight"]
    config = _clip_structure(place, canonical, second=second, penultimate=None if in_ldm else penultimate, ldm=in_ldm)
    table = {weight.name for weight in walk(place.told or config, place.layout)} | {POSITION_IDS}
    canonical = {local: key for local, key in canonical.items() if local in table}
    name = "text_encoder_2" if isinstance(config, OpenClipConfig) and not config.penultimate else "text_encoder"
    result = place.component(name, config, canonical)
    # Other transformers share some names, of the attention's projections and of the embeddings, but not these.
    own = all(any(part in local for local in canonical) for part in (".layer_norm1.", ".mlp.fc1."))
    # At the very place where a single file keeps its CLIP, a ruin is a broken CLIP and nothing else.
    in_place = in_ldm and path in found_at
    if not in_place and not place.told and not (own and len(result.keys) >= ENOUGH * len(result.table)):
        return None
    return result


def _clip_structure(
    place: Place, names: Mapping[str, str], *, second: bool, penultimate: bool | None, ldm: bool
) -> ClipConfig | OpenClipConfig:
    """CLIP-L, or in diffusers' layout OpenCLIP-H or -G, which have more layers, or another depth where it is narrow."""
    projected = "text_projection.weight" in names
    layers = _layers(names, r"text_model\.encoder\.layers\.(\d{1,4})\.")
    if ldm:
        stock: ClipConfig | OpenClipConfig = replace(STOCK_CLIP, layers=max(layers, STOCK_CLIP.layers))
        odd: ClipConfig | OpenClipConfig = ClipConfig(layers=layers)
    elif second or (penultimate is None and layers > STOCK_OPEN_CLIP_H.layers):
        stock, odd = STOCK_OPEN_CLIP_G, OpenClipConfig(layers=layers)
    elif penultimate or (penultimate is None and layers >= STOCK_OPEN_CLIP_H.layers - 1):
        stock, odd = STOCK_OPEN_CLIP_H, as_open_clip(ClipConfig(layers=layers), penultimate=True)
    else:
        stock = replace(STOCK_CLIP, layers=max(layers, STOCK_CLIP.layers), projected=projected)
        odd = ClipConfig(layers=layers, projected=projected)
    inner = replace(place, names=names)
    if (
        layers
        and odd.layers < stock.layers
        and _is_narrow(inner, odd, stock)
        and inner.explains(odd, also={POSITION_IDS})
    ):
        return odd
    return stock


def _text_paths(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What stands before names of CLIP's text transformer, to canonical name to key.

    CLIP's vision transformer has the same names but for its embeddings, and is no text encoder.
    """
    found: dict[str, dict[str, str]] = {}
    for name, key in names.items():
        if match := _CLIP_NAME.fullmatch(name):
            found.setdefault(match.group("path"), {})["text_model." + match.group("name")] = key
    marks = {"text_model.embeddings.patch_embedding.weight", "text_model.embeddings.class_embedding"}
    return {path: local for path, local in found.items() if "vision" not in path and not marks & local.keys()}
