"""The page about CI, the example workflow and the pre-commit hook: what they show works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FIXTURES, ROOT, cli

from sdsurgery.containers.saving import SUFFIXES

PAGE = (ROOT / "docs" / "ci.md").read_text("utf-8")
EXAMPLE = ROOT / "docs" / "examples" / "verify-weights.yml"
HOOKS = ROOT / ".pre-commit-hooks.yaml"

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OWN = "OWNER/sdsurgery"


def blocks(language: str) -> list[str]:
    return [found[2] for found in BLOCK.finditer(PAGE) if found[1] == language]


def console() -> Iterator[str]:
    """Every command of the page, in its order."""
    for block in blocks("console"):
        for line in block.splitlines():
            assert line.startswith("$ "), line
            yield line.removeprefix("$ ")


def elsewhere() -> Iterator[str]:
    """The commands for other CI systems."""
    for block in blocks("yaml"):
        job = yaml.safe_load(block)
        if isinstance(job, dict) and "verify-weights" in job:
            yield from (line for line in job["verify-weights"]["script"] if line.startswith("sdsurgery"))
    yield from (line for block in blocks("groovy") for line in re.findall(r"sh '(.*)'", block))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the files that the page names, and sdsurgery on the path."""
    for name in ("weights", "merges", "downloaded", "bin"):
        (tmp_path / name).mkdir()
    for name in ("model.safetensors", "weights/model.safetensors", "downloaded/model.safetensors"):
        shutil.copy(FIXTURES / "sd1-ids-ok.safetensors", tmp_path / name)
    shutil.copy(FIXTURES / "merged.ckpt", tmp_path / "merges")
    (tmp_path / "weights" / "allowed.txt").write_text(blocks("text")[0])
    script = tmp_path / "bin" / "sdsurgery"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m sdsurgery "$@"\n')
    script.chmod(0o755)
    return tmp_path


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(os.name == "nt" or not shutil.which("openssl"), reason="the page's shell and openssl aren't here")
def test_the_commands_of_the_page(place: Path) -> None:
    commands = list(console())
    assert sum(command.startswith("sdsurgery ") for command in commands) >= 10
    assert all(command.split()[0] in {"sdsurgery", "openssl"} for command in commands)
    others = list(elsewhere())
    assert len(others) == 2
    for command in (*commands, *others):
        done = run(command, place)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    for name in ("a.sarif", "a.xml", "a.html", "a.md", "a.json", "verify.xml", "baseline.json", "weights.json"):
        assert (place / name).stat().st_size > 0
    # The other way round: what the commands would stop.
    shutil.copy(FIXTURES / "merged.ckpt", place / "merges" / "new.ckpt")
    shutil.copy(FIXTURES / "sd1-ids-wrong-values.safetensors", place / "downloaded" / "model.safetensors")
    shutil.copy(FIXTURES / "sd1-ids-wrong-values.safetensors", place / "weights" / "model.safetensors")
    stopping = [command for command in (*commands, *others) if re.search("downloaded|allow-list|--baseline", command)]
    assert len(stopping) == 5
    assert [run(command, place).returncode for command in stopping] == [1] * 5


def test_no_command_hides_in_another_block() -> None:
    assert set(re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)) == {"", "console", "yaml", "text", "groovy"}
    assert all("sdsurgery verify" not in block for block in blocks("text"))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target


def test_inputs_and_outputs_are_explained() -> None:
    action: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    part = PAGE.partition("## The action")[2].partition("\n## ")[0]
    inputs, _, results = part.partition("| output |")
    named = {name for row in re.findall(r"^\|(.*?)\|", inputs, re.MULTILINE) for name in re.findall(r"`([\w-]+)`", row)}
    assert named == set(action["inputs"])
    named = {
        name for row in re.findall(r"^\|(.*?)\|", results, re.MULTILINE) for name in re.findall(r"`([\w-]+)`", row)
    }
    assert named == set(action["outputs"])


def test_the_example_workflow() -> None:
    content = EXAMPLE.read_text("utf-8")
    workflow = yaml.safe_load(content)
    assert set(workflow) == {"name", True, "permissions", "jobs"}  # YAML 1.1 takes "on" for a truth value
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert "${{" not in step.get("run", "")
    pinned = re.compile(r"(?:- )?uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # (?:v\d+\.\d+\.\d+|the commit of a release)")
    uses = [line.strip() for line in content.splitlines() if re.match(r"\s*(- )?uses:", line)]
    assert len(uses) == sum("uses" in step for step in steps)
    assert all(pinned.fullmatch(line) for line in uses), uses
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    own = [step for step in steps if step.get("uses", "").startswith(OWN)]
    assert len(own) == 2
    for step in own:
        assert set(step["with"]) <= set(action["inputs"])
    assert set(re.findall(r"steps\.verify\.outputs\.([\w-]+)", content)) <= set(action["outputs"])


def test_every_yaml_of_the_page_is_yaml() -> None:
    assert all(yaml.safe_load(block) for block in blocks("yaml"))


def test_the_hook() -> None:
    (hook,) = yaml.safe_load(HOOKS.read_text("utf-8"))
    assert (hook["id"], hook["language"], hook["entry"]) == ("sdsurgery-verify", "python", "sdsurgery verify")
    assert hook["args"][-1] == "--"
    assert hook["require_serial"] is True
    pattern = re.compile(hook["files"])
    assert all(pattern.search(f"some/where{suffix}") for suffix in SUFFIXES if suffix != ".bin")
    assert pattern.search("A.SafeTensors")
    assert not any(map(pattern.search, ("weights.json", "a.safetensors.sig", "safetensors", "a.pt.txt", "a.bin")))


def test_the_hook_on_files(tmp_path: Path) -> None:
    """As pre-commit calls it: entry, args, names."""
    (hook,) = yaml.safe_load(HOOKS.read_text("utf-8"))
    words = [*shlex.split(hook["entry"])[1:], *hook["args"]]
    good = shutil.copy(FIXTURES / "sd1-ids-ok.safetensors", tmp_path / "a.safetensors")
    bad = shutil.copy(FIXTURES / "sd1-ids-wrong-values.safetensors", tmp_path / "b.safetensors")
    assert cli(*words, good).code == 0
    assert cli(*words, good, bad).code == 1
    pointer = cli(*words, good, FIXTURES / "broken" / "git-lfs-pointer.safetensors")
    assert pointer.code == 3
    assert "git lfs pull" in pointer.out
    assert cli(*words, "--help").code == 3  # a file of that name, which isn't there
