"""What a check finds, and what a model's checks come to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import SurgeryError
from .rules import RULES, Severity

FailOn = Literal["note", "warning", "error", "never"]
"""From which severity on a finding makes a run fail."""

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""From the least to the worst."""

DONOR = "DONOR"
"""Stands in a command for a file that only the user can name."""


@dataclass(frozen=True, slots=True)
class Mend:
    """How to make a finding go away.

    Attributes:
        command: Its words, ``sdsurgery`` first; :data:`DONOR` where the user has to name a file.
        safe: Whether ``verify --fix`` may do it unasked: nothing that anybody could want is lost.
    """

    command: tuple[str, ...]
    safe: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that isn't as it should be.

    Attributes:
        id: Of the rule, always the same; :data:`~sdsurgery.inspection.rules.RULES` explains it.
        severity: ``note``, ``warning`` or ``error``, by the profile.
        message: In words.
        file: Of a folder, the name of the file in it; ``None`` for the model itself.
        key: The tensor's key in the model, or where it should be.
        component: Whose.
        expected: What should be there.
        seen: What is there.
        remedy: What to do, in words, where no command does it.
        mend: The command that does it.
        allowed: Why it doesn't count, where somebody said that it doesn't.
    """

    id: str
    severity: Severity
    message: str
    file: str | None = None
    key: str | None = None
    component: str | None = None
    expected: str | None = None
    seen: str | None = None
    remedy: str | None = None
    mend: Mend | None = None
    allowed: str | None = None

    def fingerprint(self, model: str) -> str:
        """A hash that stays the same from run to run: of what it is about and what was seen, without any folder."""
        facts = (self.id, Path(model).name, self.file, self.key, self.component, self.expected, self.seen)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of checking one model.

    Attributes:
        path: As it was named.
        container: How its bytes lie; ``None`` where it could not be opened.
        layout: How its weights are named.
        family: What model it is.
        profile: Whose needs it was held against; ``manifest`` where it was compared with one.
        rules: Ids of the rules that were applied, whether they found something or not.
        findings: What was found, the worst first.
        nbytes: Bytes of values that were read.
        output: What ``--fix`` wrote; the findings are then those that remain in it.
        mended: What ``--fix`` mended.
        failure: Why ``--fix`` could not write its result.
    """

    path: Path
    container: str | None
    layout: str | None
    family: str | None
    profile: str
    rules: tuple[str, ...]
    findings: tuple[Finding, ...]
    nbytes: int = 0
    output: Path | None = None
    mended: tuple[Finding, ...] = ()
    failure: SurgeryError | None = None

    @property
    def complete(self) -> bool:
        """Whether everything could be checked; that somebody allows a gap doesn't close it."""
        return not any(RULES[finding.id].gap for finding in self.findings)

    def failing(self, fail_on: FailOn) -> tuple[Finding, ...]:
        """The findings that count."""
        if fail_on == "never":
            return ()
        least = SEVERITIES.index(fail_on)
        return tuple(
            found for found in self.findings if not found.allowed and SEVERITIES.index(found.severity) >= least
        )

    def count(self, severity: Severity) -> int:
        """Findings of that severity that count."""
        return sum(found.severity == severity and not found.allowed for found in self.findings)


def exit_code(verifications: Iterable[Verification], fail_on: FailOn) -> int:
    """0 only if everything was checked and nothing was found that counts; where several codes hold, the highest."""
    return max((_code(each, fail_on) for each in verifications), default=0)


def _code(found: Verification, fail_on: FailOn) -> int:
    checked = 3 if not found.complete else 1 if found.failing(fail_on) else 0
    return max(checked, found.failure.exit_code if found.failure else 0)
