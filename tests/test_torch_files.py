"""Torch pickles, zip and legacy, against torch itself: read, written, and damaged."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from container_support import FIXTURES, Raw, State, in_memory, random_state, raw_state, refusal, run_python
from fuzz_torch_files import rezipped, tensors_in
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from make_fixtures import save_torch

import sdsurgery as sd
from sdsurgery import history
from sdsurgery.containers import saving, torch_zip, writing
from sdsurgery.dtypes import BY_NAME
from sdsurgery.errors import CorruptError
from sdsurgery.sources import CHUNK, Computed

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

TORCH_TYPES = [dtype for dtype in BY_NAME.values() if dtype.torch is not None]
# Torch writes these in the legacy format, but its own loader then fails.
NO_LEGACY = {"U16", "U32", "U64", "C32", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def torch_bytes(value: Any, *, legacy: bool = False, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy, **options)
    return buffer.getvalue()


def torch_read(content: bytes) -> State:
    """What ``torch.load(weights_only=True)`` reads."""
    value = torch.load(io.BytesIO(content), weights_only=True)
    return raw_state(sd.Checkpoint.from_state_dict(tensors_in(value)))


def opened(folder: Path, content: bytes) -> sd.Checkpoint:
    path = folder / "model.ckpt"
    path.write_bytes(content)
    return sd.open(path)


def filled(shape: tuple[int, ...], dtype: torch.dtype, chance: random.Random) -> torch.Tensor:
    """A tensor of random bits (of 0 and 1 where it is bool)."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = size
    for extent in shape:
        count *= extent
    if dtype is torch.bool:
        return torch.tensor([chance.getrandbits(1) for _ in range(count)], dtype=torch.bool).reshape(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(chance.randbytes(count)), dtype=dtype).reshape(shape)


