"""The tokenizer's files, as transformers reads them and as the original repositories published them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdsurgery.models.tokenizer import END, tokenizer_files, vocabulary

PUBLISHED = {
    "vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
    "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
}
"""SHA-256 of both in the published folder of Stable Diffusion v1-5."""

PROMPTS = {  # ids between start and end, by clip.simple_tokenizer
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "IT'S  A\tCAFÉ": [585, 568, 320, 15304],
    "1girl, (best quality:1.2)": [272, 1611, 267, 263, 949, 3027, 281, 272, 269, 273, 264],
    "日本の風景 🙂": [39121, 44353, 21575, 165, 95, 101, 48132, 363, 14860],
}


def load(folder: Path, pad_token: str, max_length: int = 77) -> Any:
    from transformers import CLIPTokenizer

    for name, content in tokenizer_files(pad_token, max_length).items():
        (folder / name).write_bytes(content)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def test_the_files_are_the_published_ones() -> None:
    files = tokenizer_files(END, 77)
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in PUBLISHED} == PUBLISHED
    assert files["merges.txt"].startswith(b"#version: 0.2\ni n\nt h\n")


def test_every_file_agrees_on_the_vocabulary() -> None:
    files = tokenizer_files(END, 77)
    fast = json.loads(files["tokenizer.json"])["model"]
    ids = {token: index for index, token in enumerate(vocabulary())}
    assert len(ids) == 49408
    assert json.loads(files["vocab.json"]) == fast["vocab"] == ids
    assert files["merges.txt"].decode().splitlines()[1:] == fast["merges"]


@pytest.mark.parametrize(("pad_token", "pad_id"), [(END, 49407), ("!", 0)])
def test_transformers_reads_prompts_as_clip_does(tmp_path: Path, pad_token: str, pad_id: int) -> None:
    tokenizer = load(tmp_path, pad_token)
    for prompt, ids in PROMPTS.items():
        padded = [49406, *ids, 49407, *[pad_id] * (75 - len(ids))]
        assert tokenizer(prompt, padding="max_length", truncation=True).input_ids == padded


def test_long_prompts_are_cut_at_the_given_length(tmp_path: Path) -> None:
    ids = load(tmp_path, END, 16)("cat " * 50, truncation=True).input_ids
    assert ids == [49406, *[2368] * 14, 49407]


def test_the_settings_are_what_transformers_makes_itself(tmp_path: Path) -> None:
    load(tmp_path, END).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_bytes())
    ours = json.loads(tokenizer_files(END, 77)["tokenizer.json"])
    assert {name: ours[name] for name in ours if name not in {"model", "pre_tokenizer", "decoder"}} == {
        name: saved[name] for name in saved if name not in {"model", "pre_tokenizer", "decoder"}
    }


def test_the_bytes_are_the_same_in_every_process() -> None:
    code = (
        "import hashlib; from sdsurgery.models.tokenizer import tokenizer_files as f;"
        "print(hashlib.sha256(repr(f('!', 77)).encode()).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == hashlib.sha256(repr(tokenizer_files("!", 77)).encode()).hexdigest()
