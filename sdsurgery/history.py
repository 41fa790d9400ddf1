"""What was done to a checkpoint, as it is written into the metadata and read back from it.

The record holds operations, parameters, names of further inputs and hashes that were known: never a path, a date
or anything else that would make two runs differ.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from . import __version__
from .checkpoint import Change, Input, Origin, Step, Unread

METADATA_KEY = "sdsurgery"
"""The metadata key that holds the record."""

SCHEMA_VERSION = 1

_LONGEST_WITHIN = 1 << 16
"""Characters of a record within another. Each merge of merges doubles what it holds."""

HASH_KEYS: tuple[str, ...] = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata keys that hold a hash of the tensors' bytes; any change of those makes them false."""


def recorded(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The steps that a file's metadata tells of, oldest first; empty where there is no record of ours."""
    try:
        steps = json.loads(metadata[METADATA_KEY])["steps"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def made(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The same for a record that goes into another; none if it is so long that records would grow with each merge."""
    return recorded(metadata) if len(metadata.get(METADATA_KEY, "")) <= _LONGEST_WITHIN else []


def describe(step: Step) -> dict[str, Any]:
    """One step as the record and the reports show it."""
    entry: dict[str, Any] = {"operation": step.operation, "parameters": dict(step.parameters), **step.facts}
    if step.inputs:
        entry["inputs"] = [_described(each) for each in step.inputs]
    entry["changes"] = dict(sorted(Counter(change.kind for change in _counted(step)).items()))
    return entry


def _counted(step: Step) -> list[Change]:
    return [change for change in step.changes if not isinstance(change, Unread)]


def _described(file: Input) -> dict[str, Any]:
    """A file in a record; what isn't known of it is left out."""
    known = {"sha256": file.sha256, "made": list(file.made), "steps": list(file.steps)}
    return {"name": file.name, **{name: value for name, value in known.items() if value}}


def applied(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Those of the steps that changed something, as records have them."""
    return [describe(step) | {"sdsurgery": __version__} for step in steps if _counted(step)]


def with_history(metadata: Mapping[str, str], steps: Sequence[Step], origin: Origin | None) -> dict[str, str]:
    """The metadata with the steps that changed something appended to its record.

    Args:
        metadata: What the file held.
        steps: What was done since.
        origin: What it was opened from. The first entry of a record names it; files that lay between are no part of
            it, so that steps one by one leave the same record as in one go.
    """
    before, done = recorded(metadata), applied(steps)
    if not done:
        return dict(metadata)
    if not before and origin is not None:
        done[0]["source"] = _described(Input(origin.name, origin.sha256))
    record = {"schema_version": SCHEMA_VERSION, "steps": [*before, *done]}
    # transformers refuses a safetensors file that has metadata without a format.
    return {"format": "pt", **metadata, METADATA_KEY: _as_text(record)}


def _as_text(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a file may hold bytes that are no text
        return json.dumps(record, separators=(",", ":"), sort_keys=True)
    return text
