"""The pictures of a comparison, beside each other and their differences."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..parity.metrics import Array
    from ..parity.results import Parity


_GAP = 8
_LEAST_SHOWN = 128
"""Pixels that a picture on the sheet has at least, by whole enlargements."""
AMPLIFIED = 10
"""Times that differences are enlarged in pictures of them."""
_HEADING = 20
"""Pixels that the names above the columns take."""
_LETTER = 12
"""The size of their letters."""
_SUFFIXES = r"\.safetensors|\.ckpt"
"""What names are shown without where they can be told apart without it."""


def sheet(found: Parity) -> bytes:
    """All pictures beside each other, a PNG: a row a prompt, a column a format, and the differences behind."""
    import numpy as np

    rows: list[Array] = []
    for number in range(len(found.settings.prompts)):
        cells = [each.pictures[number].pixels for each in found.formats]
        reference = cells[0]
        shown = [_enlarged(_or_grey(cell, found)) for cell in cells]
        shown += [_enlarged(amplified(cell, reference, found)) for cell in cells[1:]]
        if not rows:
            rows.append(_headings(_titles(found), [cell.shape[1] for cell in shown]))
        rows.append(_beside(shown, axis=1))
    return png(_beside(rows, axis=0) if rows else np.ones((8, 8, 3)))


def _titles(found: Parity) -> list[str]:
    """What the columns show: kinds of formats, or names where a kind is there twice."""
    from ..parity.formats import LABELS

    formats = [each.format for each in found.formats]
    kinds = Counter(each.kind for each in formats)
    stems = {each.name: re.sub(rf"({_SUFFIXES})$", "", each.name) for each in formats}
    short = stems if len(set(stems.values())) == len(stems) else {name: name for name in stems}
    names = [short[each.name] if kinds[each.kind] > 1 and each.name else LABELS[each.kind] for each in formats]
    return [*names, *(f"difference x{AMPLIFIED}" for _ in names[1:])]


def _headings(titles: Sequence[str], widths: Sequence[int]) -> Array:
    """A line of text, each title in the middle of its column."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    line = Image.new("RGB", (sum(widths) + _GAP * (len(widths) - 1), _HEADING), "white")
    pen, font = ImageDraw.Draw(line), ImageFont.load_default(_LETTER)
    left = 0
    for title, width in zip(titles, widths, strict=True):
        text = title
        while len(text) > 1 and pen.textlength(text, font) > width:
            text = "…" + text[2:]  # names end with what tells them apart
        pen.text((left + width / 2, _HEADING / 2), text, "black", font, anchor="mm")
        left += width + _GAP
    return np.asarray(line, np.float64) / 255


def amplified(picture: Array | None, reference: Array | None, found: Parity) -> Array:
    """The difference of two pictures, grey where there is none, ten times as large as it is."""
    import numpy as np

    if picture is None or reference is None:
        return _or_grey(None, found)
    shown: Array = np.clip(0.5 + AMPLIFIED * (np.nan_to_num(picture) - np.nan_to_num(reference)), 0, 1)
    return shown


def _or_grey(picture: Array | None, found: Parity) -> Array:
    import numpy as np

    if picture is None:
        return np.full((found.settings.height or 8, found.settings.width or 8, 3), 0.5)
    return np.nan_to_num(picture)


def _enlarged(picture: Array) -> Array:
    import numpy as np

    factor = enlargement(picture, _LEAST_SHOWN)
    grown: Array = np.repeat(np.repeat(picture, factor, 0), factor, 1)
    return grown


def enlargement(picture: Array, least: int) -> int:
    """How many times as large a picture is shown, so that it has at least so many pixels each way."""
    side: int = min(picture.shape[:2])
    return max(1, -(-least // max(1, side)))


def _beside(pictures: Sequence[Array], *, axis: int) -> Array:
    import numpy as np

    shape = list(pictures[0].shape)
    shape[axis] = _GAP
    gap = np.ones(shape)
    parts = [part for picture in pictures for part in (picture, gap)][:-1]
    joined: Array = np.concatenate(parts, axis)
    return joined


def png(picture: Array) -> bytes:
    """A picture's bytes."""
    from PIL import Image

    from ..parity.metrics import as_bytes

    stream = io.BytesIO()
    Image.fromarray(as_bytes(picture)).save(stream, "PNG", optimize=True)
    return stream.getvalue()
