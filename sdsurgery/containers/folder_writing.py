"""Writing a diffusers folder: what goes into which file, and what may be replaced by it.

File names, the distribution over shards and the index are those of diffusers 0.42 and transformers 5.23.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import progress
from ..checkpoint import AsideFile, Change, Checkpoint, Folder, Tensor, WeightFile
from ..errors import InputError, OutputError, OutputExistsError, UsageError
from ..sources import Data, FileSlice, InMemory, SourceFile
from . import folders, safetensors
from .folders import CONFIG, MODEL_INDEX, NAME, weight_name
from .opening import open_checkpoint
from .saving import Saved, content, drop_hashes, taken, with_history
from .writing import AtomicFolder

_CONFIG_SUFFIXES = {".json", ".txt", ".model"}


@dataclass(slots=True)
class Plan:
    """What a folder will hold.

    Attributes:
        outputs: Of each file, by its name, what it consists of.
        twice: Second names of files, with the first ones.
        hard_links: Whether the two may be one file.
        kept: Names that are taken over from the folder that is replaced, as they are.
        changes: What isn't carried over, and metadata that would have been false.
    """

    outputs: dict[str, tuple[Data, ...]] = field(default_factory=dict)
    twice: dict[str, str] = field(default_factory=dict)
    hard_links: bool = True
    kept: list[str] = field(default_factory=list)
    changes: tuple[Change, ...] = ()

    def add(self, name: str, parts: tuple[Data, ...]) -> None:
        """Plan a file."""
        if not all(map(folders.is_plain, name.split("/"))):
            raise OutputError(f"no file in a folder can be called {name[:200]!r}", remedy="rename it")
        if name in self.outputs:
            raise OutputError(f"two files would be called {name!r}", remedy="rename one of them")
        self.outputs[name] = parts


@dataclass(frozen=True, slots=True)
class _Part:
    """A component that is to be written.

    Attributes:
        prefix: What its keys and its files have in front.
        tensors: Under their keys in its files.
        opened: The files that it was read from.
        indexes: Their index, if there is one.
    """

    prefix: str
    tensors: dict[str, Tensor]
    opened: tuple[WeightFile, ...]
    indexes: Mapping[str, Data]

    @property
    def untouched(self) -> bool:
        """Whether it is as it was opened."""
        before: dict[str, Tensor] = {}
        for file in self.opened:
            before |= file.checkpoint
        return bool(self.opened) and before == self.tensors


@dataclass(frozen=True, slots=True)
class _Names:
    """How a component's weights are to be called, where they don't keep their names."""

    variant: str | None
    shard_size: int | None

    def __post_init__(self) -> None:
        if self.variant is not None and not re.fullmatch("[0-9A-Za-z_-]+", self.variant):
            raise UsageError(f"{self.variant!r} can be no variant", remedy="name a word, such as fp16")
        if self.shard_size is not None and self.shard_size <= 0:
            raise UsageError("shards need a size", remedy="give a number of bytes")

    @property
    def given(self) -> bool:
        """Whether anything was asked for."""
        return self.variant is not None or self.shard_size is not None


def plan(
    checkpoint: Checkpoint,
    target: Path,
    *,
    in_place: bool = False,
    variant: str | None = None,
    shard_size: int | None = None,
) -> Plan:
    """What saving the checkpoint as a folder will write; reads no weight.

    Raises:
        UsageError: If the variant or the size makes no sense.
        UnsupportedError: If safetensors can't hold a tensor.
        OutputError: If a file can't be called what it would have to be.
    """
    assert checkpoint.folder is not None  # noqa: S101 - whoever calls has looked
    in_place = in_place and _is_origin(checkpoint, target)
    names = _Names(variant, shard_size)
    made = Plan()
    changes: list[Change] = []
    survives = {entry.name for entry in checkpoint.aside if in_place and isinstance(entry, AsideFile)}
    for part in _parts(checkpoint):
        if in_place and part.untouched and not names.given and not _edited(checkpoint):
            for name, data in _as_it_was(part):
                made.add(name, (data,))
            survives |= {part.prefix + entry.name for file in part.opened for entry in file.checkpoint.aside}
            continue
        changes += _plan_weights(checkpoint, part, names, made)
        if in_place:
            stale = list(_stale_pickles(checkpoint, part.prefix, made))
            survives -= {change.key for change in stale}
            changes += stale
    for name, data in checkpoint.folder.files.items():
        made.add(name, (data,))
    if checkpoint.folder.graphs is not None:
        checkpoint.folder.graphs.add_to(made, checkpoint)
    beside = [Change(entry.name, "dropped", entry.what) for entry in checkpoint.aside if entry.name not in survives]
    made.changes = tuple(dict.fromkeys([*beside, *changes, *made.changes]))
    if in_place:
        files = [entry.name for entry in checkpoint.aside if isinstance(entry, AsideFile)]
        made.kept = [name for name in files if name in survives and name not in made.outputs]
    return made


def _as_it_was(part: _Part) -> Iterator[tuple[str, Data]]:
    for file in part.opened:
        yield file.name, _whole(file)
    yield from part.indexes.items()


def _parts(checkpoint: Checkpoint) -> Iterator[_Part]:
    """The components in order; a lone one has no prefix."""
    folder = checkpoint.folder or Folder({})
    tensors: dict[str, dict[str, Tensor]] = {}
    lone = folders.is_lone(checkpoint)
    for key, tensor in checkpoint.items():
        component, slash, rest = ("", "", key) if lone else key.partition("/")
        if not lone and not (slash and rest and folders.is_plain(component)):
            raise OutputError(
                f"{key!r} doesn't say which component of a folder it belongs to",
                key=key,
                remedy="convert the model, or write a single file",
            )
        tensors.setdefault(component + slash, {})[rest] = tensor
    for prefix in sorted(tensors, key=lambda prefix: (folders.place(prefix.rstrip("/")), prefix)):
        indexes = {name: data for name, data in folder.indexes.items() if name.rpartition("/")[0] == prefix.rstrip("/")}
        opened = tuple(file for file in folder.weights if file.prefix == prefix)
        yield _Part(prefix, tensors[prefix], opened, indexes)


def _edited(checkpoint: Checkpoint) -> bool:
    """Whether metadata were changed on purpose, which every file then has to tell."""
    return any(change.kind == "metadata" for change in checkpoint.changes)


def _plan_weights(checkpoint: Checkpoint, part: _Part, names: _Names, made: Plan) -> list[Change]:
    """Plan a component's files; the recorded hashes that they lose."""
    graphs = any(file.checkpoint.origin and file.checkpoint.origin.container == folders.ONNX for file in part.opened)
    several = len(part.opened) > 1 and not part.indexes
    keeps_names = bool(part.opened) and not (names.given or graphs or several)
    library = _library(checkpoint, part)
    if keeps_names:
        files = _distribution_that_was(part)
        index = next((_as_safetensors(name) for name in part.indexes), None)
    else:
        files, index = _distribution(part, names, library)
    changes: list[Change] = []
    for name, tensors in files.items():
        source = _verbatim(checkpoint, part, tensors)
        if source is not None:
            made.add(name, (_whole(source),))
            continue
        before = next((file for file in part.opened if _as_safetensors(file.name) == name), None)
        before = before or (part.opened[0] if part.opened else None)
        metadata = with_history(checkpoint)
        lost = drop_hashes(metadata)
        changes.extend(change for change in lost if before is None or change.key in before.checkpoint.metadata)
        # transformers refuses a safetensors file that doesn't say so.
        made.add(name, content(tensors, {"format": "pt", **metadata}))
    if index is not None:
        made.add(index, (_index(part, files, index, library),))
    return changes


