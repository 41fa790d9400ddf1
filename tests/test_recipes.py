"""run and recipe: what a recipe says is done, the same each time, and what is wrong with it is named by line."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import synthetic
import torch
import yaml
from conftest import FIXTURES, ROOT, cli, metadata, raw, validator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cli import UNREADABLE, unreadable

import sdsurgery as sd
from sdsurgery.merging.plain_engine import PlainEngine
from sdsurgery.recipes import load, run
from sdsurgery.recipes.schema import schema

HASH = "0" * 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models and a VAE."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b", "c")):
        made = {key: torch.from_numpy(value.copy()) for key, value in synthetic.model("sd1", seed=seed).items()}
        save_file(made, folder / f"{name}.safetensors", {"format": "pt"})
    shutil.copy(FIXTURES / "vae.safetensors", folder)
    shutil.copy(FIXTURES / "merged.ckpt", folder)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the same models."""
    for file in models.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def recipe(folder: Path, content: Mapping[str, Any] | str, name: str = "made.yaml") -> Path:
    path = folder / name
    text = content if isinstance(content, str) else yaml.safe_dump(dict(content), sort_keys=False)
    path.write_text(text, "utf-8")
    return path


def simple(steps: Sequence[Any], outputs: Sequence[Any] = ("out.safetensors",), **more: Any) -> dict[str, Any]:
    inputs = {"a": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors", "vae": "vae.safetensors"}
    told = json.dumps([steps, outputs])
    used = {name: path for name, path in inputs.items() if name == "a" or f'"{name}"' in told}
    return {"sdsurgery": 1, "inputs": used, "steps": list(steps), "outputs": list(outputs), **more}


# ---------------------------------------------------------------- what is done


def test_the_main_job(place: Path) -> None:
    """Another VAE and right ids, as a single file, a diffusers folder and an ONNX folder, all checked."""
    content = {
        "sdsurgery": 1,
        "title": "Anything",
        "inputs": {"model": "merged.ckpt", "vae": "vae.safetensors"},
        "steps": [{"merge-vae": "vae"}, "fix-clip"],
        "outputs": ["out.safetensors", {"path": "out", "sidecar": True}, {"path": "out-onnx", "to": "onnx"}],
        "checks": [{"verify": {"fail-on": "error"}}, "same-weights"],
    }
    done = cli("run", recipe(place, content), "--json")
    assert done.code == 0, done.err
    assert [Path(each["path"]).name for each in done.json["outputs"]] == ["out.safetensors", "out", "out-onnx"]
    assert [check["exit_code"] for check in done.json["checks"]] == [0, 0]
    words = ("merge-vae", place / "vae.safetensors", "+", "fix-clip")
    assert cli("pipe", place / "merged.ckpt", "-o", place / "piped.safetensors", *words).code == 0
    assert (place / "out.safetensors").read_bytes() == (place / "piped.safetensors").read_bytes()
    assert cli("convert", place / "out", place / "back.safetensors", "--sidecar").code == 0
    assert (place / "back.safetensors").read_bytes() == (place / "out.safetensors").read_bytes()
    assert (place / "out-onnx" / "unet" / "model.onnx").is_file()


def test_branches_and_the_same_calls_in_python(place: Path) -> None:
    steps: list[Any] = [
        {"merge": {"models": "b", "alpha": 0.25}, "as": "ab"},
        {"merge-vae": "vae", "from": "c", "as": "c2"},
        {"merge": {"models": ["c2", "ab"], "method": "ties", "density": 0.4}, "from": "a"},
        {"cast": "bf16"},
    ]
    assert cli("run", recipe(place, simple(steps))).code == 0
    a, b, c = (sd.open(place / f"{name}.safetensors") for name in "abc")
    ab = a.pipe(sd.Merge((b,), alpha=0.25))
    c2 = c.pipe(sd.MergeVae(place / "vae.safetensors"))
    a.pipe(sd.Merge((c2, ab), method="ties", density=0.4), sd.Cast("bf16")).save(place / "python.safetensors")
    assert (place / "out.safetensors").read_bytes() == (place / "python.safetensors").read_bytes()


BRANCHES: list[list[Any]] = [
    [{"merge": {"models": "c", "alpha": 0.5}, "from": "a", "as": "one"}],
    [{"merge-vae": "vae", "from": "b", "as": "two"}, {"cast": "bf16", "from": "two", "as": "three"}],
    [{"prune": None, "from": "c", "as": "four"}],
]


def test_the_order_of_independent_steps_doesnt_matter(place: Path) -> None:
    last = {"merge": {"models": ["three", "four"], "method": "linear", "weight": [1, 2, 3]}, "from": "one"}
    made = set()
    for number, order in enumerate(itertools.permutations(BRANCHES)):
        steps = [*itertools.chain(*order), last]
        inputs = {name: f"{name}.safetensors" for name in ("a", "b", "c", "vae")}
        content = simple(steps, [f"{number}.safetensors"]) | {"inputs": inputs}
        assert cli("run", recipe(place, content)).code == 0
        made.add((place / f"{number}.safetensors").read_bytes())
    assert len(made) == 1


STEPS: list[Any] = [
    "fix-clip",
    "prune",
    {"cast": "fp16"},
    {"cast": "bf16"},
    {"merge-vae": "vae"},
    {"merge": {"models": "b", "alpha": 0.3}},
    {"merge": {"models": ["b", "c"], "method": "add-difference"}},
    {"merge": {"models": ["c"], "method": "dare", "seed": 3, "at": {"unet": 0.5, "IN04": 0}}},
    {"merge": {"models": "c", "blocks": [0.5] * 25}},
    {"metadata": {"set": {"author": "me", "note": 1, "price": "$$5 $${author} \\ # 'a: b'", "none": "null"}}},
    {"replace": {"component": "unet", "from": "c"}},
]


@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4), hashes=st.booleans())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_twice_the_same_bytes_and_its_record_gives_them_again(place: Path, steps: list[Any], hashes: bool) -> None:
    content = simple(steps) | {"record-hashes": hashes}
    for _ in range(2):
        done = cli("run", recipe(place, content), "--force")
        assert done.code == 0, done.err
        (place / "out.safetensors").replace(place / "first.safetensors")
    assert cli("run", recipe(place, content)).code == 0
    first = (place / "first.safetensors").read_bytes()
    assert (place / "out.safetensors").read_bytes() == first
    if "sdsurgery" not in metadata(place / "out.safetensors"):
        assert cli("recipe", "from", place / "out.safetensors").code == 3
        return
    done = cli("recipe", "from", place / "out.safetensors", "-o", place / "again.yaml", "--force")
    assert done.code == 0, done.err
    done = cli("run", place / "again.yaml", "--force")
    assert done.code == 0, done.err
    assert (place / "out.safetensors").read_bytes() == first


