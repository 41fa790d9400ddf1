"""pipe: the same as its operations one by one, without files in between."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, cli, metadata, raw, raw_of, raw_pickle, shell
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import SD1_IDS

import sdsurgery as sd

VAE = str(FIXTURES / "vae.vae.pt")
OK = str(FIXTURES / "sd1-ids-ok.safetensors")
MERGED = FIXTURES / "merged.ckpt"

STEPS = [
    ["fix-clip"],
    ["fix-clip", "--target", "diffusers"],
    ["fix-clip", "--reference", OK],
    ["merge-vae", VAE],
    ["merge-vae", VAE, "--dtype", "fp32"],
    ["merge-vae", str(FIXTURES / "vae-partial.safetensors")],
    ["replace", "--component", "unet", "--from", OK, "--dtype", "bf16"],
    ["replace", "--component", "text_encoder", "--from", str(FIXTURES / "sdxl-ids-fractional.safetensors")],
    ["prune"],
    ["prune", "--ema", "--keep", "schedule"],
    ["cast", "fp16"],
    ["cast", "bf16", "--component", "vae", "--on-overflow", "clip"],
    ["extract", "--component", "vae"],
    ["extract", "--component", "unet", "--component", "text_encoder", "--keep-prefix"],
]


def joined(steps: list[list[str]]) -> list[str]:
    return [word for number, step in enumerate(steps) for word in ([] if number == 0 else ["+"]) + step]


def one_by_one(model: Path, steps: list[list[str]], folder: Path) -> tuple[int, Path]:
    """Each step as a command of its own, from file to file."""
    for number, (name, *words) in enumerate(steps):
        output = folder / f"{number}.safetensors"
        code = cli(name, model, *words, "-o", output).code
        if code:
            return code, output
        model = output
    return 0, model


def without_source(found: dict[str, str]) -> Any:
    """Metadata without the name of the file that the record begins with: a copy in between has another one."""
    record = json.loads(found.get("sdsurgery", '{"steps": [{}]}'))
    record["steps"][0].pop("source", None)
    return found | {"sdsurgery": record}


MODELS = ["merged.ckpt", "sd1-full-ema.ckpt", "sd1-flat-text-encoder.safetensors", "sd1-ids-missing.safetensors"]


@given(st.sampled_from(MODELS), st.lists(st.sampled_from(STEPS), min_size=1, max_size=4))
@settings(max_examples=25)
def test_pipe_equals_its_operations_one_by_one(name: str, steps: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "piped.safetensors"
        piped = cli("pipe", FIXTURES / name, "-o", output, *joined(steps)).code
        code, last = one_by_one(FIXTURES / name, steps, Path(folder))
        assert piped == code
        assert output.exists() == (code == 0)
        if code == 0:
            assert raw(output) == raw(last)
            if name != "sd1-full-ema.ckpt":  # whose epoch and callbacks the first file in between can't hold
                assert without_source(metadata(output)) == without_source(metadata(last))


def test_the_main_job(tmp_path: Path) -> None:
    """Anything V3.1: another VAE, mended ids, safetensors, half the size."""
    output = tmp_path / "anything-v3-1.safetensors"
    result = cli("pipe", MERGED, "-o", output, "--json", "merge-vae", VAE, "+", "fix-clip", "+", "cast", "fp16")
    assert (result.code, result.json["output"]) == (0, str(output))
    before, vae, ids = raw_pickle(MERGED), raw(FIXTURES / "vae.safetensors"), raw(OK)[SD1_IDS]
    expected = before | {f"first_stage_model.{key}": value for key, value in vae.items()} | {SD1_IDS: ids}
    assert raw(output) == expected
    steps = json.loads(metadata(output)["sdsurgery"])["steps"]
    assert [step["operation"] for step in steps] == ["merge-vae", "fix-clip"]  # the cast found nothing to do
    assert [change["kind"] for change in result.json["changes"]] == ["replaced"] * 249
    assert any("fp16 already" in note["message"] for note in result.json["notes"])


def test_the_order_is_that_of_the_words(tmp_path: Path) -> None:
    """A VAE that comes after the cast keeps its type; one that comes before is cast."""
    after, before = tmp_path / "after.safetensors", tmp_path / "before.safetensors"
    assert cli("pipe", MERGED, "-o", after, "cast", "bf16", "+", "merge-vae", VAE).code == 0
    assert cli("pipe", MERGED, "-o", before, "merge-vae", VAE, "+", "cast", "bf16").code == 0
    key = "first_stage_model.decoder.conv_in.bias"
    assert (raw(after)[key][0], raw(before)[key][0]) == ("F16", "BF16")


def test_the_same_operation_twice(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert cli("pipe", MERGED, "-o", output, "cast", "fp32", "+", "cast", "bf16").code == 0
    steps = json.loads(metadata(output)["sdsurgery"])["steps"]
    assert [step["parameters"] for step in steps] == [{"dtype": "fp32"}, {"dtype": "bf16"}]
    assert {dtype for dtype, _, _ in raw(output).values()} == {"BF16", "F32"}  # the ids stay


def test_from_python_it_is_the_same(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert cli("pipe", MERGED, "-o", output, "merge-vae", VAE, "+", "fix-clip", "+", "cast", "bf16").code == 0
    result = sd.open(MERGED).pipe(sd.MergeVae(VAE), sd.FixClip(), sd.Cast("bf16"))
    assert raw_of(result) == raw(output)
    result.save(tmp_path / "python.safetensors")
    assert (tmp_path / "python.safetensors").read_bytes() == output.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["+"],
        ["fix-clip", "+"],
        ["+", "fix-clip"],
        ["fix-clip", "+", "+", "prune"],
        ["fix-clip", "prune"],
        ["fix-clip", ",", "prune"],
        ["mend"],
        ["fix-clip", "+", "mend"],
        ["fix-clip", "+", "inspect"],
        ["merge-vae"],
        ["cast"],
        ["cast", "fp8"],
        ["cast", "fp16", "bf16"],
        ["extract"],
        ["fix-clip", "--check"],
        ["fix-clip", "--no-such-option"],
        ["replace", "--component", "vae"],
    ],
)
def test_wrong_words_are_wrong_usage(words: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = cli("pipe", MERGED, "-o", output, "--json", *words)
    assert (result.code, result.json["error"]["kind"], result.err) == (2, "usage", "")
    assert not output.exists()


def test_a_bad_name_is_answered_with_the_good_ones() -> None:
    result = cli("pipe", MERGED, "-o", "x.safetensors", "fix-clip", "+", "mend")
    assert "'mend' is no operation" in result.err
    for name in ("fix-clip", "merge-vae", "extract", "replace", "prune", "cast"):
        assert name in result.err


def test_it_needs_a_place_to_write_to() -> None:
    result = cli("pipe", MERGED, "fix-clip")
    assert result.code == 2
    assert "-o OUT or --in-place" in result.err
    assert cli("pipe", MERGED, "--dry-run", "fix-clip").code == 0
    assert cli("pipe", MERGED, "-o", "x.safetensors", "--in-place", "fix-clip").code == 2


def test_a_failure_on_the_way_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    words = ["pipe", MERGED, "-o", output, "--json", "fix-clip", "+"]
    result = cli(*words, "merge-vae", FIXTURES / "vae-partial.safetensors", "+", "prune")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert cli(*words, "merge-vae", FIXTURES / "nothing").code == 3
    assert list(tmp_path.iterdir()) == []


def test_output_always_writes_and_in_place_only_what_changed(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert cli("pipe", OK, "-o", output, "fix-clip", "+", "prune").code == 0
    assert output.read_bytes() == Path(OK).read_bytes()
    before = output.stat()
    result = cli("pipe", output, "--in-place", "--json", "fix-clip")
    assert (result.code, result.json["changed"], result.json["output"]) == (0, False, None)
    after = output.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_in_place(tmp_path: Path) -> None:
    model = Path(shutil.copy(FIXTURES / "sd1-ids-fractional.safetensors", tmp_path / "model.safetensors"))
    assert cli("pipe", model, "--in-place", "merge-vae", VAE, "+", "fix-clip").code == 0
    assert raw(model)[SD1_IDS] == raw(OK)[SD1_IDS]
    assert list(tmp_path.iterdir()) == [model]


def test_force_reaches_the_operations(tmp_path: Path) -> None:
    words = ["-o", tmp_path / "out.safetensors", "merge-vae", FIXTURES / "vae-sdxl.safetensors"]
    assert cli("pipe", OK, *words).code == 3
    assert cli("pipe", OK, "--force", *words).code == 0


def test_dry_run_and_quiet(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    words = ["merge-vae", VAE, "+", "fix-clip"]
    dry = cli("pipe", MERGED, "--dry-run", "--json", *words).json
    assert list(tmp_path.iterdir()) == []
    wet = cli("pipe", MERGED, "-o", output, "--json", *words).json
    assert (dry["changes"], dry["notes"]) == (wet["changes"], wet["notes"])
    quiet = cli("pipe", MERGED, "-o", output, "--force", "-q", *words)
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_from_the_shell(tmp_path: Path) -> None:
    shutil.copy(MERGED, tmp_path / "model.ckpt")
    shutil.copy(VAE, tmp_path / "vae.pt")
    result = shell("pipe", "model.ckpt", "-o", "out.safetensors", "merge-vae", "vae.pt", "+", "fix-clip", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out.index("merge-vae") < result.out.index("fix-clip") < result.out.index("wrote out.safetensors")
    assert raw(tmp_path / "out.safetensors")[SD1_IDS] == raw(OK)[SD1_IDS]


def test_help_of_an_operation_inside() -> None:
    result = cli("pipe", MERGED, "-o", "x.safetensors", "cast", "--help")
    assert result.code == 0
    assert "--on-overflow" in result.out


def test_an_operation_takes_a_number(tmp_path: Path) -> None:
    import onnx

    words = ["convert", "onnx", "--opset", "18", "--weights", "external", "+", "fix-clip"]
    assert cli("pipe", FIXTURES / "sd1-ids-ok.safetensors", "-o", tmp_path / "out", *words).code == 0
    graph = onnx.load(tmp_path / "out" / "unet" / "model.onnx", load_external_data=False)
    assert [entry.version for entry in graph.opset_import] == [18]
    refused = cli("pipe", FIXTURES / "sd1-ids-ok.safetensors", "-o", tmp_path / "no", "convert", "onnx", "--opset", "x")
    assert refused.code == 2
