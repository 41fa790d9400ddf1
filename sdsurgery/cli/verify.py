"""verify: whether models are whole and sound, or still what a manifest or a signature says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import click

from ..containers.discovering import models_in
from ..dtypes import CAST_TARGETS
from ..errors import SurgeryError, UsageError
from ..inspection import allowing, manifests
from ..inspection.findings import FailOn, Finding, Verification, exit_code
from ..inspection.rules import PROFILES
from ..inspection.verifying import Request, verify
from ..reports import documents, files, terminal
from ..reports import verification as report
from .common import WriteOptions, carry_out, listening
from .pipe import parsed_operation

_FILE = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class _Options:
    """What the command line asks for."""

    wanted: Path | None
    signature: Path | None
    key: Path | None
    profile: Any
    dtype: str | None
    fail_on: FailOn
    allow: tuple[str, ...]
    allow_lists: tuple[Path, ...]
    baseline: Path | None
    fix: bool
    in_place: bool
    force: bool
    as_json: bool
    sarif: Path | None
    junit: Path | None
    html: Path | None
    markdown: Path | None
    quiet: bool
    debug: bool

    def __post_init__(self) -> None:
        if (self.signature is None) != (self.key is None):
            raise UsageError("a signature is checked with a public key", remedy="give both --signature and --key")
        if self.fix and (self.wanted or self.signature):
            raise UsageError(
                "what is mended isn't what was published any more",
                remedy="leave out --fix, or --manifest and --signature",
            )
        places = [place.absolute() for place in self.reports.values()]
        if len(set(places)) < len(places):
            raise UsageError("two reports would be one file", remedy="give each a name of its own")
        if (self.in_place or self.force) and not self.fix:
            raise UsageError("only --fix writes a model", remedy="leave out --in-place and --force, or add --fix")

    @property
    def inputs(self) -> list[Path]:
        """What is read besides models."""
        named = (self.wanted, self.signature, self.key, self.baseline, *self.allow_lists)
        return [path for path in named if path is not None]

    @property
    def reports(self) -> dict[files.Format, Path]:
        """Where each report goes that is asked for."""
        asked: dict[files.Format, Path | None] = {
            "sarif": self.sarif,
            "junit": self.junit,
            "html": self.html,
            "markdown": self.markdown,
        }
        return {kind: place for kind, place in asked.items() if place is not None}


def _show_rules(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        for line in report.rules():
            click.echo(line)
        context.exit()


_OPTIONS = (
    click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=_FILE),
    click.option("--manifest", "wanted", type=_FILE, metavar="FILE", help="What the models should be."),
    click.option("--signature", type=_FILE, metavar="FILE", help="A signature that model-signing made."),
    click.option("--key", type=_FILE, metavar="FILE", help="The public key that --signature is checked with."),
    click.option(
        "--profile", type=click.Choice(PROFILES), help="Who will load it. The needs of the model's layout unless given."
    ),
    click.option("--dtype", type=click.Choice(tuple(CAST_TARGETS)), help="The type that all weights should be of."),
    click.option(
        "--fail-on", type=click.Choice(get_args(FailOn)), default="warning", show_default=True,
        help="From which severity on a finding means exit code 1.",
    ),
    click.option(
        "--allow", multiple=True, metavar="ID[:PATTERN]",
        help="A finding that doesn't count, for keys like PATTERN; may be given several times.",
    ),
    click.option(
        "--allow-list", "allow_lists", multiple=True, type=_FILE, metavar="FILE",
        help="Such findings, a line each: ID [PATTERN] [# REASON].",
    ),
    click.option(
        "--baseline", type=_FILE, metavar="FILE", help="An earlier --json report; what stands in it doesn't count."
    ),
    click.option("--fix", is_flag=True, help="Mend what can be mended safely, in NAME.fixed beside the model."),
    click.option("--in-place", is_flag=True, help="With --fix: replace the model itself."),
    click.option("--force", is_flag=True, help="With --fix: replace an existing output."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("--sarif", type=_FILE, metavar="FILE", help="Write a SARIF 2.1.0 report."),
    click.option("--junit", type=_FILE, metavar="FILE", help="Write a JUnit report."),
    click.option("--html", type=_FILE, metavar="FILE", help="Write a report as one HTML page."),
    click.option("--markdown", type=_FILE, metavar="FILE", help="Write a summary in Markdown."),
    click.option(
        "--rules", is_flag=True, is_eager=True, expose_value=False, callback=_show_rules,
        help="List what is looked for, and leave.",
    ),
    click.option("--quiet", "-q", is_flag=True, help="Print only findings that count."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)  # fmt: skip


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.reduce(lambda made, option: option(made), reversed(_OPTIONS), function)


@click.command("verify")
@_with_options
@click.pass_context
def verify_command(context: click.Context, /, models: tuple[Path, ...], **options: Any) -> int:
    """Check whether models are whole and sound, for whoever will load them.

    Checks container, family, completeness, position ids, dtypes, values and metadata; with --manifest or --signature,
    whether a model is still what it was. A folder that is no model stands for all models in it. Exit codes: 0
    everything was checked and nothing counts, 1 findings, 3 something could not be checked.
    """
    asked = _Options(**options)
    paths = [found for path in models for found in models_in(path)]
    inputs = [*paths, *asked.inputs]
    for kind, place in asked.reports.items():
        files.refuse(place, inputs, kind)
    allowances = [allowing.allowance(*text.partition(":")[::2]) for text in asked.allow]
    allowances += [each for path in asked.allow_lists for each in allowing.allow_list(path)]
    known = allowing.baseline(asked.baseline) if asked.baseline else frozenset()
    request = _request(asked)
    with listening(quiet=asked.quiet):
        found = [allowing.allowed(each, allowances, known) for each in verify(paths, request)]
    seen = list(found)
    if asked.fix:
        found = [allowing.allowed(_fixed(context, each, request, asked), allowances, known) for each in found]
    _report(found, asked, inputs)
    if not asked.quiet:
        for each in allowing.unused(allowances, [*seen, *found]):
            click.echo(terminal.printable(f"warning: allowed, but not found: {each}"), err=True)
    return exit_code(found, asked.fail_on)


def _request(asked: _Options) -> Request:
    dtype = CAST_TARGETS[asked.dtype] if asked.dtype else None
    manifest = manifests.read(asked.wanted) if asked.wanted else None
    return Request(asked.profile, dtype, manifest, _signature(asked))


def _signature(asked: _Options) -> Callable[[Path], list[Finding]] | None:
    if asked.signature is None or asked.key is None:
        return None
    from ..inspection.signing import verify_signature

    signature, key = asked.signature, asked.key
    return lambda path: verify_signature(path, signature, key)


def _report(found: Sequence[Verification], asked: _Options, inputs: Sequence[Path]) -> None:
    """Every report that is asked for; what goes to stdout last."""
    written = [each.output for each in found if each.output]
    for kind, place in asked.reports.items():
        files.refuse(place, [*inputs, *written], kind)
        files.write(place, _rendered(kind, found, asked.fail_on))
    if asked.as_json:
        click.echo(documents.text(documents.verification(found, asked.fail_on)))
        return
    for line in report.lines(found, asked.fail_on, quiet=asked.quiet):
        click.echo(line)


def _rendered(kind: files.Format, found: Sequence[Verification], fail_on: FailOn) -> str:
    if kind == "sarif":
        from ..reports.sarif import sarif

        return sarif(found)
    if kind == "junit":
        from ..reports.junit import junit

        return junit(found, fail_on)
    if kind == "markdown":
        from ..reports.markdown import markdown

        return markdown(found, fail_on)
    from ..reports.html import verification_page

    return verification_page(found, fail_on)


def _fixed(context: click.Context, found: Verification, request: Request, asked: _Options) -> Verification:
    """Do what can be done safely, write the result, and check that; without anything to do, nothing is written."""
    wanted = [each for each in found.findings if each.mend and each.mend.safe and not each.allowed]
    if not wanted:
        return found
    options = WriteOptions(None, asked.in_place, False, asked.as_json, asked.force, asked.quiet, asked.debug)
    words = dict.fromkeys((each.mend.command[1], *each.mend.command[3:]) for each in wanted if each.mend)
    operations = [parsed_operation(context, list(command), options) for command in words]
    try:
        done = carry_out(found.path, operations, options, label="fixed")
    except SurgeryError as error:  # the other models' reports are worth having all the same
        click.echo(terminal.error(error), err=True)
        return replace(found, failure=error)
    with listening(quiet=asked.quiet):
        (after,) = verify([done.target], request)
    for line in terminal.warnings(done.checkpoint, done.lost):
        click.echo(line, err=True)
    left = {(each.id, each.key) for each in after.findings}
    mended = tuple(each for each in wanted if (each.id, each.key) not in left)
    return replace(after, path=found.path, output=done.target, mended=mended)
