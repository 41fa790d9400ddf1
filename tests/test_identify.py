"""What model a checkpoint holds, and what is missing from it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from conftest import outline
from diffusers import ControlNetModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import FULL, NARROW, SD1_IDS, SDXL_IDS
from transformers import (
    BartConfig,
    BartModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    WhisperConfig,
    WhisperModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import sdsurgery as sd
from sdsurgery.inspection import Inspection, inspect
from sdsurgery.models.components import POSITION_IDS, SCHEDULE_BUFFERS
from sdsurgery.models.identify import UNETS, Model, identify
from sdsurgery.models.walks import OpenClipConfig, UNetConfig, walk

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
Shapes = dict[str, tuple[int, ...]]


@cache
def _shapes(family: str, inputs: int) -> Shapes:
    found = synthetic.shapes(family, NARROW[family], inputs=inputs)
    ids = {"sd1": SD1_IDS, "sdxl": SDXL_IDS}.get(family)
    return found | ({ids: (1, 77)} if ids else {})


def shapes(family: str, inputs: int = 4) -> Shapes:
    """Keys and shapes of a narrow model, position ids included."""
    return dict(_shapes(family, inputs))


def of(tensors: Mapping[str, tuple[int, ...]]) -> Model:
    return identify(outline(tensors))


def report(tensors: Mapping[str, tuple[int, ...]]) -> Inspection:
    """What inspect says; the position ids, whose values it reads, are left out of an outline."""
    return inspect(outline({key: shape for key, shape in tensors.items() if not key.endswith("position_ids")}))


def counts(model: Model) -> dict[str, int]:
    return {name: len(list(component.all_keys())) for name, component in model.components.items()}


def part(tensors: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in tensors.items() if key.startswith(prefix)}


# ---------------------------------------------------------------- families

COUNTS = {
    "sd1": {"text_encoder": 197, "unet": 686, "vae": 248},
    "sd2": {"text_encoder": 294, "unet": 686, "vae": 248},
    "sdxl": {"text_encoder": 197, "text_encoder_2": 390, "unet": 1680, "vae": 248},
    "sdxl-refiner": {"text_encoder_2": 390, "unet": 1220, "vae": 248},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("inputs", "suffix"), [(4, ""), (9, "-inpainting"), (8, "-pix2pix"), (5, "-depth")])
def test_families_and_variants(family: str, inputs: int, suffix: str) -> None:
    model = of(shapes(family, inputs))
    assert (model.layout, model.family, model.base_family) == ("ldm", family + suffix, family)
    assert counts(model) == COUNTS[family]
    assert all(not found.missing and not found.stray for found in model.components.values())


@pytest.mark.parametrize("inputs", [1, 3, 6, 7, 10, 16])
def test_other_input_channels_are_unknown(inputs: int) -> None:
    """7 are those of the upscaler."""
    model = of(shapes("sd1", inputs))
    assert model.family == "unknown"
    assert counts(model) == COUNTS["sd1"]
    assert f"{inputs} input channels" in " ".join(model.evidence)


THEIR_NAMES = {
    "v1": "sd1", "inpainting": "sd1-inpainting", "instruct-pix2pix": "sd1-pix2pix",
    "v2": "sd2", "inpainting_v2": "sd2-inpainting",
    "xl_base": "sdxl", "xl_inpaint": "sdxl-inpainting", "xl_refiner": "sdxl-refiner",
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "inputs"),
    [("sd1", 4), ("sd1", 9), ("sd1", 8), ("sd2", 4), ("sd2", 9), ("sdxl", 4), ("sdxl", 9), ("sdxl-refiner", 4)],
)
def test_families_are_those_that_diffusers_tells(family: str, inputs: int) -> None:
    full = synthetic.shapes(family, FULL[family], inputs=inputs)
    theirs = single_file_utils.infer_diffusers_model_type(
        {key: torch.empty(shape, device="meta") for key, shape in full.items()}
    )
    assert THEIR_NAMES[theirs] == of(full).family


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_is_told_like_narrow(family: str) -> None:
    model = of(synthetic.shapes(family, FULL[family]))
    assert model.family == family
    assert all(not found.missing and not found.stray for found in model.components.values())


@given(st.sampled_from(FAMILIES), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_the_order_of_keys_means_nothing(family: str, rng: random.Random) -> None:
    items = list(shapes(family).items())
    straight = of(dict(items))
    rng.shuffle(items)
    shuffled = of(dict(items))
    assert (shuffled.family, shuffled.layout, shuffled.evidence) == (
        straight.family,
        straight.layout,
        straight.evidence,
    )
    assert shuffled.components.keys() == straight.components.keys()
    for name, found in shuffled.components.items():
        assert dict(found.keys) == dict(straight.components[name].keys)


def test_sd2_turbo_has_its_text_encoder_where_the_refiner_has_one() -> None:
    turbo = {
        key.replace("cond_stage_model.", "conditioner.embedders.0."): shape for key, shape in shapes("sd2").items()
    }
    model = of(turbo)
    assert (model.layout, model.family) == ("ldm", "sd2")
    assert counts(model) == COUNTS["sd2"]
    assert model.components["text_encoder"].name == "text_encoder"
    assert model.clip is None


def test_waifu_diffusion_lacks_the_last_layer_and_is_complete() -> None:
    """WD 1.4: no layer 23, no projection, no logit scale."""
    tail = ("transformer.resblocks.23.", "text_projection", "logit_scale")
    lacking = {
        key: shape
        for key, shape in shapes("sd2").items()
        if not key.removeprefix("cond_stage_model.model.").startswith(tail)
    }
    found = report(lacking)
    assert found.family == "sd2"
    assert found.components["text_encoder"].tensors == 280
    assert found.components["text_encoder"].complete
    assert found.components["text_encoder"].missing == ()


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("sdxl", "conditioner.embedders.1.model."), ("sdxl-refiner", "conditioner.embedders.0.model.")],
)
def test_sdxl_needs_the_whole_of_its_second_text_encoder(family: str, prefix: str) -> None:
    """It takes the pooled state, which goes through the last layer and the projection; the scale it doesn't need."""
    for name in ("transformer.resblocks.31.ln_2.bias", "text_projection"):
        lacking = shapes(family)
        del lacking[prefix + name]
        found = report(lacking).components["text_encoder_2"]
        assert (found.missing, found.complete) == ((prefix + name,), False)
    lacking = shapes(family)
    del lacking[prefix + "logit_scale"]
    assert report(lacking).components["text_encoder_2"].complete


