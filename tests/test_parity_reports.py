"""What a comparison of formats found, as a page, a JSON document, JUnit's XML and a folder; no model is run."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import xmlschema
from conftest import ROOT, validator
from PIL import Image
from test_html import EVIL, Node, read, rows

from sdsurgery.errors import OutputError, OutputExistsError, UsageError
from sdsurgery.parity.devices import Chosen
from sdsurgery.parity.formats import LABELS, Format
from sdsurgery.parity.metrics import Array, Figures, PictureFigures
from sdsurgery.parity.results import ORDER, Compared, Parity, Picture, Stage
from sdsurgery.parity.settings import Settings
from sdsurgery.parity.tolerances import PROFILES
from sdsurgery.reports import parity as reports
from sdsurgery.reports import parity_folder, parity_junit, parity_page, parity_pictures

JUNIT = xmlschema.XMLSchema10(ROOT / "tests" / "schemas" / "junit-10.xsd")

EQUAL = Figures(True, 0.0, 1.0, math.inf, 0.0)
CLOSE = Figures(True, 1.6e-7, 1.0, 144.24, 9.5e-7)
FAR = Figures(True, 3.5e-2, 0.9, 37.3, 0.25)
STRANGE = Figures(False, math.nan, math.nan, math.nan, math.nan)
ENDLESS = Figures(True, math.inf, 0.0, -math.inf, 2.0)
SAME = PictureFigures(math.inf, 1.0, 0.0, 0)
ALMOST = PictureFigures(61.25, 0.99994, 0.0005, 1)
OTHER = PictureFigures(12.5, 0.25, 0.75, 201)
WHY = "37.3 dB, where at least 80 are wanted"

VERSIONS = {"python": "3.11.7", "torch": "2.13.0+cpu"}
HEX = {"text_encoder": "04df6106991c6c83", "unet": "3f551a3783b96625", "vae": "49f78a0db2935f92"}
NAMES = ("settings", "token ids", "text encoder", "UNet, step 1 of 3", "VAE decoder", "VAE encoder")
OF = ("settings", "tokens", "text_encoder", "unet", "vae_decoder", "vae_encoder")


def pixels(seed: int, size: tuple[int, int] = (16, 24)) -> Array:
    return np.random.default_rng(seed).random((*size, 3))


def form(kind: Any, name: str = "") -> Format:
    given = Path("/secret", name) if name else None
    return Format(kind, Path("/tmp/x"), Path("/tmp/x"), "sd1", given, name)


def stages(figures: Figures, count: int, **refused: str) -> tuple[Stage, ...]:
    """All stages of so many pictures; those of a component that is refused are so in the last one."""
    return tuple(
        Stage(
            component, name, number,  # type: ignore[arg-type]
            None if component in {"settings", "tokens"} else figures,
            refused.get(component) if number == count - 1 else None,
        )
        for component, name in zip(OF, NAMES, strict=True)
        for number in range(count if component != "settings" else 1)
    )  # fmt: skip


REFERENCE = Compared(
    form("diffusers"), "diffusers 0.42", "fp32", (),
    tuple(Picture(number, pixels(number)) for number in range(2)), (3.5, 0.25), {"UNet2DConditionModel": {"cpu": 686}},
    is_reference=True, fingerprints=HEX,
)  # fmt: skip
SINGLE = Compared(
    form("ldm", "a b.safetensors"), "diffusers 0.42", "fp32", stages(EQUAL, 2),
    tuple(Picture(number, pixels(number), SAME, (0.0, 0.0, 0.0)) for number in range(2)), (0.5, 0.25),
    {"UNet2DConditionModel": {"cpu": 686}}, fingerprints=HEX,
)  # fmt: skip
ONNX = Compared(
    form("onnx"), "ONNX Runtime 1.31", "fp32", stages(CLOSE, 2),
    tuple(Picture(n, pixels(n) + 0.001, ALMOST, (1e-7 * (n + 1), 2e-7, 4e-6)) for n in range(2)), (0.125, 0.125),
    {"unet": {"CUDAExecutionProvider": 4000, "CPUExecutionProvider": 12}, "vae_decoder": {}}, fingerprints=HEX,
)  # fmt: skip
SETTINGS = Settings(("a red circle", "a blue square"), "blurry", 7, 3, width=24, height=16)
AGREEING = Parity(SETTINGS, "fp32", Chosen("cpu", "x86_64", "there is none", VERSIONS), (REFERENCE, SINGLE, ONNX), 9.5)
BROKEN = replace(
    ONNX, stages=stages(FAR, 2, text_encoder=WHY, unet="NaN or Inf"), fingerprints=HEX | {"unet": "0" * 16}
)
DIVERGING = replace(AGREEING, formats=(REFERENCE, SINGLE, replace(BROKEN, located="layers.3.mlp.fc1")))

_IMAGE = '<img src="data:image/png;base64,'
_POLICY = "; img-src data:"


def opened(found: Parity) -> Node:
    """The page, after all that holds for every one; its pictures, which others may not have, are read as inputs."""
    page = parity_page.page(found)
    assert page.count(_POLICY) == 1
    assert page == parity_page.page(found)
    assert "/secret" not in page
    return read(page.replace(_POLICY, "").replace(_IMAGE, '<input value="'))


def texts(root: Node, tag: str) -> list[str]:
    return [" ".join(node.text.split()) for node in root.all(tag)]


def pictures(root: Node) -> list[tuple[str, Array]]:
    """What each picture is called, and what is in it."""
    found = []
    for node in root.all("input"):
        image = Image.open(io.BytesIO(base64.b64decode(node.attributes["value"], validate=True)))
        assert image.format == "PNG"
        width, height = (int(node.attributes[name]) for name in ("width", "height"))
        assert width * image.height == height * image.width
        assert ("crisp" in node.classes) == (width > image.width)
        found.append((node.attributes["alt"], np.asarray(image)))
    return found


def suites(found: Parity) -> list[ET.Element]:
    text = parity_junit.junit(found)
    assert text.isascii()
    assert text == parity_junit.junit(found)
    JUNIT.validate(text)
    return list(ET.fromstring(text))


def document(found: Parity) -> Any:
    """As it is printed, which must be JSON that every reader takes."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    printed = json.loads(json.dumps(reports.document(found)), parse_constant=refuse)
    validator("parity").validate(printed)
    return printed


