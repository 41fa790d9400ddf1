"""The diagnosis of CLIP-L's position ids, against what torch does to them and what the contract says."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import synthetic
import torch
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from synthetic import NARROW, SD1_IDS, SDXL_IDS, merged_ids

import sdsurgery as sd
from sdsurgery.models.components import POSITION_IDS
from sdsurgery.models.identify import identify
from sdsurgery.models.position_ids import Diagnosis, diagnose
from sdsurgery.models.walks import ClipConfig, walk

RIGHT = np.arange(77, dtype=np.int64)[None]
EMBEDDING = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"


def text_encoder(positions: int = 77, prefix: str = "cond_stage_model.transformer.") -> dict[str, Any]:
    """A narrow CLIP-L of zeros."""
    config = ClipConfig(12, width=8, inner=32, vocabulary=64, positions=positions)
    return {prefix + weight.name: np.zeros(weight.shape, np.float16) for weight in walk(config)}


CLIP = text_encoder()


def diagnosis(tensors: dict[str, Any]) -> Diagnosis:
    checkpoint = sd.Checkpoint.from_state_dict(tensors)
    return diagnose(checkpoint, identify(checkpoint))


def of_ids(ids: Any, tensors: dict[str, Any] = CLIP, key: str = SD1_IDS) -> Diagnosis:
    return diagnosis({**tensors, key: ids})


# ---------------------------------------------------------------- the statuses


def test_ok() -> None:
    assert of_ids(RIGHT) == Diagnosis("ok", (), "I64", SD1_IDS)


def test_missing() -> None:
    assert diagnosis(CLIP) == Diagnosis("missing", (), None, SD1_IDS)


@pytest.mark.parametrize("family", ["sd2", "sdxl-refiner"])
def test_not_applicable_where_there_is_no_clip(family: str) -> None:
    assert diagnosis(synthetic.model(family)) == Diagnosis("not-applicable")


def test_not_applicable_to_an_unknown_file() -> None:
    assert diagnosis({"a": np.zeros(3), "position_ids": RIGHT}) == Diagnosis("not-applicable")


def test_not_applicable_in_spite_of_strays_elsewhere() -> None:
    stray = "cond_stage_model.model.transformer." + POSITION_IDS
    assert diagnosis({**synthetic.model("sd2"), stray: RIGHT}) == Diagnosis("not-applicable")


@pytest.mark.parametrize(
    "ids",
    [RIGHT[0], RIGHT[:, :76], np.arange(78)[None], RIGHT.T, RIGHT[None], np.array(3), np.zeros((1, 0), np.int64)],
    ids=["flat", "short", "long", "column", "deep", "scalar", "empty"],
)
def test_wrong_shape(ids: Any) -> None:
    found = of_ids(ids.copy())
    assert (found.status, found.dtype, found.key) == ("wrong-shape", "I64", SD1_IDS)


def test_wrong_shape_before_wrong_values_and_dtype() -> None:
    assert of_ids(2.5 * RIGHT[0].astype(np.float32)).status == "wrong-shape"


def test_wrong_values() -> None:
    """What an add-difference leaves when the third model has no ids."""
    assert of_ids(2 * RIGHT) == Diagnosis("wrong-values", tuple(range(1, 77)), "I64", SD1_IDS)


def test_wrong_values_before_fractional() -> None:
    ids = RIGHT.astype(np.float32)
    ids[0, 5], ids[0, 9] = 4.9, 11.0
    assert of_ids(ids) == Diagnosis("wrong-values", (5, 9), "F32", SD1_IDS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_wrong_values_where_they_are_no_numbers(value: float, dtype: Any) -> None:
    """Not even at 0, where a cast of NaN gives 0 on some machines."""
    count = 8  # float8_e5m2 holds whole numbers to 8
    ids = np.arange(count, dtype=np.float32).astype(dtype)[None]
    for place in (0, 3):
        damaged = ids.copy()
        damaged[0, place] = value
        found = of_ids(damaged, text_encoder(count))
        assert (found.status, found.wrong) == ("wrong-values", (place,))


def test_fractional_and_not_wrong_once_truncated() -> None:
    """A little too large: the truncating cast makes it right, and the ids are fractional all the same."""
    assert of_ids((RIGHT + 0.25).astype(np.float32)) == Diagnosis("fractional", (), "F32", SD1_IDS)


def test_fractional_a_little_too_small() -> None:
    assert of_ids((RIGHT - 0.25).astype(np.float32)) == Diagnosis("fractional", tuple(range(1, 77)), "F32", SD1_IDS)


@pytest.mark.parametrize(("shift", "status"), [(0.49, "fractional"), (0.51, "wrong-values")])
def test_fractional_ends_where_rounding_does(shift: float, status: str) -> None:
    assert of_ids(RIGHT + shift).status == status
    assert of_ids(RIGHT - shift).status == status


EXACT = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "U64": np.uint64, "U32": np.uint32, "I32": np.int32, "U16": np.uint16, "I16": np.int16, "I8": np.int8,
    "U8": np.uint8,
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_wrong_dtype(name: str) -> None:
    assert of_ids(RIGHT.astype(EXACT[name])) == Diagnosis("wrong-dtype", (), name, SD1_IDS)


# How far each holds whole numbers: fp8 e4m3 to 16, e5m2 to 8 (facts of the field, section 1).
SMALL = {
    "F8_E4M3": (ml_dtypes.float8_e4m3fn, 16),
    "F8_E5M2": (ml_dtypes.float8_e5m2, 8),
    "F8_E4M3FNUZ": (ml_dtypes.float8_e4m3fnuz, 16),
    "F8_E5M2FNUZ": (ml_dtypes.float8_e5m2fnuz, 8),
    "BOOL": (np.bool_, 1),
}


@pytest.mark.parametrize("name", SMALL)
def test_wrong_dtype_or_values_in_types_that_hold_few(name: str) -> None:
    dtype, most = SMALL[name]
    few = np.arange(most + 1, dtype=np.float32).astype(dtype)[None]
    assert of_ids(few, text_encoder(most + 1)) == Diagnosis("wrong-dtype", (), name, SD1_IDS)
    many = RIGHT.astype(np.float32).astype(dtype)
    found = of_ids(many)
    assert found.status == "wrong-values"
    assert found.wrong == tuple(np.flatnonzero(many.astype(np.float32)[0] != RIGHT[0]))
    assert found.wrong[0] == most + 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.int8])
def test_ids_that_torch_cast(dtype: torch.dtype) -> None:
    """What a cast of the whole model leaves: torch itself tells which survive the way back."""
    cast = torch.arange(77)[None].to(dtype)
    wrong = torch.nonzero(cast.to(torch.int64)[0] != torch.arange(77)).flatten().tolist()
    found = of_ids(cast)
    assert list(found.wrong) == wrong
    assert found.status == ("wrong-values" if wrong else "wrong-dtype")


def test_unexpected_where_the_layout_holds_none() -> None:
    bare = text_encoder(prefix="")
    assert of_ids(RIGHT, bare, POSITION_IDS) == Diagnosis("unexpected", (), "I64", POSITION_IDS)
    assert diagnosis(bare) == Diagnosis("ok")


@pytest.mark.parametrize(
    ("ids", "status"),
    [(RIGHT[0], "wrong-shape"), (2 * RIGHT, "wrong-values"), (RIGHT + 0.2, "fractional"), (RIGHT * 1.0, "wrong-dtype")],
)
def test_in_diffusers_layout_what_is_wrong_comes_before_unexpected(ids: Any, status: str) -> None:
    assert of_ids(ids.copy(), text_encoder(prefix=""), POSITION_IDS).status == status


# ---------------------------------------------------------------- how they break


def weighted_sum(alpha: float) -> torch.Tensor:
    """A1111's formula, with its multiplier: a Python number."""
    ids = torch.arange(77).float()[None]
    return (1 - alpha) * ids + alpha * ids


