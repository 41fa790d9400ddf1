"""The contract of the commands: exit codes, streams, documents, help, and what isn't imported."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import synthetic
from conftest import FIXTURES, ROOT, cli, raw, shell, write

import sdsurgery as sd
from sdsurgery import progress
from sdsurgery.cli import app, bars, run
from sdsurgery.operations import OPERATIONS

OK, MERGED, VAE = FIXTURES / "sd1-ids-ok.safetensors", FIXTURES / "merged.ckpt", FIXTURES / "vae.safetensors"
COMMANDS = (
    "inspect",
    "fix-clip",
    "merge",
    "bake-lora",
    "extract-lora",
    "merge-vae",
    "extract",
    "replace",
    "prune",
    "cast",
    "metadata",
    "convert",
    "convert-embedding",
    "diff",
    "fingerprint",
    "manifest",
    "verify",
    "parity",
    "pipe",
    "run",
    "recipe",
)

# The options of each command in the contract, the issue and the pages of `docs/commands`.
WRITING = {"-o", "--output", "--in-place", "--dry-run", "--json", "--force", "--hash"}
WRITING |= {"--quiet", "-q", "--debug", "--help", "-h"}
OPTIONS = {
    "inspect": {"--tensors", "--hash", "--known", "--json", "--quiet", "-q", "--debug", "--help", "-h"},
    "fix-clip": WRITING | {"--target", "--reference", "--check"},
    "merge-vae": WRITING | {"--dtype"},
    "extract": WRITING | {"--component", "--keep-prefix"},
    "replace": WRITING | {"--component", "--from", "--dtype"},
    "prune": WRITING | {"--ema", "--keep", "--unknown"},
    "cast": WRITING | {"--component", "--on-overflow"},
    "metadata": WRITING | {"--set", "--drop"},
    "convert": (WRITING - {"-o", "--output", "--in-place"})
    | {"--to", "--dtype", "--variant", "--shard-size", "--ema", "--sidecar", "--config", "--prediction-type"}
    | {"--weights", "--layout", "--opset", "--compute", "--no-hard-links", "--optimize", "--relink"},
    "convert-embedding": WRITING | {"--to", "--token", "--dtype"},
    "diff": {"--component", "--explain-with", "--atol", "--stat", "--json", "--html", "--quiet", "-q", "--debug"}
    | {"--help", "-h"},
    "fingerprint": {"--component", "--register", "--json", "--quiet", "-q", "--debug", "--help", "-h"},
    "manifest": {"-o", "--output", "--force", "--quiet", "-q", "--debug", "--help", "-h"}
    | {"--statement", "--sign", "--key", "--signature"},
    "verify": {"--manifest", "--signature", "--key", "--profile", "--dtype", "--fail-on", "--allow", "--allow-list"}
    | {
        "--baseline",
        "--fix",
        "--in-place",
        "--force",
        "--json",
        "--sarif",
        "--junit",
        "--html",
        "--markdown",
        "--rules",
    }
    | {"--quiet", "-q", "--debug", "--help", "-h"},
    "parity": {"--prompt", "--prompts", "--negative", "--seed", "--steps", "--guidance", "--size", "--scheduler"}
    | {"--device", "--dtype", "--reference", "--tolerance", "--locate", "-o", "--output", "--force"}
    | {"--json", "--quiet", "-q", "--debug", "--help", "-h"},
    "merge": WRITING
    | {"--method", "--alpha", "--at", "--blocks", "--weight", "--density", "--seed", "--vae", "--dtype"}
    | {"--compute-dtype", "--device"},
    "bake-lora": WRITING | {"--scale", "--at", "--blocks", "--dtype", "--compute-dtype", "--device"},
    "extract-lora": WRITING
    | {"--rank", "--energy", "--conv-rank", "--component", "--naming", "--dtype", "--compute-dtype", "--device"},
    "pipe": WRITING,
    "run": {"--set", "--folder", "--lock", "--locked", "--dry-run", "--force", "--json"}
    | {"--quiet", "-q", "--debug", "--help", "-h"},
    "recipe": {"--help", "-h"},
}


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_no_other(command: str) -> None:
    for words in ([command, "--help"], [command, "-h"]):
        result = cli(*words)
        assert (result.code, result.err) == (0, "")
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", options_of(result.out))) == OPTIONS[command]


def options_of(text: str) -> str:
    """What stands left of the explanations, in the list of options."""
    listed = text.partition("\nOptions:\n")[2]
    return "\n".join(line[:30] for line in listed.splitlines() if re.match(r"  -", line))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_everything(command: str) -> None:
    """Every option has an explanation, and every choice is named."""
    found = app.sdsurgery.get_command(click.Context(app.sdsurgery), command)
    assert found
    assert found.help
    text = "".join(cli(command, "--help").out.split())  # lines may be broken behind any hyphen
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert "".join(parameter.help.split()) in text
        if isinstance(parameter.type, click.Choice):
            assert all(choice in text for choice in parameter.type.choices)


def test_help_of_all() -> None:
    result = cli("--help")
    assert result.code == 0
    listed = re.findall(r"^  ([a-z-]+)  ", result.out.partition("Commands:\n")[2], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    assert "1 the answer is no" in " ".join(result.out.split())


def test_version() -> None:
    assert cli("--version").out == f"sdsurgery, version {sd.__version__}\n"


def test_every_operation_is_a_command_and_documented() -> None:
    questions = {"inspect", "diff", "fingerprint", "manifest", "verify", "parity", "recipe"}
    assert (
        {*OPERATIONS, *questions, "pipe", "run"}
        == set(COMMANDS)
        == set(app.sdsurgery.list_commands(click.Context(app.sdsurgery)))
    )
    for name in COMMANDS:
        assert (ROOT / "docs" / "commands" / f"{name}.md").exists()


def test_nothing_at_all_is_wrong_usage_with_help() -> None:
    result = cli()
    assert (result.code, result.out) == (2, "")
    assert "Usage: sdsurgery" in result.err


# ---------------------------------------------------------------- exit codes

USAGE: list[list[Any]] = [
    ["mend", OK],
    ["inspect"],
    ["inspect", OK, VAE],
    ["inspect", OK, "--no-such-option"],
    ["inspect", OK, "-o", "x.safetensors"],
    ["fix-clip"],
    ["fix-clip", OK, "--target", "sd3"],
    ["fix-clip", OK, "-o"],
    ["fix-clip", MERGED, "-o", "out.safetensors", "--in-place"],
    ["fix-clip", MERGED, "-o", "out.txt"],
    ["fix-clip", MERGED, "-o", "out"],
    ["merge-vae", OK],
    ["merge-vae", OK, VAE, VAE],
    ["extract", OK],
    ["extract", OK, "--component", "vae", "--in-place"],
    ["replace", OK, "--component", "vae"],
    ["prune", OK, "--keep", "everything"],
    ["cast", OK],
    ["cast", OK, "fp8"],
    ["pipe", OK, "-o", "out.safetensors"],
    ["pipe", OK, "fix-clip"],
]


@pytest.mark.parametrize("words", USAGE, ids=lambda words: " ".join(map(str, words)).replace(str(FIXTURES), ""))
def test_wrong_usage_is_2(words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = cli(*words)
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith(("sdsurgery: ", "Usage: "))
    assert "Traceback" not in told.err
    document = cli(*words[:1], "--json", *words[1:])
    assert (document.code, document.json["error"]["kind"], document.err) == (2, "usage", "")
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_say_where_to_look() -> None:
    assert cli("--json").json["error"]["kind"] == "usage"
    assert "see sdsurgery fix-clip --help" in cli("fix-clip").err
    assert "see sdsurgery --help" in cli("mend").err


UNREADABLE = ("missing", "folder", "empty", "text", "truncated", *(["fifo"] if hasattr(os, "mkfifo") else []))


def unreadable(what: str, folder: Path) -> Path:
    path = folder / "model.safetensors"
    if what == "folder":
        path.mkdir()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "text":
        path.write_bytes(b"just some words, long enough to be looked at")
    elif what == "truncated":
        path.write_bytes(OK.read_bytes()[:-1])
    elif what == "fifo":
        os.mkfifo(path)
    return path


# A manifest is a document by itself, and verify goes on with the next model: see test_manifest.py; so is a recipe.
@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"manifest", "verify", "recipe"}))
def test_an_unreadable_input_is_3(command: str, what: str, tmp_path: Path) -> None:
    path = unreadable(what, tmp_path)
    words: list[Any] = {
        "merge-vae": [VAE], "extract": ["--component", "vae"], "cast": ["fp16"], "pipe": ["--dry-run", "fix-clip"],
        "replace": ["--component", "vae", "--from", VAE], "convert": [tmp_path / "out"],
        "diff": [OK], "merge": [OK], "bake-lora": [OK], "extract-lora": [OK],
    }.get(command, [])  # fmt: skip
    told = cli(command, path, *words)
    assert (told.code, told.out) == (3, "")
    assert told.err.startswith(f"sdsurgery: {path}: ")
    document = cli(command, "--json", path, *words)
    assert (document.code, document.err) == (3, "")
    assert document.json["error"]["file"] == str(path)
    assert document.json["error"]["kind"] in {"unreadable", "corrupt", "unsupported"}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_further_input_that_is_unreadable_is_3(what: str, tmp_path: Path) -> None:
    path = unreadable(what, tmp_path)
    for words in (
        ["merge-vae", OK, path],
        ["replace", OK, "--component", "vae", "--from", path],
        ["fix-clip", OK, "--reference", path],
        ["bake-lora", OK, path],
        ["extract-lora", OK, path],
    ):
        result = cli(*words, "-o", tmp_path / "out.safetensors", "--json")
        assert (result.code, result.json["error"]["file"]) == (3, str(path))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("what", ["exists", "no folder", "is a folder", "is the input", "is a file's child"])
def test_an_output_that_cant_be_written_is_4(what: str, tmp_path: Path) -> None:
    model = Path(shutil.copy(MERGED, tmp_path / "model.ckpt"))
    before = model.read_bytes()
    output = {
        "exists": tmp_path / "out.safetensors",
        "no folder": tmp_path / "none" / "out.safetensors",
        "is a folder": tmp_path / "folder.safetensors",
        "is the input": model,
        "is a file's child": model / "out.safetensors",
    }[what]
    if what == "exists":
        output.write_bytes(b"precious")
    elif what == "is a folder":
        output.mkdir()
    told = cli("fix-clip", model, "-o", output)
    assert (told.code, told.out) == (4, "")
    assert str(output) in told.err
    document = cli("fix-clip", model, "-o", output, "--json")
    assert (document.code, document.json["error"]["file"], document.err) == (4, str(output), "")
    assert document.json["error"]["kind"] in {"exists", "output"}
    if what != "exists":
        assert cli("fix-clip", model, "-o", output, "--force").code == 4
    else:
        assert output.read_bytes() == b"precious"
    assert model.read_bytes() == before


def test_where_several_codes_hold_the_highest_counts(tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"precious")
    for output in (taken, tmp_path / "none" / "out.safetensors"):
        for model in (tmp_path / "nothing", FIXTURES / "hostile-zip.ckpt"):
            result = cli("fix-clip", model, "-o", output, "--json")
            assert (result.code, result.json["error"]["file"]) == (4, str(output))
    assert cli("fix-clip", tmp_path / "nothing", "-o", taken, "--force").code == 3
    assert taken.read_bytes() == b"precious"


# ---------------------------------------------------------------- streams and documents


def test_documents_are_the_only_thing_on_stdout(tmp_path: Path) -> None:
    """Warnings and all go elsewhere; the document is ASCII, whatever the names are."""
    tensors = synthetic.model("sd1")
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    model = write(tmp_path / "módèl.safetensors", tensors, {"title": "☃"})
    for words in (["fix-clip", model], ["inspect", model], ["prune", model], ["cast", model, "bf16"]):
        result = shell(*words, "--json")
        assert (result.code, result.err) == (0, "")
        assert result.out.isascii()
        document = result.json
        assert document.get("path", str(model)) == str(model)


def test_warnings_go_to_stderr_and_results_to_stdout(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1")
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    del tensors[synthetic.SD1_IDS]
    result = cli("fix-clip", write(tmp_path / "model.safetensors", tensors))
    assert result.code == 0
    assert result.err == (
        "warning: missing from the text encoder: cond_stage_model.transformer.text_model.final_layer_norm.bias\n"
    )
    assert "added" in result.out
    assert "missing from" not in result.out


def test_no_traceback_without_debug_and_one_with() -> None:
    words = ["inspect", FIXTURES / "broken" / "overlap.safetensors"]
    told, debugged = cli(*words), cli(*words, "--debug")
    assert told.code == debugged.code == 3
    assert "Traceback" not in told.err
    assert "Traceback (most recent call last)" in debugged.err
    assert debugged.err.endswith(told.err)
    document = cli(*words, "--debug", "--json")
    assert document.json["error"]["kind"] == "corrupt"
    assert "Traceback" in document.err


def test_a_fault_of_our_own_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(sd.FixClip, "__call__", broken)
    told = cli("fix-clip", OK)
    assert (told.code, told.out) == (3, "")
    assert told.err.startswith("sdsurgery: a fault in sdsurgery itself: ZeroDivisionError: by accident\n")
    assert "Traceback" not in told.err
    assert "ZeroDivisionError" in cli("fix-clip", OK, "--debug").err.partition("Traceback")[2]
    assert cli("fix-clip", OK, "--json").json["error"]["kind"] == "error"


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("interrupt", 130),
        pytest.param("terminate", 143, marks=pytest.mark.skipif(os.name == "nt", reason="there it just ends")),
    ],
)
def test_interrupted_and_terminated(how: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(*_: Any) -> Any:
        if how == "interrupt":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)  # the handler runs before this is over
        raise AssertionError("nobody ended it")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sd.FixClip, "__call__", stopped)
    result = cli("fix-clip", MERGED, "-o", tmp_path / "out.safetensors")
    assert (result.code, result.out) == (code, "")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_run_in_a_thread() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(["fix-clip", "--check", "--quiet", str(MERGED)])))
    thread.start()
    thread.join()
    assert codes == [1]


@pytest.mark.parametrize(
    "words", [["inspect", "--tensors"], ["inspect", "--tensors", "--json"], ["fix-clip", "--check"]]
)
def test_a_reader_that_leaves_early_changes_nothing(words: list[str]) -> None:
    """Neither a complaint nor another answer: the exit code is the question's."""
    command, *options = words
    with subprocess.Popen(
        [sys.executable, "-m", "sdsurgery", command, str(MERGED), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
        code = process.wait()
    assert (code, complaint) == (1 if command == "fix-clip" else 0, "")


def test_a_reader_that_leaves_early_still_gets_its_file(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "sdsurgery", "fix-clip", MERGED, "-o", output],
        stdout=written, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(written)
    assert (done.returncode, done.stderr) == (0, b"")
    assert synthetic.SD1_IDS in raw(output)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    model = write(tmp_path / "☃.safetensors", {"ключ.weight": np.ones(2), "\x1b[31mred": np.ones(1)}, {"a": "日本"})
    for words in (["inspect", "--tensors"], ["inspect", "--json", "--tensors"], ["prune"], ["fix-clip", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "sdsurgery", words[0], model, *words[1:]],
            env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\x1b" not in done.stdout
        assert done.stdout.decode(encoding)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there alone")
def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xfe.safetensors")
    shutil.copy(MERGED, path)
    for words in (["inspect"], ["fix-clip", "--check"], ["fix-clip"], ["fix-clip"], ["fix-clip", "--force"]):
        for more in ([], ["--json"]):
            result = shell(*words, path, *more, *([] if words != ["fix-clip"] else ["--dry-run"]))
            assert result.code in {0, 1}
            assert "fault" not in result.out + result.err
            assert not more or result.json
    missing = shell("inspect", tmp_path / os.fsdecode(b"\xfd"), "--json")
    assert missing.json["error"]["kind"] == "unreadable"


def test_what_a_terminal_would_obey_is_written_out(tmp_path: Path) -> None:
    key = "\x1b]0;owned\x07\r\nsdsurgery: all is well"
    model = write(tmp_path / "model.safetensors", {"loss." + key: np.ones(2, np.float32)})
    for words in (["prune", model, "--dry-run"], ["cast", model, "fp16", "--dry-run"], ["inspect", model, "--tensors"]):
        result = cli(*words)
        assert result.code == 0
        assert r"\x1b]0;owned\x07\r\nsdsurgery: all is well" in result.out
        assert not any(character in result.out for character in "\x1b\x07\r")
    hostile = cli("inspect", tmp_path / "\x1b[2J")
    assert "\x1b" not in hostile.err


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("quiet", "seen"), [(False, True), (True, False)])
def test_progress_is_drawn_on_stderr(quiet: bool, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "_PATIENCE", 0.0)
    terminal, out = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    with bars.Bars(quiet=quiet) as drawn, progress.told_to(drawn.task), progress.task("copying", 100) as advance:
        advance(50)
        advance(50)
    assert ("copying" in terminal.getvalue()) == seen
    assert out.getvalue() == ""


def test_progress_is_not_drawn_before_its_time_or_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(bars, "_PATIENCE", 3600.0)
    with bars.Bars(quiet=False) as drawn, drawn.task("copying", 100) as advance:
        advance(100)
    monkeypatch.setattr(bars, "_PATIENCE", 0.0)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with bars.Bars(quiet=False) as drawn, drawn.task("copying", 100) as advance:
        advance(100)
    assert (terminal.getvalue(), file.getvalue()) == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="there are no pseudo-terminals")
def test_colours_on_a_terminal_alone() -> None:
    import pty

    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "sdsurgery", "inspect", OK],
        stdout=theirs, stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm", "COLUMNS": "80"}, check=False,
    )  # fmt: skip
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal:
        text = terminal.read(1 << 16)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b[" in text
    assert "\x1b" not in shell("inspect", OK, TERM="xterm").out


# ---------------------------------------------------------------- what isn't imported

HEAVY = {"torch", "transformers", "diffusers", "onnx", "onnxruntime", "safetensors", "numpy", "ml_dtypes"}

PROBE = """
import sys
from sdsurgery.cli import run
code = run(sys.argv[1:])
print(code, *sorted(set(sys.argv[1:2]) and {name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def imported(*words: str | os.PathLike[str], expected: int = 0) -> set[str]:
    """The packages that a command line imports."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(os.fspath, words)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    code, *names = done.stderr.splitlines()[-1].split()
    assert int(code) == expected
    assert "sdsurgery" in names
    return set(names)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["cast", "--help"],
        ["inspect", OK],
        ["inspect", MERGED, "--json", "--tensors"],
        ["fix-clip", OK],
        ["fix-clip", MERGED, "-o", "OUT"],
        ["fix-clip", FIXTURES / "sd1-ids-fractional-fp16.safetensors", "-o", "OUT"],
        ["fix-clip", FIXTURES / "sdxl-ids-fractional.safetensors", "-o", "OUT", "--reference", MERGED],
        ["merge-vae", OK, VAE, "-o", "OUT"],
        ["merge-vae", MERGED, FIXTURES / "vae.vae.pt", "-o", "OUT"],
        ["extract", OK, "--component", "vae", "-o", "OUT"],
        ["extract", FIXTURES / "sd1-legacy.ckpt", "--component", "unet", "-o", "OUT"],
        ["prune", FIXTURES / "sd1-full-ema.ckpt", "-o", "OUT"],
        ["pipe", MERGED, "-o", "OUT", "merge-vae", VAE, "+", "fix-clip"],
    ],
    ids=lambda words: " ".join(map(str, words)).replace(str(FIXTURES), ""),
)
def test_light_commands_stay_light(words: list[Any], tmp_path: Path) -> None:
    found = imported(*(tmp_path / "out.safetensors" if word == "OUT" else word for word in words))
    assert found & HEAVY == set()


