"""The weights a block that merge tools know by name: 25 numbers, IN00 to IN11, M00, OUT00 to OUT11.

Named and published by bbc-mc's sdweb-merge-block-weighted-gui (csv/preset.tsv); supermerger and sd-meh (MIT) have the
same. All of them follow formulas in the place of a block, which are written here; the published numbers are those, with
10 to 15 digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

COUNT = 25
"""Blocks of SD1's and SD2's UNet."""


def _everywhere(weight: float) -> list[float]:
    return [weight] * COUNT


def _drawn(curve: Callable[[float], float]) -> list[float]:
    return [curve(place / (COUNT - 1)) for place in range(COUNT)]


def _reverse(weights: list[float]) -> list[float]:
    return [1 - weight for weight in weights]


def _smooth(x: float) -> float:
    return 3 * x**2 - 2 * x**3


def _folded(y: float) -> float:
    """A triangle wave from 0 to 1 and back, of period 2."""
    y %= 2
    return y if y <= 1 else 2 - y


def _hermite(x: float) -> float:
    return 25 / 6 * x - 19 / 2 * x**2 + 19 / 3 * x**3


def _true_hermite(x: float) -> float:
    return 1 / 24 + 25 / 6 * x - 77 / 8 * x**2 + 77 / 12 * x**3 if x else 0.0


def _rings(one: range, other: range, soft: tuple[int, ...] = ()) -> list[float]:
    return [0.5 if place in soft else float(place in one or place in other) for place in range(COUNT)]


def _wrap(ends: int) -> list[float]:
    return _rings(range(ends), range(COUNT - ends, COUNT))


def _all() -> dict[str, list[float]]:
    found = {
        "ALL_A": _everywhere(0.0),
        "ALL_B": _everywhere(1.0),
        "FLAT_25": _everywhere(0.25),
        "FLAT_75": _everywhere(0.75),
        "GRAD_V": _drawn(lambda x: abs(1 - 2 * x)),
        "GRAD_A": _drawn(lambda x: 1 - abs(1 - 2 * x)),
        "WRAP08": _wrap(4),
        "WRAP12": _wrap(6),
        "WRAP14": _wrap(7),
        "WRAP16": _wrap(8),
        "MID12_50": [0.5 if 5 <= place <= 18 else 0.0 for place in range(COUNT)],
        "OUT07": _rings(range(18, COUNT), range(0)),
        "OUT12": _rings(range(13, COUNT), range(0)),
        "OUT12_5": _rings(range(13, COUNT), range(0), (12,)),
        "RING08_SOFT": _rings(range(6, 9), range(16, 19), (5, 9, 15, 19)),
        "RING08_5": _rings(range(6, 10), range(15, 19)),
        "RING10_5": _rings(range(5, 10), range(15, 20)),
        "RING10_3": _rings(range(6, 11), range(14, 19)),
        "SMOOTHSTEP": _drawn(_smooth),
        "COSINE": _drawn(lambda x: (1 + math.cos(math.pi * x)) / 2),
        "TRUE_CUBIC_HERMITE": _drawn(_true_hermite),
        "FAKE_CUBIC_HERMITE": _drawn(_hermite),
    }
    found["REVERSE_SMOOTHSTEP"] = _reverse(found["SMOOTHSTEP"])
    found["REVERSE_COSINE"] = _reverse(found["COSINE"])
    for kind in ("TRUE", "FAKE"):
        found[f"{kind}_REVERSE_CUBIC_HERMITE"] = _reverse(found[f"{kind}_CUBIC_HERMITE"])
    for times, part in ((2, "HALF"), (3, "ONE_THIRD"), (4, "ONE_FOURTH")):
        found[f"{times}SMOOTHSTEP"] = _drawn(lambda x, times=times: _folded(times * _smooth(x)))  # type: ignore[misc]
        found[f"{times}R_SMOOTHSTEP"] = _reverse(found[f"{times}SMOOTHSTEP"])
        found[f"{part}_SMOOTHSTEP"] = _drawn(lambda x, times=times: _smooth(_folded(times * x)))  # type: ignore[misc]
        found[f"{part}_R_SMOOTHSTEP"] = _reverse(found[f"{part}_SMOOTHSTEP"])
    return found


PRESETS = {name: tuple(weights) for name, weights in sorted(_all().items())}
"""By name."""