def test_what_is_computed_is_computed_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second output copies from the first one; its tensors are what they were, in the other layout."""
    outputs: list[Any] = ["out.safetensors", "out", "copy.ckpt"]
    path = recipe(place, simple([{"merge": {"models": "b"}}], outputs))
    calls: list[int] = []
    real = PlainEngine.in_step

    def counted(self: PlainEngine, tensors: Any) -> Any:
        calls.append(1)
        return real(self, tensors)

    monkeypatch.setattr(PlainEngine, "in_step", counted)
    assert cli("run", path).code == 0
    once = len(calls)
    calls.clear()
    assert cli("run", recipe(place, simple([{"merge": {"models": "b"}}])), "--force").code == 0
    assert once == len(calls) > 0
    found = cli("diff", place / "out.safetensors", place / "copy.ckpt", "--json").json
    assert found["identical"]
    assert cli("diff", place / "out.safetensors", place / "out", "--json").json["identical"]


def test_variables(place: Path) -> None:
    text = """
    sdsurgery: 1
    variables: {alpha: 0.5, other: b, name: null, cost: "$$"}
    inputs: {a: a.safetensors, "b": "${other}.safetensors"}
    steps:
      - merge: {models: b, alpha: "${alpha}"}
      - metadata: {set: {cost: "${cost}5", dollars: "$${alpha}"}}
    outputs: ["${name}.safetensors"]
    """
    path = recipe(place, text)
    done = cli("run", path)
    assert (done.code, "--set name=VALUE" in done.err) == (2, True)
    for alpha in ("0.25", "1e-1"):
        words = ("--set", f"alpha={alpha}", "--set", "other=c", "--set", "name=007")
        assert cli("run", path, *words, "--force").code == 0
        told = ("-o", place / "told.safetensors", "--alpha", alpha, "--force")
        assert cli("merge", place / "a.safetensors", place / "c.safetensors", *told).code == 0
        assert raw(place / "007.safetensors") == raw(place / "told.safetensors")
    assert metadata(place / "007.safetensors")["cost"] == "$$5"
    assert metadata(place / "007.safetensors")["dollars"] == "${alpha}"
    assert cli("run", path, "--set", "alpha=much", "--set", "name=x").code == 2
    assert "did you mean 'alpha'" in cli("run", path, "--set", "alhpa=1").err
    assert cli("run", path, "--set", "alpha").code == 2


def test_names_are_relative_to_the_recipe_or_to_a_folder(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = recipe(elsewhere, simple(["prune"]))
    assert cli("run", path).code == 3
    assert cli("run", path, "--folder", place).code == 0
    assert (place / "out.safetensors").is_file()


def test_a_dry_run_writes_nothing_and_refuses_what_a_real_one_would(place: Path) -> None:
    path = recipe(place, simple([{"merge-vae": "vae"}, "fix-clip"], ["out.safetensors", "out"], checks=["verify"]))
    before = sorted(place.iterdir())
    done = cli("run", path, "--dry-run")
    assert done.code == 0
    for words in ("input   a: a.safetensors, sd1", "step    merge-vae (from a)", "would write", "verify of out.safet"):
        assert words in done.out
    assert sorted(place.iterdir()) == before
    assert cli("run", path, "--dry-run", "--json").json["outputs"][0]["output"] is None
    (place / "out").write_text("mine")
    done = cli("run", path, "--dry-run")
    assert (done.code, "made.yaml, line" in done.err) == (4, True)


def test_no_input_is_written_over(place: Path) -> None:
    """Neither one of another output's, nor a config, nor the recipe, whatever is forced."""
    shutil.copy(place / "a.safetensors", place / "mine.safetensors")
    assert cli("convert", place / "a.safetensors", place / "folder").code == 0
    (place / "cfg.json").write_text("{}")
    before = (place / "mine.safetensors").read_bytes()
    inputs = {"a": "mine.safetensors", "b": "b.safetensors", "f": "folder"}
    steps = [
        {"prune": None, "as": "one"},
        {"prune": None, "from": "b", "as": "two"},
        {"prune": None, "from": "f", "as": "three"},
    ]
    rest = [
        {"path": "x.safetensors", "from": "one"},
        {"path": "y.safetensors", "from": "two"},
        {"path": "z", "from": "three"},
    ]
    for path, source in (("mine.safetensors", "two"), ("folder", "three"), ("folder/unet/x.safetensors", "one")):
        content = {"sdsurgery": 1, "inputs": inputs, "steps": steps, "outputs": [*rest, {"path": path, "from": source}]}
        done = cli("run", recipe(place, content), "--force")
        assert (done.code, "inputs" in done.err) == (4, True), done.err
        assert not (place / "x.safetensors").exists()
    assert (place / "mine.safetensors").read_bytes() == before


