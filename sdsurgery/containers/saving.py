"""The only place where weights move: one pass, bounded memory, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import history, progress
from ..checkpoint import Change, Checkpoint, Tensor
from ..errors import OutputError, OutputExistsError, UsageError
from ..sources import Data, FileSlice, SourceFile
from . import safetensors
from .writing import AtomicFile

SUFFIXES = {
    ".safetensors": safetensors.NAME,
    ".sft": safetensors.NAME,
    ".ckpt": "torch-zip",
    ".pt": "torch-zip",
    ".pth": "torch-zip",
    ".bin": "torch-zip",
}
"""What a file's name says about its container."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What :func:`save` wrote.

    Attributes:
        path: The file.
        container: Its container.
        nbytes: Its size.
        changes: What the container couldn't hold, and metadata that would have been false.
    """

    path: Path
    container: str
    nbytes: int
    changes: tuple[Change, ...]


def container_for(path: str | os.PathLike[str]) -> str:
    """The container that a file of this name will be.

    Raises:
        UsageError: If the suffix tells of none.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"{Path(path).name!r} doesn't say what to write",
            remedy=f"give it one of the suffixes {', '.join(SUFFIXES)}",
        )
    return SUFFIXES[suffix]


def save(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    in_place: bool = False,
) -> Saved:
    """Write a checkpoint, in the container that the name's suffix tells.

    The same checkpoint gives the same bytes on every run. Tensors that no operation touched are copied inside the
    kernel, adjacent ones in one call. The file appears under its name when it is complete and on the disk, or not
    at all.

    Args:
        checkpoint: What to write.
        path: ``.safetensors`` (or ``.sft``), or ``.ckpt``, ``.pt``, ``.pth``, ``.bin`` for a torch pickle.
        force: Replace a file that has this name, unless the checkpoint is read from it.
        in_place: Replace the very file that the checkpoint was opened from.

    Raises:
        OutputExistsError: If the name is taken and nothing allows to replace it.
        NoSpaceError: If it doesn't fit.
        OutputError: If it can't be written.
    """
    target = Path(path)
    container = target_container(checkpoint, target, in_place=in_place)
    check_target(checkpoint, target, force=force, in_place=in_place)
    dropped, metadata = _metadata(checkpoint, container)
    if container == safetensors.NAME:
        ordered = safetensors.in_file_order(checkpoint.tensors)
        header = safetensors.header(ordered, metadata)
        expected = len(header) + sum(tensor.nbytes for _, tensor in ordered)
    else:
        from . import torch_zip

        index = torch_zip.index(checkpoint, metadata)
        expected = torch_zip.size(checkpoint, index)
    with (
        progress.task(f"writing {target.name}", expected) as advance,
        AtomicFile(target, replace=force or in_place, size=expected, advance=advance) as out,
    ):
        if container == safetensors.NAME:
            out.write(header)
            for run in _runs(tensor for _, tensor in ordered):
                out.append(run)
        else:
            torch_zip.write(checkpoint, index, out)
        for file in checkpoint.files:
            file.check_unchanged()
            if os.name == "nt":  # there, an open file can't be replaced
                file.close()
    return Saved(target, container, target.stat().st_size, dropped)


def target_container(checkpoint: Checkpoint, target: Path, *, in_place: bool) -> str:
    """What will be written: what the name says, or in place what the file was (a legacy pickle becomes a zip)."""
    if in_place and checkpoint.origin is not None:
        return safetensors.NAME if checkpoint.origin.container == safetensors.NAME else "torch-zip"
    return container_for(target)


def check_target(checkpoint: Checkpoint, target: Path, *, force: bool, in_place: bool) -> None:
    """Refuse to write over what mustn't be: anything without ``force``, and an input except by ``in_place``.

    Raises:
        OutputExistsError: If it is refused.
        OutputError: If no file can be called that.
    """
    if "\0" in str(target):
        raise OutputError("not a file name: it holds a null byte", remedy="choose another name")
    if not os.path.exists(target):  # noqa: PTH110 - unlike Path.exists, also of names that are too long
        return
    status = target.stat()
    main = checkpoint.origin.file if checkpoint.origin else None
    is_main = main is not None and main.identity == (status.st_dev, status.st_ino)
    if is_main and in_place:
        return
    if is_main or any(file.identity == (status.st_dev, status.st_ino) for file in checkpoint.files):
        remedy = "use --in-place to replace the model itself" if is_main else "choose another name"
        raise OutputExistsError("it is one of the inputs", file=target, remedy=remedy)
    if not force:
        raise OutputExistsError("it exists already", file=target, remedy="use --force, or choose another name with -o")


def losses(checkpoint: Checkpoint, target: Path, *, in_place: bool = False) -> tuple[Change, ...]:
    """What saving the checkpoint there would not carry over; see :attr:`Saved.changes`."""
    return _metadata(checkpoint, target_container(checkpoint, target, in_place=in_place))[0]


def _metadata(checkpoint: Checkpoint, container: str) -> tuple[tuple[Change, ...], dict[str, str]]:
    """The metadata to write, and what can't be carried over."""
    dropped = [Change(entry.name, "dropped", entry.what) for entry in checkpoint.aside]
    source = checkpoint.origin.file.known_sha256 if checkpoint.origin and checkpoint.origin.file else None
    facts = {"source_sha256": source} if source else {}
    metadata = history.with_history(checkpoint.metadata, checkpoint.steps, **facts)
    if not (container == safetensors.NAME and _keeps_data(checkpoint)):
        stale = [name for name in history.HASH_KEYS if name in metadata]
        dropped.extend(Change(name, "metadata", metadata.pop(name), None) for name in stale)
    return tuple(dropped), metadata


def _keeps_data(checkpoint: Checkpoint) -> bool:
    """Whether all bytes behind the header will be those of the file it was opened from, in the same order."""
    origin = checkpoint.origin
    if origin is None or origin.file is None or origin.data_offset is None:
        return False
    runs = [run for run in _runs(tensor for _, tensor in safetensors.in_file_order(checkpoint.tensors)) if run.nbytes]
    length = origin.file.size - origin.data_offset
    return runs == ([FileSlice(origin.file, origin.data_offset, length)] if length else [])


def _runs(tensors: Iterable[Tensor]) -> Iterator[Data]:
    """The tensors' bytes in order, with slices that follow each other in a file made one."""
    pending: tuple[SourceFile, int, int] | None = None
    for tensor in tensors:
        data = tensor.data
        if not isinstance(data, FileSlice):
            if data.nbytes:
                if pending:
                    yield FileSlice(*pending)
                pending = None
                yield data
            continue
        if pending and pending[0] is data.file and pending[1] + pending[2] == data.offset:
            pending = (data.file, pending[1], pending[2] + data.nbytes)
        else:
            if pending:
                yield FileSlice(*pending)
            pending = (data.file, data.offset, data.nbytes)
    if pending:
        yield FileSlice(*pending)
