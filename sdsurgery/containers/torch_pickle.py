"""What the pickles of ``torch.save`` mean: storages, tensors on them, and the state dict among the rest.

Shared by the zip and the legacy format. Rules follow ``torch.serialization`` and ``torch._utils`` (torch 2.13).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint import Aside, Checkpoint, Origin, Tensor
from ..dtypes import BY_NAME, BY_TORCH, DType
from ..errors import CorruptError, HostileError, UnsupportedError
from ..sources import Buffer, Computed, FileSlice, InMemory, SourceFile
from .pickles import MOST_ARGUMENTS, Call, Global, Machine, PickleError
from .webui_embedding import unnested

METADATA_KEY = "metadata"
"""Beside ``state_dict``, in files that sdsurgery writes: the string metadata."""

_MAX_RANK = 32  # NumPy 1's limit
_MAX_WRAPPERS = 8
_MOST_LOOKED_AT = 1_000_000
_LONGEST_SHOWN = 200
_MOST_EXPANDED = 64 << 20
"""Bytes of a tensor that repeats a small storage, as ``expand`` makes it."""

STORAGE_TYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
}  # fmt: skip

_REMEDY = "download or copy it again; if it was made by a script, save the state dict with torch.save"


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements that tensors are views of, as a persistent id names it.

    Attributes:
        key: Names the record (zip) or the storage (legacy).
        dtype: The type of its elements; ``None`` for untyped storages, which count bytes.
        numel: Elements, or bytes where untyped.
    """

    key: str
    dtype: DType | None
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.numel * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as the pickle describes it: a strided view of a storage, in elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def storage_of(identity: Any) -> Storage | Call:
    """The storage that a persistent id names: ``('storage', type, key, location, numel, ...)``.

    Storages of types that no checkpoint holds, such as quantized ones, are inert.
    """
    if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
        raise PickleError("a persistent id names no storage")
    _, kind, key, _, numel = identity[:5]
    if not (isinstance(kind, Global) and isinstance(key, str | int) and type(numel) is int and numel >= 0):
        raise PickleError("a storage is described in a way that torch never does")
    if len(identity) > 5 and identity[5] is not None:
        raise PickleError("views of storages, from before torch 0.4, can't be read")
    if kind.module.partition(".")[0] != "torch":
        raise PickleError(f"{kind} is no storage")
    if kind.name == "UntypedStorage":
        return Storage(str(key), None, numel)
    if kind.name not in STORAGE_TYPES:
        return Call(kind, ())
    return Storage(str(key), BY_NAME[STORAGE_TYPES[kind.name]], numel)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> View:
    _refuse_pending(rest[2:])
    return _view(storage, getattr(storage, "dtype", None), offset, shape, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> Any:
    _refuse_pending(rest)
    name = dtype.name if isinstance(dtype, Global) and dtype.module == "torch" else ""
    if name not in BY_TORCH:
        return Call(Global("torch._utils", "_rebuild_tensor_v3"), (storage, dtype))
    return _view(storage, BY_TORCH[name], offset, shape, stride)


def _refuse_pending(metadata: Sequence[Any]) -> None:
    """Torch may store a tensor with a note that it is yet to be conjugated or negated."""
    if metadata and metadata[0]:
        raise UnsupportedError(
            "one of its tensors is stored with a conjugation or negation pending",
            remedy="save it again after tensor.resolve_conj().resolve_neg()",
        )


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    """A tensor with attributes, or of a subclass: the tensor itself."""
    constructor = _CONSTRUCTORS.get(str(function)) if isinstance(function, Global) else None
    sound = isinstance(arguments, tuple) and len(arguments) <= MOST_ARGUMENTS
    if constructor is None or constructor is _rebuild_from_type or not sound:
        return Call(function, arguments)
    return constructor(*arguments)


def _view(storage: Any, dtype: DType | None, offset: Any, shape: Any, stride: Any) -> View:
    sizes_are_sound = (
        isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride) <= _MAX_RANK
        and all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *stride, offset))
    )
    if not (isinstance(storage, Storage) and dtype is not None and sizes_are_sound):
        raise PickleError("a tensor is described in a way that torch never does")
    view = View(storage, dtype, offset, shape, stride)
    if math.prod(shape) * dtype.itemsize >= 1 << 63:
        raise PickleError(f"a tensor of shape {list(shape)} is larger than anything can hold")
    if math.prod(shape) and (_last_element(view) + 1) * dtype.itemsize > storage.nbytes:
        raise PickleError(f"a tensor of shape {list(shape)} reaches beyond its storage")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > max(_MOST_EXPANDED, 4 * storage.nbytes):
        raise PickleError(f"a tensor of {nbytes} bytes repeats the {storage.nbytes} of its storage")
    return view


