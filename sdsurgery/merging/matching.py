"""Which tensors of several models belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..checkpoint import Checkpoint, Note, Tensor
from ..dtypes import DType
from ..errors import MismatchError, UnsupportedError
from ..models.canonical import canonical
from ..models.components import POSITION_IDS, Component
from ..models.configs import TEXT_ENCODERS
from ..models.conversion import in_layout
from ..models.identify import Model, identify
from ..wording import listed
from .ratios import Place, places

MERGED = (*TEXT_ENCODERS, "unet")
"""The components that are merged; a VAE is one model's as a whole."""

_SHOWN = 3
"""Keys that a note names."""


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor to be merged.

    Attributes:
        place: Where it is in the first model.
        tensors: The first model's, and the others' of the same name.
        channels: Of how many input channels, where the models have different numbers of them.
        target: The type of the result.
    """

    place: Place
    tensors: tuple[Tensor, ...]
    channels: int | None
    target: DType

    @property
    def nbytes(self) -> int:
        """Bytes of all models' tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass
class Matching:
    """The first model beside the others.

    Attributes:
        checkpoint: The first model.
        model: What it is.
        others: The others, in order.
        dtype: The type of what is merged; the first model's own if ``None``.
        notes: What a person should know of it; complete when :meth:`jobs` has been called.
    """

    checkpoint: Checkpoint
    model: Model
    others: Sequence[Checkpoint]
    dtype: DType | None = None
    notes: list[Note] = field(default_factory=list)

    def jobs(self) -> list[Job]:
        """All that is merged.

        Raises:
            MismatchError: If the models have nothing in common, or are of different families.
            UnsupportedError: If elements can't be computed with.
        """
        models = [identify(other) for other in self.others]
        for other, model in zip(self.others, models, strict=True):
            if len({self.model.base_family, model.base_family} - {"unknown"}) > 1:
                message = f"it is {model.family}, and the first model is {self.model.family}"
                raise MismatchError(message, file=other.path, remedy="name models of one family")
        found = [job for name in MERGED for job in self._of_component(name, models)]
        if not found:
            there = ", ".join(self.model.components) or "nothing that is known"
            raise MismatchError(
                f"it has no text encoder or UNet that the others have, too: {there}", file=self.checkpoint.path,
                remedy="name models of one family, or see what they hold: sdsurgery inspect",
            )  # fmt: skip
        return found

    def _of_component(self, name: str, models: Sequence[Model]) -> Iterator[Job]:
        ours = self.model.components.get(name)
        if ours is None or not ours.table:
            return
        pairs = zip(self.others, models, strict=True)
        theirs = [found for other, model in pairs if (found := self._theirs(ours, other, model)) is not None]
        if len(theirs) < len(self.others):
            return
        where = places(name, _canonical_names(self.checkpoint, self.model, name))
        stays = []
        for weight, key in ours.keys.items():
            tensors = [self.checkpoint[key], *(found[weight] for found in theirs if weight in found)]
            if weight == POSITION_IDS:
                continue
            if len(tensors) > len(theirs) and all(tensor.dtype.kind == "float" for tensor in tensors):
                yield self._job(where[key], tuple(tensors))
            else:
                stays.append(key)
        self._tell_of_the_rest(ours, theirs, stays)

    def _theirs(self, ours: Component, other: Checkpoint, model: Model) -> dict[str, Tensor] | None:
        """Another model's tensors of a component, by the names of the first one's layout."""
        found = model.components.get(ours.name)
        if found is None or not found.table:
            self.notes.append(Note(f"{called(other)} has no {ours.name}: the first model's stays as it is", "warning"))
            return None
        if type(found.config) is not type(ours.config):
            message = f"its {ours.name} is of another family ({model.family}) than the first model's"
            raise MismatchError(message, file=other.path, remedy="name models of one family")
        moved, part = in_layout(other, found, ours.layout)
        return part.tensors(moved)

    def _tell_of_the_rest(self, ours: Component, theirs: Sequence[Mapping[str, Tensor]], stays: Sequence[str]) -> None:
        if stays:
            message = f"{len(stays)} tensors of the {ours.name} that not all models have stay the first one's"
            self.notes.append(Note(f"{message}: {listed(stays, _SHOWN)}", "warning"))
        for other, found in zip(self.others, theirs, strict=True):
            more = [weight for weight in found if weight not in ours.keys and weight != POSITION_IDS]
            if more:
                message = f"{len(more)} tensors of the {ours.name} that only {called(other)} has are left out"
                self.notes.append(Note(f"{message}: {listed(more, _SHOWN)}", "warning"))

    def _job(self, place: Place, tensors: tuple[Tensor, ...]) -> Job:
        first = tensors[0]
        for checkpoint, tensor in zip((self.checkpoint, *self.others), tensors, strict=True):
            if not tensor.dtype.computable:
                raise UnsupportedError(
                    f"elements of type {tensor.dtype} can't be computed with", file=checkpoint.path, key=place.key,
                    remedy="cast the model first: sdsurgery cast",
                )  # fmt: skip
            if not (_same_matrix(first, tensor) or _has_fewer_inputs(first, tensor)):
                message = f"{place.key} has the shape {list(tensor.shape)}, and {list(first.shape)} in the first model"
                remedy = "name models of one family; one with more input channels, as for inpainting, comes first"
                raise MismatchError(message, file=checkpoint.path, key=place.key, remedy=remedy)
        inputs = {tensor.shape[1] for tensor in tensors if len(tensor.shape) == 4}
        return Job(place, tensors, min(inputs) if len(inputs) > 1 else None, self.dtype or first.dtype)


def _same_matrix(first: Tensor, other: Tensor) -> bool:
    """Whether the shapes are the same; a 1 x 1 convolution may lie flat."""
    one, two = (shape[:2] if shape[2:] == (1, 1) else shape for shape in (first.shape, other.shape))
    return one == two


def _has_fewer_inputs(first: Tensor, other: Tensor) -> bool:
    """Whether both are convolutions, and the other one has fewer input channels."""
    a, b = first.shape, other.shape
    return len(a) == len(b) == 4 and (a[0], a[2:]) == (b[0], b[2:]) and a[1] > b[1]


def _canonical_names(checkpoint: Checkpoint, model: Model, component: str) -> dict[str, list[str]]:
    """By key, the canonical names of what lies there."""
    found: dict[str, list[str]] = {}
    for item in canonical(checkpoint, model).values():
        if item.component == component:
            found.setdefault(item.key, []).append(item.name)
    return found


def called(checkpoint: Checkpoint) -> str:
    """A model as it is named to people."""
    return checkpoint.path.name if checkpoint.path else "a model in memory"
