"""The safetensors container against the reference library, on random files, lying files and damaged files."""

from __future__ import annotations

import json
import random
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from container_support import (
    FIXTURES,
    LIBRARY_WRITES,
    Raw,
    State,
    header_of,
    in_memory,
    library_bytes,
    library_state,
    mutants,
    random_state,
    raw_state,
    refusal,
    run_python,
    with_header,
)
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

import sdsurgery as sd
from sdsurgery.containers import safetensors
from sdsurgery.dtypes import BY_NAME, SAFETENSORS_RANK

STORABLE = sorted(SAFETENSORS_RANK)

_extents = st.lists(st.sampled_from((0, 1, 1, 2, 3, 5)), max_size=4).map(tuple)
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
_keys = _text.filter(lambda key: key != safetensors.METADATA_KEY)
_metadata = st.dictionaries(_text, _text, max_size=3)


@st.composite
def states(draw: st.DrawFn) -> State:
    """Small state dicts: any type, scalars and empty tensors, odd keys, contents from one seed."""
    layout = draw(st.dictionaries(_keys, st.tuples(st.sampled_from(STORABLE), _extents), max_size=6))
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    state = {}
    for key, (name, extents) in layout.items():
        shape = extents
        if BY_NAME[name].bits % 8:  # packed types fill whole bytes in fours
            shape = (*extents[:-1], 4 * extents[-1]) if extents else (4,)
        nbytes = BY_NAME[name].nbytes(shape)
        content = bytes(chance.getrandbits(1) for _ in range(nbytes)) if name == "BOOL" else chance.randbytes(nbytes)
        state[key] = Raw(name, shape, content)
    return state


def save_bytes(state: State, metadata: dict[str, str], path: Path) -> bytes:
    in_memory(state, metadata).save(path, force=True)
    return path.read_bytes()


@pytest.mark.parametrize("shard", range(4))
def test_ten_thousand_state_dicts_agree_with_the_library(shard: int, scratch: Path) -> None:
    ours, theirs = scratch / "ours.safetensors", scratch / "theirs.safetensors"

    @seed(shard)
    @settings(max_examples=2500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(states(), _metadata)
    @example({}, {})
    @example({"": Raw("F32", (), b"\0\0\x80?")}, {"": ""})
    def check(state: State, metadata: dict[str, str]) -> None:
        content = save_bytes(state, metadata, ours)
        assert library_state(content) == state
        if safe_metadata := metadata:
            with safe_open(ours, "np") as handle:
                assert handle.metadata() == safe_metadata

        opened = sd.open(ours)
        assert raw_state(opened) == state
        assert opened.metadata == metadata

        reversed_order = dict(reversed(state.items()))
        assert save_bytes(reversed_order, dict(reversed(metadata.items())), theirs) == content
        opened.save(theirs, force=True)
        assert theirs.read_bytes() == content

        writable = {key: tensor for key, tensor in state.items() if tensor.dtype in LIBRARY_WRITES}
        by_library = library_bytes(writable, metadata)
        theirs.write_bytes(by_library)
        read_back = sd.open(theirs)
        assert raw_state(read_back) == writable
        assert list(read_back) == [key for key in header_of(by_library) if key != safetensors.METADATA_KEY]
        assert read_back.metadata == metadata
        if len(metadata) <= 1:
            assert save_bytes(writable, metadata, ours) == by_library

    check()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states())
def test_torch_and_numpy_front_ends_read_what_is_written(state: State, scratch: Path) -> None:
    from safetensors.numpy import load_file as load_numpy
    from safetensors.torch import _TYPES
    from safetensors.torch import load_file as load_torch

    path = scratch / "file.safetensors"
    readable = {key: tensor for key, tensor in state.items() if tensor.dtype in _TYPES}
    in_memory(readable).save(path, force=True)
    loaded = load_torch(path)
    assert raw_state(sd.Checkpoint.from_state_dict(loaded)) == readable
    assert {key: raw_state({key: sd.open(path)[key]})[key] for key in loaded} == readable
    assert all(sd.open(path)[key].torch().equal(value) or value.is_floating_point() or value.is_complex()
               for key, value in loaded.items())  # fmt: skip

    plain = {key: tensor for key, tensor in readable.items() if not tensor.dtype.startswith(("BF", "F8"))}
    in_memory(plain).save(path, force=True)
    arrays = load_numpy(path)
    assert raw_state(sd.Checkpoint.from_state_dict(arrays)) == plain
    for key, value in arrays.items():
        assert sd.open(path)[key].numpy().tobytes() == value.tobytes()
        assert sd.open(path)[key].numpy().shape == value.shape


