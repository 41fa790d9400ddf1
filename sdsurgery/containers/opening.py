"""Open a file by what is in it, whatever its name says."""

from __future__ import annotations

import os
from types import ModuleType

from ..checkpoint import Checkpoint
from ..errors import CorruptError, InputError, UnreadableError, UnsupportedError
from ..sources import SourceFile
from . import safetensors

# Files that people hand over for a checkpoint, by how they begin, and what to do about it.
_MISTAKEN = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the weights", "fetch them: git lfs pull"),
    (
        b"<!DOCTYPE",
        "it is a web page, not a checkpoint",
        "the download wanted a login or went wrong: try again",
    ),
    (b"<html", "it is a web page, not a checkpoint", "the download wanted a login or went wrong: try again"),
    (b"GGUF", "it is a GGUF file", "name a safetensors file or a torch pickle"),
)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint; only its headers are read.

    The container is told by the first bytes: safetensors, the zip format of ``torch.save``, or the legacy format.

    Raises:
        UnreadableError: If the file can't be opened.
        CorruptError: If it contradicts itself.
        HostileError: If it is a pickle that wants to run something.
        UnsupportedError: If it is nothing that can be read.
    """
    if os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, also of names that are too long
        raise UnsupportedError(
            "it is a folder", file=path, remedy="name a checkpoint file, such as a .safetensors inside it"
        )
    file = SourceFile(path)
    head = file.read(0, min(file.size, 64))
    container = _container(file, head)
    try:
        return container.read(file)  # type: ignore[no-any-return]
    except InputError:
        file.close()
        raise
    except MemoryError as error:
        raise UnreadableError("its header doesn't fit into memory", file=path) from error


def _container(file: SourceFile, head: bytes) -> ModuleType:
    if not head:
        raise CorruptError("the file is empty", file=file.path, remedy="download or copy it again")
    for start, what, remedy in _MISTAKEN:
        if head.startswith(start):
            raise UnsupportedError(what, file=file.path, remedy=remedy)
    if safetensors.looks_like(head):
        return safetensors
    # The pickle readers are imported only when one is at hand: most files are safetensors.
    from . import torch_legacy, torch_zip

    for container in (torch_zip, torch_legacy):
        if container.looks_like(head):
            return container
    if file.path.suffix.lower() in {".safetensors", ".sft"}:
        return safetensors
    raise UnsupportedError(
        "it is neither safetensors nor a torch pickle", file=file.path, remedy="name a checkpoint file"
    )
