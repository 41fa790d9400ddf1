"""A manifest: what a published model is, file by file and tensor by tensor, and whether a model still is that.

Tensors are listed under their canonical names with a BLAKE3 each, so that a manifest made of a single file verifies the
diffusers folder made of it, and names the tensor where one bit differs. It holds no date and no path: the same model
gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__, progress
from ..checkpoint import Checkpoint
from ..digests import sha256_of
from ..errors import CorruptError, MismatchError
from ..models.canonical import Canonical, canonical
from ..models.identify import identify
from ..sources import Data, SourceFile, sweep
from .findings import Finding
from .rules import RULES

SCHEMA_VERSION = 1
_LARGEST = 256 << 20
_THREADS = 2
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file: its name relative to the model, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor.

    Attributes:
        component: Whose it is.
        name: Its canonical name.
        dtype: Of its elements.
        shape: Its canonical shape, that of diffusers' layout.
        blake3: Of its bytes in that shape.
        portable: Whether both layouts can hold it.
    """

    component: str
    name: str
    dtype: str
    shape: list[int]
    blake3: str
    portable: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model is."""

    container: str
    layout: str
    family: str
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]

    def document(self) -> dict[str, Any]:
        """As ``docs/schemas/manifest.json`` describes it."""
        return {"schema_version": SCHEMA_VERSION, "generator": f"sdsurgery {__version__}", **asdict(self)}


def manifest(checkpoint: Checkpoint) -> Manifest:
    """Describe a model; reads each file and each tensor once, both at the same time."""
    model = identify(checkpoint)
    items = sorted(canonical(checkpoint, model).values(), key=lambda item: item.identity)
    found = dict(files_of(checkpoint))
    files = {name: found[name] for name in sorted(found)}
    total = sum(data.nbytes for data in files.values()) + sum(item.tensor.nbytes for item in items)
    with progress.task(f"reading {len(items)} tensors", total) as advance, ThreadPoolExecutor(_THREADS) as pool:
        whole = [pool.submit(sha256_of, data) for data in files.values()]
        single = [pool.submit(_entry, item) for item in items]
        tensors = []
        for item, future in zip(items, single, strict=True):
            tensors.append(future.result())
            advance(item.tensor.nbytes)
        listed = []
        for (name, data), digest in zip(files.items(), whole, strict=True):
            listed.append(FileEntry(name, data.nbytes, digest.result()))
            advance(data.nbytes)
    container = checkpoint.origin.container if checkpoint.origin else "memory"
    return Manifest(container, model.layout, model.family, tuple(listed), tuple(tensors))


def files_of(checkpoint: Checkpoint) -> Iterator[tuple[str, Data]]:
    """The files of a model by name; of a folder also configs and tokenizers, but not what it isn't made of."""
    origin = checkpoint.origin
    if origin and origin.file:
        yield origin.file.path.name, origin.file.whole
    if checkpoint.folder:
        yield from checkpoint.folder.files.items()
        yield from checkpoint.folder.indexes.items()
        if checkpoint.folder.graphs:
            yield from checkpoint.folder.graphs.files.items()
        for weights in checkpoint.folder.weights:
            file = weights.checkpoint.origin.file if weights.checkpoint.origin else None
            if file:
                yield weights.name, file.whole


def _entry(item: Canonical) -> TensorEntry:
    from blake3 import blake3

    digest = blake3()
    for piece in sweep((item.tensor.data,), _CHUNK):
        digest.update(piece)
    tensor = item.tensor
    return TensorEntry(
        item.component, item.name, tensor.dtype.name, list(tensor.shape), digest.hexdigest(), item.portable
    )


