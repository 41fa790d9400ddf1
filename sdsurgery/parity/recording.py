"""What one runtime did, kept for the others to be fed and held against."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .results import Stage
from .runtimes import Conditioning, Facts, Runtime
from .sampling import Trace


@dataclass
class Record:
    """A runtime's outcomes, a list entry a picture.

    Attributes:
        runtime: Which.
        facts: What its format says of itself.
        precision: What it computes in.
        tokens: Ids of the negative prompt and the prompt, by text encoder.
        given: What the text encoders made of them.
        traces: The way through the loop.
        pixels: From -1 to 1.
        encoded: The made-up picture that the VAE's encoder gets.
        moments: What it makes of it.
        stages: What was compared, not yet held against a tolerance; what is wrong whatever the figures says so.
        seconds: Of the loop and the decoder.
    """

    runtime: Runtime
    facts: Facts
    precision: str
    tokens: list[tuple[Tensor, ...]] = field(default_factory=list)
    given: list[Conditioning | None] = field(default_factory=list)
    traces: list[Trace | None] = field(default_factory=list)
    pixels: list[Tensor | None] = field(default_factory=list)
    encoded: list[Tensor] = field(default_factory=list)
    moments: list[Tensor | None] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
