"""What somebody states about a model that its shapes don't tell: prediction type, heads, norm groups, latent scale.

In the order in which they count: an option, a config that the user names, a config beside the file, our own record in
the metadata. What nobody states is assumed to be as the family's published models have it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import history
from ..checkpoint import Checkpoint
from ..errors import InputError, MismatchError, UnsupportedError
from ..sources import SourceFile
from . import yaml_config
from .configs import (
    CONFIG_NAME,
    MAX_DOCUMENT,
    NETWORKS,
    SCHEDULER_CONFIG_NAME,
    component_of,
    described,
    documents,
    read_document,
    structure,
)
from .identify import Model, identify
from .walks import Config, OpenClipConfig, UNetConfig

_NAME_ITS_OWN = "name the model's own config"

CONFIGS = "configs"
SCHEDULER = "scheduler"
"""The facts of a step that keep, in a single file, what a folder's configs said."""

INDEX = "model_index"
_SIDE_FILES: Mapping[str, str] = {
    INDEX: "model_index.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "tokenizer_2": "tokenizer_2/tokenizer_config.json",
}

SILENT_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "act_fn": "silu", "addition_time_embed_dim": None, "attention_head_dim": 8, "center_input_sample": False,
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
        "norm_eps": 1e-5, "norm_num_groups": 32, "num_attention_heads": None, "sample_size": None,
        "upcast_attention": False,
    },
    "vae": {
        "act_fn": "silu", "force_upcast": True, "latents_mean": None, "latents_std": None, "norm_num_groups": 32,
        "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None,
    },
    "text_encoder": {
        "bos_token_id": 49406, "eos_token_id": 49407, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "num_attention_heads": 8, "pad_token_id": 1, "projection_dim": 512,
    },
    "tokenizer": {"pad_token": None},
    INDEX: {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False},
}  # fmt: skip
"""The fields of a part's config that no shape tells and that change what it computes, or how it is used.

With the value that diffusers and transformers take where a config lacks the field.
"""


@dataclass(frozen=True)
class Stated:
    """What is stated.

    Attributes:
        configs: Fields by component; those of tokenizers and of the pipeline's index, too.
        whole: Components whose config is a whole one, which tells their structure too.
        scheduler: A scheduler's config.
        prediction_type: ``epsilon`` or ``v_prediction``.
        head_channels: The width of an attention head of the UNet, where that is what was stated.
        why: Who states the prediction type, in words.
        ignored: What lies beside the file and could not be read, with the reason.
    """

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    scheduler: Mapping[str, Any] | None = None
    prediction_type: str | None = None
    head_channels: int | None = None
    why: str = ""
    ignored: tuple[str, ...] = ()

    def over(self, other: Stated) -> Stated:
        """Both, with this one counting where they differ."""
        names = {*self.configs, *other.configs}
        first = self if self.prediction_type else other
        return Stated(
            {name: {**other.configs.get(name, {}), **self.configs.get(name, {})} for name in names},
            self.whole | other.whole,
            self.scheduler or other.scheduler,
            first.prediction_type,
            self.head_channels or other.head_channels,
            first.why,
            (*self.ignored, *other.ignored),
        )

    def structures(self, model: Model, source: Path | None = None) -> dict[str, Config]:
        """The structure of each component that a whole config tells; an error names the file in the source."""
        told: dict[str, Config] = {}
        for name in self.whole & model.components.keys():
            open_clip = isinstance(model.components[name].config, OpenClipConfig)
            file = str(_config_in(source, name)) if source else ""
            told[name] = structure(name, self.configs[name], file, open_clip=open_clip)
        return told

    def check(self, model: Model, file: str = "") -> None:
        """Refuse values that nothing can be built of: what is stated here ends up in a folder's configs.

        Raises:
            InputError: Names the field.
        """
        for name, found in model.networks.items():
            if name in self.configs and found.config is not None:
                fields = {**described(found.config), **self.configs[name]}
                structure(name, fields, file, open_clip=isinstance(found.config, OpenClipConfig))


def _config_in(source: Path, name: str) -> Path:
    """The file that tells of a component, in what somebody named: it, or the folder that has it."""
    return source / name / CONFIG_NAME if source.is_dir() else source


