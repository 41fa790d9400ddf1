"""What is drawn for a comparison, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from ..errors import UsageError

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
SchedulerName = Literal["model", "ddim", "euler", "dpmsolver++", "pndm"]
Profile = Literal["auto", "fp32", "fp16", "bf16"]

DEFAULT_PROMPT: Final = "a red circle on a blue background"
_FACTOR: Final = 8
"""Pixels of a latent, each way, in every family."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One set of everything that is shared by the runtimes, so that only they differ.

    Attributes:
        prompts: One picture each.
        negative: What the pictures are guided away from.
        seed: Of the latents.
        steps: Of the scheduler.
        guidance: Of classifier-free guidance; 1 takes the prompt's prediction alone.
        width: In pixels, a multiple of 8.
        height: The same.
        scheduler: Which one, with the model's own noise schedule; ``model`` is the model's own.
        device: Where to run; ``auto`` takes a GPU where one works in all runtimes.
        precision: What is computed in; ``auto`` is fp32 on a CPU, and what the weights are stored in on a GPU.
        tolerance: The profile of bounds; ``auto`` is that of what is computed in.
    """

    prompts: tuple[str, ...] = (DEFAULT_PROMPT,)
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 5.0
    width: int | None = None
    height: int | None = None
    scheduler: SchedulerName = "ddim"
    device: Device = "auto"
    precision: Precision = "auto"
    tolerance: Profile = "auto"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError("there is no prompt", remedy="give one with --prompt")
        if self.steps < 1:
            raise UsageError(f"{self.steps} steps draw nothing", remedy="give at least one")
        if not math.isfinite(self.guidance):
            raise UsageError(f"no guidance can be {self.guidance}", remedy="give a number")
        for name, size in (("width", self.width), ("height", self.height)):
            if size is not None and (size < _FACTOR or size % _FACTOR):
                raise UsageError(f"a {name} of {size} pixels is none", remedy="give a multiple of 8")
        for value, kind in (
            (self.scheduler, SchedulerName),
            (self.device, Device),
            (self.precision, Precision),
            (self.tolerance, Profile),
        ):
            if value not in get_args(kind):
                raise UsageError(f"{value!r} is none of {', '.join(get_args(kind))}", remedy="choose one of those")
