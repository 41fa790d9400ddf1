"""The recipe that a model's metadata record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .. import history
from ..checkpoint import Checkpoint
from ..errors import UnsupportedError
from ..merging import webui
from ..operations import OPERATIONS
from ..operations.base import names_checkpoints
from ..wording import bare
from .document import Dumper
from .schema import VERSION, spelled


def recipe_from(checkpoint: Checkpoint, *, deep: bool = False) -> str:
    """The recipe that makes a model again, as far as its metadata tell.

    Args:
        checkpoint: The model.
        deep: Whether inputs whose making is recorded, too, are made anew, rather than taken as files.

    Returns:
        YAML, to be run once its inputs are where it says.

    Raises:
        UnsupportedError: If there is no record, or one of something that this version doesn't know.
    """
    teller = _Teller(checkpoint, deep=deep)
    steps = history.recorded(checkpoint.metadata)
    if steps:
        teller.chain(steps, teller.file(_mapping(steps[0].get("source"))))
    elif not webui.retell(checkpoint.metadata, teller, deep=deep):
        message = "its metadata record nothing that was done to it"
        raise UnsupportedError(message, file=checkpoint.path, remedy="ask whoever published it for a recipe")
    name = checkpoint.path.name if checkpoint.path else "model.safetensors"
    return teller.text(name)


class _Teller:
    """Gathers inputs and steps.

    Attributes:
        inputs: By name, as a recipe has them.
        steps: In order, as a recipe has them.
    """

    def __init__(self, checkpoint: Checkpoint, *, deep: bool) -> None:
        self.path, self.deep = checkpoint.path, deep
        self.hashes = history.HASH_KEYS[0] in checkpoint.metadata
        self.inputs: dict[str, str | dict[str, str]] = {}
        self.steps: list[dict[str, Any]] = []
        self.unsure: set[str] = set()
        self._current: str | None = None

    def input(self, name: str, sha256: str | None = None) -> str:
        """What an input is called in the recipe."""
        if not name or name == "in memory":
            raise self._unsupported("part of it came from memory, not from a file")
        same = next((called for called, known in self.inputs.items() if _is_same(known, name, sha256)), None)
        stem = re.sub(r"\W+", "-", name.partition(".")[0]).strip("-") or "input"
        numbered = (f"{stem}-{number}" for number in range(2, len(self.inputs) + 3))
        if same and not sha256:
            self.unsure.add(name)
        called = same or next(each for each in (stem, *numbered) if each not in self.inputs)
        if same is None or sha256:
            self.inputs[called] = {"path": name, "sha256": sha256} if sha256 else name
        return called

    def add(self, operation: str, parameters: Mapping[str, Any], source: str) -> str:
        """One step; the name of its result, which it is given as soon as somebody asks for it."""
        step: dict[str, Any] = {operation: dict(parameters) or None}
        if source != self._current:
            step["from"] = self.named(source)
        self.steps.append(step)
        self._current = f"({len(self.steps)})"
        return self._current

    def named(self, result: str) -> str:
        """A result under a name that other steps can use."""
        if not result.startswith("("):
            return result
        step = self.steps[int(result[1:-1]) - 1]
        return str(step.setdefault("as", f"made-{result[1:-1]}"))

    def chain(self, steps: Sequence[Mapping[str, Any]], current: str) -> str:
        """Steps one after another, from an input or a result on; the name of the last one's result."""
        for step in steps:
            name = str(step.get("operation"))
            if name not in OPERATIONS:
                raise self._unsupported(f"it records {name!r}, which this version doesn't know")
            parameters = self._parameters(name, step)
            current = self.add(name, parameters, current)
        return current

    def file(self, entry: Mapping[str, Any]) -> str:
        """A file of a record, with what was done to it since."""
        made, since = _steps(entry.get("made")), _steps(entry.get("steps"))
        if made and self.deep:
            return self.chain([*made, *since], self.file(_mapping(made[0].get("source"))))
        sha256 = entry.get("sha256")
        known = sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None
        return self.chain(since, self.input(bare(str(entry.get("name", ""))), known))

    def _parameters(self, name: str, step: Mapping[str, Any]) -> dict[str, Any]:
        recorded = _mapping(step.get("parameters"))
        files = [_mapping(each) for each in _list(step.get("inputs"))]
        found = {}
        for declared in OPERATIONS[name].declared():
            option = spelled(declared)
            key = option.replace("-", "_")
            if key not in recorded:
                continue
            value = recorded[key]
            if names_checkpoints(declared.type):
                count = len(value) if isinstance(value, list) else 1
                names = [self.named(self.file(each)) for each in files[:count]]
                if len(names) < count:
                    raise self._unsupported(f"of the inputs of {name} it doesn't tell the files")
                files = files[count:]
                value = names if isinstance(value, list) else names[0]
            found[option] = value
        return found

    def _unsupported(self, message: str) -> UnsupportedError:
        return UnsupportedError(message, file=self.path, remedy="ask whoever published it for a recipe")

    def text(self, name: str) -> str:
        """The recipe."""
        if self.steps and self.steps[0].get("from") == next(iter(self.inputs)):
            del self.steps[0]["from"]
        taken = {each if isinstance(each, str) else each["path"] for each in self.inputs.values()}
        if name in taken:  # it was changed in place
            stem, dot, suffix = name.rpartition(".")
            name = f"{stem or name}.again{dot}{suffix}" if stem else f"{name}.again"
        document = {
            "sdsurgery": VERSION,
            "title": f"How {name} was made",
            **({"record-hashes": True} if self.hashes else {}),
            "inputs": self.inputs,
            "steps": [_short(step) for step in self.steps],
            "outputs": [name],
        }
        text: str = yaml.dump(_literal(document), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
        doubt = "is told of several times without a hash: were those different files, write an input for each"
        doubts = [f"# {each!r} {doubt}\n" for each in sorted(self.unsure)]
        return "".join(doubts) + text


def _literal(value: Any) -> Any:
    """The same with dollar signs written so that they stand for themselves."""
    if isinstance(value, dict):
        return {key: _literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_literal(each) for each in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _is_same(known: str | Mapping[str, str], name: str, sha256: str | None) -> bool:
    """Whether a file is one that is an input already: of two with one name only hashes can tell that they differ."""
    entry = {"path": known} if isinstance(known, str) else known
    return entry["path"] == name and (sha256 is None or entry.get("sha256", sha256) == sha256)


def _short(step: dict[str, Any]) -> Any:
    """A step that has nothing but its name, as that."""
    return next(iter(step)) if list(step.values()) == [None] else step


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _steps(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in _list(value) if isinstance(each, Mapping)]
