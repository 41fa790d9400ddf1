"""A LoRA laid over a model: what each of its groups changes there, and what fits nowhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..checkpoint import Tensor
from .formulas import Delta, ShapeError, delta, extent
from .naming import Module, Names, Spot
from .reading import Adapter, Group

if TYPE_CHECKING:
    from ..merging.torch_engine import TorchEngine

_CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
"""Whose UNet attends to text of that width."""

_VERSIONS = {"sdxl_": "sdxl", "sd_v1": "sd1", "sd_v2": "sd2"}
"""How ``ss_base_model_version`` begins."""

_PARAMETERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "full": (("diff", "weight"), ("diff_b", "bias")),
    "norm": (("w_norm", "weight"), ("b_norm", "bias")),
}
"""The parts of a group that are differences of a parameter as they are."""


@dataclass(frozen=True, slots=True)
class Patch:
    """What one LoRA does to one weight.

    Attributes:
        adapter: The LoRA.
        key: The first of its keys.
        spot: Where the weight is.
        kind: Of the formula.
        tensors: The LoRA's matrices by their part.
        scale: alpha / rank.
        columns: Of the weight as a matrix, those that change: a LoRA for four latent channels changes no others.
        factor: What the user wants it times.
        magnitude: DoRA's, if it is one.
        by_input: How many columns an input has, where DoRA's norms are those of inputs.
    """

    adapter: Adapter
    key: str
    spot: Spot
    kind: str
    tensors: Mapping[str, Tensor]
    scale: float
    columns: int
    factor: float = 1.0
    magnitude: Tensor | None = None
    by_input: int | None = None

    @property
    def needs_all(self) -> bool:
        """Whether it can't be computed from some of the rows alone."""
        return self.spot.turned or self.magnitude is not None

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, engine: TorchEngine) -> Delta:
        """Its matrices, in the type that is computed in."""
        return delta(self.kind, {part: engine.whole(tensor) for part, tensor in self.tensors.items()})

    def bound(self, engine: TorchEngine) -> float:
        """What it can add to an element at most; infinite where only computing tells, NaN if a matrix holds such."""
        most = self.read(engine).bound() * abs(self.scale)
        if not math.isfinite(most):
            return math.nan
        if self.magnitude is None:
            return most * abs(self.factor)
        return math.inf if math.isfinite(float(engine.whole(self.magnitude).abs().max())) else math.nan


@dataclass
class Fitted:
    """What a LoRA does to a model.

    Attributes:
        patches: Of each weight that it changes, one.
        faults: Keys that fit nothing, with the reason.
    """

    patches: list[Patch] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)


def fit(adapter: Adapter, names: Names) -> Fitted:
    """Find what each group of a LoRA changes in a model.

    Raises:
        UnsupportedError: If its config can't be understood.
    """
    found = Fitted(faults=list(adapter.strange.items()))
    candidates = {name: names.of(name) for name in adapter.groups}
    encoder = _encoder(adapter, candidates)
    taken: dict[tuple[str, int], str] = {}
    for name, group in adapter.groups.items():
        first = next(iter(group.keys.values()))
        modules = candidates[name]
        if len(modules) > 1:
            modules = [module for module in modules if module.component == encoder]
        reason = group.fault or (None if modules else _nameless(candidates[name]))
        if reason:
            found.faults.append((first, reason))
            continue
        for key, patch in _patches(adapter, group, modules[0]):
            if isinstance(patch, str):
                found.faults.append((key, patch))
            elif (where := (patch.spot.key, patch.spot.first)) in taken:
                found.faults.append((key, f"{taken[where]} changes the same weight"))
            else:
                taken[where] = key
                found.patches.append(patch)
    return found


def _nameless(modules: list[Module]) -> str:
    if modules:
        return f"it doesn't say whose it is: {' or '.join(module.component for module in modules)}"
    return "nothing in the model is called that"


def _encoder(adapter: Adapter, candidates: Mapping[str, list[Module]]) -> str | None:
    """Of two text encoders with modules of the same names, the one that a file without prefixes is for."""
    doubtful = [name for name, modules in candidates.items() if len(modules) > 1]
    encoders = {module.component for name in doubtful for module in candidates[name]}
    if adapter.folder in encoders:
        return adapter.folder

    def suits(encoder: str) -> bool:
        for name, modules in candidates.items():
            module = next((module for module in modules if module.component == encoder), None)
            if modules and (
                module is None or any(isinstance(p, str) for _, p in _patches(adapter, adapter.groups[name], module))
            ):
                return False
        return True

    fitting = [encoder for encoder in sorted(encoders) if suits(encoder)]
    return fitting[0] if len(fitting) == 1 else None


