"""One output: a model in a layout under a name, with all that goes with it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import progress
from .checkpoint import Change, Checkpoint
from .containers import folder_writing, folders, save
from .containers.saving import SUFFIXES, check_target, content, losses, target_container
from .containers.writing import AtomicFile
from .errors import OutputError, OutputExistsError, UsageError
from .models import sidecar as sidecars
from .operations import Cast, Convert, sidecar_of
from .operations.cast import DTypeName
from .operations.convert import LayoutName

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True, slots=True)
class Output:
    """What is asked for.

    Attributes:
        path: The file or the folder; its name says which.
        to: The layout, if not the one that the name says.
        dtype: What its weights are cast to; as they are unless given.
        variant: What stands in the names of a folder's weights, such as ``fp16``.
        shard_size: The most that a file of a folder's weights holds, such as ``5GB``.
        sidecar: Whether what a folder can't hold is kept in a file beside it.
        options: Those of :class:`~sdsurgery.operations.Convert`.
    """

    path: Path
    to: LayoutName | None = None
    dtype: DTypeName | None = None
    variant: str | None = None
    shard_size: str | None = None
    sidecar: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> LayoutName:
        """The layout to convert to: as told, or by the name."""
        return self.to or ("diffusers" if self.is_folder else "ldm")

    @property
    def is_folder(self) -> bool:
        """Whether the name is a folder's."""
        return self.path.suffix.lower() not in SUFFIXES

    def check(self) -> None:
        """Refuse what makes no sense whatever the model.

        Raises:
            UsageError: Names the option.
        """
        name = repr(self.path.name)
        if self.layout == "ldm" and self.is_folder:
            message = f"{name} is no name of a single file"
            raise UsageError(message, remedy=f"give it one of the suffixes {', '.join(SUFFIXES)}")
        if self.sidecar and self.is_folder != (self.layout != "ldm"):
            raise UsageError("a sidecar lies beside a folder", remedy="name a folder, or leave out --sidecar")
        given = self.altering if self.sidecar else None
        if given:
            message = f"--sidecar promises the original back, and {given} asks for another"
            raise UsageError(message, remedy="leave one of the two out")
        if self.layout == "onnx" and not self.is_folder:
            raise UsageError(f"{name} is a file's name, and ONNX takes a folder", remedy="leave out the suffix")
        if self.shard_size is not None and not self.is_folder:
            raise UsageError("a single file has no shards", remedy="leave out --shard-size")
        _size(self.shard_size)

    @property
    def altering(self) -> str | None:
        """An option that asks for another model than the original, if one is given."""
        found = {"--dtype": self.dtype, "--ema": self.options.get("ema")}
        if self.layout == "ldm":
            found |= {
                "--config": self.options.get("config"),
                "--prediction-type": self.options.get("prediction_type"),
            }
        return next((option for option, value in found.items() if value), None)

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint can be written there as it is, without being converted."""
        return self.to is None and self.is_folder == (checkpoint.folder is not None)

    def converted(self, checkpoint: Checkpoint, sidecar: Path | None = None) -> Checkpoint:
        """What will be written.

        Args:
            checkpoint: The model, in any layout.
            sidecar: What to restore a single file with.

        Raises:
            SurgeryError: What :class:`~sdsurgery.operations.Convert` and ``Cast`` raise.
        """
        convert = Convert(self.layout, sidecar=sidecar, **self.options)
        result = checkpoint.pipe(convert, *([Cast(self.dtype)] if self.dtype else []))
        if result.folder and not self.is_folder and not folders.is_lone(result):
            message = f"{self.path.name!r} is a file's name, and diffusers' layout of a whole model is a folder"
            raise UsageError(message, remedy="leave out the suffix")
        # A lone component may go into a file under diffusers' names, without the config that its folder would have.
        return replace(result, folder=None) if not self.is_folder and folders.is_lone(result) else result

    def losses(
        self, original: Checkpoint, result: Checkpoint, *, force: bool, hashes: bool = False
    ) -> tuple[Change, ...]:
        """What the output won't hold, if it may be written; no weight is read.

        Raises:
            OutputError: If it may not, or can't.
        """
        target_container(result, self.path, in_place=False)
        if self.is_folder:
            lost = folder_writing.plan(result, self.path, **self._names).changes
        else:
            lost = losses(result, self.path, hashes=hashes)
        check_target(result, self.path, force=force, in_place=False)
        refuse(self.path, force=force)
        if self.sidecar and self.is_folder:
            beside = sidecars.path_beside(self.path)
            check_target(replace(original, folder=None), beside, force=force, in_place=False)
        config = self.options.get("config")
        refuse_configs(result, self.path, [Path(config)] if config else [])
        return lost

    def misleading_config(self, result: Checkpoint) -> Path | None:
        """What lies beside a single file under its name, and every loader takes for its config."""
        beside = self.path.with_suffix(".yaml")
        wrong = not self.is_folder and ".yaml" not in result.companions and os.path.exists(beside)  # noqa: PTH110 - unlike Path.exists, also of names that are too long
        return beside if wrong else None

    def write(self, original: Checkpoint, result: Checkpoint, *, force: bool, hashes: bool = False) -> int:
        """Write the result; a sidecar appears when its folder is there, and not at all if that fails.

        Args:
            original: The model.
            result: What was made of it.
            force: Replace what has this name.
            hashes: See :func:`sdsurgery.containers.save`.

        Returns:
            How many bytes were written.
        """
        if not self.is_folder:
            return save(result, self.path, force=force, hashes=hashes).nbytes
        with self._sidecar(original, result, force=force) if self.sidecar else contextlib.nullcontext():
            return save(result, self.path, force=force, **self._names).nbytes

    @contextlib.contextmanager
    def _sidecar(self, original: Checkpoint, result: Checkpoint, *, force: bool) -> Iterator[None]:
        sidecar = sidecar_of(original, result)
        parts = content(sidecar, sidecar.metadata)
        nbytes = sum(part.nbytes for part in parts)
        beside = sidecars.path_beside(self.path)
        with (
            progress.task("writing the sidecar", nbytes) as advance,
            AtomicFile(beside, replace=force, size=nbytes, advance=advance) as out,
        ):
            for part in parts:
                out.append(part)
            yield

    @property
    def _names(self) -> dict[str, Any]:
        """How a folder's weights are to be called and split."""
        return {"variant": self.variant, "shard_size": _size(self.shard_size)}


def refuse(path: Path, *, force: bool) -> None:
    """Refuse an output that could not be written, whatever the input were.

    Raises:
        OutputError: If there is no such folder, or the name is taken.
    """
    check_target(Checkpoint({}), path, force=force, in_place=False)
    if not path.parent.is_dir():
        raise OutputError("there is no such folder", file=path, remedy="make the folder first")


def refuse_configs(checkpoint: Checkpoint, target: Path, configs: list[Path]) -> None:
    """Refuse to write one of the named configs over, whatever is forced."""
    for place in map(target.with_suffix, checkpoint.companions):
        if place.exists() and any(config.exists() and config.samefile(place) for config in configs):
            raise OutputExistsError("it is one of the inputs", file=place, remedy="choose another name")


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,12})\s*([kmg]i?b)?", text.strip().lower())
    if not match or not int(match.group(1)):
        raise UsageError(f"{text!r} is no size", remedy="give one such as 5GB, 500MB or 2GiB")
    return int(match.group(1)) * _UNITS[match.group(2) or ""]