def _last_element(view: View) -> int:
    return view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise PickleError("an OrderedDict is made in a way that torch never does")
    return {}


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not (isinstance(sizes, tuple | list) and len(sizes) <= _MAX_RANK):
        raise PickleError("a shape is made in a way that torch never does")
    return tuple(sizes)


_CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
}


def unpickle(
    stream: io.BytesIO, file: SourceFile, *, storages: bool = True, seen: dict[str, Storage] | None = None
) -> Any:
    """Run the pickle at the stream's position, with tensors as :class:`View` and all else inert.

    Args:
        stream: Ends up behind the pickle.
        file: Named in errors.
        storages: Whether it may refer to storages.
        seen: Filled with the storages that it refers to.

    Raises:
        CorruptError: If it can't be run.
        HostileError: If it wants to run something.
        UnsupportedError: If a tensor is stored in a way that can't be read.
    """
    known: dict[str, Storage] = {} if seen is None else seen

    def persistent(identity: Any) -> Storage | Call:
        storage = storage_of(identity)
        if isinstance(storage, Call):
            return storage
        first = known.setdefault(storage.key, storage)
        if first != storage and (first.nbytes or storage.nbytes):
            raise PickleError("a storage is described in two ways")
        return first

    try:
        return Machine(_CONSTRUCTORS, persistent if storages else None).run(stream)
    except (HostileError, UnsupportedError) as error:
        raise type(error)(error.message, file=file.path, remedy=error.remedy) from None
    except PickleError as error:
        raise CorruptError(f"its pickle can't be read: {error}", file=file.path, remedy=_REMEDY) from error


def checkpoint_of(value: Any, container: str, file: SourceFile, place: Callable[[Storage], FileSlice]) -> Checkpoint:
    """The checkpoint in an unpickled value.

    Args:
        value: What :func:`unpickle` returned.
        container: The container's name.
        file: The file it came from.
        place: Where a storage's bytes lie.

    Raises:
        UnsupportedError: If there is no state dict in it.
    """
    embedding = unnested(value)
    if embedding and isinstance(embedding[0][1], View):
        return _embedding(*embedding, container, file, place)
    state, left = _find_state_dict(value, file)
    tensors: dict[str, Tensor] = {}
    for key, entry in state.items():
        if isinstance(entry, View) and isinstance(key, str):
            tensors[key] = _tensor(entry, place(entry.storage))
        else:
            left.append((key, entry))
    metadata: dict[str, str] = {}
    if isinstance(value, dict) and state is not value and _is_metadata(value.get(METADATA_KEY)):
        metadata = value[METADATA_KEY]
        left = [(key, entry) for key, entry in left if entry is not metadata]
    return Checkpoint(tensors, metadata, origin=Origin(container, file.path, file, _aside(left)))


def _embedding(
    vectors: tuple[str, View],
    metadata: dict[str, str],
    left: list[tuple[Any, Any]],
    container: str,
    file: SourceFile,
    place: Callable[[Storage], FileSlice],
) -> Checkpoint:
    """The checkpoint that a webui's embedding is."""
    key, view = vectors
    for name, entry in left:
        if name == METADATA_KEY and _is_metadata(entry):
            metadata = {**entry, **metadata}
    aside = _aside((name, entry) for name, entry in left if not (name == METADATA_KEY and _is_metadata(entry)))
    origin = Origin(container, file.path, file, aside)
    return Checkpoint({key: _tensor(view, place(view.storage))}, metadata, origin=origin, embedding=True)


def _aside(left: Iterable[tuple[Any, Any]]) -> tuple[Aside, ...]:
    describe = _Describer()
    return tuple(describe.aside(_shown(key), entry) for key, entry in left)


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in (*value, *value.values()))


def _find_state_dict(value: Any, file: SourceFile) -> tuple[dict[Any, Any], list[tuple[Any, Any]]]:
    """The innermost state dict, and what lay beside the wrappers around it."""
    left: list[tuple[Any, Any]] = []
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(value, dict):
            break
        name = _wrapped(value)
        if name is None:
            if value and not any(isinstance(entry, View) for entry in value.values()):
                break
            return value, left
        left.extend((key, entry) for key, entry in value.items() if key != name)
        value = value[name]
    raise UnsupportedError(
        f"there is no state dict in it, but {_Describer()(value)}",
        file=file.path,
        remedy="save the state dict: torch.save(model.state_dict(), ...)",
    )


