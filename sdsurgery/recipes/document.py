"""A YAML document as plain values that know their lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UnreadableError, UsageError
from ..sources import SourceFile

Place = tuple[str | int, ...]
"""Where a value stands: the keys and indexes that lead to it."""

_LONGEST = 1 << 20
"""Bytes of the longest recipe that is read."""
_MOST_VALUES = 10_000
"""More can only be aliases of aliases."""

_REFERENCE = re.compile(r"\$(\$|\{([^{}]*)\})")


class RecipeError(UsageError):
    """What is wrong with a recipe, a line for each fault.

    Attributes:
        faults: Each with the line where it is, from 1 on.
    """

    def __init__(self, path: Path | str, faults: list[tuple[int, str]]) -> None:
        self.faults = sorted(dict.fromkeys(faults))
        lines = [f"line {line}: {message}" for line, message in self.faults]
        more = "mend them" if len(lines) > 1 else "mend it"
        message = f"{len(lines)} faults" if len(lines) > 1 else lines.pop()
        super().__init__(message, file=path, remedy=f"{more}; nothing was read or written", details=lines)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: ``1e-5`` is a number, ``2026-11-23`` and ``1:30`` are text."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    dropped = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"}
    number = re.compile(r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
    whole = re.compile(r"[-+]?(0|[1-9]\d*)")
    found = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in dropped]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        full = [
            (f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern.pattern})$"))
            for kind, pattern in (("int", whole), ("float", number))
        ]
        found[first] = [*full, *found.get(first, [])]
    return found


_Loader.yaml_implicit_resolvers = _resolvers()


@dataclass(frozen=True, slots=True)
class Document:
    """What a recipe's file says.

    Attributes:
        path: The file.
        content: Its values, as JSON has them.
        lines: The line of each value, from 1 on, by its place; of an entry of a mapping the line of its key.
    """

    path: Path
    content: Any
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int:
        """The line of a value, or of the nearest one around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read(path: Path) -> Document:
    """Read a document.

    Raises:
        UnreadableError: If the file can't be read.
        RecipeError: If it is no YAML, or of more than values, lists and mappings with texts as keys.
    """
    text = text_of(path, _LONGEST)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.problem, error.context) if part)
        raise RecipeError(path, [((mark.line if mark else 0) + 1, f"no YAML: {said}")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(path, [(1, "no YAML: it holds what no text file does")]) from error
    reader = _Reader(path)
    try:
        return Document(path, reader.value(node, ()) if node else None, reader.lines)
    except RecursionError as error:
        raise RecipeError(path, [(1, "its values lie too deep in each other")]) from error


def text_of(path: Path, longest: int) -> str:
    """What a small text file holds.

    Raises:
        UnreadableError: If it can't be read, is too large, or is no text.
    """
    file = SourceFile(path)
    try:
        if file.size > longest:
            raise UnreadableError(f"it is too large: {file.size:,} bytes", file=path, remedy="name a recipe")
        return file.read(0, file.size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError("it is no text in UTF-8", file=path, remedy="name a recipe") from error
    finally:
        file.close()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Place, int] = {}
        self.count = 0
        self.constructor = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)
        self.count += 1
        if self.count > _MOST_VALUES:
            raise RecipeError(self.path, [(line, f"more than {_MOST_VALUES:,} values")])
        if isinstance(node, yaml.MappingNode):
            return dict(self._entries(node, place))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(each, (*place, number)) for number, each in enumerate(node.value)]
        if node.tag.rpartition(":")[2] not in {"str", "int", "float", "bool", "null"}:
            raise RecipeError(self.path, [(line, f"{node.tag} is no kind of value that a recipe has")])
        try:
            return self.constructor.construct_object(node)
        except (ValueError, KeyError, IndexError) as error:
            raise RecipeError(self.path, [(line, f"{node.value!r} is none of what its tag says")]) from error

    def _entries(self, node: yaml.MappingNode, place: Place) -> Iterator[tuple[str, Any]]:
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(self.path, [(line, "a key must be a text")])
            if key.value in seen:
                raise RecipeError(self.path, [(line, f"{key.value!r} stands here for the second time")])
            seen.add(key.value)
            self.lines[(*place, key.value)] = line
            yield key.value, self.value(value, (*place, key.value))


def scalar(text: str) -> Any:
    """A value as it would stand in a recipe, for one that is given on a command line."""
    try:
        node = yaml.compose(text, Loader=_Loader) if text.strip() else None
    except (yaml.YAMLError, RecursionError):  # a text that means something else in YAML
        return text
    plain = isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in {"int", "float", "bool"}
    return yaml.constructor.SafeConstructor().construct_object(node) if node and plain else text


class Dumper(yaml.SafeDumper):
    """Writes texts so that they are read as texts again."""


Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable: its value, and how it was written, which is what stands within a text."""

    value: Any
    text: str


def substituted(value: Any, variables: Mapping[str, Variable], place: Place, faults: list[tuple[Place, str]]) -> Any:
    """A value with ``${name}`` replaced: by the variable itself where it is all of a text, by its text within one.

    Args:
        value: Any part of a document.
        variables: By name.
        place: Where it stands.
        faults: Names that there are none of are added here.
    """
    if isinstance(value, dict):
        return {key: substituted(each, variables, (*place, key), faults) for key, each in value.items()}
    if isinstance(value, list):
        return [substituted(each, variables, (*place, number), faults) for number, each in enumerate(value)]
    if not isinstance(value, str):
        return value

    def found(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        if match[2] not in variables:
            faults.append((place, f"there is no variable {match[2]!r}{meant(match[2], variables)}"))
            return ""
        return variables[match[2]].text

    alone = _REFERENCE.fullmatch(value)
    if alone and alone[2] in variables:
        return variables[alone[2]].value
    return _REFERENCE.sub(found, value)


def meant(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """What was probably meant, or what there is, to stand behind a message."""
    import difflib

    near = difflib.get_close_matches(word, list(known), 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(known)}" if known else ""
