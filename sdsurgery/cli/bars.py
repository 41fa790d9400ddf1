"""Progress on a terminal, for work that takes more than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from ..progress import Advance

if TYPE_CHECKING:
    from rich.progress import Progress

_PATIENCE = 1.0


class Bars:
    """Draws a bar for a task once it has taken a second; rich is imported no sooner."""

    def __init__(self, *, quiet: bool) -> None:
        self._silent = quiet or not sys.stderr.isatty()
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @contextmanager
    def task(self, description: str, total: int, unit: str = "bytes") -> Iterator[Advance]:
        """Listen to one task; see :data:`sdsurgery.progress.Listener`."""
        begun, done, bar = time.monotonic(), 0, None

        def advance(count: int) -> None:
            nonlocal done, bar
            done += count
            if self._silent or time.monotonic() - begun < _PATIENCE:
                return
            shown = self._shown()
            if bar is None:
                bar = shown.add_task(description, total=total, unit=unit)
            shown.update(bar, completed=done)

        yield advance
        if bar is not None:
            self._shown().remove_task(bar)

    def _shown(self) -> Progress:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, Task, TextColumn, TimeRemainingColumn
            from rich.text import Text

            class Amount(DownloadColumn):
                """Bytes as sizes, and anything else as its number."""

                def render(self, task: Task) -> Text:
                    if task.fields["unit"] == "bytes":
                        return super().render(task)
                    return Text(f"{task.completed:.0f}/{task.total or 0:.0f} {task.fields['unit']}")

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                Amount(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
        return self._progress
