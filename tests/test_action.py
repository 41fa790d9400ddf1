"""The GitHub Action: its steps as the runner would run them, on inputs that nobody would wish for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FIXTURES, ROOT, cli
from markdown_it import MarkdownIt

from sdsurgery.inspection.findings import Finding, Mend, Verification, exit_code
from sdsurgery.reports.markdown import code, markdown, text

BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None or os.name == "nt", reason="the action's steps run in bash")

ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


@dataclass(frozen=True)
class Ran:
    """A step, or all of them, as the runner sees them."""

    code: int
    log: str
    outputs: Mapping[str, str]
    summary: str


def outputs(content: str) -> dict[str, str]:
    """The file that GITHUB_OUTPUT names, as the runner reads it."""
    found = {}
    lines = iter(content.splitlines())
    for line in lines:
        name, mark, rest = re.fullmatch(r"([\w-]+)(=|<<)(.*)", line).groups()  # type: ignore[union-attr]
        if mark == "=":
            found[name] = rest
        else:
            value = []
            while (part := next(lines)) != rest:
                value.append(part)
            found[name] = "\n".join(value)
    return found


def run_step(run: str, folder: Path, environment: Mapping[str, str]) -> Ran:
    """A run step, as ``shell: bash`` has it."""
    files = {name: folder.parent / f"{folder.name}.{name}" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    temp = folder.parent / "runner temp"
    temp.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("INPUT_", "GITHUB_"))}
    done = subprocess.run(
        [str(BASH), "--noprofile", "--norc", "-eo", "pipefail", "-c", run],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="surrogateescape",
        cwd=folder,
        env=clean
        | {name: str(file) for name, file in files.items()}
        | {"GITHUB_ACTIONS": "true", "GITHUB_ACTION_PATH": str(ROOT), "RUNNER_TEMP": str(temp)}
        | environment,
        check=False,
    )
    written = outputs(files["GITHUB_OUTPUT"].read_text("utf-8"))
    return Ran(done.returncode, done.stdout, written, files["GITHUB_STEP_SUMMARY"].read_text("utf-8"))


def filled(template: str, inputs: Mapping[str, str], steps: Mapping[str, Mapping[str, str]]) -> str:
    """A value of action.yml with its expressions replaced."""

    def value(match: re.Match[str]) -> str:
        words = match[1].split(".")
        return inputs[words[1]] if words[0] == "inputs" else steps.get(words[1], {}).get(words[3], "")

    return EXPRESSION.sub(value, template)


def act(folder: Path, **given: str) -> Ran:
    """The action's last step, with the inputs' defaults, and this Python for that of the first step."""
    inputs = {name: str(each.get("default", "")) for name, each in ACTION["inputs"].items()}
    inputs |= {name.replace("_", "-"): value for name, value in given.items()}
    step = STEPS[-1]
    environment = {
        name: filled(value, inputs, {"install": {"python": sys.executable}}) for name, value in step["env"].items()
    }
    return run_step(step["run"], folder, environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "work space"
    place.mkdir()
    return place


def sound(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(FIXTURES / "sd1-ids-ok.safetensors", place))


def broken(place: Path) -> Path:
    return Path(shutil.copy(FIXTURES / "sd1-ids-wrong-values.safetensors", place))


# ------------------------------------------------------------------------------------------------ action.yml


def test_inputs_reach_the_shell_through_the_environment_only() -> None:
    runs = [step for step in STEPS if "run" in step]
    assert len(runs) == 2
    for step in runs:
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"
    used = {word for step in STEPS for value in map(str, step.get("env", {}).values()) for word in re.findall(
        r"inputs\.([\w-]+)", value)}  # fmt: skip
    assert used | {"python-version"} == set(ACTION["inputs"])


def test_the_action_is_what_github_asks_for() -> None:
    assert set(ACTION) == {"name", "description", "author", "branding", "inputs", "outputs", "runs"}
    assert ACTION["runs"]["using"] == "composite"
    assert all(set(each) <= {"description", "required", "default"} and each["description"] for each in ACTION[
        "inputs"].values())  # fmt: skip
    assert all(set(each) == {"description", "value"} for each in ACTION["outputs"].values())
    assert len({step["id"] for step in STEPS}) == len(STEPS)


def test_actions_of_others_are_pinned() -> None:
    lines = [line.strip() for line in (ROOT / "action.yml").read_text("utf-8").splitlines() if "uses:" in line]
    assert lines
    assert all(re.fullmatch(rf"(- )?uses: {PINNED.pattern} # v\d+\.\d+\.\d+", line) for line in lines)


def test_every_output_is_written(folder: Path) -> None:
    sound(folder / "model.safetensors")
    asked = {re.fullmatch(r"\$\{\{ steps\.verify\.outputs\.([\w-]+) \}\}", each["value"])[1] for each in ACTION[
        "outputs"].values()}  # type: ignore[index]  # fmt: skip
    assert asked == set(ACTION["outputs"])
    if BASH:
        assert set(act(folder, path="model.safetensors").outputs) == asked


# ------------------------------------------------------------------------------------------------ checking


@needs_bash
def test_a_sound_model(folder: Path) -> None:
    sound(folder / "model.safetensors")
    ran = act(folder, path="model.safetensors")
    assert (ran.code, ran.outputs["exit-code"], ran.outputs["findings"]) == (0, "0", "0"), ran.log
    for name in ("json", "sarif", "junit", "html"):
        assert (folder / ran.outputs[name]).stat().st_size > 0
    assert json.loads((folder / ran.outputs["json"]).read_text("utf-8"))["verified"] is True
    assert ran.summary.startswith("### sdsurgery verify: 1 of 1 model sound\n")
    assert "::error" not in ran.log


@needs_bash
def test_findings(folder: Path) -> None:
    sound(folder / "a.safetensors")
    broken(folder / "b.safetensors")
    ran = act(folder, path="a.safetensors\nb.safetensors\n", html="", junit="", sarif="", json="out/report.json")
    assert (ran.code, ran.outputs["exit-code"], ran.outputs["findings"]) == (1, "1", "1"), ran.log
    assert [ran.outputs[name] for name in ("json", "sarif", "junit", "html")] == ["out/report.json", "", "", ""]
    assert "position-ids-wrong" in ran.log
    assert "**error**" in ran.summary
    assert "::error title=sdsurgery verify::there are findings (exit code 1); the summary tells more" in ran.log


@needs_bash
def test_what_does_not_count(folder: Path) -> None:
    broken(folder / "b.safetensors")
    (folder / "known problems.txt").write_text("position-ids-wrong * # the merge is published as it is\n")
    (folder / "more.txt").write_text("pickle\n")
    ran = act(folder, path="b.safetensors", allow_list="known problems.txt\nmore.txt")
    assert (ran.code, ran.outputs["findings"]) == (0, "0"), ran.log
    before = act(folder, path="b.safetensors", fail_on="never", json="old.json")
    assert (before.code, before.outputs["findings"]) == (0, "0")
    assert act(folder, path="b.safetensors", baseline="old.json").code == 0
    assert act(folder, path="b.safetensors", baseline="old.json", json="old.json").code == 2
    assert act(folder, path="b.safetensors", dtype="fp32").outputs["findings"] not in {"0", "1"}


@needs_bash
def test_a_manifest(folder: Path) -> None:
    model = sound(folder / "model.safetensors")
    assert cli("manifest", model, "-o", folder / "weights.json").code == 0
    assert act(folder, path="model.safetensors", manifest="weights.json").code == 0
    broken(model)
    ran = act(folder, path="model.safetensors", manifest="weights.json", profile="ldm")
    assert ran.code == 1
    assert "tensor-changed" in ran.log
    assert "position-ids-wrong" in ran.log


@needs_bash
def test_a_signature(folder: Path) -> None:
    signing = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives import serialization as form

    key = signing.generate_private_key(signing.SECP256R1())
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (folder / "private.pem").write_bytes(private)
    (folder / "-public key.pem").write_bytes(public)
    model = sound(folder / "model.safetensors")
    words = ("--sign", "--key", folder / "private.pem", "--signature", folder / "-model.sig")
    assert cli("manifest", model, *words).code == 0
    given = {"path": "model.safetensors", "signature": "-model.sig", "key": "-public key.pem"}
    assert act(folder, **given).code == 0
    broken(model)
    ran = act(folder, **given)
    assert (ran.code, ran.outputs["exit-code"]) == (1, "1"), ran.log
    assert "signature-file" in ran.log


@needs_bash
def test_what_could_not_be_checked(folder: Path) -> None:
    shutil.copy(FIXTURES / "broken" / "git-lfs-pointer.safetensors", folder / "pointer.safetensors")
    ran = act(folder, path="pointer.safetensors\nmissing.safetensors")
    assert (ran.code, ran.outputs["exit-code"], ran.outputs["findings"]) == (3, "3", "2")
    assert "git lfs pull" in ran.log
    assert "0 of 2 models sound" in ran.summary


EVIL = [
    "with space.safetensors",
    'quote\'s "both".safetensors',
    "$(touch pwned).safetensors",
    "`touch pwned`;touch pwned&.safetensors",
    "-dash.safetensors",
    "--fail-on=never.safetensors",
    "star*[x]?.safetensors",
    "${{ inputs.path }}.safetensors",
    "::set-output name=exit-code::0.safetensors",
    "##[set-output name=exit-code]0.safetensors",
    "ünïcödé.safetensors",
]


@needs_bash
@pytest.mark.parametrize("name", EVIL)
def test_names_are_only_names(name: str, folder: Path) -> None:
    broken(folder / name)
    for pattern in (name, "*.safetensors"):
        ran = act(folder, path=pattern, json=f"{name}.json", sarif=f"{name}.sarif", junit=f"{name}.xml", html="")
        assert (ran.code, ran.outputs["exit-code"], ran.outputs["findings"]) == (1, "1", "1"), ran.log
        assert json.loads((folder / f"{name}.json").read_text("utf-8"))["models"][0]["path"] == name
        assert ran.outputs["sarif"] == f"{name}.sarif"
    left = {path.name for path in folder.iterdir()}
    assert left == {name, f"{name}.json", f"{name}.sarif", f"{name}.xml"}


@needs_bash
def test_no_line_of_a_report_is_a_command_to_the_runner(folder: Path) -> None:
    broken(folder / "::warning::x.safetensors")
    lines = act(folder, path="*.safetensors").log.splitlines()
    token = re.fullmatch(r"::stop-commands::([0-9a-f]{32})", lines[0])
    assert token
    assert lines.count(f"::{token[1]}::") == 1
    assert lines[-1].startswith("::error title=sdsurgery verify::there are findings")
    assert next(index for index, line in enumerate(lines) if "::warning::x" in line) < lines.index(f"::{token[1]}::")


@needs_bash
def test_patterns(folder: Path) -> None:
    for name in ("a/x.safetensors", "a/deep/er/y.safetensors", "b/z.safetensors", "a/.hidden/h.safetensors"):
        sound(folder / name)
    (folder / "a" / "README.md").write_text("not weights")

    def found(path: str) -> list[str]:
        ran = act(folder, path=path, sarif="", html="", junit="")
        document = json.loads((folder / ran.outputs["json"]).read_text("utf-8"))
        assert ran.code == 0, ran.log
        return [model["path"] for model in document["models"]]

    assert found("a/**/*.safetensors\n\n  b/*.safetensors  \r\nb/z.safetensors") == [
        "a/deep/er/y.safetensors", "a/x.safetensors", "b/z.safetensors",
    ]  # fmt: skip
    assert found("a") == ["a/deep/er/y.safetensors", "a/x.safetensors"]
    assert found("[b]/?.safetensors") == ["b/z.safetensors"]


@needs_bash
@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"path": ""}, 2),
        ({"path": " \n\n"}, 2),
        ({"path": "*.ckpt"}, 3),
        ({"path": "model.safetensors\n*.ckpt"}, 3),
        ({"path": "nothing"}, 3),
        ({"path": "empty"}, 3),
        ({"path": "~/model.safetensors"}, 3),
        ({"path": "model.safetensors", "profile": "nobody"}, 2),
        ({"path": "model.safetensors", "fail_on": "sometimes"}, 2),
        ({"path": "model.safetensors", "manifest": "missing.json"}, 3),
        ({"path": "model.safetensors", "baseline": "missing.json"}, 3),
        ({"path": "model.safetensors", "allow_list": "missing.txt"}, 3),
        ({"path": "model.safetensors", "key": "public.pem"}, 2),
        ({"path": "model.safetensors", "json": "model.safetensors"}, 2),
        ({"path": "model.safetensors", "sarif": "a.json", "json": "./a.json"}, 2),
        ({"path": "model.safetensors", "json": "weights.json"}, 2),
        ({"path": "model.safetensors", "html": "page.html"}, 4),
        ({"path": "model.safetensors", "manifest": "weights.json", "json": "weights.json"}, 2),
        ({"path": "model.safetensors", "manifest": "weights.json", "sarif": "empty/../weights.json"}, 2),
        ({"path": "model.safetensors", "json": "model.safetensors/a.json"}, 3),
    ],
    ids=str,
)
def test_what_can_not_be_done_never_passes(inputs: dict[str, str], expected: int, folder: Path) -> None:
    before = sound(folder / "model.safetensors").read_bytes()
    (folder / "empty").mkdir()
    (folder / "weights.json").write_text("{}")
    (folder / "page.html").write_text("mine")
    ran = act(folder, **inputs)
    assert (ran.code, ran.outputs["exit-code"]) == (expected, str(expected)), ran.log
    assert ran.summary.startswith("### sdsurgery verify: ")
    assert f"(exit code {expected})" in ran.log
    assert "Traceback" not in ran.log
    assert (folder / "model.safetensors").read_bytes() == before
    assert (folder / "weights.json").read_text() == "{}"
    assert (folder / "page.html").read_text() == "mine"


@needs_bash
def test_modules_of_the_checked_repository_stay_unread(folder: Path) -> None:
    """A change that somebody proposes may hold any file."""
    sound(folder / "model.safetensors")
    for name in ("sdsurgery", "click", "json", "glob", "sitecustomize", "usercustomize", "numpy", "pip", "venv"):
        (folder / f"{name}.py").write_text("open('pwned', 'w'); raise SystemExit(0)")
    step = STEPS[-1]
    environment = {
        "SDSURGERY_PYTHON": sys.executable, "INPUT_PATH": "model.safetensors", "PYTHONPATH": str(folder),
    }  # fmt: skip
    ran = run_step(step["run"], folder, environment)
    assert ran.outputs["exit-code"] == "0", ran.log
    assert not (folder / "pwned").exists()


# ------------------------------------------------------------------------------------------------ installing


FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"{log}"
if [[ $* == *"-m venv"* ]]; then mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python"; fi
"""


