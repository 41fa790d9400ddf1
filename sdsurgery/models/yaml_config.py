"""The ``.yaml`` beside a single file: ldm's description of a model, which says what its tensors don't.

The webui of AUTOMATIC1111 takes the one of a model's name before its own guess
(``find_checkpoint_config_near_filename`` in ``modules/sd_models_config.py``), and it guesses v-prediction for SD2
alone. The documents written here are the inference configs of CompVis' ``stable-diffusion``, of Stability AI's
``stablediffusion`` and of the webui, without what is only for training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptError, UnsupportedError, UsageError
from .walks import UNetConfig, VaeConfig

MAX_SIZE: Final = 1 << 16
"""Characters of the longest document that is read; real ones have four thousand."""

EPSILON: Final = "epsilon"
V_PREDICTION: Final = "v_prediction"

_PARAMETERIZATIONS: Final = {"eps": EPSILON, "v": V_PREDICTION}
_SCALINGS: Final = {"EpsScaling": EPSILON, "VScaling": V_PREDICTION, "VScalingWithEDMcNoise": V_PREDICTION}
_CONTEXTS: Final = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
_ENCODERS: Final = {"FrozenCLIPEmbedder": "sd1", "FrozenOpenCLIPEmbedder": "sd2"}

_TARGETS: Final = {
    "": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "-inpainting": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
    "-depth": "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion",
    "-pix2pix": "modules.models.diffusion.ddpm_edit.LatentDiffusion",  # the webui's own module
}
"""The classes that the webui makes of the variants."""


@dataclass(frozen=True, slots=True)
class Networks:
    """What the document says about the networks.

    Attributes:
        unet: Structure and widths.
        vae: Structure and widths.
        num_heads: Of the UNet's attention, the same at all levels, as SD1 has it.
        num_head_channels: The width of a head, the same at all levels, as SD2 has it; one of the two is given.
        scale_factor: What latents are multiplied by.
    """

    unet: UNetConfig
    vae: VaeConfig
    num_heads: int | None = None
    num_head_channels: int | None = None
    scale_factor: float = 0.18215


@dataclass(frozen=True, slots=True)
class YamlFacts:
    """What a document tells; ``None`` where it says nothing.

    Attributes:
        prediction_type: ``epsilon`` or ``v_prediction``.
        family: ``sd1``, ``sd2``, ``sdxl`` or ``sdxl-refiner``; a hint, by the text encoder or its width.
        num_heads: Of the UNet's attention at every level.
        num_head_channels: The width of a head at every level.
        in_channels: Of the UNet.
        context_dim: Width of the text encoder's states.
        scale_factor: What latents are multiplied by.
        image_size: Of the latents that the model was trained with; published configs aren't exact about it.
    """

    prediction_type: str | None = None
    family: str | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    in_channels: int | None = None
    context_dim: int | None = None
    scale_factor: float | None = None
    image_size: int | None = None


def path_beside(model: Path) -> Path:
    """Where the webui looks for the document of a model."""
    return model.with_suffix(".yaml")


def write(family: str, variant: str, prediction_type: str, networks: Networks) -> str:
    """The document for a model.

    Widths that are no whole multiples of the first become fractions, which ldm itself can't build; only narrow test
    models have such widths.

    Args:
        family: ``sd1`` or ``sd2``; sgm's configs, which SDXL has, aren't written.
        variant: The suffix: nothing, ``-inpainting``, ``-pix2pix`` or ``-depth``.
        prediction_type: ``epsilon`` or ``v_prediction``.
        networks: What else it says.

    Raises:
        UsageError: If there is no such document.
    """
    if (
        family not in _ENCODERS.values()
        or variant not in _TARGETS
        or prediction_type not in _PARAMETERIZATIONS.values()
    ):
        raise UsageError(f"no ldm config is known for {family}{variant} with {prediction_type}")
    import yaml

    document = {"model": {"target": _TARGETS[variant], "params": _params(family, variant, prediction_type, networks)}}
    return yaml.safe_dump(document, sort_keys=False)


def _params(family: str, variant: str, prediction_type: str, networks: Networks) -> dict[str, Any]:
    edit = variant == "-pix2pix"
    params: dict[str, Any] = {"parameterization": "v"} if prediction_type == V_PREDICTION else {}
    params |= {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "edited" if edit else "jpg",
        "cond_stage_key": "edit" if edit else "txt",
        "image_size": 16 if edit else 64,
        "channels": networks.vae.latent,
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if variant else "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": networks.scale_factor,
        "use_ema": False,
    }
    if variant in {"-inpainting", "-depth"}:
        params["finetune_keys"] = None
    if variant == "-depth":
        midas = {"target": "ldm.modules.midas.api.MiDaSInference", "params": {"model_type": "dpt_hybrid"}}
        params["depth_stage_config"] = midas
    params["unet_config"] = _unet(networks)
    params["first_stage_config"] = _vae(networks.vae)
    params["cond_stage_config"] = _text_encoder(family)
    return params


def _unet(networks: Networks) -> dict[str, Any]:
    unet = networks.unet
    heads = {"num_heads": networks.num_heads, "num_head_channels": networks.num_head_channels}
    return {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "use_checkpoint": False,
            "image_size": 32,  # ldm's own configs call it unused
            "in_channels": unet.inputs,
            "out_channels": unet.outputs,
            "model_channels": unet.channels[0],
            "attention_resolutions": [1 << level for level, depth in enumerate(unet.depths) if depth][::-1],
            "num_res_blocks": unet.residual,
            "channel_mult": _multiples(unet.channels),
            **{name: count for name, count in heads.items() if count is not None},
            "use_spatial_transformer": True,
            **({"use_linear_in_transformer": True} if unet.linear else {}),
            "transformer_depth": unet.middle,
            "context_dim": unet.context,
            "legacy": False,
        },
    }


def _vae(vae: VaeConfig) -> dict[str, Any]:
    return {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": vae.latent,
            "monitor": "val/rec_loss",
            "ddconfig": {
                "double_z": True,
                "z_channels": vae.latent,
                "resolution": 256,
                "in_channels": vae.pixels,
                "out_ch": vae.pixels,
                "ch": vae.channels[0],
                "ch_mult": _multiples(vae.channels),
                "num_res_blocks": vae.residual,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }


def _text_encoder(family: str) -> dict[str, Any]:
    if family == "sd1":
        return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    target = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    return {"target": target, "params": {"freeze": True, "layer": "penultimate"}}


def _multiples(channels: tuple[int, ...]) -> list[int | float]:
    base = channels[0]
    return [width // base if width % base == 0 else width / base for width in channels]


def read(text: str, file: str = "") -> YamlFacts:
    """What a document of ldm or sgm tells; what isn't known here is left alone.

    Args:
        text: The document.
        file: Its name, for the error.

    Raises:
        CorruptError: If it isn't YAML, or a value makes no sense.
        UnsupportedError: If it describes no model, or one that nothing here draws.
    """
    params = _mapping(_mapping(_parse(text, file).get("model")).get("params"))
    if not params:
        raise UnsupportedError("it is no config of ldm or sgm: it has no model.params", file=file or None)
    fields = _Fields(file)
    unet = _mapping(_mapping(params.get("unet_config") or params.get("network_config")).get("params"))
    context = fields.integer(unet, "context_dim")
    return YamlFacts(
        prediction_type=_prediction_type(params, file),
        family=_ENCODERS.get(_class(params.get("cond_stage_config"))) or _CONTEXTS.get(context or 0),
        num_heads=fields.integer(unet, "num_heads"),
        num_head_channels=fields.integer(unet, "num_head_channels"),
        in_channels=fields.integer(unet, "in_channels"),
        context_dim=context,
        scale_factor=fields.number(params, "scale_factor"),
        image_size=fields.integer(params, "image_size"),
    )


def _parse(text: str, file: str) -> Mapping[str, Any]:
    import yaml

    if len(text) > MAX_SIZE:
        raise UnsupportedError(f"{len(text):,} characters are too many for a config", file=file or None)

    class Loader(yaml.SafeLoader):
        """Without aliases, with which a small document can grow without bounds."""

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise UnsupportedError("it has aliases, and no config of a model needs any", file=file or None)
            return super().compose_node(parent, index)

    try:
        document = yaml.load(text, Loader)  # noqa: S506 - a safe loader
    # PyYAML's constructors of dates, numbers and the like fail with whatever Python raises.
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        message = f"it is no YAML: {' '.join(str(error).split())}"
        raise CorruptError(message, file=file or None, remedy="remove it or write it again") from error
    return _mapping(document)


def _prediction_type(params: Mapping[str, Any], file: str) -> str | None:
    """Of ldm's models, whose own default is epsilon, or of sgm's, by how they scale what the UNet puts out."""
    denoiser = _mapping(_mapping(params.get("denoiser_config")).get("params"))
    if denoiser:
        return _SCALINGS.get(_class(denoiser.get("scaling_config")))
    said = params.get("parameterization", "eps")
    if not isinstance(said, str) or said not in _PARAMETERIZATIONS:
        message = f"the model predicts {_shown(said)}, and only eps and v are known"
        raise UnsupportedError(message, file=file or None, key="model.params.parameterization")
    return _PARAMETERIZATIONS[said]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    """A value for a message, or its type where it may be of any size."""
    small = isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() < 64)
    return repr(value[:80]) if isinstance(value, str) else repr(value) if small else f"a {type(value).__name__}"


def _class(config: Any) -> str:
    return str(_mapping(config).get("target", "")).rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class _Fields:
    """Values of the types that they must have, or an error that names the file."""

    file: str

    def integer(self, mapping: Mapping[str, Any], name: str) -> int | None:
        value = mapping.get(name)
        if isinstance(value, list) and value:  # sgm gives the width of the text once a level
            value = value[0]
        if value is None or value == -1:  # openaimodel's way to say nothing
            return None
        if type(value) is not int or not 0 < value < 1 << 24:
            raise self._wrong(name, value)
        return value

    def number(self, mapping: Mapping[str, Any], name: str) -> float | None:
        value = mapping.get(name)
        if value is None:
            return None
        try:
            number = float(value)  # a string too: YAML 1.1 takes 1e-4 for one
        except (TypeError, ValueError, OverflowError) as error:
            raise self._wrong(name, value) from error
        if not 0 < number < float("inf"):
            raise self._wrong(name, value)
        return number

    def _wrong(self, name: str, value: Any) -> CorruptError:
        message = f"{name} makes no sense: {_shown(value)}"
        return CorruptError(message, file=self.file or None, key=name, remedy="remove it or write it again")
