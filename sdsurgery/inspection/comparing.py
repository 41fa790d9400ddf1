"""Two tensors, compared by their values: equal to the bit, equal but for the dtype, rounded, or changed by how much."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..arrays import arrays_of, pieces
from ..checkpoint import Tensor
from ..dtypes import DType
from ..sources import Data

Kind = Literal["equal", "dtype", "rounded", "changed", "shape"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """How far two tensors are apart, over the elements that are finite in both.

    Attributes:
        max_abs: The largest absolute difference.
        mean_abs: The mean absolute difference.
        relative_l2: The norm of the difference over the norm of the first; infinite where that is zero.
        cosine: Of the angle between the two; NaN where one is zero.
        share: Of elements that differ.
        special: Elements that are NaN or infinite in one of the two.
    """

    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float
    share: float
    special: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What became of a tensor.

    Attributes:
        kind: ``equal`` to the bit; ``dtype``: the same values in another type; ``rounded``: one is the other in a
            narrower type; ``changed``; ``shape``: nothing to compare.
        statistics: Where the values differ and can be computed with.
    """

    kind: Kind
    statistics: Statistics | None = None


def compare(one: Tensor, other: Tensor, advance: Callable[[int], None] = lambda _count: None) -> Comparison:
    """Compare two tensors; equal ones are read once, and different ones from where they begin a second time.

    Args:
        one: The first.
        other: The second.
        advance: Told of the bytes of the first that are done.
    """
    if one.shape != other.shape:
        advance(one.nbytes)
        return Comparison("shape")
    if one.dtype is other.dtype:
        if one.data == other.data or _same_bytes(one.data, other.data):
            advance(one.nbytes)
            return Comparison("equal")
        kind: Kind = "changed"
    else:
        kind = _across_types(one, other)
    advance(one.nbytes)
    if kind == "dtype" or not _computable(one.dtype) or not _computable(other.dtype):
        return Comparison(kind)
    return Comparison(kind, statistics(one, other))


def _same_bytes(one: Data, other: Data) -> bool:
    """Whether the bytes are equal; reads no further than to the first difference."""
    pairs = zip(pieces(one), pieces(other), strict=True)
    return all(left == right for left, right in pairs)


def _computable(dtype: DType) -> bool:
    return dtype.numpy is not None and dtype.kind != "complex"


def _across_types(one: Tensor, other: Tensor) -> Kind:
    """Whether the wider holds the narrower's values, or rounds to them."""
    if not (_computable(one.dtype) and _computable(other.dtype)):
        return "changed"
    import numpy as np

    wide, narrow = (one, other) if one.dtype.itemsize >= other.dtype.itemsize else (other, one)
    exact = True
    for high, low in arrays_of((wide, narrow)):
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = high.astype(low.dtype)
            if rounded.tobytes() != low.tobytes() and not np.array_equal(rounded, low, equal_nan=low.dtype.kind == "f"):
                return "changed"
            exact = exact and np.array_equal(low.astype(high.dtype), high, equal_nan=high.dtype.kind == "f")
    return "dtype" if exact else "rounded"


def statistics(one: Tensor, other: Tensor) -> Statistics:
    """How far two tensors of one shape are apart."""
    import numpy as np

    largest = total = squares = ours = theirs = dot = 0.0
    differing = special = 0
    for left, right in arrays_of((one, other)):
        differing += int(np.count_nonzero(left != right)) if left.dtype == right.dtype else 0
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = (_as_float(array) for array in (left, right))
            if left.dtype != right.dtype:
                differing += int(np.count_nonzero(a != b))
            gap = a - b
            high = float(np.abs(gap).max(initial=0.0))
            if not math.isfinite(high):
                sound = np.isfinite(a) & np.isfinite(b)
                special += int(a.size - np.count_nonzero(sound))
                a, b = a[sound], b[sound]
                gap = a - b
                high = float(np.abs(gap).max(initial=0.0))
            largest = max(largest, high)
            total += float(np.abs(gap).sum(dtype=np.float64))
            squares += float(np.dot(gap, gap))
            ours += float(np.dot(a, a))
            theirs += float(np.dot(b, b))
            dot += float(np.dot(a, b))
    count = max(1, one.numel - special)
    return Statistics(
        max_abs=largest,
        mean_abs=total / count,
        relative_l2=math.sqrt(squares / ours) if ours else (math.inf if squares else 0.0),
        cosine=dot / math.sqrt(ours * theirs) if ours and theirs else math.nan,
        share=differing / max(1, one.numel),
        special=special,
    )


def _as_float(array: Any) -> Any:
    """In float32, which holds every narrower float exactly; in float64 what that doesn't hold."""
    import numpy as np

    return array.astype(np.float32 if array.dtype.itemsize <= 2 or array.dtype == np.float32 else np.float64)
