"""How much of the others goes into each tensor: one number, or one for a component, a block, a pattern of names."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..models.regions import regions
from .presets import COUNT, PRESETS

_SDXL = 9
"""Blocks on the way down, and as many on the way up, of SDXL's UNet."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in a model.

    Attributes:
        component: Whose it is.
        key: Its key.
        names: Its canonical names within the component; several where ldm keeps in one tensor what diffusers splits.
        blocks: The blocks that those are in, as merge tools call them: ``IN00``, ``M00``, ``OUT11``.
    """

    component: str
    key: str
    names: tuple[str, ...]
    blocks: frozenset[str]

    @property
    def canonical(self) -> str:
        """What it is called whatever the layout, unless that has it in parts."""
        return f"{self.component}.{self.names[0] if self.names else self.key}"

    def is_named_by(self, selector: str) -> bool:
        """Whether a selector means it: a component, a block, or a pattern of its key or its canonical name."""
        if selector in {self.component, *self.blocks}:
            return True
        said = (self.key, *self.names, *(f"{self.component}.{name}" for name in self.names))
        return any(fnmatch.fnmatchcase(name, selector) for name in said)


def places(component: str, names_of: Mapping[str, Sequence[str]]) -> dict[str, Place]:
    """Where the tensors of a component are.

    Args:
        component: Which.
        names_of: Canonical names by key.
    """
    found = regions(component, [name for names in names_of.values() for name in names])
    return {
        key: Place(component, key, tuple(names), frozenset(_block(found[name].block.label) for name in names))
        for key, names in names_of.items()
    }


def _block(label: str) -> str:
    """A block as merge tools write it."""
    return "M00" if label == "MID" else label.replace(" ", "")


@dataclass(frozen=True, slots=True)
class Ratios:
    """The number of each tensor: the base, unless a block has its own, unless a rule names it; of rules the last.

    Attributes:
        base: Of what nothing else speaks of: text encoders, the UNet's time embedding and its last layers, too.
        blocks: By the name of a UNet's block.
        rules: A selector and its number.
    """

    base: float
    blocks: Mapping[str, float]
    rules: tuple[tuple[str, float], ...]

    def of(self, place: Place) -> float:
        """The number of a tensor."""
        ruled = [number for selector, number in self.rules if place.is_named_by(selector)]
        if ruled:
            return ruled[-1]
        return next((self.blocks[block] for block in sorted(place.blocks) if block in self.blocks), self.base)


def ratios(base: float, blocks: str | None, rules: Iterable[str], found: Sequence[Place]) -> Ratios:
    """Read what a user says.

    Args:
        base: The number of what nothing else speaks of.
        blocks: A preset's name, or numbers with commas between them, one a block of the UNet, or one more in front for
            the base.
        rules: Selectors with a number, ``IN04=0.3``.
        found: Every tensor that is merged.

    Raises:
        UsageError: If one of them makes no sense for the model.
    """
    read = tuple(map(_rule, rules))
    for selector, _ in read:
        if not any(place.is_named_by(selector) for place in found):
            raise _unknown(selector, found)
    if blocks is None:
        return Ratios(base, {}, read)
    names = sorted({block for place in found for block in place.blocks if _A_BLOCK.fullmatch(block)}, key=_flow)
    numbers = _numbers(blocks, names)
    if len(numbers) > len(names):
        base, *numbers = numbers
    return Ratios(base, dict(zip(names, numbers, strict=True)), read)


_A_BLOCK = re.compile(r"(IN|M|OUT)(\d\d)")


def _flow(block: str) -> tuple[int, int]:
    """Sorts blocks from the input to the output."""
    match = _A_BLOCK.fullmatch(block)
    assert match is not None  # noqa: S101 - for the type checker: only such are sorted
    return ("IN", "M", "OUT").index(match[1]), int(match[2])


def _rule(text: str) -> tuple[str, float]:
    selector, equals, number = text.rpartition("=")
    if not selector or not equals:
        raise UsageError(f"{text!r} is no rule", remedy="write it as WHERE=NUMBER, such as IN04=0.3 or unet=0.5")
    return selector, _number(number)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{text.strip()!r} is no number", remedy="write it as 0.25")
    return number


def _numbers(text: str, blocks: Sequence[str]) -> list[float]:
    """The numbers of a UNet's blocks, and of the base in front if that is given."""
    named = text.strip().upper().replace("-", "_")
    if "," in text:
        numbers = [_number(part) for part in text.split(",")]
    elif named in PRESETS:
        numbers = list(PRESETS[named])
    else:
        near = difflib.get_close_matches(named, PRESETS, 3)
        raise UsageError(f"{text!r} is no preset", remedy=f"choose from {', '.join(near or PRESETS)}, or give numbers")
    if len(blocks) == 2 * _SDXL + 1 and len(numbers) in {COUNT, COUNT + 1}:
        extra = len(numbers) - COUNT
        # Of a list for SD1, supermerger takes these for SDXL, too.
        numbers = numbers[: extra + _SDXL] + numbers[extra + 12 : extra + 13 + _SDXL]
    if not blocks:
        raise UsageError("no UNet is merged that has blocks", remedy="leave --blocks out")
    if len(numbers) not in {len(blocks), len(blocks) + 1}:
        raise UsageError(
            f"{len(numbers)} numbers are given for the {len(blocks)} blocks of the UNet",
            remedy=f"give one for each of {blocks[0]} to {blocks[-1]}, or one more in front for all else",
        )
    return numbers


def _unknown(selector: str, found: Sequence[Place]) -> UsageError:
    known = sorted({name for place in found for name in (place.component, *place.blocks)})
    keys = [name for place in found for name in (*place.names, place.key)]
    near = difflib.get_close_matches(selector, known + keys, 3, 0.5)
    listed = ", ".join(near) if near else f"{', '.join(known)}, or a pattern such as *.attn2.*"
    return UsageError(f"{selector!r} names nothing that is merged", remedy=f"name one of {listed}")
