"""The lock beside a recipe: the hashes of everything that went in and came out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__, progress
from ..checkpoint import Checkpoint
from ..digests import sha256_of
from ..errors import CorruptError, UnsupportedError
from ..inspection.manifests import files_of
from ..reports import files
from ..sources import Data, SourceFile
from .document import text_of

SCHEMA_VERSION = 1

ALONE = "."
"""Stands for the name of a single file, whatever it is called."""

_LARGEST = 16 << 20
_COMPUTED_WITH = ("torch", "numpy")


@dataclass(frozen=True, slots=True)
class Digest:
    """One file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Listed:
    """An input or an output.

    Attributes:
        name: The name of the file or folder.
        files: Of a single file itself, as :data:`ALONE`; of a folder those that it is made of.
    """

    name: str
    files: Mapping[str, Digest]


@dataclass(frozen=True, slots=True)
class Lock:
    """What a run was given, and what it made.

    Attributes:
        inputs: By their names in the recipe.
        outputs: By their paths as the recipe has them.
        versions: Of what computed it; not compared, but told where a result differs.
    """

    inputs: Mapping[str, Listed]
    outputs: Mapping[str, Listed]
    versions: Mapping[str, str]

    def text(self) -> str:
        """As it is written."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    def write(self, path: Path) -> None:
        """Write it, over an older one.

        Raises:
            OutputError: If it can't be written.
        """
        files.write(path, self.text())


def path_beside(recipe: Path) -> Path:
    """Where a recipe's lock lies."""
    return recipe.with_suffix(".lock.json")


def read_lock(path: Path) -> Lock:
    """Read a lock.

    Raises:
        UnreadableError: If it can't be read.
        CorruptError: If it is none.
    """
    text = text_of(path, _LARGEST)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError("it is no lock: it isn't JSON", file=path, remedy="make it anew with --lock") from error
    try:
        inputs = {name: _listed(each) for name, each in found["inputs"].items()}
        outputs = {name: _listed(each) for name, each in found["outputs"].items()}
        lock = Lock(inputs, outputs, {str(name): str(value) for name, value in found["versions"].items()})
        known = found["schema_version"] == SCHEMA_VERSION
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptError(f"it is no lock: {error!r}", file=path, remedy="make it anew with --lock") from error
    if not known:
        message = f"its version is {found['schema_version']}, and this version reads {SCHEMA_VERSION}"
        raise UnsupportedError(message, file=path, remedy="make it anew with --lock")
    return lock


def _listed(entry: Mapping[str, Any]) -> Listed:
    files = {name: Digest(int(each["bytes"]), str(each["sha256"])) for name, each in entry["files"].items()}
    return Listed(str(entry["name"]), files)


def versions() -> dict[str, str]:
    """Of what computes."""
    found = {"sdsurgery": __version__}
    for name in _COMPUTED_WITH:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def listed_models(models: Mapping[str, Checkpoint]) -> dict[str, Listed]:
    """The hashes of what models are read from; a single file's isn't computed again where it was already."""
    files: dict[str, dict[str, Data]] = {}
    known: dict[str, Listed] = {}
    names = {name: model.origin.name if model.origin else name for name, model in models.items()}
    for name, model in models.items():
        file = model.origin.file if model.origin else None
        if file and model.origin and model.origin.computed_sha256:
            known[name] = Listed(names[name], {ALONE: Digest(file.size, model.origin.computed_sha256)})
        else:
            files[name] = {ALONE if file else each: data for each, data in files_of(model)}
    found = _hashed(files, names) | known
    return {name: found[name] for name in models}


def listed_paths(paths: Mapping[str, Path]) -> dict[str, Listed]:
    """The hashes of files, and of all that lies in folders, by what the recipe calls them."""
    files = {name: dict(_files_in(path)) for name, path in paths.items()}
    return _hashed(files, {name: path.name for name, path in paths.items()})


def _files_in(path: Path) -> Iterator[tuple[str, Data]]:
    if not path.is_dir():
        yield ALONE, SourceFile(path).whole
        return
    for each in sorted(path.rglob("*")):
        if each.is_file():
            yield each.relative_to(path).as_posix(), SourceFile(each).whole


def _hashed(files: Mapping[str, Mapping[str, Data]], names: Mapping[str, str]) -> dict[str, Listed]:
    wanted = [(name, file, data) for name, found in files.items() for file, data in found.items()]
    total = sum(data.nbytes for _, _, data in wanted)
    with progress.task("hashing", total) as advance, ThreadPoolExecutor(2) as pool:
        digests = list(pool.map(lambda each: sha256_of(each[2], advance), wanted))
    found: dict[str, dict[str, Digest]] = {name: {} for name in files}
    for (name, file, data), digest in zip(wanted, digests, strict=True):
        found[name][file] = Digest(data.nbytes, digest)
    return {name: Listed(names[name], digests) for name, digests in found.items()}


def differences(wanted: Mapping[str, Listed], seen: Mapping[str, Listed]) -> Iterator[str]:
    """What isn't as a lock has it, a line each."""
    for name in dict.fromkeys((*wanted, *seen)):
        if name not in wanted or name not in seen:
            yield f"{name} is only in the {'recipe' if name in seen else 'lock'}"
        else:
            yield from _differing_files(name, wanted[name].files, seen[name].files)


def _differing_files(name: str, wanted: Mapping[str, Digest], seen: Mapping[str, Digest]) -> Iterable[str]:
    for file in dict.fromkeys((*wanted, *seen)):
        where = name if file == ALONE else f"{name}/{file}"
        if file not in seen:
            yield f"{where} is missing"
        elif file not in wanted:
            yield f"{where} is new"
        elif wanted[file] != seen[file]:
            yield f"{where} has SHA-256 {seen[file].sha256}, where the lock has {wanted[file].sha256}"
