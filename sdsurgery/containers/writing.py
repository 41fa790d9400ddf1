"""Files that appear whole under their name or not at all, and copies that stay inside the kernel."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..errors import CorruptError, NoSpaceError, OutputError, OutputExistsError
from ..progress import Advance
from ..sources import Buffer, Computed, Data, FileSlice, Joined, SourceFile, ahead

if TYPE_CHECKING:
    from concurrent.futures import Executor

COPY_CHUNK = 64 << 20
"""Bytes that one call hands to the kernel: large enough to be fast, small enough for Ctrl-C and progress."""

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: the file grows by what is written, not by what is reserved
_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_NO_SUCH_CALL = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# What copy_file_range answers where it can't copy between these two files; EIO among them, because only reading and
# writing by ourselves tells which of the two disks is broken.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.EIO}


_HASHED_AT_ONCE = 1 << 20


class OutputFile:
    """A file that grows, and tells how far it is.

    Args:
        path: What it is called in errors.
        advance: Told of every byte written.
    """

    def __init__(self, path: Path, advance: Advance) -> None:
        self.path = path
        self._report = advance
        self._fd = -1
        self._written_back = 0
        self._worker: Executor | None = None
        self.position = 0

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
            self._worker = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

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

    def sha256(self, start: int) -> str:
        """Of all that was written from an offset on."""
        digest = hashlib.sha256()
        with _reporting(self.path):
            os.lseek(self._fd, start, os.SEEK_SET)
            while piece := os.read(self._fd, _HASHED_AT_ONCE):
                digest.update(piece)
        return digest.hexdigest()

    def overwrite_start(self, content: bytes) -> None:
        """Put other bytes in the place of the first ones; then the file is whole."""
        with _reporting(self.path):
            os.lseek(self._fd, 0, os.SEEK_SET)
            while content:
                content = content[os.write(self._fd, content) :]

    def append(self, *parts: Data) -> None:
        """Append tensors' bytes: those that lie in files are copied inside the kernel."""
        for computed, group in itertools.groupby(parts, lambda part: isinstance(part, Computed)):
            if computed:
                self._append_computed(list(group))
                continue
            for part in group:
                if isinstance(part, FileSlice):
                    self._copy(part)
                elif isinstance(part, Joined):
                    self.append(*part.parts)
                else:
                    for piece in part.chunks():
                        self.write(piece)

    def _append_computed(self, parts: Sequence[Data]) -> None:
        """A second thread computes while this one writes, the next tensor, too: most are smaller than a piece."""
        from concurrent.futures import ThreadPoolExecutor

        self._worker = self._worker or ThreadPoolExecutor(1)
        pieces = itertools.chain.from_iterable(part.chunks() for part in parts)
        for piece in ahead(pieces, self._worker):
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
        if self.position - self._written_back >= COPY_CHUNK:
            self._write_back()

    def _write_back(self) -> None:
        """On Linux this starts writing dirty pages back without waiting.

        So the disk works while the copy goes on, and the flush at the end finds little left to do.
        """
        if hasattr(os, "posix_fadvise") and self.position > self._written_back:
            os.posix_fadvise(self._fd, self._written_back, self.position - self._written_back, os.POSIX_FADV_DONTNEED)
            self._written_back = self.position

    @property
    def descriptor(self) -> int:
        """The open file descriptor."""
        return self._fd


class AtomicFile(OutputFile):
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
        super().__init__(Path(os.path.realpath(path)), advance)
        self._replace = replace
        self._size = size
        self._hidden: Path | None = None

    def __enter__(self) -> Self:
        with _reporting(self.path):
            self._check_target()
            try:
                self._fd = self._create()
                if self._replace and self.path.exists():
                    _take_over_permissions(self._fd, os.stat(self.path))
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

    def _check_target(self) -> None:
        if self.path.exists() and not self.path.is_file():
            raise OutputError("it exists and isn't a regular file", file=self.path, remedy="choose another name")
        if self.path.exists() and not self._replace:
            raise _exists(self.path)
        _check_space(self.path, self._size)

    def _create(self) -> int:
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        if self._can_name_later(flags):
            return os.open(self.path.parent, flags | os.O_TMPFILE, 0o666)
        # Noted before it exists, so that an interrupt between the two leaves nothing behind.
        self._hidden = _hidden_name(self.path)
        return os.open(self._hidden, flags | os.O_CREAT | os.O_EXCL, 0o666)

    def _can_name_later(self, flags: int) -> bool:
        """Whether a file without a name can be made here and named afterwards, tried out on an empty one."""
        if not hasattr(os, "O_TMPFILE"):
            return False
        name = _hidden_name(self.path)
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

    def _publish(self) -> None:
        if self._hidden is None and self._replace:
            self._hidden = _hidden_name(self.path)
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


