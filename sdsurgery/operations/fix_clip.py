"""fix-clip: the CLIP text encoder's position ids and key names, put right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ..checkpoint import Change, Checkpoint, Note, Step, Tensor
from ..errors import MismatchError
from ..models.components import POSITION_IDS, Component
from ..models.configs import TEXT_ENCODERS
from ..models.identify import Model, identify
from ..models.position_ids import Diagnosis, diagnose, positions, right_ids
from .base import Operation, Param, Source, input_record, opened

Target = Literal["ldm", "a1111", "comfyui", "diffusers"]


@dataclass(frozen=True)
class FixClip(Operation):
    """Repair the CLIP text encoder: position ids, and keys that SD1.5 names differently.

    Finds the CLIP text encoder of SD1 and SDXL in single files and under diffusers' names, writes the position ids
    as int64 arange(N), puts back a missing 'text_model.' level, takes wrappers off, and drops stray ids. Nothing
    outside the text encoder changes by a bit; a model without one passes as it is.
    """

    name: ClassVar[str] = "fix-clip"

    target: Annotated[
        Target | None,
        Param(
            "Who will load it. ldm, a1111: ids present and right; comfyui: corrected where present, never added; "
            "diffusers: absent. The input's own layout unless given."
        ),
    ] = None
    reference: Annotated[
        Source | None,
        Param(
            "Compare the text encoder's keys and shapes with this checkpoint's instead of the built-in table.",
            metavar="FILE",
        ),
    ] = None

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`FixClip`."""
        model = identify(checkpoint)
        diagnosis = diagnose(checkpoint, model)
        renames, drops = _key_repairs(checkpoint, model)
        ids = _right_ids(model, diagnosis, self.target)
        if ids is None and diagnosis.key in checkpoint:
            drops[str(diagnosis.key)] = "position ids, which the target holds none of"
        tensors, changes = _apply(checkpoint, renames, drops)
        if ids is not None and model.clip is not None:
            key = (model.clip.prefix + POSITION_IDS).removeprefix(model.wrapper)
            changes += _set_ids(tensors, checkpoint, diagnosis, key, ids)
        notes = (_diagnosis_note(model, diagnosis), *self._compare(checkpoint, model))
        inputs = input_record(opened(self.reference)) if self.reference else ()
        step = Step(self.name, self.parameters(), tuple(changes), notes, inputs)
        return checkpoint.evolve(tensors, step)

    def _compare(self, checkpoint: Checkpoint, model: Model) -> list[Note]:
        if model.clip is None:
            return []
        if self.reference is None:
            return _against_table(checkpoint, model.clip)
        other = opened(self.reference)
        other_clip = identify(other).clip
        if other_clip is None:
            raise MismatchError(
                "the reference has no CLIP text encoder",
                file=other.path,
                remedy="name an SD1.5 checkpoint with --reference",
            )
        return _against_reference(checkpoint, model.clip, other, other_clip)


def put_right_ids(tensors: dict[str, Tensor], checkpoint: Checkpoint, model: Model) -> list[Change]:
    """Put the ids that the layout wants into a copy of a checkpoint's tensors, under the keys that it has.

    Args:
        tensors: The copy.
        checkpoint: The checkpoint.
        model: What it is.
    """
    diagnosis = diagnose(checkpoint, model)
    ids = _right_ids(model, diagnosis, None)
    if ids is None and diagnosis.key in tensors:
        old = tensors.pop(diagnosis.key)
        return [Change(diagnosis.key, "dropped", f"{old}: position ids, which the layout holds none of")]
    if ids is None or model.clip is None:
        return []
    return _set_ids(tensors, checkpoint, diagnosis, model.clip.prefix + POSITION_IDS, ids)


def _right_ids(model: Model, diagnosis: Diagnosis, target: Target | None) -> Tensor | None:
    """The ids that a target wants, or ``None`` where it wants them absent."""
    target = target or ("diffusers" if model.layout == "diffusers" else "ldm")
    absent = diagnosis.key is None or diagnosis.status == "missing"
    if model.clip is None or target == "diffusers" or (target == "comfyui" and absent):
        return None
    return right_ids(positions(model))


