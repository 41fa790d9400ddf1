"""prune and cast: what goes, what is rounded, and everything that is neither."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import synthetic
import torch
from conftest import FIXTURES, Raw, cli, metadata, raw, raw_array, raw_pickle, shell, write
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from synthetic import SD1_IDS, merged_ids

import sdsurgery as sd
from sdsurgery.dtypes import BY_NAME
from sdsurgery.operations import cast as cast_module
from sdsurgery.sources import InMemory

UNET = "model.diffusion_model."
TRAINED = FIXTURES / "sd1-full-ema.ckpt"
Arrays = dict[str, np.ndarray[Any, Any]]

MARKERS: Arrays = {
    "v_pred": np.zeros(0, np.float16), "ztsnr": np.zeros((), np.float32),
    "edm_mean": np.ones((1, 4, 1, 1), np.float32), "edm_std": np.ones((1, 4, 1, 1), np.float32),
    "edm_vpred.sigma_max": np.array([120.0], np.float32), "edm_vpred.sigma_min": np.array(0.002, np.float64),
}  # fmt: skip


def everything() -> Arrays:
    """A model with all that may stand beside it."""
    model = synthetic.model("sd1")
    return {
        **model, **dict(synthetic.ema(model)), **synthetic.schedule(), **MARKERS,
        "logvar": np.zeros(1000, np.float32),
        "loss.logvar": np.zeros((), np.float32), "loss.discriminator.main.0.weight": np.ones((2, 3), np.float32),
        "first_stage_model.loss.logvar": np.zeros(3, np.float32),
        "optimizer.state.0.exp_avg": np.ones(3, np.float32),
        "unknown.weight": np.full((2, 2), 0.1, np.float32),
        "depth_model.scale": np.ones(1, np.int32),
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return write(folder / "whole.safetensors", everything(), {"format": "pt", "modelspec.title": "A"})


GROUPS: dict[str, tuple[str, ...]] = {
    "ema": ("model_ema.",),
    "schedule": (*synthetic.schedule(), "logvar"),
    "training": ("loss.", "first_stage_model.loss.", "optimizer."),
}


def without(groups: set[str], tensors: dict[str, Raw]) -> dict[str, Raw]:
    gone = tuple(start for group in groups for start in GROUPS[group])
    return {key: value for key, value in tensors.items() if not key.startswith(gone)}


# ---------------------------------------------------------------- prune


def test_prune_drops_what_only_training_needs_and_keeps_the_rest(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    before = whole.read_bytes()
    result = cli("prune", whole, "-o", output, "--json")
    assert result.code == 0
    assert raw(output) == without(set(GROUPS), raw(whole))
    assert {*MARKERS, "unknown.weight", "depth_model.scale", SD1_IDS} <= raw(output).keys()
    assert {change["kind"] for change in result.json["changes"]} == {"dropped"}
    assert {change["key"] for change in result.json["changes"]} == raw(whole).keys() - raw(output).keys()
    assert metadata(output)["modelspec.title"] == "A"
    assert whole.read_bytes() == before


def test_prune_says_how_much_goes(whole: Path) -> None:
    tensors = raw(whole)
    notes = [note["message"] for note in cli("prune", whole, "--dry-run", "--json").json["notes"]]
    assert len(notes) == 3
    for note, (group, starts) in zip(notes, GROUPS.items(), strict=True):
        gone = [len(content) for key, (_, _, content) in tensors.items() if key.startswith(starts)]
        assert note == f"{group}: {len(gone)} tensors, {sum(gone):,} bytes"


@pytest.mark.parametrize("kept", [["ema"], ["schedule"], ["training"], ["ema", "schedule", "training"]])
def test_prune_keeps_groups_on_request(kept: list[str], whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    words = [word for group in kept for word in ("--keep", group)]
    result = cli("prune", whole, "-o", output, *words, "--json")
    assert result.code == 0
    assert raw(output) == without(set(GROUPS) - set(kept), raw(whole))
    assert result.json["changed"] is (len(kept) < 3)


@pytest.mark.parametrize("wrapper", ["module.", "state_dict."])
def test_prune_under_a_wrapper(wrapper: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model.safetensors", {wrapper + key: value for key, value in everything().items()})
    output = tmp_path / "out.safetensors"
    assert cli("prune", model, "-o", output).code == 0
    bare = {key.removeprefix(wrapper): value for key, value in raw(model).items()}
    assert raw(output) == {wrapper + key: value for key, value in without(set(GROUPS), bare).items()}


def test_prune_of_a_training_checkpoint_tells_of_what_is_no_tensor(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = cli("prune", TRAINED, "-o", output, "--json")
    assert raw(output) == without(set(GROUPS), raw_pickle(TRAINED))
    dropped = [change["key"] for change in result.json["changes"]]
    assert len(dropped) == len(set(dropped)) == 688 + 12 + 5
    assert {"epoch", "callbacks", "optimizer_states"} <= set(dropped)
    assert any(note["message"] == "non-tensors: 5 entries" for note in result.json["notes"])


def test_prune_of_what_is_pruned_already(tmp_path: Path) -> None:
    once = tmp_path / "once.safetensors"
    cli("prune", TRAINED, "-o", once)
    result = cli("prune", once, "--json")
    assert (result.code, result.json["changed"], result.json["output"]) == (0, False, None)
    twice = tmp_path / "twice.safetensors"
    cli("prune", once, "-o", twice)
    assert twice.read_bytes() == once.read_bytes()


@pytest.mark.parametrize("what", ["vae", "unknown", "diffusers"])
def test_prune_keeps_everything_that_it_doesnt_know(what: str, tmp_path: Path) -> None:
    tensors: Arrays = {
        "vae": lambda: synthetic.part(synthetic.model("sd1"), "first_stage_model."),
        "unknown": lambda: {"a.weight": np.ones(3), "betas": np.ones(1000), "model_ema.a": np.ones(2)},
        "diffusers": lambda: {"down_blocks.0.resnets.0.conv1.weight": np.ones((2, 2, 3, 3)), "mid.x": np.ones(1)},
    }[what]()
    result = cli("prune", write(tmp_path / "model.safetensors", tensors), "--json")
    assert (result.code, result.json["changed"]) == (0, False)


def test_prune_with_ema_puts_the_averages_in_the_unets_place(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = cli("prune", TRAINED, "--ema", "-o", output, "--json")
    assert result.code == 0
    tensors = raw_pickle(TRAINED)
    expected = without(set(GROUPS), tensors)
    for key in expected:
        if key.startswith(UNET):
            expected[key] = tensors["model_ema.diffusion_model" + key.removeprefix(UNET).replace(".", "")]
    assert raw(output) == expected
    assert sum(change["kind"] == "replaced" for change in result.json["changes"]) == 686
    # The oracle for the names: diffusers' own extraction of EMA weights.
    from diffusers.loaders import single_file_utils

    state = torch.load(FIXTURES / "merged.ckpt", weights_only=True)["state_dict"]  # the same UNet, without EMA
    assert state.keys() == expected.keys()
    names = {key: torch.zeros(1) for key in tensors}
    config = {"layers_per_block": 2}
    taken = single_file_utils.convert_ldm_unet_checkpoint(dict(names), config, extract_ema=True)
    sources = {id(value): key for key, value in names.items()}
    used = {sources[id(value)] for value in taken.values()}
    assert used == {key for key in tensors if key.startswith("model_ema.diffusion")}


def test_prune_with_ema_may_keep_it_too(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert cli("prune", TRAINED, "--ema", "--keep", "ema", "-o", output).code == 0
    tensors, found = raw_pickle(TRAINED), raw(output)
    key = "model_ema.diffusion_modelout2weight"
    assert found[key] == found[UNET + "out.2.weight"] == tensors[key]


@pytest.mark.parametrize("what", ["no ema", "scalars alone", "partial", "misshapen", "no unet", "unknown unet"])
def test_prune_with_ema_that_isnt_whole_is_refused(what: str, tmp_path: Path) -> None:
    tensors = everything()
    averages = [key for key in tensors if key.startswith("model_ema.diffusion")]
    if what in {"no ema", "scalars alone"}:
        tensors = {key: value for key, value in tensors.items() if key not in averages}
        if what == "no ema":
            del tensors["model_ema.decay"], tensors["model_ema.num_updates"]
    elif what == "partial":
        del tensors[averages[5]]
    elif what == "misshapen":
        tensors[averages[5]] = np.ones(1, np.float32)
    elif what == "no unet":
        tensors = {key: value for key, value in tensors.items() if not key.startswith(UNET)}
    else:
        tensors = {key: value for key, value in tensors.items() if "output_blocks" not in key}
    model = write(tmp_path / "model.safetensors", tensors)
    result = cli("prune", model, "--ema", "-o", tmp_path / "out.safetensors", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    if what in {"partial", "misshapen"}:
        assert result.json["error"]["key"] == averages[5]
    assert not (tmp_path / "out.safetensors").exists()


def test_prune_in_place_and_quiet(tmp_path: Path) -> None:
    model = Path(shutil.copy(TRAINED, tmp_path / "model.ckpt"))
    result = cli("prune", "--in-place", model, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert raw_pickle(model) == without(set(GROUPS), raw_pickle(TRAINED))
    assert torch.load(model, weights_only=True).keys() == {"state_dict", "metadata"}
    assert list(tmp_path.iterdir()) == [model]


# ---------------------------------------------------------------- cast

NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
NAMES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SOURCES = {
    "F32": np.float32, "F64": np.float64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


def cast(array: Any, target: str, on_overflow: str = "refuse") -> sd.Tensor:
    checkpoint = sd.Checkpoint.from_state_dict({"some.weight": array})
    return sd.Cast(target, on_overflow=on_overflow)(checkpoint)["some.weight"]  # type: ignore[arg-type]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("target", NUMPY)
@pytest.mark.parametrize("source", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_value_of_a_small_type_is_cast_as_torch_does(source: str, target: str) -> None:
    """All 65,536 or 256 of them, but for NaN, whose payload is nobody's business."""
    size = BY_NAME[source].itemsize
    everyone = np.arange(1 << (8 * size), dtype=f"u{size}")
    array = everyone.view(SOURCES[source])
    array = array[~np.isnan(array.astype(np.float32))]
    theirs = torch.from_numpy(array.view(f"i{size}").copy()).view(getattr(torch, str(BY_NAME[source].torch)))
    ours = cast(array, target, "inf")
    assert (ours.dtype.name, ours.shape) == (NAMES[target], array.shape)
    assert ours.tobytes() == bits(theirs.to(TORCH[target]))