# ---------------------------------------------------------------- the page


def test_formats_that_agree() -> None:
    root = opened(AGREEING)
    assert texts(root, "h1") == ["✓ All 3 formats agree"]
    listed = [[" ".join(cell.text.split()) for cell in row.walk() if cell.tag in {"th", "td"}]
              for row in root.all("tbody")[0].all("tr")]  # fmt: skip
    assert listed == [
        ["diffusers foldermade for the comparison", "the reference"],
        ["single filea b.safetensors", "✓ agrees"],
        ["ONNX foldermade for the comparison", "✓ agrees"],
    ]
    facts = dict(zip(texts(root, "dt"), texts(root, "dd"), strict=True))
    assert facts | {"Steps": "3", "Seed": "7, one more for each picture", "Negative prompt": "blurry"} == facts
    assert facts | {"Scheduler": "ddim", "Guidance": "5", "Size": "24 × 16", **VERSIONS} == facts  # noqa: RUF001
    assert texts(root, "h3") == ["Picture 1: a red circle", "Picture 2: a blue square"]
    assert "No GPU was used: there is none." in root.text
    assert not root.all("script")


def test_a_format_that_diverges() -> None:
    root = opened(DIVERGING)
    assert texts(root, "h1") == ["✗ The ONNX folder diverges at: text encoder"]
    (result,) = [row.all("td")[0].text for row in root.all("tbody")[0].all("tr") if "ONNX" in row.text]
    assert result == f"✗ diverges at: text encoder{WHY}first layer that differs: layers.3.mlp.fc1"
    table = {row[0]: row[1:] for row in rows(root, "stages")}
    assert list(table) == list(NAMES)
    assert table["token ids"] == ["✓ equal", "✓ equal"]
    assert table["text encoder"][0] == "✓ equalrelative L2 0, largest 0"
    told = f"✗ 37.3 dBdiverges: {WHY}relative L2 3.5e-02, largest 2.5e-01, in picture 2"
    assert table["text encoder"][1] == told
    assert [row[1:] for row in rows(root, "weights")] == [
        [HEX["text_encoder"], *[HEX["text_encoder"] + "= the reference's"] * 2],
        [HEX["unet"], HEX["unet"] + "= the reference's", "0" * 16 + "≠ the reference's"],
        [HEX["vae"], *[HEX["vae"] + "= the reference's"] * 2],
    ]
    assert texts(
        opened(replace(DIVERGING, formats=(REFERENCE, replace(BROKEN, format=form("ldm")), BROKEN))), "h1"
    ) == ["✗ 2 of 3 formats diverge"]


