"""CLIP's position ids, held against who will load them."""

from __future__ import annotations

from collections.abc import Iterator

from ...models.configs import TEXT_ENCODERS
from ...models.position_ids import diagnose, positions
from ...wording import listed
from ..findings import Finding
from .subject import Subject

_RULES = {
    "missing": ("position-ids-missing", "there are no position ids"),
    "wrong-shape": ("position-ids-wrong", "the position ids have a wrong shape"),
    "wrong-values": ("position-ids-wrong", "the position ids have wrong values"),
    "fractional": ("position-ids-wrong", "the position ids are fractional"),
    "wrong-dtype": ("position-ids-dtype", "the position ids are right, but of another dtype"),
    "unexpected": ("position-ids-unneeded", "the position ids are right, but this layout holds none"),
}


def is_stray_ids(component: str, key: str) -> bool:
    """Whether a key that a component doesn't have is that of CLIP's position ids; a vision transformer's are others."""
    return component in TEXT_ENCODERS and key.endswith("position_ids") and "vision" not in key


def position_ids(subject: Subject) -> Iterator[Finding]:
    """Whether the ids are there, and right, and nowhere else; reads a few hundred bytes."""
    found = diagnose(subject.checkpoint, subject.model)
    # Under diffusers' names there are none, whoever loads them.
    told = subject.profile in {"a1111", "comfyui"} and subject.model.layout == "ldm"
    target = ("--target", subject.profile) if told else ()
    mend = subject.command("fix-clip", *target, safe=True)
    if found.status in _RULES:
        rule, message = _RULES[found.status]
        count = positions(subject.model)
        places = listed(found.wrong, 8)
        wrong = f": {len(found.wrong)} of {count} are wrong once truncated ({places})" if found.wrong else ""
        seen = "nothing" if found.status == "missing" else str(subject.checkpoint[found.key or ""])
        wanted = "nothing" if found.status == "unexpected" else f"I64[1, {count}], 0 to {count - 1}"
        facts = {"key": found.key, "component": "text_encoder", "expected": wanted, "seen": seen}
        yield from subject.finding(rule, message + wrong, mend=mend, **facts)
    for name in TEXT_ENCODERS:
        component = subject.model.components.get(name)
        for key in component.stray if component else ():
            if is_stray_ids(name, key):
                facts = {"key": key, "component": name, "expected": "nothing", "seen": str(subject.checkpoint[key])}
                yield from subject.finding("position-ids-stray", f"{key} belongs nowhere", mend=mend, **facts)
