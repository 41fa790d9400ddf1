"""diff for a person: a summary a component, then what changed, the largest change first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from ..inspection.diffing import Changed, Diff, OneSided
from ..inspection.explaining import Explanation
from .terminal import printable

_SHOWN = 12
_WORDS = {
    "dtype": "the same values in another dtype",
    "rounded": "equal after rounding",
    "changed": "changed",
    "shape": "of another shape",
}


def lines(
    found: Diff, explanations: Sequence[Explanation] = (), names: tuple[str, str] = ("A", "C"), *, stat: bool = False
) -> Iterator[str]:
    """The lines of the report.

    Args:
        found: What differs.
        explanations: What explains it.
        names: Of the models that the explanations are made of.
        stat: Whether only the summary is wanted.
    """
    yield from _summary(found)
    for each in explanations:
        share = "every element" if each.exact else f"{each.matching:.2%} of elements"
        total = f"{1 - each.alpha:.4g} x {names[0]} + {each.alpha:.4g} x {names[1]}"
        yield printable(f"the {each.component} is {total}, {each.formula}: {share} to the bit")
    if stat:
        return
    for change in sorted(found.changed, key=_size, reverse=True)[:_SHOWN]:
        yield printable(f"  {change.key}  {_how(change)}")
    if len(found.changed) > _SHOWN:
        yield f"  … and {len(found.changed) - _SHOWN} more changed; --json names all"
    for what, items in (("removed", found.removed), ("added", found.added), ("not comparable", found.not_comparable)):
        yield from _one_sided(what, items)
    for renamed in found.renamed[:_SHOWN]:
        yield printable(f"  renamed  {renamed.key} -> {renamed.other_key}")
    if len(found.renamed) > _SHOWN:
        yield f"  … and {len(found.renamed) - _SHOWN} more renamed; --json names all"
    for entry in found.metadata:
        yield printable(f"  metadata {entry.key}: {_short(entry.before)} -> {_short(entry.after)}")


def _summary(found: Diff) -> Iterator[str]:
    yield f"{found.layouts[0]} {found.families[0]} against {found.layouts[1]} {found.families[1]}"
    by_component: dict[str, Counter[str]] = {name: Counter(equal=count) for name, count in found.equal.items()}
    for change in found.changed:
        by_component.setdefault(change.component, Counter())[change.comparison.kind] += 1
    for what, items in (("removed", found.removed), ("added", found.added)):
        for item in items:
            by_component.setdefault(item.component, Counter())[what] += 1
    for name, counts in by_component.items():
        yield f"{name}: {_verdict(counts)}" + (_ids(found) if name == "text_encoder" else "")
    differing = [name for name, counts in by_component.items() if set(counts) - {"equal"}]
    if found.identical:
        yield "identical in everything that both layouts hold" if found.not_comparable else "identical"
    elif len(differing) == 1 and len(by_component) > 1:
        yield f"only the {differing[0]} differs"


def _verdict(counts: Counter[str]) -> str:
    parts = [f"{count} {_WORDS.get(kind, kind)}" for kind, count in counts.items() if kind != "equal" and count]
    if not parts:
        return f"identical ({counts['equal']} tensors)"
    return ", ".join(parts) + (f", {counts['equal']} identical" if counts["equal"] else "")


def _ids(found: Diff) -> str:
    """What became of the position ids, where that can be said of both."""
    before, after = found.position_ids
    if before == after or "not-applicable" in found.position_ids:
        return ""
    repaired = " (repaired)" if after == "ok" else ""
    return f"; position ids: {before} -> {after}{repaired}"


def _size(change: Changed) -> float:
    return change.comparison.statistics.relative_l2 if change.comparison.statistics else -1.0


def _how(change: Changed) -> str:
    found = change.comparison.statistics
    types = change.before if change.before == change.after else f"{change.before} -> {change.after}"
    if found is None:
        return f"{types}: {_WORDS[change.comparison.kind]}"
    special = f", {found.special} NaN or Inf" if found.special else ""
    share = f"{found.share:.1%}" if found.share >= 0.001 else f"{found.share:.2g}"
    return (
        f"{types}: {_WORDS[change.comparison.kind]}, max {found.max_abs:.3g}, mean {found.mean_abs:.3g}, relative L2 "
        f"{found.relative_l2:.3g}, cosine {found.cosine:.6f}, {share} of elements{special}"
    )


def _one_sided(what: str, items: Iterable[OneSided]) -> Iterator[str]:
    listed = list(items)
    for item in listed[:_SHOWN]:
        yield printable(f"  {what}  {item.key}  {item.tensor}")
    if len(listed) > _SHOWN:
        yield f"  … and {len(listed) - _SHOWN} more {what}; --json names all"


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return value if len(value) <= 60 else value[:59] + "…"