def test_pictures_beside_each_other() -> None:
    shown = pictures(opened(AGREEING))
    assert [alt for alt, _ in shown[:5]] == [
        "Picture 1, diffusers folder",
        "Picture 1, single file",
        "Picture 1, ONNX folder",
        "Picture 1, single file: difference x10",
        "Picture 1, ONNX folder: difference x10",
    ]
    assert len(shown) == 10
    reference, single, _, none, some = (image for _, image in shown[:5])
    assert np.array_equal(reference, np.rint(pixels(0) * 255))
    assert np.array_equal(reference, single)
    assert set(none.ravel()) == {128}
    assert set(some.ravel()) == {130}


def test_figures_of_pictures() -> None:
    wrong = replace(BROKEN, pictures=(Picture(0, pixels(5), OTHER, (), "12.5 dB"), BROKEN.pictures[1]))
    table = rows(opened(replace(AGREEING, formats=(REFERENCE, SINGLE, wrong))), "figures")
    assert table == [
        ["Picture 1", "✓ equalSSIM 1.0000, 0.00% of pixels differ, largest difference of bytes 0",
         "✗ 12.5 dBdiverges: 12.5 dBSSIM 0.2500, 75.00% of pixels differ, largest difference of bytes 201"],
        ["Picture 2", "✓ equalSSIM 1.0000, 0.00% of pixels differ, largest difference of bytes 0",
         "✓ 61.2 dBSSIM 0.9999, 0.05% of pixels differ, largest difference of bytes 1"],
    ]  # fmt: skip


def test_where_it_ran() -> None:
    table = {row[0]: row[1:] for row in rows(opened(AGREEING), "ran")}
    assert table["single file"] == ["diffusers 0.42", "fp32", "0.38", "UNet2DConditionModel: cpu (686 weights)"]
    graphs = "unet: CUDAExecutionProvider (4,000 nodes), CPUExecutionProvider (12 nodes)vae_decoder: nothing"
    assert table["ONNX folder"] == ["ONNX Runtime 1.31", "fp32", "0.12", graphs]
    idle = replace(AGREEING, formats=(REFERENCE, replace(SINGLE, proof={}, seconds=(), fingerprints={})))
    root = opened(idle)
    assert rows(root, "ran")[1][1:] == ["diffusers 0.42", "fp32", "0.00", "no network ran"]
    assert {row[2] for row in rows(root, "weights")} == {"–"}  # noqa: RUF001


@pytest.mark.parametrize("profile", PROFILES)
def test_the_bounds_are_those_of_the_profile(profile: str) -> None:
    bounds = PROFILES[profile]
    listed = [item.text for item in opened(replace(AGREEING, profile=profile)).all("ul")[0].all("li")]
    assert f"at least {bounds.tensor:g} dB" in listed[1]
    assert f"at most {bounds.relative:g}." in listed[1]
    assert f"at least {bounds.picture:g} dB" in listed[2]
    assert ("pixels" in listed[2]) == (bounds.differing is not None)


