"""metadata: string metadata set and dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..checkpoint import Change, Checkpoint, Note, Step
from ..errors import UsageError
from ..history import METADATA_KEY
from .base import Operation, Param


@dataclass(frozen=True)
class Metadata(Operation):
    """Set and drop string metadata, such as ModelSpec's fields; no tensor is touched.

    A value is text, as every value of a safetensors file's metadata is. Sdsurgery's own record can't be set.
    """

    name: ClassVar[str] = "metadata"

    set: Annotated[
        tuple[str, ...], Param("A field and its value; may be given several times.", metavar="KEY=VALUE")
    ] = ()
    drop: Annotated[tuple[str, ...], Param("A field to take out; may be given several times.", metavar="KEY")] = ()

    def check(self) -> None:
        """Refuse fields without a value, those named twice, and our own record."""
        self._wanted()

    def _wanted(self) -> dict[str, str | None]:
        """What each field is to hold; ``None`` for those to drop."""
        wanted: dict[str, str | None] = dict.fromkeys(self.drop)
        for text in self.set:
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise UsageError(f"{text!r} is no field with a value", remedy="write it as KEY=VALUE")
            if key in wanted:
                raise UsageError(f"{key!r} is named twice", remedy="say once what becomes of it")
            wanted[key] = value
        if not wanted:
            raise UsageError("no field is named", remedy="name one with --set KEY=VALUE or --drop KEY")
        if METADATA_KEY in wanted:
            raise UsageError(f"{METADATA_KEY!r} is the record of what was done", remedy="name another field")
        return wanted

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`Metadata`."""
        wanted = self._wanted()
        metadata, changes, notes = dict(checkpoint.metadata), [], []
        for key, new in wanted.items():
            old = metadata.pop(key, None)
            if new is not None:
                metadata[key] = new
            if old == new:
                notes.append(Note(f"{key} is {'not there' if new is None else 'so'} already"))
            else:
                changes.append(Change(key, "metadata", old, new))
        step = Step(self.name, self.parameters(), tuple(changes), tuple(notes))
        return checkpoint.evolve(checkpoint.tensors, step, metadata=metadata)
