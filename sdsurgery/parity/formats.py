"""The formats of one model on disk: those that were given, and those that are made of the first for the comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..checkpoint import Checkpoint
from ..containers import open as open_checkpoint
from ..containers import safetensors
from ..errors import MismatchError, UnsupportedError, UsageError
from ..models.identify import Model, identify
from ..models.position_ids import diagnose, values
from ..operations import Convert
from ..operations.cast import DTypeName

Kind = Literal["ldm", "diffusers", "onnx"]

LABELS: dict[Kind, str] = {"ldm": "single file", "diffusers": "diffusers folder", "onnx": "ONNX folder"}
_WHOLE = frozenset({"unet", "vae", "text_encoder"})


@dataclass(frozen=True, slots=True)
class Format:
    """One format of a model.

    Attributes:
        kind: Which.
        path: What a runtime loads.
        configs: The folder whose configs and tokenizers go with it: itself if it is one.
        family: Of the model, without its variant.
        given: What the user named; ``None`` where it was made.
        name: The end of that which tells it from the others; empty where it was made.
        position_ids: Those that a single file holds, truncated to integers as ldm's and A1111's loaders do it; ``None``
            where it holds none. diffusers ignores them.
    """

    kind: Kind
    path: Path
    configs: Path
    family: str
    given: Path | None = None
    name: str = ""
    position_ids: tuple[int, ...] | None = None

    @property
    def label(self) -> str:
        """What it is called in a report: by its name, without folders, and by its kind."""
        return f"{LABELS[self.kind]} {self.name}" if self.name else f"{LABELS[self.kind]} (made)"


def prepare(paths: Sequence[Path], workplace: Path, *, compute: DTypeName | None) -> tuple[Format, ...]:
    """The formats to compare; of a single one that is given, the other two are made.

    Args:
        paths: Single files and folders of one model.
        workplace: An empty folder that is thrown away afterwards.
        compute: What graphs that are made compute in; what their weights are in unless given.

    Raises:
        UsageError: If a path is named twice.
        UnsupportedError: If it isn't a whole model, or of no known family.
        MismatchError: If they are of different families.
        InputError: If one can't be read.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a model is named twice", remedy="name each once")
    found: list[Format] = []
    first: Checkpoint | None = None
    for index, path in enumerate(paths):
        checkpoint = open_checkpoint(path)
        first = first or checkpoint
        found.append(replace(_of(checkpoint, path, workplace / f"given-{index}"), name=_name(path, paths)))
    families = {each.family for each in found}
    if len(families) > 1:
        message = f"they are of different families: {', '.join(sorted(families))}"
        raise MismatchError(message, file=paths[0], remedy="name formats of one model")
    if len(found) == 1 and first is not None:
        found += _others(first, found[0], workplace, compute)
    return tuple(found)


def _name(path: Path, paths: Sequence[Path]) -> str:
    """As much of the end of a path as no other one ends with."""
    parts = path.resolve().parts
    others = [other.resolve().parts for other in paths if other is not path]
    count = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts))
    return "/".join(parts[-count:])


def _of(checkpoint: Checkpoint, path: Path, workplace: Path) -> Format:
    model = identify(checkpoint)
    missing = _WHOLE - model.networks.keys() - ({"text_encoder"} if "text_encoder_2" in model.networks else set())
    if model.family == "unknown" or missing:
        what = f"it has no {', '.join(sorted(missing))}" if missing else "its family isn't known"
        raise UnsupportedError(f"{what}, and only whole models draw pictures", file=path, remedy="name a whole model")
    if checkpoint.folder is not None:
        kind: Kind = "onnx" if checkpoint.folder.graphs is not None else "diffusers"
        return Format(kind, path, path, model.base_family, path)
    workplace.mkdir()
    configs = _configs(checkpoint, workplace / "configs")
    plain = _plain(checkpoint, model, path, workplace)
    ids = _position_ids(checkpoint, model)
    return Format("ldm", plain, configs, model.base_family, path, position_ids=ids)


def _plain(checkpoint: Checkpoint, model: Model, path: Path, workplace: Path) -> Path:
    """A file that diffusers' loader may read: never a pickle, and under ldm's names."""
    container = checkpoint.origin.container if checkpoint.origin else None
    if container == safetensors.NAME and model.layout == "ldm":
        return path
    result = checkpoint if model.layout == "ldm" else checkpoint.pipe(Convert("ldm"))
    return Path(result.save(workplace / "model.safetensors").path)


def _configs(checkpoint: Checkpoint, target: Path) -> Path:
    """The configs and tokenizers that converting gives, without a weight."""
    folder = checkpoint.pipe(Convert("diffusers")).folder
    assert folder is not None  # noqa: S101 - for the type checker: it was made a folder
    for name, data in folder.files.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"".join(data.chunks()))
    return target


def _position_ids(checkpoint: Checkpoint, model: Model) -> tuple[int, ...] | None:
    found = diagnose(checkpoint, model)
    if found.key is None or found.key not in checkpoint:
        return None
    return tuple(
        int(value) if math.isfinite(value) and abs(value) < 1 << 31 else -1 for value in values(checkpoint[found.key])
    )


def _others(checkpoint: Checkpoint, given: Format, workplace: Path, compute: DTypeName | None) -> list[Format]:
    """The formats that aren't there; one folder serves as two, for its graphs point into diffusers' own weights."""
    made: list[Format] = []
    both = workplace / "folder"
    to_both = Convert("diffusers") if given.kind == "onnx" else Convert("onnx", compute=compute)
    checkpoint.pipe(to_both).save(both)
    for kind in ("ldm", "diffusers", "onnx"):
        if kind == given.kind:
            continue
        if kind == "ldm":
            single = checkpoint.pipe(Convert("ldm"))
            path = Path(single.save(workplace / "model.safetensors").path)
            again = _of(open_checkpoint(path), path, workplace / "single")
            made.append(replace(again, given=None))
        else:
            made.append(Format(kind, both, both, given.family))
    return made