def test_outputs_that_are_one_or_lie_in_each_other(place: Path) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    for pair in (
        ["real/t.safetensors", "link/t.safetensors"],
        ["t.safetensors", "sub/../t.safetensors"],
        ["f/x.ckpt", "f"],
    ):
        assert cli("run", recipe(place, simple(["prune"], pair))).code == 2


def test_what_a_folder_holds_besides_changes_nothing(place: Path) -> None:
    assert cli("convert", place / "a.safetensors", place / "folder").code == 0
    path = recipe(place, simple([{"cast": "fp32"}]) | {"inputs": {"a": "folder"}})
    assert cli("run", path, "--lock").code == 0
    (place / "folder" / "unet" / "extra.bin").write_text("x")
    assert cli("run", path, "--locked", "--force").code == 0


def test_a_config_is_locked(place: Path) -> None:
    (place / "cfg.yaml").write_text("model: {params: {parameterization: eps}}")
    path = recipe(place, simple(["prune"], [{"path": "out", "config": "cfg.yaml"}]))
    done = cli("run", path, "--lock")
    assert done.code == 0, done.err
    (place / "cfg.yaml").write_text("model: {params: {parameterization: v}}")
    made = (place / "out" / "scheduler" / "scheduler_config.json").read_bytes()
    done = cli("run", path, "--locked", "--force")
    assert (done.code, "config 1: cfg.yaml" in done.err) == (3, True)
    assert (place / "out" / "scheduler" / "scheduler_config.json").read_bytes() == made


def test_a_config_beside_an_input_is_locked(place: Path) -> None:
    path = recipe(place, simple(["prune"], ["out"]))
    assert cli("run", path, "--lock").code == 0
    (place / "a.yaml").write_text("model: {params: {parameterization: v}}")
    done = cli("run", path, "--locked", "--force")
    assert (done.code, "config of a" in done.err) == (3, True)


@pytest.mark.parametrize("text", ["n=[", "n=*x", "n=@x", "n={a", "n=\t-", "n=yes", "n=1.50", "n=1e3", "n=007"])
def test_a_setting_stands_in_a_text_as_it_was_written(place: Path, text: str) -> None:
    path = recipe(place, simple(["prune"], ["${n}.safetensors"]) | {"variables": {"n": None}})
    assert cli("run", path, "--set", text).code == 0
    assert (place / f"{text[2:]}.safetensors").is_file()


@pytest.mark.parametrize("name", ["1e5", "a: b", "${x}", "yes", "#1", "0x1f"])
def test_names_that_yaml_takes_for_something_else(place: Path, name: str) -> None:
    shutil.copy(place / "b.safetensors", place / f"{name}.safetensors")
    words = (place / "a.safetensors", place / f"{name}.safetensors", "-o", place / "out.safetensors")
    assert cli("merge", *words).code == 0
    made = (place / "out.safetensors").read_bytes()
    assert cli("recipe", "from", place / "out.safetensors", "-o", place / "again.yaml").code == 0
    assert cli("run", place / "again.yaml", "--force").code == 0
    assert (place / "out.safetensors").read_bytes() == made


