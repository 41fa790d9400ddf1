"""What changed between two models: told from their values, across layouts, containers and dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from .. import progress
from ..checkpoint import Checkpoint
from ..errors import MismatchError
from ..models.canonical import Canonical, canonical
from ..models.identify import Model, identify
from ..models.position_ids import Status, diagnose
from .comparing import Comparison, compare

Fate = Literal["equal", "changed", "removed", "added"]

_THREADS = 2
"""Reading and NumPy let others run; more than two threads wait for the memory."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A tensor that both have and that isn't the same.

    Attributes:
        key: Where it lies in the first.
        other_key: Where it lies in the second.
        component: Whose it is.
        name: Its canonical name.
        before: Its dtype and shape in the first.
        after: And in the second.
        comparison: How they differ.
    """

    key: str
    other_key: str
    component: str
    name: str
    before: str
    after: str
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class Renamed:
    """A tensor whose key differs, though both are in one layout."""

    key: str
    other_key: str
    component: str


@dataclass(frozen=True, slots=True)
class OneSided:
    """A tensor that only one of the two has."""

    key: str
    component: str
    tensor: str


@dataclass(frozen=True, slots=True)
class MetadataChange:
    """A metadata key that differs; ``None`` where it isn't there."""

    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Diff:
    """The differences between two models.

    Attributes:
        families: Of the first and the second.
        layouts: Of the first and the second.
        equal: Tensors that are equal to the bit, by component.
        changed: What both have and differs.
        renamed: Equal or not, what has another key in the same layout.
        added: What only the second has.
        removed: What only the first has.
        not_comparable: What only one has because the other's layout can't hold it.
        metadata: Keys whose values differ.
        position_ids: What is to be said of CLIP-L's, in the first and the second.
        fates: What became of every tensor that was or could have been compared, by component and canonical name.
    """

    families: tuple[str, str]
    layouts: tuple[str, str]
    equal: Mapping[str, int]
    changed: tuple[Changed, ...]
    renamed: tuple[Renamed, ...]
    added: tuple[OneSided, ...]
    removed: tuple[OneSided, ...]
    not_comparable: tuple[OneSided, ...]
    metadata: tuple[MetadataChange, ...]
    position_ids: tuple[Status, Status]
    fates: Mapping[tuple[str, str], Fate] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether everything that both layouts can hold is equal to the bit; names and metadata don't count."""
        return not (self.changed or self.added or self.removed)

    def within(self, tolerance: float) -> bool:
        """Whether no element of what both have differs by more; not where something is missing or can't be told."""
        near = all(_is_near(change.comparison, tolerance) for change in self.changed)
        return near and not (self.added or self.removed)


def _is_near(comparison: Comparison, tolerance: float) -> bool:
    found = comparison.statistics
    return comparison.kind == "dtype" or (found is not None and not found.special and found.max_abs <= tolerance)


