"""Figures of how far two arrays, or two pictures, are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

IDENTICAL = math.inf
"""The PSNR of equal arrays."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How far an array is from the reference.

    Attributes:
        finite: Whether neither holds NaN or Inf; the other figures are NaN then.
        relative_l2: ``|a - b| / |b|``.
        correlation: Pearson's, of all values.
        psnr: In dB, of the reference's largest magnitude, ``20 log10(max|b| / rmse)``.
        maximum: The largest absolute difference.
    """

    finite: bool
    relative_l2: float
    correlation: float
    psnr: float
    maximum: float


_NOTHING = Figures(False, math.nan, math.nan, math.nan, math.nan)


def compare(found: Array, reference: Array) -> Figures:
    """The figures of an array; in fp64.

    Raises:
        ValueError: If the shapes differ.
    """
    if found.shape != reference.shape:
        raise ValueError(f"{list(found.shape)} can't be compared with {list(reference.shape)}")
    a, b = found.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return _NOTHING
    gap = a - b
    rmse, largest = math.sqrt(float(np.square(gap).mean())), float(np.abs(b).max())
    norm = float(np.linalg.norm(b))
    return Figures(
        True,
        float(np.linalg.norm(gap)) / norm if norm else (0.0 if not rmse else math.inf),
        _correlation(a, b),
        _decibels(largest, rmse),
        float(np.abs(gap).max()),
    )


def _correlation(a: Array, b: Array) -> float:
    same = np.array_equal(a, b)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(a @ b) / scale if scale else float(same)


def _decibels(peak: float, rmse: float) -> float:
    if not rmse:
        return IDENTICAL
    return 20 * math.log10(peak / rmse) if peak else -math.inf


@dataclass(frozen=True, slots=True)
class PictureFigures:
    """How far a picture is from the reference's.

    Attributes:
        psnr: In dB, of values from 0 to 1.
        ssim: Structural similarity, 1 for equal pictures.
        differing: The share of pixels that aren't equal as bytes.
        maximum: The largest difference of two bytes.
    """

    psnr: float
    ssim: float
    differing: float
    maximum: int


def compare_pictures(found: Array, reference: Array) -> PictureFigures:
    """The figures of a picture.

    Args:
        found: ``[height, width, 3]``, from 0 to 1, finite.
        reference: The same.
    """
    from skimage.metrics import structural_similarity

    bytes_found, bytes_reference = as_bytes(found).astype(np.int16), as_bytes(reference).astype(np.int16)
    apart = np.abs(bytes_found - bytes_reference)
    rmse = math.sqrt(float(np.square(found.astype(np.float64) - reference.astype(np.float64)).mean()))
    window = min(7, *found.shape[:2])
    similar = structural_similarity(
        reference.astype(np.float64), found.astype(np.float64),
        data_range=1.0, channel_axis=2, win_size=window - (window + 1) % 2,
    )  # fmt: skip
    return PictureFigures(_decibels(1.0, rmse), float(similar), float(apart.any(axis=2).mean()), int(apart.max()))


def as_bytes(picture: Array) -> NDArray[np.uint8]:
    """A picture as image files hold it."""
    shown: NDArray[np.uint8] = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return shown


_LEAST_SPREAD = 2 / 255
"""Deviation of a picture's values below which nothing is seen in it."""


def what_is_wrong(picture: Array) -> str | None:
    """Why a picture is none, whatever it is compared with: not finite, or of one colour."""
    if not np.isfinite(picture).all():
        count = int((~np.isfinite(picture)).sum())
        return f"{count:,} of its {picture.size:,} values are NaN or Inf"
    shown = np.clip(picture, 0, 1)
    if float(shown.std(axis=(0, 1)).max()) < _LEAST_SPREAD:
        return "it is black" if float(shown.max()) < _LEAST_SPREAD else "it is of one colour"
    return None
