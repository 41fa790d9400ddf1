"""Lines for a person at a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from ..checkpoint import Change, Checkpoint, Step
from ..errors import SurgeryError

_SHOWN = 6
"""Changes of one kind that are listed before the rest is counted."""

_NAMED = 40
"""Of what was lost or made, as many are listed at least; a thousand EMA weights needn't be."""


def printable(text: str) -> str:
    """The text on one line, with whatever a terminal would obey or can't show written out as Python would."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(count: int, word: str) -> str:
    """So many of it."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def error(failure: SurgeryError) -> str:
    """One message: what is wrong, with which file and key, and what to do."""
    more = [f"\n  {printable(line)}" for line in (*failure.details, failure.remedy) if line]
    return f"sdsurgery: {printable(str(failure))}{''.join(more)}"


def warnings(checkpoint: Checkpoint, lost: Collection[Change]) -> Iterator[str]:
    """The findings that were not mended, and tensors beside the state dict that the output doesn't hold."""
    for note in checkpoint.notes:
        if note.level == "warning":
            yield printable(f"warning: {note.message}")
    for entry in checkpoint.aside if lost else ():
        if entry.tensors:
            yield printable(f"warning: not carried over: {entry.name}, {entry.what}")


def steps(checkpoint: Checkpoint, lost: Collection[Change]) -> Iterator[str]:
    """What was done, operation by operation."""
    for each in checkpoint.steps:
        yield each.operation
        yield from step(each)
    yield from not_carried_over(lost)


def not_carried_over(lost: Collection[Change]) -> Iterator[str]:
    """What the output doesn't hold."""
    if lost:
        yield "not carried over"
        yield from _changes(lost)


def step(step: Step) -> Iterator[str]:
    """What one operation had to say, and what it did."""
    for note in step.notes:
        if note.level == "info":
            yield printable(f"  {note.message}")
    yield from _changes(step.changes)


def _changes(changes: Iterable[Change]) -> Iterator[str]:
    by_kind: dict[str, list[Change]] = {}
    for change in changes:
        by_kind.setdefault(change.kind, []).append(change)
    for kind, group in by_kind.items():
        shown = len(group) if kind in {"dropped", "added"} and len(group) <= _NAMED else _SHOWN
        if kind == "renamed" and len(group) > _NAMED:  # a conversion: two show how
            shown = 2
        for change in group[:shown]:
            yield printable(f"  {kind:<9} {_change(change)}")
        if len(group) > shown:
            yield f"  {kind:<9} … and {len(group) - shown} more; --json names all"


def _change(change: Change) -> str:
    if change.kind == "renamed":
        return f"{change.before} -> {change.after}"
    if change.before is None:
        return f"{change.key}  {change.after}"
    if change.after is None:
        return f"{change.key}  {change.before:.100}"
    if change.before == change.after:
        return f"{change.key}  {change.after}"
    return f"{change.key}  {change.before} -> {change.after}"


def human_bytes(count: float) -> str:
    """A size in the units of disks and downloads: powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
