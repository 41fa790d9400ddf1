"""LoRAs of every kind with random values, and what they come to by their definitions, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import sdsurgery as sd
from sdsurgery.adapters.naming import Module, kohya_name, names_in
from sdsurgery.models.canonical import canonical
from sdsurgery.models.identify import identify

State = dict[str, torch.Tensor]
Double = NDArray[np.float64]
Shape = tuple[int, ...]


def modules(checkpoint: sd.Checkpoint) -> list[Module]:
    return names_in(checkpoint, identify(checkpoint)).modules


def kohya(checkpoint: sd.Checkpoint, module: Module) -> str:
    return kohya_name(module, identify(checkpoint))


def shape_of(module: Module) -> Shape:
    return module.spots["weight"].shape if "weight" in module.spots else ()


def weights(checkpoint: sd.Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor by component and canonical name."""
    return {key: item.tensor.torch() for key, item in canonical(checkpoint, identify(checkpoint)).items()}


class Chance:
    """Random matrices of a seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * 0.3).to(self.dtype)


def split(size: int) -> tuple[int, int]:
    """A size as a product, the smaller factor first."""
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    return small, size // small


def lora(chance: Chance, shape: Shape, rank: int = 3) -> State:
    rows, columns, *kernel = shape
    ones = [1] * len(kernel)
    return {"lora_down.weight": chance(rank, columns, *kernel), "lora_up.weight": chance(rows, rank, *ones)}


def tucker(chance: Chance, shape: Shape, rank: int = 3) -> State:
    rows, columns, *kernel = shape
    return {
        "lora_down.weight": chance(rank, columns, 1, 1),
        "lora_mid.weight": chance(rank, rank, *kernel),
        "lora_up.weight": chance(rows, rank, 1, 1),
    }


def loha(chance: Chance, shape: Shape, rank: int = 3) -> State:
    rows, columns = shape[0], math.prod(shape[1:])
    return {
        f"hada_w{half}_{part}": chance(*size)
        for half in "12"
        for part, size in (("a", (rows, rank)), ("b", (rank, columns)))
    }


def loha_tucker(chance: Chance, shape: Shape, rank: int = 3) -> State:
    rows, columns, *kernel = shape
    sizes = {"w1_a": (rank, rows), "w1_b": (rank, columns), "t1": (rank, rank, *kernel)}
    sizes |= {"w2_a": (rank, rows), "w2_b": (rank, columns), "t2": (rank, rank, *kernel)}
    return {f"hada_{part}": chance(*size) for part, size in sizes.items()}


def _lokr(first: str, second: str) -> Callable[[Chance, Shape], State]:
    def made(chance: Chance, shape: Shape, rank: int = 2) -> State:
        (a, b), (m, n), kernel = split(shape[0]), split(shape[1]), shape[2:]
        found = {"lokr_w1": chance(a, m)}
        if first == "product":
            found = {"lokr_w1_a": chance(a, rank), "lokr_w1_b": chance(rank, m)}
        if second == "whole":
            return found | {"lokr_w2": chance(b, n, *kernel)}
        if second == "product":
            return found | {"lokr_w2_a": chance(b, rank), "lokr_w2_b": chance(rank, n * math.prod(kernel))}
        return found | {
            "lokr_w2_a": chance(rank, b),
            "lokr_w2_b": chance(rank, n),
            "lokr_t2": chance(rank, rank, *kernel),
        }

    return made


def full(chance: Chance, shape: Shape) -> State:
    return {"diff": chance(*shape), "diff_b": chance(shape[0])}


LINEAR: Mapping[str, Callable[[Chance, Shape], State]] = {
    "lora": lora,
    "loha": loha,
    "lokr": _lokr("whole", "product"),
    "lokr of two products": _lokr("product", "product"),
    "lokr of a product and a whole": _lokr("product", "whole"),
    "lokr of two wholes": _lokr("whole", "whole"),
    "full": full,
}
CONVOLUTION = {**LINEAR, "tucker": tucker, "loha tucker": loha_tucker, "lokr tucker": _lokr("whole", "tucker")}


def _double(tensors: State) -> dict[str, Double]:
    return {part: tensor.double().numpy() for part, tensor in tensors.items()}


def delta(tensors: State, shape: Shape) -> Double:
    """The difference by its definition; whatever alpha and scales say."""
    t = _double(tensors)
    if "diff" in t:
        return t["diff"]
    if "lora_mid.weight" in t:
        up, down = t["lora_up.weight"][:, :, 0, 0], t["lora_down.weight"][:, :, 0, 0]
        return np.einsum("mnkl,im,nj->ijkl", t["lora_mid.weight"], up, down)
    if "lora_up.weight" in t:
        up, down = t["lora_up.weight"], t["lora_down.weight"]
        return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(shape)
    if "hada_w1_a" in t:
        one, other = (_half(t, half, shape) for half in "12")
        return one * other
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    (_, rows), (_, columns) = split(shape[0]), split(shape[1])
    if "lokr_w2" in t:
        second = t["lokr_w2"]
    elif "lokr_t2" in t:
        second = np.einsum("ijkl,ip,jr->prkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        second = (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(rows, columns, *shape[2:])
    return np.kron(first.reshape(*first.shape, *[1] * (len(shape) - 2)), second)


def _half(t: Mapping[str, Double], half: str, shape: Shape) -> Double:
    a, b = t[f"hada_w{half}_a"], t[f"hada_w{half}_b"]
    if f"hada_t{half}" in t:
        found: Double = np.einsum("ijkl,ip,jr->prkl", t[f"hada_t{half}"], a, b)
        return found
    return (a @ b).reshape(shape)


def rank_of(tensors: State) -> int | None:
    """What alpha is divided by."""
    for part in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in tensors:
            return len(tensors[part])
    return None


def scaled(tensors: State, shape: Shape, alpha: float | None) -> Double:
    rank = rank_of(tensors)
    factor = alpha / rank if rank and alpha is not None else 1.0
    return delta(tensors, shape) * factor


def in_file(groups: Mapping[str, State], alpha: float | None = None) -> State:
    """The keys of a file, from groups by module."""
    found = {f"{module}.{part}": value for module, tensors in groups.items() for part, value in tensors.items()}
    if alpha is not None:
        found |= {f"{module}.alpha": torch.tensor(alpha) for module in groups}
    return {key: value.contiguous() for key, value in found.items()}


def assert_close(found: torch.Tensor, expected: Any, bits: int = 24, name: object = "") -> None:
    """Within a rounding or two of the result's type."""
    expected = np.asarray(expected, dtype=np.float64)
    slack = 2.0**-22 * (1 + np.abs(expected).max())
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2.0**-bits * 1.01, atol=slack, err_msg=str(name))


def chosen(checkpoint: sd.Checkpoint, needles: Sequence[str]) -> list[Module]:
    """The first module with each of these in its component and name."""
    listed = modules(checkpoint)
    return [next(m for m in listed if needle in f"{m.component}.{m.name}") for needle in needles]
