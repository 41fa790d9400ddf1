"""Reports as one HTML file each: no script, nothing loaded from anywhere, readable in any browser and in print.

What a model or a file name says is text and nothing else: templates escape it, control characters are written out, and
the page's policy forbids what is left.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..inspection.diffing import Changed, Diff
from ..inspection.explaining import Explanation
from ..inspection.findings import FailOn, Finding, Verification, exit_code
from ..inspection.rules import RULES
from ..models.configs import NETWORKS
from ..models.regions import KINDS, OTHER, Block, Kind, Region, regions
from .terminal import counted, human_bytes, printable

if TYPE_CHECKING:
    import jinja2

_MOST_ROWS = 2000
"""Rows of a table; a browser scrolls through them without pause."""

_MOST_FINDINGS = 500
"""Findings of one rule."""

_MOST_TEXT = 500
"""Characters of a metadata value; some hold a whole training run."""

_FLOW = ("text_encoder", "text_encoder_2", "unet", "vae")
_PICTURES = ("unet", "text_encoder", "text_encoder_2", "vae")
"""Networks in the order of the page: what people look at first goes first."""

assert set(_FLOW) == set(_PICTURES) == set(NETWORKS)  # noqa: S101 - three orders of one fact

_KINDS = {
    "changed": "changed",
    "rounded": "equal after rounding",
    "dtype": "same values, other dtype",
    "shape": "other shape",
    "removed": "only in A",
    "added": "only in B",
    "equal": "identical",
}
"""Columns of the table of components, in their order, and what becomes of a tensor."""


def diff_page(
    found: Diff,
    names: tuple[str, str],
    explanations: Sequence[Explanation] = (),
    *,
    third: str = "",
    known: Mapping[str, str] | None = None,
) -> str:
    """What changed between two models, as a page.

    Args:
        found: What differs.
        names: What the two are called, without folders.
        explanations: What explains it.
        third: What the model is called that the explanations are made with.
        known: What the second one's components are known as.
    """
    changed = sorted(found.changed, key=_size, reverse=True)
    components = _components(found)
    return render(
        "diff.html.j2",
        found=found,
        names=names,
        third=third,
        verdict=_verdict(found, components),
        components=components,
        columns={kind: words for kind, words in _KINDS.items() if any(row.counts[kind] for row in components)},
        explanations=explanations,
        known=known or {},
        pictures=[picture for name in _PICTURES if (picture := _picture(found, name))],
        legend=_legend(),
        changed=changed,
        most=_MOST_ROWS,
        most_text=_MOST_TEXT,
        words=_KINDS,
    )


def _verdict(found: Diff, components: Sequence[_ComponentRow]) -> str:
    if found.identical:
        return "Identical in everything that both layouts hold" if found.not_comparable else "Identical"
    differing = [row.name for row in components if not row.identical]
    if len(differing) == 1:
        return f"Only the {differing[0]} differs" if len(components) > 1 else f"The {differing[0]} differs"
    listed = ", ".join(f"the {name}" for name in differing[:-1]) + f" and the {differing[-1]} differ"
    return listed[:1].upper() + listed[1:]


@dataclass(slots=True)
class _ComponentRow:
    """What became of a component's tensors, and the largest change among them."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    largest: float | None = None

    @property
    def identical(self) -> bool:
        """Whether nothing in it differs."""
        return self.counts["equal"] == self.counts.total()


def _components(found: Diff) -> list[_ComponentRow]:
    rows = {name: _ComponentRow(name, Counter(equal=count)) for name, count in found.equal.items()}
    for change in found.changed:
        row = rows.setdefault(change.component, _ComponentRow(change.component))
        row.counts[change.comparison.kind] += 1
        if change.comparison.statistics:
            row.largest = max(row.largest or 0.0, change.comparison.statistics.relative_l2)
    for what, items in (("removed", found.removed), ("added", found.added)):
        for item in items:
            rows.setdefault(item.component, _ComponentRow(item.component)).counts[what] += 1
    order = {name: place for place, name in enumerate(_FLOW)}
    return sorted(rows.values(), key=lambda row: (order.get(row.name, len(order)), row.name))


def _size(change: Changed) -> float:
    return change.comparison.statistics.relative_l2 if change.comparison.statistics else -1.0


# ---------------------------------------------------------------- where the change lies

_WIDTH, _HEIGHT, _ROOM = 25, 20, 2
_HEAD, _LABELS = 78, 58
_LOWEST, _STEPS_A_DECADE, _STEPS = -5, 2, 12
"""The scale: steps of half a decade from 1e-5 to 1, and one below."""


