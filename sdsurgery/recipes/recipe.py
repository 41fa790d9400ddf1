"""A recipe: inputs, steps, outputs and checks, validated before any model is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from ..errors import UnsupportedError, UsageError
from ..operations import OPERATIONS, Convert, Operation
from ..operations.base import Declared, names_checkpoints
from ..outputs import Output
from .checking import Check
from .document import Document, Place, RecipeError, Variable, meant, read, scalar, substituted
from .schema import WORDS_OF_STEP, names_file, spelled
from .validating import validate

_OF_OUTPUT = ("to", "dtype", "variant", "shard_size", "sidecar")


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input.

    Attributes:
        name: What the recipe calls it.
        path: The file or the folder.
        sha256: What it must be; of a folder by the names of files.
        variant: Which weights of a folder.
        line: Where it stands.
    """

    name: str
    path: Path
    sha256: str | Mapping[str, str] | None
    variant: str | None
    line: int


@dataclass(frozen=True, slots=True)
class StepOf:
    """A step.

    Attributes:
        operation: With names in the places of checkpoints.
        source: The name of what it is applied to.
        result: The name of its result; a number in brackets where it has none.
        line: Where it stands.
    """

    operation: Operation
    source: str
    result: str
    line: int


@dataclass(frozen=True, slots=True)
class OutputOf:
    """An output.

    Attributes:
        name: Its path as the recipe has it, without variables put in: what the lock calls it.
        output: How it is written.
        source: The name of what is written.
        line: Where it stands.
    """

    name: str
    output: Output
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe.

    Attributes:
        path: Its file.
        title: What it makes.
        inputs: By name; the first is what the first step starts from.
        steps: In order.
        outputs: In order.
        checks: In order.
        records_hashes: Whether the outputs record the inputs' hashes, and their own.
    """

    path: Path
    title: str | None
    inputs: Mapping[str, InputFile]
    steps: tuple[StepOf, ...]
    outputs: tuple[OutputOf, ...]
    checks: tuple[Check, ...] = ()
    records_hashes: bool = False


def load(path: Path, settings: Mapping[str, str] | None = None, *, folder: Path | None = None) -> Recipe:
    """Read and validate a recipe; no model is opened.

    Args:
        path: Its file.
        settings: What variables are set to, as on a command line.
        folder: What relative names are relative to; the recipe's own folder unless given.

    Raises:
        UnreadableError: If the file can't be read.
        UnsupportedError: If it is no recipe at all.
        RecipeError: Names every fault with its line.
        UsageError: If a setting names no variable.
    """
    document = read(path)
    if not isinstance(document.content, dict):
        message = "it is no recipe: that is a mapping of sdsurgery, inputs, steps, outputs and checks"
        raise UnsupportedError(message, file=path, remedy="name a recipe")
    variables = _variables(document, settings or {})
    faults: list[tuple[Place, str]] = []
    content = {
        key: value if key == "variables" else substituted(value, variables, (key,), faults)
        for key, value in document.content.items()
    }
    if faults:
        raise RecipeError(path, [(document.line(place), message) for place, message in faults])
    filled = Document(path, content, document.lines)
    validate(filled)
    return _Reader(document, filled, path.parent if folder is None else folder).recipe()


def _variables(document: Document, settings: Mapping[str, str]) -> dict[str, Variable]:
    stated = document.content.get("variables")
    known: dict[str, Any] = dict(stated) if isinstance(stated, dict) else {}
    texts = {name: _written(value) for name, value in known.items()}
    nested = [name for name, text in texts.items() if "${" in text]
    if nested:
        lines = [(document.line(("variables", name)), f"{name!r}: variables can't refer to others") for name in nested]
        raise RecipeError(document.path, lines)
    for name, text in settings.items():
        if name not in known:
            message = f"the recipe has no variable {name!r}{meant(name, known)}"
            raise UsageError(message, file=document.path, remedy="name one that stands under its variables")
        known[name] = text if isinstance(known[name], str) else scalar(text)
        texts[name] = text
    unset = [name for name, value in known.items() if value is None]
    if unset:
        lines = [(document.line(("variables", name)), f"{name!r} must be set: --set {name}=VALUE") for name in unset]
        raise RecipeError(document.path, lines)
    return {name: Variable(value, texts[name]) for name, value in known.items()}


@dataclass(slots=True)
class _Reader:
    """Makes a recipe of a document that fits the schema."""

    told: Document
    document: Document
    folder: Path
    faults: list[tuple[int, str]] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def recipe(self) -> Recipe:
        content = self.document.content
        inputs = {name: self._input(name, entry) for name, entry in content["inputs"].items()}
        self.known = {name: each.line for name, each in inputs.items()}
        last = next(iter(inputs))
        steps = []
        for number, entry in enumerate(content.get("steps", [])):
            step = self._step(number, entry, last)
            if step is not None:
                steps.append(step)
                self.known[step.result] = step.line
                last = step.result
        outputs = list(self._outputs(content["outputs"], last))
        checks: list[Check] = []
        for number, entry in enumerate(content.get("checks", [])):
            checks += self._check(number, entry)
        self._tell_of_the_unused()
        if self.faults:
            raise RecipeError(self.document.path, self.faults)
        found = (inputs, tuple(steps), tuple(outputs), tuple(checks), content.get("record-hashes", False))
        return Recipe(self.document.path, content.get("title"), *found)

    def _fault(self, place: Place, message: str) -> None:
        self.faults.append((self.document.line(place), message))

    def _refused(self, place: Place, error: UsageError) -> None:
        self._fault(place, error.message + (f"; {error.remedy}" if error.remedy else ""))

    def _input(self, name: str, entry: str | dict[str, Any]) -> InputFile:
        found = {"path": entry} if isinstance(entry, str) else entry
        sha256 = found.get("sha256")
        line = self.document.line(("inputs", name))
        self._real(found["path"], ("inputs", name, "path"))
        return InputFile(name, self.folder / found["path"], sha256, found.get("variant"), line)

    def _name(self, name: str, place: Place) -> str:
        """A name that must be known by then."""
        if name not in self.known:
            named = [each for each in self.known if not each.startswith("(")]
            self._fault(place, f"nothing before is called {name!r}{meant(name, named)}")
        self.used.add(name)
        return name

    def _step(self, number: int, entry: str | dict[str, Any], last: str) -> StepOf | None:
        place: Place = ("steps", number)
        given: dict[str, Any] = {entry: None} if isinstance(entry, str) else entry
        names = [key for key in given if key not in WORDS_OF_STEP]
        if len(names) != 1:
            what = "no operation" if not names else f"several operations, {' and '.join(names)},"
            self._fault(place, f"{what} in one step; write one, with a - in front")
            return None
        (name,) = names
        source = self._name(given["from"], (*place, "from")) if "from" in given else self._name(last, place)
        operation = self._operation(name, given[name], (*place, name))
        result = given.get("as", f"({number + 1})")
        if result in self.known:
            self._fault((*place, "as"), f"{result!r} is the name of something else already")
        return StepOf(operation, source, result, self.document.line(place)) if operation else None

    def _operation(self, name: str, value: Any, place: Place) -> Operation | None:
        kind = OPERATIONS[name]
        declared = {spelled(each): each for each in kind.declared()}
        if not isinstance(value, dict):
            positional = next((option for option, each in declared.items() if each.param.positional), None)
            value = {} if value is None else {positional: value}
        parameters: dict[str, Any] = {}
        for option, given in value.items():
            each = declared[option]
            at = (*place, option) if (*place, option) in self.document.lines else place
            if names_checkpoints(each.type):
                for reference in given if isinstance(given, list) else [given]:
                    self._name(reference, at)
            plain = _plain(each, given)
            parameters[each.field.name] = str(self.folder / plain) if names_file(each) else plain
        try:
            operation = kind(**parameters)
            operation.check()
        except UsageError as error:
            self._refused(place, error)
            return None
        except OverflowError:
            self._fault(place, "a number is too large to be computed with")
            return None
        return operation

    def _outputs(self, entries: Sequence[str | dict[str, Any]], last: str) -> Iterator[OutputOf]:
        seen: set[Path] = set()
        for number, entry in enumerate(entries):
            place: Place = ("outputs", number)
            found: dict[str, Any] = {"path": entry} if isinstance(entry, str) else entry
            source = self._name(found["from"], (*place, "from")) if "from" in found else self._name(last, place)
            output = self._output(found)
            try:
                output.check()
                Convert(output.layout, **output.options).check()
            except UsageError as error:
                self._refused(place, error)
            real = self._real(found["path"], (*place, "path"))
            if real in seen:
                self._fault(place, f"{found['path']!r} is written twice")
            elif any(real.is_relative_to(other) or other.is_relative_to(real) for other in seen):
                self._fault(place, f"{found['path']!r} and another output lie in each other")
            seen.add(real)
            if not output.is_folder and real.with_suffix(".yaml") == self.document.path.resolve():
                self._fault(place, "the recipe lies beside it under its name, where loaders look for a model's config")
            told = self.told.content["outputs"][number]
            name = told if isinstance(told, str) else told["path"]
            yield OutputOf(name, output, source, self.document.line(place))

    def _real(self, text: str, place: Place) -> Path:
        """Where a name leads, if it can be one."""
        try:
            os.fsencode(text)
            return Path(os.path.realpath(self.folder / text))
        except ValueError:  # half of a character, or a null byte
            self._fault(place, f"no file can be called {text!r}")
            return self.folder / "none"

    def _output(self, found: Mapping[str, Any]) -> Output:
        fields = {name.replace("-", "_"): value for name, value in found.items() if name not in {"path", "from"}}
        own = {name: fields.pop(name) for name in list(fields) if name not in _OF_OUTPUT}
        if "config" in own:
            own["config"] = self.folder / own["config"]
        return Output(self.folder / found["path"], **fields, options=own)

    def _check(self, number: int, entry: str | dict[str, Any]) -> Iterator[Check]:
        place: Place = ("checks", number)
        given: dict[str, Any] = {entry: None} if isinstance(entry, str) else entry
        kinds = [key for key in given if key != "of"]
        if len(kinds) != 1:
            self._fault(place, "one entry is one check; write each with a - in front")
            return
        told = [each if isinstance(each, str) else each["path"] for each in self.document.content["outputs"]]
        paths = {str(Path(text)): self.folder / text for text in told}
        chosen = []
        for text in _as_list(given.get("of", list(paths))):
            found = paths.get(str(Path(text)))
            if found is None:
                self._fault((*place, "of"), f"no output is called {text!r}{meant(text, paths)}")
            else:
                chosen.append(found)
        if kinds[0] == "same-weights" and len(chosen) < 2:
            self._fault(place, "there is only one output, and nothing to compare it with")
        parameters = dict(given[kinds[0]] or {})
        if "report" in parameters:
            self._real(parameters["report"], (*place, kinds[0], "report"))
            parameters["report"] = self.folder / parameters["report"]
        check = Check(kinds[0], parameters, tuple(chosen), self.document.line(place))
        try:
            check.prepare()
        except UsageError as error:
            self._refused((*place, check.kind), error)
        yield check

    def _tell_of_the_unused(self) -> None:
        for name, line in self.known.items():
            if name not in self.used:
                what = "the result of this step" if name.startswith("(") else repr(name)
                self.faults.append((line, f"{what} is used by nothing: name it with from, or take it out"))


def _plain(declared: Declared, value: Any) -> Any:
    """A parameter as the operation takes it: lists of numbers and mappings have a form for the command line."""
    if isinstance(value, dict):
        return tuple(f"{key}={_written(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value)) if declared.param.metavar == "NUMBERS" else tuple(value)
    return (value,) if get_origin(declared.type) is tuple else value


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
