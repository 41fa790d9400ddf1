"""Surgery against cp and against the way people do it today.

    python benchmarks/surgery.py FOLDER [--rounds 5] [--only NAME]...

FOLDER gets about 25 GB of made-up checkpoints and outputs; how it is measured stands in racing.py.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

from racing import SDSURGERY, Contender, Race, command, copy, make, today

import sdsurgery as sd
from sdsurgery.sources import FileSlice

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def break_ids(path: Path) -> Callable[[], None]:
    """Put wrong int64 ids where right ones are, so that --in-place has something to mend."""

    def prepare() -> None:
        tensor = sd.open(path)[IDS]
        assert isinstance(tensor.data, FileSlice)
        with path.open("r+b") as stream:
            stream.seek(tensor.data.offset)
            stream.write(struct.pack("<77q", *(index // 2 for index in range(77))))

    return prepare


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


if __name__ == "__main__":
    command(races)()
