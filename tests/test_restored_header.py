"""A safetensors file that is restored with the very header that it had."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from container_support import random_state, with_header

import sdsurgery as sd
from sdsurgery import history
from sdsurgery.errors import MismatchError

STEP = sd.Step("t", {}, (sd.Change("a", "renamed"),))


def strange_header() -> tuple[dict[str, Any], bytes]:
    """A sound header that nobody else would write so, and its data: an order of its own, a field that nobody knows."""
    entries: dict[str, Any] = {"__metadata__": {"z": "1", "a": "2"}}
    data = b""
    for key, tensor in reversed(random_state().items()):
        offsets = [len(data), len(data) + len(tensor.content)]
        entries[key] = {"data_offsets": offsets, "shape": list(tensor.shape), "x": 1, "dtype": tensor.dtype}
        data += tensor.content
    entries["empty"] = {"dtype": "F32", "shape": [0, 3], "data_offsets": [64, 64]}
    return entries, data


def strange_file(path: Path) -> Path:
    entries, data = strange_header()
    path.write_bytes(with_header(json.dumps(entries, indent=1).encode(), data))
    return path


def recorded(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize("change", [lambda text: text, lambda text: text.replace(b'{"z": "1", "a": "2"}', b"null")])
def test_the_same_file_comes_back(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    original = tmp_path / "in.safetensors"
    entries, data = strange_header()
    original.write_bytes(with_header(change(json.dumps(entries).encode()), data))
    tensors = dict(sorted(sd.open(original).items()))
    restored = sd.Checkpoint(tensors, {"sshs_model_hash": "x"}, steps=(STEP,), header=recorded(original))
    saved = restored.save(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == original.read_bytes()
    assert saved.changes == ()
    restored.evolve(tensors, STEP).save(tmp_path / "edited.safetensors")
    assert len(history.recorded(sd.open(tmp_path / "edited.safetensors").metadata)) == 2


def _entry(key: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entries: entries[key].update(values)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another type": _entry("block.0.weight", dtype="BF16"),
    "a type that is none": _entry("block.0.weight", dtype=["F16"]),
    "another shape": _entry("block.0.weight", shape=[4, 8]),
    "a shape of floats": _entry("block.0.weight", shape=[8.0, 4]),
    "a shape of truths": _entry("empty", shape=[False, 3]),
    "another place": _entry("block.0.weight", data_offsets=[0, 64]),
    "no offsets": _entry("block.0.weight", data_offsets=None),
    "words for offsets": _entry("block.0.weight", data_offsets=["a", "b"]),
    "no entry": lambda entries: entries.update({"block.0.weight": 1}),
    "a tensor more": lambda entries: entries.update({"new": entries["empty"]}),
    "a tensor less": lambda entries: entries.pop("empty"),
    "metadata of numbers": lambda entries: entries.update({"__metadata__": {"a": 1}}),
    "metadata that are none": lambda entries: entries.update({"__metadata__": []}),
}
BROKEN = [b"", b"1234567", struct.pack("<Q", 2), struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2) + b"[]"]
DEEP = b'{"a":' + b"[" * 100_000


@pytest.mark.parametrize("damage", [*DAMAGES, *BROKEN, struct.pack("<Q", len(DEEP)) + DEEP], ids=lambda d: str(d)[:30])
def test_the_header_of_another_file_is_refused(damage: str | bytes, tmp_path: Path) -> None:
    original = strange_file(tmp_path / "in.safetensors")
    if isinstance(damage, str):
        entries, _ = strange_header()
        DAMAGES[damage](entries)
        damage = with_header(json.dumps(entries).encode())
    with pytest.raises(MismatchError):
        sd.Checkpoint(sd.open(original).tensors, header=damage).save(tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
