"""A model's weights from one layout to the other: what each becomes, what the target can't hold, what is made.

Nothing is left to chance: a missing or misshapen weight is refused by name, and so is one too many in a diffusers
folder, which loaders there take without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..checkpoint import Change, Checkpoint, Note, Tensor
from ..errors import MismatchError
from ..wording import listed
from .components import POSITION_IDS, Component
from .identify import UNET_PREFIX, VAE_PREFIX, Model, foreign_parts
from .position_ids import diagnose, positions, right_ids
from .translation import fits, to_diffusers, to_ldm
from .walks import ClipConfig, Layout, Link, OpenClipConfig, links, walk

_LARGEST_TRANSPOSED = 256 << 20
"""Bytes of the largest matrix that is transposed, which is done in memory; real ones take three million."""

_TEXT_PREFIXES: Mapping[tuple[str, str], str] = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
    ("sdxl-refiner", "text_encoder_2"): "conditioner.embedders.0.model.",
}
"""Where a family's single files keep its text encoders."""


@dataclass
class Converted:
    """The weights in the other layout, and what became of each.

    Attributes:
        tensors: By their new keys.
        changes: Every weight that was renamed, added or dropped.
        notes: What a person should know.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def put(self, key: str, tensor: Tensor, *sources: str) -> None:
        """A weight under its new key, made of those."""
        self.tensors[key] = tensor
        if sources != (key,):
            self.changes.append(Change(key, "renamed", " + ".join(sources), key))

    def drop(self, checkpoint: Checkpoint, key: str, why: str) -> None:
        """A tensor that the target can't hold."""
        self.changes.append(Change(key, "dropped", f"{checkpoint[key]}: {why}"))


def convertible(checkpoint: Checkpoint, model: Model) -> None:
    """Refuse what isn't a whole model, or one component of it, of a known family.

    Raises:
        MismatchError: Naming what is wrong, and with which key.
    """
    networks = model.networks
    unknown = [name for name, found in networks.items() if not found.table]
    foreign = foreign_parts(checkpoint)
    if foreign or unknown or not networks or (len(networks) > 1 and model.family == "unknown"):
        what = f"its {unknown[0]} is of no known kind" if unknown else "it is no model of a known family"
        message = f"{what}; " + "; ".join(model.evidence)
        remedy = "see what it holds: sdsurgery inspect; it was left as it is"
        raise MismatchError(message, file=checkpoint.path, remedy=remedy)
    for name, found in networks.items():
        _check_whole(checkpoint, name, found)


def _check_whole(checkpoint: Checkpoint, name: str, component: Component) -> None:
    if component.missing:
        message = f"its {name} lacks {len(component.missing)} of {len(component.table)} weights: "
        raise MismatchError(
            message + listed(component.missing),
            file=checkpoint.path,
            key=component.missing[0],
            remedy="take them from a sound model: sdsurgery replace",
        )
    for key, link in _by_name(component).items():
        if link.how == "transpose" and checkpoint[key].nbytes > _LARGEST_TRANSPOSED:
            message = f"{key} is {checkpoint[key]}, larger than any text encoder's"
            raise MismatchError(message, file=checkpoint.path, key=key, remedy="take it from a sound model")
    wrong = misfits(checkpoint, component)
    if wrong:
        shapes = (f"{key} {list(checkpoint[key].shape)} instead of {list(shape)}" for key, shape in wrong.items())
        raise MismatchError(
            f"its {name} has weights of the wrong shape: " + listed(shapes),
            file=checkpoint.path,
            key=next(iter(wrong)),
            remedy="take the component from a sound model: sdsurgery replace; or state its config with --config",
        )
    extra = [key for key in component.stray if not key.endswith("position_ids")]
    if component.layout == "diffusers" and extra:
        raise MismatchError(
            f"its {name} has {len(extra)} weights that its config knows nothing of: " + listed(extra),
            file=checkpoint.path,
            key=extra[0],
            remedy="remove them, or mend the config",
        )


