"""What verify counts in a tensor's values, held against counting them one by one in float64."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdsurgery as sd
from sdsurgery.arrays import PIECE
from sdsurgery.dtypes import BY_NAME, CAST_TARGETS
from sdsurgery.errors import RefusedError
from sdsurgery.operations.cast import check_values
from sdsurgery.sources import InMemory, Joined
from sdsurgery.values import Values, readable, scan

FLOATS = {
    "F64": np.float64, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
RARE = {
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
WHOLE = {name: np.dtype(str(BY_NAME[name].numpy)) for name in
         ("U64", "I64", "U32", "I32", "U16", "I16", "U8", "I8", "BOOL")}  # fmt: skip
COMPLEX = {"C64": np.dtype("complex64"), "C128": np.dtype("complex128")}
TYPES = {**FLOATS, **RARE, **WHOLE, **COMPLEX}
SMALLEST_NORMAL = {name: float(ml_dtypes.finfo(kind).smallest_normal) for name, kind in FLOATS.items()}


def tensor(array: np.ndarray[Any, Any], name: str) -> sd.Tensor:
    return sd.Tensor(BY_NAME[name], array.shape, InMemory(array.tobytes()))


def counted(array: np.ndarray[Any, Any], name: str) -> Values:
    """One element after the other."""
    numbers = array.reshape(-1)
    nan = infinite = overflow = denormal = 0
    for number in numbers if name not in WHOLE else ():
        wide = complex(number) if name in COMPLEX else complex(float(number))
        parts = (wide.real, wide.imag)
        nan += any(map(math.isnan, parts))
        infinite += any(map(math.isinf, parts))
        size = abs(float(number)) if name in FLOATS else 0.0
        overflow += name in FLOATS and math.isfinite(size) and size >= 65520
        denormal += name in FLOATS and 0 < size < SMALLEST_NORMAL.get(name, 0)
    same = numbers.size > 0 and all(number.tobytes() == numbers[0].tobytes() for number in numbers)
    constant = float(numbers[0]) if same and name not in COMPLEX else None
    return Values(numbers.size, nan, infinite, overflow, denormal, constant)


def assert_same(found: Values, expected: Values) -> None:
    """Equal, NaN to NaN and the sign of zero included."""
    assert str(found) == str(expected)


def shaped(data: st.DataObject, name: str) -> np.ndarray[Any, Any]:
    """Any bytes, and often those of what is special."""
    kind = np.dtype(TYPES[name])
    shape = data.draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (0, 4), (3, 1, 2)]))
    count = math.prod(shape)
    if name == "BOOL":
        return np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool).reshape(shape)
    chunk = st.binary(min_size=kind.itemsize, max_size=kind.itemsize)
    special = st.sampled_from(SPECIAL.get(name, [0.0])).map(lambda value: np.array(value).astype(kind).tobytes())
    if name in FLOATS:
        chunk |= special
    whole = st.lists(chunk, min_size=count, max_size=count) | chunk.map(lambda one: [one] * count)
    return np.frombuffer(b"".join(data.draw(whole)), kind).reshape(shape)


_NUMBERS = [
    0.0, -0.0, 1.0, math.nan, -math.nan, math.inf, -math.inf, 65504.0, 65519.0, 65519.996, 65520.0, -65520.0, 65536.0,
    1e30, -1e30,
]  # fmt: skip
SPECIAL = {
    name: [number for number in _NUMBERS if name in {"F64", "F32", "BF16"} or not abs(number) > 448]
    + [smallest, -smallest, smallest / 2, smallest * 1.5]
    for name, smallest in SMALLEST_NORMAL.items()
}


@given(data=st.data())
@settings(max_examples=400)
def test_counts_are_those_of_counting(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TYPES)))
    array = shaped(data, name)
    assert_same(scan(tensor(array, name)), counted(array, name))


@pytest.mark.parametrize("name", sorted({**FLOATS, **RARE}))
def test_every_value_of_a_narrow_type(name: str) -> None:
    kind = np.dtype(TYPES[name])
    if kind.itemsize > 2:
        kinds = {8: "u8", 4: "u4"}
        high = np.arange(1 << 16, dtype=kinds[kind.itemsize]) << (8 * kind.itemsize - 16)
        array = np.concatenate([high, high + 1, high - 1]).view(kind)
    else:
        array = np.arange(256**kind.itemsize, dtype=f"u{kind.itemsize}").view(kind)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = array.astype(np.float64)
    size = np.abs(wide)
    finite = np.isfinite(wide)
    expected = Values(
        array.size,
        int(np.isnan(wide).sum()),
        int(np.isinf(wide).sum()),
        int((finite & (size >= 65520)).sum()) if name in FLOATS else 0,
        int(((size > 0) & (size < SMALLEST_NORMAL[name])).sum()) if name in FLOATS else 0,
        None,
    )
    assert_same(scan(tensor(array, name)), expected)


@pytest.mark.parametrize("name", sorted(FLOATS))
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("pieces", [1, 2])
def test_around_the_size_of_a_piece(name: str, more: int, pieces: int) -> None:
    """What is special lies last, or first, or on both sides of a border."""
    kind = np.dtype(FLOATS[name])
    border = PIECE // kind.itemsize
    count = pieces * border + more
    array = np.full(count, 0.5, kind)
    assert_same(scan(tensor(array, name)), Values(count, 0, 0, 0, 0, 0.5))
    for place in {0, min(border - 1, count - 1), min(border, count - 1), count - 1}:
        spoilt = array.copy()
        spoilt[place] = math.nan
        assert_same(scan(tensor(spoilt, name)), Values(count, 1, 0, 0, 0, None))
        spoilt[place] = SMALLEST_NORMAL[name] / 2
        assert_same(scan(tensor(spoilt, name)), Values(count, 0, 0, 0, 1, None))


def test_pieces_that_differ_are_no_constant() -> None:
    border = PIECE // 4
    halves = np.concatenate([np.full(border, 1.0, np.float32), np.full(border, 2.0, np.float32)])
    assert scan(tensor(halves, "F32")).constant is None
    inner = np.full(border, 1.0, np.float32)
    inner[border // 2] = 2.0
    assert scan(tensor(inner, "F32")).constant is None


def test_progress_is_told_of_every_byte_and_joins_are_read_through() -> None:
    array = np.arange(200_001, dtype=np.float32)
    content = array.tobytes()
    joined = sd.Tensor(BY_NAME["F32"], array.shape, Joined((InMemory(content[:333_333]), InMemory(content[333_333:]))))
    told: list[int] = []
    assert_same(scan(joined, told.append), scan(tensor(array, "F32")))
    assert sum(told) == len(content)
    assert scan(joined).overflow == 200_001 - 65_520


@pytest.mark.parametrize("name", ["F64", "F32", "BF16", "F16"])
def test_zeros_of_two_signs_and_payloads_of_nan_are_no_constant(name: str) -> None:
    kind = np.dtype(FLOATS[name])
    zeros = np.array([0.0, 0.0, -0.0], kind)
    assert scan(tensor(zeros, name)).constant is None
    assert_same(scan(tensor(zeros[:2], name)), Values(2, 0, 0, 0, 0, 0.0))
    assert_same(scan(tensor(zeros[2:], name)), Values(1, 0, 0, 0, 0, -0.0))
    bits = np.full(4, math.nan, kind).view(f"u{kind.itemsize}")
    assert math.isnan(scan(tensor(bits.view(kind), name)).constant or 0)
    bits[1] |= 1
    found = scan(tensor(bits.view(kind), name))
    assert (found.nan, found.infinite, found.constant) == (4, 0, None)


@pytest.mark.parametrize(
    ("name", "below", "beyond"),
    [
        ("F64", math.nextafter(65520.0, 0), 65520.0),
        ("F32", float(np.nextafter(np.float32(65520), np.float32(0))), 65520.0),
        ("BF16", 65280.0, 65536.0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_fp16_overflows_from_half_a_step_beyond_its_largest(name: str, below: float, beyond: float, sign: int) -> None:
    kind = np.dtype(FLOATS[name])
    for value, count in ((below, 0), (beyond, 1)):
        array = np.array([sign * value, 0.5], kind)
        assert float(array[0]) == sign * value
        assert scan(tensor(array, name)).overflow == count
        with np.errstate(over="ignore"):
            assert int(np.isinf(array.astype(np.float16)).sum()) == count


@given(data=st.data())
@settings(max_examples=150)
def test_overflow_is_what_a_cast_to_fp16_refuses(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["F64", "F32", "BF16", "F8_E5M2", "F8_E4M3"]))
    array = shaped(data, name)
    found = scan(tensor(array, name))
    weight = {"weight": tensor(array, name)}
    checkpoint = sd.Checkpoint(weight)
    notes = [note.message for note in check_values(weight, CAST_TARGETS["fp16"], checkpoint, "", "inf")]
    expected = [f"weight holds {found.nan} NaN"] * bool(found.nan)
    expected += [f"weight holds {found.infinite} Inf"] * bool(found.infinite)
    expected += [f"{found.overflow} values of weight are beyond F16 and become Inf"] * bool(found.overflow)
    assert notes == expected
    if found.overflow:
        with pytest.raises(RefusedError):
            list(check_values(weight, CAST_TARGETS["fp16"], checkpoint, "", "refuse"))


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_what_can_be_read(name: str) -> None:
    dtype = BY_NAME[name]
    assert readable(sd.Tensor(dtype, (8,), InMemory(bytes(dtype.nbytes((8,)))))) == (name in TYPES)


@pytest.mark.parametrize("name", ["F64", "F32", "BF16", "F16"])
def test_a_nan_that_signals_is_no_reason_to_speak_up(name: str) -> None:
    """Warnings of NumPy would stand between the lines of a report, and are errors here."""
    layout = ml_dtypes.finfo(np.dtype(FLOATS[name]))
    bits = (np.full(70, math.inf, layout.dtype).view(f"u{layout.dtype.itemsize}") + 1).view(layout.dtype)
    found = scan(tensor(bits, name))
    assert (found.nan, found.infinite, math.isnan(found.constant or 0)) == (70, 0, True)
