"""What the tests of the containers share: raw tensors, the reference libraries behind one face, and limited runs."""

from __future__ import annotations

import ctypes
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdsurgery import Checkpoint, SurgeryError, Tensor
from sdsurgery import open as open_checkpoint
from sdsurgery.dtypes import BY_NAME
from sdsurgery.sources import InMemory

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "fixtures"


@dataclass(frozen=True)
class Raw:
    """A tensor as nothing but a type's name, a shape and bytes: what every reader must agree on."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


State = dict[str, Raw]


def raw(tensor: Tensor) -> Raw:
    return Raw(tensor.dtype.name, tensor.shape, tensor.tobytes())


def raw_state(checkpoint: Mapping[str, Tensor]) -> State:
    return {key: raw(tensor) for key, tensor in checkpoint.items()}


def in_memory(state: State, metadata: Mapping[str, str] | None = None) -> Checkpoint:
    tensors = {key: Tensor(BY_NAME[r.dtype], r.shape, InMemory(r.content)) for key, r in state.items()}
    return Checkpoint(tensors, metadata or {})


def random_state(seed: int = 0, *, tensors: int = 8, nbytes: int = 64) -> State:
    """A small state dict of several types, the same for a seed."""
    chance = random.Random(seed)
    types = ("F16", "F32", "I64", "BF16", "U8", "BOOL")
    result = {}
    for number in range(tensors):
        dtype = BY_NAME[types[number % len(types)]]
        count = nbytes // dtype.itemsize
        content = bytes(count) if dtype.kind == "bool" else chance.randbytes(count * dtype.itemsize)
        result[f"block.{number}.weight"] = Raw(dtype.name, (count // 4, 4), content)
    return result


def refusal(path: Path) -> SurgeryError | None:
    """The error that opening the file and reading all of it gives, if any; it must be of the input's fault."""
    found: SurgeryError | None = None
    try:
        for tensor in open_checkpoint(path).values():
            tensor.tobytes()
    except SurgeryError as error:
        found = error
    if found is not None:
        assert found.exit_code == 3, repr(found)
        assert found.message
        assert found.file == str(path)
    return found


# The safetensors library.

_LIBRARY_NAMES = {
    **{dtype.name: dtype.torch for dtype in BY_NAME.values() if dtype.torch and dtype.storable},
    "F4": "float4_e2m1fn_x2",  # packed by two; the library wants half the last extent
}
LIBRARY_WRITES = frozenset(_LIBRARY_NAMES)


def library_bytes(state: State, metadata: Mapping[str, str] | None = None) -> bytes:
    """What the safetensors library makes of it."""
    from safetensors import TensorSpec, serialize

    alive, specs = [], {}
    for key, tensor in state.items():
        content = ctypes.create_string_buffer(tensor.content, len(tensor.content) or 1)
        alive.append(content)
        shape = [*tensor.shape]
        if tensor.dtype == "F4":
            shape[-1] //= 2
        specs[key] = TensorSpec(
            dtype=str(_LIBRARY_NAMES[tensor.dtype]),
            shape=shape,
            data_ptr=ctypes.addressof(content),
            data_len=len(tensor.content),
        )
    return bytes(serialize(specs, metadata=dict(metadata) if metadata else None))


def library_state(content: bytes) -> State:
    """What the safetensors library reads from a file of these bytes."""
    from safetensors import deserialize

    return {
        key: Raw(found["dtype"], tuple(found["shape"]), bytes(found["data"])) for key, found in deserialize(content)
    }


def header_of(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert isinstance(header, dict)
    return header


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever it says."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# Mutations.

_NUMBERS = (b"0", b"1", b"3", b"-1", b"127", b"4294967295", b"9223372036854775807", b"18446744073709551615", b"1e3")


def mutants(bases: Sequence[bytes], count: int, seed: int, *, focus: int = 0) -> Iterator[bytes]:
    """Damaged variants of these files: the same ones for the same seed.

    Args:
        bases: Sound files.
        count: How many.
        seed: Of all choices.
        focus: Bytes at the beginning in which half of the damage is done; 0 for none in particular.
    """
    chance = random.Random(seed)
    for _ in range(count):
        base = bytearray(chance.choice(bases))
        for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
            _damage(base, chance, focus)
        yield bytes(base)


def _damage(content: bytearray, chance: random.Random, focus: int) -> None:
    if not content:
        return
    end = min(len(content), focus) if focus and chance.random() < 0.5 else len(content)
    place = chance.randrange(end)
    kind = chance.randrange(8)
    if kind == 0:
        content[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        content[place] = chance.choice(b'\x00\x01\x7f\x80\xff{}[]",:.0129tueRbqhsXcK}')
    elif kind == 2:
        del content[place:]
    elif kind == 3:
        del content[place : place + chance.choice((1, 2, 4, 8, 32))]
    elif kind == 4:
        content[place:place] = chance.randbytes(chance.choice((1, 2, 4, 8)))
    elif kind == 5:
        start = chance.randrange(len(content))
        content[place:place] = content[start : start + chance.choice((4, 16, 64))]
    elif kind == 6:
        width = chance.choice((1, 2, 4, 8))
        value = chance.choice((0, 1, 0x7F, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1, len(content)))
        content[place : place + width] = value.to_bytes(8, "little")[:width]
    else:
        digits = [index for index in range(place, min(len(content), place + 200)) if chr(content[index]).isdigit()]
        if digits:
            content[digits[0] : digits[0] + 1] = chance.choice(_NUMBERS)


# Runs in a process of their own, with limits.


def limited(memory: int, cpu: int = 120) -> None:
    """Limit this process; called in a child before anything else."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))


def peak_memory() -> int:
    """MiB that this process had resident at most; unlike getrusage's, without what its parent had before it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def run_python(
    code: str, *arguments: str | os.PathLike[str], timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds sdsurgery and these helpers, warnings being errors."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment | options.pop("env", {}),
        check=False,
        **options,
    )


def command(*arguments: str | os.PathLike[str], timeout: float = 120, **options: Any) -> Any:
    """Run ``python -m sdsurgery`` with these arguments."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "sdsurgery", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
        **options,
    )
