"""Merges as A1111's webui records them in a file's metadata: ``sd_merge_recipe`` and ``sd_merge_models``.

Both are JSON texts. Their fields are those of ``run_modelmerger`` in ``modules/extras.py``; the first has our own name
as its type, as other tools have theirs. ``sd_merge_models`` holds all ancestors that are known, flat, by their SHA-256:
the recipes in it lead from one to the next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..checkpoint import Checkpoint
from ..digests import legacy_hash
from ..wording import bare

RECIPE, MODELS = "sd_merge_recipe", "sd_merge_models"

TYPE = "sdsurgery"
_THEIRS = "webui"

_INTERPOLATIONS = {"weighted-sum": "Weighted sum", "add-difference": "Add difference"}
_NO_INTERPOLATION = "No interpolation"
_NO_VAE = "None"
_NOWHERE = 3
"""``config_source`` of a merge that takes no config from any of the models."""

_LONGEST = 1 << 20
"""Characters of the longest map of ancestors that is handed on."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge.

    Attributes:
        models: A, B and on.
        method: Our name of it.
        multiplier: Alpha.
        family: Of A, with its variant.
        vae: The name of the VAE's file, if another is named.
        half: Whether the result is in fp16 by choice.
        options: What else counts; ``options`` in the recipe, which other tools pass over.
    """

    models: Sequence[Checkpoint]
    method: str
    multiplier: float
    family: str
    vae: str | None = None
    half: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def record(merge: Merged) -> dict[str, str]:
    """The metadata that tell of a merge."""
    hashes = [_sha256(model) for model in merge.models]
    given = dict(zip(("primary", "secondary", "tertiary"), hashes, strict=False))
    recipe: dict[str, Any] = {
        "type": TYPE,
        **{f"{place}_model_hash": given.get(place) for place in ("primary", "secondary", "tertiary")},
        "interp_method": _INTERPOLATIONS.get(merge.method, merge.method),
        "multiplier": merge.multiplier,
        "save_as_half": merge.half,
        "custom_name": "",
        "config_source": _NOWHERE,
        "bake_in_vae": merge.vae or _NO_VAE,
        "discard_weights": "",
        "is_inpainting": merge.family.endswith("-inpainting"),
        "is_instruct_pix2pix": merge.family.endswith("-pix2pix"),
    }
    if merge.options:
        recipe["options"] = dict(sorted(merge.options.items()))
    known: dict[str, Any] = {}
    for model, sha256 in zip(merge.models, hashes, strict=True):
        file = model.origin.file if model.origin else None
        if sha256 and file and model.origin:
            own = _parsed(model.metadata, RECIPE)
            known[sha256] = {"name": model.origin.name, "legacy_hash": legacy_hash(file), RECIPE: own or None}
        known |= _parsed(model.metadata, MODELS)
    return {RECIPE: _text(recipe), MODELS: _text(known)}


def title(models: Sequence[str], method: str, multiplier: float) -> str:
    """What a merge is called, as the webui does it where it can."""
    amount = f"{round(multiplier, 2):g}"
    if method == "weighted-sum":
        return f"{round(1 - multiplier, 2):g}({models[0]}) + {amount}({models[1]})"
    if method == "add-difference":
        return f"{models[0]} + {amount}({models[1]} - {models[2]})"
    return f"{method} of {', '.join(models)}"


def _sha256(model: Checkpoint) -> str | None:
    """Of the model's file, if it is known, and the model is that file still."""
    return model.origin.sha256 if model.origin and not model.changes else None


def _parsed(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """What a file says there, if it is what others write: a JSON object."""
    try:
        found = json.loads(metadata.get(key, "{}")[:_LONGEST])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class Teller(Protocol):
    """Who writes a recipe; see ``recipes/retelling.py``."""

    def input(self, name: str, sha256: str | None = None) -> str:
        """What an input is called in the recipe."""

    def add(self, operation: str, parameters: Mapping[str, Any], source: str) -> str:
        """One step; the name of its result."""

    def named(self, result: str) -> str:
        """A result under a name that other steps can use."""


def retell(metadata: Mapping[str, str], teller: Teller, *, deep: bool) -> bool:
    """Tell the steps of a merge that the webui recorded; whether there is one that could be told.

    Args:
        metadata: Of the merge.
        teller: Who is told.
        deep: Whether models that were merged themselves are merged anew.
    """
    recipe = _parsed(metadata, RECIPE)
    if recipe.get("type") != _THEIRS:
        return False
    return _Retelling(_parsed(metadata, MODELS), teller, deep=deep).told(recipe, 0) is not None


_NEEDED = {"Weighted sum": 2, "Add difference": 3, _NO_INTERPOLATION: 1}
_DEEPEST = 100


class _Retelling:
    """Tells merges, each model that was merged itself once."""

    def __init__(self, models: Mapping[str, Any], teller: Teller, *, deep: bool) -> None:
        self._models, self._teller, self._deep = models, teller, deep
        self._known: dict[str, str | None] = {}

    def told(self, recipe: Mapping[str, Any], depth: int) -> str | None:
        """The name of the result of a recipe; ``None`` if it is one that can't be told."""
        method = recipe.get("interp_method")
        needed = _NEEDED.get(method, 0) if isinstance(method, str) else 0
        places = ("primary", "secondary", "tertiary")[:needed]
        hashes = [recipe.get(f"{place}_model_hash") for place in places]
        amount = _finite(recipe.get("multiplier"))
        known = all(isinstance(each, str) and isinstance(self._models.get(each), dict) for each in hashes)
        if not needed or not known or recipe.get("discard_weights") or (needed > 1 and amount is None):
            return None
        first, *others = [self._model(str(each), depth) for each in hashes]
        result = first
        if others:
            ours = next(name for name, theirs in _INTERPOLATIONS.items() if theirs == method)
            models = [self._teller.named(name) for name in others]
            result = self._teller.add("merge", {"models": models, "method": ours, "alpha": amount}, first)
        vae = recipe.get("bake_in_vae")
        if isinstance(vae, str) and vae and vae != _NO_VAE:
            result = self._teller.add("merge-vae", {"vae": self._teller.input(bare(vae))}, result)
        if recipe.get("save_as_half") is True:
            result = self._teller.add("cast", {"dtype": "fp16"}, result)
        return result

    def _model(self, sha256: str, depth: int) -> str:
        """What a model is called in the recipe: the result of its own, or an input."""
        entry = self._models[sha256]
        own = entry.get(RECIPE)
        if sha256 not in self._known:
            self._known[sha256] = None  # a model that is its own ancestor is a file
            if self._deep and depth < _DEEPEST and isinstance(own, dict) and own.get("type") == _THEIRS:
                made = self.told(own, depth + 1)
                self._known[sha256] = self._teller.named(made) if made else None
        return self._known[sha256] or self._teller.input(bare(str(entry.get("name", ""))), sha256)


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