def _transposed(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return tensor.permute(*chance.sample(range(tensor.dim()), tensor.dim())) if tensor.dim() else tensor


def _sliced(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return tensor[tuple(slice(chance.randrange(2), None, chance.choice((1, 2, 3))) for _ in tensor.shape)]


def _expanded(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return tensor.expand(chance.choice((0, 1, 3)), *tensor.shape)


def _narrowed(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return tensor[-1] if tensor.dim() and tensor.shape[0] else tensor


def _overlapping(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return flat.unfold(0, 2, 1) if flat.numel() >= 2 else flat


def _as_parameter(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    # Torch can't load untyped views that require a gradient.
    possible = (tensor.is_floating_point() or tensor.is_complex()) and sd.Tensor.of(tensor).dtype.name not in NO_LEGACY
    return torch.nn.Parameter(tensor, requires_grad=possible and chance.random() < 0.5)


VIEWS: list[Callable[[torch.Tensor, random.Random], torch.Tensor]] = [
    _transposed, _sliced, _expanded, _narrowed, _overlapping, _as_parameter, lambda tensor, _: tensor,
]  # fmt: skip


@st.composite
def torch_states(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """State dicts of tensors of every type; several may be views of one storage, strided in all ways."""
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    keys = st.text(st.characters(), max_size=6)
    state: dict[str, torch.Tensor] = {}
    extents = st.lists(st.sampled_from((0, 1, 2, 3, 5)), max_size=4).map(tuple)
    for _ in range(draw(st.integers(0, 3))):
        dtype = getattr(torch, str(draw(st.sampled_from(TORCH_TYPES)).torch))
        base = filled(draw(extents), dtype, chance)
        for key in draw(st.lists(keys, max_size=3)):
            view = base
            for step in draw(st.lists(st.sampled_from(VIEWS), max_size=3)):
                view = step(view, chance)
            state[key] = view
    return state


@FORMATS
@pytest.mark.parametrize("shard", range(2))
def test_random_state_dicts_are_read_as_torch_reads_them(shard: int, legacy: bool, scratch: Path) -> None:
    @seed(shard)
    @settings(max_examples=750, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(torch_states(), st.sampled_from((lambda d: d, OrderedDict, lambda d: {"state_dict": d, "epoch": 1})))
    def check(state: dict[str, torch.Tensor], wrap: Callable[[Any], Any]) -> None:
        if legacy:
            state = {key: t for key, t in state.items() if sd.Tensor.of(t).dtype.name not in NO_LEGACY}
        content = torch_bytes(wrap(state), legacy=legacy)
        checkpoint = opened(scratch, content)
        assert checkpoint.origin is not None
        assert checkpoint.origin.container == ("torch-legacy" if legacy else "torch-zip")
        expected = torch_read(content)
        assert raw_state(checkpoint) == expected
        assert list(checkpoint) == list(state) == list(expected)
        assert expected == raw_state(sd.Checkpoint.from_state_dict(state))

    check()


@FORMATS
@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_every_type_is_read(dtype: Any, legacy: bool, scratch: Path) -> None:
    tensor = filled((3, 4), getattr(torch, dtype.torch), random.Random(0))
    state = {"plain": tensor, "turned": tensor.t(), "scalar": tensor[1, 2], "empty": tensor[:0]}
    checkpoint = opened(scratch, torch_bytes(state, legacy=legacy))
    assert raw_state(checkpoint) == raw_state(sd.Checkpoint.from_state_dict(state))
    assert {tensor.dtype for tensor in checkpoint.values()} == {dtype}


@FORMATS
def test_strides_and_shared_storages(legacy: bool, scratch: Path) -> None:
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    state = {
        "base": base,
        "again": base,
        "transposed": base.transpose(1, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "part": base[1, 1:, ::2, 3],
        "offset": base[1],
        "expanded": base[:, :1].expand(2, 7, 4, 5),
        "diagonal": torch.diagonal(base, dim1=2, dim2=3),
        "column": base.reshape(-1, 5)[:, 2:3],
        "windows": base.reshape(-1).unfold(0, 8, 3),
        "one": base[0, 0, 0, 4],
    }
    content = torch_bytes(state, legacy=legacy)
    checkpoint = opened(scratch, content)
    assert raw_state(checkpoint) == torch_read(content) == raw_state(sd.Checkpoint.from_state_dict(state))
    # Contiguous views, wherever they begin, are slices of the file and cost nothing.
    in_file = {key for key, tensor in checkpoint.items() if not isinstance(tensor.data, Computed)}
    assert in_file == {"base", "again", "offset", "one"}
    assert checkpoint.files == (checkpoint.origin.file,)  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096, CHUNK])
def test_strided_tensors_come_in_chunks_of_the_size_that_was_asked_for(chunk: int, scratch: Path) -> None:
    base = torch.arange(3000, dtype=torch.int16).reshape(10, 20, 15)
    tensor = opened(scratch, torch_bytes({"a": base.permute(2, 0, 1)}))["a"]
    pieces = list(tensor.chunks(chunk))
    assert b"".join(pieces) == base.permute(2, 0, 1).contiguous().numpy().tobytes()
    assert max(map(len, pieces)) <= max(chunk, tensor.dtype.itemsize)


def test_a_small_storage_may_be_repeated_but_not_into_terabytes(scratch: Path) -> None:
    """`expand` is honest; a few hundred bytes that would fill the disk on save are not."""
    row = torch.arange(77).expand(1000, 77)
    assert torch.equal(opened(scratch, torch_bytes({"a": row}))["a"].torch(), row)
    with pytest.raises(CorruptError, match="repeats the 4 of its storage"):
        opened(scratch, torch_bytes({"a": torch.zeros(1).expand(1 << 40)}))


# What is around the tensors.


def _module_state() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state},
    "nested twice": lambda state: {"state_dict": {"state_dict": state}},
    "single entry": lambda state: {"params_ema": state},
    "single in single": lambda state: {"a": {"b": state}},
    "model beside others": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 4},
    "model_state_dict": lambda state: {"model_state_dict": state, "other": {"t": torch.ones(1)}},
    "only dict with tensors": lambda state: {"net": state, "config": {"width": 3}, "step": 1},
}


@FORMATS
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_dicts_are_found_in_their_wrappers(wrapper: str, legacy: bool, scratch: Path) -> None:
    state = _module_state()
    assert state._metadata  # what a module's state dict carries along
    checkpoint = opened(scratch, torch_bytes(WRAPPERS[wrapper](state), legacy=legacy))
    assert raw_state(checkpoint) == raw_state(sd.Checkpoint.from_state_dict(state))
    assert list(checkpoint) == list(state)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3),
        [torch.ones(3)],
        "text",
        {"a": 1},
        {"a": {"t": torch.ones(1)}, "b": {"t": torch.ones(1)}},
        torch.ones(3).untyped_storage(),
        {"only": torch.ones(3).untyped_storage()},
        None,
        {1: 2},
    ],
    ids=["tensor", "list", "text", "numbers", "two dicts", "storage", "storage in a dict", "nothing", "int key"],
)
@FORMATS
def test_files_without_a_state_dict_are_refused_with_what_they_hold(value: Any, legacy: bool, scratch: Path) -> None:
    path = scratch / "model.ckpt"
    path.write_bytes(torch_bytes(value, legacy=legacy))
    error = refusal(path)
    assert error is not None
    assert error.kind == "unsupported"
    assert "no state dict" in error.message


@FORMATS
def test_what_is_no_tensor_is_kept_aside_and_named(legacy: bool, scratch: Path) -> None:
    one = torch.ones(2)
    content = torch_bytes(
        {
            "state_dict": {
                "w": one,
                "epoch": 3,
                "name": "text",
                "raw": b"abc",
                "none": None,
                "flag": True,
                "rate": 0.5,
                "storage": torch.ones(3).untyped_storage(),
                "list": [one, {"deep": (one, one)}],
                "set": {1, 2},
                7: one,
                "sparse": torch.eye(2).to_sparse(),
                "big": 1 << 500,
            },
            "optimizer": {"state": [torch.zeros(2)]},
            (1, 2): "a tuple's name",
            2.5: "a float's name",
        },
        legacy=legacy,
    )
    checkpoint = opened(scratch, content)
    assert raw_state(checkpoint) == {"w": Raw("F32", (2,), one.numpy().tobytes())}
    told = {entry.name: entry.what for entry in checkpoint.aside}
    assert told.pop("storage").startswith("storage")
    assert told.pop("sparse") == "object torch._utils._rebuild_sparse_tensor"
    assert told.pop("set").startswith("object")
    assert told.pop("raw").startswith(("bytes", "object _codecs.encode"))
    assert told.pop("big").startswith("int 32733906")
    assert told == {
        "epoch": "int 3",
        "name": "str of length 4",
        "none": "NoneType None",
        "flag": "bool True",
        "rate": "float 0.5",
        "list": "list of 2, 1 tensors inside",
        "7": "tensor F32[2]",
        "optimizer": "dict of 1, 1 tensors inside",
        "tuple": "str of length 14",
        "2.5": "str of length 14",
    }


@FORMATS
def test_tensors_with_attributes_and_subclasses_of_tensor(legacy: bool, scratch: Path) -> None:
    marked = torch.arange(3.0)
    marked.note = "kept by torch.save"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.arange(4.0))
    parameter.note = 1  # type: ignore[attr-defined]
    state = {"marked": marked, "parameter": parameter, "buffer": torch.nn.Buffer(torch.arange(5.0))}
    content = torch_bytes(state, legacy=legacy)
    checkpoint = opened(scratch, content)
    assert raw_state(checkpoint) == torch_read(content)
    assert list(checkpoint) == list(state)
    assert checkpoint.aside == ()


