"""The sidecar: a folder and what it can't hold are the original file again, bit for bit; and what it refuses."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from conftest import FIXTURES, cli, metadata, raw_pickle
from conftest import raw as raw_file
from container_support import Raw, State, library_bytes
from convert_support import (
    CLIP,
    FAMILIES,
    FLOATS,
    METADATA,
    ODDITIES,
    UNET,
    VAE,
    int64s,
    made_odd,
    put_strange,
    raw,
    shallow,
    strange_bytes,
    whole,
)
from folder_support import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import IDS, NARROW

import sdsurgery as sd
from sdsurgery import history
from sdsurgery.dtypes import BY_NAME
from sdsurgery.errors import NoSpaceError, UsageError
from sdsurgery.models.walks import walk
from sdsurgery.operations import Convert, sidecar_of

TORCH = {
    name for name, dtype in BY_NAME.items() if dtype.torch and hasattr(torch, dtype.torch) and dtype.kind != "bool"
}


def as_torch(tensor: Raw) -> torch.Tensor:
    dtype = getattr(torch, str(BY_NAME[tensor.dtype].torch))
    if not tensor.content:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.content), dtype=dtype).reshape(tensor.shape)


def tuple_of(tensor: Raw) -> tuple[str, tuple[int, ...], bytes]:
    return (tensor.dtype, tensor.shape, tensor.content)


@pytest.fixture(scope="module")
def scratch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples: each of them writes over the one before."""
    return tmp_path_factory.mktemp("examples")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def there_and_back(path: Path, *, force: bool = False) -> Path:
    """Converted to a folder with a sidecar, and back without the original at hand."""
    folder, back = path.with_name("folder"), path.with_name("back" + path.suffix)
    more = ["--force"] if force else []
    there = cli("convert", path, folder, "--sidecar", "--quiet", *more)
    assert (there.code, there.out) == (0, ""), there.err
    again = cli("convert", folder, back, "--sidecar", "--quiet", *more)
    assert (again.code, again.out) == (0, ""), again.err
    return back


