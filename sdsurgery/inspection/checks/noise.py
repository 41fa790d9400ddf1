"""Whether the buffers of a noise schedule are what ``ldm.models.diffusion.ddpm.DDPM.register_schedule`` makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

_CLOSE = 1e-3
"""How far a buffer may be from what it should be, of its largest element; fp32 is off by a thousandth of that."""

_NEARLY_ONE, _NEARLY_ZERO = 0.9, 0.1
"""The published schedule goes from 0.9991 to 0.0047; one with zero terminal SNR to 0."""

_OF_ALPHAS: Mapping[str, Callable[[float], float]] = {
    "sqrt_alphas_cumprod": math.sqrt,
    "sqrt_one_minus_alphas_cumprod": lambda alpha: math.sqrt(1 - alpha),
    "log_one_minus_alphas_cumprod": lambda alpha: math.log(1 - alpha),
    "sqrt_recip_alphas_cumprod": lambda alpha: math.sqrt(1 / alpha),
    "sqrt_recipm1_alphas_cumprod": lambda alpha: math.sqrt(1 / alpha - 1),
}


def faults(series: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """What is wrong, by the buffer's name; ``alphas_cumprod`` is what the others are held against."""
    alphas = series.get("alphas_cumprod")
    if alphas is None:
        return {}
    falls = all(math.isfinite(alpha) for alpha in alphas) and all(now <= before for before, now in pairwise(alphas))
    if not (alphas and falls and 1 >= alphas[0] >= _NEARLY_ONE and _NEARLY_ZERO >= alphas[-1] >= 0):
        return {"alphas_cumprod": "doesn't fall from nearly one to nearly zero"}
    right = {name: [_or_nan(rule, alpha) for alpha in alphas] for name, rule in _OF_ALPHAS.items()}
    right["alphas_cumprod_prev"] = [1.0, *alphas[:-1]]
    found = {
        name: "isn't what follows from alphas_cumprod"
        for name, values in right.items()
        if name in series and not _agree(series[name], values)
    }
    products = list(accumulate((1 - beta for beta in series.get("betas", ())), lambda one, other: one * other))
    if products and not _agree(alphas, products):
        found["betas"] = "isn't what alphas_cumprod follows from"
    return found


def _or_nan(rule: Callable[[float], float], alpha: float) -> float:
    """NaN where there is no number: at the end of a schedule without a signal."""
    try:
        return rule(alpha)
    except (ValueError, ZeroDivisionError):
        return math.nan


def _agree(seen: Sequence[float], right: Sequence[float]) -> bool:
    if len(seen) != len(right):
        return False
    largest = max((abs(value) for value in right if math.isfinite(value)), default=0.0)
    pairs = [(one, other) for one, other in zip(seen, right, strict=True) if math.isfinite(other)]
    return all(abs(one - other) <= _CLOSE * largest for one, other in pairs)
