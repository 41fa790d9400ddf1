"""fix-clip: what it mends, what it leaves alone, and what it says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from conftest import FIXTURES, Raw, cli, metadata, raw, raw_array, raw_of, raw_pickle, shell, write
from synthetic import IDS, SD1_IDS, SDXL_IDS, merged_ids
from transformers import CLIPTextConfig, CLIPTextModel

import sdsurgery as sd

RIGHT = np.arange(77, dtype=np.int64)[None]
RIGHT_IDS = raw_array(RIGHT, "I64")
FLAT_IDS = SD1_IDS.replace("text_model.", "")


def original(name: str) -> dict[str, Raw]:
    """A fixture's tensors as the library of its container sees them."""
    path = FIXTURES / name
    return raw(path) if path.suffix == ".safetensors" else raw_pickle(path)


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copy(FIXTURES / name, folder))


def as_it_should_be(name: str) -> dict[str, Raw]:
    """What fix-clip should make of a fixture, said without it."""
    tensors = original(name)
    if name == "sd1-flat-text-encoder.safetensors":
        flat, right = "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."
        return {key.replace(flat, right): value for key, value in tensors.items()}
    if name == "sd1-wrapped.safetensors":
        return {key.removeprefix("module."): value for key, value in tensors.items()}
    if name in {"sd2-stray-ids.safetensors", "clip-ids-unexpected.safetensors"}:
        return {key: value for key, value in tensors.items() if not key.endswith("position_ids")}
    ids = SDXL_IDS if name.startswith("sdxl") else SD1_IDS
    return tensors | ({} if name.startswith("vae") else {ids: RIGHT_IDS})


MENDED = {
    "sd1-ids-missing.safetensors": ("missing", {"added": 1}),
    "sd1-ids-wrong-dtype.safetensors": ("wrong-dtype", {"replaced": 1}),
    "sd1-ids-fractional.safetensors": ("fractional", {"replaced": 1}),
    "sd1-ids-fractional-fp16.safetensors": ("fractional", {"replaced": 1}),
    "sd1-ids-wrong-values.safetensors": ("wrong-values", {"replaced": 1}),
    "sd1-ids-wrong-shape.safetensors": ("wrong-shape", {"replaced": 1}),
    "sdxl-ids-fractional.safetensors": ("fractional", {"replaced": 1}),
    "clip-ids-unexpected.safetensors": ("unexpected", {"dropped": 1}),
    "sd1-flat-text-encoder.safetensors": ("ok", {"renamed": 197}),
    "sd1-wrapped.safetensors": ("ok", {"renamed": 1131}),
    "sd2-stray-ids.safetensors": ("not-applicable", {"dropped": 1}),
    "merged.ckpt": ("fractional", {"replaced": 1}),
}
SOUND = {
    "miniature.safetensors": "ok",
    "sd1-ids-ok.safetensors": "ok",
    "sd1-full-ema.ckpt": "ok",
    "sd1-legacy.ckpt": "ok",
    "vae.safetensors": "not-applicable",
    "vae.vae.pt": "not-applicable",
}


def kinds(document: Any) -> dict[str, int]:
    counted: dict[str, int] = {}
    for change in document["changes"]:
        counted[change["kind"]] = counted.get(change["kind"], 0) + 1
    return counted


# ---------------------------------------------------------------- the fixtures


@pytest.mark.parametrize("name", MENDED)
def test_mends_every_fixture_and_touches_nothing_else(name: str, tmp_path: Path) -> None:
    model = copied(name, tmp_path)
    before = model.read_bytes()
    result = cli("fix-clip", model, "--json")
    output = model.with_name(model.stem + ".fixed.safetensors")
    assert result.code == 0
    assert result.json["output"] == str(output)
    assert kinds(result.json) == MENDED[name][1]
    assert raw(output) == as_it_should_be(name)
    assert model.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([model.name, output.name])


@pytest.mark.parametrize("name", SOUND)
def test_writes_nothing_where_nothing_is_wrong(name: str, tmp_path: Path) -> None:
    model = copied(name, tmp_path)
    before = model.read_bytes()
    result = cli("fix-clip", model, "--json")
    assert result.code == 0
    assert (result.json["output"], result.json["changed"], result.json["changes"]) == (None, False, [])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert model.read_bytes() == before


