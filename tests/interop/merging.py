"""Compares what `sdsurgery merge` writes with what other people's merge tools write, tensor by tensor.

    python -m venv PEERS && PEERS/bin/pip install -r benchmarks/peers/requirements.txt
    python tests/interop/merging.py FOLDER --peers PEERS/bin/python

FOLDER gets the models and what is merged of them. Where results differ, the formula is computed once more with the
change that is said to be the cause, and must then give the tool's result. No part of the tests, which download nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "peers"), str(ROOT / "fixtures")]

from merging import DENSITY, FACTOR, SEED, SHARE  # noqa: E402
from synthetic import SD1_IDS  # noqa: E402

from sdsurgery.merging import methods  # noqa: E402

PEER = ROOT / "benchmarks" / "peers" / "merging.py"
VAE = "first_stage_model."
State = dict[str, torch.Tensor]
Tensors = Sequence[torch.Tensor]
Explanation = Callable[[Tensors, torch.Tensor], torch.Tensor]
"""A tensor of the tool's result, from that of each model and, for what is drawn at random, the tool's own."""


# The models.


def made(folder: Path) -> list[Path]:
    """The miniature, and two models that differ from it by noise: little in some tensors, much in others."""
    first = folder / "a.safetensors"
    shutil.copy(ROOT / "fixtures" / "miniature.safetensors", first)
    paths = [first]
    for seed, name in enumerate("bc", 1):
        random = np.random.default_rng(seed)
        state = load_file(first)
        for key, value in state.items():
            if value.is_floating_point():
                shape, spread = tuple(value.shape), float(value.float().std(correction=0)) or 0.02
                noise = random.standard_normal(shape) * (random.random(shape) < 0.8)
                noise *= spread * random.choice([0.003, 0.1, 1.0])
                state[key] = (value.float() + torch.from_numpy(noise).float()).to(value.dtype)
        paths.append(folder / f"{name}.safetensors")
        save_file(state, paths[-1], metadata={"format": "pt"})
    return paths


# What is computed otherwise: our own formulas, with a change.


def of(formula: methods.Formula, compute: torch.dtype = torch.float32) -> Explanation:
    """The very formula of sdsurgery, computed in a type."""

    def explained(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
        def pieces() -> Iterator[Tensors]:
            yield [tensor.flatten().to(compute, copy=True) for tensor in tensors]

        return formula.over(pieces)(0, next(pieces()))

    return explained


def fused(total: torch.Tensor, value: torch.Tensor, factor: float) -> torch.Tensor:
    """``total + value * factor`` in fp32, rounded once: a product of two of them is exact in fp64."""
    return (total.double() + value.double() * float(np.float32(factor))).float()


def fused_mean(*weights: float) -> Explanation:
    """A weighted sum of fused multiply-adds, divided by the sum of the weights in fp32."""

    def explained(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(tensors[0].numel())
        for tensor, weight in zip(tensors, weights, strict=True):
            total = fused(total, tensor.flatten().float(), weight)
        return total / torch.tensor(weights).sum()

    return explained


def fused_step(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
    """``a + alpha * (b - a)``, fused."""
    a, b = (tensor.flatten().float() for tensor in tensors)
    return fused(a, b - a, SHARE)


def fused_steps(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
    """A mean, a model at a time: each a step of 1 / i towards the next one; from a half on torch goes from the end."""
    a, b, c = (tensor.flatten().float() for tensor in tensors)
    half = fused(b, b - a, -0.5)
    return fused(half, c - half, 1 / 3)


def fused_difference(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
    """``a + alpha * (b - c)``, fused."""
    a, b, c = (tensor.flatten().float() for tensor in tensors)
    return fused(a, b - c, FACTOR)


def task_arithmetic(compute: torch.dtype) -> Explanation:
    """``c + ((a - c) + alpha * (b - c))``: the same sum, in another order."""

    def explained(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
        a, b, c = (tensor.flatten().to(compute) for tensor in tensors)
        weights = torch.tensor([[1], [FACTOR]], dtype=compute)
        return c + (torch.stack([a - c, b - c]) * weights).sum(0)

    return explained


def slerp_of_directions(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
    """The arc between the directions, as long as the weighted sum of both lengths, however parallel they are."""
    a, b = (tensor.flatten().float() for tensor in tensors)
    ours, theirs = a / a.norm(), b / b.norm()
    angle = torch.arccos((ours * theirs).sum().clamp(-1, 1))
    found = ours * torch.sin((1 - SHARE) * angle) + theirs * torch.sin(SHARE * angle)
    found = found / torch.sin(angle) * torch.lerp(a.norm(), b.norm(), SHARE)
    return torch.lerp(a, b, SHARE) if found.isnan().any() else found


def slerp_in_fp32(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
    """The same as ours, but for the type that sums and angles are computed in; sums of 2 ** 20 elements each."""
    a, b = (tensor.reshape(1, -1).float() for tensor in tensors)

    def length(value: torch.Tensor) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in value.split(1 << 20, 1)]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return torch.where(norm > 1e-8, norm, 1)

    products = (a / length(a) * (b / length(b))).split(1 << 20, 1)
    cosine = torch.stack([part.sum(1, keepdim=True) for part in products]).sum(0).clamp(-1, 1)
    share = torch.tensor(SHARE)
    if cosine.abs() > 0.9995:
        return (1 - share) * a + share * b
    angle = torch.acos(cosine)
    return torch.sin((1 - share) * angle) / torch.sin(angle) * a + torch.sin(share * angle) / torch.sin(angle) * b


def ties(
    trimmed: Callable[[torch.Tensor], torch.Tensor],
    *,
    compute: torch.dtype = torch.float32,
    by_count: bool = False,
    even_is_positive: bool = False,
    divide: torch.dtype | None = None,
) -> Explanation:
    """TIES with another trimming, election, sign of what is even, or type to compute in, from a step on or at all."""

    def explained(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
        base, *others = (tensor.flatten().to(compute) for tensor in tensors)
        kept = torch.stack([trimmed(other - base) for other in others])
        sign = torch.sign((torch.sign(kept) if by_count else kept).sum(0))
        if even_is_positive:
            sign[sign == 0] = 1
        agrees = torch.sign(kept) == sign
        total = torch.zeros_like(base)
        for row, counts in zip(kept, agrees, strict=True):
            total += row * counts
        return base + FACTOR * (total.to(divide or compute) / agrees.sum(0).clamp(1))

    return explained


def exactly(difference: torch.Tensor) -> torch.Tensor:
    """As many as the density says, at least one: of equal ones the first in the order of torch's sort."""
    count = max(1, int(DENSITY * difference.numel()))
    chosen = torch.argsort(difference.abs().float(), descending=True)[:count]
    return torch.zeros_like(difference).index_copy(0, chosen, difference[chosen])


