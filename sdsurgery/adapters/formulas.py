"""What the matrices of a LoRA come to: the difference that they add to a weight.

A weight is a matrix here, its rows the outputs; a convolution's columns are its inputs with their kernels. Each formula
is checked by shapes alone first, and then computes the difference in blocks of rows, so that no more than a block and
the small matrices are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Matrices = Mapping[str, "Tensor"]


class Delta(Protocol):
    """The difference that a LoRA's matrices make, before any scale."""

    def add_to(self, block: Tensor, start: int, factor: float, /) -> None:
        """Add it times a factor to rows of a weight, of which the first is ``start``."""

    def bound(self) -> float:
        """What no element's magnitude exceeds; NaN or infinite if a matrix holds such."""


class ShapeError(ValueError):
    """The matrices don't fit each other."""


def _need(*, fits: bool) -> None:
    if not fits:
        raise ShapeError


def extent(kind: str, shapes: Shapes) -> tuple[int, int]:
    """Rows and columns of the difference.

    Args:
        kind: See :class:`~sdsurgery.adapters.reading.Group`.
        shapes: Of the matrices.

    Raises:
        ShapeError: If they don't fit each other.
    """
    _need(fits=all(size for shape in shapes.values() for size in shape))
    try:
        return _EXTENTS[kind](shapes)
    except (IndexError, ValueError) as error:  # a matrix of too few dimensions
        raise ShapeError from error


def _lora_extent(shapes: Shapes) -> tuple[int, int]:
    up, down, mid = shapes["up"], shapes["down"], shapes.get("mid")
    if mid is None:
        _need(fits=math.prod(up[1:]) == down[0])
        return up[0], math.prod(down[1:])
    _need(fits=math.prod(up[1:]) == mid[0] and down[0] == mid[1])
    return up[0], math.prod(down[1:]) * math.prod(mid[2:])


def _loha_extent(shapes: Shapes) -> tuple[int, int]:
    found = set()
    for half in "12":
        a, b, core = shapes[f"hada_w{half}_a"], shapes[f"hada_w{half}_b"], shapes.get(f"hada_t{half}")
        if core is None:
            _need(fits=a[1] == b[0] and len(a) == 2)
            found.add((a[0], math.prod(b[1:])))
        else:
            _need(fits=(a[0], b[0]) == core[:2] and len(a) == len(b) == 2)
            found.add((a[1], b[1] * math.prod(core[2:])))
    _need(fits=len(found) == 1)
    return found.pop()


def _lokr_extent(shapes: Shapes) -> tuple[int, int]:
    small = shapes.get("lokr_w1")
    if small is None:
        a, b = shapes["lokr_w1_a"], shapes["lokr_w1_b"]
        _need(fits=a[1] == b[0] and len(a) == len(b) == 2)
        small = (a[0], b[1])
    large, core = shapes.get("lokr_w2"), shapes.get("lokr_t2")
    if large is None:
        a, b = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
        ranks = {shape[0] for part in ("lokr_w1_b", "lokr_w2_b") if (shape := shapes.get(part))}
        _need(fits=len(ranks) == 1 and len(a) == 2)
        if core is None:
            _need(fits=a[1] == b[0])
            large = (a[0], *b[1:])
        else:
            _need(fits=(a[0], b[0]) == core[:2] and len(b) == 2)
            large = (a[1], b[1], *core[2:])
    _need(fits=len(small) == 2 and len(large) > 1)
    return small[0] * large[0], small[1] * math.prod(large[1:])


def _whole_extent(part: str) -> Callable[[Shapes], tuple[int, int]]:
    def found(shapes: Shapes) -> tuple[int, int]:
        rows, *rest = shapes[part]
        return rows, math.prod(rest)

    return found


_EXTENTS: Mapping[str, Callable[[Shapes], tuple[int, int]]] = {
    "lora": _lora_extent,
    "loha": _loha_extent,
    "lokr": _lokr_extent,
    "diff": _whole_extent("diff"),
}


def delta(kind: str, matrices: Matrices) -> Delta:
    """The difference that matrices make, all of one type, whose shapes were checked."""
    return _DELTAS[kind](matrices)


def _flat(matrix: Tensor) -> Tensor:
    """A matrix of all that lies behind the first axis."""
    return matrix.reshape(matrix.shape[0], -1)


@dataclass(frozen=True, slots=True)
class _Product:
    """``left @ right``."""

    left: Tensor
    right: Tensor

    def rows(self, start: int, count: int) -> Tensor:
        return self.left[start : start + count] @ self.right

    def add_to(self, block: Tensor, start: int, factor: float, /) -> None:
        """See :class:`Delta`."""
        block.addmm_(self.left[start : start + len(block)], self.right, alpha=factor)

    def bound(self) -> float:
        """By Cauchy and Schwarz: the longest row times the longest column."""
        return float(self.left.norm(dim=1).max() * self.right.norm(dim=0).max())