class AtomicFolder:
    """A folder under construction; as whole or not at all as :class:`AtomicFile`.

    It is made under a hidden name beside the final one, flushed when everything is in it, and renamed. One that is
    replaced changes names with it in one step where the system can.

    Args:
        path: The final name; a link is followed.
        replace: Whether a folder that has this name may be replaced; it gives its permissions on.
        size: Bytes that will be written.
        advance: Told of every byte written.
    """

    def __init__(self, path: Path, *, replace: bool, size: int, advance: Advance) -> None:
        self.path = Path(os.path.realpath(path))
        self._replace = replace
        self._size = size
        self._report = advance
        self._hidden = _hidden_name(self.path)
        self._old: Path | None = None
        self._before: os.stat_result | None = None
        self._folders: dict[str, None] = {}
        self._files: list[Path] = []

    def __enter__(self) -> Self:
        with _reporting(self.path):
            if os.path.lexists(self.path):
                self._before = os.stat(self.path)
                if not stat.S_ISDIR(self._before.st_mode):
                    raise OutputError("it exists and isn't a folder", file=self.path, remedy="choose another name")
                if not self._replace:
                    raise _exists(self.path)
            _check_space(self.path, self._size)
            try:
                self._hidden.mkdir()
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
                    self._flush()
                    self._publish()
        finally:
            self._discard()

    def write(self, name: str, content: Sequence[Data]) -> None:
        """Make a file in it; folders in front of its name are made with it."""
        with _reporting(self.path / name):
            place = self._place(name)
            file = _MemberFile(self.path / name, place, self._report)
            self._files.append(place)
            try:
                with contextlib.suppress(FileNotFoundError):
                    if self._before and stat.S_ISREG((old := os.lstat(self.path / name)).st_mode):
                        _take_over_permissions(file.descriptor, old)
                _reserve(file.descriptor, sum(part.nbytes for part in content))
                file.append(*content)
            finally:
                file.finish()

    def again(self, name: str, first: str, *, link: bool) -> None:
        """Have a file in it a second time, with one copy of its bytes on the disk if that can be.

        Args:
            name: Its second name.
            first: Its first.
            link: Whether the two may be one file, where the file system can't share the bytes of two.
        """
        with _reporting(self.path / name):
            source, place = self._hidden / first, self._place(name)
            if _cloned(source, place):
                self._files.append(place)
                return
            with contextlib.suppress(OSError):
                if link:
                    os.link(source, place, follow_symlinks=False)
                    return
            file = SourceFile(source)
            self.write(name, [FileSlice(file, 0, file.size)])
            file.close()

    def keep(self, name: str) -> None:
        """Take over what has this name in the folder that is replaced, by a link where that can be."""
        with _reporting(self.path / name):
            self._keep(name)

    def _keep(self, name: str) -> None:
        source, place = self.path / name, self._place(name)
        mode = os.lstat(source).st_mode
        if stat.S_ISLNK(mode):
            place.symlink_to(os.readlink(source))  # noqa: PTH115 - its text exactly, which a Path would tidy up
        elif stat.S_ISDIR(mode):
            self._make_folder(name)
            for inner in sorted(os.listdir(source)):
                self._keep(f"{name}/{inner}")
        else:
            try:
                os.link(source, place, follow_symlinks=False)
            except OSError:
                if not stat.S_ISREG(mode):
                    raise
                file = SourceFile(source)
                self.write(name, [FileSlice(file, 0, file.size)])
                shutil.copystat(source, place)
                file.close()

    def _place(self, name: str) -> Path:
        parents = name.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            self._make_folder("/".join(parents[:depth]))
        return self._hidden / name

    def _make_folder(self, name: str) -> None:
        if name not in self._folders:
            self._folders[name] = None
            (self._hidden / name).mkdir()

    def _flush(self) -> None:
        """Wait for the disk once everything is written: it had its work while the rest was copied."""
        for file in self._files:
            fd = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
            try:
                flush_to_disk(fd)
            finally:
                os.close(fd)
        for name in [*reversed(self._folders), ""]:
            self._finish_folder(name)

    def _finish_folder(self, name: str) -> None:
        if os.name == "nt":
            return
        fd = os.open(self._hidden / name, os.O_RDONLY)
        try:
            old = self.path / name
            if self._before and old.is_dir():
                _take_over_permissions(fd, os.stat(old))
            with contextlib.suppress(OSError):  # not every file system can flush a folder
                os.fsync(fd)
        finally:
            os.close(fd)

    def _publish(self) -> None:
        if self._before is None:
            self._take_free_name()
        else:
            self._take_place()
        _flush_folder(self.path.parent)

    def _take_free_name(self) -> None:
        try:
            if _renameat2(self._hidden, self.path, _RENAME_NOREPLACE):
                return
        except FileExistsError as error:
            raise _exists(self.path) from error
        if os.path.lexists(self.path):  # on other systems a rename replaces an empty folder
            raise _exists(self.path)
        self._hidden.rename(self.path)

    def _take_place(self) -> None:
        now = os.stat(self.path)
        if self._before is None or (now.st_dev, now.st_ino) != (self._before.st_dev, self._before.st_ino):
            raise _exists(self.path)  # somebody else's by now
        if not _renameat2(self._hidden, self.path, _RENAME_EXCHANGE):
            self._old = _hidden_name(self.path)
            self.path.rename(self._old)
            self._hidden.rename(self.path)

    def _discard(self) -> None:
        """Leave nothing but a folder that has the final name: the new one, or the one that was there before."""
        try:
            self._clean_up()
        except BaseException:  # an interrupt, which comes once
            self._clean_up()
            raise

    def _clean_up(self) -> None:
        if self._old is not None and os.path.lexists(self.path):
            _remove_tree(self._old)
        elif self._old is not None:
            with contextlib.suppress(OSError):  # what went wrong before matters more
                self._old.rename(self.path)
        _remove_tree(self._hidden)  # after an exchange, it is the old one that is called that


