"""Dialects of names that are read alike, lone components, and everything that isn't whole: refused by its name."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import synthetic
import torch
import transformers
from conftest import cli
from folder_support import contents, put
from oracle_support import assert_same, converted, document, named_as, weights
from safetensors.torch import load_file, save_file

from sdsurgery.models.stated import SILENT_FIELDS

State = dict[str, torch.Tensor]

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
PREFIXES = {
    family: {"unet": "model.diffusion_model.", "vae": "first_stage_model."} | text for family, text in PREFIXES.items()
}
PARTS = [(family, name) for family, prefixes in PREFIXES.items() for name in prefixes]


def single(family: str, seed: int = 0) -> State:
    found = synthetic.model(family, dtype="float32", seed=seed)
    return {key: torch.from_numpy(value.copy()) for key, value in found.items()}


def saved(path: Path, tensors: State) -> Path:
    save_file({key: value.clone() for key, value in tensors.items()}, path, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder, and the single file that it was made of beside it."""
    root = tmp_path_factory.mktemp("made")

    def folder(family: str) -> Path:
        target = root / family
        if not target.exists():
            converted(saved(root / f"{family}.safetensors", single(family)), target)
        return target

    return folder


def weight_file(folder: Path, name: str) -> Path:
    (file,) = (folder / name).glob("*.safetensors")
    return file


def rewritten(folder: Path, target: Path, name: str, change: Callable[[State], State]) -> Path:
    """A copy of a folder with a component's tensors changed."""
    shutil.copytree(folder, target)
    file = weight_file(target, name)
    saved(file, change(load_file(file)))
    return target


# ---------------------------------------------------------------- dialects


def old_attention(state: State) -> State:
    """The VAE's attention as diffusers named it before 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        next((key.replace(f".{new}.", f".{name}.") for new, name in old.items() if f".{new}." in key), key): value
        for key, value in state.items()
    }


def four_dimensional(state: State) -> State:
    """The VAE's attention as the 1 x 1 convolutions that old converters left it."""
    return {
        key: value[:, :, None, None] if "attentions.0.to_" in key and value.ndim == 2 else value
        for key, value in state.items()
    }


def flat(state: State) -> State:
    """The text encoder as transformers 5 saves it when it was freshly built."""
    return {key.removeprefix("text_model."): value for key, value in state.items()}


def with_ids(state: State) -> State:
    """The text encoder as transformers before 4.31 saved it."""
    return state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def test_old_names_are_those_of_diffusers_itself() -> None:
    """diffusers still renames them when it loads: its own table is the judge of ours."""
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    today = dict(vae.state_dict())
    old = old_attention(today)
    assert len(old.keys() - today.keys()) == 16
    vae._fix_state_dict_keys_on_load(old)
    assert_same(old, today)


@pytest.mark.parametrize(
    ("family", "name", "dialect"),
    [
        ("sd1", "vae", old_attention),
        ("sd2", "vae", old_attention),
        ("sdxl", "vae", four_dimensional),
        ("sd1", "text_encoder", flat),
        ("sd2", "text_encoder", flat),
        ("sdxl", "text_encoder", flat),
        ("sdxl", "text_encoder_2", flat),
        ("sd1", "text_encoder", with_ids),
        ("sd2", "text_encoder", with_ids),
    ],
)
def test_dialects_in_folders_are_read_and_mended(
    made: Callable[[str], Path], tmp_path: Path, family: str, name: str, dialect: Callable[[State], State]
) -> None:
    folder = made(family)
    other = rewritten(folder, tmp_path / "other", name, dialect)
    assert load_file(weight_file(other, name)).keys() != weights(folder, name).keys() or dialect is four_dimensional
    assert_same(
        load_file(converted(other, tmp_path / "a.safetensors")),
        load_file(converted(folder, tmp_path / "b.safetensors")),
    )
    mended = converted(other, tmp_path / "mended", "--to", "diffusers")
    for part in PREFIXES[family]:
        assert_same(weights(mended, part), weights(folder, part))
        assert document(mended, f"{part}/config.json") == document(folder, f"{part}/config.json")


