"""merge: every method against a naive one in float64, and what no merge may do to a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from conftest import FIXTURES, cli, metadata, write
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from synthetic import SD1_IDS, SDXL_IDS

import sdsurgery as sd
from sdsurgery.checkpoint import Tensor
from sdsurgery.dtypes import BY_NAME
from sdsurgery.merging import blending, methods, plain_engine, presets, torch_engine
from sdsurgery.models.identify import identify
from sdsurgery.sources import InMemory

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
State = dict[str, torch.Tensor]
Double = NDArray[np.float64]


def state(seed: int, family: str = "sd1", *, dtype: torch.dtype = torch.float16, inputs: int = 4) -> State:
    """Weights around one, so that halves round them visibly, and about as alike as models of one family are."""
    made = {}
    for key, value in synthetic.model(family, seed=0, inputs=inputs).items():
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        if tensor.is_floating_point() and "position_ids" not in key:
            noise = torch.Generator().manual_seed(seed * 7919 + len(made))
            common = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(made)))
            tensor = (common + 0.3 * torch.randn(tensor.shape, generator=noise)).to(dtype)
        made[key] = tensor
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A, B and C."""
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / f"{name}.safetensors" for name in "abc"]
    for seed, path in enumerate(paths):
        save_file(state(seed), path)
    return paths


def merged(paths: Sequence[Path], target: Path, *words: object) -> State:
    done = cli("merge", *paths, "-o", target, "--force", "--quiet", *map(str, words))
    assert done.code == 0, done.err
    return load_file(target)


def is_merged(key: str) -> bool:
    return key.startswith((UNET, CLIP)) and "position_ids" not in key


# ---------------------------------------------------------------- formulas


def ties(base: Double, others: Sequence[Double], weights: Sequence[float], density: float, scale: float) -> Double:
    """The definition, on whole tensors."""
    trimmed = []
    for other in others:
        difference = other - base
        kept = int(density * difference.size)
        least = np.sort(np.abs(difference).ravel())[::-1][kept - 1] if kept else math.inf
        trimmed.append(np.where(np.abs(difference) >= least, difference, 0))  # all of those that are equal
    elected = np.sign(sum(weight * each for weight, each in zip(weights, trimmed, strict=True)))
    total, shares = np.zeros(base.shape), np.zeros(base.shape)
    for weight, each in zip(weights, trimmed, strict=True):
        agrees = (np.sign(each) == elected) & (each != 0)
        total += np.where(agrees, weight * each, 0)
        shares += np.where(agrees, weight, 0)
    return base + scale * np.divide(total, shares, out=np.zeros(base.shape), where=shares != 0)


def slerp(a: Double, b: Double, t: float) -> Double:
    cosine = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    result: Double = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    return result


def train_difference(a: Double, b: Double, c: Double, alpha: float) -> Double:
    both = np.abs(b - c) + np.abs(b - a)
    share = np.divide(np.abs(b - a), both, out=np.zeros(a.shape), where=both != 0)
    return a + 1.8 * alpha * share * (b - c)


NAIVE: dict[str, tuple[int, tuple[str, ...], Callable[..., Double]]] = {
    "weighted-sum": (2, ("--alpha", "0.3"), lambda a, b: 0.7 * a + 0.3 * b),
    "add-difference": (3, ("--alpha", "0.6"), lambda a, b, c: a + 0.6 * (b - c)),
    "linear": (3, ("--weight", "2", "--weight", "1", "--weight", "1"), lambda a, b, c: a / 2 + b / 4 + c / 4),
    "slerp": (2, ("--alpha", "0.4"), lambda a, b: slerp(a, b, 0.4)),
    "ties": (
        3, ("--weight", "1", "--weight", "0.5", "--density", "0.3", "--alpha", "0.8"),
        lambda a, b, c: ties(a, (b, c), (1, 0.5), 0.3, 0.8),
    ),
    "dare": (
        3, ("--density", "1", "--weight", "0.5", "--weight", "0.25"),
        lambda a, b, c: a + (b - a) / 2 + (c - a) / 4,
    ),
    "train-difference": (3, ("--alpha", "0.7"), lambda a, b, c: train_difference(a, b, c, 0.7)),
}  # fmt: skip


