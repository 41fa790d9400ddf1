"""The elements of tensors as NumPy arrays, piece by piece, several tensors in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .checkpoint import Tensor
from .sources import Data, FileSlice, Joined

PIECE = 256 << 10
"""Bytes of a piece: small enough that both, and what is computed of them, stay in a core's cache."""


def arrays_of(tensors: Sequence[Tensor], size: int = PIECE) -> Iterator[tuple[Any, ...]]:
    """The elements of tensors of one shape as flat NumPy arrays, in pieces of as many elements each.

    Each is only good until the next is asked for.

    Args:
        tensors: The tensors.
        size: Bytes of a piece of the widest of them.
    """
    import numpy as np

    widest = max(tensor.dtype.itemsize for tensor in tensors)
    count = max(1, size // widest)
    kinds = [tensor.dtype.to_numpy() for tensor in tensors]
    streams = [pieces(tensor.data, count * tensor.dtype.itemsize) for tensor in tensors]
    for found in zip(*streams, strict=True):
        yield tuple(np.frombuffer(piece, dtype=kind) for piece, kind in zip(found, kinds, strict=True))


def pieces(data: Data, size: int = PIECE) -> Iterator[bytes | bytearray]:
    """Pieces of exactly ``size`` bytes, the last one shorter, each good until the next is asked for.

    A whole one is a ``bytearray``, which compares with another at the speed of memory; a ``memoryview`` doesn't.
    """
    buffer = bytearray(size)
    view = memoryview(buffer)
    filled = 0
    for count in _filling(data, view):
        filled = count % size
        if not filled:
            yield buffer
    if filled:
        yield bytes(view[:filled])


def _filling(data: Data, view: memoryview) -> Iterator[int]:
    """Fill a buffer with the bytes in order, and tell how many came in all whenever it is full, and at the end."""
    size, done = len(view), 0
    for part in data.parts if isinstance(data, Joined) else (data,):
        position = 0
        chunks = part.chunks(size) if not isinstance(part, FileSlice) else None
        piece = memoryview(b"")
        while position < part.nbytes:
            room = view[done % size :]
            if isinstance(part, FileSlice):
                count = min(len(room), part.nbytes - position)
                part.file.read_into(room[:count], part.offset + position)
            else:
                piece = piece or memoryview(next(chunks)).cast("B")  # type: ignore[arg-type]
                count = min(len(room), len(piece))
                room[:count] = piece[:count]
                piece = piece[count:]
            position, done = position + count, done + count
            if done % size == 0:
                yield done
    if done % size:
        yield done
