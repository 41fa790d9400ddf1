"""What a comparison of formats found, as lines and as a JSON document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .terminal import counted

if TYPE_CHECKING:
    from ..parity.results import Compared, Parity, Picture, Stage


def lines(found: Parity) -> Iterator[str]:
    """A table of stages for each format, and a verdict."""
    settings = found.settings
    yield (
        f"{counted(len(settings.prompts), 'picture')} of {settings.width} x {settings.height}, "
        f"{settings.steps} steps of {settings.scheduler}, guidance {settings.guidance:g}, seed {settings.seed}"
    )
    yield f"on {found.chosen.device} ({found.chosen.name}); bounds for {found.profile}"
    if found.chosen.why_not_cuda:
        yield f"no GPU was used: {found.chosen.why_not_cuda}"
    for each in found.formats:
        yield ""
        role = "the reference: " if each.is_reference else ""
        yield f"{role}{each.format.label}, {each.software}, {each.precision}, {mean(each.seconds):.2f} s a picture"
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
        where = f", first at {each.located}" if each.located else ""
        number = f" (picture {first.picture + 1})" if len(found.settings.prompts) > 1 else ""
        yield f"{each.format.label} diverges at: {first.name}{number}{where}: {first.refusal}"


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
    return f"{decibels(figures.psnr):>9}  relative L2 {figures.relative_l2:.1e}  largest {figures.maximum:.1e}{mark}"


def told_of_picture(picture: Picture, *, is_reference: bool) -> str:
    """A picture's figures in a line."""
    mark = "" if picture.refusal is None else f"  <- {picture.refusal}"
    figures = picture.figures
    if figures is None:
        return (("drawn" if is_reference else "") + mark).strip()
    same = decibels(figures.psnr)
    return f"{same:>9}  SSIM {figures.ssim:.4f}  {figures.differing:.2%} of pixels differ{mark}"


def decibels(psnr: float) -> str:
    """A PSNR as it is shown; equal values have none."""
    return "equal" if psnr == math.inf else f"{psnr:.1f} dB"


def proof(each: Compared) -> str:
    """Where its operators ran."""
    totals: dict[str, int] = {}
    for ran in each.proof.values():
        for place, count in ran.items():
            totals[place] = totals.get(place, 0) + count
    return ", ".join(f"{place} ({count:,})" for place, count in totals.items()) or "nothing"


def mean(seconds: Sequence[float]) -> float:
    """Seconds a picture; 0 where none was drawn."""
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
        "formats": [_format(each) for each in found.formats],
    }


def _format(each: Compared) -> dict[str, Any]:
    first = each.diverges
    return {
        "kind": each.format.kind,
        "path": str(each.format.given) if each.format.given else None,
        "software": each.software,
        "precision": each.precision,
        "reference": each.is_reference,
        "diverges": None if first is None else {"component": first.component, "stage": first.name},
        "located": each.located,
        "fingerprints": dict(each.fingerprints),
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
