"""What model a checkpoint holds: told by keys and ranks, never by width, and never by the keys' order.

"Unknown" is an honest answer: it costs nothing, because no operation touches what isn't recognised.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..checkpoint import Checkpoint
from .components import POSITION_IDS, Component, ema_component, schedule_component
from .walks import ClipConfig, Config, OpenClipConfig, UNetConfig, VaeConfig, solve, walk

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

# Where single files keep their text encoders. SD1 and SD2 have one; sgm's models (SDXL, its refiner, SD2-Turbo) a list.
_TEXT_ROOTS = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")

_WRAPPER = re.compile(r"(?:(?:module|state_dict)\.)+")
_CLIP_NAME = re.compile(r"(?P<path>(?:.*?\.)?)(?P<name>(?:embeddings|encoder\.layers|final_layer_norm)\..+)", re.DOTALL)

UNETS: Mapping[str, UNetConfig] = {
    "sd1": UNetConfig(depths=(1, 1, 1, 0), middle=1, linear=False, channels=(320, 640, 1280, 1280)),
    "sd2": UNetConfig(depths=(1, 1, 1, 0), middle=1, linear=True, channels=(320, 640, 1280, 1280)),
    "sdxl": UNetConfig(depths=(0, 2, 10), middle=10, linear=True, vector=True, channels=(320, 640, 1280)),
    "sdxl-refiner": UNetConfig(
        depths=(0, 4, 4, 0), middle=4, linear=True, vector=True, channels=(384, 768, 1536, 1536)
    ),
}
"""The structure of each family's UNet, with its published widths."""

_VARIANTS = {4: "", 9: "-inpainting", 8: "-pix2pix", 5: "-depth"}
"""What further input channels of the UNet mean."""

_TEXT_ENCODERS: Mapping[str, tuple[type[Config], ...]] = {
    "sd1": (ClipConfig,),
    "sd2": (OpenClipConfig,),
    "sdxl": (ClipConfig, OpenClipConfig),
    "sdxl-refiner": (OpenClipConfig,),
}

_ENOUGH = 0.25
"""The share of a component's keys that must be there for a file without prefixes to count as that component."""

_STRANGERS = 0.1
"""The share of a UNet's own keys beyond which a family that doesn't know them isn't its family."""

_UNET_NAME = re.compile(r"(?:time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\.")
_UNET_PARTS = ("input_blocks.", "middle_block.1.", "output_blocks.")
"""What every family's UNet has. A ControlNet has no output blocks, SSD-1B no attention in the middle."""

