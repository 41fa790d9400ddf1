"""The format of ``torch.save`` before torch 1.6: five pickles, then the storages one after another.

The pickles are the magic number, the protocol version, facts about the system, the object, and the storages' keys
in the order in which they follow; each storage is an int64 count of elements and their bytes.
"""

from __future__ import annotations

import io
import struct

from ..checkpoint import Checkpoint
from ..errors import CorruptError, UnsupportedError
from ..sources import FileSlice, SourceFile
from . import torch_pickle
from .torch_pickle import Storage

NAME = "torch-legacy"

MAX_PICKLES = 32 << 20
"""Bytes at the file's beginning in which the pickles must end."""

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_REMEDY = "download or copy it again"


def looks_like(head: bytes) -> bool:
    """Whether a file begins as a pickle of protocol 2 to 5 does."""
    return head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}


def read(file: SourceFile) -> Checkpoint:
    """Read the pickles and the storages' counts; tensors are slices of the file.

    Raises:
        CorruptError: If a pickle or a storage is broken.
        HostileError: If a pickle wants to run something.
        UnsupportedError: If it is another kind of pickle.
    """
    stream = io.BytesIO(file.read(0, min(file.size, MAX_PICKLES)))
    if torch_pickle.unpickle(stream, file, storages=False) != _MAGIC:
        raise UnsupportedError(
            "it is a pickle, but not one that torch.save made", file=file.path, remedy="name a checkpoint"
        )
    if torch_pickle.unpickle(stream, file, storages=False) != _PROTOCOL:
        raise UnsupportedError("its protocol is unknown", file=file.path, remedy="save it again with torch.save")
    system = torch_pickle.unpickle(stream, file, storages=False)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnsupportedError(
            "it was written on a big-endian machine",
            file=file.path,
            remedy="save it again on another machine",
        )
    seen: dict[str, Storage] = {}
    value = torch_pickle.unpickle(stream, file, seen=seen)
    keys = torch_pickle.unpickle(stream, file, storages=False)
    places = _places(file, stream.tell(), keys, seen)

    def place(storage: Storage) -> FileSlice:
        if storage.key not in places or places[storage.key].nbytes < storage.nbytes:
            raise CorruptError(f"the storage {storage.key} isn't in it", file=file.path, remedy=_REMEDY)
        return places[storage.key]

    return torch_pickle.checkpoint_of(value, NAME, file, place)


def _places(file: SourceFile, position: int, keys: object, storages: dict[str, Storage]) -> dict[str, FileSlice]:
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        raise CorruptError("its list of storages can't be read", file=file.path, remedy=_REMEDY)
    places: dict[str, FileSlice] = {}
    for key in map(str, keys):
        storage = storages.get(key)
        if storage is None or key in places or position + 8 > file.size:
            raise CorruptError(f"the storage {key} can't be found", file=file.path, remedy=_REMEDY)
        (numel,) = struct.unpack("<q", file.read(position, 8))
        if numel != storage.numel or position + 8 + storage.nbytes > file.size:
            raise CorruptError(
                f"truncated: the storage {key} doesn't end within the file", file=file.path, remedy=_REMEDY
            )
        places[key] = FileSlice(file, position + 8, storage.nbytes)
        position += 8 + storage.nbytes
    return places
