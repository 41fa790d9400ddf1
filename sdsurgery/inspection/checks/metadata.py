"""Whether the metadata tell the truth: ModelSpec's architecture, and hashes of the tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from ...checkpoint import Checkpoint
from ...models.folder_files import prediction
from ...models.known import family_of_architecture
from ...models.stated import of_folder_files
from ...sources import FileSlice, sweep
from ..findings import Finding
from .subject import Subject

_PREFIX = "modelspec."
_CHUNK = 1 << 20

_MUST = ("architecture", "implementation", "title", "resolution")
"""What ModelSpec 1.0.1 asks for, beside its own version."""

_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
_RESOLUTIONS = {"sd1": "512x512", "sdxl": "1024x1024", "sdxl-refiner": "1024x1024"}
_IMPLEMENTATIONS = {"sd1": "https://github.com/CompVis/stable-diffusion"}
_SGM = "https://github.com/Stability-AI/generative-models"
"""The implementations that ModelSpec's own examples name."""


def metadata(subject: Subject) -> Iterator[Finding]:
    """What the metadata say of the model, and what they leave out."""
    stated = subject.checkpoint.metadata.get(_PREFIX + "architecture")
    family = subject.model.base_family
    claimed = family_of_architecture(stated) if stated else None
    right = _architecture(subject)
    if stated and claimed and family not in {"unknown", claimed}:  # a name that isn't known is no other family's
        message = f"the metadata say {stated}, and the weights are of {family}"
        mend = subject.command("metadata", "--set", f"{_PREFIX}architecture={right}", safe=True)
        facts = {"key": _PREFIX + "architecture", "expected": right, "seen": stated}
        yield from subject.finding("metadata-architecture", message, mend=mend, **facts)
    if _PREFIX + "sai_model_spec" in subject.checkpoint.metadata:
        lacking = [name for name in _MUST if not subject.checkpoint.metadata.get(_PREFIX + name)]
        values = {
            "architecture": right,
            "implementation": _IMPLEMENTATIONS.get(family, _SGM),
            "title": "TITLE",
            "resolution": _RESOLUTIONS.get(family, "768x768" if right.endswith("768-v") else "512x512"),
        }
        words = [word for name in lacking for word in ("--set", f"{_PREFIX}{name}={values[name]}")]
        if lacking:
            message = f"ModelSpec asks for {', '.join(_PREFIX + name for name in lacking)}"
            yield from subject.finding("metadata-modelspec", message, mend=subject.command("metadata", *words))


def _architecture(subject: Subject) -> str:
    """What the architecture is called; SD2's are told apart by what the UNet predicts."""
    family = subject.model.base_family
    if family == "sd2":
        predicted = prediction(subject.checkpoint, subject.model, of_folder_files(subject.checkpoint)).type
        return f"stable-diffusion-v2-{'768-v' if predicted == 'v_prediction' else '512'}"
    return _ARCHITECTURES.get(family, "ARCHITECTURE")


def stated_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of the tensors' bytes that the metadata of a safetensors file state, in hexadecimal without ``0x``."""
    if checkpoint.origin is None or checkpoint.origin.data_offset is None:
        return {}
    found = {name: checkpoint.metadata.get(name) for name in (_PREFIX + "hash_sha256", "sshs_model_hash")}
    return {name: value.strip().lower().removeprefix("0x") for name, value in found.items() if value}


def tensor_hash(checkpoint: Checkpoint, advance: Callable[[int], None]) -> str:
    """The SHA-256 of all that follows the header, which is what both of those metadata fields mean."""
    origin = checkpoint.origin
    if origin is None or origin.file is None or origin.data_offset is None:
        raise ValueError("only a safetensors file has such a hash")
    digest = hashlib.sha256()
    length = origin.file.size - origin.data_offset
    for piece in sweep((FileSlice(origin.file, origin.data_offset, length),), _CHUNK):
        digest.update(piece)
        advance(len(piece))
    return digest.hexdigest()


def false_hashes(subject: Subject, right: str) -> Iterator[Finding]:
    """Which of the stated hashes aren't the right one; AutoV3's twelve digits count as well as all."""
    for name, stated in stated_hashes(subject.checkpoint).items():
        if len(stated) < 12 or not right.startswith(stated):
            mend = subject.command("metadata", "--drop", name, safe=True)
            message = f"{name} isn't the hash of the tensors in the file"
            facts = {"key": name, "expected": right, "seen": stated}
            yield from subject.finding("metadata-hash", message, mend=mend, **facts)
