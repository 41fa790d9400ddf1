"""What a diffusers folder holds besides weights: configs, scheduler, tokenizers and the index of the pipeline."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import pstdev
from typing import Any

from ..checkpoint import Checkpoint, Note
from .components import Component
from .configs import CONFIG_NAME, NETWORKS, SCHEDULER_CONFIG_NAME, described, indented
from .identify import Model
from .known import latent_space, provenance_of_vae
from .position_ids import values
from .stated import INDEX, Stated, silent_fields
from .tokenizer import tokenizer_files
from .walks import ClipConfig, Config, Layout, OpenClipConfig, UNetConfig, VaeConfig

INDEX_NAME = "model_index.json"

# ComfyUI's rule for SD2: the v-prediction models have learned a wider bias here.
_TELLING_BIAS: Mapping[Layout, str] = {
    "ldm": "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "diffusers": "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
}
_TELLING_SPREAD = 0.09

_HEAD_WIDTH = 64
"""Width of an attention head in all published models but SD1's UNet, which has eight heads at every level."""

_TIME_IDS = {"sdxl": 6, "sdxl-refiner": 5}
"""Numbers of size and crop that stand in the vector beside the pooled text."""


@dataclass(frozen=True)
class Prediction:
    """What the UNet was trained to predict.

    Attributes:
        type: ``epsilon`` or ``v_prediction``.
        zero_snr: Whether the schedule ends without any signal.
        why: How that is known; empty if it is assumed.
    """

    type: str
    zero_snr: bool
    why: str


