"""convert: every weight there and back, everything else named; and the command around it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import FIXTURES, cli, metadata
from conftest import raw as raw_file
from container_support import Raw, State, raw_state, run_python
from convert_support import (
    CLIP,
    FAMILIES,
    FLOATS,
    METADATA,
    ODDITIES,
    UNET,
    VAE,
    made_odd,
    opened,
    put_strange,
    raw,
    shallow,
    whole,
)
from folder_support import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import IDS, NARROW

import sdsurgery as sd
from sdsurgery import history
from sdsurgery.dtypes import BY_NAME
from sdsurgery.errors import MismatchError
from sdsurgery.models import yaml_config
from sdsurgery.models.components import ema_name
from sdsurgery.operations import Convert

SEEDS = st.integers(0, 1 << 32)
DTYPES = st.lists(st.sampled_from(FLOATS), min_size=1, max_size=4)
LAST = "cond_stage_model.model.transformer.resblocks."


# ---------------------------------------------------------------- properties


def sorted_out(before: Mapping[str, sd.Tensor], after: sd.Checkpoint) -> dict[str, set[str]]:
    """What the report says of each key; between them, they must tell of all, once."""
    by_kind: dict[str, list[sd.Change]] = {"renamed": [], "dropped": [], "added": [], "replaced": []}
    for change in after.steps[-1].changes:
        by_kind[change.kind].append(change)
    # Of one that diffusers splits there are three, and of three that ldm joins there is one.
    sources = {source for change in by_kind["renamed"] for source in str(change.before).split(" + ")}
    made = [change.key for change in by_kind["renamed"]]
    dropped, added = ([change.key for change in by_kind[kind]] for kind in ("dropped", "added"))
    replaced = [change.key for change in by_kind["replaced"]]
    for keys in (made, dropped, added, replaced):
        assert len(keys) == len(set(keys))
    kept = {key for key in before.keys() & after.keys() if key not in {*made, *dropped, *added, *replaced}}
    assert all(after[key] == before[key] for key in kept)
    ids = {str(change.before).partition(" ")[0] for change in by_kind["replaced"]}
    groups = (sources, set(dropped), kept, ids)
    assert set(before) == set().union(*groups)
    assert sum(map(len, groups)) == len(before)
    assert set(after) == {*made, *added, *kept, *replaced}
    return {"sources": sources, "dropped": set(dropped), "kept": kept, "added": set(added), "replaced": set(replaced)}


def assert_there_and_back(state: State) -> tuple[dict[str, set[str]], dict[str, set[str]], sd.Checkpoint]:
    """Convert and convert back: whatever wasn't named as lost is the same again."""
    original = opened(state)
    folder = Convert("diffusers")(original)
    there = sorted_out(original, folder)
    back = Convert("ldm")(folder)
    again = sorted_out(folder, back)
    assert not again["dropped"]
    assert not there["added"]
    assert set(back) - set(original) <= again["added"]
    # Not merely equal: the same data, of which no byte was moved.
    for key in original.keys() - there["dropped"]:
        assert back[key] == original[key]
    return there, again, back


@settings(max_examples=50)
@given(st.sampled_from(FAMILIES), DTYPES, SEEDS)
def test_a_sound_model_comes_back_as_it_was(family: str, dtypes: list[str], seed: int) -> None:
    chance = random.Random(seed)
    state = whole(shallow(family, chance), chance, dtypes)
    there, again, back = assert_there_and_back(state)
    ids = CLIP[family] + IDS if family in CLIP else None
    assert again["added"] == ({ids} if ids else set())
    if ids:
        assert back[ids].tobytes() == state[ids].content
    last = {key for key in state if key.startswith(f"{LAST}1.")} if family == "sd2" else set()
    unheld = {key for key in state if key.endswith("logit_scale")} | ({ids} if ids else set()) | last
    unheld |= {key for key in state if key.endswith("text_projection") and family == "sd2"}
    assert there["dropped"] == unheld


@settings(max_examples=50)
@given(st.sampled_from(FAMILIES), st.sets(st.sampled_from(ODDITIES), min_size=1, max_size=6), DTYPES, SEEDS)
def test_of_an_odd_model_all_that_is_lost_is_named(
    family: str, oddities: set[str], dtypes: list[str], seed: int
) -> None:
    """Names and ranks that no loader takes come back as they should have been, everything else as it was."""
    chance = random.Random(seed)
    configs = shallow(family, chance)
    sound = whole(configs, chance, dtypes)
    state = made_odd(sound, configs, oddities, chance)
    original = opened(state)
    folder = Convert("diffusers")(original)
    there = sorted_out(original, folder)
    back = Convert("ldm")(folder)
    again = sorted_out(folder, back)
    assert not again["dropped"]
    lost = {key.removeprefix("module.") for key in there["dropped"]}
    for key in back.keys() - again["added"]:
        assert back[key].tobytes() == sound[key].content
        assert (back[key].dtype.name, back[key].shape) == (sound[key].dtype, sound[key].shape)
    weights = {key for key in sound if not key.endswith("position_ids")}
    left_out = {key for key in weights if key.removeprefix("module.") not in lost}
    if "no last layer" in oddities:
        left_out &= {*back, *left_out} - {key for key in weights if key not in back and "resblocks.1." in key}
        left_out -= {"cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"}
    gone = left_out - back.keys()
    assert not {key for key in gone if not key.startswith("cond_stage_model.model.")}
    assert "no last layer" in oddities or not gone