def _distribution_that_was(part: _Part) -> dict[str, dict[str, Tensor]]:
    """Every tensor in the file where it was, or where its bytes were, or in the last one."""
    where = {key: file.name for file in part.opened for key in file.checkpoint}
    by_source = {_source(file): file.name for file in part.opened}
    files: dict[str, dict[str, Tensor]] = {file.name: {} for file in part.opened}
    for key, tensor in part.tensors.items():
        name = where.get(key) or next(
            (by_source[source] for source in tensor.data.files if source in by_source), part.opened[-1].name
        )
        files[name][key] = tensor
    renamed = {name: _as_safetensors(name) for name in files}
    if len(set(renamed.values())) < len(files):
        raise OutputError(
            f"two files of {part.prefix or 'the component'} would get one name",
            remedy="say how its weights are to be called: variant=... or shard_size=...",
        )
    return {renamed[name]: tensors for name, tensors in files.items() if tensors}


def _as_safetensors(name: str) -> str:
    """What a file of weights, or its index, is called when it isn't a pickle."""
    folder, slash, base = name.rpartition("/")
    if weight_name(base):
        base = re.sub(r"\.bin(?=$|\.)", ".safetensors", re.sub("^pytorch_model", "model", base))
    elif not base.endswith(".safetensors"):
        base += ".safetensors"
    return folder + slash + base


