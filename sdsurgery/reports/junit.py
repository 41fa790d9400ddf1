"""JUnit's XML: what checks found as tests that failed, for whatever shows tests."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..inspection.findings import FailOn, Finding, Verification
from ..inspection.rules import RULES, Rule
from .sarif import in_words
from .terminal import printable

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite

_SHOWN = 100
"""Findings of one rule that are listed before the rest is counted."""


def junit(verifications: Sequence[Verification], fail_on: FailOn) -> str:
    """The report as it is written: in ASCII, without dates.

    Args:
        verifications: A suite each, with a test for each rule that was applied.
        fail_on: From which severity on a finding is a failure. What could not be checked is an error in any case.
    """
    from junitparser import JUnitXml

    report: Any = JUnitXml("sdsurgery")
    for each in verifications:
        # add_testsuite would join two models of one name, and totals bring an attribute that Jenkins' schema lacks
        report.append(_suite(each, fail_on))
    raw = io.BytesIO()
    report.write(raw)
    return raw.getvalue().decode().encode("ascii", "xmlcharrefreplace").decode()


def _suite(verification: Verification, fail_on: FailOn) -> TestSuite:
    from junitparser import TestSuite

    found: dict[str, list[Finding]] = {name: [] for name in verification.rules}
    for finding in verification.findings:
        found.setdefault(finding.id, []).append(finding)
    failing = frozenset(verification.failing(fail_on))
    suite = TestSuite(printable(str(verification.path)))
    for name in ("profile", "container", "layout", "family", "output"):
        if value := getattr(verification, name):
            suite.add_property(name, printable(str(value)))
    suite.add_testcases([_case(rule, found[rule.id], failing) for rule in RULES.values() if rule.id in found])
    return suite


def _case(rule: Rule, findings: Sequence[Finding], failing: Collection[Finding]) -> TestCase:
    from junitparser import Error, Failure, TestCase

    case = TestCase(rule.id, f"sdsurgery.{rule.group}")
    counting = [finding for finding in findings if rule.gap or finding in failing]
    others = [finding for finding in findings if not rule.gap and finding not in failing]
    if counting:
        outcome = (Error if rule.gap else Failure)(in_words(counting[0]), counting[0].severity)
        outcome.text = _lines(counting)
        case.result = outcome
    if others:
        case.system_out = _lines(others)
    return case


def _lines(findings: Sequence[Finding]) -> str:
    lines = list(map(_line, findings[:_SHOWN]))
    if len(findings) > _SHOWN:
        lines.append(f"... and {len(findings) - _SHOWN} more")
    return "\n".join(lines)


def _line(finding: Finding) -> str:
    place = f"{printable(finding.file)}: " if finding.file else ""
    why = f" (allowed: {printable(finding.allowed)})" if finding.allowed else ""
    return f"{finding.severity}: {place}{in_words(finding)}{why}"
