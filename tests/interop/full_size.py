"""Proves at full size that our ONNX graphs compute what diffusers and transformers compute in torch.

    python tests/interop/full_size.py FOLDER [--family sd1|sdxl] [--checkpoint FILE] [--memory 14]

FOLDER gets a checkpoint of random fp16 weights, unless one is named, and two folders made of it (9 GB for SD1, 29 GB
for SDXL); only the checkpoint is kept. Needs the project's environment with the extra ``test``, and Linux, whose kernel
says what a process held at most. No part of the tests, which make nothing of this size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPONENTS = {
    "sd1": ("text_encoder", "unet", "vae_encoder", "vae_decoder"),
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder"),
}
FOLDERS = {"fp32": ("--compute", "fp32"), "plain": ()}
"""How the graphs are asked for."""

BOUND = {"fp32": 1e-4, "fp16": 5e-2}
"""The largest difference, as a share of the reference's largest value."""

LEAST_MOVED = 0.01
"""What another value of one input must change: a network that ignored it would agree with anything."""

SPREAD = 0.04
"""The deviation of the made checkpoint's values."""

NEEDS = 3.6
"""Bytes that a session with ONNX Runtime's own settings needs for a byte of halves."""

TOKENS, END = 49408, 49407
WAVES = 256
TEXTS = ((1, 77), (2, 77), (2, 11))
"""Batch and tokens."""

LATENTS = ((1, 8, 9, 77), (2, 15, 7, 77), (2, 8, 8, 154), (1, 64, 64, 77))
"""Batch, height, width and, for a UNet, tokens."""

Arrays = dict[str, np.ndarray[Any, Any]]


# ---------------------------------------------------------------- what is converted


def _alive(key: str, tensor: Any, size: int) -> Iterator[Any]:
    """A tensor's values, scaled as trained ones are, so that a signal comes through every layer."""
    from sdsurgery.sources import InMemory

    values = tensor.numpy()
    if key.endswith("weight") and values.ndim == 1:
        values = 1 + 5 * values.astype(np.float32)
    elif values.ndim > 1 and "embedding" not in key and values.dtype.kind == "f":
        values = values.astype(np.float32) / (SPREAD * np.sqrt(np.prod(values.shape[1:])))
    yield from InMemory(values.astype(tensor.dtype.to_numpy()).tobytes()).chunks(size)


def scaled(source: Path, target: Path) -> None:
    """The same checkpoint with values that neither die away nor overflow."""
    import sdsurgery as sd
    from sdsurgery.sources import Computed

    made = {
        key: sd.Tensor(value.dtype, value.shape, Computed(value.nbytes, partial(_alive, key, value)))
        for key, value in sd.open(source).items()
    }
    sd.Checkpoint(made, {"format": "pt"}).save(target, force=True)


def graphs(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """The folders that the real command line makes."""
    found = {}
    for name, options in FOLDERS.items():
        found[name] = folder / name
        words = ["convert", checkpoint, found[name], "--to", "onnx", "--no-hard-links", "--quiet", *options]
        subprocess.run([sys.executable, "-m", "sdsurgery", *map(str, words)], check=True)
    return found


# ---------------------------------------------------------------- what both sides are given


def _config(folder: Path, component: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / component / "config.json").read_text("utf-8"))
    return found


