"""The package as others get it: a wheel in an empty environment; and the fixtures as their script makes them."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from conftest import FIXTURES, ROOT
from packaging.requirements import Requirement

import sdsurgery as sd


def run(*words: str | os.PathLike[str], cwd: Path, code: int = 0) -> str:
    """Run a command without any trace of this environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(os.fspath, words)), cwd=cwd, env=clean, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy that holds what git would hold."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "sdsurgery", source / "sdsurgery", ignore=shutil.ignore_patterns("__pycache__"))
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    run(*words, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's commands, with the wheel and what it needs in it and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", with_pip=True)
    bin_ = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    run(bin_ / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=folder)
    return bin_


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name == f"sdsurgery-{sd.__version__}-py3-none-any.whl"
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sdsurgery").rglob("*.py")}
    assert sources <= names
    assert "sdsurgery/data/known_files.json" in names
    assert "sdsurgery/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"sdsurgery", f"sdsurgery-{sd.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    found = metadata(wheel)
    assert (found["Name"], found["Version"], found["License-Expression"]) == ("sdsurgery", sd.__version__, "MIT")
    assert found["Requires-Python"] == ">=3.11"


MACHINES = {
    "linux x86-64": {"sys_platform": "linux", "platform_machine": "x86_64"},
    "linux arm": {"sys_platform": "linux", "platform_machine": "aarch64"},
    "macOS": {"sys_platform": "darwin", "platform_machine": "arm64"},
    "macOS on Intel": {"sys_platform": "darwin", "platform_machine": "x86_64"},
    "Windows": {"sys_platform": "win32", "platform_machine": "AMD64"},
    "Windows on arm": {"sys_platform": "win32", "platform_machine": "ARM64"},
}


def required(wheel: Path, extra: str, machine: str = "linux x86-64") -> set[str]:
    """Names of what an installation with this extra needs on that machine, extras of our own followed."""
    environment = MACHINES[machine] | {"extra": extra, "python_version": "3.12", "python_full_version": "3.12.0"}
    names: set[str] = set()
    for line in metadata(wheel).get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            if requirement.name == "sdsurgery":
                for inner in requirement.extras:
                    names |= required(wheel, inner, machine)
            else:
                names.add(requirement.name)
    return names


@pytest.mark.parametrize(
    ("machine", "gpu"),
    [
        ("linux x86-64", True),
        ("Windows", True),
        ("linux arm", False),
        ("macOS", False),
        ("macOS on Intel", False),
        ("Windows on arm", False),
    ],
)
@pytest.mark.parametrize("extra", ["onnx", "parity", "all"])
def test_extras_take_the_onnx_runtime_of_the_machine(wheel: Path, extra: str, machine: str, gpu: bool) -> None:
    runtimes = {name for name in required(wheel, extra, machine) if name.startswith("onnxruntime")}
    assert runtimes == {"onnxruntime-gpu" if gpu else "onnxruntime"}


def test_the_core_needs_neither_torch_nor_onnx(wheel: Path) -> None:
    assert required(wheel, "") == {
        "blake3", "click", "jinja2", "jsonschema", "junitparser", "ml-dtypes", "numpy", "pyyaml", "rich",
    }  # fmt: skip
    assert "torch" in required(wheel, "torch")
    assert {"torch", "diffusers", "transformers"} <= required(wheel, "diffusers")
    assert {"torch", "diffusers", "onnx"} <= required(wheel, "parity")
    assert {"model-signing", "pyopenssl"} <= required(wheel, "signing")
    assert required(wheel, "all") == required(wheel, "parity") | required(wheel, "signing")
    extras = {"torch", "diffusers", "onnx", "parity", "signing", "all"}
    assert set(metadata(wheel).get_all("Provides-Extra", [])) >= extras


def test_the_wheel_works_in_an_empty_environment(installed: Path, tmp_path: Path) -> None:
    """Its two commands, its data, and the main job, from another folder and without torch."""
    script = installed / ("sdsurgery.exe" if os.name == "nt" else "sdsurgery")
    python = installed / "python"
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json", cwd=tmp_path))
    names = {entry["name"].lower() for entry in listed}
    assert "sdsurgery" in names
    assert names & {"torch", "safetensors", "diffusers", "transformers", "onnx", "onnxruntime"} == set()

    assert "merge-vae" in run(script, "--help", cwd=tmp_path)
    assert run(python, "-m", "sdsurgery", "--version", cwd=tmp_path) == f"sdsurgery, version {sd.__version__}\n"
    for name in ("merged.ckpt", "sd1-legacy.ckpt", "vae.vae.pt"):
        shutil.copy(FIXTURES / name, tmp_path)
    found = json.loads(run(script, "inspect", "merged.ckpt", "--json", "--hash", cwd=tmp_path))
    assert (found["family"], found["position_ids"]["status"]) == ("sd1", "fractional")
    assert "torch-legacy" in run(python, "-m", "sdsurgery", "inspect", "sd1-legacy.ckpt", cwd=tmp_path)
    words = ["pipe", "merged.ckpt", "-o", "out.safetensors", "merge-vae", "vae.vae.pt", "+", "fix-clip", "+", "cast"]
    run(script, *words, "bf16", cwd=tmp_path)
    run(script, "fix-clip", "--check", "out.safetensors", cwd=tmp_path)
    run(script, "fix-clip", "--check", "merged.ckpt", cwd=tmp_path, code=1)
    run(script, "inspect", "nothing", cwd=tmp_path, code=3)

    program = (
        "import sdsurgery, importlib.resources as r;"
        "print(sdsurgery.__file__);"
        "print(r.files('sdsurgery.data').joinpath('known_files.json').is_file());"
        "from sdsurgery.models.known import _files; print(len(_files()))"
    )
    where, data, count = run(python, "-c", program, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert (data, int(count) > 5) == ("True", True)


def test_the_fixtures_are_what_their_script_makes(tmp_path: Path) -> None:
    """Byte for byte, but for the miniature, which takes half an hour to train."""
    subprocess.run([sys.executable, FIXTURES / "make_fixtures.py", tmp_path], check=True, cwd=ROOT)
    made = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    there = {
        path.relative_to(FIXTURES).as_posix(): path
        for path in FIXTURES.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    trained = {"miniature.safetensors", "washed-out.vae.safetensors", "captions.txt", "story.yaml", "story.lock.json"}
    trained |= {name for name in there if name.startswith("miniature/")}
    assert trained < set(there)
    assert sum(path.stat().st_size for path in there.values()) < 40_000_000
    there = {name: path for name, path in there.items() if name not in trained}
    assert made.keys() == there.keys()
    assert [name for name, path in made.items() if path.read_bytes() != there[name].read_bytes()] == []
    assert sum(path.stat().st_size for path in there.values()) < 20_000_000
