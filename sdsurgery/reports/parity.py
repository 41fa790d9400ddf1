"""What a comparison of formats found: as lines, as a JSON document, and as a folder with a page and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..containers.writing import AtomicFolder
from ..errors import OutputExistsError
from ..sources import InMemory
from . import documents

if TYPE_CHECKING:
    from ..parity.metrics import Array
    from ..parity.results import Compared, Parity, Picture, Stage

PAGE = "index.html"
SHEET = "sheet.png"
DOCUMENT = "parity.json"
JUNIT = "junit.xml"
_OURS = {PAGE, SHEET, DOCUMENT, JUNIT}


def lines(found: Parity) -> Iterator[str]:
    """A table of stages for each format, and a verdict."""
    settings = found.settings
    yield (
        f"{len(settings.prompts)} pictures of {settings.width} x {settings.height}, {settings.steps} steps of "
        f"{settings.scheduler}, guidance {settings.guidance:g}, seed {settings.seed}"
    )
    yield f"on {found.chosen.device} ({found.chosen.name}); bounds for {found.profile}"
    if found.chosen.why_not_cuda:
        yield f"no GPU was used: {found.chosen.why_not_cuda}"
    for each in found.formats:
        yield ""
        role = "the reference: " if each.is_reference else ""
        yield f"{role}{each.format.label}, {each.software}, {each.precision}, {_mean(each.seconds):.2f} s a picture"
        for stage in worst(each):
            yield f"  {stage.name:<28} {told(stage)}"
        for picture in each.pictures:
            yield f"  {f'picture {picture.number + 1}':<28} {told_of_picture(picture, is_reference=each.is_reference)}"
        yield f"  ran on: {proof(each)}"
    yield ""
    yield from verdict(found)


def verdict(found: Parity) -> Iterator[str]:
    """What came of it, a line for each format that doesn't agree."""
    if found.agrees:
        yield f"all {len(found.formats)} formats agree"
        return
    for each in found.formats:
        first = each.diverges
        if first is None:
            continue
        inside = found.located.get(each.format.label)
        where = f", first at {inside}" if inside else ""
        yield f"{each.format.label} diverges at: {first.name}{where}: {first.refusal}"


def worst(each: Compared) -> list[Stage]:
    """Each stage once, by the picture in which it is furthest off."""
    found: dict[str, Stage] = {}
    for stage in each.stages:
        before = found.get(stage.name)
        if before is None or _badness(stage) > _badness(before):
            found[stage.name] = stage
    return list(found.values())


def _badness(stage: Stage) -> tuple[bool, float]:
    figures = stage.figures
    if figures is None or not figures.finite:
        return bool(stage.refusal), math.inf if stage.refusal else -math.inf
    return bool(stage.refusal), -figures.psnr


def told(stage: Stage) -> str:
    """A stage's figures in a line."""
    mark = "" if stage.refusal is None else f"  <- {stage.refusal}"
    figures = stage.figures
    if figures is None:
        return f"equal{mark}" if not mark else mark.strip()
    if not figures.finite:
        return f"not finite{mark}"
    same = "equal" if math.isinf(figures.psnr) else f"{figures.psnr:6.1f} dB"
    return f"{same:>9}  relative L2 {figures.relative_l2:.1e}  largest {figures.maximum:.1e}{mark}"


def told_of_picture(picture: Picture, *, is_reference: bool) -> str:
    """A picture's figures in a line."""
    mark = "" if picture.refusal is None else f"  <- {picture.refusal}"
    figures = picture.figures
    if figures is None:
        return (("drawn" if is_reference else "") + mark).strip()
    same = "equal" if math.isinf(figures.psnr) else f"{figures.psnr:6.1f} dB"
    return f"{same:>9}  SSIM {figures.ssim:.4f}  {figures.differing:.2%} of pixels differ{mark}"


def proof(each: Compared) -> str:
    """Where its operators ran."""
    totals: dict[str, int] = {}
    for ran in each.proof.values():
        for place, count in ran.items():
            totals[place] = totals.get(place, 0) + count
    return ", ".join(f"{place} ({count:,})" for place, count in totals.items()) or "nothing"


def _mean(seconds: Sequence[float]) -> float:
    return sum(seconds) / len(seconds) if seconds else 0.0


