"""Where the bytes of tensors come from: a slice of a file, memory, or a computation that runs when asked.

Nothing here knows a format. A :class:`SourceFile` is read by position, never mapped, so that resident memory
stays small and a file that shrinks under us is an error and not a crash.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .errors import CorruptError, UnreadableError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

CHUNK = 4 << 20
"""Bytes that a chunk holds unless the caller wants another size."""

Buffer = bytes | bytearray | memoryview


class SourceFile:
    """A regular file that is read by position and known again if it changes.

    The descriptor is opened at the first read and kept, so a file that is renamed over meanwhile still gives
    the bytes that were there when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._fd: int | None = _open_for_reading(self.path)
        self._stat = os.fstat(self._fd)
        self.size = self._stat.st_size

    def __repr__(self) -> str:
        return f"SourceFile({str(self.path)!r}, {self.size} bytes)"

    def fileno(self) -> int:
        """The open descriptor; opens the file again after :meth:`close`, if it is still the same."""
        with self._lock:
            if self._fd is None:
                fd = _open_for_reading(self.path)
                if not self._is_same(os.fstat(fd)):
                    os.close(fd)
                    raise self._changed()
                self._fd = fd
            return self._fd

    def close(self) -> None:
        """Give the descriptor back. A later read opens the file again."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: the same for every name and link of one file."""
        return (self._stat.st_dev, self._stat.st_ino)

    @property
    def links(self) -> int:
        """How many names the file has."""
        return self._stat.st_nlink

    @property
    def known_sha256(self) -> str | None:
        """The SHA-256, where it is known without reading the file: a Hugging Face cache names its blobs by it."""
        real = Path(os.path.realpath(self.path))
        named = real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name)
        return real.name if named else None

    @property
    def whole(self) -> FileSlice:
        """All of its bytes."""
        return FileSlice(self, 0, self.size)

    def check_unchanged(self) -> None:
        """Raise if the file was written to since it was opened, so that no mixture of two states is kept."""
        if not self._is_same(os.fstat(self.fileno())):
            raise self._changed()

    def _is_same(self, now: os.stat_result) -> bool:
        seen = self._stat
        return (now.st_size, now.st_mtime_ns, now.st_dev, now.st_ino) == (
            seen.st_size,
            seen.st_mtime_ns,
            seen.st_dev,
            seen.st_ino,
        )

    def _changed(self) -> CorruptError:
        return CorruptError(
            "the file changed since it was opened",
            file=self.path,
            remedy="wait until whatever writes it has finished, and run this again",
        )

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``."""
        parts = []
        while length:
            part = self._pread(length, offset)
            if not part:
                raise self._too_short(offset, length)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes at ``offset``."""
        if not hasattr(os, "preadv"):
            buffer[:] = self.read(offset, len(buffer))
            return
        while buffer:
            try:
                count = os.preadv(self.fileno(), [buffer], offset)
            except OSError as error:
                raise self._unreadable(offset, error) from error
            if not count:
                raise self._too_short(offset, len(buffer))
            buffer, offset = buffer[count:], offset + count

    def _too_short(self, offset: int, length: int) -> CorruptError:
        return CorruptError(
            f"the file ends at byte {offset}, {length} bytes early",
            file=self.path,
            remedy="download or copy it again",
        )

    def _unreadable(self, offset: int, error: OSError) -> UnreadableError:
        return UnreadableError(
            f"reading at byte {offset} failed: {error.strerror}", file=self.path, remedy="check the disk"
        )

    def _pread(self, length: int, offset: int) -> bytes:
        fd = self.fileno()
        try:
            if hasattr(os, "pread"):
                return os.pread(fd, length, offset)
            with self._lock:
                os.lseek(fd, offset, os.SEEK_SET)
                return os.read(fd, length)
        except OSError as error:
            raise self._unreadable(offset, error) from error


