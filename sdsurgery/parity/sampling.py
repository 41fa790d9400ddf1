"""One sampling loop for every runtime: the same tokens, latents, noise schedule and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .runtimes import Conditioning, Facts, Predictor, document
from .settings import Settings

_CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
}


@dataclass(frozen=True)
class Noise:
    """What a picture starts from, and what stands in for a picture's own conditions.

    Attributes:
        latents: ``[1, 4, height / 8, width / 8]``, of unit deviation.
        channels: What an inpainting, pix2pix or depth UNet gets beside latents, ``[1, channels, ...]``; noise, too.
        pixels: A made-up picture for the VAE's encoder, ``[1, 3, height, width]``, from -1 to 1.
    """

    latents: Tensor
    channels: Tensor | None
    pixels: Tensor


def noise_for(settings: Settings, index: int, *, height: int, width: int, channels: int) -> Noise:
    """The noise of a picture, from the seed and its number."""
    random = torch.Generator().manual_seed(settings.seed + index)
    latents = torch.randn(1, 4, height // 8, width // 8, generator=random)
    beside = torch.randn(1, channels - 4, height // 8, width // 8, generator=random) if channels > 4 else None
    return Noise(latents, beside, _blurred(torch.randn(1, 3, height, width, generator=random)))


def _blurred(noise: Tensor) -> Tensor:
    """Noise with the large patches that pictures have."""
    small = torch.nn.functional.avg_pool2d(noise, 8)
    large = torch.nn.functional.interpolate(small, scale_factor=8, mode="bilinear")
    return (large / large.abs().max()).clamp(-1, 1)


def size_of(configs: Path, settings: Settings) -> tuple[int, int]:
    """Height and width: as told, or what the model was made for."""
    usual = int(document(configs, "unet/config.json").get("sample_size") or 64) * 8
    return settings.height or usual, settings.width or usual


def scheduler_of(configs: Path, facts: Facts, settings: Settings) -> Any:
    """The scheduler: the reference's steps with a format's own prediction type and schedule; nothing is clipped.

    Args:
        configs: The reference's.
        facts: What the format says of itself.
        settings: Which scheduler.
    """
    import diffusers

    config = document(configs, "scheduler/scheduler_config.json")
    name = config["_class_name"] if settings.scheduler == "model" else _CLASSES[settings.scheduler]
    told = {key: value for key, value in config.items() if not key.startswith("_")}
    told |= {**facts.schedule, "prediction_type": facts.prediction_type, "clip_sample": False}
    if settings.scheduler == "pndm":
        told["skip_prk_steps"] = True
    return getattr(diffusers, name).from_config(told)


def time_ids(configs: Path, height: int, width: int) -> Tensor | None:
    """SDXL's numbers of size and crop, for a prompt and its negative; other families have none."""
    config = document(configs, "unet/config.json")
    if config.get("addition_embed_type") != "text_time":
        return None
    width_each = int(config["addition_time_embed_dim"])
    pooled = document(configs, "text_encoder_2/config.json").get("projection_dim", 0)
    count = (int(config["projection_class_embeddings_input_dim"]) - int(pooled)) // width_each
    numbers = [height, width, 0, 0, height, width] if count == 6 else [height, width, 0, 0, 6]
    return torch.tensor([numbers, numbers], dtype=torch.float32)


@dataclass
class Step:
    """What goes into the UNet at a step, and what the loop holds before it."""

    number: int
    timestep: float
    sample: Tensor
    predicted: Tensor


@dataclass
class Trace:
    """A picture's way through the loop.

    Attributes:
        steps: What was asked and answered, at each step.
        latents: After each step.
    """

    steps: list[Step] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


def sample(
    predict: Predictor,
    given: Conditioning,
    noise: Noise,
    scheduler: Any,
    settings: Settings,
) -> Trace:
    """Draw a picture's latents.

    Args:
        predict: The UNet.
        given: Of the negative prompt and the prompt, in a batch of two.
        noise: What to start from.
        scheduler: A fresh one.
        settings: Steps and guidance.
    """
    scheduler.set_timesteps(settings.steps)
    latents = noise.latents.to(given.states.device) * scheduler.init_noise_sigma
    beside = None if noise.channels is None else noise.channels.to(latents.device)
    trace = Trace()
    for number, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        one = scaled if beside is None else torch.cat([scaled, beside], 1)
        both = torch.cat([one, one])
        predicted = predict(both, float(timestep), given)
        away, towards = predicted.chunk(2)
        guided = away + settings.guidance * (towards - away)
        latents = scheduler.step(guided, timestep, latents).prev_sample
        trace.steps.append(Step(number, float(timestep), both, predicted))
        trace.latents.append(latents)
    return trace


def chosen(steps: int) -> Sequence[int]:
    """The steps that are compared one by one: first, middle, last."""
    return sorted({0, steps // 2, steps - 1})