def _patches(adapter: Adapter, group: Group, module: Module) -> Iterator[tuple[str, Patch | str]]:
    """What a group does to a module, or why it can't, each with the key that it begins with."""
    first = next(iter(group.keys.values()))
    if group.kind is None or group.fault:
        yield first, group.fault or "it is of no known kind"
        return
    if group.kind in _PARAMETERS:
        for part, parameter in _PARAMETERS[group.kind]:
            if part in group.tensors:
                yield group.keys[part], _patch(adapter, group, module, parameter, {"diff": group.tensors[part]})
        return
    matrices = {part: tensor for part, tensor in group.tensors.items() if part not in {"dora_scale", "magnitude"}}
    yield first, _patch(adapter, group, module, "weight", matrices)


def _patch(
    adapter: Adapter, group: Group, module: Module, parameter: str, matrices: Mapping[str, Tensor]
) -> Patch | str:
    """What matrices do to a parameter, or why they can't."""
    spot = module.spots.get(parameter)
    if spot is None:
        return f"the model's {module.component} lacks the {parameter} of {module.name}"
    odd = next((tensor.dtype for tensor in group.tensors.values() if not tensor.dtype.computable), None)
    if odd is not None:
        return f"elements of type {odd} can't be computed with"
    kind = "diff" if group.kind in _PARAMETERS else str(group.kind)
    try:
        rows, columns = extent(kind, {part: tensor.shape for part, tensor in matrices.items()})
    except ShapeError:
        return "its matrices don't fit each other: " + ", ".join(f"{part} {t}" for part, t in matrices.items())
    wide = math.prod(spot.shape[1:])
    if rows != spot.shape[0] or not (columns == wide or _for_fewer_channels(module, spot, columns)):
        return f"it is for a weight of {rows} x {columns}, and the model's is {list(spot.shape)}"
    scale = adapter.scale(group, module.component, module.name)
    patch = Patch(adapter, next(iter(group.keys.values())), spot, kind, matrices, scale, columns)
    return _with_magnitude(patch, group, rows) if group.tensors.keys() & {"dora_scale", "magnitude"} else patch


def _for_fewer_channels(module: Module, spot: Spot, columns: int) -> bool:
    """Whether it is for a UNet without the further channels of an inpainting model's: those stay, as in A1111."""
    kernel = math.prod(spot.shape[2:])
    return module.name == "conv_in" and columns == 4 * kernel < math.prod(spot.shape[1:])


def _with_magnitude(patch: Patch, group: Group, rows: int) -> Patch | str:
    """A patch with DoRA's magnitude: PEFT's is one number an output, LyCORIS' shape tells."""
    told = group.tensors.get("magnitude", group.tensors.get("dora_scale"))
    assert told is not None  # noqa: S101 - for the type checker: one of them is there
    inputs = patch.spot.shape[1] if len(patch.spot.shape) > 1 else 0
    by_output = told.numel == rows and ("magnitude" in group.tensors or told.shape[0] == rows)
    by_input = told.numel == inputs and told.shape[0] == 1
    if patch.columns != math.prod(patch.spot.shape[1:]) or not (by_output or by_input):
        return f"its magnitude {told} doesn't fit the model's {list(patch.spot.shape)}"
    by = None if by_output else math.prod(patch.spot.shape[2:])
    return Patch(
        patch.adapter, patch.key, patch.spot, patch.kind, patch.tensors, patch.scale, patch.columns,
        magnitude=told, by_input=by,
    )  # fmt: skip


def made_for(adapter: Adapter) -> str | None:
    """The family that a LoRA says it is for, or that its shapes tell."""
    version = adapter.checkpoint.metadata.get("ss_base_model_version", "")
    told = next((family for start, family in _VERSIONS.items() if version.startswith(start)), None)
    if told:
        return told
    widths = {
        group.tensors["down"].shape[1]
        for name, group in adapter.groups.items()
        if "attn2" in name and name.endswith("to_k") and (down := group.tensors.get("down")) and len(down.shape) > 1
    }
    known = next((_CONTEXTS[width] for width in sorted(widths) if width in _CONTEXTS), None)
    second = any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in adapter.groups)
    return known or ("sdxl" if second else None)
