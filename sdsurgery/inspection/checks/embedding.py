"""Textual inversion embeddings: their widths, how many vectors there are, and what their values are like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...checkpoint import Tensor
from ...models.embeddings import WIDTHS
from ...values import Values, readable
from ...wording import listed
from ..findings import Finding
from .subject import Subject

RULES_APPLIED = (
    "embedding-width", "embedding-vectors", "embedding-zero", "dtype-asked", "value-nan", "value-infinite",
    "value-overflow", "value-unread", "metadata-hash", "metadata-modelspec",
)  # fmt: skip
"""What is looked for in an embedding, beside what every file is looked through for."""

_ANY_WIDTH = (768, 1024, 1280)
_CAST_NAMES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
_ELSEWHERE = "get it anew from where it was published"
_LARGEST = 64 << 20
"""Bytes of vectors that are looked at one by one; an honest embedding has some hundred kilobytes."""


def vectors(subject: Subject) -> Iterator[Finding]:
    """Whether there are vectors, as many for each text encoder, as wide as those are, and of the dtype asked for."""
    found = subject.embedding
    if found is None:
        return
    for encoder, width in zip(found.keys, found.widths, strict=True):
        wanted = (WIDTHS[encoder],) if encoder in WIDTHS else _ANY_WIDTH
        if width not in wanted:
            key, right = found.keys[encoder], " or ".join(map(str, wanted))
            message = f"the vectors of {key} are {width} wide, and the published text encoders take {right}"
            facts = {"key": key, "expected": right, "seen": str(width)}
            yield from subject.finding("embedding-width", message, mend=None, remedy=_ELSEWHERE, **facts)
    if not all(found.counts) or len(set(found.counts)) > 1:
        seen = ", ".join(f"{key} {n}" for key, n in zip(found.keys.values(), found.counts, strict=True))
        message = f"the numbers of vectors make no sense: {seen}"
        yield from subject.finding("embedding-vectors", message, seen=seen, remedy=_ELSEWHERE)
    for key, tensor in subject.checkpoint.items():
        if subject.dtype and tensor.dtype is not subject.dtype:
            mend = subject.command("cast", _CAST_NAMES[subject.dtype.name])
            facts = {"key": key, "expected": subject.dtype.name, "seen": tensor.dtype.name}
            yield from subject.finding("dtype-asked", f"{key} is {tensor.dtype}", mend=mend, **facts)


def values(subject: Subject, found: Mapping[str, Values]) -> Iterator[Finding]:
    """What the values of the vectors tell."""
    for key, tensor in subject.checkpoint.items():
        if not readable(tensor):
            message = f"{key} is {tensor.dtype}, whose values nobody here can read"
            yield from subject.finding("value-unread", message, key=key, remedy="check it where it was made")
    for key, seen in found.items():
        counts = {"value-nan": (seen.nan, "NaN"), "value-infinite": (seen.infinite, "infinite")}
        counts["value-overflow"] = (seen.overflow, "beyond fp16")
        for rule, (count, what) in counts.items():
            if count:
                message = f"{count:,} of {seen.numel:,} values of {key} are {what}"
                yield from subject.finding(rule, message, key=key, seen=str(count), remedy=_ELSEWHERE)
        zeros = _zeros(subject.checkpoint[key])
        if zeros:
            message = f"{len(zeros)} of the vectors of {key} are all zero: {listed(zeros, 8)}"
            yield from subject.finding("embedding-zero", message, key=key, seen=str(len(zeros)), remedy=_ELSEWHERE)


def _zeros(tensor: Tensor) -> list[int]:
    """Which vectors are zero, counted from 0."""
    if not tensor.numel or tensor.nbytes > _LARGEST:
        return []
    rows = (tensor.numpy() == 0).reshape(-1, tensor.shape[-1]).all(axis=1)
    return [int(row) for row in rows.nonzero()[0]]
