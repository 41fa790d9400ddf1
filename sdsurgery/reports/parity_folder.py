"""What a comparison of formats found, as a folder: a page, a sheet of pictures, a JSON document, and JUnit's XML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..containers.writing import AtomicFolder
from ..errors import OutputError, OutputExistsError
from ..sources import InMemory
from . import documents
from .parity import document
from .parity_junit import junit
from .parity_page import page
from .parity_pictures import sheet

if TYPE_CHECKING:
    from ..parity.results import Parity


PAGE = "index.html"
SHEET = "sheet.png"
DOCUMENT = "parity.json"
JUNIT = "junit.xml"
_OURS = {PAGE, SHEET, DOCUMENT, JUNIT}


def refuse(folder: Path, models: Sequence[Path], *, force: bool) -> None:
    """Refuse a place for a report before any work is done for it.

    Raises:
        OutputExistsError: If something is there that isn't an older report, or is one and may not be replaced.
        OutputError: If no folder can be there.
    """
    if not folder.parent.is_dir():
        raise OutputError("there is no such folder to write it into", file=folder, remedy="make the folder first")
    real = folder.resolve()
    if any(path.exists() and real.is_relative_to(path.resolve()) for path in models):
        raise OutputExistsError("it is one of the inputs, or lies in it", file=folder, remedy="choose another name")
    if not folder.exists():
        return
    try:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    except OSError as error:
        message = f"it can't be looked into: {error.strerror}"
        raise OutputError(message, file=folder, remedy="choose another name") from error
    if not names <= _OURS:
        raise OutputExistsError("it holds other things than a report", file=folder, remedy="choose another name")
    if not force:
        there = "there is a report already" if names else "it exists"
        raise OutputExistsError(there, file=folder, remedy="add --force to replace it")


def write(found: Parity, folder: Path, *, force: bool) -> None:
    """Write the report, whole or not at all."""
    parts = {
        PAGE: page(found).encode(),
        SHEET: sheet(found),
        DOCUMENT: (documents.text(document(found)) + "\n").encode(),
        JUNIT: junit(found).encode(),
    }
    size = sum(map(len, parts.values()))
    with AtomicFolder(folder, replace=force, size=size, advance=lambda _count: None) as out:
        for name, content in parts.items():
            out.write(name, [InMemory(content)])
