"""Dtypes and values of the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...checkpoint import Tensor
from ...models.components import MARKERS
from ...models.known import latent_space
from ...models.leftovers import is_other_part, training_groups
from ...models.position_ids import values as elements
from ...values import Values, readable
from ..findings import Finding, Mend
from ..known_components import published_vae, publisher, rules
from .noise import faults
from .subject import Subject

_MOSTLY = 0.5
"""The share of denormal elements beyond which it is said; nobody has published one."""

_FEWEST = 64
"""Elements of a weight below which neither a constant nor many denormals mean anything."""

_HALVES = ("F16", "BF16")
_CAST_NAMES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
_LONGEST_SCHEDULE = 1 << 16


def dtypes(subject: Subject) -> Iterator[Finding]:
    """Whether the weights are of the dtype that is asked for, and each component of one."""
    for name, found in subject.model.networks.items():
        kinds = {key: subject.checkpoint[key].dtype for key in found.keys.values() if not key.endswith("position_ids")}
        floats = {key: dtype for key, dtype in kinds.items() if dtype.kind == "float"}
        for key in kinds.keys() - floats.keys():
            facts = {"key": key, "component": name, "expected": "a float", "seen": kinds[key].name}
            mend = subject.replaced(name)
            yield from subject.finding("weight-kind", f"{key} is {kinds[key].name}", mend=mend, **facts)
        for key, dtype in floats.items():
            if subject.dtype and dtype is not subject.dtype:
                mend = subject.command("cast", _CAST_NAMES[subject.dtype.name]) if not subject.uncastable else None
                facts = {"key": key, "component": name, "expected": subject.dtype.name, "seen": dtype.name}
                yield from subject.finding("dtype-asked", f"{key} is {dtype.name}", mend=mend, **facts)
        counts = Counter(dtype.name for dtype in floats.values()).most_common()
        if len(counts) > 1:
            told = ", ".join(f"{count} {dtype}" for dtype, count in counts)
            to = _CAST_NAMES.get(counts[0][0])
            one = subject.command("cast", to, "--component", name) if to and name not in subject.uncastable else None
            message = f"the {name} has {told}"
            yield from subject.finding("dtype-mixed", message, component=name, seen=told, mend=one)


def schedule(subject: Subject) -> Iterator[Finding]:
    """Whether the noise schedule's buffers, where they are there, are one."""
    found = subject.model.components.get("schedule")
    if found is None:
        return
    mend, series = subject.pruned(drop=["schedule"]), {}
    for name, key in found.keys.items():
        tensor = subject.checkpoint[key]
        if tensor.dtype.name in _HALVES:
            facts = {"key": key, "component": "schedule", "expected": "F32", "seen": tensor.dtype.name}
            yield from subject.finding("schedule-dtype", f"{key} is {tensor.dtype}", mend=mend, **facts)
        elif tensor.numel <= _LONGEST_SCHEDULE:
            series[name] = elements(tensor)
    for name, message in faults(series).items():
        key = found.keys[name]
        yield from subject.finding("schedule-values", f"{key} {message}", mend=mend, key=key, component="schedule")


def vae_figure(subject: Subject) -> Iterator[Finding]:
    """Whether the VAE's values are those of a known one of another family; reads the VAE, in a family that minds."""
    wanted = latent_space(subject.model.base_family)
    others = [each for each in rules()["vae"].published if each.latents not in {None, wanted}]
    if wanted is None or "vae" not in subject.known or not others:
        return
    match = published_vae(subject.checkpoint, subject.model)
    if match and match.latents and match.latents != wanted:
        message = f"the VAE's figure is {match.figure}, which {publisher()} publishes for {match.name}"
        facts = {"component": "vae", "expected": wanted, "seen": match.latents}
        yield from subject.finding("vae-figure", message, mend=subject.replaced("vae"), **facts)


def owners(subject: Subject) -> dict[str, str]:
    """The component that each key is of."""
    return {key: name for name, found in subject.model.components.items() for key in found.all_keys()}


