"""The only place where weights move: one pass, bounded memory, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import history, progress
from ..checkpoint import Change, Checkpoint, Tensor
from ..errors import OutputError, OutputExistsError, UnsupportedError, UsageError
from ..sources import Data, FileSlice, InMemory, Joined, joined
from . import folders, safetensors
from .writing import AtomicFile

SUFFIXES = {
    ".safetensors": safetensors.NAME,
    ".sft": safetensors.NAME,
    ".ckpt": "torch-zip",
    ".pt": "torch-zip",
    ".pth": "torch-zip",
    ".bin": "torch-zip",
}
"""What a file's name says about its container; any other name is a folder's."""

_OTHER_FORMATS = {".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".zip", ".tar", ".gz", ".json", ".yaml", ".txt"}


_UNKNOWN = dict(zip(history.HASH_KEYS, ("0x" + "?" * 64, "?" * 64), strict=False))
"""What stands for the hashes of the tensors until those are written; as long as what they will be."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What :func:`save` wrote.

    Attributes:
        path: The file or the folder.
        container: Its container.
        nbytes: Its size, that of all its files for a folder.
        changes: What the container couldn't hold, and metadata that would have been false.
    """

    path: Path
    container: str
    nbytes: int
    changes: tuple[Change, ...]


def container_for(path: str | os.PathLike[str]) -> str:
    """The container that an output of this name will be.

    Raises:
        UsageError: If the suffix is that of a file which can't be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _OTHER_FORMATS:
        raise UsageError(
            f"{Path(path).name!r} doesn't say what to write",
            remedy=f"give it one of the suffixes {', '.join(SUFFIXES)}, or none for a folder",
        )
    return SUFFIXES.get(suffix, folders.NAME)


def save(  # noqa: PLR0913 - a word for each thing that people ask for
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    in_place: bool = False,
    variant: str | None = None,
    shard_size: int | None = None,
    hashes: bool = False,
) -> Saved:
    """Write a checkpoint, in the container that the name's suffix tells.

    The same checkpoint gives the same bytes on every run. Tensors that no operation touched are copied inside the
    kernel, adjacent ones in one call. The output appears under its name when it is complete and on the disk, or not
    at all.

    Args:
        checkpoint: What to write.
        path: ``.safetensors`` (or ``.sft``), or ``.ckpt``, ``.pt``, ``.pth``, ``.bin`` for a torch pickle; a folder
            otherwise, if the checkpoint has what belongs into one.
        force: Replace what has this name, unless the checkpoint is read from it. Of folders, only model folders are
            replaced, and only if nothing but weights and configs goes with them.
        in_place: Replace the very file or folder that the checkpoint was opened from; what else lies in a folder stays.
        variant: What stands in the names of a folder's weights, such as ``fp16``.
        shard_size: Bytes that a file of a folder's weights may have before it is split. Without this and ``variant``,
            a folder's weights keep the names and the distribution that they had.
        hashes: Put the hash of the tensors into the metadata, as ModelSpec and kohya's tools have it. Only a
            safetensors file has one; of others this asks nothing.

    Raises:
        OutputExistsError: If the name is taken and nothing allows to replace it.
        NoSpaceError: If it doesn't fit.
        OutputError: If it can't be written.
        UnsupportedError: If the container can't hold the checkpoint.
        UsageError: If the name or an option makes no sense for the checkpoint.
    """
    target = Path(path)
    container = target_container(checkpoint, target, in_place=in_place)
    check_target(checkpoint, target, force=force, in_place=in_place)
    if container == folders.NAME:
        from . import folder_writing

        plan = folder_writing.plan(checkpoint, target, in_place=in_place, variant=variant, shard_size=shard_size)
        return folder_writing.write(checkpoint, target, plan, replace=force or in_place)
    if variant is not None or shard_size is not None:
        raise UsageError("a single file has no variant and no shards", remedy="name a folder, without a suffix")
    dropped, metadata = _metadata(checkpoint, container, hashes=hashes)
    if container == safetensors.NAME:
        content = _content(checkpoint, metadata)
        expected = sum(part.nbytes for part in content)
    else:
        from . import torch_zip

        index = torch_zip.index(checkpoint, metadata)
        expected = torch_zip.size(checkpoint, index)
    with (
        progress.task(f"writing {target.name}", expected) as advance,
        _companions(checkpoint, target, replace=force or in_place),
        AtomicFile(target, replace=force or in_place, size=expected, advance=advance) as out,
    ):
        if container == safetensors.NAME:
            out.append(*content)
            if metadata.get(history.HASH_KEYS[0]) == _UNKNOWN[history.HASH_KEYS[0]]:
                digest = out.sha256(content[0].nbytes)
                known = {name: text.replace("?" * 64, digest) for name, text in _UNKNOWN.items()}
                out.overwrite_start(_header(checkpoint, metadata | known))
        else:
            torch_zip.write(checkpoint, index, out)
        for file in checkpoint.files:
            file.check_unchanged()
            if os.name == "nt":  # there, an open file can't be replaced
                file.close()
    return Saved(target, container, target.stat().st_size, dropped)