def _key_repairs(checkpoint: Checkpoint, model: Model) -> tuple[dict[str, str], dict[str, str]]:
    """Old key to new key, and dropped key to the reason."""
    renames: dict[str, str] = {}
    drops: dict[str, str] = {}
    encoders = [found for name in TEXT_ENCODERS if (found := model.components.get(name))]
    wrapper = model.wrapper if any(found.table for found in encoders) else ""
    if wrapper:
        # A wrapper around the whole file is no loader's: taken off everywhere, or the parts would come apart.
        renames = {key: key.removeprefix(wrapper) for key in checkpoint}
    for component in encoders:
        for name, key in component.keys.items() if component.table else ():
            right = (component.prefix + name).removeprefix(wrapper)
            if key != right:
                renames[key] = right
        for key in component.stray:
            if key.endswith("position_ids") and "vision" not in key:
                drops[key] = "stray position ids"
    return renames, drops


def _apply(
    checkpoint: Checkpoint, renames: Mapping[str, str], drops: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[Change]]:
    tensors: dict[str, Tensor] = {}
    changes: list[Change] = []
    for key, tensor in checkpoint.items():
        if key in drops:
            changes.append(Change(key, "dropped", f"{tensor}: {drops[key]}"))
            continue
        new = renames.get(key, key)
        if new in tensors or (new != key and new in checkpoint and renames.get(new, new) == new):
            raise MismatchError(
                f"{key!r} should be called {new!r}, but that exists too",
                file=checkpoint.path,
                key=key,
                remedy="drop one of the two first",
            )
        tensors[new] = tensor
        if new != key:
            changes.append(Change(new, "renamed", key, new))
    return tensors, changes


def _set_ids(
    tensors: dict[str, Tensor], checkpoint: Checkpoint, diagnosis: Diagnosis, key: str, ids: Tensor
) -> list[Change]:
    """Put the right ids at their right place, unless they are there."""
    old = checkpoint.get(diagnosis.key or "")
    if old is not None and diagnosis.status in {"ok", "unexpected"}:
        return []
    tensors[key] = ids
    if old is None:
        return [Change(key, "added", None, str(ids))]
    return [Change(key, "replaced", f"{old} {diagnosis.status}", str(ids))]


def _diagnosis_note(model: Model, diagnosis: Diagnosis) -> Note:
    if diagnosis.status == "not-applicable":
        return Note("no CLIP text encoder with position ids is in it: not applicable")
    wrong = ""
    if diagnosis.wrong:
        shown = ", ".join(map(str, diagnosis.wrong[:8])) + (", …" if len(diagnosis.wrong) > 8 else "")
        wrong = f"; {len(diagnosis.wrong)} of {positions(model)} wrong once truncated ({shown})"
    kind = f" ({diagnosis.dtype})" if diagnosis.dtype else ""
    return Note(f"position ids: {diagnosis.status}{kind}{wrong}", key=diagnosis.key)


def _against_table(checkpoint: Checkpoint, clip: Component) -> list[Note]:
    """Faults that no repair of names can mend."""
    found = [Note(f"missing from the text encoder: {key}", "warning", key) for key in clip.missing]
    found += [
        Note(f"{key} has the shape {list(checkpoint[key].shape)} instead of {list(shape)}", "warning", key)
        for key, shape in clip.misshapen(checkpoint.tensors).items()
    ]
    found += [
        Note(f"unknown in a CLIP text encoder, left alone: {key}", key=key)
        for key in clip.stray
        if not key.endswith("position_ids")
    ]
    return found


def _against_reference(checkpoint: Checkpoint, clip: Component, other: Checkpoint, reference: Component) -> list[Note]:
    found: list[Note] = []
    for name in {**reference.keys, **clip.keys}:
        if name == POSITION_IDS:
            continue
        key = clip.keys.get(name)
        if key is None:
            found.append(Note(f"the reference has {name}, which is missing here", "warning", clip.prefix + name))
        elif name not in reference.keys:
            found.append(Note(f"the reference lacks {name}", "warning", key))
        elif checkpoint[key].shape != (expected := other[reference.keys[name]].shape):
            message = f"{name} has the shape {list(checkpoint[key].shape)}, the reference's {list(expected)}"
            found.append(Note(message, "warning", key))
    return found