@FORMATS
@pytest.mark.parametrize("part", ["whole", "imaginary"])
def test_pending_conjugation_is_never_lost_in_silence(part: str, legacy: bool, scratch: Path) -> None:
    lazy = torch.complex(torch.arange(3.0), torch.arange(3.0) + 1).conj()
    value = lazy if part == "whole" else lazy.imag
    path = scratch / "model.ckpt"
    path.write_bytes(torch_bytes({"a": value}, legacy=legacy))
    error = refusal(path)
    assert error is not None
    assert error.kind == "unsupported"
    assert "conj" in error.message or "neg" in error.message


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_stand_aside_and_do_not_hide_the_others(scratch: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    checkpoint = opened(scratch, torch_bytes({"w": torch.ones(2), "q": quantized}))
    assert list(checkpoint) == ["w"]
    assert [entry.name for entry in checkpoint.aside] == ["q"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@FORMATS
def test_every_pickle_protocol_that_torch_writes(protocol: int, legacy: bool, scratch: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(2, dtype=torch.int8)}
    content = torch_bytes(state, legacy=legacy, pickle_protocol=protocol)
    assert raw_state(opened(scratch, content)) == raw_state(sd.Checkpoint.from_state_dict(state))


def test_honest_unknown_classes_do_not_stop_reading() -> None:
    checkpoint = sd.open(FIXTURES / "sd1-full-ema.ckpt")
    theirs = torch.load(FIXTURES / "sd1-full-ema.ckpt", weights_only=False, pickle_module=_lenient)["state_dict"]
    assert raw_state(checkpoint) == raw_state(sd.Checkpoint.from_state_dict(theirs))
    assert {entry.name for entry in checkpoint.aside} == {
        "epoch", "global_step", "pytorch-lightning_version", "callbacks", "optimizer_states",
    }  # fmt: skip


class _lenient:  # noqa: N801 - stands in for the module pickle
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("pytorch_lightning"):
                return type(name, (), {})
            return super().find_class(module, name)


@pytest.mark.parametrize("name", ["merged.ckpt", "sd1-legacy.ckpt", "vae.vae.pt"])
def test_committed_pickles_are_read_as_torch_reads_them(name: str) -> None:
    assert raw_state(sd.open(FIXTURES / name)) == torch_read((FIXTURES / name).read_bytes())


# Other archives.


def test_archives_that_are_no_checkpoints_are_named(scratch: Path) -> None:
    path = scratch / "model.ckpt"
    content = torch_bytes({"a": torch.ones(3)})
    cases = {
        rezipped(content, {"data.pkl": None}): ("unsupported", "not one that torch.save made"),
        rezipped(content, {"constants.pkl": b"\x80\x02]."}): ("unsupported", "TorchScript"),
        rezipped(content, {}, zipfile.ZIP_DEFLATED): ("unsupported", "compressed"),
        rezipped(content, {"byteorder": b"big"}): ("unsupported", "big-endian"),
        rezipped(content, {"data/0": None}): ("corrupt", "the storage 0 isn't in it"),
        rezipped(content, {"data/0": b"12345678"}): ("corrupt", "8 bytes instead of 12"),
    }
    for changed, (kind, words) in cases.items():
        path.write_bytes(changed)
        error = refusal(path)
        assert error is not None
        assert (error.kind, words in error.message) == (kind, True), error.message


def test_a_name_twice_in_an_archive_is_refused(scratch: Path) -> None:
    buffer = io.BytesIO(torch_bytes({"a": torch.ones(3)}))
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(12))
    path = scratch / "model.ckpt"
    path.write_bytes(buffer.getvalue())
    assert "two records of one name" in str(refusal(path))


def test_a_storage_that_is_marked_as_a_folder_is_refused(scratch: Path) -> None:
    """torch.load gives uninitialized memory for it."""
    content = torch_bytes({"a": torch.ones(3)})
    place = content.rindex(b"PK\1\2", 0, content.rindex(b"archive/data/0"))
    path = scratch / "model.ckpt"
    path.write_bytes(content[: place + 38] + b"\x10" + content[place + 39 :])
    assert "marked as a folder" in str(refusal(path))


def test_an_archive_with_an_endless_index_is_refused_early(scratch: Path) -> None:
    """Half a million records in the index, none of them there: seconds and a hundred megabytes for zipfile."""
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 6) + bytes(16)
    index = b"".join(entry + b"%06x" % number for number in range(500_000))
    head = b"PK\3\4" + bytes(60)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(index), len(head), 0)
    path = scratch / "model.ckpt"
    path.write_bytes(head + index + end)
    code = """
import sys
import container_support
error = container_support.refusal(container_support.Path(sys.argv[1]))
print(container_support.peak_memory(), error)
"""
    done = run_python(code, path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 150
    assert "archive is broken" in done.stdout


# Writing.


def written(folder: Path, state: State, metadata: dict[str, str] | None = None, name: str = "out.ckpt") -> Path:
    in_memory(state, metadata).save(folder / name, force=True)
    return folder / name


def all_types() -> State:
    chance = random.Random(5)
    state = {}
    for dtype in TORCH_TYPES:
        for shape in ((), (3,), (2, 5), (0, 2), (1, 1, 4, 2)):
            nbytes = dtype.nbytes(shape)
            content = bytes(nbytes) if dtype.kind == "bool" else chance.randbytes(nbytes)
            state[f"{dtype}.{len(shape)}.{nbytes}"] = Raw(dtype.name, shape, content)
    return state


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_written_pickles_are_read_by_torch_and_by_us(suffix: str, scratch: Path) -> None:
    metadata = {"format": "pt", "é": "\U0001f600\n", "": ""}
    path = written(scratch, all_types(), metadata, f"out{suffix}")
    assert torch_read(path.read_bytes()) == all_types()
    value = torch.load(path, weights_only=True)
    assert value["metadata"] == metadata
    assert list(value["state_dict"]) == list(all_types())
    assert all(tensor.is_contiguous() for tensor in value["state_dict"].values())
    checkpoint = sd.open(path)
    assert raw_state(checkpoint) == all_types()
    assert checkpoint.metadata == metadata
    assert checkpoint.aside == ()


_texts = st.text(st.characters(), max_size=8)


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    state=st.dictionaries(
        _texts,
        st.tuples(st.sampled_from(TORCH_TYPES), st.lists(st.sampled_from((0, 1, 2, 3)), max_size=5).map(tuple)),
        max_size=6,
    ),
    metadata=st.dictionaries(_texts, _texts, max_size=3),
)
def test_random_pickles_are_read_by_torch_and_by_us(
    state: dict[str, Any], metadata: dict[str, str], scratch: Path
) -> None:
    raws = {key: Raw(dtype.name, shape, bytes(dtype.nbytes(shape))) for key, (dtype, shape) in state.items()}
    path = written(scratch, raws, metadata)
    content = path.read_bytes()
    assert torch_read(content) == raws
    checkpoint = sd.open(path)
    assert raw_state(checkpoint) == raws
    assert checkpoint.metadata == metadata
    checkpoint.save(scratch / "again.ckpt", force=True)
    assert (scratch / "again.ckpt").read_bytes() == content