def test_two_files_of_one_name_are_doubted(place: Path) -> None:
    (place / "d").mkdir()
    shutil.copy(place / "b.safetensors", place / "d" / "a.safetensors")
    assert cli("merge", place / "a.safetensors", place / "d" / "a.safetensors", "-o", place / "m.safetensors").code == 0
    assert cli("recipe", "from", place / "m.safetensors").out.startswith("# 'a.safetensors' is told of several times")
    words = ("-o", place / "m.safetensors", "--hash", "--force")
    assert cli("merge", place / "a.safetensors", place / "d" / "a.safetensors", *words).code == 0
    assert len(yaml.safe_load(cli("recipe", "from", place / "m.safetensors").out)["inputs"]) == 2


def test_what_was_changed_in_place_gets_another_name(place: Path) -> None:
    shutil.copy(place / "a.safetensors", place / "own.safetensors")
    assert cli("cast", place / "own.safetensors", "bf16", "--in-place").code == 0
    found = yaml.safe_load(cli("recipe", "from", place / "own.safetensors").out)
    assert (found["inputs"], found["outputs"]) == ({"own": "own.safetensors"}, ["own.again.safetensors"])


# ---------------------------------------------------------------- checks


def test_a_failing_check_is_exit_code_1(place: Path) -> None:
    content = simple(["prune"], checks=[{"verify": {"profile": "a1111", "dtype": "bf16"}}])
    done = cli("run", recipe(place, content), "--json")
    assert (done.code, done.json["checks"][0]["exit_code"]) == (1, 1)
    assert "dtype" in done.err
    rules = {finding["id"] for model in done.json["checks"][0]["verify"]["models"] for finding in model["findings"]}
    validator("verify").validate(done.json["checks"][0]["verify"])
    content["checks"] = [{"verify": {"profile": "a1111", "dtype": "bf16", "allow": sorted(rules)}}]
    assert cli("run", recipe(place, content), "--force").code == 0


def test_outputs_of_different_weights_are_told(place: Path) -> None:
    outputs = ["out.safetensors", {"path": "other", "from": "b"}, {"path": "third", "from": "b"}]
    content = simple(["prune"], outputs, checks=["same-weights", {"same-weights": None, "of": ["other", "third"]}])
    done = cli("run", recipe(place, content), "--json")
    assert (done.code, [check["exit_code"] for check in done.json["checks"]]) == (1, [1, 0])
    assert "other differs from" in done.err


def test_a_report_doesnt_replace_what_is_none(place: Path) -> None:
    """Refused before anything is written."""
    content = simple(["prune"], checks=[{"parity": {"report": "report"}}])
    (place / "report").mkdir()
    (place / "report" / "diary.txt").write_text("mine")
    for words in ((), ("--force",), ("--dry-run",)):
        done = cli("run", recipe(place, content), *words)
        assert (done.code, "parity" in done.err) == (4, True)
    assert not (place / "out.safetensors").exists()


# ---------------------------------------------------------------- locks


def test_a_locked_run_fails_by_a_bit(place: Path) -> None:
    content = simple(
        [{"merge": {"models": "b", "alpha": 0.5}}], ["out.safetensors", "out", {"path": "o", "to": "onnx"}]
    )
    path = recipe(place, content)
    assert cli("run", path, "--locked").code == 3  # there is none yet
    done = cli("run", path, "--lock", "--json")
    assert (done.code, done.json["lock"]) == (0, str(place / "made.lock.json"))
    assert set(done.json["outputs"][0]["sha256"]) == {"."}
    assert cli("run", path, "--locked", "--force").code == 0
    content["steps"][0]["merge"]["alpha"] = 0.5000001
    done = cli("run", recipe(place, content), "--locked", "--force", "--json")
    assert (done.code, any("out.safetensors has SHA-256" in line for line in done.json["differences"])) == (1, True)
    assert "torch" in done.err
    content["outputs"].pop()
    assert "o is only in the lock" in cli("run", recipe(place, content), "--locked", "--force").err


def test_a_lock_holds_the_inputs_and_not_their_names(place: Path) -> None:
    content = simple([{"merge": {"models": "b"}}]) | {"variables": {"file": "b"}}
    content["inputs"]["b"] = "${file}.safetensors"
    path = recipe(place, content)
    assert cli("run", path, "--lock").code == 0
    made = (place / "out.safetensors").read_bytes()
    shutil.copy(place / "b.safetensors", place / "renamed.safetensors")
    assert cli("run", path, "--locked", "--force", "--set", "file=renamed").code == 0
    assert (place / "out.safetensors").read_bytes() == made
    (place / "out.safetensors").unlink()
    done = cli("run", path, "--locked", "--set", "file=c", "--json")
    assert (done.code, done.json["error"]["kind"]) == (3, "mismatch")
    assert "b has SHA-256" in done.json["error"]["details"][0]
    assert not (place / "out.safetensors").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 1}', '{"inputs": {"a": 3}}', "\x00" * 9])
