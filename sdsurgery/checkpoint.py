"""The checkpoint: an immutable mapping from keys to lazy tensors, with its metadata and its history.

No format and no model is known here. Bytes move only in :func:`sdsurgery.containers.save`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .dtypes import BY_NUMPY, BY_TORCH, DType
from .sources import CHUNK, Buffer, Computed, Data, InMemory, SourceFile

if TYPE_CHECKING:
    import os
    from pathlib import Path

    import numpy as np

    from .containers.saving import Saved

ChangeKind = Literal["replaced", "renamed", "added", "dropped", "cast", "metadata"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dtype, a shape, and a way to get the bytes (little-endian, row-major, dense)."""

    dtype: DType
    shape: tuple[int, ...]
    data: Data

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a file."""
        return self.data.nbytes

    @property
    def numel(self) -> int:
        """How many elements it has."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def chunks(self, size: int = CHUNK) -> Iterator[Buffer]:
        """The bytes in order, in pieces of about ``size``."""
        return self.data.chunks(size)

    def tobytes(self) -> bytes:
        """All bytes at once."""
        return b"".join(self.chunks())

    def numpy(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The values as a NumPy array (types that NumPy lacks come from ``ml_dtypes``)."""
        import numpy as np

        return np.frombuffer(bytearray(self.tobytes()), dtype=self.dtype.to_numpy()).reshape(self.shape)

    def torch(self) -> Any:
        """The values as a ``torch.Tensor``.

        Raises:
            ValueError: If torch has no such type.
        """
        import torch

        if self.dtype.torch is None:
            raise ValueError(f"torch has no type for {self.dtype}")
        dtype = getattr(torch, self.dtype.torch)
        if not self.numel:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.tobytes()), dtype=dtype).reshape(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @classmethod
    def of(cls, value: Any) -> Tensor:
        """A tensor of a NumPy array, a ``torch.Tensor`` or a tensor; the bytes are taken when needed."""
        if isinstance(value, cls):
            return value
        if type(value).__module__.partition(".")[0] == "torch":
            name = str(value.dtype).removeprefix("torch.")
            if name not in BY_TORCH:
                raise TypeError(f"no checkpoint holds elements of type {name}")
            dtype, shape = BY_TORCH[name], tuple(value.shape)
            return cls(dtype, shape, _computed(dtype.nbytes(shape), lambda: _torch_bytes(value)))
        import numpy as np

        array = np.asarray(value)
        if array.dtype.name not in BY_NUMPY:
            raise TypeError(f"no checkpoint holds elements of type {array.dtype}")
        dtype, shape = BY_NUMPY[array.dtype.name], tuple(array.shape)
        little = array.dtype.newbyteorder("<")
        return cls(dtype, shape, _computed(array.nbytes, lambda: array.astype(little, copy=False).tobytes()))


def _computed(nbytes: int, whole: Callable[[], bytes]) -> Computed:
    return Computed(nbytes, lambda size: InMemory(whole()).chunks(size))


def _torch_bytes(value: Any) -> bytes:
    import torch

    dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # A lone element counts as contiguous whatever its stride, but can't be viewed as bytes then.
    flat = dense.as_strided((dense.numel(),), (1,))
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that an operation did.

    Attributes:
        key: The key in the result; in the input for what was dropped.
        kind: What was done.
        before: What stood there, in words (a renamed tensor: its old key); ``None`` for what was added.
        after: What stands there now; ``None`` for what was dropped.
    """

    key: str
    kind: ChangeKind
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True, slots=True)
class Unread(Change):
    """A file in a model folder that isn't read and doesn't come along; no record counts it, for it changes nothing."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a person should know; a warning is a finding that was not mended."""

    message: str
    level: Literal["info", "warning"] = "info"
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """A further checkpoint that an operation took something from; no path is ever recorded.

    Attributes:
        name: The name of its file.
        sha256: Of its file, where it is known.
        made: The record that the file has of its own making.
        steps: What was done to it since it was opened, as records have it.
    """

    name: str
    sha256: str | None = None
    made: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One operation as it was applied: what history, ``--dry-run``, the log and the tests all read.

    Attributes:
        operation: Its name.
        parameters: As given; files by their names, without folders.
        changes: What it did.
        notes: What it found.
        inputs: The further files that it took something from.
        facts: What a later reader of the record may want to know, such as the family a part came from.
    """

    operation: str
    parameters: Mapping[str, Any]
    changes: tuple[Change, ...] = ()
    notes: tuple[Note, ...] = ()
    inputs: tuple[Input, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Aside:
    """Something in a file that is no tensor of the state dict, such as an epoch or optimizer state.

    Attributes:
        name: Its key.
        what: What it is, in a few words.
        tensors: How many tensors are in it.
    """

    name: str
    what: str
    tensors: int = 0


@dataclass(frozen=True, slots=True)
class AsideFile(Aside):
    """A file or folder in a model folder that the checkpoint isn't made of: other variants, formats, hidden files."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a checkpoint was opened from.

    Attributes:
        container: How its bytes lie.
        path: The file or the folder.
        file: The file; ``None`` for a folder.
        aside: What it holds besides the state dict.
        data_offset: Where the tensors' bytes begin, in a safetensors file.
        recorded_as: The name under which records tell of it; its own unless given.
        computed_sha256: Of the file, if somebody computed it.
    """

    container: str
    path: Path
    file: SourceFile | None = None
    aside: tuple[Aside, ...] = ()
    data_offset: int | None = None
    recorded_as: str | None = None
    computed_sha256: str | None = None

    @property
    def name(self) -> str:
        """The name under which records tell of it."""
        return self.recorded_as or self.path.name or self.path.resolve().name

    @property
    def sha256(self) -> str | None:
        """Of the file, where it is known without reading it."""
        return self.computed_sha256 or (self.file.known_sha256 if self.file else None)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of a model folder that holds weights, as it was opened.

    Attributes:
        name: Relative to the folder, with ``/``.
        checkpoint: Its content under its own keys.
        prefix: What the model's keys have before the file's own, such as ``unet/``.
    """

    name: str
    checkpoint: Checkpoint
    prefix: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors under the model's keys."""
        return {self.prefix + key: tensor for key, tensor in self.checkpoint.items()}