def test_a_written_archive_is_laid_out_as_old_loaders_want_it(scratch: Path) -> None:
    path = written(scratch, all_types() | random_state(tensors=30), {"format": "pt"})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert archive.testzip() is None  # every CRC is right
        infos = archive.infolist()
    assert names[0] == "archive/data.pkl"
    assert names[-1] == "archive/version"
    assert not {"archive/byteorder", "archive/.data/serialization_id"} & set(names)
    assert len(names) == 2 + len(all_types()) + 30
    for info in infos:
        name, extra = struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30])
        assert (info.header_offset + 30 + name + extra) % 64 == 0
        assert info.compress_type == zipfile.ZIP_STORED
        assert info.date_time == (1980, 1, 1, 0, 0, 0)
        assert info.flag_bits & ~0x800 == 0  # sizes stand in front of the data, as torch's reader wants it


def test_the_same_checkpoint_gives_the_same_pickle(scratch: Path) -> None:
    first = written(scratch, all_types(), {"b": "1", "a": "2"}).read_bytes()
    second = written(scratch, all_types(), {"a": "2", "b": "1"}).read_bytes()
    assert first == second
    reordered = written(scratch, dict(reversed(all_types().items()))).read_bytes()
    assert torch_read(reordered) == all_types()


def test_types_that_torch_lacks_are_refused_before_a_file_exists(scratch: Path) -> None:
    with pytest.raises(sd.SurgeryError, match="F6_E2M3") as caught:
        in_memory({"a": Raw("F6_E2M3", (4,), b"abc")}).save(scratch / "out.ckpt")
    assert caught.value.exit_code == 3
    assert not list(scratch.iterdir())


