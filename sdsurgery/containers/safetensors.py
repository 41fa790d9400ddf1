"""The safetensors container: an 8 byte length, a JSON header, and the tensors' bytes without a gap.

Reading is at least as strict as the reference library (0.8): whatever it refuses is refused here. Writing gives
the reference library's own bytes, with metadata keys sorted, which that library leaves to chance.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..checkpoint import Checkpoint, Origin, Tensor
from ..dtypes import BY_NAME, SAFETENSORS_RANK
from ..errors import CorruptError, MismatchError, UnsupportedError
from ..sources import FileSlice, SourceFile

NAME = "safetensors"

MAX_HEADER = 100_000_000
"""Bytes of the longest header that the reference library reads."""

METADATA_KEY = "__metadata__"
_USIZE = 1 << 64
HIGHEST_RANK = 1000
_MOST_SHOWN = 200
_REDOWNLOAD = "download or copy it again; if it was made by a script, mend the script"


def looks_like(head: bytes) -> bool:
    """Whether a file that begins with these (at least nine) bytes is meant to be safetensors."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 40


def read(file: SourceFile) -> Checkpoint:
    """Read the header; the tensors are slices of the file.

    Raises:
        CorruptError: If the header can't be read or contradicts the file.
    """
    length = header_length(file)
    entries = json_object(file, file.read(8, length), "its header")
    metadata = _metadata(file, entries.pop(METADATA_KEY, None))
    start = 8 + length
    tensors = {key: _tensor(file, key, entry, start) for key, entry in entries.items()}
    _check_coverage(file, tensors, start)
    return Checkpoint(tensors, metadata, origin=Origin(NAME, file.path, file, data_offset=start))


def header_length(file: SourceFile) -> int:
    """The length that the first eight bytes state, checked against the file's own."""
    if file.size < 8:
        raise _corrupt(file, f"only {file.size} bytes long, too short for a safetensors header")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > MAX_HEADER:
        raise _corrupt(file, f"its header claims {length} bytes, more than the {MAX_HEADER} that are allowed")
    if length > file.size - 8:
        raise _corrupt(file, f"truncated: its header claims {length} bytes and {file.size - 8} are left")
    return int(length)


def _corrupt(file: SourceFile, message: str, key: str | None = None) -> CorruptError:
    return CorruptError(message, file=file.path, key=key and key[:_MOST_SHOWN], remedy=_REDOWNLOAD)


def _quoted(key: str) -> str:
    return repr(key if len(key) <= _MOST_SHOWN else key[:_MOST_SHOWN] + "…")


def json_object(file: SourceFile, raw: bytes, what: str) -> dict[str, Any]:
    """What :func:`parsed` reads from a file; ``what`` names it in errors.

    Raises:
        CorruptError: If it can't be read.
    """
    try:
        return parsed(raw)
    except RecursionError as error:
        raise _corrupt(file, f"{what} nests too deeply") from error
    except ValueError as error:
        raise _corrupt(file, f"{what} isn't valid: {error}") from error


def parsed(raw: bytes) -> dict[str, Any]:
    """A JSON object, read more strictly than Python does.

    Raises:
        ValueError: If it is none, or names something twice.
        RecursionError: If it nests too deeply.
    """
    if raw[:1] != b"{":
        raise ValueError("it doesn't begin with '{'")
    # A tensor takes three brackets in fifty bytes. More than that is a table of nothing, made to fill the memory.
    if raw.count(b"[") + raw.count(b"{") > (1 << 20) + len(raw) // 16:
        raise ValueError("it is no table of tensors")
    entries = json.loads(raw.decode(), object_pairs_hook=_no_duplicates, parse_int=_whole, parse_constant=_no_constant)
    "".join(entries).encode()
    return dict(entries)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{_quoted(twice)} stands there twice")
    return result


