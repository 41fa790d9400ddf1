"""What model a checkpoint holds: told by keys and ranks, never by width, and never by the keys' order.

"Unknown" is an honest answer: it costs nothing, because no operation touches what isn't recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import UnsupportedError
from . import recognition
from .components import Component, ema_component, schedule_component
from .configs import NETWORKS, TEXT_ENCODERS, component_of, documents, structure
from .recognition import ENOUGH, STOCK_CLIP, UNETS, Place
from .walks import ClipConfig, Config, Layout, OpenClipConfig, UNetConfig

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

# Where single files keep their text encoders. SD1 and SD2 have one; sgm's models (SDXL, its refiner, SD2-Turbo) a list.
_TEXT_ROOTS = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")

_WRAPPER = re.compile(r"(?:(?:module|state_dict)\.)+")

_VARIANTS = {4: "", 9: "-inpainting", 8: "-pix2pix", 5: "-depth"}
"""What further input channels of the UNet mean."""

_TEXT_ENCODERS: Mapping[str, tuple[type[Config], ...]] = {
    "sd1": (ClipConfig,),
    "sd2": (OpenClipConfig,),
    "sdxl": (ClipConfig, OpenClipConfig),
    "sdxl-refiner": (OpenClipConfig,),
}

_IN_FOLDERS = frozenset({*NETWORKS, "safety_checker", "image_encoder", "depth_estimator", "controlnet"})
"""What a folder of these families may hold weights of."""

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

    @property
    def networks(self) -> dict[str, Component]:
        """Text encoders, UNet and VAE: what has weights that both layouts hold."""
        return {name: found for name, found in self.components.items() if name in NETWORKS}


def identify(checkpoint: Checkpoint, told: Mapping[str, Config] | None = None) -> Model:
    """Recognise the model; looks at keys, shapes and configs only.

    Args:
        checkpoint: The checkpoint.
        told: By component, the structure that somebody states, which isn't inferred then. In a folder it is the one
            that the component's own config tells.

    Raises:
        CorruptError: If a config in its folder makes no sense.
    """
    wrapper = _common_wrapper(checkpoint)
    evidence = [f"all keys are wrapped in {wrapper!r}"] if wrapper else []
    layout, components = _found(checkpoint, wrapper, told or {}, evidence)
    if layout == "ldm":
        for extra in (
            ema_component(checkpoint, wrapper, components.get("unet")),
            schedule_component(checkpoint, wrapper),
        ):
            if extra:
                components[extra.name] = extra
    family = _family(checkpoint, components, evidence)
    owned = {key for component in components.values() for key in component.all_keys()}
    rest = {key: key for key in checkpoint if key not in owned}
    if rest:
        components["other"] = Component("other", "", rest, {})
    order = (*TEXT_ENCODERS, "unet", "vae", "ema", "schedule", "other")
    return Model(
        layout,
        family,
        {name: components[name] for name in order if name in components},
        wrapper,
        tuple(evidence),
    )


def _found(
    checkpoint: Checkpoint, wrapper: str, told: Mapping[str, Config], evidence: list[str]
) -> tuple[str, dict[str, Component]]:
    """The layout and the networks: of a folder, of a single file under its prefixes, or of a lone component."""
    if _is_folder(checkpoint):
        return "diffusers", _in_folder(checkpoint, told, evidence)
    components = _prefixed(checkpoint, wrapper, told, evidence)
    if components:
        return "ldm", components
    return _lone(checkpoint, wrapper, told, evidence)


def _is_folder(checkpoint: Checkpoint) -> bool:
    """Whether its keys are those of a diffusers folder, and not a stray one among others."""
    prefixes = tuple(name + "/" for name in NETWORKS)
    count = sum(key.startswith(prefixes) for key in checkpoint)
    return count > 0 and (checkpoint.folder is not None or 2 * count > len(checkpoint))


def foreign_parts(checkpoint: Checkpoint) -> list[str]:
    """What a diffusers folder has weights of that no family here has, such as a ``transformer``."""
    if not _is_folder(checkpoint):
        return []
    return sorted({key.partition("/")[0] for key in checkpoint if "/" in key} - _IN_FOLDERS)


def _common_wrapper(keys: Iterable[str]) -> str:
    """The wrapping prefix that all keys share, or nothing."""
    found = {match.group() if (match := _WRAPPER.match(key)) else "" for key in keys}
    return found.pop() if len(found) == 1 else ""


def _under(checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): key for key in checkpoint if key.startswith(prefix)}


# ---------------------------------------------------------------- single files


def _prefixed(
    checkpoint: Checkpoint, wrapper: str, told: Mapping[str, Config], evidence: list[str]
) -> dict[str, Component]:
    """The components of a single file, each under its own prefix."""
    components: dict[str, Component] = {}
    prefix = wrapper + UNET_PREFIX
    names = _under(checkpoint, prefix)
    if names:
        place = Place(checkpoint, prefix, names, told=told.get("unet"))
        components["unet"] = recognition.unet(place, evidence)
    prefix = wrapper + VAE_PREFIX
    names = _under(checkpoint, prefix)
    if names:
        vae = recognition.vae(Place(checkpoint, prefix, names, told=told.get("vae")))
        evidence.append(f"{len(vae.keys)} keys of a VAE under {prefix!r}")
        known = len(vae.keys) >= ENOUGH * len(vae.table)
        components["vae"] = vae if known else Component("vae", prefix, names, {})
    for root in _TEXT_ROOTS:
        found = _text_encoder(checkpoint, wrapper + root, told, components.get("unet"), evidence)
        if found:
            components[found.name] = found
    return components


def _text_encoder(
    checkpoint: Checkpoint, root: str, told: Mapping[str, Config], unet: Component | None, evidence: list[str]
) -> Component | None:
    names = _under(checkpoint, root)
    if not names:
        return None
    if any(name.startswith("model.transformer.resblocks.") for name in names):
        # SD2-Turbo keeps SD2's only text encoder where the refiner keeps CLIP-G.
        sd2 = root.endswith("cond_stage_model.") or _stock_family(unet) == "sd2"
        return _open_clip(Place(checkpoint, root, names), told, evidence, sd2=sd2)
    place = Place(checkpoint, root + "transformer.", names, told=told.get("text_encoder"))
    clip = recognition.clip(place, "transformer.text_model.")
    if clip:
        evidence.append(f"{len(clip.keys)} keys of a CLIP text encoder under {clip.prefix!r}")
    return clip


def _open_clip(place: Place, told: Mapping[str, Config], evidence: list[str], *, sd2: bool) -> Component | None:
    inner = {name.removeprefix("model."): key for name, key in place.names.items() if name.startswith("model.")}
    outside = tuple(key for name, key in place.names.items() if not name.startswith("model."))
    name = "text_encoder" if sd2 else "text_encoder_2"
    inside = replace(place, prefix=place.prefix + "model.", names=inner, told=told.get(name))
    found = recognition.open_clip(inside, penultimate=sd2)
    if len(found.keys) < ENOUGH * len(found.table):
        return None
    evidence.append(f"{len(found.keys)} keys of an OpenCLIP text encoder under {found.prefix!r}")
    return replace(found, name=name, stray=(*found.stray, *outside))


# ---------------------------------------------------------------- diffusers folders


def _in_folder(checkpoint: Checkpoint, told: Mapping[str, Config], evidence: list[str]) -> dict[str, Component]:
    """The components of a diffusers folder, each under its own name."""
    stated = documents(checkpoint)
    components: dict[str, Component] = {}
    for name in ("unet", "vae", *TEXT_ENCODERS):
        prefix = name + "/"
        names = _under(checkpoint, prefix)
        if not names:
            continue
        sd2 = _stock_family(components.get("unet")) == "sd2"
        place = Place(checkpoint, prefix, names, "diffusers")
        config = told.get(name)
        if config is None and name in stated:
            try:
                config = structure(name, stated[name], _named(checkpoint, f"{name}/config.json"), open_clip=sd2)
            except UnsupportedError as error:
                evidence.append(error.message)
                components[name] = place.unknown(name)
                continue
        component = _from_folder(name, replace(place, told=config), sd2=sd2, evidence=evidence)
        components[name] = component or place.unknown(name)
        if components[name].table:
            evidence.append(f"{len(components[name].keys)} of {len(components[name].table)} keys in {prefix}")
    return components


def _named(checkpoint: Checkpoint, name: str) -> str:
    return str(checkpoint.path / name) if checkpoint.path else name


def _from_folder(name: str, place: Place, *, sd2: bool, evidence: list[str]) -> Component | None:
    if name == "unet":
        return recognition.unet(place, evidence)
    if name == "vae":
        return recognition.vae(place)
    second = name == "text_encoder_2"
    found = recognition.clip(place, "text_model.", {"", "text_model."}, second=second, penultimate=sd2)
    return replace(found, name=name) if found else None


# ---------------------------------------------------------------- lone components


def _lone(
    checkpoint: Checkpoint, wrapper: str, told: Mapping[str, Config], evidence: list[str]
) -> tuple[str, dict[str, Component]]:
    """A file or folder that holds one component under its own names."""
    names = _under(checkpoint, wrapper)
    stated = documents(checkpoint).get("")
    if stated is not None:
        return "diffusers", _lone_in_folder(Place(checkpoint, wrapper, names, "diffusers"), stated, told, evidence)
    for candidate, layout in _LONE:
        found = _bare(candidate, Place(checkpoint, wrapper, names, layout, told.get(candidate)))
        if found and len(found.keys) >= ENOUGH * len(found.table):
            evidence.append(f"{len(found.keys)} of {len(found.table)} keys of a lone {found.name}")
            return layout, {found.name: found}
    for name, mark in (("unet", "down_blocks.0."), ("vae", "encoder.down_blocks.0.")):
        if any(local.startswith(mark) for local in names):
            evidence.append(f"a lone {name} under diffusers' names, of no known kind")
            return "diffusers", {name: Component(name, wrapper, names, {}, layout="diffusers")}
    evidence.append("no component of Stable Diffusion is in it")
    return "unknown", {}


_LONE: tuple[tuple[str, Layout], ...] = (
    ("unet", "ldm"),
    ("unet", "diffusers"),
    ("vae", "ldm"),
    ("vae", "diffusers"),
    ("text_encoder", "diffusers"),
    ("text_encoder", "ldm"),
)
"""What a file without prefixes may be; a text encoder under transformers' names counts as diffusers'."""


def _bare(candidate: str, place: Place) -> Component | None:
    """The component of that kind in a file without prefixes; only what its table knows belongs to it."""
    found: Component | None
    if candidate == "unet":
        config = place.told or recognition.unet_structure(place, evidence=[])
        found = place.component("unet", config) if config else None
    elif candidate == "vae":
        found = recognition.vae(place)
    elif place.layout == "ldm":
        found = recognition.open_clip(place, penultimate=None)
    else:
        found = recognition.clip(place, "text_model.", _LONE_CLIP_PATHS)
    return found and replace(found, stray=tuple(key for key in found.stray if key.endswith("position_ids")))


def _lone_in_folder(
    place: Place, stated: Mapping[str, Any], told: Mapping[str, Config], evidence: list[str]
) -> dict[str, Component]:
    """The one component of a folder without others, which its config names."""
    # CLIP-L has twelve layers, whatever activation somebody states for it; OpenCLIP's have more.
    gelu = stated.get("hidden_act") == "gelu" and stated.get("num_hidden_layers", 12) != STOCK_CLIP.layers
    name = component_of(stated, open_clip=gelu)
    if name is None:
        evidence.append("its config tells of nothing that is a part of Stable Diffusion")
        return {}
    file = _named(place.checkpoint, "config.json")
    try:
        config = told.get(name) or structure(name, stated, file, open_clip=gelu)
    except UnsupportedError as error:
        evidence.append(error.message)
        return {name: place.unknown(name)}
    found = _from_folder(name, replace(place, told=config), sd2=gelu, evidence=evidence)
    if found is None:
        return {name: place.unknown(name)}
    evidence.append(f"{len(found.keys)} of {len(found.table)} keys of a lone {name}")
    return {name: found}


# ---------------------------------------------------------------- families


def _stock_family(unet: Component | None) -> str | None:
    """The family that a UNet's structure is of, whatever its widths, and whatever its depths if those are unusual."""
    config = unet.config if unet else None
    if not isinstance(config, UNetConfig):
        return None
    for name, stock in UNETS.items():
        if (config.depths, config.linear, config.vector) == (stock.depths, stock.linear, stock.vector):
            return name
    if not config.vector:
        return "sd2" if config.linear else "sd1"
    if not config.linear or config.depths[0]:
        return None
    return "sdxl" if config.depths[-1] else "sdxl-refiner"