def installed(folder: Path, **environment: str) -> tuple[Ran, str]:
    """The first step with a Python that only writes down what it is told."""
    log = folder / "log"
    log.write_text("")
    fake = folder / "fake python"
    fake.write_text(FAKE.format(log=log))
    fake.chmod(0o755)
    install = next(step for step in STEPS if step["id"] == "install")
    return run_step(install["run"], folder, {"SDSURGERY_PYTHON": str(fake)} | environment), log.read_text()


@needs_bash
def test_what_is_installed(folder: Path) -> None:
    ran, told = installed(folder, SDSURGERY_VERSION="")
    assert ran.code == 0, ran.log
    assert told.splitlines()[-1].endswith(f"--no-input {ROOT}")
    assert Path(ran.outputs["python"]).name == "python"
    assert "runner temp" in ran.outputs["python"]
    for given, what in (
        ({"SDSURGERY_VERSION": "1.2.3rc1"}, "sdsurgery==1.2.3rc1"),
        ({"SDSURGERY_VERSION": "1.2.3", "SDSURGERY_SIGNATURE": "a b.sig"}, "sdsurgery[signing]==1.2.3"),
        ({"SDSURGERY_SIGNATURE": "$(x)"}, f"{ROOT}[signing]"),
    ):
        assert installed(folder, **given)[1].splitlines()[-1].endswith(f" --no-input {what}")


