"""fingerprint: what the components of a model are, as numbers."""

from __future__ import annotations

from pathlib import Path

import click

from ..containers import open as open_checkpoint
from ..inspection import registry
from ..inspection.fingerprints import fingerprints
from ..reports import documents
from ..reports.terminal import printable
from .common import COMPONENTS, MODEL, listening


@click.command("fingerprint")
@MODEL
@COMPONENTS
@click.option("--register", "name", metavar="NAME", help="Remember the components by this name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def fingerprint_command(
    model: Path,
    *,
    components: tuple[str, ...],
    name: str | None,
    as_json: bool,
    quiet: bool,
    **_: bool,  # --debug, which run() reads
) -> None:
    """Tell a model's components by their content, wherever they lie.

    The same for a single file and a diffusers folder, for any order of keys and any container. The fp16 one is also the
    same for fp32 storage and the fp16 storage made of it. With --register the components are remembered by a name in
    the user's own registry, and found again in other models.
    """
    with listening(quiet=quiet):
        found = fingerprints(open_checkpoint(model), components)
    names = registry.load()
    if name is not None:
        registry.register(found, name)
    if as_json:
        click.echo(documents.text(documents.fingerprints(found, names, name)))
        return
    for each in found:
        known = registry.known_as(each, names)
        notes = [] if each.complete else ["not complete"]
        notes += [f"known as {known}"] if known else []
        click.echo(printable(", ".join([f"{each.component}: {each.tensors} tensors", *notes])))
        click.echo(f"  exact  {each.exact}\n  fp16   {each.fp16}")
    if name is not None:
        click.echo(printable(f"registered as {name} in {registry.path()}"))
