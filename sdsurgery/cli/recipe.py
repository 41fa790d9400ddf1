"""recipe: recipes without running them."""

from __future__ import annotations

from pathlib import Path

import click

from ..containers import open as open_checkpoint
from ..outputs import refuse
from ..reports import documents, files, terminal

_PATH = click.Path(path_type=Path)


@click.group("recipe")
def recipe_command() -> None:
    """The recipe that a model's metadata record, and the JSON schema of recipes for editors."""


@recipe_command.command("from")
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, metavar="FILE", help="Write it to this file rather than to stdout.")
@click.option("--deep", is_flag=True, help="Make inputs whose own making is recorded anew, too.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def from_command(model: Path, output: Path | None, *, deep: bool, force: bool, debug: bool) -> None:
    """Write the recipe that makes MODEL again, as far as its metadata tell.

    That is sdsurgery's own record, or else what A1111's webui recorded of a merge. Its inputs are named as they were
    called, with their hashes where those were known.
    """
    del debug  # it counts where errors are shown
    from ..recipes.retelling import recipe_from

    if output is not None:
        refuse(output, force=force)
    text = recipe_from(open_checkpoint(model), deep=deep)
    if output is None:
        click.echo(text, nl=False)
    else:
        files.write(output, text)
        click.echo(terminal.printable(f"wrote {output}"))


@recipe_command.command("schema")
def schema_command() -> None:
    """Print the JSON schema of recipes, which editors complete and check them with."""
    from ..recipes.schema import schema

    click.echo(documents.text(schema(references=True)))