def _lora(matrices: Matrices) -> Delta:
    """``up @ down``; with a core, ``W[i, j, ...] = sum of mid[m, n, ...] up[i, m] down[n, j]``.

    As kohya's ``networks/lora.py`` trains it, LyCORIS' LoCon, with and without Tucker decomposition, and A1111 and PEFT
    compute it; a convolution's matrices are flattened.
    """
    up, down, mid = _flat(matrices["up"]), _flat(matrices["down"]), matrices.get("mid")
    return _Product(up, down if mid is None else _tucker_right(mid, down))


def _tucker_right(core: Tensor, right: Tensor) -> Tensor:
    """The core times the matrix of the inputs: what is left to multiply with the outputs'."""
    import torch

    return _flat(torch.einsum("mn...,nj->mj...", core, right))


@dataclass(frozen=True, slots=True)
class _Hadamard:
    """The element-wise product of two matrix products: LyCORIS' LoHa, ``(w1_a @ w1_b) * (w2_a @ w2_b)``.

    With cores, each half is ``W[p, r, ...] = sum of t[i, j, ...] a[i, p] b[j, r]``.
    """

    one: _Product
    other: _Product

    def add_to(self, block: Tensor, start: int, factor: float, /) -> None:
        """See :class:`Delta`."""
        found = self.one.rows(start, len(block)).mul_(self.other.rows(start, len(block)))
        block.add_(found, alpha=factor)

    def bound(self) -> float:
        """See :class:`Delta`."""
        return self.one.bound() * self.other.bound()


def _loha(matrices: Matrices) -> Delta:
    halves = []
    for half in "12":
        a, b, core = matrices[f"hada_w{half}_a"], matrices[f"hada_w{half}_b"], matrices.get(f"hada_t{half}")
        halves.append(_Product(a, _flat(b)) if core is None else _Product(a.T, _tucker_right(core, b)))
    return _Hadamard(*halves)


@dataclass(frozen=True, slots=True)
class _Kronecker:
    """LyCORIS' LoKr, ``kron(w1, w2)``, where the kernel of a convolution belongs to w2 alone."""

    small: Tensor
    large: Tensor

    def add_to(self, block: Tensor, start: int, factor: float, /) -> None:
        """See :class:`Delta`."""
        import torch

        rows = torch.arange(start, start + len(block), device=block.device)
        outer, inner = self.small[rows // len(self.large)], self.large[rows % len(self.large)]
        block.add_((outer[:, :, None] * inner[:, None, :]).reshape(block.shape), alpha=factor)

    def bound(self) -> float:
        """See :class:`Delta`."""
        return float(self.small.abs().max() * self.large.abs().max())


def _lokr(matrices: Matrices) -> Delta:
    small, large, core = matrices.get("lokr_w1"), matrices.get("lokr_w2"), matrices.get("lokr_t2")
    if small is None:
        small = matrices["lokr_w1_a"] @ matrices["lokr_w1_b"]
    if large is None:
        a, b = matrices["lokr_w2_a"], matrices["lokr_w2_b"]
        large = a @ _flat(b) if core is None else a.T @ _tucker_right(core, b)
    return _Kronecker(small, _flat(large))


@dataclass(frozen=True, slots=True)
class _Whole:
    """A difference as it is: what LyCORIS' "full" keeps, and of norms and biases."""

    values: Tensor

    def add_to(self, block: Tensor, start: int, factor: float, /) -> None:
        """See :class:`Delta`."""
        block.add_(self.values[start : start + len(block)], alpha=factor)

    def bound(self) -> float:
        """See :class:`Delta`."""
        return float(self.values.abs().max())


_DELTAS: Mapping[str, Callable[[Matrices], Delta]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "diff": lambda matrices: _Whole(_flat(matrices["diff"])),
}


def decomposed(weight: Tensor, change: Delta, factor: float, magnitude: Tensor, *, by_input: int | None) -> Tensor:
    """What DoRA makes of a weight: ``m * (W + d) / |W + d|``, as PEFT and LyCORIS compute it; zeros stay zeros.

    Args:
        weight: The weight.
        change: The difference.
        factor: Its alpha / rank; the user's scale is none of its.
        magnitude: ``m``, one number an output or an input.
        by_input: How many columns an input has, where the norms are those of inputs; ``None`` for outputs.
    """
    import torch

    moved = weight.clone()
    change.add_to(moved, 0, factor)
    if by_input is None:
        lengths = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        return moved.mul_(magnitude.reshape(-1, 1) / torch.where(lengths > 0, lengths, 1.0))
    inputs = moved.reshape(len(moved), -1, by_input)
    lengths = torch.linalg.vector_norm(inputs, dim=(0, 2), keepdim=True)
    return inputs.mul_(magnitude.reshape(1, -1, 1) / torch.where(lengths > 0, lengths, 1.0)).reshape(weight.shape)
