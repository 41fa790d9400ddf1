"""The JSON documents; ``docs/schemas`` describes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Change, Checkpoint
from ..errors import SurgeryError
from ..inspection import Inspection, registry
from ..inspection.comparing import Statistics
from ..inspection.diffing import Diff
from ..inspection.explaining import Explanation
from ..inspection.findings import FailOn, Finding, Verification, exit_code
from ..inspection.fingerprints import Fingerprint
from ..inspection.hashes import FileHashes
from ..models.position_ids import Diagnosis

if TYPE_CHECKING:
    from ..inspection.known_components import Known


def text(document: Mapping[str, Any]) -> str:
    """The document as it is printed: in ASCII, which every pipe and every code page holds."""
    return json.dumps(document, indent=2)


def error(failure: SurgeryError) -> dict[str, Any]:
    """What ``--json`` prints on a failure."""
    return {"error": failure.as_json()}


def written(checkpoint: Checkpoint, output: Path | None, dropped: Iterable[Change], *, dry_run: bool) -> dict[str, Any]:
    """What a writing command did, or would do."""
    changes = [asdict(change) for change in (*checkpoint.changes, *dropped)]
    return {
        "output": None if output is None else str(output),
        "dry_run": dry_run,
        "changed": bool(changes),
        "changes": changes,
        "notes": [asdict(note) for note in checkpoint.notes],
    }


def diff(
    found: Diff, explanations: Iterable[Explanation] = (), known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What ``diff --json`` prints."""
    return {
        "identical": found.identical,
        "families": list(found.families),
        "layouts": list(found.layouts),
        "equal": dict(found.equal),
        "changed": [
            {
                "key": change.key,
                "other_key": change.other_key,
                "component": change.component,
                "name": change.name,
                "before": change.before,
                "after": change.after,
                "kind": change.comparison.kind,
                **_statistics(change.comparison.statistics),
            }
            for change in found.changed
        ],
        "renamed": [asdict(entry) for entry in found.renamed],
        "added": [asdict(entry) for entry in found.added],
        "removed": [asdict(entry) for entry in found.removed],
        "not_comparable": [asdict(entry) for entry in found.not_comparable],
        "metadata": [asdict(entry) for entry in found.metadata],
        "position_ids": list(found.position_ids),
        "explanations": [asdict(entry) | {"exact": entry.exact} for entry in explanations],
        "known": dict(known or {}),
    }


def fingerprints(found: Iterable[Fingerprint], names: Mapping[str, str], registered: str | None) -> dict[str, Any]:
    """What ``fingerprint --json`` prints."""
    return {
        "fingerprints": [asdict(each) | {"known_as": registry.known_as(each, names)} for each in found],
        "registered": registered,
    }


def verification(verifications: Sequence[Verification], fail_on: FailOn) -> dict[str, Any]:
    """What ``verify --json`` prints."""
    return {
        "schema_version": 1,
        "verified": exit_code(verifications, fail_on) == 0,
        "fail_on": fail_on,
        "models": [_verified(each) for each in verifications],
    }


def _verified(found: Verification) -> dict[str, Any]:
    model = str(found.path)
    return {
        "path": model,
        "container": found.container,
        "layout": found.layout,
        "family": found.family,
        "profile": found.profile,
        "complete": found.complete,
        "rules": list(found.rules),
        "findings": [_finding(each, model) for each in found.findings],
        "mended": [_finding(each, model) for each in found.mended],
        "output": str(found.output) if found.output else None,
        "error": found.failure.as_json() if found.failure else None,
    }


def _finding(found: Finding, model: str) -> dict[str, Any]:
    mend = {"command": list(found.mend.command), "safe": found.mend.safe} if found.mend else None
    return asdict(found) | {"mend": mend, "fingerprint": found.fingerprint(model)}


def _statistics(found: Statistics | None) -> dict[str, Any]:
    """Numbers that JSON holds; null for what isn't one."""
    names = ("max_abs", "mean_abs", "relative_l2", "cosine", "share", "special")
    numbers = {name: getattr(found, name) if found else None for name in names}
    return {name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()}


def position_ids(diagnosis: Diagnosis) -> dict[str, Any]:
    """A diagnosis of CLIP-L's position ids."""
    return {
        "status": diagnosis.status,
        "wrong": list(diagnosis.wrong),
        "dtype": diagnosis.dtype,
        "key": diagnosis.key,
    }


def inspection(
    found: Inspection,
    hashes: FileHashes | None,
    known: Mapping[str, Iterable[Known]] | None = None,
    *,
    with_tensors: bool,
) -> dict[str, Any]:
    """What ``inspect --json`` prints."""
    document: dict[str, Any] = {
        "path": found.path,
        "container": found.container,
        "layout": found.layout,
        "family": found.family,
        "evidence": list(found.evidence),
        "file_bytes": found.file_bytes,
        "tensors": len(found.tensors),
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "components": {
            name: {
                "tensors": report.tensors,
                "parameters": report.parameters,
                "bytes": report.nbytes,
                "dtypes": dict(report.dtypes),
                "complete": report.complete,
                "missing": list(report.missing),
                "unexpected": list(report.unexpected),
                "misshapen": {key: list(shape) for key, shape in report.misshapen.items()},
            }
            for name, report in found.components.items()
        },
        "position_ids": position_ids(found.position_ids),
        "metadata": dict(found.metadata),
        "history": found.history,
        "non_tensors": [asdict(entry) for entry in found.aside],
    }
    if hashes is not None:
        document["hashes"] = asdict(hashes)
    if known is not None:
        document["known"] = {name: [asdict(entry) for entry in entries] for name, entries in known.items()}
    if with_tensors:
        document["keys"] = {
            key: {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "bytes": tensor.nbytes}
            for key, tensor in found.tensors.items()
        }
    return document