@contextlib.contextmanager
def _companions(checkpoint: Checkpoint, target: Path, *, replace: bool) -> Iterator[None]:
    """The files beside it, which appear when it has, and not at all if it doesn't."""
    with contextlib.ExitStack() as stack:
        for suffix, data in checkpoint.companions.items():
            place = target.with_suffix(suffix)
            file = AtomicFile(place, replace=replace, size=data.nbytes, advance=lambda _count: None)
            stack.enter_context(file).append(data)
        yield


def target_container(checkpoint: Checkpoint, target: Path, *, in_place: bool) -> str:
    """What will be written: what the name says, or in place what the file was (a legacy pickle becomes a zip).

    Raises:
        UsageError: If the name says nothing that this checkpoint can be.
        UnsupportedError: If it must be converted first.
    """
    if in_place and checkpoint.origin is not None:
        was = checkpoint.origin.container
        container = folders.NAME if folders.is_folder(was) else was if was == safetensors.NAME else "torch-zip"
    else:
        container = container_for(target)
    if container == folders.NAME and checkpoint.folder is None:
        raise UsageError(
            f"{target.name!r} would be a folder, and this is a single file",
            remedy=f"give it one of the suffixes {', '.join(SUFFIXES)}, or convert the model to a folder",
        )
    if container != folders.NAME and checkpoint.folder is not None and not folders.is_lone(checkpoint):
        raise UnsupportedError(
            "a folder with several components isn't simply a single file",
            file=checkpoint.path,
            remedy="convert it to a single file first, or name an output without a suffix: a folder",
        )
    return container


def check_target(checkpoint: Checkpoint, target: Path, *, force: bool, in_place: bool) -> None:
    """Refuse to write over what mustn't be: anything without ``force``, and an input except by ``in_place``.

    Raises:
        OutputExistsError: If it is refused.
        OutputError: If no file can be called that.
    """
    if "\0" in str(target):
        raise OutputError("not a file name: it holds a null byte", remedy="choose another name")
    if checkpoint.folder and target_container(checkpoint, target, in_place=in_place) == folders.NAME:
        from . import folder_writing

        folder_writing.check_target(checkpoint, target, force=force, in_place=in_place)
        return
    for suffix in checkpoint.companions:
        if target.with_suffix(suffix).exists() and not (force or in_place):
            raise taken(target.with_suffix(suffix))
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
        raise taken(target)


def beside(model: Path, label: str, *, folder: bool = False) -> Path:
    """``NAME.label.safetensors`` beside the model, or the folder ``NAME.label``: an output that nobody names."""
    if model.name in {"", ".."}:
        model = model.resolve()
    stem = model.name.removesuffix(model.suffix) if model.suffix.lower() in SUFFIXES else model.name
    return model.with_name(f"{stem}.{label}" + ("" if folder else ".safetensors"))


