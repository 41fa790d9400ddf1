"""Proves that real clients run our ONNX folders: diffusers' own pipeline, and optimum-onnx's in their environment.

    python tests/interop/run.py FOLDER

FOLDER gets optimum's environment, made once, and the models, made anew. Needs the project's environment with the
extras ``parity`` and ``test``, and a package index. No part of the tests, which download nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "fixtures"), str(HERE.parents[1])]

import oracle_support  # noqa: E402
from oracle_support import WIDTHS, Bench, Case, converted, from_folder  # noqa: E402

LEAST_PSNR = {"fp32": 80.0, "fp16": 35.0}
LEAST_SPREAD = 0.01
"""A picture that is one colour would agree with anything."""

REQUIREMENTS = HERE / "requirements.txt"
MODELS = {
    "sd1": Case("sd1"),
    "sd2": Case("sd2"),
    "sd2-v": Case("sd2", prediction="v_prediction"),
    "sdxl": Case("sdxl"),
}


@dataclass(frozen=True)
class Run:
    """A client, what it draws from, and how the folder was written."""

    client: str
    model: str
    task: str = "text"
    options: tuple[str, ...] = ()
    bind: bool = False

    @property
    def precision(self) -> str:
        return "fp16" if "fp16" in self.options else "fp32"

    @property
    def written(self) -> tuple[str, ...]:
        return (*(("--layout", "diffusers-onnx") if self.client == "diffusers" else ()), *self.options)


EXTERNAL = ("--weights", "external")
EMBEDDED = ("--weights", "embedded")
OLD = ("--opset", "17")
FUSED = ("--optimize",)
LOOSE = ("--no-hard-links",)
HALF = ("--dtype", "fp16")
RUNS = (
    *(Run("diffusers", model, options=options) for model in ("sd1", "sd2", "sd2-v") for options in ((), EXTERNAL)),
    Run("diffusers", "sd1", options=EMBEDDED),
    *(Run("diffusers", "sd1", options=options) for options in (OLD, FUSED)),
    Run("diffusers", "sd1", options=HALF),
    *(Run("optimum", model, options=options) for model in ("sd1", "sd2-v", "sdxl") for options in ((), EXTERNAL)),
    *(
        Run("optimum", model, options=options)
        for model in ("sd1", "sdxl")
        for options in (EMBEDDED, OLD, LOOSE, HALF, FUSED)
    ),
    *(Run("optimum", model, "image", options) for model in ("sd1", "sdxl") for options in ((), EXTERNAL)),
    *(Run("optimum", model, task, bind=True) for model in ("sd1", "sdxl") for task in ("text", "image")),
)


def environment(folder: Path) -> Path:
    """An interpreter with optimum-onnx, installed unless it was."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = folder / "made-of.txt"
    wanted = REQUIREMENTS.read_text("utf-8")
    if not stamp.is_file() or stamp.read_text("utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
        stamp.write_text(wanted, "utf-8")
    return python


class Models:
    """Narrow models with the real depths, vocabulary and classes, each as diffusers saves it and as a single file."""

    def __init__(self, root: Path) -> None:
        self.bench = Bench(root)
        self.root = root
        self.made: dict[str, tuple[Path, Path]] = {}

    def saved(self, model: str) -> tuple[Path, Path]:
        """The pipeline as diffusers saves it, and the single file that we make of that."""
        if model not in self.made:
            case = MODELS[model]
            saved = self.root / f"{model}-saved"
            from_folder(self.bench.folder(case)).save_pretrained(saved)
            self.made[model] = saved, converted(saved, self.root / f"{model}-single.safetensors")
        return self.made[model]

    def for_torch(self, run: Run) -> Path:
        """What torch draws with: transformers 5 saves no tokenizer that optimum's transformers 4 can read."""
        saved, _single = self.saved(run.model)
        return saved if run.client == "diffusers" else self.bench.folder(MODELS[run.model])

    def graphs(self, run: Run) -> Path:
        name = "-".join((run.model, *(option.lstrip("-") for option in run.written), "onnx"))
        folder = self.root / name
        return folder if folder.is_dir() else converted(self.saved(run.model)[1], folder, "--to", "onnx", *run.written)


def outcome(run: Run, python: Path, models: Models) -> dict[str, Any]:
    """What the client says, or its last words."""
    folders = [str(models.graphs(run)), str(models.for_torch(run))]
    command = [python, HERE / "client.py", run.client, run.task, *folders, *(["--bind"] if run.bind else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": words[-1] if words else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def verdict(run: Run, found: dict[str, Any]) -> str:
    if "failed" in found:
        return found["failed"]  # type: ignore[no-any-return]
    if found["spread"] < LEAST_SPREAD:
        return "the picture is empty"
    return "agrees" if found["psnr"] >= LEAST_PSNR[run.precision] else "differs"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--client", choices=("diffusers", "optimum"), help="only this one")
    asked = parser.parse_args(arguments)
    runs = [run for run in RUNS if asked.client in {None, run.client}]
    root = asked.folder.resolve()
    root.mkdir(parents=True, exist_ok=True)
    python = {"diffusers": Path(sys.executable)}
    if any(run.client == "optimum" for run in runs):
        python["optimum"] = environment(root / "optimum")
    shutil.rmtree(root / "models", ignore_errors=True)
    (root / "models").mkdir()
    # Heads of 64 channels, as a single file's yaml can state them.
    oracle_support.WIDTHS["sd2"] = replace(WIDTHS["sd2"], unet=(64, 128, 192, 192))
    models, installed, wrong = Models(root / "models"), {}, 0
    print("| client | model | picture from | folder written with | PSNR | largest difference | |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        found = outcome(run, python[run.client], models)
        said = verdict(run, found)
        wrong += said != "agrees"
        figures = f"{found['psnr']:.1f} dB | {found['largest']:.1e}" if "psnr" in found else "|"
        written = (" ".join(run.written) or "defaults") + (", bound" if run.bind else "")
        print(f"| {run.client} | {run.model} | {run.task} | {written} | {figures} | {said} |", flush=True)
        installed[run.client] = found.get("installed", installed.get(run.client, {}))
    print()
    for client, versions in installed.items():
        print(f"{client}: " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    print(f"{len(runs) - wrong} of {len(runs)} agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