def _tokens(chance: np.random.Generator, batch: int, sequence: int) -> np.ndarray[Any, Any]:
    """Prompts that end at different places."""
    found = chance.integers(1, END - 1, (batch, sequence))
    for row in range(batch):
        place = int(chance.integers(sequence // 2, sequence))
        found[row, place:] = 0 if row % 2 else END
        found[row, place] = END
    return found


def _for_unet(chance: np.random.Generator, config: Mapping[str, Any], size: Sequence[int]) -> Arrays:
    batch, height, width, sequence = size
    given: dict[str, Any] = {
        "sample": chance.standard_normal((batch, config["in_channels"], height, width)),
        "timestep": np.array(float(chance.integers(1, 1000))),
        "encoder_hidden_states": chance.standard_normal((batch, sequence, config["cross_attention_dim"])),
    }
    if config.get("addition_embed_type"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * WAVES
        given["text_embeds"] = chance.standard_normal((batch, pooled))
        given["time_ids"] = chance.integers(0, 1024, (batch, 6)).astype(float)
    return given


def inputs(folder: Path, component: str) -> list[Arrays]:
    """What every case is given; the values are halves, so that graphs of either type take the same."""
    config, found = _config(folder, component), []
    for number, size in enumerate(TEXTS if component.startswith("text") else LATENTS):
        chance = np.random.default_rng(number)
        given: dict[str, Any]
        if component.startswith("text"):
            found.append({"input_ids": _tokens(chance, *size)})
            continue
        if component == "unet":
            given = _for_unet(chance, config, size)
        elif component == "vae_encoder":
            pixels = (size[0], config["in_channels"], size[1] * 8, size[2] * 8)
            given = {"sample": chance.uniform(-1, 1, pixels)}
        else:
            given = {"latent_sample": chance.standard_normal((size[0], config["latent_channels"], *size[1:3]))}
        found.append({name: value.astype(np.float16) for name, value in given.items()})
    return found


def _others(name: str, given: Arrays) -> Arrays:
    """The same with another value of one input; of tokens, only the second."""
    chance, value = np.random.default_rng(99), given[name]
    if name == "input_ids":
        other = value.copy()
        other[:, 1] = TOKENS - 1 - other[:, 1]
    elif name == "timestep":
        other = np.asarray(1000 - value)
    else:
        other = chance.permuted(value.reshape(-1)).reshape(value.shape)
    return given | {name: other.astype(value.dtype)}


# ---------------------------------------------------------------- one process each


def _held(what: str) -> int:
    """What the kernel says that this process holds."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


class Memory(threading.Thread):
    """Watches how much this process holds: in all, mapped pages of files included, and without those."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = 0

    def run(self) -> None:
        while True:
            self.own = max(self.own, _held("RssAnon"))
            time.sleep(0.05)

    def peaks(self) -> dict[str, int]:
        return {"peak": _held("VmHWM"), "own": self.own}


def _module(folder: Path, component: str) -> Any:
    """What diffusers or transformers makes of a component of the folder, in fp32."""
    import diffusers
    import torch
    import transformers

    config = _config(folder, component)
    kind = (
        getattr(diffusers, config["_class_name"])
        if "_class_name" in config
        else getattr(transformers, config["architectures"][0])
    )
    return kind.from_pretrained(folder, subfolder=component, torch_dtype=torch.float32, local_files_only=True).eval()


def _unlike(module: Any, file: Path) -> list[str]:
    """The weights that are missing, too many, or differ in a bit from those in the file."""
    import torch
    from safetensors import safe_open

    loaded = {key: value for key, value in module.state_dict().items() if not key.endswith("position_ids")}
    with safe_open(file, "pt") as stored:
        names = {key: key for key in stored.keys()}  # noqa: SIM118 - it is no mapping
        if not any(key.startswith("text_model.") for key in loaded):  # transformers 5.6 and later
            names = {key.removeprefix("text_model."): key for key in names}
        wrong = list(loaded.keys() ^ names.keys())
        for key in loaded.keys() & names.keys():
            wanted = stored.get_tensor(names[key]).float()
            same = loaded[key].dtype == torch.float32 and loaded[key].shape == wanted.shape
            if not same or not torch.equal(loaded[key].view(torch.int32), wanted.view(torch.int32)):
                wrong.append(key)
    return sorted(wrong)


def _computed(module: Any, component: str, given: Arrays) -> Arrays:
    """A component's outputs by the names that our graphs have for them."""
    import torch

    whole = {key: torch.from_numpy(value) for key, value in given.items()}
    real = {key: value.float() for key, value in whole.items()}
    with torch.no_grad():
        if component == "vae_encoder":
            found = {"latent_parameters": module.encode(real["sample"]).latent_dist.parameters}
        elif component == "vae_decoder":
            found = {"sample": module.decode(real["latent_sample"]).sample}
        elif component == "unet":
            plain = {key: real.pop(key) for key in ("sample", "timestep", "encoder_hidden_states")}
            found = {"out_sample": module(**plain, added_cond_kwargs=real).sample}
        else:
            made = module(input_ids=whole["input_ids"], output_hidden_states=True)
            names = {"last_hidden_state", "pooler_output", "text_embeds"} & made.keys()
            found = {name: made[name] for name in names}
            found |= {f"hidden_states.{number}": value for number, value in enumerate(made.hidden_states)}
    return {name: value.numpy() for name, value in found.items()}


def _apart(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> dict[str, float]:
    """The largest difference and the PSNR, both of the reference's largest value."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape} is no {theirs.shape}")
    if not np.isfinite(ours).all() or not np.isfinite(theirs).all() or not theirs.any():
        raise ValueError("a value is not finite, or all are zero")
    difference, largest = ours.astype(np.float64) - theirs, float(np.abs(theirs).max())
    error = max(float(np.sqrt((difference**2).mean())), 1e-30)
    return {"largest": float(np.abs(difference).max()) / largest, "psnr": float(20 * np.log10(largest / error))}


def by_torch(folder: Path, component: str, results: Path) -> dict[str, Any]:
    """Keeps what torch computes; says whether the weights are those of the file, and what each input changes."""
    begun = time.perf_counter()
    stored = "vae" if component.startswith("vae") else component
    module = _module(folder, stored)
    seconds = time.perf_counter() - begun
    (file,) = (folder / stored).glob("*.safetensors")
    unlike, cases = _unlike(module, file), inputs(folder, component)
    outputs = [_computed(module, component, given) for given in cases]
    moved = {}
    for name in cases[0]:
        other = _computed(module, component, _others(name, cases[0]))
        moved[name] = min(
            _apart(other[key], value)["largest"] for key, value in outputs[0].items() if key != "hidden_states.0"
        )
    kept = {f"{number}/{key}": value for number, case in enumerate(outputs) for key, value in case.items()}
    np.savez(results, **kept)
    return {"seconds": seconds, "unlike": unlike, "weights": len(module.state_dict()), "moved": moved}


def by_runtime(folder: Path, component: str, results: Path, level: str) -> dict[str, Any]:
    """How far a graph is from what torch computed, at worst."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if level == "off":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    begun = time.perf_counter()
    graph = str(folder / component / "model.onnx")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    seconds, names = time.perf_counter() - begun, [value.name for value in session.get_outputs()]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    taken = {value.name: types[value.type] for value in session.get_inputs()}
    references, apart = np.load(results), []
    for number, given in enumerate(inputs(folder, component)):
        assert given.keys() == taken.keys(), f"{given.keys()} is not {taken.keys()}"
        made = session.run(names, {name: value.astype(taken[name]) for name, value in given.items()})
        apart += [_apart(ours, references[f"{number}/{name}"]) for name, ours in zip(names, made, strict=True)]
    return {
        "seconds": seconds,
        "computes": {"tensor(float)": "fp32", "tensor(float16)": "fp16"}[session.get_outputs()[0].type],
        "largest": max(each["largest"] for each in apart),
        "psnr": min(each["psnr"] for each in apart),
    }


def one(words: Sequence[str]) -> dict[str, Any]:
    """What a process of its own is for."""
    memory = Memory()
    memory.start()
    folder, component, results = Path(words[1]), words[2], Path(words[3])
    if words[0] == "torch":
        return by_torch(folder, component, results) | memory.peaks()
    return by_runtime(folder, component, results, words[4]) | memory.peaks()


def apart_from_this(*words: object) -> dict[str, Any]:
    """What such a process says, or its last words."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    command = [sys.executable, __file__, "one", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | quiet)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": said[-1] if said else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------- what is said


@dataclass(frozen=True)
class Row:
    """A line of a table, and whether it says that something is wrong."""

    cells: tuple[str, ...]
    wrong: bool = False

    def __str__(self) -> str:
        return f"| {' | '.join(self.cells)} |"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _costs(found: Mapping[str, Any]) -> tuple[str, str]:
    return f"{found['seconds']:.1f} s", f"{_gigabytes(found['peak'])}, {_gigabytes(found['own'])}"


def printed(heading: str, rows: Iterable[Row]) -> int:
    """Print a table as its rows come, and count what is wrong."""
    print(f"\n| {heading} |\n|{'---|' * (heading.count('|') + 1)}")
    wrong = 0
    for row in rows:
        print(row, flush=True)
        wrong += row.wrong
    return wrong


def checked(made: Mapping[str, Path]) -> Iterator[Row]:
    """What the graphs add beside the weights, and what the onnx package says of them."""
    import onnx

    for name, folder in made.items():
        found, said = sorted(folder.glob("*/model.onnx")), []
        for path in found:
            try:
                onnx.checker.check_model(str(path), full_check=True)
            except Exception as error:
                said.append(f"{path.parent.name}: {error}".partition("\n")[0])
        sizes = ", ".join(f"{path.parent.name} {path.stat().st_size:,}" for path in found)
        weights = sum(file.stat().st_size for file in folder.glob("*/*.safetensors") if not _of_graph(file))
        total = f"{sum(path.stat().st_size for path in found):,}"
        options = " ".join(FOLDERS[name]) or "defaults"
        yield Row((options, _gigabytes(weights), total, sizes, "; ".join(said) or "passes"), bool(said))


def _of_graph(file: Path) -> bool:
    """Whether it is the VAE's file under a further name."""
    return file.parent.name in {"vae_encoder", "vae_decoder"}


def referenced(folder: Path, components: Iterable[str], results: Path) -> Iterator[Row]:
    """What torch makes of each component."""
    for component in components:
        found = apart_from_this("torch", folder, component, results / f"{component}.npz")
        if "failed" in found:
            yield Row((component, "", "", "", "", found["failed"]), True)
            continue
        moved = ", ".join(f"{name} {share:.2f}" for name, share in found["moved"].items())
        numb = [name for name, share in found["moved"].items() if share < LEAST_MOVED]
        said = [f"{len(found['unlike'])} weights differ"] if found["unlike"] else []
        said += [f"{name} changes nothing" for name in numb]
        cells = component, *_costs(found), str(found["weights"]), moved
        yield Row((*cells, "; ".join(said) or "equal"), bool(said))


def compared(family: str, made: Mapping[str, Path], results: Path, memory: float) -> Iterator[Row]:
    """How far each graph is from torch."""
    for name, folder in made.items():
        for component in COMPONENTS[family]:
            weights = sum(file.stat().st_size for file in (folder / component).glob("*.safetensors"))
            level = "off" if weights * NEEDS > memory * 1e9 else "default"
            found = apart_from_this("onnx", folder, component, results / f"{component}.npz", level)
            if "failed" in found:
                yield Row((component, "", "", "", "", "", "", found["failed"]), True)
                continue
            widened = name == "fp32" or (family, component) == ("sdxl", "vae_decoder")
            expected = "fp32" if widened else "fp16"
            agrees = found["computes"] == expected and found["largest"] <= BOUND[expected]
            apart = f"{found['largest']:.1e}", f"{found['psnr']:.1f} dB"
            cells = component, found["computes"], level, *_costs(found), *apart, "agrees" if agrees else "differs"
            yield Row(cells, not agrees)


def alike(one_folder: Path, other: Path) -> bool:
    """Whether they have the same weights; the files' metadata tell how each was made."""
    names, others = ({file.relative_to(at) for file in at.glob("*/*.safetensors")} for at in (one_folder, other))
    return names == others and all(_same(one_folder / name, other / name) for name in names)


def _same(one_file: Path, other: Path) -> bool:
    from safetensors import safe_open

    with safe_open(one_file, "np") as ours, safe_open(other, "np") as theirs:
        pairs = ((ours.get_tensor(key), theirs.get_tensor(key)) for key in ours.keys())  # noqa: SIM118
        return set(ours.keys()) == set(theirs.keys()) and all(
            mine.dtype == yours.dtype and mine.shape == yours.shape and mine.tobytes() == yours.tobytes()
            for mine, yours in pairs
        )


def proved(family: str, checkpoint: Path, folder: Path, memory: float) -> int:
    """Make everything of one family, compare it and throw it away; count what is wrong."""
    print(f"\n**{family}**")
    alive, results = folder / "alive.safetensors", folder / "results"
    results.mkdir()
    scaled(checkpoint, alive)
    made = graphs(alive, folder)
    wrong = printed("folder written with | weights | graphs, bytes | of which | onnx's checker", checked(made))
    same = alike(*made.values())
    print(f"\nBoth folders have {'the same' if same else 'DIFFERENT'} weights.")
    heading = "component | loaded in | peak memory, its own | tensors | what another value of one input changes |"
    wrong += printed(heading, referenced(made["fp32"], COMPONENTS[family], results))
    heading = "component | computes in | optimizer | session | peak memory, its own | largest difference | PSNR |"
    return wrong + (not same) + printed(heading, compared(family, made, results, memory))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=tuple(COMPONENTS), help="only this one")
    parser.add_argument("--checkpoint", type=Path, help="one that benchmarks/make_checkpoint.py made of that family")
    parser.add_argument("--memory", type=float, default=14, help="in GB; graphs that need more are not optimized")
    asked = parser.parse_args(arguments)
    if asked.checkpoint and not asked.family:
        parser.error("--checkpoint needs --family")
    root = asked.folder.resolve()
    root.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "fixtures"), str(ROOT)]
    import racing

    wrong = 0
    for family in [asked.family] if asked.family else COMPONENTS:
        name = f"{family}-fp16.safetensors"
        checkpoint = asked.checkpoint or racing.make(root, family, "fp16", name, "--ids", "right")
        work = root / f"{family}-full-size"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            wrong += proved(family, checkpoint, work, asked.memory)
        finally:
            shutil.rmtree(work)
    print(f"\n{wrong} wrong" if wrong else "\nall agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(sys.argv[2:])))
    else:
        sys.exit(main())