@settings(max_examples=40)
@given(
    st.sampled_from(FAMILIES),
    st.sets(st.sampled_from(ODDITIES), max_size=5),
    st.lists(st.sampled_from(FLOATS), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 1 << 32),
)
def test_the_original_file_comes_back_bit_for_bit(
    scratch_folder: Path, family: str, oddities: set[str], dtypes: list[str], with_metadata: bool, seed: int
) -> None:
    chance = random.Random(seed)
    configs = shallow(family, chance)
    state = made_odd(whole(configs, chance, dtypes), configs, oddities, chance)
    path = put_strange(scratch_folder / "model.safetensors", state, chance, METADATA if with_metadata else None)
    back = there_and_back(path, force=True)
    assert back.read_bytes() == path.read_bytes()
    assert sha256(back) == sha256(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_structure_with_junk_in_its_components_comes_back(family: str, tmp_path: Path) -> None:
    """And all oddities together; random weights, so that detection meets NaN and Inf."""
    chance = random.Random(family)
    configs = synthetic.configs(family, NARROW[family])
    state = made_odd(whole(configs, chance, FLOATS), configs, {*ODDITIES} - {"no ids", "ema scalars"}, chance)
    for name in (
        "first_stage_model.loss.logvar", "first_stage_model.encoder.extra.weight", "cond_stage_model.logit_scale",
        "model.diffusion_model.junk", "conditioner.embedders.1.model.text_model.embeddings.position_ids",
    ):  # fmt: skip
        state["module." + name] = raw((3,), "F32", chance)
    path = put_strange(tmp_path / "model.safetensors", state, chance, METADATA)
    assert there_and_back(path).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("prefixed", [False, True])
def test_a_lone_component_comes_back(component: str, prefixed: bool, tmp_path: Path) -> None:
    chance = random.Random(component)
    configs = synthetic.configs("sdxl", NARROW["sdxl"])
    prefix = dict(zip(("unet", "vae", "text_encoder", "text_encoder_2"), configs, strict=True))[component]
    state = whole({prefix: configs[prefix]}, chance, FLOATS)
    if not prefixed:
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    state["something.else"] = raw((2, 2), "I16", chance)
    path = put_strange(tmp_path / "lone.safetensors", state, chance, METADATA)
    assert there_and_back(path).read_bytes() == path.read_bytes()


def test_a_component_under_diffusers_names_comes_back(tmp_path: Path) -> None:
    """Old names for the attention too, which the folder has under today's."""
    chance = random.Random(1)
    config = synthetic.configs("sd1", NARROW["sd1"])[VAE]
    state = {weight.name: raw(weight.shape, "F16", chance) for weight in walk(config, "diffusers")}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        for key in [key for key in state if f".attentions.0.{new}." in key]:
            state[key.replace(new, name)] = state.pop(key)
    path = put_strange(tmp_path / "old.safetensors", state, chance, METADATA)
    assert there_and_back(path).read_bytes() == path.read_bytes()
    assert "encoder.mid_block.attentions.0.to_q.weight" in sd.open(tmp_path / "folder")


# ---------------------------------------------------------------- pickles


@settings(max_examples=10)
@given(st.sampled_from(FAMILIES), st.sets(st.sampled_from(ODDITIES), max_size=5), st.integers(0, 1 << 32))
def test_a_pickle_comes_back_tensor_for_tensor(
    scratch_folder: Path, family: str, oddities: set[str], seed: int
) -> None:
    """In the same order; with weights that share their data, and a few that no safetensors file could hold so."""
    chance = random.Random(seed)
    configs = shallow(family, chance)
    state = made_odd(whole(configs, chance, ("F16", "F32")), configs, oddities, chance)
    keys = chance.sample(sorted(state), len(state))
    tensors = {key: as_torch(state[key]) for key in keys if state[key].dtype in TORCH}
    shared = [key for key in tensors if tensors[key].dim() == 4]
    start = "module." * ("wrapper" in oddities) + "tied"
    tensors[f"{start}.weight"] = tensors[shared[0]]
    tensors[f"{start}.view"] = tensors[shared[0]].reshape(-1)[:1]
    tensors[f"{start}.turned"] = tensors[shared[-1]].transpose(0, 1)
    path = scratch_folder / "model.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3, "callbacks": {"a": [1]}}, path)
    back = there_and_back(path, force=True)
    assert list(raw_pickle(back).items()) == list(raw_pickle(path).items())


def test_a_pickle_comes_back_as_a_safetensors_file_too(tmp_path: Path) -> None:
    chance = random.Random(2)
    configs = shallow("sd2", chance)
    state = whole(configs, chance)
    path = tmp_path / "model.ckpt"
    torch.save({key: as_torch(tensor) for key, tensor in state.items()}, path)
    assert cli("convert", path, tmp_path / "folder", "--sidecar").code == 0
    result = cli("convert", tmp_path / "folder", tmp_path / "back.safetensors", "--sidecar")
    assert result.code == 0
    assert "bit for bit" in result.out
    assert raw_file(tmp_path / "back.safetensors") == {key: tuple_of(tensor) for key, tensor in state.items()}


# ---------------------------------------------------------------- what isn't so


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    chance = random.Random(7)
    configs = shallow("sd1", chance)
    state = made_odd(whole(configs, chance), configs, {"ema", "schedule", "markers", "wrong ids"}, chance)
    put_strange(folder / "model.safetensors", state, chance, METADATA)
    assert cli("convert", folder / "model.safetensors", folder / "folder", "--sidecar").code == 0
    return folder


@pytest.fixture
def made(made_once: Path, tmp_path: Path) -> Path:
    """A folder with a sidecar, and beside them the original ``model.safetensors``."""
    shutil.copytree(made_once, tmp_path / "made")
    return tmp_path / "made" / "folder"


def with_weight(folder: Path, key: str, change: Callable[[Raw], Raw]) -> None:
    """Change one weight of a folder, as another program would."""
    component, _, name = key.partition("/")
    (file,) = (folder / component).glob("*.safetensors")
    state = {name: Raw(*value) for name, value in raw_file(file).items()}
    state[name] = change(state[name])
    file.write_bytes(library_bytes(state, {"format": "pt"}))


def sidecar(folder: Path) -> Path:
    return folder.with_name(folder.name + ".sidecar.safetensors")


def test_without_being_asked_for_a_sidecar_is_used(made: Path) -> None:
    result = cli("convert", made, made.with_name("back.safetensors"))
    assert result.code == 0
    assert "bit for bit" in result.out
    assert made.with_name("back.safetensors").read_bytes() == made.with_name("model.safetensors").read_bytes()


def zeroed(weight: Raw) -> Raw:
    return replace(weight, content=bytes(len(weight.content)))


def widened(weight: Raw) -> Raw:
    return Raw("F32", weight.shape, weight.content * 2)


CHANGED = {
    "unet": ("unet/conv_in.bias", UNET + "input_blocks.0.0.bias", zeroed),
    "vae": ("vae/quant_conv.bias", VAE + "quant_conv.bias", zeroed),
    "vae, cast": ("vae/quant_conv.bias", VAE + "quant_conv.bias", widened),
    "text_encoder": (
        "text_encoder/text_model.final_layer_norm.bias", CLIP["sd1"] + "text_model.final_layer_norm.bias", zeroed
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGED)
def test_what_belongs_to_a_changed_component_isnt_put_back(made: Path, kind: str) -> None:
    """EMA weights and what is no network's are of the UNet as it was; all that belongs to the others is put back."""
    before, kept = raw_file(made.with_name("model.safetensors")), raw_file(sidecar(made))
    there, key, change = CHANGED[kind]
    with_weight(made, there, change)
    back = made.with_name("back.safetensors")
    result = cli("convert", made, back, "--json")
    assert result.code == 0
    (warning,) = [note["message"] for note in result.json["notes"] if note["level"] == "warning"]
    assert f"its {kind.partition(',')[0]} changed" in warning
    expected = before | {key: tuple_of(change(Raw(*before[key])))}
    added = {entry["key"] for entry in result.json["changes"] if entry["kind"] == "added"}
    if kind == "unet":
        gone = kept.keys() - {CLIP["sd1"] + IDS}
        assert f"{len(gone)} tensors in the sidecar are left out" in warning
        expected = {name: tensor for name, tensor in expected.items() if name not in gone}
        assert added == {CLIP["sd1"] + IDS}
    elif kind == "text_encoder":
        expected[CLIP["sd1"] + IDS] = tuple_of(int64s(range(before[CLIP["sd1"] + IDS][1][1])))
        assert added == kept.keys() - {CLIP["sd1"] + IDS}
        assert "left out" not in warning
    else:
        assert added == kept.keys()
        assert "left out" not in warning
    assert raw_file(back) == expected
    told = metadata(back)
    assert not set(told) & set(history.HASH_KEYS)
    assert {name: told[name] for name in METADATA if name not in {*history.HASH_KEYS, "sdsurgery"}} == {
        name: text for name, text in METADATA.items() if name not in {*history.HASH_KEYS, "sdsurgery"}
    }
    assert [step["operation"] for step in history.recorded(told)] == ["convert"]
    dropped = {change["key"] for change in result.json["changes"] if change["kind"] == "metadata"}
    assert dropped == set(history.HASH_KEYS)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("kind", CHANGED)
def test_where_the_original_is_asked_for_nothing_else_will_do(made: Path, kind: str, dry: list[str]) -> None:
    there, _, change = CHANGED[kind]
    with_weight(made, there, change)
    result = cli("convert", made, made.with_name("back.safetensors"), "--sidecar", "--json", *dry)
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert result.json["error"]["file"] == str(sidecar(made))
    assert f"its {kind.partition(',')[0]} changed" in result.json["error"]["message"]
    assert "leave out --sidecar" in result.json["error"]["remedy"]
    assert not made.with_name("back.safetensors").exists()


def test_what_a_folder_states_of_a_changed_component_is_kept(made: Path) -> None:
    with_weight(made, *CHANGED["vae"][::2])
    path = made / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"scaling_factor": 0.5}), "utf-8")
    back, again = made.with_name("back.safetensors"), made.with_name("again")
    assert "configs is kept in the metadata" in cli("convert", made, back).out
    assert cli("convert", back, again).code == 0
    assert json.loads((again / "vae" / "config.json").read_text("utf-8"))["scaling_factor"] == 0.5


