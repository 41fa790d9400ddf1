"""The command ``sdsurgery``, also ``python -m sdsurgery``."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Self, TextIO


class PatientStream(io.TextIOWrapper):
    """A text stream that any text can be written to, and that goes on when nobody reads it any more.

    So ``sdsurgery fix-clip --check model.ckpt | head -1`` ends with the code that answers the question.
    """

    def write(self, text: str, /) -> int:
        """Write; what nobody reads is thrown away."""
        with self._deaf_ears():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; what nobody reads is thrown away."""
        with self._deaf_ears():
            super().flush()

    @contextlib.contextmanager
    def _deaf_ears(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)

    @classmethod
    def around(cls, stream: TextIO | None) -> Self:
        """The same stream, patient; where there is none, one that nobody reads."""
        if stream is None:
            return cls(open(os.devnull, "wb"), encoding="utf-8")
        return cls(stream.buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.isatty())


def main() -> None:
    """Run the command line and exit with its code."""
    from .cli import run

    sys.stdout, sys.stderr = PatientStream.around(sys.stdout), PatientStream.around(sys.stderr)
    code = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        os._exit(code)  # taking torch down takes a quarter of a second, and all that was written is on the disk
    sys.exit(code)


if __name__ == "__main__":
    main()