def _open_for_reading(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise UnreadableError("there is no such file", file=path, remedy="check the name") from error
    except OSError as error:
        raise UnreadableError(
            f"it can't be opened: {error.strerror}", file=path, remedy="check its permissions"
        ) from error
    except ValueError as error:
        raise UnreadableError(f"not a file name: {error}", remedy="check the name") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnreadableError("it isn't a regular file", file=path, remedy="name a checkpoint file")
    return fd


class Data(Protocol):
    """Bytes that can be had more than once, piece by piece."""

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Every file that they are read from."""

    def chunks(self, size: int = CHUNK) -> Iterator[Buffer]:
        """The bytes in order, in pieces of ``size`` bytes (the last one shorter)."""


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A run of bytes in a file."""

    file: SourceFile
    offset: int
    nbytes: int

    def chunks(self, size: int = CHUNK) -> Iterator[Buffer]:
        """See :meth:`Data.chunks`."""
        for start in range(0, self.nbytes, size):
            yield self.file.read(self.offset + start, min(size, self.nbytes - start))

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The file."""
        return (self.file,)


@dataclass(frozen=True, slots=True)
class InMemory:
    """Bytes that are at hand."""

    content: Buffer

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return len(self.content)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """None."""
        return ()

    def chunks(self, size: int = CHUNK) -> Iterator[Buffer]:
        """See :meth:`Data.chunks`."""
        view = memoryview(self.content)
        for start in range(0, len(view), size):
            yield view[start : start + size]


@dataclass(frozen=True, slots=True)
class Computed:
    """Bytes that a function makes anew each time they are asked for, in bounded memory.

    Attributes:
        nbytes: How many bytes ``produce`` yields in all.
        produce: Called with the wanted piece size; yields pieces of about that size.
        files: What it reads from.
    """

    nbytes: int
    produce: Callable[[int], Iterator[Buffer]]
    files: tuple[SourceFile, ...] = ()

    def chunks(self, size: int = CHUNK) -> Iterator[Buffer]:
        """See :meth:`Data.chunks`."""
        return self.produce(size)


@dataclass(frozen=True, slots=True)
class Joined:
    """Bytes that follow each other; made by :func:`joined`."""

    parts: tuple[Data, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return sum(part.nbytes for part in self.parts)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Every file that they are read from."""
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files))

    def chunks(self, size: int = CHUNK) -> Iterator[Buffer]:
        """See :meth:`Data.chunks`."""
        for part in self.parts:
            yield from part.chunks(size)


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes of others that lie in no file; made by :func:`part_of`."""

    whole: Data
    offset: int
    nbytes: int

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Every file that they are read from."""
        return self.whole.files

    def chunks(self, size: int = CHUNK) -> Iterator[Buffer]:
        """See :meth:`Data.chunks`."""
        position, end = 0, self.offset + self.nbytes
        for piece in self.whole.chunks(size):
            view = memoryview(piece).cast("B")
            wanted = view[max(0, self.offset - position) : max(0, end - position)]
            if wanted:
                yield wanted
            position += len(view)
            if position >= end:
                return


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix with rows and columns exchanged; made by :func:`transposed`.

    Attributes:
        data: The matrix as it lies, row by row.
        rows: Rows that it has there.
        itemsize: Bytes of an element: 1, 2, 4 or 8.
    """

    data: Data
    rows: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return self.data.nbytes

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Every file that they are read from."""
        return self.data.files

    def chunks(self, size: int = CHUNK) -> Iterator[Buffer]:
        """See :meth:`Data.chunks`; holds the whole matrix, which for text encoders is a few megabytes."""
        elements = memoryview(b"".join(self.data.chunks())).cast(_UNSIGNED[self.itemsize])  # type: ignore[call-overload]
        columns = len(elements) // self.rows if self.rows else 0
        turned = b"".join(elements[column::columns].tobytes() for column in range(columns))
        yield from InMemory(turned).chunks(size)


_UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}


def joined(parts: Iterable[Data]) -> Data:
    """The parts as one, in the simplest form: those that follow each other in their source are that source again."""
    simple: list[Data] = []
    for part in parts:
        for piece in part.parts if isinstance(part, Joined) else (part,):
            merged = _merged(simple[-1], piece) if simple else None
            if merged is None:
                simple.append(piece)
            else:
                simple[-1] = merged
    return simple[0] if len(simple) == 1 else Joined(tuple(simple))


def _merged(one: Data, other: Data) -> Data | None:
    """Two neighbours as one, or ``None`` where they are none."""
    if not one.nbytes or not other.nbytes:
        return one if one.nbytes else other
    if isinstance(one, FileSlice) and isinstance(other, FileSlice):
        adjacent = one.file is other.file and one.offset + one.nbytes == other.offset
        return FileSlice(one.file, one.offset, one.nbytes + other.nbytes) if adjacent else None
    if isinstance(one, Part) and isinstance(other, Part):
        adjacent = one.whole == other.whole and one.offset + one.nbytes == other.offset
        return part_of(one.whole, one.offset, one.nbytes + other.nbytes) if adjacent else None
    return None


def part_of(whole: Data, offset: int, nbytes: int) -> Data:
    """A run of bytes of others, in the simplest form."""
    if offset == 0 and nbytes == whole.nbytes:
        return whole
    if isinstance(whole, FileSlice):
        return FileSlice(whole.file, whole.offset + offset, nbytes)
    if isinstance(whole, Part):
        return part_of(whole.whole, whole.offset + offset, nbytes)
    if isinstance(whole, Joined):
        return joined(_pieces(whole, offset, offset + nbytes))
    return Part(whole, offset, nbytes)


def _pieces(whole: Joined, start: int, end: int) -> Iterator[Data]:
    """What of each part lies between two places."""
    for part in whole.parts:
        if start < part.nbytes and end > 0:
            first = max(0, start)
            yield part_of(part, first, min(end, part.nbytes) - first)
        start, end = start - part.nbytes, end - part.nbytes


def transposed(data: Data, shape: tuple[int, int], itemsize: int) -> Data:
    """A matrix of this shape, transposed; twice transposed it is itself."""
    rows, columns = shape
    if isinstance(data, Transposed) and (data.rows, data.itemsize) == (columns, itemsize):
        return data.data
    return Transposed(data, rows, itemsize)


def sweep(parts: Iterable[Data], size: int = CHUNK) -> Iterator[Buffer]:
    """The bytes of all parts, piece by piece, each only good until the next is asked for.

    What lies in files is read into one buffer over and over: new memory for each piece costs more than the reading.
    """
    buffer = memoryview(bytearray(size))
    for part in parts:
        for piece in part.parts if isinstance(part, Joined) else (part,):
            if not isinstance(piece, FileSlice):
                yield from piece.chunks(size)
                continue
            for start in range(0, piece.nbytes, size):
                view = buffer[: min(size, piece.nbytes - start)]
                piece.file.read_into(view, piece.offset + start)
                yield view


def ahead(pieces: Iterable[Buffer], worker: Executor, depth: int = 2) -> Iterator[Buffer]:
    """The same pieces, made by a worker's thread while the caller uses the ones before.

    Args:
        pieces: What yields them.
        worker: Of one thread. One for many tensors: libraries such as torch keep threads of their own for each that
            calls them.
        depth: How many pieces it may be ahead.
    """
    source = iter(pieces)
    waiting: deque[Future[Buffer | None]] = deque(worker.submit(next, source, None) for _ in range(depth))
    while (piece := waiting.popleft().result()) is not None:
        waiting.append(worker.submit(next, source, None))
        yield piece