def test_a_broken_lock_is_named(place: Path, text: str) -> None:
    path = recipe(place, simple(["prune"]))
    (place / "made.lock.json").write_text(text)
    done = cli("run", path, "--locked", "--json")
    assert (done.code, done.json["error"]["file"]) == (3, str(place / "made.lock.json"))


def test_a_lock_of_another_version_is_refused(place: Path) -> None:
    path = recipe(place, simple(["prune"]))
    assert cli("run", path, "--lock").code == 0
    lock = json.loads((place / "made.lock.json").read_text())
    (place / "made.lock.json").write_text(json.dumps(lock | {"schema_version": 2}))
    done = cli("run", path, "--locked", "--force")
    assert (done.code, "its version is 2" in done.err) == (3, True)


def test_nothing_is_locked_that_fails_a_check(place: Path) -> None:
    path = recipe(place, simple(["prune"], checks=[{"verify": {"dtype": "bf16"}}]))
    assert cli("run", path, "--lock").code == 1
    assert not (place / "made.lock.json").exists()


def test_expected_hashes_are_verified_and_recorded(place: Path) -> None:
    found = cli("inspect", place / "a.safetensors", "--hash", "--json").json["hashes"]["sha256"]
    content = simple(["fix-clip", {"cast": "bf16"}]) | {"inputs": {"a": {"path": "a.safetensors", "sha256": found}}}
    assert cli("run", recipe(place, content)).code == 0
    record = json.loads(metadata(place / "out.safetensors")["sdsurgery"])
    assert record["steps"][0]["source"] == {"name": "a.safetensors", "sha256": found}
    model = sd.open(place / "a.safetensors", sha256=found.upper())
    model.pipe(sd.FixClip(), sd.Cast("bf16")).save(place / "python.safetensors")
    assert (place / "out.safetensors").read_bytes() == (place / "python.safetensors").read_bytes()
    content["inputs"]["a"]["sha256"] = HASH
    done = cli("run", recipe(place, content), "--force")
    assert (done.code, HASH in done.err, "made.yaml, line 3: a" in done.err) == (3, True, True)


def test_the_hashes_of_a_folder_are_those_of_its_files(place: Path) -> None:
    assert cli("convert", place / "a.safetensors", place / "folder").code == 0
    assert cli("run", recipe(place, simple(["prune"]) | {"inputs": {"a": "folder"}}), "--lock", "--force").code in {
        0,
        2,
    }
    name = "unet/diffusion_pytorch_model.safetensors"
    content = simple(["prune"], ["new"]) | {"inputs": {"a": {"path": "folder", "sha256": {name: HASH}}}}
    done = cli("run", recipe(place, content))
    assert (done.code, name in done.err) == (3, True)
    found = cli("inspect", place / "folder" / name, "--hash", "--json").json["hashes"]["sha256"]
    content["inputs"]["a"]["sha256"] = {name: found}
    assert cli("run", recipe(place, content)).code == 0
    content["inputs"]["a"]["sha256"] = {"unet/nothing.safetensors": found}
    assert cli("run", recipe(place, content), "--force").code == 3
    content["inputs"]["a"]["sha256"] = found
    assert cli("run", recipe(place, content), "--force").code == 2


# ---------------------------------------------------------------- what is wrong with a recipe

HEAD = "sdsurgery: 1\ninputs:\n  a: a.safetensors\n"  # three lines
OUT = "outputs: [out.safetensors]\n"

