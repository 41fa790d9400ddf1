"""inspect for a person: a few tables, drawn by rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..inspection import ComponentReport, Inspection
from ..inspection.hashes import FileHashes
from ..wording import listed
from .making import making
from .terminal import human_bytes, printable

if TYPE_CHECKING:
    from ..inspection.known_components import Known

_SHOWN = 8


def show(
    found: Inspection,
    hashes: FileHashes | None,
    known: Mapping[str, Sequence[Known]] | None = None,
    *,
    with_tensors: bool,
) -> None:
    """Print an inspection to stdout."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(printable(found.path), style="bold"))
    console.print(
        f"{found.container}, {found.layout} layout, family {found.family}: {len(found.tensors):,} tensors, "
        f"{found.parameters:,} parameters, {human_bytes(found.file_bytes)}"
    )
    if found.family == "unknown":
        for line in found.evidence:
            console.print(Text(printable(f"  {line}"), style="dim"))
    if found.components:
        console.print(_components(found))
    _faults(console, found)
    console.print(Text.assemble("position ids: ", _position_ids(found)))
    _metadata(console, found)
    if known:
        _known(console, known)
    if hashes:
        _columns(console, ((name, value or "-") for name, value in asdict(hashes).items()))
    if with_tensors:
        _columns(
            console,
            (
                (printable(key), tensor.dtype.name, " x ".join(map(str, tensor.shape)) or "scalar")
                for key, tensor in found.tensors.items()
            ),
        )


def _columns(console: Console, rows: Iterable[tuple[str, ...]]) -> None:
    """Rows as lines that are never cut or broken, however narrow the terminal: people copy and grep them."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        console.print(Text("  ".join(cells).rstrip()))


def _components(found: Inspection) -> Table:
    table = Table("component", "tensors", "parameters", "size", "dtypes", "complete", box=box.SIMPLE, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, report in found.components.items():
        dtypes = ", ".join(
            f"{dtype} ({count})" if len(report.dtypes) > 1 else dtype for dtype, count in report.dtypes.items()
        )
        faults = [
            f"{len(items)} {what}"
            for items, what in (
                (report.missing, "missing"),
                (report.misshapen, "misshapen"),
                (report.unexpected, "unexpected"),
            )
            if items
        ]
        verdict = Text("yes" if report.complete else "no", style="green" if report.complete else "red")
        if not report.checked:
            verdict = Text("not known", style="yellow")
        if _is_pruned_ema(name, report):
            verdict = Text("pruned, two scalars left")
        elif faults:
            verdict.append(": " + ", ".join(faults), style="yellow")
        table.add_row(
            name, f"{report.tensors:,}", f"{report.parameters:,}", human_bytes(report.nbytes), dtypes, verdict
        )
    return table


def _is_pruned_ema(name: str, report: ComponentReport) -> bool:
    """Files published as "emaonly" keep LitEma's scalars alone; that is no damage."""
    return name == "ema" and report.parameters == report.tensors <= 2


def _faults(console: Console, found: Inspection) -> None:
    for name, report in found.components.items():
        if _is_pruned_ema(name, report):
            continue
        for what, keys in (("missing", report.missing), ("unexpected", report.unexpected)):
            if keys:
                console.print(Text(printable(f"{name}, {what}: {listed(keys, _SHOWN)}")))
        for key, shape in list(report.misshapen.items())[:_SHOWN]:
            console.print(Text(printable(f"{name}, misshapen: {key} should be {list(shape)}")))
    if found.aside:
        entries = listed((f"{entry.name} ({entry.what})" for entry in found.aside), _SHOWN)
        console.print(Text(printable(f"not tensors: {entries}")))


def _position_ids(found: Inspection) -> Text:
    ids = found.position_ids
    sound = ids.status in {"ok", "not-applicable"}
    text = Text(ids.status, style="green" if sound else "red")
    if ids.dtype and not sound:
        text.append(f" ({ids.dtype})")
    if ids.wrong:
        wrong = ", ".join(map(str, ids.wrong[:_SHOWN])) + (", …" if len(ids.wrong) > _SHOWN else "")
        text.append(f", {len(ids.wrong)} wrong once truncated: {wrong}")
    if not sound:
        text.append("; mend with: sdsurgery fix-clip")
    return text


def _metadata(console: Console, found: Inspection) -> None:
    for key, value in found.metadata.items():
        if key == "sdsurgery":
            continue
        shown = value if len(value) <= 100 else value[:99] + "…"
        console.print(Text(printable(f"metadata {key}: {shown}")))
    for line in making(found.history) if found.history else ():
        console.print(Text(line))


def _known(console: Console, known: Mapping[str, Sequence[Known]]) -> None:
    from ..inspection.known_components import publisher

    for component, entries in known.items():
        if not entries:
            console.print(Text(f"{component} is not known", style="dim"))
        for entry in entries:
            line = f"{component} is known as {entry.name}{'' if entry.exact else ', rounded to fp16'} (your registry)"
            if entry.by == "published figure":
                line = (
                    f"{component} matches the figure published for {entry.name} by {publisher()}: {entry.figure}; "
                    "evidence and no proof, for the figure is no hash"
                )
            console.print(Text(printable(line)))
