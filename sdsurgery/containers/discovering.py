"""The models in a folder that is none itself."""

from __future__ import annotations

import os
import stat
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
    waiting = [path]
    while waiting:
        place = waiting.pop()
        if place != path and (not _is_folder(place) or _is_model(place)):
            yield place
        else:
            names = (name for name in os.listdir(place) if not name.startswith("."))
            inside = [place / name for name in sorted(names, reverse=True)]
            waiting += [each for each in inside if _is_folder(each) or _is_single(each)]


def _is_folder(path: Path) -> bool:
    """Whether it is to be looked into; what can't be looked at counts too, for whoever opens it will say why."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return True


def _is_single(path: Path) -> bool:
    """Whether its name is a single file's."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES and suffix != _IN_PARTS and not os.path.isdir(path)  # noqa: PTH112 - raises nothing


def _is_model(path: Path) -> bool:
    try:
        names = set(os.listdir(path))
    except OSError:
        return True  # whoever opens it will say what is wrong
    if MODEL_INDEX in names or (CONFIG in names and any(weight_name(name) for name in names)):
        return True
    return "unet" in names and (path / "unet" / CONFIG).is_file()
