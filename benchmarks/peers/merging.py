"""One merge by one of other people's tools, by its own way in, with the environment that has it.

    python benchmarks/peers/merging.py TOOL METHOD A B [C] OUT [--dtype fp16|fp32] [--threads N] [--unchecked]

A is the first model and what differences are taken from, as in ``sdsurgery merge``; OUT is one safetensors file.
Imports nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

SHARE = 0.3
"""Alpha where it is a share."""
FACTOR = 0.7
"""Alpha where it is a factor."""
DENSITY = 0.4
"""The share of a difference that is kept."""
SEED = 0


@dataclass(frozen=True)
class Merge:
    """What is to be done.

    Attributes:
        method: As sdsurgery names it.
        models: A, B and on.
        output: A safetensors file.
        dtype: What is computed in, where the tool has the choice and isn't left to itself.
        threads: Likewise.
        unchecked: Whether sd-mecha leaves out all that it looks for besides merging.
    """

    method: str
    models: list[Path]
    output: Path
    dtype: str | None = None
    threads: int | None = None
    unchecked: bool = False


def by_mecha(merge: Merge) -> None:
    """sd-mecha: recipes of methods; it computes in fp32 and writes fp16 unless told."""
    import sd_mecha
    import torch

    a, *others = map(sd_mecha.model, merge.models)
    differences = [other - a for other in others]
    recipes: dict[str, Callable[[], Any]] = {
        "weighted-sum": lambda: sd_mecha.weighted_sum(a, *others, alpha=SHARE),
        "add-difference": lambda: sd_mecha.add_difference(a, *others, alpha=FACTOR),
        "linear": lambda: sd_mecha.n_average(a, *others),
        "slerp": lambda: sd_mecha.slerp(a, *others, alpha=SHARE),
        "ties": lambda: a + sd_mecha.ties_sum(*differences, k=DENSITY, vote_sgn=True) * FACTOR,
        "ties-count": lambda: a + sd_mecha.ties_sum(*differences, k=DENSITY) * FACTOR,
        "dare": lambda: sd_mecha.dropout(a, *others, probability=1 - DENSITY, alpha=FACTOR, seed=SEED),
        "train-difference": lambda: sd_mecha.add_difference(
            a, *others, alpha=sd_mecha.train_difference_mask(a, *others, alpha=FACTOR)
        ),
        "cosine-adaptive": lambda: sd_mecha.add_cosine_a(a, *others, alpha=SHARE),
    }
    looks = ("omit_non_finite_inputs", "check_finite_output", "validate_mm_contract", "memoize_intermediates")
    sd_mecha.merge(
        recipes[merge.method](),
        output=merge.output.absolute(),
        merge_dtype=torch.float16 if merge.dtype == "fp16" else torch.float32,
        threads=merge.threads,
        **(dict.fromkeys(looks, False) if merge.unchecked else {}),
    )


def by_meh(merge: Merge) -> None:
    """sd-meh: everything loaded; it computes in the type that the files have."""
    from sd_meh.merge import merge_models, save_model

    names, mode, numbers = {
        "weighted-sum": (("model_a", "model_b"), "weighted_sum", {"alpha": SHARE}),
        "add-difference": (("model_a", "model_b", "model_c"), "add_difference", {"alpha": FACTOR}),
        "ties": (("model_c", "model_a", "model_b"), "ties_add_difference", {"alpha": FACTOR, "beta": DENSITY}),
    }[merge.method]
    models = dict(zip(names, map(str, merge.models), strict=True))
    blocks = {name: [number] * 25 for name, number in numbers.items()}
    merged = merge_models(models, blocks, numbers, mode, threads=merge.threads or 1)
    save_model(merged, str(merge.output.with_suffix("")), "safetensors")


def by_mergekit(merge: Merge) -> None:
    """mergekit-pytorch: a configuration, and a folder of shards."""
    from mergekit.scripts.merge_raw_pytorch import main

    config = mergekit_config(merge)
    if merge.dtype:
        config |= {"dtype": {"fp16": "float16", "fp32": "float32"}[merge.dtype], "out_dtype": "float16"}
    with tempfile.TemporaryDirectory(dir=merge.output.parent) as folder:
        described = Path(folder, "merge.yaml")
        described.write_text(json.dumps(config), "utf-8")
        threads = ["--num-threads", str(merge.threads)] if merge.threads else []
        main([str(described), folder, "--random-seed", str(SEED), "--quiet", *threads], standalone_mode=False)
        (written,) = Path(folder).glob("*.safetensors")
        shutil.move(written, merge.output)


def mergekit_config(merge: Merge) -> dict[str, Any]:
    """The merge as mergekit describes it; its ``lambda`` is our alpha where that is a factor."""
    a, *others = map(str, merge.models)

    def weighted(*pairs: tuple[str, float]) -> list[dict[str, Any]]:
        return [{"model": model, "parameters": {"weight": weight, "density": DENSITY}} for model, weight in pairs]

    match merge.method:
        case "weighted-sum":
            return {"merge_method": "linear", "models": weighted((a, 1 - SHARE), (others[0], SHARE))}
        case "linear":
            return {"merge_method": "linear", "models": weighted(*((model, 1.0) for model in (a, *others)))}
        case "add-difference":
            models = weighted((a, 1.0), (others[0], FACTOR))
            return {"merge_method": "task_arithmetic", "base_model": others[1], "models": models}
        case "slerp":
            models = [{"model": model} for model in (a, *others)]
            return {"merge_method": "slerp", "base_model": a, "models": models, "parameters": {"t": SHARE}}
        case "ties" | "dare":
            models = weighted(*((model, 1.0) for model in others))
            name = {"ties": "ties", "dare": "dare_linear"}[merge.method]
            return {"merge_method": name, "base_model": a, "models": models, "parameters": {"lambda": FACTOR}}
        case _:
            raise SystemExit(f"mergekit has no {merge.method}")


TOOLS = {"sd-mecha": by_mecha, "sd-meh": by_meh, "mergekit": by_mergekit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("method")
    parser.add_argument("models", nargs="+", type=Path, metavar="A B [C] OUT")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), help="what is computed in, where the tool has the choice")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--unchecked", action="store_true", help="sd-mecha: look for nothing besides merging")
    asked = parser.parse_args()
    *models, output = asked.models
    TOOLS[asked.tool](Merge(asked.method, models, output, asked.dtype, asked.threads, asked.unchecked))


if __name__ == "__main__":
    main()
