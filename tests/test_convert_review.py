"""What a review of convert found, one by one: things stated that nobody said, options unheeded, bombs, and losses."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
from conftest import cli, metadata, outline, write
from conftest import raw as raw_file
from container_support import Raw, State, library_bytes, raw_state
from convert_support import CLIP, FAMILIES, UNET, VAE, put_strange, shallow, whole
from folder_support import contents, put, put_weights
from synthetic import NARROW

import sdsurgery as sd
from sdsurgery import history
from sdsurgery.containers import saving
from sdsurgery.errors import MismatchError, NoSpaceError
from sdsurgery.models.identify import identify
from sdsurgery.models.walks import OpenClipConfig, walk
from sdsurgery.operations import Convert

Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("made")

    def made(family: str) -> Path:
        place = root / family
        if not place.exists():
            place.mkdir()
            put_model(place / "model.safetensors", family)
            assert cli("convert", place / "model.safetensors", place / "folder", "--sidecar").code == 0
        return place

    return made


@pytest.fixture
def folders(made_once: Callable[[str], Path], tmp_path: Path) -> Folders:
    """A family's ``folder``, with ``model.safetensors`` and a sidecar beside it where they are wanted."""

    def copied(family: str = "sd1", *, sidecar: bool = False) -> Path:
        shutil.copytree(made_once(family), tmp_path, dirs_exist_ok=True)
        if not sidecar:
            (tmp_path / "folder.sidecar.safetensors").unlink()
        return tmp_path / "folder"

    return copied


def put_model(path: Path, family: str = "sd1", more: State | None = None) -> Path:
    chance = random.Random(family)
    configs = shallow(family, chance)
    configs[UNET] = replace(configs[UNET], inputs=4)  # type: ignore[call-arg]
    return put_strange(path, whole(configs, chance) | (more or {}), chance)


def put_lone(path: Path, family: str, prefix: str) -> Path:
    """One component of a published structure, as narrow as may be, under ldm's names without a prefix."""
    chance = random.Random(family + prefix)
    config = synthetic.configs(family, NARROW[family])[prefix]
    state = whole({"": config}, chance)
    return put(path, library_bytes(state))