@pytest.mark.parametrize("method", NAIVE)
@pytest.mark.parametrize("compute", ["fp32", "fp64"])
def test_a_method_is_its_formula(models: list[Path], tmp_path: Path, method: str, compute: str) -> None:
    count, options, formula = NAIVE[method]
    given = [load_file(path) for path in models[:count]]
    found = merged(models[:count], tmp_path / "m.safetensors", "--method", method, *options, "--compute-dtype", compute)
    changed = 0
    for key, value in found.items():
        if not is_merged(key):
            assert torch.equal(value, given[0][key]), key
            continue
        expected = formula(*(each[key].double().numpy() for each in given))
        assert value.dtype == torch.float16
        np.testing.assert_allclose(value.double().numpy(), expected, rtol=2**-11 * 1.01, atol=2e-6, err_msg=key)
        changed += not torch.equal(value, given[0][key])
    assert changed > 800


def test_a_weighted_sum_is_what_a1111_computes_to_the_bit(models: list[Path], tmp_path: Path) -> None:
    a, b = (load_file(path) for path in models[:2])
    found = merged(models[:2], tmp_path / "m.safetensors", "--alpha", 0.3)
    for key in filter(is_merged, a):
        assert torch.equal(found[key], ((1 - 0.3) * a[key].float() + 0.3 * b[key].float()).half()), key


def test_an_added_difference_is_what_a1111_computes_to_the_bit(models: list[Path], tmp_path: Path) -> None:
    a, b, c = (load_file(path) for path in models)
    found = merged(models, tmp_path / "m.safetensors", "--method", "add-difference", "--alpha", 0.7)
    for key in filter(is_merged, a):
        assert torch.equal(found[key], (a[key].float() + 0.7 * (b[key].float() - c[key].float())).half()), key


def test_cosine_adaptive_is_its_formula(models: list[Path], tmp_path: Path) -> None:
    a, b = ({key: value.double() for key, value in load_file(path).items()} for path in models[:2])
    keys = [key for key in a if is_merged(key)]
    columns = {key: torch.nn.functional.cosine_similarity(a[key], b[key], dim=0).numpy() for key in keys}
    pool = np.concatenate([np.ravel(each) for each in columns.values()])
    pool = pool[pool >= np.percentile(pool, 1, method="midpoint")]
    pool = pool[pool <= np.percentile(pool, 99, method="midpoint")]
    found = merged(models[:2], tmp_path / "m.safetensors", "--method", "cosine-adaptive", "--alpha", 0.2)
    for key in keys:
        alike = (columns[key] + columns[key].mean()) / 2
        k = np.clip((alike - pool.min()) / (pool.max() - pool.min()) - 0.2, 0, 1)
        expected = k * a[key].numpy() + (1 - k) * b[key].numpy()
        np.testing.assert_allclose(found[key].double().numpy(), expected, rtol=2**-11 * 1.01, atol=2e-6, err_msg=key)


def test_diff_finds_the_weight_that_a_sum_was_made_with(models: list[Path], tmp_path: Path) -> None:
    merged(models[:2], tmp_path / "m.safetensors", "--alpha", 0.35)
    a, b = models[:2]
    told = cli("diff", a, tmp_path / "m.safetensors", "--explain-with", b).out
    assert "0.35" in told


@given(st.integers(1, 400), st.integers(1, 3), st.floats(0.01, 1.0), st.integers(0, 2**32), st.booleans())
def test_the_thresholds_keep_the_largest(count: int, models: int, density: float, seed: int, even: bool) -> None:
    random = np.random.default_rng(seed)
    base, *others = random.standard_normal((1 + models, count)).astype(np.float32)
    if even:  # with many that are the same
        base, *others = map(np.round, (base, *others))
    kept = int(density * count)
    found = methods._thresholds(lambda: iter([[torch.from_numpy(each) for each in (base, *others)]]), density)
    for threshold, other in zip(found, others, strict=True):
        magnitudes = np.sort(np.abs(other - base))[::-1]
        assert threshold == (math.inf if kept == 0 else magnitudes[kept - 1])


