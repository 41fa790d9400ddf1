"""Torch, as what computes the elements of tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..arrays import pieces
from ..checkpoint import Tensor
from ..dtypes import DType

ComputeType = Literal["fp32", "fp64"]
Device = Literal["cpu", "cuda"]

_ELEMENTS = 1 << 17
"""Of a piece of each tensor: half a megabyte in fp32, so that a core's cache holds what is computed of it."""

_COMPUTE_TYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class TorchEngine:
    """Computes with torch; see :class:`~sdsurgery.merging.blending.Engine`.

    Attributes:
        compute: The type that is computed in; results are rounded to their own type once.
        device: Where.
    """

    compute: ComputeType = "fp32"
    device: Device = "cpu"

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Have torch use the calling thread alone."""
        return one_thread()

    def in_step(self, tensors: Sequence[Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        """The elements of tensors of one size in the type that is computed in, as many of each at a time."""
        kinds = [torch_type(tensor.dtype) for tensor in tensors]
        streams = [pieces(tensor.data, _ELEMENTS * tensor.dtype.itemsize) for tensor in tensors]
        for found in zip(*streams, strict=True):
            yield [self.given(piece, kind) for piece, kind in zip(found, kinds, strict=True)]

    def rounded(self, result: torch.Tensor, target: DType, out: memoryview) -> None:
        """Round a piece of the result to the bytes of its type."""
        torch.frombuffer(out, dtype=torch_type(target)).copy_(result)

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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use the calling thread alone: pieces are small, and another thread writes them meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
