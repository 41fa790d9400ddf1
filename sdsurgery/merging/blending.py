"""One tensor computed from the tensors of several models, piece by piece, when its bytes are asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..arrays import pieces
from ..checkpoint import Tensor
from ..dtypes import DType
from ..sources import Buffer, Computed, joined, part_of
from .methods import Formula

ComputeType = Literal["fp32", "fp64"]
Device = Literal["cpu", "cuda"]

_ELEMENTS = 1 << 17
"""Of a piece of each tensor: half a megabyte in fp32, so that a core's cache holds what is computed of it."""
_YIELDED = 1 << 20
"""Elements of the result that are handed on at a time."""

_COMPUTE_TYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Engine:
    """What computes.

    Attributes:
        compute: The type that is computed in; results are rounded to their own type once.
        device: Where.
    """

    compute: ComputeType = "fp32"
    device: Device = "cpu"

    def in_step(self, tensors: Sequence[Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        """The elements of tensors of one size in the type that is computed in, as many of each at a time."""
        kinds = [torch_type(tensor.dtype) for tensor in tensors]
        streams = [pieces(tensor.data, _ELEMENTS * tensor.dtype.itemsize) for tensor in tensors]
        for found in zip(*streams, strict=True):
            yield [self.given(piece, kind) for piece, kind in zip(found, kinds, strict=True)]

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """All of a tensor in the type that is computed in."""
        found: torch.Tensor = tensor.torch()
        return found.to(self.device, _COMPUTE_TYPES[self.compute])

    def given(self, piece: bytes | bytearray, kind: torch.dtype) -> torch.Tensor:
        """The elements in a piece of a tensor, in the type that is computed in."""
        whole = piece if isinstance(piece, bytearray) else bytearray(piece)
        return torch.frombuffer(whole, dtype=kind).to(self.device, _COMPUTE_TYPES[self.compute], copy=True)


def torch_type(dtype: DType) -> torch.dtype:
    """Torch's name of a type that can be computed with."""
    kind = getattr(torch, dtype.torch or "", None)
    assert isinstance(kind, torch.dtype), dtype  # noqa: S101 - what can't be computed with was refused before
    return kind


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
    kind, whole = torch_type(target), tensors[0]
    given = first_inputs(tensors, channels)

    def produce(_size: int) -> Iterator[Buffer]:
        with one_thread():
            compute = formula.over(lambda: engine.in_step(given))
            start = filled = 0
            room = torch.empty(0)
            for values in engine.in_step(given):
                room = room if filled else torch.empty(min(given[0].numel - start, _YIELDED), dtype=kind)
                result = compute(start, values)
                room[filled : filled + len(result)] = result
                start, filled = start + len(result), filled + len(result)
                if filled == len(room):
                    yield memoryview(room.view(torch.uint8).numpy())
                    filled = 0

    files = tuple(dict.fromkeys(file for tensor in tensors for file in tensor.data.files))
    made = Tensor(target, given[0].shape, Computed(target.nbytes(given[0].shape), produce, files))
    if channels is None:
        return made

    def widened(_size: int) -> Iterator[Buffer]:
        merged = made.torch()
        kept = whole.torch()[:, channels:].to(merged.dtype)
        yield memoryview(torch.cat([merged, kept], 1).contiguous().flatten().view(torch.uint8).numpy())

    return Tensor(target, whole.shape, Computed(target.nbytes(whole.shape), widened, files))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use the calling thread alone: pieces are small, and another thread writes them meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