def _cloned(source: Path, place: Path) -> bool:
    """Make a file that shares another's bytes until one of the two is written to; on file systems that can."""
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    with source.open("rb") as old, place.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            place.unlink()
            return False
    return True


_FICLONE = 0x40049409
"""``linux/fs.h``: ``_IOW(0x94, 9, int)``."""


class _MemberFile(OutputFile):
    """A file in a folder that is under construction."""

    def __init__(self, path: Path, place: Path, advance: Advance) -> None:
        super().__init__(path, advance)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(place, flags, 0o666)

    def finish(self) -> None:
        """Give back what was reserved and not used, and let the disk begin with what it didn't get yet."""
        try:
            os.ftruncate(self._fd, self.position)
            self._write_back()
        finally:
            self._close()


class _Raw(io.RawIOBase):
    """The file as a raw stream; :class:`io.BufferedRandom` needs one that reads, writes and seeks."""

    def __init__(self, file: OutputFile) -> None:
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


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".sdsurgery-{os.urandom(8).hex()}.partial")


def _take_over_permissions(fd: int, old: os.stat_result) -> None:
    if hasattr(os, "fchmod"):
        os.fchmod(fd, old.st_mode & 0o7777)
    if hasattr(os, "fchown"):
        with contextlib.suppress(PermissionError):  # only root may give files away; others own what they write
            os.fchown(fd, old.st_uid, old.st_gid)


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise NoSpaceError(
            f"{size:,} bytes are needed and {free:,} are free",
            file=path,
            remedy="free some space, or write to another disk",
        )


def _remove_tree(folder: Path) -> None:
    """Remove a folder, also where parts of it may not be written."""
    for place, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            Path(place).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """Rename with a promise that plain renames can't give; ``False`` where the system doesn't know how."""
    number = _call(
        "renameat2", "int char_p int char_p uint", _AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag
    )
    if number in _NO_SUCH_CALL:
        return False
    if number:
        raise OSError(number, os.strerror(number))
    return True


def _call(name: str, types: str, *arguments: Any) -> int:
    """Call what Linux's C library has and Python doesn't offer; its error number, 0 where it went well."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return errno.ENOSYS
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return errno.ENOSYS
    function.argtypes = [getattr(ctypes, f"c_{kind}") for kind in types.split()]
    return ctypes.get_errno() if function(*arguments) else 0


def _reserve(fd: int, size: int) -> None:
    """Have the file system set the blocks aside at once, where it can.

    A full disk or quota is found before the first byte, and the copy into reserved blocks costs a fifth less. Not by
    :func:`os.posix_fallocate`, which falls back on writing to every block.
    """
    number = _call("fallocate", "int int int64 int64", fd, _KEEP_SIZE, 0, size) if size else 0
    if number in _FULL:
        raise OSError(number, os.strerror(number))


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