# ---------------------------------------------------------------- components alone, wrappers


@pytest.mark.parametrize(
    ("family", "prefix", "layout", "told", "name"),
    [
        ("sd1", UNET, "ldm", "sd1", "unet"),
        ("sd2", UNET, "ldm", "sd2", "unet"),
        ("sdxl", UNET, "ldm", "sdxl", "unet"),
        ("sdxl-refiner", UNET, "ldm", "sdxl-refiner", "unet"),
        ("sd1", VAE, "ldm", "unknown", "vae"),
        ("sdxl", VAE, "ldm", "unknown", "vae"),
        ("sd1", "cond_stage_model.transformer.", "diffusers", "unknown", "text_encoder"),
        ("sd2", "cond_stage_model.model.", "ldm", "unknown", "text_encoder"),
        ("sdxl", "conditioner.embedders.1.model.", "ldm", "unknown", "text_encoder_2"),
    ],
)
def test_a_component_alone_with_bare_names(family: str, prefix: str, layout: str, told: str, name: str) -> None:
    bare = part(shapes(family), prefix)
    for wrapper in ("", "module.", "state_dict."):
        model = of({wrapper + key: shape for key, shape in bare.items()})
        assert (model.layout, model.family, model.wrapper) == (layout, told, wrapper)
        assert counts(model) == {name: len(bare)}
        assert (model.components[name].missing, model.components[name].stray) == ((), ())


def test_an_inpainting_unet_alone_is_told() -> None:
    assert of(part(shapes("sd1", 9), UNET)).family == "sd1-inpainting"


@pytest.mark.parametrize("prefix", [UNET, VAE, "cond_stage_model.transformer."])
def test_a_component_alone_under_its_prefix(prefix: str) -> None:
    name = {UNET: "unet", VAE: "vae"}.get(prefix, "text_encoder")
    model = of({key: shape for key, shape in shapes("sd1").items() if key.startswith(prefix)})
    assert (model.layout, list(model.components)) == ("ldm", [name])
    assert model.family == ("sd1" if name == "unet" else "unknown")


