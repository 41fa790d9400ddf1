"""verify: is a model whole and sound, for whoever will load it; is it still what a manifest or a signature says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import progress
from ..checkpoint import Checkpoint
from ..containers import open as open_checkpoint
from ..dtypes import DType
from ..errors import SurgeryError
from ..models.identify import identify
from ..values import scan
from . import manifests
from .checks import embedding, folder, metadata, structure, text, weights
from .checks.subject import Subject
from .findings import SEVERITIES, Finding, Verification
from .rules import RULES, Group, Profile

MANIFEST = "manifest"
SIGNATURE = "signature"
"""What stands for the profile where nothing but a manifest or a signature is asked after."""

_MOST_THREADS = 4
_MOST_FILES = 16
"""Files that are open at a time, if no folder has more; some systems allow a few dozen."""

_CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    structure.container,
    structure.family,
    structure.components,
    structure.keys,
    structure.leftovers,
    structure.vae,
    text.position_ids,
    weights.dtypes,
    weights.schedule,
    weights.vae_figure,
    metadata.metadata,
    folder.configs_there,
)
"""Those that read headers and a few hundred bytes, and of SDXL's VAE the values."""

_OF_EMBEDDINGS = (structure.container, embedding.vectors, metadata.metadata)
"""Those that mean something for a textual inversion embedding, which is no model."""

_OF_WEIGHTS = {"weight-missing", "weight-shape", "key-unknown"}
"""What a wrong config brings about in every weight."""


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        profile: Whose needs count; the layout's own unless given.
        dtype: What all weights should be.
        manifest: What the model should be. With one or with a signature, the checks run only if a profile or a dtype
            is named.
        signature: Checks a model's signature, and tells what isn't as it was signed.
    """

    profile: Profile | None = None
    dtype: DType | None = None
    manifest: manifests.Manifest | None = None
    signature: Callable[[Path], list[Finding]] | None = None

    @property
    def checks(self) -> bool:
        """Whether the checks run."""
        return self.profile is not None or self.dtype is not None or not (self.manifest or self.signature)


@dataclass
class _Case:
    """A model on its way through."""

    path: Path
    checkpoint: Checkpoint | None = None
    subject: Subject | None = None
    findings: list[Finding] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    values: dict[str, Future[Any]] = field(default_factory=dict)
    hash: Future[str] | None = None
    nbytes: int = 0


def verify(paths: Sequence[Path], request: Request) -> list[Verification]:
    """Check models; each weight is read once, and all models share the threads.

    What can't be opened or read is a finding, and the others are checked all the same.
    """
    cases = [_begun(path, request) for path in paths]
    for batch in _batches([case for case in cases if case.subject]):
        _read_values(batch)
    for case in cases:
        _compare(case, request)
    return [_done(case, request) for case in cases]


def _begun(path: Path, request: Request) -> _Case:
    """Open a model, and look at all that its header tells."""
    case = _Case(path)
    case.rules += _rules("container", ("container-suffix", "pickle", "non-tensors"))
    try:
        case.checkpoint = open_checkpoint(path)
        if request.checks:
            model = identify(case.checkpoint)
            layout: Profile = "diffusers" if model.layout == "diffusers" else "ldm"
            case.subject = Subject(path, case.checkpoint, model, request.profile or layout, request.dtype)
            case.findings += _header_findings(case.subject)
            case.rules += _applied(case.subject)
    except SurgeryError as error:
        case.subject = None
        case.findings.append(_gap(path, error))
    finally:
        for file in case.checkpoint.files if case.checkpoint else ():
            file.close()  # there may be thousands of models
    return case


def _header_findings(subject: Subject) -> Iterator[Finding]:
    contradicted = folder.contradicting(subject) if subject.checkpoint.folder else {}
    yield from contradicted.values()
    for check in _OF_EMBEDDINGS if subject.embedding else _CHECKS:
        for finding in check(subject):
            if not (finding.component in contradicted and finding.id in _OF_WEIGHTS):
                yield finding


def _applied(subject: Subject) -> list[str]:
    """The rules that mean something for this model and this profile."""
    without = set() if subject.dtype else {"dtype-asked"}
    if not metadata.stated_hashes(subject.checkpoint):
        without.add("metadata-hash")
    if "schedule" not in subject.model.components:
        without |= {"schedule-dtype", "schedule-values"}
    if subject.embedding:
        return [name for name in (*_ON_OPENING, *embedding.RULES_APPLIED) if name not in without]
    groups: list[Group] = ["structure", "dtypes", "values", "metadata"]
    if any(name.startswith("text_encoder") for name in subject.model.components):
        groups.append("position-ids")
    if subject.checkpoint.folder:
        groups.append("folder")
    found = [rule.id for rule in RULES.values() if rule.group in groups or rule.id in _ON_OPENING]
    return [name for name in found if name not in without and RULES[name].severity_in(subject.profile)]


_ON_OPENING = ("container-suffix", "pickle", "non-tensors")


def _rules(group: Group, without: Sequence[str] = ()) -> list[str]:
    return [rule.id for rule in RULES.values() if rule.group == group and rule.id not in without]


def _batches(cases: list[_Case]) -> Iterator[list[_Case]]:
    """The models in order, a few at a time: what is read stays open until all of its batch is."""
    batch: list[_Case] = []
    files = 0
    for case in cases:
        batch.append(case)
        files += len(_subject(case).checkpoint.files)
        if files >= _MOST_FILES:
            yield batch
            batch, files = [], 0
    if batch:
        yield batch


def _read_values(cases: list[_Case]) -> None:
    """Look at all values of all models, in the order in which they lie, by as many threads as there are processors."""
    work = [(case, key) for case in cases for key in weights.readable_keys(_subject(case))]
    hashed = [case for case in cases if metadata.stated_hashes(_subject(case).checkpoint)]
    total = sum(_subject(case).checkpoint[key].nbytes for case, key in work)
    total += sum(tensor.nbytes for case in hashed for tensor in _subject(case).checkpoint.values())
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with progress.task(f"checking {len(work)} tensors", total) as advance, ThreadPoolExecutor(threads) as pool:
        try:
            for case in hashed:
                case.hash = pool.submit(metadata.tensor_hash, _subject(case).checkpoint, lambda _count: None)
            for case, key in work:
                case.values[key] = pool.submit(scan, _subject(case).checkpoint[key])
            for case in cases:
                _gather(case, advance)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _gather(case: _Case, advance: progress.Advance) -> None:
    """A model's values as they come, and what they tell."""
    subject = _subject(case)
    try:
        seen = {}
        for key, future in case.values.items():
            seen[key] = future.result()
            case.nbytes += subject.checkpoint[key].nbytes
            advance(subject.checkpoint[key].nbytes)
        if subject.embedding:
            case.findings += embedding.values(subject, seen)
        else:
            case.findings += weights.values(subject, seen, weights.owners(subject))
        if case.hash:
            case.findings += metadata.false_hashes(subject, case.hash.result())
            advance(sum(tensor.nbytes for tensor in subject.checkpoint.values()))
    except SurgeryError as error:
        for future in case.values.values():
            future.cancel()
        case.findings.append(_gap(case.path, error))
    finally:
        for file in subject.checkpoint.files:
            file.close()