def document(found: Parity) -> dict[str, Any]:
    """What ``parity --json`` prints; ``docs/schemas/parity.json`` describes it."""
    return {
        "agrees": found.agrees,
        "verdict": list(verdict(found)),
        "profile": found.profile,
        "settings": asdict(found.settings),
        "device": asdict(found.chosen),
        "seconds": found.seconds,
        "formats": [_format(each, found) for each in found.formats],
    }


def _format(each: Compared, found: Parity) -> dict[str, Any]:
    first = each.diverges
    return {
        "kind": each.format.kind,
        "path": str(each.format.given) if each.format.given else None,
        "software": each.software,
        "precision": each.precision,
        "reference": each.is_reference,
        "diverges": None if first is None else {"component": first.component, "stage": first.name},
        "located": found.located.get(each.format.label),
        "stages": [
            {
                "component": stage.component,
                "stage": stage.name,
                "picture": stage.picture,
                "refusal": stage.refusal,
                **({} if stage.figures is None else _plain(asdict(stage.figures))),
            }
            for stage in each.stages
        ],
        "pictures": [
            {
                "picture": picture.number,
                "refusal": picture.refusal,
                "curve": [_number(value) for value in picture.curve],
                **({} if picture.figures is None else _plain(asdict(picture.figures))),
            }
            for picture in each.pictures
        ],
        "seconds": list(each.seconds),
        "ran_on": {name: dict(ran) for name, ran in each.proof.items()},
    }


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: _number(value) if isinstance(value, float) else value for name, value in figures.items()}


def _number(value: float) -> float | None:
    """JSON has no infinity: equal values have no PSNR."""
    return value if math.isfinite(value) else None


def refuse(folder: Path, models: Sequence[Path], *, force: bool) -> None:
    """Refuse a place for a report before any work is done for it.

    Raises:
        OutputExistsError: If something is there that isn't an older report, or is one and may not be replaced.
    """
    if not folder.exists():
        return
    if any(path.exists() and path.samefile(folder) for path in models):
        raise OutputExistsError("it is one of the inputs", file=folder, remedy="choose another name")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if not names <= _OURS:
        raise OutputExistsError("it holds other things than a report", file=folder, remedy="choose another name")
    if not force:
        raise OutputExistsError("there is a report already", file=folder, remedy="add --force to replace it")


def write(found: Parity, folder: Path, *, force: bool) -> None:
    """Write the report, whole or not at all."""
    parts = {
        SHEET: sheet(found),
        DOCUMENT: (documents.text(document(found)) + "\n").encode(),
    }
    size = sum(map(len, parts.values()))
    with AtomicFolder(folder, replace=force, size=size, advance=lambda _count: None) as out:
        for name, content in parts.items():
            out.write(name, [InMemory(content)])


_GAP = 8
_LEAST_SHOWN = 128
"""Pixels that a picture on the sheet has at least, by whole enlargements."""


def sheet(found: Parity) -> bytes:
    """All pictures beside each other, a PNG: a row a prompt, a column a format, and the differences behind."""
    import numpy as np

    rows = []
    for number in range(len(found.settings.prompts)):
        cells = [each.pictures[number].pixels for each in found.formats]
        reference = cells[0]
        shown = [_enlarged(_or_grey(cell, found)) for cell in cells]
        shown += [_enlarged(amplified(cell, reference, found)) for cell in cells[1:]]
        rows.append(_beside(shown, axis=1))
    return png(_beside(rows, axis=0) if rows else np.ones((8, 8, 3)))


def amplified(picture: Array | None, reference: Array | None, found: Parity) -> Array:
    """The difference of two pictures, grey where there is none, ten times as large as it is."""
    import numpy as np

    if picture is None or reference is None:
        return _or_grey(None, found)
    shown: Array = np.clip(0.5 + 10 * np.nan_to_num(picture - reference), 0, 1)
    return shown


def _or_grey(picture: Array | None, found: Parity) -> Array:
    import numpy as np

    if picture is None:
        return np.full((found.settings.height or 8, found.settings.width or 8, 3), 0.5)
    return np.nan_to_num(picture)


def _enlarged(picture: Array) -> Array:
    import numpy as np

    factor = max(1, -(-_LEAST_SHOWN // max(1, min(picture.shape[:2]))))
    grown: Array = np.repeat(np.repeat(picture, factor, 0), factor, 1)
    return grown


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
    import io

    from PIL import Image

    from ..parity.metrics import as_bytes

    stream = io.BytesIO()
    Image.fromarray(as_bytes(picture)).save(stream, "PNG", optimize=True)
    return stream.getvalue()
