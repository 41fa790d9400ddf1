"""What a comparison of formats found, as a page: what users and files say is written out unless it is plain."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .parity import decibels, mean, worst
from .parity_chart import chart_of, short
from .parity_pictures import AMPLIFIED, amplified, enlargement, png

if TYPE_CHECKING:
    from ..parity.metrics import Array
    from ..parity.results import Compared, Parity, Picture, Stage


_MOST_PICTURES = 20
"""Prompts whose pictures are shown."""
_MOST_TEXT = 500
"""Characters of a prompt."""
_LEAST_ON_PAGE = 192
"""Pixels that a picture has at least, by whole enlargements."""
_MARKS = {True: "✓", False: "✗"}


def page(found: Parity) -> str:
    """All of it as one HTML file."""
    from ..parity.formats import LABELS
    from .html import render

    sides = _sides(found)
    others = [side for side in sides if not side.found.is_reference]
    return render(
        "parity.html.j2",
        found=found,
        kinds=LABELS,
        sides=sides,
        others=others,
        verdict=_headline(sides),
        bounds=_bounds(found.profile),
        pictures=_pictures(found, sides),
        stages=_stages(others, several=len(found.settings.prompts) > 1),
        figures=_picture_figures(others),
        chart=chart_of(others, found.settings.steps),
        components=dict.fromkeys(name for side in sides for name in side.found.fingerprints),
        marks=_MARKS,
        times=AMPLIFIED,
        most_text=_MOST_TEXT,
        enough=_enough,
    )


@dataclass(frozen=True)
class Side:
    """A format as the page names it.

    Attributes:
        place: Its number.
        name: Its kind, with a file's name where another is of that kind.
        found: What was found.
    """

    place: int
    name: str
    found: Compared

    @cached_property
    def first(self) -> Stage | None:
        """The first stage that isn't within the tolerance."""
        return self.found.diverges

    @property
    def where(self) -> str:
        """That stage's name."""
        if self.first is None:
            return ""
        return f"picture {self.first.picture + 1}" if self.first.component == "picture" else self.first.name

    @property
    def mean(self) -> str:
        """Seconds a picture."""
        return f"{mean(self.found.seconds):.2f}"

    @property
    def counted(self) -> str:
        """What proves where it ran: ONNX Runtime tells of each node it ran, torch where weights lie."""
        return "nodes" if self.found.format.kind == "onnx" else "weights"


def _sides(found: Parity) -> list[Side]:
    from ..parity.formats import LABELS

    kinds = Counter(each.format.kind for each in found.formats)
    return [
        Side(place, LABELS[each.format.kind] if kinds[each.format.kind] == 1 else each.format.label, each)
        for place, each in enumerate(found.formats)
    ]


def _headline(sides: Sequence[Side]) -> str:
    apart = [side for side in sides if side.first]
    if not apart:
        return f"All {len(sides)} formats agree"
    if len(apart) == 1:
        return f"The {apart[0].name} diverges at: {apart[0].where}"
    return f"{len(apart)} of {len(sides)} formats diverge"


def _bounds(profile: str) -> list[str]:
    """A profile in words."""
    from ..parity.tolerances import PROFILES

    bounds = PROFILES[profile]
    pixels = "" if bounds.differing is None else f", at most {bounds.differing:.1%} of its pixels differ as bytes"
    return [
        "Settings and token ids: equal.",
        f"A network's output: a PSNR of at least {bounds.tensor:g} dB, a relative L2 of at most {bounds.relative:g}.",
        f"A picture: a PSNR of at least {bounds.picture:g} dB{pixels}.",
    ]


def _enough(text: str) -> str:
    """As much of a prompt as a page needs."""
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}… ({len(text):,} characters)"


@dataclass(frozen=True, slots=True)
class _Shown:
    """A picture on the page.

    Attributes:
        title: Whose it is.
        refusal: Why it isn't within the tolerance.
        agrees: Whether it is; ``None`` where that isn't asked.
        address: Its bytes, as an address; ``None`` where there is none.
        size: Width and height that it is shown with.
        crisp: Whether it is enlarged.
    """

    title: str
    refusal: str | None
    agrees: bool | None
    address: str | None = None
    size: tuple[int, int] = (0, 0)
    crisp: bool = False


