"""diffusers' and transformers' ``config.json``: what they say about a component's structure, and how it is said.

Defaults are those of diffusers 0.42's ``UNet2DConditionModel`` and ``AutoencoderKL`` and of transformers'
``CLIPTextConfig``, which published configs leave out at will.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import CorruptError, UnsupportedError
from .walks import ClipConfig, Config, OpenClipConfig, UNetConfig, VaeConfig

CONFIG_NAME = "config.json"
SCHEDULER_CONFIG_NAME = "scheduler_config.json"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
NETWORKS = (*TEXT_ENCODERS, "unet", "vae")
"""The components that weights are converted of; in a diffusers folder they are called the same."""

_MOST_LAYERS = 64
_MOST_BLOCKS = 16
"""More than any model has: a config that claims more isn't walked."""

MAX_DOCUMENT = 4 << 20
"""Bytes of the longest config that is read; real ones take a few thousand."""

# Fields that change which weights there are, with the only values whose weights are known here.
_UNET_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
}
_VAE_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


def read_document(content: bytes, file: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptError: If it isn't one; names the file.
    """
    remedy = "download or write it again"
    if len(content) > MAX_DOCUMENT:
        raise CorruptError(f"{len(content):,} bytes are too many for a config", file=file, remedy=remedy)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"it is no JSON: {error}", file=file, remedy=remedy) from error
    if not isinstance(document, dict):
        raise CorruptError("it is no JSON object", file=file, remedy=remedy)
    return document


def indented(document: Mapping[str, Any]) -> bytes:
    """A JSON file as transformers and diffusers lay it out, also of text that no file can hold but escaped."""
    try:
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 can't
        return (json.dumps(document, indent=2) + "\n").encode()


def documents(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The configs of a folder's parts, the scheduler's included; that of a lone component under an empty name."""
    found: dict[str, dict[str, Any]] = {}
    for name, data in checkpoint.folder.files.items() if checkpoint.folder else ():
        component, _, file = name.rpartition("/")
        if file in {CONFIG_NAME, SCHEDULER_CONFIG_NAME} and "/" not in component:
            content = b"".join(data.chunks()) if data.nbytes <= MAX_DOCUMENT else b" " * (MAX_DOCUMENT + 1)
            found[component] = read_document(content, str(checkpoint.path / name if checkpoint.path else name))
    return found


def structure(component: str, document: Mapping[str, Any], file: str = "", *, open_clip: bool = False) -> Config:
    """The structure and the widths that a config tells.

    Args:
        component: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``.
        document: The content of its ``config.json``.
        file: For the error.
        open_clip: Whether a ``text_encoder`` is SD2's OpenCLIP-H, whose last layer diffusers leaves out.

    Raises:
        UnsupportedError: If the config describes something whose weights aren't known here, with the field.
        CorruptError: If a field has a value that makes no sense.
    """
    try:
        if component == "unet":
            return _unet(document)
        if component == "vae":
            return _vae(document)
        return _text_encoder(document, second=component == "text_encoder_2", open_clip=open_clip)
    except _UnknownFieldError as error:
        message = f"no {component} whose {error.args[0]} is {error.args[1]!r} is known"
        remedy = "only the networks of SD1, SD2, SDXL and its refiner are converted"
        raise UnsupportedError(message, file=file or None, remedy=remedy) from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        message = f"it makes no sense as the config of a {component}: {type(error).__name__}: {error}"
        raise CorruptError(message, file=file or None, remedy="download or write it again") from error


class _UnknownFieldError(Exception):
    """A field and its value, which the walks don't know."""


def _require(document: Mapping[str, Any], plain: Mapping[str, tuple[Any, ...]]) -> None:
    for field, known in plain.items():
        if field in document and document[field] not in known:
            raise _UnknownFieldError(field, document[field])


def component_of(document: Mapping[str, Any], *, open_clip: bool) -> str | None:
    """The component whose config it is, by the class that it names."""
    listed = document.get("architectures")
    kind = document.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    return {
        "UNet2DConditionModel": "unet",
        "AutoencoderKL": "vae",
        "CLIPTextModel": "text_encoder",
        "CLIPTextModelWithProjection": "text_encoder_2" if open_clip else "text_encoder",
    }.get(str(kind))


def _size(document: Mapping[str, Any], field: str, default: int, most: int = 1 << 24) -> int:
    value = document.get(field, default)
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{field} is {value!r}")
    return value


def _sizes(document: Mapping[str, Any], field: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = document.get(field, default)
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
        raise ValueError(f"{field} is {value!r}")
    return tuple(_size({field: item}, field, 0) for item in value)


def _same(document: Mapping[str, Any], field: str, default: int, count: int, most: int = 1 << 24) -> int:
    """A size that may be given once or once a level; the levels must agree."""
    value = document.get(field, default)
    if isinstance(value, list | tuple):
        if len(value) != count or len(set(value)) != 1:
            raise _UnknownFieldError(field, value)
        value = value[0]
    return _size({field: value}, field, default, most)


def _unet(document: Mapping[str, Any]) -> UNetConfig:
    _require(document, _UNET_PLAIN)
    channels = _sizes(document, "block_out_channels", (320, 640, 1280, 1280))
    count = len(channels)
    default_down = ["CrossAttnDownBlock2D"] * (count - 1) + ["DownBlock2D"]
    attends = [_block(_DOWN, "down_block_types", kind) for kind in document.get("down_block_types", default_down)]
    default_up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)]
    ups = [_block(_UP, "up_block_types", kind) for kind in document.get("up_block_types", default_up)]
    if len(attends) != count or ups != attends[::-1]:
        raise _UnknownFieldError("up_block_types", document.get("up_block_types"))
    depths = document.get("transformer_layers_per_block", 1)
    if isinstance(depths, int):
        depths = [depths] * count
    if any(isinstance(depth, list) for depth in depths):
        raise _UnknownFieldError("transformer_layers_per_block", depths)
    depths = _sizes({"transformer_layers_per_block": depths}, "transformer_layers_per_block", ())
    if max(depths) > _MOST_LAYERS:
        raise ValueError(f"transformer_layers_per_block is {max(depths)}")
    heads = document.get("attention_head_dim", 8)
    listed = heads if isinstance(heads, list | tuple) else [heads] * count
    if len(_sizes({"attention_head_dim": listed}, "attention_head_dim", ())) != count:
        raise ValueError(f"attention_head_dim is {heads!r}")
    _size(document, "norm_num_groups", 32)
    vector = document.get("addition_embed_type") == "text_time"
    return UNetConfig(
        depths=tuple(depth if attention else 0 for depth, attention in zip(depths, attends, strict=True)),
        middle=depths[-1],
        linear=bool(document.get("use_linear_projection", False)),
        vector=vector,
        residual=_same(document, "layers_per_block", 2, count, _MOST_BLOCKS),
        channels=channels,
        inputs=_size(document, "in_channels", 4),
        outputs=_size(document, "out_channels", 4),
        time=4 * channels[0],
        context=_same(document, "cross_attention_dim", 1280, count),
        conditions=_size(document, "projection_class_embeddings_input_dim", 0) if vector else 0,
    )


