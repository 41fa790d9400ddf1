"""What an operation is: a small frozen object that turns a checkpoint into another.

Its fields are declared once, with :class:`Param`; the Python API, the command line and the record in the metadata
all read that one declaration.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from .. import history
from ..checkpoint import Checkpoint, Input
from ..containers import open as open_checkpoint
from ..errors import UsageError
from ..wording import bare

Source = str | os.PathLike[str] | Checkpoint
"""A further checkpoint: a file's name, or one that is open."""


@dataclass(frozen=True, slots=True)
class Param:
    """How a field of an operation is shown to people.

    Attributes:
        help: What it means, in a sentence.
        positional: Whether it stands on the command line without an option's name.
        flag: The option's name where it isn't the field's own.
        metavar: What stands for its value in the usage.
    """

    help: str
    positional: bool = False
    flag: str | None = None
    metavar: str | None = None


@dataclass(frozen=True, slots=True)
class Declared:
    """A field of an operation, with its type and how it is shown."""

    field: Field[Any]
    type: Any
    param: Param


class Operation(ABC):
    """Base of all operations; calling one with a checkpoint gives another."""

    name: ClassVar[str]
    whole: ClassVar[bool] = True
    """Whether the result is still the model, and may take its place."""
    keeps_container: ClassVar[bool] = True
    """Whether the result is a single file or a folder as the input is, and may take its place."""
    label: str = "fixed"
    """What stands in the name of an output that the user didn't name: ``NAME.fixed.safetensors``."""

    def __post_init__(self) -> None:
        """Refuse values that the declaration doesn't know; a single name stands for a list of one."""
        for declared in self.declared():
            name, value = declared.field.name, getattr(self, declared.field.name)
            kind = declared.type
            if get_origin(kind) is tuple:
                single = isinstance(value, str | os.PathLike | Checkpoint)
                kind, value = get_args(kind)[0], (value,) if single else tuple(value)
                object.__setattr__(self, name, value)
            choices = [choice for option in (kind, *get_args(kind)) for choice in _choices(option)]
            for given in value if isinstance(value, tuple) else (value,):
                if choices and given not in choices and given != declared.field.default:
                    raise UsageError(
                        f"{given!r} is no {name} that {self.name} knows", remedy=f"choose from {', '.join(choices)}"
                    )

    @property
    def configs_read(self) -> tuple[Path, ...]:
        """Files besides models that it reads, which no output may replace."""
        return ()

    def check(self) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse parameters that make no sense whatever the model; the call does so, too.

        Raises:
            UsageError: Names what is wrong.
        """

    @abstractmethod
    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint after this operation; nothing is written, and no weight read that needn't be."""

    @classmethod
    def declared(cls) -> Iterator[Declared]:
        """Its fields, in order."""
        hints = get_type_hints(cls, include_extras=True)
        for field in fields(cls):  # type: ignore[arg-type]
            hint = hints[field.name]
            if get_origin(hint) is Annotated:
                kind, *extras = get_args(hint)
                yield Declared(field, kind, next(extra for extra in extras if isinstance(extra, Param)))

    def with_sources(self, opened: Callable[[Any], Checkpoint]) -> Self:
        """The same operation with its sources opened.

        Args:
            opened: Makes a checkpoint of what was given for one.
        """
        found: dict[str, Any] = {}
        for declared in self.declared():
            value = getattr(self, declared.field.name)
            if value is not None and names_checkpoints(declared.type):
                found[declared.field.name] = tuple(map(opened, value)) if isinstance(value, tuple) else opened(value)
        return replace(self, **found) if found else self  # type: ignore[type-var]

    def parameters(self) -> dict[str, Any]:
        """Its parameters as they are recorded: those that aren't the default, with files by name alone."""
        recorded: dict[str, Any] = {}
        for declared in self.declared():
            value = getattr(self, declared.field.name)
            if value is declared.field.default or value == declared.field.default:
                continue
            flag = (declared.param.flag or declared.field.name).lstrip("-").replace("-", "_")
            recorded[flag] = _recorded(value, files=_names_files(declared.type))
        return recorded


def _choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _names_files(annotation: Any) -> bool:
    """Whether values of a type may be names of files."""
    origin = get_origin(annotation) or annotation
    return origin in {os.PathLike, Path} or any(map(_names_files, get_args(annotation)))


def names_checkpoints(annotation: Any) -> bool:
    """Whether values of a type may be checkpoints."""
    return annotation is Checkpoint or any(map(names_checkpoints, get_args(annotation)))


def _recorded(value: Any, *, files: bool) -> Any:
    if isinstance(value, Checkpoint):
        return value.origin.name if value.origin else "in memory"
    if files and isinstance(value, str | os.PathLike):
        return bare(os.fspath(value))
    return [_recorded(each, files=files) for each in value] if isinstance(value, tuple) else value


def opened(source: Source) -> Checkpoint:
    """The checkpoint that a source names."""
    return source if isinstance(source, Checkpoint) else open_checkpoint(source)


def input_record(checkpoint: Checkpoint, sha256: str | None = None) -> tuple[Input, ...]:
    """How a further checkpoint is recorded: its file, how that was made, and what was done to it since."""
    made, steps = tuple(history.made(checkpoint.metadata)), tuple(history.applied(checkpoint.steps))
    origin = checkpoint.origin
    if origin is None:
        return (Input("in memory", None, made, steps),)
    return (Input(origin.name, sha256 or origin.sha256, made, steps),)
