#!/usr/bin/env python3
"""The two commands of the README, for a fresh machine that has nothing but Python 3.11 or later.

python3 dev.py demo    make an environment, install sdsurgery, and do its main job on the fixtures
python3 dev.py test    make an environment, install what the tests need, and run linters, types and tests
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"


def run(*command: str | Path, cwd: Path = ROOT, code: int = 0) -> None:
    """Run a command that should end with this code; another ends this one with it, too."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, check=False).returncode
    if done != code:
        sys.exit(done or 1)


def install(what: str) -> None:
    """Make the environment if there is none, and install the package into it."""
    if not (BIN / "pip").exists() and not (BIN / "pip.exe").exists():
        print(f"making an environment in {VENV.relative_to(ROOT)}")
        venv.create(VENV, with_pip=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt", "-e", what)


def demo() -> None:
    """The story of Anything V3.1 on a small model that draws: bad position ids and VAE, mended, converted, drawn."""
    install(".[parity]")
    folder = ROOT / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run(PYTHON, ROOT / "fixtures" / "break_miniature.py", folder / "anything-v3.safetensors")
    for name in ("captions.txt", "story.yaml", "story.lock.json"):
        shutil.copy(ROOT / "fixtures" / name, folder)
    shutil.copy(ROOT / "fixtures" / "miniature.safetensors", folder / "sound.safetensors")
    for title, words, code in (
        ("What is in this merge?", "inspect anything-v3.safetensors", 0),
        ("The VAE of a sound model, as a file:", "extract sound.safetensors --component vae -o better.vae.pt", 0),
        ("Swap the VAE:", "merge-vae anything-v3.safetensors better.vae.pt -o only-the-vae.safetensors", 0),
        ("A recipe for all of it: VAE, position ids, a file, a folder for diffusers, ONNX graphs, and checks:",
         "run story.yaml --dry-run", 0),
        ("Make it, check that nothing is left to mend, draw with all three, and see that every byte is the locked one:",
         "run story.yaml --locked", 0),
        ("Is anything left to mend?", "fix-clip --check anything-v3-1.safetensors", 0),
        ("Back to the very same file:", "convert anything-v3-1 again.safetensors --sidecar", 0),
        ("How was it made?", "inspect anything-v3-1.safetensors", 0),
        ("And what did the merge draw, and the merge with the other VAE?",
         ("parity anything-v3-1.safetensors only-the-vae.safetensors anything-v3.safetensors --prompts captions.txt "
          "-o before-and-after"),
         1),
    ):  # fmt: skip
        print(f"\n# {title}\n$ sdsurgery {words}", flush=True)
        run(PYTHON, "-m", "sdsurgery", *words.split(), cwd=folder, code=code)
    print(f"\nThe files are in {folder.relative_to(ROOT)}/, the pictures in its folders parity/ and before-and-after/.")


_GPU = """
from sdsurgery.parity.devices import why_no_gpu
missing = why_no_gpu()
print(f"tests/test_parity_gpu.py is left out: {missing}" if missing else "The checks on the GPU take part.")
"""


def test() -> None:
    """Linters, types, tests."""
    install(".[test]")
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "mypy")
    run(PYTHON, "-c", _GPU)
    run(PYTHON, "-m", "pytest", "-n", "auto", *sys.argv[2:])


if __name__ == "__main__":
    commands = {"demo": demo, "test": test}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything has checked it
        sys.exit("sdsurgery needs Python 3.11 or later")
    commands[sys.argv[1]]()