FAULTS = [
    ("a: [", 1, "no YAML"),
    ("a: 1\na: 2", 2, "for the second time"),
    ("? [1]\n: 2", 1, "a key must be a text"),
    ("a: !!python/object:os.system x", 1, "no kind of value"),
    ("a: &x [*x]", 1, "too deep"),
    ("a: !!int abc", 1, "none of what its tag says"),
    ("variables: {a: '${b}', b: x}\n" + HEAD + OUT, 1, "can't refer to others"),
    (HEAD + OUT + "steps:\n - cast: []", 6, "an empty list"),
    (HEAD + OUT + "steps:\n - merge: {models: a, alpha: 1" + "0" * 400 + "}", 6, "too large"),
    (HEAD + OUT + 'checks: [{parity: {report: "a\\0b"}}]', 5, "no file can be called"),
    (HEAD, 1, "'outputs' is missing"),
    (HEAD + OUT + "step: []", 5, "did you mean 'steps'"),
    (HEAD.replace("1", "2") + OUT, 1, "2 stands where 1 should"),
    ("sdsurgery: 1\ninputs: {}\n" + OUT, 2, "an empty mapping"),
    (HEAD + "outputs: []", 4, "an empty list"),
    (HEAD + "outputs: ['']", 4, "nothing stands where"),
    (HEAD + "  b: {path: x, sha256: abc}\n" + OUT, 4, "no SHA-256"),
    (HEAD + "  b: {pth: x}\n" + OUT, 4, "did you mean 'path'"),
    (HEAD + "  b: b.safetensors\n" + OUT, 4, "'b' is used by nothing"),
    (HEAD + OUT + "steps:\n - fix-clp", 6, "did you mean 'fix-clip'"),
    (HEAD + OUT + "steps:\n - merge", 6, "merge needs parameters"),
    (HEAD + OUT + "steps:\n - marge: {}", 6, "did you mean 'merge'"),
    (HEAD + OUT + "steps:\n - merge: {models: a,\n     aplha: 1}", 7, "did you mean 'alpha'"),
    (HEAD + OUT + "steps:\n - merge: {alpha: 1}", 6, "'models' is missing"),
    (HEAD + OUT + "steps:\n - merge: {models: a, alpha: lots}", 6, "'lots' stands where a number should"),
    (HEAD + OUT + "steps:\n - merge: {models: [b]}", 6, "nothing before is called 'b'"),
    (HEAD + OUT + "steps:\n - merge: {models: a, weight: 1}", 6, "weighted-sum has no weight"),
    (HEAD + OUT + "steps:\n - cast: fp17", 6, "did you mean 'fp16'"),
    (HEAD + OUT + "steps:\n - cast: 16", 6, "one of fp16, bf16, fp32"),
    (HEAD + OUT + "steps:\n - cast:", 6, "nothing stands where"),
    (HEAD + OUT + "steps:\n - {fix-clip: , prune: }", 6, "several operations"),
    (HEAD + OUT + "steps:\n - {from: a}", 6, "no operation"),
    (HEAD + OUT + "steps:\n - {prune: , from: late}\n - {prune: , as: late}", 6, "nothing before is called 'late'"),
    (HEAD + OUT + "steps:\n - {prune: , as: a}", 6, "name of something else"),
    (HEAD + OUT + "steps:\n - {prune: , from: a, as: b}\n - {prune: , from: a}", 6, "'b' is used by nothing"),
    (
        HEAD + OUT + "steps:\n - {prune: , from: a}\n - {prune: , from: a}",
        6,
        "the result of this step is used by nothing",
    ),
    (HEAD + OUT + "steps:\n - metadata: {set: x}", 6, "no field with a value"),
    (HEAD + OUT + "steps:\n - convert: {to: ldm, opset: 17}", 6, "only ONNX graphs"),
    (HEAD + "outputs:\n - {path: out.ckpt, to: onnx}", 5, "ONNX takes a folder"),
    (HEAD + "outputs:\n - {path: out, opset: 17}", 5, "only ONNX graphs"),
    (HEAD + "outputs:\n - {path: out, shard-size: big}", 5, "'big' is no size"),
    (HEAD + "outputs:\n - {path: out, to: diffuser}", 5, "did you mean 'diffusers'"),
    (HEAD + "outputs:\n - out\n - out", 6, "written twice"),
    (HEAD + "outputs: [made.safetensors]", 4, "the recipe lies beside it"),
    (HEAD + "outputs: [{path: out, from: b}]", 4, "nothing before is called 'b'"),
    (HEAD + "outputs: ['${x}']", 4, "no variable 'x'"),
    ("variables: {y: 1}\n" + HEAD + "outputs: ['${x}']", 5, "there are y"),
    (HEAD + OUT + "checks: [verfy]", 5, "did you mean 'verify'"),
    (HEAD + OUT + "checks: [{verify: {profile: webui}}]", 5, "'webui' isn't known"),
    (HEAD + OUT + "checks: [{verify: , parity: }]", 5, "one entry is one check"),
    (HEAD + OUT + "checks:\n - verify:\n     allow: nothing", 6, "'nothing' is no id of a finding"),
    (HEAD + OUT + "checks:\n - parity: {width: 7}", 6, "a width of 7 pixels"),
    (HEAD + OUT + "checks: [{parity: {steps: many}}]", 5, "a whole number"),
    (HEAD + OUT + "checks: [same-weights]", 5, "only one output"),
    (HEAD + OUT + "checks: [{verify: , of: ot.safetensors}]", 5, "did you mean 'out.safetensors'"),
]


@pytest.mark.parametrize(("text", "line", "message"), FAULTS)
def test_every_fault_has_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    """Before anything is read: there are no models."""
    done = cli("run", recipe(tmp_path, text), "--json")
    assert done.code == 2, done.out
    error = done.json["error"]
    told = [error["message"], *error.get("details", [])]
    assert any(each.startswith(f"line {line}: ") and message in each for each in told), told


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = HEAD + "steps:\n - fix-clp\n - cast: fp17\noutputs: [{path: out, too: onnx}]"
    done = cli("run", recipe(tmp_path, text))
    assert (done.code, done.err.count("\n  line ")) == (2, 3)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", 3),
        (b"- 1", 3),
        (b"some words", 3),
        (b"\xff\xfe\x00", 3),
        (b"a" * (2 << 20), 3),
        (b"[" * 100_000, 2),
        (b"\x00", 2),
        (b"a: " + b"[" * 900 + b"]" * 900, 2),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, content: bytes, code: int) -> None:
    (tmp_path / "made.yaml").write_bytes(content)
    assert cli("run", tmp_path / "made.yaml").code == code
    assert cli("run", tmp_path).code == 3
    assert cli("run", tmp_path / "none.yaml").code == 3


