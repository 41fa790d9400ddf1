"""The ``.yaml`` beside a single file, against diffusers' reader of the same documents."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdsurgery.errors import CorruptError, InputError, UnsupportedError, UsageError
from sdsurgery.models.walks import UNetConfig, VaeConfig
from sdsurgery.models.yaml_config import MAX_SIZE, Networks, YamlFacts, path_beside, read, write

SD1 = UNetConfig(depths=(1, 1, 1, 0), middle=1, linear=False, channels=(320, 640, 1280, 1280), context=768)
SD2 = replace(SD1, linear=True, context=1024)
VAE = VaeConfig(channels=(128, 256, 512, 512))
CHANNELS = {"": 4, "-inpainting": 9, "-pix2pix": 8, "-depth": 5}
STOCK = {
    "sd1": Networks(SD1, VAE, num_heads=8),
    "sd2": Networks(SD2, VAE, num_head_channels=64),
}
KINDS = [(family, variant, kind) for family in STOCK for variant in CHANNELS for kind in ("epsilon", "v_prediction")]


def networks(family: str, variant: str) -> Networks:
    stock = STOCK[family]
    return replace(stock, unet=replace(stock.unet, inputs=CHANNELS[variant]))


@pytest.mark.parametrize(("family", "variant", "kind"), KINDS)
def test_what_is_written_is_read(family: str, variant: str, kind: str) -> None:
    assert read(write(family, variant, kind, networks(family, variant))) == YamlFacts(
        prediction_type=kind,
        family=family,
        num_heads=8 if family == "sd1" else None,
        num_head_channels=None if family == "sd1" else 64,
        in_channels=CHANNELS[variant],
        context_dim=768 if family == "sd1" else 1024,
        scale_factor=0.18215,
        image_size=16 if variant == "-pix2pix" else 64,
    )


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize("variant", CHANNELS)
def test_diffusers_makes_the_stock_configs_of_it(family: str, variant: str) -> None:
    from diffusers.loaders import single_file_utils as diffusers

    document = yaml.safe_load(write(family, variant, "epsilon", networks(family, variant)))
    stock = json.loads(resources.files("sdsurgery.data").joinpath(f"stock/{family}.json").read_text("utf-8"))
    expected = stock["components"]["unet"] | {"in_channels": CHANNELS[variant]}
    unet = diffusers.create_unet_diffusers_config_from_ldm(document, {})
    assert {name: value for name, value in unet.items() if name in expected} == {
        name: value for name, value in expected.items() if name in unet
    }
    vae = diffusers.create_vae_diffusers_config_from_ldm(document, {})
    expected = stock["components"]["vae"] | {"sample_size": 512}
    assert vae == {name: value for name, value in expected.items() if name in vae}


@pytest.mark.parametrize(
    ("variant", "target", "key"),
    [
        ("", "LatentDiffusion", "crossattn"),
        ("-inpainting", "LatentInpaintDiffusion", "hybrid"),
        ("-depth", "LatentDepth2ImageDiffusion", "hybrid"),
        ("-pix2pix", "LatentDiffusion", "hybrid"),
    ],
)
def test_the_webui_makes_the_right_class(variant: str, target: str, key: str) -> None:
    model = yaml.safe_load(write("sd2", variant, "v_prediction", networks("sd2", variant)))["model"]
    assert model["target"].endswith(f".{target}")
    assert model["params"]["conditioning_key"] == key
    assert model["params"]["parameterization"] == "v"
    assert ("depth_stage_config" in model["params"]) is (variant == "-depth")
    assert ("ddpm_edit" in model["target"]) is (model["params"]["cond_stage_key"] == "edit") is (variant == "-pix2pix")
    text_encoder = model["params"]["cond_stage_config"]
    assert text_encoder["params"] == {"freeze": True, "layer": "penultimate"}


def test_narrow_widths_survive() -> None:
    unet = replace(SD1, channels=(32, 48, 64, 64), context=48)
    narrow = Networks(unet, VaeConfig(channels=(16, 32, 64, 64)), num_heads=4)
    params = yaml.safe_load(write("sd1", "", "epsilon", narrow))["model"]["params"]
    unet_params = params["unet_config"]["params"]
    assert (unet_params["model_channels"], unet_params["channel_mult"]) == (32, [1, 1.5, 2, 2])
    assert params["first_stage_config"]["params"]["ddconfig"]["ch_mult"] == [1, 2, 4, 4]


SGM = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.13025
    denoiser_config:
      params:
        scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.SCALING}
    network_config:
      params: {in_channels: 4, num_heads: -1, num_head_channels: 64, context_dim: CONTEXT}
"""


