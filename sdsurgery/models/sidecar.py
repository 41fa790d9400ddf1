"""The sidecar: what a diffusers folder can't hold of the file it was made from, so that the file can be had again.

It is a safetensors file of the tensors that converting back doesn't give (EMA, schedule buffers, position ids,
OpenCLIP's last layer, markers, whatever isn't known), and of a record in its metadata: every tensor of the original in
its order, the header byte for byte, and a BLAKE3 of the tensors' bytes that tells whether the folder is still the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import progress
from ..checkpoint import Checkpoint, Tensor
from ..containers import safetensors
from ..dtypes import BY_NAME
from ..errors import CorruptError, MismatchError
from ..sources import FileSlice

RECORD_KEY = "sdsurgery.sidecar"
SCHEMA_VERSION = 1
SUFFIX = ".sidecar.safetensors"

_REMEDY = "name the folder that the sidecar was written beside, or convert without it"


def path_beside(folder: Path) -> Path:
    """Where a folder's sidecar lies."""
    if folder.name in {"", ".."}:
        folder = folder.resolve()
    return folder.with_name(folder.name + SUFFIX)


@dataclass(frozen=True, slots=True)
class Restored:
    """The original again.

    Attributes:
        tensors: In the original's order.
        metadata: The original's.
        header: The original's, byte for byte, where it was a safetensors file and nothing changed since.
        exact: Whether nothing changed since.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    header: bytes | None
    exact: bool


def make(original: Checkpoint, back: Mapping[str, Tensor]) -> Checkpoint:
    """The sidecar of a file.

    Args:
        original: The file as it was opened.
        back: What converting back gives by itself, of the original's own data.
    """
    by_data: dict[Any, str] = {(tensor.dtype.name, tensor.data): key for key, tensor in back.items() if tensor.nbytes}
    kept: dict[str, Tensor] = {}
    entries = []
    for key, tensor in original.items():
        source = by_data.get((tensor.dtype.name, tensor.data))
        if source is None:
            kept[key] = tensor
        entries.append([key, tensor.dtype.name, list(tensor.shape), source])
    record = {
        "schema_version": SCHEMA_VERSION,
        "tensors": entries,
        "metadata": dict(original.metadata),
        "header": _header_text(original),
        "blake3": _digest(_in_place_order(original)),
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return Checkpoint(kept, {"format": "pt", RECORD_KEY: text})


def restore(back: Mapping[str, Tensor], sidecar: Checkpoint) -> Restored:
    """The original, of what converting back gives and what the sidecar kept.

    Args:
        back: What converting back gives by itself.
        sidecar: The sidecar.

    Raises:
        CorruptError: If it is no sidecar, or a damaged one.
        MismatchError: If it isn't that of the folder.
    """
    record = _record(sidecar)
    tensors: dict[str, Tensor] = {}
    for key, dtype, shape, source in record["tensors"]:
        found = sidecar.get(key) if source is None else back.get(source)
        if found is None and source is None:
            raise _corrupt(sidecar, f"it lacks {key}, which its record names")
        wanted = _nbytes(dtype, shape)
        if found is None or (found.dtype.name, found.nbytes) != (dtype, wanted):
            what = "isn't in the folder" if found is None else f"is {found} in the folder"
            message = f"it isn't this folder's: {source or key}, {dtype}{shape} once, {what}"
            raise MismatchError(message, file=sidecar.path, key=source or key, remedy=_REMEDY)
        tensors[key] = Tensor(found.dtype, tuple(shape), found.data)
    header: bytes | None = None
    ordered = tensors
    if record["header"] is not None:
        text = record["header"].encode()
        header = len(text).to_bytes(8, "little") + text
        ordered = _in_header_order(tensors, header, sidecar)
    exact = _digest(ordered) == record["blake3"]
    return Restored(tensors, record["metadata"], header if exact else None, exact)


def _header_text(original: Checkpoint) -> str | None:
    origin = original.origin
    if origin is None or origin.file is None or origin.data_offset is None:
        return None
    return origin.file.read(8, origin.data_offset - 8).decode()


def _in_place_order(original: Checkpoint) -> dict[str, Tensor]:
    """The tensors as their bytes follow each other in a safetensors file; elsewhere in their own order."""
    if original.origin is None or original.origin.data_offset is None:
        return dict(original)

    def place(item: tuple[str, Tensor]) -> tuple[int, int]:
        data = item[1].data
        assert isinstance(data, FileSlice)  # noqa: S101 - a safetensors file has nothing else
        return data.offset, data.nbytes

    return dict(sorted(original.items(), key=place))


def _in_header_order(tensors: Mapping[str, Tensor], header: bytes, sidecar: Checkpoint) -> dict[str, Tensor]:
    try:
        return dict(safetensors.in_header_order(header, tensors))
    except MismatchError as error:
        raise _corrupt(sidecar, f"the header that it keeps is none of its tensors': {error.message}") from error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    from blake3 import blake3

    digest = blake3(max_threads=blake3.AUTO)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress.task("comparing with the sidecar's record", total) as advance:
        for tensor in tensors.values():
            for chunk in tensor.chunks():
                digest.update(chunk)
                advance(len(chunk))
    return digest.hexdigest()


def _record(sidecar: Checkpoint) -> dict[str, Any]:
    if RECORD_KEY not in sidecar.metadata:
        raise _corrupt(sidecar, "it is no sidecar: it has no record of a conversion")
    try:
        record = json.loads(sidecar.metadata[RECORD_KEY])
        header, metadata, tensors = record["header"], record["metadata"], record["tensors"]
        sound = (
            record["schema_version"] == SCHEMA_VERSION
            and (header is None or isinstance(header, str))
            and all(isinstance(text, str) for item in metadata.items() for text in item)
            and isinstance(record["blake3"], str)
            and all(_is_entry(*entry) for entry in tensors)
        )
        keys = {entry[0] for entry in tensors}
        # What isn't text to the letter can't be written.
        "".join([header or "", *metadata, *metadata.values(), *keys]).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(sidecar, "its record can't be read") from error
    if not sound or len(keys) < len(tensors):
        raise _corrupt(sidecar, "its record isn't one that this version wrote")
    return dict(record)


def _is_entry(key: Any, dtype: Any, shape: Any, source: Any) -> bool:
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
    names = isinstance(key, str) and (source is None or isinstance(source, str))
    return names and sizes and dtype in BY_NAME and _nbytes(dtype, shape) >= 0


def _nbytes(dtype: str, shape: list[int]) -> int:
    return BY_NAME[dtype].nbytes(tuple(shape))


def _corrupt(sidecar: Checkpoint, message: str) -> CorruptError:
    return CorruptError(message, file=sidecar.path, remedy="convert again with --sidecar")