def test_hostile_texts_are_text() -> None:
    odd = ("<script>alert(1)</script>", EVIL, "\0\ud800\x1b[31m]]>", "y" * 9999)
    drawn = tuple(replace(SINGLE.pictures[0], number=number) for number in range(4))
    bad = replace(
        SINGLE, format=form("ldm", EVIL), software=EVIL, stages=stages(FAR, 4, unet=f"it fails: {EVIL}"),
        pictures=drawn, proof={EVIL: {EVIL: 1}}, fingerprints={EVIL: EVIL}, located=EVIL,
    )  # fmt: skip
    found = replace(
        AGREEING, settings=replace(SETTINGS, prompts=odd, negative=EVIL),
        chosen=Chosen(EVIL, EVIL, EVIL, {EVIL: EVIL}), formats=(replace(REFERENCE, pictures=drawn), bad),
    )  # fmt: skip
    root = opened(found)
    shown = EVIL.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    heads = texts(root, "h3")
    assert heads[:2] == [f"Picture 1: {odd[0]}", f"Picture 2: {shown}"]
    assert heads[2] == "Picture 3: \\x00\\ud800\\x1b[31m]]>"
    assert heads[3] == f"Picture 4: {'y' * 500}… (9,999 characters)"
    assert f"first layer that differs: {shown}" in root.text
    (suite,) = suites(found)
    assert suite.get("name") == f"single file {shown}"
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == f"it fails: {shown}"
    assert all(line.isprintable() for case in suite.iterfind("testcase/*") for line in str(case.text).split("\n"))


def test_pictures_that_failed() -> None:
    """One that couldn't be drawn, one of NaN, and a reference without one."""
    nothing = Picture(0, None, refusal="it couldn't be drawn")
    hollow = Picture(1, np.full((16, 24, 3), np.nan), refusal="1,152 of its 1,152 values are NaN or Inf")
    bad = replace(SINGLE, stages=(), pictures=(nothing, hollow))
    blind = replace(REFERENCE, pictures=(nothing, REFERENCE.pictures[1]))
    lost = replace(ONNX, pictures=(Picture(0, pixels(0), refusal="the reference has no picture"), ONNX.pictures[1]))
    found = replace(AGREEING, formats=(blind, bad, lost))
    root = opened(found)
    assert texts(root, "h1") == ["✗ 3 of 3 formats diverge"]
    assert "the reference, ✗ wrong by itself at: picture 1it couldn't be drawn" in root.text
    assert [alt for alt, _ in pictures(root)] == [
        "Picture 1, ONNX folder",
        *(f"Picture 2, {name}" for name in ("diffusers folder", "single file", "ONNX folder")),
        *(f"Picture 2, {name}: difference x10" for name in ("single file", "ONNX folder")),
    ]
    (black,) = [image for alt, image in pictures(root) if alt == "Picture 2, single file: difference x10"]
    assert set(black.ravel()) != {128}, "NaN isn't equal"
    assert rows(root, "stages")[0] == ["settings", "not compared", "✓ equal"]
    assert [suite.get("failures") for suite in suites(found)] == ["1", "2", "1"]
    assert {Image.open(io.BytesIO(parity_pictures.sheet(found))).format} == {"PNG"}
    document(found)


