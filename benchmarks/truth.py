"""diff, fingerprint, manifest and verify against cmp, hashlib and NumPy.

    python benchmarks/truth.py FOLDER [--rounds 5] [--only NAME]...

FOLDER gets about 7 GB of made-up checkpoints; how it is measured stands in racing.py.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from racing import SDSURGERY, Contender, Race, command, make, today


def races(folder: Path) -> list[Race]:
    one = make(folder, "sd1", "fp16", "sd1-fp16.safetensors", "--ids", "right")
    other = make(folder, "sd1", "fp16", "sd1-other.safetensors", "--ids", "right", "--seed", "3")
    twin, listed, model = folder / "sd1-twin.safetensors", folder / "sd1.manifest.json", folder / "sd1-truth"
    if not twin.exists():
        shutil.copy(one, twin)
    if not model.exists():
        subprocess.run([*SDSURGERY, "convert", str(one), str(model), "--quiet"], check=True)
    subprocess.run([*SDSURGERY, "manifest", str(one), "-o", str(listed), "--force", "--quiet"], check=True)
    warm = [one, other, twin]
    return [
        Race("diff of equal files, 2.1 GB each", [
            Contender("cmp", ["cmp", str(one), str(twin)]),
            Contender("sdsurgery diff", [*SDSURGERY, "diff", str(one), str(twin)]),
            Contender("sdsurgery diff, against the diffusers folder", [*SDSURGERY, "diff", str(one), str(model)]),
        ], warm),
        Race("diff of different files with all figures, 2.1 GB each", [
            Contender("NumPy, mapped, two threads", today("diff", one, other)),
            Contender("sdsurgery diff", ["sh", "-c", f"{' '.join(SDSURGERY)} diff {one} {other} || true"]),
        ], warm),
        Race("digests, 2.1 GB", [
            Contender("hashlib and blake3, mapped, two threads", today("digests", one)),
            Contender("sdsurgery manifest", [*SDSURGERY, "manifest", str(one)]),
            Contender("sdsurgery verify --manifest", [*SDSURGERY, "verify", str(one), "--manifest", str(listed)]),
            Contender("sdsurgery fingerprint", [*SDSURGERY, "fingerprint", str(one)]),
        ], warm),
    ]  # fmt: skip


if __name__ == "__main__":
    command(races)()
