"""Which known component a model's is, told from its values.

There are two sources. The user's registry knows fingerprints, and what it names is that component. And a program has
published a figure for each of a few well-known VAEs and text encoders; the data file has the rule, the figures and the
source. A figure is a sum of the weights with four digits left of it: what matches one is likely that component and
may be another.

The rule is one of single precision, and so is what it publishes: CLIP-L's figure counts millionths, of which the
errors of an fp32 sigmoid make up a dozen. They are therefore reproduced, in a table of all 65,536 values that fp16 has.
Its entries are multiples of 2**-26, which fp64 adds up without rounding: neither order nor layout can change a sum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from .. import progress
from ..arrays import arrays_of
from ..checkpoint import Checkpoint, Tensor
from ..models.canonical import canonical
from ..models.identify import Model, identify
from ..models.walks import ClipConfig, OpenClipConfig, VaeConfig
from . import registry
from .fingerprints import fingerprints

_THREADS = 2
_KINDS = {VaeConfig: "vae", ClipConfig: "clip", OpenClipConfig: "open_clip"}
_TURN = 10_000
"""Figures are below this; the rule folds larger ones into the upper half."""


@dataclass(frozen=True, slots=True)
class Published:
    """A figure that is published for a component.

    Attributes:
        name: What the publisher calls the component.
        figure: Its figure.
        latents: Of a VAE: whose scale its latents have, ``sd`` or ``sdxl``.
    """

    name: str
    figure: int
    latents: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """How a kind of component comes to its figure.

    Attributes:
        containing: A weight takes part if its name contains one of these,
        without: and none of these.
        elements: How many elements take part in the components whose figures are published.
        base: The sum that the figure is the distance from.
        scale: What a distance as large as the base is multiplied with.
        published: The figures of known components.
    """

    containing: tuple[str, ...]
    without: tuple[str, ...]
    elements: int
    base: float
    scale: int
    published: tuple[Published, ...]

    def covers(self, name: str) -> bool:
        """Whether a weight takes part, by its name in either layout."""
        return any(part in name for part in self.containing) and not any(part in name for part in self.without)

    def figure(self, total: float) -> int | None:
        """The figure that a sum comes to; ``None`` for a sum of nothing, or with a NaN in it."""
        if not total or math.isnan(total):
            return None
        distance = int(abs(total / self.base - 1) * self.scale)
        return distance if distance < _TURN else _TURN // 2 + distance % (_TURN // 2)


@dataclass(frozen=True, slots=True)
class Match:
    """A component whose figure is one that is published.

    Attributes:
        name: What the publisher calls the component that has it.
        figure: The component's own, which may be one off.
        latents: Of a VAE: whose scale the latents of the published one have, ``sd`` or ``sdxl``.
    """

    name: str
    figure: int
    latents: str | None


@dataclass(frozen=True, slots=True)
class Known:
    """What a component is known as.

    Attributes:
        name: Its name there.
        by: Where it is known.
        exact: Whether it is the very component, to the bit; not where values rounded to fp16 or a figure agree.
        figure: Its own, where it is known by that.
    """

    name: str
    by: Literal["registry", "published figure"]
    exact: bool
    figure: int | None = None


def known(checkpoint: Checkpoint, components: Collection[str] = ()) -> dict[str, tuple[Known, ...]]:
    """What each text encoder, UNet and VAE is known as; reads only what a source has something about.

    Args:
        checkpoint: The model.
        components: Only these; all unless given.

    Raises:
        CorruptError: If the registry is broken.
    """
    model = identify(checkpoint)
    tabled = [name for name, component in model.networks.items() if component.table]
    networks = [name for name in tabled if not components or name in components]
    names = registry.load()
    found: dict[str, list[Known]] = {name: [] for name in networks}
    for each in fingerprints(checkpoint, networks) if names and networks else ():
        exact = each.exact in names
        if exact or each.fp16 in names:
            found[each.component].append(Known(names[each.exact if exact else each.fp16], "registry", exact))
    for name, matches in published_matches(checkpoint, model, networks).items() if networks else ():
        found[name] += [Known(match.name, "published figure", exact=False, figure=match.figure) for match in matches]
    return {name: tuple(entries) for name, entries in found.items()}


def labels(checkpoint: Checkpoint, components: Collection[str] = ()) -> dict[str, str]:
    """In words, the first thing that each component is known as; a component that isn't known is left out."""
    return {name: _label(entries[0]) for name, entries in known(checkpoint, components).items() if entries}


def _label(entry: Known) -> str:
    if entry.by == "registry":
        return entry.name if entry.exact else f"{entry.name}, rounded to fp16"
    return f"{entry.name}, by the figure that {publisher()} publishes"


def published_vae(checkpoint: Checkpoint, model: Model | None = None) -> Match | None:
    """The published VAE whose figure the model's VAE has, with the family of its latents; reads the VAE alone.

    It is evidence and no proof: there are ten thousand figures, and some fifteen of them match.
    """
    return next(iter(published_matches(checkpoint, model, ("vae",)).get("vae", ())), None)


