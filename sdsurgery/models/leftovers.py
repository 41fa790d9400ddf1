"""What lies in a checkpoint that nobody needs to draw with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..checkpoint import Checkpoint
from .components import MARKERS, TRAINING_PREFIXES
from .identify import VAE_PREFIX, Model

Group = Literal["ema", "schedule", "training"]


def training_groups(checkpoint: Checkpoint, model: Model) -> Iterator[tuple[Group, list[str]]]:
    """What only training needs, with the keys that are there of it."""
    for name in ("ema", "schedule"):
        component = model.components.get(name)
        keys = set(component.all_keys()) if component else set()
        yield name, [key for key in checkpoint if key in keys]
    prefixes = tuple(model.wrapper + prefix for prefix in (*TRAINING_PREFIXES, VAE_PREFIX + "loss."))
    yield "training", [key for key in checkpoint if key.startswith(prefixes)]


def unknown_keys(model: Model) -> list[str]:
    """Keys that lie in a component which hasn't them, or in none; not those of a component of an unknown kind."""
    others = model.components.get("other")
    rest = list(others.keys.values()) if others else []
    strays = [key for found in model.components.values() if found.table for key in found.stray]
    known = (*TRAINING_PREFIXES, VAE_PREFIX + "loss.")
    bare = ((key, key.removeprefix(model.wrapper)) for key in (*strays, *rest))
    return [key for key, name in bare if name not in MARKERS and not name.startswith(known)]