@needs_bash
@pytest.mark.parametrize("version", ["main", "-r x", "1.0 --index-url=x", "1.0\n2", "1;touch pwned", "$(touch pwned)"])
def test_a_version_is_a_version(version: str, folder: Path) -> None:
    ran, told = installed(folder, SDSURGERY_VERSION=version)
    assert (ran.code, told) == (2, "")
    assert "::error title=sdsurgery::the input 'version'" in ran.log
    assert not (folder / "pwned").exists()


@needs_bash
def test_the_whole_action(folder: Path) -> None:
    """All of its steps, with an installation from this checkout."""
    sound(folder / "model.safetensors")
    inputs = {name: str(each.get("default", "")) for name, each in ACTION["inputs"].items()}
    inputs["path"] = "*.safetensors"
    seen: dict[str, Mapping[str, str]] = {"python": {"python-path": sys.executable}}
    for step in STEPS:
        if "run" in step:
            environment = {name: filled(value, inputs, seen) for name, value in step["env"].items()}
            ran = run_step(step["run"], folder, environment)
            assert ran.code == 0, ran.log
            seen[step["id"]] = ran.outputs
    assert seen["verify"]["exit-code"] == "0"
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "sdsurgery-reports"]


# ------------------------------------------------------------------------------------------------ the summary


