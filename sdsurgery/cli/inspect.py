"""inspect: what a file holds."""

from __future__ import annotations

from pathlib import Path

import click

from ..containers import open as open_checkpoint
from ..errors import UsageError
from ..inspection import inspect
from ..reports import documents
from .common import MODEL, listening


@click.command("inspect")
@MODEL
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--hash", "hashes", is_flag=True, help="Add SHA-256, AutoV1, AutoV2, AutoV3, CRC32 and BLAKE3, in one read."
)
@click.option(
    "--known", "with_known", is_flag=True, help="Tell which components are known, by your registry or by their figures."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect_command(
    model: Path,
    *,
    tensors: bool,
    hashes: bool,
    with_known: bool,
    as_json: bool,
    quiet: bool,
    **_: bool,  # --debug, which run() reads
) -> None:
    """Tell what a checkpoint holds, from its header.

    Container, layout, family, components and how complete they are, position ids, metadata and history. Without
    --hash and --known no weight is read.
    """
    checkpoint = open_checkpoint(model)
    found = inspect(checkpoint)
    computed = None
    if hashes and checkpoint.origin is not None:
        if checkpoint.origin.file is None:
            raise UsageError("a folder has no hash of its own", remedy="name one of its files, or leave out --hash")
        from ..inspection.hashes import hash_file

        with listening(quiet=quiet):
            computed = hash_file(checkpoint.origin.file, checkpoint.origin.data_offset)
    recognised = None
    if with_known:
        from ..inspection.known_components import known

        with listening(quiet=quiet):
            recognised = known(checkpoint)
    if as_json:
        document = documents.inspection(found, computed, recognised, with_tensors=tensors)
        click.echo(documents.text(document))
        return
    from ..reports.inspection import show

    show(found, computed, recognised, with_tensors=tensors)
