"""verify for a person: what was found, the worst first, and the command that mends it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from ..inspection.findings import FailOn, Finding, Verification, exit_code
from ..inspection.rules import PROFILES, RULES
from .terminal import human_bytes, printable

_SHOWN = 3
"""Findings of one rule in one component that are listed; the rest are counted."""


def lines(verifications: Sequence[Verification], fail_on: FailOn, *, quiet: bool = False) -> Iterator[str]:
    """The report.

    Args:
        verifications: What came of each model.
        fail_on: From which severity on a finding counts.
        quiet: Whether only findings that count are wanted.
    """
    for each in verifications:
        yield from _model(each, fail_on, quiet=quiet)
    if len(verifications) > 1 and not quiet:
        codes = [exit_code([each], fail_on) for each in verifications]
        parts = ((0, "sound"), (1, "with findings"), (3, "not fully checked"))
        told = ", ".join(f"{codes.count(code)} {what}" for code, what in parts if code in codes)
        yield f"{len(verifications)} models: {told}"


def _model(found: Verification, fail_on: FailOn, *, quiet: bool) -> Iterator[str]:
    counting = found.failing(fail_on)
    wanted = counting if quiet else [finding for finding in found.findings if not finding.allowed]
    if not quiet or wanted:
        mended = ", as mended" if found.output else ""
        yield printable(f"{found.path}{mended}: {_verdict(found, fail_on)}")
    for group in _grouped(wanted):
        for finding in group[:_SHOWN]:
            where = f"{finding.file}: " if finding.file and finding.file not in finding.message else ""
            yield printable(f"  {finding.severity:<7} {finding.id}: {where}{finding.message}")
        if len(group) > _SHOWN:
            yield f"  {'':<7} {group[0].id}: … and {len(group) - _SHOWN} more; --json names all"
        yield from _remedy(group[0])
    for finding in found.mended[: _SHOWN * 4]:
        yield printable(f"  mended  {finding.id}: {finding.message}")
    if found.output:
        yield printable(f"  wrote {found.output}")


def _grouped(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of one rule, component and remedy together, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.id, finding.component, finding.mend, finding.remedy), []).append(finding)
    return list(groups.values())


def _remedy(finding: Finding) -> Iterator[str]:
    if finding.mend:
        yield printable(f"          mend with: {shlex.join(finding.mend.command)}")
    elif finding.remedy:
        yield printable(f"          {finding.remedy}")


def _verdict(found: Verification, fail_on: FailOn) -> str:
    what = ", ".join(text for text in (found.family, found.layout, found.container) if text)
    read = f"; {human_bytes(found.nbytes)} read" if found.nbytes else ""
    facts = f" ({what}; profile {found.profile}{read})" if what else ""
    counts = [(found.count(severity), severity) for severity in ("error", "warning", "note")]
    told = ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for count, severity in counts if count)
    allowed = sum(bool(finding.allowed) for finding in found.findings)
    told += f"{', ' if told else ''}{allowed} allowed" if allowed else ""
    if not found.complete:
        return f"could not be fully checked{facts}: {told}"
    sound = "sound" if found.profile in PROFILES else "as it should be"
    verdict = "has findings" if found.failing(fail_on) else sound
    return f"{verdict}{facts}{': ' + told if told else ''}"


def rules() -> Iterator[str]:
    """Every rule, with its severity, and where a profile has another."""
    for rule in RULES.values():
        others = [
            f"{profile}: {severity or 'off'}"
            for profile in PROFILES
            if (severity := rule.severity_in(profile)) != rule.severity
        ]
        yield f"{rule.id:<22} {rule.severity:<8} {rule.title}" + (f" ({', '.join(others)})" if others else "")
