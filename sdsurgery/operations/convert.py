"""convert: the same weights under the other layout's names, with everything that the other layout has besides."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

from ..checkpoint import Change, Checkpoint, Folder, Note, Step, Tensor
from ..dtypes import F32
from ..errors import UsageError
from ..models import sidecar as sidecars
from ..models import yaml_config
from ..models.components import Component
from ..models.configs import documents
from ..models.conversion import Converted, convertible, from_diffusers, from_ldm, renamed_to_current
from ..models.folder_files import FolderFiles, Prediction
from ..models.identify import Model, identify
from ..models.stated import CONFIGS, SCHEDULER, Stated, of_folder_files, silent_fields, stated_about
from ..models.walks import UNetConfig, VaeConfig
from ..sources import InMemory
from .base import Operation, Param, Source, input_record, opened
from .grafts import without_aside
from .prune import take_ema

LayoutName = Literal["ldm", "diffusers"]
PredictionType = Literal["epsilon", "v_prediction"]
ConfigSource = str | os.PathLike[str]


@dataclass(frozen=True)
class Convert(Operation):
    """Convert between the single-file layout (ldm) and diffusers, bit for bit.

    Whole models and lone components, SD1, SD2, SDXL and its refiner, with their inpainting, pix2pix and depth
    variants. What the target can't hold is named, and kept by a sidecar; what shapes don't tell comes from --config,
    from a config or .yaml beside the file, from the metadata, or else is assumed and said so.
    """

    name: ClassVar[str] = "convert"
    label = "converted"

    to: Annotated[LayoutName, Param("The layout to convert to.", positional=True)]
    config: Annotated[
        ConfigSource | None,
        Param(
            "What shapes don't tell, from a diffusers folder, a component's config.json, or an A1111 .yaml.",
            metavar="FILE",
        ),
    ] = None
    prediction_type: Annotated[
        PredictionType | None, Param("What the UNet predicts. Detected unless given, or assumed and said so.")
    ] = None
    ema: Annotated[bool, Param("Take the EMA weights as the UNet.")] = False
    sidecar: Annotated[
        Source | None,
        Param("Restore the original with what this sidecar kept of it; to ldm only.", metavar="FILE"),
    ] = None

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`Convert`."""
        if self.sidecar is not None and self.to != "ldm":
            raise UsageError("a sidecar is what a single file is restored with", remedy="leave it out")
        model = identify(checkpoint)
        stated = stated_about(checkpoint, model, self.config)
        if self.prediction_type:
            stated = Stated(prediction_type=self.prediction_type, why="as told").over(stated)
        if stated.whole:
            model = identify(checkpoint, stated.structures(model))
        changes: list[Change] = []
        source = checkpoint
        if self.ema:
            tensors = dict(checkpoint)
            changes = take_ema(checkpoint, model, tensors)
            source = replace(checkpoint, tensors=tensors)
        convertible(source, model)
        if self.to == "diffusers":
            return self._to_diffusers(source, model, stated, changes)
        return self._to_ldm(source, model, stated, changes)

    def _to_diffusers(self, checkpoint: Checkpoint, model: Model, stated: Stated, changes: list[Change]) -> Checkpoint:
        converted = from_ldm(checkpoint, model) if model.layout == "ldm" else renamed_to_current(checkpoint, model)
        folder, notes = checkpoint.folder, []
        if folder is None:
            files = FolderFiles(checkpoint, model, stated)
            folder = Folder({name: InMemory(content) for name, content in files.files().items()})
            notes = [*files.notes, Note(f"written beside the weights: {', '.join(sorted(folder.files))}")]
        elif not converted.changes:
            notes = [Note("it is in diffusers' layout already")]
        return self._result(checkpoint, converted, changes, notes, folder=folder)

    def _to_ldm(self, checkpoint: Checkpoint, model: Model, stated: Stated, changes: list[Change]) -> Checkpoint:
        if model.layout == "ldm":
            if self.sidecar is not None:
                raise UsageError("it is in ldm's layout already, and no sidecar restores it", remedy="leave it out")
            step = Step(self.name, self.parameters(), tuple(changes), (Note("it is in ldm's layout already"),))
            return checkpoint.evolve(checkpoint.tensors, step)
        stated = stated.over(of_folder_files(checkpoint))
        converted = from_diffusers(checkpoint, model)
        single = Checkpoint(converted.tensors)
        files = FolderFiles(single, identify(single), Stated())
        facts = _unheld(checkpoint, files, stated)
        family = files.model.base_family
        prediction = FolderFiles(single, files.model, stated).prediction
        if family == "sdxl":
            _mark(converted, prediction)
        companions = _yaml(files, stated, prediction)
        if self.sidecar is not None:
            return self._restored(checkpoint, converted, opened(self.sidecar), companions)
        notes = [Note(f"{name} is kept in the metadata: no shape tells it") for name in facts]
        notes += [_companion_note(suffix) for suffix in companions]
        return self._result(checkpoint, converted, changes, notes, facts, folder=None, companions=companions)

    def _restored(
        self,
        checkpoint: Checkpoint,
        converted: Converted,
        sidecar: Checkpoint,
        companions: Mapping[str, InMemory],
    ) -> Checkpoint:
        found = sidecars.restore(converted.tensors, sidecar)
        kept = [change for change in converted.changes if change.kind == "renamed" and change.key in found.tensors]
        added = [Change(key, "added", None, f"{sidecar[key]}, from the sidecar") for key in sidecar]
        if found.exact:
            note = Note("with the sidecar it is the original again, bit for bit")
        else:
            message = "the weights are no longer those that the sidecar was written for: the original isn't restored"
            note = Note(message, "warning")
        notes = (*converted.notes[:1], note, *map(_companion_note, companions))
        step = Step(self.name, self.parameters(), (*kept, *added), notes, input_record(sidecar))
        result = without_aside(checkpoint).evolve(
            found.tensors, step, folder=None, metadata=found.metadata, companions=companions
        )
        return replace(result, header=found.header, as_it_was=found.exact)

    def _result(
        self,
        checkpoint: Checkpoint,
        converted: Converted,
        changes: list[Change],
        notes: list[Note],
        facts: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Checkpoint:
        dropped = [Change(entry.name, "dropped", entry.what) for entry in checkpoint.aside]
        step = Step(
            self.name,
            self.parameters(),
            (*changes, *converted.changes, *dropped),
            (*converted.notes, *notes),
            facts=facts or {},
        )
        return without_aside(checkpoint).evolve(converted.tensors, step, **fields)


def _companion_note(suffix: str) -> Note:
    return Note(f"a {suffix} of the same name is written beside it, which A1111's webui needs for such a model")


def sidecar_of(original: Checkpoint, converted: Checkpoint) -> Checkpoint:
    """What a diffusers folder doesn't hold of the single file it was made from; to be saved beside it.

    Args:
        original: As it was opened.
        converted: What :class:`Convert` made of it, and nothing else.
    """
    back = from_diffusers(converted, identify(converted))
    return sidecars.make(original, back.tensors)


def _unheld(checkpoint: Checkpoint, files: FolderFiles, stated: Stated) -> dict[str, Any]:
    """What the folder's configs say and nobody would assume of the single file."""
    facts: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    stand_there = documents(checkpoint)
    for name, component in files.model.networks.items():
        said = stand_there.get(name, stand_there.get("", {}))
        configs[name] = _unlike(silent_fields(name), said, files.config(component))
    if len(files.model.networks) > 1:
        for name, assumed in files.sides().items():
            configs[name] = _unlike(assumed, stated.configs.get(name, {}), assumed)
        scheduler = {field: value for field, value in (stated.scheduler or {}).items() if field != "_diffusers_version"}
        if scheduler and {"prediction_type": "epsilon"} | scheduler != files.scheduler():
            facts[SCHEDULER] = scheduler
    if any(configs.values()):
        facts[CONFIGS] = {name: fields for name, fields in configs.items() if fields}
    return facts


def _unlike(defaults: Mapping[str, Any], said: Mapping[str, Any], assumed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that mean another thing than what would be assumed; one that it lacks has its default."""
    fields = {field: said.get(field, default) for field, default in defaults.items()}
    return {field: value for field, value in fields.items() if value != assumed.get(field, defaults[field])}


def _mark(converted: Converted, prediction: Prediction) -> None:
    """The markers by which loaders of SDXL's single files know what the UNet predicts."""
    marks = {"v_pred": prediction.type == "v_prediction", "ztsnr": prediction.zero_snr}
    for key in (key for key, holds in marks.items() if holds):
        tensor = Tensor(F32, (0,), InMemory(b""))
        converted.tensors[key] = tensor
        converted.changes.append(Change(key, "added", None, str(tensor)))


def _yaml(files: FolderFiles, stated: Stated, prediction: Prediction) -> dict[str, InMemory]:
    """The webui's config, for the models that it doesn't draw rightly without."""
    model = files.model
    family, variant = model.base_family, model.family.removeprefix(model.base_family)
    unet, vae = model.components.get("unet"), model.components.get("vae")
    needed = family == "sd2" or (family == "sd1" and (variant or prediction.type == "v_prediction"))
    if not needed or unet is None or vae is None or len(model.networks) < 2:
        return {}
    if prediction.type not in get_args(PredictionType):  # the webui knows no other
        return {}
    assert isinstance(unet.config, UNetConfig)  # noqa: S101 - for the type checker
    assert isinstance(vae.config, VaeConfig)  # noqa: S101
    heads = _said(files, stated, unet)["attention_head_dim"]
    first = heads[0] if isinstance(heads, list) else heads
    networks = yaml_config.Networks(
        unet=unet.config,
        vae=vae.config,
        num_heads=heads if isinstance(heads, int) else None,
        num_head_channels=None if isinstance(heads, int) else unet.config.channels[0] // first,
        scale_factor=_said(files, stated, vae)["scaling_factor"],
    )
    text = yaml_config.write(family, variant, prediction.type, networks)
    return {".yaml": InMemory(text.encode())}


def _said(files: FolderFiles, stated: Stated, component: Component) -> dict[str, Any]:
    return files.config(component) | dict(stated.configs.get(component.name, {}))
