"""Operations that move whole components between checkpoints: merge-vae, replace, extract."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from ..checkpoint import Change, Checkpoint, Folder, Note, Step, Tensor
from ..dtypes import CAST_TARGETS
from ..errors import MismatchError, SurgeryError, UsageError
from ..models.components import POSITION_IDS, Component
from ..models.configs import CONFIG_NAME, documents
from ..models.conversion import in_layout, misfits
from ..models.folder_files import FolderFiles
from ..models.identify import VAE_PREFIX, Model, identify
from ..models.known import VAE_FAMILY, Provenance, latent_space, provenance_of_vae
from ..models.single_file import settings_of
from ..models.stated import Stated, silent_fields, stated_about
from ..models.walks import Layout, UNetConfig
from ..sources import InMemory
from ..wording import listed
from .base import Operation, Param, Source, input_record, opened
from .cast import ComponentName, DTypeName, cast_tensor, check_values

_COMPARE_CHUNK = 256 << 10


@dataclass(frozen=True)
class MergeVae(Operation):
    """Put another VAE into a model.

    The donor is a VAE file with bare or 'first_stage_model.' keys, or a whole checkpoint, in safetensors or a torch
    pickle. Exactly the VAE's tensors are replaced, each checked by name and shape; a model without a VAE gets one.
    What else is in the donor (losses, discriminators, EMA) is ignored.
    """

    name: ClassVar[str] = "merge-vae"

    vae: Annotated[Source, Param("Where the VAE comes from.", positional=True, metavar="VAE")]
    dtype: Annotated[DTypeName | None, Param("Cast the VAE to this type. The donor's own is kept unless given.")] = None
    force: Annotated[bool, Param("Take the VAE even of a family whose latents have another scale.")] = False

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`MergeVae`."""
        model, donor = identify(checkpoint), _donor(self.vae, "vae")
        target = model.components.get("vae") or _place_for_vae(checkpoint, model, donor.part)
        return _graft(self, checkpoint, model, target, donor.in_layout(target.layout))


@dataclass(frozen=True)
class Replace(Operation):
    """Replace a component by another checkpoint's, each tensor checked by name and shape.

    CLIP's position ids are no weights and stay the model's own: see fix-clip.
    """

    name: ClassVar[str] = "replace"

    component: Annotated[ComponentName, Param("Which component.")]
    donor: Annotated[
        Source,
        Param("The checkpoint, or the file of that component alone, to take it from.", flag="--from", metavar="FILE"),
    ]
    dtype: Annotated[
        DTypeName | None, Param("Cast the component to this type. The donor's own is kept unless given.")
    ] = None
    force: Annotated[bool, Param("Take a VAE even of a family whose latents have another scale.")] = False

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`Replace`."""
        model = identify(checkpoint)
        target = _component(checkpoint, model, self.component)
        return _graft(self, checkpoint, model, target, _donor(self.donor, self.component).in_layout(target.layout))


@dataclass(frozen=True)
class Extract(Operation):
    """Take components out of a model into a file of their own.

    One component loses the prefix that it has in the model, which is how loaders of single VAEs, UNets and text
    encoders want it; several keep theirs.
    """

    name: ClassVar[str] = "extract"
    whole: ClassVar[bool] = False

    component: Annotated[tuple[ComponentName, ...], Param("Which component; may be given several times.")]
    keep_prefix: Annotated[bool, Param("Keep the keys as they are in the model, for one component too.")] = False

    @property
    def label(self) -> str:  # type: ignore[override]
        """The components, as they stand in the name of the output."""
        return "-".join(self.component)

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`Extract`."""
        if not self.component:
            raise UsageError("no component is named", remedy="name one, such as vae")
        model = identify(checkpoint)
        parts = [_component(checkpoint, model, name) for name in self.component]
        prefix = parts[0].prefix if len(parts) == 1 and not self.keep_prefix else ""
        chosen = {key for part in parts for key in part.all_keys()}
        tensors: dict[str, Tensor] = {}
        changes: list[Change] = []
        for key, tensor in checkpoint.items():
            new = key.removeprefix(prefix)
            if key not in chosen:
                changes.append(Change(key, "dropped", str(tensor)))
                continue
            tensors[new] = tensor
            if new != key:
                changes.append(Change(new, "renamed", key, new))
        changes.extend(Change(entry.name, "dropped", entry.what) for entry in checkpoint.aside)
        facts = {"family": model.base_family} if model.base_family != "unknown" else {}
        step = Step(self.name, self.parameters(), tuple(changes), facts=facts)
        return without_aside(checkpoint).evolve(tensors, step, folder=_part_of_folder(checkpoint, parts, prefix))