def readable_keys(subject: Subject) -> Iterator[str]:
    """The keys of tensors whose values are looked at: all but integers and markers."""
    for key, tensor in subject.checkpoint.items():
        marker = key.removeprefix(subject.model.wrapper) in MARKERS
        ids = key.endswith("position_ids")  # see text.py
        if tensor.dtype.kind in {"float", "complex"} and readable(tensor) and not marker and not ids:
            yield key


def unreadable_keys(subject: Subject) -> Iterator[str]:
    """The keys of tensors whose dtype no library here has values for."""
    return (key for key, tensor in subject.checkpoint.items() if not readable(tensor))


def values(subject: Subject, found: Mapping[str, Values], owner: Mapping[str, str]) -> Iterator[Finding]:
    """What the values of the weights tell."""
    for key in unreadable_keys(subject):
        message = f"{key} is {subject.checkpoint[key].dtype}, whose values nobody here can read"
        facts = {"key": key, "component": owner.get(key, "other"), "remedy": "check it with the program that wrote it"}
        yield from subject.finding("value-unread", message, mend=None, **facts)
    for key, seen in found.items():
        component, tensor = owner.get(key, "other"), subject.checkpoint[key]
        for finding in _broken(subject, key, component, seen):
            loaded = component in subject.model.networks or is_other_part(subject.checkpoint, key)
            yield finding if loaded else replace(finding, severity="note")
        if component in subject.model.networks and seen.numel >= _FEWEST:
            yield from _odd(subject, key, component, tensor, seen)


def _broken(subject: Subject, key: str, component: str, seen: Values) -> Iterator[Finding]:
    facts = {"key": key, "component": component}
    mend = _without(subject, component, key)
    if seen.nan:
        message = f"{seen.nan:,} of {seen.numel:,} values of {key} are NaN"
        yield from subject.finding("value-nan", message, seen=str(seen.nan), mend=mend, **facts)
    if seen.infinite:
        message = f"{seen.infinite:,} of {seen.numel:,} values of {key} are infinite"
        yield from subject.finding("value-infinite", message, seen=str(seen.infinite), mend=mend, **facts)
    if seen.overflow and component in subject.model.networks:
        message = f"{seen.overflow:,} of {seen.numel:,} values of {key} are beyond fp16"
        words = ("fp16", "--component", component, "--on-overflow", "clip")
        cast = subject.command("cast", *words) if component not in subject.uncastable else None
        yield from subject.finding("value-overflow", message, seen=str(seen.overflow), mend=cast, **facts)


def _odd(subject: Subject, key: str, component: str, tensor: Tensor, seen: Values) -> Iterator[Finding]:
    facts = {"key": key, "component": component}
    if seen.constant is not None and math.isfinite(seen.constant) and len(tensor.shape) > 1:
        message = f"all {seen.numel:,} values of {key} are {seen.constant:g}"
        mend = _without(subject, component, key)
        yield from subject.finding("value-constant", message, seen=f"{seen.constant:g}", mend=mend, **facts)
    if seen.denormal > _MOSTLY * seen.numel:
        message = f"{seen.denormal:,} of {seen.numel:,} values of {key} are denormal in {tensor.dtype}"
        yield from subject.finding("value-denormal", message, seen=str(seen.denormal), mend=None, **facts)


def _without(subject: Subject, component: str, key: str) -> Mend | None:
    """Rid of a component's values: another's instead, or none where nobody needs them."""
    if component in subject.known and key in subject.strays:
        return subject.pruned("--unknown")
    if component in subject.model.networks:
        return subject.replaced(component)
    if component in {"ema", "schedule"}:
        return subject.pruned(drop=[component])
    if is_other_part(subject.checkpoint, key):
        return None
    trained = dict(training_groups(subject.checkpoint, subject.model))["training"]
    if key in trained:
        return subject.pruned(drop=["training"])
    return subject.pruned("--unknown")