@pytest.mark.parametrize("wrapper", ["module.", "state_dict.", "state_dict.module.", "module.module."])
def test_wrappers_around_all_keys(wrapper: str) -> None:
    model = of({wrapper + key: shape for key, shape in shapes("sd1").items()})
    assert (model.family, model.wrapper) == ("sd1", wrapper)
    assert counts(model) == COUNTS["sd1"]


def test_a_prefix_of_some_keys_is_no_wrapper() -> None:
    model = of(shapes("sd1") | {"module.x": (1,)})
    assert (model.family, model.wrapper) == ("sd1", "")
    assert list(model.components["other"].all_keys()) == ["module.x"]


def text_config(**more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64, hidden_size=8, intermediate_size=32, num_hidden_layers=12, num_attention_heads=1, **more
    )


def shapes_of(module: torch.nn.Module, prefix: str = "") -> Shapes:
    return {prefix + key: tuple(value.shape) for key, value in module.state_dict().items()}


def made(kind: Callable[..., torch.nn.Module], *args: Any, **config: Any) -> Shapes:
    """Keys and shapes of somebody else's model."""
    with torch.device("meta"):
        return shapes_of(kind(*args, **config))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_that_transformers_saved(prefix: str) -> None:
    """Prefixed before transformers 5.6, flat since: both are read."""
    saved = {key.removeprefix("text_model."): shape for key, shape in made(CLIPTextModel, text_config()).items()}
    model = of({prefix + key: shape for key, shape in saved.items()})
    assert (model.layout, model.family, counts(model)) == ("diffusers", "unknown", {"text_encoder": 196})
    assert model.components["text_encoder"].missing == ()
    assert model.clip is not None


def test_a_text_encoder_with_projection_that_transformers_saved() -> None:
    model = of(made(CLIPTextModelWithProjection, text_config(projection_dim=4)))
    assert (model.layout, counts(model)) == ("diffusers", {"text_encoder": 197})
    assert model.components["text_encoder"].missing == ()


def test_flat_text_encoder_in_a_whole_model() -> None:
    flat = {key.replace("transformer.text_model.", "transformer."): shape for key, shape in shapes("sd1").items()}
    model = of(flat)
    assert (model.family, counts(model)) == ("sd1", COUNTS["sd1"])
    assert model.components["text_encoder"].missing == ()
    assert model.components["text_encoder"].keys[POSITION_IDS] == SD1_IDS.replace("text_model.", "")


def test_a_second_copy_in_the_wrong_place_is_the_stray_one() -> None:
    stray = SD1_IDS.replace("text_model.", "")
    for order in (1, -1):
        items = list((shapes("sd1") | {stray: (1, 77)}).items())[::order]
        clip = of(dict(items)).components["text_encoder"]
        assert (clip.keys[POSITION_IDS], clip.stray) == (SD1_IDS, (stray,))


# ---------------------------------------------------------------- what isn't Stable Diffusion


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=8, intermediate_size=32, num_hidden_layers=24, num_attention_heads=1, image_size=32, patch_size=8
    )


def bare_controlnet() -> Shapes:
    """A UNet's half with zero convolutions and a hint, as lllyasviel published it: 340 keys."""
    half = {
        key: shape for key, shape in part(shapes("sd1"), UNET).items() if not key.startswith(("output_blocks.", "out."))
    }
    zeros = {f"zero_convs.{index}.0": (4, 4, 1, 1) for index in range(12)} | {"middle_block_out.0": (12, 12, 1, 1)}
    hints = {f"input_hint_block.{index}": (4, 4, 3, 3) for index in range(0, 16, 2)}
    for name, shape in (zeros | hints).items():
        half |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert len(half) == 340
    return half


def clip_and_vision() -> Shapes:
    config = CLIPConfig(text_config=text_config().to_dict(), vision_config=vision_config().to_dict())
    return made(CLIPModel, config)


SMALL = {"d_model": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1, "encoder_ffn_dim": 32}


def bart_encoder() -> Shapes:
    """Its attention has CLIP's own names."""
    config = BartConfig(vocab_size=64, encoder_layers=12, decoder_layers=1, decoder_ffn_dim=32, **SMALL)
    return {key: shape for key, shape in made(BartModel, config).items() if key.startswith("encoder.layers.")}


