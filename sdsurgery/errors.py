"""What can go wrong: one class a kind, each with what to do about it.

Every error carries the file and the key it speaks of, where there is one, and a remedy. The exit codes are
those of the command line: 1 the answer is no, 2 wrong usage, 3 an input is at fault, 4 an output is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar


class SurgeryError(Exception):
    """Base of everything that sdsurgery raises on purpose.

    Attributes:
        message: What is wrong.
        file: With which file.
        key: With which key.
        remedy: What to do about it.
        details: What else there is to say, in lines.
    """

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 3

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] | None = None,
        key: str | None = None,
        remedy: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(Path(file))
        self.key = key
        self.remedy = remedy
        self.details = tuple(details)

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        return where + self.message

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints under ``error``."""
        return {
            "kind": self.kind,
            "message": self.message,
            "file": self.file,
            "key": self.key,
            "remedy": self.remedy,
            **({"details": list(self.details)} if self.details else {}),
        }


class RefusedError(SurgeryError):
    """The values themselves speak against doing it, such as weights that would overflow."""

    kind = "refused"
    exit_code = 1


class UsageError(SurgeryError):
    """The call makes no sense, whatever the files hold."""

    kind = "usage"
    exit_code = 2


class InputError(SurgeryError):
    """An input is at fault; the kinds below say how."""

    kind = "input"


class UnreadableError(InputError):
    """The file isn't there, or the system won't let us read it."""

    kind = "unreadable"


class CorruptError(InputError):
    """The bytes contradict themselves or their container's format."""

    kind = "corrupt"


class HostileError(InputError):
    """The file asks for something that only an attack needs."""

    kind = "hostile"


class UnsupportedError(InputError):
    """The file may be sound, but it is nothing that sdsurgery reads."""

    kind = "unsupported"


class MismatchError(InputError):
    """The file is sound but isn't what the operation needs: keys are missing, or shapes differ."""

    kind = "mismatch"


class OutputError(SurgeryError):
    """The output can't be written; nothing was."""

    kind = "output"
    exit_code = 4


class OutputExistsError(OutputError):
    """Something already has the output's name, and nobody said that it may be replaced."""

    kind = "exists"


class NoSpaceError(OutputError):
    """The output doesn't fit on its disk."""

    kind = "no-space"
