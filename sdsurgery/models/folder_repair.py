"""What a diffusers folder lacks besides weights, and what it would be: configs, scheduler, index, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..checkpoint import Checkpoint, Note
from ..sources import Data, InMemory
from .configs import indented
from .folder_files import INDEX_NAME, FolderFiles
from .identify import Model
from .stated import of_folder_files
from .tokenizer import FAST, MERGES, VOCABULARY
from .tokenizer_reading import TokenFiles, read_tokens

Lack = Literal["config", "tokenizer", "tokenizer-old", "tokenizer-length"]

T = TypeVar("T")

_TOKENIZER = "tokenizer"
_VAE_GRAPH = "vae_decoder"
"""A part of indexes that speak of ONNX graphs, where the VAE is two."""

_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_SLOW = (VOCABULARY, MERGES)
_LIMIT = "model_max_length"
_MOST_TOKENIZER = 64 << 20
_SHORTEST = 3
"""Tokens that a prompt has room for at least: its start, one word, its end."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A file that a folder lacks, or lacks something in.

    Attributes:
        name: The file, relative to the folder.
        what: Which kind of lack.
        content: What it should hold; ``None`` where that can't be told.
        wrong: What is wrong with the file that is there; empty where there is none.
    """

    name: str
    what: Lack
    content: bytes | None
    wrong: str = ""


def missing_files(checkpoint: Checkpoint, model: Model) -> tuple[list[Missing], list[Note]]:
    """What the folder of a whole pipeline lacks, and what had to be assumed to say what it would be."""
    there = checkpoint.folder.files if checkpoint.folder else {}
    maker = FolderFiles(checkpoint, model, of_folder_files(_readable(checkpoint)))
    made = maker.of_pipeline()
    stated = document_in(there[INDEX_NAME]) if INDEX_NAME in there else None
    index = stated if isinstance(stated, dict) else {}
    parts = [part for part in dict.fromkeys(name.partition("/")[0] for name in made) if not _left_out(index, part)]
    found = [] if not index else list(_index(index, json.loads(made[INDEX_NAME]), parts))
    for part in parts:
        ours, theirs = _inside(made, part), _inside(there, part)
        if part.startswith(_TOKENIZER):
            found += [replace(each, name=f"{part}/{each.name}") for each in _tokenizer(ours, theirs)]
        elif part == INDEX_NAME and part not in there:
            found.append(Missing(part, "config", made[part]))
        else:
            found += [
                Missing(f"{part}/{name}", "config", content) for name, content in ours.items() if name not in theirs
            ]
    return found, maker.notes if any(each.content is not None for each in found) else []


def _readable(checkpoint: Checkpoint) -> Checkpoint:
    """The same without tokenizers' configs that can't be read: they are found wrong, and state nothing."""
    folder = checkpoint.folder
    if folder is None:
        return checkpoint
    files = {
        name: data
        for name, data in folder.files.items()
        if not name.endswith(f"/{_CONFIG}") or isinstance(document_in(data), dict)
    }
    return replace(checkpoint, folder=replace(folder, files=files))


def _left_out(index: Mapping[str, Any], part: str) -> bool:
    """Whether whoever made the folder left a part out, and said so."""
    pair = index.get(part, ["", ""])
    return not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair))


def _index(index: Mapping[str, Any], ours: Mapping[str, Any], parts: list[str]) -> Iterator[Missing]:
    """The index with the parts that it doesn't speak of."""
    silent = {part: ours[part] for part in parts if part != INDEX_NAME and part not in index}
    if _VAE_GRAPH in index:
        silent.pop("vae", None)
    if silent:
        yield Missing(INDEX_NAME, "config", indented({**index, **silent}))


def _inside(files: Mapping[str, T], folder: str) -> dict[str, T]:
    prefix = folder + "/"
    return {name.removeprefix(prefix): content for name, content in files.items() if name.startswith(prefix)}


