"""Token ids as each format's own tokenizer makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CorruptError


def token_ids(configs: Path, texts: Sequence[str]) -> tuple[Tensor, ...]:
    """The ids of prompts for each text encoder, ``[len(texts), 77]``, padded and cut as pipelines do.

    Args:
        configs: The folder with the tokenizers.
        texts: The prompts.

    Raises:
        CorruptError: If a tokenizer's files can't be read.
    """
    from transformers import CLIPTokenizer

    found = []
    for name in ("tokenizer", "tokenizer_2"):
        if (configs / name).is_dir():
            try:
                tokenizer = CLIPTokenizer.from_pretrained(str(configs / name), local_files_only=True)
            except Exception as error:  # the library's exceptions have no common base
                raise CorruptError(
                    f"it can't be read: {str(error)[:300]}", file=configs / name, remedy="take it from a sound model"
                ) from error
            length = min(tokenizer.model_max_length, 77)
            ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length).input_ids
            found.append(torch.tensor(ids, dtype=torch.int64))
    return tuple(found)
