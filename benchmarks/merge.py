"""Merging against reading and copying, and against the way people do it today.

    python benchmarks/merge.py FOLDER [--rounds 5] [--only NAME]... [--peers PYTHON]

FOLDER gets about 15 GB of made-up checkpoints and outputs; how it is measured stands in racing.py. Other people's tools
take part with the Python of an environment that peers/requirements.txt is installed in.
"""

from __future__ import annotations

from pathlib import Path

import click
from racing import HERE, SDSURGERY, Contender, Race, command, make, today


def read_and_copy(paths: list[Path], target: Path) -> list[str]:
    """Read all, and write one with a flush: the least that any merge must do."""
    names = [str(path) for path in paths]
    script = 'out="$1"; shift; cat "$@" > /dev/null; cp --reflink=never "$1" "$out" && sync "$out"'
    return ["sh", "-c", script, "sh", str(target), *names]


def peers_contenders(python: Path, one: Path, other: Path, output: Path) -> list[Contender]:
    """Other people's tools on the weighted sum of two."""
    script = str(HERE / "peers" / "merging.py")
    files = [str(one), str(other), str(output)]
    return [
        Contender(name, [str(python), script, tool, "weighted-sum", *files, *words], output)
        for name, tool, words in (
            ("sd-meh", "sd-meh", ["--threads", "2"]),
            ("mergekit-pytorch", "mergekit", []),
            ("sd-mecha as it comes", "sd-mecha", []),
            ("sd-mecha, four threads, nothing checked", "sd-mecha", ["--threads", "4", "--unchecked"]),
        )
    ]


def races(folder: Path, peers: Path | None = None) -> list[Race]:
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
            contenders += peers_contenders(peers.absolute(), *given, old) if peers else []
        found.append(Race(f"{label}, SD1.5 fp16, 2.1 GB each", contenders, given))
    return found


if __name__ == "__main__":
    tools = click.option(
        "--peers", type=click.Path(path_type=Path), metavar="PYTHON", help="Of the environment that has other tools."
    )
    command(races, tools)()
