"""Models as they are found in the wild, and safetensors files as nobody but their author would write them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import synthetic
from container_support import Raw, State, in_memory, with_header
from synthetic import IDS, NARROW

import sdsurgery as sd
from sdsurgery.dtypes import BY_NAME
from sdsurgery.models.components import SCHEDULE_BUFFERS, ema_name
from sdsurgery.models.walks import Config, UNetConfig, VaeConfig, links, walk

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
FLOATS = ("F16", "BF16", "F32", "F64")
JUNK_TYPES = sorted(name for name, dtype in BY_NAME.items() if dtype.storable and dtype.bits % 8 == 0)
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
COMPONENTS = {UNET: "unet", VAE: "vae", **dict.fromkeys(CLIP.values(), "text_encoder")}

_SHALLOW: dict[str, dict[str, Any]] = {
    "sd1": {"depths": (1, 0), "middle": 1},
    "sd2": {"depths": (1, 0), "middle": 1},
    "sdxl": {"depths": (0, 1), "middle": 1},
    "sdxl-refiner": {"depths": (0, 1, 0), "middle": 1},
}
"""Structures that no published model has and that count, because they explain every key."""


def shallow(family: str, chance: random.Random) -> dict[str, Config]:
    """Prefix to config of a model of few layers and random widths."""

    def widths(count: int) -> tuple[int, ...]:
        return tuple(chance.randint(1, 6) for _ in range(count))

    found: dict[str, Config] = {}
    for prefix, config in synthetic.configs(family, NARROW[family], inputs=chance.choice((4, 4, 9, 8, 5))).items():
        changes: dict[str, Any]
        if isinstance(config, UNetConfig):
            depths = _SHALLOW[family]["depths"]
            channels = widths(len(depths))
            changes = _SHALLOW[family] | {"channels": channels, "time": 4 * channels[0], "residual": 1}
            changes |= {"context": chance.randint(1, 9)} | (
                {"conditions": chance.randint(1, 9)} if config.vector else {}
            )
        elif isinstance(config, VaeConfig):
            changes = {"channels": widths(chance.randint(1, 3)), "latent": chance.randint(1, 5), "residual": 1}
        else:
            width = chance.randint(1, 6)
            changes = {"layers": 2, "width": width, "inner": chance.randint(1, 9), "vocabulary": chance.randint(1, 9)}
            changes |= {"positions": chance.randint(1, 9)}
            changes |= {"projection": chance.randint(1, 6)} if family in {"sdxl", "sdxl-refiner"} else {}
        found[prefix] = replace(config, **changes)
    return found


def raw(shape: Iterable[int], dtype: str, chance: random.Random) -> Raw:
    """Random bytes, NaN and all; of truth values only the two that there are."""
    shape = tuple(shape)
    nbytes = BY_NAME[dtype].nbytes(shape)
    content = bytes(chance.choice((0, 1)) for _ in range(nbytes)) if dtype == "BOOL" else chance.randbytes(nbytes)
    return Raw(dtype, shape, content)


def int64s(values: Sequence[int]) -> Raw:
    return Raw("I64", (1, len(values)), b"".join(value.to_bytes(8, "little", signed=True) for value in values))


def whole(
    configs: Mapping[str, Config], chance: random.Random, dtypes: Sequence[str] = ("F16",), *, ids: bool = True
) -> State:
    """A sound single file of these components, each tensor of one of the types."""
    state = {
        prefix + weight.name: raw(weight.shape, chance.choice(dtypes), chance)
        for prefix, config in configs.items()
        for weight in walk(config)
    }
    for prefix, config in configs.items():
        if ids and prefix in CLIP.values():
            state[prefix + IDS] = int64s(range(config.positions))  # type: ignore[union-attr]
    return state


# ---------------------------------------------------------------- what is found in the wild

ODDITIES = (
    "ema", "ema scalars", "schedule", "markers", "junk", "wrong ids", "fractional ids", "no ids", "misshapen ids",
    "flat text encoder", "wrapper", "flat attention", "no last layer", "stray ids",
)  # fmt: skip


def made_odd(state: State, configs: Mapping[str, Config], oddities: Iterable[str], chance: random.Random) -> State:
    """The model with these oddities, as far as it can have them."""
    state = dict(state)
    for oddity in sorted(oddities, key=ODDITIES.index):
        _ODD[oddity](state, configs, chance)
    if "wrapper" in oddities:
        state = {"module." + key: tensor for key, tensor in state.items()}
    return state


def _ema(state: State, configs: Mapping[str, Config], chance: random.Random) -> None:
    for weight in walk(configs[UNET]) if UNET in configs else ():
        state["model_ema." + ema_name(weight.name)] = raw(weight.shape, "F32", chance)
    _ema_scalars(state, configs, chance)


def _ema_scalars(state: State, _configs: Mapping[str, Config], chance: random.Random) -> None:
    state["model_ema.decay"] = raw((), "F32", chance)
    state["model_ema.num_updates"] = raw((), chance.choice(("I32", "I64")), chance)


def _schedule(state: State, _configs: Mapping[str, Config], chance: random.Random) -> None:
    steps = chance.choice((1, 4, 1000))
    for name in (*SCHEDULE_BUFFERS, "logvar"):
        state[name] = raw((steps,), chance.choice(("F32", "F64", "F16")), chance)


def _markers(state: State, _configs: Mapping[str, Config], chance: random.Random) -> None:
    for name in chance.sample(("v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max"), 2):
        state[name] = raw(chance.choice(((), (0,), (1,))), "F32", chance)


def _junk(state: State, _configs: Mapping[str, Config], chance: random.Random) -> None:
    for number, dtype in enumerate(JUNK_TYPES):
        name = chance.choice(("junk", "loss.logvar", "🎲", "a b", 'quo"te\\', "", "callbacks", "unet", "zeros\u2028"))
        state[f"{name}.{number}"] = raw(chance.choice(((), (0,), (3,), (2, 0, 5), (1, 2, 1, 3))), dtype, chance)
    state[chance.choice(("", "x", "model_ema", "__junk__"))] = raw((2,), "U8", chance)


def _ids(values: str) -> Any:
    def spoil(state: State, configs: Mapping[str, Config], chance: random.Random) -> None:
        for prefix in configs.keys() & set(CLIP.values()):
            count: int = configs[prefix].positions  # type: ignore[union-attr]
            wrong = {
                "wrong": int64s([chance.randint(-3, 300) for _ in range(count)]),
                "fractional": raw((1, count), chance.choice(FLOATS), chance),
                "misshapen": raw((count,), "I64", chance),
            }
            state.pop(prefix + IDS, None)
            if values in wrong:
                state[prefix + IDS] = wrong[values]

    return spoil


def _flat(state: State, configs: Mapping[str, Config], _chance: random.Random) -> None:
    """CLIP without its level ``text_model.``."""
    for prefix in configs.keys() & set(CLIP.values()):
        for key in [key for key in state if key.startswith(prefix + "text_model.")]:
            state[key.replace("text_model.", "", 1)] = state.pop(key)


def _flat_attention(state: State, configs: Mapping[str, Config], chance: random.Random) -> None:
    """What a convertor leaves that forgets to unsqueeze; some of it."""
    for link in links(configs[VAE]) if VAE in configs else ():
        if link.how == "squeeze" and chance.random() < 0.7:
            key = VAE + link.ldm.name
            state[key] = replace(state[key], shape=link.diffusers[0].shape)


def _no_last_layer(state: State, _configs: Mapping[str, Config], _chance: random.Random) -> None:
    """As Waifu Diffusion's SD2 was published."""
    prefix = "cond_stage_model.model."
    layers = [key for key in state if key.startswith(prefix + "transformer.resblocks.")]
    last = max((int(key.removeprefix(prefix).split(".")[2]) for key in layers), default=0)
    for key in [key for key in layers if f".resblocks.{last}." in key]:
        del state[key]
    state.pop(prefix + "text_projection", None)
    state.pop(prefix + "logit_scale", None)


