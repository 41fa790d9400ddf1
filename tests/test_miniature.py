"""The trained miniature: it draws what it is told, breaks the way merges break models, and is mended again."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, cli
from shapes import Scene, caption, judged, scene

import sdsurgery as sd
from sdsurgery.parity.results import Parity
from sdsurgery.parity.running import parity
from sdsurgery.parity.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::transformers", "ignore::FutureWarning")

MODEL = FIXTURES / "miniature.safetensors"
FADED = FIXTURES / "washed-out.vae.safetensors"
SEED = 3
COUNT = 24


def scenes() -> tuple[list[Scene], list[str]]:
    random = np.random.default_rng(SEED)
    drawn = [scene(random) for _ in range(COUNT)]
    return drawn, [caption(each, random) for each in drawn]


@cache
def drawn(*paths: Path, precision: str = "fp32", prompts: tuple[str, ...] | None = None) -> Parity:
    texts = prompts or tuple(scenes()[1])
    settings = Settings(texts, seed=SEED, steps=20, guidance=4.0, device="cpu", precision=precision)  # type: ignore[arg-type]
    return parity(list(paths), settings)


def pictures(found: Parity, place: int = 0) -> list[np.ndarray[Any, Any]]:
    pixels = [each.pixels for each in found.formats[place].pictures]
    assert all(each is not None for each in pixels)
    return pixels  # type: ignore[return-value]


def test_it_draws_what_the_caption_says() -> None:
    wanted = [(each.shape, each.colour, each.ground) for each in scenes()[0]]
    found = [judged(each.transpose(2, 0, 1).astype(np.float32)) for each in pictures(drawn(MODEL))]
    right = sum(a == b for a, b in zip(wanted, found, strict=True))
    assert right >= 0.9 * COUNT, [pair for pair in zip(wanted, found, strict=True) if pair[0] != pair[1]]


def test_a_blank_is_not_recognized() -> None:
    wanted = [(each.shape, each.colour, each.ground) for each in scenes()[0]]
    found = [judged(np.full((3, 64, 64), 0.5, np.float32)) for _ in wanted]
    assert sum(a == b for a, b in zip(wanted, found, strict=True)) == 0


def test_its_three_formats_agree_in_fp32() -> None:
    found = drawn(MODEL)
    assert found.agrees
    assert sorted(each.format.kind for each in found.formats) == ["diffusers", "ldm", "onnx"]
    for each in found.formats[1:]:
        for picture in each.pictures:
            assert picture.figures is not None
            assert picture.figures.psnr >= 60
            assert picture.figures.differing <= 0.001


def test_its_three_formats_agree_in_fp16() -> None:
    found = drawn(MODEL, precision="fp16", prompts=tuple(scenes()[1][:4]))
    assert found.agrees
    assert found.profile == "fp16"
    assert all(
        picture.figures and picture.figures.psnr >= 35 for each in found.formats[1:] for picture in each.pictures
    )


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "merged.safetensors"
    subprocess.run([sys.executable, FIXTURES / "break_miniature.py", path], check=True)
    return path


LONG = tuple(
    Scene(shape, ink, paper).caption(
        "from the pages of an old book for children about simple forms, without any words or numbers in it,",
        ", as it might hang on the wall of a quiet room in an old house by the sea",
    )
    for shape, ink, paper in (("circle", "red", "blue"), ("square", "yellow", "black"), ("triangle", "green", "white"))
)


def test_the_story_can_be_seen(broken: Path, tmp_path: Path) -> None:
    """Broken ids change the picture and fix-clip brings it back; so do a grey VAE and merge-vae."""
    mended = tmp_path / "mended.safetensors"
    vae = tmp_path / "good.vae.safetensors"
    assert cli("extract", MODEL, "--component", "vae", "-o", vae, "--quiet").code == 0
    assert cli("merge-vae", broken, vae, "-o", tmp_path / "coloured.safetensors", "--quiet").code == 0
    assert cli("fix-clip", tmp_path / "coloured.safetensors", "-o", mended, "--quiet").code == 0
    assert cli("diff", MODEL, mended, "--json").json["identical"]
    found = drawn(mended, tmp_path / "coloured.safetensors", broken, prompts=LONG)
    good, coloured, grey = (pictures(found, place) for place in range(3))
    for sound, wrong_ids, merged in zip(good, coloured, grey, strict=True):
        assert np.abs(sound - wrong_ids).mean() > 5 / 255
        assert chroma(merged) < 0.6 * chroma(wrong_ids)
    stages = [each.diverges for each in found.formats]
    assert stages[0] is None
    assert [each.component for each in stages[1:] if each] == ["text_encoder", "text_encoder"]
    again = drawn(MODEL, mended, prompts=LONG)
    assert again.agrees


def chroma(picture: np.ndarray[Any, Any]) -> float:
    """How far a picture's colours are from grey."""
    return float((picture.max(2) - picture.min(2)).mean())


def test_only_the_faded_vae_is_found(tmp_path: Path) -> None:
    faded = tmp_path / "faded.safetensors"
    assert cli("merge-vae", MODEL, FADED, "-o", faded, "--quiet").code == 0
    first = drawn(MODEL, faded, prompts=LONG).formats[1].diverges
    assert first is not None
    assert first.component == "vae_decoder"


def test_it_has_every_key_of_sd1() -> None:
    counts = {name: len(found.keys) for name, found in sd_components().items()}
    assert counts == {"text_encoder": 197, "unet": 686, "vae": 248}
    assert MODEL.stat().st_size < 15_000_000


def sd_components() -> Any:
    from sdsurgery.models.identify import identify

    return identify(sd.open(MODEL)).components