def test_types_are_ordered_as_the_library_orders_them() -> None:
    # Keys against the order of types, so that neither can stand in for the other.
    names = sorted(LIBRARY_WRITES, key=SAFETENSORS_RANK.__getitem__)
    state = {
        f"{len(names) - place:03}": Raw(name, (8,), bytes(BY_NAME[name].nbytes((8,))))
        for place, name in enumerate(names)
    }
    entries = header_of(library_bytes(state))
    assert [entry["dtype"] for entry in entries.values()] == names
    assert set(names) == set(SAFETENSORS_RANK) - {"F6_E3M2", "F6_E2M3"}  # the library reads those and writes none


def test_the_whole_table_of_types_is_the_librarys(scratch: Path) -> None:
    for name in STORABLE:
        nbytes = BY_NAME[name].nbytes((8,))
        entry = {"a": {"dtype": name, "shape": [8], "data_offsets": [0, nbytes]}}
        content = with_header(json.dumps(entry).encode(), bytes(range(nbytes)))
        path = scratch / "file.safetensors"
        path.write_bytes(content)
        assert raw_state(sd.open(path)) == library_state(content) == {"a": Raw(name, (8,), bytes(range(nbytes)))}


def test_more_metadata_is_sorted_and_always_the_same(scratch: Path) -> None:
    metadata = {f"{number % 7}-{number}": f"value {number}" for number in range(40)}
    first = save_bytes(random_state(), metadata, scratch / "a.safetensors")
    second = save_bytes(random_state(), dict(reversed(metadata.items())), scratch / "a.safetensors")
    assert first == second
    written = header_of(first)[safetensors.METADATA_KEY]
    assert list(written) == sorted(metadata)
    assert written == metadata
    assert library_state(first) == random_state()


def test_the_header_is_padded_so_that_data_begin_at_a_multiple_of_eight(scratch: Path) -> None:
    for length in range(1, 20):
        content = save_bytes({"k" * length: Raw("U8", (3,), b"abc")}, {}, scratch / "a.safetensors")
        assert struct.unpack("<Q", content[:8])[0] % 8 == 0
        assert content.endswith(b"abc")


@pytest.mark.parametrize(
    ("state", "metadata"),
    [
        ({"__metadata__": Raw("U8", (1,), b"a")}, {}),
        ({"\ud800": Raw("U8", (1,), b"a")}, {}),
        ({"a": Raw("U8", (1,), b"a")}, {"\udfff": "x"}),
        ({"a": Raw("U8", (1,), b"a")}, {"x": "\ud800"}),
        ({"a": Raw("C128", (1,), bytes(16))}, {}),
        ({"a": Raw("C32", (1,), bytes(4))}, {}),
        ({"a": Raw("U8", (1,), b"a")}, {"x": "y" * (safetensors.MAX_HEADER + 1)}),
    ],
    ids=["key-metadata", "key-surrogate", "metadata-key", "metadata-value", "complex128", "complex32", "too-long"],
)
def test_what_safetensors_cannot_hold_is_refused_before_a_file_exists(
    state: State, metadata: dict[str, str], scratch: Path
) -> None:
    with pytest.raises(sd.SurgeryError) as caught:
        in_memory(state, metadata).save(scratch / "a.safetensors")
    assert caught.value.exit_code == 3
    assert caught.value.remedy
    assert not list(scratch.iterdir())


