"""extract-lora: what one model learned since another, as a LoRA."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from .. import progress
from ..adapters.naming import ADAPTED, Module, kohya_name, names_in
from ..checkpoint import Change, Checkpoint, Note, Step, Tensor
from ..dtypes import BY_NAME, CAST_TARGETS
from ..errors import MismatchError, RefusedError, UnsupportedError, UsageError
from ..merging.matching import called
from ..models import modelspec
from ..models.canonical import canonical
from ..models.identify import Model, identify
from ..sources import Computed, InMemory
from ..wording import listed
from .base import Operation, Param, Source, input_record, opened
from .cast import DTypeName
from .computing import ComputeName, DeviceName, engine
from .grafts import same_bytes, without_aside

if TYPE_CHECKING:
    from ..adapters.extracting import Extracted, Wanted

AdaptedName = Literal["text_encoder", "text_encoder_2", "unet"]
Naming = Literal["kohya", "diffusers"]

_RANK = 32
_SHOWN = 3

_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""What kohya's trainer calls the families."""


@dataclass(frozen=True)
class ExtractLora(Operation):
    """Make a LoRA of the difference between a model and the one that it was made from.

    Of each layer the largest singular values of the difference, as many as --rank or --energy say: the nearest that a
    LoRA of that rank comes. The layers are those that kohya's trainer adapts: of the UNet's transformers and of the
    text encoders, and with --conv-rank the UNet's residual blocks and resamplers.
    """

    name: ClassVar[str] = "extract-lora"
    whole: ClassVar[bool] = False
    label = "lora"

    base: Annotated[Source, Param("The model that it was made from.", positional=True, metavar="BASE")]
    rank: Annotated[
        int | None,
        Param(f"The rank; with --energy, the largest. {_RANK} unless one of them is given.", metavar="NUMBER"),
    ] = None
    energy: Annotated[
        float | None,
        Param("As high a rank as keeps this share of a layer's squared singular values, 0.99 say.", metavar="SHARE"),
    ] = None
    conv_rank: Annotated[
        int | None,
        Param("The (largest) rank of 3 x 3 convolutions, which are left out unless it is given.", metavar="NUMBER"),
    ] = None
    component: Annotated[
        tuple[AdaptedName, ...], Param("Only this component; may be given several times. All unless given.")
    ] = ()
    naming: Annotated[Naming, Param("Whose names the LoRA gets. kohya's are read by all.")] = "kohya"
    dtype: Annotated[DTypeName, Param("The type of the LoRA.")] = "fp16"
    compute_dtype: Annotated[ComputeName, Param("What the difference is read in; it is decomposed in fp64.")] = "fp32"
    device: Annotated[DeviceName, Param("What computes.")] = "cpu"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`ExtractLora`."""
        self.check()
        run = _Run(self, checkpoint, opened(self.base))
        tensors = run.lora()
        changes = tuple(Change(key, "added", None, str(tensor)) for key, tensor in tensors.items())
        family = run.model.base_family
        facts = {"family": family} if family != "unknown" else {}
        told = {**self.parameters(), "naming": self.naming, "dtype": self.dtype}
        step = Step(self.name, told, changes, tuple(run.notes), input_record(run.base), facts)
        metadata = run.metadata()
        return without_aside(checkpoint).evolve(tensors, step, metadata=metadata, folder=None)

    @property
    def most(self) -> int | None:
        """The largest rank; ``None`` for any."""
        return _RANK if self.rank is None and self.energy is None else self.rank

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        for name, value in (("--rank", self.rank), ("--conv-rank", self.conv_rank)):
            if value is not None and value < 1:
                raise UsageError(f"{value} is no rank", remedy=f"give {name} a number from 1 on")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"{self.energy:g} is no share", remedy="give --energy one above 0, up to 1")


class _Run:
    """One run of the operation.

    Attributes:
        base: The model that the other was made from.
        model: What the other is.
        notes: What a person should know.
    """

    def __init__(self, operation: ExtractLora, checkpoint: Checkpoint, base: Checkpoint) -> None:
        self.operation, self.checkpoint, self.base = operation, checkpoint, base
        self.model, other = identify(checkpoint), identify(base)
        self.notes: list[Note] = []
        if len({self.model.base_family, other.base_family} - {"unknown"}) > 1:
            message = f"it is {other.family}, and the first model is {self.model.family}"
            raise MismatchError(message, file=base.path, remedy="name the model that it was made from")
        self.engine = engine(operation.name, operation.compute_dtype, operation.device)
        self._tuned, self._base = canonical(checkpoint, self.model), canonical(base, other)
        self._components = self._chosen(other)

    def _chosen(self, other: Model) -> list[str]:
        """The components that are looked at.

        Raises:
            MismatchError: If one of the models lacks them.
        """
        sides = ((self.checkpoint, self.model), (self.base, other))
        lacking = [
            (name, file)
            for name in ADAPTED
            for file, model in sides
            if not (found := model.components.get(name)) or not found.table
        ]
        missing = dict(reversed(lacking))
        for name in self.operation.component or ADAPTED:
            if name in missing and (name in self.operation.component or len(missing) == len(ADAPTED)):
                remedy = "name another component, or see what it holds: sdsurgery inspect"
                raise MismatchError(f"it has no {name} that is known", file=missing[name].path, remedy=remedy)
        return [name for name in self.operation.component or ADAPTED if name not in missing]

    def lora(self) -> dict[str, Tensor]:
        """Its tensors.

        Raises:
            MismatchError: If the models don't fit each other, or don't differ.
            RefusedError: If a difference is NaN or infinite, or beyond the LoRA's type.
        """
        from ..adapters.extracting import extracted

        wanted = dict(self._wanted())
        kept = total = 0.0
        found: dict[str, Tensor] = {}
        nbytes = {name: each.tuned.nbytes for name, (_, each) in wanted.items()}
        with progress.task(f"decomposing {len(wanted)} differences", sum(nbytes.values())) as done:
            results = extracted((each for _, each in wanted.values()), self.engine)
            for (name, (module, each)), result in zip(wanted.items(), results, strict=True):
                if not math.isfinite(result.total):
                    message = f"the difference of {module.spots['weight'].key} is NaN or infinite"
                    raise RefusedError(message, file=self.checkpoint.path, remedy="name sound models: sdsurgery verify")
                if result.rank:
                    found.update(self._tensors(name, each, result))
                kept, total = kept + result.kept, total + result.total
                done(nbytes[name])
        if not found:
            message = f"it differs from {called(self.base)} in nothing that a LoRA would hold"
            raise MismatchError(message, file=self.checkpoint.path, remedy="name the model that it was made from")
        found.update(self._alphas(found))
        self.notes.append(Note(f"it holds {kept / total:.2%} of the squared difference of {len(wanted)} layers"))
        self._tell_of_the_rest({(module.component, module.name) for module, _ in wanted.values()})
        return found

    def _wanted(self) -> Iterator[tuple[str, tuple[Module, Wanted]]]:
        """The layers that are extracted, by the name that each gets."""
        from ..adapters.extracting import Wanted

        for module in names_in(self.checkpoint, self.model).modules:
            tuned = self._tuned.get((module.component, f"{module.name}.weight"))
            if module.component not in self._components or tuned is None or "weight" not in module.spots:
                continue
            rank = self._rank(module, tuned.tensor)
            base = self._base.get(tuned.identity)
            if rank is None:
                continue
            if base is None or base.tensor.shape != tuned.tensor.shape:
                there = f"has the shape {list(base.tensor.shape)}" if base else "isn't there"
                message = f"{tuned.key} is {list(tuned.tensor.shape)} in the first model, and {there}"
                raise MismatchError(message, file=self.base.path, key=tuned.key, remedy="name models of one family")
            for file, tensor in ((self.checkpoint, tuned.tensor), (self.base, base.tensor)):
                if tensor.dtype.kind != "float" or not tensor.dtype.computable:
                    message = f"elements of type {tensor.dtype} can't be computed with"
                    remedy = "cast the model first: sdsurgery cast"
                    raise UnsupportedError(message, file=file.path, key=tuned.key, remedy=remedy)
            yield self._name(module), (module, Wanted(tuned.tensor, base.tensor, rank, self.operation.energy))

    def _rank(self, module: Module, tensor: Tensor) -> int | None:
        """The largest rank of a layer; ``None`` for one that is left out."""
        path, shape = f".{module.name}.", tensor.shape
        inner = ".attentions." in path if module.component == "unet" else ".layers." in path
        outer = any(f".{part}." in path for part in ("resnets", "downsamplers", "upsamplers"))
        if len(shape) < 2 or not (inner or (outer and self.operation.conv_rank is not None)):
            return None
        most = self.operation.conv_rank if math.prod(shape[2:]) > 1 else self.operation.most
        least = min(shape[0], math.prod(shape[1:]))
        return least if most is None else min(most, least)

    def _name(self, module: Module) -> str:
        if self.operation.naming == "kohya":
            return kohya_name(module, self.model)
        return f"{module.component}.{module.name}"

    def _tensors(self, name: str, wanted: Wanted, result: Extracted) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one layer, in memory, but known to come from files: no output may replace those."""
        import torch

        rows, *rest = wanted.tuned.shape
        shapes = {"down": (result.rank, *rest), "up": (rows, result.rank, *(1 for _ in rest[1:]))}
        kind = CAST_TARGETS[self.operation.dtype]
        files = (*wanted.tuned.data.files, *wanted.base.data.files)
        words = {"down": "lora_down", "up": "lora_up"}
        if self.operation.naming == "diffusers":
            words = {"down": "lora_A", "up": "lora_B"}
        for part, matrix in (("down", result.down), ("up", result.up)):
            rounded = matrix.to(getattr(torch, str(kind.torch)))
            if not rounded.isfinite().all():
                message = f"the LoRA of {name} has values that {self.operation.dtype} can't hold"
                raise RefusedError(message, file=self.checkpoint.path, remedy="extract with --dtype fp32")
            content = bytes(rounded.flatten().view(torch.uint8).numpy())
            yield f"{name}.{words[part]}.weight", _held(kind.name, shapes[part], content, files)

    def _alphas(self, found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The alphas of kohya's naming, each the rank, where all ranks are the same.

        Every reader takes a missing alpha for the rank; diffusers 0.42 takes alphas that differ for each other's.
        """
        ends = ".lora_down.weight"
        ranks = {key.removesuffix(ends): tensor.shape[0] for key, tensor in found.items() if key.endswith(ends)}
        if len(set(ranks.values())) == 1:
            for name, rank in ranks.items():
                content = struct.pack("<f", rank)
                yield f"{name}.alpha", _held("F32", (), content, found[name + ends].data.files)

    def _tell_of_the_rest(self, extracted: set[tuple[str, str]]) -> None:
        """What differs and isn't in the LoRA: norms, biases, embeddings, what stands around the blocks."""
        rest = []
        for identity, tuned in self._tuned.items():
            base = self._base.get(identity)
            layer, _, parameter = tuned.name.rpartition(".")
            out = tuned.component not in self._components or not tuned.portable
            if out or base is None or ((tuned.component, layer) in extracted and parameter == "weight"):
                continue
            if not same_bytes(tuned.tensor, base.tensor):
                rest.append(tuned.key)
        if rest:
            message = f"{len(rest)} weights differ that it doesn't hold: {listed(dict.fromkeys(rest), _SHOWN)}"
            self.notes.append(Note(message, "warning"))

    def metadata(self) -> dict[str, str]:
        """What kohya's tools and A1111 read of a LoRA."""
        operation, family = self.operation, self.model.base_family
        number = "Dynamic" if operation.energy is not None else str(operation.most)
        conv = {"conv_dim": str(operation.conv_rank), "conv_alpha": str(operation.conv_rank)}
        found = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": number,
            "ss_network_alpha": number,
            "ss_network_args": json.dumps(conv if operation.conv_rank else {}),
        }
        if family in _VERSIONS:
            found |= {"ss_base_model_version": _VERSIONS[family], "ss_v2": str(family == "sd2")}
        fields = modelspec.required(self.checkpoint, self.model)
        if fields:
            fields |= {"sai_model_spec": modelspec.VERSION, "architecture": f"{fields['architecture']}/lora"}
            fields["title"] = f"{modelspec.title_of(self.checkpoint)} since {modelspec.title_of(self.base)}"
        found |= {modelspec.PREFIX + name: value for name, value in fields.items()}
        return {"format": "pt", **found}


def _held(dtype: str, shape: tuple[int, ...], content: bytes, files: tuple[Any, ...]) -> Tensor:
    """A tensor in memory."""
    produce: Callable[[int], Iterator[Any]] = partial(InMemory.chunks, InMemory(content))
    return Tensor(BY_NAME[dtype], shape, Computed(len(content), produce, tuple(dict.fromkeys(files))))