def _distribution(part: _Part, names: _Names, library: str) -> tuple[dict[str, dict[str, Tensor]], str | None]:
    """The files that a component gets, and the name of their index, if there are several."""
    shards = [part.tensors] if names.shard_size is None else _shards(part.tensors, names.shard_size)
    stem = part.prefix + ("diffusion_pytorch_model" if library == "diffusers" else "model")
    variant = f".{names.variant}" if names.variant else ""
    if len(shards) == 1:
        return {f"{stem}{variant}.safetensors": shards[0]}, None
    named = {
        f"{stem}{variant}-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }
    return named, f"{stem}.safetensors.index{variant}.json"


def _shards(tensors: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """As ``huggingface_hub`` splits: in the order of the keys, a tensor that is too large by itself."""
    shards: list[dict[str, Tensor]] = []
    current: dict[str, Tensor] = {}
    filled = 0
    for key, tensor in tensors.items():
        if tensor.nbytes > size:
            shards.append({key: tensor})
            continue
        if filled + tensor.nbytes > size:
            shards.append(current)
            current, filled = {}, 0
        current[key] = tensor
        filled += tensor.nbytes
    return [*shards, current] if current else shards


def _index(part: _Part, files: Mapping[str, Mapping[str, Tensor]], name: str, library: str) -> Data:
    """The index: the one that was there, if it is still true."""
    sizes = {key: (file, tensor.nbytes) for file, tensors in files.items() for key, tensor in tensors.items()}
    before = {key: (file.name, tensor.nbytes) for file in part.opened for key, tensor in file.checkpoint.items()}
    if name in part.indexes and sizes == before:
        return part.indexes[name]
    metadata = {"total_size": sum(nbytes for _, nbytes in sizes.values())}
    if library == "transformers":
        weights = (tensor for tensor in part.tensors.values() if tensor.dtype.kind == "float")
        metadata["total_parameters"] = sum(tensor.numel for tensor in weights)
    weight_map = {key: file.removeprefix(part.prefix) for key, (file, _) in sizes.items()}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    return InMemory(text.encode() + b"\n")


def _verbatim(checkpoint: Checkpoint, part: _Part, tensors: Mapping[str, Tensor]) -> WeightFile | None:
    """The file that holds exactly these tensors already, if there is one."""
    if _edited(checkpoint):
        return None
    for file in part.opened:
        origin = file.checkpoint.origin
        if origin and origin.container == safetensors.NAME and dict(file.checkpoint) == tensors:
            return file
    return None


def _source(file: WeightFile) -> SourceFile:
    assert file.checkpoint.origin is not None  # noqa: S101 - it was opened
    assert file.checkpoint.origin.file is not None  # noqa: S101
    return file.checkpoint.origin.file


def _whole(file: WeightFile) -> FileSlice:
    source = _source(file)
    return FileSlice(source, 0, source.size)


def _library(checkpoint: Checkpoint, part: _Part) -> str:
    """Whose component it is: what the model's index says, or else its own config."""
    files = checkpoint.folder.files if checkpoint.folder else {}
    pair = _document(files.get(MODEL_INDEX)).get(part.prefix.rstrip("/")) if part.prefix else None
    if isinstance(pair, list) and pair and isinstance(pair[0], str):
        return pair[0]
    config = _document(files.get(part.prefix + CONFIG))
    return "diffusers" if "_class_name" in config else "transformers" if config else ""


def _document(data: Data | None) -> dict[str, Any]:
    """A JSON object that is to be written; an empty one where there is none."""
    if data is None or data.nbytes > safetensors.MAX_HEADER:
        return {}
    try:
        return safetensors.parsed(b"".join(data.chunks()).strip())
    except (ValueError, RecursionError):
        return {}
    finally:
        for file in data.files:
            file.close()


def _stale_pickles(checkpoint: Checkpoint, prefix: str, made: Plan) -> Iterator[Change]:
    """The pickles of a component that was written anew, which would hold what it was before."""
    written = [name.removeprefix(prefix) for name in made.outputs if name.startswith(prefix)]
    variants = {kind.variant for name in written if (kind := weight_name(name))}
    for entry in checkpoint.aside:
        folder, slash, base = entry.name.rpartition("/")
        kind = weight_name(base) if isinstance(entry, AsideFile) and folder + slash == prefix else None
        if kind and kind.format == "bin" and kind.variant in variants:
            yield Change(entry.name, "dropped", entry.what)


def write(checkpoint: Checkpoint, target: Path, made: Plan, *, replace: bool) -> Saved:
    """Write what was planned.

    Raises:
        OutputError: If it can't be written.
    """
    real = Path(os.path.realpath(target))
    linked = {name for name, parts in made.outputs.items() if _lies_there(parts, real / name)}
    copied = {name: parts for name, parts in made.outputs.items() if name not in linked}
    size = sum(part.nbytes for parts in copied.values() for part in parts)
    mine = set(_opened_files(checkpoint))  # closed so far, and closed again after use, for there may be hundreds
    with (
        progress.task(f"writing {target.name}", size) as advance,
        AtomicFolder(target, replace=replace, size=size, advance=advance) as out,
    ):
        for name in sorted(made.outputs):
            if name in linked:
                out.keep(name)
                continue
            out.write(name, copied[name])
            for file in {file for part in copied[name] for file in part.files} & mine:
                file.close()
        for name, first in made.twice.items():
            out.again(name, first, link=made.hard_links)
        for name in made.kept:
            if os.path.lexists(real / name):
                out.keep(name)
        for file in checkpoint.files:
            file.check_unchanged()
            if file in mine or os.name == "nt":  # there, an open file can't be replaced
                file.close()
    return Saved(target, NAME, _bytes_in(real), made.changes)


def _lies_there(parts: Sequence[Data], place: Path) -> bool:
    """Whether it is nothing but the file that is there already."""
    if len(parts) != 1 or not isinstance(parts[0], FileSlice):
        return False
    file, offset, nbytes = parts[0].file, parts[0].offset, parts[0].nbytes
    try:
        found = os.lstat(place)
    except OSError:
        return False
    same = stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == file.identity
    return same and (offset, nbytes) == (0, file.size)


def _bytes_in(folder: Path) -> int:
    return sum(os.lstat(path).st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _is_origin(checkpoint: Checkpoint, target: Path) -> bool:
    """Whether that is the very folder that the checkpoint was opened from."""
    origin = checkpoint.origin
    try:
        return origin is not None and folders.is_folder(origin.container) and origin.path.samefile(target)
    except OSError:
        return False


def check_target(checkpoint: Checkpoint, target: Path, *, force: bool, in_place: bool) -> None:
    """Refuse to write over what mustn't be.

    Raises:
        OutputExistsError: If it is refused.
        OutputError: If the folder can't be replaced.
    """
    real = Path(os.path.realpath(target))
    if _is_origin(checkpoint, target):
        if not in_place:
            raise OutputExistsError(
                "it is one of the inputs", file=target, remedy="use --in-place to replace the model itself"
            )
        _refuse_cache(checkpoint, target, real)
        return
    if checkpoint.origin and folders.is_folder(checkpoint.origin.container):
        source = Path(os.path.realpath(checkpoint.origin.path))
        if real.is_relative_to(source) or source.is_relative_to(real):
            raise OutputExistsError(
                "one of input and output would lie inside the other", file=target, remedy="choose another name"
            )
    if not os.path.lexists(real):
        return
    if not os.path.isdir(real):  # noqa: PTH112 - unlike Path.is_dir, also of names that are too long
        raise OutputExistsError("it exists and isn't a folder", file=target, remedy="choose another name")
    if not force:
        raise taken(target)
    if any(Path(os.path.realpath(file.path)).is_relative_to(real) for file in checkpoint.files):
        raise OutputExistsError("one of the inputs lies in it", file=target, remedy="choose another name")
    _refuse_loss(checkpoint, target)


def _refuse_cache(checkpoint: Checkpoint, target: Path, real: Path) -> None:
    """The cache of the Hugging Face hub shares its files between revisions, and keeps its own books of them."""
    if not all(Path(os.path.realpath(file.path)).is_relative_to(real) for file in _opened_files(checkpoint)):
        raise OutputError(
            "it is a snapshot in a Hugging Face cache, which no program may change",
            file=target,
            remedy="write to another folder with -o",
        )


def _opened_files(checkpoint: Checkpoint) -> Iterator[SourceFile]:
    folder = checkpoint.folder or Folder({})
    yield from map(_source, folder.weights)
    for data in folder.files.values():
        yield from (file for file in data.files if checkpoint.path in file.path.parents)


def _refuse_loss(checkpoint: Checkpoint, target: Path) -> None:
    """Of a folder that is replaced, nothing may be lost but weights, and configs that can be had again."""
    if not any(target.iterdir()):
        return
    try:
        old = open_checkpoint(target)
    except InputError as error:
        raise OutputExistsError(
            f"it exists, and is no model folder that can be replaced: {error.message}",
            file=target,
            remedy="choose another name, or remove it yourself",
        ) from error
    folder, written = old.folder or Folder({}), checkpoint.folder.files if checkpoint.folder else {}
    lone = folders.is_lone(old)
    lost = [name for name in folder.files if not _is_config(name, lone=lone)]
    lost += [entry.name for entry in old.aside if isinstance(entry, AsideFile) and not _is_weights(entry, lone=lone)]
    lost += [str(file.path.relative_to(target)) for file in old.files if file.path.is_symlink()]
    precious = [name for name in dict.fromkeys(lost) if name not in written]
    if precious:
        raise OutputExistsError(
            f"it holds more than weights and configs: {', '.join(precious[:5])}",
            file=target,
            remedy="choose another name, or take those out of it",
        )


def _is_config(name: str, *, lone: bool) -> bool:
    return name == MODEL_INDEX or (Path(name).suffix in _CONFIG_SUFFIXES and (lone or "/" in name))


def _is_weights(entry: AsideFile, *, lone: bool) -> bool:
    folder, _, base = entry.name.rpartition("/")
    return bool(folder or lone) and weight_name(base) is not None