@cache
def stock(family: str) -> dict[str, Any]:
    """The published configs of a family without its variant; see ``data/stock``."""
    from importlib import resources

    text = resources.files("sdsurgery.data").joinpath("stock", f"{family}.json").read_text("utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def prediction(checkpoint: Checkpoint, model: Model, stated: Stated) -> Prediction:
    """The prediction type: stated, told by a marker, or for SD2 by the spread of a bias."""
    markers = {key.removeprefix(model.wrapper) for key in checkpoint}
    zero_snr = "ztsnr" in markers or _ends_without_signal(checkpoint, model)
    if stated.scheduler:
        zero_snr = zero_snr or bool(stated.scheduler.get("rescale_betas_zero_snr"))
    if stated.prediction_type:
        return Prediction(stated.prediction_type, zero_snr, stated.why)
    if model.base_family == "sdxl" and {"edm_vpred.sigma_max", "edm_vpred.sigma_min"} & markers:
        return Prediction("v_prediction", zero_snr, "the file has the markers edm_vpred")
    if "v_pred" in markers:
        return Prediction("v_prediction", zero_snr, "the file has the marker v_pred")
    unet = model.components.get("unet")
    key = unet.keys.get(_TELLING_BIAS[unet.layout]) if unet else None
    if model.family == "sd2" and key:
        found = values(checkpoint[key])
        spread = pstdev(found) if found and all(map(math.isfinite, found)) else math.nan
        kind = "v_prediction" if spread > _TELLING_SPREAD else "epsilon"
        return Prediction(kind, zero_snr, f"the spread of {key} is {spread:.3f}")
    return Prediction("epsilon", zero_snr, "")


def _ends_without_signal(checkpoint: Checkpoint, model: Model) -> bool:
    schedule = model.components.get("schedule")
    key = schedule.keys.get("alphas_cumprod") if schedule else None
    if key is None or not 0 < checkpoint[key].numel <= 1 << 16:
        return False
    return values(checkpoint[key])[-1] == 0


class FolderFiles:
    """Makes the files of one model's folder, and notes what had to be assumed.

    Attributes:
        model: What it is.
        notes: What was assumed; complete when :meth:`files` has been called.
    """

    def __init__(self, checkpoint: Checkpoint, model: Model, stated: Stated) -> None:
        self._checkpoint = checkpoint
        self.model = model
        self._stated = stated
        self.notes: list[Note] = [Note(message, "warning") for message in stated.ignored]

    def files(self) -> dict[str, bytes]:
        """Content by name; of a lone component only its config."""
        networks = self.model.networks
        if len(networks) == 1:
            (component,) = networks.values()
            return {CONFIG_NAME: indented(self.config(component))}
        return self.of_pipeline()

    def of_pipeline(self) -> dict[str, bytes]:
        """Content by name of a whole pipeline's files, however few of its networks there are.

        One of no known kind gets no config.
        """
        networks = {name: found for name, found in self.model.networks.items() if found.config is not None}
        family = self.model.base_family
        files = {f"{name}/{CONFIG_NAME}": indented(self.config(found)) for name, found in networks.items()}
        scheduler = self.scheduler()
        files[f"scheduler/{SCHEDULER_CONFIG_NAME}"] = indented(scheduler)
        files |= dict(self._tokenizers(family))
        files[INDEX_NAME] = indented(self._index(scheduler))
        return files

    def _family_of(self, component: Component) -> str:
        config = component.config
        if self.model.family != "unknown":
            return self.model.base_family
        if isinstance(config, OpenClipConfig):
            return "sd2" if config.penultimate else "sdxl"
        if isinstance(config, VaeConfig):
            family = provenance_of_vae(self._checkpoint, self.model).family
            if latent_space(family) is None and "vae" not in self._stated.configs:
                message = "the VAE's family isn't known: the latent scale of SD1 and SD2, 0.18215, is assumed"
                self.notes.append(Note(message + "; state another with --config", "warning"))
            return "sdxl" if latent_space(family) == "sdxl" else "sd1"
        return "sd1"

    def config(self, component: Component) -> dict[str, Any]:
        """The ``config.json`` of a component: its own shapes, then what is stated, then what is assumed."""
        family = self._family_of(component)
        name, config = component.name, component.config
        assert config is not None  # noqa: S101 - for the type checker: only networks are asked for
        document = dict(stock(family)["components"].get(name) or stock("sdxl")["components"][name])
        if name == "unet" and self.prediction.type == "v_prediction" and family == "sd2":
            document |= stock(family)["overrides"]["v_prediction"]["components"]["unet"]
        stated = dict(self._stated.configs.get(name, {}))
        shaped = described(config)
        if document | shaped != document:
            document |= self._assumed(name, document, config, stated)
        if name == "vae" and self._edm_latents():
            document |= {"scaling_factor": stock("sdxl")["edm"]["latents_scaling_factor"], **self._edm_latents()}
        if isinstance(config, ClipConfig) and config.projected:
            document["architectures"] = ["CLIPTextModelWithProjection"]
        if name == "unet" and self._stated.head_channels and "attention_head_dim" not in stated:
            stated["attention_head_dim"] = [
                width // self._stated.head_channels for width in shaped["block_out_channels"]
            ]
        return dict(sorted((document | stated | shaped).items()))

    @cached_property
    def prediction(self) -> Prediction:
        """What the UNet was trained to predict."""
        return prediction(self._checkpoint, self.model, self._stated)

    def _assumed(
        self, name: str, document: Mapping[str, Any], config: Config, stated: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Heads, groups and the like for widths that no published model has."""
        if isinstance(config, UNetConfig):
            guess = self._assumed_for_unet(document, config)
        elif isinstance(config, VaeConfig):
            guess = {"norm_num_groups": math.gcd(document["norm_num_groups"], *config.channels)}
        else:
            guess = {"num_attention_heads": _heads(config.width, document["num_attention_heads"])}
        open_fields = sorted(field for field in guess if field not in stated and guess[field] != document.get(field))
        if open_fields:
            listed = ", ".join(f"{field} {guess[field]}" for field in open_fields)
            message = f"no published {name} has these widths; assumed: {listed}; state others with --config"
            self.notes.append(Note(message, "warning"))
        return guess

    def _assumed_for_unet(self, document: Mapping[str, Any], config: UNetConfig) -> dict[str, Any]:
        heads = document["attention_head_dim"]
        guess: dict[str, Any] = {"norm_num_groups": math.gcd(document["norm_num_groups"], *config.channels)}
        if isinstance(heads, int):
            attending = [width for width, depth in zip(config.channels, config.depths, strict=True) if depth]
            guess["attention_head_dim"] = math.gcd(heads, *attending, config.channels[-1])
        else:
            guess["attention_head_dim"] = [_heads(width, 1) for width in config.channels]
        pooled = self.model.components.get("text_encoder_2")
        numbers = _TIME_IDS.get(self.model.base_family)
        if numbers and pooled and isinstance(pooled.config, OpenClipConfig):
            size = (config.conditions - pooled.config.projection) / numbers
            if size > 0 and size.is_integer():
                guess["addition_time_embed_dim"] = int(size)
        return guess

    def scheduler(self) -> dict[str, Any]:
        """The ``scheduler_config.json``."""
        found, family = self.prediction, self.model.base_family
        why = found.why or "assumed, as published models of the family have it; state another with --prediction-type"
        self.notes.append(Note(f"prediction type {found.type}: {why}"))
        if self._stated.scheduler:
            return dict(sorted((dict(self._stated.scheduler) | {"prediction_type": found.type}).items()))
        document = dict(stock(family)["scheduler"])
        overrides = stock(family)["overrides"]
        if found.type == "v_prediction" and "v_prediction" in overrides:
            document |= overrides["v_prediction"]["scheduler"]
        edm = self._edm_scheduler()
        if edm:
            return dict(sorted((edm | {"prediction_type": found.type}).items()))
        text_encoder = self.model.components.get("text_encoder")
        if family == "sd2" and text_encoder and "conditioner." in text_encoder.prefix:
            document |= overrides["turbo"]["scheduler"]
            self.notes.append(Note("its text encoder lies where SD2-Turbo has it: the scheduler is Turbo's"))
        if found.zero_snr:
            document |= stock("sdxl")["overrides"]["zero_snr"]["scheduler"]
        return dict(sorted((document | {"prediction_type": found.type}).items()))

    def _edm_scheduler(self) -> dict[str, Any] | None:
        """The scheduler of CosXL or Playground v2.5, whose markers tell of them; both came after diffusers 0.21."""
        if self._edm_latents():
            return dict(stock("sdxl")["edm"]["latents"])
        sigmas = {name: self._marker(f"edm_vpred.{name}") for name in ("sigma_max", "sigma_min")}
        if self.model.base_family != "sdxl" or not any(sigmas.values()):
            return None
        return dict(stock("sdxl")["edm"]["vpred"]) | {name: found[0] for name, found in sigmas.items() if found}

    def _edm_latents(self) -> dict[str, list[float]]:
        """Playground's mean and spread of the latents; nothing where the markers don't tell both of each channel."""
        vae = self.model.components.get("vae")
        if self.model.base_family != "sdxl" or vae is None or not isinstance(vae.config, VaeConfig):
            return {}
        found = {"latents_mean": self._marker("edm_mean"), "latents_std": self._marker("edm_std")}
        return found if all(len(numbers) == vae.config.latent for numbers in found.values()) else {}

    def _marker(self, name: str) -> list[float]:
        """The values of a marker tensor, if it is there and they are sound."""
        tensor = self._checkpoint.get(self.model.wrapper + name)
        found = values(tensor) if tensor and tensor.numel <= _MOST_IN_MARKER else []
        return found if all(map(math.isfinite, found)) else []

    def sides(self) -> dict[str, dict[str, Any]]:
        """What is assumed of tokenizers and index where nobody states it: see :data:`stated.SILENT_FIELDS`."""
        family = stock(self.model.base_family)
        variant = self.model.family.removeprefix(self.model.base_family)
        index = (family["pipelines"].get(variant) or family["pipelines"][""])["index"]
        known = silent_fields(INDEX)
        return {
            **{name: {"pad_token": entry["pad_token"]} for name, entry in family["tokenizers"].items()},
            INDEX: {field: value for field, value in index.items() if field in known},
        }

    def _tokenizers(self, family: str) -> Iterator[tuple[str, bytes]]:
        for name, entry in stock(family)["tokenizers"].items():
            encoder = self.model.components.get(name.replace("tokenizer", "text_encoder"))
            if encoder is None or not isinstance(encoder.config, ClipConfig | OpenClipConfig):
                continue
            vocabulary, positions = encoder.config.vocabulary, encoder.config.positions
            if vocabulary != _VOCABULARY:
                message = f"the {encoder.name} has {vocabulary:,} tokens, and CLIP's tokenizer {_VOCABULARY:,}"
                self.notes.append(Note(message, "warning"))
            pad_token = self._stated.configs.get(name, entry).get("pad_token", entry["pad_token"])
            for file, content in tokenizer_files(pad_token, positions).items():
                yield f"{name}/{file}", content

    def _index(self, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        family, variant = self.model.base_family, self.model.family.removeprefix(self.model.base_family)
        pipelines = stock(family)["pipelines"]
        entry = pipelines.get(variant) or pipelines[""]
        if variant not in pipelines:
            message = f"diffusers has no pipeline for {self.model.family}: {entry['class']} is named, and won't draw"
            self.notes.append(Note(message, "warning"))
        stated = self._stated.configs.get(INDEX, {})
        parts: dict[str, Any] = {field: stated.get(field, value) for field, value in entry["index"].items()}
        for name in stock(family)["components"]:
            parts[name] = self._loaded_by(name)
        for name in stock(family)["tokenizers"]:
            there = name.replace("tokenizer", "text_encoder") in self.model.components
            parts[name] = ["transformers", "CLIPTokenizer"] if there else [None, None]
        kind = scheduler.get("_class_name")
        parts["scheduler"] = ["diffusers", kind if isinstance(kind, str) else stock(family)["scheduler"]["_class_name"]]
        absent = [name for name in NETWORKS if name in stock(family)["components"] and parts[name] == [None, None]]
        if absent:
            message = f"it has no {', '.join(absent)}: who loads the folder must give one"
            self.notes.append(Note(message, "warning"))
        return {"_class_name": entry["class"], **dict(sorted(parts.items()))}

    def _loaded_by(self, name: str) -> list[str | None]:
        """Library and class that load a component."""
        found = self.model.components.get(name)
        if found is None:
            return [None, None]
        if name in _LOADED_BY:
            return ["diffusers", _LOADED_BY[name]]
        projected = name == "text_encoder_2" or (isinstance(found.config, ClipConfig) and found.config.projected)
        return ["transformers", "CLIPTextModelWithProjection" if projected else "CLIPTextModel"]


_LOADED_BY = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}

_VOCABULARY = 49408
_MOST_IN_MARKER = 64


def _heads(width: int, fewest: int) -> int:
    """Heads of 64, or as many as divide the width."""
    return width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else math.gcd(width, fewest)
