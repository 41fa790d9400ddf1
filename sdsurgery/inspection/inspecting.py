"""inspect: what a file holds, told from its header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import history
from ..checkpoint import Aside, Checkpoint, Tensor
from ..models.components import MARKERS, Component
from ..models.identify import identify
from ..models.position_ids import Diagnosis, diagnose


@dataclass(frozen=True, slots=True)
class ComponentReport:
    """One component.

    Attributes:
        tensors: How many.
        parameters: Elements of all of them.
        nbytes: Bytes of all of them.
        dtypes: Tensors of each dtype, the commonest first.
        missing: Keys that its family has and the file hasn't.
        unexpected: Keys that lie in it and that its family hasn't.
        misshapen: Keys of the wrong shape, with the right one.
        checked: Whether it is known what it should hold.
    """

    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[int, ...]]
    checked: bool

    @property
    def complete(self) -> bool:
        """Whether every weight is there in its right shape; not where nobody can tell."""
        return self.checked and not self.missing and not self.misshapen


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        path: The file.
        container: How its bytes lie.
        layout: How its weights are named.
        family: What model it is.
        evidence: How that was told.
        file_bytes: Size of the file, or of all files of a folder.
        tensors: The tensors themselves, headers only.
        components: By name.
        position_ids: Diagnosis of CLIP-L's.
        metadata: As the file has it.
        history: What sdsurgery recorded in it.
        aside: What it holds besides tensors.
    """

    path: str
    container: str
    layout: str
    family: str
    evidence: tuple[str, ...]
    file_bytes: int
    tensors: Mapping[str, Tensor]
    components: Mapping[str, ComponentReport]
    position_ids: Diagnosis
    metadata: Mapping[str, str]
    history: list[dict[str, Any]]
    aside: tuple[Aside, ...]

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Describe a checkpoint; reads nothing but headers and the few bytes of the position ids."""
    model = identify(checkpoint)
    origin = checkpoint.origin
    told = _adapter(checkpoint) if model.layout == "unknown" else []
    components = {name: _report(checkpoint, found, model.wrapper) for name, found in model.components.items()}
    if told and "other" in components:  # what is known to be something else isn't unexpected
        components["other"] = replace(components["other"], unexpected=())
    return Inspection(
        path=str(origin.path) if origin else "",
        container=origin.container if origin else "memory",
        layout=model.layout,
        family=model.family,
        evidence=(*model.evidence, *told),
        file_bytes=sum(file.size for file in checkpoint.files),
        tensors=checkpoint.tensors,
        components=components,
        position_ids=diagnose(checkpoint, model),
        metadata=checkpoint.metadata,
        history=history.recorded(checkpoint.metadata) + [history.describe(step) for step in checkpoint.steps],
        aside=checkpoint.aside,
    )


def _adapter(checkpoint: Checkpoint) -> list[str]:
    """What a file that is no model is, if it is a LoRA or an embedding."""
    from ..adapters import describing
    from ..models import embeddings

    return describing.described(checkpoint) or embeddings.described(checkpoint)


def _report(checkpoint: Checkpoint, component: Component, wrapper: str) -> ComponentReport:
    tensors = [checkpoint[key] for key in component.all_keys()]
    unexpected = component.stray
    if component.name == "other":
        unexpected = tuple(key for key in component.keys.values() if key.removeprefix(wrapper) not in MARKERS)
    return ComponentReport(
        tensors=len(tensors),
        parameters=sum(tensor.numel for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=dict(Counter(tensor.dtype.name for tensor in tensors).most_common()),
        missing=component.missing,
        unexpected=unexpected,
        misshapen=component.misshapen(checkpoint.tensors),
        checked=bool(component.table) or component.name == "other",
    )