def test_a_merge_at_005_leaves_twelve_wrong() -> None:
    twelve = (13, 21, 26, 31, 37, 42, 47, 52, 57, 62, 69, 74)
    for alpha in (0.05, 0.95):
        assert of_ids(weighted_sum(alpha)) == Diagnosis("fractional", twelve, "F32", SD1_IDS)
    assert of_ids(merged_ids(0.05, "float32")).wrong == twelve


def test_a_merge_at_01_leaves_twenty_two_wrong() -> None:
    for ids in (weighted_sum(0.1), weighted_sum(0.9), merged_ids(0.1, "float32")):
        found = of_ids(ids)
        assert (found.status, len(found.wrong)) == ("fractional", 22)
        assert {3, 6, 7, 9} <= set(found.wrong)


def test_a_merge_at_05_leaves_none_wrong() -> None:
    assert of_ids(weighted_sum(0.5)) == Diagnosis("wrong-dtype", (), "F32", SD1_IDS)


def test_a_merge_in_fp16_at_02_leaves_eighteen_wrong() -> None:
    ids, alpha = torch.arange(77).to(torch.float16)[None], torch.tensor(0.2, dtype=torch.float16)
    found = of_ids((1 - alpha) * ids + alpha * ids)
    assert (found.status, len(found.wrong), found.dtype) == ("fractional", 18, "F16")