def test_aliases_of_aliases_are_bounded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    done = cli("run", recipe(tmp_path, "\n".join(lines)))
    assert (done.code, "values" in done.err) == (2, True)


def test_an_error_while_running_names_the_line(place: Path) -> None:
    content = simple([{"merge-vae": "vae"}, {"replace": {"component": "text_encoder_2", "from": "b"}}])
    done = cli("run", recipe(place, content))
    assert (done.code, "made.yaml, line" in done.err, "replace" in done.err) == (3, True, True)
    assert not (place / "out.safetensors").exists()


# ---------------------------------------------------------------- the schema


def test_the_published_schema_is_the_one_that_counts() -> None:
    from docs import make_tables

    assert make_tables.RECIPE.read_text("utf-8") == make_tables.recipe_schema(), "run: python docs/make_tables.py"
    for references in (False, True):
        jsonschema.Draft202012Validator.check_schema(schema(references=references))
    assert json.loads(cli("recipe", "schema").out) == schema(references=True)


def test_editors_may_have_references_everywhere() -> None:
    made = simple(
        [{"merge": {"models": ["${x}"], "alpha": "${alpha}", "method": "${m}", "blocks": "${b}"}}, {"cast": "${t}"}],
        [{"path": "${p}", "to": "${l}", "sidecar": "${s}"}],
        checks=[{"parity": {"steps": "${n}"}}],
    )
    published = jsonschema.Draft202012Validator(schema(references=True))
    assert published.is_valid(made)
    assert not published.is_valid(simple([{"merge": {"models": "b", "alpha": "lots"}}]))
    assert not jsonschema.Draft202012Validator(schema(references=False)).is_valid(made)


def test_recipes_that_ship_are_valid() -> None:
    shipped = sorted((ROOT / "recipes").glob("*.yaml"))
    assert [path.name for path in shipped] == ["anything-v3-1.yaml"]
    for path in shipped:
        assert load(path).outputs


def test_the_story_comes_out_as_it_is_locked(tmp_path: Path) -> None:
    """README's first command; its last check, the pictures, has its own tests."""
    import break_miniature

    content = yaml.safe_load((FIXTURES / "story.yaml").read_text("utf-8"))
    assert set(content["checks"].pop()) == {"parity"}
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    shutil.copy(FIXTURES / "story.lock.json", tmp_path)
    shutil.copy(FIXTURES / "miniature.safetensors", tmp_path / "sound.safetensors")
    break_miniature.main(tmp_path / "anything-v3.safetensors")
    done = cli("run", tmp_path / "story.yaml", "--locked")
    assert done.code == 0, done.err + "\nif that was meant to be: sdsurgery run story.yaml --lock"


# ---------------------------------------------------------------- recipe from


def test_a_recipe_of_a1111s_record(place: Path) -> None:
    """What the webui's merger writes; its models, merged themselves, are made anew where that is asked for."""
    hashes = {"a": "a" * 64, "b": "b" * 64, "c": "c" * 64, "ab": "d" * 64}
    inner = webui_recipe("Weighted sum", hashes["a"], hashes["b"], multiplier=0.3)
    outer = webui_recipe("Add difference", hashes["ab"], hashes["b"], hashes["c"], multiplier=0.5) | {
        "bake_in_vae": "vae.safetensors", "save_as_half": True,
    }  # fmt: skip
    known = {
        value: {
            "name": f"folder\\{name}.safetensors", "legacy_hash": "0" * 8,
            "sd_merge_recipe": inner if name == "ab" else None,
        }
        for name, value in hashes.items()
    }  # fmt: skip
    told = {"format": "pt", "sd_merge_recipe": json.dumps(outer), "sd_merge_models": json.dumps(known)}
    save_file(load_file(place / "a.safetensors"), place / "theirs.safetensors", told)
    found = yaml.safe_load(cli("recipe", "from", place / "theirs.safetensors").out)
    assert found["inputs"]["ab"] == {"path": "ab.safetensors", "sha256": hashes["ab"]}
    assert found["steps"] == [
        {"merge": {"models": ["b", "c"], "method": "add-difference", "alpha": 0.5}},
        {"merge-vae": {"vae": "vae"}},
        {"cast": {"dtype": "fp16"}},
    ]
    found = yaml.safe_load(cli("recipe", "from", place / "theirs.safetensors", "--deep").out)
    assert set(found["inputs"]) == {"a", "b", "c", "vae"}
    assert found["steps"][0]["merge"] == {"models": ["b"], "method": "weighted-sum", "alpha": 0.3}
    inputs = {name: entry if isinstance(entry, str) else entry["path"] for name, entry in found["inputs"].items()}
    assert cli("run", recipe(place, found | {"inputs": inputs, "outputs": ["again.safetensors"]})).code == 0