@dataclass(slots=True)
class _Cell:
    """What became of the tensors of one kind in one block.

    Attributes:
        region: Which.
        largest: The largest relative L2 among them, where any was computed.
        name: The tensor that has it.
        counts: How many of each fate, or kind of change.
        special: How many have NaN or Inf.
    """

    region: Region
    largest: float | None = None
    name: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    special: int = 0

    @property
    def marked(self) -> bool:
        """Whether something differs that the colour doesn't tell."""
        return bool(self.special or self.counts["shape"] or self.counts["removed"] or self.counts["added"])

    @property
    def look(self) -> str:
        """Its class in the picture."""
        if self.largest is not None:
            return f"s{step(self.largest)}"
        return "same" if self.counts["equal"] == self.counts.total() else "other"

    @property
    def text(self) -> str:
        """What stands in it."""
        if self.largest is not None:
            return brief(self.largest)
        if self.look == "same":
            return "="
        both = {kind for kind in ("removed", "added") if self.counts[kind]}
        if both and not (self.counts["shape"] or self.counts["changed"]):
            return {"removed": "\N{MINUS SIGN}", "added": "+"}[both.pop()] if len(both) == 1 else "±"
        return "≠" if self.marked or self.counts["changed"] else "T"

    @property
    def words(self) -> str:
        """All of it, for whoever points at it."""
        block = self.region.block
        where = f"{block.label} ({block.name}), {self.region.kind.words}"
        fates = ", ".join(f"{self.counts[kind]} {words}" for kind, words in _KINDS.items() if self.counts[kind])
        largest = f"\nlargest relative L2 {figure(self.largest)}: {self.name}" if self.largest is not None else ""
        special = f"\n{self.special} with NaN or Inf" if self.special else ""
        return f"{where}\n{fates}{largest}{special}"


@dataclass(frozen=True, slots=True)
class _Picture:
    """A heat map: its cells by block and kind, and where everything is drawn."""

    component: str
    rows: tuple[tuple[Block, int], ...]
    columns: tuple[tuple[Kind, int], ...]
    groups: tuple[tuple[str, int, int], ...]
    cells: Mapping[tuple[Block, str], _Cell]
    width: int
    height: int
    head: int = _HEAD
    labels: int = _LABELS
    cell: tuple[int, int] = (_WIDTH - _ROOM, _HEIGHT - _ROOM)


def cells(found: Diff, component: str) -> dict[tuple[Block, str], _Cell]:
    """What became of a network's tensors, by block and kind of layer."""
    names = [name for owner, name in found.fates if owner == component]
    changes = {change.name: change.comparison for change in found.changed if change.component == component}
    result: dict[tuple[Block, str], _Cell] = {}
    for name, region in regions(component, names).items():
        cell = result.setdefault((region.block, region.kind.id), _Cell(region))
        change = changes.get(name)
        cell.counts[change.kind if change else found.fates[component, name]] += 1
        if change and change.statistics:
            cell.special += bool(change.statistics.special)
            if cell.largest is None or change.statistics.relative_l2 > cell.largest:
                cell.largest, cell.name = change.statistics.relative_l2, name
    return result


def _picture(found: Diff, component: str) -> _Picture | None:
    """The heat map of a network; none where nothing in it differs, or where its structure isn't known."""
    drawn = cells(found, component)
    if all(cell.look == "same" for cell in drawn.values()) or all(block == OTHER for block, _ in drawn):
        return None
    rows: list[tuple[Block, int]] = []
    top, before = _HEAD, None
    for block in sorted({block for block, _ in drawn}):
        if before is not None:
            top += 8 if before[0] != block.order[0] else 4 if before[1] != block.order[1] else 0
        rows.append((block, top))
        before, top = block.order, top + _HEIGHT
    columns: list[tuple[Kind, int]] = []
    groups: list[tuple[str, int, int]] = []
    left, group = 0, None
    for kind in (kind for kind in KINDS.values() if any(kind.id == found for _, found in drawn)):
        if group is not None and kind.group != group:
            left += 5
        if not groups or kind.group != group:
            groups.append((kind.group, left, left + _WIDTH))
        groups[-1] = (groups[-1][0], groups[-1][1], left + _WIDTH - _ROOM)
        columns.append((kind, left))
        group, left = kind.group, left + _WIDTH
    wide = tuple(entry for entry in groups if entry[0] and entry[2] - entry[1] > _WIDTH)
    return _Picture(component, tuple(rows), tuple(columns), wide, drawn, left, top)


def step(value: float) -> int:
    """The place of a relative L2 on the scale: 0 below 1e-5, the last from 1 on."""
    if value < 10.0**_LOWEST:
        return 0
    if math.isinf(value):
        return _STEPS - 1
    return min(_STEPS - 1, 1 + math.floor((math.log10(value) - _LOWEST) * _STEPS_A_DECADE))


def _legend() -> list[tuple[int, str]]:
    """Every step of the scale, with the number where it begins."""
    starts = [10.0 ** (_LOWEST + place / _STEPS_A_DECADE) for place in range(_STEPS - 1)]
    return [(0, "0"), *((place + 1, brief(start)) for place, start in enumerate(starts))]


