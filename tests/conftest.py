"""What the tests share: the fixtures' folder, the command line, and bytes as other libraries see them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import sdsurgery as sd
from sdsurgery.cli import run as run_cli
from sdsurgery.dtypes import BY_NAME
from sdsurgery.sources import Computed

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # as many workers as cores: torch with more threads each is slower by far

os.environ["SDSURGERY_REGISTRY"] = os.devnull + "/none"  # nobody's own registry takes part

hypothesis.settings.register_profile("sdsurgery", deadline=None, print_blob=True)
hypothesis.settings.load_profile("sdsurgery")

Raw = tuple[str, tuple[int, ...], bytes]
"""A tensor as its bytes: safetensors' name of the dtype, shape, content."""


@dataclass(frozen=True)
class Result:
    """What a command line printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout, which must hold nothing else and be what its schema says."""
        document = json.loads(self.out)
        name = next((name for mark, name in _MARKS.items() if mark in document), "written")
        validator(name).validate(document)
        return document


_MARKS = {
    "error": "error",
    "recipe": "run",
    "components": "inspect",
    "identical": "diff",
    "fingerprints": "fingerprint",
    "verified": "verify",
    "agrees": "parity",
}


@functools.cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """One of the schemas that ``docs`` gives for what ``--json`` prints."""
    schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def cli(*words: str | os.PathLike[str]) -> Result:
    """Run a command line in this process, as ``python -m sdsurgery`` does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_cli([os.fspath(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


def shell(*words: str | os.PathLike[str], cwd: Path | None = None, **environment: str) -> Result:
    """Run ``python -m sdsurgery`` as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "sdsurgery", *map(os.fspath, words)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"} | environment,
        cwd=cwd,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def raw(path: str | os.PathLike[str]) -> dict[str, Raw]:
    """All tensors of a safetensors file as the safetensors library sees them."""
    entries = safetensors.deserialize(Path(path).read_bytes())
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in entries}


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """A safetensors file's metadata as the safetensors library sees them."""
    with safetensors.safe_open(path, "numpy") as file:
        return dict(file.metadata() or {})


class _Unpickler(pickle.Unpickler):
    """For fixtures that name classes of packages that aren't here."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except ImportError:
            return type(name, (), {})


def raw_pickle(path: str | os.PathLike[str]) -> dict[str, Raw]:
    """All tensors of a torch pickle's state dict as torch sees them."""
    import torch

    lenient = types.SimpleNamespace(**vars(pickle) | {"Unpickler": _Unpickler})
    value = torch.load(path, weights_only=False, pickle_module=lenient)
    names = {dtype.torch: dtype.name for dtype in BY_NAME.values()}
    return {
        key: (
            names[str(tensor.dtype).removeprefix("torch.")],
            tuple(tensor.shape),
            bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b"",
        )
        for key, tensor in value.get("state_dict", value).items()
    }


def raw_of(checkpoint: Mapping[str, sd.Tensor]) -> dict[str, Raw]:
    """All tensors of a checkpoint, read through its own interface."""
    return {key: (tensor.dtype.name, tensor.shape, tensor.tobytes()) for key, tensor in checkpoint.items()}


def raw_array(array: np.ndarray[Any, Any], dtype: str) -> Raw:
    """An array as its bytes."""
    return (dtype, array.shape, array.tobytes())


def write(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file with the safetensors library."""
    safetensors.numpy.save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    return path


def outline(shapes: Mapping[str, tuple[int, ...]] | Iterable[tuple[str, tuple[int, ...]]]) -> sd.Checkpoint:
    """A checkpoint of fp16 tensors that have a shape and no bytes: reading any of them fails the test."""

    def unread(size: int) -> Any:
        raise AssertionError("a weight was read")

    dtype = BY_NAME["F16"]
    return sd.Checkpoint(
        {key: sd.Tensor(dtype, shape, Computed(dtype.nbytes(shape), unread)) for key, shape in dict(shapes).items()}
    )


@pytest.fixture
def fixtures() -> Path:
    """The folder of the committed fixtures."""
    return FIXTURES


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty folder in memory where the system has such a thing: for tests that write thousands of files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
