"""prune: training leftovers out, everything that a loader may need in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..checkpoint import Change, ChangeKind, Checkpoint, Note, Step, Tensor
from ..errors import MismatchError
from ..models.components import ema_name
from ..models.identify import Model, identify
from ..models.leftovers import Group, training_groups, unknown_keys
from .base import Operation, Param
from .grafts import same_bytes, without_aside


@dataclass(frozen=True)
class Prune(Operation):
    """Drop what only training needs: EMA weights, schedule buffers, losses, optimizer state and non-tensors.

    Anything that isn't recognised stays unless --unknown is given, and so do marker tensors such as v_pred.
    """

    name: ClassVar[str] = "prune"

    ema: Annotated[bool, Param("Use the EMA weights as the UNet before they are dropped.")] = False
    keep: Annotated[tuple[Group, ...], Param("Keep this group; may be given several times.")] = ()
    unknown: Annotated[bool, Param("Drop keys that the model's family doesn't have, too.")] = False

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`Prune`."""
        model = identify(checkpoint)
        if self.unknown and not model.networks:
            message = "nothing in it is known, so that nobody can say what doesn't belong"
            raise MismatchError(message, file=checkpoint.path, remedy="leave out --unknown")
        tensors, changes = dict(checkpoint), []
        if self.ema:
            changes += take_ema(checkpoint, model, tensors)
        notes = []
        groups = [
            *training_groups(checkpoint, model),
            *([("unknown", unknown_keys(checkpoint, model))] if self.unknown else []),
        ]
        for group, keys in groups:
            if group in self.keep or not keys:
                continue
            freed = sum(checkpoint[key].nbytes for key in keys)
            notes.append(Note(f"{group}: {len(keys)} tensors, {freed:,} bytes"))
            changes += [Change(key, "dropped", str(tensors.pop(key))) for key in keys]
        result = checkpoint
        if checkpoint.aside:
            notes.append(Note(f"non-tensors: {len(checkpoint.aside)} entries"))
            changes += [Change(entry.name, "dropped", entry.what) for entry in checkpoint.aside]
            result = without_aside(checkpoint)
        if not changes:
            notes.append(Note("nothing to prune"))
        return result.evolve(tensors, Step(self.name, self.parameters(), tuple(changes), tuple(notes)))


def take_ema(checkpoint: Checkpoint, model: Model, tensors: dict[str, Tensor]) -> list[Change]:
    """Put the EMA weights in the UNet's place; every one must be there and of the right shape."""
    unet, ema = model.components.get("unet"), model.components.get("ema")
    if unet is None or ema is None or not unet.table:
        raise _no_ema(checkpoint, "it has no UNet with EMA weights")
    if ema.missing:
        raise _no_ema(checkpoint, f"{len(ema.missing)} of {len(unet.table)} EMA weights are missing", ema.missing[0])
    wrong = ema.misshapen(checkpoint.tensors)
    if wrong:
        raise _no_ema(checkpoint, f"{len(wrong)} EMA weights have another shape than the UNet's", next(iter(wrong)))
    changes = []
    for name in unet.table:
        key, averaged = unet.keys.get(name, unet.prefix + name), checkpoint[ema.keys[ema_name(name)]]
        old = checkpoint.get(key)
        if old is None or not same_bytes(old, averaged):
            tensors[key] = averaged
            kind: ChangeKind = "added" if old is None else "replaced"
            changes.append(Change(key, kind, None if old is None else str(old), str(averaged)))
    return changes


def _no_ema(checkpoint: Checkpoint, message: str, key: str | None = None) -> MismatchError:
    return MismatchError(
        message,
        file=checkpoint.path,
        key=key,
        remedy="leave out --ema: the file's own UNet weights are kept",
    )
