"""Names as people are told them, and as records have them."""

from __future__ import annotations

from collections.abc import Iterable


def listed(items: Iterable[object], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def bare(name: str) -> str:
    """A file's name without folders, whatever system it comes from."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]
