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
from .checkpoint import Step

METADATA_KEY = "sdsurgery"
"""The metadata key that holds the record."""

SCHEMA_VERSION = 1

HASH_KEYS = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata keys that hold a hash of the tensors' bytes; any change of those makes them false."""


def recorded(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The steps that a file's metadata tells of, oldest first; empty where there is no record of ours."""
    try:
        steps = json.loads(metadata[METADATA_KEY])["steps"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def describe(step: Step) -> dict[str, Any]:
    """One step as the record and the reports show it."""
    entry: dict[str, Any] = {"operation": step.operation, "parameters": dict(step.parameters), **step.facts}
    if step.inputs:
        entry["inputs"] = [
            {"name": source.name, **({"sha256": source.sha256} if source.sha256 else {})} for source in step.inputs
        ]
    entry["changes"] = dict(sorted(Counter(change.kind for change in step.changes).items()))
    return entry


def with_history(metadata: Mapping[str, str], steps: Sequence[Step], **facts: str) -> dict[str, str]:
    """The metadata with the steps that changed something appended to its record.

    Args:
        metadata: What the file held.
        steps: What was done since.
        facts: Written into every new entry, such as the SHA-256 of the file it started from.
    """
    done = [describe(step) | facts | {"sdsurgery": __version__} for step in steps if step.changes]
    if not done:
        return dict(metadata)
    record = {"schema_version": SCHEMA_VERSION, "steps": [*recorded(metadata), *done]}
    # transformers refuses a safetensors file that has metadata without a format.
    return {"format": "pt", **metadata, METADATA_KEY: _as_text(record)}


def _as_text(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a file may hold bytes that are no text
        return json.dumps(record, separators=(",", ":"), sort_keys=True)
    return text
