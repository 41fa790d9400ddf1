"""The JSON schema of recipes, made from the operations' own declarations."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, Literal, Union, get_args, get_origin

from ..dtypes import CAST_TARGETS
from ..inspection.findings import FailOn
from ..inspection.rules import PROFILES
from ..operations import OPERATIONS, Convert, Operation
from ..operations.base import Declared, names_checkpoints
from ..operations.convert import LayoutName
from ..parity.settings import Device, Precision, Profile, SchedulerName

VERSION = 1
"""Of the format, which a recipe states as ``sdsurgery``."""

WORDS_OF_STEP = ("from", "as")
"""Keys of a step that aren't its operation."""

_OWN_OF_OUTPUT = {"to", "sidecar"}
"""Parameters of ``convert`` that an output has its own way with."""

_NAME = {"type": "string", "minLength": 1}
_REFERENCE = {"type": "string", "pattern": r"\$\{[^{}]+\}"}
_SHA256 = {"type": "string", "pattern": "^[0-9a-fA-F]{64}$", "description": "64 hexadecimal digits."}


def schema(*, references: bool) -> dict[str, Any]:
    """The schema.

    Args:
        references: Whether ``${name}`` may stand for any value, as in the file that somebody edits; what is validated
            has the variables' values in their places.
    """
    made = _Schema(references)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of sdsurgery",
        "type": "object",
        "required": ["sdsurgery", "inputs", "outputs"],
        "additionalProperties": False,
        "properties": {
            "sdsurgery": {"const": VERSION, "description": "The version of this format."},
            "title": {"type": "string"},
            "description": {"type": "string"},
            "variables": {
                "type": "object",
                "description": "What --set can change, with what it is unless set; null where it must be.",
                "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            },
            "record-hashes": {
                "type": "boolean",
                "description": "Hash every input, and record that in the outputs, with the hash of their tensors.",
            },
            "inputs": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": made.input(),
                "description": "Checkpoints by name. The first one is what the first step starts from.",
            },
            "steps": {"type": "array", "items": made.step(), "description": "Operations, one after another."},
            "outputs": {"type": "array", "minItems": 1, "items": made.output()},
            "checks": {"type": "array", "items": made.check(), "description": "What must hold in the end."},
        },
    }