def test_a_component_that_is_gone_is_a_changed_one(made: Path) -> None:
    shutil.rmtree(made / "vae")
    index = json.loads((made / "model_index.json").read_text("utf-8"))
    (made / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}), "utf-8")
    before, back = raw_file(made.with_name("model.safetensors")), made.with_name("back.safetensors")
    result = cli("convert", made, back)
    assert result.code == 0
    assert "its vae changed" in result.err
    assert raw_file(back) == {key: tensor for key, tensor in before.items() if not key.startswith(VAE)}


def test_an_equal_weight_written_anew_is_no_change(made: Path) -> None:
    """diffusers saving the folder again, in other files, changes nothing that counts."""
    with_weight(made, "vae/quant_conv.bias", lambda weight: weight)
    assert "bit for bit" in cli("convert", made, made.with_name("back.safetensors"), "--sidecar").out
    assert made.with_name("back.safetensors").read_bytes() == made.with_name("model.safetensors").read_bytes()


def another(folder: Path) -> None:
    """A folder of other widths under the same name."""
    shutil.rmtree(folder)
    chance = random.Random(8)
    path = put_strange(folder.with_name("other.safetensors"), whole(shallow("sd1", chance), chance), chance)
    assert cli("convert", path, folder).code == 0


def cast(folder: Path) -> None:
    other = folder.with_name("cast")
    assert cli("convert", folder, other, "--dtype", "bf16").code == 0
    shutil.rmtree(folder)
    other.rename(folder)


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = sidecar(folder)
        state = {name: Raw(*value) for name, value in raw_file(path).items()}
        record = json.loads(metadata(path)["sdsurgery.sidecar"])
        changed = change(record)
        text = json.dumps(record if changed is None else changed)
        path.write_bytes(with_metadata(state, {"sdsurgery.sidecar": text}))

    return spoil