def webui_recipe(method: str, *hashes: str, multiplier: float) -> dict[str, Any]:
    places = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
    return {
        "type": "webui", **dict.fromkeys(places), **dict(zip(places, hashes, strict=False)), "interp_method": method,
        "multiplier": multiplier, "save_as_half": False, "custom_name": "", "config_source": 0, "bake_in_vae": "None",
        "discard_weights": "", "is_inpainting": False, "is_instruct_pix2pix": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "told",
    [
        {}, {"sdsurgery": "{"}, {"sdsurgery": '{"steps": [3, "x"]}'},
        {"sdsurgery": '{"steps": [{"operation": "melt"}]}'},
        {"sdsurgery": '{"steps": [{"operation": "merge-vae", "parameters": {"vae": "v"}}]}'},
        {"sdsurgery": '{"steps": [{"operation": "prune", "source": {"name": "in memory"}}]}'},
        {"sd_merge_recipe": "{"}, {"sd_merge_recipe": "[]"}, {"sd_merge_recipe": '{"type": "webui"}'},
        {"sd_merge_recipe": '{"type": "webui", "interp_method": ["x"], "primary_model_hash": {}}',
         "sd_merge_models": "3"},
        {"sd_merge_recipe": '{"type": "sd-webui-supermerger"}'},
    ],
)  # fmt: skip
def test_a_record_that_tells_no_recipe(place: Path, told: dict[str, str]) -> None:
    save_file(load_file(place / "a.safetensors"), place / "told.safetensors", {"format": "pt", **told})
    done = cli("recipe", "from", place / "told.safetensors")
    assert (done.code, done.out) == (3, "")
    assert cli("inspect", place / "told.safetensors").code == 0


@pytest.mark.parametrize("odd", [{"interp_method": ["x"]}, {"multiplier": 10**400}, {"multiplier": True}])
def test_odd_records_tell_nothing(place: Path, odd: dict[str, Any]) -> None:
    told = webui_recipe("Weighted sum", "a" * 64, "b" * 64, multiplier=0.5) | odd
    known = {each * 64: {"name": f"{each}.safetensors"} for each in "ab"}
    text = {"sd_merge_recipe": json.dumps(told), "sd_merge_models": json.dumps(known)}
    save_file(load_file(place / "a.safetensors"), place / "told.safetensors", {"format": "pt", **text})
    assert cli("recipe", "from", place / "told.safetensors").code == 3


@pytest.mark.parametrize("levels", [40, 1200])
def test_ancestors_are_told_once(place: Path, levels: int) -> None:
    """Both parents of each are one model: without that, the steps would double with every level."""
    known = {
        f"{level:064x}": {
            "name": f"{level}.safetensors",
            "sd_merge_recipe": webui_recipe("Weighted sum", *[f"{level + 1:064x}"] * 2, multiplier=0.5),
        }
        for level in range(levels)
    } | {f"{levels:064x}": {"name": "first.safetensors"}}
    text = {
        "sd_merge_recipe": json.dumps(known[f"{0:064x}"]["sd_merge_recipe"]),
        "sd_merge_models": json.dumps(known),
    }
    save_file(load_file(place / "a.safetensors"), place / "told.safetensors", {"format": "pt", **text})
    done = cli("recipe", "from", place / "told.safetensors", "--deep")
    assert done.code == 0
    assert len(yaml.safe_load(done.out)["steps"]) <= 110


def test_a_model_that_is_its_own_ancestor(place: Path) -> None:
    told = webui_recipe("Weighted sum", "a" * 64, "b" * 64, multiplier=0.5)
    known = {each * 64: {"name": f"{each}.safetensors", "sd_merge_recipe": told} for each in "ab"}
    text = {"sd_merge_recipe": json.dumps(told), "sd_merge_models": json.dumps(known)}
    save_file(load_file(place / "a.safetensors"), place / "told.safetensors", {"format": "pt", **text})
    assert cli("recipe", "from", place / "told.safetensors", "--deep").code == 0


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_model_that_cant_be_read_has_no_recipe(tmp_path: Path, what: str) -> None:
    path = unreadable(what, tmp_path)
    done = cli("recipe", "from", path)
    assert (done.code, done.out, str(path) in done.err) == (3, "", True)


def test_a_recipe_is_not_written_over_a_file(place: Path) -> None:
    assert cli("prune", place / "a.safetensors", "-o", place / "x.safetensors").code == 0
    assert cli("cast", place / "a.safetensors", "bf16", "-o", place / "y.safetensors").code == 0
    assert cli("recipe", "from", place / "y.safetensors", "-o", place / "vae.safetensors").code == 4
    assert cli("recipe", "from", place / "y.safetensors", "-o", place / "no" / "such.yaml").code == 4


def test_from_python(place: Path) -> None:
    done = run(load(recipe(place, simple(["fix-clip"]))))
    assert (done.exit_code, done.outputs[0].nbytes) == (0, (place / "out.safetensors").stat().st_size)
