"""Two processes of the tests of torch files: one reads damaged files within limits, one asks torch about them.

    python -c 'import fuzz_torch_files as f; f.read_damaged(...)' FOLDER SEED COUNT

They talk through files in a folder, because torch itself doesn't survive every damaged file and doesn't fit under
the limits.
"""

from __future__ import annotations

import hashlib
import io
import json
import signal
import traceback
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

from container_support import limited, mutants

import sdsurgery as sd

SECONDS_A_FILE = 20
MOST_BYTES = 1 << 20


class HangError(BaseException):
    """No ``except Exception`` may swallow this."""


def _alarm(_number: int, _frame: FrameType | None) -> None:
    raise HangError


def read_damaged(folder: Path, seed: int, count: int, memory: int = 1 << 30) -> None:
    """Read mutants of every ``base-*`` in the folder; keep those that were accepted, and what was read from them.

    Where there is an ``envelope`` beside them, they are pickles, and put into that archive when they are damaged.
    """
    limited(memory)
    signal.signal(signal.SIGALRM, _alarm)
    bases = [path.read_bytes() for path in sorted(folder.glob("base-*"))]
    envelope = folder / "envelope"
    path = folder / "damaged.ckpt"
    refused, accepted, failures = 0, {}, []
    for number, mutant in enumerate(mutants(bases, count, seed)):
        content = rezipped(envelope.read_bytes(), {"data.pkl": mutant}) if envelope.exists() else mutant
        path.write_bytes(content)
        signal.alarm(SECONDS_A_FILE)
        try:
            state = {key: _seen(tensor) for key, tensor in sd.open(path).items()}
            json.dumps(state).encode()
        except sd.SurgeryError as error:
            refused += 1
            if error.exit_code != 3 or not error.remedy or len(str(error)) > 2000:
                failures.append(f"{number}: {error!r}")
        except (Exception, HangError):  # the test is that there are none
            failures.append(f"{number}: {traceback.format_exc()}")
        else:
            (folder / f"accepted-{number}").write_bytes(content)
            accepted[str(number)] = state
        finally:
            signal.alarm(0)
    print(json.dumps({"refused": refused, "accepted": len(accepted), "failures": failures}))
    (folder / "accepted.json").write_text(json.dumps(accepted))


def rezipped(content: bytes, changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> bytes:
    """The archive that torch wrote, with records left out (``None``), added or replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        records = {name: old.read(name) for name in old.namelist()}
        for name, data in (records | {f"archive/{name}": data for name, data in changes.items()}).items():
            if data is not None:
                new.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def _seen(tensor: sd.Tensor) -> list[Any]:
    digest = hashlib.sha256(tensor.tobytes()).hexdigest() if tensor.nbytes <= MOST_BYTES else ""
    return [tensor.dtype.name, list(tensor.shape), digest]


def compare_with_torch(folder: Path) -> None:
    """Load what was accepted with torch; where it can, it must have read the same."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    compared, differences = 0, []
    for number, ours in json.loads((folder / "accepted.json").read_text()).items():
        try:
            value = torch.load(folder / f"accepted-{number}", weights_only=True)
            found = sd.Checkpoint.from_state_dict(tensors_in(value))
            theirs = {key: _seen(tensor) for key, tensor in found.items()}
        except Exception:  # torch may refuse in whatever way it likes
            continue
        compared += 1
        if theirs != ours:
            differences.append(f"{number}: torch {theirs}, ours {ours}")
    print(json.dumps({"compared": compared, "differences": differences}))


def tensors_in(value: Any) -> dict[str, Any]:
    """The tensors of the state dict in what ``torch.load`` gave, wherever it is wrapped."""
    import torch

    while True:
        inner = value.get("state_dict")
        if not isinstance(inner, dict):
            if any(isinstance(entry, torch.Tensor) for entry in value.values()):
                break
            dicts = [entry for entry in value.values() if isinstance(entry, dict)]
            filled = [d for d in dicts if any(isinstance(entry, torch.Tensor) for entry in d.values())]
            if len(filled) == 1:
                inner = filled[0]
            elif len(value) == 1 and dicts:
                inner = dicts[0]
            else:
                break
        value = inner
    return {key: entry for key, entry in value.items() if isinstance(key, str) and isinstance(entry, torch.Tensor)}
