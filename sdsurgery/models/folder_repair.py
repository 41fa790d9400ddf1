"""What a diffusers folder lacks besides weights, and what it would be: configs, scheduler, index, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..checkpoint import Checkpoint, Note
from ..sources import Data, InMemory
from .folder_files import INDEX_NAME, FolderFiles
from .identify import Model
from .stated import of_folder_files

Lack = Literal["config", "tokenizer", "tokenizer-old", "tokenizer-length"]

T = TypeVar("T")

_TOKENIZER = "tokenizer"
_FAST, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_SLOW = ("vocab.json", "merges.txt")
_LIMIT = "model_max_length"
_MOST_TOKENIZER = 64 << 20
_ENDLESS = 1e12
"""transformers writes a limit of 1e30 where there is none."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A file that a folder lacks, or lacks something in.

    Attributes:
        name: The file, relative to the folder.
        what: Which kind of lack.
        content: What it should hold; ``None`` where that can't be told.
    """

    name: str
    what: Lack
    content: bytes | None


def missing_files(checkpoint: Checkpoint, model: Model) -> tuple[list[Missing], list[Note]]:
    """What the folder of a whole pipeline lacks, and what had to be assumed to say what it would be."""
    there = checkpoint.folder.files if checkpoint.folder else {}
    maker = FolderFiles(checkpoint, model, of_folder_files(checkpoint))
    made = maker.files()
    stated = _document(there[INDEX_NAME]) if INDEX_NAME in there else None
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
    return found, maker.notes if found else []


def _left_out(index: Mapping[str, Any], part: str) -> bool:
    """Whether whoever made the folder left a part out, and said so."""
    pair = index.get(part, ["", ""])
    return part in index and not (isinstance(pair, list) and all(isinstance(word, str) for word in pair))


def _index(index: Mapping[str, Any], ours: Mapping[str, Any], parts: list[str]) -> Iterator[Missing]:
    """The index with the parts that it doesn't speak of."""
    silent = {part: ours[part] for part in parts if part != INDEX_NAME and part not in index}
    if silent:
        content = (json.dumps({**index, **silent}, indent=2, ensure_ascii=False) + "\n").encode()
        yield Missing(INDEX_NAME, "config", content)


def _inside(files: Mapping[str, T], folder: str) -> dict[str, T]:
    prefix = folder + "/"
    return {name.removeprefix(prefix): content for name, content in files.items() if name.startswith(prefix)}


def _tokenizer(ours: Mapping[str, bytes], theirs: Mapping[str, Data]) -> list[Missing]:
    """What one tokenizer's folder lacks; one with another vocabulary than CLIP's is left to its maker."""
    slow, fast = all(name in theirs for name in _SLOW), _FAST in theirs
    if not slow and not fast:
        return [Missing(name, "tokenizer", content) for name, content in ours.items() if name not in theirs]
    found = []
    if not slow:
        clip = _vocabulary(_document(theirs[_FAST])) == _vocabulary(json.loads(ours[_FAST]))
        names = [name for name in _SLOW if name not in theirs]
        found += [Missing(name, "tokenizer-old", ours[name] if clip else None) for name in names]
    stated = _document(theirs[_CONFIG]) if _CONFIG in theirs else None
    limit = stated.get(_LIMIT) if isinstance(stated, dict) else None
    if not isinstance(limit, int | float) or limit > _ENDLESS:
        right = json.loads(ours[_CONFIG])
        mended = (stated | {_LIMIT: right[_LIMIT]}) if isinstance(stated, dict) else right
        content = (json.dumps(mended, indent=2, ensure_ascii=False) + "\n").encode()
        found.append(Missing(_CONFIG, "tokenizer-length", content))
    return found


def _vocabulary(document: Any) -> Any:
    model = document.get("model") if isinstance(document, dict) else None
    return model.get("vocab") if isinstance(model, dict) else None


def _document(data: Data) -> Any:
    """The JSON that a file holds; nothing where it holds none."""
    if data.nbytes > _MOST_TOKENIZER:
        return None
    try:
        return json.loads(b"".join(data.chunks()))
    except (ValueError, RecursionError):
        return None


def completed(files: Mapping[str, Data], missing: list[Missing]) -> dict[str, Data]:
    """The folder's files with what it lacks."""
    return {**files, **{each.name: InMemory(each.content) for each in missing if each.content is not None}}
