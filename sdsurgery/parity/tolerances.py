"""How far apart runtimes may be, by what they compute in.

The bounds leave room above what was measured on sound models, and stay far below what any fault does. Where they come
from is in ``docs/parity.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .metrics import Figures, PictureFigures


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The bounds of a profile.

    Attributes:
        tensor: The least PSNR of a stage's output, in dB.
        relative: The largest relative L2 difference of one.
        picture: The least PSNR of a picture, in dB.
        differing: The largest share of a picture's pixels that may differ as bytes; ``None`` sets no bound.
    """

    tensor: float
    relative: float
    picture: float
    differing: float | None = None

    def refusal(self, figures: Figures) -> str | None:
        """Why a stage isn't within it."""
        if not figures.finite:
            return "NaN or Inf"
        if figures.psnr < self.tensor:
            return f"{figures.psnr:.1f} dB, where at least {self.tensor:.0f} are wanted"
        if figures.relative_l2 > self.relative:
            return f"a relative difference of {figures.relative_l2:.1e}, where at most {self.relative:.0e} is allowed"
        return None

    def refusal_of_picture(self, figures: PictureFigures) -> str | None:
        """Why a picture isn't within it."""
        if figures.psnr < self.picture or math.isnan(figures.psnr):
            return f"{figures.psnr:.1f} dB, where at least {self.picture:.0f} are wanted"
        if self.differing is not None and figures.differing > self.differing:
            return f"{figures.differing:.2%} of its pixels differ, where at most {self.differing:.1%} may"
        return None


PROFILES: Final[Mapping[str, Tolerance]] = {
    "fp32": Tolerance(tensor=80, relative=1e-3, picture=60, differing=0.001),
    "fp16": Tolerance(tensor=45, relative=2e-2, picture=35),
    "bf16": Tolerance(tensor=30, relative=1e-1, picture=25),
}
