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
from ..containers import container_for, save
from ..containers.patching import patch_in_place
from ..errors import OutputExistsError, UsageError
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


def apply(checkpoint: Checkpoint, operations: Sequence[Operation], options: WriteOptions) -> Checkpoint:
    """Apply the operations, with progress shown where somebody looks."""
    with listening(quiet=options.quiet):
        return checkpoint.pipe(*operations)


@contextlib.contextmanager
def listening(*, quiet: bool) -> Iterator[None]:
    """Show progress on a terminal."""
    bars = Bars(quiet=quiet)
    with bars, progress.told_to(bars.task):
        yield


def write(checkpoint: Checkpoint, options: WriteOptions, default: Path, *, only_if_changed: bool) -> None:
    """Write the result where the options say, and report it.

    Args:
        checkpoint: After the operations.
        options: Of the command.
        default: The name where none is given.
        only_if_changed: Whether nothing is written under the default name when nothing changed.
    """
    source = checkpoint.origin.file.path if checkpoint.origin else default
    target = source if options.in_place else options.output or default
    changed = bool(checkpoint.changes)
    written: Path | None = None
    dropped: tuple[Change, ...] = ()
    if not options.dry_run and (changed or options.output is not None or not only_if_changed):
        _refuse_existing(target, options)
        with listening(quiet=options.quiet):
            if not (options.in_place and _only_ids(checkpoint) and patch_in_place(checkpoint)):
                dropped = save(checkpoint, target, force=options.force, in_place=options.in_place).changes
        written = target
    if options.json:
        document = documents.written(checkpoint, written, dropped, dry_run=options.dry_run)
        click.echo(documents.text(document))
    else:
        _print(checkpoint, written, dropped, options, target)


def _only_ids(checkpoint: Checkpoint) -> bool:
    """Whether nothing but position ids was changed, which alone may be patched where they lie."""
    return all(change.kind == "replaced" and change.key.endswith("position_ids") for change in checkpoint.changes)


def _print(
    checkpoint: Checkpoint, written: Path | None, dropped: tuple[Change, ...], options: WriteOptions, target: Path
) -> None:
    for line in terminal.warnings(checkpoint):
        click.echo(line, err=True)
    if options.quiet:
        return
    for line in terminal.steps(checkpoint, dropped):
        click.echo(line)
    if written is not None:
        click.echo(f"wrote {written} ({terminal.human_bytes(written.stat().st_size)})")
    elif options.dry_run:
        click.echo(f"dry run: nothing written; it would go to {target}")
    else:
        click.echo("nothing to change, nothing written")


def _refuse_existing(target: Path, options: WriteOptions) -> None:
    """Tell early what save would tell late."""
    container_for(target)
    if target.exists() and not (options.force or options.in_place):
        raise OutputExistsError("it exists already", file=target, remedy="use --force, or choose another name with -o")


def check_target(options: WriteOptions, default: Path) -> None:
    """Refuse a bad name before any weight is looked at."""
    if not options.dry_run and not options.in_place and options.output is not None:
        _refuse_existing(options.output, options)
    elif options.in_place:
        container_for(default)


def beside(model: Path, what: str) -> Path:
    """``NAME.what.safetensors`` beside the model, the name that a command chooses by itself."""
    return Path(os.path.normpath(model)).with_suffix(f".{what}.safetensors")
