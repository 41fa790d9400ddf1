"""Whether the metadata tell the truth: ModelSpec's architecture, and hashes of the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...checkpoint import Checkpoint
from ...digests import sha256_of
from ...models import modelspec
from ...models.known import family_of_architecture
from ...models.modelspec import PREFIX
from ...sources import FileSlice
from ..findings import Finding
from .subject import Subject


def metadata(subject: Subject) -> Iterator[Finding]:
    """What the metadata say of the model, and what they leave out."""
    stated = subject.checkpoint.metadata.get(PREFIX + "architecture")
    family = subject.model.base_family
    claimed = family_of_architecture(stated) if stated else None
    right = modelspec.required(subject.checkpoint, subject.model)
    if stated and claimed and family not in {"unknown", claimed}:  # a name that isn't known is no other family's
        message = f"the metadata say {stated}, and the weights are of {family}"
        wanted = right["architecture"]
        mend = subject.command("metadata", "--set", f"{PREFIX}architecture={wanted}", safe=True)
        facts = {"key": PREFIX + "architecture", "expected": wanted, "seen": stated}
        yield from subject.finding("metadata-architecture", message, mend=mend, **facts)
    if PREFIX + "sai_model_spec" in subject.checkpoint.metadata:
        lacking = [name for name in modelspec.MUST if not subject.checkpoint.metadata.get(PREFIX + name)]
        words = [word for name in lacking for word in ("--set", f"{PREFIX}{name}={right.get(name, name.upper())}")]
        if lacking:
            message = f"ModelSpec asks for {', '.join(PREFIX + name for name in lacking)}"
            yield from subject.finding("metadata-modelspec", message, mend=subject.command("metadata", *words))


def stated_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of the tensors' bytes that the metadata of a safetensors file state, in hexadecimal without ``0x``."""
    if checkpoint.origin is None or checkpoint.origin.data_offset is None:
        return {}
    found = {name: checkpoint.metadata.get(name) for name in (PREFIX + "hash_sha256", "sshs_model_hash")}
    return {name: value.strip().lower().removeprefix("0x") for name, value in found.items() if value}


def tensor_hash(checkpoint: Checkpoint, advance: Callable[[int], None]) -> str:
    """The SHA-256 of all that follows the header, which is what both of those metadata fields mean."""
    origin = checkpoint.origin
    if origin is None or origin.file is None or origin.data_offset is None:
        raise ValueError("only a safetensors file has such a hash")
    length = origin.file.size - origin.data_offset
    return sha256_of(FileSlice(origin.file, origin.data_offset, length), advance)


def false_hashes(subject: Subject, right: str) -> Iterator[Finding]:
    """Which of the stated hashes aren't the right one; AutoV3's twelve digits count as well as all."""
    for name, stated in stated_hashes(subject.checkpoint).items():
        if len(stated) < 12 or not right.startswith(stated):
            mend = subject.command("metadata", "--drop", name, safe=True)
            message = f"{name} isn't the hash of the tensors in the file"
            facts = {"key": name, "expected": right, "seen": stated}
            yield from subject.finding("metadata-hash", message, mend=mend, **facts)
