"""Baking a LoRA against its parts, copying and matrix work, and against the way people do it today.

    python benchmarks/lora.py FOLDER [--rounds 5] [--only NAME]...

FOLDER gets about 9 GB of made-up files and outputs; how it is measured stands in racing.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from racing import SDSURGERY, Contender, Race, command, copy, make, today

import sdsurgery as sd
from sdsurgery.adapters.naming import kohya_name, names_in
from sdsurgery.models.identify import identify


def layers(checkpoint: sd.Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of the layers that kohya's trainer adapts: key and shape, by kohya's name."""
    model = identify(checkpoint)
    return {
        kohya_name(module, model): (spot.key, spot.shape)
        for module in names_in(checkpoint, model).modules
        if (spot := module.spots.get("weight")) and len(spot.shape) > 1
        if ".attentions." in module.name or ".layers." in module.name
    }


def made_up(model: Path, target: Path, rank: int) -> Path:
    """A LoRA of these layers, in fp16."""
    if target.exists():
        return target
    chance = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for name, (_, (rows, columns, *kernel)) in layers(sd.open(model)).items():
        down = chance.standard_normal((rank, columns, *kernel), dtype=np.float32)
        up = chance.standard_normal((rows, rank, *(1 for _ in kernel)), dtype=np.float32)
        tensors[f"{name}.lora_down.weight"] = (down * 0.02).astype(np.float16)
        tensors[f"{name}.lora_up.weight"] = (up * 0.02).astype(np.float16)
        tensors[f"{name}.alpha"] = np.array(rank / 2, dtype=np.float16)
    sd.Checkpoint.from_state_dict(tensors, {"format": "pt"}).save(target)
    return target


def split(model: Path, folder: Path) -> tuple[Path, Path, Path]:
    """What a LoRA leaves alone, what it changes, and the keys of that by the LoRA's names; each a file."""
    untouched, touched, names = folder / "untouched.safetensors", folder / "touched.safetensors", folder / "names.json"
    checkpoint = sd.open(model)
    keys = {name: key for name, (key, _) in layers(checkpoint).items()}
    names.write_text(json.dumps(keys))
    changed = set(keys.values())
    for path, inside in ((untouched, False), (touched, True)):
        tensors = {key: tensor for key, tensor in checkpoint.items() if (key in changed) == inside}
        sd.Checkpoint(tensors, {"format": "pt"}).save(path, force=True)
    return untouched, touched, names


def least(untouched: Path, work: list[str], target: Path) -> list[str]:
    """Copy what is untouched, do the matrix work of the rest, and flush both: the least that baking must do."""
    # One thread: on two cores that others use, too, several wait for each other longer than they work.
    script = (
        'out="$1"; cp --reflink=never "$2" "$out"; shift 2; export OMP_NUM_THREADS=1; "$@" && '
        'sync "$out" "$out.rest" && rm "$out.rest"'
    )
    return ["sh", "-c", script, "sh", str(target), str(untouched), *work, f"{target}.rest"]


def races(folder: Path) -> list[Race]:
    model = make(folder, "sd1", "fp16", "lora-model.safetensors")
    untouched, touched, names = split(model, folder)
    copied, parts, out, old = (folder / f"out-{name}.safetensors" for name in ("copied", "parts", "baked", "today"))
    found = []
    for rank in (32, 128):
        lora = made_up(model, folder / f"lora-{rank}.safetensors", rank)
        bake = [*SDSURGERY, "bake-lora", str(model), str(lora), "--scale", "0.8", "-o", str(out), "--quiet"]
        work = today("bake-lora", touched, lora, names)
        contenders = [
            Contender("cp of the untouched, matrix work of the rest, flush", least(untouched, work, parts), parts),
            Contender("cp + flush", copy(model, copied), copied),
            Contender("sdsurgery bake-lora", bake, out),
            Contender("torch, all loaded", today("bake-lora", model, lora, names, old), old),
        ]
        found.append(Race(f"LoRA of rank {rank} into SD1.5 fp16, 2.1 GB", contenders, [model, lora]))
    return found


if __name__ == "__main__":
    command(races)()