def read(path: Path) -> Manifest:
    """A manifest from a file.

    Raises:
        CorruptError: If it is none.
    """
    file = SourceFile(path)
    remedy = "name a file that sdsurgery manifest wrote"
    if file.size > _LARGEST:
        raise CorruptError("it is too large for a manifest", file=path, remedy=remedy)
    try:
        document = json.loads(file.read(0, file.size))
        if document["schema_version"] != SCHEMA_VERSION:
            raise CorruptError("it is a manifest of another version", file=path, remedy=remedy)
        found = Manifest(
            container=str(document["container"]),
            layout=str(document["layout"]),
            family=str(document["family"]),
            files=tuple(FileEntry(**entry) for entry in document["files"]),
            tensors=tuple(TensorEntry(**entry) for entry in document["tensors"]),
        )
        sound = all(
            isinstance(value, str)
            for tensor in found.tensors
            for value in (tensor.component, tensor.name, tensor.dtype, tensor.blake3)
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError("it is no manifest", file=path, remedy=remedy) from error
    finally:
        file.close()
    if not sound or len({(tensor.component, tensor.name) for tensor in found.tensors}) < len(found.tensors):
        raise CorruptError("it is no manifest: its list of tensors makes no sense", file=path, remedy=remedy)
    return found


def verify(checkpoint: Checkpoint, wanted: Manifest) -> list[Finding]:
    """What of a model isn't as a manifest says; in another layout, what that layout can hold.

    Raises:
        MismatchError: If the manifest lists nothing that could be compared.
    """
    seen = manifest(checkpoint)
    across = seen.layout != wanted.layout
    expected = {(entry.component, entry.name): entry for entry in wanted.tensors if entry.portable or not across}
    there = {(entry.component, entry.name): entry for entry in seen.tensors if entry.portable or not across}
    if not expected:
        raise MismatchError("the manifest has nothing that this layout holds", file=checkpoint.path)
    keys = {item.identity: item.key for item in canonical(checkpoint, identify(checkpoint)).values()}
    found = list(_tensor_findings(expected, there, keys))
    if not across and seen.container == wanted.container:
        found += _file_findings(wanted.files, seen.files, alone=len(wanted.files) == 1 == len(seen.files))
    return found


def _tensor_findings(
    expected: Mapping[tuple[str, str], TensorEntry],
    there: Mapping[tuple[str, str], TensorEntry],
    keys: Mapping[tuple[str, str], str],
) -> Iterator[Finding]:
    for identity, entry in expected.items():
        component, name = identity
        seen = there.get(identity)
        if seen is None:
            yield _finding("tensor-missing", f"{name} of the {component} is missing", key=name, component=component)
        elif (seen.dtype, seen.shape) != (entry.dtype, entry.shape):
            was, now = f"{entry.dtype}{entry.shape}", f"{seen.dtype}{seen.shape}"
            message = f"{keys[identity]} is {now} and should be {was}"
            yield _finding("tensor-type", message, key=keys[identity], component=component, expected=was, seen=now)
        elif seen.blake3 != entry.blake3:
            message, digests = f"{keys[identity]} has other values", {"expected": entry.blake3, "seen": seen.blake3}
            yield _finding("tensor-changed", message, key=keys[identity], component=component, **digests)
    for identity in sorted(there.keys() - expected.keys()):
        message = f"{keys[identity]} isn't in the manifest"
        yield _finding("tensor-added", message, key=keys[identity], component=identity[0])


def _file_findings(wanted: Sequence[FileEntry], seen: Sequence[FileEntry], *, alone: bool) -> Iterator[Finding]:
    """Files by name; a single file may be called otherwise."""
    there = {entry.name: entry for entry in seen}
    for entry in wanted:
        file = seen[0] if alone else there.get(entry.name)
        if file is None:
            yield _finding("file-missing", f"{entry.name} is missing", file=entry.name)
        elif file.sha256 != entry.sha256:
            name = None if alone else file.name
            digests = {"expected": entry.sha256, "seen": file.sha256}
            yield _finding("file-changed", f"{file.name} has another SHA-256", file=name, **digests)
    if not alone:
        names = {entry.name for entry in wanted}
        for entry in seen:
            if entry.name not in names:
                yield _finding("file-added", f"{entry.name} isn't in the manifest", file=entry.name)


def _finding(rule: str, message: str, **facts: str | None) -> Finding:
    return Finding(rule, RULES[rule].severity, message, **facts)  # type: ignore[arg-type]