def brief(value: float) -> str:
    """A number in four characters."""
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    if 0.095 <= value < 99.5:
        return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def figure(value: float | None) -> str:
    """A number in three digits, as the terminal shows it."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.2g}"


# ---------------------------------------------------------------- verify

_VERDICTS = {0: "passed", 1: "findings", 3: "could not be checked"}
_MARKS = {"pass": "✓", "fail": "✗", "noted": "•", "allowed": "\N{EN DASH}"}


def verification_page(verifications: Sequence[Verification], fail_on: FailOn) -> str:
    """What came of checking models, as a page.

    Args:
        verifications: One a model.
        fail_on: From which severity on a finding counts.
    """
    models = [_Checked(place, each, fail_on) for place, each in enumerate(verifications, 1)]
    return render(
        "verification.html.j2",
        models=models,
        fail_on=fail_on,
        verdict=_VERDICTS[exit_code(verifications, fail_on)],
        counts={word: sum(model.counts[word] for model in models) for word in _COUNTS},
        tally=Counter(model.verdict for model in models),
        most=_MOST_FINDINGS,
        marks=_MARKS,
    )


_COUNTS = ("error", "warning", "note", "allowed")


@dataclass(frozen=True, slots=True)
class _Checked:
    """A model as its section shows it."""

    place: int
    found: Verification
    fail_on: FailOn

    @property
    def name(self) -> str:
        """What it is called, without folders."""
        return bare(self.found.path)

    @property
    def written(self) -> str | None:
        """What was written, without folders."""
        return bare(self.found.output) if self.found.output else None

    @property
    def verdict(self) -> str:
        """In words."""
        return _VERDICTS[exit_code([self.found], self.fail_on)]

    @property
    def counts(self) -> Mapping[str, int]:
        """Findings of each severity that count, and those that are allowed."""
        found = self.found
        allowed = sum(bool(finding.allowed) for finding in found.findings)
        return {
            "error": found.count("error"),
            "warning": found.count("warning"),
            "note": found.count("note"),
            "allowed": allowed,
        }

    @property
    def groups(self) -> list[_Group]:
        """The findings by rule, in the order in which rules come first: the worst."""
        by_rule: dict[str, list[Finding]] = {}
        for finding in self.found.findings:
            by_rule.setdefault(finding.id, []).append(finding)
        return [_Group(self, tuple(findings)) for findings in by_rule.values()]

    @property
    def rules(self) -> list[tuple[str, str, str, str]]:
        """Every rule that was applied: its id, its title, a mark, and what it found."""
        failing = {finding.id for finding in self.found.failing(self.fail_on)}
        every = Counter(finding.id for finding in self.found.findings)
        counting = Counter(finding.id for finding in self.found.findings if not finding.allowed)
        rows = []
        for name in dict.fromkeys([*self.found.rules, *every]):
            mark = "pass" if not every[name] else "fail" if name in failing else "noted"
            mark = "allowed" if every[name] and not counting[name] else mark
            rows.append((name, RULES[name].title, mark, counted(every[name], "finding") if every[name] else "nothing"))
        return rows

    def place_of(self, finding: Finding) -> str | None:
        """The file of a finding where it isn't the model itself, which the whole section is about."""
        return None if finding.file == str(self.found.path) else finding.file


@dataclass(frozen=True, slots=True)
class _Group:
    """The findings of one rule."""

    model: _Checked
    findings: tuple[Finding, ...]

    @property
    def rule(self) -> Any:
        """The rule."""
        return RULES[self.findings[0].id]

    @property
    def severity(self) -> str:
        """Of its findings."""
        return self.findings[0].severity

    @property
    def allowed(self) -> bool:
        """Whether somebody allows all of them."""
        return all(finding.allowed for finding in self.findings)

    @property
    def placed(self) -> bool:
        """Whether any of them says where it is."""
        return any(found.key or found.component or self.model.place_of(found) for found in self.findings)

    @property
    def remedy(self) -> tuple[str | None, str | None, bool] | None:
        """What mends all of them, if one thing does: it is said once and not on every line."""
        every = {remedy(finding) for finding in self.findings}
        (one,) = every if len(every) == 1 else (None,)
        return one


def remedy(finding: Finding) -> tuple[str | None, str | None, bool]:
    """The command that mends a finding, what else to do, and whether ``--fix`` does it."""
    mend = finding.mend
    return shlex.join(mend.command) if mend else None, finding.remedy, bool(mend and mend.safe)


def bare(path: Path) -> str:
    """What a file or a folder is called, without what leads to it."""
    return path.name if path.name not in {"", ".."} else path.resolve().name or str(path)


# ---------------------------------------------------------------- templates


def _plain(value: Any) -> Any:
    """Whatever a model says, on one line, without characters that do something; nothing for nothing."""
    if value is None:
        return ""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def _breakable(key: str) -> Any:
    """A key that may go on in the next line behind a dot."""
    import markupsafe

    return markupsafe.Markup(".<wbr>").join(_plain(key).split("."))


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdsurgery.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: Iterable[tuple[str, Callable[..., Any]]] = (
        ("figure", figure), ("share", _share), ("counted", counted), ("bytes", human_bytes), ("remedy", remedy),
        ("breakable", _breakable),
    )  # fmt: skip
    environment.filters.update(filters)
    return environment


def render(template: str, **facts: Any) -> str:
    """A page, from a template and what goes into it."""
    return _environment().get_template(template).render(version=__version__, **facts)
