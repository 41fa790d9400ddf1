"""The sidecar: what a diffusers folder can't hold of the file it was made from, so that the file can be had again.

It is a safetensors file of the tensors that converting back doesn't give (EMA, schedule buffers, position ids,
OpenCLIP's last layer, markers, whatever isn't known), and of a record in its metadata: every tensor of the original in
its order, the header byte for byte, and a BLAKE3 of each component's bytes, which tell what is still the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import progress
from ..checkpoint import Checkpoint, Tensor
from ..containers import safetensors
from ..containers.saving import header_of
from ..dtypes import BY_NAME
from ..errors import CorruptError, MismatchError
from ..sources import sweep
from .identify import identify

RECORD_KEY = "sdsurgery.sidecar"
SCHEMA_VERSION = 1
SUFFIX = ".sidecar.safetensors"

_KEPT = ""
"""The part of what the sidecar itself holds."""

_REMEDY = "name the folder that the sidecar was written beside, or convert without it"


def path_beside(folder: Path) -> Path:
    """Where a folder's sidecar lies."""
    if folder.name in {"", ".."}:
        folder = folder.resolve()
    return folder.with_name(folder.name + SUFFIX)


@dataclass(frozen=True, slots=True)
class Restored:
    """The original again, or as much of it as still belongs to the folder.

    Attributes:
        tensors: In the original's order.
        metadata: The original's.
        header: The original's, byte for byte, where it was a safetensors file and nothing changed since.
        changed: The components that are no longer those of the original; none where it is the original again.
        left_out: What the sidecar kept of them, which would be another model's.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    header: bytes | None
    changed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def parts(checkpoint: Checkpoint) -> dict[str, str]:
    """Which component each key stands or falls with: EMA weights and what is no network's go with the UNet."""
    model = identify(checkpoint)
    main = "unet" if "unet" in model.networks or len(model.networks) != 1 else next(iter(model.networks))
    return {
        key: name if name in model.networks else main
        for name, component in model.components.items()
        for key in component.all_keys()
    }