def with_metadata(state: State, texts: dict[str, str]) -> bytes:
    return strange_bytes(state, texts, random.Random(0))


def entries(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    return rewritten(lambda record: change(record["tensors"]) and None)


def header(change: Callable[[str], Any]) -> Callable[[Path], None]:
    return rewritten(lambda record: record.update(header=change(record["header"])))


def tensors_gone(folder: Path) -> None:
    sidecar(folder).write_bytes(with_metadata({}, metadata(sidecar(folder))))


def kept_one(change: Callable[[Raw], Raw]) -> Callable[[Path], None]:
    """Change one of the tensors that it keeps."""

    def spoil(folder: Path) -> None:
        state = {name: Raw(*value) for name, value in raw_file(sidecar(folder)).items()}
        state["betas"] = change(state["betas"])
        sidecar(folder).write_bytes(with_metadata(state, metadata(sidecar(folder))))

    return spoil


def parts_unknown(found: list[Any]) -> None:
    for entry in found:
        entry[4] = "x"


def sources_gone(found: list[Any]) -> None:
    for entry in found:
        entry[3] = entry[3] and "nowhere"


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another folder's": (another, "isn't this folder's"),
    "the folder was cast": (cast, "isn't this folder's"),
    "no safetensors file": (lambda folder: sidecar(folder).write_bytes(b"{}") and None, "too short"),
    "no sidecar at all": (
        lambda folder: shutil.copy(folder.with_name("model.safetensors"), sidecar(folder)) and None,
        "no sidecar",
    ),
    "its tensors are gone": (tensors_gone, "lacks"),
    "no JSON": (
        lambda folder: sidecar(folder).write_bytes(with_metadata({}, {"sdsurgery.sidecar": "{"})) and None,
        "be read",
    ),
    "a list": (rewritten(lambda _: []), "be read"),
    "nested without end": (
        lambda folder: sidecar(folder).write_bytes(with_metadata({}, {"sdsurgery.sidecar": "[" * 100_000})) and None,
        "be read",
    ),
    "an empty record": (rewritten(lambda _: {}), "be read"),
    "a later version": (rewritten(lambda record: record.update(schema_version=2)), "this version"),
    "no digest": (rewritten(lambda record: record.update(blake3=None)), "be read"),
    "no digest of a component": (rewritten(lambda record: record["blake3"].pop("vae") and None), "this version"),
    "no digest of what it keeps": (rewritten(lambda record: record["blake3"].pop("") and None), "this version"),
    "a digest that is no text": (rewritten(lambda record: record["blake3"].update(vae=5)), "be read"),
    "metadata that are no text": (rewritten(lambda record: record.update(header=None, metadata={"a": 1})), "be read"),
    "metadata that can't be written": (
        rewritten(lambda record: record.update(header=None, metadata={"a": "\ud800"})),
        "be read",
    ),
    "neither header nor metadata": (rewritten(lambda record: record.update(header=None)), "be read"),
    "a key that is no text": (entries(lambda found: found.append([1, "F16", [], None, "vae"])), "be read"),
    "a key that can't be written": (entries(lambda found: found.append(["\ud800", "F16", [0], "a", "vae"])), "be read"),
    "an entry too short": (entries(lambda found: found.append(["a"])), "be read"),
    "an entry twice": (entries(lambda found: found.append(found[0])), "this version"),
    "an unknown type": (entries(lambda found: found[0].__setitem__(1, "F17")), "this version"),
    "a type that is no name": (entries(lambda found: found[0].__setitem__(1, [])), "be read"),
    "a negative size": (entries(lambda found: found[0].__setitem__(2, [-1])), "this version"),
    "a size that is true": (entries(lambda found: found[0].__setitem__(2, [True])), "this version"),
    "half a byte": (entries(lambda found: found.append(["a", "F4", [1], None, "vae"])), "be read"),
    "a size without bounds": (entries(lambda found: found[0].__setitem__(2, [10**4000, 10**4000])), "this version"),
    "two thousand dimensions": (entries(lambda found: found[0].__setitem__(2, [1] * 2000)), "this version"),
    "a part that is no name": (entries(lambda found: found[0].__setitem__(4, 5)), "this version"),
    "a part that nobody knows": (entries(parts_unknown), "this version"),
    "weights of the folder that aren't there": (entries(sources_gone), "isn't this folder's"),
    "a tensor more": (entries(lambda found: found.append(["a", "F16", [], None, "vae"])), "lacks a"),
    "a tensor fewer": (
        entries(lambda found: found.remove(next(entry for entry in found if not entry[3]))),
        "what it keeps isn't",
    ),
    "a kept tensor of other bytes": (kept_one(zeroed), "what it keeps isn't"),
    "a kept tensor of another type": (kept_one(lambda _: Raw("U8", (1,), b"a")), "what it keeps isn't"),
    "another shape": (entries(lambda found: found[0].__setitem__(2, [1, *found[0][2]])), "the header"),
    "a header that is no JSON": (header(lambda text: text[:-9]), "be read"),
    "a header of another file": (header(lambda _: "{}"), "the header"),
    "a header that is no text": (header(lambda _: 5), "be read"),
    "a header that can't be written": (header(lambda text: text + "\ud800"), "be read"),
    "offsets of another file": (
        header(lambda text: re.sub(r'"data_offsets"\s*:\s*\[\s*', r"\g<0>1", text, count=1)),
        "the header",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_sidecar_that_doesnt_fit_is_refused_where_it_was_asked_for(made: Path, kind: str) -> None:
    spoil, words = SPOILED[kind]
    spoil(made)
    result = cli("convert", made, made.with_name("back.safetensors"), "--sidecar", "--json")
    assert result.code == 3
    error = result.json["error"]
    assert error["file"] == str(sidecar(made))
    assert words in error["message"]
    assert error["remedy"]
    assert not made.with_name("back.safetensors").exists()


@pytest.mark.parametrize("kind", SPOILED)
def test_and_otherwise_left_alone_with_a_warning(made: Path, kind: str) -> None:
    spoil, words = SPOILED[kind]
    spoil(made)
    result = cli("convert", made, made.with_name("back.safetensors"), "--quiet")
    assert (result.code, result.out) == (0, "")
    assert f"{sidecar(made)} was not used: " in result.err
    assert words in result.err
    assert not [key for key in raw_file(made.with_name("back.safetensors")) if key.startswith("model_ema.")]


def test_a_sidecar_that_is_asked_for_must_be_there(made: Path) -> None:
    sidecar(made).unlink()
    result = cli("convert", made, made.with_name("back.safetensors"), "--sidecar", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "unreadable")
    assert not made.with_name("back.safetensors").exists()
    assert cli("convert", made, made.with_name("back.safetensors")).code == 0


@pytest.mark.parametrize("more", [["--dtype", "fp16"], ["--ema"]])
@pytest.mark.parametrize("back", [False, True])
def test_what_changes_the_weights_and_a_sidecar_contradict_each_other(made: Path, more: list[str], back: bool) -> None:
    words = [made, made.with_name("out.safetensors")] if back else [made.with_name("model.safetensors"), made / "x"]
    result = cli("convert", *words, "--sidecar", *more, "--json")
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")
    assert more[0] in result.json["error"]["message"]


def test_with_another_type_asked_for_a_sidecar_isnt_used(made: Path) -> None:
    back = made.with_name("back.safetensors")
    assert cli("convert", made, back, "--dtype", "bf16").code == 0
    assert {tensor[0] for tensor in raw_file(back).values()} == {"BF16", "I64"}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("model.safetensors", "out.safetensors"),  # a file has no sidecar
        ("folder", "out"),  # nor has a folder of a folder
    ],
)
def test_a_sidecar_goes_with_a_folder_and_a_file(made: Path, source: str, target: str) -> None:
    result = cli("convert", made.with_name(source), made.with_name(target), "--sidecar", "--json")
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")
    assert not made.with_name(target).exists()