@pytest.mark.parametrize(
    ("scaling", "kind"), [("EpsScaling", "epsilon"), ("VScaling", "v_prediction"), ("EDMScaling", None)]
)
@pytest.mark.parametrize(("context", "family"), [("2048", "sdxl"), ("[1280, 1280]", "sdxl-refiner"), ("1024", "sd2")])
def test_configs_of_sgm_are_read(scaling: str, kind: str | None, context: str, family: str) -> None:
    facts = read(SGM.replace("SCALING", scaling).replace("CONTEXT", context))
    assert (facts.prediction_type, facts.family) == (kind, family)
    assert (facts.num_heads, facts.num_head_channels, facts.scale_factor) == (None, 64, 0.13025)


def test_little_is_enough() -> None:
    assert read("model: {params: {parameterization: v}}") == YamlFacts(prediction_type="v_prediction")
    assert read("model: {params: {scale_factor: 1e-4}}").scale_factor == 1e-4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", UnsupportedError),
        ("just words", UnsupportedError),
        ("model: {params: [1, 2]}", UnsupportedError),
        ("model: {params: {parameterization: x0}}", UnsupportedError),
        ("model: {params: {parameterization: [v]}}", UnsupportedError),
        ("x" * (MAX_SIZE + 1), UnsupportedError),
        ("a: &a [x, x]\nmodel: {params: {scale_factor: *a}}", UnsupportedError),
        ("model: [", CorruptError),
        ("model: !!python/object/apply:os.system [id]", CorruptError),
        ("model: 2024-99-99", CorruptError),
        ("model: !!timestamp soon", CorruptError),
        ("model: !!bool perhaps", CorruptError),
        ("model: !!int ''", CorruptError),
        ("a: 1\x00", CorruptError),
        ("[" * 5000, CorruptError),
        ("model: {params: {scale_factor: -1}}", CorruptError),
        ("model: {params: {scale_factor: .nan}}", CorruptError),
        ("model: {params: {scale_factor: {}}}", CorruptError),
        ("model: {params: {scale_factor: 0x" + "f" * 50_000 + "}}", CorruptError),
        ("model: {params: {image_size: " + "1:" * 30_000 + "1}}", CorruptError),
        ("model: {params: {image_size: large}}", CorruptError),
        ("model: {params: {unet_config: {params: {num_heads: true}}}}", CorruptError),
        ("model: {params: {unet_config: {params: {in_channels: 4.5}}}}", CorruptError),
    ],
    ids=range(23),
)
def test_malformed_documents_name_their_file(text: str, error: type[InputError]) -> None:
    with pytest.raises(error) as caught:
        read(text, "model.yaml")
    assert caught.value.file == "model.yaml"


@pytest.mark.parametrize(
    "words", [("sdxl", "", "epsilon"), ("sd1", "-upscaler", "epsilon"), ("sd1", "", "sample")], ids=" ".join
)
def test_nothing_is_made_up(words: tuple[Any, Any, Any]) -> None:
    with pytest.raises(UsageError):
        write(*words, STOCK["sd1"])


def test_the_document_lies_beside_the_model() -> None:
    assert path_beside(Path("models/a.fp16.safetensors")) == Path("models/a.fp16.yaml")