def _stray_ids(state: State, _configs: Mapping[str, Config], _chance: random.Random) -> None:
    """What ComfyUI and a few trainers leave at a place where nothing reads it."""
    state["embedding_manager.text_model.embeddings.position_ids.old"] = int64s(range(3))


_ODD = {
    "ema": _ema,
    "ema scalars": _ema_scalars,
    "schedule": _schedule,
    "markers": _markers,
    "junk": _junk,
    "wrong ids": _ids("wrong"),
    "fractional ids": _ids("fractional"),
    "no ids": _ids("none"),
    "misshapen ids": _ids("misshapen"),
    "flat text encoder": _flat,
    "wrapper": lambda *_: None,
    "flat attention": _flat_attention,
    "no last layer": _no_last_layer,
    "stray ids": _stray_ids,
}
assert tuple(_ODD) == ODDITIES


# ---------------------------------------------------------------- files

METADATA = {
    "format": "pt",
    "modelspec.title": "Ünïcödé 模型 🎲 \u2028",
    "modelspec.hash_sha256": "0x" + "ab" * 32,
    "sshs_model_hash": "cd" * 32,
    "sshs_legacy_hash": "12345678",
    "ss_tag_frequency": json.dumps({"a\n": {"b\t\\": 1}}),
    "": "",
    "sd_merge_models": "{" * 20,
    "sdsurgery": "no record of ours",
}


def strange_bytes(state: State, metadata: Mapping[str, str] | None, chance: random.Random) -> bytes:
    """A safetensors file whose keys stand in any order and whose data lie in another, with a header of many spaces."""
    laid = chance.sample(sorted(state), len(state))
    offsets, position = {}, 0
    for key in laid:
        offsets[key] = [position, position + len(state[key].content)]
        position = offsets[key][1]
    entries: list[tuple[str, Any]] = []
    for key in chance.sample(sorted(state), len(state)):
        entry = {"dtype": state[key].dtype, "shape": list(state[key].shape), "data_offsets": offsets[key]}
        entries.append((key, dict(chance.sample(sorted(entry.items()), len(entry)))))
    if metadata is not None:
        texts = dict(chance.sample(sorted(metadata.items()), len(metadata)))
        entries.insert(chance.randint(0, len(entries)), ("__metadata__", texts))
    text = json.dumps(
        dict(entries),
        indent=chance.choice((None, None, 0, 1)),
        separators=chance.choice(((",", ":"), (", ", ": "), (" , ", " :\t"))),
        ensure_ascii=chance.random() < 0.5,
    )
    header = text.encode() + b" " * chance.choice((0, 1, 7, 8, 100, -len(text.encode()) % 8))
    return with_header(header, b"".join(state[key].content for key in laid))


def put_strange(path: Path, state: State, chance: random.Random, metadata: Mapping[str, str] | None = None) -> Path:
    path.write_bytes(strange_bytes(state, metadata, chance))
    return path


def opened(state: State, metadata: Mapping[str, str] | None = None) -> sd.Checkpoint:
    """The same as a checkpoint that lies nowhere."""
    return in_memory(state, metadata)