def whisper() -> Shapes:
    return made(WhisperModel, WhisperConfig(encoder_layers=12, decoder_layers=12, **SMALL))


STRANGERS: dict[str, Callable[[], Shapes]] = {
    "nothing": dict,
    "random keys": lambda: {f"layer.{index}.weight": (8, 8) for index in range(300)},
    "a LoRA": lambda: {
        f"lora_unet_input_blocks_{index}_1_proj_in.lora_{side}.weight": (4, 4)
        for index in range(12)
        for side in ("up", "down")
    },
    "CLIP's vision transformer": lambda: made(CLIPVisionModel, vision_config()),
    "CLIP's vision transformer, prefixed": lambda: {
        "vision_model." + key.removeprefix("vision_model."): shape
        for key, shape in made(CLIPVisionModel, vision_config()).items()
    },
    "Whisper": whisper,
    "BART's encoder": bart_encoder,
    "CLIP's text transformer deep in another model": lambda: {
        "owlvit.text_model." + key.removeprefix("text_model."): shape
        for key, shape in made(CLIPTextModel, text_config()).items()
    },
    "Flux": lambda: made(
        FluxTransformer2DModel, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, in_channels=4, axes_dims_rope=(4, 4, 8),
    ),
    "SD3": lambda: made(
        SD3Transformer2DModel, num_layers=2, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=8, in_channels=4,
    ),
    "a ControlNet": lambda: {"control_model." + key: shape for key, shape in bare_controlnet().items()},
    "a ControlNet with bare names": bare_controlnet,
    "a ControlNet of diffusers": lambda: made(
        ControlNetModel, block_out_channels=(4, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=8, attention_head_dim=1, norm_num_groups=1, conditioning_embedding_out_channels=(2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_stay_unknown(name: str) -> None:
    tensors = STRANGERS[name]()
    model = of(tensors)
    assert model.family == "unknown"
    assert model.clip is None
    if name != "a ControlNet of diffusers":
        assert (model.layout, counts(model)) == ("unknown", {"other": len(tensors)} if tensors else {})
    checkpoint = outline(tensors)
    assert dict(sd.FixClip()(checkpoint)) == dict(checkpoint)


# hypothesis tries the words of the source too.
KNOWN = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.", "down_blocks.")


@given(
    st.dictionaries(
        st.text(max_size=40).filter(lambda key: not any(word in key for word in KNOWN)),
        st.lists(st.integers(0, 9), max_size=5).map(tuple),
        max_size=60,
    )
)
@settings(max_examples=200)
def test_random_keys_are_unknown(tensors: Shapes) -> None:
    model = of(tensors)
    assert (model.layout, model.family) == ("unknown", "unknown")
    assert counts(model) == ({"other": len(tensors)} if tensors else {})


SEGMENTS = st.sampled_from(
    "model diffusion_model first_stage_model cond_stage_model conditioner embedders 0 1 2 transformer text_model "
    "embeddings encoder layers position_ids input_blocks middle_block output_blocks proj_in label_emb resblocks attn "
    "weight bias model_ema betas decoder module state_dict in_proj_weight vision_model patch_embedding".split()
)


@given(
    st.dictionaries(
        st.lists(SEGMENTS, min_size=1, max_size=6).map(".".join),
        st.lists(st.integers(0, 9), max_size=5).map(tuple),
        max_size=60,
    )
)
@settings(max_examples=300)
def test_words_of_the_trade_in_any_order_never_fail(tensors: Shapes) -> None:
    """Whatever it is told to be, every key is in exactly one component, and all that inspect asks has an answer."""
    checkpoint = outline(tensors)
    model = identify(checkpoint)
    owned = [key for component in model.components.values() for key in component.all_keys()]
    assert sorted(owned) == sorted(tensors)
    if not any(key.endswith("position_ids") for key in tensors):
        assert inspect(checkpoint).family == model.family


@pytest.mark.parametrize(
    "key",
    [
        "embeddings." * 200_000 + "\n",
        "cond_stage_model." + "embeddings." * 200_000 + "\n",
        "cond_stage_model.transformer." + "encoder.layers." * 100_000,
        "cond_stage_model.model.transformer.resblocks." + "9" * 5000 + ".x",
        "text_model.encoder.layers." + "9" * 5000 + ".self_attn.q_proj.weight",
        "module." * 200_000,
        "." * 1_000_000,
    ],
    ids=lambda key: f"{key[:20]!r}",
)
def test_absurd_keys_are_read_in_no_time(key: str) -> None:
    """A pattern that goes over such a key again and again would take minutes, and a number of its digits fail."""
    assert of(shapes("sd1") | {key: (1,)}).family == "sd1"
    model = of({key: (1,)})
    assert model.family == "unknown"
    assert [key for found in model.components.values() for key in found.all_keys()] == [key]


def unclip() -> Shapes:
    """SD2.1 unCLIP: SD2's UNet with a vector embedding as the refiner has one."""
    unet = synthetic.configs("sd2", NARROW["sd2"])[UNET]
    assert isinstance(unet, UNetConfig)
    return {UNET + weight.name: weight.shape for weight in walk(replace(unet, vector=True, conditions=24))}


def upscaler() -> Shapes:
    """SD2's x4 upscaler: attention in the inner levels, an embedding of noise levels, 7 channels."""
    unet = UNetConfig((0, 1, 1, 1), 1, True, channels=(4, 8, 8, 12), inputs=7, time=16, context=12)
    return {UNET + weight.name: weight.shape for weight in walk(unet)} | {UNET + "label_emb.weight": (1000, 16)}


def ssd() -> Shapes:
    """SSD-1B: SDXL without attention in the middle, and with fewer transformer blocks."""
    gone = tuple(f"transformer_blocks.{index}." for index in range(4, 10))
    return {
        key: shape
        for key, shape in shapes("sdxl").items()
        if key.startswith(UNET) and ".middle_block.1." not in key and not any(block in key for block in gone)
    }


@pytest.mark.parametrize(
    ("family", "unet"), [("sd2", unclip), ("sd2", upscaler), ("sdxl", ssd)], ids=lambda x: str(x)[:20]
)
def test_unets_of_no_family_are_unknown(family: str, unet: Callable[[], Shapes]) -> None:
    """Their model is unknown, its other parts aren't; nobody calls the UNet complete."""
    rest = {key: shape for key, shape in shapes(family).items() if not key.startswith(UNET)}
    found = report(rest | unet())
    assert found.family == "unknown"
    assert (found.components["unet"].tensors, found.components["unet"].complete) == (len(unet()), False)
    assert found.components["unet"].missing == found.components["unet"].unexpected == ()
    assert "no family's UNet" in " ".join(found.evidence)
    assert all(found.components[name].complete for name in COUNTS[family].keys() - {"unet"})
    assert of(unet()).family == "unknown"
    assert of(part(unet(), UNET)).family == "unknown"


def test_a_text_encoder_of_another_kind_is_left_alone() -> None:
    """AltDiffusion keeps XLM-RoBERTa where SD1 keeps CLIP; its position ids are its own."""
    config = XLMRobertaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=2, num_attention_heads=1)
    roberta = {f"cond_stage_model.roberta.{key}": shape for key, shape in made(XLMRobertaModel, config).items()}
    roberta["cond_stage_model.roberta.embeddings.position_ids"] = (1, 514)
    rest = {key: shape for key, shape in shapes("sd1").items() if not key.startswith("cond_stage_model.")}
    model = of(rest | roberta)
    assert model.clip is None
    assert set(model.components["other"].all_keys()) == roberta.keys()
    checkpoint = outline(rest | roberta)
    assert dict(sd.FixClip()(checkpoint)) == dict(checkpoint)


def test_a_vae_of_another_kind_is_not_called_complete() -> None:
    """What lies under the VAE's prefix may be anything; a few names in common don't make it the one we know."""
    other = {f"{VAE}encoder.down_blocks.{index}.norm.weight": (4,) for index in range(300)}
    found = report(other | {VAE + "quant_conv.weight": (8, 8, 1, 1)})
    assert (found.layout, found.components["vae"].tensors) == ("ldm", 301)
    assert (found.components["vae"].complete, found.components["vae"].missing) == (False, ())


def test_the_upscaler_is_told_like_diffusers_tells_it() -> None:
    tensors = {key: torch.empty(shape, device="meta") for key, shape in upscaler().items()}
    assert single_file_utils.infer_diffusers_model_type(tensors) == "upscale"


def test_text_encoder_of_another_family_is_no_family() -> None:
    mixed = {key: shape for key, shape in shapes("sd2").items() if not key.startswith("cond_stage_model.")}
    mixed |= {key: shape for key, shape in shapes("sd1").items() if key.startswith("cond_stage_model.")}
    assert of(mixed).family == "unknown"


def test_the_whole_of_clip_has_a_text_encoder_and_other_things() -> None:
    tensors = clip_and_vision()
    model = of(tensors)
    vision = sum("vision_model" in key or key in {"logit_scale", "visual_projection.weight"} for key in tensors)
    assert counts(model) == {"text_encoder": 197, "other": vision}
    assert model.components["text_encoder"].missing == ()
    assert model.clip is not None
    assert len(model.clip.table) == 197


def test_the_whole_of_open_clip_has_a_text_encoder_and_other_things() -> None:
    """The layers of its vision transformer, more than the text's, are not counted."""
    text = part(shapes("sd2"), "cond_stage_model.model.")
    vision = {f"visual.transformer.resblocks.{index}.ln_1.weight": (8,) for index in range(32)}
    model = of(text | vision)
    assert counts(model) == {"text_encoder": 294, "other": 32}
    assert model.components["text_encoder"].missing == ()


def test_a_unet_of_unusual_depths_is_known_where_it_explains_every_key() -> None:
    """Two levels, as the miniature pipelines of other people's tests have them; with a key more or less, it isn't."""
    names = made(
        UNet2DConditionModel, block_out_channels=(4, 8), cross_attention_dim=8, attention_head_dim=1, norm_num_groups=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    found = report(names)
    assert (found.layout, found.family) == ("diffusers", "sd1")
    assert (found.components["unet"].tensors, found.components["unet"].complete) == (len(names), True)
    for broken in (dict(list(names.items())[1:]), names | {"conv_in.extra": (1,)}):
        assert report(broken).family == "unknown"
        assert not report(broken).components["unet"].complete


@pytest.mark.parametrize(
    ("family", "unet"),
    [
        ("sd1", UNetConfig((1, 1, 0), 1, False, channels=(4, 8, 12))),
        ("sd1", UNetConfig((1, 1, 1, 1, 0), 1, False, channels=(4, 8, 12, 12, 16))),
        ("sd2", UNetConfig((0, 1), 1, True, channels=(4, 8))),
        # Most of its names are SDXL's too, of which it has a quarter.
        ("sdxl", UNetConfig((0, 2), 2, True, vector=True, channels=(4, 8), conditions=28)),
        ("sdxl-refiner", UNetConfig((0, 4, 0), 4, True, vector=True, channels=(4, 8, 12), conditions=24)),
    ],
)
def test_a_model_of_unusual_depths(family: str, unet: UNetConfig) -> None:
    unet = replace(unet, inputs=4, time=16, context=8)
    rest = {key: shape for key, shape in shapes(family).items() if not key.startswith(UNET)}
    for layout, prefix in (("ldm", UNET), ("diffusers", "")):
        names = {prefix + weight.name: weight.shape for weight in walk(unet, layout)}  # type: ignore[arg-type]
        found = report((rest if layout == "ldm" else {}) | names)
        assert found.family == family
        assert (found.components["unet"].complete, found.components["unet"].tensors) == (True, len(names))


# ---------------------------------------------------------------- junk, markers, completeness


@given(st.sets(st.text("abcdefg.", min_size=1, max_size=12).map("junk.".__add__), min_size=1, max_size=20))
@settings(max_examples=25)
def test_junk_goes_to_other(junk: set[str]) -> None:
    found = report(shapes("sd1") | dict.fromkeys(junk, (3,)))
    assert found.family == "sd1"
    assert set(found.components["other"].unexpected) == junk
    assert all(found.components[name].unexpected == () for name in COUNTS["sd1"])
    assert all(found.components[name].complete for name in COUNTS["sd1"])


def test_junk_under_a_components_prefix_is_unexpected_there() -> None:
    junk = {
        "text_encoder": "cond_stage_model.transformer.text_projection.weight",
        "unet": UNET + "input_blocks.1.0.lora.weight",
        "vae": VAE + "loss.logvar",
    }
    found = report(shapes("sd1") | dict.fromkeys(junk.values(), (2,)))
    assert found.family == "sd1"
    assert {name: found.components[name].unexpected for name in junk} == {k: (v,) for k, v in junk.items()}
    assert "other" not in found.components


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_markers_are_not_called_unexpected(wrapper: str) -> None:
    markers: Shapes = {
        "v_pred": (0,), "ztsnr": (0,), "edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1), "edm_vpred.sigma_max": (1,),
        "edm_vpred.sigma_min": (),
    }  # fmt: skip
    found = report({wrapper + key: shape for key, shape in (shapes("sdxl") | markers).items()})
    assert found.family == "sdxl"
    assert (found.components["other"].tensors, found.components["other"].unexpected) == (6, ())
    assert found.components["other"].complete


@cache
def told(family: str) -> Inspection:
    return report(shapes(family))


@given(st.sampled_from(FAMILIES), st.data())
@settings(max_examples=120)
def test_a_missing_key_is_reported_and_nothing_else(family: str, data: st.DataObject) -> None:
    tensors = shapes(family)
    optional = {
        "cond_stage_model.model." + weight.name
        for weight in walk(OpenClipConfig(24, penultimate=True))
        if weight.optional
    } | {key for key in tensors if key.endswith("logit_scale")}
    key = data.draw(st.sampled_from(sorted(k for k in tensors if not k.endswith("position_ids"))))
    del tensors[key]
    found = report(tensors)
    assert found.family == family
    missing = {name: report.missing for name, report in found.components.items() if report.missing}
    assert list(missing.values()) == ([] if key in optional else [(key,)])
    for name, component in found.components.items():
        assert component.complete == (name not in missing)
        assert component.unexpected == ()
        assert component.misshapen == {}
        assert component.tensors >= told(family).components[name].tensors - 1


@given(st.sampled_from(FAMILIES), st.data())
@settings(max_examples=120)
def test_a_misshapen_key_is_reported_and_nothing_else(family: str, data: st.DataObject) -> None:
    tensors = shapes(family)
    # Weights that alone tell of a width (how many tokens, how many latent channels): whatever they say is right.
    alone = (
        "token_embedding.weight", "positional_embedding", "position_embedding.weight", "text_projection",
        "input_blocks.0.0.weight", "out.2.weight", "out.2.bias", "label_emb.0.0.weight", "conv_in.weight",
        "conv_out.weight", "conv_out.bias", "quant_conv.weight", "quant_conv.bias",
    )  # fmt: skip
    key = data.draw(
        st.sampled_from(sorted(k for k in tensors if not k.endswith(("position_ids", "logit_scale", *alone))))
    )
    right = tensors[key]
    place = data.draw(st.integers(0, len(right) - 1))
    thrice, longer = list(right), list(right)
    thrice[place] *= 3
    longer[-1] += 1
    wrong = data.draw(st.sampled_from([(*right, 1), tuple(thrice), tuple(longer)]))
    tensors[key] = wrong
    found = report(tensors)
    assert found.family == family
    for component in found.components.values():
        assert component.missing == component.unexpected == ()
        assert component.complete == (not component.misshapen)
    misshapen = {k: shape for component in found.components.values() for k, shape in component.misshapen.items()}
    assert misshapen == {key: right}


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_the_wrong_rank_are_outvoted(family: str) -> None:
    """Their rank tells SD1 from the others; a converter's slip in some of them doesn't."""
    tensors = shapes(family)
    projections = [key for key in tensors if key.endswith(".proj_in.weight")]
    bent = projections[: len(projections) // 3]
    right = {key: tensors[key] for key in bent}
    for key in bent:
        tensors[key] = tensors[key][:2] if family == "sd1" else (*tensors[key], 1, 1)
    found = report(tensors)
    assert (found.family, found.components["unet"].misshapen) == (family, right)


def test_ids_of_a_vision_transformer_are_not_the_texts() -> None:
    """All that some savers left of CLIP's other half."""
    tensors = shapes("sd1")
    del tensors[SD1_IDS]
    stray = "cond_stage_model.transformer.vision_model.embeddings.position_ids"
    clip = of(tensors | {stray: (1, 257)}).components["text_encoder"]
    assert POSITION_IDS not in clip.keys
    assert clip.stray == (stray,)


@pytest.mark.parametrize("key", [UNET + "input_blocks.0.0.weight", VAE + "decoder.conv_in.weight"])
def test_a_wrong_rank_is_reported_where_the_weight_alone_tells_a_width(key: str) -> None:
    tensors = shapes("sd1")
    right, tensors[key] = tensors[key], (7,)
    found = report(tensors)
    misshapen = {k: shape for component in found.components.values() for k, shape in component.misshapen.items()}
    assert misshapen == {key: right}
    assert found.family == "sd1"


# ---------------------------------------------------------------- EMA, schedule


@cache
def _averaged() -> Shapes:
    return {key: value.shape for key, value in synthetic.ema(synthetic.model("sd1"))}


def averaged() -> Shapes:
    return dict(_averaged())


def test_ema_complete() -> None:
    found = report(shapes("sd1") | averaged())
    assert found.family == "sd1"
    assert found.components["ema"].tensors == 688
    assert found.components["ema"].complete
    assert found.components["ema"].unexpected == ()
    assert "other" not in found.components


@given(st.data())
@settings(max_examples=30)
def test_ema_partial(data: st.DataObject) -> None:
    weights = averaged()
    names = sorted(key for key, shape in weights.items() if shape)
    gone = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=20))
    found = report(shapes("sd1") | {key: shape for key, shape in weights.items() if key not in gone})
    assert set(found.components["ema"].missing) == gone
    assert not found.components["ema"].complete
    assert found.components["unet"].complete


def test_ema_misshapen_and_unexpected() -> None:
    weights = averaged()
    key = next(iter(weights))
    right, weights[key] = weights[key], (5, 5)
    found = report(shapes("sd1") | weights | {"model_ema.other": (1,)})
    assert found.components["ema"].misshapen == {key: right}
    assert found.components["ema"].unexpected == ("model_ema.other",)


def test_ema_of_which_only_the_scalars_are_left() -> None:
    """The weights were pruned, so it isn't complete; the UNet is."""
    scalars = {key: shape for key, shape in averaged().items() if not shape}
    found = report(shapes("sd1") | scalars)
    assert (found.components["ema"].tensors, found.components["ema"].complete) == (2, False)
    assert found.components["unet"].complete


def test_ema_without_its_scalars_is_complete() -> None:
    weights = {key: shape for key, shape in averaged().items() if shape}
    assert report(shapes("sd1") | weights).components["ema"].complete


@given(st.sampled_from(SCHEDULE_BUFFERS), st.booleans())
@settings(max_examples=24)
def test_schedule(name: str, logvar: bool) -> None:
    buffers: Shapes = dict.fromkeys(SCHEDULE_BUFFERS, (1000,)) | ({"logvar": (1000,)} if logvar else {})
    whole = report(shapes("sd1") | buffers).components["schedule"]
    assert (whole.tensors, whole.complete, whole.unexpected) == (12 + logvar, True, ())
    lacking = {key: shape for key, shape in buffers.items() if key != name}
    found = report(shapes("sd1") | lacking).components["schedule"]
    assert (found.missing, found.complete) == ((name,), False)
    misshapen = report(shapes("sd1") | buffers | {name: (999,)}).components["schedule"]
    assert (misshapen.misshapen, misshapen.missing, misshapen.complete) == ({name: (1000,)}, (), False)


def test_schedule_names_are_those_of_ddpm() -> None:
    """Twelve of them, all of which diffusers' own schedule agrees with where both have one."""
    from diffusers import DDPMScheduler

    ours = synthetic.schedule()
    assert tuple(ours) == SCHEDULE_BUFFERS
    theirs = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    np.testing.assert_allclose(ours["betas"], theirs.betas.numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours["alphas_cumprod"], theirs.alphas_cumprod.numpy(), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_without_a_unet(family: str) -> None:
    """Two parts tell the family by where they are kept; the refiner's can't."""
    rest = {key: shape for key, shape in shapes(family).items() if not key.startswith(UNET)}
    assert of(rest).family == {"sdxl-refiner": "unknown"}.get(family, family)


def test_unet_tables_agree_with_the_structures_of_families() -> None:
    assert set(UNETS) == set(FAMILIES)
