"""What a comparison of formats found, as JUnit's XML: what users and files say is written out unless it is plain."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .parity import told, told_of_picture
from .terminal import printable

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite

    from ..parity.results import Compared, Parity, Stage


def junit(found: Parity) -> str:
    """A suite for each format that is held against the reference, a test for each stage of each picture; in ASCII.

    The reference has a suite, too, where it is wrong by itself.
    """
    from junitparser import JUnitXml

    report: Any = JUnitXml("sdsurgery parity")
    for each in found.formats:
        if not each.is_reference or each.diverges:
            report.append(_suite(each, found))
    raw = io.BytesIO()
    report.write(raw)
    return raw.getvalue().decode().encode("ascii", "xmlcharrefreplace").decode()


def _suite(each: Compared, found: Parity) -> TestSuite:
    from junitparser import TestSuite

    suite = TestSuite(printable(each.format.label))
    about = {
        "software": each.software, "precision": each.precision, "tolerance": found.profile,
        "device": found.chosen.device, "reference": found.formats[0].format.label,
        **{f"prompt {number}": prompt for number, prompt in enumerate(found.settings.prompts, 1)},
    }  # fmt: skip
    for name, value in about.items():
        suite.add_property(name, printable(value))
    suite.add_testcases(list(_cases(each)))
    return suite


def _cases(each: Compared) -> Iterator[TestCase]:
    stages: dict[tuple[str, str, int], list[Stage]] = {}
    for stage in each.stages:
        stages.setdefault((stage.component, stage.name, stage.picture), []).append(stage)
    for (component, name, number), found in stages.items():
        refusals = [stage.refusal for stage in found if stage.refusal]
        yield _case(component, f"{name}, picture {number + 1}", refusals, "\n".join(map(told, found)))
    for picture in each.pictures:
        line = told_of_picture(picture, is_reference=each.is_reference)
        yield _case("picture", f"picture {picture.number + 1}", [picture.refusal] if picture.refusal else [], line)


def _case(component: str, name: str, refusals: Sequence[str], text: str) -> TestCase:
    from junitparser import Failure, TestCase

    case = TestCase(printable(name), f"sdsurgery.parity.{component}")
    shown = "\n".join(map(printable, text.strip().split("\n")))
    if refusals:
        outcome = Failure(printable("; ".join(refusals)), component)
        outcome.text = shown
        case.result = outcome
    else:
        case.system_out = shown
    return case
