"""How runtimes drift apart over the steps, as a chart of lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..parity.results import Picture
    from .parity_page import Side


_LEFT, _TOP, _WIDE, _HIGH, _BESIDE, _BELOW = 64, 14, 400, 220, 216, 40
_LANE, _LINE = 24, 15
"""Between the scale and what it doesn't hold; between two labels."""
_MOST_LINES = 16
"""Lines of the drawing of how runtimes drift apart."""
_TICKS = 8
_LETTERS = 20
"""Of a name in a label."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """A line: one format's way, of all pictures in which it is the same.

    Attributes:
        label: Whose.
        look: The number of its colour.
        points: Across and down, and what it says.
        level: Of its label.
    """

    label: str
    look: int
    points: tuple[tuple[float, float, str], ...]
    level: float

    @property
    def path(self) -> str:
        """Its points, for a polyline."""
        return " ".join(f"{across:.1f},{down:.1f}" for across, down, _ in self.points)


@dataclass(frozen=True, slots=True)
class _Chart:
    """The drawing, and its figures as a table.

    Attributes:
        lines: Drawn.
        left_out: How many aren't.
        across: Ticks of the steps.
        down: Ticks of the differences.
        size: Of the whole.
        plot: Left, top, width and height.
        heads: Of the table's columns.
        rows: By step.
    """

    lines: tuple[_Curve, ...]
    left_out: int
    across: tuple[tuple[float, str], ...]
    down: tuple[tuple[float, str], ...]
    size: tuple[int, int]
    plot: tuple[int, int, int, int]
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def chart_of(sides: Sequence[Side], steps: int) -> _Chart | None:
    """The relative L2 differences of latents by step; ``None`` where there are none."""
    found = [(side, picture) for side in sides for picture in side.found.pictures if picture.curve]
    if not found:
        return None
    scale = _Scale.of([value for _, picture in found for value in picture.curve], steps)
    groups = _alike(found)
    lines = _labelled([_Curve(label, look, scale.points(curve), 0.0) for label, look, curve in groups[:_MOST_LINES]])
    height = max(_TOP + _HIGH + _BELOW, math.ceil(max(line.level for line in lines)) + _LINE)
    return _Chart(
        lines, len(groups) - len(lines), scale.across, scale.down,
        (_LEFT + _WIDE + _BESIDE, height), (_LEFT, _TOP, _WIDE, _HIGH),
        tuple(f"{side.name}, picture {picture.number + 1}" for side, picture in found),
        tuple(
            (str(step), *map(short, values))
            for step, values in enumerate(zip_longest(*(picture.curve for _, picture in found)), 1)
        ),
    )  # fmt: skip


def _alike(found: Iterable[tuple[Side, Picture]]) -> list[tuple[str, int, tuple[float, ...]]]:
    """A label, a colour and a curve for each of a format's that are the same."""
    groups: dict[tuple[int, tuple[str, ...]], list[tuple[Side, Picture]]] = {}
    for side, picture in found:
        groups.setdefault((side.place, tuple(map(repr, picture.curve))), []).append((side, picture))
    result = []
    for members in groups.values():
        side = members[0][0]
        numbers = [str(picture.number + 1) for _, picture in members]
        which = "all" if len(numbers) == len(side.found.pictures) > 1 else ", ".join(numbers)
        result.append((f"{_clipped(side.name)}: {_clipped(which)}", side.place, members[0][1].curve))
    return result


def _clipped(text: str) -> str:
    """As much of a text as a label has room for; names end with what tells them apart."""
    return text if len(text) <= _LETTERS else f"…{text[1 - _LETTERS :]}"


def _labelled(lines: Sequence[_Curve]) -> tuple[_Curve, ...]:
    """The lines with their labels beside their ends, none over another."""
    placed, free = [], float(_TOP)
    for line in sorted(lines, key=lambda line: line.points[-1][1]):
        level = max(free, line.points[-1][1])
        placed.append(_Curve(line.label, line.look, line.points, level))
        free = level + _LINE
    return tuple(placed)


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where a value of a step is drawn: logarithmic, with lanes for what no logarithm has.

    Attributes:
        steps: How many.
        low: The least power of ten.
        high: The largest.
        top: Where that is.
        bottom: Where the least is.
        zeros: Whether there is an exact zero.
    """

    steps: int
    low: int
    high: int
    top: int
    bottom: int
    zeros: bool

    @classmethod
    def of(cls, values: Sequence[float], steps: int) -> _Scale:
        """One that holds all values."""
        logs = [math.log10(value) for value in values if math.isfinite(value) and value > 0] or [-8.0, 0.0]
        low, zeros = math.floor(min(logs)), 0 in values
        strange = not all(map(math.isfinite, values))
        bottom = _TOP + _HIGH - _LANE * zeros
        return cls(steps, low, max(low + 1, math.ceil(max(logs))), _TOP + _LANE * strange, bottom, zeros)

    def x(self, step: int) -> float:
        """Of a step, counted from 0."""
        return _LEFT + _WIDE * ((step + 0.5) / self.steps)

    def y(self, value: float) -> float:
        """Of a value."""
        if not math.isfinite(value):
            return _TOP
        if value <= 0:
            return _TOP + _HIGH
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.bottom - part * (self.bottom - self.top)

    def points(self, curve: Sequence[float]) -> tuple[tuple[float, float, str], ...]:
        """Of a line."""
        return tuple(
            (self.x(step), self.y(value), f"step {step + 1}: {short(value)}") for step, value in enumerate(curve)
        )

    @property
    def across(self) -> tuple[tuple[float, str], ...]:
        """Some of the steps."""
        stride = -(-self.steps // _TICKS)
        return tuple((self.x(step), str(step + 1)) for step in range(0, self.steps, stride))

    @property
    def down(self) -> tuple[tuple[float, str], ...]:
        """Some of the powers of ten, and the lanes."""
        stride = -(-(self.high - self.low) // _TICKS)
        ticks = [(self.y(10.0**power), f"1e{power}") for power in range(self.low, self.high + 1, stride)]
        zero = [(float(_TOP + _HIGH), "0")] if self.zeros else []
        strange = [(float(_TOP), "NaN, Inf")] if self.top > _TOP else []
        return (*zero, *ticks, *strange)


def short(value: float | None) -> str:
    """A difference in a few characters."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf"
    return f"{value:.1e}" if value else "0"
