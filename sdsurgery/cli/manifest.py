"""manifest: what a model is, written down, and signed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..containers import open as open_checkpoint
from ..containers.saving import taken
from ..containers.writing import AtomicFile
from ..errors import UsageError
from ..inspection import manifests
from ..reports import documents, terminal
from .common import MODEL, listening

PASSWORD = "SDSURGERY_KEY_PASSWORD"  # noqa: S105 - the name of an environment variable


@dataclass(frozen=True, slots=True)
class _Options:
    """What was asked for, see the options' help."""

    output: Path | None
    statement: bool
    sign: bool
    key: Path | None
    signature: Path | None
    force: bool
    quiet: bool
    debug: bool

    def check(self) -> None:
        """Refuse what makes no sense together."""
        if self.sign and (self.statement or self.output is not None):
            raise UsageError(
                "--sign writes a signature, and neither a manifest nor a statement",
                remedy="leave out --statement and -o, and name the signature with --signature",
            )
        if self.sign and self.key is None:
            raise UsageError("--sign needs a key", remedy="name a private key: --key PRIVATE.pem")
        if not self.sign and self.key is not None:
            raise UsageError("--key is for signing", remedy="add --sign, or leave it out")
        if self.signature is not None and not (self.sign or self.statement):
            raise UsageError("--signature is for signing", remedy="add --sign, or leave it out")


@click.command("manifest")
@MODEL
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file; to stdout unless given.")
@click.option("--statement", is_flag=True, help="Write the in-toto statement that a signature signs instead.")
@click.option("--sign", is_flag=True, help="Sign the model instead, as OpenSSF's model_signing does.")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="PRIVATE.pem",
    help=f"Sign with this elliptic-curve key; if it is encrypted, its password is in {PASSWORD} or asked for.",
)
@click.option(
    "--signature",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the signature to this file; to MODEL.sig beside the model unless given.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def manifest_command(model: Path, **arguments: Any) -> None:
    """Write down what a model is: every file by its SHA-256, every tensor by its canonical name and BLAKE3.

    The same model gives the same bytes; there is no date and no path in it. verify checks a model against it, also in
    another layout.
    """
    options = _Options(**arguments)
    options.check()
    if options.sign:
        _sign(model, options)
        return
    output = options.output
    if output is not None and output.exists() and not options.force:
        raise taken(output)
    document, what = _made(model, options)
    content = documents.text(document) + "\n"
    if output is None:
        click.echo(content, nl=False)
        return
    raw = content.encode()
    with AtomicFile(output, replace=options.force, size=len(raw), advance=lambda _count: None) as out:
        out.write(raw)
    if not options.quiet:
        click.echo(terminal.printable(f"wrote {output}: {what}"))


def _made(model: Path, options: _Options) -> tuple[Mapping[str, Any], str]:
    """The document that was asked for, and how much is in it."""
    with listening(quiet=options.quiet):
        checkpoint = open_checkpoint(model)
        if options.statement:
            from ..inspection import signing

            document = signing.statement(checkpoint, signature=options.signature)
            return document, f"{len(document['predicate']['resources'])} files"
        found = manifests.manifest(checkpoint)
    return found.document(), f"{len(found.files)} files, {len(found.tensors)} tensors"


def _sign(model: Path, options: _Options) -> None:
    from ..inspection import signing

    assert options.key is not None  # noqa: S101 - for the type checker
    open_checkpoint(model)  # what isn't a model isn't signed as one
    target = options.signature or signing.beside(model)
    signing.check_target(model, options.key, target, replace=options.force)  # before anybody is asked for a password
    password = os.environ.get(PASSWORD)
    if password is None and sys.stdin.isatty() and signing.needs_password(options.key):
        password = click.prompt(f"Password of {terminal.printable(str(options.key))}", hide_input=True, err=True)
    signing.sign(model, options.key, target, password=password, replace=options.force)
    if not options.quiet:
        click.echo(terminal.printable(f"wrote {target}"))
