"""The formulas of merging, each over one tensor of every model.

A formula is given the tensors in pieces, as torch tensors of the type that is computed in. What it must know of the
whole tensors (an angle, a threshold) it reads before the first piece is computed. Products and sums are separate torch
operations, for a fused multiply-add rounds differently from machine to machine; what is summed over a tensor is summed
by NumPy in float64, in pieces of one size, whatever the number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Pieces = Callable[[], Iterator[Sequence["Tensor"]]]
"""Reads the tensors from their beginning: in each piece as many elements of every tensor, flat."""

Compute = Callable[[int, Sequence["Tensor"]], "Tensor"]
"""Computes a piece of the result: from the number of its first element, and that piece of every tensor, which it may
overwrite."""


class Formula(Protocol):
    """How one tensor of several models is computed."""

    def over(self, pieces: Pieces, /) -> Compute:
        """Get to know the whole tensors, as far as need be."""

    def bound(self, largest: Sequence[float]) -> float:
        """What no element of the result exceeds, where ``largest`` are the largest magnitudes in the tensors."""


@dataclass(frozen=True, slots=True)
class Linear:
    """``sum(w[i] * x[i])``: the weighted sum, with ``(1 - alpha, alpha)`` for two models.

    That is what A1111's checkpoint merger computes as its weighted sum, and mergekit's ``linear`` with weights that
    add up to one.
    """

    weights: tuple[float, ...]

    def over(self, _pieces: Pieces, /) -> Compute:
        """See :class:`Formula`."""

        def compute(_start: int, values: Sequence[Tensor]) -> Tensor:
            total = values[0]
            total *= self.weights[0]
            for value, weight in zip(values[1:], self.weights[1:], strict=True):
                value *= weight  # noqa: PLW2901 - in its place
                total += value
            return total

        return compute

    def bound(self, largest: Sequence[float]) -> float:
        """See :class:`Formula`."""
        return math.fsum(abs(weight) * most for weight, most in zip(self.weights, largest, strict=True))


@dataclass(frozen=True, slots=True)
class AddDifference:
    """``a + alpha * (b - c)``: what was learned from C to B, put on A; A1111's add difference."""

    alpha: float

    def over(self, _pieces: Pieces, /) -> Compute:
        """See :class:`Formula`."""

        def compute(_start: int, values: Sequence[Tensor]) -> Tensor:
            a, b, c = values
            b -= c
            b *= self.alpha
            a += b
            return a

        return compute

    def bound(self, largest: Sequence[float]) -> float:
        """See :class:`Formula`."""
        a, b, c = largest
        return a + abs(self.alpha) * (b + c)


@dataclass(frozen=True, slots=True)
class TrainDifference:
    """``a + 1.8 alpha * (b - c) * |b - a| / (|b - c| + |b - a|)``, and ``a`` where both are zero.

    supermerger's trainDifference: what was learned from C to B counts the more the further A is from B.
    """

    alpha: float

    def over(self, _pieces: Pieces, /) -> Compute:
        """See :class:`Formula`."""
        import torch

        def compute(_start: int, values: Sequence[Tensor]) -> Tensor:
            a, b, c = values
            learned, away = b - c, (b - a).abs()
            both = learned.abs() + away
            return a + torch.where(both != 0, away / both, 0.0) * learned * (1.8 * self.alpha)

        return compute

    def bound(self, largest: Sequence[float]) -> float:
        """See :class:`Formula`."""
        a, b, c = largest
        return a + 1.8 * abs(self.alpha) * (b + c)


@dataclass(frozen=True, slots=True)
class CosineAdaptive:
    """``k * a + (1 - k) * b``, where k is the larger the more alike A and B are.

    supermerger's cosineA. With c the mean of a column's cosine between A and B (a column being all that shares its
    place behind the first axis) and of the mean of those cosines over the tensor, ``k = clip((c - low) / (high - low) -
    alpha, 0, 1)``; ``low`` and ``high`` are the first and the 99th percentile of the columns' cosines in all that is
    merged.

    Attributes:
        alpha: 0 keeps A where both are alike, 1 takes B everywhere.
        low: See above.
        high: See above.
        columns: The cosine of each column.
    """

    alpha: float
    low: float
    high: float
    columns: Any

    def over(self, _pieces: Pieces, /) -> Compute:
        """See :class:`Formula`."""
        import torch

        alike = (self.columns + np.mean(self.columns)) / 2
        spread = (self.high - self.low) or 1.0  # where all columns are equally alike, there is nothing to adapt to
        kept = torch.from_numpy(np.clip((alike - self.low) / spread - abs(self.alpha), 0, 1).astype(np.float32))

        def compute(start: int, values: Sequence[Tensor]) -> Tensor:
            a, b = values
            k = kept[(start + torch.arange(len(a))) % len(kept)].to(a)
            return a * k + b * (1 - k)

        return compute

    def bound(self, largest: Sequence[float]) -> float:
        """See :class:`Formula`."""
        return max(largest)


