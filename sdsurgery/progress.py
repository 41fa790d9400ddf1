"""How far a long piece of work is, told to whoever listens; by default nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Advance = Callable[[int], None]
"""Called with how much was done since the last call."""

Listener = Callable[[str, int, str], AbstractContextManager[Advance]]
"""Called with a description, how much there is to do, and of what; gives the function to call while it goes on."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def task(description: str, total: int, unit: str = "bytes") -> Iterator[Advance]:
    """A piece of work of that many bytes, or of something else."""
    listener = _listener.get()
    if listener is None:
        yield lambda _: None
    else:
        with listener(description, total, unit) as advance:
            yield advance


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Tell this listener of all work done in the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
