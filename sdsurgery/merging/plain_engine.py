"""Weighted sums with NumPy alone, for importing torch takes longer than computing one.

NumPy converts halves in software, element by element. Here they are converted by their bits, many at a time: a fp16
number's bits, moved to where fp32 has them, are the number times 2**-112 (Fabian Giesen's notes on half to float); and
adding a power of two that is 2**13 times as large as a number's leading bit rounds it to fp16's places, to nearest and
ties to even, as the hardware adds: the places are the sum's last bits then, and exponent and sign are added to those.
Infinities, NaN and what overflows don't come out of that right: pieces that hold some go NumPy's own way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..arrays import pieces
from ..checkpoint import Tensor
from ..dtypes import DType

TYPES = frozenset({"F16", "BF16", "F32"})
"""What it computes with."""

_ELEMENTS = 1 << 17
"""Of a piece of each tensor: half a megabyte in fp32."""

_MAGNITUDE, _EXPONENT = np.uint32((1 << 31) - 1), np.uint32(0xFF << 23)
_INFINITE_HALF = 0x7C00
_NEAR_OVERFLOW = (127 + 15) << 23
"""32768 in fp32: what has a larger power of two may overflow in fp16."""
_LEAST_NORMAL = np.float32(2.0**-14)
"""fp16's smallest normal number."""
_BOTH_SIGNS = np.uint32(1 << 31 | 1 << 15)
"""fp32's sign, and fp16's."""
_PLACES_AND_BIAS = np.uint32((13 << 23) + (-(127 - 14 << 10) & 0xFFFF))
"""Thirteen binary orders of magnitude, for so many places fp32 has more than fp16; and in the last sixteen bits what
takes fp32's exponent to fp16's, but for one, which the leading bit makes up, for it is counted among the places."""

Array = Any


class _Rooms(threading.local):
    """Memory for what lies between, kept by each thread: the system's for a new array costs more than the sums."""

    def __init__(self) -> None:
        self._rooms: dict[str, Array] = {}

    def of(self, name: str, kind: type[Any], count: int) -> Array:
        """An array for so many elements, with whatever lies in it."""
        room = self._rooms.get(name)
        if room is None or len(room) < count:
            room = self._rooms[name] = np.empty(count, kind)
        return room[:count]


_rooms = _Rooms()


class PlainEngine:
    """Computes in fp32, on the CPU; see :class:`~sdsurgery.merging.blending.Engine`."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """NumPy has no threads of its own here."""
        return contextlib.nullcontext()

    def in_step(self, tensors: Sequence[Tensor]) -> Iterator[Sequence[Array]]:
        """The elements of tensors of one size in fp32, as many of each at a time; each good until the next."""
        streams = [pieces(tensor.data, _ELEMENTS * tensor.dtype.itemsize) for tensor in tensors]
        rooms = [np.empty(_ELEMENTS, np.float32) for _ in tensors]
        for found in zip(*streams, strict=True):
            yield [
                widened(piece, tensor.dtype, room[: len(piece) // tensor.dtype.itemsize])
                for piece, tensor, room in zip(found, tensors, rooms, strict=True)
            ]

    def rounded(self, result: Array, target: DType, out: memoryview) -> None:
        """Round a piece of the result, which is overwritten, to the bytes of its type."""
        if target.name == "F32":
            np.copyto(np.frombuffer(out, np.float32), result)
        elif target.name == "F16":
            _to_half(result, np.frombuffer(out, np.uint16))
        else:
            _to_bfloat(result, np.frombuffer(out, np.uint16))


def widened(piece: bytes | bytearray, dtype: DType, room: Array) -> Array:
    """The elements of a piece in fp32.

    Args:
        piece: Bytes of whole elements.
        dtype: One of :data:`TYPES`.
        room: Where they are put: as many elements in fp32.
    """
    if dtype.name == "F32":
        np.copyto(room, np.frombuffer(piece, np.float32))
        return room
    bits, given = room.view(np.int32), np.frombuffer(piece, np.int16)
    if dtype.name == "BF16":
        np.copyto(bits, given)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    power = np.bitwise_and(given, np.int16(_INFINITE_HALF), out=_rooms.of("halves", np.int16, len(given)))
    if len(given) and int(power.max()) == _INFINITE_HALF:
        with np.errstate(invalid="ignore"):
            np.copyto(room, given.view(np.float16))
        return room
    np.copyto(bits, given)  # the sign comes with it, into all the upper bits
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(~(0b111 << 28)), out=bits)
    return np.multiply(room, np.float32(2.0**112), out=room)


def _to_half(values: Array, out: Array) -> None:
    bits = values.view(np.uint32)
    power = np.bitwise_and(bits, _EXPONENT, out=_rooms.of("power", np.uint32, len(bits)))
    if len(bits) and int(power.max()) >= _NEAR_OVERFLOW:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, values.astype(np.float16).view(np.uint16))
        return
    np.maximum(power.view(np.float32), _LEAST_NORMAL, out=power.view(np.float32))  # six times as fast as of integers
    exponent = np.right_shift(power, 13, out=_rooms.of("exponent", np.uint32, len(bits)))
    sign = np.right_shift(bits.view(np.int32), 31, out=_rooms.of("sign", np.int32, len(bits))).view(np.uint32)
    np.bitwise_and(sign, _BOTH_SIGNS, out=sign)
    np.add(power, _PLACES_AND_BIAS, out=power)
    np.bitwise_or(power, sign, out=power)
    np.add(values, power.view(np.float32), out=values)
    np.add(bits, exponent, out=bits)
    np.copyto(out, bits, casting="unsafe")


def _to_bfloat(values: Array, out: Array) -> None:
    bits = values.view(np.uint32)
    magnitude = np.bitwise_and(bits, _MAGNITUDE, out=_rooms.of("magnitude", np.uint32, len(bits)))
    if len(bits) and int(magnitude.max()) > int(_EXPONENT):  # NaN
        import ml_dtypes

        with np.errstate(invalid="ignore"):
            np.copyto(out, values.astype(ml_dtypes.bfloat16).view(np.uint16))
        return
    np.right_shift(bits, 16, out=magnitude)
    np.bitwise_and(magnitude, np.uint32(1), out=magnitude)
    np.add(bits, magnitude, out=bits)
    np.add(bits, np.uint32(0x7FFF), out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(out, bits, casting="unsafe")
