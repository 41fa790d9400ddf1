"""What the values of a tensor are like: NaN, infinities, what fp16 can't hold, denormals, constants.

Floats are looked at by their bits, which order as magnitudes do once the sign is off: one pass tells the largest, and
only a piece that holds something special is looked at again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .arrays import arrays_of
from .checkpoint import Tensor

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Values:
    """What was counted.

    Attributes:
        numel: Elements.
        nan: That are NaN.
        infinite: That are infinite.
        overflow: Finite ones that become infinite in fp16, which rounds from 65520 on.
        denormal: Below the smallest normal number of the type, but not zero.
        constant: What every element is, where all are the same.
    """

    numel: int
    nan: int
    infinite: int
    overflow: int
    denormal: int
    constant: float | None


@dataclass(frozen=True, slots=True)
class _Bits:
    """How a float type's bits are laid out, without the sign.

    Attributes:
        kind: The unsigned integer of its width.
        mask: All bits but the sign.
        infinity: Infinity's bits, beyond which all is NaN; for a type without one, the largest finite number's.
        normal: The smallest normal number's.
        overflow: The smallest number that fp16 rounds to infinity; ``None`` where the type has no such.
        has_infinity: Whether there is an infinity.
    """

    kind: str
    mask: int
    infinity: int
    normal: int
    overflow: int | None = None
    has_infinity: bool = True


_LAYOUTS = {
    "F64": _Bits("u8", (1 << 63) - 1, 0x7FF << 52, 1 << 52, 0x40EFFE0000000000),
    "F32": _Bits("u4", (1 << 31) - 1, 0xFF << 23, 1 << 23, 0x477FF000),
    "BF16": _Bits("u2", 0x7FFF, 0x7F80, 0x80, 0x4780),
    "F16": _Bits("u2", 0x7FFF, 0x7C00, 0x400),
    "F8_E5M2": _Bits("u1", 0x7F, 0x7C, 0x04),
    "F8_E4M3": _Bits("u1", 0x7F, 0x7E, 0x08, has_infinity=False),
}
"""65520 = 0x1.ffep15 is half way between fp16's largest number and what would be the next: ties go to even, infinity.
The first bfloat16 from there on is 65536."""


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at."""
    return tensor.dtype.numpy is not None


def scan(tensor: Tensor, advance: Callable[[int], None] = lambda _count: None) -> Values:
    """Look at every element, in bounded memory.

    Args:
        tensor: A tensor whose values can be looked at.
        advance: Told of the bytes that are done.
    """
    bits = _LAYOUTS.get(tensor.dtype.name)
    totals = [0, 0, 0, 0]
    first: Array | None = None
    same = True
    for (array,) in arrays_of((tensor,)):
        first = array[:1].copy() if first is None else first
        same = same and _is_constant(array, first)
        counts = _count_bits(array.view(bits.kind), bits) if bits else _count(array)
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        advance(array.nbytes)
    constant = _number(first) if same and first is not None else None
    nan, infinite, overflow, denormal = totals
    return Values(tensor.numel, nan, infinite, overflow, denormal, constant)


def _number(first: Array) -> float | None:
    """An element as a number, if it is a real one; a NaN that signals is no reason for NumPy to speak up."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        return float(first.astype("f8")[0]) if first.dtype.kind != "c" else None


def _is_constant(array: Array, first: Array) -> bool:
    """Whether all elements are that one, to the bit."""
    if array[-1:].tobytes() != first.tobytes():
        return False
    one, width = first.tobytes(), first.itemsize
    return array.tobytes() == one * (array.nbytes // width)


def _count_bits(array: Array, bits: _Bits) -> tuple[int, int, int, int]:
    """NaN, infinite, overflowing and denormal elements of a type whose bits are known."""
    import numpy as np

    kind = array.dtype.type
    magnitude = np.bitwise_and(array, kind(bits.mask))
    largest = int(magnitude.max(initial=0))
    nan = infinite = overflow = 0
    if largest > bits.infinity - bits.has_infinity:
        nan = int(np.count_nonzero(magnitude > bits.infinity))
        infinite = int(np.count_nonzero(magnitude == bits.infinity)) if bits.has_infinity else 0
    if bits.overflow is not None and largest >= bits.overflow:
        overflow = int(np.count_nonzero((magnitude >= bits.overflow) & (magnitude < bits.infinity)))
    magnitude -= kind(1)  # zero wraps around to the largest number there is
    return nan, infinite, overflow, int(np.count_nonzero(magnitude < kind(bits.normal - 1)))


def _count(array: Array) -> tuple[int, int, int, int]:
    """The same of integers, booleans, complex numbers and rare float types, whose denormals nobody counts."""
    import numpy as np

    if array.dtype.kind in "iub":
        return 0, 0, 0, 0
    with np.errstate(over="ignore", invalid="ignore"):
        wide = array if array.dtype.kind == "c" else array.astype(np.float32)
    return int(np.count_nonzero(np.isnan(wide))), int(np.count_nonzero(np.isinf(wide))), 0, 0


def largest(tensor: Tensor) -> float:
    """The largest magnitude of a float tensor's elements; NaN if one of them is NaN."""
    import numpy as np

    bits = _LAYOUTS.get(tensor.dtype.name)
    most = 0.0
    with np.errstate(invalid="ignore"):
        for (array,) in arrays_of((tensor,)):
            if bits:
                unsigned = array.view(bits.kind)
                magnitude = float(np.bitwise_and(unsigned, unsigned.dtype.type(bits.mask)).max().view(array.dtype))
            else:
                magnitude = float(np.abs(array.astype(np.float32)).max())
            if math.isnan(magnitude):
                return math.nan
            most = max(most, magnitude)
    return most
