"""convert: from one layout to the other, with the files that go with it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import click

from .. import progress
from ..checkpoint import Change, Checkpoint, Step
from ..containers import folder_writing, folders, save
from ..containers import open as open_checkpoint
from ..containers.saving import SUFFIXES, check_target, content, losses, target_container
from ..containers.writing import AtomicFile
from ..errors import InputError, MismatchError, SurgeryError, UnsupportedError, UsageError
from ..models import sidecar as sidecars
from ..operations import Cast, Convert, sidecar_of
from ..operations.cast import DTypeName
from ..operations.convert import LayoutName
from ..reports import documents, terminal
from .common import Report, WriteOptions, listening, refuse_configs, refuse_output, write_options
from .surgery import parameters

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True, slots=True)
class _Request:
    """What the command line asks for, besides the shared options; ``options`` are the operation's own."""

    source: Path
    target: Path
    to: LayoutName | None
    dtype: Any
    variant: str | None
    shard_size: str | None
    sidecar: bool
    relink: bool
    options: Mapping[str, Any]

    @property
    def layout(self) -> LayoutName:
        """The layout to convert to: as told, or by the target's name."""
        if self.to:
            return self.to
        return "ldm" if self.target.suffix.lower() in SUFFIXES else "diffusers"

    @property
    def into_folder(self) -> bool:
        """Whether the target's name is a folder's."""
        return self.target.suffix.lower() not in SUFFIXES

    @property
    def folder_options(self) -> dict[str, Any]:
        """How a folder's weights are to be called and split."""
        return {"variant": self.variant, "shard_size": _size(self.shard_size)}


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
    request = _Request(**arguments, options=stated)
    _check(request)
    with listening(quiet=options.quiet):
        try:
            checkpoint = _opened(request)
            result = _converted(request, checkpoint)
        except SurgeryError:
            # Where several exit codes hold, the highest counts.
            refuse_output(request.target, options)
            raise
        lost = _checked(request, checkpoint, result, options)
        nbytes = 0 if options.dry_run else _write(request, checkpoint, result, force=options.force)
    Report(result, lost, request.target, nbytes, writes=True, options=options).print()


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


def _opened(request: _Request) -> Checkpoint:
    """The source; of a folder the variant that is named, which a folder to be written needn't come from."""
    if request.variant is None or (request.into_folder and not request.source.is_dir()):
        return open_checkpoint(request.source)
    try:
        return open_checkpoint(request.source, variant=request.variant)
    except UnsupportedError:  # it has no such variant: then it is what the new folder's files are to be called
        if not request.into_folder:
            raise
        return open_checkpoint(request.source)


def _check(request: _Request) -> None:
    if request.layout == "ldm" and request.into_folder:
        raise UsageError(
            f"{request.target.name!r} is no name of a single file",
            remedy=f"give it one of the suffixes {', '.join(SUFFIXES)}",
        )
    given = _changing(request) if request.sidecar else None
    if given:
        message = f"--sidecar promises the original back, and {given} asks for another"
        raise UsageError(message, remedy="leave one of the two out")
    if request.layout == "onnx" and not request.into_folder:
        raise UsageError(
            f"{request.target.name!r} is a file's name, and ONNX takes a folder", remedy="leave out the suffix"
        )
    if request.sidecar and request.into_folder != (request.layout != "ldm"):
        raise UsageError("a sidecar lies beside a folder", remedy="name a folder, or leave out --sidecar")
    if request.shard_size is not None and not request.into_folder:
        raise UsageError("a single file has no shards", remedy="leave out --shard-size")
    _size(request.shard_size)


def _changing(request: _Request) -> str | None:
    """An option that asks for another model than the original, if one is given."""
    changing = {"--dtype": request.dtype, "--ema": request.options["ema"]}
    if request.layout == "ldm":
        changing |= {
            "--config": request.options["config"],
            "--prediction-type": request.options["prediction_type"],
        }
    return next((option for option, value in changing.items() if value), None)


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,12})\s*([kmg]i?b)?", text.strip().lower())
    if not match or not int(match.group(1)):
        raise UsageError(f"{text!r} is no size", remedy="give one such as 5GB, 500MB or 2GiB")
    return int(match.group(1)) * _UNITS[match.group(2) or ""]