@settings(max_examples=40)
@given(st.sampled_from(FAMILIES), DTYPES, SEEDS, st.booleans(), st.data())
def test_a_lone_component_comes_back_as_it_was(
    family: str, dtypes: list[str], seed: int, prefixed: bool, data: st.DataObject
) -> None:
    chance = random.Random(seed)
    # What a lone file holds is told by its keys alone, so its structure is a published one.
    configs = synthetic.configs(family, NARROW[family])
    prefix = data.draw(st.sampled_from(sorted(configs)))
    state = whole({prefix: configs[prefix]}, chance, dtypes, ids=False)
    bare = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    original = opened(state if prefixed else bare)
    folder = Convert("diffusers")(original)
    there = sorted_out(original, folder)
    assert not {key for key in folder if "/" in key}
    back = Convert("ldm")(folder)
    again = sorted_out(folder, back)
    assert again["added"] == ({IDS} if prefix in CLIP.values() else set())
    lost = {key.removeprefix(prefix) for key in there["dropped"]}
    expected = {key: tensor for key, tensor in bare.items() if key not in lost}
    assert {key: tensor for key, tensor in raw_state(back).items() if key != IDS} == expected
    # SD2's text encoder alone might be any OpenCLIP-H: nothing of it may be lost on that guess.
    assert lost <= {"logit_scale", *(key for key in bare if "resblocks.23." in key or key == "text_projection")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inputs", [4, 5, 8, 9])
def test_a_published_structure_comes_back_as_it_was(family: str, inputs: int) -> None:
    chance = random.Random(inputs)
    configs = synthetic.configs(family, NARROW[family], inputs=inputs)
    there, again, back = assert_there_and_back(whole(configs, chance, FLOATS))
    assert len(there["dropped"]) == {"sd1": 1, "sd2": 14, "sdxl": 2, "sdxl-refiner": 1}[family]
    assert len(again["added"]) == (family in CLIP)
    assert back.steps[-1].operation == "convert"


@settings(max_examples=15)
@given(st.sampled_from(FAMILIES), DTYPES, SEEDS)
def test_a_folder_comes_back_too(family: str, dtypes: list[str], seed: int) -> None:
    """The other way round: a folder, a single file, and the same weights in a folder again."""
    chance = random.Random(seed)
    first = Convert("diffusers")(opened(whole(shallow(family, chance), chance, dtypes)))
    again = Convert("diffusers")(Convert("ldm")(first))
    assert dict(again) == dict(first)
    files = {name: b"".join(data.chunks()) for name, data in first.folder.files.items()}  # type: ignore[union-attr]
    assert {name: b"".join(data.chunks()) for name, data in again.folder.files.items()} == files  # type: ignore[union-attr]


def test_what_is_there_already_is_said_and_done(tmp_path: Path) -> None:
    chance = random.Random(1)
    original = opened(whole(shallow("sd1", chance), chance))
    same = Convert("ldm")(original)
    assert (dict(same), same.changes) == (dict(original), ())
    folder = Convert("diffusers")(original)
    again = Convert("diffusers")(folder)
    assert (dict(again), again.steps[-1].changes) == (dict(folder), ())
    assert all("already" in step.notes[-1].message for step in (same.steps[-1], again.steps[-1]))


@pytest.mark.parametrize(
    "kind", ["q, k and v of different types", "a weight gone", "a weight of another shape", "one more"]
)
def test_a_folder_that_isnt_sound_is_refused_by_the_key(kind: str) -> None:
    chance = random.Random(3)
    folder = Convert("diffusers")(opened(whole(shallow("sdxl", chance), chance)))
    key = "text_encoder_2/text_model.encoder.layers.0.self_attn.k_proj.weight"
    tensors = dict(folder)
    if kind == "one more":
        tensors["text_encoder_2/extra"] = tensors[key]
    elif kind == "a weight gone":
        del tensors[key]
    elif kind == "a weight of another shape":
        tensors[key] = replace(tensors[key], shape=(*tensors[key].shape, 1))
    else:
        tensors[key] = replace(tensors[key], dtype=BY_NAME["BF16"])
    with pytest.raises(MismatchError) as caught:
        Convert("ldm")(replace(folder, tensors=tensors))
    assert "k_proj" in str(caught.value) or "extra" in str(caught.value)
    assert caught.value.key
    assert caught.value.remedy


# ---------------------------------------------------------------- the command: layouts and names


def put_model(path: Path, family: str = "sd1", oddities: set[str] | None = None, **more: Any) -> Path:
    """A small model as a file, the same for the same arguments."""
    chance = random.Random(family)
    configs = shallow(family, chance)
    unet = replace(configs[UNET], inputs=more.pop("inputs", 4))  # type: ignore[call-arg]
    configs[UNET] = unet
    state = made_odd(whole(configs, chance, more.pop("dtypes", ("F16",))), configs, oddities or set(), chance)
    return put_strange(path, state | more.pop("state", {}), chance, more.pop("metadata", None))


def config(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def scheduler(folder: Path) -> Any:
    return config(folder, "scheduler/scheduler_config.json")


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".ckpt", ".SAFETENSORS"])
def test_a_name_with_a_suffix_is_a_single_file(suffix: str, tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors")
    assert cli("convert", model, tmp_path / "folder").code == 0
    back = tmp_path / ("back" + suffix)
    result = cli("convert", tmp_path / "folder", back, "--json")
    assert (result.code, result.json["output"]) == (0, str(back))
    assert raw_state(sd.open(back)) == raw_state(sd.open(model))


@pytest.mark.parametrize("name", ["folder", "model.v1.5", "model.fp16", "Übung 模型"])
def test_any_other_name_is_a_folder(name: str, tmp_path: Path) -> None:
    result = cli("convert", put_model(tmp_path / "model.safetensors"), tmp_path / name, "--json")
    assert (result.code, result.json["output"]) == (0, str(tmp_path / name))
    assert config(tmp_path / name, "model_index.json")["_class_name"] == "StableDiffusionPipeline"
    assert sd.open(tmp_path / name).origin.container == "diffusers"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["out.gguf", "out.onnx", "out.json", "out.yaml", "out.zip"])