@pytest.mark.parametrize(("family", "depth"), [("sd1", "cond_stage_model"), ("sdxl", "conditioner.embedders.0")])
def test_flat_text_encoder_in_a_single_file(
    made: Callable[[str], Path], tmp_path: Path, family: str, depth: str
) -> None:
    """What diffusers' script makes of a pipeline that transformers 5 saved; ``from_single_file`` refuses it."""
    tensors = {key.replace(f"{depth}.transformer.text_model.", f"{depth}.transformer."): value
               for key, value in single(family).items()}  # fmt: skip
    assert tensors.keys() != single(family).keys()
    folder = converted(saved(tmp_path / "flat.safetensors", tensors), tmp_path / "flat")
    for name in PREFIXES[family]:
        assert_same(weights(folder, name), weights(made(family), name))


@pytest.mark.parametrize("kind", ["bin", "fp16", "shards", "fp16 shards"])
def test_containers_of_folders(made: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(made("sdxl"), folder)
    options: list[str] = []
    for name in PREFIXES["sdxl"]:
        state, stem = weights(folder, name), STEMS.get(name, "model")
        weight_file(folder, name).unlink()
        variant = ".fp16" if "fp16" in kind else ""
        if kind == "bin":
            torch.save(state, folder / name / f"{'pytorch_model' if stem == 'model' else stem}.bin")
        elif kind == "fp16":
            saved(folder / name / f"{stem}.fp16.safetensors", state)
        else:
            shards(folder / name, stem, variant, state)
    if "fp16" in kind:
        options = ["--variant", "fp16"]
    result = load_file(converted(folder, tmp_path / "a.safetensors", *options))
    assert_same(result, load_file(converted(made("sdxl"), tmp_path / "b.safetensors")))


def shards(folder: Path, stem: str, variant: str, state: State) -> None:
    keys, table = list(state), {}
    for number in range(3):
        file = f"{stem}{variant}-{number + 1:05d}-of-00003.safetensors"
        table |= dict.fromkeys(keys[number::3], file)
        saved(folder / file, {key: state[key] for key in keys[number::3]})
    index = f"{stem}.safetensors.index{variant}.json"
    put(
        folder / index, {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": table}
    )


# ---------------------------------------------------------------- lone components


@pytest.mark.parametrize(("family", "name"), PARTS)
def test_lone_components(made: Callable[[str], Path], tmp_path: Path, family: str, name: str) -> None:
    """A component's file to the folder that its class loads, and back."""
    prefix = PREFIXES[family][name]
    alone = {key.removeprefix(prefix): value for key, value in single(family).items() if key.startswith(prefix)}
    file = saved(tmp_path / "alone.safetensors", alone)
    folder = converted(file, tmp_path / "alone", "--to", "diffusers")
    config = document(folder, "config.json")
    kind = (
        getattr(diffusers, config["_class_name"])
        if name in STEMS
        else getattr(transformers, config["architectures"][0])
    )
    loaded = kind.from_pretrained(folder, local_files_only=True)
    assert not any(value.is_meta for value in loaded.parameters())
    assert_same(named_as(loaded, weights(made(family), name)), loaded.state_dict())
    assert_same(load_file(weight_file(tmp_path, "alone")), weights(made(family), name))

    loaded.save_pretrained(tmp_path / "theirs")
    back = load_file(converted(tmp_path / "theirs", tmp_path / "back.safetensors", "--to", "ldm"))
    held = {key: value for key, value in alone.items() if not unheld(family, key)}
    assert_same(back, held)


def unheld(family: str, key: str) -> bool:
    return key == "logit_scale" or (family == "sd2" and (key == "text_projection" or ".resblocks.23." in key))


def test_a_wrapped_component_loses_its_wrapper(made: Callable[[str], Path], tmp_path: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in weights(made("sd1"), "vae").items()}
    folder = converted(saved(tmp_path / "a.safetensors", wrapped), tmp_path / "a", "--to", "diffusers")
    assert_same(load_file(weight_file(tmp_path, "a")), weights(made("sd1"), "vae"))
    diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)


# ---------------------------------------------------------------- what a record of ours is worth


def edited(folder: Path, name: str, **fields: Any) -> None:
    put(folder / name, document(folder, name) | fields)


def test_a_record_of_an_earlier_conversion_is_not_taken_for_the_last(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    """What the user has changed in the folder since counts, even where it is now what would be assumed."""
    folder = tmp_path / "a"
    shutil.copytree(made("sd1"), folder)
    heads = document(folder, "unet/config.json")["attention_head_dim"]
    scheduler = document(folder, "scheduler/scheduler_config.json")
    edited(folder, "unet/config.json", attention_head_dim=2)
    edited(folder, "scheduler/scheduler_config.json", _class_name="DDIMScheduler", prediction_type="v_prediction")
    again = converted(converted(folder, tmp_path / "a.safetensors"), tmp_path / "again")
    assert document(again, "unet/config.json")["attention_head_dim"] == 2
    assert document(again, "scheduler/scheduler_config.json")["_class_name"] == "DDIMScheduler"
    edited(again, "unet/config.json", attention_head_dim=heads)
    put(again / "scheduler" / "scheduler_config.json", scheduler)
    last = converted(converted(again, tmp_path / "b.safetensors"), tmp_path / "last")
    assert document(last, "unet/config.json")["attention_head_dim"] == heads
    assert document(last, "scheduler/scheduler_config.json") == scheduler


def test_a_record_does_not_speak_of_a_component_that_was_replaced(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(made("sd1"), folder)
    edited(folder, "vae/config.json", scaling_factor=0.5, norm_num_groups=1)
    edited(folder, "unet/config.json", attention_head_dim=2)
    file = converted(folder, tmp_path / "a.safetensors")
    assert document(converted(file, tmp_path / "kept"), "vae/config.json")["scaling_factor"] == 0.5
    donor = saved(tmp_path / "donor.safetensors", single("sd1", seed=5))
    for words in (["merge-vae", file, donor], ["replace", file, "--from", donor, "--component", "vae"]):
        done = cli(*words, "-o", tmp_path / "b.safetensors", "--force")
        assert done.code == 0, done.err
        back = converted(tmp_path / "b.safetensors", tmp_path / str(words[0]))
        assert document(back, "vae/config.json") == document(made("sd1"), "vae/config.json")
        assert document(back, "unet/config.json")["attention_head_dim"] == 2


def test_a_field_that_a_config_lacks_has_its_default(made: Callable[[str], Path], tmp_path: Path) -> None:
    """SDXL's published latent scale is another than the default of the class."""
    folder = tmp_path / "a"
    shutil.copytree(made("sdxl"), folder)
    for name, field in (("vae/config.json", "scaling_factor"), ("text_encoder_2/config.json", "hidden_act")):
        config = document(folder, name)
        del config[field]
        put(folder / name, config)
    back = converted(converted(folder, tmp_path / "a.safetensors"), tmp_path / "back")
    assert document(back, "vae/config.json")["scaling_factor"] == 0.18215
    assert document(back, "text_encoder_2/config.json")["hidden_act"] == "quick_gelu"
    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": None}
    for name, kind in classes.items():
        theirs = transformers.CLIPTextConfig().to_dict()
        if kind:
            theirs = {field: given.default for field, given in inspect.signature(kind).parameters.items()}
        assert {field: theirs[field] for field in SILENT_FIELDS[name]} == SILENT_FIELDS[name]


# ---------------------------------------------------------------- refusals


def refused(source: Path, target: Path, names: str, *options: str) -> str:
    """The key that the refusal names; nothing was written."""
    before = contents(target.parent)
    done = cli("convert", source, target, "--json", *options)
    assert done.code == 3, done.out + done.err
    assert contents(target.parent) == before
    error = done.json["error"]
    assert error["remedy"]
    assert names in error["message"] + str(error["key"])
    return str(error["key"])


def chosen(state: State) -> str:
    """A matrix in the midst of it."""
    return sorted(key for key, value in state.items() if value.ndim in {2, 4} and value.shape[0] > 4)[7]


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen", "of no dimension"])
@pytest.mark.parametrize(("family", "name"), PARTS)
@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_folders_that_are_not_whole(
    made: Callable[[str], Path], tmp_path: Path, family: str, name: str, fault: str, to: str
) -> None:
    folder = made(family)
    key = chosen(weights(folder, name))
    change: dict[str, Callable[[State], State]] = {
        "missing": lambda state: {k: v for k, v in state.items() if k != key},
        "extra": lambda state: state | {key.replace("weight", "wait"): torch.zeros(3)},
        "misshapen": lambda state: state | {key: state[key][:-1]},
        "of no dimension": lambda state: state | {key: torch.zeros(())},
    }
    other = rewritten(folder, tmp_path / "other", name, change[fault])
    named = f"{name}/{key.replace('weight', 'wait') if fault == 'extra' else key}"
    target = tmp_path / ("a.safetensors" if to == "ldm" else "a")
    assert refused(other, target, named, "--to", to) == named


CONTRADICTIONS: dict[str, list[dict[str, Any]]] = {
    "unet": [
        {"layers_per_block": 3},
        {"block_out_channels": [4, 8, 12, 16]},
        {"in_channels": 9},
        {"use_linear_projection": True},
        {"cross_attention_dim": 24},
        {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 12},
        {"class_embed_type": "timestep"},
        {"down_block_types": ["DownBlock2D"] * 4},
    ],
    "vae": [
        {"block_out_channels": [2, 4, 6, 8]},
        {"layers_per_block": 1},
        {"latent_channels": 16},
        {"use_quant_conv": False},
        {"mid_block_add_attention": False},
    ],
    "text_encoder": [
        {"num_hidden_layers": 13},
        {"num_hidden_layers": 11},
        {"hidden_size": 16},
        {"vocab_size": 65},
        {"max_position_embeddings": 248},
        {"architectures": ["CLIPTextModelWithProjection"]},
    ],
}


@pytest.mark.parametrize(
    ("name", "fields"), [(name, fields) for name in CONTRADICTIONS for fields in CONTRADICTIONS[name]]
)
@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_configs_that_contradict_the_weights(
    made: Callable[[str], Path], tmp_path: Path, name: str, fields: dict[str, Any], to: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(made("sd1"), other)
    put(other / name / "config.json", document(other, f"{name}/config.json") | fields)
    refused(other, tmp_path / ("a.safetensors" if to == "ldm" else "a"), name, "--to", to)


@pytest.mark.parametrize(
    ("part", "field"),
    [("unet", "attention_head_dim"), ("unet", "norm_num_groups"), ("vae", "norm_num_groups"),
     ("text_encoder", "num_attention_heads")],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, None, "x", [], [0, 1], {}, 1e300])
def test_configs_that_no_module_is_built_of(
    made: Callable[[str], Path], tmp_path: Path, part: str, field: str, value: Any
) -> None:
    other = tmp_path / "other"
    shutil.copytree(made("sd2"), other)
    edited(other, f"{part}/config.json", **{field: value})
    for target in (tmp_path / "a.safetensors", tmp_path / "a"):
        done = cli("convert", other, target, "--to", "ldm" if target.suffix else "diffusers", "--json")
        assert done.code == 3
        assert done.json["error"]["kind"] == "corrupt"
        assert done.json["error"]["file"] == str(other / part / "config.json")
        assert not target.exists()


@pytest.mark.parametrize("value", ["sample", "flow_prediction", 5, None, [1]])
def test_prediction_types_of_no_webui(made: Callable[[str], Path], tmp_path: Path, value: Any) -> None:
    other = tmp_path / "other"
    shutil.copytree(made("sd2"), other)
    edited(other, "scheduler/scheduler_config.json", prediction_type=value)
    back = converted(converted(other, tmp_path / "a.safetensors"), tmp_path / "back")
    assert (tmp_path / "a.yaml").exists() != isinstance(value, str)
    expected = value if isinstance(value, str) else "epsilon"
    assert document(back, "scheduler/scheduler_config.json")["prediction_type"] == expected


@pytest.mark.parametrize("fault", ["missing", "misshapen", "of no dimension"])
@pytest.mark.parametrize(("family", "name"), PARTS)
def test_single_files_that_are_not_whole(tmp_path: Path, family: str, name: str, fault: str) -> None:
    tensors, prefix = single(family), PREFIXES[family][name]
    key = chosen({key: value for key, value in tensors.items() if key.startswith(prefix)})
    if fault == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:-1] if fault == "misshapen" else torch.zeros(())
    assert refused(saved(tmp_path / "a.safetensors", tensors), tmp_path / "a", key) == key


def test_two_names_of_one_weight_are_one_too_many(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Which of the two counts differs from reader to reader."""

    def both(state: State) -> State:
        return old_attention({key: value + 1 for key, value in state.items()}) | state

    other = rewritten(made("sd1"), tmp_path / "other", "vae", both)
    for target in (tmp_path / "a.safetensors", tmp_path / "a"):
        assert "attentions.0." in refused(other, target, "vae/", "--to", "ldm" if target.suffix else "diffusers")
    other = rewritten(made("sd1"), tmp_path / "other2", "text_encoder", lambda state: state | flat(state))
    assert refused(other, tmp_path / "a.safetensors", "text_encoder/").startswith("text_encoder/e")