def test_thresholds_are_read_off_in_two_readings() -> None:
    """However many models there are."""
    readings = []
    tensors = [torch.randn(100) for _ in range(6)]

    def pieces() -> Iterator[list[torch.Tensor]]:
        readings.append(1)
        yield tensors

    assert len(methods._thresholds(pieces, 0.5)) == 5
    assert len(readings) == 2


@pytest.mark.parametrize("b", [2.0, -1.0, 0.0])
def test_slerp_of_what_has_no_angle_is_the_sum(b: float) -> None:
    a = torch.linspace(-1, 1, 64)
    one, other = a, a * b
    compute = methods.Slerp(0.25).over(lambda: iter([(one, other)]))
    assert torch.allclose(compute(0, (one.clone(), other.clone())), 0.75 * one + 0.25 * other)


# ---------------------------------------------------------------- DARE's chance


def test_dare_keeps_its_share_and_rescales(models: list[Path], tmp_path: Path) -> None:
    a, b = (load_file(path) for path in models[:2])
    found = merged(models[:2], tmp_path / "m.safetensors", "--method", "dare", "--density", 0.25, "--dtype", "fp32")
    kept = total = 0
    for key in filter(is_merged, a):
        difference = b[key].double() - a[key].double()
        change = (found[key].double() - a[key].double())[difference != 0] / difference[difference != 0]
        assert ((change.abs() < 1e-5) | ((change - 4).abs() < 1e-2)).all(), key
        kept, total = kept + int((change > 2).sum()), total + change.numel()
    assert abs(kept / total - 0.25) < 5 * math.sqrt(0.25 * 0.75 / total)


def test_dare_is_the_same_each_time_and_another_with_another_seed(models: list[Path], tmp_path: Path) -> None:
    options = ("--method", "dare", "--density", 0.5)
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file, seed in zip(files, (3, 3, 4), strict=True):
        merged(models[:2], file, *options, "--seed", seed)
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other


