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
from ..errors import InputError, UnsupportedError
from ..sources import SourceFile
from . import yaml_config
from .configs import CONFIG_NAME, MAX_DOCUMENT, NETWORKS, SCHEDULER_CONFIG_NAME, documents, read_document, structure
from .identify import Model
from .walks import Config, OpenClipConfig

CONFIGS = "configs"
SCHEDULER = "scheduler"
"""The facts of a step that keep, in a single file, what a folder's configs said."""

SILENT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "unet": (
        "act_fn", "addition_time_embed_dim", "attention_head_dim", "center_input_sample", "downsample_padding",
        "flip_sin_to_cos", "freq_shift", "mid_block_scale_factor", "norm_eps", "norm_num_groups", "num_attention_heads",
        "sample_size", "upcast_attention",
    ),
    "vae": (
        "act_fn", "force_upcast", "latents_mean", "latents_std", "norm_num_groups", "sample_size", "scaling_factor",
        "shift_factor",
    ),
    "text_encoder": (
        "bos_token_id", "eos_token_id", "hidden_act", "layer_norm_eps", "num_attention_heads", "pad_token_id",
        "projection_dim",
    ),
}  # fmt: skip
"""The fields of a component's config that no shape tells and that change what it computes, or how it is used."""


@dataclass(frozen=True)
class Stated:
    """What is stated.

    Attributes:
        configs: Fields by component.
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

    def structures(self, model: Model) -> dict[str, Config]:
        """The structure of each component that a whole config tells."""
        told: dict[str, Config] = {}
        for name in self.whole & model.components.keys():
            open_clip = isinstance(model.components[name].config, OpenClipConfig)
            told[name] = structure(name, self.configs[name], open_clip=open_clip)
        return told


def silent_fields(component: str) -> tuple[str, ...]:
    """See :data:`SILENT_FIELDS`."""
    return SILENT_FIELDS["text_encoder" if component.startswith("text_encoder") else component]


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
    found = _in_metadata(checkpoint)
    beside = _beside(checkpoint)
    if beside is not None:
        try:
            found = _read(beside, model).over(found)
        except InputError as error:  # nobody named it: it may be anything
            found = replace(found, ignored=(f"{beside.name} beside it was not used: {error.message}",))
    if config is not None:
        found = _read(Path(config), model).over(found)
    return found


def _beside(checkpoint: Checkpoint) -> Path | None:
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
        return _of_yaml(yaml_config.read(_content(path).decode("utf-8", "replace"), str(path)), source)
    document = read_document(_content(path), str(path))
    networks = list(model.networks)
    if len(networks) != 1:
        raise UnsupportedError(
            f"it is the config of one component, and the model has {len(networks)}",
            file=path,
            remedy="name a folder that has the configs of all, or a .yaml",
        )
    return Stated({networks[0]: document}, frozenset(networks), why=source)


def _of_folder(folder: Path, source: str) -> Stated:
    files = {name: folder / name / CONFIG_NAME for name in NETWORKS}
    configs = {name: read_document(_content(file), str(file)) for name, file in files.items() if file.is_file()}
    file = folder / "scheduler" / SCHEDULER_CONFIG_NAME
    scheduler = read_document(_content(file), str(file)) if file.is_file() else None
    if not configs and scheduler is None:
        raise UnsupportedError("no config is in that folder", file=folder, remedy="name a diffusers folder")
    prediction = scheduler.get("prediction_type") if scheduler else None
    return Stated(configs, frozenset(configs), scheduler, prediction, why=source)


def of_folder_files(checkpoint: Checkpoint) -> Stated:
    """What the configs in a checkpoint's own folder state."""
    found = documents(checkpoint)
    scheduler = found.get("scheduler")
    networks = {name: document for name, document in found.items() if name in NETWORKS}
    prediction = scheduler.get("prediction_type") if scheduler else None
    return Stated(networks, frozenset(), scheduler, prediction, why="its scheduler says so")


def _of_yaml(facts: yaml_config.YamlFacts, source: str) -> Stated:
    configs: dict[str, dict[str, Any]] = {}
    if facts.num_heads:
        configs["unet"] = {"attention_head_dim": facts.num_heads}
    if facts.scale_factor:
        configs["vae"] = {"scaling_factor": facts.scale_factor}
    return Stated(configs, prediction_type=facts.prediction_type, head_channels=facts.num_head_channels, why=source)


def _content(path: Path) -> bytes:
    file = SourceFile(path)
    content = file.read(0, min(file.size, MAX_DOCUMENT + 1))
    file.close()
    return content


def _in_metadata(checkpoint: Checkpoint) -> Stated:
    """What the record of an earlier conversion kept."""
    found = Stated()
    for step in [*history.recorded(checkpoint.metadata), *map(history.describe, checkpoint.steps)]:
        configs = dict(_recorded_configs(step.get(CONFIGS)))
        scheduler = step.get(SCHEDULER)
        if configs or isinstance(scheduler, dict):
            kept = Stated(configs, why="its metadata say so")
            if isinstance(scheduler, dict) and isinstance(scheduler.get("_class_name"), str):
                kept = replace(kept, scheduler=scheduler, prediction_type=scheduler.get("prediction_type"))
            found = kept.over(found)
    return found


def _recorded_configs(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Only what we would have written: a record in somebody's metadata may hold anything."""
    for name, fields in value.items() if isinstance(value, dict) else ():
        if name in NETWORKS and isinstance(fields, dict):
            yield name, {key: fields[key] for key in silent_fields(name) if key in fields}