def test_the_announced_size_is_never_too_small(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = []
    original = writing.AtomicFile.__init__

    def noting(self: writing.AtomicFile, path: Path, **options: Any) -> None:
        announced.append(options["size"])
        original(self, path, **options)

    monkeypatch.setattr(writing.AtomicFile, "__init__", noting)
    cases = [
        ({}, {}),
        (all_types(), {}),
        ({"x" * 5000: Raw("U8", (1,), b"a"), "\U0001f600" * 5000: Raw("U8", (1,), b"a")}, {}),
        ({f"{n}": Raw("U8", (1,) * 32, b"a") for n in range(1000)}, {}),
        (random_state(), {"big": "x" * 1_000_000, "\U0001f600" * 10000: "\U0001f600" * 100_000}),
    ]
    for state, metadata in cases:
        size = written(scratch, state, metadata).stat().st_size
        assert size <= announced[-1] <= size + 1000 * (len(state) + 10)


@pytest.mark.parametrize(
    "value", [0, 1, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 5 << 32, (1 << 63) - 1, 1 << 63]
)
def test_integers_of_every_size_are_pickled_right(value: int) -> None:
    assert pickle.loads(b"\x80\x02" + torch_zip._integer(value) + b".") == value


def test_beyond_four_gigabytes(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zip64 and 64-bit sizes, with zeros that are skipped over instead of written."""
    huge = 4 * (1 << 30) + (64 << 20)
    zeros = bytes(64 << 20)
    original = writing.AtomicFile.write

    def sparse(self: writing.AtomicFile, content: Any) -> int:
        if len(content) != len(zeros):
            return original(self, content)
        import os

        os.lseek(self.descriptor, len(content), os.SEEK_CUR)
        self.position += len(content)
        return len(content)

    monkeypatch.setattr(writing.AtomicFile, "write", sparse)
    monkeypatch.setattr(zipfile, "crc32", lambda _data, _crc=0: 0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 40})())
    tensors = {
        "huge": sd.Tensor(BY_NAME["U8"], (huge,), Computed(huge, lambda _: iter([zeros] * (huge // len(zeros))))),
        "behind": sd.Tensor.of(torch.arange(5.0)),
        "typed": sd.Tensor.of(torch.arange(6).to(torch.uint16)),
    }
    path = scratch / "huge.ckpt"
    sd.Checkpoint(tensors).save(path)
    assert path.stat().st_size > huge
    checkpoint = sd.open(path)
    assert {key: tensor.shape for key, tensor in checkpoint.items()} == {"huge": (huge,), "behind": (5,), "typed": (6,)}
    assert raw_state({"behind": checkpoint["behind"]}) == raw_state({"behind": tensors["behind"]})
    where = checkpoint["behind"].data
    assert where.offset > huge  # type: ignore[attr-defined]
    assert where.offset % 64 == 0  # type: ignore[attr-defined]
    state = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    assert state["huge"].shape == (huge,)
    assert state["behind"].tolist() == [0, 1, 2, 3, 4]
    assert state["typed"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_records_with_zip64_fields_are_aligned_and_read(
    limit: int, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    state = all_types() | {"larger": Raw("U8", (3000,), bytes(3000))}
    path = written(scratch, state)
    monkeypatch.undo()
    assert torch_read(path.read_bytes()) == state
    checkpoint = sd.open(path)
    assert raw_state(checkpoint) == state
    assert all(tensor.data.offset % 64 == 0 for tensor in checkpoint.values() if tensor.nbytes)  # type: ignore[attr-defined]


def test_metadata_and_history_survive_the_way_through_a_pickle(scratch: Path) -> None:
    step = sd.Step("test", {"a": 1}, (sd.Change("x", "replaced", "1", "2"),))
    start = in_memory(random_state(), {"modelspec.title": "é"})
    start.evolve(start.tensors, step).save(scratch / "a.ckpt")
    sd.open(scratch / "a.ckpt").save(scratch / "b.safetensors")
    metadata = sd.open(scratch / "b.safetensors").metadata
    assert metadata["modelspec.title"] == "é"
    assert [entry["operation"] for entry in history.recorded(metadata)] == ["test"]


def test_names_for_containers() -> None:
    assert saving.container_for("a.CKPT") == torch_zip.NAME
    with pytest.raises(sd.SurgeryError) as caught:
        saving.container_for("a.gguf")
    assert caught.value.exit_code == 2


# Damage.


def _bases(folder: Path, *, legacy: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    state = {
        "model.a.weight": base,
        "model.a.bias": torch.arange(5, dtype=torch.float16),
        "model.turned": base.permute(2, 0, 1),
        "model.shared": base[1],
        "model.wide": base[:, :1].expand(2, 5, 4),
        "model.ids": torch.arange(7)[None],
        "model.scalar": torch.tensor(0.5, dtype=torch.bfloat16),
        "model.empty": torch.empty(0, 3),
        "model.parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    values = [
        {"a": torch.arange(3, dtype=torch.int8), "b": torch.ones(2, dtype=torch.float64)},
        {"state_dict": state, "epoch": 3, "step": 1 << 40, "rate": 0.5, "name": "text", "history": [1, (2, None)]},
        OrderedDict(state),
        _module_state(),
    ]
    for number, value in enumerate(values):
        path = folder / f"base-{number}"
        if legacy:
            save_torch(value, path, legacy=True)  # which numbers the storages, so that the bytes are always the same
        else:
            path.write_bytes(torch_bytes(value))


def _fuzz(scratch: Path, number: int, count: int) -> None:
    read = run_python(
        "import sys, fuzz_torch_files as f; f.read_damaged(f.Path(sys.argv[1]), *map(int, sys.argv[2:]))",
        scratch, str(number), str(count), timeout=300,
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    report = json.loads(read.stdout)
    assert report["failures"] == []
    assert report["refused"] > count // 4
    assert report["accepted"] > count // 20
    compared = run_python(
        "import sys, fuzz_torch_files as f; f.compare_with_torch(f.Path(sys.argv[1]))", scratch, timeout=300
    )
    assert compared.returncode == 0, compared.stderr
    verdict = json.loads(compared.stdout)
    assert verdict["differences"] == []
    assert verdict["compared"] > count // 40


@FORMATS
@pytest.mark.parametrize("number", range(2))
def test_damaged_files_are_refused_or_read_as_torch_reads_them(number: int, legacy: bool, scratch: Path) -> None:
    _bases(scratch, legacy=legacy)
    _fuzz(scratch, number, 3000)


@pytest.mark.parametrize("number", range(2))
def test_damaged_pickles_in_sound_archives(number: int, scratch: Path) -> None:
    """All of the damage lands in the pickle."""
    _bases(scratch, legacy=False)
    (scratch / "base-1").rename(scratch / "envelope")
    for path in scratch.glob("base-*"):
        path.unlink()
    with zipfile.ZipFile(scratch / "envelope") as archive:
        (scratch / "base-0").write_bytes(archive.read("archive/data.pkl"))
    _fuzz(scratch, 100 + number, 3000)


@FORMATS
def test_truncation_at_every_byte(legacy: bool, scratch: Path) -> None:
    content = torch_bytes({"a": torch.arange(3.0), "b": {"c": [1, "x"]}, "d": torch.ones(2, 2).t()}, legacy=legacy)
    path = scratch / "model.ckpt"
    for end in range(len(content)):
        path.write_bytes(content[:end])
        assert refusal(path) is not None, end
    path.write_bytes(content)
    assert refusal(path) is None