def _family(checkpoint: Checkpoint, components: Mapping[str, Component], evidence: list[str]) -> str:
    unet = components.get("unet")
    text = {name: components[name].config for name in TEXT_ENCODERS if name in components}
    foreign = foreign_parts(checkpoint)
    if foreign:
        evidence.append(f"no family: the folder has a {foreign[0]}, which no family here has")
        return "unknown"
    if unet is None:
        return _family_without_unet(components, text)
    family = _stock_family(unet)
    if family is None:
        return "unknown"
    if not all(isinstance(config, _TEXT_ENCODERS[family]) for config in text.values()):
        evidence.append(f"no family: a UNet of {family} with another family's text encoder")
        return "unknown"
    stem = unet.keys.get("input_blocks.0.0.weight" if unet.layout == "ldm" else "conv_in.weight")
    channels = checkpoint[stem].shape[1] if stem and len(checkpoint[stem].shape) == 4 else 4
    if channels not in _VARIANTS:
        evidence.append(f"no family: a UNet of {family} with {channels} input channels")
        return "unknown"
    return family + _VARIANTS[channels]


def _family_without_unet(components: Mapping[str, Component], text: Mapping[str, Config | None]) -> str:
    """Two components can tell by where they are kept; one alone can't."""
    networks = components.keys() & set(NETWORKS)
    if len(networks) < 2 or not text:
        return "unknown"
    clip = isinstance(text.get("text_encoder"), ClipConfig)
    if "text_encoder_2" in text:
        return "sdxl" if clip else "unknown"
    return "sd1" if clip else "sd2"
