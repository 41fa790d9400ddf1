"""Commands made from the declarations of operations."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click

from ..errors import UsageError
from ..operations import OPERATIONS, Operation
from ..operations.base import Declared
from .common import MODEL, WriteOptions, perform, write_options

_SHARED = {"force"}
"""Fields that are set by an option that every command has."""


def surgery_command(name: str) -> click.Command:
    """``NAME MODEL [...]``: apply one operation and write the result."""
    operation = OPERATIONS[name]

    def callback(model: Path, options: WriteOptions, **values: Any) -> None:
        made = build(operation, values, options)
        perform(model, [made], options, label=made.label)

    return command(operation.name, operation, write_options()(callback), [MODEL])


def command(
    name: str,
    operation: type[Operation],
    callback: Callable[..., Any],
    decorators: list[Callable[[Any], Any]],
) -> click.Command:
    """A click command with the operation's parameters and its docstring as help."""
    for decorator in reversed([*decorators, *parameters(operation)]):
        callback = decorator(callback)
    return click.command(name, help=inspect.getdoc(operation))(callback)


def build(operation: type[Operation], values: dict[str, Any], options: WriteOptions) -> Operation:
    """The operation that parsed values name."""
    if options.in_place and not operation.keeps_container:
        raise UsageError(
            f"{operation.name} makes a file of a folder, or a folder of a file", remedy="name an output: -o"
        )
    if options.in_place and not operation.whole:
        raise UsageError(
            f"{operation.name} would replace the model by a part of it", remedy="write to another file with -o"
        )
    shared = {declared.field.name for declared in operation.declared()} & _SHARED
    return operation(**values, **{name: getattr(options, name) for name in shared})


def parameters(operation: type[Operation], without: Collection[str] = _SHARED) -> list[Callable[[Any], Any]]:
    """Click's decorators for the fields of an operation."""
    return [_decorator(declared) for declared in operation.declared() if declared.field.name not in without]


def _decorator(declared: Declared) -> Callable[[Any], Any]:
    name, param = declared.field.name, declared.param
    required = declared.field.default is MISSING
    kind, multiple = _click_type(declared.type)
    if param.positional:
        count: dict[str, Any] = {"nargs": -1, "required": True} if multiple else {}
        return click.argument(name, type=kind, metavar=param.metavar, **count)
    flag = param.flag or "--" + name.replace("_", "-")
    if declared.type is bool:
        return click.option(flag, name, is_flag=True, help=param.help)
    # click takes a default of None for a value that was given.
    default: dict[str, Any] = {} if required or multiple else {"default": declared.field.default}
    return click.option(
        flag, name, type=kind, multiple=multiple, required=required, help=param.help, metavar=param.metavar, **default,
        show_default=declared.field.default if isinstance(declared.field.default, str) else False,
    )  # fmt: skip


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """Click's type for an annotation, and whether the option may be repeated."""
    if get_origin(annotation) in {Union, types.UnionType}:
        choices = [choice for choice in get_args(annotation) if choice is not type(None)]
        literal = next((choice for choice in choices if get_origin(choice) is Literal), None)
        if literal:
            return click.Choice(get_args(literal)), False
        number = next((kind for kind in (int, float, str) if choices == [kind]), None)
        return number or click.Path(path_type=Path), False
    if get_origin(annotation) is tuple:
        return _click_type(get_args(annotation)[0])[0], True
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation)), False
    return annotation, False
