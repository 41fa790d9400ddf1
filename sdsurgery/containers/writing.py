"""Files that appear whole under their name or not at all, and copies that stay inside the kernel."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import CorruptError, NoSpaceError, OutputError, OutputExistsError
from ..progress import Advance
from ..sources import Buffer, Computed, Data, FileSlice, ahead

COPY_CHUNK = 64 << 20
"""Bytes that one call hands to the kernel: large enough to be fast, small enough for Ctrl-C and progress."""

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: the file grows by what is written, not by what is reserved
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# What copy_file_range answers where it can't copy between these two files; EIO among them, because only reading and
# writing by ourselves tells which of the two disks is broken.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.EIO}


class AtomicFile:
    """A file under construction.

    Leaving the ``with`` block in peace flushes it to the disk and gives it its name; leaving it by an exception
    leaves nothing. Where the system can, the file has no name at all until then, so that not even a kill leaves
    a trace; elsewhere it is a hidden file in the same folder.

    Args:
        path: The final name; a link is followed.
        replace: Whether a file that has this name may be replaced; it gives its permissions on.
        size: Bytes that will be written, for a look at the free space before the first one.
        advance: Told of every byte written.
    """

    def __init__(self, path: Path, *, replace: bool, size: int, advance: Advance) -> None:
        self.path = Path(os.path.realpath(path))
        self._replace = replace
        self._size = size
        self._report = advance
        self._hidden: Path | None = None
        self._fd = -1
        self._written_back = 0
        self.position = 0

    def __enter__(self) -> Self:
        with _reporting(self.path):
            self._check_target()
            try:
                self._fd = self._create()
                if self._replace and self.path.exists():
                    self._take_over_permissions(os.stat(self.path))
                _reserve(self._fd, self._size)
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _reporting(self.path):
                    os.ftruncate(self._fd, os.fstat(self._fd).st_size)  # gives back what was reserved and not used
                    flush_to_disk(self._fd)
                    self._publish()
        finally:
            self._discard()

    def _discard(self) -> None:
        """Leave nothing but a file that has its final name."""
        self._close()
        if self._hidden is not None:
            with contextlib.suppress(OSError):  # what went wrong before matters more
                self._hidden.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_target(self) -> None:
        if self.path.exists() and not self.path.is_file():
            raise OutputError("it exists and isn't a regular file", file=self.path, remedy="choose another name")
        if self.path.exists() and not self._replace:
            raise _exists(self.path)
        free = shutil.disk_usage(self.path.parent).free
        if self._size > free:
            raise NoSpaceError(
                f"{self._size:,} bytes are needed and {free:,} are free",
                file=self.path,
                remedy="free some space, or write to another disk",
            )

    def _create(self) -> int:
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        if self._can_name_later(flags):
            return os.open(self.path.parent, flags | os.O_TMPFILE, 0o666)
        # Noted before it exists, so that an interrupt between the two leaves nothing behind.
        self._hidden = self._hidden_name()
        return os.open(self._hidden, flags | os.O_CREAT | os.O_EXCL, 0o666)

    def _can_name_later(self, flags: int) -> bool:
        """Whether a file without a name can be made here and named afterwards, tried out on an empty one."""
        if not hasattr(os, "O_TMPFILE"):
            return False
        name = self._hidden_name()
        try:
            probe = os.open(self.path.parent, flags | os.O_TMPFILE, 0o600)
            try:
                self._link(f"/proc/self/fd/{probe}", name)
            finally:
                os.close(probe)
                name.unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def _hidden_name(self) -> Path:
        return self.path.with_name(f".sdsurgery-{os.urandom(8).hex()}.partial")

    def _take_over_permissions(self, old: os.stat_result) -> None:
        if hasattr(os, "fchmod"):
            os.fchmod(self._fd, old.st_mode & 0o7777)
        if hasattr(os, "fchown"):
            with contextlib.suppress(PermissionError):  # only root may give files away; others own what they write
                os.fchown(self._fd, old.st_uid, old.st_gid)

    def _publish(self) -> None:
        if self._hidden is None and self._replace:
            self._hidden = self._hidden_name()
            self._link(f"/proc/self/fd/{self._fd}", self._hidden)
        if self._replace:
            self._rename()
        elif self._hidden is None:
            self._link(f"/proc/self/fd/{self._fd}", self.path)
        else:
            self._rename_to_free_name()
        _flush_folder(self.path.parent)

    def _link(self, source: str | Path, name: Path) -> None:
        """Give the file another name; fails, atomically, if that is taken."""
        folder = os.open(name.parent, os.O_RDONLY)
        try:
            os.link(source, name.name, dst_dir_fd=folder)
        except FileExistsError as error:
            raise _exists(name) from error
        finally:
            os.close(folder)

    def _rename(self) -> None:
        assert self._hidden is not None  # noqa: S101 - for the type checker
        self._close()  # Windows renames no open files
        self._hidden.replace(self.path)
        self._hidden = None

    def _rename_to_free_name(self) -> None:
        assert self._hidden is not None  # noqa: S101 - for the type checker
        if os.name == "nt":
            self._close()
            try:
                self._hidden.rename(self.path)  # there, renaming refuses a name that is taken
            except FileExistsError as error:
                raise _exists(self.path) from error
            self._hidden = None
            return
        with contextlib.suppress(OSError):  # the file system has no hard links
            self._link(self._hidden, self.path)
            return
        if self.path.exists():
            raise _exists(self.path)
        self._rename()

    def write(self, content: Buffer) -> int:
        """Append bytes."""
        view = memoryview(content).cast("B")
        with _reporting(self.path):
            for start in range(0, len(view), COPY_CHUNK):
                piece = view[start : start + COPY_CHUNK]
                while piece:
                    count = os.write(self._fd, piece)
                    piece = piece[count:]
                    self._advance(count)
        return len(view)

    def append(self, data: Data) -> None:
        """Append a tensor's bytes: those that lie in a file are copied inside the kernel."""
        if isinstance(data, FileSlice):
            self._copy(data)
        else:
            for piece in ahead(data.chunks()) if isinstance(data, Computed) else data.chunks():
                self.write(piece)

    def stream(self) -> io.BufferedRandom:
        """A buffered file object over the same file, for libraries that want one; close it when done."""
        return io.BufferedRandom(_Raw(self), 1 << 20)

    def _copy(self, data: FileSlice) -> None:
        offset, left = data.offset, data.nbytes
        if hasattr(os, "copy_file_range"):
            source = data.file.fileno()
            while left:
                try:
                    count = os.copy_file_range(source, self._fd, min(left, COPY_CHUNK), offset)
                except InterruptedError:  # by a signal that nobody minds, such as a terminal's new size
                    continue
                except OSError as error:
                    if error.errno in _NO_KERNEL_COPY:
                        break
                    raise _explained(error, self.path) from error
                if not count:
                    break
                offset, left = offset + count, left - count
                self._advance(count)
        for piece in FileSlice(data.file, offset, left).chunks():
            self.write(piece)

    def _advance(self, count: int) -> None:
        self.position += count
        self._report(count)
        if self.position - self._written_back >= COPY_CHUNK and hasattr(os, "posix_fadvise"):
            # On Linux this starts writing dirty pages back without waiting, so that the disk works while the
            # copy goes on and the flush at the end finds little left to do.
            os.posix_fadvise(self._fd, self._written_back, self.position - self._written_back, os.POSIX_FADV_DONTNEED)
            self._written_back = self.position

    @property
    def descriptor(self) -> int:
        """The open file descriptor."""
        return self._fd