class _Schema:
    def __init__(self, references: bool) -> None:
        self.references = references

    def value(self, found: dict[str, Any]) -> dict[str, Any]:
        """A schema that a reference satisfies, too."""
        return {"anyOf": [found, _REFERENCE]} if self.references and found.get("type") != "string" else found

    def pattern(self, found: dict[str, Any]) -> dict[str, Any]:
        """A schema of certain texts, which a reference isn't one of."""
        return {"anyOf": [found, _REFERENCE]} if self.references else found

    def mapping(self, properties: dict[str, Any], *required: str) -> dict[str, Any]:
        """A mapping of just these."""
        found = {"type": "object", "additionalProperties": False, "properties": properties}
        return found | ({"required": list(required)} if required else {})

    def input(self) -> dict[str, Any]:
        path = {**_NAME, "description": "A file or a folder; relative to the recipe's folder."}
        hashes = {"type": "object", "additionalProperties": self.pattern(_SHA256), "minProperties": 1}
        whole = self.mapping(
            {
                "path": path,
                "sha256": {
                    "anyOf": [self.pattern(_SHA256), hashes],
                    "description": "What it must be; of a folder, of some or all of its files by name.",
                },
                "variant": {**_NAME, "description": "Which weights of a folder, such as fp16."},
            },
            "path",
        )
        return {"anyOf": [path, whole]}

    def step(self) -> dict[str, Any]:
        """An operation by its name alone, or with its parameters, and where it starts and what its result is called."""
        words = {
            "from": {
                **_NAME,
                "description": "What it is applied to: an input, or what another step's result is called.",
            },
            "as": {**_NAME, "description": "What its result is called."},
        }
        known = {name: self.operation(operation) for name, operation in OPERATIONS.items()}
        alone = [name for name, operation in OPERATIONS.items() if not any(map(_is_required, operation.declared()))]
        whole = {**self.mapping({**known, **words}), "minProperties": 1}
        return {"anyOf": [{"type": "string", "enum": alone}, whole]}

    def operation(self, operation: type[Operation]) -> dict[str, Any]:
        fields = list(operation.declared())
        required = [spelled(declared) for declared in fields if _is_required(declared)]
        whole = self.mapping({spelled(declared): self.parameter(declared) for declared in fields}, *required)
        short = [declared for declared in fields if declared.param.positional]
        forms = (
            [self.parameter(short[0]), whole] if len(short) == 1 and required in ([], [spelled(short[0])]) else [whole]
        )
        forms += [] if required else [{"type": "null"}]
        text = (operation.__doc__ or "").partition("\n")[0]
        return {"description": text, **(forms[0] if len(forms) == 1 else {"anyOf": forms})}

    def parameter(self, declared: Declared) -> dict[str, Any]:
        described = {"description": declared.param.help}
        kind = declared.type
        several = get_origin(kind) is tuple
        item = self.value(_of_type(get_args(kind)[0] if several else kind))
        if not several:
            numbers = [{"type": "array", "items": {"type": "number"}}] if declared.param.metavar == "NUMBERS" else []
            return described | ({"anyOf": [item, *numbers]} if numbers else item)
        forms = [item, {"type": "array", "items": item}]
        if "=" in (declared.param.metavar or ""):
            forms.append({"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}})
        return described | {"anyOf": forms}

    def output(self) -> dict[str, Any]:
        path = {**_NAME, "description": "A file or a folder; relative to the recipe's folder. Its name says which."}
        own = {
            spelled(declared): self.parameter(declared)
            for declared in Convert.declared()
            if declared.field.name not in _OWN_OF_OUTPUT
        }
        whole = {
            "path": path,
            "from": {**_NAME, "description": "What is written: the last step's result unless given."},
            "to": self.value(
                {"enum": list(get_args(LayoutName)), "description": "The layout; by the name unless given."}
            ),
            "dtype": self.value({"enum": list(CAST_TARGETS), "description": "Cast the weights to this type."}),
            "variant": {**_NAME, "description": "Stands in the names of a folder's weights."},
            "shard-size": {**_NAME, "description": "Split a folder's weights into files of at most this."},
            "sidecar": self.value(
                {"type": "boolean", "description": "Keep what a folder can't hold in a file beside it."}
            ),
        }
        return {"anyOf": [path, self.mapping(whole | own, "path")]}

    def check(self) -> dict[str, Any]:
        verify = {
            "profile": self.value({"enum": list(PROFILES), "description": "Who will load it."}),
            "dtype": self.value({"enum": list(CAST_TARGETS), "description": "The type that all weights should be of."}),
            "fail-on": self.value({"enum": list(get_args(FailOn))}),
            "allow": {"anyOf": [_NAME, {"type": "array", "items": _NAME}], "description": "ID[:PATTERN]"},
        }
        texts = {"anyOf": [_NAME, {"type": "array", "items": _NAME, "minItems": 1}]}
        whole, number = self.value({"type": "integer"}), self.value({"type": "number"})
        parity = {
            "prompts": texts,
            "negative": {"type": "string"},
            "seed": whole,
            "steps": whole,
            "guidance": number,
            "width": whole,
            "height": whole,
            "scheduler": self.value({"enum": list(get_args(SchedulerName))}),
            "device": self.value({"enum": list(get_args(Device))}),
            "precision": self.value({"enum": list(get_args(Precision))}),
            "tolerance": self.value({"enum": list(get_args(Profile))}),
            "reference": {**_NAME, "enum": ["ldm", "diffusers", "onnx"]},
            "report": {**_NAME, "description": "Write a report into this folder."},
        }
        words = {
            "verify": {"anyOf": [{"type": "null"}, self.mapping(verify)], "description": "Are they whole and sound?"},
            "parity": {"anyOf": [{"type": "null"}, self.mapping(parity)], "description": "Do they draw the same?"},
            "same-weights": {"type": "null", "description": "Do they hold the same weights, whatever their layout?"},
            "of": {
                "anyOf": [_NAME, {"type": "array", "items": _NAME, "minItems": 1}],
                "description": "The paths of the outputs that it is about; all unless given.",
            },
        }
        alone = [name for name in words if name != "of"]
        return {"anyOf": [{"type": "string", "enum": alone}, {**self.mapping(words), "minProperties": 1}]}


def spelled(declared: Declared) -> str:
    """A parameter as the command line spells it."""
    return (declared.param.flag or declared.field.name).lstrip("-").replace("_", "-")


def names_file(declared: Declared) -> bool:
    """Whether its value is a file that is no checkpoint."""
    parts = {get_origin(part) or part for part in _parts(declared.type)}
    return os.PathLike in parts and not names_checkpoints(declared.type)


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _is_required(declared: Declared) -> bool:
    return declared.field.default is MISSING


def _of_type(annotation: Any) -> dict[str, Any]:
    if get_origin(annotation) in {Union, types.UnionType}:
        choices = [choice for choice in get_args(annotation) if choice is not type(None)]
        literal = next((choice for choice in choices if get_origin(choice) is Literal), None)
        return _of_type(literal or choices[0])
    if get_origin(annotation) is Literal:
        return {"enum": list(get_args(annotation))}
    return {"type": {bool: "boolean", int: "integer", float: "number"}.get(annotation, "string")}
