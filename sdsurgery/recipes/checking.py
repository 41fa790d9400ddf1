"""The checks at the end of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..containers import open as open_checkpoint
from ..dtypes import CAST_TARGETS
from ..errors import UnsupportedError
from ..inspection import allowing
from ..inspection.diffing import Diff, diff
from ..inspection.findings import FailOn, Verification, exit_code
from ..inspection.verifying import Request, verify
from ..parity.settings import Settings

if TYPE_CHECKING:
    from ..parity.results import Parity


@dataclass(frozen=True, slots=True)
class Check:
    """What must hold in the end.

    Attributes:
        kind: ``verify``, ``parity`` or ``same-weights``.
        parameters: Its own, as the recipe has them.
        paths: The outputs that it is about.
        line: Where it stands.
    """

    kind: str
    parameters: Mapping[str, Any]
    paths: tuple[Path, ...]
    line: int

    def prepare(self) -> None:
        """Refuse parameters that make no sense.

        Raises:
            UsageError: Names what is wrong.
        """
        if self.kind == "verify":
            self.allowances()
        elif self.kind == "parity":
            self.settings()

    @property
    def report(self) -> Path | None:
        """The folder for the report of ``parity``, if there is to be one."""
        found: Path | None = self.parameters.get("report")
        return found

    def refuse(self, *, force: bool) -> None:
        """Refuse a report that could not be written, before any work is done for it.

        Raises:
            OutputError: If something else is there, or an older report and nobody said that it may be replaced.
        """
        if self.report is not None:
            from ..reports import parity_folder

            parity_folder.refuse(self.report, self.paths, force=force)

    def allowances(self) -> list[allowing.Allowance]:
        """The findings of ``verify`` that don't count."""
        given = self.parameters.get("allow", [])
        return [
            allowing.allowance(*text.partition(":")[::2]) for text in ([given] if isinstance(given, str) else given)
        ]

    def settings(self) -> Settings:
        """What ``parity`` draws, and how."""
        given = {name: value for name, value in self.parameters.items() if name not in _OF_RUN}
        prompts = given.get("prompts")
        if prompts is not None:
            given["prompts"] = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        return Settings(**given)


_OF_RUN = ("reference", "report")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a check.

    Attributes:
        check: It.
        exit_code: 0 if it holds, 1 if not, 3 if that could not be told.
        verifications: Of ``verify``, a model each.
        diffs: Of ``same-weights``: each of the others against the first.
        parity: Of ``parity``.
    """

    check: Check
    exit_code: int
    verifications: tuple[Verification, ...] = ()
    diffs: tuple[Diff, ...] = ()
    parity: Parity | None = None

    @property
    def fail_on(self) -> FailOn:
        """From which severity on a finding counts."""
        found: FailOn = self.check.parameters.get("fail-on", "warning")
        return found


def check(entry: Check, *, force: bool = False) -> Outcome:
    """Do one check.

    Args:
        entry: It.
        force: Whether an older report may be replaced.

    Raises:
        SurgeryError: What comparing and drawing raise; what ``verify`` can't read is a finding.
    """
    if entry.kind == "verify":
        return _verify(entry)
    if entry.kind == "parity":
        return _parity(entry, force=force)
    first, *others = map(open_checkpoint, entry.paths)
    found = tuple(diff(first, other) for other in others)
    return Outcome(entry, 0 if all(each.identical for each in found) else 1, diffs=found)


def _verify(entry: Check) -> Outcome:
    given = entry.parameters
    dtype = CAST_TARGETS[given["dtype"]] if "dtype" in given else None
    found = [
        allowing.allowed(each, entry.allowances(), frozenset())
        for each in verify(entry.paths, Request(given.get("profile"), dtype))
    ]
    return Outcome(entry, exit_code(found, given.get("fail-on", "warning")), verifications=tuple(found))


def _parity(entry: Check, *, force: bool) -> Outcome:
    try:
        from ..parity.running import parity

        found = parity(entry.paths, entry.settings(), reference=entry.parameters.get("reference"))
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"parity needs {error.name}", remedy="pip install 'sdsurgery[parity]'") from error
    if entry.report is not None:
        from ..reports import parity_folder

        parity_folder.write(found, entry.report, force=force)
    return Outcome(entry, 0 if found.agrees else 1, parity=found)