def test_check_and_failures_stay_light() -> None:
    assert imported("fix-clip", "--check", MERGED, expected=1) & HEAVY == set()
    assert imported("inspect", FIXTURES / "hostile-zip.ckpt", expected=3) & HEAVY == set()


def test_cast_needs_numpy_and_nothing_heavier(tmp_path: Path) -> None:
    """Which also shows that the probe sees what is imported."""
    words = ["cast", OK, "bf16", "-o", tmp_path / "out.safetensors"]
    assert imported(*words) & HEAVY == {"numpy", "ml_dtypes"}


def test_importing_the_package_is_light() -> None:
    code = "import sys, sdsurgery; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(done.stdout.split()) & (HEAVY | {"click", "rich"}) == set()


# ---------------------------------------------------------------- schemas


def test_the_schema_of_writing_commands_is_strict() -> None:
    from conftest import validator

    check = validator("written")
    found = cli("fix-clip", "--check", MERGED, "--json").json
    spoil: list[Callable[[Any], Any]] = [
        lambda d: d.update(more=1),
        lambda d: d.update(output="x"),  # under a dry run
        lambda d: d.update(changed=False),
        lambda d: d["changes"][0].update(kind="mended"),
        lambda d: d["changes"][0].update(kind="added"),  # with something before
        lambda d: d["changes"][0].pop("before"),
        lambda d: d["notes"].append({"message": "x", "level": "error", "key": None}),
        lambda d: d.pop("sound"),
        lambda d: d.pop("notes"),
        lambda d: d["position_ids"].update(status="good"),
    ]
    for change in spoil:
        document = json.loads(json.dumps(found))
        change(document)
        assert not check.is_valid(document)


