"""The SHA-256 of bytes wherever they lie."""

from __future__ import annotations

import hashlib

from .progress import Advance
from .sources import Data, SourceFile, sweep

_CHUNK = 1 << 20
"""Bytes at a time, which a core's cache holds."""

_LEGACY_OFFSET = 0x100000
_LEGACY_LENGTH = 0x10000


def sha256_of(data: Data, advance: Advance = lambda _count: None) -> str:
    """The SHA-256 in hexadecimal, read in pieces.

    Args:
        data: What to read.
        advance: Told of the bytes that are done.
    """
    digest = hashlib.sha256()
    for piece in sweep((data,), _CHUNK):
        digest.update(piece)
        advance(len(piece))
    return digest.hexdigest()


def legacy_hash(file: SourceFile) -> str:
    """A1111's first hash, Civitai's AutoV1: 8 digits of the SHA-256 of 64 KiB at offset 1 MiB."""
    length = min(_LEGACY_LENGTH, max(0, file.size - _LEGACY_OFFSET))
    return hashlib.sha256(file.read(_LEGACY_OFFSET, length)).hexdigest()[:8]