def test_a_lone_component_in_a_file_has_no_sidecar(tmp_path: Path) -> None:
    result = cli(
        "convert",
        FIXTURES / "vae.safetensors",
        tmp_path / "out.safetensors",
        "--to",
        "diffusers",
        "--sidecar",
        "--json",
    )
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("taken", ["again", "again.sidecar.safetensors"])
def test_what_exists_is_left_alone(made: Path, taken: str, dry: list[str]) -> None:
    there = made.with_name(taken)
    if taken == "again":
        shutil.copytree(made, there)
    else:
        there.write_bytes(b"precious")
    before = sorted(made.parent.rglob("*"))
    result = cli("convert", made.with_name("model.safetensors"), made.with_name("again"), "--sidecar", "--json", *dry)
    assert (result.code, result.json["error"]["kind"]) == (4, "exists")
    assert result.json["error"]["file"] == str(there)
    assert sorted(made.parent.rglob("*")) == before


def test_force_replaces_both(made: Path) -> None:
    before = sidecar(made).read_bytes()
    chance = random.Random(9)
    path = put_strange(made.with_name("other.safetensors"), whole(shallow("sd2", chance), chance), chance)
    assert cli("convert", path, made, "--sidecar").code == 4
    assert sidecar(made).read_bytes() == before
    assert cli("convert", path, made, "--sidecar", "--force").code == 0
    assert cli("convert", made, made.with_name("back.safetensors"), "--sidecar").code == 0
    assert made.with_name("back.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_that_fails_leaves_no_sidecar_and_takes_none_away(
    made: Path, force: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise NoSpaceError("the disk is full")

    target = made if force else made.with_name("new")
    before = contents(made.parent)
    monkeypatch.setattr("sdsurgery.outputs.save", full)
    result = cli("convert", made.with_name("model.safetensors"), target, "--sidecar", *force)
    assert result.code == 4
    assert contents(made.parent) == before


def test_a_dry_run_with_a_sidecar_writes_nothing(made: Path) -> None:
    before = contents(made.parent)
    for words in (
        (made.with_name("model.safetensors"), made.with_name("new")),
        (made, made.with_name("back.safetensors")),
    ):
        assert cli("convert", *words, "--sidecar", "--dry-run").code == 0
    assert contents(made.parent) == before


def test_a_folder_that_is_named_by_a_dot_has_its_sidecar_beside_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert cli("convert", ".", "../one.safetensors", "--sidecar").code == 0
    monkeypatch.chdir(made / "unet")
    assert cli("convert", "..", "../../two.safetensors", "--sidecar").code == 0
    for name in ("one.safetensors", "two.safetensors"):
        assert made.with_name(name).read_bytes() == made.with_name("model.safetensors").read_bytes()


# ---------------------------------------------------------------- what is in it


def test_a_sidecar_holds_no_more_than_it_must(made: Path) -> None:
    """What converting back gives isn't kept twice."""
    kept = set(raw_file(sidecar(made)))
    original = raw_file(made.with_name("model.safetensors"))
    networks = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    ids = {key for key in original if key.endswith("position_ids")}
    assert kept == {key for key in original if not key.startswith(networks)} | ids
    assert metadata(sidecar(made))["format"] == "pt"


def test_no_path_of_the_machine_is_in_what_is_written(made: Path) -> None:
    cli("convert", made, made.with_name("back.safetensors"))
    for path in (made.parent).rglob("*"):
        assert not path.is_file() or str(made.parent).encode() not in path.read_bytes()


def test_the_hash_of_the_data_alone_is_the_same_too(made: Path) -> None:
    """AutoV3, which people quote, leaves the header out."""
    cli("convert", made, made.with_name("back.safetensors"))
    hashes = []
    for name in ("model", "back"):
        result = cli("inspect", made.with_name(f"{name}.safetensors"), "--json", "--hash")
        hashes.append(result.json["hashes"])
    assert hashes[0] == hashes[1]
    assert hashes[0]


def test_from_python(made: Path) -> None:
    original = sd.open(made.with_name("model.safetensors"))
    folder = Convert("diffusers")(original)
    kept = sidecar_of(original, folder)
    restored = Convert("ldm", sidecar=kept)(folder)
    restored.save(made.with_name("back.safetensors"))
    assert made.with_name("back.safetensors").read_bytes() == made.with_name("model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="restored"):
        Convert("diffusers", sidecar=kept)(folder)
