"""pipe: operations one after another, without files in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..operations import OPERATIONS, Operation
from .common import MODEL, WriteOptions, perform, write_options
from .surgery import build, command

_SEPARATOR = "+"


class _PipeCommand(click.Command):
    """Splits its arguments where the first operation is named; what follows belongs to the operations."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next((place for place, word in enumerate(args) if place and word in OPERATIONS), len(args))
        ctx.meta["operations"] = args[first:]
        return super().parse_args(ctx, args[:first])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "OPERATION [ARGS]...", "[+ OPERATION [ARGS]...]..."]


def pipe_command(_name: str) -> click.Command:
    """``pipe MODEL -o OUT operation + operation + ...``."""

    @click.command("pipe", cls=_PipeCommand)
    @MODEL
    @write_options()
    @click.pass_context
    def pipe(context: click.Context, model: Path, options: WriteOptions) -> None:
        """Apply several operations in one pass, without files in between.

        sdsurgery pipe model.ckpt -o out.safetensors merge-vae vae.pt + fix-clip + cast fp16

        Options of pipe itself stand before the first operation; needs -o or --in-place, or --dry-run.
        """
        if options.output is None and not options.in_place and not options.dry_run:
            raise UsageError("pipe needs a place to write to", remedy="give -o OUT or --in-place")
        operations = _operations(context, context.meta["operations"], options)
        perform(model, operations, options, label=Operation.label)

    return pipe


def _operations(context: click.Context, words: list[str], options: WriteOptions) -> list[Operation]:
    segments: list[list[str]] = [[]]
    for word in words:
        if word == _SEPARATOR:
            segments.append([])
        else:
            segments[-1].append(word)
    return [parsed_operation(context, segment, options) for segment in segments]


def parsed_operation(context: click.Context, segment: list[str], options: WriteOptions) -> Operation:
    """The operation that words of a command line name."""
    if not segment:
        raise UsageError("an operation is missing", remedy=f"name one of {', '.join(OPERATIONS)}")
    name, *arguments = segment
    if name not in OPERATIONS:
        raise UsageError(f"{name!r} is no operation", remedy=f"name one of {', '.join(OPERATIONS)}")
    operation = OPERATIONS[name]

    def callback(**values: Any) -> Operation:
        return build(operation, values, options)

    parsed = command(name, operation, callback, []).make_context(name, arguments, parent=context)
    with parsed:
        made: Operation = parsed.command.invoke(parsed)
    return made
