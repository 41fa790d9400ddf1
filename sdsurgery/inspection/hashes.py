"""The hashes that people quote for a checkpoint file, all of them from one read."""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

from .. import progress
from ..digests import legacy_hash
from ..sources import SourceFile

_CHUNK = 4 << 20
_AHEAD = 4


@dataclass(frozen=True, slots=True)
class FileHashes:
    """Hashes of a file.

    Attributes:
        sha256: Of the whole file.
        autov1: A1111's first: 8 digits of the SHA-256 of 64 KiB at offset 1 MiB.
        autov2: A1111's short hash: the first 10 digits of ``sha256``.
        autov3: The first 12 digits of the SHA-256 of what follows a safetensors header, as Civitai shows it.
        tensor_data_sha256: All digits of that (kohya's ``sshs_model_hash``, ModelSpec's ``hash_sha256``).
        crc32: Of the whole file, its four bytes in the order in which Civitai shows them.
        blake3: Of the whole file.
    """

    sha256: str
    autov1: str
    autov2: str
    autov3: str | None
    tensor_data_sha256: str | None
    crc32: str
    blake3: str


class _Digest(Protocol):
    def update(self, content: bytes, /) -> object:
        """Take in more bytes."""


class _Crc32:
    def __init__(self) -> None:
        self.value = 0

    def update(self, content: bytes) -> None:
        self.value = zlib.crc32(content, self.value)


class _Worker:
    """A digest that takes its chunks in a thread of its own; the libraries let others run while they compute."""

    def __init__(self, digest: _Digest) -> None:
        self._digest = digest
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._chunks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._digest.update(chunk)

    def feed(self, chunk: bytes) -> None:
        """Hand over a chunk; waits while the thread is too far behind."""
        self._chunks.put(chunk)


def hash_file(file: SourceFile, data_offset: int | None = None) -> FileHashes:
    """All hashes of a file; those of the tensors' bytes alone where it is told at which byte they begin."""
    import blake3 as blake3_library

    whole, data, crc, blake3 = hashlib.sha256(), hashlib.sha256(), _Crc32(), blake3_library.blake3()
    with (
        progress.task(f"hashing {file.path.name}", file.size) as advance,
        _Worker(whole) as to_whole,
        _Worker(data) as to_data,
        _Worker(crc) as to_crc,
        _Worker(blake3) as to_blake3,
    ):
        for offset, chunk in _chunks(file, advance):
            for worker in (to_whole, to_crc, to_blake3):
                worker.feed(chunk)
            if data_offset is not None and offset + len(chunk) > data_offset:
                to_data.feed(chunk[max(0, data_offset - offset) :])
    file.check_unchanged()
    data_digest = data.hexdigest() if data_offset is not None else None
    return FileHashes(
        sha256=whole.hexdigest(),
        autov1=legacy_hash(file),
        autov2=whole.hexdigest()[:10],
        autov3=data_digest[:12] if data_digest else None,
        tensor_data_sha256=data_digest,
        crc32=crc.value.to_bytes(4, "little").hex().upper(),
        blake3=blake3.hexdigest(),
    )


def _chunks(file: SourceFile, advance: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    for offset in range(0, file.size, _CHUNK):
        chunk = file.read(offset, min(_CHUNK, file.size - offset))
        yield offset, chunk
        advance(len(chunk))
