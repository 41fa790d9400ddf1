"""Sound and damaged models in every format, and what ``sdsurgery parity`` says of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import Result, cli
from oracle_support import Bench, Case, State, converted
from safetensors.torch import load_file, save_file

SD1, SDXL = Case("sd1"), Case("sdxl")
SMALL = {"--size": "64x64", "--steps": "2", "--device": "cpu"}

Change = Callable[[State], None]
"""Damages the tensors of a single file."""


@dataclass(frozen=True)
class Found:
    """A result, read."""

    code: int
    document: dict[str, Any]

    def of(self, kind: str) -> dict[str, Any]:
        """The only format of that kind."""
        (found,) = (each for each in self.document["formats"] if each["kind"] == kind)
        return dict(found)

    def component(self, kind: str) -> str | None:
        """What diverges first."""
        first = self.of(kind)["diverges"]
        return first and str(first["component"])

    def located(self, kind: str) -> str | None:
        """The module that is named, without the ``text_model.`` of some versions of transformers."""
        name = self.of(kind)["located"]
        return name and str(name).removeprefix("text_model.")


def run(*words: str | os.PathLike[str]) -> Result:
    """``sdsurgery parity``, of two steps and 64 x 64 pixels unless told otherwise."""
    told = {name: value for name, value in SMALL.items() if name not in words}
    return cli("parity", *words, *(word for pair in told.items() for word in pair))


def compared(*words: str | os.PathLike[str]) -> Found:
    """The document of a comparison that came to its end."""
    done = run(*words, "--json")
    document = json.loads(done.out)
    assert "error" not in document, document
    return Found(done.code, document)


class Models:
    """Models that are made once and read by many tests."""

    def __init__(self, root: Path) -> None:
        self.root, self.bench = root, Bench(root)
        self.file = self.bench.file
        self.made = cache(self._made)

    def _made(self, file: Path, kind: str, *options: str) -> Path:
        return converted(file, self.root / "-".join((file.stem, kind, *options)), "--to", kind, *options)

    def damaged(self, case: Case, name: str, change: Change) -> Path:
        """A copy of a single file whose tensors are changed."""
        path = self.root / f"{case}-{name}.safetensors"
        if not path.exists():
            tensors = load_file(self.file(case))
            change(tensors)
            save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})
        return path

    def edited(self, case: Case, name: str, place: str, **fields: Any) -> Path:
        """A copy of the diffusers folder with other fields in a config; weights are links."""
        folder = self.root / f"{case}-{name}"
        shutil.copytree(self.made(self.file(case), "diffusers"), folder, copy_function=os.link)
        config = json.loads((folder / place).read_text("utf-8")) | fields
        (folder / place).unlink()
        (folder / place).write_text(json.dumps(config), "utf-8")
        return folder


def transposed(key: str) -> Change:
    """Rows and columns of a square matrix."""

    def change(tensors: State) -> None:
        assert tensors[key].shape[0] == tensors[key].shape[1]
        tensors[key] = tensors[key].transpose(0, 1)

    return change


def zeroed(key: str) -> Change:
    return lambda tensors: tensors.update({key: torch.zeros_like(tensors[key])})


def rolled(key: str, count: int = 5) -> Change:
    """Output channels, each in the place of another."""
    return lambda tensors: tensors.update({key: tensors[key].roll(count, 0)})


def scaled(key: str, factor: float) -> Change:
    return lambda tensors: tensors.update({key: tensors[key] * factor})


def put(key: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({key: value})


def another(prefix: str) -> Change:
    """Weights of another training under a prefix."""

    def change(tensors: State) -> None:
        noise = torch.Generator().manual_seed(5)
        for key, value in tensors.items():
            if key.startswith(prefix) and value.dim() > 1:
                tensors[key] = value + 0.2 * value.std() * torch.randn(value.shape, generator=noise)

    return change
