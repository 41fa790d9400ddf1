"""The zip format of ``torch.save`` (torch 1.6 and later), read lazily and written.

A tensor that is stored contiguous is a slice of the file: torch stores its records uncompressed.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping

from ..checkpoint import Checkpoint, Tensor
from ..dtypes import BY_NAME, DType
from ..errors import CorruptError, UnsupportedError
from ..sources import FileSlice, SourceFile
from . import torch_pickle, webui_embedding
from .torch_pickle import Storage
from .writing import AtomicFile

NAME = "torch-zip"

MAX_PICKLE = 256 << 20
"""Bytes of the longest ``data.pkl`` that is read; that of a Stable Diffusion checkpoint has some 200 KB."""

MAX_INDEX = 16 << 20
"""Bytes of the longest archive index that is read: some 150,000 records."""

_ROOT = "archive"
_VERSION = b"3\n"
_ALIGNMENT = 64
_FOLDER = 0x10
_MOST_AROUND_RECORD = 512  # twice the headers and the name, zip64 fields, padding
_REMEDY = "download or copy it again"
# What zipfile raises on archives that are broken in one way or another.
_FAILURES = (
    zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, RuntimeError, OSError, struct.error,
    IndexError, KeyError,
)  # fmt: skip


def looks_like(head: bytes) -> bool:
    """Whether a file begins as a zip archive does."""
    return head[:4] == b"PK\x03\x04"


def read(file: SourceFile) -> Checkpoint:
    """Read the archive's index and its pickle; tensors are slices of the file.

    Raises:
        CorruptError: If the archive or the pickle is broken.
        HostileError: If the pickle wants to run something.
        UnsupportedError: If it is another kind of archive.
    """
    records = _records(file)
    root = next(iter(records), "").partition("/")[0]
    index = records.get(f"{root}/data.pkl")
    if index is None or f"{root}/constants.pkl" in records:
        what = "a TorchScript program" if index else "a zip archive, but not one that torch.save made"
        raise UnsupportedError(f"it is {what}", file=file.path, remedy="name a checkpoint")
    _check_byte_order(file, records.get(f"{root}/byteorder"))
    where = _place(file, index)
    if where.nbytes > MAX_PICKLE:
        raise CorruptError(f"its pickle claims {where.nbytes} bytes", file=file.path, remedy=_REMEDY)
    value = torch_pickle.unpickle(io.BytesIO(file.read(where.offset, where.nbytes)), file)

    def place(storage: Storage) -> FileSlice:
        entry = records.get(f"{root}/data/{storage.key}")
        if entry is None:
            raise CorruptError(f"the storage {storage.key} isn't in it", file=file.path, remedy=_REMEDY)
        found = _place(file, entry)
        if found.nbytes < storage.nbytes:
            raise CorruptError(
                f"the storage {storage.key} has {found.nbytes} bytes instead of {storage.nbytes}",
                file=file.path,
                remedy=_REMEDY,
            )
        return found

    return torch_pickle.checkpoint_of(value, NAME, file, place)


class _Reader(io.BufferedReader):
    """What :mod:`zipfile` reads from; it takes the whole index at once, and some fifteen times its size in memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_INDEX:
            raise zipfile.BadZipFile(f"its index has {size} bytes")
        return super().read(size)


def _records(file: SourceFile) -> dict[str, zipfile.ZipInfo]:
    try:
        with _Reader(io.FileIO(os.dup(file.fileno()))) as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except _FAILURES as error:
        raise CorruptError(f"its zip archive is broken: {error}", file=file.path, remedy=_REMEDY) from error
    records = {entry.filename: entry for entry in entries}
    if len({name.casefold() for name in records}) != len(entries):
        raise CorruptError("its zip archive has two records of one name", file=file.path, remedy=_REMEDY)
    if any(entry.orig_filename != entry.filename for entry in entries) or not _index_is_plain(file):
        raise CorruptError(
            "its zip archive can be read in two ways, as one made to deceive can", file=file.path, remedy=_REMEDY
        )
    return records


def _index_is_plain(file: SourceFile) -> bool:
    """Whether the index ends where its end record begins, and that record ends the file.

    Readers of zip disagree about archives with something before, between or behind those: one takes the index that
    the record points to, another the one in front of it. torch writes neither comment nor gap.
    """
    end = file.size - 22
    record = file.read(end, 22) if end >= 0 else b""
    if record[:4] != b"PK\x05\x06":
        return False
    size, offset = struct.unpack("<II", record[12:20])
    locator = file.read(end - 20, 20) if end >= 20 else b""
    if locator[:4] == b"PK\x06\x07":
        (end,) = struct.unpack("<Q", locator[8:16])
        if end + 56 != file.size - 42 or (wide := file.read(end, 56))[:4] != b"PK\x06\x06":
            return False
        size, offset = struct.unpack("<QQ", wide[40:56])
    return bool(offset + size == end)


