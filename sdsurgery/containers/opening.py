"""Open a file by what is in it, whatever its name says, and a folder by its index."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from .. import progress
from ..checkpoint import Checkpoint
from ..digests import sha256_of
from ..errors import CorruptError, InputError, MismatchError, UnreadableError, UnsupportedError, UsageError
from ..sources import SourceFile
from . import folders, safetensors

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


_OF_LORA = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
"""What PEFT and diffusers call the file in a LoRA's folder."""


def open_checkpoint(
    path: str | os.PathLike[str], variant: str | None = None, *, sha256: str | None = None
) -> Checkpoint:
    """Open a checkpoint; only its headers are read, unless it is to be a certain file.

    A file's container is told by its first bytes: safetensors, the zip format of ``torch.save``, or the legacy format.
    A folder is a diffusers folder, or one component of it; one that holds a LoRA stands for its file.

    Args:
        path: The file or the folder.
        variant: Which weights of a folder, such as ``fp16``; those without a variant unless given.
        sha256: What a single file's SHA-256 must be, 64 hexadecimal digits; then all of it is read.

    Raises:
        UnreadableError: If the file can't be opened.
        CorruptError: If it contradicts itself.
        HostileError: If it is a pickle that wants to run something, or a folder with a link that leads out of it.
        UnsupportedError: If it is nothing that can be read.
        MismatchError: If its SHA-256 is another.
        UsageError: If a variant of a single file is asked for, or the SHA-256 of a folder.
    """
    if sha256 is not None:
        return _verified(open_checkpoint(path, variant), sha256)
    if os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, also of names that are too long
        lora = next((file for name in _OF_LORA if (file := Path(path, name)).is_file()), None)
        return _read(SourceFile(lora)) if lora else folders.read(Path(path), variant, _read)
    if variant is not None:
        raise UsageError(f"a single file has no variant {variant!r}", remedy="leave the variant out, or name a folder")
    return _read(SourceFile(path))


def hashed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the SHA-256 of the single file that it was opened from, for records of its use."""
    origin = checkpoint.origin
    if origin is None or origin.file is None or origin.computed_sha256:
        return checkpoint
    with progress.task(f"hashing {origin.path.name}", origin.file.size) as advance:
        found = sha256_of(origin.file.whole, advance)
    origin.file.check_unchanged()
    return replace(checkpoint, origin=replace(origin, computed_sha256=found))


def _verified(checkpoint: Checkpoint, sha256: str) -> Checkpoint:
    """The checkpoint, if its file has that hash."""
    if checkpoint.folder is not None:
        raise UsageError("a folder has no SHA-256", file=checkpoint.path, remedy="verify it with a manifest")
    found = hashed(checkpoint)
    seen = found.origin.sha256 if found.origin else None
    if seen != sha256.lower():
        message = f"its SHA-256 is {seen}, and {sha256} was expected"
        raise MismatchError(message, file=checkpoint.path, remedy="get the right file, or correct the hash")
    return found


def _read(file: SourceFile) -> Checkpoint:
    try:
        return _container(file, file.read(0, min(file.size, 64))).read(file)  # type: ignore[no-any-return]
    except InputError:
        file.close()
        raise
    except MemoryError as error:
        raise UnreadableError("its header doesn't fit into memory", file=file.path) from error


def _container(file: SourceFile, head: bytes) -> ModuleType:
    if not head:
        raise CorruptError("the file is empty", file=file.path, remedy="download or copy it again")
    for start, what, remedy in _MISTAKEN:
        if head.startswith(start):
            raise UnsupportedError(what, file=file.path, remedy=remedy)
    if safetensors.looks_like(head):
        return safetensors
    if file.path.suffix.lower() == ".onnx":
        from . import onnx

        return onnx
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
