"""ModelSpec's fields: what Stability AI's ``ModelSpec`` 1.0.1 has a file's metadata say of a model."""

from __future__ import annotations

from typing import Final

from ..checkpoint import Checkpoint
from .folder_files import prediction
from .identify import Model
from .stated import of_folder_files, recorded

PREFIX: Final = "modelspec."
VERSION: Final = "1.0.1"

MUST: Final = ("architecture", "implementation", "title", "resolution")
"""What it asks for, beside its own version."""

_ARCHITECTURES: Final = {
    "sd1": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
_SGM: Final = "https://github.com/Stability-AI/generative-models"
_IMPLEMENTATIONS: Final = {"sd1": "https://github.com/CompVis/stable-diffusion"}
"""The implementations that ModelSpec's own examples name."""


def architecture(checkpoint: Checkpoint, model: Model) -> str | None:
    """What a model's architecture is called; SD2's are told apart by what the UNet predicts."""
    if model.base_family != "sd2":
        return _ARCHITECTURES.get(model.base_family)
    stated = of_folder_files(checkpoint).over(recorded(checkpoint))
    predicted = prediction(checkpoint, model, stated).type
    return f"stable-diffusion-v2-{'768-v' if predicted == 'v_prediction' else '512'}"


def required(checkpoint: Checkpoint, model: Model) -> dict[str, str]:
    """The fields that a model of its family must have, without their prefix, but for the title; none for no family."""
    name = architecture(checkpoint, model)
    if name is None:
        return {}
    resolution = "1024x1024" if "xl" in name else "768x768" if name.endswith("768-v") else "512x512"
    return {
        "architecture": name,
        "implementation": _IMPLEMENTATIONS.get(model.base_family, _SGM),
        "resolution": resolution,
    }


def title_of(checkpoint: Checkpoint) -> str:
    """What a model is called: by its metadata, or by its file."""
    stated = checkpoint.metadata.get(PREFIX + "title", "").strip()
    if stated or checkpoint.origin is None:
        return stated or "a model in memory"
    name = checkpoint.origin.name
    return name.rpartition(".")[0] or name
