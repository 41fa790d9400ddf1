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


def allowance(text: str, where: Path | None = None) -> Allowance:
    """One line of an allow list: ``ID [PATTERN] [# REASON]``.

    Raises:
        UsageError: If there is no such rule.
    """
    entry, _, reason = text.partition("#")
    words = entry.split(None, 1)
    if not words or words[0] not in RULES:
        raise UsageError(
            f"{words[0] if words else text!r} is no id of a finding", file=where, remedy="see: sdsurgery verify --rules"
        )
    return Allowance(words[0], words[1].strip() if len(words) > 1 else "*", reason.strip() or "allowed")


def allow_list(path: Path) -> list[Allowance]:
    """The allowances in a file, one a line; empty lines and lines that begin with ``#`` are comments.

    Raises:
        UsageError: If a line names no rule.
        CorruptError: If it is no text.
    """
    lines = (line.strip() for line in _text(path).splitlines())
    return [allowance(line, path) for line in lines if line and not line.startswith("#")]


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
        return file.read(0, file.size).decode()
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