# Files that lie. The library reads those listed here, and we are stricter on purpose.
STRICTER = {"entry-list"}
BROKEN = sorted((FIXTURES / "broken").glob("*.safetensors"))


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_broken_files_are_refused(path: Path) -> None:
    error = refusal(path)
    assert error is not None
    assert len(str(error)) < 500
    assert error.remedy
    if path.stem in STRICTER:
        assert library_state(path.read_bytes())
    else:
        with pytest.raises(SafetensorError):
            library_state(path.read_bytes())


ENTRY = b'"dtype":"U8","shape":[4],"data_offsets":[0,4]'


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"U8","shape":{},"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":"","data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":null,"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[false,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1.0]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":{"0":0,"1":1}}}',
        b'{"a":{"dtype":"U8","shape":[1]}}',
        b'{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"C128","shape":[1],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F6_E2M3","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}',
        b'{"a":null}',
        b'{"a":{%s}} x' % ENTRY,
        b'\xef\xbb\xbf{"a":{%s}}' % ENTRY,
        b'{"a":{%s},}' % ENTRY,
        b'{"a":{%s},"__metadata__":{"a":1}}' % ENTRY,
        b'{"a":{%s},"__metadata__":{"a":null}}' % ENTRY,
        b'{"a":{%s},"__metadata__":[]}' % ENTRY,
        b'{"a":{%s},"__metadata__":{"\\ud800":"b"}}' % ENTRY,
        b'{"a":{%s},"__metadata__":{"b":"\\udfff"}}' % ENTRY,
        b'{"a\x01":{%s}}' % ENTRY,
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[NaN,1]}}',
        b'{"a":{"dtype":"U8","shape":[18446744073709551616,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[5,5]}}',
        b"",
    ],
)
def test_headers_that_the_library_refuses_are_refused(header: bytes, scratch: Path) -> None:
    for data in (b"", b"\0", bytes(4), bytes(16)):
        content = with_header(header, data)
        with pytest.raises(SafetensorError):
            library_state(content)
        path = scratch / "file.safetensors"
        path.write_bytes(content)
        assert refusal(path) is not None


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{}", b""),
        (b"{}" + b" \n\t\r" * 9, b""),
        (b'{"__metadata__":{}}', b""),
        (b'{"__metadata__":null,"a":{%s}}' % ENTRY, b"abcd"),
        (b'{ "a" : { %s } }' % ENTRY.replace(b",", b" ,\n"), b"abcd"),
        (b'{"a":{"data_offsets":[0,4],"shape":[2,2],"dtype":"U8"}}', b"abcd"),
        (b'{"a":{%s,"x":{"y":[1.5,-2,true,null,"z"]}}}' % ENTRY, b"abcd"),
        (b'{"z":{"dtype":"U8","shape":[2],"data_offsets":[2,4]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
         b"abcd"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"b":{%s}}' % ENTRY, b"abcd"),
        (b'{"a":{%s},"b":{"dtype":"U8","shape":[9,0],"data_offsets":[4,4]}}' % ENTRY, b"abcd"),
        (b'{"\\u00e9\\ud83d\\ude00\\n":{%s}}' % ENTRY, b"abcd"),
    ],
)  # fmt: skip
def test_odd_but_sound_headers_are_read_as_the_library_reads_them(header: bytes, data: bytes, scratch: Path) -> None:
    path = scratch / "file.safetensors"
    path.write_bytes(with_header(header, data))
    assert raw_state(sd.open(path)) == library_state(path.read_bytes())


def test_the_longest_header_is_the_librarys(scratch: Path) -> None:
    path = scratch / "file.safetensors"
    for surplus in (0, 1):
        path.write_bytes(with_header(b"{}".ljust(safetensors.MAX_HEADER + surplus)))
        if surplus:
            with pytest.raises(SafetensorError, match="too large"):
                safe_open(path, "np").__enter__()
            assert "100000001" in str(refusal(path))
        else:
            assert safe_open(path, "np").__enter__().keys() == []
            assert len(sd.open(path)) == 0


# Damage.