@pytest.mark.parametrize("name", [*MENDED, *SOUND])
def test_check_tells_and_writes_nothing(name: str, tmp_path: Path) -> None:
    model = copied(name, tmp_path)
    result = cli("fix-clip", "--check", model, "--json")
    assert result.code == (1 if name in MENDED else 0)
    assert result.json["sound"] is (name not in MENDED)
    assert result.json["position_ids"]["status"] == (MENDED[name][0] if name in MENDED else SOUND[name])
    assert (result.json["output"], result.json["dry_run"]) == (None, True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", [*MENDED, "sd1-ids-ok.safetensors", "sd1-full-ema.ckpt"])
def test_the_second_time_changes_nothing(name: str, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.safetensors"
    assert cli("fix-clip", FIXTURES / name, "-o", fixed).code == 0
    assert cli("fix-clip", "--check", fixed).code == 0
    again = cli("fix-clip", fixed, "--json")
    assert (again.code, again.json["changed"], again.json["output"]) == (0, False, None)
    twice = tmp_path / "twice.safetensors"
    assert cli("fix-clip", fixed, "-o", twice).code == 0
    assert twice.read_bytes() == fixed.read_bytes()


@pytest.mark.parametrize("name", ["merged.ckpt", "sd1-ids-fractional.safetensors"])
def test_output_always_writes(name: str, tmp_path: Path) -> None:
    fixed = tmp_path / "model.safetensors"
    result = cli("fix-clip", FIXTURES / name, "-o", fixed)
    assert (result.code, raw(fixed)) == (0, as_it_should_be(name))


def test_output_always_writes_even_where_nothing_changes(tmp_path: Path) -> None:
    output = tmp_path / "same.safetensors"
    result = cli("fix-clip", FIXTURES / "sd1-ids-ok.safetensors", "-o", output, "--json")
    assert (result.code, result.json["changed"], result.json["output"]) == (0, False, str(output))
    assert output.read_bytes() == (FIXTURES / "sd1-ids-ok.safetensors").read_bytes()


def test_a_pickle_is_written_as_safetensors_and_says_what_is_left_behind(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = cli("fix-clip", FIXTURES / "sd1-full-ema.ckpt", "-o", output, "--json")
    assert raw(output) == original("sd1-full-ema.ckpt")
    dropped = {change["key"] for change in result.json["changes"] if change["kind"] == "dropped"}
    assert dropped == {"epoch", "global_step", "pytorch-lightning_version", "callbacks", "optimizer_states"}
    assert result.json["changed"] is True


def test_a_ckpt_is_written_for_those_who_need_one(tmp_path: Path) -> None:
    output = tmp_path / "out.ckpt"
    assert cli("fix-clip", FIXTURES / "merged.ckpt", "-o", output).code == 0
    loaded = torch.load(output, weights_only=True)["state_dict"]
    assert loaded.keys() == original("merged.ckpt").keys()
    assert torch.equal(loaded[SD1_IDS], torch.arange(77)[None])
    assert raw_pickle(output) == as_it_should_be("merged.ckpt")


# ---------------------------------------------------------------- targets

BROKEN = merged_ids(0.1, "float32")
BEFORE = {"right": RIGHT, "broken": BROKEN, "missing": None}


def models(tmp_path: Path, layout: str, ids: Any) -> tuple[Path, str]:
    """A model of that layout with these ids, and the key where they are."""
    if layout == "diffusers":
        tensors = synthetic.part(synthetic.model("sd1"), "cond_stage_model.transformer.")
    else:
        tensors = synthetic.model(layout)
    key = {"sd1": SD1_IDS, "sdxl": SDXL_IDS, "diffusers": IDS}[layout]
    del tensors[key]
    if ids is not None:
        tensors[key] = ids
    return write(tmp_path / "model.safetensors", tensors), key


@pytest.mark.parametrize("target", ["ldm", "a1111", "comfyui", "diffusers", None])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("layout", ["sd1", "sdxl", "diffusers"])
def test_targets(layout: str, before: str, target: str | None, tmp_path: Path) -> None:
    model, key = models(tmp_path, layout, BEFORE[before])
    old = raw(model)
    wants = target or ("diffusers" if layout == "diffusers" else "ldm")
    present = wants in {"ldm", "a1111"} or (wants == "comfyui" and before != "missing")
    expected = {name: value for name, value in old.items() if name != key} | ({key: RIGHT_IDS} if present else {})
    words = [model, *(["--target", target] if target else [])]

    check = cli("fix-clip", "--check", *words, "--json")
    assert check.code == (0 if expected == old else 1)
    output = tmp_path / "out.safetensors"
    result = cli("fix-clip", *words, "-o", output, "--json")
    assert result.code == 0
    assert raw(output) == expected
    assert result.json["changed"] is (expected != old)
    assert cli("fix-clip", "--check", output, *words[1:]).code == 0


def test_a_target_is_recorded(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    cli("fix-clip", FIXTURES / "sd1-ids-ok.safetensors", "--target", "diffusers", "-o", output)
    (step,) = json.loads(metadata(output)["sdsurgery"])["steps"]
    assert (step["operation"], step["parameters"]) == ("fix-clip", {"target": "diffusers"})
    assert step["changes"] == {"dropped": 1}


# ---------------------------------------------------------------- names


def test_a_text_encoder_saved_by_transformers_5_gets_its_prefix_back(tmp_path: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=8, intermediate_size=32, num_hidden_layers=12, num_attention_heads=1
    )
    encoder = CLIPTextModel(config)
    encoder.save_pretrained(tmp_path / "encoder")
    saved = raw(tmp_path / "encoder" / "model.safetensors")
    assert not any(key.startswith("text_model.") for key in saved)
    output = tmp_path / "out.safetensors"
    result = cli("fix-clip", tmp_path / "encoder" / "model.safetensors", "-o", output)
    assert result.code == 0
    assert raw(output) == {"text_model." + key: value for key, value in saved.items()}
    shutil.copy(output, tmp_path / "encoder" / "model.safetensors")
    again, report = CLIPTextModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state = encoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_flat_and_broken_at_once(tmp_path: Path) -> None:
    tensors = {key.replace("text_model.", ""): value for key, value in synthetic.model("sd1").items()}
    tensors[FLAT_IDS] = BROKEN
    model, output = write(tmp_path / "model.safetensors", tensors), tmp_path / "out.safetensors"
    result = cli("fix-clip", model, "-o", output, "--json")
    assert kinds(result.json) == {"renamed": 197, "replaced": 1}
    assert raw(output) == original("sd1-ids-ok.safetensors")


def test_a_stray_copy_of_the_ids_is_dropped(tmp_path: Path) -> None:
    for number, key in enumerate([FLAT_IDS, "cond_stage_model.transformer.text_model.encoder." + IDS]):
        model = write(tmp_path / f"{number}.safetensors", {**synthetic.model("sd1"), key: 2 * RIGHT})
        output = tmp_path / f"{number}.out.safetensors"
        assert cli("fix-clip", "--check", model).code == 1
        assert cli("fix-clip", model, "-o", output).code == 0
        assert raw(output) == original("sd1-ids-ok.safetensors")


def test_both_copies_of_a_weight_are_kept(tmp_path: Path) -> None:
    """Which one is right nobody can tell: the one at the right place counts, the other is left where it is."""
    key = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    flat = key.replace("text_model.", "")
    tensors = {**synthetic.model("sd1"), flat: np.ones(8, np.float16)}
    model = write(tmp_path / "model.safetensors", tensors)
    result = cli("fix-clip", model, "--json")
    assert (result.code, result.json["changed"]) == (0, False)
    assert any(flat in note["message"] for note in result.json["notes"])


def test_what_stands_between_the_prefix_and_a_name_is_taken_off(tmp_path: Path) -> None:
    tensors = {key.replace("text_model.", ""): value for key, value in synthetic.model("sd1").items()}
    key = "cond_stage_model.transformer.final_layer_norm.bias"
    del tensors[key]
    tensors["cond_stage_model.transformer.other." + key.rpartition("transformer.")[2]] = np.ones(8, np.float16)
    model = write(tmp_path / "model.safetensors", tensors)
    output = tmp_path / "out.safetensors"
    assert cli("fix-clip", model, "-o", output).code == 0
    right = key.replace("transformer.", "transformer.text_model.")
    assert raw(output)[right] == raw_array(np.ones(8, np.float16), "F16")
    assert raw(output).keys() == original("sd1-ids-ok.safetensors").keys()


def test_wrapped_and_broken_at_once(tmp_path: Path) -> None:
    tensors = {"state_dict." + key: value for key, value in synthetic.model("sd1").items()}
    tensors["state_dict." + SD1_IDS] = BROKEN
    output = tmp_path / "out.safetensors"
    result = cli("fix-clip", write(tmp_path / "model.safetensors", tensors), "-o", output, "--json")
    assert kinds(result.json) == {"renamed": 1131, "replaced": 1}
    assert raw(output) == original("sd1-ids-ok.safetensors")


def test_a_wrapper_goes_with_an_open_clip_text_encoder_too(tmp_path: Path) -> None:
    tensors = {"module." + key: value for key, value in synthetic.model("sd2").items()}
    output = tmp_path / "out.safetensors"
    result = cli("fix-clip", write(tmp_path / "model.safetensors", tensors), "-o", output, "--json")
    assert kinds(result.json) == {"renamed": len(tensors)}
    assert set(raw(output)) == set(synthetic.model("sd2"))


@pytest.mark.parametrize("what", ["vae", "unknown"])
def test_a_wrapped_file_without_text_encoder_passes_as_it_is(what: str, tmp_path: Path) -> None:
    tensors = {
        "vae": lambda: synthetic.part(synthetic.model("sd1"), "first_stage_model."),
        "unknown": lambda: {"some.weight": np.ones(3, np.float32)},
    }[what]()
    model = write(tmp_path / "model.safetensors", {"module." + key: value for key, value in tensors.items()})
    result = cli("fix-clip", model, "--json")
    assert (result.code, result.json["changed"]) == (0, False)
    check = cli("fix-clip", "--check", model, "--json")
    assert (check.code, check.json["position_ids"]["status"]) == (0, "not-applicable")


def test_an_unknown_model_is_never_touched(tmp_path: Path) -> None:
    """Not even where it has position ids of its own."""
    tensors = {"bert.embeddings.position_ids": 3 * RIGHT, "bert.pooler.weight": np.ones((2, 2), np.float32)}
    model = write(tmp_path / "model.safetensors", tensors)
    assert cli("fix-clip", "--check", model).code == 0
    output = tmp_path / "out.safetensors"
    cli("fix-clip", model, "-o", output)
    assert raw(output) == raw(model)


def test_what_cant_be_mended_is_a_warning_and_a_no_under_check(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1")
    gone = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.bias"
    bent = "cond_stage_model.transformer.text_model.encoder.layers.4.mlp.fc1.bias"
    del tensors[gone]
    tensors[bent] = np.ones(5, np.float16)
    model = write(tmp_path / "model.safetensors", tensors)
    result = cli("fix-clip", "--check", model, "--json")
    assert (result.code, result.json["sound"], result.json["changed"]) == (1, False, False)
    warned = {note["key"] for note in result.json["notes"] if note["level"] == "warning"}
    assert warned == {gone, bent}
    told = cli("fix-clip", model)
    assert told.code == 0
    assert gone in told.err
    assert "[32]" in told.err


# ---------------------------------------------------------------- reference


@pytest.mark.parametrize(
    "reference", ["sd1-ids-ok.safetensors", "sd1-legacy.ckpt", "sd1-flat-text-encoder.safetensors"]
)
def test_reference_that_agrees(reference: str, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    words = ["fix-clip", FIXTURES / "merged.ckpt", "--reference", FIXTURES / reference]
    result = cli(*words, "-o", output, "--json")
    assert result.code == 0
    assert [note for note in result.json["notes"] if note["level"] == "warning"] == []
    (step,) = json.loads(metadata(output)["sdsurgery"])["steps"]
    assert step["inputs"] == [{"name": reference}]
    assert cli("fix-clip", "--check", output, *words[2:]).code == 0


def test_reference_that_differs(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1")
    prefix = "cond_stage_model.transformer."
    bent = prefix + "text_model.embeddings.position_embedding.weight"
    gone = prefix + "text_model.final_layer_norm.weight"
    tensors[bent] = np.zeros((248, 8), np.float16)
    del tensors[gone]
    reference = write(tmp_path / "long.safetensors", tensors)
    result = cli("fix-clip", "--check", FIXTURES / "sd1-ids-ok.safetensors", "--reference", reference, "--json")
    assert (result.code, result.json["sound"]) == (1, False)
    warned = {note["key"]: note["message"] for note in result.json["notes"] if note["level"] == "warning"}
    assert warned.keys() == {bent, gone}
    assert "[77, 8]" in warned[bent]
    assert "[248, 8]" in warned[bent]
    # The other way round, the model lacks what the reference has.
    result = cli("fix-clip", "--check", reference, "--reference", FIXTURES / "sd1-ids-ok.safetensors", "--json")
    messages = " ".join(note["message"] for note in result.json["notes"] if note["level"] == "warning")
    assert "text_model.final_layer_norm.weight, which is missing here" in messages


def test_reference_says_nothing_of_the_ids(tmp_path: Path) -> None:
    """They are right or wrong by themselves."""
    without, whole = FIXTURES / "sd1-ids-missing.safetensors", FIXTURES / "sd1-ids-ok.safetensors"
    assert cli("fix-clip", "--check", whole, "--reference", without).code == 0
    result = cli("fix-clip", without, "--reference", whole, "-o", tmp_path / "out.safetensors", "--json")
    assert [note for note in result.json["notes"] if note["level"] == "warning"] == []


def test_reference_instead_of_the_built_in_table(tmp_path: Path) -> None:
    """A text encoder that lacks a weight is right beside a reference that lacks it too."""
    tensors = synthetic.model("sd1")
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    model = write(tmp_path / "model.safetensors", tensors)
    assert cli("fix-clip", "--check", model).code == 1
    assert cli("fix-clip", "--check", model, "--reference", model).code == 0


def test_reference_without_clip(tmp_path: Path) -> None:
    words = ["fix-clip", FIXTURES / "merged.ckpt", "-o", tmp_path / "out.safetensors", "--json"]
    result = cli(*words, "--reference", FIXTURES / "vae.safetensors")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert cli(*words, "--reference", tmp_path / "nothing").code == 3
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- options


def test_in_place_rewrites_those_few_bytes_alone(tmp_path: Path) -> None:
    model = copied("sd1-ids-wrong-values.safetensors", tmp_path)
    before, inode = model.read_bytes(), model.stat().st_ino
    assert cli("fix-clip", "--in-place", model).code == 0
    after = model.read_bytes()
    assert (len(after), model.stat().st_ino) == (len(before), inode)
    differing = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert differing[-1] - differing[0] < 8 * 77
    assert raw(model) == as_it_should_be("sd1-ids-wrong-values.safetensors")
    assert metadata(model) == {"format": "pt"}


@pytest.mark.parametrize("name", ["sd1-ids-fractional.safetensors", "sd1-ids-missing.safetensors", "merged.ckpt"])
def test_in_place_otherwise_replaces_the_file(name: str, tmp_path: Path) -> None:
    model = copied(name, tmp_path)
    result = cli("fix-clip", "--in-place", model, "--json")
    assert (result.code, result.json["output"]) == (0, str(model))
    assert (raw(model) if model.suffix == ".safetensors" else raw_pickle(model)) == as_it_should_be(name)
    assert list(tmp_path.iterdir()) == [model]
    assert cli("fix-clip", "--check", model).code == 0


def test_in_place_leaves_the_other_names_of_the_file_alone(tmp_path: Path) -> None:
    model = copied("sd1-ids-wrong-values.safetensors", tmp_path)
    other = tmp_path / "other.safetensors"
    os.link(model, other)
    before = other.read_bytes()
    assert cli("fix-clip", "--in-place", model).code == 0
    assert other.read_bytes() == before
    assert raw(model) == as_it_should_be("sd1-ids-wrong-values.safetensors")


def test_in_place_where_nothing_is_wrong_writes_nothing(tmp_path: Path) -> None:
    model = copied("sd1-ids-ok.safetensors", tmp_path)
    before = model.stat()
    assert cli("fix-clip", "--in-place", model).code == 0
    after = model.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("name", MENDED)
def test_dry_run_says_what_the_run_does(name: str, tmp_path: Path) -> None:
    model = copied(name, tmp_path)
    dry = cli("fix-clip", model, "--dry-run", "--json")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (dry.code, dry.json["output"], dry.json["dry_run"]) == (0, None, True)
    wet = cli("fix-clip", model, "--json")
    assert {key: wet.json[key] for key in ("changed", "changes", "notes")} == {
        key: dry.json[key] for key in ("changed", "changes", "notes")
    }


def test_dry_run_with_in_place_and_output(tmp_path: Path) -> None:
    model = copied("merged.ckpt", tmp_path)
    before = model.read_bytes()
    assert cli("fix-clip", model, "--dry-run", "--in-place").code == 0
    assert cli("fix-clip", model, "--dry-run", "-o", tmp_path / "x.safetensors").code == 0
    assert list(tmp_path.iterdir()) == [model]
    assert model.read_bytes() == before


def test_quiet_prints_nothing_but_warnings(tmp_path: Path) -> None:
    model = copied("merged.ckpt", tmp_path)
    result = cli("fix-clip", model, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert cli("fix-clip", "--check", model, "-q").out == ""
    tensors = synthetic.model("sd1")
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    result = cli("fix-clip", write(tmp_path / "lacking.safetensors", tensors), "--quiet")
    assert result.out == ""
    assert "final_layer_norm.weight" in result.err


def test_an_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    model, output = copied("merged.ckpt", tmp_path), tmp_path / "merged.fixed.safetensors"
    output.write_bytes(b"precious")
    for words in ([model], [model, "-o", output]):
        result = cli("fix-clip", *words, "--json")
        assert (result.code, result.json["error"]["kind"]) == (4, "exists")
        assert output.read_bytes() == b"precious"
    assert cli("fix-clip", model, "--force").code == 0
    assert raw(output) == as_it_should_be("merged.ckpt")


def test_force_never_replaces_the_input(tmp_path: Path) -> None:
    model = copied("sd1-ids-fractional.safetensors", tmp_path)
    before = model.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(model)
    for output in (model, link):
        assert cli("fix-clip", model, "-o", output, "--force").code == 4
        assert model.read_bytes() == before


@pytest.mark.parametrize("words", [["-o", "out.safetensors"], ["--in-place"]])
def test_check_and_writing_contradict_each_other(words: list[str], tmp_path: Path) -> None:
    model = copied("merged.ckpt", tmp_path)
    before = model.read_bytes()
    result = cli("fix-clip", "--check", model, *words, "--json")
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")
    assert model.read_bytes() == before


def test_through_a_symbolic_link(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    target = copied("sd1-ids-wrong-values.safetensors", folder)
    link = tmp_path / "model.safetensors"
    link.symlink_to(target)
    assert cli("fix-clip", link).code == 0
    assert raw(tmp_path / "model.fixed.safetensors") == as_it_should_be("sd1-ids-wrong-values.safetensors")
    assert cli("fix-clip", "--in-place", link).code == 0
    assert link.is_symlink()
    assert raw(target) == as_it_should_be("sd1-ids-wrong-values.safetensors")


def test_text_output_tells_what_was_wrong_and_done(tmp_path: Path) -> None:
    model = copied("merged.ckpt", tmp_path)
    result = cli("fix-clip", model)
    assert "fractional (F32); 22 of 77 wrong once truncated (3, 6, 7, 9, 12, 14, 18, 23, …)" in result.out
    assert f"replaced  {SD1_IDS}  F32[1, 77] fractional -> I64[1, 77]" in result.out
    assert f"wrote {tmp_path / 'merged.fixed.safetensors'}" in result.out
    assert result.err == ""


# ---------------------------------------------------------------- metadata


def test_metadata_survive_and_the_history_grows(tmp_path: Path) -> None:
    kept = {"format": "pt", "modelspec.title": "Anything ☃", "sd_merge_recipe": json.dumps({"type": "webui"}), "": "x"}
    model = write(tmp_path / "model.safetensors", {**synthetic.model("sd1"), SD1_IDS: BROKEN}, kept)
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    assert cli("fix-clip", model, "-o", once).code == 0
    assert cli("prune", once, "-o", twice).code == 0
    assert metadata(twice) == metadata(once)  # nothing to prune, nothing to tell
    assert cli("cast", once, "fp32", "-o", twice, "--force").code == 0
    for path, operations in ((once, ["fix-clip"]), (twice, ["fix-clip", "cast"])):
        found = metadata(path)
        record = json.loads(found.pop("sdsurgery"))
        assert found == kept
        assert [step["operation"] for step in record["steps"]] == operations
        assert str(tmp_path) not in json.dumps(record)
    assert json.loads(metadata(twice)["sdsurgery"])["steps"][1]["parameters"] == {"dtype": "fp32"}


def test_no_path_gets_into_a_file(tmp_path: Path) -> None:
    model, vae = copied("merged.ckpt", tmp_path), copied("vae.vae.pt", tmp_path)
    output = tmp_path / "out.safetensors"
    words = ["pipe", model, "-o", output, "merge-vae", vae, "+", "fix-clip", "--reference", model]
    assert cli(*words).code == 0
    content = output.read_bytes()
    assert str(tmp_path).encode() not in content
    record = json.loads(metadata(output)["sdsurgery"])
    assert [step["inputs"][0]["name"] for step in record["steps"]] == ["vae.vae.pt", "merged.ckpt"]
    assert record["steps"][0]["parameters"] == {"vae": "vae.vae.pt"}


def test_a_recorded_hash_that_became_false_is_dropped_and_said_so(tmp_path: Path) -> None:
    told = {"format": "pt", "modelspec.hash_sha256": "0x" + "1" * 64, "sshs_model_hash": "2" * 64}
    model = write(tmp_path / "model.safetensors", {**synthetic.model("sd1"), SD1_IDS: BROKEN}, told)
    output = tmp_path / "out.safetensors"
    result = cli("fix-clip", model, "-o", output, "--json")
    lost = {change["key"] for change in result.json["changes"] if change["kind"] == "metadata"}
    assert lost == {"modelspec.hash_sha256", "sshs_model_hash"}
    assert metadata(output).keys() == {"format", "sdsurgery"}


@pytest.mark.parametrize(
    "record", ["", "null", "[]", '{"steps": 3}', '{"steps": [1, null, {"family": ["x"], "changes": 5}]}', "[" * 9000]
)
def test_a_record_of_somebody_else_is_no_trouble(record: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model.safetensors", {**synthetic.model("sd1"), SD1_IDS: BROKEN}, {"sdsurgery": record})
    output = tmp_path / "out.safetensors"
    assert cli("fix-clip", model, "-o", output).code == 0
    assert json.loads(metadata(output)["sdsurgery"])["steps"][-1]["operation"] == "fix-clip"
    assert cli("inspect", model).code == 0
    assert cli("merge-vae", model, output, "--dry-run").code == 0
    assert cli("extract", model, "--component", "vae", "-o", tmp_path / "vae.safetensors").code == 0
    assert cli("merge-vae", output, tmp_path / "vae.safetensors", "--dry-run").code == 0


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for number in range(3):
        output = tmp_path / f"{number}.safetensors"
        shell("fix-clip", FIXTURES / "merged.ckpt", "-o", output, PYTHONHASHSEED=str(number))
        digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
    assert len(digests) == 1


# ---------------------------------------------------------------- Python


def test_from_python(tmp_path: Path) -> None:
    model = sd.open(FIXTURES / "merged.ckpt")
    fixed = model.pipe(sd.FixClip())
    assert raw_of(model) == original("merged.ckpt")
    assert [(change.key, change.kind) for change in fixed.changes] == [(SD1_IDS, "replaced")]
    saved = fixed.save(tmp_path / "out.safetensors")
    assert saved.path == tmp_path / "out.safetensors"
    assert raw(saved.path) == as_it_should_be("merged.ckpt")
    assert sd.FixClip()(fixed).changes == fixed.changes


def test_from_python_with_a_checkpoint_in_memory() -> None:
    model = sd.Checkpoint.from_state_dict({**synthetic.model("sd1"), SD1_IDS: torch.from_numpy(BROKEN)})
    fixed = model.pipe(sd.FixClip(reference=model))
    assert fixed[SD1_IDS].numpy().tolist() == RIGHT.tolist()
    assert fixed.steps[0].inputs[0].name == "in memory"


def test_from_python_a_bad_target_is_refused() -> None:
    with pytest.raises(sd.SurgeryError, match="a1112") as caught:
        sd.FixClip(target="a1112")  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["merged.ckpt", "sdxl-ids-fractional.safetensors"])
def test_from_the_shell(name: str, tmp_path: Path) -> None:
    model = copied(name, tmp_path)
    assert shell("fix-clip", "--check", model.name, cwd=tmp_path).code == 1
    result = shell("fix-clip", model.name, cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert raw(tmp_path / f"{model.stem}.fixed.safetensors") == as_it_should_be(name)


def test_every_fixture_of_a_model_is_tried() -> None:
    tried = {*MENDED, *SOUND, "vae-partial.safetensors", "vae-sdxl.safetensors", "washed-out.vae.safetensors"}
    there = {path.name for path in FIXTURES.iterdir() if path.suffix in {".safetensors", ".ckpt", ".pt"}}
    assert there - tried == {"hostile-legacy.ckpt", "hostile-zip.ckpt"}