def test_figures_that_are_none() -> None:
    odd = (
        Stage("unet", "UNet", 0, None, "it fails: no"), Stage("text_encoder", "text encoder", 0, STRANGE, "NaN or Inf"),
        Stage("vae_encoder", "VAE encoder", 1, ENDLESS, "-inf dB"), Stage("tokens", "token ids", 1, None, "other ids"),
    )  # fmt: skip
    found = replace(AGREEING, formats=(REFERENCE, replace(SINGLE, stages=odd, pictures=(
        Picture(0, pixels(0), PictureFigures(math.nan, math.nan, 1.0, 255), (math.nan, math.inf, 0.0), "nan dB"),
        Picture(1, pixels(1), SAME),
    ))))  # fmt: skip
    root = opened(found)
    assert rows(root, "stages") == [
        ["token ids", "✗ differsdiverges: other idsin picture 2"],
        ["text encoder", "✗ not finitediverges: NaN or Infin picture 1"],
        ["UNet", "✗ differsdiverges: it fails: noin picture 1"],
        ["VAE encoder", "✗ -inf dBdiverges: -inf dBrelative L2 Inf, largest 2.0e+00, in picture 2"],
    ]
    assert rows(root, "drift") == [["1", "NaN"], ["2", "Inf"], ["3", "0"]]
    single = document(found)["formats"][1]
    assert [stage.get("psnr", "none") for stage in single["stages"]] == ["none", None, None, "none"]
    assert single["pictures"][0]["curve"] == [None, None, 0.0]
    assert "-inf dB" in reports.told(odd[2])


def test_long_runs_show_what_diverges_first() -> None:
    count = 30
    drawn = tuple(Picture(number, pixels(0), SAME, (1e-9 * (number + 1),)) for number in range(count))
    bad = (*drawn[:-1], replace(drawn[-1], refusal="12.5 dB"))
    each = replace(ONNX, stages=stages(CLOSE, count), pictures=bad)
    found = replace(
        AGREEING, settings=replace(SETTINGS, prompts=tuple(f"p{number}" for number in range(count)), steps=1),
        formats=(replace(REFERENCE, pictures=drawn), each),
    )  # fmt: skip
    root = opened(found)
    heads = texts(root, "h3")
    assert heads[:19] == [f"Picture {number + 1}: p{number}" for number in range(19)]
    assert heads[19:] == ["Picture 30: p29"]
    assert "The page shows 20 of 30 prompts" in root.text
    assert len(root.all("polyline")) == 16
    assert "14 lines more would not fit in" in root.text
    assert len(rows(root, "figures")) == count


# ---------------------------------------------------------------- the drawing


def points(line: Node) -> list[tuple[float, float]]:
    return [tuple(map(float, point.split(","))) for point in line.attributes["points"].split()]  # type: ignore[misc]


def test_the_drawing_is_true_to_its_figures() -> None:
    ways = ((1e-6, 1e-4, 1e-2), (0.0, 1e-5, math.nan))
    each = replace(ONNX, pictures=tuple(replace(ONNX.pictures[n], curve=way) for n, way in enumerate(ways)))
    root = opened(replace(AGREEING, formats=(REFERENCE, SINGLE, each)))
    single, *lines = sorted(
        (node for node in root.all("g") if "line" in node.classes),
        key=lambda node: node.all("text")[0].text,
        reverse=True,
    )
    assert single.all("text")[0].text == "single file: all"
    labels = {node.all("text")[0].text: points(node.all("polyline")[0]) for node in lines}
    assert set(labels) == {"ONNX folder: 1", "ONNX folder: 2"}
    straight, odd = labels["ONNX folder: 1"], labels["ONNX folder: 2"]
    assert straight[0][1] - straight[1][1] == pytest.approx(straight[1][1] - straight[2][1], abs=0.2)
    assert [across for across, _ in straight] == [across for across, _ in odd]
    bottom = {down for _, down in points(single.all("polyline")[0])}
    assert bottom == {odd[0][1]}, "an exact 0 lies at the bottom"
    assert odd[0][1] > straight[0][1] > odd[1][1] > straight[2][1] > odd[2][1]
    ticks = {node.text: float(node.attributes["y"]) - 4 for node in root.all("text") if "tick" in node.classes}
    assert ticks["0"] == odd[0][1]
    assert ticks["1e-4"] == pytest.approx(straight[1][1], abs=0.2)
    assert ticks["NaN, Inf"] == odd[2][1]
    assert rows(root, "drift") == [
        ["1", "0", "0", "1.0e-06", "0"],
        ["2", "0", "0", "1.0e-04", "1.0e-05"],
        ["3", "0", "0", "1.0e-02", "NaN"],
    ]
    levels = sorted(float(node.all("text")[0].attributes["y"]) for node in [single, *lines])
    assert min(b - a for a, b in itertools.pairwise(levels)) >= 14