def taken(target: Path) -> OutputExistsError:
    """The refusal to replace without being told to."""
    return OutputExistsError("it exists already", file=target, remedy="use --force, or choose another name with -o")


def losses(checkpoint: Checkpoint, target: Path, *, in_place: bool = False, hashes: bool = False) -> tuple[Change, ...]:
    """What saving the checkpoint there would not carry over; see :attr:`Saved.changes`."""
    container = target_container(checkpoint, target, in_place=in_place)
    if container == folders.NAME:
        from . import folder_writing

        return folder_writing.plan(checkpoint, target, in_place=in_place).changes
    return _metadata(checkpoint, container, hashes=hashes)[0]


def _metadata(checkpoint: Checkpoint, container: str, *, hashes: bool) -> tuple[tuple[Change, ...], dict[str, str]]:
    """The metadata to write, and what can't be carried over."""
    dropped = [Change(entry.name, "dropped", entry.what) for entry in checkpoint.aside]
    if checkpoint.folder:
        dropped.extend(Change(name, "dropped", "file of its folder") for name in checkpoint.folder.files)
    metadata = with_history(checkpoint)
    if hashes and container == safetensors.NAME and not checkpoint.header:
        metadata = {"format": "pt", **metadata, **_UNKNOWN}
    elif not (container == safetensors.NAME and (checkpoint.header or _keeps_data(checkpoint))):
        dropped.extend(drop_hashes(metadata))
    return tuple(dropped), metadata


def with_history(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata, with what was done to the file."""
    if checkpoint.as_it_was:
        return dict(checkpoint.metadata)
    return history.with_history(checkpoint.metadata, checkpoint.steps, checkpoint.origin)


def drop_hashes(metadata: dict[str, str]) -> list[Change]:
    """Take out hashes that would be false."""
    return [Change(name, "metadata", metadata.pop(name), None) for name in history.HASH_KEYS if name in metadata]


def _content(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> tuple[Data, ...]:
    """What a safetensors file will consist of; one that is restored gets the very header that it had."""
    if checkpoint.header is not None:
        ordered = safetensors.in_header_order(checkpoint.header, checkpoint.tensors)
        return (InMemory(checkpoint.header), *_runs(tensor for _, tensor in ordered))
    return content(checkpoint.tensors, metadata)


def content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[Data, ...]:
    """What a safetensors file with these tensors consists of: a header, and runs of bytes."""
    ordered = safetensors.in_file_order(tensors)
    return (InMemory(_header(tensors, metadata)), *_runs(tensor for _, tensor in ordered))


def header_of(checkpoint: Checkpoint) -> bytes:
    """The header, with its length in front, of the safetensors file that :func:`save` makes of a checkpoint."""
    return _header(checkpoint.tensors, _metadata(checkpoint, safetensors.NAME, hashes=False)[1])


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    return safetensors.header(safetensors.in_file_order(tensors), metadata)


def _keeps_data(checkpoint: Checkpoint) -> bool:
    """Whether all bytes behind the header will be those of the file it was opened from, in the same order."""
    origin = checkpoint.origin
    if origin is None or origin.file is None or origin.data_offset is None:
        return False
    runs = _runs(tensor for _, tensor in safetensors.in_file_order(checkpoint.tensors))
    length = origin.file.size - origin.data_offset
    return runs == ((FileSlice(origin.file, origin.data_offset, length),) if length else ())


def _runs(tensors: Iterable[Tensor]) -> tuple[Data, ...]:
    """The tensors' bytes in order, with slices that follow each other in a file made one."""
    whole = joined(tensor.data for tensor in tensors if tensor.nbytes)
    return whole.parts if isinstance(whole, Joined) else (whole,)