def test_a_name_of_another_format_is_no_folder(name: str, tmp_path: Path) -> None:
    result = cli("convert", put_model(tmp_path / "model.safetensors"), tmp_path / name)
    assert result.code == 2
    assert not (tmp_path / name).exists()


def test_to_must_agree_with_the_name(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors")
    for target, to, code in (("folder", "ldm", 2), ("out.safetensors", "diffusers", 2), ("out.safetensors", "onnx", 2)):
        result = cli("convert", model, tmp_path / target, "--to", to, "--json")
        assert result.code == code, result
        assert not (tmp_path / target).exists()
    for target, to in (("folder", "diffusers"), ("out.safetensors", "ldm")):
        assert cli("convert", model, tmp_path / target, "--to", to).code == 0
    assert raw_file(tmp_path / "out.safetensors") == raw_file(model)


def test_a_lone_component_may_lie_in_a_file_under_diffusers_names(tmp_path: Path) -> None:
    vae, there, back = FIXTURES / "vae.safetensors", tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert cli("convert", vae, there, "--to", "diffusers").code == 0
    assert "decoder.mid_block.attentions.0.to_q.weight" in raw_file(there)
    assert cli("convert", there, back).code == 0
    assert raw_file(back) == raw_file(vae)


def test_a_lone_component_becomes_a_folder_with_its_config(tmp_path: Path) -> None:
    assert cli("convert", FIXTURES / "vae.safetensors", tmp_path / "vae").code == 0
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    assert config(tmp_path / "vae", "config.json")["_class_name"] == "AutoencoderKL"
    assert cli("convert", tmp_path / "vae", tmp_path / "back.safetensors").code == 0
    assert raw_file(tmp_path / "back.safetensors") == raw_file(FIXTURES / "vae.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tokenizer_and_config_is_written(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert cli("convert", put_model(tmp_path / "model.safetensors", family), folder).code == 0
    index = config(folder, "model_index.json")
    parts = {name for name, pair in index.items() if isinstance(pair, list) and pair[0]}
    assert parts == {path.name for path in folder.iterdir() if path.is_dir()}
    for part in parts - {"scheduler"}:
        names = {path.name for path in (folder / part).iterdir()}
        if part.startswith("tokenizer"):
            assert names >= {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
        else:
            assert len(names) == 2
            assert "config.json" in names
    assert not list(folder.rglob("*.bin"))


# ---------------------------------------------------------------- the command: types, names of weights, shards


@pytest.mark.parametrize(("option", "name"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32")])
@pytest.mark.parametrize("back", [False, True])
def test_dtype_casts_the_weights(option: str, name: str, back: bool, tmp_path: Path) -> None:
    state = {"betas": Raw("F32", (2,), bytes(8))}
    model = put_tame(tmp_path / "model.safetensors", state)
    folder, out = tmp_path / "folder", tmp_path / "out.safetensors"
    assert cli("convert", model, folder, *([] if back else ["--dtype", option])).code == 0
    result = cli("convert", folder, out, *(["--dtype", option] if back else []), "--json")
    assert result.code == 0
    weights = {key: tensor for key, tensor in raw_file(out).items() if not key.endswith("position_ids")}
    assert {tensor[0] for tensor in weights.values()} == {name}
    expected = {key: tensor.numpy().astype(BY_NAME[name].to_numpy()) for key, tensor in sd.open(model).items()}
    assert all(value[2] == expected[key].tobytes() for key, value in weights.items())
    casts = [change for change in result.json["changes"] if change["kind"] == "cast"]
    others = [key for key in weights if raw_file(model)[key][0] != name]
    assert len(casts) == (len(others) if back else 0)


def put_tame(path: Path, more: State | None = None) -> Path:
    """A model whose weights are of the size that weights are."""
    chance = random.Random(11)
    state = whole(shallow("sd1", chance), chance, ("F32", "F64"))
    for key, tensor in state.items():
        if tensor.dtype != "I64":
            values = np.array([chance.uniform(-1, 1) for _ in range(int(np.prod(tensor.shape)))])
            state[key] = replace(tensor, content=values.astype(BY_NAME[tensor.dtype].to_numpy()).tobytes())
    return put_strange(path, state | (more or {}), chance)


def test_what_doesnt_fit_into_the_type_is_refused(tmp_path: Path) -> None:
    key = UNET + "out.2.bias"
    model = put_tame(tmp_path / "model.safetensors")
    count = raw_file(model)[key][1][0]
    model = put_tame(model, {key: Raw("F32", (count,), struct.pack("<f", 1e6) * count)})
    result = cli("convert", model, tmp_path / "folder", "--dtype", "fp16", "--json")
    assert (result.code, result.json["error"]["key"]) == (1, "unet/conv_out.bias")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("size", [[], ["--shard-size", "500"]])
def test_a_variant_stands_in_the_names(size: list[str], tmp_path: Path) -> None:
    model, folder = put_model(tmp_path / "model.safetensors"), tmp_path / "folder"
    assert cli("convert", model, folder, "--variant", "fp16", *size).code == 0
    names = {path.name for path in folder.rglob("*.safetensors")}
    assert all(".fp16" in name for name in names)
    assert size or names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    back = tmp_path / "back.safetensors"
    assert cli("convert", folder, back, "--variant", "fp16").code == 0
    assert raw_file(back) == raw_file(model)
    assert cli("convert", folder, tmp_path / "no.safetensors", "--variant", "bf16").code == 3


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_can_be_no_variant_is_refused(dry: list[str], tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors")
    result = cli("convert", model, tmp_path / "folder", "--variant", "../x", "--json", *dry)
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_are_split_where_they_are_too_large(tmp_path: Path) -> None:
    model, folder = put_model(tmp_path / "model.safetensors"), tmp_path / "folder"
    assert cli("convert", model, folder, "--shard-size", "0.9kB").code == 2
    assert cli("convert", model, folder, "--shard-size", "1KiB").code == 0
    index = config(folder, "unet/diffusion_pytorch_model.safetensors.index.json")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    for path in shards:
        tensors = raw_file(path)
        assert len(tensors) == 1 or sum(len(tensor[2]) for tensor in tensors.values()) <= 1024
        assert {index["weight_map"][key] for key in tensors} == {path.name}
    back = tmp_path / "back.safetensors"
    assert cli("convert", folder, back).code == 0
    assert raw_file(back) == raw_file(model)


@pytest.mark.parametrize("size", ["0", "0GB", "-1", "5 apples", "1e9", "", "GB", "1.5.5GB"])
def test_what_is_no_size_is_refused(size: str, tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors")
    result = cli("convert", model, tmp_path / "folder", f"--shard-size={size}", "--json")
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")


def test_a_single_file_has_no_shards(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors")
    assert cli("convert", model, tmp_path / "out.safetensors", "--shard-size", "1GB").code == 2


# ---------------------------------------------------------------- the command: EMA


def test_the_ema_weights_become_the_unet(tmp_path: Path) -> None:
    model, folder = put_model(tmp_path / "model.safetensors", oddities={"ema"}), tmp_path / "folder"
    result = cli("convert", model, folder, "--ema", "--json")
    assert result.code == 0
    assert cli("convert", folder, tmp_path / "back.safetensors").code == 0
    before, after = raw_file(model), raw_file(tmp_path / "back.safetensors")
    unet = [key for key in before if key.startswith(UNET)]
    assert {key: after[key] for key in unet} == {
        key: before["model_ema." + ema_name(key.removeprefix(UNET))] for key in unet
    }
    assert all(after[key] == before[key] for key in after if not key.startswith(UNET))
    replaced = {change["key"] for change in result.json["changes"] if change["kind"] == "replaced"}
    assert replaced == set(unet)


@pytest.mark.parametrize("oddity", [set(), {"ema scalars"}])
def test_without_ema_weights_none_can_be_taken(oddity: set[str], tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors", oddities=oddity)
    result = cli("convert", model, tmp_path / "folder", "--ema", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert not (tmp_path / "folder").exists()


# ---------------------------------------------------------------- the command: what shapes don't tell


def test_a_folder_states_what_shapes_dont_tell(tmp_path: Path) -> None:
    model, named = put_model(tmp_path / "model.safetensors"), tmp_path / "named"
    assert cli("convert", model, named).code == 0
    for name, fields in (
        ("unet/config.json", {"norm_num_groups": 1, "attention_head_dim": 3, "norm_eps": 1e-4}),
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction", "steps_offset": 7}),
    ):
        (named / name).write_text(json.dumps(config(named, name) | fields), "utf-8")
    folder = tmp_path / "folder"
    result = cli("convert", model, folder, "--config", named)
    assert result.code == 0
    assert "prediction type v_prediction: named says so" in result.out
    assert config(folder, "unet/config.json")["norm_num_groups"] == 1
    assert config(folder, "unet/config.json")["attention_head_dim"] == 3
    assert config(folder, "vae/config.json")["scaling_factor"] == 0.5
    assert config(folder, "text_encoder/config.json")["hidden_act"] == "gelu"
    assert scheduler(folder)["prediction_type"] == "v_prediction"
    assert scheduler(folder)["steps_offset"] == 7
    # What a folder stated survives in a single file, and comes back without being told again.
    assert cli("convert", folder, tmp_path / "single.safetensors").code == 0
    assert cli("convert", tmp_path / "single.safetensors", tmp_path / "again").code == 0
    for name in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        assert config(tmp_path / "again", name) == config(folder, name)


def test_a_config_of_one_component_is_for_a_lone_one(tmp_path: Path) -> None:
    stated = tmp_path / "config.json"
    assert cli("convert", FIXTURES / "vae.safetensors", tmp_path / "vae").code == 0
    stated.write_text(json.dumps(config(tmp_path / "vae", "config.json") | {"scaling_factor": 0.25}), "utf-8")
    assert cli("convert", FIXTURES / "vae.safetensors", tmp_path / "other", "--config", stated).code == 0
    assert config(tmp_path / "other", "config.json")["scaling_factor"] == 0.25
    model = put_model(tmp_path / "model.safetensors")
    result = cli("convert", model, tmp_path / "no", "--config", stated, "--json")
    assert (result.code, result.json["error"]["file"]) == (3, str(stated))
    # One that contradicts the shapes is found out.
    stated.write_text(json.dumps(config(tmp_path / "vae", "config.json") | {"latent_channels": 16}), "utf-8")
    result = cli("convert", FIXTURES / "vae.safetensors", tmp_path / "no", "--config", stated, "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("content", [None, "", "[1]", "{", "model: {params: {parameterization: x0}}"])
@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_a_named_config_that_cant_be_used_is_refused(content: str | None, name: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, "utf-8")
    vae = FIXTURES / "vae.safetensors"
    result = cli("convert", vae, tmp_path / "folder", "--config", tmp_path / name, "--json")
    assert (result.code, result.json["error"]["file"]) == (3, str(tmp_path / name))
    assert not (tmp_path / "folder").exists()


YAML = "model: {params: {parameterization: v, scale_factor: 0.3, unet_config: {params: {num_heads: 2}}}}\n"


@pytest.mark.parametrize("named", [False, True])
def test_a_yaml_states_what_shapes_dont_tell(named: bool, tmp_path: Path) -> None:
    model, folder = put_model(tmp_path / "model.safetensors"), tmp_path / "folder"
    yaml = tmp_path / ("other.yaml" if named else "model.yaml")
    yaml.write_text(YAML, "utf-8")
    result = cli("convert", model, folder, *(["--config", yaml] if named else []))
    assert result.code == 0
    assert f"{yaml.name} says so" in result.out
    assert scheduler(folder)["prediction_type"] == "v_prediction"
    assert config(folder, "unet/config.json")["attention_head_dim"] == 2
    assert config(folder, "vae/config.json")["scaling_factor"] == 0.3


def test_an_option_counts_most_and_a_named_config_more_than_one_beside(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text(YAML, "utf-8")
    (tmp_path / "eps.yaml").write_text(YAML.replace("parameterization: v", "parameterization: eps"), "utf-8")
    words = ["--config", tmp_path / "eps.yaml"]
    assert cli("convert", model, tmp_path / "a", *words).code == 0
    assert scheduler(tmp_path / "a")["prediction_type"] == "epsilon"
    result = cli("convert", model, tmp_path / "b", *words, "--prediction-type", "v_prediction")
    assert scheduler(tmp_path / "b")["prediction_type"] == "v_prediction"
    assert "as told" in result.out
    assert cli("convert", model, tmp_path / "c", "--prediction-type", "sample").code == 2


def test_a_broken_yaml_beside_the_file_is_no_reason_to_fail(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text("a: [", "utf-8")
    result = cli("convert", model, tmp_path / "folder", "--quiet")
    assert result.code == 0
    assert "model.yaml" in result.err


@pytest.mark.parametrize(
    ("family", "inputs", "prediction", "written"),
    [
        ("sd1", 4, "epsilon", False),
        ("sd1", 4, "v_prediction", True),
        ("sd1", 9, "epsilon", True),
        ("sd1", 8, "epsilon", True),
        ("sd2", 4, "epsilon", True),
        ("sd2", 4, "v_prediction", True),
        ("sd2", 9, "epsilon", True),
        ("sd2", 5, "epsilon", True),
        ("sdxl", 4, "epsilon", False),
        ("sdxl", 4, "v_prediction", False),
        ("sdxl-refiner", 4, "epsilon", False),
    ],
)
def test_the_webui_gets_a_yaml_where_it_needs_one(
    family: str, inputs: int, prediction: str, written: bool, tmp_path: Path
) -> None:
    model, folder = put_model(tmp_path / "model.safetensors", family, inputs=inputs), tmp_path / "folder"
    assert cli("convert", model, folder, "--prediction-type", prediction).code == 0
    out, yaml = tmp_path / "out.safetensors", tmp_path / "out.yaml"
    assert cli("convert", folder, out, "--dry-run").code == 0
    assert not yaml.exists()
    assert cli("convert", folder, out).code == 0
    assert yaml.exists() == written
    if written:
        facts = yaml_config.read(yaml.read_text("utf-8"))
        assert (facts.prediction_type, facts.family, facts.in_channels) == (prediction, family, inputs)
        yaml.write_text("mine", "utf-8")
        for more in ([], ["--dry-run"]):
            result = cli("convert", folder, tmp_path / "out.ckpt", "--json", *more)
            assert (result.code, result.json["error"]["file"]) == (4, str(yaml))
        assert not (tmp_path / "out.ckpt").exists()
        assert yaml.read_text("utf-8") == "mine"
        assert cli("convert", folder, tmp_path / "out.ckpt", "--force").code == 0
        assert yaml.read_text("utf-8") != "mine"


@pytest.mark.parametrize(("spread", "kind"), [(0.2, "v_prediction"), (0.02, "epsilon")])
def test_sd2_is_told_by_the_spread_of_a_bias(spread: float, kind: str, tmp_path: Path) -> None:
    tensors = synthetic.model("sd2")
    key = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors[key] = np.resize(np.array([-spread, spread]), tensors[key].shape).astype("float16")
    state = raw_state(sd.Checkpoint.from_state_dict(tensors))
    model = put_strange(tmp_path / "model.safetensors", state, random.Random(0))
    result = cli("convert", model, tmp_path / "folder")
    assert f"prediction type {kind}: the spread of {key} is" in result.out
    assert scheduler(tmp_path / "folder")["prediction_type"] == kind
    assert config(tmp_path / "folder", "unet/config.json").get("upcast_attention", False) == (kind == "v_prediction")


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), float("-inf")])
def test_a_ruined_bias_tells_nothing_and_breaks_nothing(bias: float, tmp_path: Path) -> None:
    tensors = synthetic.model("sd2")
    key = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors[key][0] = bias
    assert Convert("diffusers")(sd.Checkpoint.from_state_dict(tensors)).changes


@pytest.mark.parametrize("markers", [(), ("v_pred",), ("v_pred", "ztsnr")])
def test_sdxl_is_told_by_markers_both_ways(markers: tuple[str, ...], tmp_path: Path) -> None:
    state = {name: Raw("F32", (), bytes(4)) for name in markers}
    model, folder = put_model(tmp_path / "model.safetensors", "sdxl", state=state), tmp_path / "folder"
    there = cli("convert", model, folder)
    found = scheduler(folder)
    assert found["prediction_type"] == ("v_prediction" if "v_pred" in markers else "epsilon")
    assert found.get("rescale_betas_zero_snr", False) == ("ztsnr" in markers)
    assert all(f"dropped   {name}" in there.out for name in markers)
    back = tmp_path / "back.safetensors"
    result = cli("convert", folder, back, "--json")
    assert raw_file(model).keys() - raw_file(back).keys() == {"conditioner.embedders.1.model.logit_scale"}
    added = {change["key"] for change in result.json["changes"] if change["kind"] == "added"}
    assert added == {*markers, CLIP["sdxl"] + IDS}
    assert cli("convert", back, tmp_path / "again").code == 0
    assert scheduler(tmp_path / "again") == found


@pytest.mark.parametrize(("last", "zero"), [(0.0, True), (1e-6, False)])
def test_a_schedule_that_ends_without_signal_is_told(last: float, zero: bool, tmp_path: Path) -> None:
    state = {"alphas_cumprod": Raw("F32", (3,), struct.pack("<3f", 1, 0.5, last))}
    model = put_model(tmp_path / "model.safetensors", state=state)
    assert cli("convert", model, tmp_path / "folder").code == 0
    assert scheduler(tmp_path / "folder").get("rescale_betas_zero_snr", False) is zero


# ---------------------------------------------------------------- the command: reports


def test_every_tensor_that_is_lost_is_named(tmp_path: Path) -> None:
    """In the text while they are few; in JSON always."""
    model = put_model(tmp_path / "model.safetensors", oddities={"schedule", "markers", "ema scalars", "wrong ids"})
    gone = {key for key in raw_file(model) if not key.startswith((UNET, VAE, "cond_stage_model."))}
    gone.add(CLIP["sd1"] + IDS)
    result = cli("convert", model, tmp_path / "folder")
    assert len(gone) < 40
    assert all(f"dropped   {key}  " in result.out for key in gone)
    many = put_model(tmp_path / "many.safetensors", oddities={"ema"})
    assert "more; --json names all" in cli("convert", many, tmp_path / "other").out
    document = cli("convert", many, tmp_path / "other", "--json", "--force").json
    dropped = {change["key"] for change in document["changes"] if change["kind"] == "dropped"}
    assert dropped == {key for key in raw_file(many) if key.startswith("model_ema.")} | {CLIP["sd1"] + IDS}


def test_wrong_ids_are_told_because_they_change_what_is_drawn(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors", oddities={"wrong ids"})
    result = cli("convert", model, tmp_path / "folder", "--quiet")
    assert (result.code, result.out) == (0, "")
    assert "position ids are wrong" in result.err
    assert "fix-clip" in result.err


@pytest.mark.parametrize("back", [False, True])
def test_a_dry_run_says_the_same_and_writes_nothing(back: bool, tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors", "sd2", {"ema", "schedule", "junk"}, metadata=METADATA)
    source, target = model, tmp_path / "folder"
    if back:
        assert cli("convert", model, target).code == 0
        source, target = target, tmp_path / "back.ckpt"
    before = contents(tmp_path)
    dry = cli("convert", source, target, "--dry-run", "--json")
    said = cli("convert", source, target, "--dry-run")
    assert contents(tmp_path) == before
    real = cli("convert", source, target, "--json")
    assert (dry.code, said.code, real.code) == (0, 0, 0)
    assert dry.json | {"output": str(target), "dry_run": False} == real.json
    assert said.out.endswith(f"dry run: {target} would be written\n")


def test_quiet_says_nothing_and_text_says_where(tmp_path: Path) -> None:
    model = put_tame(tmp_path / "model.safetensors")
    assert cli("convert", model, tmp_path / "a", "--quiet").out == ""
    out = cli("convert", model, tmp_path / "b").out
    assert f"wrote {tmp_path / 'b'} (" in out
    assert "converted: text_encoder" in out
    assert "written beside the weights: model_index.json" in out


def test_the_history_grows_and_false_hashes_go(tmp_path: Path) -> None:
    model, folder = put_model(tmp_path / "model.safetensors", metadata=METADATA), tmp_path / "folder"
    there = cli("convert", model, folder, "--json").json
    assert {c["key"] for c in there["changes"] if c["kind"] == "metadata"} == set(history.HASH_KEYS)
    for path in folder.rglob("*.safetensors"):
        told = metadata(path)
        assert not set(told) & set(history.HASH_KEYS)
        assert told["modelspec.title"] == METADATA["modelspec.title"]
        (step,) = history.recorded(told)
        assert (step["operation"], step["parameters"]) == ("convert", {"to": "diffusers"})
    assert cli("convert", folder, tmp_path / "back.safetensors").code == 0
    told = metadata(tmp_path / "back.safetensors")
    assert told["modelspec.title"] == METADATA["modelspec.title"]
    assert [step["parameters"]["to"] for step in history.recorded(told)] == ["diffusers", "ldm"]
    assert str(tmp_path) not in json.dumps(told)


# ---------------------------------------------------------------- the command: refusals


def test_an_unknown_model_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    chance = random.Random(5)
    unknown = {
        "a lora": {"lora_unet_down_blocks_0.lora_up.weight": raw((4, 4), "F16", chance)},
        "SSD-1B": {
            key: tensor
            for key, tensor in whole(shallow("sdxl", chance), chance).items()
            if not key.startswith(UNET + "middle_block.1.")
        },
        "two families": whole(shallow("sd1", chance), chance)
        | {key: value for key, value in whole(shallow("sdxl", chance), chance).items() if key.startswith(UNET)},
        "nothing": {},
    }
    for name, state in unknown.items():
        model = put_strange(tmp_path / "model.safetensors", state, chance)
        result = cli("convert", model, tmp_path / "folder", "--json")
        error = result.json["error"]
        assert (result.code, error["kind"], error["file"]) == (3, "mismatch", str(model)), name
        assert "; " in error["message"], name  # the evidence
        assert error["remedy"]
        assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("kind", ["missing", "misshapen"])
def test_a_damaged_model_is_refused_by_its_key(kind: str, tmp_path: Path) -> None:
    tensors = synthetic.model("sd1")
    key = VAE + "decoder.norm_out.bias"
    if kind == "missing":
        del tensors[key]
    else:
        tensors[key] = np.zeros(3, "float16")
    state = raw_state(sd.Checkpoint.from_state_dict(tensors))
    model = put_strange(tmp_path / "model.safetensors", state, random.Random(0))
    result = cli("convert", model, tmp_path / "folder", "--json")
    assert (result.code, result.json["error"]["key"]) == (3, key)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("source", ["model.safetensors", "nothing.safetensors", "unknown.safetensors"])
@pytest.mark.parametrize("target", ["out.safetensors", "out", "nowhere/out"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_cant_be_written_counts_more_than_what_cant_be_read(
    source: str, target: str, dry: list[str], tmp_path: Path
) -> None:
    put_model(tmp_path / "model.safetensors")
    put_strange(tmp_path / "unknown.safetensors", {"a": Raw("U8", (1,), b"a")}, random.Random(0))
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_bytes(b"x")
    before = contents(tmp_path)
    result = cli("convert", tmp_path / source, tmp_path / target, *dry)
    assert result.code == 4
    assert contents(tmp_path) == before


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors")
    before = model.read_bytes()
    assert cli("convert", model, model, "--force").code == 4
    assert cli("convert", model, tmp_path / "folder").code == 0
    for target in (tmp_path / "folder", tmp_path / "folder" / "inside"):
        assert cli("convert", tmp_path / "folder", target, "--force").code == 4
    assert model.read_bytes() == before
    assert cli("convert", model, model).code == 4


def test_force_replaces_a_folder_and_a_file(tmp_path: Path) -> None:
    model, other = put_model(tmp_path / "a.safetensors"), put_model(tmp_path / "b.safetensors", "sd2")
    folder = tmp_path / "folder"
    for source in (model, other):
        assert cli("convert", source, folder, "--force").code == 0
    assert sd.open(folder)["unet/conv_in.weight"].tobytes() == raw_file(other)[UNET + "input_blocks.0.0.weight"][2]
    assert cli("convert", folder, model, "--force").code == 0
    assert UNET + "input_blocks.0.0.weight" in raw_file(model)


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b", "c"], ["a", "b", "--in-place"], ["a", "b", "-o", "c"]])
def test_usage(words: list[str], tmp_path: Path) -> None:
    assert cli("convert", *words).code == 2


# ---------------------------------------------------------------- what it takes

_LIGHT = """
import sys
from sdsurgery.cli import run
for words in (sys.argv[1:4], ["convert", sys.argv[3], sys.argv[4]]):
    code = run([*words, "--quiet"])
    assert code == 0, code
heavy = {"torch", "numpy", "diffusers", "transformers", "onnx", "safetensors", "tokenizers"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.mark.parametrize("sidecar", [False, True])
def test_neither_torch_nor_numpy_is_imported(sidecar: bool, tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors", "sd2")
    code = _LIGHT.replace('"--quiet"', '"--quiet", "--sidecar"') if sidecar else _LIGHT
    done = run_python(code, "convert", model, tmp_path / "folder", tmp_path / "back.safetensors")
    assert done.returncode == 0, done.stderr


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model.safetensors", "sdxl", {"markers", "junk"}, metadata=METADATA)
    for name in ("one", "two"):
        assert cli("convert", model, tmp_path / name).code == 0
        assert cli("convert", tmp_path / name, tmp_path / f"{name}.safetensors").code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