def silent_fields(part: str) -> Mapping[str, Any]:
    """See :data:`SILENT_FIELDS`."""
    return SILENT_FIELDS[part.removesuffix("_2")]


def stated_about(checkpoint: Checkpoint, model: Model, config: str | os.PathLike[str] | None) -> Stated:
    """Everything that is stated about a checkpoint.

    Args:
        checkpoint: The checkpoint.
        model: What it holds.
        config: What the user names: a diffusers folder, a component's ``config.json``, or an A1111 ``.yaml``.

    Raises:
        UnreadableError: If what the user names isn't there.
        CorruptError: If a config makes no sense.
        UnsupportedError: If a config is of no known kind.
    """
    # A folder's own configs tell more than what an earlier file's record says, and later.
    found = Stated() if checkpoint.folder else recorded(checkpoint)
    try:
        found.check(model)
    except InputError as error:
        found = Stated(ignored=(f"what its metadata record of a conversion was not used: {error.message}",))
    beside = config_beside(checkpoint)
    if beside is not None:
        try:
            found = _read_fitting(beside, checkpoint, model).over(found)
        except InputError as error:  # nobody named it: it may be anything
            found = replace(found, ignored=(f"{beside.name} beside it was not used: {error.message}",))
    if config is not None:
        found = _read_fitting(Path(config), checkpoint, model).over(found)
    return found


def _read_fitting(path: Path, checkpoint: Checkpoint, model: Model) -> Stated:
    """What a config states, unless it is one of another model than the weights are of."""
    told = _read(path, model)
    if not told.whole:
        told.check(model, str(path))
    for name, found in identify(checkpoint, told.structures(model, path)).networks.items():
        wrong = [*found.missing, *found.misshapen(checkpoint.tensors)] if name in told.whole else []
        if wrong:
            message = f"it tells of another {name} than these weights are of: {wrong[0]} doesn't fit"
            raise MismatchError(message, file=_config_in(path, name), key=wrong[0], remedy=_NAME_ITS_OWN)
    return told


def config_beside(checkpoint: Checkpoint) -> Path | None:
    """The config beside a file: the webui's ``.yaml`` of the same name, or that of a diffusers component."""
    path = checkpoint.path
    if path is None or checkpoint.folder is not None:
        return None
    yaml = yaml_config.path_beside(path)
    if yaml.is_file():
        return yaml
    lone = path.with_name(CONFIG_NAME)
    return lone if path.name.startswith(("diffusion_pytorch_model", "model.")) and lone.is_file() else None


def _read(path: Path, model: Model) -> Stated:
    source = f"{path.name} says so"
    if path.is_dir():
        return _of_folder(path, source)
    if path.suffix.lower() in {".yaml", ".yml"}:
        return _of_yaml(yaml_config.read(_content(path).decode("utf-8", "replace"), str(path)), path, model)
    document = read_document(_content(path), str(path))
    networks = list(model.networks)
    name = component_of(document, open_clip="text_encoder_2" in networks)
    if len(networks) == 1 and (name is None or silent_fields(name) is silent_fields(networks[0])):
        name = networks[0]  # of two text encoders, the class doesn't tell which
    if name not in networks:
        message = f"it is no config of a component that the model has: {', '.join(networks)}"
        raise UnsupportedError(message, file=path, remedy="name a folder that has the configs of all, or a .yaml")
    return Stated({name: document}, frozenset({name}), why=source)


def _of_folder(folder: Path, source: str) -> Stated:
    files = {name: folder / name / CONFIG_NAME for name in NETWORKS}
    configs = {name: read_document(_content(file), str(file)) for name, file in files.items() if file.is_file()}
    file = folder / "scheduler" / SCHEDULER_CONFIG_NAME
    scheduler = read_document(_content(file), str(file)) if file.is_file() else None
    if not configs and scheduler is None:
        raise UnsupportedError("no config is in that folder", file=folder, remedy="name a diffusers folder")
    there = {name: folder / name for name in _SIDE_FILES.values() if (folder / name).is_file()}
    sides = _sides({name: read_document(_content(path), str(path)) for name, path in there.items()})
    return Stated(configs | sides, frozenset(configs), scheduler, _predicted(scheduler), why=source)


