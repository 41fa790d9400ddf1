"""Pipelines that diffusers made and saved, through our single file and back: nothing that they compute is lost.

Their heads, norm groups, activations and schedulers are those of no published model, so that whatever is merely
assumed on the way back shows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import metadata
from oracle_support import (
    Case,
    assert_same,
    converted,
    draw,
    from_folder,
    from_single_file,
    module,
    named_as,
    trained_like,
    weights,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdsurgery.models.tokenizer import tokenizer_files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

CROSS, PLAIN, CROSS_UP, PLAIN_UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
FOUR = {
    "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
    "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "block_out_channels": (32, 64, 96, 96),
}
VECTOR = {"addition_embed_type": "text_time", "use_linear_projection": True}
WIDE = 48  # of the second text encoder
ADDED = 16  # of each number of size and crop

UNETS: dict[str, dict[str, Any]] = {
    "sd1": FOUR | {"attention_head_dim": 4, "norm_num_groups": 16, "cross_attention_dim": 64, "norm_eps": 1e-6},
    "sd2": FOUR
    | {"attention_head_dim": [2, 4, 8, 6], "norm_num_groups": 8, "cross_attention_dim": 64}
    | {"use_linear_projection": True, "upcast_attention": True, "sample_size": 48},
    "sdxl": VECTOR
    | {"down_block_types": (PLAIN, CROSS, CROSS), "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP)}
    | {"block_out_channels": (32, 64, 96), "transformer_layers_per_block": (1, 2, 10), "norm_num_groups": 16}
    | {"attention_head_dim": [2, 8, 4], "cross_attention_dim": 64 + WIDE, "addition_time_embed_dim": ADDED}
    | {"projection_class_embeddings_input_dim": WIDE + 6 * ADDED},
    "sdxl-refiner": VECTOR
    | {"down_block_types": (PLAIN, CROSS, CROSS, PLAIN), "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP)}
    | {"block_out_channels": (32, 64, 96, 96), "transformer_layers_per_block": 4, "norm_num_groups": 8}
    | {"attention_head_dim": [2, 4, 6, 12], "cross_attention_dim": WIDE, "addition_time_embed_dim": ADDED}
    | {"projection_class_embeddings_input_dim": WIDE + 5 * ADDED},
}
VAE = {
    "block_out_channels": (16, 32, 48, 48), "down_block_types": ("DownEncoderBlock2D",) * 4, "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "scaling_factor": 0.2, "sample_size": 128,
    "force_upcast": False,
}  # fmt: skip
CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
H = CLIP | {"num_hidden_layers": 23, "num_attention_heads": 16}
G = {"hidden_size": WIDE, "intermediate_size": 96, "num_hidden_layers": 32, "num_attention_heads": 6}
TEXT: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {"text_encoder": CLIP | {"hidden_act": "gelu"}},
    "sd2": {"text_encoder": H | {"hidden_act": "quick_gelu"}},
    "sdxl": {"text_encoder": CLIP, "text_encoder_2": G | {"projection_dim": WIDE}},
    "sdxl-refiner": {"text_encoder_2": G | {"projection_dim": WIDE, "hidden_act": "gelu"}},
}
SCHEDULERS = {
    "sd1": lambda: diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1),
    "sd1-v": lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction", steps_offset=1),
    "sd2": lambda: diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
    "sd2-v": lambda: diffusers.DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    ),
    "sdxl": lambda: diffusers.DPMSolverMultistepScheduler(
        use_karras_sigmas=True, steps_offset=1, algorithm_type="sde-dpmsolver++"
    ),
    "sdxl-v": lambda: diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1
    ),
    "sdxl-refiner": lambda: diffusers.DDIMScheduler(beta_start=0.001, clip_sample=False, steps_offset=1),
}


@dataclass(frozen=True)
class Saved:
    """A pipeline in the folder that diffusers saved it to, our single file of it, and our folder of that."""

    case: Case
    folder: Path
    file: Path
    back: Path
    states: dict[str, dict[str, torch.Tensor]]


def filled(network: Any) -> Any:
    """With values of the size that trained ones have."""
    shaped = {key: trained_like(key, tuple(value.shape)) for key, value in network.state_dict().items()}
    network.load_state_dict(shaped)
    return network.eval()


def text_encoder(name: str, config: dict[str, Any], folder: Path, *, prefixed: bool) -> Any:
    """Freshly built, as transformers 5 saves it flat; or as it is after it was loaded from prefixed keys."""
    kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
    built = filled(kind(CLIPTextConfig(**config)))
    if not prefixed:
        return built
    built.save_pretrained(folder)
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in built.state_dict().items()}
    if "text_model.text_projection.weight" in state:
        state["text_projection.weight"] = state.pop("text_model.text_projection.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return kind.from_pretrained(folder, local_files_only=True)


def pipeline(family: str, scheduler: Any, scratch: Path, *, prefixed: bool) -> Any:
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    for name, config in TEXT[family].items():
        parts[name] = text_encoder(name, config, scratch / name, prefixed=prefixed)
        tokenizer = scratch / "tokenizer" / name
        tokenizer.mkdir(parents=True)
        for file, content in tokenizer_files("!", 77).items():
            (tokenizer / file).write_bytes(content)
        parts[name.replace("text_encoder", "tokenizer")] = CLIPTokenizer.from_pretrained(tokenizer)
    parts["unet"] = filled(diffusers.UNet2DConditionModel(**UNETS[family]))
    parts["vae"] = filled(diffusers.AutoencoderKL(**VAE))
    parts["scheduler"] = scheduler
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts)
    if family == "sdxl-refiner":
        return diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    del parts["text_encoder_2"], parts["tokenizer_2"]
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, **rest)


PIPELINES = [(name, True) for name in SCHEDULERS] + [("sd1", False), ("sd2-v", False), ("sdxl-refiner", False)]


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda param: f"{param[0]}-{'flat' if param[1] else 'prefixed'}")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    name, flat = request.param
    family = name.removesuffix("-v")
    root = tmp_path_factory.mktemp("pipelines")
    pipe = pipeline(family, SCHEDULERS[name](), root / "scratch", prefixed=not flat)
    states = {part: dict(getattr(pipe, part).state_dict()) for part in ("unet", "vae", *TEXT[family])}
    pipe.save_pretrained(root / "theirs")
    file = converted(root / "theirs", root / "single.safetensors")
    assert root.joinpath("single.yaml").exists() == (family == "sd2" or name == "sd1-v")
    if not flat:  # the metadata alone keep what is to be kept
        root.joinpath("single.yaml").unlink(missing_ok=True)
    case = Case(family, prediction=pipe.scheduler.config.prediction_type)
    yield Saved(case, root / "theirs", file, converted(file, root / "back"), states)
    shutil.rmtree(root)


def test_what_was_saved_is_flat_or_prefixed(saved: Saved, request: pytest.FixtureRequest) -> None:
    _, flat = request.node.callspec.params["saved"]
    for name in TEXT[saved.case.family]:
        prefixed = all(key.startswith(("text_model.", "text_projection.")) for key in weights(saved.folder, name))
        assert prefixed == (name == "text_encoder_2" or not flat)


def test_single_file_loads_through_diffusers(saved: Saved) -> None:
    theirs = from_single_file(saved.file, saved.folder)
    for name, state in saved.states.items():
        assert_same(state, getattr(theirs, name).state_dict())


def test_folder_there_and_back_has_the_same_tensors(saved: Saved) -> None:
    for name, state in saved.states.items():
        built = module(saved.back, name)
        assert_same(named_as(built, weights(saved.back, name)), state)
        built.load_state_dict(named_as(built, weights(saved.back, name)), strict=True, assign=True)


def test_folder_there_and_back_has_configs_that_mean_the_same(saved: Saved) -> None:
    theirs, ours = from_folder(saved.folder), from_folder(saved.back)
    assert type(ours) is type(theirs)
    assert type(ours.scheduler) is type(theirs.scheduler)
    for name in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        assert ours.config.get(name) == theirs.config.get(name), name
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(theirs, name, None):
            assert getattr(ours, name).pad_token == getattr(theirs, name).pad_token == "!"
    for name in ("scheduler", *saved.states):
        assert said(getattr(ours, name).config) == said(getattr(theirs, name).config), name
    assert "convert" in str(metadata(saved.file))


def said(config: Any) -> dict[str, Any]:
    found = dict(config) if isinstance(config, dict) else config.to_dict()
    unsaid = {"_name_or_path", "_diffusers_version", "_use_default_values", "dtype", "transformers_version"}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in found.items() if key not in unsaid
    }


def test_there_and_back_draws_the_same_picture(saved: Saved) -> None:
    assert torch.equal(draw(from_folder(saved.folder), saved.case), draw(from_folder(saved.back), saved.case))


def test_single_file_holds_what_the_folder_held_and_ids(saved: Saved) -> None:
    file = load_file(saved.file)
    ids = {key: value for key, value in file.items() if key.endswith("position_ids")}
    assert len(ids) == (saved.case.family in {"sd1", "sdxl"})
    assert all(torch.equal(value, torch.arange(77)[None]) for value in ids.values())
    again = converted(saved.back, saved.file.with_name("again.safetensors"))
    assert_same(load_file(again), file)