def _block(known: Mapping[str, bool], field: str, kind: Any) -> bool:
    if kind not in known:
        raise _UnknownFieldError(field, kind)
    return known[kind]


def _vae(document: Mapping[str, Any]) -> VaeConfig:
    _require(document, _VAE_PLAIN)
    channels = _sizes(document, "block_out_channels", (64,))
    for field, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        for kind in document.get(field, [known] * len(channels)):
            _block({known: True}, field, kind)
    _size(document, "norm_num_groups", 32)
    scale = document.get("scaling_factor", 0.18215)
    if type(scale) not in {int, float} or not 0 < scale < 1 << 24:
        raise ValueError(f"scaling_factor is {scale!r}")
    for field in ("latents_mean", "latents_std"):
        numbers = document.get(field)
        if not (numbers is None or (isinstance(numbers, list) and all(type(item) in {int, float} for item in numbers))):
            raise ValueError(f"{field} is {numbers!r}")
    pixels = _size(document, "in_channels", 3)
    if _size(document, "out_channels", 3) != pixels:
        raise _UnknownFieldError("out_channels", document.get("out_channels"))
    return VaeConfig(
        residual=_size(document, "layers_per_block", 1, _MOST_BLOCKS),
        channels=channels,
        pixels=pixels,
        latent=_size(document, "latent_channels", 4),
    )


def _text_encoder(document: Mapping[str, Any], *, second: bool, open_clip: bool) -> ClipConfig | OpenClipConfig:
    layers = _size(document, "num_hidden_layers", 12, _MOST_LAYERS)
    _size(document, "num_attention_heads", 8)
    projected = document.get("architectures") == ["CLIPTextModelWithProjection"]
    found = ClipConfig(
        layers=layers,
        projected=projected,
        width=_size(document, "hidden_size", 512),
        inner=_size(document, "intermediate_size", 2048),
        vocabulary=_size(document, "vocab_size", 49408),
        positions=_size(document, "max_position_embeddings", 77),
        projection=_size(document, "projection_dim", 512),
    )
    if not (second or open_clip):
        return found
    return as_open_clip(found, penultimate=not second)


def as_open_clip(config: ClipConfig, *, penultimate: bool) -> OpenClipConfig:
    """The OpenCLIP text encoder that transformers has under CLIP's names, with the layer that diffusers leaves out."""
    return OpenClipConfig(
        layers=config.layers + penultimate,
        penultimate=penultimate,
        width=config.width,
        inner=config.inner,
        vocabulary=config.vocabulary,
        positions=config.positions,
        projection=config.projection,
    )


def described(config: Config) -> dict[str, Any]:
    """The fields of a ``config.json`` that a structure and its widths decide."""
    if isinstance(config, UNetConfig):
        return _describe_unet(config)
    if isinstance(config, VaeConfig):
        return {
            "block_out_channels": list(config.channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
            "in_channels": config.pixels,
            "latent_channels": config.latent,
            "layers_per_block": config.residual,
            "out_channels": config.pixels,
            "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
        }
    unused = isinstance(config, OpenClipConfig) and config.penultimate
    document = {
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "max_position_embeddings": config.positions,
        "num_hidden_layers": config.layers - unused,
        "vocab_size": config.vocabulary,
    }
    projected = config.projected if isinstance(config, ClipConfig) else not unused
    return document | ({"projection_dim": config.projection} if projected else {})


def _describe_unet(config: UNetConfig) -> dict[str, Any]:
    attends = [bool(depth) for depth in config.depths]
    # Where a level has no attention its depth counts for nothing; the last one is also the middle's.
    depths = [depth or 1 for depth in config.depths]
    depths[-1] = config.middle
    if {*config.depths, config.middle} - {0} == {config.middle}:
        depths = [config.middle] * len(depths)
    return {
        "block_out_channels": list(config.channels),
        "cross_attention_dim": config.context,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "in_channels": config.inputs,
        "layers_per_block": config.residual,
        "out_channels": config.outputs,
        "projection_class_embeddings_input_dim": config.conditions if config.vector else None,
        "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "use_linear_projection": config.linear,
    }
