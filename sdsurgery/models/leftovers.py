"""What lies in a checkpoint that nobody needs to draw with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..checkpoint import Checkpoint
from .components import KNOWN_EXTRAS, MARKERS, TRAINING_PREFIXES
from .configs import NETWORKS
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


def unknown_keys(checkpoint: Checkpoint, model: Model) -> list[str]:
    """Keys that lie in a component which hasn't them, or in none.

    Not those of a component of an unknown kind, of a folder's other parts, of what published files are known to carry
    besides; and none in a file where nothing is known.
    """
    if not model.networks:
        return []
    others = model.components.get("other")
    rest = list(others.keys.values()) if others else []
    strays = [key for found in model.components.values() if found.table for key in found.stray]
    known = (*TRAINING_PREFIXES, VAE_PREFIX + "loss.", *KNOWN_EXTRAS)
    bare = ((key, key.removeprefix(model.wrapper)) for key in (*strays, *rest) if not is_other_part(checkpoint, key))
    return [key for key, name in bare if name not in MARKERS and not name.startswith(known)]


def is_other_part(checkpoint: Checkpoint, key: str) -> bool:
    """Whether a key is of a part of a folder that isn't looked into, such as a safety checker."""
    return checkpoint.folder is not None and "/" in key and key.partition("/")[0] not in NETWORKS
