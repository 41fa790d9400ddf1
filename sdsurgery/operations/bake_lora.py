"""bake-lora: LoRAs computed into a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import progress
from ..adapters.fitting import Fitted, Patch, fit, made_for
from ..adapters.naming import Names, every_place, names_in
from ..adapters.reading import Adapter, read
from ..checkpoint import Change, Checkpoint, Note, Step, Tensor
from ..dtypes import CAST_TARGETS, DType
from ..errors import MismatchError, RefusedError, UnsupportedError, UsageError
from ..merging.matching import called
from ..merging.presets import COUNT
from ..merging.ratios import Ratios, ratios
from ..models.identify import Model, identify
from ..values import largest
from ..wording import listed
from .base import Operation, Param, Source, input_record, opened
from .cast import LARGEST, DTypeName
from .computing import ComputeName, DeviceName, engine, without_averages

if TYPE_CHECKING:
    from ..merging.torch_engine import TorchEngine

_SHORT_LISTS = {
    17: (1, 2, 4, 5, 7, 8, 12, *range(16, COUNT)),
    12: (4, 5, 7, 8, 12, *range(13, 19)),
}
"""Of the lists of numbers that skip the blocks without attention, which of 25 blocks each number behind the first is
for; as in sd-webui-lora-block-weight, SD1's and SDXL's. The others take nothing, as there."""


@dataclass(frozen=True)
class BakeLora(Operation):
    """Compute LoRAs into a model's UNet and text encoders.

    LoRA, LoCon, LoHa, LoKr, DoRA and LyCORIS' full differences and norms, in kohya's, diffusers' and PEFT's naming.
    Each weight is computed in fp32 and rounded once to the type that it has; what no LoRA changes is copied. A key that
    fits nothing in the model is refused. The model's averaged (EMA) weights go if its UNet changes, for they are none
    of the result's.
    """

    name: ClassVar[str] = "bake-lora"
    label = "baked"

    loras: Annotated[tuple[Source, ...], Param("The LoRAs.", positional=True, metavar="LORA...")]
    scale: Annotated[
        tuple[float, ...],
        Param("How strong: once for all LoRAs, or once for each; 1 unless given.", metavar="NUMBER"),
    ] = ()
    at: Annotated[
        tuple[str, ...],
        Param(
            "A further factor for a component, a block of the UNet, or a pattern of the model's keys: "
            "text_encoder=0.5, IN04=0, '*.attn2.*=0.7'. May be given several times; the last that fits counts.",
            metavar="WHERE=NUMBER",
        ),
    ] = ()
    blocks: Annotated[
        str | None,
        Param(
            "Further factors for the UNet's blocks, IN00 to IN11, M00, OUT00 to OUT11: 25 numbers with commas, 26 with "
            "that of all else in front, the lists of 17 and 12 that LoRA block weight has, or the name of a preset.",
            metavar="NUMBERS",
        ),
    ] = None
    dtype: Annotated[DTypeName | None, Param("The type of what is changed; the model's own unless given.")] = None
    compute_dtype: Annotated[ComputeName, Param("What is computed in.")] = "fp32"
    device: Annotated[DeviceName, Param("What computes.")] = "cpu"
    force: Annotated[
        bool, Param("Leave out what fits nothing in the model, and take even a LoRA that holds NaN or Inf.")
    ] = False

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`BakeLora`."""
        self.check()
        model, adapters = identify(checkpoint), [read(opened(source)) for source in self.loras]
        run = _Run(self, checkpoint, model, names_in(checkpoint, model))
        results = run.results(
            [run.patches(adapter, scale) for adapter, scale in zip(adapters, self._scales, strict=True)]
        )
        tensors: dict[str, Tensor] = dict(checkpoint)
        changes: list[Change] = []
        if any(key in results for key in _keys(model, "unet")):
            tensors, changes = without_averages(checkpoint, model, "averaged weights of the model without the LoRA")
        for key, tensor in results.items():
            tensors[key] = tensor
            changes.append(Change(key, "replaced", str(checkpoint[key]), str(tensor)))
        if not results:
            run.notes.append(Note("with these numbers the result is the model as it is"))
        inputs = tuple(record for adapter in adapters for record in input_record(adapter.checkpoint))
        told = {name: value for name, value in self.parameters().items() if name != "force"}
        told["scale"] = list(self._scales)
        return checkpoint.evolve(tensors, Step(self.name, told, tuple(changes), tuple(run.notes), inputs))

    @property
    def _scales(self) -> tuple[float, ...]:
        """One for each LoRA."""
        given = self.scale or (1.0,)
        return given * len(self.loras) if len(given) == 1 else given

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        if not self.loras:
            raise UsageError("no LoRA is named", remedy="name one behind the model: bake-lora MODEL LORA")
        if len(self._scales) != len(self.loras):
            message = f"{len(self.scale)} scales are given for {len(self.loras)} LoRAs"
            raise UsageError(message, remedy="give --scale once for all of them, or once for each")
        if not all(map(math.isfinite, self.scale)):
            raise UsageError("a scale is NaN or infinite", remedy="give a number")

    @property
    def factors(self) -> str | None:
        """``blocks`` with a number for each block."""
        numbers = self.blocks.split(",") if self.blocks else []
        if len(numbers) not in _SHORT_LISTS:
            return self.blocks
        spread = ["0"] * COUNT
        for block, number in zip(_SHORT_LISTS[len(numbers)], numbers[1:], strict=True):
            spread[block] = number
        return ",".join((numbers[0], *spread))


