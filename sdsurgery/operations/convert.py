"""convert: the same weights under the other layout's names, with everything that the other layout has besides."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ..checkpoint import AsideFile, Change, Checkpoint, Folder, Note, Step, Unread
from ..containers.folders import is_lone
from ..dtypes import CAST_TARGETS
from ..errors import UsageError
from ..models import sidecar as sidecars
from ..models.configs import MAX_DOCUMENT
from ..models.conversion import Converted, convertible, from_diffusers, from_ldm, renamed_to_current
from ..models.folder_files import INDEX_NAME, FolderFiles
from ..models.folder_repair import completed, missing_files
from ..models.identify import Model, identify
from ..models.single_file import mark, unheld_settings, webui_config
from ..models.stated import CONFIGS, SCHEDULER, Stated, of_folder_files, recorded, stated_about
from ..sources import InMemory
from .base import Operation, Param, Source, input_record, opened
from .cast import DTypeName
from .grafts import without_aside
from .prune import take_ema

if TYPE_CHECKING:
    from ..graphs.files import Graphs

LayoutName = Literal["ldm", "diffusers", "onnx"]
WeightsName = Literal["shared", "external", "embedded"]
GraphLayout = Literal["optimum", "diffusers-onnx"]
PredictionType = Literal["epsilon", "v_prediction"]
ConfigSource = str | os.PathLike[str]


@dataclass(frozen=True)
class Convert(Operation):
    """Convert between the single-file layout (ldm), diffusers and ONNX, bit for bit.

    Whole models and lone components, SD1, SD2, SDXL and its refiner, with their inpainting, pix2pix and depth
    variants. What the target can't hold is named, and kept by a sidecar; what shapes don't tell comes from --config,
    from a config or .yaml beside the file, from the metadata, or else is assumed and said so.
    """

    name: ClassVar[str] = "convert"
    keeps_container: ClassVar[bool] = False
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
    weights: Annotated[
        WeightsName | None,
        Param(
            "Where ONNX graphs have their weights: in the safetensors files that diffusers reads (shared, unless "
            "given), in a file of data beside each graph (external), or within the graphs (embedded)."
        ),
    ] = None
    layout: Annotated[
        GraphLayout | None,
        Param("Who runs the graphs: optimum's pipelines, unless given, or diffusers' OnnxStableDiffusionPipeline."),
    ] = None
    opset: Annotated[int | None, Param("Of ONNX's operators, 17 to 23; 23 unless given.", metavar="NUMBER")] = None
    compute: Annotated[
        DTypeName | None,
        Param("The type that graphs compute in. That of the weights unless given, but fp32 for SDXL's VAE decoder."),
    ] = None
    no_hard_links: Annotated[
        bool, Param("Copy shared weights of the VAE for its two graphs, rather than give one file three names.")
    ] = False

    optimize: Annotated[
        bool,
        Param(
            "Draw ONNX Runtime's own operators, those that its transformer optimizer fuses others into. Nothing else "
            "runs such graphs."
        ),
    ] = False

    @property
    def configs_read(self) -> tuple[Path, ...]:
        """What is named with ``config``."""
        return (Path(self.config),) if self.config else ()

    def check(self) -> None:
        """Refuse options of another target."""
        if self.sidecar is not None and self.to != "ldm":
            raise UsageError("a sidecar is what a single file is restored with", remedy="leave it out")
        of_graphs = (self.weights, self.layout, self.opset, self.compute, self.no_hard_links, self.optimize)
        if self.to != "onnx" and any(of_graphs):
            raise UsageError(
                "only ONNX graphs are told how to be made", remedy="leave the option out, or convert to onnx"
            )

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`Convert`."""
        self.check()
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
        if self.to == "ldm":
            return self._to_ldm(source, model, stated, changes)
        result = self._to_diffusers(source, model, stated, changes)
        return self._with_graphs(result, model) if self.to == "onnx" else result

    def _with_graphs(self, checkpoint: Checkpoint, model: Model) -> Checkpoint:
        """The folder with graphs, which are drawn when it is written."""
        from ..graphs.files import Graphs
        from ..graphs.networks import Style

        interface: Literal["optimum", "diffusers"] = "diffusers" if self.layout == "diffusers-onnx" else "optimum"
        compute = CAST_TARGETS[self.compute] if self.compute else None
        opset = {} if self.opset is None else {"opset": self.opset}
        style = Style(interface=interface, compute=compute, family=model.base_family, fused=self.optimize, **opset)
        graphs = Graphs(style, self.weights or "shared", hard_links=not self.no_hard_links)
        assert checkpoint.folder is not None  # noqa: S101 - for the type checker: it was made a folder
        step = checkpoint.steps[-1]
        step = replace(step, notes=(*step.notes, *map(Note, _said_of_graphs(graphs))))
        folder = replace(checkpoint.folder, graphs=graphs)
        return replace(checkpoint, folder=folder, steps=(*checkpoint.steps[:-1], step))

    def _to_diffusers(self, checkpoint: Checkpoint, model: Model, stated: Stated, changes: list[Change]) -> Checkpoint:
        converted = from_ldm(checkpoint, model) if model.layout == "ldm" else renamed_to_current(checkpoint, model)
        folder, notes = checkpoint.folder, []
        if folder is not None and (self.config or self.prediction_type):
            raise UsageError("a folder states all of that itself", remedy="mend its configs, and leave the option out")
        if folder is None:
            files = FolderFiles(checkpoint, model, stated)
            folder = Folder({name: InMemory(content) for name, content in files.files().items()})
            notes = [*files.notes, Note(f"written beside the weights: {', '.join(sorted(folder.files))}")]
        else:
            folder, notes = _completed(_without_graphs(checkpoint), model, changes)
            if not converted.changes and not changes:
                notes = [Note("it is in diffusers' layout already"), *notes]
        return self._result(checkpoint, converted, changes, notes, folder=folder)

    def _to_ldm(self, checkpoint: Checkpoint, model: Model, stated: Stated, changes: list[Change]) -> Checkpoint:
        if model.layout == "ldm":
            if self.sidecar or self.config or self.prediction_type:
                message = "it is in ldm's layout already: there is nothing to restore, and nothing to state"
                raise UsageError(message, remedy="leave the option out")
            step = Step(self.name, self.parameters(), tuple(changes), (Note("it is in ldm's layout already"),))
            return checkpoint.evolve(checkpoint.tensors, step)
        stated = stated.over(of_folder_files(checkpoint))
        converted = from_diffusers(checkpoint, model)
        single = Checkpoint(converted.tensors)
        files = FolderFiles(single, identify(single), Stated())
        facts = unheld_settings(checkpoint, files, stated)
        family = files.model.base_family
        prediction = FolderFiles(single, files.model, stated).prediction
        if family == "sdxl":
            mark(converted, prediction, stated)
        companions = webui_config(files, stated, prediction)
        if self.sidecar is not None:
            return self._restored(checkpoint, converted, opened(self.sidecar), facts, companions)
        notes = _fact_notes(facts)
        gone, warnings = _files_that_go(checkpoint, files)
        converted.changes.extend(gone)
        notes.extend(warnings)
        notes += [_companion_note(suffix) for suffix in companions]
        return self._result(checkpoint, converted, changes, notes, facts, folder=None, companions=companions)

    def _restored(
        self,
        checkpoint: Checkpoint,
        converted: Converted,
        sidecar: Checkpoint,
        facts: Mapping[str, Any],
        companions: Mapping[str, InMemory],
    ) -> Checkpoint:
        found = sidecars.restore(converted.tensors, sidecar)
        kept = [change for change in converted.changes if change.kind == "renamed" and change.key in found.tensors]
        added = [
            Change(key, "added", None, f"{tensor}, from the sidecar")
            for key, tensor in sidecar.items()
            if key in found.tensors and found.tensors[key].data == tensor.data
        ]
        notes = [*converted.notes[:1], *map(_companion_note, companions)]
        if not found.changed:
            notes.append(Note("with the sidecar it is the original again, bit for bit"))
            if facts and not _stands_in(found.metadata, facts):
                message = f"the folder's settings ({', '.join(facts)}) aren't those of the original, which holds none"
                notes.append(Note(message + ": convert without the sidecar to keep them", "warning"))
            facts = {}
        else:
            notes += _fact_notes(facts)
            message = f"not the original: its {', '.join(found.changed)} changed since the sidecar was written"
            gone = f"; of that, {len(found.left_out)} tensors in the sidecar are left out" if found.left_out else ""
            notes.append(Note(message + gone, "warning"))
        step = Step(self.name, self.parameters(), (*kept, *added), tuple(notes), input_record(sidecar), facts)
        result = without_aside(checkpoint).evolve(
            found.tensors, step, folder=None, metadata=found.metadata, companions=companions
        )
        return replace(result, header=found.header, as_it_was=not found.changed)

    def _result(
        self,
        checkpoint: Checkpoint,
        converted: Converted,
        changes: list[Change],
        notes: list[Note],
        facts: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Checkpoint:
        dropped = [
            (Unread if isinstance(entry, AsideFile) else Change)(entry.name, "dropped", entry.what)
            for entry in checkpoint.aside
        ]
        step = Step(
            self.name,
            self.parameters(),
            (*changes, *converted.changes, *dropped),
            (*converted.notes, *notes),
            facts=facts or {},
        )
        return without_aside(checkpoint).evolve(converted.tensors, step, **fields)


def _said_of_graphs(graphs: Graphs) -> Iterator[str]:
    if graphs.weights == "shared":
        how = "hard-linked" if graphs.hard_links else "copied"
        yield "graphs and diffusers share the weights"
        yield f"the VAE's file lies in three folders, {how} where the file system can't share bytes between files"
    else:
        yield f"the weights are {graphs.weights}: diffusers' own pipelines can't load the folder"
    if graphs.style.fused:
        yield "the graphs have operators of ONNX Runtime's own: nothing else runs them"
    if graphs.style.family.startswith("sdxl") and graphs.style.compute is None:
        yield "the VAE computes in fp32, because SDXL's overflows in fp16: --compute says otherwise"


def _without_graphs(checkpoint: Checkpoint) -> Checkpoint:
    """A folder without its graphs, and without an index that may speak of them."""
    folder = checkpoint.folder
    if folder is None or folder.graphs is None:
        return checkpoint
    files = {name: data for name, data in folder.files.items() if name != INDEX_NAME}
    return replace(checkpoint, folder=replace(folder, files=files, graphs=None))


def _completed(checkpoint: Checkpoint, model: Model, changes: list[Change]) -> tuple[Folder | None, list[Note]]:
    """The folder with the configs and tokenizer files that it lacks."""
    folder = checkpoint.folder
    if folder is None or is_lone(checkpoint) or model.family == "unknown":
        return folder, []
    missing, notes = missing_files(checkpoint, model)
    for each in missing:
        if each.content is None:
            wrong = f"can't be loaded ({each.wrong})" if each.wrong else "is missing"
            notes.append(Note(f"{each.name} {wrong}, and isn't CLIP's", "warning", each.name))
        else:
            was = f"{folder.files[each.name].nbytes:,} bytes" if each.name in folder.files else None
            changes.append(Change(each.name, "replaced" if was else "added", was, f"{len(each.content):,} bytes"))
    return replace(folder, files=completed(folder.files, missing)), notes


def _files_that_go(checkpoint: Checkpoint, files: FolderFiles) -> tuple[list[Change], list[Note]]:
    """The files of a folder that converting back wouldn't make, and a warning where it would make other ones."""
    made = files.files() if files.model.networks else {}
    there = checkpoint.folder.files if checkpoint.folder else {}
    gone = [Change(name, "dropped", "a file of the folder") for name in there if name not in made]
    other = [
        name
        for name, data in there.items()
        if name.endswith((_VOCABULARY, _MERGES))
        and name in made
        and (data.nbytes > MAX_DOCUMENT or _tokens(b"".join(data.chunks())) != _tokens(made[name]))
    ]
    message = "isn't CLIP's: a single file holds no tokenizer, and loaders will take CLIP's"
    return gone, [Note(f"{name} {message}", "warning", name) for name in other]


_VOCABULARY, _MERGES = "vocab.json", "merges.txt"


def _tokens(content: bytes) -> Any:
    """What a file of a tokenizer says, however it is laid out."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return [line for line in content.decode("utf-8", "replace").splitlines() if line and line[:9] != "#version:"]


def _stands_in(metadata: Mapping[str, str], facts: Mapping[str, Any]) -> bool:
    """Whether a file's record tells just these facts."""
    told = recorded(Checkpoint({}, metadata))
    kept = {CONFIGS: told.configs, SCHEDULER: told.scheduler}
    return all(kept[name] == fact for name, fact in facts.items())


def _fact_notes(facts: Mapping[str, Any]) -> list[Note]:
    return [Note(f"{name} is kept in the metadata: no shape tells it") for name in facts]


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
