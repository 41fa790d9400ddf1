"""Textual inversion embeddings: whose format one has, and what its vectors are for; told by keys and shapes alone.

What the formats are, and who reads which, is as in A1111's webui (``modules/textual_inversion``), ComfyUI
(``comfy/sd1_clip.py``), diffusers (``loaders/textual_inversion.py``) and kohya's sd-scripts
(``train_textual_inversion.py`` and SDXL's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final, Literal

from ..checkpoint import Checkpoint, Tensor
from ..containers.webui_embedding import NAME, PLACEHOLDER, TWO_ENCODERS

Format = Literal["a1111", "kohya", "diffusers", "sdxl", "pti"]

KOHYA_KEY: Final = "emb_params"
_PTI: Final = dict(zip(("text_encoders_0", "text_encoders_1"), TWO_ENCODERS, strict=True))

_TOLD: Mapping[Format, str] = {
    "a1111": "A1111's format",
    "kohya": "kohya's format",
    "diffusers": "diffusers' format",
    "sdxl": "SDXL's format",
    "pti": "the format of SDXL's first trainers (.pti)",
}

WIDTHS: Final = {"clip_l": 768, "clip_g": 1280}
"""Of the vectors of text encoders that a format names; so wide are the published ones."""

_FAMILIES: Mapping[tuple[int, ...], str] = {(768,): "sd1", (1024,): "sd2", (1280,): "sdxl-refiner", (768, 1280): "sdxl"}
"""Of published models, by the widths of the text encoders that an embedding is for."""

LONGEST_PROMPT: Final = 75
"""Tokens that a prompt of CLIP's has room for."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """An embedding in a checkpoint.

    Attributes:
        format: Whose format it is.
        keys: The vectors' keys, by the text encoder: ``clip_l``, ``clip_g``, or nothing where the format doesn't say.
        vectors: The vectors, by the same; each ``[width]`` or ``[number, width]``.
        token: What it is called, if the file says so.
    """

    format: Format
    keys: Mapping[str, str]
    vectors: Mapping[str, Tensor]
    token: str | None

    @property
    def counts(self) -> tuple[int, ...]:
        """How many vectors there are for each text encoder."""
        return tuple(tensor.shape[0] if len(tensor.shape) == 2 else 1 for tensor in self.vectors.values())

    @property
    def widths(self) -> tuple[int, ...]:
        """How wide the vectors for each text encoder are."""
        return tuple(tensor.shape[-1] for tensor in self.vectors.values())

    @property
    def family(self) -> str:
        """The family whose published models have text encoders of these widths, or ``unknown``."""
        return _FAMILIES.get(self.widths, "unknown")


def find(checkpoint: Checkpoint) -> Embedding | None:
    """The embedding that a checkpoint is, if it is one."""
    if not checkpoint or len(checkpoint) > len(TWO_ENCODERS) or not all(map(_may_be_vectors, checkpoint.values())):
        return None
    stated = checkpoint.metadata.get(NAME)
    named: tuple[tuple[Format, Mapping[str, str]], ...] = (
        ("sdxl", dict(zip(TWO_ENCODERS, TWO_ENCODERS, strict=True))), ("pti", _PTI),
        ("kohya", {KOHYA_KEY: ""}), ("a1111", {PLACEHOLDER: ""}),
    )  # fmt: skip
    for kind, encoders in named:
        if checkpoint.keys() <= encoders.keys():
            keys = {encoder: key for key, encoder in encoders.items() if key in checkpoint}
            return Embedding(kind, keys, {name: checkpoint[key] for name, key in keys.items()}, stated)
    (key, *others) = checkpoint
    if others or not _is_token(key, checkpoint[key], stated):
        return None
    return Embedding("diffusers", {"": key}, {"": checkpoint[key]}, key)


def _may_be_vectors(tensor: Tensor) -> bool:
    return tensor.dtype.kind == "float" and len(tensor.shape) in {1, 2}


def _is_token(key: str, tensor: Tensor, stated: str | None) -> bool:
    """Whether a lone tensor's key is a token: by the brackets that tokens have, by its width, or because it is said."""
    if stated == key or (key.startswith("<") and key.endswith(">")):
        return True
    published = (tensor.shape[-1],) in _FAMILIES and (len(tensor.shape) == 1 or tensor.shape[0] <= LONGEST_PROMPT)
    return published and "." not in key and key not in {"weight", "bias"}


def called(checkpoint: Checkpoint, embedding: Embedding) -> str:
    """What it is called: by itself, or by its file, as the webui and ComfyUI do it."""
    name = checkpoint.origin.name if checkpoint.origin else ""
    return embedding.token or PurePath(name).stem or "embedding"


def described(checkpoint: Checkpoint) -> list[str]:
    """What an embedding is, in a few words; nothing if it is none."""
    found = find(checkpoint)
    if found is None:
        return []
    parts = zip(found.vectors, found.counts, found.widths, strict=True)
    counted = (f"{count} of width {width}" + (f" for {name}" if name else "") for name, count, width in parts)
    told = [f"a textual inversion embedding in {_TOLD[found.format]}; vectors: {', '.join(counted)}"]
    told.append(f"its token is {found.token}" if found.token else "it says no token: it is called as its file is")
    return told + ([f"made for {found.family}"] if found.family != "unknown" else [])
