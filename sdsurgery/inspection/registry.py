"""The user's own list of fingerprints with names; nothing is known that somebody hasn't registered.

It is a JSON file in the user's data folder, or where the environment variable ``SDSURGERY_REGISTRY`` says.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..containers.writing import AtomicFile
from ..errors import CorruptError
from ..sources import SourceFile
from .fingerprints import Fingerprint

VARIABLE = "SDSURGERY_REGISTRY"
_SCHEMA_VERSION = 1
_LARGEST = 64 << 20


def path() -> Path:
    """Where it lies."""
    told = os.environ.get(VARIABLE)
    if told:
        return Path(told)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "sdsurgery" / "fingerprints.json"


def load() -> dict[str, str]:
    """Fingerprint (of either kind) to name; empty where there is no registry.

    Raises:
        CorruptError: If there is a file and it is none.
    """
    place = path()
    if not place.exists():
        return {}
    file = SourceFile(place)
    remedy = f"mend or remove it, or name another with {VARIABLE}"
    if file.size > _LARGEST:
        raise CorruptError("it is too large for a registry", file=place, remedy=remedy)
    content = file.read(0, file.size)
    file.close()
    try:
        document = json.loads(content)
        names = document["fingerprints"] if document["schema_version"] == _SCHEMA_VERSION else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError("it is no registry of fingerprints", file=place, remedy=remedy) from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CorruptError("it is no registry of this version", file=place, remedy=remedy)
    return names


def register(found: Iterable[Fingerprint], name: str) -> Path:
    """Give these components a name; a component's own stands behind it if there are several.

    Returns:
        Where the registry lies.
    """
    names, listed = load(), list(found)
    for each in listed:
        label = name if len(listed) == 1 else f"{name} ({each.component})"
        names |= {each.exact: label, each.fp16: label}
    place = path()
    place.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema_version": _SCHEMA_VERSION, "fingerprints": dict(sorted(names.items()))}
    content = (json.dumps(document, indent=1) + "\n").encode()
    with AtomicFile(place, replace=True, size=len(content), advance=lambda _count: None) as out:
        out.write(content)
    return place


def known_as(found: Fingerprint, names: Mapping[str, str]) -> str | None:
    """The name of a component, with a word where only its values rounded to fp16 are those that were registered."""
    if found.exact in names:
        return names[found.exact]
    return f"{names[found.fp16]}, rounded to fp16" if found.fp16 in names else None
