"""The stock documents against diffusers and transformers: sizes, fields, and a narrow folder of every pipeline."""

from __future__ import annotations

import copy
import inspect
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sdsurgery.models.tokenizer import tokenizer_files

CLIP_L, VAE = (196, 123_060_480), (248, 83_653_863)
SIZES = {  # tensors and parameters
    "sd1": {"text_encoder": CLIP_L, "unet": (686, 859_520_964), "vae": VAE},
    "sd2": {"text_encoder": (372, 340_387_840), "unet": (686, 865_910_724), "vae": VAE},
    "sdxl": {
        "text_encoder": CLIP_L,
        "text_encoder_2": (517, 694_659_840),
        "unet": (1680, 2_567_463_684),
        "vae": VAE,
    },
    "sdxl-refiner": {"text_encoder_2": (517, 694_659_840), "unet": (1220, 2_259_526_660), "vae": VAE},
}
STOCK = {
    family: json.loads(resources.files("sdsurgery.data").joinpath(f"stock/{family}.json").read_text("utf-8"))
    for family in SIZES
}
CHANNELS = {"": 4, "-inpainting": 9, "-pix2pix": 8, "-depth": 5}
PIPELINES = [(family, suffix) for family, stock in STOCK.items() for suffix in stock["pipelines"]]
OVERRIDES = [(family, name) for family, stock in STOCK.items() for name in stock["overrides"]]


def merged(document: Any, override: Any) -> Any:
    if not (isinstance(document, dict) and isinstance(override, dict)):
        return override
    return document | {name: merged(document.get(name), value) for name, value in override.items()}


def build(config: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    return getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))


@pytest.mark.parametrize("family", SIZES)
def test_components_have_the_published_sizes(family: str) -> None:
    import torch

    for name, size in SIZES[family].items():
        with torch.device("meta"):
            weights = build(STOCK[family]["components"][name]).state_dict().values()
        assert (len(weights), sum(weight.numel() for weight in weights)) == size


@pytest.mark.parametrize("family", STOCK)
def test_every_field_is_known(family: str) -> None:
    import diffusers
    import transformers

    overridden = [merged(STOCK[family], override) for override in STOCK[family]["overrides"].values()]
    for stock in [STOCK[family], *overridden]:
        for config in stock["components"].values():
            if "_class_name" in config:
                known = {"_class_name", *inspect.signature(getattr(diffusers, config["_class_name"])).parameters}
            else:
                known = {*transformers.CLIPTextConfig().to_dict()}
            assert set(config) <= known
        siblings = {"_class_name", "clip_sample", "set_alpha_to_one", "skip_prk_steps"}
        siblings |= {"interpolation_type", "use_karras_sigmas"}  # of EulerDiscreteScheduler, where DDIM replaces it
        scheduler = getattr(diffusers, stock["scheduler"]["_class_name"])
        assert set(stock["scheduler"]) - siblings <= {*inspect.signature(scheduler).parameters}


def narrow(stock: dict[str, Any], suffix: str) -> dict[str, Any]:
    components: dict[str, Any] = copy.deepcopy(stock["components"])
    texts = [config for name, config in components.items() if name.startswith("text_encoder")]
    for config in texts:
        config |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 16}
        config |= {"num_hidden_layers": 2, "vocab_size": 64}
    unet, vae = components["unet"], components["vae"]
    levels = len(unet["block_out_channels"])
    unet |= {"block_out_channels": [8, 16, 24, 24][:levels], "norm_num_groups": 4, "attention_head_dim": 2}
    unet |= {"cross_attention_dim": 16 * len(texts), "in_channels": CHANNELS[suffix]}
    if "addition_time_embed_dim" in unet:
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    vae |= {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 4}
    return components


def write(folder: Path, stock: dict[str, Any], suffix: str) -> str:
    """A folder as the documents describe it, with random weights; its pipeline's class."""
    from safetensors.torch import save_file

    pipeline = stock["pipelines"][suffix]
    index = {"_class_name": pipeline["class"], **pipeline["index"]}
    for name, config in narrow(stock, suffix).items():
        ours = "_class_name" in config
        file = folder / name / ("diffusion_pytorch_model" if ours else "model")
        file.parent.mkdir()
        save_file(build(config).state_dict(), file.with_suffix(".safetensors"), metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
        index[name] = ["diffusers", config["_class_name"]] if ours else ["transformers", config["architectures"][0]]
    for name, settings in stock["tokenizers"].items():
        (folder / name).mkdir()
        for file_name, content in tokenizer_files(settings["pad_token"], 77).items():
            (folder / name / file_name).write_bytes(content)
        index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(stock["scheduler"]))
    index["scheduler"] = ["diffusers", stock["scheduler"]["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(pipeline["class"])


@pytest.mark.parametrize(("family", "suffix"), PIPELINES)
def test_every_pipeline_loads(
    tmp_path: Path, family: str, suffix: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    import torch

    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
    pipeline = getattr(diffusers, write(tmp_path, STOCK[family], suffix))
    given: dict[str, Any] = {}
    if suffix == "-depth":
        with pytest.raises(ValueError, match="depth_estimator"):
            pipeline.from_pretrained(tmp_path, local_files_only=True)
        given = {"depth_estimator": torch.nn.Identity(), "feature_extractor": torch.nn.Identity()}
    loaded = pipeline.from_pretrained(tmp_path, local_files_only=True, **given)
    assert loaded.unet.config.in_channels == CHANNELS[suffix]
    for name, settings in STOCK[family]["tokenizers"].items():
        assert getattr(loaded, name).pad_token == settings["pad_token"]
    assert not [record.getMessage() for record in caplog.records if "config attributes" in record.getMessage()]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("family", "name"), OVERRIDES)
def test_overrides_make_a_scheduler_that_runs(family: str, name: str) -> None:
    import diffusers

    settings = merged(STOCK[family], STOCK[family]["overrides"][name])["scheduler"]
    scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    scheduler.set_timesteps(4)
    assert scheduler.config.prediction_type == ("epsilon" if name == "turbo" else "v_prediction")
    assert int(scheduler.timesteps[0]) == (999 if settings.get("timestep_spacing") == "trailing" else 751)
