"""A recipe, run: its inputs opened, its steps applied, its outputs written and checked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint import Change, Checkpoint
from ..containers import open as open_checkpoint
from ..digests import sha256_of
from ..errors import MismatchError, OutputExistsError, SurgeryError, UsageError
from ..inspection.manifests import files_of
from ..models import sidecar as sidecars
from ..models.stated import config_beside
from ..operations import Cast
from ..sources import Computed, Data
from .checking import Outcome, check
from .locking import Listed, Lock, differences, listed_models, listed_paths, versions
from .recipe import InputFile, OutputOf, Recipe


@dataclass(frozen=True, slots=True)
class Made:
    """An output.

    Attributes:
        entry: As the recipe has it.
        original: The steps' result.
        result: What is written of it.
        lost: What the output doesn't hold.
        nbytes: What was written; in a plan nothing is.
    """

    entry: OutputOf
    original: Checkpoint
    result: Checkpoint
    lost: tuple[Change, ...]
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Ran:
    """What a recipe did, or would do.

    Attributes:
        recipe: It.
        inputs: By name.
        results: The result of each step, by name.
        outputs: In order.
        checks: In order; none in a plan.
        lock: The hashes of all, where they were asked for.
        differences: What isn't as the lock has it, a line each.
    """

    recipe: Recipe
    inputs: Mapping[str, Checkpoint]
    results: Mapping[str, Checkpoint]
    outputs: tuple[Made, ...]
    checks: tuple[Outcome, ...] = ()
    lock: Lock | None = None
    differences: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if all is as it should be, 1 if not, 3 if something could not be checked."""
        return max([*(outcome.exit_code for outcome in self.checks), 1 if self.differences else 0])


def plan(recipe: Recipe, *, lock: Lock | None = None, force: bool = False) -> Ran:
    """Open the inputs and apply the steps; nothing is written.

    Args:
        recipe: What to do.
        lock: What the inputs must be.
        force: Whether outputs that are there already may be replaced.

    Raises:
        MismatchError: If an input isn't what the recipe or the lock says.
        SurgeryError: What opening and the operations raise; its details name the line.
    """
    inputs = _opened(recipe, lock)
    known = dict(inputs)
    for step in recipe.steps:
        with _at(recipe, step.line, step.operation.name):
            operation = step.operation.with_sources(known.__getitem__)
            known[step.result] = operation(known[step.source])
    made = []
    for entry in recipe.outputs:
        with _at(recipe, entry.line, entry.name):
            made.append(_made(recipe, entry, known, force=force))
    _spare_inputs(recipe, inputs, made)
    for each in recipe.checks:
        with _at(recipe, each.line, each.kind):
            each.refuse(force=force)
    return Ran(recipe, inputs, known, tuple(made))


def run(recipe: Recipe, *, lock: Lock | None = None, locking: bool = False, force: bool = False) -> Ran:
    """Make what a recipe says.

    Args:
        recipe: What to do.
        lock: What must go in and come out.
        locking: Whether to hash all that goes in and comes out, for a new lock.
        force: Whether outputs that are there already may be replaced.

    Raises:
        MismatchError: If an input isn't what the recipe or the lock says; then nothing is written.
        SurgeryError: What opening, the operations and writing raise.
    """
    planned = plan(recipe, lock=lock, force=force)
    known = planned.results
    outputs: list[Made] = []
    for each in planned.outputs:
        entry = each.entry
        with _at(recipe, entry.line, entry.name):
            stored = known[entry.source] is not each.original
            made = _made(recipe, entry, known, force=force) if stored else each
            nbytes = entry.output.write(made.original, made.result, force=force, hashes=recipe.records_hashes)
        outputs.append(replace(made, nbytes=nbytes))
        if entry is not recipe.outputs[-1]:
            known = _with_what_is_written(known, made)
    seen = _lock(planned, outputs, lock) if locking or lock else None
    wrong = tuple(differences(lock.outputs, seen.outputs)) if lock and seen else ()
    checks = tuple(check(each, force=force) for each in recipe.checks)
    return replace(planned, outputs=tuple(outputs), checks=checks, lock=seen, differences=wrong)


def _spare_inputs(recipe: Recipe, inputs: Mapping[str, Checkpoint], outputs: Sequence[Made]) -> None:
    """Refuse to write over anything that the recipe reads, whatever is forced.

    Raises:
        OutputExistsError: Names the output.
    """
    read = [recipe.path, *_configs(recipe, inputs).values(), *(entry.path for entry in recipe.inputs.values())]
    taken = {identity for path in read if (identity := _identity(path))}
    taken |= {file.identity for checkpoint in inputs.values() for file in checkpoint.files}
    folders = [Path(os.path.realpath(path)) for path in read if path.is_dir()]
    for made in outputs:
        for path in _places(made).values():
            inside = any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders)
            if inside or _identity(path) in taken:
                with _at(recipe, made.entry.line, made.entry.name):
                    raise OutputExistsError("it is one of the inputs", file=path, remedy="choose another name")


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _places(made: Made) -> dict[str, Path]:
    """All that is written for an output, by what the lock calls it."""
    name, path = made.entry.name, made.entry.output.path
    found = {name: path} | {f"{name}::{suffix}": path.with_suffix(suffix) for suffix in made.result.companions}
    return found | ({f"{name}::sidecar": sidecars.path_beside(path)} if made.entry.output.sidecar else {})