def _bases() -> list[bytes]:
    state = random_state(1) | {
        "empty": Raw("F32", (3, 0), b""),
        "scalar": Raw("I64", (), bytes(8)),
        "packed": Raw("F4", (8,), b"abcd"),
        'odd "key"\n\u00e9\U0001f600': Raw("C64", (2,), bytes(range(16))),
    }
    return [
        library_bytes({}),
        library_bytes({"a": Raw("U8", (4,), b"abcd")}),
        library_bytes(state),
        library_bytes(state, {"format": "pt"}),
        library_bytes(random_state(2, tensors=40, nbytes=32), {"sshs_model_hash": "0" * 64}),
    ]


def _library_verdict(path: Path, content: bytes) -> tuple[State, dict[str, str]] | None:
    try:
        state = library_state(content)
        with safe_open(path, "np") as handle:
            return state, handle.metadata() or {}
    except (SafetensorError, ValueError, OverflowError):
        return None


@pytest.mark.parametrize("number", range(4))
def test_damaged_files_are_refused_or_read_as_the_library_reads_them(number: int, scratch: Path) -> None:
    path = scratch / "file.safetensors"
    readable = accepted = refused = 0
    for content in mutants(_bases(), 3000, number, focus=400):
        path.write_bytes(content)
        verdict = _library_verdict(path, content)
        readable += verdict is not None
        error = refusal(path)
        if error is not None:
            refused += 1
            assert len(str(error)) < 1000
            continue
        accepted += 1
        opened = sd.open(path)
        assert verdict == (raw_state(opened), dict(opened.metadata)), content
    # Neither side of the comparison is empty, and strictness is no excuse for refusing sound files.
    assert refused > 1000
    assert accepted > 100
    assert accepted >= 0.97 * readable


@pytest.mark.parametrize("number", range(2))
def test_edited_headers_are_refused_or_read_as_the_library_reads_them(number: int, scratch: Path) -> None:
    """Changes that keep the JSON whole, and so get past the parser."""
    chance = random.Random(number)
    path = scratch / "file.safetensors"
    values = ["0", "1", "4", "-1", "8.0", "true", "null", '""', "[]", "{}", "[0]", '"F32"', '"U8"', '"F4"', "1e2",
              str(1 << 32), str((1 << 63) - 1), str(1 << 64), "[4,0]", "[0,4]", "[[]]"]  # fmt: skip
    accepted = refused = 0
    for base in _bases()[1:] * 400:
        length = struct.unpack("<Q", base[:8])[0]
        text, data = base[8 : 8 + length].decode().rstrip(), base[8 + length :]
        spots = list(re.finditer(r'(?<=[:,\[])("[^"\\]*"|\d+|\[[\d,]*\])', text))
        spot = chance.choice(spots)
        edited = (text[: spot.start()] + chance.choice(values) + text[spot.end() :]).encode()
        content = with_header(edited, data)
        path.write_bytes(content)
        verdict = _library_verdict(path, content)
        if refusal(path) is not None:
            refused += 1
            continue
        accepted += 1
        opened = sd.open(path)
        assert verdict == (raw_state(opened), dict(opened.metadata)), content
    assert refused > 500
    assert accepted > 20


def test_damaged_files_take_no_more_memory_than_they_are_long(scratch: Path) -> None:
    path = scratch / "file.safetensors"
    for warm_up in (_bases()[3], b"PK\x03\x04", b"\x80\x02."):  # modules loaded once are no part of the measurement
        path.write_bytes(warm_up)
        refusal(path)
    tracemalloc.start()
    try:
        for content in mutants(_bases(), 1500, 99, focus=16):
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            refusal(path)
            assert tracemalloc.get_traced_memory()[1] - before < 200_000 + 20 * len(content)
    finally:
        tracemalloc.stop()