def misfits(checkpoint: Checkpoint, component: Component) -> dict[str, tuple[int, ...]]:
    """Keys whose shape is wrong, with the right one; a 1 x 1 convolution passes for a linear layer."""
    by_name = _by_name(component)
    wrong = component.misshapen(checkpoint.tensors)
    # The shape of what diffusers leaves out matters to nobody.
    return {
        key: shape
        for key, shape in wrong.items()
        if by_name[key].diffusers and not fits(by_name[key], checkpoint[key], shape)
    }


def _by_name(component: Component) -> dict[str, Link]:
    """The link of each key that the component has."""
    assert component.config is not None  # noqa: S101 - for the type checker: convertible() asks for tables
    found: dict[str, Link] = {}
    for link in links(component.config):
        for weight in (link.ldm,) if component.layout == "ldm" else link.diffusers:
            if weight.name in component.keys:
                found[component.keys[weight.name]] = link
    return found


# ---------------------------------------------------------------- ldm -> diffusers


def from_ldm(checkpoint: Checkpoint, model: Model) -> Converted:
    """The weights under diffusers' names; with prefixes such as ``unet/`` unless there is but one component."""
    result = _begun(model)
    networks = model.networks
    for name, component in networks.items():
        prefix = "" if len(networks) == 1 else name + "/"
        _component_from_ldm(checkpoint, component, prefix, result)
        for key in component.stray:
            result.drop(checkpoint, key, f"unknown in a {name}")
    _drop_others(checkpoint, model, "diffusers", result)
    _tell_of_ids(checkpoint, model, result)
    return result


def _component_from_ldm(checkpoint: Checkpoint, component: Component, prefix: str, result: Converted) -> None:
    assert component.config is not None  # noqa: S101 - for the type checker
    for link in links(component.config):
        key = component.keys.get(link.ldm.name)
        if key is None:
            continue
        if not link.diffusers:
            result.drop(checkpoint, key, f"diffusers has no place for it in the {component.name}")
        for weight, tensor in zip(link.diffusers, to_diffusers(link, checkpoint[key]), strict=False):
            result.put(prefix + weight.name, tensor, key)
    if POSITION_IDS in component.keys:
        result.drop(checkpoint, component.keys[POSITION_IDS], "position ids, which transformers makes by itself")


def _tell_of_ids(checkpoint: Checkpoint, model: Model, result: Converted) -> None:
    """Loaders of ldm files honour wrong ids, those of folders don't: the two draw different pictures."""
    found = diagnose(checkpoint, model)
    if found.wrong or found.status == "wrong-shape":
        message = (
            f"the file's position ids are wrong ({found.status}), and the folder has the right ones: the two draw "
            "different pictures; mend the file with: sdsurgery fix-clip"
        )
        result.notes.append(Note(message, "warning", found.key))


# ---------------------------------------------------------------- diffusers -> diffusers


def renamed_to_current(checkpoint: Checkpoint, model: Model) -> Converted:
    """A diffusers model under today's names: text encoders with ``text_model.``, the VAE's attention as since 0.17."""
    result = Converted()
    current = {
        key: (component.prefix.removeprefix(model.wrapper) + name, component.table[name].shape)
        for component in model.networks.values()
        for name, key in component.keys.items()
        if name != POSITION_IDS
    }
    ids = {key for component in model.networks.values() for key in component.all_keys()} - current.keys()
    for key, tensor in checkpoint.items():
        name, shape = current.get(key, (key, tensor.shape))
        if key in ids:
            result.drop(checkpoint, key, "position ids, which transformers makes by itself")
        elif tensor.shape != shape:  # a 1 x 1 convolution where diffusers has a linear layer
            result.tensors[name] = Tensor(tensor.dtype, shape, tensor.data)
            result.changes.append(Change(key, "replaced", str(tensor), str(result.tensors[name])))
        elif key in current or checkpoint.folder:
            result.put(name, tensor, key)
    if checkpoint.folder is None:
        _drop_others(checkpoint, model, "diffusers", result)
    return result


# ---------------------------------------------------------------- diffusers -> ldm