HOSTILE = [
    "a|b\n|c|\r\n\n# heading",
    "<script>alert(1)</script><img src=x onerror=y></code></td></table>",
    "[link](javascript:alert(1)) ![p](https://example.org/p.png) https://example.org www.example.org",
    "`code` ``two`` **bold** _i_ ~~s~~ \\| \\\\| $math$ :smile: &lt;b&gt; &#60;b&#62;",
    "@someone #12 owner/repo#1",
    "\x1b[31m\u202e\u200b\ud800 ünï 絵",
    "<!-- --> --> ```",
    "x" * 5000,
]


class _Texts(HTMLParser):
    """Tags, attributes and the text of each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[Any] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes += [pair for pair in attrs if pair[0] != "style"]
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def rendered(content: str) -> _Texts:
    parser = _Texts()
    parser.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(content))
    return parser


def verification(*findings: Finding, path: str = "m.safetensors") -> Verification:
    return Verification(Path(path), "safetensors", "ldm", "sd1", "ldm", ("weight-missing",), findings, 4_000_000)


@pytest.mark.parametrize("evil", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_breaks_out_of_the_summary(evil: str) -> None:
    mend = Mend(("sdsurgery", "fix-clip", evil))
    findings = (
        Finding("weight-missing", "error", evil, file=evil, key=evil, component=evil, mend=mend),
        Finding("key-unknown", "warning", f"key {evil}", remedy=evil),
    )
    content = markdown([verification(*findings, path=evil.replace("\0", ""))], "warning")
    assert content.isascii()
    seen = rendered(content)
    assert seen.tags == {"h3", "table", "thead", "tbody", "tr", "th", "td", "code", "strong"}
    assert seen.attributes == []
    assert len(seen.cells) == 8 + 8 + 5 + 2 * 5
    assert content.count("\n") == 1 + 1 + 3 + 1 + 4
    assert not re.search(r"@[a-z]|#\d+ |https?:|www\.", content.replace("&#", "&"))


def test_names_are_shown_as_they_are() -> None:
    name = "we|ird `na<me>` [x](y) *&amp; @a #1.safetensors"
    assert rendered(f"|a|\n|-|\n|{code(name)}|").cells[1].strip() == name
    assert rendered(f"|a|\n|-|\n|{text(name)}|").cells[1].strip().replace("\u200b", "") == name


def test_a_summary_stays_small() -> None:
    evil = "\U0001f600" * 500
    findings = [Finding("weight-missing", "error", f"{evil}", file=f"{n}{evil}", remedy=evil) for n in range(500)]
    content = markdown([verification(*findings, path=f"{n}{evil}") for n in range(500)], "warning")
    assert len(content.encode()) < 1024 * 1024
    assert "and 350 more models" in content
    assert "more kinds of findings" in content


def test_findings_of_one_kind_are_one_row() -> None:
    many = [Finding("weight-missing", "error", f"{n} is missing", key=str(n), component="unet") for n in range(3)]
    allowed = Finding("pickle", "note", "a pickle", allowed="known")
    found = verification(*many, Finding("leftovers", "note", "EMA"), allowed)
    lines = markdown([found, verification()], "error").splitlines()
    assert lines[0] == "### sdsurgery verify: 1 of 2 models sound"
    assert lines[4].split(" | ")[1:] == [
        "findings", "sd1, ldm, safetensors (4 MB read)", "ldm", "3", "0", "1", "1 |",
    ]  # fmt: skip
    assert lines[-2].startswith("| **error** | <code>weight-missing</code> | <code>m&#46;safetensors</code> | ")
    assert lines[-2].endswith(" | 0 is missing and 2 more |  |")
    assert lines[-1].startswith("| note | <code>leftovers</code>")
    assert len(lines) == 11


def test_what_was_not_checked_stands_first() -> None:
    gap = verification(Finding("container-corrupt", "error", "cut off", file="m.safetensors"))
    lines = markdown([verification(path="a"), gap], "never").splitlines()
    assert exit_code([gap], "never") == 3
    assert "**not fully checked**" in lines[4]
    assert "| error | <code>container-corrupt</code> | <code>m&#46;safetensors</code> | cut off |" in lines[-1]


@pytest.mark.parametrize("fail_on", ["note", "never"])
def test_verify_writes_it(fail_on: str, tmp_path: Path) -> None:
    model = broken(tmp_path / "model.safetensors")
    assert cli("verify", model, "--fail-on", fail_on, "--markdown", tmp_path / "a.md").code in {0, 1}
    content = (tmp_path / "a.md").read_text("ascii")
    assert content.startswith("### sdsurgery verify: ")
    assert "position-ids-wrong" in content
    cli("verify", model, "--fail-on", fail_on, "--markdown", tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text("ascii") == content
