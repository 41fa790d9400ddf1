"""CLIP's tokenizer as the files of a diffusers folder hold it.

All that Stable Diffusion's text encoders share is one list of byte-pair merges; vocabulary and ids follow from it
(``clip.simple_tokenizer``). Readers differ in what they want: slow tokenizers of transformers 4 read ``vocab.json``
and ``merges.txt``, fast ones and transformers 5 ``tokenizer.json``. So all three are written, and the merges in
``tokenizer.json`` as strings, because tokenizers before 0.20 reads no pairs.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any, Final

from .configs import indented

FAST: Final = "tokenizer.json"
VOCABULARY: Final = "vocab.json"
MERGES: Final = "merges.txt"

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
_VERSION: Final = "#version: 0.2\n"
_PATTERN: Final = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _added(index: int, token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": token, **flags}


_FAST: Final[dict[str, Any]] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [_added(49406, START), _added(49407, END)],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        ],
    },
    "post_processor": {
        "type": "RobertaProcessing",
        "sep": [END, 49407],
        "cls": [START, 49406],
        "trim_offsets": False,
        "add_prefix_space": False,
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": END,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>",
        "fuse_unk": False,
        "vocab": "@vocab",
        "merges": "@merges",
    },
}


def tokenizer_files(pad_token: str, max_length: int) -> dict[str, bytes]:
    """The files of a ``tokenizer`` folder by name.

    Args:
        pad_token: What fills short prompts: ``<|endoftext|>`` for OpenAI's CLIP, ``!`` for OpenCLIP, which pads with
            id 0. As in the published folders of SD2 and SDXL, transformers then takes every ``!`` in a prompt for
            that token, where open_clip has ``!</w>``.
        max_length: The longest prompt in tokens, the number of the text encoder's positions. Without it,
            transformers has no limit, and a pipeline ends in an overflow.
    """
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    config = {
        "add_prefix_space": False,
        **special,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        VOCABULARY: vocab_json(),
        MERGES: merges_txt(),
        FAST: fast_json(),
        "tokenizer_config.json": indented(config),
        "special_tokens_map.json": indented(special),
    }


def vocabulary() -> list[str]:
    """Every token; its index is its id."""
    characters = _byte_characters()
    joined = merge_lines().replace(" ", "").splitlines()
    return [*characters, *(character + "</w>" for character in characters), *joined, START, END]


def token_ids() -> dict[str, int]:
    """Every token with its id."""
    return {token: index for index, token in enumerate(vocabulary())}


def _byte_characters() -> list[str]:
    """A printable character for each byte, in the order of their ids: those that print as themselves come first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + index) for index in range(0x100 - len(printable))]


@cache
def merge_lines() -> str:
    """CLIP's merges, the most frequent first, one a line."""
    from importlib import resources

    return gzip.decompress(resources.files("sdsurgery.data").joinpath("tokenizer/merges.txt.gz").read_bytes()).decode()


def merges_txt() -> bytes:
    """The merges as slow tokenizers read them."""
    return (_VERSION + merge_lines()).encode()


@cache
def vocab_json() -> bytes:
    """As transformers' slow tokenizer saved it for the published folders: sorted by token, one a line.

    Separators stand in for ``indent=2``, because json's indenting encoder is many times slower.
    """
    text = json.dumps(token_ids(), ensure_ascii=False, sort_keys=True, separators=(",\n  ", ": "))
    return f"{{\n  {text[1:-1]}\n}}\n".encode()


@cache
def fast_json() -> bytes:
    """``tokenizer.json``: the settings indented, the two long lists on a line each."""
    ids = json.dumps(token_ids(), ensure_ascii=False)
    merges = json.dumps(merge_lines().splitlines(), ensure_ascii=False)
    text = json.dumps(_FAST, indent=2).replace('"@vocab"', ids).replace('"@merges"', merges)
    return f"{text}\n".encode()
