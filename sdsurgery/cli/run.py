"""run: a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..reports import documents
from .common import listening

_PATH = click.Path(path_type=Path)


@click.command("run")
@click.argument("recipe", type=_PATH)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A variable's value; may be given several times."
)
@click.option("--folder", type=_PATH, help="What relative names are relative to; the recipe's own folder unless given.")
@click.option("--lock", "locking", is_flag=True, help="Write the hashes of all inputs and outputs to NAME.lock.json.")
@click.option("--locked", is_flag=True, help="Fail if an input or a bit of the result isn't as NAME.lock.json has it.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and write nothing.")
@click.option("--force", is_flag=True, help="Replace existing outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors and warnings.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def run_command(recipe: Path, settings: tuple[str, ...], **options: Any) -> int:
    """Make a model as a recipe says: from the same inputs, the same bytes.

    A recipe is a YAML file of inputs, steps, outputs and checks; docs/recipes.md tells how to write one. It is
    validated before anything is read. Exit codes: 0 done and all checks hold, 1 a check fails or the result isn't the
    locked one, 2 the recipe is wrong.
    """
    from ..recipes import load, locking, plan, read_lock, run, telling

    if options["locking"] and (options["locked"] or options["dry_run"]):
        raise UsageError("--lock writes what a run came to", remedy="leave out --locked and --dry-run")
    loaded = load(recipe, dict(map(_setting, settings)), folder=options["folder"])
    place = locking.path_beside(recipe)
    lock = read_lock(place) if options["locked"] else None
    with listening(quiet=options["quiet"]):
        if options["dry_run"]:
            done = plan(loaded, lock=lock, force=options["force"])
        else:
            done = run(loaded, lock=lock, locking=options["locking"], force=options["force"])
    written = place if options["locking"] and done.lock and not done.exit_code else None
    if written and done.lock:
        done.lock.write(written)
    for line in telling.warnings(done):
        click.echo(line, err=True)
    if options["as_json"]:
        click.echo(documents.text(telling.document(done, written, dry_run=options["dry_run"])))
    elif not options["quiet"]:
        for line in telling.lines(done, written, dry_run=options["dry_run"]):
            click.echo(line)
    for line in telling.failures(done):
        click.echo(line, err=True)
    return done.exit_code


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"{text!r} sets nothing", remedy="write it as NAME=VALUE")
    return name, value