@pytest.mark.parametrize("curve", [(0.0,), (5e-324, 1e300), (1.0,) * 50, (1e-7,), (math.inf,)])
def test_every_curve_stays_inside_its_drawing(curve: tuple[float, ...]) -> None:
    each = replace(SINGLE, pictures=tuple(replace(picture, curve=curve) for picture in SINGLE.pictures))
    settings = replace(SETTINGS, steps=len(curve))
    root = opened(replace(AGREEING, settings=settings, formats=(REFERENCE, each)))
    (line,) = root.all("polyline")
    assert len(points(line)) == len(curve)
    for across, down in points(line):
        assert 64 <= across <= 464
        assert 14 <= down <= 234
    assert len([node for node in root.all("text") if "tick" in node.classes]) < 22


def test_no_way_at_all_has_no_drawing() -> None:
    bare = tuple(replace(picture, curve=()) for picture in SINGLE.pictures)
    root = opened(replace(AGREEING, formats=(REFERENCE, replace(SINGLE, pictures=bare))))
    assert root.all("svg") == []


def test_two_of_one_kind_have_their_names() -> None:
    two = replace(ONNX, format=form("ldm", "c.safetensors"))
    root = opened(replace(AGREEING, formats=(REFERENCE, SINGLE, two)))
    heads = [head.text for head in root.all("thead")[1].all("th")]
    assert heads == ["Stage", "single file a b.safetensors", "single file c.safetensors"]
    assert "…" in "".join(node.all("text")[0].text for node in root.all("g"))


# ---------------------------------------------------------------- JUnit


def test_a_suite_for_each_format_and_a_test_for_each_stage_of_each_picture() -> None:
    single, broken = suites(DIVERGING)
    assert (single.get("name"), broken.get("name")) == ("single file a b.safetensors", "ONNX folder (made)")
    cases = [str(case.get("name")) for case in single.iter("testcase")]
    assert len(cases) == len(set(cases)) == 1 + 2 * 5 + 2
    assert (single.get("failures"), broken.get("failures")) == ("0", "2")
    failed = {case.get("name"): case[0] for case in broken.iter("testcase") if case.find("failure") is not None}
    assert set(failed) == {"text encoder, picture 2", "UNet, step 1 of 3, picture 2"}
    assert failed["text encoder, picture 2"].get("message") == WHY
    assert "relative L2 3.5e-02" in str(failed["text encoder, picture 2"].text)
    properties = {each.get("name"): each.get("value") for each in broken.iter("property")}
    assert properties | {"tolerance": "fp32", "prompt 2": "a blue square", "reference": "diffusers folder (made)"} == (
        properties
    )


def test_a_stage_that_fails_twice_is_one_test() -> None:
    twice = tuple(Stage("text_encoder", "text encoder", 0, None, f"it fails: {why}") for why in "ab")
    (suite,) = suites(replace(AGREEING, formats=(REFERENCE, replace(SINGLE, stages=twice, pictures=()))))
    (failure,) = suite.iter("failure")
    assert failure.get("message") == "it fails: a; it fails: b"


def test_a_reference_that_is_wrong_by_itself_fails() -> None:
    wrong = replace(REFERENCE, stages=(Stage("vae_encoder", "VAE encoder", 0, None, "it fails: no"),))
    found = replace(AGREEING, formats=(wrong, SINGLE))
    assert not found.agrees
    assert [suite.get("failures") for suite in suites(found)] == ["1", "0"]


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("found", [AGREEING, DIVERGING], ids=["agreeing", "diverging"])
def test_the_document(found: Parity) -> None:
    printed = document(found)
    assert printed["agrees"] is found.agrees
    assert [each["reference"] for each in printed["formats"]] == [True, False, False]
    assert [each["fingerprints"] for each in printed["formats"]] == [dict(each.fingerprints) for each in found.formats]
    assert printed["formats"][1]["path"] == "/secret/a b.safetensors"
    last = printed["formats"][2]
    assert last["diverges"] == (None if found.agrees else {"component": "text_encoder", "stage": "text encoder"})
    assert last["located"] == (None if found.agrees else "layers.3.mlp.fc1")
    assert last["ran_on"]["unet"] == {"CUDAExecutionProvider": 4000, "CPUExecutionProvider": 12}


