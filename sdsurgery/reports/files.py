"""Reports as files: where one may be written, and how.

A report is written over an older one of its kind, as a log would be, but over nothing else: what is named by mistake is
more likely a model than a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..containers.writing import AtomicFile
from ..errors import OutputError, OutputExistsError

Format = Literal["html", "sarif", "junit", "markdown"]

_BEGINNINGS: dict[Format, tuple[bytes, str]] = {
    "html": (b"<!doctype html", "HTML file"),
    "sarif": (b'{\n  "$schema": "https://json.schemastore.org/sarif', "SARIF file of ours"),
    "junit": (b"<?xml", "JUnit file"),
    "markdown": (b"### sdsurgery verify", "report in Markdown"),
}


def refuse(place: Path, inputs: Sequence[Path], kind: Format) -> None:
    """Refuse a place for a report before any work is done for it: an input, or whatever isn't such a report already.

    Raises:
        OutputExistsError: If something else is there.
        OutputError: If no file can be there.
    """
    beginning, name = _BEGINNINGS[kind]
    try:
        if not place.parent.is_dir():
            raise OutputError("there is no such folder", file=place, remedy="make the folder first")
        folder = place.parent.resolve()
        if any(path.is_dir() and folder.is_relative_to(path.resolve()) for path in inputs):
            raise OutputExistsError("it lies in a folder that is an input", file=place, remedy="choose another folder")
        if not place.exists():
            return
        if any(path.exists() and path.samefile(place) for path in inputs):
            raise OutputExistsError("it is one of the inputs", file=place, remedy="choose another name")
        if not place.is_file():
            raise OutputError("it exists and isn't a regular file", file=place, remedy="choose another name")
        with place.open("rb") as file:
            begins = file.read(len(beginning))
    except OSError as error:
        raise OutputError(
            f"it can't be looked at: {error.strerror}", file=place, remedy="choose another name"
        ) from error
    if begins and begins.lower() != beginning:
        raise OutputExistsError(f"it exists and is no {name}", file=place, remedy="choose another name")


def write(place: Path, text: str) -> None:
    """Write a report, whole or not at all."""
    raw = text.encode()
    with AtomicFile(place, replace=True, size=len(raw), advance=lambda _count: None) as out:
        out.write(raw)