def _converted(request: _Request, checkpoint: Checkpoint) -> Checkpoint:
    """The model in the other layout; a sidecar beside a folder is used if it is the folder's."""
    if request.sidecar and (checkpoint.folder is None) != request.into_folder:
        raise UsageError(
            "a sidecar keeps what a folder can't hold of a single file, and restores that file",
            remedy="leave out --sidecar",
        )
    beside = _sidecar_of_source(request.source)
    may_restore = request.layout == "ldm" and checkpoint.folder is not None
    if may_restore and request.sidecar:
        result = _pipe(request, checkpoint, beside)
        if not result.as_it_was:
            message = next((note.message for note in result.notes if note.level == "warning"), "it is not the original")
            remedy = "leave out --sidecar, to have what it keeps of the rest"
            raise MismatchError(message, file=beside, remedy=remedy)
        return result
    given = _changing(request)
    if may_restore and beside.is_file() and given:
        click.echo(terminal.printable(f"warning: {beside} was not used: {given} asks for another file"), err=True)
    elif may_restore and beside.is_file():
        try:
            return _pipe(request, checkpoint, beside)
        except InputError as error:
            if error.file != str(beside):
                raise
            click.echo(terminal.printable(f"warning: {beside} was not used: {error.message}"), err=True)
    return _pipe(request, checkpoint, None)


def _sidecar_of_source(source: Path) -> Path:
    """Beside the folder as it was named, or else beside the one that a link leads to."""
    beside = sidecars.path_beside(source)
    return beside if beside.is_file() or not source.is_symlink() else sidecars.path_beside(source.resolve())


def _pipe(request: _Request, checkpoint: Checkpoint, sidecar: Path | None) -> Checkpoint:
    convert = Convert(request.layout, sidecar=sidecar, **request.options)
    result = checkpoint.pipe(convert, *([Cast(request.dtype)] if request.dtype else []))
    if result.folder and not request.into_folder and not folders.is_lone(result):
        raise UsageError(
            f"{request.target.name!r} is a file's name, and diffusers' layout of a whole model is a folder",
            remedy="leave out the suffix",
        )
    # A lone component may go into a file under diffusers' names, without the config that its folder would have.
    lone_file = not request.into_folder and folders.is_lone(result)
    return replace(result, folder=None) if lone_file else result


def _check_yaml(request: _Request, result: Checkpoint) -> None:
    """What lies beside a single file under its name is taken for its config by every loader."""
    config = request.options["config"]
    refuse_configs(result, request.target, [config] if config else [])
    beside = request.target.with_suffix(".yaml")
    if not request.into_folder and ".yaml" not in result.companions and beside.exists():
        message = f"warning: {beside} lies there already, and loaders will take it for the new file's config"
        click.echo(terminal.printable(message), err=True)


def _checked(
    request: _Request, checkpoint: Checkpoint, result: Checkpoint, options: WriteOptions
) -> tuple[Change, ...]:
    """What the output won't hold, if it may be written; reads no weight."""
    target_container(result, request.target, in_place=False)
    if request.into_folder:
        lost = folder_writing.plan(result, request.target, **request.folder_options).changes
    else:
        lost = losses(result, request.target)
    check_target(result, request.target, force=options.force, in_place=False)
    refuse_output(request.target, options)
    if request.sidecar and request.into_folder:
        beside = sidecars.path_beside(request.target)
        check_target(replace(checkpoint, folder=None), beside, force=options.force, in_place=False)
    _check_yaml(request, result)
    return lost


def _write(request: _Request, checkpoint: Checkpoint, result: Checkpoint, *, force: bool) -> int:
    """Write the result; a sidecar appears when its folder is there, and not at all if that fails."""
    if not request.into_folder:
        return save(result, request.target, force=force).nbytes
    with contextlib.ExitStack() as stack:
        if request.sidecar:
            sidecar = sidecar_of(checkpoint, result)
            parts = content(sidecar, sidecar.metadata)
            nbytes = sum(part.nbytes for part in parts)
            advance = stack.enter_context(progress.task("writing the sidecar", nbytes))
            beside = sidecars.path_beside(request.target)
            out = stack.enter_context(AtomicFile(beside, replace=force, size=nbytes, advance=advance))
            for part in parts:
                out.append(part)
        return save(result, request.target, force=force, **request.folder_options).nbytes