class FolderGraphs(Protocol):
    """The ONNX graphs of a folder; see ``containers/onnx_folders.py`` and ``graphs/files.py``."""

    @property
    def files(self) -> Mapping[str, Data]:
        """Those that were read, with their own files of data, by name; none of graphs that are yet to be made."""

    def add_to(self, plan: Any, checkpoint: Checkpoint) -> None:
        """Add them to what is planned."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What a model folder is besides its tensors.

    Attributes:
        files: Those that hold no weights (configs, tokenizers), by their names relative to the folder, with ``/``.
        weights: Those that do, as they were opened; none in a folder that is yet to be written.
        indexes: The files that say in which shard a tensor lies, by their names, for components that are sharded.
        graphs: Its ONNX graphs, if it has any or is to have.
    """

    files: Mapping[str, Data]
    weights: tuple[WeightFile, ...] = ()
    indexes: Mapping[str, Data] = field(default_factory=dict)
    graphs: FolderGraphs | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """An immutable mapping from keys to lazy tensors.

    Attributes:
        tensors: The mapping itself, in the order of the file.
        metadata: String metadata as the container holds it.
        steps: The operations applied since it was opened.
        origin: What it was opened from, if anything.
        folder: What belongs to it besides tensors where it lies in a folder, with keys such as ``unet/conv_in.weight``.
        header: The exact header to write, where a safetensors file is restored as it was: its eight bytes of length,
            and the JSON as it stood there.
        as_it_was: Whether the metadata are to be written as they are, with nothing appended: a file is restored.
        companions: Files to be written beside a single file, by the suffix that takes the place of its own.
        embedding: Whether it is a textual inversion embedding, whose pickle is another than that of a model.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    origin: Origin | None = None
    folder: Folder | None = None
    header: bytes | None = None
    as_it_was: bool = False
    companions: Mapping[str, Data] = field(default_factory=dict)
    embedding: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Everything that was done since it was opened."""
        return tuple(change for step in self.steps for change in step.changes)

    @property
    def notes(self) -> tuple[Note, ...]:
        """Everything that the operations had to say."""
        return tuple(note for step in self.steps for note in step.notes)

    @property
    def aside(self) -> tuple[Aside, ...]:
        """What the file held besides the state dict."""
        return self.origin.aside if self.origin else ()

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Every file that some tensor's bytes are read from, and the one it was opened from."""
        files = {file: None for tensor in self.tensors.values() for file in tensor.data.files}
        if self.folder:
            files |= {file: None for data in self.folder.files.values() for file in data.files}
        if self.origin and self.origin.file:
            files[self.origin.file] = None
        return tuple(files)

    @property
    def path(self) -> Path | None:
        """The file or folder that it was opened from, if any."""
        return self.origin.path if self.origin else None

    def pipe(self, *operations: Callable[[Checkpoint], Checkpoint]) -> Checkpoint:
        """The checkpoint after these operations, in order; no weight is read before :meth:`save` needs it."""
        result = self
        for operation in operations:
            result = operation(result)
        return result

    def evolve(self, tensors: Mapping[str, Tensor], step: Step, **changes: Any) -> Checkpoint:
        """The checkpoint with other tensors, and a step that tells why."""
        return replace(self, tensors=tensors, steps=(*self.steps, step), header=None, as_it_was=False, **changes)

    def hashed(self) -> Checkpoint:
        """The same with the SHA-256 of the file it was opened from, which is read for it, for records to tell."""
        from .containers.opening import hashed

        return hashed(self)

    def save(self, path: str | os.PathLike[str], **options: Any) -> Saved:
        """Write it; see :func:`sdsurgery.containers.save` for the options."""
        from .containers import save

        return save(self, path, **options)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any] | Iterable[tuple[str, Any]],
        metadata: Mapping[str, str] | None = None,
    ) -> Checkpoint:
        """A checkpoint of NumPy arrays or torch tensors that are in memory."""
        return cls({key: Tensor.of(value) for key, value in dict(state_dict).items()}, metadata or {})
