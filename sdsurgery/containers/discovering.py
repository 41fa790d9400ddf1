"""The models in a folder that is none itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .folders import CONFIG, MODEL_INDEX, weight_name
from .saving import SUFFIXES

_IN_PARTS = ".bin"
"""A suffix that single files rarely have, and parts of all kinds of models do."""


def models_in(path: Path) -> list[Path]:
    """The path itself if it is a file or a model's folder; else every model in it, however deep, in order.

    A diffusers folder counts as one model. Links to folders aren't followed, and hidden folders not looked into.
    """
    if not path.is_dir() or _is_model(path):
        return [path]
    return list(_below(path)) or [path]


def _below(path: Path) -> Iterator[Path]:
    with os.scandir(path) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        place = path / entry.name
        if entry.name.startswith("."):
            continue
        if not entry.is_dir(follow_symlinks=False):
            if entry.is_file() and place.suffix.lower() in SUFFIXES and place.suffix.lower() != _IN_PARTS:
                yield place
        elif _is_model(place):
            yield place
        else:
            yield from _below(place)


def _is_model(path: Path) -> bool:
    try:
        names = set(os.listdir(path))
    except OSError:
        return True  # whoever opens it will say what is wrong
    if MODEL_INDEX in names or (CONFIG in names and any(weight_name(name) for name in names)):
        return True
    return "unet" in names and (path / "unet" / CONFIG).is_file()