def make(original: Checkpoint, back: Mapping[str, Tensor]) -> Checkpoint:
    """The sidecar of a file.

    Args:
        original: The file as it was opened; where something was changed since, the safetensors file that saving makes
            of it.
        back: What converting back gives by itself, of the original's own data.
    """
    by_data: dict[Any, str] = {(tensor.dtype.name, tensor.data): key for key, tensor in back.items() if tensor.nbytes}
    part_of = parts(original)
    kept: dict[str, Tensor] = {}
    by_part: dict[str, list[Tensor]] = {}
    entries = []
    for key, tensor in original.items():
        source = by_data.get((tensor.dtype.name, tensor.data))
        if source is None:
            kept[key] = tensor
        by_part.setdefault(_KEPT if source is None else part_of[key], []).append(tensor)
        entries.append([key, tensor.dtype.name, list(tensor.shape), source, part_of[key]])
    header = _header_text(original)
    record = {
        "schema_version": SCHEMA_VERSION,
        "tensors": entries,
        "metadata": dict(original.metadata) if header is None else None,
        "header": header,
        "blake3": {part: _digest(tensors) for part, tensors in by_part.items()},
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
    found: dict[str, Tensor] = {}
    by_part: dict[str, list[Tensor]] = {}
    changed = set()
    for key, dtype, shape, source, part in record["tensors"]:
        tensor = sidecar.get(key) if source is None else back.get(source)
        if tensor is None and source is None:
            raise _corrupt(sidecar, f"it lacks {key}, which its record names")
        if tensor is None or (tensor.dtype.name, tensor.nbytes) != (dtype, _nbytes(dtype, shape)):
            changed.add(_KEPT if source is None else part)
            continue
        found[key] = Tensor(tensor.dtype, tuple(shape), tensor.data)
        by_part.setdefault(_KEPT if source is None else part, []).append(tensor)
    digests: dict[str, str] = record["blake3"]
    changed |= {part for part in digests if part not in changed and _digest(by_part.get(part, [])) != digests[part]}
    if _KEPT in changed:
        raise _corrupt(sidecar, "what it keeps isn't what was written into it")
    if changed and changed >= digests.keys() - {_KEPT}:
        message = "it isn't this folder's: no component is the one that it was written for"
        raise MismatchError(message, file=sidecar.path, key=min(changed), remedy=_REMEDY)
    if changed:
        return _as_much(record, found, back, frozenset(changed))
    header: bytes | None = None
    if record["header"] is not None:
        text = record["header"].encode()
        header = len(text).to_bytes(8, "little") + text
        _check_header(found, header, sidecar)
    return Restored(found, _metadata(record), header)


def _as_much(
    record: Mapping[str, Any], found: Mapping[str, Tensor], back: Mapping[str, Tensor], changed: frozenset[str]
) -> Restored:
    """The folder's own weights where they changed, the original's everywhere else."""
    mine = parts(Checkpoint(back))
    tensors = {key: found[key] for key, *_, part in record["tensors"] if part not in changed}
    tensors |= {key: tensor for key, tensor in back.items() if mine[key] in changed}
    gone = (key for key, _, _, source, part in record["tensors"] if source is None and part in changed)
    left_out = tuple(key for key in gone if key not in tensors)
    return Restored(tensors, _metadata(record), None, tuple(sorted(changed)), left_out)


def _metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """The original's metadata, which its header holds where there is one."""
    if record["header"] is None:
        return dict(record["metadata"])
    return dict(safetensors.parsed(record["header"].encode()).get(safetensors.METADATA_KEY) or {})


def _header_text(original: Checkpoint) -> str | None:
    """The header of the file, or of the one that would be saved of what was changed since."""
    if original.changes:
        return header_of(original)[8:].decode()
    origin = original.origin
    if origin is None or origin.file is None or origin.data_offset is None:
        return None
    return origin.file.read(8, origin.data_offset - 8).decode()


def _check_header(tensors: Mapping[str, Tensor], header: bytes, sidecar: Checkpoint) -> None:
    try:
        safetensors.in_header_order(header, tensors)
    except MismatchError as error:
        raise _corrupt(sidecar, f"the header that it keeps is none of its tensors': {error.message}") from error


def _digest(tensors: Iterable[Tensor]) -> str:
    from blake3 import blake3

    listed = list(tensors)
    digest = blake3(max_threads=blake3.AUTO)
    with progress.task("comparing with the original", sum(tensor.nbytes for tensor in listed)) as advance:
        for piece in sweep(tensor.data for tensor in listed):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def _record(sidecar: Checkpoint) -> dict[str, Any]:
    if RECORD_KEY not in sidecar.metadata:
        raise _corrupt(sidecar, "it is no sidecar: it has no record of a conversion")
    try:
        record = json.loads(sidecar.metadata[RECORD_KEY])
        sound = record["schema_version"] == SCHEMA_VERSION and all(_is_entry(*entry) for entry in record["tensors"])
        texts = [part for pair in record["blake3"].items() for part in pair]
        if record["header"] is None:
            texts += [part for pair in record["metadata"].items() for part in pair]
        else:
            texts.append(record["header"])
            _metadata(record)
        keys = {entry[0] for entry in record["tensors"]}
        # What isn't text to the letter can't be written.
        "".join([*texts, *keys]).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(sidecar, "its record can't be read") from error
    if not sound or len(keys) < len(record["tensors"]):
        raise _corrupt(sidecar, "its record isn't one that this version wrote")
    if {_KEPT if entry[3] is None else entry[4] for entry in record["tensors"]} - record["blake3"].keys():
        raise _corrupt(sidecar, "its record isn't one that this version wrote")
    return dict(record)


def _is_entry(key: Any, dtype: Any, shape: Any, source: Any, part: Any) -> bool:
    names = isinstance(key, str) and isinstance(part, str) and (source is None or isinstance(source, str))
    if not (names and dtype in BY_NAME and isinstance(shape, list) and len(shape) <= safetensors.HIGHEST_RANK):
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in shape) and _nbytes(dtype, shape) >= 0


def _nbytes(dtype: str, shape: list[int]) -> int:
    return BY_NAME[dtype].nbytes(tuple(shape))


def _corrupt(sidecar: Checkpoint, message: str) -> CorruptError:
    return CorruptError(message, file=sidecar.path, remedy="convert again with --sidecar")