def _place(file: SourceFile, entry: zipfile.ZipInfo) -> FileSlice:
    """Where a record's bytes lie, behind its local header (30 bytes, name and extra field)."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise UnsupportedError(
            f"the record {entry.filename} is compressed or encrypted, as torch never does it",
            file=file.path,
            remedy="unpack the archive and pack it again without compression (zip -0)",
        )
    # torch takes such a record for empty, and its tensors from whatever was in memory.
    if entry.external_attr & _FOLDER:
        raise CorruptError(f"the record {entry.filename} is marked as a folder", file=file.path, remedy=_REMEDY)
    name = entry.filename.encode()
    end = entry.header_offset + 30 + len(name)
    if entry.header_offset >= 0 and end <= file.size:
        local = file.read(entry.header_offset, 30 + len(name))
        named, extra = struct.unpack("<HH", local[26:30])
        sound = local[:4] == b"PK\x03\x04" and named == len(name) and local[30:] == name
        if sound and end + extra + entry.file_size <= file.size:
            return FileSlice(file, end + extra, entry.file_size)
    raise CorruptError(f"the record {entry.filename} lies outside the file", file=file.path, remedy=_REMEDY)


def _check_byte_order(file: SourceFile, entry: zipfile.ZipInfo | None) -> None:
    if entry is None:
        return
    where = _place(file, entry)
    if where.nbytes > 16 or file.read(where.offset, where.nbytes) != b"little":
        raise UnsupportedError(
            "it was written on a big-endian machine",
            file=file.path,
            remedy="save it again on another machine",
        )


def size(checkpoint: Checkpoint, index: bytes) -> int:
    """About how many bytes :func:`write` will take, never less."""
    return len(index) + sum(tensor.nbytes + _MOST_AROUND_RECORD for tensor in checkpoint.values()) + 4096


def index(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> bytes:
    """The pickle: ``{"state_dict": {...}, "metadata": {...}}`` in protocol 2, with torch's names and without torch.

    Metadata goes into a dict of strings beside ``state_dict``. An embedding's is what the webui makes of it.

    Raises:
        UnsupportedError: If torch has no type for a tensor's elements, or an embedding is none that a pickle can hold.
    """
    return b"".join((_embedding if checkpoint.embedding else _pickle)(checkpoint, metadata))


def write(checkpoint: Checkpoint, index: bytes, out: AtomicFile) -> None:
    """Write a file that every torch since 1.6 and ``torch.load(weights_only=True)`` read.

    The records ``byteorder`` and ``.data/serialization_id`` of newer releases are left out, because loaders of
    A1111 from before June 2024 refuse them.
    """
    # Closed in any case: a buffer that is left with something to write complains when it is collected.
    with out.stream() as stream, zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
        with archive.open(_entry("data.pkl", len(index), archive), "w") as record:
            record.write(index)
        for number, tensor in enumerate(checkpoint.values()):
            with archive.open(_entry(f"data/{number}", tensor.nbytes, archive), "w") as record:
                for piece in tensor.chunks():
                    record.write(piece)
        with archive.open(_entry("version", len(_VERSION), archive), "w") as record:
            record.write(_VERSION)


def _entry(name: str, nbytes: int, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """A record whose data begin at a multiple of 64, as torch's own do; the padding is an extra field."""
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    entry.file_size = nbytes
    entry.create_system = 3  # whatever the machine, so that the bytes are the same
    stream = archive.fp
    assert stream is not None  # noqa: S101 - it is open
    zip64 = 20 if nbytes * 1.05 > zipfile.ZIP64_LIMIT else 0
    begin = stream.tell() + 30 + len(entry.filename) + zip64 + 4
    padding = -begin % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return entry


def _pickle(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> Iterator[bytes]:
    yield b"\x80\x02}" + _text("state_dict") + b"}"
    for number, (key, tensor) in enumerate(checkpoint.items()):
        yield _text(key) + _tensor(number, key, tensor) + b"s"
    yield b"s"
    yield from _metadata(metadata)
    yield b"."


def _embedding(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> Iterator[bytes]:
    fields, rest = webui_embedding.nested(checkpoint, metadata)
    ((key, tensor),) = checkpoint.items()
    yield b"\x80\x02}" + _text(webui_embedding.VECTORS) + b"}"
    yield _text(webui_embedding.PLACEHOLDER) + _tensor(0, key, tensor) + b"ss"
    for name, value in fields.items():
        yield _text(name) + _value(value) + b"s"
    yield from _metadata(rest)
    yield b"."


def _value(value: str | int | Mapping[str, int] | None) -> bytes:
    if isinstance(value, Mapping):
        return b"}" + b"".join(_text(name) + _integer(number) + b"s" for name, number in value.items())
    return b"N" if value is None else _integer(value) if isinstance(value, int) else _text(value)


def _metadata(metadata: Mapping[str, str]) -> Iterator[bytes]:
    if metadata:
        yield _text(torch_pickle.METADATA_KEY) + b"}"
        for name, value in sorted(metadata.items()):
            yield _text(name) + _text(value) + b"s"
        yield b"s"


def _tensor(number: int, key: str, tensor: Tensor) -> bytes:
    """``_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())``; v3 for types without a storage."""
    storage_type = _STORAGE_NAMES.get(tensor.dtype)
    if tensor.dtype.torch is None:
        raise UnsupportedError(
            f"torch can't hold {key!r}, whose elements are {tensor.dtype}",
            key=key,
            remedy="write a .safetensors",
        )
    untyped = storage_type is None
    kind = b"ctorch.storage\nUntypedStorage\n" if untyped else f"ctorch\n{storage_type}\n".encode()
    stride = [1] * len(tensor.shape)
    for axis in range(len(tensor.shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * max(1, tensor.shape[axis + 1])
    rebuild = b"_rebuild_tensor_v3" if untyped else b"_rebuild_tensor_v2"
    return b"".join(
        (
            b"ctorch._utils\n" + rebuild + b"\n(",
            b"(" + _text("storage") + kind + _text(str(number)) + _text("cpu"),
            _integer(tensor.nbytes if untyped else tensor.numel) + b"tQ",
            _integer(0) + _tuple(tensor.shape) + _tuple(stride) + b"\x89ccollections\nOrderedDict\n)R",
            f"ctorch\n{tensor.dtype.torch}\n".encode() if untyped else b"",
            b"tR",
        )
    )


_STORAGE_NAMES: dict[DType, str] = {BY_NAME[name]: storage for storage, name in torch_pickle.STORAGE_TYPES.items()}


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(9, "little")
    return b"\x8a\x09" + raw


def _tuple(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