_LONE_CLIP_PATHS = frozenset({"", "text_model.", "transformer.", "transformer.text_model."})
"""What may stand before CLIP's own names in a file of its own; elsewhere it is a part of some other model."""


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds.

    Attributes:
        layout: ``ldm``, ``diffusers`` or ``unknown``.
        family: ``sd1``, ``sd2``, ``sdxl``, ``sdxl-refiner``, with the variant's suffix, or ``unknown``.
        components: By name; one that isn't there is left out.
        wrapper: A prefix that all keys have and that no loader expects, such as ``module.``.
        evidence: What was tried and what it showed, in words.
    """

    layout: str
    family: str
    components: Mapping[str, Component]
    wrapper: str
    evidence: tuple[str, ...]

    @cached_property
    def clip(self) -> Component | None:
        """The CLIP-L text encoder, the one that has position ids."""
        found = self.components.get("text_encoder")
        return found if found and isinstance(found.config, ClipConfig) else None

    @property
    def base_family(self) -> str:
        """The family without its variant."""
        return re.sub(r"-(inpainting|pix2pix|depth)$", "", self.family)


def identify(checkpoint: Checkpoint) -> Model:
    """Recognise the model; looks at keys and shapes only."""
    wrapper = _common_wrapper(checkpoint)
    components, evidence = _prefixed(checkpoint, wrapper)
    layout = "ldm" if components else "unknown"
    if not components:
        layout, components = _lone(checkpoint, wrapper, evidence)
    if components:
        for extra in (
            ema_component(checkpoint, wrapper, components.get("unet")),
            schedule_component(checkpoint, wrapper),
        ):
            if extra:
                components[extra.name] = extra
    family = _family(checkpoint, components, evidence)
    if family.startswith("sd2") and "text_encoder_2" in components:
        # SD2-Turbo keeps SD2's only text encoder where the refiner keeps CLIP-G.
        components["text_encoder"] = replace(components.pop("text_encoder_2"), name="text_encoder")
    owned = {key for component in components.values() for key in component.all_keys()}
    rest = {key: key for key in checkpoint if key not in owned}
    if rest:
        components["other"] = Component("other", "", rest, {})
    order = ("text_encoder", "text_encoder_2", "unet", "vae", "ema", "schedule", "other")
    return Model(
        layout,
        family,
        {name: components[name] for name in order if name in components},
        wrapper,
        tuple(evidence),
    )


def _common_wrapper(keys: Iterable[str]) -> str:
    """The wrapping prefix that all keys share, or nothing."""
    found = {match.group() if (match := _WRAPPER.match(key)) else "" for key in keys}
    return found.pop() if len(found) == 1 else ""


def _under(checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): key for key in checkpoint if key.startswith(prefix)}


def _shapes(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    return {name: checkpoint[key].shape for name, key in names.items()}


def _component(name: str, prefix: str, checkpoint: Checkpoint, names: Mapping[str, str], config: Config) -> Component:
    """A component whose names are told; what its table doesn't know is stray."""
    config = solve(config, _shapes(checkpoint, names))
    table = {weight.name: weight for weight in walk(config)}
    known = {local: key for local, key in names.items() if local in table or local == POSITION_IDS}
    stray = tuple(key for local, key in names.items() if local not in known)
    return Component(name, prefix, known, table, stray, config)


def _prefixed(checkpoint: Checkpoint, wrapper: str) -> tuple[dict[str, Component], list[str]]:
    """The components of a single file, each under its own prefix."""
    components: dict[str, Component] = {}
    evidence = [f"all keys are wrapped in {wrapper!r}"] if wrapper else []
    prefix = wrapper + UNET_PREFIX
    names = _under(checkpoint, prefix)
    if names:
        config = _unet_structure(checkpoint, names, evidence)
        components["unet"] = (
            _component("unet", prefix, checkpoint, names, config) if config else Component("unet", prefix, names, {})
        )
    prefix = wrapper + VAE_PREFIX
    names = _under(checkpoint, prefix)
    if names:
        vae = _component("vae", prefix, checkpoint, names, VaeConfig())
        evidence.append(f"{len(vae.keys)} keys of a VAE under {prefix!r}")
        known = len(vae.keys) >= _ENOUGH * len(vae.table)
        components["vae"] = vae if known else Component("vae", prefix, names, {})
    for root in _TEXT_ROOTS:
        found = _text_encoder(checkpoint, wrapper + root, evidence)
        if found:
            components[found.name] = found
    return components, evidence


def _text_encoder(checkpoint: Checkpoint, root: str, evidence: list[str]) -> Component | None:
    names = _under(checkpoint, root)
    if not names:
        return None
    if any(name.startswith("model.transformer.resblocks.") for name in names):
        inner = {name.removeprefix("model."): key for name, key in names.items() if name.startswith("model.")}
        outside = tuple(key for name, key in names.items() if not name.startswith("model."))
        in_list = not root.endswith("cond_stage_model.")
        name = "text_encoder_2" if in_list else "text_encoder"
        found = _component(name, root + "model.", checkpoint, inner, _open_clip(inner))
        if len(found.keys) < _ENOUGH * len(found.table):
            return None
        evidence.append(f"{len(found.keys)} keys of an OpenCLIP text encoder under {found.prefix!r}")
        return replace(found, stray=(*found.stray, *outside))
    clip = _clip(checkpoint, root + "transformer.", names, "transformer.text_model.")
    if clip:
        evidence.append(f"{len(clip.keys)} keys of a CLIP text encoder under {clip.prefix!r}")
    return clip