def column_cosines(pieces: Pieces, columns: int) -> Any:
    """The cosine between two tensors along their first axis, a number a column; 0 where one is zero, or not finite."""
    sums = np.zeros((3, columns))
    start = 0
    for a, b in map(_in_float64, pieces()):
        place = (start + np.arange(len(a))) % columns
        for row, product in enumerate((a * b, a * a, b * b)):
            sums[row] += np.bincount(place, product, columns)
        start += len(a)
    dot, ours, theirs = sums
    norm = np.sqrt(ours * theirs)
    return np.divide(dot, norm, out=np.zeros(columns), where=(norm > 0) & np.isfinite(norm))


def usual_range(cosines: Sequence[Any]) -> tuple[float, float]:
    """The first and, of those from there on, the 99th percentile: what supermerger takes for the range."""
    pool = np.concatenate(cosines)
    for percent, keeps in ((1, np.greater_equal), (99, np.less_equal)):
        pool = pool[keeps(pool, np.percentile(pool, percent, method="midpoint"))]
    return float(pool.min()), float(pool.max())


@dataclass(frozen=True, slots=True)
class Slerp:
    """``sin((1 - t) o) / sin(o) * a + sin(t o) / sin(o) * b``, where o is the angle between the flat tensors.

    Spherical interpolation (Shoemake 1985, "Animating rotation with quaternion curves"). Where they are nearly
    parallel, beyond a cosine of 0.9995 as in mergekit, or one of them is zero, it is the weighted sum.
    """

    t: float

    def over(self, pieces: Pieces, /) -> Compute:
        """See :class:`Formula`."""
        return Linear(self._coefficients(pieces)).over(pieces)

    def _coefficients(self, pieces: Pieces) -> tuple[float, float]:
        sums = [0.0, 0.0, 0.0]
        for a, b in map(_in_float64, pieces()):
            for place, (one, other) in enumerate(((a, b), (a, a), (b, b))):
                sums[place] += float((one * other).sum())
        dot, ours, theirs = sums
        norm = math.sqrt(ours * theirs)
        cosine = dot / norm if norm else 1.0
        if not abs(cosine) <= _NEARLY_PARALLEL:
            return 1 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)

    def bound(self, largest: Sequence[float]) -> float:
        """See :class:`Formula`."""
        return sum(largest) / math.sqrt(1 - _NEARLY_PARALLEL**2) * max(1.0, abs(self.t), abs(1 - self.t))


_NEARLY_PARALLEL = 0.9995


def _in_float64(values: Sequence[Tensor]) -> list[Any]:
    return [value.cpu().numpy().astype(np.float64) for value in values]


@dataclass(frozen=True, slots=True)
class Ties:
    """``a + scale * mean(d[i])`` over the differences d[i] = x[i] - a that are kept and have the elected sign.

    TIES-Merging (Yadav et al. 2023, arXiv 2306.01708). Trim: of each difference only the share ``density`` of its
    elements that are largest in magnitude is kept, others count as zero. Elect: an element's sign is that of the
    weighted sum of what was kept. Merge: the weighted mean of those that have it. Trimmed tensor by tensor, as mergekit
    does, and not over the whole model.
    """

    weights: tuple[float, ...]
    density: float
    scale: float

    def over(self, pieces: Pieces, /) -> Compute:
        """See :class:`Formula`."""
        import torch

        thresholds = _thresholds(pieces, self.density)

        def compute(_start: int, values: Sequence[Tensor]) -> Tensor:
            base, *others = values
            kept = []
            for other, weight, threshold in zip(others, self.weights, thresholds, strict=True):
                difference = other - base
                trimmed = difference.abs().float() < threshold
                kept.append((_zero_where(trimmed, difference), weight))
            elected = torch.sign(_sum([difference * weight for difference, weight in kept]))
            total, shares = torch.zeros_like(base), torch.zeros_like(base)
            for difference, weight in kept:
                differs = ~(difference * elected > 0)  # in sign; zeros and NaN agree with nobody
                total += _zero_where(differs, difference * weight)
                shares += _zero_where(differs, torch.full_like(base, weight))
            return base + _zero_where(shares == 0, total / shares) * self.scale

        return compute

    def bound(self, largest: Sequence[float]) -> float:
        """See :class:`Formula`."""
        base, *others = largest
        return base + abs(self.scale) * (base + max(others))


