"""What a runtime is asked to do, whatever runs it: encode text, predict noise, decode and encode pictures.

Everything goes in and comes out as torch tensors in fp32 on the CPU, unless a runtime keeps it on a GPU. A runtime
holds one network at a time, so that full-size models of three formats fit into the memory of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CorruptError
from .formats import Format

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of a prompt.

    Attributes:
        states: ``[batch, sequence, width]``.
        pooled: ``[batch, width]``, of SDXL.
        time_ids: SDXL's numbers of size and crop, ``[batch, 6]``.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    @property
    def added(self) -> dict[str, Tensor]:
        """What SDXL's UNet gets besides the states, by name."""
        if self.pooled is None or self.time_ids is None:
            return {}
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a format says of itself that no weight tells.

    Attributes:
        prediction_type: ``epsilon`` or ``v_prediction``.
        scaling_factor: What latents are multiplied by before the UNet sees them.
        schedule: The fields of the noise schedule, by the names of a scheduler's config.
    """

    prediction_type: str
    scaling_factor: float
    schedule: Mapping[str, Any] = field(default_factory=dict)

    def as_text(self) -> dict[str, str]:
        """Each fact as it is told, to be compared."""
        told = {"prediction_type": self.prediction_type, "scaling_factor": self.scaling_factor, **self.schedule}
        return {name: json.dumps(value) for name, value in told.items()}


_SCHEDULE = {
    "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000,
    "trained_betas": None, "rescale_betas_zero_snr": False,
}  # fmt: skip
"""What the model was trained with, and what diffusers' schedulers take where a config says nothing.

Which of the steps a scheduler goes through is its own affair (``steps_offset``, ``timestep_spacing``): no single file
tells, and all go through the reference's.
"""


def facts_of(configs: Path) -> Facts:
    """The facts that a folder's configs state."""
    scheduler, vae = document(configs, "scheduler/scheduler_config.json"), document(configs, "vae/config.json")
    return Facts(
        scheduler.get("prediction_type", "epsilon"),
        float(vae.get("scaling_factor", 0.18215)),
        _SCHEDULE | {name: scheduler[name] for name in _SCHEDULE if name in scheduler},
    )


def document(configs: Path, name: str) -> dict[str, Any]:
    """A JSON file of a folder; empty where there is none.

    Raises:
        CorruptError: If it holds no JSON object.
    """
    place = configs / name
    if not place.is_file():
        return {}
    try:
        found = json.loads(place.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"it can't be read: {error}", file=place, remedy="download or write it again") from error
    if not isinstance(found, dict):
        raise CorruptError("it holds no JSON object", file=place, remedy="download or write it again")
    return found


def bare(name: str) -> str:
    """A module's name as graphs and all versions of transformers agree on it."""
    return name.removeprefix("text_model.")


def text_encoders(given: Format) -> list[str]:
    """The folders of a format's text encoders, in the order in which they are fed."""
    return [name for name in ("text_encoder", "text_encoder_2") if (given.configs / name).is_dir()]


class TextEncoders(Protocol):
    """The text encoders of a model, loaded."""

    def __call__(self, ids: Sequence[Tensor]) -> Conditioning:
        """Encode token ids, ``[batch, 77]`` for each encoder."""


class Predictor(Protocol):
    """A UNet, loaded."""

    def __call__(self, sample: Tensor, timestep: float, given: Conditioning) -> Tensor:
        """Predict, ``[batch, 4, height / 8, width / 8]``."""


class Autoencoder(Protocol):
    """A VAE, loaded."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of unscaled latents, from -1 to 1, ``[batch, 3, height, width]``."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean and log variance of unscaled latents, ``[batch, 8, height / 8, width / 8]``."""


class Runtime(Protocol):
    """A format and the software that runs it."""

    format: Format
    software: str
    """What runs it, such as ``ONNX Runtime 1.31``."""

    def text_encoders(self) -> AbstractContextManager[TextEncoders]:
        """Load the text encoders."""

    def unet(self) -> AbstractContextManager[Predictor]:
        """Load the UNet."""

    def vae(self) -> AbstractContextManager[Autoencoder]:
        """Load the VAE."""

    def proof(self) -> Mapping[str, Mapping[str, int]]:
        """By network, how many of its nodes ran on which provider, or of its weights lay on which device."""

    def sizes(self, component: str, feed: Mapping[str, Tensor]) -> dict[str, int]:
        """How many values modules with weights of their own give, in the order in which a run comes to them.

        Args:
            component: Such as ``unet`` or ``vae_decoder``.
            feed: What the network is fed, under the names of a graph's inputs.
        """

    def outputs_of(self, component: str, names: Sequence[str], feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What such modules give; where the network fails, those before may be all."""
