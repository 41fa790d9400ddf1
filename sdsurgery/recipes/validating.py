"""What the schema has against a document, in words for a person, each with its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..operations import OPERATIONS
from .document import Document, RecipeError, meant
from .schema import schema

if TYPE_CHECKING:
    from jsonschema import ValidationError

_KINDS = {
    "string": "a text", "integer": "a whole number", "number": "a number", "boolean": "true or false",
    "array": "a list", "object": "a mapping", "null": "nothing",
}  # fmt: skip


def validate(document: Document) -> None:
    """Hold a document against the schema.

    Raises:
        RecipeError: Names every fault.
    """
    from jsonschema import Draft202012Validator

    errors = Draft202012Validator(schema(references=False)).iter_errors(document.content)
    faults = [fault for error in errors for leaf in _leaves(error) for fault in _told(leaf, document)]
    if faults:
        raise RecipeError(document.path, faults)


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """What is wrong in the form that was meant, where there are several."""
    if not error.context:
        yield error
        return
    forms: dict[Any, list[ValidationError]] = {}
    for each in error.context:
        forms.setdefault(each.relative_schema_path[0], []).append(each)
    fitting = [found for found in forms.values() if not any(_is_another_kind(each) for each in found)]
    if not fitting:
        yield error
        return
    for each in min(fitting, key=len):
        yield from _leaves(each)


def _is_another_kind(error: ValidationError) -> bool:
    """Whether a form isn't what was meant: a list where a mapping stands, or the like."""
    if error.relative_path:
        return False
    forms: dict[Any, bool] = {}
    for each in error.context or ():
        form = each.relative_schema_path[0]
        forms[form] = forms.get(form, False) or _is_another_kind(each)
    return all(forms.values()) if forms else error.validator == "type"


def _told(error: ValidationError, document: Document) -> Iterator[tuple[int, str]]:
    place = tuple(error.absolute_path)
    name = f"{place[-1]}: " if place and isinstance(place[-1], str) else ""
    value: Any = error.instance
    wanted = cast(Any, error.validator_value)
    form = cast(Mapping[str, Any], error.schema)
    if error.validator == "additionalProperties":
        known = form["properties"]
        for key in value:
            if key not in known:
                yield document.line((*place, key)), f"{key!r} isn't known here{meant(key, known)}"
    elif error.validator == "required":
        missing = [key for key in wanted if key not in value]
        yield document.line(place), f"{name}{missing[0]!r} is missing"
    elif error.validator == "enum" and isinstance(value, str) and value in OPERATIONS and place[0] == "steps":
        yield document.line(place), f"{value} needs parameters: write {value}: and what they are"
    elif error.validator == "enum" and isinstance(value, str):
        yield document.line(place), f"{name}{value!r} isn't known here{meant(value, list(wanted))}"
    elif error.validator == "pattern":
        yield document.line(place), f"{name}{value!r} is no SHA-256: that has 64 hexadecimal digits"
    else:
        yield document.line(place), f"{name}{_shown(value)} stands where {_expected(form)} should"


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return ("an empty " if not value else "a ") + ("list" if isinstance(value, list) else "mapping")
    return "nothing" if value is None or value == "" else repr(value)


def _expected(found: Mapping[str, Any]) -> str:
    """What a schema asks for, in words."""
    if "const" in found:
        return repr(found["const"])
    if "enum" in found:
        return f"one of {', '.join(map(str, found['enum']))}"
    if "anyOf" in found:
        return _either(list(dict.fromkeys(_expected(form) for form in found["anyOf"])))
    kinds = found["type"] if isinstance(found["type"], list) else [found["type"]]
    return _either([_KINDS[kind] for kind in kinds])


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
