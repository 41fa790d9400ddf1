"""What all writing commands share: their options, and the way from a checkpoint to a file and a report."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import progress
from ..checkpoint import Change, Checkpoint
from ..containers import open as open_checkpoint
from ..containers import save
from ..containers.patching import patch_in_place
from ..containers.saving import SUFFIXES, check_target, losses, target_container
from ..errors import OutputError, SurgeryError, UsageError
from ..operations import Operation
from ..reports import documents, terminal
from .bars import Bars

Function = TypeVar("Function", bound=Callable[..., Any])

MODEL = click.argument("model", type=click.Path(path_type=Path))


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """The options that every writing command has."""

    output: Path | None
    in_place: bool
    dry_run: bool
    json: bool
    force: bool
    quiet: bool
    debug: bool


_WRITE_OPTIONS = (
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file; always writes."),
    click.option("--in-place", is_flag=True, help="Replace the input itself."),
    click.option("--dry-run", is_flag=True, help="Say what would be done and write nothing."),
    click.option("--json", is_flag=True, help="Print one JSON document."),
    click.option("--force", is_flag=True, help="Replace an existing output, and override refusals that say so."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors and warnings."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def write_options(function: Function) -> Function:
    """Give a command the shared options, gathered in one argument ``options``."""

    @functools.wraps(function)
    def gathered(**arguments: Any) -> Any:
        names = WriteOptions.__dataclass_fields__
        options = WriteOptions(**{name: arguments.pop(name) for name in names})
        if options.output is not None and options.in_place:
            raise UsageError("-o and --in-place contradict each other", remedy="leave one of them out")
        return function(options=options, **arguments)

    for option in reversed(_WRITE_OPTIONS):
        gathered = option(gathered)
    return gathered  # type: ignore[return-value]


@contextlib.contextmanager
def listening(*, quiet: bool) -> Iterator[None]:
    """Show progress on a terminal."""
    bars = Bars(quiet=quiet)
    with bars, progress.told_to(bars.task):
        yield


def perform(model: Path, operations: Sequence[Operation], options: WriteOptions, *, label: str) -> None:
    """Open the model, apply the operations, write the result where the options say, and report it.

    Without ``-o`` and ``--in-place`` it goes to ``NAME.label.safetensors``, and only if something changed. A dry run
    does and refuses all that a real one would, up to the first byte written.
    """
    try:
        checkpoint = open_checkpoint(model)
    except SurgeryError:
        # Where several exit codes hold, the highest counts.
        if options.output is not None:
            _refuse_output(options.output, options)
        raise
    target = model if options.in_place else options.output or beside(model, label)
    target_container(checkpoint, target, in_place=options.in_place)
    if options.in_place or options.output is not None:
        check_target(checkpoint, target, force=options.force, in_place=options.in_place)
    with listening(quiet=options.quiet):
        result = checkpoint.pipe(*operations)
        lost = losses(result, target, in_place=options.in_place)
        writes = bool(result.changes) or options.output is not None
        if writes:
            check_target(result, target, force=options.force, in_place=options.in_place)
            _refuse_loss(result, target, options)
            _warn_of_cache(target, options)
        if writes and not options.dry_run:
            if options.in_place and _only_ids(result) and patch_in_place(result):
                lost = ()
            else:
                save(result, target, force=options.force, in_place=options.in_place)
    report = _Report(result, lost if writes else (), target, writes=writes, options=options)
    report.print_json() if options.json else report.print_text()


def _refuse_output(output: Path, options: WriteOptions) -> None:
    """Refuse an output that could not be written, whatever the input were."""
    check_target(Checkpoint({}), output, force=options.force, in_place=False)
    if not output.parent.is_dir():
        raise OutputError("there is no such folder", file=output, remedy="make the folder first")


def _warn_of_cache(target: Path, options: WriteOptions) -> None:
    real = Path(os.path.realpath(target))  # unlike resolve, this minds no loop of links
    if options.in_place and real.parent.name == "blobs" and real.parent != target.parent:
        click.echo(f"warning: {target} leads into a Hugging Face cache, whose other revisions share the file", err=True)


def _refuse_loss(checkpoint: Checkpoint, target: Path, options: WriteOptions) -> None:
    """In place, what the file holds beside its state dict would be gone for good."""
    precious = [entry for entry in checkpoint.aside if entry.tensors]
    if options.in_place and precious and not options.force:
        listed = ", ".join(f"{entry.name} ({entry.what})" for entry in precious)
        raise OutputError(
            f"writing in place would lose {listed}",
            file=target,
            remedy="write to another file with -o, or insist with --force",
        )


def _only_ids(checkpoint: Checkpoint) -> bool:
    """Whether nothing but position ids was changed, which alone may be patched where they lie."""
    return all(change.kind == "replaced" and change.key.endswith("position_ids") for change in checkpoint.changes)


@dataclass(frozen=True, slots=True)
class _Report:
    """What was done, or would be."""

    checkpoint: Checkpoint
    lost: tuple[Change, ...]
    target: Path
    writes: bool
    options: WriteOptions

    def print_json(self) -> None:
        """One document."""
        output = self.target if self.writes and not self.options.dry_run else None
        document = documents.written(self.checkpoint, output, self.lost, dry_run=self.options.dry_run)
        click.echo(documents.text(document))

    def print_text(self) -> None:
        """Warnings on stderr, the rest on stdout."""
        for line in terminal.warnings(self.checkpoint, self.lost):
            click.echo(line, err=True)
        if self.options.quiet:
            return
        for line in terminal.steps(self.checkpoint, self.lost):
            click.echo(line)
        if not self.writes:
            click.echo("nothing to change, nothing written")
        elif self.options.dry_run:
            click.echo(f"dry run: {self.target} would be written")
        else:
            click.echo(f"wrote {self.target} ({terminal.human_bytes(self.target.stat().st_size)})")


def beside(model: Path, label: str) -> Path:
    """``NAME.label.safetensors`` beside the model, the name that a command chooses by itself."""
    stem = model.name.removesuffix(model.suffix) if model.suffix.lower() in SUFFIXES else model.name
    return model.with_name(f"{stem}.{label}.safetensors")
