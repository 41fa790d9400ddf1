"""merge: other models computed into this one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from .. import progress
from ..checkpoint import Change, Checkpoint, Note, Step, Tensor
from ..dtypes import CAST_TARGETS
from ..errors import RefusedError, UsageError
from ..merging import webui
from ..merging.matching import Job, Matching, called
from ..merging.ratios import ratios
from ..models import modelspec
from ..models.identify import Model, identify
from ..values import largest
from .base import Operation, Param, Source, input_record, opened
from .cast import LARGEST, DTypeName, cast_tensor
from .computing import ComputeName, DeviceName, engine, without_averages
from .fix_clip import put_right_ids
from .grafts import MergeVae

if TYPE_CHECKING:
    from ..merging.blending import Engine
    from ..merging.methods import Formula

Method = Literal[
    "weighted-sum", "add-difference", "linear", "slerp", "ties", "dare", "train-difference", "cosine-adaptive"
]

_MOST_MODELS = 99
_SUMS = frozenset({"weighted-sum", "linear", "add-difference"})
"""Methods that need nothing but products and sums."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a method takes.

    Attributes:
        least: Further models, at least.
        most: And at most.
        alpha: What alpha is unless given; ``None`` if the method has none.
        takes: Its options besides.
    """

    least: int
    most: int
    alpha: float | None
    takes: frozenset[str] = frozenset()


_KINDS: Mapping[str, _Kind] = {
    "weighted-sum": _Kind(1, 1, 0.5),
    "add-difference": _Kind(2, 2, 1.0),
    "linear": _Kind(1, _MOST_MODELS, None, frozenset({"weight"})),
    "slerp": _Kind(1, 1, 0.5),
    "ties": _Kind(1, _MOST_MODELS, 1.0, frozenset({"weight", "density"})),
    "dare": _Kind(1, _MOST_MODELS, 1.0, frozenset({"weight", "density", "seed"})),
    "train-difference": _Kind(2, 2, 1.0),
    "cosine-adaptive": _Kind(1, 1, 0.5),
}


@dataclass(frozen=True)
class Merge(Operation):
    """Merge other models into this one: A is the model, B, C and on are those that are named.

    UNet and text encoders are computed, tensor by tensor, in fp32, and rounded once to the type that A's have. The VAE
    is A's unless another is named. Position ids are no weights: they come out right. Keys that only A has stay, keys
    that only others have are left out, and A's averaged (EMA) weights go, for they are none of the result's.
    """

    name: ClassVar[str] = "merge"
    label = "merged"

    models: Annotated[tuple[Source, ...], Param("The other models: B, C and on.", positional=True, metavar="B [C]...")]
    method: Annotated[
        Method,
        Param(
            "weighted-sum: (1-alpha) A + alpha B; add-difference: A + alpha (B-C); linear: a weighted mean of all; "
            "slerp, cosine-adaptive: between A and B; ties, dare: A, and what the others learned from it; "
            "train-difference: A, and what B learned from C."
        ),
    ] = "weighted-sum"
    alpha: Annotated[
        float | None,
        Param("How much of the others: 0.5 unless given where that is a share, 1 where a factor.", metavar="NUMBER"),
    ] = None
    at: Annotated[
        tuple[str, ...],
        Param(
            "Another alpha for a component, a block of the UNet, or a pattern of keys: unet=0.4, IN04=0, "
            "'*.attn2.*=0.7'. May be given several times; the last that fits counts.",
            metavar="WHERE=NUMBER",
        ),
    ] = ()
    blocks: Annotated[
        str | None,
        Param(
            "The alphas of the UNet's blocks, IN00 to IN11, M00, OUT00 to OUT11: 25 numbers with commas, 26 with alpha "
            "in front, or the name of a preset such as GRAD_V.",
            metavar="NUMBERS",
        ),
    ] = None
    weight: Annotated[
        tuple[float, ...],
        Param(
            "linear: of A, B, C and on, a mean whatever they add up to; ties, dare: of B, C and on. Given once for "
            "each model; all 1 unless given.",
            metavar="NUMBER",
        ),
    ] = ()
    density: Annotated[
        float | None, Param("ties, dare: the share of each difference that is kept; 0.5 unless given.", metavar="SHARE")
    ] = None
    seed: Annotated[int | None, Param("dare: which elements are dropped; 0 unless given.", metavar="NUMBER")] = None
    vae: Annotated[Source | None, Param("Where the VAE comes from; A's unless given.", metavar="FILE")] = None
    dtype: Annotated[DTypeName | None, Param("The type of what is merged; A's own unless given.")] = None
    compute_dtype: Annotated[ComputeName, Param("What is computed in.")] = "fp32"
    device: Annotated[DeviceName, Param("What computes.")] = "cpu"
    force: Annotated[bool, Param("Take a VAE even of a family whose latents have another scale.")] = False

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`Merge`."""
        self.check()
        model, others = identify(checkpoint), [opened(source) for source in self.models]
        run = _Run(self, Matching(checkpoint, model, others, CAST_TARGETS[self.dtype] if self.dtype else None))
        tensors, changes = without_averages(checkpoint, model)
        for job, tensor in run.results():
            old = checkpoint[job.place.key]
            if tensor is not old:
                tensors[job.place.key] = tensor
                changes.append(Change(job.place.key, "replaced", str(old), str(tensor)))
        if not any(change.kind == "replaced" for change in changes):
            run.notes.append(Note("with these numbers the result is the first model as it is"))
        changes += put_right_ids(tensors, checkpoint, model)
        inputs = tuple(record for other in others for record in input_record(other))
        step = Step(self.name, self._recorded(), tuple(changes), tuple(run.notes), inputs)
        metadata = dict(checkpoint.metadata)
        if any(change.kind == "replaced" for change in changes):
            metadata |= self._told(checkpoint, model, others)
        merged = checkpoint.evolve(tensors, step, metadata=metadata)
        return merged if self.vae is None else MergeVae(self.vae, force=self.force)(merged)

    def _told(self, checkpoint: Checkpoint, model: Model, others: Sequence[Checkpoint]) -> dict[str, str]:
        """Metadata that tell of the merge, as A1111's webui and ModelSpec have it."""
        models = (checkpoint, *others)
        options = {name: value for name, value in self._recorded().items() if name not in {"models", "method", "alpha"}}
        vae = self.parameters().get("vae")
        half = self.dtype == "fp16"
        found = webui.record(webui.Merged(models, self.method, self.amount, model.family, vae, half, options))
        fields = modelspec.required(checkpoint, model)
        if fields:
            titles = [modelspec.title_of(each) for each in models]
            fields |= {"sai_model_spec": modelspec.VERSION, "merged_from": ", ".join(titles)}
            fields["title"] = webui.title(titles, self.method, self.amount)
        return found | {modelspec.PREFIX + name: value for name, value in fields.items()}

    @property
    def amount(self) -> float:
        """The alpha that counts where nothing else is said."""
        return self.alpha if self.alpha is not None else _KINDS[self.method].alpha or 0.0

    @property
    def kept(self) -> float:
        """The share of each difference that is kept."""
        return 0.5 if self.density is None else self.density

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each model; of ``linear`` they add up to one."""
        given = self.weight or (1.0,) * self._weighted
        total = math.fsum(given) if self.method == "linear" else 1.0
        return tuple(weight / total for weight in given)

    @property
    def _weighted(self) -> int:
        """How many models have a weight."""
        return len(self.models) + (self.method == "linear")

    def _recorded(self) -> dict[str, Any]:
        """Its parameters, those that count whether they were given or not; the VAE has a step of its own."""
        told = {name: value for name, value in self.parameters().items() if name not in {"vae", "force"}}
        kind = _KINDS[self.method]
        told["method"] = self.method
        if kind.alpha is not None:
            told["alpha"] = self.amount
        if "density" in kind.takes:
            told["density"] = self.kept
        if "seed" in kind.takes:
            told["seed"] = self.seed or 0
        return told

    def check(self) -> None:
        """Refuse options that the method doesn't have, and numbers that make no sense."""
        kind = _KINDS[self.method]
        if not kind.least <= len(self.models) <= kind.most:
            wanted = "two further models, B and C" if kind.least == 2 else "one further model"
            wanted = wanted if kind.most == kind.least else "one further model or more"
            message = f"{self.method} takes {wanted}, and {len(self.models)} are named"
            raise UsageError(message, remedy="name them behind the first: merge A B")
        options = {"weight": self.weight or None, "density": self.density, "seed": self.seed}
        ratio = {"alpha": self.alpha, "at": self.at or None, "blocks": self.blocks}
        wrong = [name for name, value in options.items() if value is not None and name not in kind.takes]
        wrong += [name for name, value in ratio.items() if value is not None and kind.alpha is None]
        if wrong:
            raise UsageError(f"{self.method} has no {wrong[0]}", remedy=f"leave --{wrong[0]} out")
        if self.weight and len(self.weight) != self._weighted:
            whose = "A, B and on" if self.method == "linear" else "B, C and on"
            message = f"{len(self.weight)} weights are given for {self._weighted} models"
            raise UsageError(message, remedy=f"give one for each of {whose}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if not all(map(math.isfinite, (self.amount, *self.weight))):
            raise UsageError("a weight is NaN or infinite", remedy="give a number")
        if self.method == "linear" and self.weight and not math.fsum(self.weight):
            raise UsageError("the weights add up to nothing", remedy="give others: they are divided by their sum")
        if not 0 < self.kept <= 1:
            raise UsageError(f"{self.kept:g} is no density", remedy="give one above 0, up to 1")


@dataclass(frozen=True, slots=True)
class _Plan:
    """A tensor of the result that isn't simply the first model's.

    Attributes:
        job: What it is made of.
        tensors: What of that goes into it.
        result: It.
        bound: The largest magnitude that the result can have, given those of the tensors.
    """

    job: Job
    tensors: tuple[Tensor, ...]
    result: Tensor
    bound: Callable[[Sequence[float]], float]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def largest(self) -> list[float]:
        """The largest magnitude in each of the tensors."""
        return [largest(tensor) for tensor in self.tensors]


class _Run:
    """One run of the operation.

    Attributes:
        notes: What a person should know.
    """

    def __init__(self, operation: Merge, matching: Matching) -> None:
        self.operation, self.matching = operation, matching
        self.jobs = matching.jobs()
        self.notes = matching.notes
        where = [job.place for job in self.jobs]
        self.ratios = ratios(operation.amount, operation.blocks, operation.at, where)
        self.engine = self._engine()

    def _engine(self) -> Engine:
        """NumPy for sums of usual types, which spares the import of torch; else torch."""
        from ..merging.plain_engine import TYPES, PlainEngine

        operation = self.operation
        types = {each.dtype.name for job in self.jobs for each in job.tensors} | {job.target.name for job in self.jobs}
        usual = types <= TYPES and all(job.channels is None for job in self.jobs)
        if usual and operation.method in _SUMS and (operation.compute_dtype, operation.device) == ("fp32", "cpu"):
            return PlainEngine()
        return engine(operation.name, operation.compute_dtype, operation.device)

    def results(self) -> list[tuple[Job, Tensor]]:
        """Each tensor as it will be; one that stays is the very one.

        Raises:
            RefusedError: If finite values would become infinite.
        """
        plain = {job.place.key: self._plain(job) for job in self.jobs}
        computed = [job for job in self.jobs if plain[job.place.key] is None]
        formulas = {job.place.key: formula for job, formula in self._formulas(computed)}
        results, plans = [], []
        for job in self.jobs:
            source, formula = plain[job.place.key], formulas.get(job.place.key)
            if formula is not None:
                result = self._blended(job, formula)
                plans.append(_Plan(job, job.tensors, result, formula.bound))
            else:
                assert source is not None  # noqa: S101 - for the type checker: it has a formula otherwise
                shape = job.tensors[0].shape
                shaped = source if source.shape == shape else Tensor(source.dtype, shape, source.data)
                result = cast_tensor(shaped, job.target)
                if result is not job.tensors[0]:
                    plans.append(_Plan(job, (source,), result, max))
            results.append((job, result))
        self._check(plans)
        return results

    def _check(self, plans: Sequence[_Plan]) -> None:
        """Read what goes into the result: NaN and Inf are told of, overflow is refused, before anything is written."""
        overflowing = []
        total = sum(plan.nbytes for plan in plans)
        with progress.task(f"checking {len(plans)} tensors", total) as done, ThreadPoolExecutor(2) as pool:
            for plan, most in zip(plans, pool.map(_Plan.largest, plans), strict=True):
                self.notes.extend(self._special(plan, most))
                if all(map(math.isfinite, most)) and plan.bound(most) > LARGEST.get(plan.job.target.name, 0.0):
                    overflowing += [plan.job.place.key] if not math.isfinite(largest(plan.result)) else []
                done(plan.nbytes)
        if overflowing:
            message = f"{len(overflowing)} tensors get values that their type can't hold, the first {overflowing[0]}"
            remedy = "merge with --dtype fp32 or bf16, or with a smaller alpha"
            raise RefusedError(message, file=self.matching.checkpoint.path, key=overflowing[0], remedy=remedy)

    def _special(self, plan: _Plan, most: Sequence[float]) -> Iterator[Note]:
        models = (self.matching.checkpoint, *self.matching.others)
        read = set(map(id, plan.tensors))
        whose = [called(model) for model, each in zip(models, plan.job.tensors, strict=True) if id(each) in read]
        for name, value in zip(whose, most, strict=True):
            if not math.isfinite(value):
                what = "NaN" if math.isnan(value) else "Inf"
                yield Note(f"{plan.job.place.key} holds {what} in {name}", "warning", plan.job.place.key)

    def _plain(self, job: Job) -> Tensor | None:
        """One model's tensor as it is, where that is what the formula comes to."""
        operation, amount = self.operation, self.ratios.of(job.place)
        shares: Sequence[float] = ()
        match operation.method:
            case "linear":
                shares = operation.weights
            case "weighted-sum" | "slerp":
                shares = (1 - amount, amount)
            case "add-difference" | "train-difference" | "ties" | "dare" if amount == 0:
                shares = (1.0,)
        only = [place for place, share in enumerate(shares) if share]
        if len(only) != 1 or shares[only[0]] != 1 or (only[0] and job.channels is not None):
            return None
        return job.tensors[only[0]]

    def _formulas(self, jobs: Sequence[Job]) -> list[tuple[Job, Formula]]:
        from ..merging import methods

        operation = self.operation
        if operation.method == "cosine-adaptive":
            return self._adaptive(jobs)
        weights, kept, seed = operation.weights, operation.kept, operation.seed or 0

        def formula(job: Job) -> Formula:
            amount = self.ratios.of(job.place)
            match operation.method:
                case "weighted-sum":
                    return methods.Linear((1 - amount, amount))
                case "linear":
                    return methods.Linear(weights)
                case "slerp":
                    return methods.Slerp(amount)
                case "add-difference":
                    return methods.AddDifference(amount)
                case "train-difference":
                    return methods.TrainDifference(amount)
                case "ties":
                    return methods.Ties(weights, kept, amount)
                case _:
                    return methods.Dare(weights, kept, amount, seed, job.place.canonical)

        return [(job, formula(job)) for job in jobs]

    def _adaptive(self, jobs: Sequence[Job]) -> list[tuple[Job, Formula]]:
        """What is alike is told by all that is merged, so all of it is read first."""
        from ..merging import methods
        from ..merging.blending import first_inputs

        cosines = []
        with progress.task(f"comparing {len(jobs)} tensors", sum(job.nbytes for job in jobs)) as done:
            for job in jobs:
                tensors = first_inputs(job.tensors, job.channels)
                columns = math.prod(tensors[0].shape[1:])
                cosines.append(methods.column_cosines(partial(self.engine.in_step, tensors), columns))
                done(job.nbytes)
        low, high = methods.usual_range(cosines)
        return [
            (job, methods.CosineAdaptive(self.ratios.of(job.place), low, high, found))
            for job, found in zip(jobs, cosines, strict=True)
        ]

    def _blended(self, job: Job, formula: Formula) -> Tensor:
        from ..merging.blending import blended

        return blended(job.tensors, job.target, formula, self.engine, channels=job.channels)
