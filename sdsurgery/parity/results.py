"""What a comparison found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .devices import Chosen
from .formats import Format
from .metrics import Array, Figures, PictureFigures
from .settings import Settings

Component = Literal["settings", "tokens", "text_encoder", "unet", "vae_decoder", "vae_encoder", "picture"]
ORDER: tuple[Component, ...] = (
    "settings", "tokens", "text_encoder", "unet", "vae_decoder", "vae_encoder", "picture",
)  # fmt: skip
"""In which a fault shows first."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of one picture, with the reference's inputs.

    Attributes:
        component: Whose output was compared.
        name: What it is called in a report, such as ``UNet, step 1``.
        picture: The number of the picture.
        figures: How far apart; ``None`` where nothing could be computed, and for what is equal or not.
        refusal: Why it isn't within the tolerance.
        step: Of the loop, where it is one that was compared.
    """

    component: Component
    name: str
    picture: int
    figures: Figures | None = None
    refusal: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that a runtime drew freely.

    Attributes:
        number: Of its prompt.
        pixels: ``[height, width, 3]``, from 0 to 1; ``None`` where it couldn't be drawn.
        figures: How far from the reference's; ``None`` for the reference, and where it is no picture.
        curve: The relative L2 difference of the latents after each step.
        refusal: Why it isn't within the tolerance.
    """

    number: int
    pixels: Array | None
    figures: PictureFigures | None = None
    curve: tuple[float, ...] = ()
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """One format, held against the reference.

    Attributes:
        format: Which.
        software: What ran it.
        precision: What it computed in.
        stages: In their order.
        pictures: By number.
        seconds: For each picture, of the loop and the decoder.
        proof: By network, how many of its nodes ran on which provider, or how many of its weights lay on which device.
        is_reference: Whether it is the one that the others are held against.
        fingerprints: By component, the beginning of the hash of its weights as they are stored.
        located: The first module inside the stage that diverges, if it was looked for and found.
    """

    format: Format
    software: str
    precision: str
    stages: tuple[Stage, ...]
    pictures: tuple[Picture, ...]
    seconds: tuple[float, ...]
    proof: Mapping[str, Mapping[str, int]]
    is_reference: bool = False
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    located: str | None = None

    @property
    def diverges(self) -> Stage | None:
        """The first stage that isn't within the tolerance; a picture is the last of them."""
        found = [stage for stage in self.stages if stage.refusal]
        found += [
            Stage("picture", "picture", each.number, None, each.refusal) for each in self.pictures if each.refusal
        ]
        return min(found, key=lambda stage: ORDER.index(stage.component), default=None)


@dataclass(frozen=True, slots=True)
class Parity:
    """All of it.

    Attributes:
        settings: What was drawn, with the size that was taken.
        profile: The tolerance's name.
        chosen: The device.
        formats: The reference first.
        seconds: That it took.
    """

    settings: Settings
    profile: str
    chosen: Chosen
    formats: tuple[Compared, ...]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether every format is within the tolerance of the reference."""
        return not any(each.diverges for each in self.formats)
