"""fix-clip, with ``--check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..containers import open as open_checkpoint
from ..errors import UsageError
from ..models.identify import identify
from ..models.position_ids import diagnose
from ..operations import FixClip
from ..reports import documents, terminal
from .common import MODEL, WriteOptions, perform, write_options
from .surgery import command

_CHECK = click.option("--check", is_flag=True, help="Only diagnose: exit 0 when nothing needs mending, 1 otherwise.")


def fix_clip_command(_name: str) -> click.Command:
    """``fix-clip MODEL``."""

    @write_options()
    def callback(model: Path, options: WriteOptions, check: bool, **values: Any) -> int:
        if check and (options.output is not None or options.in_place):
            raise UsageError("--check writes nothing", remedy="leave out --check, or -o and --in-place")
        if check:
            return _check(model, FixClip(**values), options)
        perform(model, [FixClip(**values)], options, label=FixClip.label)
        return 0

    return command(FixClip.name, FixClip, callback, [MODEL, _CHECK])


def _check(model: Path, operation: FixClip, options: WriteOptions) -> int:
    checkpoint = open_checkpoint(model)
    fixed = operation(checkpoint)
    sound = not fixed.changes and not any(note.level == "warning" for note in fixed.notes)
    if options.json:
        diagnosis = diagnose(checkpoint, identify(checkpoint))
        document = documents.written(fixed, None, (), dry_run=True) | {
            "position_ids": documents.position_ids(diagnosis),
            "sound": sound,
        }
        click.echo(documents.text(document))
    else:
        for line in terminal.warnings(fixed, ()):
            click.echo(line, err=True)
        if not options.quiet:
            for line in terminal.steps(fixed, ()):
                click.echo(line)
            click.echo("nothing needs mending" if sound else "needs mending")
    return 0 if sound else 1