@given(st.integers(0, 3), st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 9))
def test_what_is_dropped_does_not_depend_on_the_pieces(place: int, sizes: list[int], seed: int) -> None:
    formula = methods.Dare((1.0,) * 4, 0.5, 1.0, seed, "unet.conv_in.weight")
    whole = formula.keeps(place, 0, sum(sizes))
    starts = np.cumsum([0, *sizes])
    parts = [formula.keeps(place, int(start), size) for start, size in zip(starts, sizes, strict=False)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("method", [*NAIVE, "cosine-adaptive"])
def test_the_size_of_pieces_means_nothing(
    models: list[Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, options, _ = NAIVE.get(method, (2, (), None))
    files = [tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"]
    for file, elements in zip(files, (1 << 17, 40), strict=True):
        for engine in (plain_engine, torch_engine):
            monkeypatch.setattr(engine, "_ELEMENTS", elements)
        monkeypatch.setattr(blending, "_YIELDED", 8 * elements)
        merged(models[:count], file, "--method", method, *options)
    assert files[0].read_bytes() == files[1].read_bytes()


# ---------------------------------------------------------------- what stays


@settings(max_examples=12)
@given(st.sampled_from(["weighted-sum", "slerp"]), st.sampled_from([0, 1]), st.sampled_from(["unet", "text_encoder"]))
def test_zero_and_one_copy_bits(
    models: list[Path], tmp_path_factory: pytest.TempPathFactory, method: str, end: int, component: str
) -> None:
    target = tmp_path_factory.mktemp("ends") / "m.safetensors"
    a, b = (load_file(path) for path in models[:2])
    found = merged(models[:2], target, "--method", method, "--alpha", 0.5, "--at", f"{component}={end}")
    prefix = UNET if component == "unet" else CLIP
    for key in filter(is_merged, a):
        if key.startswith(prefix):
            assert torch.equal(found[key], (a, b)[end][key]), key
        else:
            assert not torch.equal(found[key], a[key]), key


@pytest.mark.parametrize("method", ["add-difference", "train-difference", "ties", "dare"])
def test_nothing_of_the_others_is_the_first(models: list[Path], tmp_path: Path, method: str) -> None:
    count = NAIVE[method][0]
    found = merged(models[:count], tmp_path / "m.safetensors", "--method", method, "--alpha", 0)
    assert all(torch.equal(found[key], value) for key, value in load_file(models[0]).items())


IDS = torch.arange(77)[None]


@pytest.mark.parametrize("broken", [IDS * 0.95, IDS.half() * 0.9, IDS * 0])
@pytest.mark.parametrize("whose", [0, 1])
def test_ids_are_right_whatever_the_models_have(
    models: list[Path], tmp_path: Path, broken: torch.Tensor, whose: int
) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, path in enumerate(paths):
        save_file(load_file(models[number]) | ({SD1_IDS: broken} if number == whose else {}), path)
    found = merged(paths, tmp_path / "m.safetensors", "--alpha", 0.1)
    width = load_file(models[0])[SD1_IDS].shape[-1]
    assert torch.equal(found[SD1_IDS], torch.arange(width)[None])


def test_the_vae_is_the_one_that_is_named(models: list[Path], tmp_path: Path) -> None:
    b, c = load_file(models[1]), load_file(models[2])
    found = merged(models[:2], tmp_path / "m.safetensors", "--vae", models[2])
    for key, value in found.items():
        if key.startswith(VAE):
            assert torch.equal(value, c[key])
            assert not torch.equal(value, b[key])
    record = json.loads(metadata(tmp_path / "m.safetensors")["sdsurgery"])["steps"]
    assert [step["operation"] for step in record] == ["merge", "merge-vae"]


def test_averages_of_the_first_alone_go(models: list[Path], tmp_path: Path) -> None:
    full = FIXTURES / "sd1-full-ema.ckpt"
    done = cli("merge", full, full, "-o", tmp_path / "m.safetensors", "--json")
    dropped = [change["key"] for change in done.json["changes"] if change["kind"] == "dropped"]
    assert len([key for key in dropped if key.startswith("model_ema.")]) == 688
    assert "ema" not in identify(sd.open(tmp_path / "m.safetensors")).components
    assert "schedule" in identify(sd.open(tmp_path / "m.safetensors")).components


def test_keys_that_not_all_have(models: list[Path], tmp_path: Path) -> None:
    a, b = load_file(models[0]), load_file(models[1])
    lost = f"{UNET}out.2.bias"
    more = f"{CLIP}transformer.text_model.extra.weight"
    save_file(
        {key: value for key, value in b.items() if key != lost} | {more: torch.ones(3)}, tmp_path / "b.safetensors"
    )
    done = cli("merge", models[0], tmp_path / "b.safetensors", "-o", tmp_path / "m.safetensors")
    assert done.code == 0
    assert lost in done.err
    found = load_file(tmp_path / "m.safetensors")
    assert torch.equal(found[lost], a[lost])
    assert more not in found


# ---------------------------------------------------------------- layouts, containers, dtypes


def test_layouts_and_containers_mix(models: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for path, folder in zip(models, folders, strict=False):
        assert cli("convert", path, folder, "--quiet").code == 0
    torch.save({"state_dict": load_file(models[1])}, tmp_path / "b.ckpt")
    expected = merged(models[:2], tmp_path / "m.safetensors")
    for other in (folders[1], tmp_path / "b.ckpt"):
        found = merged([models[0], other], tmp_path / "n.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert cli("merge", folders[0], models[1], "-o", tmp_path / "c", "--quiet").code == 0
    assert cli("diff", tmp_path / "c", tmp_path / "m.safetensors", "--json").json["identical"]


@pytest.mark.parametrize(
    "kinds", [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.bfloat16,) * 2]
)
def test_types_mix_and_the_first_ones_stays(tmp_path: Path, kinds: tuple[torch.dtype, torch.dtype]) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        save_file(state(seed, dtype=kind), path)
    a, b = map(load_file, paths)
    found = merged(paths, tmp_path / "m.safetensors", "--alpha", 0.25)
    for key in filter(is_merged, a):
        assert torch.equal(found[key], (0.75 * a[key].float() + 0.25 * b[key].float()).to(kinds[0])), key
    half = merged(paths, tmp_path / "m.safetensors", "--alpha", 0.25, "--dtype", "fp32")
    for key in filter(is_merged, a):
        assert torch.equal(half[key], 0.75 * a[key].float() + 0.25 * b[key].float()), key


@pytest.mark.parametrize("inputs", [9, 8, 5])
def test_further_input_channels_stay_the_first_ones(tmp_path: Path, inputs: int) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    save_file(state(0, inputs=inputs), paths[0])
    for seed in (1, 2):
        save_file(state(seed), paths[seed])
    a, b, c = map(load_file, paths)
    key = f"{UNET}input_blocks.0.0.weight"
    found = merged(paths, tmp_path / "m.safetensors", "--method", "add-difference")
    assert torch.equal(found[key][:, 4:], a[key][:, 4:])
    assert torch.equal(found[key][:, :4], (a[key][:, :4].float() + (b[key].float() - c[key].float())).half())
    whole = merged(paths[:2], tmp_path / "m.safetensors", "--alpha", 1)
    assert torch.equal(whole[key], torch.cat([b[key], a[key][:, 4:]], 1))
    adaptive = merged(paths[:2], tmp_path / "m.safetensors", "--method", "cosine-adaptive")
    assert torch.equal(adaptive[key][:, 4:], a[key][:, 4:])
    refused = cli("merge", paths[1], paths[0], "-o", tmp_path / "n.safetensors")
    assert (refused.code, key in refused.err) == (3, True)
    assert "comes first" in refused.err


# ---------------------------------------------------------------- blocks and rules


def block_of(key: str) -> str | None:
    """By ldm's own names, as merge tools do it."""
    rest = key.removeprefix(UNET)
    for prefix, name in (("input_blocks.", "IN"), ("output_blocks.", "OUT")):
        if key.startswith(UNET) and rest.startswith(prefix):
            return f"{name}{int(rest.split('.')[1]):02}"
    return "M00" if key.startswith(UNET) and rest.startswith("middle_block.") else None


ORDER = [f"IN{n:02}" for n in range(12)] + ["M00"] + [f"OUT{n:02}" for n in range(12)]


@pytest.mark.parametrize("form", ["numbers", "with base", "preset"])
def test_block_weights_are_a_loop_over_blocks(models: list[Path], tmp_path: Path, form: str) -> None:
    numbers = [round(0.03 * n + 0.02, 2) for n in range(25)]
    base, given = 0.5, ",".join(map(str, numbers))
    if form == "with base":
        base, given = 0.11, f"0.11,{given}"
    elif form == "preset":
        numbers, given = list(presets.PRESETS["COSINE"]), "cosine"
    weights = dict(zip(ORDER, numbers, strict=True))
    a, b = (load_file(path) for path in models[:2])
    found = merged(models[:2], tmp_path / "m.safetensors", "--blocks", given)
    for key in filter(is_merged, a):
        alpha = weights.get(block_of(key) or "", base)
        assert torch.equal(found[key], ((1 - alpha) * a[key].float() + alpha * b[key].float()).half()), key


@pytest.mark.parametrize("count", [19, 20, 25, 26])
def test_sdxl_has_nineteen_blocks(tmp_path: Path, count: int) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        save_file(state(seed, "sdxl"), path)
    numbers = [round(0.5 + 0.01 * n, 2) for n in range(count)]
    found = merged(paths, tmp_path / "m.safetensors", "--blocks", ",".join(map(str, numbers)))
    a, b = map(load_file, paths)
    extra = count % 2 == 0
    own = numbers[extra:]
    taken = own if count < 25 else [*own[:9], *own[12:22]]
    order = [f"IN{n:02}" for n in range(9)] + ["M00"] + [f"OUT{n:02}" for n in range(9)]
    weights = dict(zip(order, taken, strict=True))
    checked = 0
    for key, value in found.items():
        if key.startswith(UNET):
            alpha = weights.get(block_of(key) or "", numbers[0] if extra else 0.5)
            expected = ((1 - alpha) * a[key].float() + alpha * b[key].float()).half()
            assert torch.equal(value, expected), key
            checked += 1
    assert checked > 1000
    assert torch.equal(found[SDXL_IDS], torch.arange(found[SDXL_IDS].shape[-1])[None])


def test_rules_name_components_blocks_and_patterns(models: list[Path], tmp_path: Path) -> None:
    a, b = (load_file(path) for path in models[:2])
    rules = ("text_encoder=0.1", "unet=0.2", "IN04=0.3", "*.attn2.to_k.weight=0.4", f"{UNET}out.2.bias=0.6")
    words = [word for rule in rules for word in ("--at", rule)]
    found = merged(models[:2], tmp_path / "m.safetensors", *words, "--blocks", "ALL_B")
    for key in filter(is_merged, a):
        alpha = 0.1 if key.startswith(CLIP) else 0.2
        alpha = 0.3 if block_of(key) == "IN04" else alpha
        alpha = 0.4 if key.endswith(".attn2.to_k.weight") else alpha
        alpha = 0.6 if key == f"{UNET}out.2.bias" else alpha
        assert torch.equal(found[key], ((1 - alpha) * a[key].float() + alpha * b[key].float()).half()), key


PUBLISHED = {
    "GRAD_V": (1, 0.9166666667, 0.8333333333, 0.75), "GRAD_A": (0, 0.0833333333, 0.1666666667, 0.25),
    "SMOOTHSTEP": (0, 0.00506365740740741, 0.0196759259259259, 0.04296875),
    "3R_SMOOTHSTEP": (1, 0.984809027777778, 0.940972222222222, 0.87109375),
    "ONE_THIRD_SMOOTHSTEP": (0, 0.04296875, 0.15625, 0.31640625),
    "COSINE": (1, 0.995722430686905, 0.982962913144534, 0.961939766255643),
    "TRUE_CUBIC_HERMITE": (0, 0.199031876929012, 0.325761959876543, 0.424641927083333),
    "FAKE_REVERSE_CUBIC_HERMITE": (1, 0.842423804012346, 0.71508487654321, 0.615234375),
    "RING08_SOFT": (0, 0, 0, 0, 0, 0.5, 1, 1, 1, 0.5, 0), "WRAP14": (1, 1, 1, 1, 1, 1, 1, 0),
}  # fmt: skip


def test_presets_are_the_published_ones() -> None:
    assert len(presets.PRESETS) == 38
    assert {len(weights) for weights in presets.PRESETS.values()} == {25}
    for name, numbers in PUBLISHED.items():
        assert presets.PRESETS[name][: len(numbers)] == pytest.approx(numbers, abs=1e-10), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--at", "IN4=0.5"), "IN04"), (("--at", "IN04"), "WHERE=NUMBER"), (("--at", "IN04=much"), "no number"),
        (("--at", "IN04=nan"), "no number"),
        (("--blocks", "GRADV"), "GRAD_V"), (("--blocks", "1,2,3"), "25 blocks"), (("--blocks", "1,,3"), "no number"),
        (("--seed", "1"), "no seed"),
        (("--method", "add-difference"), "two further models"), (("--method", "linear", "--alpha", "1"), "no alpha"),
        (("--method", "linear", "--weight", "1"), "2 models"), (("--method", "ties", "--density", "0"), "no density"),
        (("--method", "linear", "--weight", "1", "--weight", "-1"), "add up to nothing"), (("--alpha", "nan"), "NaN"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said(models: list[Path], tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = cli("merge", *models[:2], "-o", tmp_path / "m.safetensors", *words)
    assert (done.code, said in done.err) == (2, True), done.err
    assert not (tmp_path / "m.safetensors").exists()


# ---------------------------------------------------------------- bad values, other models, records


def test_overflow_is_refused_before_anything_is_written(models: list[Path], tmp_path: Path) -> None:
    big = load_file(models[1])
    key = f"{UNET}out.2.weight"
    big[key] = torch.full_like(big[key], 60000.0)
    save_file(big, tmp_path / "b.safetensors")
    words = ("merge", models[0], tmp_path / "b.safetensors", models[2], "--method", "add-difference", "--alpha", "2")
    done = cli(*words, "-o", tmp_path / "m.safetensors")
    assert (done.code, key in done.err, "--dtype" in done.err) == (1, True, True), done.err
    assert not (tmp_path / "m.safetensors").exists()
    assert cli(*words, "-o", tmp_path / "m.safetensors", "--dtype", "fp32", "--quiet").code == 0
    assert torch.isfinite(load_file(tmp_path / "m.safetensors")[key]).all()


@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN"), (math.inf, "Inf")])
def test_nan_and_inf_are_told_of(models: list[Path], tmp_path: Path, value: float, said: str) -> None:
    bad = load_file(models[1])
    key = f"{UNET}out.2.weight"
    bad[key][0, 0, 0, 0] = value
    save_file(bad, tmp_path / "b.safetensors")
    done = cli("merge", models[0], tmp_path / "b.safetensors", "-o", tmp_path / "m.safetensors", "--dry-run")
    assert f"{key} holds {said} in b.safetensors" in done.err
    assert not (tmp_path / "m.safetensors").exists()


def test_another_family_is_refused(models: list[Path], tmp_path: Path) -> None:
    save_file(state(1, "sdxl"), tmp_path / "b.safetensors")
    done = cli("merge", models[0], tmp_path / "b.safetensors", "-o", tmp_path / "m.safetensors")
    assert (done.code, "b.safetensors" in done.err) == (3, True)
    done = cli("merge", models[0], FIXTURES / "vae.safetensors", "-o", tmp_path / "m.safetensors")
    assert done.code == 3


def test_the_record_repeats_it_and_names_no_folder(models: list[Path], tmp_path: Path) -> None:
    merged(models[:2], tmp_path / "m.safetensors", "--at", "unet=0.25", "--at", "IN04=0")
    (step,) = json.loads(metadata(tmp_path / "m.safetensors")["sdsurgery"])["steps"]
    assert step["parameters"] == {
        "models": ["b.safetensors"], "method": "weighted-sum", "alpha": 0.5, "at": ["unet=0.25", "IN04=0"],
    }  # fmt: skip
    assert step["inputs"] == [{"name": "b.safetensors"}]
    assert str(tmp_path) not in json.dumps(step)


def test_shell_python_and_pipe_make_the_same_file(models: list[Path], tmp_path: Path) -> None:
    a, b = models[:2]
    merged([a, b], tmp_path / "shell.safetensors", "--alpha", 0.3)
    sd.open(a).pipe(sd.Merge([b], alpha=0.3)).save(tmp_path / "python.safetensors")
    words = ("pipe", a, "-o", tmp_path / "pipe.safetensors", "merge", b, "--alpha", "0.3")
    assert cli(*words, "+", "fix-clip").code == 0
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("shell", "python", "pipe")]
    assert files[0] == files[1] == files[2]
    assert sd.Merge(b, alpha=0.3).models == (b,)


def test_without_torch_it_says_so(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "sdsurgery.merging.torch_engine")
    done = cli("merge", *models[:2], "-o", tmp_path / "m.safetensors", "--method", "slerp")
    assert (done.code, "sdsurgery[torch]" in done.err) == (3, True), done.err
    for words in ((models[1],), (models[1], models[2], "--method", "add-difference")):
        done = cli("merge", models[0], *words, "-o", tmp_path / "m.safetensors", "--force")
        assert done.code == 0, done.err


HALVES = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize(("name", "kind"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_every_half_is_what_torch_makes_of_it(name: str, kind: torch.dtype) -> None:
    """By itself, and among others that are finite: a piece that holds Inf or NaN goes another way."""
    theirs = torch.from_numpy(HALVES.copy()).view(kind)
    for chosen in (HALVES, HALVES[torch.isfinite(theirs).numpy()]):
        piece = bytearray(chosen.tobytes())
        ours = plain_engine.widened(piece, BY_NAME[name], np.empty(len(chosen), np.float32))
        wanted = torch.frombuffer(bytearray(piece), dtype=kind).float().numpy()
        assert np.array_equal(ours, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(ours), np.signbit(wanted))


def floats(bits: Sequence[int]) -> NDArray[np.float32]:
    return np.array(bits, np.uint32).view(np.float32)


HARD = [
    *(base + step for base in (0x38800000, 0x33800000, 0x33000000, 0x477FE000, 0x477FF000) for step in range(-2, 3)),
    *(0x7F7FFFFF - step for step in range(3)), 0, 2, 3,
    *(number << 13 | tie for number in (0x1C400, 0x1C401, 0x20000, 0x23BFF) for tie in (0xFFF, 0x1000, 0x1001)),
    0x7F800000, 0x7FC00000, 0x00000001, 0x007FFFFF,
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
@given(bits=st.lists(st.one_of(st.integers(0, (1 << 32) - 1), st.sampled_from(HARD)), max_size=60))
@example(bits=HARD)
@example(bits=[bit | 1 << 31 for bit in HARD if bit < 0x477FF000])
@example(bits=[bit for bit in HARD if bit < 0x477FF000])
def test_rounding_is_torchs(name: str, kind: torch.dtype, bits: list[int]) -> None:
    values = floats(bits)
    out = memoryview(bytearray(len(values) * BY_NAME[name].itemsize))
    plain_engine.PlainEngine().rounded(values.copy(), BY_NAME[name], out)
    ours = torch.frombuffer(bytearray(out), dtype=kind) if bits else torch.empty(0, dtype=kind)
    theirs = torch.from_numpy(values).to(kind)
    assert torch.equal(ours.isnan(), theirs.isnan())
    kept = ~theirs.isnan()
    assert ours[kept].float().numpy().tobytes() == theirs[kept].float().numpy().tobytes()


@given(
    seed=st.integers(0, 1 << 32),
    names=st.lists(st.sampled_from(["F16", "BF16", "F32"]), min_size=4, max_size=4),
    method=st.sampled_from(
        [methods.Linear((0.7, 0.2, 0.1)), methods.Linear((2.5, -1.5, 1e-7)), methods.AddDifference(0.3)]
    ),
)
def test_both_engines_give_the_same_bits(seed: int, names: list[str], method: methods.Formula) -> None:
    """On bits of all kinds: huge, tiny, denormal, infinite, not a number."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 300))
    given_bits = [random.bytes(count * BY_NAME[name].itemsize) for name in names[:3]]
    tensors = [
        Tensor(BY_NAME[name], (count,), InMemory(bits)) for name, bits in zip(names[:3], given_bits, strict=True)
    ]
    found = [
        blending.blended(tensors, BY_NAME[names[3]], method, engine).torch().float()
        for engine in (plain_engine.PlainEngine(), torch_engine.TorchEngine())
    ]
    assert torch.equal(found[0].isnan(), found[1].isnan())
    assert torch.equal(found[0].nan_to_num(0, 1, -1), found[1].nan_to_num(0, 1, -1))


def test_a_gpu_that_is_not_there(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = cli("merge", *models[:2], "-o", tmp_path / "m.safetensors", "--device", "cuda")
    assert (done.code, "GPU" in done.err) == (3, True)


def test_an_output_is_not_changed_by_the_order_of_what_is_told(models: list[Path], tmp_path: Path) -> None:
    options: list[Any] = ["--at", "IN01=0.1", "--at", "OUT03=0.9"]
    one = merged(models[:2], tmp_path / "m.safetensors", *options)
    other = merged(models[:2], tmp_path / "n.safetensors", *options[2:], *options[:2])
    assert all(torch.equal(one[key], value) for key, value in other.items())


def test_a_model_in_memory_merges_too(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1", seed=4)
    path = write(tmp_path / "b.safetensors", synthetic.model("sd1", seed=5))
    model = sd.Checkpoint.from_state_dict(tensors).pipe(sd.Merge(path, alpha=0.5))
    key = f"{UNET}out.2.bias"
    a, b = tensors[key], synthetic.model("sd1", seed=5)[key]
    expected = (np.float32(0.5) * a.astype(np.float32) + np.float32(0.5) * b.astype(np.float32)).astype(np.float16)
    assert np.array_equal(model[key].numpy(), expected)
