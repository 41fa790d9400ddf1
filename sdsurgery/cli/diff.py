"""diff: what changed between two models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..containers import open as open_checkpoint
from ..inspection.diffing import diff
from ..inspection.explaining import explain
from ..inspection.known_components import labels
from ..models.configs import NETWORKS
from ..reports import diff as report
from ..reports import documents, files
from ..reports.terminal import printable
from .common import COMPONENTS, listening


@click.command("diff")
@click.argument("one", metavar="A", type=click.Path(path_type=Path))
@click.argument("other", metavar="B", type=click.Path(path_type=Path))
@COMPONENTS
@click.option(
    "--explain-with",
    "third",
    type=click.Path(path_type=Path),
    metavar="C",
    help="Tell whether what changed in B is a weighted sum of A and this model.",
)
@click.option("--atol", type=click.FloatRange(min=0), help="Differences up to this count as none, for the exit code.")
@click.option("--stat", is_flag=True, help="Only the summary, a line a component.")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write a report as one HTML file, with a picture of where the change lies.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing; the exit code tells.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def diff_command(one: Path, other: Path, **options: Any) -> int:
    """Tell what changed from A to B, from the values of the weights.

    Any container and layout against any other: single files, pickles, diffusers folders, lone components. Exit codes:
    0 equal in everything that both layouts hold, 1 different.
    """
    asked = _Options(**options)
    third = asked.third
    if asked.page:
        files.refuse(asked.page, [one, other, *([third] if third else [])], "html")
    with listening(quiet=asked.quiet):
        models = open_checkpoint(one), open_checkpoint(other)
        found = diff(*models, asked.components)
        changed = [name for name in NETWORKS if any(change.component == name for change in found.changed)]
        explanations = explain(*models, open_checkpoint(third), changed) if third and changed else []
        known = labels(models[1], changed) if changed else {}
    if asked.page:
        from ..reports import html

        names = html.bare(one), html.bare(other)
        text = html.diff_page(found, names, explanations, third=html.bare(third) if third else "", known=known)
        files.write(asked.page, text)
    if asked.as_json:
        click.echo(documents.text(documents.diff(found, explanations, known)))
    elif not asked.quiet:
        names = (one.name, third.name if third else "")
        for line in report.lines(found, explanations, names=names, stat=asked.stat):
            click.echo(line)
        for component, label in known.items():
            click.echo(printable(f"the {component} of {other.name} is known as {label}"))
        if asked.page:
            click.echo(printable(f"wrote {asked.page}"))
    return 0 if found.identical or (asked.atol is not None and found.within(asked.atol)) else 1


@dataclass(frozen=True, slots=True)
class _Options:
    """What the command line asks for."""

    components: tuple[str, ...]
    third: Path | None
    atol: float | None
    stat: bool
    page: Path | None
    as_json: bool
    quiet: bool
    debug: bool