@pytest.mark.parametrize(("source", "target"), [(np.float32, "fp16"), (np.float32, "bf16"), (np.float64, "fp32")])
@given(st.data())
@settings(max_examples=60)
def test_large_types_are_cast_as_torch_does(source: Any, target: str, data: st.DataObject) -> None:
    width = 8 * np.dtype(source).itemsize
    array = data.draw(hnp.arrays(source, st.integers(1, 50), elements=st.floats(width=width, allow_nan=False)))
    ours = cast(array, target, "inf")
    assert ours.tobytes() == bits(torch.from_numpy(array).to(TORCH[target]))


def nearest(value: float, target: str) -> float:
    """The nearest value of the type, ties to even, in exact numbers."""
    dtype = NUMPY[target]
    guess = np.array(value, np.float64).astype(dtype)
    unsigned = {2: np.uint16, 4: np.uint32}[guess.itemsize]
    code = int(guess.view(unsigned))
    around = [np.array(c, unsigned).view(dtype) for c in (code - 1, code, code + 1) if 0 <= c < 1 << 8 * guess.itemsize]
    exact = [(abs(Fraction(float(near)) - Fraction(value)), int(near.view(unsigned)) & 1, float(near))
             for near in around if np.isfinite(near) and np.sign(float(near)) in {0, np.sign(value)}]  # fmt: skip
    return min(exact)[2]


