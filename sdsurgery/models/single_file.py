"""What goes with a single file besides weights: settings in its metadata, markers, and the webui's config beside it.

A folder says all of that in its configs; see ``folder_files.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from ..checkpoint import Change, Checkpoint, Tensor
from ..dtypes import F32
from ..sources import InMemory
from . import yaml_config
from .components import Component
from .configs import documents
from .conversion import Converted
from .folder_files import FolderFiles, Prediction
from .stated import CONFIGS, SCHEDULER, Stated, silent_fields
from .walks import UNetConfig, VaeConfig


def unheld_settings(checkpoint: Checkpoint, files: FolderFiles, stated: Stated) -> dict[str, Any]:
    """What the folder's configs say and nobody would assume of the single file."""
    facts: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    stand_there = documents(checkpoint)
    for name, component in files.model.networks.items():
        said = {**stand_there.get(name, stand_there.get("", {})), **stated.configs.get(name, {})}
        defaults = silent_fields(name)
        if not (name in stated.whole or name in stand_there or "" in stand_there):
            # Without a config, its class's defaults are nobody's word.
            defaults = {field: default for field, default in defaults.items() if field in said}
        configs[name] = _unlike(defaults, said, files.config(component))
    if len(files.model.networks) > 1:
        for name, assumed in files.sides().items():
            configs[name] = _unlike(assumed, stated.configs.get(name, {}), assumed)
        scheduler = {field: value for field, value in (stated.scheduler or {}).items() if field != "_diffusers_version"}
        if scheduler and {"prediction_type": "epsilon"} | scheduler != files.scheduler():
            facts[SCHEDULER] = scheduler
    if any(configs.values()):
        facts[CONFIGS] = {name: fields for name, fields in configs.items() if fields}
    return facts


def settings_of(component: Component, config: Mapping[str, Any], files: FolderFiles) -> dict[str, Any]:
    """What a component's config says and nobody would assume of it, as a step's facts keep it.

    Args:
        component: One of a single file.
        config: What its config says.
        files: Makes the files that a folder of that single file would get.
    """
    said = {field: config[field] for field in silent_fields(component.name) if field in config}
    fields = _unlike(said, said, files.config(component))
    return {CONFIGS: {component.name: fields}} if fields else {}


def _unlike(defaults: Mapping[str, Any], said: Mapping[str, Any], assumed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that mean another thing than what would be assumed; one that it lacks has its default."""
    fields = {field: said.get(field, default) for field, default in defaults.items()}
    return {field: value for field, value in fields.items() if value != assumed.get(field, defaults[field])}


def mark(converted: Converted, prediction: Prediction, stated: Stated) -> None:
    """The markers by which loaders of SDXL's single files know what the UNet predicts, and of which latents."""
    predicts_v = prediction.type == "v_prediction"
    scheduler = {**_EDM_SIGMAS, **(stated.scheduler or {})}
    marks: dict[str, tuple[float, ...]] = {}
    if str(scheduler.get("_class_name")).startswith("EDM"):
        vae = stated.configs.get("vae", {})
        if predicts_v:
            marks = {f"edm_vpred.{name}": _numbers([scheduler[name]]) for name in _EDM_SIGMAS}
        else:
            marks = {f"edm_{name}": _numbers(vae.get(f"latents_{name}")) for name in ("mean", "std")}
        marks = marks if all(marks.values()) else {}
    elif predicts_v:
        marks = {"v_pred": (), **({"ztsnr": ()} if prediction.zero_snr else {})}
    for key, numbers in marks.items():
        tensor = Tensor(F32, (len(numbers),), InMemory(struct.pack(f"<{len(numbers)}f", *numbers)))
        converted.tensors[key] = tensor
        converted.changes.append(Change(key, "added", None, str(tensor)))


_EDM_SIGMAS: Mapping[str, Any] = {"sigma_max": 80.0, "sigma_min": 0.002}
"""What diffusers' EDM schedulers take where their config lacks it."""

_MOST_IN_F32 = 3e38


def _numbers(value: Any) -> tuple[float, ...]:
    """The numbers of a list, or nothing if it holds what is none, or what no marker can hold."""
    listed = value if isinstance(value, list) else []
    sound = all(type(number) in {int, float} and abs(number) < _MOST_IN_F32 for number in listed)
    return tuple(map(float, listed)) if sound else ()


def webui_config(files: FolderFiles, stated: Stated, prediction: Prediction) -> dict[str, InMemory]:
    """The webui's config, for the models that it doesn't draw rightly without."""
    model = files.model
    family, variant = model.base_family, model.family.removeprefix(model.base_family)
    unet, vae = model.components.get("unet"), model.components.get("vae")
    needed = family == "sd2" or (family == "sd1" and (variant or prediction.type == "v_prediction"))
    if not needed or unet is None or vae is None or len(model.networks) < 2:
        return {}
    if prediction.type not in {yaml_config.EPSILON, yaml_config.V_PREDICTION}:  # the webui knows no other
        return {}
    assert isinstance(unet.config, UNetConfig)  # noqa: S101 - for the type checker
    assert isinstance(vae.config, VaeConfig)  # noqa: S101
    heads = _heads(_said(files, stated, unet)["attention_head_dim"], unet.config.channels)
    networks = yaml_config.Networks(
        unet=unet.config,
        vae=vae.config,
        num_heads=heads[0],
        num_head_channels=heads[1],
        scale_factor=_said(files, stated, vae)["scaling_factor"],
    )
    text = yaml_config.write(family, variant, prediction.type, networks)
    return {".yaml": InMemory(text.encode())}


def _heads(heads: int | list[int], channels: tuple[int, ...]) -> tuple[int | None, int | None]:
    """The number of heads, or the width of one, as ldm states them; neither where neither is the same everywhere."""
    if isinstance(heads, int):
        return heads, None
    widths = {width / count for width, count in zip(channels, heads, strict=True)}
    if len(widths) == 1:
        return None, int(widths.pop())
    return (heads[0] if len(set(heads)) == 1 else None), None


def _said(files: FolderFiles, stated: Stated, component: Component) -> dict[str, Any]:
    return files.config(component) | dict(stated.configs.get(component.name, {}))
