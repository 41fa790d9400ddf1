"""SARIF 2.1.0: what checks found, for code scanning and for editors."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import __version__
from ..inspection.findings import SEVERITIES, Finding, Verification
from ..inspection.rules import PROFILES, RULES, Rule
from .terminal import printable

LIMIT = 25_000
"""Results of one run; GitHub rejects a file with more."""

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

_START = {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1}
"""GitHub requires a region in lines, of which weights have none: the empty one where the file begins."""

_PROBLEM = {"note": "recommendation", "warning": "warning", "error": "error"}


def sarif(verifications: Sequence[Verification]) -> str:
    """The log as it is written: in ASCII, without dates, the worst results first."""
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [_Run(verifications).document()]}, indent=2)


def in_words(finding: Finding) -> str:
    """A finding on one line: what it is, where, and what to do."""
    named = finding.key is None or finding.key in finding.message
    facts = "" if named else str(finding.key)
    for name, value in (("expected", finding.expected), ("seen", finding.seen)):
        if value is not None:
            facts += f"{', ' if facts else ''}{name} {value}"
    said = f"{finding.message.rstrip('.')} ({facts})." if facts else f"{finding.message.rstrip('.')}."
    todo = f"To mend it: {shlex.join(finding.mend.command)}" if finding.mend else finding.remedy
    return printable(f"{said} {todo}" if todo else said)


class _Run:
    """One run, whose arrays fill up as its results are made."""

    def __init__(self, verifications: Sequence[Verification]) -> None:
        self.verifications = verifications
        applied = {name for each in verifications for name in each.rules}
        applied |= {finding.id for each in verifications for finding in each.findings}
        self.rules = [rule for rule in RULES.values() if rule.id in applied]
        self.indices = {rule.id: index for index, rule in enumerate(self.rules)}
        self.artifacts: dict[str, int] = {}
        self.components: dict[str, int] = {}

    def document(self) -> dict[str, Any]:
        for each in self.verifications:
            self._artifact(each.output or each.path)
        found = [(each, finding) for each in self.verifications for finding in each.findings]
        found.sort(key=lambda pair: (bool(pair[1].allowed), -SEVERITIES.index(pair[1].severity)))
        results = [self._result(each, finding) for each, finding in found[:LIMIT]]
        notifications = [self._gap(each, finding) for each, finding in found if RULES[finding.id].gap]
        if len(found) > LIMIT:
            words = f"{len(found) - LIMIT} findings are left out, the least of all; code scanning takes {LIMIT} results"
            notifications.append({"level": "warning", "message": {"text": words}})
        return {
            "tool": {"driver": {"name": "sdsurgery", "version": __version__, "rules": list(map(_rule, self.rules))}},
            "invocations": [
                {
                    "executionSuccessful": all(each.complete for each in self.verifications),
                    "toolExecutionNotifications": notifications,
                }
            ],
            "artifacts": [{"location": {"uri": uri}, "roles": ["analysisTarget"]} for uri in self.artifacts],
            "logicalLocations": [
                {"name": name, "fullyQualifiedName": name, "kind": "module"} for name in self.components
            ],
            "results": results,
        }

    def _result(self, verification: Verification, finding: Finding) -> dict[str, Any]:
        fingerprint = finding.fingerprint(str(verification.path))
        return {
            "ruleId": finding.id,
            "ruleIndex": self.indices[finding.id],
            "level": finding.severity,
            "message": {"text": _message(finding)},
            "locations": [self._location(verification, finding)],
            # GitHub reads the second name alone; left to itself it would take all findings of a rule for one.
            "partialFingerprints": {"sdsurgery/v1": fingerprint, "primaryLocationLineHash": fingerprint},
            # SARIF wants this property at all results or at none.
            "suppressions": [{"kind": "external", "justification": printable(finding.allowed)}]
            if finding.allowed
            else [],
            "properties": _properties(finding),
        }

    def _gap(self, verification: Verification, finding: Finding) -> dict[str, Any]:
        return {
            "level": finding.severity,
            "message": {"text": _message(finding)},
            "locations": [self._location(verification, finding)],
            "associatedRule": {"id": finding.id, "index": self.indices[finding.id]},
        }

    def _location(self, verification: Verification, finding: Finding) -> dict[str, Any]:
        path = _file(verification, finding)
        place = {"uri": _uri(path), "index": self._artifact(path)}
        location: dict[str, Any] = {"physicalLocation": {"artifactLocation": place, "region": _START}}
        if logical := self._logical(finding):
            location["logicalLocations"] = [logical]
        return location

    def _logical(self, finding: Finding) -> dict[str, Any]:
        parent = None
        if finding.component is not None:
            parent = self.components.setdefault(printable(finding.component), len(self.components))
        if finding.key is not None:
            found: dict[str, Any] = {"fullyQualifiedName": printable(finding.key), "kind": "member"}
            return found if parent is None else found | {"parentIndex": parent}
        if finding.component is not None:
            return {"fullyQualifiedName": printable(finding.component), "kind": "module", "index": parent}
        return {}

    def _artifact(self, path: Path) -> int:
        return self.artifacts.setdefault(_uri(path), len(self.artifacts))


def _rule(rule: Rule) -> dict[str, Any]:
    others = {profile: rule.severity_in(profile) for profile in PROFILES}
    listed = "".join(
        f"; {severity or 'not looked for'} in the profile {profile}"
        for profile, severity in others.items()
        if severity != rule.severity
    )
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.id.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.help},
        "help": {"text": f"{rule.title}. {rule.help}\n\nSeverity: {rule.severity}{listed}."},
        "defaultConfiguration": {"level": rule.severity},
        "properties": {"tags": [rule.group], "problem.severity": _PROBLEM[rule.severity]},
    }


def _message(finding: Finding) -> str:
    """In words that hold no link: ``[text](target)`` is one in SARIF's plain text too, and a key may say anything."""
    return in_words(finding).replace("](", "] (")


def _properties(finding: Finding) -> dict[str, Any]:
    facts = {"component": finding.component, "expected": finding.expected, "seen": finding.seen}
    found: dict[str, Any] = {name: printable(value) for name, value in facts.items() if value is not None}
    if finding.mend:
        found["mend"] = {"command": list(map(printable, finding.mend.command)), "safe": finding.mend.safe}
    return found


def _file(verification: Verification, finding: Finding) -> Path:
    """The file that it is about, in what ``--fix`` wrote where it wrote something."""
    model = verification.output or verification.path
    itself = {name for path in (model, verification.path) for name in (str(path), path.name)}
    return model if finding.file is None or finding.file in itself else model / finding.file


def _uri(path: Path) -> str:
    """Relative where that is possible: then it names the same file in another clone of a repository."""
    if path.is_absolute() and path.is_relative_to(here := Path.cwd()):
        path = path.relative_to(here)
    if not path.is_absolute():
        return _quoted(path)
    anchor = Path(path.anchor)
    return anchor.as_uri() + _quoted(path.relative_to(anchor))


def _quoted(path: Path) -> str:
    text = path.as_posix()
    try:
        return quote(os.fsencode(text))
    except UnicodeEncodeError:  # half a surrogate pair, out of a folder's index
        return quote(text.encode("utf-8", "surrogatepass"))