@given(st.floats(0, 1, width=32))
@settings(max_examples=60)
def test_torchs_lerp_breaks_none(alpha: float) -> None:
    ids = torch.arange(77).float()[None]
    assert of_ids(torch.lerp(ids, ids, alpha)).wrong == ()


@given(st.floats(0, 1, width=32))
@settings(max_examples=60)
def test_any_weighted_sum_is_recoverable(alpha: float) -> None:
    """Which ids break depends on alpha; rounding recovers all of them."""
    ids = weighted_sum(alpha)
    found = of_ids(ids)
    assert found.status in {"fractional", "wrong-dtype"}
    truncated = ids.to(torch.int64)[0]
    assert list(found.wrong) == torch.nonzero(truncated != torch.arange(77)).flatten().tolist()


def test_ids_truncated_by_another_tool() -> None:
    """A truncating fixer makes int64 of 0.99: the right dtype with wrong values, not fractional."""
    ids = merged_ids(0.1, "float32").astype(np.int64)
    found = of_ids(ids)
    assert (found.status, len(found.wrong), found.dtype) == ("wrong-values", 22, "I64")


# ---------------------------------------------------------------- other lengths, other places


def test_long_clip_has_248_positions() -> None:
    long = text_encoder(248)
    assert of_ids(np.arange(248)[None], long).status == "ok"
    assert of_ids(RIGHT, long).status == "wrong-shape"
    assert of_ids(np.arange(248)[None]).status == "wrong-shape"


def test_positions_beyond_what_fp16_and_bf16_hold() -> None:
    """fp16 holds whole numbers to 2048, bf16 to 256."""
    for dtype, most in ((np.float16, 2048), (ml_dtypes.bfloat16, 256)):
        for count, status in ((most + 1, "wrong-dtype"), (most + 2, "wrong-values")):
            ids = np.arange(count, dtype=np.float32).astype(dtype)[None]
            assert of_ids(ids, text_encoder(count)).status == status


@pytest.mark.parametrize("damage", ["missing", "flat"])
def test_without_a_sound_position_embedding_there_are_77(damage: str) -> None:
    tensors = {**CLIP, EMBEDDING: np.zeros(616, np.float16)}
    if damage == "missing":
        del tensors[EMBEDDING]
    assert of_ids(RIGHT, tensors).status == "ok"
    assert of_ids(np.arange(248)[None], tensors).status == "wrong-shape"


def test_sdxl_has_them_in_its_first_text_encoder() -> None:
    model = synthetic.model("sdxl")
    assert diagnosis(model) == Diagnosis("ok", (), "I64", SDXL_IDS)
    del model[SDXL_IDS]
    assert diagnosis(model) == Diagnosis("missing", (), None, SDXL_IDS)
    assert of_ids(merged_ids(0.05, "float32"), model, SDXL_IDS).status == "fractional"


def test_under_a_wrapper_and_in_the_flat_dialect() -> None:
    flat = SD1_IDS.replace("text_model.", "")
    tensors = {key.replace("text_model.", ""): value for key, value in CLIP.items()}
    assert of_ids(2 * RIGHT, tensors, flat) == Diagnosis("wrong-values", tuple(range(1, 77)), "I64", flat)
    # Where none are, they belong to the right place.
    assert diagnosis(tensors) == Diagnosis("missing", (), None, SD1_IDS)
    wrapped = {"module." + key: value for key, value in CLIP.items()}
    assert of_ids(RIGHT, wrapped, "module." + SD1_IDS) == Diagnosis("ok", (), "I64", "module." + SD1_IDS)


def test_ids_of_absurd_size_are_not_read() -> None:
    from sdsurgery.dtypes import BY_NAME
    from sdsurgery.sources import Computed

    def unread(size: int) -> Any:
        raise AssertionError("gigabytes were read")

    dtype = BY_NAME["I64"]
    huge = sd.Tensor(dtype, (1, 1 << 30), Computed(8 << 30, unread))
    assert of_ids(huge) == Diagnosis("wrong-shape", (), "I64", SD1_IDS)


# ---------------------------------------------------------------- the contract, said again in NumPy


