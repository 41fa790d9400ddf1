"""A content hash of each component, independent of key order, container, layout, dialect and of fp32 against fp16.

A component's fingerprint is the BLAKE3 of its tensors' canonical names, shapes and digests, in the order of the names.
Only what both layouts hold takes part, so that position ids, or the layer of SD2's text encoder that diffusers leaves
out, make no difference. There are two:

- ``exact``: dtypes and bytes as they are stored.
- ``fp16``: every float element rounded to fp16 (to nearest, ties to even) first, so that an fp32 file and the fp16 file
  made of it agree. bf16 storage loses other digits and doesn't.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .. import progress
from ..arrays import arrays_of
from ..checkpoint import Checkpoint, Tensor
from ..errors import MismatchError
from ..models.canonical import Canonical, canonical
from ..models.identify import identify
from ..sources import sweep

_THREADS = 2
_CHUNK = 1 << 20

VERSION = "sdsurgery fingerprint 1"
"""Goes into every fingerprint: another rule would be another version."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a component is, as a number.

    Attributes:
        component: Its name.
        exact: Over dtypes and bytes as stored.
        fp16: Over values rounded to fp16.
        tensors: How many took part.
        complete: Whether all of the component's weights did.
    """

    component: str
    exact: str
    fp16: str
    tensors: int
    complete: bool


def fingerprints(checkpoint: Checkpoint, components: Collection[str] = ()) -> list[Fingerprint]:
    """The fingerprints of a model's text encoders, UNet and VAE; reads each weight once.

    Args:
        checkpoint: The model.
        components: Only these; all unless given.

    Raises:
        MismatchError: If it hasn't one of them, or none at all.
    """
    model = identify(checkpoint)
    known = {name: found for name, found in model.networks.items() if found.table}
    absent = [name for name in components if name not in known] or ([] if known else ["component of a known kind"])
    if absent:
        message = f"it has no {absent[0]}; " + "; ".join(model.evidence)
        raise MismatchError(message, file=checkpoint.path, remedy="see what it holds: sdsurgery inspect")
    chosen = [name for name in known if not components or name in components]
    items = [item for item in canonical(checkpoint, model).values() if item.portable and item.component in chosen]
    digests = _digests(items)
    return [
        Fingerprint(
            component=name,
            exact=_combined(name, [digests[item.identity][0] for item in parts], parts, exact=True),
            fp16=_combined(name, [digests[item.identity][1] for item in parts], parts, exact=False),
            tensors=len(parts),
            complete=not known[name].missing and not known[name].misshapen(checkpoint.tensors),
        )
        for name in chosen
        for parts in [sorted((item for item in items if item.component == name), key=lambda item: item.name)]
    ]


def _digests(items: Sequence[Canonical]) -> dict[tuple[str, str], tuple[bytes, bytes]]:
    """Of each tensor: as it is stored, and rounded to fp16."""
    total = sum(item.tensor.nbytes for item in items)
    found = {}
    ordered = sorted(items, key=lambda item: -item.tensor.nbytes)
    with progress.task(f"fingerprinting {len(items)} tensors", total) as advance, ThreadPoolExecutor(_THREADS) as pool:
        for item, pair in zip(ordered, pool.map(lambda item: _digest(item.tensor), ordered), strict=True):
            found[item.identity] = pair
            advance(item.tensor.nbytes)
    return found


def _digest(tensor: Tensor) -> tuple[bytes, bytes]:
    from blake3 import blake3

    exact, rounded = blake3(), blake3()
    convertible = tensor.dtype.kind == "float" and tensor.dtype.numpy is not None and tensor.dtype.name != "F16"
    if not convertible:
        for piece in sweep((tensor.data,), _CHUNK):
            exact.update(piece)
        return exact.digest(), exact.digest()
    import numpy as np

    for (array,) in arrays_of((tensor,)):
        exact.update(memoryview(array).cast("B") if array.dtype.kind == "f" else array.tobytes())
        with np.errstate(over="ignore", invalid="ignore"):
            half = array.astype(np.float16)
        half[np.isnan(half)] = np.nan  # one NaN for all
        rounded.update(memoryview(half).cast("B"))
    return exact.digest(), rounded.digest()


def _combined(component: str, digests: Iterable[bytes], items: Sequence[Canonical], *, exact: bool) -> str:
    from blake3 import blake3

    whole = blake3()
    whole.update(f"{VERSION}\0{'exact' if exact else 'fp16'}\0{_kind(component)}\0".encode())
    for item, digest in zip(items, digests, strict=True):
        dtype = item.tensor.dtype.name if exact or item.tensor.dtype.kind != "float" else "F16"
        whole.update(f"{item.name}\0{dtype}\0".encode())
        whole.update(struct.pack(f"<{len(item.tensor.shape) + 1}Q", len(item.tensor.shape), *item.tensor.shape))
        whole.update(digest)
    return whole.hexdigest()


def _kind(component: str) -> str:
    """The same text encoder may be a model's first or second."""
    return component.removesuffix("_2")
