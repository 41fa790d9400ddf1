"""Merging against reading and copying, and against the way people do it today.

    python benchmarks/merge.py FOLDER [--rounds 5] [--only NAME]...

FOLDER gets about 15 GB of made-up checkpoints and outputs; how it is measured stands in racing.py.
"""

from __future__ import annotations

from pathlib import Path

from racing import SDSURGERY, Contender, Race, command, make, today


def read_and_copy(paths: list[Path], target: Path) -> list[str]:
    """Read all, and write one with a flush: the least that any merge must do."""
    names = [str(path) for path in paths]
    script = 'out="$1"; shift; cat "$@" > /dev/null; cp --reflink=never "$1" "$out" && sync "$out"'
    return ["sh", "-c", script, "sh", str(target), *names]


def races(folder: Path) -> list[Race]:
    models = [make(folder, "sd1", "fp16", f"merge-{seed}.safetensors", "--seed", str(seed)) for seed in range(4)]
    copied, out, old = (folder / f"out-{name}.safetensors" for name in ("copied", "merged", "today"))
    found = []
    for label, count, words in (
        ("weighted-sum of two", 2, ["--alpha", "0.3"]),
        ("add-difference of three", 3, ["--method", "add-difference"]),
        ("linear of four", 4, ["--method", "linear"]),
        ("slerp of two", 2, ["--method", "slerp"]),
        ("ties of two", 2, ["--method", "ties"]),
        ("ties of four", 4, ["--method", "ties"]),
        ("dare of two", 2, ["--method", "dare"]),
    ):
        given = models[:count]
        merge = [*SDSURGERY, "merge", *map(str, given), *words, "-o", str(out)]
        contenders = [
            Contender("cat of all, cp of one + flush", read_and_copy(given, copied), copied),
            Contender("sdsurgery merge", merge, out),
        ]
        if label.startswith("weighted-sum"):
            contenders.append(Contender("torch, both loaded", today("merge", *given, old), old))
        found.append(Race(f"{label}, SD1.5 fp16, 2.1 GB each", contenders, given))
    return found


if __name__ == "__main__":
    command(races)()