def _open_clip(names: Iterable[str]) -> OpenClipConfig:
    """OpenCLIP-H of 24 layers, or -G of 32; a file that lacks some is measured against the next larger one.

    SD2 uses H's last layer but one, and some models were published without the last; SDXL needs all of G.
    """
    matches = (re.match(r"transformer\.resblocks\.(\d{1,4})\.", name) for name in names)
    large = any(int(match.group(1)) >= 24 for match in matches if match)
    return OpenClipConfig(layers=32) if large else OpenClipConfig(layers=24, penultimate=True)


def _clip(
    checkpoint: Checkpoint,
    prefix: str,
    names: Mapping[str, str],
    path: str,
    paths: Collection[str] | None = None,
) -> Component | None:
    """CLIP's text encoder, whatever stands before its own names; ``None`` where there is no such thing.

    Args:
        checkpoint: Where it is.
        prefix: What stands before ``text_model.`` where the names are right.
        names: Name below the root to key.
        path: What stands between the root and CLIP's own names where they are right.
        paths: What else may stand there; anything unless given.
    """
    found_at = _text_paths(names)
    places = sorted((place for place in found_at if paths is None or place in paths), key=lambda place: place != path)
    layers = ClipConfig().layers
    for place in places:
        for local in found_at[place]:
            if match := re.match(r"text_model\.encoder\.layers\.(\d{1,4})\.", local):
                layers = max(layers, min(int(match.group(1)) + 1, 64))
    projected = "text_projection.weight" in names and not path.startswith("transformer.")
    config = ClipConfig(layers=layers, projected=projected)
    expected = {weight.name for weight in walk(config)} | {POSITION_IDS}
    canonical = {"text_projection.weight": names["text_projection.weight"]} if projected else {}
    # The right place comes first, so that a second copy elsewhere is the stray one.
    for place in places:
        for local, key in found_at[place].items():
            if local in expected:
                canonical.setdefault(local, key)
    found = _component("text_encoder", prefix, checkpoint, canonical, config)
    # Other transformers share some names, of the attention's projections and of the embeddings, but not these.
    own = all(any(part in local for local in canonical) for part in (".layer_norm1.", ".mlp.fc1."))
    # At the very place where a single file keeps its CLIP, a ruin is a broken CLIP and nothing else.
    in_place = path.startswith("transformer.") and path in found_at
    if not in_place and not (own and len(found.keys) >= _ENOUGH * len(found.table)):
        return None
    known = set(canonical.values())
    return replace(found, stray=tuple(key for key in names.values() if key not in known))


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


def _unet_structure(checkpoint: Checkpoint, names: Mapping[str, str], evidence: list[str]) -> UNetConfig | None:
    """Which family's UNet it is, by the rank of its projections, its vector embedding and its depth."""
    own = [name for name in names if _UNET_NAME.match(name)]
    lacking = [part for part in _UNET_PARTS if not any(name.startswith(part) for name in own)]
    if lacking:
        evidence.append(f"no family's UNet: it has no {lacking[0].rstrip('.')}")
        return None
    ranks = Counter(len(checkpoint[names[name]].shape) for name in own if name.endswith(".proj_in.weight"))
    rank = ranks.most_common(1)[0][0] if ranks else 0
    if rank not in {2, 4}:
        evidence.append(f"no family's UNet: its attention projections have the rank {rank}")
        return None
    linear = rank == 2
    vector = any(name.startswith("label_emb.") for name in own)
    deep = any(name.startswith("input_blocks.9.") for name in own)
    family = {
        (False, False, True): "sd1",
        (True, False, True): "sd2",
        (True, True, False): "sdxl",
        (True, True, True): "sdxl-refiner",
    }.get((linear, vector, deep))
    kind = "linear" if linear else "convolutional"
    facts = f"{kind} projections, {'a' if vector else 'no'} vector embedding, {'more' if deep else 'no more'}"
    if family is None:
        evidence.append(f"no family's UNet has {facts} than nine input blocks")
        return None
    table = {weight.name for weight in walk(UNETS[family])}
    hits = sum(name in table for name in own)
    if hits < _ENOUGH * len(table) or len(own) - hits > _STRANGERS * len(own):
        evidence.append(
            f"no family's UNet: {facts} than nine input blocks, as in {family}, but {len(own) - hits} keys that it "
            f"doesn't know, and {hits} of its {len(table)}"
        )
        return None
    evidence.append(f"the UNet of {family}: {facts} than nine input blocks; {hits} of {len(table)} keys")
    return UNETS[family]


