"""A weight with LoRAs in it, computed in blocks of rows when its bytes are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ..arrays import pieces
from ..checkpoint import Tensor
from ..dtypes import DType
from ..merging.torch_engine import TorchEngine, one_thread, torch_type
from ..sources import Buffer, Computed
from .fitting import Patch
from .formulas import Delta, decomposed
from .naming import Spot

_ELEMENTS = 1 << 18
"""Of a block of rows: a megabyte in fp32."""


def baked(tensor: Tensor, patches: Sequence[Patch], target: DType, engine: TorchEngine) -> Tensor:
    """A tensor with LoRAs in it: ``W + sum of factor * scale * delta``, rounded to its type once.

    DoRA's difference is what it makes of the weight as it was, so that the order of LoRAs doesn't matter.

    Args:
        tensor: The weight.
        patches: What is done to it.
        target: The type of the result.
        engine: What computes.
    """
    data = [tensor.data, *(each.data for patch in patches for each in patch.tensors.values())]
    files = tuple(dict.fromkeys(file for each in data for file in each.files))
    produce = partial(_produce, tensor, patches, target, engine)
    return Tensor(target, tensor.shape, Computed(target.nbytes(tensor.shape), produce, files))


def _produce(
    tensor: Tensor, patches: Sequence[Patch], target: DType, engine: TorchEngine, _size: int
) -> Iterator[Buffer]:
    with one_thread():
        ready = [(patch, patch.read(engine)) for patch in patches]
        rows = tensor.shape[0]
        columns = tensor.numel // rows
        at_once = rows if any(patch.needs_all for patch in patches) else max(1, _ELEMENTS // columns)
        start = 0
        for piece in pieces(tensor.data, at_once * columns * tensor.dtype.itemsize):
            block = engine.given(piece, torch_type(tensor.dtype)).reshape(-1, columns)
            _change(block, start, ready, engine)
            start += len(block)
            yield memoryview(block.to("cpu", torch_type(target)).flatten().view(torch.uint8).numpy())


def _change(block: torch.Tensor, start: int, ready: Sequence[tuple[Patch, Delta]], engine: TorchEngine) -> None:
    """Put all that falls into a block of rows into it."""
    before = block.clone() if any(patch.magnitude is not None for patch, _ in ready) else block
    for patch, change in ready:
        spot = patch.spot
        if patch.needs_all:
            _own(block, spot).add_(_whole(patch, change, _own(before, spot), engine), alpha=patch.factor)
            continue
        first, last = max(start, spot.first), min(start + len(block), spot.first + spot.shape[0])
        if first < last:
            part = block[first - start : last - start, : patch.columns]
            change.add_to(part, first - spot.first, patch.factor * patch.scale)


def _whole(patch: Patch, change: Delta, weight: torch.Tensor, engine: TorchEngine) -> torch.Tensor:
    """All that a patch adds to a weight."""
    if patch.magnitude is not None:
        magnitude = engine.whole(patch.magnitude)
        return decomposed(weight, change, patch.scale, magnitude, by_input=patch.by_input).sub_(weight)
    found = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    change.add_to(found, 0, patch.scale)
    return found


def _own(whole: torch.Tensor, spot: Spot) -> torch.Tensor:
    """The rows of a tensor that are one weight's, the way round that the LoRA has it."""
    return whole.T if spot.turned else whole[spot.first : spot.first + spot.shape[0]]