def test_the_schema_of_errors_is_strict() -> None:
    from conftest import validator

    check = validator("error")
    found = cli("inspect", "none", "--json").json
    assert found["error"].keys() == {"kind", "message", "file", "key", "remedy"}
    for changed in (
        {**found, "more": 1},
        {"error": {**found["error"], "kind": "bad"}},
        {"error": {**found["error"], "message": ""}},
        {"error": {k: v for k, v in found["error"].items() if k != "key"}},
        {"error": None},
    ):
        assert not check.is_valid(changed)


def test_every_kind_of_error_is_in_the_schema() -> None:
    from sdsurgery import errors

    schema = json.loads((ROOT / "docs" / "schemas" / "error.json").read_text("utf-8"))
    kinds = set(schema["properties"]["error"]["properties"]["kind"]["enum"])
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, sd.SurgeryError)]
    assert {kind.kind for kind in classes} - {"input"} == kinds  # "input" is the base of those that say how


# ---------------------------------------------------------------- as a process


def test_as_a_module_and_from_another_folder(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "sd1-ids-fractional.safetensors", tmp_path / "model.safetensors")
    assert shell("--version", cwd=tmp_path).out == f"sdsurgery, version {sd.__version__}\n"
    assert shell("fix-clip", "--check", "model.safetensors", cwd=tmp_path).code == 1
    result = shell("fix-clip", "model.safetensors", "--json", cwd=tmp_path)
    assert (result.code, result.json["output"]) == (0, "model.fixed.safetensors")
    assert shell("fix-clip", "--check", "model.fixed.safetensors", cwd=tmp_path).code == 0
    assert shell("inspect", "nothing", cwd=tmp_path).code == 3
    assert shell("fix-clip", "model.safetensors", cwd=tmp_path).code == 4
    assert shell("mend", cwd=tmp_path).code == 2


def test_default_names_keep_what_is_no_suffix(tmp_path: Path) -> None:
    for name, expected in (
        ("model.v1.5.safetensors", "model.v1.5.fixed.safetensors"),
        ("model.ckpt", "model.fixed.safetensors"),
        ("v1.5", "v1.5.fixed.safetensors"),
    ):
        shutil.copy(FIXTURES / "sd1-ids-fractional.safetensors", tmp_path / name)
        result = cli("fix-clip", tmp_path / name, "--json")
        assert (result.code, result.json["output"]) == (0, str(tmp_path / expected))
        (tmp_path / expected).unlink()
