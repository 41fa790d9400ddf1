"""What a recipe did, in lines and as a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..containers.saving import content, with_history
from ..models.identify import identify
from ..reports import documents, terminal
from ..reports import parity as parity_report
from ..reports import verification as verify_report
from ..reports.terminal import human_bytes, printable
from .checking import Outcome
from .running import Made, Ran


def warnings(done: Ran) -> Iterator[str]:
    """What the steps found and didn't mend, and what lies in the way of an output."""
    said: list[str] = []
    for made in done.outputs:
        said += terminal.warnings(made.result, made.lost)
        beside = made.entry.output.misleading_config(made.result)
        if beside:
            said.append(printable(f"warning: {beside} lies there, and loaders will take it for the model's config"))
    yield from dict.fromkeys(said)


def lines(done: Ran, lock: Path | None, *, dry_run: bool) -> Iterator[str]:
    """For a person: inputs, steps, outputs, checks."""
    yield printable(done.recipe.title or done.recipe.path.name)
    for name, checkpoint in done.inputs.items():
        family = identify(checkpoint).family
        size = human_bytes(sum(file.size for file in checkpoint.files))
        yield printable(f"  input   {name}: {done.recipe.inputs[name].path.name}, {family}, {size}")
    for step in done.recipe.steps:
        result = done.results[step.result]
        yield printable(f"  step    {step.operation.name}{_named(step.source, step.result)}")
        for applied in result.steps[len(done.results[step.source].steps) :]:
            yield from (f"        {line}" for line in terminal.step(applied))
    for made in done.outputs:
        size = human_bytes(made.nbytes or _expected(made.result))
        what = "would write" if dry_run else "wrote"
        yield printable(f"  output  {what} {made.entry.output.path} ({'about ' * dry_run}{size})")
        yield from (f"        {line}" for line in terminal.not_carried_over(made.lost))
    for outcome in done.checks:
        yield printable(f"  check   {_outcome(outcome)}")
    if dry_run:
        for check in done.recipe.checks:
            yield printable(f"  check   {check.kind} of {', '.join(path.name for path in check.paths)}")
    if lock:
        yield printable(f"  lock    wrote {lock}")


def _named(source: str, result: str) -> str:
    told = [f"from {source}"] if not source.startswith("(") else []
    told += [f"as {result}"] if not result.startswith("(") else []
    return f" ({', '.join(told)})" if told else ""


def _expected(checkpoint: Checkpoint) -> int:
    """Bytes of the weights and their header."""
    return sum(part.nbytes for part in content(checkpoint.tensors, with_history(checkpoint)))


def _outcome(outcome: Outcome) -> str:
    names = ", ".join(path.name for path in outcome.check.paths)
    verdict = {0: "holds", 1: "FAILS"}.get(outcome.exit_code, "could not be done in full")
    return f"{outcome.check.kind} of {names}: {verdict}"


def failures(done: Ran) -> Iterator[str]:
    """What a check found, and what isn't as it was locked."""
    for outcome in done.checks:
        if not outcome.exit_code:
            continue
        if outcome.verifications:
            yield from verify_report.lines(outcome.verifications, outcome.fail_on, quiet=True)
        if outcome.parity is not None:
            yield from map(printable, parity_report.lines(outcome.parity))
        for path, found in zip(outcome.check.paths[1:], outcome.diffs, strict=False):
            counts = f"{len(found.changed)} changed, {len(found.added)} added, {len(found.removed)} removed"
            if not found.identical:
                yield printable(f"{path} differs from {outcome.check.paths[0]}: {counts}")
    if done.differences:
        yield "the result isn't the one that is locked:"
        yield from (printable(f"  {line}") for line in done.differences)
        if done.lock:
            made = ", ".join(f"{name} {version}" for name, version in done.lock.versions.items())
            yield printable(f"  computed here with {made}")


def document(done: Ran, lock: Path | None, *, dry_run: bool) -> dict[str, Any]:
    """What ``run --json`` prints; ``docs/schemas/run.json`` describes it."""
    return {
        "recipe": str(done.recipe.path),
        "dry_run": dry_run,
        "outputs": [_output(done, made, dry_run=dry_run) for made in done.outputs],
        "checks": [_check(outcome) for outcome in done.checks],
        "lock": None if lock is None else str(lock),
        "differences": list(done.differences),
    }


def _output(done: Ran, made: Made, *, dry_run: bool) -> dict[str, Any]:
    path = made.entry.output.path
    found = documents.written(made.result, None if dry_run else path, made.lost, dry_run=dry_run)
    listed = done.lock.outputs.get(made.entry.name) if done.lock else None
    files = {name: digest.sha256 for name, digest in listed.files.items()} if listed else None
    return {"path": str(path), "bytes": made.nbytes, "sha256": files} | found


def _check(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": outcome.check.kind,
        "of": [str(path) for path in outcome.check.paths],
        "exit_code": outcome.exit_code,
    }
    if outcome.verifications:
        found["verify"] = documents.verification(outcome.verifications, outcome.fail_on)
    if outcome.parity is not None:
        found["parity"] = parity_report.document(outcome.parity)
    return found
