"""The walks against other people's software: diffusers converts our names and shapes into its own models'."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import synthetic
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdsurgery.models.components import ema_name
from sdsurgery.models.recognition import UNETS
from sdsurgery.models.walks import (
    ClipConfig,
    Config,
    OpenClipConfig,
    UNetConfig,
    VaeConfig,
    parameters,
    solve,
    symbolic,
    walk,
)

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

# The structure in the `unet/config.json` of stable-diffusion-v1-5, stable-diffusion-2-1, stable-diffusion-xl-base-1.0
# and stable-diffusion-xl-refiner-1.0.
DIFFUSERS_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
    },
    "sd2": {
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
        "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": (PLAIN, CROSS, CROSS),
        "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
    },
    "sdxl-refiner": {
        "down_block_types": (PLAIN, CROSS, CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP),
        "transformer_layers_per_block": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
    },
}

PUBLISHED_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    "sd2": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-refiner": {
        "block_out_channels": (384, 768, 1536, 1536),
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
}


def meta(prefix: str, config: Config) -> dict[str, torch.Tensor]:
    """Our names and shapes as tensors that take no memory."""
    return {prefix + weight.name: torch.empty(weight.shape, device="meta") for weight in walk(config)}


def theirs(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def assert_none_lost(ours: dict[str, torch.Tensor], converted: dict[str, torch.Tensor]) -> None:
    """The converters pass over names that they don't know: each of ours must have come through."""
    arrived = {id(tensor) for tensor in converted.values()}
    assert [key for key, tensor in ours.items() if id(tensor) not in arrived] == []


def assert_unet_fits(family: str, ours: UNetConfig) -> None:
    config = DIFFUSERS_UNETS[family] | {
        "block_out_channels": ours.channels,
        "cross_attention_dim": ours.context,
        "in_channels": ours.inputs,
        "out_channels": ours.outputs,
        "attention_head_dim": 1,
        "norm_num_groups": 1,
    }
    if ours.vector:
        config["projection_class_embeddings_input_dim"] = ours.conditions
    tensors = meta("model.diffusion_model.", ours)
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    converted = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(model.config))
    assert shapes(converted) == theirs(model)
    assert len(converted) == len(tensors)
    assert_none_lost(tensors, converted)


def assert_vae_fits(ours: VaeConfig) -> None:
    levels = len(ours.channels)
    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=ours.channels,
            layers_per_block=2,
            latent_channels=ours.latent,
            norm_num_groups=1,
        )
    tensors = meta("first_stage_model.", ours)
    converted = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), dict(model.config))
    assert shapes(converted) == theirs(model)
    assert len(converted) == len(tensors)
    # The attention's weights come through squeezed, as others.
    attention = {key: value for key, value in tensors.items() if ".attn_1." in key and value.ndim == 4}
    assert len(attention) == 8
    assert_none_lost({key: value for key, value in tensors.items() if key not in attention}, converted)


def clip_config(ours: ClipConfig | OpenClipConfig, *, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=ours.vocabulary,
        hidden_size=ours.width,
        intermediate_size=ours.inner,
        projection_dim=ours.projection or ours.width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=ours.positions,
        eos_token_id=ours.vocabulary - 1,
        bos_token_id=0,
    )