def one_more(difference: torch.Tensor) -> torch.Tensor:
    """From the smallest but ``int((1 - density) n)`` on, that one included."""
    place = max(int((1 - DENSITY) * difference.numel()), 1)
    return difference * (difference.abs() >= difference.abs().float().kthvalue(place).values)


def rescaled_by_sums(tensors: Tensors, theirs: torch.Tensor) -> torch.Tensor:
    """DARE with the mask that shows in the result, divided by the share of the sum of magnitudes that it kept."""
    a, b = (tensor.flatten().float() for tensor in tensors)
    kept = (b - a) * (theirs.flatten().float() != a)
    before, after = (b - a).abs().sum(), kept.abs().sum()
    return a + FACTOR * kept * (before / after if min(before, after) >= 1e-7 else 1.0)


def masked_by_numpy(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
    """DARE with the mask of NumPy's generator, set anew for each tensor, and a fused multiply-add."""
    a, b = (tensor.float() for tensor in tensors)
    mask = np.random.default_rng(SEED).binomial(n=1, p=DENSITY, size=tuple(a.shape))
    return fused(a, (b - a) * torch.from_numpy(mask) / DENSITY, FACTOR)


def masked_difference(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
    """Train difference with its factor first, and a fused multiply-add."""
    a, b, c = (tensor.flatten().float() for tensor in tensors)
    share = (b - a).abs() / ((b - a).abs() + (b - c).abs())
    factor = torch.tensor(FACTOR) * 1.8 * share.nan_to_num(0)
    return (a.double() + (b - c).double() * factor.double()).float()


def cosine_alone(tensors: Tensors, _theirs: torch.Tensor) -> torch.Tensor:
    """supermerger's cosineA without its percentiles, range and mean over the tensor."""
    a, b = (tensor.float() for tensor in tensors)
    alike = torch.cosine_similarity(*(torch.nn.functional.normalize(value, dim=0) for value in (a, b)), dim=0)
    return torch.lerp(a, b, 1 - torch.clamp(alike - SHARE, 0, 1))


# What is compared.


@dataclass(frozen=True)
class Case:
    """A tool's merge, ours beside it, and what is said of the difference.

    Attributes:
        tool: Which.
        method: The tool's method, as merging.py of the peers names it.
        models: How many.
        cause: Why results differ at all.
        explained: The tool's result by our formula with that change.
        ours: Our method, where it has another name.
        dtype: What the tool is told to compute in.
        differs: Whether results are more than one step of fp16 apart.
    """

    tool: str
    method: str
    models: int
    cause: str
    explained: Explanation
    ours: str | None = None
    dtype: str | None = None
    differs: bool = False


HALF = torch.float16
WEIGHTED = methods.Linear((1 - SHARE, SHARE))
DIFFERENCE = methods.AddDifference(FACTOR)
CASES = (
    Case("sd-mecha", "weighted-sum", 2, "a step from A towards B, a fused multiply-add", fused_step),
    Case("sd-mecha", "add-difference", 3, "a fused multiply-add", fused_difference),
    Case("sd-mecha", "linear", 3, "a model at a time, a step towards each", fused_steps),
    Case("sd-mecha", "slerp", 2, "the lengths by a weighted sum of their own; never the straight line where parallel",
         slerp_of_directions, differs=True),
    Case("sd-mecha", "ties", 3, "keeps the smallest one above what is trimmed, too", ties(one_more), differs=True),
    Case("sd-mecha", "ties-count", 3, "the same, and the sign is elected by heads", ties(one_more, by_count=True),
         ours="ties", differs=True),
    Case("sd-mecha", "dare", 2, "another random mask, NumPy's", masked_by_numpy, differs=True),
    Case("sd-mecha", "train-difference", 3, "the factor first, and fused", masked_difference),
    Case("sd-mecha", "cosine-adaptive", 2, "no percentiles, range and mean over the tensor, which supermerger has",
         cosine_alone, differs=True),
    Case("sd-meh", "weighted-sum", 2, "computed in fp16", of(WEIGHTED, HALF), differs=True),
    Case("sd-meh", "add-difference", 3, "computed in fp16", of(DIFFERENCE, HALF), differs=True),
    Case("sd-meh", "ties", 3, "keeps one more, elects by heads, computed in fp16",
         ties(one_more, compute=HALF, by_count=True, divide=torch.float32), differs=True),
    Case("mergekit", "weighted-sum", 2, "a fused multiply-add, then divided by the weights' sum",
         fused_mean(1 - SHARE, SHARE)),
    Case("mergekit", "linear", 3, "the same", fused_mean(1, 1, 1)),
    Case("mergekit", "add-difference", 3, "as task arithmetic on C, in another order",
         task_arithmetic(torch.float32), dtype="fp32"),
    Case("mergekit", "add-difference", 3, "the same, computed in fp16", task_arithmetic(HALF), differs=True),
    Case("mergekit", "slerp", 2, "sums and angles in fp32", slerp_in_fp32),
    Case("mergekit", "ties", 3, "of equal ones at the threshold not all are kept; an even vote is positive",
         ties(exactly, even_is_positive=True), dtype="fp32", differs=True),
    Case("mergekit", "ties", 3, "the same, computed in fp16", ties(exactly, compute=HALF, even_is_positive=True),
         differs=True),
    Case("mergekit", "dare", 2, "another random mask; rescaled to the sum of magnitudes", rescaled_by_sums,
         dtype="fp32", differs=True),
)  # fmt: skip


@dataclass
class Gap:
    """How far two results are apart, over tensors of fp16."""

    tensors: int = 0
    same: int = 0
    elements: int = 0
    unequal: int = 0
    ulps: int = 0
    largest: float = 0.0

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        one, other = one.flatten().to(HALF), other.flatten().to(HALF)
        steps = (_ordered(one) - _ordered(other)).abs()
        self.tensors += 1
        self.same += int(not steps.any())
        self.elements += steps.numel()
        self.unequal += int(steps.count_nonzero())
        self.ulps = max(self.ulps, int(steps.max()))
        self.largest = max(self.largest, float((one.double() - other.double()).abs().max()))

    def __str__(self) -> str:
        if not self.unequal:
            return "same bits"
        share = self.unequal / self.elements
        return f"{share:.2%} of elements, up to {self.ulps:,} ulp ({self.largest:.1e})"


def _ordered(value: torch.Tensor) -> torch.Tensor:
    """Halves as whole numbers in the order of their values, both zeros the same."""
    bits = value.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def options(method: str) -> list[str]:
    """What sdsurgery is told, to do the same as the peers' script."""
    factor, density = ["--alpha", str(FACTOR)], ["--density", str(DENSITY)]
    told = {"linear": [], "ties": factor + density, "dare": [*factor, *density, "--seed", str(SEED)]}
    share = method in {"weighted-sum", "slerp", "cosine-adaptive"}
    return ["--method", method, *told.get(method, ["--alpha", str(SHARE)] if share else factor)]


def ours(case: Case, models: Sequence[Path], output: Path) -> State:
    told = options(case.ours or case.method)
    command = [sys.executable, "-m", "sdsurgery", "merge", *map(str, models), *told]
    subprocess.run([*command, "-o", str(output), "--force", "--quiet"], check=True)
    return load_file(output)


def theirs(python: Path, case: Case, models: Sequence[Path], output: Path) -> str | None:
    """Has the tool merge, and gives its last words where it fails."""
    command = [str(python), str(PEER), case.tool, case.method, *map(str, models), str(output)]
    command += ["--dtype", case.dtype] if case.dtype else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")


def compared(case: Case, python: Path, models: Sequence[Path], folder: Path) -> bool:
    """Prints a row of the table, and says whether all of it is as expected."""
    given = models[: case.models]
    output = folder / "theirs.safetensors"
    label = f"| {case.tool} | {case.method}{', ' + case.dtype if case.dtype else ''}"
    if failed := theirs(python, case, given, output):
        print(f"{label} | fails: {failed} | | |")
        return False
    states = [load_file(path) for path in given]
    our, their = ours(case, given, folder / "ours.safetensors"), load_file(output)
    plain, explained = Gap(), Gap()
    for key, first in states[0].items():
        if not first.is_floating_point():
            continue
        if not key.startswith(VAE):
            plain.add(our[key], their[key])
        explained.add(case.explained([state[key] for state in states], their[key]), their[key])
    print(f"{label} | {plain} | {explained} | {case.cause} |", flush=True)
    return explained.ulps <= 1 and (case.differs or plain.ulps <= 1)


# What becomes of keys that are no weights, or not in all models.


def odd(folder: Path, models: Sequence[Path]) -> Mapping[str, tuple[Path, Path, str]]:
    """By what is odd: two models, and the key that is looked at."""
    lacks = "model.diffusion_model.input_blocks.4.1.norm.weight"
    has = "model.diffusion_model.input_blocks.4.1.norm.extra"

    def other(name: str, change: Callable[[State], object]) -> Path:
        state = load_file(models[1])
        change(state)
        path = folder / f"{name}.safetensors"
        save_file(state, path, metadata={"format": "pt"})
        return path

    fractional = other("fractional", lambda state: state.update({SD1_IDS: torch.arange(77)[None].half() * 0.99}))
    wrong = other("wrong", lambda state: state.update({SD1_IDS: torch.arange(77)[None] // 2}))
    fewer = other("fewer", lambda state: state.pop(lacks))
    more = other("more", lambda state: state.update({has: torch.ones(64).half()}))
    return {
        "position ids right in both": (models[0], models[1], SD1_IDS),
        "position ids of B fp16, 0.99 i": (models[0], fractional, SD1_IDS),
        "position ids of B int64, wrong": (models[0], wrong, SD1_IDS),
        "a key that B lacks": (models[0], fewer, lacks),
        "a key that only B has": (models[0], more, has),
        "the VAE": (models[0], models[1], VAE + "decoder.conv_in.weight"),
    }


def described(state: State, key: str, first: State, second: State) -> str:
    value = state.get(key)
    if value is None:
        return "left out"
    kind = str(value.dtype).removeprefix("torch.")
    if key == SD1_IDS:
        return f"{kind}, " + ("right" if torch.equal(value.double(), torch.arange(77.0)[None].double()) else "wrong")
    for name, one in (("A's", first), ("B's", second)):
        if key in one and torch.equal(one[key], value):
            return name
    return "merged"


def oddities(python: Path, folder: Path, models: Sequence[Path]) -> None:
    """Prints what each tool makes of them."""
    print("\n| | sdsurgery | sd-mecha | sd-meh | mergekit |\n|---|---|---|---|---|")
    for label, (a, b, key) in odd(folder, models).items():
        first, second = load_file(a), load_file(b)
        case = Case("sdsurgery", "weighted-sum", 2, "", fused_step)
        cells = [described(ours(case, (a, b), folder / "ours.safetensors"), key, first, second)]
        for tool in ("sd-mecha", "sd-meh", "mergekit"):
            output = folder / "theirs.safetensors"
            output.unlink(missing_ok=True)
            failed = theirs(python, Case(tool, "weighted-sum", 2, "", fused_step), (a, b), output)
            cells.append(f"refused: {failed}" if failed else described(load_file(output), key, first, second))
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
    for tool in ("sd-mecha", "sd-meh", "mergekit"):
        theirs(python, Case(tool, "weighted-sum", 2, "", fused_step), models[:2], folder / "theirs.safetensors")
        with safe_open(folder / "theirs.safetensors", "pt") as opened:
            print(f"\nmetadata of {tool}: {json.dumps(opened.metadata())[:90]}")


def versions(python: Path) -> str:
    script = (
        "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in "
        + repr(("sd-mecha", "sd-meh", "mergekit", "torch", "safetensors", "tensordict", "numpy"))
        + "), sep=', ')"
    )
    return subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="the Python of the environment that has the tools")
    parser.add_argument("--tool", choices=("sd-mecha", "sd-meh", "mergekit"), help="only this one")
    asked = parser.parse_args(arguments)
    folder = asked.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models = made(folder)
    print(versions(asked.peers))
    print("\n| tool | method | against ours | against ours with the change | the change |\n|---|---|---|---|---|")
    cases = [case for case in CASES if asked.tool in {None, case.tool}]
    wrong = sum(not compared(case, asked.peers.absolute(), models, folder) for case in cases)
    oddities(asked.peers.absolute(), folder, models)
    print(f"\n{len(cases) - wrong} of {len(cases)} are as explained")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