# ---------------------------------------------------------------- tokenizers


def _tokenizer(ours: Mapping[str, bytes], theirs: Mapping[str, Data]) -> list[Missing]:
    """What one tokenizer's folder lacks; one with another vocabulary than CLIP's is left to its maker."""
    read = _read(theirs)
    found = list(_vocabularies(ours, theirs, read))
    if _CONFIG in theirs or not any(each.name == _CONFIG for each in found):
        found += _settings(ours, theirs, read)
    return found


def _read(theirs: Mapping[str, Data]) -> TokenFiles:
    return read_tokens({name: _content(theirs[name]) for name in (FAST, *_SLOW) if name in theirs})


def _vocabularies(ours: Mapping[str, bytes], theirs: Mapping[str, Data], read: TokenFiles) -> Iterator[Missing]:
    """The files of tokens that are missing or can't be loaded."""
    for name, wrong in read.wrong.items():
        what: Lack = "tokenizer-old" if name in _SLOW and read.fast else "tokenizer"
        yield Missing(name, what, ours[name] if read.clip else None, wrong)
    absent = [name for name in _SLOW if name not in theirs]
    if FAST in theirs:
        yield from (Missing(name, "tokenizer-old", ours[name] if read.clip else None) for name in absent)
    elif absent:
        names = [name for name in ours if name not in theirs]
        yield from (Missing(name, "tokenizer", ours[name] if read.clip else None) for name in names)


def _settings(ours: Mapping[str, bytes], theirs: Mapping[str, Data], read: TokenFiles) -> Iterator[Missing]:
    """The files beside the tokens that can't be loaded, and a limit that is none."""
    for name in (_CONFIG, _SPECIAL):
        if name in theirs and not isinstance(document_in(theirs[name]), dict):
            content = ours[name] if read.clip else None
            yield Missing(name, "tokenizer", content, "it is no JSON object")
    stated = document_in(theirs[_CONFIG]) if _CONFIG in theirs else {}
    right = json.loads(ours[_CONFIG])
    if isinstance(stated, dict) and not _is_limit(stated.get(_LIMIT), right[_LIMIT]):
        mended = (stated | {_LIMIT: right[_LIMIT]}) if stated else right
        wrong = f"its {_LIMIT} is {_shown(stated[_LIMIT])}" if _LIMIT in stated else ""
        yield Missing(_CONFIG, "tokenizer-length", indented(mended), wrong)


def _is_limit(value: Any, positions: int) -> bool:
    """Whether a prompt can be so long: transformers writes 1e30 where there is no limit."""
    return type(value) is int and min(_SHORTEST, positions) <= value <= positions


def _shown(value: Any, most: int = 40) -> str:
    text = ascii(value)
    return text if len(text) <= most else text[:most] + "..."


def tokens_in(checkpoint: Checkpoint, part: str) -> int | None:
    """How many tokens a tokenizer in the folder has; ``None`` where that can't be told."""
    theirs = _inside(checkpoint.folder.files if checkpoint.folder else {}, part)
    read = _read(theirs)
    tokens = read.fast or read.slow
    if tokens is None:
        return None
    more = document_in(theirs[_ADDED]) if _ADDED in theirs else None
    return replace(tokens, added=tokens.added | (more.keys() if isinstance(more, dict) else set())).count


# ---------------------------------------------------------------- files


def _content(data: Data) -> bytes | None:
    return b"".join(data.chunks()) if data.nbytes <= _MOST_TOKENIZER else None


def document_in(data: Data) -> Any:
    """The JSON that a file holds; nothing where it holds none."""
    content = _content(data)
    try:
        return json.loads(content.decode()) if content is not None else None
    except (ValueError, RecursionError):
        return None


def completed(files: Mapping[str, Data], missing: list[Missing]) -> dict[str, Data]:
    """The folder's files with what it lacks."""
    return {**files, **{each.name: InMemory(each.content) for each in missing if each.content is not None}}
