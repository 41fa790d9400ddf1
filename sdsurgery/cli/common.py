"""What all writing commands share: their options, and the way from a checkpoint to a file and a report."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from .. import progress
from ..checkpoint import Change, Checkpoint
from ..containers import open as open_checkpoint
from ..containers import save
from ..containers.patching import patch_in_place
from ..containers.saving import beside, check_target, losses, target_container
from ..errors import OutputError, SurgeryError, UsageError
from ..operations import Operation
from ..operations.base import opened as open_source
from ..operations.cast import ComponentName
from ..outputs import refuse, refuse_configs
from ..reports import documents, terminal
from .bars import Bars

Function = TypeVar("Function", bound=Callable[..., Any])

MODEL = click.argument("model", type=click.Path(path_type=Path))
COMPONENTS = click.option(
    "--component",
    "components",
    multiple=True,
    type=click.Choice(get_args(ComponentName)),
    help="Only this component; may be given several times.",
)


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
    hash: bool = False


_WRITE_OPTIONS = {
    "output": click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Write to this file; always writes."
    ),
    "in_place": click.option("--in-place", is_flag=True, help="Replace the input itself."),
    "dry_run": click.option("--dry-run", is_flag=True, help="Say what would be done and write nothing."),
    "json": click.option("--json", is_flag=True, help="Print one JSON document."),
    "force": click.option(
        "--force", is_flag=True, help="Replace an existing output, and override refusals that say so."
    ),
    "hash": click.option(
        "--hash", is_flag=True, help="Record the SHA-256 of all inputs, and that of the tensors of a safetensors file."
    ),
    "quiet": click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors and warnings."),
    "debug": click.option("--debug", is_flag=True, help="Show the traceback of an error."),
}


def write_options(*, without: Collection[str] = ()) -> Callable[[Function], Function]:
    """Give a command the shared options, gathered in one argument ``options``; a command may do without some."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def gathered(**arguments: Any) -> Any:
            names = WriteOptions.__dataclass_fields__
            options = WriteOptions(**{name: arguments.pop(name, None) for name in names})
            if options.output is not None and options.in_place:
                raise UsageError("-o and --in-place contradict each other", remedy="leave one of them out")
            return function(options=options, **arguments)

        for name, option in reversed(_WRITE_OPTIONS.items()):
            gathered = gathered if name in without else option(gathered)
        return gathered  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def listening(*, quiet: bool) -> Iterator[None]:
    """Show progress on a terminal."""
    bars = Bars(quiet=quiet)
    with bars, progress.told_to(bars.task):
        yield


def perform(model: Path, operations: Sequence[Operation], options: WriteOptions, *, label: str) -> None:
    """Apply the operations to a model, write the result where the options say, and report it."""
    carry_out(model, operations, options, label=label).print()


def carry_out(model: Path, operations: Sequence[Operation], options: WriteOptions, *, label: str) -> Report:
    """Open the model, apply the operations, write the result where the options say, and tell what was done.

    Without ``-o`` and ``--in-place`` it goes to ``NAME.label.safetensors``, or the folder ``NAME.label``, and only if
    something changed. A dry run does and refuses all that a real one would, up to the first byte written.
    """
    try:
        checkpoint = open_checkpoint(model)
    except SurgeryError:
        # Where several exit codes hold, the highest counts.
        if options.output is not None:
            refuse(options.output, force=options.force)
        raise
    named = model if options.in_place else options.output
    # What lies in a folder may leave it, and the other way round: then only the result tells what may be written.
    same_kind = all(operation.whole and operation.keeps_container for operation in operations)
    if named is not None and same_kind:
        target_container(checkpoint, named, in_place=options.in_place)
    if named is not None and (same_kind or checkpoint.folder is None):
        check_target(checkpoint, named, force=options.force, in_place=options.in_place)
    with listening(quiet=options.quiet):
        result = with_hashes(checkpoint, operations) if options.hash else checkpoint.pipe(*operations)
        target = named or beside(model, label, folder=result.folder is not None)
        nbytes = 0
        lost = losses(result, target, in_place=options.in_place, hashes=options.hash)
        writes = bool(result.changes) or options.output is not None
        if writes:
            check_target(result, target, force=options.force, in_place=options.in_place)
            refuse_configs(result, target, [path for operation in operations for path in operation.configs_read])
            _refuse_loss(result, target, options)
            _warn_of_cache(target, options)
        if writes and not options.dry_run:
            if options.in_place and not options.hash and _only_ids(result) and patch_in_place(result):
                lost, nbytes = (), target.stat().st_size
            else:
                saved = save(result, target, force=options.force, in_place=options.in_place, hashes=options.hash)
                nbytes = saved.nbytes
    return Report(result, lost if writes else (), target, nbytes, writes=writes, options=options)


def with_hashes(checkpoint: Checkpoint, operations: Sequence[Operation]) -> Checkpoint:
    """The result of the operations, with all inputs hashed for its record."""
    opened = (operation.with_sources(lambda source: open_source(source).hashed()) for operation in operations)
    return checkpoint.hashed().pipe(*opened)


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
class Report:
    """What was done, or would be."""

    checkpoint: Checkpoint
    lost: tuple[Change, ...]
    target: Path
    nbytes: int
    writes: bool
    options: WriteOptions

    def print(self) -> None:
        """As the options want it."""
        self._print_json() if self.options.json else self._print_text()

    def _print_json(self) -> None:
        """One document."""
        output = self.target if self.writes and not self.options.dry_run else None
        document = documents.written(self.checkpoint, output, self.lost, dry_run=self.options.dry_run)
        click.echo(documents.text(document))

    def _print_text(self) -> None:
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
            click.echo(f"wrote {self.target} ({terminal.human_bytes(self.nbytes)})")
