"""parity: does every format of a model draw the same picture?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UnsupportedError, UsageError
from ..reports import documents, parity_folder, terminal
from ..reports import parity as reports
from .common import listening

if TYPE_CHECKING:
    from ..parity.settings import Settings

_PRECISIONS = click.Choice(["auto", "fp32", "fp16", "bf16"])
_MOST_PROMPTS = 1 << 20
"""Bytes of a file of prompts."""


@click.command("parity")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [MODEL...]", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Draw this; may be given several times.")
@click.option(
    "--prompts", "prompt_file", metavar="FILE", type=click.Path(path_type=Path), help="Draw every line of this file."
)
@click.option("--negative", default="", metavar="TEXT", help="What the pictures are guided away from.")
@click.option("--seed", default=0, show_default=True, help="Of the latents; each picture counts one up.")
@click.option("--steps", default=20, show_default=True, help="Of the scheduler.")
@click.option("--guidance", default=5.0, show_default=True, help="Of classifier-free guidance.")
@click.option("--size", metavar="WIDTHxHEIGHT", help="Of the pictures. What the model was made for unless given.")
@click.option(
    "--scheduler",
    type=click.Choice(["ddim", "euler", "dpmsolver++", "pndm", "model"]),
    default="ddim",
    show_default=True,
    help="With the model's own noise schedule; model is the model's own scheduler.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to run: auto takes a GPU where all runtimes work on one.",
)
@click.option("--dtype", type=_PRECISIONS, default="auto", show_default=True, help="What torch computes in.")
@click.option(
    "--reference",
    metavar="NAME",
    help="Hold the others against this: a MODEL, or ldm, diffusers or onnx. The diffusers folder unless given.",
)
@click.option(
    "--tolerance", type=_PRECISIONS, default="auto", show_default=True, help="The bounds, by what is computed in."
)
@click.option("--locate", is_flag=True, help="Name the first layer that differs, inside the stage that does.")
@click.option(
    "-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), help="Write a report into this folder."
)
@click.option("--force", is_flag=True, help="Replace an older report.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def parity_command(models: tuple[Path, ...], **options: Any) -> int:
    """Draw the same pictures from every format of a model, and show stage by stage how far they agree.

    A MODEL is a single file, a diffusers folder or one with ONNX graphs; of a lone one the other formats are made. All
    draw with the same latents, scheduler and prompts. Exit code 0 if they agree within the tolerance, 1 if not, 3 if
    one couldn't be run.
    """
    with _needed():
        from ..parity.running import parity
    settings, output, force = _settings(options), options["output"], options["force"]
    if output is not None:
        parity_folder.refuse(output, models, force=force)
    with listening(quiet=options["quiet"]), _needed():
        found = parity(models, settings, reference=options["reference"], locate=options["locate"])
    if output is not None:
        parity_folder.write(found, output, force=force)
    if options["as_json"]:
        click.echo(documents.text(reports.document(found)))
    elif not options["quiet"]:
        for line in reports.lines(found):
            click.echo(terminal.printable(line))
        if output is not None:
            click.echo(terminal.printable(f"report: {output / parity_folder.PAGE}"))
    return 0 if found.agrees else 1


def _settings(options: Mapping[str, Any]) -> Settings:
    """What the command line says of the pictures."""
    from ..parity.settings import DEFAULT_PROMPT, Settings

    width, height = _size(options["size"])
    told = bool(options["prompts"]) or options["prompt_file"] is not None
    prompts = (*options["prompts"], *_lines(options["prompt_file"])) if told else (DEFAULT_PROMPT,)
    same = {name: options[name] for name in _SETTINGS}
    return Settings(prompts, width=width, height=height, precision=options["dtype"], **same)


_SETTINGS = ("negative", "seed", "steps", "guidance", "scheduler", "device", "tolerance")


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    """What runs models is installed on request."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "sdsurgery":
            raise
        raise UnsupportedError(f"parity needs {error.name}", remedy="pip install 'sdsurgery[parity]'") from error


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and (height or width).isdecimal()):
        raise UsageError(f"{text!r} is no size", remedy="give one such as 512x768")
    return int(width), int(height or width)


def _lines(place: Path | None) -> Iterator[str]:
    if place is None:
        return
    try:
        with place.open("rb") as file:
            content = file.read(_MOST_PROMPTS + 1)
        if len(content) > _MOST_PROMPTS:
            raise UsageError(f"{place} is too large for prompts", remedy="name a text file with a prompt a line")
        found = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{place} can't be read: {error}", remedy="name a text file with a prompt a line") from error
    yield from filter(None, found)