def _keys(model: Model, component: str) -> Iterable[str]:
    found = model.components.get(component)
    return found.all_keys() if found else ()


class _Run:
    """One run of the operation.

    Attributes:
        notes: What a person should know.
    """

    def __init__(self, operation: BakeLora, checkpoint: Checkpoint, model: Model, names: Names) -> None:
        self.operation, self.checkpoint, self.model, self.names = operation, checkpoint, model, names
        self.notes: list[Note] = []
        self.ratios: Ratios = ratios(1.0, operation.factors, operation.at, every_place(names))
        self.engine: TorchEngine = engine(operation.name, operation.compute_dtype, operation.device)

    def patches(self, adapter: Adapter, scale: float) -> list[Patch]:
        """What a LoRA changes, with the factors that the user wants.

        Raises:
            MismatchError: If some of it fits nothing in the model, and nobody insists; or if nothing fits.
        """
        found = fit(adapter, self.names)
        if found.faults:
            self._tell_of_faults(adapter, found)
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(patch.kind for patch in found.patches).items())
        self.notes.append(Note(f"{called(adapter.checkpoint)} changes {len(found.patches)} weights ({kinds})"))
        self.notes.extend(_without_alpha(adapter))
        return [replace(patch, factor=scale * self.ratios.of(patch.spot.place)) for patch in found.patches]

    def _tell_of_faults(self, adapter: Adapter, found: Fitted) -> None:
        key = found.faults[0][0]
        family, whose = made_for(adapter), self.model.base_family
        made = f"; it is made for {family}, and the model is {whose}" if family not in {None, whose} else ""
        shown = listed((f"{key} ({reason})" for key, reason in found.faults), 3)
        message = f"{len(found.faults)} of its keys can't be used{made}: {shown}"
        if self.operation.force and found.patches:
            self.notes.append(Note(f"{called(adapter.checkpoint)}: {message}", "warning", key))
            return
        remedy = "name a LoRA for this model, or leave those out with --force"
        if not found.patches:
            message, remedy = f"nothing of it fits the model{made}: {shown}", "name a LoRA for this model"
        raise MismatchError(message, file=adapter.checkpoint.path, key=key, remedy=remedy)

    def results(self, patches: Sequence[Sequence[Patch]]) -> dict[str, Tensor]:
        """By key, the tensors that change.

        Raises:
            RefusedError: If finite values would become infinite, or a LoRA holds NaN or Inf and nobody insists.
            UnsupportedError: If a tensor's elements can't be computed with.
        """
        from ..adapters.baking import baked

        by_key: dict[str, list[Patch]] = {}
        for patch in (patch for each in patches for patch in each if patch.factor):
            by_key.setdefault(patch.spot.key, []).append(patch)
        plans = []
        for key, tensor in self.checkpoint.items():
            if key in by_key:
                target = self._target(key, tensor)
                plans.append(_Plan(key, tensor, by_key[key], baked(tensor, by_key[key], target, self.engine)))
        self._check(plans)
        return {plan.key: plan.result for plan in plans}

    def _target(self, key: str, tensor: Tensor) -> DType:
        if tensor.dtype.kind != "float" or not tensor.dtype.computable:
            raise UnsupportedError(
                f"elements of type {tensor.dtype} can't be computed with", file=self.checkpoint.path, key=key,
                remedy="cast the model first: sdsurgery cast",
            )  # fmt: skip
        return CAST_TARGETS[self.operation.dtype] if self.operation.dtype else tensor.dtype

    def _check(self, plans: Sequence[_Plan]) -> None:
        """Read what goes into the result: NaN and Inf are told of, overflow is refused, before anything is written."""
        from ..merging.torch_engine import one_thread

        overflowing = []
        with (
            one_thread(),
            progress.task(f"checking {len(plans)} tensors", sum(plan.nbytes for plan in plans)) as done,
            ThreadPoolExecutor(2) as pool,
        ):
            for plan, most in zip(plans, pool.map(lambda plan: largest(plan.tensor), plans), strict=True):
                added = self._added(plan)
                if not math.isfinite(most):
                    what = "NaN" if math.isnan(most) else "Inf"
                    self.notes.append(Note(f"{plan.key} holds {what} in the model", "warning", plan.key))
                elif not math.isnan(added) and most + added > LARGEST.get(plan.result.dtype.name, 0.0):
                    overflowing += [] if math.isfinite(largest(plan.result)) else [plan.key]
                done(plan.nbytes)
        if overflowing:
            message = f"{len(overflowing)} tensors get values that their type can't hold, the first {overflowing[0]}"
            remedy = "bake with --dtype fp32 or bf16, or with a smaller --scale"
            raise RefusedError(message, file=self.checkpoint.path, key=overflowing[0], remedy=remedy)

    def _added(self, plan: _Plan) -> float:
        """What the LoRAs can add to an element at most; NaN if one of them holds NaN or Inf."""
        total = 0.0
        for patch in plan.patches:
            bound = patch.bound(self.engine)
            if math.isnan(bound):
                message = f"{patch.key} and what belongs to it hold NaN or Inf, or their product does"
                if not self.operation.force:
                    remedy = "name a sound LoRA, or insist with --force: whole rows of the weight become NaN"
                    raise RefusedError(message, file=patch.adapter.checkpoint.path, key=patch.key, remedy=remedy)
                self.notes.append(Note(message, "warning", patch.key))
            total += bound
        return total


@dataclass(frozen=True, slots=True)
class _Plan:
    """A tensor of the result that isn't the model's.

    Attributes:
        key: Its key.
        tensor: The model's.
        patches: What is done to it.
        result: It.
    """

    key: str
    tensor: Tensor
    patches: Sequence[Patch]
    result: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.tensor.nbytes + sum(patch.nbytes for patch in self.patches)


def _without_alpha(adapter: Adapter) -> Iterator[Note]:
    """PEFT's files don't hold their alpha; without the config beside them it isn't known."""
    lacking = sum(group.alpha is None and group.rank is not None for group in adapter.groups.values())
    if lacking and not adapter.config and adapter.naming == "peft":
        message = "says no alpha, and no adapter_config.json lies beside it: it is taken with alpha = rank"
        yield Note(f"{called(adapter.checkpoint)} {message}", "warning")
