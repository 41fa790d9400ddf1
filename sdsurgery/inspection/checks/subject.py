"""What a check looks at, and how it says what it found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...checkpoint import Checkpoint
from ...containers.folders import is_lone
from ...containers.saving import beside
from ...dtypes import DType
from ...errors import MismatchError
from ...models.components import Component
from ...models.conversion import convertible
from ...models.embeddings import Embedding, find
from ...models.identify import Model
from ..findings import DONOR, Finding, Mend
from ..rules import RULES


@dataclass(frozen=True)
class Subject:
    """A model that is checked.

    Attributes:
        path: As it was named.
        checkpoint: Opened.
        model: What it was recognised as.
        profile: Whose needs it is held against.
        dtype: What its weights should be, if somebody asks for it.
    """

    path: Path
    checkpoint: Checkpoint
    model: Model
    profile: str
    dtype: DType | None = None

    @cached_property
    def embedding(self) -> Embedding | None:
        """The embedding that it is, where it is no model."""
        return find(self.checkpoint)

    @cached_property
    def files(self) -> dict[str, str]:
        """Of a folder, the file that each key lies in."""
        weights = self.checkpoint.folder.weights if self.checkpoint.folder else ()
        return {key: file.name for file in weights for key in file.tensors}

    @property
    def whole(self) -> bool:
        """Whether it should be a model of several parts: a folder of a pipeline, or a UNet where a model has it."""
        if self.checkpoint.folder:
            return not is_lone(self.checkpoint)
        placed = [name for name, found in self.model.networks.items() if found.prefix != self.model.wrapper]
        # A UNet alone under its prefix is what ComfyUI loads as a diffusion model, and no other program does.
        return len(placed) > 1 or (placed == ["unet"] and self.profile not in {"ldm", "comfyui"})

    def finding(self, rule: str, message: str, *, mend: Mend | None = None, **facts: str | None) -> Iterator[Finding]:
        """One finding, or none where the profile doesn't mind."""
        severity = RULES[rule].severity_in(self.profile)
        if severity is not None:
            facts.setdefault("file", self.files.get(facts.get("key") or ""))
            yield Finding(rule, severity, message, mend=mend, **facts)

    def command(self, *words: str, safe: bool = False) -> Mend:
        """A command on this model that writes its result beside it."""
        return Mend(("sdsurgery", words[0], self.named, *words[1:]), safe)

    @cached_property
    def convertible(self) -> bool:
        """Whether ``convert`` takes it: a whole model, or a whole component."""
        try:
            convertible(self.checkpoint, self.model)
        except MismatchError:
            return False
        return True

    @cached_property
    def strays(self) -> dict[str, str]:
        """The component of each key that it has by its prefix, and that it doesn't know."""
        return {key: name for name, found in self.model.components.items() for key in found.stray}

    @cached_property
    def uncastable(self) -> frozenset[str]:
        """The components that hold floats which no cast can read."""
        parts = self.model.components.items()
        tensors = ((name, self.checkpoint[key].dtype) for name, found in parts for key in found.all_keys())
        return frozenset(name for name, dtype in tensors if dtype.kind == "float" and dtype.numpy is None)

    @property
    def named(self) -> str:
        """The model as a word of a command."""
        return _word(self.path)

    @property
    def beside(self) -> str:
        """Where a mended model goes."""
        return _word(beside(self.path, "fixed", folder=self.checkpoint.folder is not None))

    def rewritten(self) -> Mend | None:
        """The same model, written anew beside it: safetensors, and in a folder what a folder should hold."""
        if self.embedding:
            same = ("--to", "diffusers") if self.embedding.format == "diffusers" else ()
            return self.command("convert-embedding", "-o", self.beside, *same)
        if self.convertible:
            same = ("--to", "diffusers") if self.model.layout == "diffusers" and not self.checkpoint.folder else ()
            return self.command("convert", self.beside, *same)
        return None if self.checkpoint.folder else self.pruned("-o", self.beside)

    def pruned(self, *words: str, drop: Iterable[str] = ()) -> Mend:
        """Prune nothing but these groups, and what the words say."""
        kept = [group for group in ("ema", "schedule", "training") if group not in set(drop)]
        return self.command("prune", *words, *(word for group in kept for word in ("--keep", group)))

    def replaced(self, component: str) -> Mend | None:
        """Another checkpoint's component instead of this one."""
        if component not in self.known:
            return None
        if component == "vae":
            return self.command("merge-vae", DONOR)
        return self.command("replace", "--component", component, "--from", DONOR)

    @property
    def known(self) -> dict[str, Component]:
        """The networks of which it is known what they should hold."""
        return {name: found for name, found in self.model.networks.items() if found.table}


def _word(path: Path) -> str:
    """A path that no command line takes for an option."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text