def _configs(recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> dict[str, Path]:
    """Files that are read besides models: those that are named, and those that lie beside an input for its config."""
    named = [path for step in recipe.steps for path in step.operation.configs_read]
    named += [Path(path) for entry in recipe.outputs if (path := entry.output.options.get("config"))]
    beside = {f"config of {name}": path for name, model in inputs.items() if (path := config_beside(model))}
    return {f"config {number}: {path.name}": path for number, path in enumerate(named, 1)} | beside


@contextmanager
def _at(recipe: Recipe, line: int, what: str) -> Iterator[None]:
    """Have an error tell where in the recipe it happened."""
    try:
        yield
    except SurgeryError as error:
        error.details = (*error.details, f"{recipe.path.name}, line {line}: {what}")
        raise


def _opened(recipe: Recipe, lock: Lock | None) -> dict[str, Checkpoint]:
    inputs = {}
    for name, entry in recipe.inputs.items():
        with _at(recipe, entry.line, name):
            single = entry.sha256 if isinstance(entry.sha256, str) else None
            found = open_checkpoint(entry.path, entry.variant, sha256=single)
            _verify_files(found, entry)
            inputs[name] = found.hashed() if recipe.records_hashes else found
    if lock is None:
        return inputs
    wrong = list(differences(lock.inputs, _listed_inputs(recipe, inputs)))
    if wrong:
        remedy = "get the inputs that the lock names, or make a new lock with --lock"
        raise MismatchError("the inputs aren't those of the lock", file=recipe.path, remedy=remedy, details=wrong)
    return {name: _called(found, lock.inputs[name]) for name, found in inputs.items()}


def _called(checkpoint: Checkpoint, listed: Listed) -> Checkpoint:
    """The checkpoint under the name that the lock has, so that records are the same whatever it is called here."""
    assert checkpoint.origin is not None  # noqa: S101 - it was opened
    return replace(checkpoint, origin=replace(checkpoint.origin, recorded_as=listed.name))


def _verify_files(checkpoint: Checkpoint, entry: InputFile) -> None:
    """Hold the files of a folder against the hashes that the recipe has."""
    if not isinstance(entry.sha256, Mapping):
        return
    if checkpoint.folder is None:
        raise UsageError("it is a single file, and has one SHA-256", file=entry.path, remedy="write sha256: HASH")
    files = dict(files_of(checkpoint))
    for name, wanted in entry.sha256.items():
        if name not in files:
            raise MismatchError(f"the model has no {name}", file=entry.path, remedy="correct the recipe")
        seen = sha256_of(files[name])
        if seen != wanted.lower():
            message = f"the SHA-256 of {name} is {seen}, and {wanted} was expected"
            raise MismatchError(message, file=entry.path, remedy="get the right files, or correct the hash")


def _made(recipe: Recipe, entry: OutputOf, known: Mapping[str, Checkpoint], *, force: bool) -> Made:
    output, original = entry.output, known[entry.source]
    if output.fits(original) and not output.options:
        result = original.pipe(*([Cast(output.dtype)] if output.dtype else []))
    else:
        result = output.converted(original)
    return Made(entry, original, result, output.losses(original, result, force=force, hashes=recipe.records_hashes))


def _with_what_is_written(known: Mapping[str, Checkpoint], made: Made) -> Mapping[str, Checkpoint]:
    """All results, with what they had to compute read from a file that holds it now."""
    computed = {key: tensor for key, tensor in made.result.items() if isinstance(tensor.data, Computed)}
    if not computed:
        return known
    output = made.entry.output
    written = open_checkpoint(output.path, output.variant if output.is_folder else None)
    stored: dict[int, Data] = {}
    for key, tensor in computed.items():
        there = written.get(key)
        if there is not None and (there.dtype, there.shape) == (tensor.dtype, tensor.shape):
            stored[id(tensor.data)] = there.data
    return {name: _reading(checkpoint, stored) for name, checkpoint in known.items()}


def _reading(checkpoint: Checkpoint, stored: Mapping[int, Data]) -> Checkpoint:
    """The checkpoint with what is stored read from there; the very same if it has none of that."""
    if not any(id(tensor.data) in stored for tensor in checkpoint.values()):
        return checkpoint
    tensors = {
        key: replace(tensor, data=stored[id(tensor.data)]) if id(tensor.data) in stored else tensor
        for key, tensor in checkpoint.items()
    }
    return replace(checkpoint, tensors=tensors)


def _lock(planned: Ran, outputs: Sequence[Made], known: Lock | None) -> Lock:
    """The hashes of all; the inputs are those of a lock that they were held against."""
    paths: dict[str, Path] = {}
    for made in outputs:
        paths |= _places(made)
    inputs = known.inputs if known else _listed_inputs(planned.recipe, planned.inputs)
    return Lock(inputs, listed_paths(paths), versions())


def _listed_inputs(recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> dict[str, Listed]:
    """The hashes of models and of configs."""
    return listed_models(inputs) | listed_paths(_configs(recipe, inputs))