def _wrapped(value: dict[Any, Any]) -> Any:
    """The key under which the state dict lies, or ``None`` where the dict is the state dict itself."""
    if isinstance(value.get("state_dict"), dict):
        return "state_dict"
    if any(isinstance(entry, View) for entry in value.values()):
        return None
    # One dict may be the value of a million keys: each is looked into once.
    dicts = {id(entry): entry for entry in value.values() if isinstance(entry, dict)}
    filled = {name for name, entry in dicts.items() if any(isinstance(inner, View) for inner in entry.values())}
    candidates = [key for key, entry in value.items() if id(entry) in filled]
    for name in ("model_state_dict", "model", "module"):
        if name in candidates:
            return name
    if not candidates and len(value) == 1:
        (key, entry) = next(iter(value.items()))
        return key if isinstance(entry, dict) and entry else None
    return candidates[0] if len(candidates) == 1 else None


def _shown(value: str | bytes | Any) -> str:
    """A key in one line of bearable length."""
    text = repr(value[:_LONGEST_SHOWN]) if isinstance(value, bytes) else str(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


class _Describer:
    """Says what things are, each in a few words.

    Looks at a bounded number of things in all: values share their parts, so that looking into each could take forever.
    """

    def __init__(self) -> None:
        self._left = _MOST_LOOKED_AT

    def aside(self, name: str, value: Any) -> Aside:
        """What lies beside a state dict under that name."""
        inside = self._count_tensors(value)
        return Aside(name, self._words(value, inside), inside)

    def __call__(self, value: Any) -> str:
        return self._words(value, self._count_tensors(value))

    @staticmethod
    def _words(value: Any, inside: int) -> str:
        if isinstance(value, View):
            return f"tensor {value.dtype}{list(value.shape)}"
        if isinstance(value, Storage):
            return f"storage of {value.nbytes} bytes"
        if value is None or isinstance(value, bool | int | float):
            return f"{type(value).__name__} {value!r:.40}"
        if isinstance(value, str | bytes | bytearray):
            return f"{type(value).__name__} of length {len(value)}"
        if isinstance(value, Call | Global):
            return f"object {value!s:.80}"
        return f"{type(value).__name__} of {len(value)}" + (f", {inside} tensors inside" if inside else "")

    def _count_tensors(self, value: Any) -> int:
        count, seen, stack = 0, set(), [value]
        while stack and self._left > 0:
            current = stack.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            inner = _parts(current)
            self._left -= 1 + len(inner)
            stack.extend(inner)
            count += isinstance(current, View)
        return count


def _parts(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    return (value.arguments, value.items) if isinstance(value, Call) else ()


def _tensor(view: View, where: FileSlice) -> Tensor:
    nbytes = view.dtype.nbytes(view.shape)
    if not nbytes:
        return Tensor(view.dtype, view.shape, InMemory(b""))
    if _is_dense(view):
        start = where.offset + view.offset * view.dtype.itemsize
        return Tensor(view.dtype, view.shape, FileSlice(where.file, start, nbytes))
    return Tensor(view.dtype, view.shape, Computed(nbytes, lambda size: _gather(view, where, size), (where.file,)))


def _is_dense(view: View) -> bool:
    expected = 1
    for size, step in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _gather(view: View, where: FileSlice, size: int) -> Iterator[Buffer]:
    """The elements of a strided view in row-major order; holds the part of the storage that it spans."""
    import numpy as np

    item = view.dtype.itemsize
    span = (_last_element(view) - view.offset + 1) * item
    raw = np.frombuffer(where.file.read(where.offset + view.offset * item, span), dtype=f"V{item}")
    strided = np.lib.stride_tricks.as_strided(
        raw, view.shape, tuple(step * item for step in view.stride), writeable=False
    )
    yield from _blocks(strided, max(1, size // item))


def _blocks(array: Any, limit: int) -> Iterator[Buffer]:
    if array.size <= limit or array.ndim == 0:
        yield array.tobytes()
        return
    rows = limit // (array.size // array.shape[0])
    if rows:
        for start in range(0, array.shape[0], rows):
            yield array[start : start + rows].tobytes()
    else:
        for row in array:
            yield from _blocks(row, limit)