def test_the_schema_is_strict() -> None:
    """An unknown field, a wrong name or a wrong type is no valid document, and nothing may be missing."""
    printed, check = document(DIVERGING), validator("parity")
    for path, value in (
        (("more",), 1), (("agrees",), "yes"), (("profile",), "auto"), (("settings", "width"), 20),
        (("settings", "scheduler"), "lcm"), (("device", "device"), "tpu"), (("verdict",), []), (("formats",), []),
        (("formats", 1, "kind"), "gguf"), (("formats", 1, "fingerprints", "unet"), "xyz"),
        (("formats", 2, "diverges", "component"), "clip"), (("formats", 1, "ran_on", "unet"), {"cpu": -1}),
        (("formats", 1, "stages", 2, "psnr"), "inf"), (("formats", 1, "pictures", 0, "differing"), 1.5),
    ):  # fmt: skip
        changed = json.loads(json.dumps(printed))
        inner: Any = changed
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        assert not check.is_valid(changed), path
    for name in printed:
        assert not check.is_valid({key: value for key, value in printed.items() if key != name}), name
    for name in printed["formats"][0]:
        changed = json.loads(json.dumps(printed))
        del changed["formats"][0][name]
        with pytest.raises(jsonschema.ValidationError, match="required"):
            check.validate(changed)


def test_the_schema_knows_every_name() -> None:
    known = validator("parity").schema["$defs"]
    assert known["component"]["enum"] == list(ORDER)
    assert known["format"]["properties"]["kind"]["enum"] == list(LABELS)
    assert validator("parity").schema["properties"]["profile"]["enum"] == list(PROFILES)


@pytest.mark.parametrize("guidance", [math.inf, -math.inf, math.nan])
def test_a_guidance_that_is_no_number_is_refused(guidance: float) -> None:
    with pytest.raises(UsageError, match="guidance"):
        replace(SETTINGS, guidance=guidance)


# ---------------------------------------------------------------- the folder


def test_a_report_is_four_files_and_the_same_every_time(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    parity_folder.refuse(folder, [tmp_path / "model.safetensors"], force=False)
    parity_folder.write(DIVERGING, folder, force=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"index.html", "sheet.png", "parity.json", "junit.xml"}
    validator("parity").validate(json.loads(before["parity.json"]))
    JUNIT.validate(before["junit.xml"].decode())
    parity_folder.write(DIVERGING, folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert re.search(rb"<h1[^>]*>\xe2\x9c\x97 The ONNX folder", before["index.html"])


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    parity_folder.write(AGREEING, folder, force=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputExistsError, match="a report already") as caught:
        parity_folder.refuse(folder, [], force=False)
    assert "--force" in str(caught.value.remedy)
    parity_folder.refuse(folder, [], force=True)
    with pytest.raises(OutputExistsError):
        parity_folder.write(DIVERGING, folder, force=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="other things than a report"):
        parity_folder.refuse(folder, [], force=True)
    with pytest.raises(OutputExistsError, match="one of the inputs"):
        parity_folder.refuse(folder, [folder], force=True)
    with pytest.raises(OutputExistsError, match="other things"):
        parity_folder.refuse(folder / "mine.txt", [], force=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    parity_folder.refuse(empty, [], force=True)
    with pytest.raises(OutputExistsError, match="it exists"):
        parity_folder.refuse(empty, [], force=False)
    with pytest.raises(OutputExistsError, match="lies in it"):
        parity_folder.refuse(folder / "report", [folder], force=True)
    with pytest.raises(OutputError, match="no such folder"):
        parity_folder.refuse(tmp_path / "none" / "report", [], force=True)