def _whole(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:24]} is no size or offset")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _metadata(file: SourceFile, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not _is_metadata(value):
        raise _corrupt(file, "its metadata is no map from strings to strings")
    try:
        "".join([*value, *value.values()]).encode()
    except UnicodeEncodeError as error:
        raise _corrupt(file, f"its metadata isn't valid text: {error}") from error
    return dict(value)


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _tensor(file: SourceFile, key: str, entry: Any, start: int) -> Tensor:
    try:
        dtype, extents, (begin, end) = BY_NAME[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sound = (
            dtype.storable
            and isinstance(extents, list)
            and len(extents) <= HIGHEST_RANK
            and all(type(number) is int and number >= 0 for number in (*extents, begin, end))
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise _corrupt(file, f"the header's entry for {_quoted(key)} isn't a dtype, a shape and two offsets", key)
    shape = tuple(extents)
    size = 1
    for extent in (*shape, dtype.bits):
        size *= extent
        if extent >= _USIZE or size >= _USIZE:
            raise _corrupt(file, f"the shape of {_quoted(key)} overflows", key)
    if size % 8 or end - begin != size // 8:
        shown = list(shape) if len(shape) < 16 else f" of rank {len(shape)}"
        raise _corrupt(file, f"{_quoted(key)} has {end - begin} bytes, but {dtype}{shown} takes {size / 8:g}", key)
    return Tensor(dtype, shape, FileSlice(file, start + begin, end - begin))


def _check_coverage(file: SourceFile, tensors: Mapping[str, Tensor], start: int) -> None:
    """The tensors must cover the rest of the file exactly: no overlap, no hole, nothing behind the last one."""
    position = start
    for offset, nbytes, key in sorted(_slices(tensors)):
        if offset != position:
            what = "overlaps the tensor before it" if offset < position else "leaves a hole before it"
            raise _corrupt(file, f"{_quoted(key)} {what}", key)
        position += nbytes
    if position != file.size:
        gap = position - file.size
        what = f"truncated: {gap} bytes are missing" if gap > 0 else f"{-gap} bytes follow the last tensor"
        raise _corrupt(file, what)


def _slices(tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, int, str]]:
    for key, tensor in tensors.items():
        data = tensor.data
        assert isinstance(data, FileSlice)  # noqa: S101 - what read() made a line above
        yield data.offset, data.nbytes, key


def in_file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The reference library's order: by dtype, the widest first, then by key.

    Raises:
        UnsupportedError: If a tensor has a type that safetensors can't hold.
    """
    for key, tensor in tensors.items():
        if not tensor.dtype.storable:
            raise UnsupportedError(
                f"safetensors can't hold {key!r}, whose elements are {tensor.dtype}",
                key=key,
                remedy="write a .ckpt, or leave the tensor out",
            )
    return sorted(tensors.items(), key=lambda item: (SAFETENSORS_RANK[item[1].dtype.name], item[0]))


def in_header_order(header: bytes, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors in the order in which a header that was recorded lays them out.

    Raises:
        MismatchError: If the header isn't valid, or isn't that of a file with these tensors.
    """
    try:
        (length,) = struct.unpack("<Q", header[:8])
        entries = parsed(header[8:])
    except (struct.error, ValueError, RecursionError) as error:
        raise _no_header_of(f"it isn't valid: {error}") from error
    metadata = entries.pop(METADATA_KEY, None)
    if length != len(header) - 8 or length > MAX_HEADER or not (metadata is None or _is_metadata(metadata)):
        raise _no_header_of("it isn't valid")
    if entries.keys() != tensors.keys():
        key = min(entries.keys() ^ tensors.keys())
        raise _no_header_of(f"{_quoted(key)} is in only one of the two", key)
    position, ordered = 0, []
    for key in sorted(entries, key=lambda key: _offsets(entries[key])):
        tensor, end = tensors[key], position + tensors[key].nbytes
        expected = [tensor.dtype.name, [*tensor.shape], [position, end]]
        entry = entries[key]
        found = [entry.get(name) for name in ("dtype", "shape", "data_offsets")] if isinstance(entry, dict) else []
        if json.dumps(found) != json.dumps(expected):  # as text, for in Python true is 1 and 1.0 is 1
            raise _no_header_of(f"{_quoted(key)} is described as {found!s:.200} instead of {expected}", key)
        ordered.append((key, tensor))
        position = end
    return ordered


def _offsets(entry: Any) -> list[int]:
    """The offsets to sort by; those that are none are found out later."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    sound = isinstance(offsets, list) and all(type(number) is int for number in offsets)
    return offsets if isinstance(offsets, list) and sound else []


def _no_header_of(message: str, key: str | None = None) -> MismatchError:
    return MismatchError(
        f"the recorded header doesn't fit the tensors: {message}",
        key=key and key[:_MOST_SHOWN],
        remedy="write the file without what was recorded",
    )


def header(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds these tensors in this order, padded to 8 bytes with spaces.

    Raises:
        UnsupportedError: If a key can't be written.
    """
    document: dict[str, Any] = {}
    if metadata:
        document[METADATA_KEY] = dict(sorted(metadata.items()))
    offset = 0
    for key, tensor in tensors:
        if key == METADATA_KEY:
            raise UnsupportedError(f"no tensor can be called {key!r} in safetensors", key=key, remedy="rename it")
        end = offset + tensor.nbytes
        document[key] = {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"a key or the metadata isn't valid text: {error}", remedy="rename it") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise UnsupportedError(
            f"the header would take {len(text)} bytes, more than the {MAX_HEADER} that readers allow",
            remedy="shorten the metadata or the keys",
        )
    return struct.pack("<Q", len(text)) + text
