"""convert --to onnx against cp, and the graphs' own speed on ONNX Runtime against torch's legacy exporter.

    python benchmarks/onnx_graphs.py FOLDER [--rounds 3] [--only NAME]...

FOLDER gets a full-size SD1.5 checkpoint of random fp16 weights, folders made of it, and for "step" the UNet as torch
exports it, folded, in fp32 (about 12 GB in all). A step is one call with 64 x 64 latents and 77 tokens; each process
makes its session and takes a few steps, the processes of a round one after another in random order.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import click
from racing import SDSURGERY, Contender, Race, copy, make, race, today

STEPS = 5


def conversions(folder: Path) -> list[Race]:
    races = []
    for family, size in (("sd1", "2.1"), ("sdxl", "6.9")):
        source = make(folder, family, "fp16", f"{family}-fp16.safetensors", "--ids", "right")
        target, plain = folder / f"{family}-onnx", folder / f"{family}-copy.safetensors"
        convert = [*SDSURGERY, "convert", str(source), str(target), "--to", "onnx", "--quiet"]
        contenders = [
            Contender("cp --reflink=never + flush", copy(source, plain), plain),
            Contender("sdsurgery convert --to onnx", convert, target),
            Contender("... --weights external", [*convert, "--weights", "external"], target),
        ]
        if family == "sd1":
            loaded, exported = folder / "sd1-folder", folder / "sd1-exported"
            if not loaded.exists():
                subprocess.run([*SDSURGERY, "convert", str(source), str(loaded), "--quiet"], check=True)
            by_torch = Contender(
                "torch exports the loaded pipeline", today("export-pipeline", loaded, exported), exported
            )
            contenders.append(by_torch)
        races.append(Race(f"convert {family}, {size} GB, to ONNX", contenders, [source]))
    return races


def step(path: Path, size: int) -> dict[str, float]:
    """Seconds for the session, and the median of a few steps."""
    import time

    import numpy as np
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    begun = time.perf_counter()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    made = time.perf_counter() - begun
    random_numbers = np.random.default_rng(0)
    feed = {
        "sample": random_numbers.standard_normal((1, 4, size, size), np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": random_numbers.standard_normal((1, 77, 768), np.float32),
    }
    seconds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - begun)
    return {"session": made, "step": statistics.median(seconds)}


def graphs(folder: Path) -> dict[str, Path]:
    """The same UNet by name of the graph."""
    source = make(folder, "sd1", "fp16", "sd1-fp16.safetensors", "--ids", "right")
    found = {}
    wide = folder / "sd1-fp32"
    if not wide.exists():
        subprocess.run([*SDSURGERY, "convert", str(source), str(wide), "--dtype", "fp32", "--quiet"], check=True)
    legacy = folder / "legacy" / "model.onnx"
    if not legacy.exists():
        legacy.parent.mkdir(exist_ok=True)
        subprocess.run(today("export-unet", wide / "unet", legacy), check=True)
    found["torch's legacy exporter, folded, opset 17"] = legacy
    for opset in (17, 21, 23):
        target = folder / f"sd1-onnx-{opset}"
        if not target.exists():
            words = ["convert", str(wide), str(target), "--to", "onnx", "--opset", str(opset), "--quiet"]
            subprocess.run([*SDSURGERY, *words], check=True)
        found[f"sdsurgery, opset {opset}"] = target / "unet" / "model.onnx"
    fused = folder / "sd1-onnx-fused"
    if not fused.exists():
        subprocess.run(
            [*SDSURGERY, "convert", str(wide), str(fused), "--to", "onnx", "--optimize", "--quiet"], check=True
        )
    found["sdsurgery --optimize"] = fused / "unet" / "model.onnx"
    return found


def steps(folder: Path, rounds: int, size: int) -> None:
    found = graphs(folder)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in found}
    for _ in range(rounds):
        for name in random.sample(list(found), len(found)):
            words = [sys.executable, __file__, "one", str(found[name]), str(size)]
            runs[name].append(json.loads(subprocess.run(words, capture_output=True, check=True).stdout))
    base = next(iter(runs.values()))
    print(f"\n**a step of SD1.5's UNet, fp32, {size} x {size} latents, ONNX Runtime on the CPU** ({rounds} rounds)\n")
    print("| | session | step | ratio of steps |\n|---|---|---|---|")
    for name, measured in runs.items():
        ratio = statistics.median(run["step"] / other["step"] for run, other in zip(measured, base, strict=True))
        session, seconds = (statistics.median(run[what] for run in measured) for what in ("session", "step"))
        print(f"| {name} | {session:.1f} s | {seconds:.2f} s | {ratio:.2f} |", flush=True)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--size", default=64, show_default=True, help="Of the latents in a step.")
@click.option("--only", multiple=True, help="Only what has this in its name: convert, step.")
def main(folder: Path, rounds: int, size: int, only: tuple[str, ...]) -> None:
    """Run the races and print their tables in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in conversions(folder) if not only or any(word in "convert sd1 sdxl" for word in only) else ():
        if not only or any(word in entry.name for word in only):
            print(f"\n**{entry.name}** ({rounds} rounds)\n")
            print("| | median | range | ratio | peak memory |\n|---|---|---|---|---|")
            print("\n".join(race(entry, rounds)), flush=True)
    if not only or "step" in only:
        steps(folder, rounds, size)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(step(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