def _zero_where(mask: Tensor, values: Tensor) -> Tensor:
    """The values, with zeros where the mask holds, whatever stands there.

    By their bits: ``masked_fill`` and ``where`` take five times as long for pieces of this size.
    """
    import torch

    whole = torch.int64 if values.dtype == torch.float64 else torch.int32
    kept = mask.to(whole) - 1  # all bits where it doesn't hold
    return (values.view(whole) & kept).view(values.dtype)


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _thresholds(pieces: Pieces, density: float) -> list[float]:
    """Of each difference the magnitude from which on the largest share of its elements lies; more where some are equal.

    Found in two readings of all tensors by the bits of the magnitudes in float32, which order as they do: the upper 16
    bits first, then the lower 16 of those that share the upper ones of the magnitude that is looked for.
    """
    upper = _counted(pieces, lambda _place, bits: bits >> _HALF)
    kept = int(density * int(upper[0].sum())) if upper else 0
    if not kept:
        return [math.inf] * len(upper)
    found = [_from_above(counts, kept) for counts in upper]
    lower = _counted(pieces, lambda place, bits: bits[bits >> _HALF == found[place][0]] & ((1 << _HALF) - 1))
    bits = [high << _HALF | _from_above(counts, rest)[0] for (high, rest), counts in zip(found, lower, strict=True)]
    return [float(value) for value in np.array(bits, np.int32).view(np.float32)]


_HALF = 16


def _counted(pieces: Pieces, chosen: Callable[[int, Tensor], Tensor]) -> list[Any]:
    """How often each number comes among what is chosen of the bits of each difference's magnitudes."""
    import torch

    counts: list[Tensor] = []
    for base, *others in pieces():
        counts = counts or [torch.zeros(1 << _HALF, dtype=torch.int64) for _ in others]
        for place, other in enumerate(others):
            bits = (other - base).abs().to("cpu", torch.float32).view(torch.int32)
            counts[place] += torch.bincount(chosen(place, bits), minlength=1 << _HALF)
    return [each.numpy() for each in counts]


def _from_above(counts: Any, kept: int) -> tuple[int, int]:
    """The number that the ``kept``-th largest has, and how many of that number are among those kept."""
    above = np.cumsum(counts[::-1])[::-1]
    chosen = int(np.flatnonzero(above >= kept)[-1])
    return chosen, kept - int(above[chosen] - counts[chosen])


@dataclass(frozen=True, slots=True)
class Dare:
    """``a + scale * sum(w[i] * m[i] * d[i] / density)``, where m[i] keeps a random share ``density`` of all elements.

    Drop and rescale (Yu et al. 2023, arXiv 2311.03099), linear. What is dropped is told by the seed, the tensor's name
    and the number of the model alone: not by the machine, nor by how the work is divided.
    """

    weights: tuple[float, ...]
    density: float
    scale: float
    seed: int
    name: str

    def over(self, _pieces: Pieces, /) -> Compute:
        """See :class:`Formula`."""
        import torch

        def compute(start: int, values: Sequence[Tensor]) -> Tensor:
            base, *others = values
            total = torch.zeros_like(base)
            for place, (other, weight) in enumerate(zip(others, self.weights, strict=True)):
                keeps = torch.from_numpy(self.keeps(place, start, len(base))).to(base.device)
                total += torch.where(keeps, other - base, 0.0) * (weight / self.density)
            return base + total * self.scale

        return compute

    def keeps(self, place: int, start: int, count: int) -> Any:
        """Which elements of a model's difference are kept: random 32-bit numbers of Philox, four to a counter."""
        key = hashlib.blake2b(f"{self.seed}/{place}/{self.name}".encode(), digest_size=16).digest()
        first, skipped = divmod(start, _NUMBERS)
        stream = np.random.Philox(key=int.from_bytes(key, "little"), counter=first)
        raw = stream.random_raw(-(-(skipped + count) // 2)).view(np.uint32)
        kept: Any = raw[skipped : skipped + count] < self.density * 2.0**32
        return kept

    def bound(self, largest: Sequence[float]) -> float:
        """See :class:`Formula`."""
        base, *others = largest
        differences = math.fsum(abs(w) * (base + most) for w, most in zip(self.weights, others, strict=True))
        return base + abs(self.scale) * differences / self.density


_NUMBERS = 8
"""32-bit numbers that one count of Philox gives: four of 64 bits."""
