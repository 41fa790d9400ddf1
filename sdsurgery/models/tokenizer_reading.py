"""What the files of somebody's tokenizer say, read as transformers would, and whether it is CLIP's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from .tokenizer import FAST, MERGES, VOCABULARY, fast_json, merge_lines, merges_txt, token_ids, vocab_json

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a tokenizer's files say.

    Attributes:
        ids: The tokens with their ids; empty where the tokenizer is of a kind that isn't looked into.
        merges: What becomes of two neighbours, the most frequent first.
        added: Tokens besides.
    """

    ids: Mapping[str, int]
    merges: tuple[Pair, ...] = ()
    added: frozenset[str] = frozenset()

    @property
    def count(self) -> int | None:
        """How many tokens there are, if that is known."""
        return len(self.ids.keys() | self.added) if self.ids else None


@dataclass(frozen=True)
class TokenFiles:
    """The files that hold a tokenizer's vocabulary, as they were read.

    Attributes:
        fast: What ``tokenizer.json`` says, if it is there and sound.
        slow: What ``vocab.json`` and ``merges.txt`` say, if both are there, sound, and fit each other.
        clip: Whether it is CLIP's, as far as anything tells.
        wrong: The files that can't be loaded, with the reason.
    """

    fast: Tokens | None
    slow: Tokens | None
    clip: bool
    wrong: Mapping[str, str] = field(default_factory=dict)


def read_tokens(contents: Mapping[str, bytes | None]) -> TokenFiles:
    """Read the files of a tokenizer as transformers would.

    Args:
        contents: Of each file by name, for those that are there; ``None`` for one that is too long to be looked into.
    """
    wrong: dict[str, str] = {}
    found: dict[str, Tokens] = {}
    for name, read in ((FAST, _read_fast), (VOCABULARY, _read_vocabulary), (MERGES, _read_merges)):
        content = contents.get(name)
        if name not in contents:
            continue
        try:
            found[name] = read(content) if content is not None else Tokens({})
        except (ValueError, RecursionError) as error:
            wrong[name] = str(error)
    slow = None
    if VOCABULARY in found and MERGES in found:
        slow = Tokens(found[VOCABULARY].ids, found[MERGES].merges)
        unfit = _unfit(slow) if slow.ids and contents[MERGES] is not None else None
        if unfit:
            name = MERGES if slow.ids == clip_tokens().ids else VOCABULARY
            wrong[name], slow = unfit, None
    known = [tokens for name, tokens in found.items() if name not in wrong]
    return TokenFiles(found.get(FAST), slow, all(map(_is_clips, known)), wrong)


def _is_clips(tokens: Tokens) -> bool:
    """Whether all that the tokens of one file tell is as CLIP has it."""
    clip = clip_tokens()
    return bool(tokens.ids or tokens.merges) and (tokens.ids in ({}, clip.ids) and tokens.merges in ((), clip.merges))


@cache
def clip_tokens() -> Tokens:
    """CLIP's own."""
    return Tokens(token_ids(), tuple(map(_pair, merge_lines().splitlines())))


def _pair(line: str) -> Pair:
    first, _, second = line.partition(" ")
    if not first or not second or " " in second:
        raise ValueError(f"{line[:40]!r} are not two tokens")
    return first, second


def _json(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError("it isn't UTF-8") from error
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


@lru_cache(maxsize=2)  # read twice in a row: for what is missing, and for the number of tokens
def _read_fast(content: bytes) -> Tokens:
    if content == fast_json():
        return clip_tokens()
    document = _json(content)
    model = document.get("model") if isinstance(document, dict) else None
    added = document.get("added_tokens") if isinstance(document, dict) else None
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError("it describes no tokenizer")  # noqa: TRY004 - as for all other contents
    texts = frozenset(str(entry.get("content")) for entry in added if isinstance(entry, dict))
    merges = model.get("merges")
    if model.get("type", "BPE") != "BPE":
        return Tokens({}, (), texts)
    if not isinstance(merges, list):
        raise ValueError("it has no merges")  # noqa: TRY004
    tokens = Tokens(_checked_ids(model.get("vocab")), tuple(map(_listed_pair, merges)), texts)
    unfit = _unfit(tokens) if not model.get("continuing_subword_prefix") else None
    if unfit:
        raise ValueError(unfit)
    return tokens


def _listed_pair(entry: Any) -> Pair:
    if isinstance(entry, str):
        return _pair(entry)
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(token, str) for token in entry):
        return entry[0], entry[1]
    raise ValueError("its merges are not pairs of tokens")


@lru_cache(maxsize=2)
def _read_vocabulary(content: bytes) -> Tokens:
    return clip_tokens() if content == vocab_json() else Tokens(_checked_ids(_json(content)))


def _checked_ids(vocabulary: Any) -> dict[str, int]:
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError("it has no vocabulary")
    if not all(type(index) is int and index >= 0 for index in vocabulary.values()):
        raise ValueError("its vocabulary gives a token no id")
    return vocabulary


def _read_merges(content: bytes) -> Tokens:
    if content == merges_txt():
        return Tokens({}, clip_tokens().merges)
    try:
        lines = [line.rstrip("\r") for line in content.decode().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError("it isn't UTF-8") from error
    if not any(lines):
        raise ValueError("it is empty")
    start = 1 if "#version" in lines[0] else 0
    return Tokens({}, tuple(_pair(line) for line in lines[start:] if line))


def _unfit(tokens: Tokens) -> str | None:
    """What is wrong where the merges aren't those of the vocabulary."""
    ids = tokens.ids
    for first, second in tokens.merges:
        if first not in ids or second not in ids or first + second not in ids:
            return f"vocabulary and merges don't belong together: {first[:20]!r} and {second[:20]!r}"
    fewest = len(clip_tokens().merges)
    if len(tokens.merges) < fewest and ids == clip_tokens().ids:
        return f"CLIP's vocabulary has {fewest:,} merges, and there are {len(tokens.merges):,}"
    return None