def published_matches(
    checkpoint: Checkpoint, model: Model | None = None, components: Collection[str] = ()
) -> dict[str, tuple[Match, ...]]:
    """The published figures that components have, the nearest first.

    A component that isn't of the published size, or lacks a weight that takes part, has none and isn't read.

    Args:
        checkpoint: The model.
        model: What it was identified as, if it was.
        components: Only these; all unless given.
    """
    tolerance = _document()["tolerance"]
    measured = {
        name: (rule, tensors)
        for name, (rule, tensors) in _measurable(checkpoint, model or identify(checkpoint)).items()
        if (not components or name in components) and sum(tensor.numel for tensor in tensors) == rule.elements
    }
    totals = _totals({name: tensors for name, (_, tensors) in measured.items()})
    found = {}
    for name, (rule, _) in measured.items():
        figure = rule.figure(totals[name])
        near = [each for each in rule.published if figure is not None and abs(each.figure - figure) <= tolerance]
        if figure is not None and near:
            near.sort(key=lambda each: abs(each.figure - figure))
            found[name] = tuple(Match(each.name, figure, each.latents) for each in near)
    return found


def figures(checkpoint: Checkpoint, model: Model | None = None) -> dict[str, int]:
    """The figure of each component for whose kind there is a rule, whatever its size, where the rule gives one."""
    measured = _measurable(checkpoint, model or identify(checkpoint))
    totals = _totals({name: tensors for name, (_, tensors) in measured.items()})
    found = {name: rule.figure(totals[name]) for name, (rule, _) in measured.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def publisher() -> str:
    """Who publishes the figures."""
    return str(_document()["publisher"])


@cache
def rules() -> Mapping[str, Rule]:
    """The rule of each kind of component that has figures published."""
    return {
        entry["kind"]: Rule(
            containing=tuple(entry["containing"]),
            without=tuple(entry["without"]),
            elements=entry["elements"],
            base=entry["base"],
            scale=entry["scale"],
            published=tuple(Published(**each) for each in entry["figures"]),
        )
        for entry in _document()["rules"]
    }


@cache
def _document() -> dict[str, Any]:
    from importlib import resources

    text = resources.files("sdsurgery.data").joinpath("known_components.json").read_text("utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def _measurable(checkpoint: Checkpoint, model: Model) -> dict[str, tuple[Rule, list[Tensor]]]:
    """By component that there is a rule for: the rule, and the tensors that take part."""
    ruled = {
        name: rules()[_KINDS[type(component.config)]]
        for name, component in model.networks.items()
        if component.table and _KINDS.get(type(component.config)) in rules()
    }
    found: dict[str, tuple[Rule, list[Tensor]]] = {name: (rule, []) for name, rule in ruled.items()}
    for item in canonical(checkpoint, model).values() if found else ():
        if item.component in found and item.portable and found[item.component][0].covers(item.name):
            found[item.component][1].append(item.tensor)
    return found


def _totals(components: Mapping[str, Iterable[Tensor]]) -> dict[str, float]:
    """The sum that a figure is made of, by component."""
    ordered = [(name, tensor) for name, tensors in components.items() for tensor in tensors]
    parts: dict[str, list[float]] = {name: [] for name in components}
    if not ordered:
        return dict.fromkeys(components, 0.0)
    total = sum(tensor.nbytes for _, tensor in ordered)
    with progress.task(f"summing up {len(ordered)} tensors", total) as advance, ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda entry: _sum(entry[1]), ordered)
        for (name, tensor), part in zip(ordered, sums, strict=True):
            parts[name].append(part)
            advance(tensor.nbytes)
    return {name: math.fsum(each) for name, each in parts.items()}


def _sum(tensor: Tensor) -> float:
    """The sum of ``sigmoid(w) - 1/2`` over a tensor rounded to fp16; NaN where it holds one, or no floats."""
    if tensor.dtype.kind != "float" or tensor.dtype.numpy is None:
        return math.nan
    import numpy as np

    table, total = _table(), 0.0
    for (array,) in arrays_of((tensor,)):
        with np.errstate(over="ignore", invalid="ignore"):
            half = array.astype(np.float16, copy=False)
        total += float(table.take(half.view(np.uint16)).sum())
    return total


@cache
def _table() -> Any:
    """``sigmoid(w) - 1/2`` of every fp16 value by its bits, computed in fp32, to be added up in fp64.

    The exponential is what vectorised libraries make of it: ``2**q`` times ``1 + (exp(rest) - 1)``, with the bracket
    and the sum rounded. Rounded but once it has other last digits, in the mean too, and the mean is what counts here.
    """
    import numpy as np

    single = np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
        power = np.where(np.isfinite(values), np.rint(-values / math.log(2)), 0)
        bracket = np.expm1(-values - power * math.log(2)).astype(single)
        exponential = np.ldexp(single(1) + bracket, power.astype(np.int32))
        return (single(1) / (single(1) + exponential) - single(0.5)).astype(np.float64)