def _family(checkpoint: Checkpoint, components: Mapping[str, Component], evidence: list[str]) -> str:
    unet = components.get("unet")
    text = {name: components[name].config for name in ("text_encoder", "text_encoder_2") if name in components}
    if unet is None:
        return _family_without_unet(components, text)
    family = next((name for name, stock in UNETS.items() if _same_structure(unet.config, stock)), None)
    if family is None:
        return "unknown"
    if not all(isinstance(config, _TEXT_ENCODERS[family]) for config in text.values()):
        evidence.append(f"no family: a UNet of {family} with another family's text encoder")
        return "unknown"
    stem = unet.keys.get("input_blocks.0.0.weight")
    channels = checkpoint[stem].shape[1] if stem and len(checkpoint[stem].shape) == 4 else 4
    if channels not in _VARIANTS:
        evidence.append(f"no family: a UNet of {family} with {channels} input channels")
        return "unknown"
    return family + _VARIANTS[channels]


def _family_without_unet(components: Mapping[str, Component], text: Mapping[str, Config | None]) -> str:
    """Two components can tell by where they are kept; one alone can't."""
    networks = components.keys() & {"text_encoder", "text_encoder_2", "vae"}
    if len(networks) < 2 or not text:
        return "unknown"
    clip = isinstance(text.get("text_encoder"), ClipConfig)
    if "text_encoder_2" in text:
        return "sdxl" if clip else "unknown"
    return "sd1" if clip else "sd2"


def _same_structure(config: Config | None, stock: UNetConfig) -> bool:
    return isinstance(config, UNetConfig) and (
        (config.depths, config.linear, config.vector) == (stock.depths, stock.linear, stock.vector)
    )


def _lone(checkpoint: Checkpoint, wrapper: str, evidence: list[str]) -> tuple[str, dict[str, Component]]:
    """A file that holds one component under its own names."""
    names = _under(checkpoint, wrapper)
    for candidate in ("unet", "vae", "text_encoder", "open_clip"):
        found = _bare(candidate, checkpoint, wrapper, names)
        if found and len(found.keys) >= _ENOUGH * len(found.table):
            evidence.append(f"{len(found.keys)} of {len(found.table)} keys of a lone {found.name}")
            diffusers = isinstance(found.config, ClipConfig)
            return "diffusers" if diffusers else "ldm", {found.name: found}
    for name, mark in (("unet", "down_blocks.0."), ("vae", "encoder.down_blocks.0.")):
        if any(local.startswith(mark) for local in names):
            evidence.append(f"a lone {name} under diffusers' names, whose table is not known yet")
            return "diffusers", {name: Component(name, wrapper, names, {})}
    evidence.append("no component of Stable Diffusion is in it")
    return "unknown", {}


def _bare(candidate: str, checkpoint: Checkpoint, wrapper: str, names: Mapping[str, str]) -> Component | None:
    """The component of that kind in a file without prefixes; only what its table knows belongs to it."""
    name = candidate
    config: Config | None = None
    if candidate == "unet" and any(local.startswith("input_blocks.") for local in names):
        config = _unet_structure(checkpoint, names, evidence=[])
    elif candidate == "vae":
        config = VaeConfig()
    elif candidate == "open_clip":
        open_clip = _open_clip(names)
        config, name = open_clip, "text_encoder" if open_clip.penultimate else "text_encoder_2"
    found: Component | None = None
    if candidate == "text_encoder":
        found = _clip(checkpoint, wrapper, names, "text_model.", _LONE_CLIP_PATHS)
    elif config:
        found = _component(name, wrapper, checkpoint, names, config)
    return found and replace(found, stray=tuple(key for key in found.stray if key.endswith("position_ids")))