def said_again(ids: np.ndarray[Any, Any], count: int, *, diffusers: bool) -> tuple[str, tuple[int, ...]]:
    """The contract's words, one by one; values by NumPy."""
    exact = ids.dtype.kind in "iub"
    values = ids.reshape(-1) if exact else ids.reshape(-1).astype(np.float64)
    arange = np.arange(values.size)

    def equal(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        # Element by element, as Python's own numbers, so that no type is widened into another.
        return np.array([number.item() == place for number, place in zip(numbers, arange, strict=True)], dtype=bool)

    wrong = tuple(np.flatnonzero(~equal(values if exact else np.trunc(values))).tolist())
    if ids.shape != (1, count):
        return "wrong-shape", wrong
    if not equal(values if exact else np.rint(values)).all():
        return "wrong-values", wrong
    if not equal(values).all():
        return "fractional", wrong
    if ids.dtype != np.int64:
        return "wrong-dtype", wrong
    return ("unexpected" if diffusers else "ok"), wrong


DTYPES = [*(np.dtype(dtype) for dtype in EXACT.values()), np.dtype(np.int64), np.dtype(np.bool_)]
DTYPES += [np.dtype(dtype) for dtype, _ in SMALL.values()]


@st.composite
def damaged_ids(draw: Any) -> tuple[np.ndarray[Any, Any], int]:
    """Ids of some length and dtype, some of them shifted, replaced or scaled, in some shape."""
    count = draw(st.sampled_from([1, 2, 9, 77]))
    dtype = draw(st.sampled_from(DTYPES))
    ids = np.arange(count, dtype=np.float64)
    kind = draw(st.sampled_from(["none", "merge", "shift", "values"]))
    if kind == "merge":
        ids = merged_ids(draw(st.floats(0, 1, width=32)), "float64").reshape(-1)[:count]
    elif kind == "shift":
        places = draw(st.sets(st.integers(0, count - 1), min_size=1))
        ids[list(places)] += draw(st.floats(-1.5, 1.5))
    with np.errstate(all="ignore"):
        array = ids.astype(dtype)
    if kind == "values":
        if dtype.type.__module__ == "numpy":
            array = draw(hnp.arrays(dtype, count))
        else:
            bits = draw(hnp.arrays(np.dtype(f"u{dtype.itemsize}"), count))
            array = bits.view(dtype)
    shape = draw(st.sampled_from([(1, count)] * 6 + [(count,), (count, 1), (1, 1, count)]))
    return array.reshape(shape), count


SMALLER = {count: {form: text_encoder(count, form) for form in ("", "cond_stage_model.transformer.")}
           for count in (1, 2, 9, 77)}  # fmt: skip


@given(damaged_ids(), st.booleans())
@settings(max_examples=500)
def test_any_damage_is_told_as_the_contract_words_it(damage: tuple[np.ndarray[Any, Any], int], diffusers: bool) -> None:
    ids, count = damage
    prefix = "" if diffusers else "cond_stage_model.transformer."
    with np.errstate(all="ignore"):
        expected = said_again(ids, count, diffusers=diffusers)
    found = of_ids(ids, SMALLER[count][prefix], prefix + POSITION_IDS)
    assert (found.status, found.wrong) == expected
    assert found.key == prefix + POSITION_IDS


# ---------------------------------------------------------------- the fixtures

CASES = {
    "sd1-ids-ok.safetensors": ("ok", 0, "I64"),
    "sd1-ids-missing.safetensors": ("missing", 0, None),
    "sd1-ids-wrong-dtype.safetensors": ("wrong-dtype", 0, "F16"),
    "sd1-ids-fractional.safetensors": ("fractional", 22, "F32"),
    "sd1-ids-fractional-fp16.safetensors": ("fractional", 18, "F16"),
    "sd1-ids-wrong-values.safetensors": ("wrong-values", 76, "I64"),
    "sd1-ids-wrong-shape.safetensors": ("wrong-shape", 0, "I64"),
    "clip-ids-unexpected.safetensors": ("unexpected", 0, "I64"),
    "sd1-flat-text-encoder.safetensors": ("ok", 0, "I64"),
    "sd1-wrapped.safetensors": ("ok", 0, "I64"),
    "sd2-stray-ids.safetensors": ("not-applicable", 0, None),
    "sdxl-ids-fractional.safetensors": ("fractional", 12, "F32"),
    "vae.safetensors": ("not-applicable", 0, None),
    "merged.ckpt": ("fractional", 22, "F32"),
    "sd1-full-ema.ckpt": ("ok", 0, "I64"),
    "sd1-legacy.ckpt": ("ok", 0, "I64"),
}


@pytest.mark.parametrize("name", CASES)
def test_fixtures(name: str) -> None:
    checkpoint = sd.open(FIXTURES / name)
    found = diagnose(checkpoint, identify(checkpoint))
    assert (found.status, len(found.wrong), found.dtype) == CASES[name]


def test_full_size_needs_no_more_than_the_ids() -> None:
    """Only the ids are read, whatever the model's size."""
    from conftest import outline

    shapes = synthetic.shapes("sd1", synthetic.FULL["sd1"])
    checkpoint = outline(shapes)
    checkpoint = sd.Checkpoint({**checkpoint, SD1_IDS: sd.Tensor.of(RIGHT)})
    assert diagnose(checkpoint, identify(checkpoint)).status == "ok"
    assert NARROW["sd1"].clip != synthetic.FULL["sd1"].clip
