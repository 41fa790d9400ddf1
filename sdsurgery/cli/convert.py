"""convert: from one layout to the other, with the files that go with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import click

from ..checkpoint import Change, Checkpoint, Step
from ..containers import open as open_checkpoint
from ..errors import InputError, MismatchError, SurgeryError, UnsupportedError, UsageError
from ..models import sidecar as sidecars
from ..operations import Convert
from ..operations.cast import DTypeName
from ..operations.convert import LayoutName
from ..outputs import Output, refuse
from ..reports import documents, terminal
from .common import Report, WriteOptions, listening, write_options
from .surgery import parameters


def _own_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operation's parameters, but for those that the command has its own way with."""
    decorators = parameters(Convert, without=_OTHERWISE)
    return functools.reduce(lambda made, option: option(made), reversed(decorators), function)


_OTHERWISE = ("to", "sidecar")


@click.command("convert")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="[DST]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(get_args(LayoutName)),
    help="The layout to convert to. By the name of DST unless given: a checkpoint file is ldm, a folder diffusers.",
)
@click.option("--dtype", type=click.Choice(get_args(DTypeName)), help="Cast the weights to this type.")
@click.option(
    "--variant",
    metavar="NAME",
    help="Stands in the names of a folder's weights, such as fp16: of those to write, or of those to read.",
)
@click.option("--shard-size", metavar="SIZE", help="Split a folder's weights into files of at most this, such as 5GB.")
@click.option(
    "--sidecar",
    is_flag=True,
    help="Keep what a folder can't hold in DST.sidecar.safetensors; on the way back, insist on restoring with it.",
)
@_own_options
@click.option("--relink", is_flag=True, help="Without DST: link the graphs in SRC to the weights as they lie now.")
@write_options(without=("output", "in_place"))
def convert_command(options: WriteOptions, **arguments: Any) -> None:
    """Convert between a single file (ldm's layout), a diffusers folder and ONNX, bit for bit and offline.

    SRC is a safetensors file, a torch pickle, a diffusers folder or one with ONNX graphs, of a whole model or of one
    component. DST is a single file if its name ends in .safetensors or .ckpt, and else a folder; with --to onnx, one
    that diffusers and ONNX Runtime both run from one copy of the weights. What DST can't hold is named in the
    report; with --sidecar it is kept in a file beside the folder, and converting back gives the original file again.
    """
    if arguments["relink"]:
        _relink(arguments, options)
        return
    if arguments["target"] is None:
        raise UsageError("no output is named", remedy="name a file or a folder behind the input")
    own = {declared.field.name for declared in Convert.declared()}.difference(_OTHERWISE)
    stated = {name: arguments.pop(name) for name in own}
    del arguments["relink"]
    source: Path = arguments.pop("source")
    output = Output(arguments.pop("target"), **arguments, options=stated)
    output.check()
    with listening(quiet=options.quiet):
        try:
            checkpoint = _opened(source, output)
            checkpoint = checkpoint.hashed() if options.hash else checkpoint
            result = _converted(source, output, checkpoint)
        except SurgeryError:
            # Where several exit codes hold, the highest counts.
            refuse(output.path, force=options.force)
            raise
        lost = output.losses(checkpoint, result, force=options.force, hashes=options.hash)
        misleading = output.misleading_config(result)
        if misleading:
            message = f"warning: {misleading} lies there already, and loaders will take it for the new file's config"
            click.echo(terminal.printable(message), err=True)
        nbytes = 0
        if not options.dry_run:
            nbytes = output.write(checkpoint, result, force=options.force, hashes=options.hash)
    Report(result, lost, output.path, nbytes, writes=True, options=options).print()


def _relink(arguments: Mapping[str, Any], options: WriteOptions) -> None:
    """Link a folder's graphs to the weights beside them."""
    if arguments["target"] is not None:
        raise UsageError("--relink mends a folder where it is", remedy="name no output")
    from ..graphs.relinking import relink

    done = relink(arguments["source"], dry_run=options.dry_run)
    if options.json:
        changes = [Change(name, "replaced", "links", "links") for name in done]
        step = Step("relink", {}, tuple(changes))
        document = documents.written(Checkpoint({}, steps=(step,)), arguments["source"], (), dry_run=options.dry_run)
        click.echo(documents.text(document))
    elif not options.quiet:
        click.echo(terminal.printable(f"linked again: {', '.join(done)}" if done else "every link is right already"))


def _opened(source: Path, output: Output) -> Checkpoint:
    """The source; of a folder the variant that is named, which a folder to be written needn't come from."""
    if output.variant is None or (output.is_folder and not source.is_dir()):
        return open_checkpoint(source)
    try:
        return open_checkpoint(source, variant=output.variant)
    except UnsupportedError:  # it has no such variant: then it is what the new folder's files are to be called
        if not output.is_folder:
            raise
        return open_checkpoint(source)


def _converted(source: Path, output: Output, checkpoint: Checkpoint) -> Checkpoint:
    """The model in the other layout; a sidecar beside a folder is used if it is the folder's."""
    if output.sidecar and (checkpoint.folder is None) != output.is_folder:
        raise UsageError(
            "a sidecar keeps what a folder can't hold of a single file, and restores that file",
            remedy="leave out --sidecar",
        )
    beside = _sidecar_of_source(source)
    may_restore = output.layout == "ldm" and checkpoint.folder is not None
    if may_restore and output.sidecar:
        result = output.converted(checkpoint, beside)
        if not result.as_it_was:
            message = next((note.message for note in result.notes if note.level == "warning"), "it is not the original")
            remedy = "leave out --sidecar, to have what it keeps of the rest"
            raise MismatchError(message, file=beside, remedy=remedy)
        return result
    given = output.altering
    if may_restore and beside.is_file() and given:
        click.echo(terminal.printable(f"warning: {beside} was not used: {given} asks for another file"), err=True)
    elif may_restore and beside.is_file():
        try:
            return output.converted(checkpoint, beside)
        except InputError as error:
            if error.file != str(beside):
                raise
            click.echo(terminal.printable(f"warning: {beside} was not used: {error.message}"), err=True)
    return output.converted(checkpoint)


def _sidecar_of_source(source: Path) -> Path:
    """Beside the folder as it was named, or else beside the one that a link leads to."""
    beside = sidecars.path_beside(source)
    return beside if beside.is_file() or not source.is_symlink() else sidecars.path_beside(source.resolve())
