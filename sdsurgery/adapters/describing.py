"""A LoRA file in a few words, without the model that it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..wording import listed
from .fitting import made_for
from .naming import KOHYA_PREFIXES, PEFT_PREFIX
from .reading import looks_like, read


def described(checkpoint: Checkpoint) -> list[str]:
    """What kind of LoRA it is, for what, and of which ranks and alphas; nothing if it is none."""
    if not looks_like(checkpoint):
        return []
    try:
        adapter = read(checkpoint)
    except InputError as error:
        return [f"a LoRA that can't be used: {error.message}"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in adapter.kinds.most_common())
    parts = Counter(_component(name) for name in adapter.groups)
    where = ", ".join(f"{count} of the {name}" for name, count in parts.most_common())
    groups = adapter.groups.values()
    told = [
        f"a LoRA in {adapter.naming} naming: {kinds}; layers: {where}",
        f"rank {_numbers(group.rank for group in groups)}, alpha {_numbers(group.alpha for group in groups)}",
    ]
    family = made_for(adapter)
    return told + ([f"made for {family}"] if family else [])


def _component(name: str) -> str:
    """Whose a module is by the beginning of its name."""
    for component, prefixes in KOHYA_PREFIXES.items():
        if name.startswith((*prefixes, f"{component}.")):
            return component
    inner = name.removeprefix(PEFT_PREFIX)
    if inner.startswith(("down_blocks.", "mid_block.", "up_blocks.", "diffusion_model.")):
        return "unet"
    return "text encoder" if ".layers." in inner else "rest"


def _numbers(values: Iterable[float | None]) -> str:
    """The values that there are, the commonest first."""
    counted = Counter(f"{value:g}" for value in values if value is not None)
    return listed((value for value, _ in counted.most_common()), 4) or "not stated"
