"""Whole processes against cp and against the way people do it today, paired in one run.

    python benchmarks/surgery.py FOLDER [--rounds 5] [--only NAME]... [--out docs/performance-surgery.md]

FOLDER gets about 25 GB of made-up checkpoints and outputs. Every round runs every contender once, in random order,
with the inputs in the page cache and nothing else waiting to be written; a ratio is the median over the rounds of
the ratio within a round. Peak memory is the kernel's own figure for the process (ru_maxrss), mapped pages included.
"""

from __future__ import annotations

import os
import random
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

import sdsurgery as sd
from sdsurgery.sources import FileSlice

HERE = Path(__file__).resolve().parent
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
SDSURGERY = [sys.executable, "-m", "sdsurgery"]


@dataclass(frozen=True)
class Contender:
    """A command, what it must do before each run, and what it leaves behind."""

    name: str
    command: list[str]
    output: Path | None = None
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Race:
    """Contenders on the same work; the first is what the others are measured against."""

    name: str
    contenders: list[Contender]
    warm: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    seconds: float
    peak: int


def measure(contender: Contender) -> Run:
    """One whole process."""
    contender.prepare()
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(contender.command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if contender.output:
        contender.output.unlink(missing_ok=True)
    if process.returncode:
        raise SystemExit(f"{contender.name} failed with {process.returncode}: {contender.command}")
    return Run(seconds, usage.ru_maxrss * 1024)


def warm(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass


def race(entry: Race, rounds: int) -> list[str]:
    """Run it and give the rows of its table."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in entry.contenders}
    for _ in range(rounds):
        warm(entry.warm)
        for contender in random.sample(entry.contenders, len(entry.contenders)):
            runs[contender.name].append(measure(contender))
    base = runs[entry.contenders[0].name]
    rows = []
    for name, measured in runs.items():
        ratio = statistics.median(run.seconds / against.seconds for run, against in zip(measured, base, strict=True))
        seconds = sorted(run.seconds for run in measured)
        peak = max(run.peak for run in measured) / (1 << 20)
        rows.append(
            f"| {name} | {statistics.median(seconds):.2f} s | {seconds[0]:.2f} to {seconds[-1]:.2f} s "
            f"| {ratio:.2f} | {peak:,.0f} MiB |"
        )
    return rows


def copy(source: Path, target: Path) -> list[str]:
    return ["sh", "-c", 'cp --reflink=never "$0" "$1" && sync "$1"', str(source), str(target)]


def today(script: str, *arguments: Path) -> list[str]:
    return [sys.executable, str(HERE / "today.py"), script, *map(str, arguments)]


def break_ids(path: Path) -> Callable[[], None]:
    """Put wrong int64 ids where right ones are, so that --in-place has something to mend."""

    def prepare() -> None:
        tensor = sd.open(path)[IDS]
        assert isinstance(tensor.data, FileSlice)
        with path.open("r+b") as stream:
            stream.seek(tensor.data.offset)
            stream.write(struct.pack("<77q", *(index // 2 for index in range(77))))

    return prepare


def make(folder: Path, family: str, dtype: str, name: str, *options: str) -> Path:
    path = folder / name
    if not path.exists():
        subprocess.run(
            [sys.executable, str(HERE / "make_checkpoint.py"), family, dtype, str(path), *options], check=True
        )
    return path


def races(folder: Path) -> list[Race]:
    half = make(folder, "sd1", "fp16", "sd1-fp16.safetensors", "--ids", "merged")
    full = make(folder, "sd1", "fp32", "sd1-fp32.safetensors", "--ids", "merged")
    pickle = make(folder, "sd1", "fp32", "sd1-fp32.ckpt", "--ids", "merged")
    half_pickle = make(folder, "sd1", "fp16", "sd1-fp16.ckpt", "--ids", "merged")
    patched = make(folder, "sd1", "fp32", "sd1-in-place.safetensors", "--ids", "wrong-values")
    vae = make(folder, "sd1", "fp32", "vae.safetensors", "--seed", "5", "--only", "first_stage_model.")
    found = []
    for label, model in (
        ("fp16 safetensors, 2.1 GB", half),
        ("fp32 safetensors, 4.3 GB", full),
        ("fp16 zip .ckpt, 2.1 GB", half_pickle),
        ("fp32 zip .ckpt, 4.3 GB", pickle),
    ):
        copied, out, old = (
            folder / f"out-cp{model.suffix}",
            folder / "out.safetensors",
            folder / "out-today.safetensors",
        )
        fix = [*SDSURGERY, "fix-clip", str(model), "-o", str(out)]
        merge = [*SDSURGERY, "merge-vae", str(model), str(vae), "-o", str(out)]
        found.append(Race(label, [
            Contender("cp --reflink=never + flush", copy(model, copied), copied),
            Contender("sdsurgery fix-clip", fix, out),
            Contender("sdsurgery merge-vae", merge, out),
            Contender("today: load, edit, save_file (no flush)", today("fix", model, old), old),
        ], [model, vae]))  # fmt: skip
    found.append(Race("fix-clip --in-place, 4.3 GB", [
        Contender("sdsurgery fix-clip --in-place", [*SDSURGERY, "fix-clip", "--in-place", str(patched)],
                  prepare=break_ids(patched)),
    ]))  # fmt: skip
    found.append(Race("questions", [
        Contender("python -c pass", [sys.executable, "-c", "pass"]),
        Contender("sdsurgery --help", [*SDSURGERY, "--help"]),
        Contender("sdsurgery inspect, safetensors 4.3 GB", [*SDSURGERY, "inspect", str(full)]),
        Contender("sdsurgery inspect, .ckpt 4.3 GB", [*SDSURGERY, "inspect", str(pickle)]),
        Contender("sdsurgery inspect --json, safetensors 4.3 GB", [*SDSURGERY, "inspect", "--json", str(full)]),
    ]))  # fmt: skip
    found.append(Race("hashes, 2.1 GB", [
        Contender("hashlib, zlib and blake3 in parallel", today("hash", half)),
        Contender("sdsurgery inspect --hash", [*SDSURGERY, "inspect", "--hash", str(half)]),
    ], [half]))  # fmt: skip
    return found


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", multiple=True, help="Only races whose name contains this.")
def main(folder: Path, rounds: int, only: tuple[str, ...]) -> None:
    """Run the races and print their tables in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in races(folder):
        if only and not any(word in entry.name for word in only):
            continue
        print(f"\n**{entry.name}** ({rounds} rounds)\n")
        print("| | median | range | ratio | peak memory |\n|---|---|---|---|---|")
        print("\n".join(race(entry, rounds)), flush=True)


if __name__ == "__main__":
    main()