def diff(one: Checkpoint, other: Checkpoint, components: Collection[str] = ()) -> Diff:
    """Compare two models tensor by tensor, by canonical name.

    Args:
        one: The first.
        other: The second.
        components: Only these; all of both unless given.

    Raises:
        MismatchError: If neither of the two has a component that is named.
    """
    models = identify(one), identify(other)
    ours, theirs = (_chosen(canonical(c, m), components) for c, m in zip((one, other), models, strict=True))
    for name in components:
        if not any(item.component == name for side in (ours, theirs) for item in side.values()):
            raise MismatchError(f"neither of the two has a {name}", file=one.path, remedy="see: sdsurgery inspect")
    shared = [identity for identity in ours if identity in theirs]
    comparisons = _compare_all([(ours[identity], theirs[identity]) for identity in shared])
    equal: Counter[str] = Counter()
    changed = []
    for identity, comparison in zip(shared, comparisons, strict=True):
        before, after = ours[identity], theirs[identity]
        if comparison.kind == "equal":
            equal[identity[0]] += 1
            continue
        texts = str(before.tensor), str(after.tensor)
        changed.append(Changed(before.key, after.key, *identity, *texts, comparison))
    across = models[0].layout != models[1].layout
    fates: dict[tuple[str, str], Fate] = {
        identity: "equal" if comparison.kind == "equal" else "changed"
        for identity, comparison in zip(shared, comparisons, strict=True)
    }
    fates |= {item.identity: "removed" for item in _alone(ours, theirs) if item.portable or not across}
    fates |= {item.identity: "added" for item in _alone(theirs, ours) if item.portable or not across}
    removed, lost = _one_sided(ours, theirs, across=across)
    added, made = _one_sided(theirs, ours, across=across)
    return Diff(
        families=(models[0].family, models[1].family),
        layouts=(models[0].layout, models[1].layout),
        equal=dict(equal),
        changed=tuple(changed),
        renamed=() if across else tuple(_renamed(ours, theirs, models)),
        added=added,
        removed=removed,
        not_comparable=(*lost, *made),
        metadata=tuple(_metadata(one.metadata, other.metadata)),
        position_ids=(diagnose(one, models[0]).status, diagnose(other, models[1]).status),
        fates=fates,
    )


def _chosen(
    items: Mapping[tuple[str, str], Canonical], components: Collection[str]
) -> dict[tuple[str, str], Canonical]:
    return {identity: item for identity, item in items.items() if not components or item.component in components}


def _compare_all(pairs: list[tuple[Canonical, Canonical]]) -> list[Comparison]:
    """All pairs, large ones first, by threads; in the order of the pairs."""
    total = sum(one.tensor.nbytes for one, _ in pairs)
    results: list[Comparison | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda place: -pairs[place][0].tensor.nbytes)
    with progress.task(f"comparing {len(pairs)} tensors", total) as advance, ThreadPoolExecutor(_THREADS) as pool:
        futures = {place: pool.submit(compare, pairs[place][0].tensor, pairs[place][1].tensor) for place in order}
        try:
            for place in order:
                results[place] = futures[place].result()
                advance(pairs[place][0].tensor.nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for result in results if result is not None]


def _one_sided(
    here: Mapping[tuple[str, str], Canonical], there: Mapping[tuple[str, str], Canonical], *, across: bool
) -> tuple[tuple[OneSided, ...], tuple[OneSided, ...]]:
    """What only this side has: of that, what the other's layout could hold, and what it couldn't."""
    alone = _alone(here, there)
    could = [item for item in alone if item.portable or not across]
    couldnt = [item for item in alone if across and not item.portable]
    return tuple(map(_side, could)), tuple(map(_side, couldnt))


def _alone(here: Mapping[tuple[str, str], Canonical], there: Mapping[tuple[str, str], Canonical]) -> list[Canonical]:
    return [item for identity, item in here.items() if identity not in there]


def _side(item: Canonical) -> OneSided:
    return OneSided(item.key, item.component, str(item.tensor))


def _renamed(
    ours: Mapping[tuple[str, str], Canonical],
    theirs: Mapping[tuple[str, str], Canonical],
    models: tuple[Model, Model],
) -> Iterator[Renamed]:
    """Keys that differ by more than where the component lies as a whole."""
    seen = set()
    for identity, item in ours.items():
        found = theirs.get(identity)
        if found is None or item.key in seen:
            continue
        seen.add(item.key)
        prefixes = (_prefix(models[0], item.component), _prefix(models[1], item.component))
        if item.key.removeprefix(prefixes[0]) != found.key.removeprefix(prefixes[1]):
            yield Renamed(item.key, found.key, item.component)


def _prefix(model: Model, component: str) -> str:
    found = model.components[component]
    return found.prefix if component in model.networks else model.wrapper


def _metadata(before: Mapping[str, str], after: Mapping[str, str]) -> Iterable[MetadataChange]:
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            yield MetadataChange(key, before.get(key), after.get(key))
