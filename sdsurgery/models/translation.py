"""A weight from one layout to the other, and back: no byte is computed that can be copied.

Splitting by rows and joining are runs of bytes, squeezing changes the shape alone; only transposing computes.
What goes there and back is the same tensor again, not merely an equal one, which is how a lossless conversion is
told from one that isn't without reading a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint import Tensor
from ..errors import UnsupportedError
from ..sources import joined, part_of, transposed
from .walks import Link

_TURNABLE = {8, 16, 32, 64}
"""Bits of the elements whose order can be changed."""


def fits(link: Link, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape; a 1 x 1 convolution and a linear layer pass for each other."""
    if tensor.shape == shape:
        return True
    return link.how == "squeeze" and tensor.shape in {link.ldm.shape, *(part.shape for part in link.diffusers)}


def to_diffusers(link: Link, tensor: Tensor) -> tuple[Tensor, ...]:
    """What diffusers has for an ldm weight of the right shape; nothing where it has none."""
    if link.how == "split":
        size, rest = divmod(tensor.nbytes, max(1, len(link.diffusers)))
        if rest:
            raise _torn(link, tensor)
        return tuple(
            Tensor(tensor.dtype, part.shape, part_of(tensor.data, index * size, size))
            for index, part in enumerate(link.diffusers)
        )
    return tuple(_changed(link, tensor, part.shape) for part in link.diffusers)


def to_ldm(link: Link, tensors: Sequence[Tensor]) -> Tensor:
    """The ldm weight that these make, all of one dtype and of the right shapes."""
    first = tensors[0]
    if link.how == "split":
        return Tensor(first.dtype, link.ldm.shape, joined(tensor.data for tensor in tensors))
    return _changed(link, first, link.ldm.shape)


def _changed(link: Link, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    data = tensor.data
    if link.how == "transpose":
        if tensor.dtype.bits not in _TURNABLE:
            raise _torn(link, tensor)
        rows, columns = tensor.shape
        data = transposed(data, (rows, columns), tensor.dtype.itemsize)
    return Tensor(tensor.dtype, shape, data)


def _torn(link: Link, tensor: Tensor) -> UnsupportedError:
    """The refusal of elements that share bytes, or are too long."""
    message = f"{link.ldm.name} can't be converted: its elements are {tensor.dtype}"
    return UnsupportedError(message, remedy="cast it to a type of whole bytes first")
