"""The best product of two small matrices for a difference of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..checkpoint import Tensor
from ..merging.torch_engine import TorchEngine, one_thread

_WORKERS = 2
"""Each of them holds a weight in float64, and a square matrix of its shorter side."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A weight whose difference is sought.

    Attributes:
        tuned: The weight.
        base: As it was.
        rank: The largest rank.
        energy: The share of the squared singular values that is enough, if less than the rank is.
    """

    tuned: Tensor
    base: Tensor
    rank: int
    energy: float | None


@dataclass(frozen=True, slots=True)
class Extracted:
    """A difference, as near as the rank allows.

    Attributes:
        up: ``[rows, rank]``.
        down: ``[rank, columns]``.
        kept: The squared singular values that it holds, added up.
        total: All of them: the squares of the difference's elements. NaN or infinite if a weight holds such.
    """

    up: torch.Tensor
    down: torch.Tensor
    kept: float
    total: float

    @property
    def rank(self) -> int:
        """Its rank; 0 if there is no difference, or none that is finite."""
        return len(self.down)


def extracted(wanted: Iterable[Wanted], engine: TorchEngine) -> Iterator[Extracted]:
    """The differences of weights, in order, two at a time; the result doesn't depend on the number of threads."""
    with one_thread(), ThreadPoolExecutor(_WORKERS) as pool:
        yield from pool.map(lambda each: _extract(each, engine), wanted)


def _extract(wanted: Wanted, engine: TorchEngine) -> Extracted:
    tuned, base = (engine.whole(tensor).double() for tensor in (wanted.tuned, wanted.base))
    difference = tuned.sub_(base).reshape(wanted.tuned.shape[0], -1)
    total = float(difference.square().sum())
    if not total or not math.isfinite(total):
        return Extracted(torch.empty(len(difference), 0), torch.empty(0, difference.shape[1]), 0.0, total)
    # What the rows have in common, or the columns, whichever are fewer.
    tall = difference.shape[0] >= difference.shape[1]
    matrix = difference if tall else difference.T
    left, vectors, squares = _principal(matrix, wanted.rank)
    count = _enough(squares, total, wanted.energy)
    left, vectors, squares = left[:, :count], vectors[:, :count], squares[:count]
    up, down = (left, vectors.T) if tall else (vectors, left.T)
    return Extracted(up.contiguous().cpu(), down.contiguous().cpu(), float(squares.sum()), total)


def _principal(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of a matrix, squared, and what belongs to them, each with the root of its value.

    The right vectors are eigenvectors of ``A^T A``, which in float64 is exacter than a decomposition in float32 for
    every value above 1e-9 of the largest, and several times faster than one in float64. A vector's largest element is
    positive: its sign is nobody's otherwise.
    """
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    most = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * most.sign()
    left = matrix @ vectors
    values = torch.linalg.vector_norm(left, dim=0)
    root = values.sqrt()
    return left / torch.where(root > 0, root, 1.0), vectors * root, values.square()


def _enough(squares: torch.Tensor, total: float, energy: float | None) -> int:
    """How many of the squared singular values make up that share of all; all that there are unless one is asked for."""
    if energy is None:
        return len(squares)
    reached = (squares.cumsum(0) >= energy * total).nonzero()
    return int(reached[0]) + 1 if len(reached) else len(squares)
