"""Conversion between the layouts against cp and against diffusers.

    python benchmarks/convert.py FOLDER [--rounds 5] [--only NAME]...

FOLDER gets about 40 GB of made-up checkpoints and outputs; how it is measured stands in racing.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from racing import SDSURGERY, Contender, Race, command, copy, make, today


def races(folder: Path) -> list[Race]:
    found = []
    for family, size in (("sd1", "2.1 GB"), ("sdxl", "6.9 GB")):
        single = make(folder, family, "fp16", f"{family}-fp16.safetensors", "--ids", "right")
        model = folder / f"{family}-folder"
        if not model.exists():
            subprocess.run([*SDSURGERY, "convert", str(single), str(model), "--sidecar", "--quiet"], check=True)
        copied, out, back = folder / "out-cp.safetensors", folder / "out-folder", folder / "out.safetensors"
        plain = folder / f"{family}-plain"
        if not plain.exists():  # the same weights without a sidecar beside them
            shutil.copytree(model, plain, copy_function=os.link)
        found.append(Race(f"{family}, {size}, to a folder", [
            Contender("cp --reflink=never + flush", copy(single, copied), copied),
            Contender("sdsurgery convert", [*SDSURGERY, "convert", str(single), str(out), "--quiet"], out),
            Contender("diffusers: from_single_file, save_pretrained (no flush)",
                      today("to-folder", single, model, folder / "out-diffusers"), folder / "out-diffusers"),
        ], [single]))  # fmt: skip
        found.append(Race(f"{family}, {size}, to a single file", [
            Contender("cp --reflink=never + flush", copy(single, copied), copied),
            Contender("sdsurgery convert", [*SDSURGERY, "convert", str(plain), str(back), "--quiet"], back),
            Contender("sdsurgery convert, restored with its sidecar",
                      [*SDSURGERY, "convert", str(model), str(back), "--sidecar", "--quiet"], back),
            Contender("the work of diffusers' script: load, rename, save_file (no flush)",
                      today("to-file", model, folder / "out-today.safetensors"), folder / "out-today.safetensors"),
        ], [single, *sorted(model.glob("*/*.safetensors"))]))  # fmt: skip
    return found


if __name__ == "__main__":
    command(races)()