class _Raw(io.RawIOBase):
    """The file as a raw stream; :class:`io.BufferedRandom` needs one that reads, writes and seeks."""

    def __init__(self, file: AtomicFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        content = os.read(self._file.descriptor, len(buffer))
        memoryview(buffer)[: len(content)] = content
        return len(content)

    def write(self, content: Buffer) -> int:  # type: ignore[override]
        return self._file.write(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._file.descriptor, offset, whence)


def _reserve(fd: int, size: int) -> None:
    """Have the file system set the blocks aside at once, where it can.

    A full disk or quota is found before the first byte, and the copy into reserved blocks costs a fifth less. Called
    through ctypes because :func:`os.posix_fallocate` falls back on writing to every block.
    """
    if sys.platform != "linux" or sys.maxsize < 1 << 32 or not size:
        return
    import ctypes

    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(fd, _KEEP_SIZE, 0, size) and ctypes.get_errno() in _FULL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def flush_to_disk(fd: int) -> None:
    """Return when the bytes are on the disk, not merely with the drive (macOS tells the two apart)."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # not every file system there has it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def _flush_folder(folder: Path) -> None:
    """Make a new name last through a power cut, where folders can be flushed; the file is complete in any case."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError("it exists already", file=path, remedy="use --force, or choose another name with -o")


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turn the system's errors into ours."""
    try:
        yield
    except OSError as error:
        raise _explained(error, path) from error


def _explained(error: OSError, path: Path) -> OutputError | CorruptError:
    if error.errno in _FULL:
        return NoSpaceError(
            f"writing failed: {error.strerror}", file=path, remedy="free some space, or write to another disk"
        )
    if error.errno == errno.ENOENT:
        return OutputError("there is no such folder", file=path, remedy="make the folder first")
    return OutputError(f"writing failed: {error.strerror}", file=path, remedy="check the folder's permissions")
