"""Whole processes against each other, paired in one run; what the benchmarks share.

Every round runs every contender once, in random order, with the inputs in the page cache and nothing else waiting to
be written; a ratio is the median over the rounds of the ratio within a round. Peak memory is the kernel's own figure
for the process (ru_maxrss), mapped pages included.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
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
    if contender.output and contender.output.is_dir():
        shutil.rmtree(contender.output)
    elif contender.output:
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


def make(folder: Path, family: str, dtype: str, name: str, *options: str) -> Path:
    path = folder / name
    if not path.exists():
        subprocess.run(
            [sys.executable, str(HERE / "make_checkpoint.py"), family, dtype, str(path), *options], check=True
        )
    return path


def command(races: Callable[..., Iterable[Race]], *options: Callable[[Any], Any]) -> click.Command:
    """The command of a benchmark, which runs its races and prints their tables in Markdown.

    ``races`` gets the folder, and by name what further options say.
    """

    @click.command()
    @click.argument("folder", type=click.Path(path_type=Path))
    @click.option("--rounds", default=5, show_default=True)
    @click.option("--only", multiple=True, help="Only races whose name contains this.")
    def main(folder: Path, rounds: int, only: tuple[str, ...], **more: Any) -> None:
        """Run the races and print their tables in Markdown."""
        folder.mkdir(parents=True, exist_ok=True)
        for entry in races(folder, **more):
            if only and not any(word in entry.name for word in only):
                continue
            print(f"\n**{entry.name}** ({rounds} rounds)\n")
            print("| | median | range | ratio | peak memory |\n|---|---|---|---|---|")
            print("\n".join(race(entry, rounds)), flush=True)

    for option in options:
        main = option(main)
    return main