def document(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def edit(folder: Path, name: str, **fields: Any) -> Path:
    return put(folder / name, document(folder, name) | fields)


def done(*words: str | Path) -> str:
    """What a conversion that succeeds says."""
    result = cli("convert", *words)
    assert result.code == 0, result.err
    return result.out + result.err


def refused(*words: str | Path, code: int = 3) -> Any:
    """The error of a conversion that writes nothing."""
    folder = Path(words[1]).parent
    before = contents(folder)
    result = cli("convert", *words, "--json")
    assert result.code == code, result
    assert contents(folder) == before
    return result.json["error"]


# ---------------------------------------------------------------- nothing is stated that nobody said

LONE = {
    "clip-l": ("sdxl", "conditioner.embedders.0.transformer."),
    "clip-g": ("sdxl", "conditioner.embedders.1.model."),
    "clip-h": ("sd2", "cond_stage_model.model."),
    "unet": ("sd1", UNET),
    "sdxl's unet": ("sdxl", UNET),
    "vae": ("sd1", VAE),
}


@pytest.mark.parametrize("kind", LONE)
def test_lone_weights_without_a_config_record_nothing(kind: str, tmp_path: Path) -> None:
    file, there = put_lone(tmp_path / "lone.safetensors", *LONE[kind]), tmp_path / "there"
    done(file, there)
    (weights,) = there.glob("*.safetensors")
    bare = Path(shutil.copy(weights, tmp_path / "bare.safetensors"))
    done(bare, tmp_path / "direct")
    done(bare, tmp_path / "back.safetensors", "--to", "ldm")
    (*_, step) = history.recorded(metadata(tmp_path / "back.safetensors"))
    assert not {"configs", "scheduler"} & step.keys()
    done(tmp_path / "back.safetensors", tmp_path / "again")
    expected = document(there, "config.json")
    assert document(tmp_path / "direct", "config.json") == expected
    assert document(tmp_path / "again", "config.json") == expected


def test_clip_l_with_gelu_stays_clip_l(tmp_path: Path) -> None:
    """Which some fine-tunes state; OpenCLIP's text encoders have it, and other names in a single file."""
    file, folder = put_lone(tmp_path / "lone.safetensors", "sd1", CLIP["sd1"]), tmp_path / "folder"
    done(file, folder)
    edit(folder, "config.json", hidden_act="gelu")
    done(folder, tmp_path / "back.safetensors")
    assert raw_file(tmp_path / "back.safetensors").keys() >= raw_file(file).keys()
    done(tmp_path / "back.safetensors", tmp_path / "again")
    assert document(tmp_path / "again", "config.json") == document(folder, "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_can_be_read_back(family: str, folders: Folders, tmp_path: Path) -> None:
    folder = folders(family)
    outputs = {
        "folder.v1": ["--variant", "fp16", "--shard-size", "1kB"],
        "pickle.ckpt": [],
        "single.safetensors": ["--dtype", "fp32"],
    }
    for name, words in outputs.items():
        done(folder, tmp_path / name, *words)
        assert cli("inspect", tmp_path / name, "--json").json["family"] == family
        done(tmp_path / name, tmp_path / "next", *words[:2], "--force")
        assert contents(tmp_path / "next").keys() >= {"model_index.json", "unet"}


# ---------------------------------------------------------------- what can't be honoured is refused, or told


@pytest.mark.parametrize("option", ["--config", "--prediction-type"])
@pytest.mark.parametrize("kind", ["folder to folder", "file to file", "with a sidecar"])
def test_options_that_would_do_nothing_are_refused(kind: str, option: str, folders: Folders, tmp_path: Path) -> None:
    folder = folders(sidecar=True)
    words: list[str | Path] = {
        "folder to folder": [folder, tmp_path / "other"],
        "file to file": [tmp_path / "model.safetensors", tmp_path / "other.safetensors"],
        "with a sidecar": [folder, tmp_path / "other.safetensors", "--sidecar"],
    }[kind]
    error = refused(*words, option, folder if option == "--config" else "epsilon", code=2)
    assert error["remedy"]


@pytest.mark.parametrize(
    "words", [["--dtype", "bf16"], ["--ema"], ["--config", "model.yaml"], ["--prediction-type", "epsilon"]]
)
def test_a_sidecar_that_an_option_leaves_unused_is_told_of(words: list[str], folders: Folders, tmp_path: Path) -> None:
    folder = folders(sidecar=True)
    put(tmp_path / "model.yaml", "model: {params: {parameterization: v}}")
    words = [str(tmp_path / word) if word == "model.yaml" else word for word in words]
    result = cli("convert", folder, tmp_path / "back.safetensors", *words)
    assert result.code == (3 if words == ["--ema"] else 0)  # a folder has no EMA weights
    assert f"{folder}.sidecar.safetensors was not used: {words[0]}" in result.err


def test_a_variant_is_read_where_a_folder_has_it(folders: Folders, tmp_path: Path) -> None:
    folder = folders()
    done(folder, tmp_path / "half", "--variant", "fp16", "--dtype", "bf16")
    for path in (tmp_path / "half").rglob("*.safetensors"):
        shutil.copy(path, folder / path.relative_to(tmp_path / "half"))
    done(folder, tmp_path / "out", "--variant", "fp16")
    done(folder, tmp_path / "plain")
    names = {path.name for path in (tmp_path / "out").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    assert raw_state(sd.open(tmp_path / "out")) == raw_state(sd.open(tmp_path / "half"))
    assert {tensor.dtype for tensor in raw_state(sd.open(tmp_path / "plain")).values()} == {"F16"}


def test_a_variant_that_cant_be_read_isnt_replaced_by_another(folders: Folders, tmp_path: Path) -> None:
    folder = folders()
    for path in list(folder.rglob("*.safetensors")):
        path.with_suffix(".fp16.safetensors").write_bytes(path.read_bytes())
    put(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", "damaged")
    assert "fp16" in refused(folder, tmp_path / "out", "--variant", "fp16")["file"]


# ---------------------------------------------------------------- other models


@pytest.mark.parametrize("third", [False, True])
def test_a_folder_of_another_kind_of_model_is_refused(third: bool, folders: Folders, tmp_path: Path) -> None:
    """Flux has two text encoders and SD3 three, some under the names that SDXL's have."""
    folder = folders("sdxl")
    index = document(folder, "model_index.json")
    shutil.rmtree(folder / "unet")
    index = {name: value for name, value in index.items() if name != "unet"}
    for name in ["transformer", *(["text_encoder_3"] if third else [])]:
        put(folder / name / "config.json", {"_class_name": "Other2DModel"})
        stem = "diffusion_pytorch_model" if name == "transformer" else "model"
        put_weights(folder / name / f"{stem}.safetensors", {"a.weight": Raw("F16", (2, 2), bytes(8))})
        index[name] = ["diffusers", "Other2DModel"]
    put(folder / "model_index.json", index | {"_class_name": "OtherPipeline"})
    for target in ("out.safetensors", "out"):
        error = refused(folder, tmp_path / target)
        assert (error["kind"], "transformer" in error["message"] or "text_encoder_3" in error["message"]) == (
            "mismatch", True
        )  # fmt: skip
    assert cli("inspect", folder, "--json").json["family"] == "unknown"


def test_a_stray_key_makes_no_folder_of_a_file(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors", more={"vae/x": Raw("F16", (1,), bytes(2))})
    assert "dropped   vae/x" in done(model, tmp_path / "folder")


def test_a_logit_scale_may_have_a_dimension(tmp_path: Path) -> None:
    scale = {"conditioner.embedders.1.model.logit_scale": Raw("F32", (1,), bytes(4))}
    model = put_model(tmp_path / "model.safetensors", "sdxl", scale)
    done(model, tmp_path / "folder", "--sidecar")
    done(tmp_path / "folder", tmp_path / "back.safetensors", "--sidecar")
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


# ---------------------------------------------------------------- SDXL's kin


def floats(*numbers: float, shape: tuple[int, ...] | None = None) -> Raw:
    return Raw("F32", (len(numbers),) if shape is None else shape, struct.pack(f"<{len(numbers)}f", *numbers))


def markers(path: Path) -> State:
    return {key: Raw(*value) for key, value in raw_file(path).items() if key.startswith(("edm", "v_pred", "ztsnr"))}


SIGMAS = {"edm_vpred.sigma_max": floats(100.0, shape=()), "edm_vpred.sigma_min": floats(0.25, shape=())}


def test_cosxl_is_told_by_its_markers_both_ways(tmp_path: Path) -> None:
    model, folder = put_model(tmp_path / "model.safetensors", "sdxl", SIGMAS), tmp_path / "folder"
    assert "prediction type v_prediction: the file has the markers edm_vpred" in done(model, folder)
    scheduler = document(folder, "scheduler/scheduler_config.json")
    told = {"_class_name": "EDMEulerScheduler", "sigma_max": 100.0, "sigma_min": 0.25, "sigma_data": 1.0}
    assert scheduler.items() >= (told | {"prediction_type": "v_prediction"}).items()
    assert document(folder, "model_index.json")["scheduler"] == ["diffusers", "EDMEulerScheduler"]
    edit(folder, "scheduler/scheduler_config.json", sigma_max=100)  # as others write it
    done(folder, tmp_path / "back.safetensors")
    assert markers(tmp_path / "back.safetensors") == {
        name: replace(marker, shape=(1,)) for name, marker in SIGMAS.items()
    }
    done(tmp_path / "back.safetensors", tmp_path / "again")
    assert document(tmp_path / "again", "scheduler/scheduler_config.json") == scheduler


def test_what_is_told_counts_more_than_markers(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors", "sdxl", SIGMAS)
    done(model, tmp_path / "folder", "--prediction-type", "epsilon")
    assert document(tmp_path / "folder", "scheduler/scheduler_config.json")["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("sigma", "marked"),
    [(None, False), (1e300, False), (10**400, False), (math.nan, False), ("a", False), (True, False), (3, True)],
)
def test_a_sigma_that_no_marker_can_hold_is_not_marked(sigma: Any, marked: bool, tmp_path: Path) -> None:
    model, folder = put_model(tmp_path / "model.safetensors", "sdxl", SIGMAS), tmp_path / "folder"
    done(model, folder)
    edit(folder, "scheduler/scheduler_config.json", sigma_min=sigma)
    done(folder, tmp_path / "back.safetensors")
    assert bool(markers(tmp_path / "back.safetensors")) is marked


def latents(count: int) -> dict[str, Raw]:
    return {
        name: floats(*[start] * count, shape=(1, count, 1, 1)) for name, start in (("edm_mean", -1.5), ("edm_std", 8))
    }


def test_playground_is_told_by_its_markers_both_ways(tmp_path: Path) -> None:
    count = raw_file(put_model(tmp_path / "model.safetensors", "sdxl"))[VAE + "post_quant_conv.bias"][1][0]
    model, folder = put_model(tmp_path / "model.safetensors", "sdxl", latents(count)), tmp_path / "folder"
    done(model, folder)
    scheduler, vae = document(folder, "scheduler/scheduler_config.json"), document(folder, "vae/config.json")
    assert scheduler["_class_name"] == "EDMDPMSolverMultistepScheduler"
    assert scheduler["prediction_type"] == "epsilon"
    assert (vae["scaling_factor"], vae["latents_mean"], vae["latents_std"]) == (0.5, [-1.5] * count, [8.0] * count)
    done(folder, tmp_path / "back.safetensors")
    flat = {name: replace(marker, shape=(count,)) for name, marker in latents(count).items()}
    assert markers(tmp_path / "back.safetensors") == flat
    done(tmp_path / "back.safetensors", tmp_path / "again")
    assert document(tmp_path / "again", "scheduler/scheduler_config.json") == scheduler
    assert document(tmp_path / "again", "vae/config.json") == vae


@pytest.mark.parametrize("kind", ["of another family", "not finite", "too many", "only one"])
def test_markers_that_make_no_sense_tell_nothing(kind: str, tmp_path: Path) -> None:
    more = {
        "of another family": latents(4) | SIGMAS,
        "not finite": {"edm_vpred.sigma_max": floats(math.nan, shape=())},
        "too many": latents(60) | {"edm_vpred.sigma_min": floats(*[1.0] * 65)},
        "only one": {"edm_mean": floats(1.0, 2.0)},
    }[kind]
    family = "sd1" if kind == "of another family" else "sdxl"
    done(put_model(tmp_path / "model.safetensors", family, more), tmp_path / "folder")
    assert not document(tmp_path / "folder", "scheduler/scheduler_config.json")["_class_name"].startswith("EDM")
    assert not {"latents_mean", "latents_std"} & document(tmp_path / "folder", "vae/config.json").keys()


# ---------------------------------------------------------------- what a single file can't hold


def test_files_that_go_are_named(folders: Folders, tmp_path: Path) -> None:
    folder = folders()
    for name in ("README.md", "safety_checker/config.json", "feature_extractor/preprocessor_config.json"):
        put(folder / name, "{}")
    put_weights(folder / "safety_checker" / "model.safetensors", {"a": Raw("F16", (1,), bytes(2))})
    parts = {"safety_checker": "StableDiffusionSafetyChecker", "feature_extractor": "CLIPImageProcessor"}
    edit(folder, "model_index.json", **{name: ["transformers", kind] for name, kind in parts.items()})
    vocabulary = document(folder, "tokenizer/vocab.json")
    put(folder / "tokenizer" / "vocab.json", json.dumps(vocabulary, indent=4, ensure_ascii=True))
    out = done(folder, tmp_path / "a.safetensors")
    dropped = [line.split()[1] for line in out.splitlines() if line.strip().startswith("dropped")]
    there = (
        "README.md",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/a",
        "safety_checker/config.json",
    )
    assert sorted(dropped) == list(there)
    assert "isn't CLIP's" not in out
    put(folder / "tokenizer" / "vocab.json", vocabulary | {"<|new|>": len(vocabulary)})
    for content in (vocabulary | {"<|new|>": len(vocabulary)}, "[" * 100_000, "{}" + " " * (4 << 20)):
        put(folder / "tokenizer" / "vocab.json", content)
        result = cli("convert", folder, tmp_path / "b.safetensors", "--quiet", "--force")
        assert result.code == 0
        assert "tokenizer/vocab.json isn't CLIP's" in result.err


# ---------------------------------------------------------------- configs that lie


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_encoder", "num_hidden_layers", 3_000_000),
        ("unet", "layers_per_block", 2_000_000),
        ("unet", "transformer_layers_per_block", 2_000_000),
        ("vae", "layers_per_block", 2_000_000),
        ("vae", "scaling_factor", None),
        ("vae", "scaling_factor", "abc"),
        ("vae", "scaling_factor", math.nan),
    ],
)
def test_a_config_that_nothing_can_be_built_of_is_refused(
    part: str, field: str, value: Any, folders: Folders, tmp_path: Path
) -> None:
    folder = folders()
    path = edit(folder, f"{part}/config.json", **{field: value})
    for source, *words in (
        (folder,),
        (tmp_path / "model.safetensors", "--config", path),
        (tmp_path / "model.safetensors", "--config", folder),
    ):
        error = refused(source, tmp_path / ("out" if words else "out.safetensors"), *words)
        assert (error["kind"], error["file"]) == ("corrupt", str(path))
        assert field in error["message"]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vae", "scaling_factor", "abc"),
        ("vae", "latents_mean", "abc"),
        ("unet", "attention_head_dim", [1] * 7),
        ("unet", "norm_num_groups", -3),
        ("text_encoder", "num_attention_heads", 0),
    ],
)
def test_what_a_record_says_and_nobody_can_build_isnt_written(
    part: str, field: str, value: Any, folders: Folders, tmp_path: Path
) -> None:
    folders()
    record = {"schema_version": 1, "steps": [{"operation": "convert", "configs": {part: {field: value}}}]}
    model = tmp_path / "model.safetensors"
    state = {key: Raw(*tensor) for key, tensor in raw_file(model).items()}
    put(model, library_bytes(state, {"sdsurgery": json.dumps(record)}))
    result = cli("convert", model, tmp_path / "out", "--quiet")
    assert result.code == 0
    assert "what its metadata record of a conversion was not used" in result.err
    assert document(tmp_path / "out", f"{part}/config.json") == document(tmp_path / "folder", f"{part}/config.json")


@pytest.mark.parametrize("listed", [5, [], [5], None])
def test_architectures_of_no_kind_are_no_fault_of_ours(listed: Any, folders: Folders, tmp_path: Path) -> None:
    folder = folders()
    edit(folder, "text_encoder/config.json", architectures=listed)
    done(folder, tmp_path / "out.safetensors")
    assert refused(folder / "text_encoder", tmp_path / "lone.safetensors")["kind"] == "mismatch"


OTHER: dict[str, dict[str, Any]] = {
    "other widths": {"latent_channels": 16},
    "another class": {"_class_name": "UNet2DConditionModel"},
    "layers without end": {"layers_per_block": 2_000_000},
}


@pytest.mark.parametrize("kind", OTHER)
def test_a_config_of_other_weights_isnt_these(kind: str, folders: Folders, tmp_path: Path) -> None:
    folder = folders()
    path = edit(folder, "vae/config.json", **OTHER[kind], scaling_factor=0.5)
    lone = folder / "vae" / "diffusion_pytorch_model.safetensors"
    result = cli("convert", lone, tmp_path / "out", "--quiet")
    assert result.code == 0
    assert "config.json beside it was not used" in result.err
    assert document(tmp_path / "out", "config.json")["scaling_factor"] == 0.18215
    assert refused(lone, tmp_path / "other", "--config", path)["file"] == str(path)


@pytest.mark.parametrize("other", ["sd2", "sdxl", "inpainting", "nowhere"])
def test_a_yaml_of_another_family_isnt_this_models(other: str, folders: Folders, tmp_path: Path) -> None:
    folders()
    unet = {"sd2": "context_dim: 1024", "sdxl": "context_dim: 2048", "inpainting": "in_channels: 9"}.get(other, "")
    scale = 1e30 if other == "nowhere" else 0.5
    text = f"model: {{params: {{parameterization: v, scale_factor: {scale}, unet_config: {{params: {{{unet}}}}}}}}}"
    yaml = put(tmp_path / "model.yaml", text)
    result = cli("convert", tmp_path / "model.safetensors", tmp_path / "out", "--quiet")
    assert result.code == 0
    assert "model.yaml beside it was not used" in result.err
    assert document(tmp_path / "out", "scheduler/scheduler_config.json")["prediction_type"] == "epsilon"
    error = refused(tmp_path / "model.safetensors", tmp_path / "no", "--config", yaml)
    assert (error["file"], bool(error["remedy"])) == (str(yaml), True)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "unet", "vae"])
