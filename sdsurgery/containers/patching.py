"""The one write that isn't a rename: position ids of the right size, mended where they lie."""

from __future__ import annotations

import os

from .. import history
from ..checkpoint import Checkpoint
from ..errors import CorruptError, OutputError
from ..sources import FileSlice, InMemory
from . import safetensors
from .opening import open_checkpoint
from .writing import flush_to_disk

_MOST_BYTES = 4096


def patch_in_place(checkpoint: Checkpoint) -> bool:
    """Write the one small tensor that differs into the file that the checkpoint was opened from.

    Done only where nothing else differs: one safetensors file with one name, the same keys, dtypes and shapes, and
    no recorded hash that would become false. One write of bytes that were wrong anyway, which a crash can at worst
    leave undone; the header isn't touched, so there is no entry in the history.

    Returns:
        Whether it was done; if not, the file is as it was.

    Raises:
        OutputError: If the file can't be written.
    """
    origin = checkpoint.origin
    if origin is None or origin.file is None or origin.container != safetensors.NAME or origin.file.links > 1:
        return False
    if any(name in checkpoint.metadata for name in history.HASH_KEYS):
        return False
    now = open_checkpoint(origin.file.path)
    if now.origin is None or now.origin.file is None or now.origin.file.identity != origin.file.identity:
        raise CorruptError(
            "the file was replaced since it was opened",
            file=origin.file.path,
            remedy="wait until whatever writes it has finished, and run this again",
        )
    origin.file.check_unchanged()
    found = _difference(now, checkpoint)
    if found is None:
        return False
    offset, content = found
    try:
        fd = os.open(origin.file.path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            os.lseek(fd, offset, os.SEEK_SET)
            while content:
                content = content[os.write(fd, content) :]
            flush_to_disk(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise OutputError(
            f"writing failed: {error.strerror}", file=origin.file.path, remedy="check the file's permissions"
        ) from error
    return True


def _difference(before: Checkpoint, after: Checkpoint) -> tuple[int, bytes] | None:
    """Offset and new bytes of the only tensor that differs, if it is small and its dtype and shape are the same."""
    if before.keys() != after.keys() or before.metadata != after.metadata:
        return None
    found: tuple[int, bytes] | None = None
    for key, old in before.items():
        new = after[key]
        if isinstance(new.data, FileSlice) and isinstance(old.data, FileSlice):
            place, old_place = (new.data.file.identity, new.data.offset), (old.data.file.identity, old.data.offset)
            if (new.dtype, new.shape, place) != (old.dtype, old.shape, old_place):
                return None
            continue
        same_size = (new.dtype, new.shape) == (old.dtype, old.shape) and new.nbytes <= _MOST_BYTES
        if found or not same_size or not isinstance(new.data, InMemory) or not isinstance(old.data, FileSlice):
            return None
        found = (old.data.offset, new.tobytes())
    return found