_BOMBS = {
    "lists": (b'{"a":[', b"[],", b"[]]}"),
    "objects": (b'{"a":[', b"{},", b"{}]}"),
    "nested objects": (b"{", b'"a":{', b""),
    "numbers": (b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[', b"1,", b"0]}}"),
    "texts": (b'{"__metadata__":{"a":"', b"\xf0\x9f\x98\x80", b'"}}'),
    "an escaped key": (b'{"', b"\\u00e9", b'":{}}'),
    "spaces": (b"{", b" ", b"}"),
}


@pytest.mark.parametrize("name", _BOMBS)
def test_header_bombs_stay_within_a_few_times_the_files_size(name: str, scratch: Path) -> None:
    begin, middle, end = _BOMBS[name]
    size = 24 << 20
    path = scratch / "bomb.safetensors"
    path.write_bytes(with_header(begin + middle * (size // len(middle)) + end))
    code = """
import sys
import container_support
container_support.limited(2 << 30)
before = container_support.peak_memory()
error = container_support.refusal(container_support.Path(sys.argv[1]))
print(container_support.peak_memory() - before, len(str(error)))
"""
    done = run_python(code, path)
    assert done.returncode == 0, done.stderr
    grown, message = map(int, done.stdout.split())
    assert grown < 16 * (size >> 20)
    assert message < 1000


def test_a_file_that_shrinks_after_opening_is_an_error_and_no_crash(scratch: Path) -> None:
    path = scratch / "file.safetensors"
    path.write_bytes(library_bytes({"a": Raw("U8", (1000,), bytes(1000))}))
    opened = sd.open(path)
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(sd.SurgeryError, match="ends at byte") as caught:
        opened["a"].tobytes()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"<html><body>Sign in</body></html>", "web page"),
        (b"plain text, nothing else", "neither"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "neither"),
    ],
)
def test_files_that_people_mistake_for_checkpoints_are_named(content: bytes, words: str, scratch: Path) -> None:
    path = scratch / "file.ckpt"
    path.write_bytes(content)
    error = refusal(path)
    assert error is not None
    assert words in error.message


def test_the_container_is_told_by_content_and_not_by_name(scratch: Path) -> None:
    path = scratch / "model.ckpt"
    path.write_bytes(library_bytes(random_state()))
    opened = sd.open(path)
    assert opened.origin is not None
    assert opened.origin.container == "safetensors"
    assert raw_state(opened) == random_state()


def test_what_is_no_file_is_unreadable(scratch: Path) -> None:
    import os

    os.mkfifo(scratch / "pipe.safetensors")
    (scratch / "folder.safetensors").mkdir()
    (scratch / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("missing", "pipe", "folder", "loop", "x" * 300, "pipe.safetensors/inside"):
        assert refusal(scratch / f"{name}.safetensors") is not None
    with pytest.raises(sd.SurgeryError) as caught:
        sd.open("nul\0byte.safetensors")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("dtype", ["float4_e2m1fn_x2"])
def test_torch_types_that_no_table_knows_are_a_type_error(dtype: str) -> None:
    import torch

    with pytest.raises(TypeError, match=dtype):
        sd.Tensor.of(torch.zeros(4, dtype=torch.uint8).view(getattr(torch, dtype)))


def test_arrays_of_every_kind_become_little_endian_and_dense() -> None:
    import numpy as np
    import torch

    big = np.arange(6, dtype=">i4").reshape(2, 3)
    assert sd.Tensor.of(big).tobytes() == np.arange(6, dtype="<i4").tobytes()
    assert sd.Tensor.of(big.T).tobytes() == np.ascontiguousarray(big.T).astype("<i4").tobytes()
    assert sd.Tensor.of(big[:, ::-2]).tobytes() == np.ascontiguousarray(big[:, ::-2]).astype("<i4").tobytes()
    assert sd.Tensor.of(np.float16(2.5)).shape == ()
    with pytest.raises(TypeError, match="<U4"):
        sd.Tensor.of(np.array(["text"]))
    with pytest.raises(TypeError, match="object"):
        sd.Tensor.of(np.array([None]))

    wave = torch.complex(torch.arange(3.0), torch.arange(3.0) + 1)
    lazy = wave.conj()
    assert sd.Tensor.of(lazy).tobytes() == lazy.resolve_conj().numpy().tobytes()
    assert sd.Tensor.of(lazy.imag).tobytes() == lazy.imag.resolve_neg().numpy().tobytes()
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    assert sd.Tensor.of(parameter).tobytes() == parameter.detach().contiguous().numpy().tobytes()