def _subject(case: _Case) -> Subject:
    assert case.subject is not None  # noqa: S101 - for the type checker: only cases that have one come here
    return case.subject


def _compare(case: _Case, request: Request) -> None:
    """Hold a model against its manifest and its signature; the latter is of files, whatever is in them."""
    try:
        if request.manifest and case.checkpoint is not None:
            case.rules += _rules("manifest")
            case.findings += manifests.verify(case.checkpoint, request.manifest)
            case.nbytes += sum(tensor.nbytes for tensor in case.checkpoint.values())
        if request.signature:
            case.rules += _rules("signature")
            case.findings += request.signature(case.path)
    except SurgeryError as error:
        case.findings.append(_gap(case.path, error))


def _gap(path: Path, error: SurgeryError) -> Finding:
    """An error that kept something from being checked, as a finding."""
    rule = f"container-{error.kind}"
    rule = rule if rule in RULES else "container-unsupported"
    file = None
    if error.file and Path(error.file) != path:
        inside = Path(error.file)
        file = inside.relative_to(path).as_posix() if inside.is_relative_to(path) else inside.name
    return Finding(rule, RULES[rule].severity, error.message, file=file, key=error.key, remedy=error.remedy)


def _done(case: _Case, request: Request) -> Verification:
    subject, origin = case.subject, case.checkpoint.origin if case.checkpoint else None
    alone = MANIFEST if request.manifest else SIGNATURE
    profile = subject.profile if subject else (request.profile or "ldm") if request.checks else alone
    return Verification(
        path=case.path,
        container=origin.container if origin else None,
        layout=subject.model.layout if subject else None,
        family=(subject.embedding or subject.model).family if subject else None,
        profile=profile,
        rules=tuple(case.rules),
        findings=tuple(sorted(case.findings, key=lambda finding: -SEVERITIES.index(finding.severity))),
        nbytes=case.nbytes,
    )
