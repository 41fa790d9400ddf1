"""The action's second step: sdsurgery verify on what the inputs name, and word to GitHub of what came of it.

Inputs are environment variables, INPUT_PATH and so on; action.yml describes them. Whatever stops the check short ends
in an exit code that isn't 0.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdsurgery.inspection.findings import SEVERITIES
from sdsurgery.reports.markdown import text
from sdsurgery.reports.terminal import printable

USAGE, UNCHECKED = 2, 3

REPORTS = {"json": (".json",), "sarif": (".sarif", ".json"), "junit": (".xml",), "html": (".html", ".htm")}
"""What may be written, and the suffixes that its name may have: no report takes a model's place."""

MOST_LINES = 50
"""Findings of one model in the log."""


class RefusedError(Exception):
    """Nothing was checked."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    code: int
    findings: int | None
    summary: str
    reports: Mapping[str, Path]


def say(line: str) -> None:
    """A line for the log, at once: other processes write there too."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def given(name: str) -> str:
    """An input."""
    return os.environ.get(f"INPUT_{name.upper().replace('-', '_')}", "").strip()


def listed(name: str) -> list[str]:
    """An input that takes one thing a line."""
    return [line.strip() for line in given(name).splitlines() if line.strip()]


def models() -> list[str]:
    """What is to be checked: a name that exists is taken as it is, any other may be a pattern."""
    found: list[str] = []
    for line in listed("path"):
        if os.path.lexists(line) or not glob.has_magic(line):
            found.append(line)  # one that isn't there becomes a finding
        elif matches := sorted(glob.glob(line, recursive=True)):  # noqa: PTH207 - names stay as they are written
            found += matches
        else:
            raise RefusedError(f"nothing matches {line}", UNCHECKED)
    if not found:
        raise RefusedError("the input 'path' names nothing")
    return list(dict.fromkeys(found))


def reports(inputs: Sequence[str]) -> dict[str, Path]:
    """Where the reports go."""
    found = {name: Path(given(name)) for name in REPORTS if given(name)}
    if len({where.resolve() for where in found.values()}) < len(found):
        raise RefusedError("two reports have the same name")
    for name, place in found.items():
        if place.suffix.lower() not in REPORTS[name]:
            raise RefusedError(f"the name of the report '{name}' should end with {REPORTS[name][0]}, unlike {place}")
        if place.exists() and any(each.exists() and place.samefile(each) for each in map(Path, inputs)):
            raise RefusedError(f"the report '{name}' would take the place of an input: {place}")
        if name == "json" and place.exists() and b'"verified"' not in place.read_bytes()[:100]:
            raise RefusedError(f"it exists and is no earlier report: {place}")  # verify looks after the others
    for place in found.values():
        place.parent.mkdir(parents=True, exist_ok=True)
    return found


def checked(scratch: Path) -> Outcome:
    """Run verify, and read what it says."""
    options = {
        name: given(name) for name in ("profile", "dtype", "fail-on", "manifest", "baseline", "signature", "key")
    }
    files = [options[name] for name in ("manifest", "baseline", "signature", "key") if options[name]]
    named = models()
    places = reports([*named, *files, *listed("allow-list")])
    summary = scratch / "summary.md"
    words = [f"--{name}={value}" for name, value in options.items() if value]
    words += [f"--allow-list={place}" for place in listed("allow-list")]
    words += [f"--{name}={place}" for name, place in places.items() if name != "json"]
    # =VALUE and --: a name that begins with a dash is no option
    command = [
        sys.executable,
        "-I",
        "-X",
        "utf8",
        "-m",
        "sdsurgery",
        "verify",
        "--json",
        f"--markdown={summary}",
        *words,
    ]
    try:
        done = subprocess.run([*command, "--", *named], stdout=subprocess.PIPE, check=False)  # noqa: S603
    except OSError as error:
        raise RefusedError(f"{error.strerror}: name folders instead of thousands of files") from error
    try:
        document = json.loads(done.stdout)
    except ValueError as error:
        raise RefusedError(f"sdsurgery verify ended with code {done.returncode} and no report", UNCHECKED) from error
    if failure := document.get("error"):
        message = ": ".join(part for part in (failure["file"], failure["message"], failure["remedy"]) if part)
        raise RefusedError(message, done.returncode or UNCHECKED)
    for line in spoken(document):
        say(line)
    if "json" in places:
        beside = places["json"].with_name(f".{places['json'].name}.{secrets.token_hex(4)}")
        beside.write_bytes(done.stdout)
        beside.replace(places["json"])
    sound = document["verified"] is True and document["models"]
    code = done.returncode or (0 if sound else UNCHECKED)
    return Outcome(code, counting(document), summary.read_text("utf-8"), places)


