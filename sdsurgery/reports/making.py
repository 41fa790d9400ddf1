"""How a model was made, as a tree: its steps under the file that it began with, and their further inputs under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .terminal import printable

_DEEPEST = 20
_DIGITS = 12
"""Of a hash, as many as tell it from others."""


@dataclass(slots=True)
class _Node:
    label: str
    children: list[_Node] = field(default_factory=list)


def making(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The tree of a record, line by line; see :mod:`sdsurgery.history`.

    The lines are never cut or broken, however narrow the terminal. A record in somebody's metadata may hold anything.
    """
    root = _made(steps, 0)
    yield root.label
    yield from _drawn(root.children, "")


def _drawn(nodes: Sequence[_Node], before: str) -> Iterator[str]:
    for node in nodes:
        is_last = node is nodes[-1]
        yield f"{before}{'└── ' if is_last else '├── '}{node.label}"
        yield from _drawn(node.children, before + ("    " if is_last else "│   "))


def _made(steps: Sequence[Any], depth: int) -> _Node:
    source = _mapping(_mapping(steps[0]).get("source"))
    return _Node(f"made from {_file(source) if source else 'an unnamed file'}", _steps(steps, depth))


def _steps(steps: Sequence[Any], depth: int) -> list[_Node]:
    return [_step(_mapping(step), depth) for step in steps]


def _step(step: Mapping[str, Any], depth: int) -> _Node:
    changes = ", ".join(f"{count} {kind}" for kind, count in _mapping(step.get("changes")).items())
    inputs = [_mapping(each) for each in _list(step.get("inputs"))]
    names = {str(each.get("name")) for each in inputs}
    given = "".join(
        f" {name}={_value(value)}"
        for name, value in _mapping(step.get("parameters")).items()
        if not names.issuperset(map(str, value if isinstance(value, list) else [value]))
    )
    label = printable(f"{step.get('operation')}{given}: {changes or 'nothing changed'}")
    if depth == _DEEPEST:
        return _Node(label, [_Node("…")] if inputs else [])
    return _Node(label, [_input(each, depth + 1) for each in inputs])


def _input(entry: Mapping[str, Any], depth: int) -> _Node:
    made, since = _list(entry.get("made")), _list(entry.get("steps"))
    return _Node(_file(entry), ([_made(made, depth)] if made else []) + _steps(since, depth))


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _file(entry: Mapping[str, Any]) -> str:
    sha256 = entry.get("sha256")
    return printable(str(entry.get("name")) + (f" ({sha256[:_DIGITS]})" if isinstance(sha256, str) else ""))


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
