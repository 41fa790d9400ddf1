"""Protocol buffers' wire format, read from a file field by field, without holding what a field contains; and written.

An ONNX graph with its weights within it takes gigabytes; of those only the places are wanted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import CorruptError
from ..sources import SourceFile

_WINDOW = 1 << 16
_LONGEST_TEXT = 16 << 20
"""Bytes; names are short, and what exporters say of a graph fits many times."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a message.

    Attributes:
        number: Which.
        wire: How it is encoded.
        value: Of a varint or a number of fixed size.
        start: Where the content of a field of bytes begins.
        end: And where it ends.
    """

    number: int
    wire: int
    value: int = 0
    start: int = 0
    end: int = 0


class Wire:
    """A file read by position, through a small window."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self._window = b""
        self._begin = 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message in that part of the file.

        Raises:
            CorruptError: If it is none.
        """
        position = start
        while position < end:
            tag, position = self._varint(position, end)
            number, wire = tag >> 3, tag & 7
            if not number:
                raise self._corrupt(position)
            if wire == VARINT:
                value, position = self._varint(position, end)
                yield Field(number, wire, value)
            elif wire == BYTES:
                length, position = self._varint(position, end)
                if length > end - position:
                    raise self._corrupt(position)
                yield Field(number, wire, start=position, end=position + length)
                position += length
            elif wire in {FIXED32, FIXED64}:
                size = 4 if wire == FIXED32 else 8
                if size > end - position:
                    raise self._corrupt(position)
                yield Field(number, wire, int.from_bytes(self.read(position, position + size), "little"))
                position += size
            else:
                raise self._corrupt(position)

    def read(self, start: int, end: int) -> bytes:
        """The bytes of a part of the file."""
        if not self._begin <= start <= end <= self._begin + len(self._window):
            if end - start > _WINDOW:
                return self.file.read(start, end - start)
            self._begin = start
            self._window = self.file.read(start, min(_WINDOW, self.file.size - start))
        return self._window[start - self._begin : end - self._begin]

    def text(self, field: Field) -> str:
        """A field that is a text.

        Raises:
            CorruptError: If it is none.
        """
        if field.wire != BYTES or field.end - field.start > _LONGEST_TEXT:
            raise self._corrupt(field.start)
        try:
            return self.read(field.start, field.end).decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(field.start) from error

    def numbers(self, field: Field, alone: int = VARINT) -> Iterator[int]:
        """A repeated integer, packed or not; if not, it is encoded as ``alone`` says."""
        if field.wire == alone:
            yield field.value
            return
        position = field.start
        while position < field.end:
            value, position = self._varint(position, field.end)
            yield value

    def encoded(self, field: Field) -> bytes:
        """A field as it stands in the file."""
        if field.wire == BYTES:
            return content(field.number, self.read(field.start, field.end))
        if field.wire == VARINT:
            return integer(field.number, field.value)
        return varint(field.number << 3 | field.wire) + field.value.to_bytes(
            4 if field.wire == FIXED32 else 8, "little"
        )

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                raise self._corrupt(position)
            byte = self.read(position, position + 1)[0]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80 and value < 1 << 64:
                return value, position
        raise self._corrupt(position)

    def _corrupt(self, position: int) -> CorruptError:
        return CorruptError(
            f"at byte {position} it is no ONNX graph", file=self.file.path, remedy="download or export it again"
        )


def varint(value: int) -> bytes:
    """An integer; a negative one takes ten bytes."""
    if 0 <= value < 0x80:
        return _SHORT[value]
    value &= (1 << 64) - 1
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


_SHORT = [bytes([value]) for value in range(0x80)]


def integer(number: int, value: int) -> bytes:
    """A field that is an integer."""
    return varint(number << 3 | VARINT) + varint(value)


def real(number: int, value: float) -> bytes:
    """A field that is a float of 32 bits."""
    return varint(number << 3 | FIXED32) + struct.pack("<f", value)


def heading(number: int, length: int) -> bytes:
    """How a field of that many bytes begins."""
    return varint(number << 3 | BYTES) + varint(length)


def content(number: int, value: bytes | bytearray) -> bytes:
    """A field of bytes, or a message."""
    return heading(number, len(value)) + value


def text(number: int, value: str) -> bytes:
    """A field that is a text."""
    return content(number, value.encode())