def _pictures(found: Parity, sides: Sequence[Side]) -> dict[int, list[_Shown]]:
    """By prompt: the picture of each format, and the differences behind; where there are many, what diverges first."""
    numbers = range(len(found.settings.prompts))
    wrong = {picture.number for side in sides for picture in side.found.pictures if picture.refusal}
    chosen = sorted(numbers, key=lambda number: number not in wrong)[:_MOST_PICTURES]
    return {number: _row(number, found, sides) for number in sorted(chosen)}


def _row(number: int, found: Parity, sides: Sequence[Side]) -> list[_Shown]:
    reference = sides[0].found.pictures[number].pixels
    shown = []
    for side in sides:
        picture = side.found.pictures[number]
        asked = not side.found.is_reference or picture.refusal
        shown.append(_shown(side.name, picture.pixels, picture.refusal, not picture.refusal if asked else None))
    for side in sides[1:]:
        picture = side.found.pictures[number]
        if picture.pixels is not None and reference is not None:
            difference = amplified(picture.pixels, reference, found)
            shown.append(_shown(f"{side.name}: difference x{AMPLIFIED}", difference, None, None))
    return shown


def _shown(title: str, picture: Array | None, refusal: str | None, agrees: bool | None) -> _Shown:
    import markupsafe
    import numpy as np

    if picture is None:
        return _Shown(title, refusal, agrees)
    factor = enlargement(picture, _LEAST_ON_PAGE)
    text = base64.b64encode(png(np.nan_to_num(picture))).decode()
    address = markupsafe.Markup("data:image/png;base64,{}").format(text)
    height, width = picture.shape[:2]
    return _Shown(title, refusal, agrees, address, (width * factor, height * factor), factor > 1)


@dataclass(frozen=True, slots=True)
class _Cell:
    """What a table says of a format.

    Attributes:
        agrees: Whether it is within the tolerance.
        text: The figure that counts most.
        more: Others.
        refusal: Why it isn't.
    """

    agrees: bool
    text: str
    more: tuple[str, ...] = ()
    refusal: str | None = None


Row = tuple[str, list[_Cell | None]]
"""A name, and what is said of each format."""


def _stages(sides: Sequence[Side], *, several: bool) -> list[Row]:
    """Each stage once, by the picture in which a format is furthest off."""
    from ..parity.results import ORDER

    found = [{stage.name: stage for stage in worst(side.found)} for side in sides]
    components = {name: stage.component for stages in found for name, stage in stages.items()}
    names = sorted(components, key=lambda name: ORDER.index(components[name]))
    return [
        (name, [_cell(stages[name], several=several) if name in stages else None for stages in found])
        for name in names
    ]  # fmt: skip


def _cell(stage: Stage, *, several: bool) -> _Cell:
    figures, refusal = stage.figures, stage.refusal
    same = not refusal and (figures is None or figures.psnr == math.inf)
    where = (f"in picture {stage.picture + 1}",) if several and not same else ()
    if figures is None:
        return _Cell(not refusal, "differs" if refusal else "equal", where, refusal)
    if not figures.finite:
        return _Cell(not refusal, "not finite", where, refusal)
    more = (f"relative L2 {short(figures.relative_l2)}", f"largest {short(figures.maximum)}", *where)
    return _Cell(not refusal, decibels(figures.psnr), more, refusal)


def _picture_figures(sides: Sequence[Side]) -> list[Row]:
    numbers = range(len(sides[0].found.pictures)) if sides else ()
    return [
        (f"Picture {number + 1}", [_picture_cell(side.found.pictures[number]) for side in sides])
        for number in numbers
    ]  # fmt: skip


def _picture_cell(picture: Picture) -> _Cell:
    figures, refusal = picture.figures, picture.refusal
    if figures is None:
        return _Cell(not refusal, "no figures", (), refusal)
    more = (
        f"SSIM {figures.ssim:.4f}",
        f"{figures.differing:.2%} of pixels differ",
        f"largest difference of bytes {figures.maximum}",
    )
    return _Cell(not refusal, decibels(figures.psnr), more, refusal)