def unprefixed(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """CLIPTextModel has lost its ``text_model.`` level in transformers 5.6; CLIPTextModelWithProjection hasn't."""
    return {key.removeprefix("text_model."): shape for key, shape in theirs(model).items()}


def assert_clip_fits(prefix: str, ours: ClipConfig) -> None:
    tensors = meta(prefix, ours)
    kind = CLIPTextModelWithProjection if ours.projected else CLIPTextModel
    with torch.device("meta"):
        model = kind(clip_config(ours, layers=ours.layers))
    converted = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
    assert {key.removeprefix("text_model."): value for key, value in shapes(converted).items()} == unprefixed(model)
    assert_none_lost(tensors, converted)


def assert_open_clip_fits(prefix: str, ours: OpenClipConfig) -> None:
    """SD2 uses the last but one state, so that diffusers builds a layer less and drops the projection."""
    sd2 = prefix == "cond_stage_model.model."
    with torch.device("meta"):
        if sd2:
            model = CLIPTextModel(clip_config(ours, layers=ours.layers - 1))
        else:
            model = CLIPTextModelWithProjection(clip_config(ours, layers=ours.layers))
    tensors = meta(prefix, ours)
    converted = single_file_utils.convert_open_clip_checkpoint(model, dict(tensors), prefix=prefix)
    assert {key.removeprefix("text_model."): value for key, value in shapes(converted).items()} == unprefixed(model)
    split = {key: value for key, value in tensors.items() if ".attn.in_proj_" in key}
    assert len(split) == 2 * ours.layers
    ignored = {prefix + "logit_scale", prefix + "text_projection"}  # the projection comes through transposed
    if sd2:
        ignored |= set(single_file_utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE)
        last = {key for key in tensors if f"resblocks.{ours.layers - 1}." in key}
        assert last < ignored
    assert ignored <= tensors.keys()
    assert_none_lost({k: v for k, v in tensors.items() if k not in split and k not in ignored}, converted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("widths", [synthetic.FULL, synthetic.NARROW], ids=["full", "narrow"])
def test_every_component_fits_diffusers(family: str, widths: dict[str, synthetic.Widths]) -> None:
    kinds = set()
    for prefix, config in synthetic.configs(family, widths[family]).items():
        kinds.add(type(config))
        if isinstance(config, UNetConfig):
            assert_unet_fits(family, config)
        elif isinstance(config, VaeConfig):
            assert_vae_fits(config)
        elif isinstance(config, ClipConfig):
            assert_clip_fits(prefix, config)
        else:
            assert_open_clip_fits(prefix, config)
    assert len(kinds) == {"sdxl": 4}.get(family, 3)


@pytest.mark.parametrize("inputs", [4, 5, 8, 9])
def test_variants_fit_diffusers(inputs: int) -> None:
    widths = synthetic.NARROW["sd1"]
    config = synthetic.configs("sd1", widths, inputs=inputs)["model.diffusion_model."]
    assert isinstance(config, UNetConfig)
    assert_unet_fits("sd1", config)


# Neighbours that are equal have no shortcut between them: the keys themselves depend on the widths.
WIDTH = st.sampled_from([2, 4, 6, 8])


@given(st.data())
@settings(max_examples=16)
def test_unets_of_any_width_fit_diffusers(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["sd1", "sd2", "sdxl-refiner"]))
    channels = tuple(data.draw(st.lists(WIDTH, min_size=4, max_size=4)))
    config = replace(
        UNETS[family],
        channels=channels,
        time=4 * channels[0],
        context=data.draw(WIDTH),
        inputs=data.draw(st.sampled_from([4, 9])),
        conditions=data.draw(WIDTH) if UNETS[family].vector else 0,
    )
    assert_unet_fits(family, config)


@given(st.lists(WIDTH, min_size=4, max_size=4).map(tuple), st.sampled_from([4, 16]))
@settings(max_examples=12)
def test_vaes_of_any_width_fit_diffusers(channels: tuple[int, ...], latent: int) -> None:
    assert_vae_fits(VaeConfig(channels=channels, pixels=3, latent=latent))


@given(WIDTH, WIDTH, st.integers(3, 50), st.integers(1, 300), st.booleans(), WIDTH)
@settings(max_examples=12)
def test_clips_of_any_width_fit_transformers(
    width: int, inner: int, vocabulary: int, positions: int, projected: bool, projection: int
) -> None:
    config = ClipConfig(12, projected, width, inner, vocabulary, positions, projection if projected else 0)
    assert_clip_fits("cond_stage_model.transformer.", config)


@given(WIDTH, WIDTH, st.integers(3, 50), st.integers(1, 300), WIDTH)
@settings(max_examples=12)
def test_open_clips_of_any_width_fit_transformers(
    width: int, inner: int, vocabulary: int, positions: int, projection: int
) -> None:
    """The projection is transposed, which square ones, as all published are, don't show."""
    config = OpenClipConfig(32, False, width, inner, vocabulary, positions, projection)
    assert_open_clip_fits("conditioner.embedders.1.model.", config)


@pytest.mark.parametrize(
    ("family", "places"),
    [("sd1", "2.1 5.2 8.2"), ("sd2", "2.1 5.2 8.2"), ("sdxl", "2.2 5.2"), ("sdxl-refiner", "2.1 5.2 8.2")],
)
def test_the_upsamplers_places(family: str, places: str) -> None:
    """They come behind the attention where there is one. diffusers looks for them in both places."""
    names = [weight.name for weight in walk(full(family, "model.diffusion_model."))]
    found = [name.split(".", 1)[1].removesuffix(".conv.bias") for name in names if name.endswith(".conv.bias")]
    assert found == places.split()


def full(family: str, prefix: str) -> Config:
    return synthetic.configs(family, synthetic.FULL[family])[prefix]


@pytest.mark.parametrize(
    ("family", "prefix", "count"),
    [
        ("sd1", "model.diffusion_model.", 686),
        ("sd2", "model.diffusion_model.", 686),
        ("sdxl", "model.diffusion_model.", 1680),
        ("sdxl-refiner", "model.diffusion_model.", 1220),
        ("sd1", "first_stage_model.", 248),
        ("sd1", "cond_stage_model.transformer.", 196),
        ("sd2", "cond_stage_model.model.", 294),
        ("sdxl", "conditioner.embedders.0.transformer.", 196),
        ("sdxl", "conditioner.embedders.1.model.", 390),
        ("sdxl-refiner", "conditioner.embedders.0.model.", 390),
    ],
)
def test_counts_of_published_components(family: str, prefix: str, count: int) -> None:
    names = [weight.name for weight in walk(full(family, prefix))]
    assert len(names) == len(set(names)) == count


@pytest.mark.parametrize(
    ("family", "prefix", "count"),
    [
        ("sd1", "model.diffusion_model.", 859_520_964),
        ("sd1", "first_stage_model.", 83_653_863),
        ("sd1", "cond_stage_model.transformer.", 123_060_480),
    ],
)
def test_parameters_of_published_components(family: str, prefix: str, count: int) -> None:
    assert parameters(walk(full(family, prefix))) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_published_unets_are_those_that_diffusers_counts(family: str) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(**DIFFUSERS_UNETS[family], **PUBLISHED_UNETS[family], attention_head_dim=8)
    assert parameters(walk(full(family, "model.diffusion_model."))) == model.num_parameters()


@pytest.mark.parametrize(("family", "count"), [("sd1", 1131), ("sd2", 1228), ("sdxl", 2515), ("sdxl-refiner", 1858)])
def test_counts_of_whole_files(family: str, count: int) -> None:
    assert len(synthetic.model(family)) == count


def test_counts_of_whole_files_with_ema_and_schedule() -> None:
    sd1 = synthetic.model("sd1")
    averaged, buffers = dict(synthetic.ema(sd1)), synthetic.schedule()
    scalars = {key for key, value in averaged.items() if not value.shape}
    assert scalars == {"model_ema.decay", "model_ema.num_updates"}
    assert len(sd1) + len(buffers) + len(scalars) == 1145
    assert len(sd1) + len(buffers) + len(averaged) == 1831
    assert len(sd1) + len(averaged) == 1819


def test_ema_names_are_those_that_diffusers_looks_for() -> None:
    """Its converter takes all dots out of the whole key."""
    config = full("sd1", "model.diffusion_model.")
    tensors = meta("model.diffusion_model.", config)
    averaged = {
        "model_ema." + ema_name(weight.name): torch.empty(weight.shape, device="meta") for weight in walk(config)
    }
    with torch.device("meta"):
        model = UNet2DConditionModel(**DIFFUSERS_UNETS["sd1"], **PUBLISHED_UNETS["sd1"], attention_head_dim=8)
    converted = single_file_utils.convert_ldm_unet_checkpoint(tensors | averaged, dict(model.config), extract_ema=True)
    assert_none_lost(averaged, converted)
    assert shapes(converted) == theirs(model)


def test_optional_weights_are_those_that_published_models_lack() -> None:
    """WD 1.4's OpenCLIP has 280 keys of the 294."""
    optional = [weight.name for weight in walk(OpenClipConfig(24, penultimate=True)) if weight.optional]
    assert len(optional) == 14
    assert {name.partition("resblocks.")[2].partition(".")[0] for name in optional} == {"23", ""}
    assert {name for name in optional if "resblocks" not in name} == {"text_projection", "logit_scale"}


# ---------------------------------------------------------------- solve

SIZE = st.integers(1, 64)


def widths_of(config: Config, draw: Any) -> Config:
    """The config with random widths: every level its own."""
    if isinstance(config, UNetConfig):
        channels = tuple(draw(st.lists(SIZE, min_size=len(config.depths), max_size=len(config.depths))))
        conditions = draw(SIZE) if config.vector else 0
        return replace(
            config, channels=channels, inputs=draw(SIZE), outputs=draw(SIZE), time=draw(SIZE), context=draw(SIZE),
            conditions=conditions,
        )  # fmt: skip
    if isinstance(config, VaeConfig):
        channels = tuple(draw(st.lists(SIZE, min_size=4, max_size=4)))
        return replace(config, channels=channels, pixels=draw(SIZE), latent=draw(SIZE))
    projection = draw(SIZE) if isinstance(config, OpenClipConfig) or config.projected else 0
    return replace(
        config, width=draw(SIZE), inner=draw(SIZE), vocabulary=draw(SIZE), positions=draw(SIZE), projection=projection
    )


STRUCTURES: list[Config] = [
    *(replace(unet, channels=()) for unet in UNETS.values()),
    VaeConfig(),
    ClipConfig(),
    ClipConfig(projected=True),
    OpenClipConfig(),
    OpenClipConfig(layers=32),
]


@given(st.data())
@settings(max_examples=200)
def test_solve_recovers_the_widths(data: st.DataObject) -> None:
    structure = data.draw(st.sampled_from(STRUCTURES))
    config = widths_of(structure, data.draw)
    assert solve(structure, {weight.name: weight.shape for weight in walk(config)}) == config


def lonely(structure: Config) -> set[str]:
    """Weights that alone tell of a width, so that a damage to them can't be seen."""
    seen: Counter[str] = Counter()
    tells: dict[str, set[str]] = {}
    for weight in walk(symbolic(structure)):
        for size in weight.shape:
            for name, _ in getattr(size, "terms", ()):
                seen[name] += 1
                tells.setdefault(weight.name, set()).add(name)
    return {weight for weight, names in tells.items() if any(seen[name] < 10 for name in names)}


@given(st.data(), st.integers(0, 1 << 64))
@settings(max_examples=100)
def test_solve_is_right_in_spite_of_a_damaged_minority(data: st.DataObject, seed: int) -> None:
    rng = random.Random(seed)  # hypothesis' own randomness is adversarial, and would damage a majority
    structure = data.draw(st.sampled_from(STRUCTURES))
    config = widths_of(structure, data.draw)
    shapes = {weight.name: weight.shape for weight in walk(config)}
    for name in sorted(shapes.keys() - lonely(structure)):
        fate = rng.random()
        if fate < 0.1:
            del shapes[name]
        elif fate < 0.2:
            shapes[name] = tuple(size + rng.randrange(1, 1000) for size in shapes[name])
        elif fate < 0.25:
            shapes[name] = (*shapes[name], 1)
    assert solve(structure, shapes) == config


def test_solve_keeps_what_no_shape_tells() -> None:
    assert solve(ClipConfig(positions=77), {}) == ClipConfig(positions=77)
