"""convert-embedding: a textual inversion embedding in the format that somebody else reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from ..checkpoint import Change, Checkpoint, Note, Step, Tensor
from ..containers.webui_embedding import NAME, TWO_ENCODERS
from ..dtypes import CAST_TARGETS
from ..errors import MismatchError, UsageError
from ..models.embeddings import KOHYA_KEY, Embedding, called, find
from .base import Operation, Param
from .cast import DTypeName, cast_tensor, check_values

Reader = Literal["a1111", "diffusers"]


@dataclass(frozen=True)
class ConvertEmbedding(Operation):
    """Write a textual inversion embedding as the webuis or diffusers read it; no bit of a vector changes.

    For A1111's webui, which ComfyUI and kohya's trainer agree with: in a .safetensors emb_params, or clip_l and clip_g
    for SDXL. For diffusers: a .safetensors whose one key is the token. A .pt, for either of them, is the dict that
    A1111's webui writes.
    """

    name: ClassVar[str] = "convert-embedding"
    label = "converted"

    to: Annotated[Reader, Param("Who is to read it: A1111's webui, ComfyUI and kohya's trainer, or diffusers.")] = (
        "a1111"
    )
    token: Annotated[
        str | None,
        Param("What it is called; as it says itself unless given, or else as its file is.", metavar="NAME"),
    ] = None
    dtype: Annotated[DTypeName | None, Param("The type of the vectors; what they have unless given.")] = None

    def check(self) -> None:
        """Refuse a token that none can be."""
        if self.token is not None and not self.token.strip():
            raise UsageError("a token of nothing", remedy="give --token a word")

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`ConvertEmbedding`."""
        self.check()
        found = find(checkpoint)
        if found is None:
            raise MismatchError(
                "it is no embedding: its keys are those of no format that is known", file=checkpoint.path,
                remedy="name the file of an embedding; see what this one holds: sdsurgery inspect",
            )  # fmt: skip
        token = self.token or called(checkpoint, found)
        notes = self._checked(checkpoint, found)
        tensors: dict[str, Tensor] = {}
        changes: list[Change] = []
        for encoder, old in found.keys.items():
            new = self._key(checkpoint, encoder, token)
            tensors[new] = self._written(checkpoint[old])
            changes += _told(old, checkpoint[old], new, tensors[new])
        metadata = {**checkpoint.metadata, NAME: token}
        if metadata != checkpoint.metadata:
            changes.append(Change(NAME, "metadata", checkpoint.metadata.get(NAME), token))
        if not changes:
            notes.append(Note(f"it is as {self.to} reads it already"))
        told = {**self.parameters(), "to": self.to, "token": token}
        step = Step(self.name, told, tuple(changes), tuple(notes))
        return checkpoint.evolve(tensors, step, metadata=metadata, embedding=True)

    def _checked(self, checkpoint: Checkpoint, found: Embedding) -> list[Note]:
        """What the values say to a cast."""
        if self.dtype is None:
            return []
        target = CAST_TARGETS[self.dtype]
        chosen = {key: checkpoint[key] for key in found.keys.values() if checkpoint[key].dtype is not target}
        return list(check_values(chosen, target, checkpoint, "cast to bf16, or leave out --dtype"))

    def _key(self, checkpoint: Checkpoint, encoder: str, token: str) -> str:
        if self.to == "a1111":
            return encoder or KOHYA_KEY
        if encoder in TWO_ENCODERS:
            raise MismatchError(
                f"diffusers reads one tensor of a file, and this one has {encoder} for one of SDXL's text encoders",
                file=checkpoint.path, key=encoder,
                remedy="write it for a1111, and hand diffusers each tensor of that with its tokenizer and text encoder",
            )  # fmt: skip
        return token

    def _written(self, tensor: Tensor) -> Tensor:
        """The vectors in the wanted type; one alone is ``[width]`` for diffusers, and ``[1, width]`` for all others."""
        width = tensor.shape[-1]
        if tensor.shape in {(width,), (1, width)}:
            tensor = replace(tensor, shape=(1, width) if self.to == "a1111" else (width,))
        return cast_tensor(tensor, CAST_TARGETS[self.dtype]) if self.dtype else tensor


def _told(old: str, before: Tensor, new: str, after: Tensor) -> list[Change]:
    """What became of vectors."""
    changes = [Change(new, "renamed", old, new)] if new != old else []
    if after.shape != before.shape:
        changes.append(Change(new, "replaced", str(before), str(replace(before, shape=after.shape))))
    if after.dtype is not before.dtype:
        changes.append(Change(new, "cast", str(before.dtype), str(after.dtype)))
    return changes
