"""manifest and verify: what a model is, and whether it still is that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..containers import open as open_checkpoint
from ..containers.saving import taken
from ..containers.writing import AtomicFile
from ..errors import SurgeryError
from ..inspection import manifests
from ..reports import documents, terminal
from .common import MODEL, listening


@click.command("manifest")
@MODEL
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file; to stdout unless given.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def manifest_command(model: Path, *, output: Path | None, force: bool, quiet: bool, **_: bool) -> None:
    """Write down what a model is: every file by its SHA-256, every tensor by its canonical name and BLAKE3.

    The same model gives the same bytes; there is no date and no path in it. verify checks a model against it, also in
    another layout.
    """
    if output is not None and output.exists() and not force:
        raise taken(output)
    with listening(quiet=quiet):
        found = manifests.manifest(open_checkpoint(model))
    content = documents.text(found.document()) + "\n"
    if output is None:
        click.echo(content, nl=False)
        return
    raw = content.encode()
    with AtomicFile(output, replace=force, size=len(raw), advance=lambda _count: None) as out:
        out.write(raw)
    if not quiet:
        click.echo(terminal.printable(f"wrote {output}: {len(found.files)} files, {len(found.tensors)} tensors"))


@click.command("verify")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    "wanted",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What the models should be.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but findings.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def verify_command(models: tuple[Path, ...], *, wanted: Path, as_json: bool, quiet: bool, **_: bool) -> int:
    """Check models against a manifest, tensor by tensor and file by file.

    A model in another layout than the manifest's is checked for what both layouts hold, and its files aren't compared.
    Exit codes: 0 everything is as it was, 1 something isn't, 3 something could not be checked.
    """
    expected = manifests.read(wanted)
    results: list[dict[str, Any]] = []
    code = 0
    for path in models:
        try:
            with listening(quiet=quiet):
                findings = manifests.verify(open_checkpoint(path), expected)
        except SurgeryError as error:
            results.append(documents.unverified(path, error))
            code = 3
            continue
        results.append(documents.verified(path, findings))
        code = max(code, 1 if findings else 0)
    if as_json:
        click.echo(documents.text({"verified": code == 0, "models": results}))
        return code
    for result in results:
        for line in terminal.verification(result, quiet=quiet):
            click.echo(line)
    return code
