"""Markdown: what checks found, for the summary of a CI job or a comment on a change.

What a model or a file name says is text and nothing else: whatever Markdown or HTML could obey is written as a
character reference, so that no table ends early, no link, picture or mention comes out of a key. The text is ASCII.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from ..inspection.findings import FailOn, Finding, Verification, exit_code
from .terminal import human_bytes, printable

_MOST_MODELS = 150
_MOST_FINDINGS = 100
_MOST_TEXT = 200
"""Rows of the two tables, and characters of a cell: with all of them GitHub's limit of 1 MiB isn't reached."""

_PLAIN = frozenset(" ,;'/=%?()-")
"""What may stand as it is, besides letters and digits: at no place does Markdown give it a meaning."""

_VERDICTS = {0: "sound", 1: "findings", 3: "**not fully checked**"}


def markdown(verifications: Sequence[Verification], fail_on: FailOn) -> str:
    """The report as it is written: a table of models, then one of findings.

    Args:
        verifications: What came of each model.
        fail_on: From which severity on a finding counts.
    """
    return "\n".join(_lines(verifications, fail_on)) + "\n"


def text(content: str) -> str:
    """Words in a cell or a paragraph, on one line."""
    return "".join(map(_character, _shortened(content)))


def code(content: str) -> str:
    """A name, or what can be copied into a shell."""
    # Not a code span: what ends one, and what a bar means in it, depends on the reader. No mention begins in it.
    return f"<code>{''.join(_reference(c) if c in '@#' else _character(c) for c in _shortened(content))}</code>"


def _shortened(content: str) -> str:
    shown = printable(content)
    return shown if len(shown) <= _MOST_TEXT else shown[: _MOST_TEXT - 1] + "…"


def _character(character: str) -> str:
    if character in _PLAIN or (character.isascii() and character.isalnum()):
        return character
    # A space without width parts what would call a person or an issue; references alone don't prevent that.
    return _reference(character) + ("&#8203;" if character in "@#" else "")


def _reference(character: str) -> str:
    return f"&#{ord(character)};"


def _lines(verifications: Sequence[Verification], fail_on: FailOn) -> Iterator[str]:
    codes = [exit_code([each], fail_on) for each in verifications]
    plural = "" if len(codes) == 1 else "s"
    yield f"### sdsurgery verify: {codes.count(0)} of {len(codes)} model{plural} sound"
    yield ""
    yield "| model | result | what it is | profile | errors | warnings | notes | allowed |"
    yield "|---|---|---|---|--:|--:|--:|--:|"
    order = sorted(range(len(codes)), key=lambda index: -codes[index])
    for index in order[:_MOST_MODELS]:
        yield _row(*_model(verifications[index], codes[index]))
    if len(codes) > _MOST_MODELS:
        yield ""
        yield f"&#8230; and {len(codes) - _MOST_MODELS} more models."
    groups = [(verifications[index], group) for index in order for group in _grouped(verifications[index])]
    if groups:
        yield ""
        yield "| severity | finding | model | what | to mend it |"
        yield "|---|---|---|---|---|"
    for verification, group in groups[:_MOST_FINDINGS]:
        yield _row(*_finding(verification, group, fail_on))
    if len(groups) > _MOST_FINDINGS:
        yield ""
        yield f"&#8230; and {len(groups) - _MOST_FINDINGS} more kinds of findings; the other reports name all."


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _model(found: Verification, verdict: int) -> Iterator[str]:
    yield code(str(found.path))
    yield _VERDICTS[verdict]
    what = ", ".join(word for word in (found.family, found.layout, found.container) if word)
    yield text(f"{what} ({human_bytes(found.nbytes)} read)" if what else "")
    yield text(found.profile)
    for severity in ("error", "warning", "note"):
        yield str(found.count(severity))
    yield str(sum(bool(finding.allowed) for finding in found.findings))


def _grouped(found: Verification) -> list[list[Finding]]:
    """Findings that nobody allowed, those of one rule, component, file and remedy together."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in found.findings:
        if not finding.allowed:
            about = (finding.id, finding.severity, finding.component, finding.file, finding.mend, finding.remedy)
            groups.setdefault(about, []).append(finding)
    return list(groups.values())


def _finding(found: Verification, group: Sequence[Finding], fail_on: FailOn) -> Iterator[str]:
    first = group[0]
    counts = first in found.failing(fail_on)
    yield f"**{first.severity}**" if counts else first.severity
    yield code(first.id)
    inside = first.file is not None and first.file not in {str(found.path), found.path.name}
    yield code(str(found.path / str(first.file) if inside else found.path))
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    yield text(first.message) + more
    if first.mend:
        yield code(shlex.join(first.mend.command))
    else:
        yield text(first.remedy or "")
