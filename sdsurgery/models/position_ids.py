"""The CLIP text encoder's position ids: what they should be, and what merges and casts made of them.

The buffer holds ``arange(N)`` as int64 of shape ``[1, N]``, N being the rows of ``position_embedding``. Merging
tools scale it as if it were a weight, casts turn it into floats, and loaders that honour it then truncate:
0.99 becomes 0.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

from ..checkpoint import Checkpoint, Tensor
from ..dtypes import I64
from ..sources import InMemory
from .components import POSITION_IDS
from .identify import Model
from .walks import ClipConfig

Status = Literal[
    "not-applicable",
    "missing",
    "wrong-shape",
    "wrong-values",
    "fractional",
    "wrong-dtype",
    "unexpected",
    "ok",
]

_MOST_IDS = 1 << 16
"""More ids than any text encoder has; beyond, only the shape is looked at."""

_STRUCT_CODES = {
    "U64": "Q", "I64": "q", "F64": "d", "F32": "f", "U32": "I", "I32": "i", "F16": "e", "U16": "H", "I16": "h",
    "I8": "b", "U8": "B", "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with the position ids.

    Attributes:
        status: The first that holds of the statuses, in their order.
        wrong: Positions whose value, truncated to int64 as loaders do it, isn't their own index.
        dtype: Of the ids as they are; ``None`` where there are none.
        key: Where they are, or belong where they are missing; ``None`` where the layout holds none.
    """

    status: Status
    wrong: tuple[int, ...] = ()
    dtype: str | None = None
    key: str | None = None


def right_ids(count: int) -> Tensor:
    """int64 ``arange(count)`` of shape ``[1, count]``."""
    return Tensor(I64, (1, count), InMemory(struct.pack(f"<{count}q", *range(count))))


def diagnose(checkpoint: Checkpoint, model: Model) -> Diagnosis:
    """Look at CLIP-L's position ids; reads those few hundred bytes and nothing else."""
    clip = model.clip
    if clip is None:
        return Diagnosis("not-applicable")
    key = clip.keys.get(POSITION_IDS)
    if key is None:
        if model.layout == "diffusers":
            return Diagnosis("ok")
        return Diagnosis("missing", key=clip.prefix + POSITION_IDS)
    tensor = checkpoint[key]
    if tensor.numel > _MOST_IDS:
        return Diagnosis("wrong-shape", (), tensor.dtype.name, key)
    ids = values(tensor)
    wrong = tuple(index for index, value in enumerate(ids) if not (math.isfinite(value) and int(value) == index))
    return Diagnosis(_status(tensor, ids, positions(model), model.layout), wrong, tensor.dtype.name, key)


def positions(model: Model) -> int:
    """How many positions the text encoder has: the rows of its position embedding, or 77 where that is missing."""
    config = model.clip.config if model.clip else None
    known = config.positions if isinstance(config, ClipConfig) else 0
    return known if 0 < known <= _MOST_IDS else 77


def _status(tensor: Tensor, ids: list[float], count: int, layout: str) -> Status:
    if tensor.shape != (1, count):
        return "wrong-shape"
    if any(not math.isfinite(value) or round(value) != index for index, value in enumerate(ids)):
        return "wrong-values"
    if any(value != index for index, value in enumerate(ids)):
        return "fractional"
    if tensor.dtype is not I64:
        return "wrong-dtype"
    return "unexpected" if layout == "diffusers" else "ok"


def values(tensor: Tensor) -> list[float]:
    """The elements as Python numbers; NumPy is imported only for the rare types that ``struct`` lacks."""
    raw, name = tensor.tobytes(), tensor.dtype.name
    if name == "BF16":
        raw = b"".join(b"\0\0" + raw[start : start + 2] for start in range(0, len(raw), 2))
        name = "F32"
    code = _STRUCT_CODES.get(name)
    if code is not None:
        return list(struct.unpack(f"<{tensor.numel}{code}", raw))
    if tensor.dtype.numpy is None or tensor.dtype.kind == "complex":
        return [math.nan] * tensor.numel
    return [float(value) for value in tensor.numpy().reshape(-1).astype("float64")]
