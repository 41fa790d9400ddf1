"""Findings that don't count, because somebody says so: an allow list, or a baseline of what was there before."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CorruptError, UsageError
from ..sources import SourceFile
from .findings import Finding, Verification
from .rules import RULES

_LARGEST = 256 << 20
_BASELINE = "in the baseline"


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is allowed.

    Attributes:
        rule: The finding's id.
        pattern: Of the keys, file names or components that it is about, with ``*`` and ``?``; ``*`` for all.
        reason: Why.
    """

    rule: str
    pattern: str
    reason: str

    def covers(self, finding: Finding) -> bool:
        """Whether a finding is what is meant."""
        about = [text for text in (finding.key, finding.file, finding.component) if text] or [""]
        return finding.id == self.rule and any(
            text == self.pattern or fnmatchcase(text, self.pattern) for text in about
        )

    def __str__(self) -> str:
        return self.rule if self.pattern == "*" else f"{self.rule} {self.pattern}"


def allowance(rule: str, pattern: str = "", reason: str = "", where: Path | None = None) -> Allowance:
    """What is allowed, in parts; without a pattern, all findings of the rule.

    Raises:
        UsageError: If there is no such rule.
    """
    if rule not in RULES:
        remedy = "see: sdsurgery verify --rules"
        raise UsageError(f"{rule!r} is no id of a finding", file=where, remedy=remedy)
    return Allowance(rule, pattern.strip() or "*", reason.strip() or "allowed")


def allow_list(path: Path) -> list[Allowance]:
    """The allowances in a file, ``ID [PATTERN] [# REASON]`` a line; other lines may be empty or a comment.

    Raises:
        UsageError: If a line names no rule.
        CorruptError: If it is no text.
    """
    found = []
    for line in _text(path).splitlines():
        entry, _, reason = line.partition("#")
        words = entry.split(None, 1)
        if words:
            found.append(allowance(words[0], "".join(words[1:]), reason, path))
    return found


def baseline(path: Path) -> frozenset[str]:
    """The fingerprints of the findings in an earlier report, as ``verify --json`` printed it.

    Raises:
        CorruptError: If it is none.
    """
    try:
        models = json.loads(_text(path))["models"]
        return frozenset(str(finding["fingerprint"]) for model in models for finding in model["findings"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "name what sdsurgery verify --json printed"
        raise CorruptError("it is no report of findings", file=path, remedy=remedy) from error


def _text(path: Path) -> str:
    file = SourceFile(path)
    try:
        if file.size > _LARGEST:
            raise CorruptError(f"{file.size:,} bytes are too many", file=path, remedy="name another file")
        return file.read(0, file.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptError("it is no text", file=path, remedy="name another file") from error
    finally:
        file.close()


def allowed(
    verification: Verification, allowances: Iterable[Allowance] = (), known: frozenset[str] = frozenset()
) -> Verification:
    """The same with every finding marked that is allowed, or that the baseline has."""
    listed = list(allowances)
    findings = tuple(_marked(finding, verification, listed, known) for finding in verification.findings)
    return replace(verification, findings=findings)


def _marked(finding: Finding, verification: Verification, listed: list[Allowance], known: frozenset[str]) -> Finding:
    reason = next((each.reason for each in listed if each.covers(finding)), None)
    if reason is None and known and finding.fingerprint(str(verification.path)) in known:
        reason = _BASELINE
    return replace(finding, allowed=reason) if reason else finding


def unused(allowances: Iterable[Allowance], verifications: Iterable[Verification]) -> Iterator[Allowance]:
    """Allowances that nothing was found for any more."""
    findings = [finding for each in verifications for finding in (*each.findings, *each.mended)]
    return (each for each in allowances if not any(each.covers(finding) for finding in findings))
