"""Files that are known by their published SHA-256, and where a VAE's family can be read off.

The VAEs of SD1, SD2 and SDXL have the same keys and shapes and differ in the scale of their latents, so that a
wrong one passes every check of names and draws in wrong colours. What tells them apart is where a file came from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from .. import history
from ..checkpoint import Checkpoint
from ..digests import sha256_of
from ..sources import SourceFile
from .configs import documents
from .identify import Model

_ARCHITECTURES = {
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2": "sd2",
    "stable-diffusion-xl-v1-refiner": "sdxl-refiner",
    "stable-diffusion-xl-v1": "sdxl",
}
"""By how ModelSpec's names of them begin, the longer beginnings first."""

VAE_FAMILY = "vae_family"
"""The fact that a step records when it brings in a VAE whose family is known."""

_SCALES = {0.18215: "sd1", 0.13025: "sdxl"}
"""A family whose latents have that scale, as diffusers' configs state it."""

_LATENT_SPACES = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl", "sdxl-refiner": "sdxl"}


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A published file."""

    name: str
    sha256: str
    size: int
    family: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is known of where a VAE came from; empty strings where nothing is.

    Attributes:
        family: Of the model it was made for.
        why: How that is known.
        sha256: Of its file, where it was computed.
    """

    family: str = ""
    why: str = ""
    sha256: str | None = None


@cache
def _files() -> dict[str, KnownFile]:
    from importlib import resources

    text = resources.files("sdsurgery.data").joinpath("known_files.json").read_text("utf-8")
    return {
        entry["sha256"]: KnownFile(entry["name"], entry["sha256"], entry["size"], entry["family"])
        for entry in json.loads(text)["files"]
    }


def known_file(file: SourceFile) -> KnownFile | None:
    """The published file that this one is; it is read only if it has the size of one."""
    if all(file.size != known.size for known in _files().values()):
        return None
    return _files().get(sha256_of(file.whole))


def latent_space(family: str) -> str | None:
    """``sd`` (scale 0.18215) or ``sdxl`` (0.13025); ``None`` for a family that isn't known."""
    return _LATENT_SPACES.get(family)


def family_of_architecture(architecture: str) -> str | None:
    """The family that ModelSpec's ``architecture`` names, such as ``stable-diffusion-v1/vae``."""
    name = architecture.partition("/")[0].lower()
    matches = (family for prefix, family in _ARCHITECTURES.items() if name.startswith(prefix))
    return next(matches, None)


def provenance_of_vae(checkpoint: Checkpoint, model: Model) -> Provenance:
    """Whose VAE it is, as far as can be told: by its config, the model around it, its record, or its file's hash."""
    stated = documents(checkpoint)
    scale = stated.get("vae", stated.get("", {})).get("scaling_factor")
    if isinstance(scale, float) and scale in _SCALES:
        return Provenance(_SCALES[scale], f"its config states a latent scale of {scale}")
    family = ""
    for step in reversed([*history.recorded(checkpoint.metadata), *map(history.describe, checkpoint.steps)]):
        if step.get("operation") == "merge-vae" or _parameter(step, "component") == "vae":
            taken = str(step.get(VAE_FAMILY, ""))
            return Provenance(taken, "its metadata tell where it was taken from") if taken else Provenance()
        family = family or str(step.get("family", ""))
    if family in _LATENT_SPACES:
        return Provenance(family, "its metadata tell where it was extracted from")
    if model.base_family != "unknown":
        return Provenance(model.base_family, f"it lies in a model of {model.family}")
    architecture = checkpoint.metadata.get("modelspec.architecture", "")
    told = family_of_architecture(architecture)
    if told:
        return Provenance(told, f"its metadata say {architecture.partition('/')[0]}")
    known = known_file(checkpoint.origin.file) if checkpoint.origin and checkpoint.origin.file else None
    return Provenance(known.family, f"it is {known.name}", known.sha256) if known else Provenance()


def _parameter(step: dict[str, Any], name: str) -> Any:
    parameters = step.get("parameters")
    return parameters.get(name) if isinstance(parameters, dict) else None
