"""Guesses that can be checked: whether a component of B is a weighted sum of A's and C's.

The weight is estimated by least squares over the whole component, then each plausible value near it is tried with the
ways in which merging tools compute, and what comes out is compared with B bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..arrays import arrays_of
from ..checkpoint import Checkpoint
from ..models.canonical import Canonical, canonical
from ..models.identify import identify

_DECIMALS = (1, 2, 3, 4)
"""Merging tools are told short numbers; the estimate is rounded to as many places as it takes."""

_SAMPLE = 1 << 16
"""Elements of each tensor that tell the formulas apart, before the best one is checked on all."""

_MOST_RESIDUAL = 0.02
"""Of the change from A to B, what a weighted sum may leave unexplained; rounding leaves less."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A component of B as a weighted sum.

    Attributes:
        component: Which one.
        alpha: The weight of C; that of A is ``1 - alpha``.
        formula: How it was computed, in words.
        matching: The share of elements that come out equal to the bit.
        tensors: How many it was checked on.
    """

    component: str
    alpha: float
    formula: str
    matching: float
    tensors: int

    @property
    def exact(self) -> bool:
        """Whether every element comes out."""
        return self.matching == 1.0


Triple = tuple[Canonical, Canonical, Canonical]
Formula = Callable[[Any, Any, float, Any], Any]


def _in_float32(a: Any, c: Any, alpha: float, kind: Any) -> Any:
    import numpy as np

    wide = np.float32
    return (wide(1 - alpha) * a.astype(wide) + wide(alpha) * c.astype(wide)).astype(kind)


def _as_lerp(a: Any, c: Any, alpha: float, kind: Any) -> Any:
    """As ``torch.lerp`` on floats: from the nearer end, product and sum rounded once (a fused multiply-add)."""
    import numpy as np

    low, high = a.astype(np.float32), c.astype(np.float32)
    gap = (high - low).astype(np.float64)
    if alpha < 0.5:
        mixed = low + np.float64(np.float32(alpha)) * gap
    else:
        mixed = high - np.float64(np.float32(1) - np.float32(alpha)) * gap
    return mixed.astype(np.float32).astype(kind)


def _in_own_type(a: Any, c: Any, alpha: float, kind: Any) -> Any:
    own = a.dtype.type
    return (a * own(1 - alpha) + c * own(alpha)).astype(kind)


FORMULAS: Final[dict[str, Formula]] = {
    "computed in fp32": _in_float32,
    "by lerp in fp32": _as_lerp,
    "computed in the weights' own type": _in_own_type,
}


def explain(one: Checkpoint, other: Checkpoint, third: Checkpoint, components: Sequence[str]) -> list[Explanation]:
    """Which of these components of ``other`` are weighted sums of ``one`` and ``third``; others are left out."""
    sides = [canonical(checkpoint, identify(checkpoint)) for checkpoint in (one, other, third)]
    found = []
    for component in components:
        triples = [
            (sides[0][identity], sides[1][identity], sides[2][identity])
            for identity in sides[1]
            if identity[0] == component and all(identity in side for side in sides)
        ]
        sound = [triple for triple in triples if _is_float(triple)]
        explanation = _explain(component, sound) if sound else None
        if explanation:
            found.append(explanation)
    return found


def _is_float(triple: Triple) -> bool:
    first = triple[0].tensor
    return all(
        item.tensor.shape == first.shape and item.tensor.dtype.kind == "float" and item.tensor.dtype.numpy is not None
        for item in triple
    )


def _explain(component: str, triples: Sequence[Triple]) -> Explanation | None:
    estimate = _estimate(triples)
    if estimate is None:
        return None
    candidates = dict.fromkeys([*(round(estimate, places) for places in _DECIMALS), estimate])
    best = max(
        ((alpha, name) for alpha in candidates for name in FORMULAS),
        key=lambda pair: _matching(triples, pair[0], FORMULAS[pair[1]], _SAMPLE),
    )
    alpha, name = best
    return Explanation(component, alpha, name, _matching(triples, alpha, FORMULAS[name], None), len(triples))


def _estimate(triples: Sequence[Triple]) -> float | None:
    """The weight that explains B best, if it explains it at all."""
    import numpy as np

    along = across = change = 0.0
    for a, b, c in _pieces(triples, None):
        base = a.astype(np.float32)
        step, gone = c.astype(np.float32) - base, b.astype(np.float32) - base
        along += float(np.dot(step, gone))
        across += float(np.dot(step, step))
        change += float(np.dot(gone, gone))
    if not across or not change or not np.isfinite([along, across, change]).all():
        return None
    residual = max(0.0, 1 - along * along / (across * change))
    return along / across if residual**0.5 <= _MOST_RESIDUAL else None


def _matching(triples: Sequence[Triple], alpha: float, formula: Formula, sample: int | None) -> float:
    import numpy as np

    right = total = 0
    for a, b, c in _pieces(triples, sample):
        with np.errstate(over="ignore", invalid="ignore"):
            made = formula(a, c, alpha, b.dtype)
        right += int(np.count_nonzero(made == b))
        total += b.size
    return right / total if total else 0.0


def _pieces(triples: Sequence[Triple], sample: int | None) -> Iterator[tuple[Any, Any, Any]]:
    for triple in triples:
        for number, piece in enumerate(arrays_of([item.tensor for item in triple])):
            yield piece[0][:sample], piece[1][:sample], piece[2][:sample]
            if sample and number == 0:
                break
