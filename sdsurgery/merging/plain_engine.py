"""Weighted sums with NumPy alone, for importing torch takes longer than computing one.

NumPy converts halves in software, element by element. Here they are converted by their bits, many at a time: a fp16
number's bits, moved to where fp32 has them, are the number times 2**-112 (Fabian Giesen's notes on half to float); and
adding a power of two that is 2**13 times as large as a number's leading bit rounds it to fp16's places, to nearest and
ties to even, as the hardware adds. Infinities and NaN don't come out of that right: pieces that hold some go NumPy's
own way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..arrays import pieces
from ..checkpoint import Tensor
from ..dtypes import DType

TYPES = frozenset({"F16", "BF16", "F32"})
"""What it computes with."""

_ELEMENTS = 1 << 16
"""Of a piece of each tensor: a quarter of a megabyte in fp32."""

_SIGN, _MAGNITUDE, _EXPONENT = np.uint32(1 << 31), np.uint32((1 << 31) - 1), np.uint32(0xFF << 23)
_INFINITE_HALF = 0x7C00
_OVERFLOWS = 0x477FF000
"""65520 in fp32, from where on fp16 has infinity."""
_LEAST_NORMAL = np.uint32((127 - 14) << 23)
"""fp16's smallest normal number, in fp32."""
_PLACES = np.uint32(13 << 23)
"""Thirteen binary orders of magnitude: so many places fp32 has more than fp16."""

Array = Any


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
    if len(given) and int(np.max(given & np.int16(_INFINITE_HALF))) == _INFINITE_HALF:
        with np.errstate(invalid="ignore"):
            np.copyto(room, given.view(np.float16))
        return room
    np.copyto(bits, given)  # the sign comes with it, into all the upper bits
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(~(0b111 << 28)), out=bits)
    return np.multiply(room, np.float32(2.0**112), out=room)


def _to_half(values: Array, out: Array) -> None:
    bits = values.view(np.uint32)
    sign = bits & _SIGN
    np.bitwise_and(bits, _MAGNITUDE, out=bits)
    if len(bits) and int(bits.max()) >= _OVERFLOWS:
        np.bitwise_or(bits, sign, out=bits)
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, values.astype(np.float16).view(np.uint16))
        return
    power = bits & _EXPONENT
    np.maximum(power, _LEAST_NORMAL, out=power)
    np.add(power, _PLACES, out=power)
    np.add(values, power.view(np.float32), out=values)
    np.subtract(bits, power, out=bits)  # the leading places as a whole number, the implicit one among them
    np.right_shift(power, 13, out=power)
    np.add(bits, power, out=bits)
    np.subtract(bits, np.uint32((127 - 14 + 13) << 10), out=bits)
    np.right_shift(sign, 16, out=sign)
    np.bitwise_or(bits, sign, out=bits)
    np.copyto(out, bits, casting="unsafe")


def _to_bfloat(values: Array, out: Array) -> None:
    bits = values.view(np.uint32)
    magnitude = bits & _MAGNITUDE
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
