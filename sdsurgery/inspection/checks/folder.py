"""A diffusers folder against its own configs: what it lacks besides weights, and what its configs get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...checkpoint import Checkpoint
from ...containers.folders import is_lone
from ...models.configs import CONFIG_NAME, described, documents
from ...models.folder_repair import Lack, missing_files
from ...models.identify import identify
from ..findings import Finding
from .subject import Subject, listed

_RULES: dict[Lack, tuple[str, str]] = {
    "config": ("config-missing", "it is missing"),
    "tokenizer": ("tokenizer", "it is missing, and no other file holds the tokenizer"),
    "tokenizer-old": ("tokenizer-old", "it is missing, and older programs read nothing else"),
    "tokenizer-length": ("tokenizer-length", "it states no model_max_length"),
}


def configs_there(subject: Subject) -> Iterator[Finding]:
    """Whether every file is there that a pipeline needs besides weights."""
    if subject.checkpoint.folder is None or is_lone(subject.checkpoint) or subject.model.family == "unknown":
        return
    for missing in missing_files(subject.checkpoint, subject.model)[0]:
        rule, why = _RULES[missing.what]
        mend = subject.rewritten() if missing.content is not None else None
        yield from subject.finding(rule, f"{missing.name}: {why}", file=missing.name, mend=mend)


def contradicting(subject: Subject) -> dict[str, Finding]:
    """Components whose weights are whole by themselves, but not what their config says; with what to say of it."""
    found: dict[str, Finding] = {}
    stated = documents(subject.checkpoint)
    for name, component in subject.known.items():
        place = name if name in stated else ""
        wrong = component.missing or component.misshapen(subject.checkpoint.tensors)
        if place not in stated or not wrong:
            continue
        file = f"{place}/{CONFIG_NAME}".lstrip("/")
        alone = _without(subject.checkpoint, file)
        other = identify(alone).components.get(name)
        if other is None or not other.table or other.missing or other.stray or other.misshapen(alone.tensors):
            continue
        says = described(component.config) if component.config else {}
        has = described(other.config) if other.config else {}
        fields = [field for field in has if has[field] != says.get(field)]
        message = f"{file} states another {listed(fields)} than the weights have"
        facts = {
            "component": name,
            "expected": ", ".join(f"{field} {has[field]}" for field in fields),
            "seen": ", ".join(f"{field} {says.get(field)}" for field in fields),
            "remedy": "put the model's own config in its place, or remove it and convert the folder, which writes one",
        }
        for finding in subject.finding("config-contradicts", message, mend=None, file=file, **facts):
            found[name] = finding
    return found


def _without(checkpoint: Checkpoint, file: str) -> Checkpoint:
    """The same folder without one of its files."""
    assert checkpoint.folder is not None  # noqa: S101 - for the type checker: configs lie in folders
    files = {name: data for name, data in checkpoint.folder.files.items() if name != file}
    return replace(checkpoint, folder=replace(checkpoint.folder, files=files))