def counting(document: Mapping[str, Any]) -> int:
    """How many findings count."""
    if document["fail_on"] == "never":
        return 0
    least = SEVERITIES.index(document["fail_on"])
    findings = [finding for model in document["models"] for finding in model["findings"]]
    return sum(not found["allowed"] and SEVERITIES.index(found["severity"]) >= least for found in findings)


def spoken(document: Mapping[str, Any]) -> Iterator[str]:
    """The report for the log."""
    for model in document["models"]:
        findings = [finding for finding in model["findings"] if not finding["allowed"]]
        what = ", ".join(filter(None, (model["family"], model["layout"], model["container"]))) or "no model"
        told = (
            f"{len(findings) or 'no'} finding{'' if len(findings) == 1 else 's'}"
            if model["complete"]
            else "could not be fully checked"
        )
        yield printable(f"{model['path']} ({what}; profile {model['profile']}): {told}")
        for finding in findings[:MOST_LINES]:
            mend = finding["mend"] and shlex.join(finding["mend"]["command"])
            todo = f"; mend with: {mend}" if mend else f"; {finding['remedy']}" if finding["remedy"] else ""
            yield printable(f"  {finding['severity']:<7} {finding['id']}: {finding['message']}{todo}")
        if len(findings) > MOST_LINES:
            yield f"  {'':<7} and {len(findings) - MOST_LINES} more"


def tell(outcome: Outcome) -> None:
    """Outputs and summary, in the files that GitHub names."""
    if path := os.environ.get("GITHUB_OUTPUT"):
        values = {"exit-code": str(outcome.code), "findings": "" if outcome.findings is None else str(outcome.findings)}
        values |= {name: str(outcome.reports.get(name, "")) for name in REPORTS}
        with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
            for name, value in values.items():
                end = secrets.token_hex(16)  # no value can guess where it ends
                file.write(f"{name}<<{end}\n{value}\n{end}\n")
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(outcome.summary + "\n")


def main() -> int:
    """Check, tell, and end with verify's exit code."""
    on_github = os.environ.get("GITHUB_ACTIONS") == "true"
    token = secrets.token_hex(16)
    if on_github:
        # A line of the log can be a command to the runner: until the token comes, none is.
        say(f"::stop-commands::{token}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = checked(Path(folder))
    except Exception as error:  # no fault may look like a finding, or like none
        say(printable(f"sdsurgery: {error}"))
        code = error.code if isinstance(error, RefusedError) else UNCHECKED
        outcome = Outcome(code, None, f"### sdsurgery verify: nothing was checked\n\n{text(str(error))}\n", {})
    finally:
        if on_github:
            say(f"::{token}::")
    tell(outcome)
    if outcome.code and on_github:
        meaning = {1: "there are findings", USAGE: "nothing was checked"}.get(outcome.code, "not all could be checked")
        say(f"::error title=sdsurgery verify::{meaning} (exit code {outcome.code}); the summary tells more")
    return outcome.code if 0 <= outcome.code < 256 else UNCHECKED


if __name__ == "__main__":
    sys.exit(main())