def from_diffusers(checkpoint: Checkpoint, model: Model) -> Converted:
    """The weights under ldm's names and prefixes; a lone component has none."""
    result = _begun(model)
    for name, component in model.networks.items():
        prefix = ldm_prefix(model, component)
        _component_from_diffusers(checkpoint, component, prefix, result)
        for key in component.stray:
            result.drop(checkpoint, key, "stray position ids")
        if isinstance(component.config, ClipConfig):
            _add_ids(checkpoint, component, prefix, model, result)
        if isinstance(component.config, OpenClipConfig) and component.config.penultimate:
            result.notes.append(Note(f"{name}: the layer and the projection that diffusers leaves out can't be made"))
    _drop_others(checkpoint, model, "a single file", result)
    return result


def ldm_prefix(model: Model, component: Component) -> str:
    """What stands before a component's names in a single file of the model's family."""
    if not component.prefix.removeprefix(model.wrapper):
        return ""
    if component.name in {"unet", "vae"}:
        return UNET_PREFIX if component.name == "unet" else VAE_PREFIX
    return _TEXT_PREFIXES.get((model.base_family, component.name), "")


def _component_from_diffusers(checkpoint: Checkpoint, component: Component, prefix: str, result: Converted) -> None:
    assert component.config is not None  # noqa: S101 - for the type checker
    for link in links(component.config):
        keys = [component.keys[weight.name] for weight in link.diffusers if weight.name in component.keys]
        if not keys:
            continue
        if link.ldm.name == "text_projection.weight":
            result.drop(checkpoint, keys[0], "ldm's CLIP text encoder has no projection")
            continue
        tensors = [checkpoint[key] for key in keys]
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise MismatchError(
                f"ldm keeps {', '.join(keys)} in one tensor, and they are of different types",
                file=checkpoint.path,
                key=keys[0],
                remedy="cast them to one type first: sdsurgery cast",
            )
        result.put(prefix + link.ldm.name, to_ldm(link, tensors), *keys)


def _add_ids(checkpoint: Checkpoint, component: Component, prefix: str, model: Model, result: Converted) -> None:
    key, old = prefix + POSITION_IDS, component.keys.get(POSITION_IDS)
    ids = right_ids(positions(model))
    if old is None:
        result.tensors[key] = ids
        result.changes.append(Change(key, "added", None, str(ids)))
    elif diagnose(checkpoint, model).status == "unexpected":  # which are right
        result.put(key, checkpoint[old], old)
    else:
        result.tensors[key] = ids
        result.changes.append(Change(key, "replaced", f"{old} {checkpoint[old]}", str(ids)))


# ---------------------------------------------------------------- one component


def in_layout(checkpoint: Checkpoint, component: Component, layout: Layout) -> tuple[Checkpoint, Component]:
    """A whole component in another layout, in a checkpoint of its own under its own names.

    What the layout has no place for is left out: the model that takes the component in keeps its own of that.
    """
    result = Converted()
    if component.layout == layout or component.config is None:
        return checkpoint, component
    convert = _component_from_ldm if layout == "diffusers" else _component_from_diffusers
    convert(checkpoint, component, "", result)
    table = {weight.name: weight for weight in walk(component.config, layout)}
    keys = {name: name for name in result.tensors}
    moved = Component(component.name, "", keys, table, (), component.config, layout)
    return replace(checkpoint, tensors=result.tensors), moved


# ---------------------------------------------------------------- both


def _begun(model: Model) -> Converted:
    counts = (f"{name} {len(found.keys)}" for name, found in model.networks.items())
    return Converted(notes=[Note(f"converted: {', '.join(counts)} tensors")])


def _drop_others(checkpoint: Checkpoint, model: Model, target: str, result: Converted) -> None:
    """EMA, schedule buffers, markers and unknown tensors, and what lay beside the state dict."""
    for name, component in model.components.items():
        if name in model.networks:
            continue
        keys = list(component.all_keys())
        for key in keys:
            result.drop(checkpoint, key, f"{name}, which {target} doesn't hold")
        nbytes = sum(checkpoint[key].nbytes for key in keys)
        result.notes.append(Note(f"not held by {target}: {name}, {len(keys)} tensors, {nbytes:,} bytes"))