def of_folder_files(checkpoint: Checkpoint) -> Stated:
    """What the configs in a checkpoint's own folder state."""
    found = documents(checkpoint)
    scheduler = found.get("scheduler")
    networks = {name: document for name, document in found.items() if name in NETWORKS}
    files = checkpoint.folder.files if checkpoint.folder else {}
    there = {name: files[name] for name in _SIDE_FILES.values() if name in files and files[name].nbytes <= MAX_DOCUMENT}
    sides = _sides({name: read_document(b"".join(data.chunks()), name) for name, data in there.items()})
    return Stated(networks | sides, frozenset(), scheduler, _predicted(scheduler), why="its scheduler says so")


def _predicted(scheduler: Mapping[str, Any] | None) -> str | None:
    found = scheduler.get("prediction_type") if scheduler else None
    return found if isinstance(found, str) else None


def _sides(there: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the index and the tokenizers state, where it makes sense."""
    found: dict[str, dict[str, Any]] = {}
    for part, name in _SIDE_FILES.items():
        fields = {field: there[name][field] for field in silent_fields(part) if field in there.get(name, {})}
        pad = fields.get("pad_token")
        if isinstance(pad, dict):  # as transformers 4 spelled out what it had added
            fields["pad_token"] = pad.get("content")
        found[part] = _sound(part, fields)
    return {part: fields for part, fields in found.items() if fields}


def _sound(part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of index or tokenizer that hold what such fields hold."""
    kind = bool if part == INDEX else str
    return {field: value for field, value in fields.items() if isinstance(value, kind)}


def _of_yaml(facts: yaml_config.YamlFacts, path: Path, model: Model) -> Stated:
    unet = model.components.get("unet")
    inputs = unet.config.inputs if unet and isinstance(unet.config, UNetConfig) else None
    if model.base_family not in {facts.family or model.base_family, "unknown"}:
        message = f"it is for {facts.family}, and the model is {model.family}"
        raise MismatchError(message, file=path, remedy=_NAME_ITS_OWN)
    if inputs and facts.in_channels not in {None, inputs}:
        message = f"it is for {facts.in_channels} input channels, and the model has {inputs}"
        raise MismatchError(message, file=path, remedy=_NAME_ITS_OWN)
    configs: dict[str, dict[str, Any]] = {}
    if facts.num_heads:
        configs["unet"] = {"attention_head_dim": facts.num_heads}
    if facts.scale_factor:
        configs["vae"] = {"scaling_factor": facts.scale_factor}
    return Stated(
        configs,
        prediction_type=facts.prediction_type,
        head_channels=facts.num_head_channels,
        why=f"{path.name} says so",
    )


def _content(path: Path) -> bytes:
    file = SourceFile(path)
    content = file.read(0, min(file.size, MAX_DOCUMENT + 1))
    file.close()
    return content


def recorded(checkpoint: Checkpoint) -> Stated:
    """What the record in the metadata tells: of the last conversion, and of components that were replaced since."""
    found = Stated()
    done = (history.describe(step) for step in checkpoint.steps if step.changes)
    for step in [*history.recorded(checkpoint.metadata), *done]:
        if step.get("operation") == "convert" and step.get("changes"):
            found = Stated()
        gone = _replaced(step)
        found = replace(found, configs={name: said for name, said in found.configs.items() if name != gone})
        configs = dict(_recorded_configs(step.get(CONFIGS)))
        scheduler = step.get(SCHEDULER)
        if configs or isinstance(scheduler, dict):
            kept = Stated(configs, why="its metadata say so")
            if isinstance(scheduler, dict) and isinstance(scheduler.get("_class_name"), str):
                kept = replace(kept, scheduler=scheduler, prediction_type=_predicted(scheduler))
            found = kept.over(found)
    return found


def _replaced(step: Mapping[str, Any]) -> str | None:
    """The component that a step took from another model."""
    if step.get("operation") == "merge-vae":
        return "vae"
    parameters = step.get("parameters")
    if step.get("operation") == "replace" and isinstance(parameters, dict):
        return str(parameters.get("component"))
    return None


def _recorded_configs(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Only what we would have written: a record in somebody's metadata may hold anything."""
    for name, fields in value.items() if isinstance(value, dict) else ():
        if name in {*NETWORKS, *_SIDE_FILES} and isinstance(fields, dict):
            known = {key: fields[key] for key in silent_fields(name) if key in fields}
            yield name, known if name in NETWORKS else _sound(name, known)