def _part_of_folder(checkpoint: Checkpoint, parts: list[Component], prefix: str) -> Folder | None:
    """The configs of the extracted components; that of a lone one at the root."""
    if checkpoint.folder is None:
        return None
    wanted = tuple(part.prefix for part in parts)
    files = {name: data for name, data in checkpoint.folder.files.items() if name.startswith(wanted)}
    return Folder({name.removeprefix(prefix): data for name, data in files.items()})


def without_aside(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without what lay beside its state dict."""
    return replace(checkpoint, origin=replace(checkpoint.origin, aside=()) if checkpoint.origin else None)


def _fault(
    kind: type[SurgeryError], message: str, checkpoint: Checkpoint, remedy: str, key: str | None = None
) -> SurgeryError:
    file = checkpoint.path
    return kind(message, file=file, key=key, remedy=remedy)


def _component(checkpoint: Checkpoint, model: Model, name: str) -> Component:
    found = model.components.get(name)
    if found is None or not found.table:
        others = (known for known in model.components if known not in {"other", name})
        there = f"no {name} is in it" if found is None else f"its {name} is of a kind that is not known"
        message = f"{there}, but {', '.join(others) or 'nothing that is known'}; " + "; ".join(model.evidence)
        raise _fault(MismatchError, message, checkpoint, "name another file, or see what it holds: sdsurgery inspect")
    return found


@dataclass(frozen=True)
class _Donor:
    """The checkpoint that a component is taken from, the component, where it came from, and its config if any."""

    checkpoint: Checkpoint
    part: Component
    origin: Provenance
    config: Mapping[str, Any] | None = None

    def in_layout(self, layout: Layout) -> _Donor:
        """The same under the names of another layout."""
        checkpoint, part = in_layout(self.checkpoint, self.part, layout)
        return replace(self, checkpoint=checkpoint, part=part)


def _donor(source: Source, name: str) -> _Donor:
    """The donor's component, whole and in shape."""
    donor = opened(source)
    model = identify(donor)
    part = _component(donor, model, name)
    if part.missing:
        message = f"its {name} lacks {len(part.missing)} of {len(part.table)} weights: {listed(part.missing)}"
        raise _fault(MismatchError, message, donor, "name a file that has all of them", part.missing[0])
    wrong = misfits(donor, part)
    if wrong:
        message = f"its {name} has weights of the wrong shape: " + listed(
            f"{key} {list(donor[key].shape)} instead of {list(shape)}" for key, shape in wrong.items()
        )
        raise _fault(MismatchError, message, donor, "name a file whose component is sound", next(iter(wrong)))
    origin = provenance_of_vae(donor, model) if name == "vae" else Provenance()
    return _Donor(donor, part, origin, _config(donor, model, part))


def _config(donor: Checkpoint, model: Model, part: Component) -> Mapping[str, Any] | None:
    """The component's config, if anybody states one: its folder, or what is beside a file or in its metadata."""
    configs = documents(donor)
    stands_there = configs.get(part.name, configs.get(""))
    if stands_there is not None:
        return stands_there
    stated = stated_about(donor, model, None)
    return FolderFiles(donor, model, stated).config(part) if stated.configs.get(part.name) else None


def _place_for_vae(checkpoint: Checkpoint, model: Model, part: Component) -> Component:
    """Where a single-file model keeps its VAE, for one that has none."""
    unet = model.components.get("unet")
    if checkpoint.folder is not None:
        message = "its model_index.json has no VAE"
        raise _fault(MismatchError, message, checkpoint, "name a folder that has one, or a single file")
    if unet is None or model.layout != "ldm" or not isinstance(unet.config, UNetConfig) or unet.prefix == model.wrapper:
        message = f"it is no model that could hold a VAE (layout {model.layout}, family {model.family})"
        raise _fault(MismatchError, message, checkpoint, "name a single-file model")
    return Component("vae", model.wrapper + VAE_PREFIX, {}, part.table, config=part.config)


def _check_latents(model: Model, donor: _Donor, *, force: bool) -> Note:
    """Refuse a VAE whose latents have another scale; names and shapes can't tell."""
    ours, theirs = latent_space(model.base_family), latent_space(donor.origin.family)
    if ours is None or theirs is None:
        what = "the donor's" if theirs is None else "the model's"
        return Note(f"{what} family isn't known: that the VAE fits is told by names and shapes alone")
    if ours == theirs:
        return Note(f"the VAE is of {donor.origin.family}: {donor.origin.why}")
    message = (
        f"its VAE is of {donor.origin.family} ({donor.origin.why}), whose latents have another scale than those of "
        f"{model.family}: every picture would come out wrong"
    )
    if not force:
        remedy = "name a VAE of the model's family, or insist with --force"
        raise _fault(MismatchError, message, donor.checkpoint, remedy)
    return Note(message, "warning")


def _graft(
    operation: MergeVae | Replace, checkpoint: Checkpoint, model: Model, target: Component, donor: _Donor
) -> Checkpoint:
    """The checkpoint with the donor's weights in the target's place; those that are equal are left alone."""
    notes = [_check_latents(model, donor, force=operation.force)] if target.name == "vae" else []
    _check_fit(target, donor)
    weights = {
        name: replace(donor.checkpoint[key], shape=donor.part.table[name].shape)  # 1 x 1 convolutions may lie flat
        for name, key in donor.part.keys.items()
        if name != POSITION_IDS
    }
    if operation.dtype is not None:
        goal = CAST_TARGETS[operation.dtype]
        to_cast = {donor.part.keys[name]: tensor for name, tensor in weights.items() if tensor.dtype is not goal}
        remedy = "choose another --dtype, or keep the donor's own"
        notes.extend(check_values(to_cast, goal, donor.checkpoint, remedy))
        weights = {name: cast_tensor(tensor, goal) for name, tensor in weights.items()}
    tensors, changes = dict(checkpoint), []
    for name, tensor in weights.items():
        key = target.keys.get(name, target.prefix + name)
        old = checkpoint.get(key)
        if old is None:
            changes.append(Change(key, "added", None, str(tensor)))
        elif not same_bytes(old, tensor):
            changes.append(Change(key, "replaced", str(old), str(tensor)))
        else:
            continue
        tensors[key] = tensor
    facts: dict[str, Any] = {VAE_FAMILY: donor.origin.family} if donor.origin.family else {}
    folder = checkpoint.folder
    if donor.config and folder:
        folder, change = _with_config(checkpoint, folder, target, donor.config)
        changes.extend(change)
    elif donor.config:
        facts |= _settings(replace(checkpoint, tensors=tensors), target.name, donor.config)
    kept = [key for name, key in target.keys.items() if name not in weights and name != POSITION_IDS]
    if kept:
        notes.append(Note(f"{len(kept)} weights that the donor lacks stay the model's own: {listed(kept)}"))
    if not changes:
        notes.append(Note(f"the {target.name} is this one already"))
    parameters = {name: value for name, value in operation.parameters().items() if name != "force"}
    inputs = input_record(donor.checkpoint, donor.origin.sha256)
    step = Step(operation.name, parameters, tuple(changes), tuple(notes), inputs, facts)
    return checkpoint.evolve(tensors, step, folder=folder)


def _settings(checkpoint: Checkpoint, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a single file's record must keep of a config: no shape tells it."""
    model = identify(checkpoint)
    return settings_of(model.components[name], config, FolderFiles(checkpoint, model, Stated()))


def _with_config(
    checkpoint: Checkpoint, folder: Folder, target: Component, config: Mapping[str, Any]
) -> tuple[Folder, list[Change]]:
    """The folder with the donor's config, if that tells something else than the model's: no shape does."""
    own = documents(checkpoint).get(target.prefix.rstrip("/"), {})
    if all(own.get(field) == config.get(field) for field in silent_fields(target.name)):
        return folder, []
    name = target.prefix + CONFIG_NAME
    content = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    files = {**folder.files, name: InMemory(content)}
    return replace(folder, files=files), [Change(name, "replaced", "the config", "the donor's config")]


def _check_fit(target: Component, donor: _Donor) -> None:
    """Every weight of the donor's component must have the target's name and shape."""
    part = donor.part
    needed = {name for name, weight in part.table.items() if not weight.optional}
    expected = {name for name, weight in target.table.items() if not weight.optional}
    if type(part.config) is not type(target.config) or needed != expected:
        message = f"its {part.name} has another structure than the model's"
        first = next(iter(sorted(needed ^ expected)), None)
        raise _fault(MismatchError, message, donor.checkpoint, "name a file of the model's family", first)
    wrong = {
        name: weight.shape
        for name, weight in target.table.items()
        # A size of 0 is one that no weight of the model tells.
        if name in part.keys and 0 not in weight.shape and part.table[name].shape != weight.shape
    }
    if wrong:
        message = f"its {part.name} doesn't fit: " + listed(
            f"{part.keys[name]} {list(part.table[name].shape)} instead of {list(shape)}"
            for name, shape in wrong.items()
        )
        first = part.keys[next(iter(wrong))]
        raise _fault(MismatchError, message, donor.checkpoint, "name a file of the model's family and size", first)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit; reads no further than to the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.data == other.data:
        return True
    return all(left == right for left, right in _side_by_side(one, other))


def _side_by_side(one: Tensor, other: Tensor) -> Iterator[tuple[bytes, bytes]]:
    """Pieces of equal length of two tensors of equal length, whose own pieces may be of different ones."""
    streams = one.chunks(_COMPARE_CHUNK), other.chunks(_COMPARE_CHUNK)
    left = right = b""
    while True:
        left, right = left or bytes(next(streams[0], b"")), right or bytes(next(streams[1], b""))
        length = min(len(left), len(right))
        if not length:
            return
        yield left[:length], right[:length]
        left, right = left[length:], right[length:]
