"""cast: another float type, for weights and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from .. import progress
from ..arrays import arrays_of
from ..checkpoint import Change, Checkpoint, Note, Step, Tensor
from ..dtypes import CAST_TARGETS, DType
from ..errors import MismatchError, RefusedError, UnsupportedError
from ..models.components import EMA_SCALARS, MARKERS
from ..models.identify import Model, identify
from ..sources import Buffer, Computed
from .base import Operation, Param

DTypeName = Literal["fp16", "bf16", "fp32"]
ComponentName = Literal["text_encoder", "text_encoder_2", "unet", "vae"]
OnOverflow = Literal["refuse", "clip", "inf"]

_CHUNK = 8 << 20
LARGEST = {"F16": 65504.0, "BF16": float.fromhex("0x1.fep127"), "F32": float.fromhex("0x1.fffffep127")}
"""The largest finite number of the types that are cast to."""


@dataclass(frozen=True)
class Cast(Operation):
    """Cast the weights to another float type, rounding to nearest once.

    Integers, position ids, schedule buffers, EMA scalars and marker tensors stay as they are. All values are looked
    at first: NaN and Inf are reported, and finite values that would become Inf are refused unless told otherwise.
    """

    name: ClassVar[str] = "cast"

    dtype: Annotated[DTypeName, Param("The type to cast to.", positional=True)]
    component: Annotated[
        tuple[ComponentName, ...], Param("Only this component; may be given several times. All weights unless given.")
    ] = ()
    on_overflow: Annotated[
        OnOverflow,
        Param("What to do with finite values beyond the type's range: refuse, clip to its largest, or let be Inf."),
    ] = "refuse"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """See :class:`Cast`."""
        target = CAST_TARGETS[self.dtype]
        model = identify(checkpoint)
        _require(model, checkpoint, self.component)
        castable = _castable(checkpoint, model, self.component)
        chosen = {key: tensor for key, tensor in checkpoint.items() if key in castable and tensor.dtype is not target}
        remedy = "leave the component out, or choose --on-overflow clip"
        if target.name == "F16":
            remedy = "cast to bf16, " + remedy
        notes = list(check_values(chosen, target, checkpoint, remedy, self.on_overflow))
        if not chosen:
            notes.append(Note(f"every weight is {self.dtype} already" if castable else "it has no weights to cast"))
        tensors = dict(checkpoint) | {
            key: cast_tensor(tensor, target, self.on_overflow) for key, tensor in chosen.items()
        }
        changes = tuple(Change(key, "cast", str(tensor), str(tensors[key])) for key, tensor in chosen.items())
        return checkpoint.evolve(tensors, Step(self.name, self.parameters(), changes, tuple(notes)))


def _require(model: Model, checkpoint: Checkpoint, components: tuple[str, ...]) -> None:
    for name in components:
        if name not in model.components:
            raise MismatchError(
                f"it has no {name}; it has {', '.join(model.components) or 'nothing that is known'}",
                file=checkpoint.path,
                remedy="see what it holds: sdsurgery inspect",
            )


def _castable(checkpoint: Checkpoint, model: Model, components: tuple[str, ...]) -> set[str]:
    """Keys of float weights in the chosen components; all of them where none is chosen."""
    kept = set(model.components["schedule"].all_keys()) if "schedule" in model.components else set()
    if "ema" in model.components:
        kept |= {key for name, key in model.components["ema"].keys.items() if name in EMA_SCALARS}
    keys = set(checkpoint) - kept
    if components:
        keys = {key for name in components for key in model.components[name].all_keys()}
    return {
        key
        for key in keys
        if checkpoint[key].dtype.kind == "float"
        and not key.endswith("position_ids")
        and key.removeprefix(model.wrapper) not in MARKERS
    }


def cast_tensor(tensor: Tensor, target: DType, on_overflow: OnOverflow = "refuse") -> Tensor:
    """The tensor in another float type; computed piece by piece when its bytes are asked for."""
    if tensor.dtype is target:
        return tensor

    def produce(size: int) -> Iterator[Buffer]:
        for (piece,) in arrays_of((tensor,), size):
            yield memoryview(_convert(piece, target, on_overflow)).cast("B")

    return Tensor(target, tensor.shape, Computed(target.nbytes(tensor.shape), produce, tensor.data.files))


def _convert(array: Any, target: DType, on_overflow: OnOverflow) -> Any:
    import numpy as np

    kind = target.to_numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        converted = (_rounded_to_odd(array) if target.name == "BF16" and array.itemsize == 8 else array).astype(kind)
        if on_overflow == "clip":
            overflowed = np.isinf(converted) & np.isfinite(array)
            if overflowed.any():
                largest = np.array(LARGEST[target.name], dtype=kind)
                converted[overflowed] = np.where(array[overflowed] > 0, largest, -largest)
    return converted.view("V2") if target.name == "BF16" else converted


def _rounded_to_odd(array: Any) -> Any:
    """float64 as float32 with inexact values rounded to the odd neighbour.

    On the way to bfloat16, rounding to the nearest float32 first could make a tie of what is none.
    """
    import numpy as np

    nearest = array.astype(np.float32)
    inexact = np.isfinite(array) & (nearest != array)
    beyond = inexact & (np.abs(nearest) > np.abs(array))
    bits = nearest.view(np.uint32)
    return np.where(inexact, (bits - beyond) | np.uint32(1), bits).astype(np.uint32).view(np.float32)


def check_values(
    tensors: dict[str, Tensor], target: DType, checkpoint: Checkpoint, remedy: str, on_overflow: OnOverflow = "refuse"
) -> Iterator[Note]:
    """Read what will be cast, and tell of NaN, Inf and overflow before anything is written.

    Args:
        tensors: By their keys.
        target: The type that they will be cast to.
        checkpoint: Where they are, for the error.
        remedy: What to do about overflow, for the error.
        on_overflow: See :class:`Cast`.

    Raises:
        RefusedError: If finite values would become Inf and ``on_overflow`` is ``refuse``.
        UnsupportedError: If a tensor's type has no values that NumPy knows.
    """
    overflowing: dict[str, int] = {}
    with progress.task(f"checking {len(tensors)} tensors", sum(tensor.nbytes for tensor in tensors.values())) as done:
        for key, tensor in tensors.items():
            if tensor.dtype.numpy is None:
                raise UnsupportedError(
                    f"elements of type {tensor.dtype} can't be cast, such as those of {key}",
                    file=checkpoint.path,
                    key=key,
                    remedy="cast the other components, with --component",
                )
            nan, infinite, overflow = _count_special(tensor, target, done)
            if nan:
                yield Note(f"{key} holds {nan} NaN", "warning", key)
            if infinite:
                yield Note(f"{key} holds {infinite} Inf", "warning", key)
            if overflow:
                overflowing[key] = overflow
                verb = "are clipped" if on_overflow == "clip" else "become Inf"
                yield Note(f"{overflow} values of {key} are beyond {target} and {verb}", "warning", key)
    if overflowing and on_overflow == "refuse":
        first = next(iter(overflowing))
        raise RefusedError(
            f"{sum(overflowing.values())} values in {len(overflowing)} tensors are beyond {target}, "
            f"the first in {first}",
            file=checkpoint.path,
            key=first,
            remedy=remedy,
        )


def _count_special(tensor: Tensor, target: DType, done: progress.Advance) -> tuple[int, int, int]:
    """How many NaN, Inf, and finite values that the target can't hold."""
    import numpy as np

    nan = infinite = overflow = 0
    limit = LARGEST[target.name]
    with np.errstate(invalid="ignore"):  # a signalling NaN is counted, and no reason for NumPy to speak up
        for (array,) in arrays_of((tensor,), _CHUNK):
            done(array.nbytes)
            if not array.size or _is_tame(array, limit):
                continue
            wide = array.astype(np.float64)
            nan += int(np.isnan(wide).sum())
            infinite += int(np.isinf(wide).sum())
            converted = _convert(array, target, "inf").view(target.to_numpy())
            overflow += int((np.isinf(converted) & np.isfinite(wide)).sum())
    return nan, infinite, overflow


def _is_tame(array: Any, limit: float) -> bool:
    """Whether all values are finite and within the limit, told fast: by the bits where NumPy has no fast minimum."""
    import numpy as np

    if array.dtype.itemsize == 2:
        # Without the sign, the bits of a half or bfloat16 order as its magnitudes do; the exponent is all ones in
        # Inf and NaN.
        bits = array.view(np.uint16) & np.uint16(0x7FFF)
        largest = bits.max().view(array.dtype)
        return bool(np.isfinite(largest)) and float(largest) <= limit
    if array.dtype.kind != "f":
        array = array.astype(np.float32)
    low, high = array.min(), array.max()
    return bool(-limit <= low) and bool(high <= limit)
