"""One tensor computed from the tensors of several models, piece by piece, when its bytes are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from ..checkpoint import Tensor
from ..dtypes import DType
from ..sources import Buffer, Computed, joined, part_of
from .methods import Formula

_YIELDED = 1 << 20
"""Elements of the result that are handed on at a time."""


class Engine(Protocol):
    """What computes: torch (``torch_engine.py``), or for sums NumPy (``plain_engine.py``)."""

    def alone(self) -> AbstractContextManager[None]:
        """Have it use the calling thread alone."""

    def in_step(self, tensors: Sequence[Tensor], /) -> Iterator[Sequence[Any]]:
        """The elements of tensors of one size in the type that is computed in, as many of each at a time.

        They may be overwritten, and each is only good until the next is asked for.
        """

    def rounded(self, result: Any, target: DType, out: memoryview, /) -> None:
        """Round a piece of the result, which may be overwritten, to the bytes of its type, to nearest."""


def blended(
    tensors: Sequence[Tensor], target: DType, formula: Formula, engine: Engine, *, channels: int | None = None
) -> Tensor:
    """A tensor computed from others.

    Args:
        tensors: One of each model, all of as many elements; what they hold is read anew each time.
        target: The type of the result, rounded to once, to nearest.
        formula: How it is computed.
        engine: What computes.
        channels: Of convolutions, ``[outputs, inputs, height, width]``, the number of input channels that are computed;
            the first tensor keeps its further ones. So merge tools treat models with more inputs than others, such as
            inpainting's with mask and masked picture.
    """
    whole = tensors[0]
    given = first_inputs(tensors, channels)

    def produce(_size: int) -> Iterator[Buffer]:
        with engine.alone():
            compute = formula.over(lambda: engine.in_step(given))
            start = filled = 0
            room = memoryview(b"")
            for values in engine.in_step(given):
                if not filled:
                    room = np.empty(target.nbytes((min(given[0].numel - start, _YIELDED),)), np.uint8).data
                with np.errstate(all="ignore"):  # NaN, Inf and overflow were told of, or refused
                    result = compute(start, values)
                nbytes = target.nbytes((len(result),))
                engine.rounded(result, target, room[filled : filled + nbytes])
                start, filled = start + len(values[0]), filled + nbytes
                if filled == len(room):
                    yield room
                    filled = 0

    files = tuple(dict.fromkeys(file for tensor in tensors for file in tensor.data.files))
    made = Tensor(target, given[0].shape, Computed(target.nbytes(given[0].shape), produce, files))
    if channels is None:
        return made

    def widened(_size: int) -> Iterator[Buffer]:
        import torch

        merged = made.torch()
        kept = whole.torch()[:, channels:].to(merged.dtype)
        yield memoryview(torch.cat([merged, kept], 1).contiguous().flatten().view(torch.uint8).numpy())

    return Tensor(target, whole.shape, Computed(target.nbytes(whole.shape), widened, files))


def first_inputs(tensors: Sequence[Tensor], channels: int | None) -> list[Tensor]:
    """Convolutions' weights of their first input channels; all there is where ``channels`` is ``None``."""
    if channels is None:
        return list(tensors)
    return [tensor if tensor.shape[1] == channels else _cut(tensor, channels) for tensor in tensors]


def _cut(tensor: Tensor, channels: int) -> Tensor:
    outputs, inputs, *size = tensor.shape
    row = tensor.nbytes // outputs
    parts = joined(part_of(tensor.data, place * row, row // inputs * channels) for place in range(outputs))
    return Tensor(tensor.dtype, (outputs, channels, *size), parts)