@pytest.mark.parametrize("target", NUMPY)
@given(st.integers(-14, 14), st.integers(1, 1 << 24), st.sampled_from([-1, 0, 1]), st.booleans())
@settings(max_examples=80)
def test_doubles_are_rounded_once(target: str, exponent: int, step: int, side: int, negative: bool) -> None:
    """Halfway between two values of the type, and a hair beside it, which a detour over float32 would lose.

    torch makes that detour.
    """
    mantissa = {"fp16": 10, "bf16": 7, "fp32": 23}[target]
    halfway = (1 + (step % (1 << mantissa) + 0.5) / (1 << mantissa)) * 2.0**exponent
    value = (halfway + side * 2.0 ** (exponent - 45)) * (-1 if negative else 1)
    assert float(cast(np.array([value]), target).numpy()[0]) == nearest(value, target)


def test_a_tie_that_only_a_detour_makes() -> None:
    value = 1 + 2**-8 + 2**-40
    assert float(cast(np.array([value]), "bf16").numpy()[0]) == 1 + 2**-7
    assert float(torch.tensor(value, dtype=torch.float64).to(torch.bfloat16)) == 1.0


@pytest.mark.parametrize("target", NUMPY)
def test_cast_touches_weights_and_nothing_else(target: str, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = cli("cast", whole, target, "-o", output, "--json")
    assert result.code == 0
    left = {SD1_IDS, *MARKERS, *GROUPS["schedule"], "model_ema.decay", "model_ema.num_updates", "depth_model.scale"}
    arrays, found = everything(), raw(output)
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        expected = raw(whole)[key] if key in left else raw_array(array.astype(NUMPY[target]), NAMES[target])
        assert found[key] == expected
    changed = {key for key, array in arrays.items() if key not in left and array.dtype != NUMPY[target]}
    assert {change["key"] for change in result.json["changes"]} == changed
    assert {change["kind"] for change in result.json["changes"]} == {"cast"}
    assert all(change["after"].startswith(NAMES[target]) for change in result.json["changes"])


@pytest.mark.parametrize("ids", [merged_ids(0.1, "float32"), merged_ids(0.1, "float16")], ids=["fp32", "fp16"])
def test_cast_leaves_broken_ids_to_fix_clip(ids: Any, tmp_path: Path) -> None:
    model = write(tmp_path / "model.safetensors", {**synthetic.model("sd1"), SD1_IDS: ids})
    output = tmp_path / "out.safetensors"
    assert cli("cast", model, "bf16", "-o", output).code == 0
    assert raw(output)[SD1_IDS] == raw(model)[SD1_IDS]


@pytest.mark.parametrize(
    ("component", "prefix"),
    [("unet", UNET), ("vae", "first_stage_model."), ("text_encoder", "cond_stage_model.")],
)
def test_cast_of_one_component(component: str, prefix: str, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert cli("cast", whole, "fp32", "--component", component, "-o", output).code == 0
    found = raw(output)
    for key, value in raw(whole).items():
        if key.startswith(prefix) and key != SD1_IDS:
            wide = np.frombuffer(value[2], {"F16": np.float16, "F32": np.float32}[value[0]]).astype(np.float32)
            assert found[key] == ("F32", value[1], wide.tobytes())
        else:
            assert found[key] == value


def test_cast_of_several_components(whole: Path) -> None:
    words = ["--component", "vae", "--component", "text_encoder"]
    changes = cli("cast", whole, "fp32", *words, "--dry-run", "--json").json["changes"]
    assert {change["key"].partition(".")[0] for change in changes} == {"first_stage_model", "cond_stage_model"}
    assert len(changes) == 248 + 196


def test_cast_of_a_component_that_isnt_there() -> None:
    result = cli("cast", FIXTURES / "vae.safetensors", "bf16", "--component", "unet", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert "no unet; it has vae" in result.json["error"]["message"]


def test_cast_to_what_it_is_already(tmp_path: Path) -> None:
    result = cli("cast", FIXTURES / "sd1-ids-ok.safetensors", "fp16", "--json")
    assert (result.code, result.json["changed"], result.json["output"]) == (0, False, None)
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    assert cli("cast", FIXTURES / "sd1-ids-ok.safetensors", "bf16", "-o", once).code == 0
    assert cli("cast", once, "bf16", "-o", twice).code == 0
    assert twice.read_bytes() == once.read_bytes()


def test_cast_up_and_back_is_the_identity(tmp_path: Path) -> None:
    up, back = tmp_path / "up.safetensors", tmp_path / "back.safetensors"
    assert cli("cast", FIXTURES / "merged.ckpt", "fp32", "-o", up).code == 0
    assert cli("cast", up, "fp16", "-o", back).code == 0
    assert raw(back) == raw_pickle(FIXTURES / "merged.ckpt")


def test_cast_of_every_float_type_and_no_other(tmp_path: Path) -> None:
    numbers = np.array([0.0, 1.0, -2.0, 0.5], np.float32)
    tensors = {}
    for name in ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        tensors[f"float.{name}"] = torch.from_numpy(numbers).to(getattr(torch, str(BY_NAME[name].torch)))
    for name in ("I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64"):
        tensors[f"int.{name}"] = torch.tensor([0, 1, 1, 0]).to(getattr(torch, str(BY_NAME[name].torch)))
    tensors["complex"] = torch.tensor([1 + 2j, 3 + 4j])
    from safetensors.torch import save_file

    model, output = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, model)
    assert cli("cast", model, "fp16", "-o", output).code == 0
    for key, value in raw(output).items():
        if key.startswith("float."):
            assert value == raw_array(numbers.astype(np.float16), "F16")
        else:
            assert value == raw(model)[key]


@pytest.mark.parametrize("name", ["F4", "F6_E2M3"])
def test_cast_of_what_numpy_doesnt_know_is_refused(name: str) -> None:
    dtype = BY_NAME[name]
    tensors = {"first.weight": sd.Tensor.of(np.ones(4, np.float32))}
    tensors["packed.weight"] = sd.Tensor(dtype, (8,), InMemory(bytes(dtype.nbytes((8,)))))
    with pytest.raises(sd.SurgeryError, match=name) as caught:
        sd.Cast("fp16")(sd.Checkpoint(tensors))
    assert (caught.value.kind, caught.value.key) == ("unsupported", "packed.weight")


def test_cast_of_scalars_and_of_nothing(tmp_path: Path) -> None:
    tensors = {"scalar": np.array(1.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    output = tmp_path / "out.safetensors"
    assert cli("cast", write(tmp_path / "model.safetensors", tensors), "fp16", "-o", output).code == 0
    expected = {key: raw_array(value.astype(np.float16), "F16") for key, value in tensors.items()}
    assert raw(output) == expected


def test_cast_of_more_than_a_chunk(tmp_path: Path) -> None:
    """Several chunks of several megabytes, in one tensor; with an odd number of elements."""
    numbers = np.random.PCG64(1).random_raw((9 << 20) // 4 + 3).astype(np.float32) / np.float32(2**64)
    model = write(tmp_path / "model.safetensors", {"big.weight": numbers})
    for target in ("fp16", "bf16"):
        output = tmp_path / f"{target}.safetensors"
        assert cli("cast", model, target, "-o", output).code == 0
        assert raw(output) == {"big.weight": raw_array(numbers.astype(NUMPY[target]), NAMES[target])}


@given(st.integers(1, 40), st.integers(1, 13), st.sampled_from(sorted(SOURCES)), st.sampled_from(sorted(NUMPY)))
@settings(max_examples=60)
def test_the_size_of_pieces_means_nothing(count: int, size: int, source: str, target: str) -> None:
    array = np.linspace(-3, 3, count).astype(SOURCES[source])
    cast_tensor = cast_module.cast_tensor(sd.Tensor.of(array), BY_NAME[NAMES[target]])
    assert b"".join(cast_tensor.chunks(size)) == array.astype(np.float64).astype(NUMPY[target]).tobytes()


# ---------------------------------------------------------------- cast: values that speak against it


def with_values(folder: Path, values: dict[str, Any], dtype: Any = np.float32) -> Path:
    tensors = synthetic.model("sd1", dtype=np.dtype(dtype).name)
    for key, value in values.items():
        tensors[key] = tensors[key].copy()
        tensors[key].reshape(-1)[0] = value
    return write(folder / "model.safetensors", tensors)


FIRST = UNET + "out.2.bias"
SECOND = "first_stage_model.decoder.conv_in.bias"


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [
        (np.float32, "fp16", 65520.0), (np.float32, "fp16", -1e30), (np.float64, "fp16", 65520.0),
        (np.float64, "fp32", 1e39), (np.float64, "bf16", -1e39), (np.float32, "bf16", 3.4e38),
    ],
)  # fmt: skip
def test_overflow_is_refused_before_anything_is_written(source: Any, target: str, value: float, tmp_path: Path) -> None:
    model = with_values(tmp_path, {FIRST: value}, source)
    result = cli("cast", model, target, "-o", tmp_path / "out.safetensors", "--json")
    assert (result.code, result.json["error"]["kind"], result.json["error"]["key"]) == (1, "refused", FIRST)
    assert "1 values in 1 tensors" in result.json["error"]["message"]
    assert list(tmp_path.iterdir()) == [model]
    assert cli("cast", model, target, "--in-place").code == 1
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(("value", "kept"), [(65504.0, 65504.0), (65519.996, 65504.0), (-65519.996, -65504.0)])
def test_what_rounds_to_the_largest_value_is_no_overflow(value: float, kept: float, tmp_path: Path) -> None:
    model, output = with_values(tmp_path, {FIRST: value}), tmp_path / "out.safetensors"
    result = cli("cast", model, "fp16", "-o", output, "--json")
    assert (result.code, result.json["notes"]) == (0, [])
    assert np.frombuffer(raw(output)[FIRST][2], np.float16)[0] == np.float16(kept)


def test_overflow_clipped(tmp_path: Path) -> None:
    model = with_values(tmp_path, {FIRST: 1e5, SECOND: -np.inf})
    output = tmp_path / "out.safetensors"
    result = cli("cast", model, "fp16", "--on-overflow", "clip", "-o", output, "--json")
    assert result.code == 0
    warned = {note["key"]: note["message"] for note in result.json["notes"] if note["level"] == "warning"}
    assert warned == {
        FIRST: f"1 values of {FIRST} are beyond F16 and are clipped",
        SECOND: f"{SECOND} holds 1 Inf",
    }
    found = raw(output)
    assert np.frombuffer(found[FIRST][2], np.float16)[0] == np.finfo(np.float16).max
    assert np.frombuffer(found[SECOND][2], np.float16)[0] == -np.inf  # it was Inf before


@pytest.mark.parametrize(("target", "value"), [("bf16", -1e39), ("fp32", 1e39)])
def test_overflow_clipped_to_the_largest_of_the_others(target: str, value: float) -> None:
    largest = float(torch.finfo(TORCH[target]).max)
    with np.errstate(all="ignore"):
        assert float(cast(np.array([value, 1.0]), target, "clip").numpy()[0]) == np.copysign(largest, value)
        assert float(cast(np.array([value, 1.0]), target, "inf").numpy()[0]) == np.copysign(np.inf, value)


def test_overflow_let_be_inf(tmp_path: Path) -> None:
    model, output = with_values(tmp_path, {FIRST: -1e5}), tmp_path / "out.safetensors"
    result = cli("cast", model, "fp16", "--on-overflow", "inf", "-o", output, "--json")
    assert result.code == 0
    assert [note["message"] for note in result.json["notes"]] == [f"1 values of {FIRST} are beyond F16 and become Inf"]
    assert np.frombuffer(raw(output)[FIRST][2], np.float16)[0] == -np.inf


@pytest.mark.parametrize("source", [np.float32, np.float64, np.float16])
def test_nan_and_inf_are_reported_and_kept(source: Any, tmp_path: Path) -> None:
    model = with_values(tmp_path, {FIRST: np.nan, SECOND: np.inf}, source)
    output = tmp_path / "out.safetensors"
    result = cli("cast", model, "bf16", "-o", output)
    assert result.code == 0
    assert f"warning: {FIRST} holds 1 NaN" in result.err
    assert f"warning: {SECOND} holds 1 Inf" in result.err
    found = raw(output)
    assert np.isnan(np.frombuffer(found[FIRST][2], ml_dtypes.bfloat16)[0])
    assert np.frombuffer(found[SECOND][2], ml_dtypes.bfloat16)[0] == np.inf
    assert "holds" in cli("cast", model, "bf16", "--dry-run", "--quiet").err


@given(st.data(), st.sampled_from(sorted(NUMPY)), st.sampled_from(sorted(SOURCES)))
@settings(max_examples=200)
def test_the_report_is_what_numpy_counts(data: st.DataObject, target: str, source: str) -> None:
    # All bits of the type, so that what lies about the target's largest value occurs.
    edge = st.sampled_from([65504.0, 65519.0, 65520.0, -65536.0, 1e5, 3.39e38, -3.4e38, 1e39, np.inf, np.nan, 0.5])
    with np.errstate(all="ignore"):
        array = np.array(data.draw(st.lists(edge | st.floats(), min_size=1, max_size=20))).astype(SOURCES[source])
        wide = array.astype(np.float64)
        converted = wide.astype(NUMPY[target]).astype(np.float64)
    checkpoint = sd.Checkpoint.from_state_dict({"w": array})
    same = source == NAMES[target]
    overflow = int((np.isfinite(wide) & np.isinf(converted)).sum())
    expected = {
        f"w holds {int(np.isnan(wide).sum())} NaN": np.isnan(wide).any(),
        f"w holds {int(np.isinf(wide).sum())} Inf": np.isinf(wide).any(),
        f"{overflow} values of w are beyond {NAMES[target]} and become Inf": overflow,
    }
    result = sd.Cast(target, on_overflow="inf")(checkpoint)  # type: ignore[arg-type]
    told = [note.message for note in result.notes]
    assert told == (
        [f"every weight is {target} already"] if same else [text for text, there in expected.items() if there]
    )
    if overflow:
        with pytest.raises(sd.SurgeryError) as caught:
            sd.Cast(target)(checkpoint)  # type: ignore[arg-type]
        assert (caught.value.exit_code, caught.value.key) == (1, "w")


def test_component_left_out_is_not_looked_at(tmp_path: Path) -> None:
    """The way out that the refusal names."""
    model = with_values(tmp_path, {FIRST: 1e6})
    words = ["--component", "vae", "--component", "text_encoder", "--dry-run"]
    assert cli("cast", model, "fp16", *words).code == 0
    assert cli("cast", model, "fp16", "--component", "unet", "--dry-run").code == 1


@pytest.mark.parametrize("words", [["fp8"], [], ["fp16", "--component", "ema"], ["fp16", "--on-overflow", "maybe"]])
def test_wrong_usage(words: list[str]) -> None:
    result = cli("cast", FIXTURES / "merged.ckpt", *words, "--json")
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")


def test_from_python_a_bad_type_is_refused() -> None:
    with pytest.raises(sd.SurgeryError, match="fp8") as caught:
        sd.Cast("fp8")  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_from_the_shell(tmp_path: Path) -> None:
    model = Path(shutil.copy(FIXTURES / "merged.ckpt", tmp_path))
    result = shell("cast", model.name, "bf16", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert "wrote merged.fixed.safetensors" in result.out
    assert {dtype for dtype, _, _ in raw(tmp_path / "merged.fixed.safetensors").values()} == {"BF16", "F32"}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("target", ["fp16", "bf16", "fp32"])
def test_a_nan_that_signals_is_counted_in_silence(dtype: str, target: Any) -> None:
    """NumPy warns of those, which in a real run would be noise on stderr, and is an error here."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bits = {"float16": 0x7C01, "float32": 0x7F800001, "float64": 0x7FF0000000000001, "bfloat16": 0x7F81}[dtype]
    array = np.array([bits], f"u{kind.itemsize}").view(kind)
    cast = sd.Cast(target)(sd.Checkpoint.from_state_dict({"weight": array}))
    with np.errstate(invalid="ignore"):
        assert np.isnan(cast["weight"].numpy().astype("float64")).all()
    changed = bool(cast.changes)
    assert [note.message for note in cast.notes if note.level == "warning"] == ["weight holds 1 NaN"] * changed
