"""Every tensor of a model under one name, whatever the layout, container and dialect it lies in.

The name is diffusers' where both layouts hold the weight. What only one of them can hold (position ids, schedule
buffers, EMA weights, OpenCLIP's last layer in SD2) keeps the name of its own and is marked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint, Tensor
from .components import POSITION_IDS, Component
from .identify import Model
from .translation import fits, to_diffusers
from .walks import Link, links


@dataclass(frozen=True, slots=True)
class Canonical:
    """A tensor of a model.

    Attributes:
        component: Whose it is.
        name: Its canonical name within the component.
        key: Where it lies in the checkpoint; the three parts of one tensor share a key.
        tensor: The tensor, in diffusers' shape.
        portable: Whether both layouts can hold it.
    """

    component: str
    name: str
    key: str
    tensor: Tensor
    portable: bool

    @property
    def identity(self) -> tuple[str, str]:
        """What it is called in every layout."""
        return self.component, self.name


def canonical(checkpoint: Checkpoint, model: Model) -> dict[tuple[str, str], Canonical]:
    """Every tensor by component and canonical name; nothing is read."""
    found: dict[tuple[str, str], Canonical] = {}
    for component in model.components.values():
        known = component.name in model.networks and component.table
        for item in _network(checkpoint, component) if known else _others(checkpoint, model, component):
            found[item.identity] = item
    return found


def _network(checkpoint: Checkpoint, component: Component) -> Iterator[Canonical]:
    assert component.config is not None  # noqa: S101 - for the type checker: a table comes from a config
    from_link = _from_diffusers if component.layout == "diffusers" else _from_ldm
    placed = set()
    for link in links(component.config):
        for item in from_link(checkpoint, component, link):
            placed.add(item.key)
            yield item
    for name, key in component.keys.items():
        if key not in placed:
            yield Canonical(component.name, name, key, checkpoint[key], portable=name != POSITION_IDS)
    for key in component.stray:
        name = key.removeprefix(component.prefix)
        yield Canonical(component.name, name, key, checkpoint[key], portable=False)


def _from_diffusers(checkpoint: Checkpoint, component: Component, link: Link) -> Iterator[Canonical]:
    for weight in link.diffusers:
        key = component.keys.get(weight.name)
        if key is not None:
            tensor = checkpoint[key]
            shaped = replace(tensor, shape=weight.shape) if fits(link, tensor, weight.shape) else tensor
            yield Canonical(component.name, weight.name, key, shaped, portable=True)


def _from_ldm(checkpoint: Checkpoint, component: Component, link: Link) -> Iterator[Canonical]:
    key = component.keys.get(link.ldm.name)
    if key is None:
        return
    tensor = checkpoint[key]
    if not link.diffusers:
        yield Canonical(component.name, link.ldm.name, key, tensor, portable=False)
    elif fits(link, tensor, link.ldm.shape):
        for weight, part in zip(link.diffusers, to_diffusers(link, tensor), strict=True):
            yield Canonical(component.name, weight.name, key, part, portable=True)
    else:
        yield Canonical(component.name, link.diffusers[0].name, key, tensor, portable=True)


def _others(checkpoint: Checkpoint, model: Model, component: Component) -> Iterator[Canonical]:
    """What is no network: EMA, schedule, markers, unknown tensors; or a network of no known kind, as it is named."""
    for name, key in component.keys.items():
        local = name.removeprefix(model.wrapper) if component.name == "other" else name
        yield Canonical(component.name, local, key, checkpoint[key], portable=False)
    for key in component.stray:
        yield Canonical(component.name, key, key, checkpoint[key], portable=False)