def test_one_components_config_may_be_named_for_a_whole_model(part: str, folders: Folders, tmp_path: Path) -> None:
    folder, changed = folders("sdxl"), "norm_num_groups" if part in {"unet", "vae"} else "layer_norm_eps"
    path = edit(folder, f"{part}/config.json", **{changed: 1})
    done(tmp_path / "model.safetensors", tmp_path / "out", "--config", path)
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        assert document(tmp_path / "out", f"{name}/config.json") == document(folder, f"{name}/config.json")


# ---------------------------------------------------------------- headers that lie


def bare(names: list[str]) -> State:
    return {name: Raw("F16", (1,), bytes(2)) for name in names}


BOMBS = {
    "160 levels of 160 blocks": bare(
        [f"{VAE}{half}.{way}.{level}.block.{number}.norm1.weight"
         for half, way in (("encoder", "down"), ("decoder", "up")) for level in range(160) for number in range(160)]
    ),
    "399 blocks of a thousand layers": bare(
        [f"{UNET}input_blocks.{number}.{name}" for number in range(1, 400)
         for name in ("0.in_layers.0.weight", "1.transformer_blocks.999.norm1.weight")]
        + [f"{UNET}input_blocks.0.0.weight", f"{UNET}middle_block.1.transformer_blocks.999.norm1.weight"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("kind", BOMBS)
def test_what_no_model_has_isnt_walked(kind: str, prefixed: bool, tmp_path: Path) -> None:
    state = BOMBS[kind]
    if not prefixed:
        state = {key.removeprefix(UNET).removeprefix(VAE): tensor for key, tensor in state.items()}
    model = put(tmp_path / "model.safetensors", library_bytes(state))
    assert refused(model, tmp_path / "out")["kind"] == "mismatch"
    assert cli("inspect", model, "--json").json["family"] == "unknown"


def test_no_matrix_of_any_size_is_transposed() -> None:
    """It is done in memory: a header claims as many bytes as a sparse file pretends to have."""
    configs = shallow("sdxl-refiner", random.Random(1))
    name, config = next((name, config) for name, config in configs.items() if isinstance(config, OpenClipConfig))
    configs[name] = replace(config, projection=1 << 28)
    model = outline({prefix + weight.name: weight.shape for prefix, found in configs.items() for weight in walk(found)})
    assert identify(model).family == "sdxl-refiner"
    with pytest.raises(MismatchError, match=r"text_projection is .* larger") as caught:
        Convert("diffusers")(model)
    assert caught.value.remedy


# ---------------------------------------------------------------- what lies there


def test_no_sidecar_is_written_over_an_input(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.sidecar.safetensors")
    for words in (["--force"], ["--force", "--dry-run"]):
        assert refused(model, tmp_path / "model", "--sidecar", *words, code=4)["file"] == str(model)


def test_no_yaml_is_written_over_an_input(folders: Folders, tmp_path: Path) -> None:
    folder, yaml = folders("sd2"), put(tmp_path / "out.yaml", "model: {params: {parameterization: v}}")
    for words in (["--force"], ["--force", "--dry-run"]):
        error = refused(folder, tmp_path / "out.safetensors", "--config", yaml, *words, code=4)
        assert error["file"] == str(yaml)
        piped = ["-o", tmp_path / "out.safetensors", "--json", *words, "convert", "ldm", "--config", yaml]
        result = cli("pipe", folder, *piped)
        assert (result.code, result.json["error"]["file"]) == (4, str(yaml))
        assert yaml.read_text() == "model: {params: {parameterization: v}}"


def test_a_failing_save_leaves_neither_file_nor_yaml(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(saving.AtomicFile):
        def append(self, *parts: Any) -> None:
            if self.path.suffix != ".yaml":
                raise NoSpaceError("the disk is full")
            super().append(*parts)

    folder = folders("sd2")
    monkeypatch.setattr(saving, "AtomicFile", Full)
    refused(folder, tmp_path / "out.safetensors", code=4)
    put(tmp_path / "out.yaml", "mine")
    refused(folder, tmp_path / "out.safetensors", "--force", code=4)


def test_a_yaml_that_lies_there_is_told_of(folders: Folders, tmp_path: Path) -> None:
    folder, yaml = folders("sdxl"), put(tmp_path / "out.yaml", "stale")
    for words in (["--dry-run"], []):
        result = cli("convert", folder, tmp_path / "out.safetensors", "--quiet", *words)
        assert result.code == 0
        assert f"{yaml} lies there already" in result.err
    assert yaml.read_text() == "stale"
    assert "lies there" not in cli("convert", folder, tmp_path / "other.safetensors").err


def test_a_folder_behind_a_link_has_its_sidecar(folders: Folders, tmp_path: Path) -> None:
    folder = folders(sidecar=True)
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(folder)
    done(link, tmp_path / "back.safetensors", "--sidecar")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- pipe


def test_pipe_converts_in_both_directions(folders: Folders, tmp_path: Path) -> None:
    folder = folders()
    assert cli("pipe", tmp_path / "model.safetensors", "-o", tmp_path / "piped", "convert", "diffusers").code == 0
    assert contents(tmp_path / "piped").keys() == contents(folder).keys()
    assert raw_state(sd.open(tmp_path / "piped")) == raw_state(sd.open(folder))
    back = tmp_path / "b.safetensors"
    assert cli("pipe", folder, "-o", back, "convert", "ldm", "+", "cast", "fp32").code == 0
    done(folder, tmp_path / "c.safetensors", "--dtype", "fp32")
    assert raw_file(back) == raw_file(tmp_path / "c.safetensors")
    assert {tensor[0] for tensor in raw_file(back).values()} == {"F32", "I64"}


@pytest.mark.parametrize(
    ("source", "to"), [("model.safetensors", "diffusers"), ("folder", "ldm"), ("folder", "diffusers")]
)
def test_nothing_is_converted_in_place(source: str, to: str, folders: Folders, tmp_path: Path) -> None:
    folders()
    before = contents(tmp_path)
    result = cli("pipe", tmp_path / source, "--in-place", "--json", "convert", to)
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")
    assert contents(tmp_path) == before


def test_heads_that_ldm_has_one_number_for(tmp_path: Path) -> None:
    """As many heads at every level, however wide: no width of a head says that."""
    single = write(tmp_path / "model.safetensors", synthetic.model("sd2"))
    folder = tmp_path / "folder"
    assert cli("convert", single, folder, "--prediction-type", "v_prediction").code == 0
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["attention_head_dim"] = [1] * len(config["block_out_channels"])
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    back, again = tmp_path / "back.safetensors", tmp_path / "again"
    assert cli("convert", folder, back).code == 0
    assert cli("convert", back, again).code == 0
    found = json.loads((again / "unet" / "config.json").read_text())["attention_head_dim"]
    assert found in (1, config["attention_head_dim"])
