"""Reports as HTML pages: what they say, that it is true, and that a page loads and runs nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import FIXTURES, cli, write

import sdsurgery as sd
from sdsurgery.inspection.diffing import Diff, Renamed, diff
from sdsurgery.inspection.explaining import Explanation
from sdsurgery.inspection.findings import DONOR, Finding, Mend, Verification
from sdsurgery.inspection.rules import RULES
from sdsurgery.models.regions import KINDS, OTHER, regions
from sdsurgery.models.walks import ClipConfig, OpenClipConfig, UNetConfig, VaeConfig, links
from sdsurgery.reports import html

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
EVIL = '<script>alert(1)</script>"onload=x \x1b[2J\u202e'

_VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


@dataclass
class Node:
    """An element, with its children and texts in order."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str) -> list[Node]:
        return [node for node in self.walk() if node.tag == tag]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        assert len(node.attributes) == len(attrs), attrs
        self.open[-1].children.append(node)
        if tag not in _VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: str) -> Node:
    """The page, after what holds for every one: it is whole, accessible, and refers to nothing outside."""
    assert page.startswith("<!doctype html>\n")
    assert all(c.isprintable() or c == "\n" for c in page)
    reader = Reader()
    reader.feed(page)
    reader.close()
    root = reader.root
    assert reader.open == [root]
    nodes = list(root.walk())
    assert not {node.tag for node in nodes} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(set(ids)) == len(ids)
    for node in nodes:
        for name, value in node.attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "style", "action", "data"}
            assert "://" not in value
            if name in {"href", "aria-labelledby"}:
                assert value.removeprefix("#") in ids
            if name == "href":
                assert value.startswith("#")
    (style,) = root.all("style")
    assert "@import" not in style.text
    assert "url(" not in style.text
    assert {policy.attributes["content"] for policy in root.all("meta") if "http-equiv" in policy.attributes} == {
        "default-src 'none'; style-src 'unsafe-inline'"
    }
    (document,) = root.all("html")
    assert document.attributes["lang"] == "en"
    assert root.all("title")[0].text
    assert len(root.all("h1")) == 1
    for table in root.all("table"):
        columns = {sum(cell.tag in {"th", "td"} for cell in row.walk()) for row in table.all("tr")}
        assert len(columns) == 1
        heads = table.all("thead")[0].all("th")
        assert {head.attributes["scope"] for head in heads} == {"col"}
    for drawing in root.all("svg"):
        assert drawing.attributes.get("role") == "img" or drawing.attributes.get("aria-hidden") == "true"
    return root


def rows(root: Node, section: str) -> list[list[str]]:
    """The texts of the table under a heading of that id."""
    (found,) = [node for node in root.all("section") if node.attributes.get("aria-labelledby") == section]
    return [[cell.text for cell in row.walk() if cell.tag in {"th", "td"}] for row in found.all("tbody")[0].all("tr")]


def page_of(one: dict[str, Any], other: dict[str, Any], **options: Any) -> tuple[Diff, Node]:
    found = diff(sd.Checkpoint.from_state_dict(one), sd.Checkpoint.from_state_dict(other))
    return found, read(html.diff_page(found, ("a", "b"), **options))


def noisy(tensors: dict[str, Any], *marks: str, scale: float = 1e-3) -> dict[str, Any]:
    """The tensors, those with a mark in their key changed, each by another amount."""
    changed = dict(tensors)
    for place, key in enumerate(key for key in tensors if any(mark in key for mark in marks)):
        noise = synthetic.values(key, tensors[key].shape, "float32", seed=5)
        changed[key] = (tensors[key] + noise * np.float32(scale * (1 + place % 9))).astype(tensors[key].dtype)
    return changed


# ---------------------------------------------------------------- regions

CONFIGS = [
    ("unet" if UNET in prefix else "vae" if VAE in prefix else "text_encoder", config)
    for family, widths in synthetic.NARROW.items()
    for prefix, config in synthetic.configs(family, widths).items()
] + [
    ("unet", UNetConfig(depths=(1, 2), middle=2, linear=True, channels=(4, 8), residual=3)),
    ("vae", VaeConfig(residual=1, channels=(2, 4))),
    ("text_encoder_2", ClipConfig(layers=3, projected=True)),
    ("text_encoder", OpenClipConfig(layers=3, penultimate=True)),
]


@pytest.mark.parametrize(("component", "config"), CONFIGS)
def test_every_weight_of_every_walk_has_a_region(component: str, config: Any) -> None:
    names = [weight.name for link in links(config) for weight in link.diffusers or (link.ldm,)]
    found = regions(component, names)
    assert list(found) == names
    assert not [name for name, region in found.items() if region.block == OTHER or region.kind.id == "other"]
    labels = {region.block.label: region.block for region in found.values()}
    assert len(labels) == len({region.block for region in found.values()})


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_unet_blocks_are_ldms(family: str) -> None:
    """ldm numbers its blocks in its own keys, which says whether ours are the same."""
    ends = {"time_embed": "time", "label_emb": "vector", "middle_block": "MID", "out": "final"}
    config = synthetic.configs(family, synthetic.NARROW[family])[UNET]
    found = regions("unet", [weight.name for link in links(config) for weight in link.diffusers])
    for link in links(config):
        part, _, rest = link.ldm.name.partition(".")
        side = {"input_blocks": "IN", "output_blocks": "OUT"}.get(part)
        expected = f"{side} {int(rest.split('.')[0]):02}" if side else ends[part]
        assert found[link.diffusers[0].name].block.label == expected


def test_regions_of_names_that_tell() -> None:
    config = synthetic.configs("sdxl", synthetic.NARROW["sdxl"])[UNET]
    found = regions("unet", [weight.name for link in links(config) for weight in link.diffusers])
    told = {name: (region.block.label, region.kind.id) for name, region in found.items()}
    block = "down_blocks.1.attentions.1"
    assert told["down_blocks.0.resnets.1.conv1.weight"] == ("IN 02", "conv")
    assert told["down_blocks.0.downsamplers.0.conv.bias"] == ("IN 03", "resample")
    assert told[f"{block}.transformer_blocks.1.attn2.to_k.weight"] == ("IN 05", "cross.k")
    assert told[f"{block}.proj_out.bias"] == ("IN 05", "transformer.out")
    assert told["up_blocks.0.upsamplers.0.conv.weight"] == ("OUT 02", "resample")
    assert told["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"] == ("MID", "self.q")
    order = list(dict.fromkeys(region.block for region in found.values()))
    assert sorted(order) == order, "blocks come in the order of the walk, which is that of the data"


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_strange_names_have_a_place_of_their_own(component: str) -> None:
    names = ["", ".weight", EVIL, "down_blocks.9999.resnets.0.conv1.weight", "mid_block.resnets.0.\n", "encoder.\u0663"]
    assert {region.block for region in regions(component, names).values()} == {OTHER}


def test_a_stray_name_renumbers_nothing() -> None:
    config = synthetic.configs("sd1", synthetic.NARROW["sd1"])[UNET]
    names = [weight.name for link in links(config) for weight in link.diffusers]
    found = regions("unet", [*names, "down_blocks.2.resnets.14.conv1.weight"])
    assert {name: found[name] for name in names} == regions("unet", names)


# ---------------------------------------------------------------- diff


def test_every_changed_tensor_is_in_the_table_the_largest_first() -> None:
    a = synthetic.model("sd1")
    found, root = page_of(a, noisy(a, "attn1", VAE + "decoder"))
    table = rows(root, "changed")
    assert {row[0] for row in table} == {change.key for change in found.changed}
    assert len(table) == len(found.changed) > 100
    sizes = [float(row[4]) for row in table]
    assert sizes == sorted(sizes, reverse=True)
    assert root.all("h1")[0].text == "The unet and the vae differ"
    (words,) = [row.text for row in root.all("tbody")[0].all("tr") if row.text.startswith("text_encoder")]
    assert words.endswith("identical")


def test_the_page_says_what_the_terminal_says(tmp_path: Path) -> None:
    model, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(model, synthetic.model("sd1"))
    assert cli("merge-vae", model, FIXTURES / "vae.safetensors", "-o", other).code == 0
    page = tmp_path / "page.html"
    result = cli("diff", model, other, "--html", page)
    assert result.code == 1
    assert f"wrote {page}" in result.out
    root = read(page.read_text("utf-8"))
    assert root.all("h1")[0].text == "Only the vae differs"
    assert "only the vae differs" in result.out
    header = root.all("header")[0].text
    assert "A: a.safetensors (ldm sd1)" in header
    assert "B: b.safetensors (ldm sd1)" in header
    assert str(tmp_path) not in page.read_text("utf-8").replace("sdsurgery", "")
    counts = {row.all("th")[0].text: row.text for row in root.all("tbody")[0].all("tr")}
    assert counts["unet"] == "unet0686identical"
    for line in re.findall(r"^  (\S+)  F16", result.out, re.MULTILINE):
        assert line in root.text


def test_identical() -> None:
    a = synthetic.model("sd1")
    _, root = page_of(a, a)
    assert root.all("h1")[0].text == "Identical"
    assert root.all("figure") == []
    assert [node.attributes["id"] for node in root.all("h2")] == []


def test_across_layouts(tmp_path: Path) -> None:
    single, folder, page = (
        write(tmp_path / "a.safetensors", synthetic.model("sd2")),
        tmp_path / "b",
        tmp_path / "p.html",
    )
    assert cli("convert", single, folder).code == 0
    assert cli("diff", single, folder, "--html", page, "--quiet").code == 0
    root = read(page.read_text("utf-8"))
    assert root.all("h1")[0].text == "Identical in everything that both layouts hold"
    assert any("resblocks.23" in row[0] for row in rows(root, "not-comparable"))


def drawn(root: Node, component: str) -> dict[tuple[str, str], Node]:
    """The cells of a picture by block and kind, as their tooltips name them."""
    (figure,) = [node for node in root.all("figure") if node.all("figcaption")[0].text == component]
    cells = {}
    for node in figure.walk():
        if "cell" in node.classes:
            where = node.all("title")[0].text.split("\n")[0]
            match = re.fullmatch(r"(.+?) \(.+?\), (.+)", where)
            assert match, where
            cells[match[1], match[2]] = node
    return cells


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_cells_are_what_a_naive_computation_says(family: str) -> None:
    a = synthetic.model(family, dtype="float32")
    b = noisy(a, "attn2.to_k", "output_blocks.5", "middle_block.0", scale=0.01)
    found, root = page_of(a, b)
    cells = drawn(root, "unet")
    config = synthetic.configs(family, synthetic.NARROW[family])[UNET]
    places = regions("unet", [weight.name for link in links(config) for weight in link.diffusers])
    largest: dict[tuple[str, str], float] = {}
    for link in links(config):
        place = places[link.diffusers[0].name]
        before, after = (side[UNET + link.ldm.name].astype(np.float64) for side in (a, b))
        change = float(np.linalg.norm(after - before) / np.linalg.norm(before))
        where = place.block.label, place.kind.words
        largest[where] = max(largest.get(where, 0.0), change)
    assert cells.keys() == largest.keys()
    for where, value in largest.items():
        text, look = cells[where].all("text")[0].text, cells[where].classes
        if value == 0:
            assert (text, "same" in look) == ("=", True)
            continue
        assert text == html.brief(value)
        assert f"s{html.step(value)}" in look
        assert f"largest relative L2 {value:.3g}: " in cells[where].all("title")[0].text
    assert "text_encoder" not in {figure.all("figcaption")[0].text for figure in root.all("figure")}
    (figure,) = root.all("figure")
    listed = [
        [cell.text for cell in row.walk() if cell.tag in {"td", "th"}] for row in figure.all("table")[0].all("tr")
    ]
    kinds = listed[0][1:]
    for block, *values in listed[1:]:
        for kind, value in zip(kinds, values, strict=True):
            number = largest.get((block, kind))
            assert value == ("" if number is None else "=" if number == 0 else f"{number:.3g}")
    assert found.fates.keys() >= {("unet", name) for name in places}


def test_what_a_cell_says_that_has_no_number() -> None:
    layer = TEXT + "encoder.layers."
    a = synthetic.model("sd1") | {layer + "1.layer_norm1.bias": np.zeros(8, np.float16)}
    b = synthetic.model("sd1")
    b[layer + "2.mlp.fc1.weight"] = b[layer + "2.mlp.fc1.weight"].astype(np.float32)
    b[layer + "3.mlp.fc1.bias"] = np.zeros(5, np.float16)
    del b[layer + "4.layer_norm2.bias"], a[layer + "5.layer_norm2.bias"]
    b[layer + "6.self_attn.v_proj.bias"] = np.full(8, np.nan, np.float16)
    _, root = page_of(a, b)
    cells = drawn(root, "text_encoder")

    def look(block: int, words: str) -> tuple[str, bool]:
        cell = cells[f"layer {block}", words]
        return cell.all("text")[0].text, "marked" in cell.classes

    assert look(1, "norms") == ("∞", False)
    assert look(2, "feed-forward in") == ("T", False)
    assert look(3, "feed-forward in") == ("≠", True)
    assert look(4, "norms") == ("\N{MINUS SIGN}", True)
    assert look(5, "norms") == ("+", True)
    assert look(6, "self attention v") == ("0", True)
    assert look(7, "norms") == ("=", False)
    assert "1 with NaN or Inf" in cells["layer 6", "self attention v"].all("title")[0].text
    assert [row[0] for row in rows(root, "removed")] == [layer + "4.layer_norm2.bias"]
    assert [row[0] for row in rows(root, "added")] == [layer + "5.layer_norm2.bias"]


def test_a_component_of_no_known_kind_has_no_picture() -> None:
    a = {f"model.diffusion_model.strange.{place}": np.ones(3, np.float16) for place in range(9)}
    b = a | {"model.diffusion_model.strange.3": np.zeros(3, np.float16)}
    found, root = page_of(a, b)
    assert len(found.changed) == 1
    assert root.all("figure") == []


def test_scale() -> None:
    assert [html.step(value) for value in (0, 9e-6, 1e-5, 1e-3, 0.999, 1, 50, math.inf)] == [0, 0, 1, 5, 10, 11, 11, 11]
    numbers = (0, 1e-10, 0.00042, 0.0949, 0.0951, 0.96, 9.96, 99.4, 99.6, 1e300, math.inf)
    said = [html.brief(value) for value in numbers]
    assert said == ["0", "1e-10", "4e-4", "9e-2", "0.1", "1.0", "10", "99", "1e2", "1e300", "∞"]
    assert html.figure(None) == html.figure(math.nan) == "\N{EN DASH}"


def test_hostile_names_and_values_are_text(tmp_path: Path) -> None:
    a = synthetic.model("sd1")
    key = UNET + EVIL
    one = write(tmp_path / "a.safetensors", a | {key: np.ones(2, np.float16), EVIL: np.ones(2, np.float16)}, {"x": "1"})
    two = write(tmp_path / "<b>&.safetensors", a | {key: np.zeros(2, np.float16)}, {"x": EVIL, EVIL: "y" * 9999})
    page = tmp_path / "page.html"
    assert cli("diff", one, two, "--html", page, "--quiet").code == 1
    root = read(page.read_text("utf-8"))
    shown = EVIL.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert [row[0] for row in rows(root, "changed")] == [UNET + shown]
    assert [row[0] for row in rows(root, "removed")] == [shown]
    metadata = {row[0]: row[2] for row in rows(root, "metadata")}
    assert metadata["x"] == shown
    assert metadata[shown].startswith("yyyy")
    assert metadata[shown].endswith("(9,999 characters)")
    assert len(metadata[shown]) < 600
    assert "<b>&.safetensors" in root.all("title")[0].text


def test_long_tables_say_what_they_leave_out() -> None:
    a = synthetic.model("sdxl")
    found, root = page_of(a, noisy(a, UNET, "embedders", scale=0.1))
    assert len(rows(root, "changed")) == 2000 < len(found.changed)
    assert f"The first 2,000 of {len(found.changed):,} tensors" in root.text
    renamed = replace(found, renamed=tuple(Renamed(f"a{place}", f"b{place}", "unet") for place in range(2001)))
    assert len(rows(read(html.diff_page(renamed, ("a", "b"))), "renamed")) == 2000


def test_explanations_and_names_of_the_registry() -> None:
    a = synthetic.model("sd1")
    said = [Explanation("unet", 0.3, "computed in fp32", 1.0, 686), Explanation("vae", 0.5, "by lerp in fp32", 0.9, 9)]
    _, root = page_of(a, noisy(a, UNET), explanations=said, third="c<3", known={"vae": "orangemix"})
    (listed,) = [node for node in root.all("ul") if "said" in node.classes]
    assert [item.text.replace("\N{MULTIPLICATION SIGN}", "x") for item in listed.all("li")] == [
        "The unet of B is 0.7 x a + 0.3 x c<3, computed in fp32: every element to the bit.",
        "The vae of B is 0.5 x a + 0.5 x c<3, by lerp in fp32: 90.00% of elements to the bit.",
        "The vae of B is known as orangemix.",
    ]


def test_same_models_same_bytes(tmp_path: Path) -> None:
    a = synthetic.model("sd1")
    b = noisy(a, "attn")
    pages = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        files = write(folder / "a.safetensors", a), write(folder / "b.safetensors", b)
        assert cli("diff", *files, "--html", folder / "page.html", "--quiet").code == 1
        pages.append((folder / "page.html").read_bytes())
    assert pages[0] == pages[1]


# ---------------------------------------------------------------- the option


def test_html_goes_with_the_other_options(tmp_path: Path) -> None:
    one, other = (write(tmp_path / f"{seed}.safetensors", synthetic.model("sd1", seed=seed)) for seed in (0, 1))
    page = tmp_path / "page.html"
    texts = set()
    for words in (["--json"], ["--stat"], ["--quiet"], []):
        result = cli("diff", one, other, "--html", page, *words)
        assert result.code == 1
        assert result.out == "" or "--quiet" not in words
        if "--json" in words:
            assert result.json["identical"] is False
        texts.add(page.read_text("utf-8"))
    assert len(texts) == 1
    assert cli("diff", one, other, "--html", page, "--atol", "9").code == 0


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    one, other = (write(tmp_path / f"{seed}.safetensors", synthetic.model("sd1", seed=seed)) for seed in (0, 1))
    third = write(tmp_path / "2.safetensors", synthetic.model("sd1", seed=2))
    before = {path: path.read_bytes() for path in (one, other, third)}
    link = tmp_path / "link.html"
    link.symlink_to(other)
    for target in (one, other, link, third, tmp_path, tmp_path / "no" / "page.html"):
        result = cli("diff", one, other, "--html", target)
        assert (result.code, result.out) == (4, "")
    assert cli("diff", one, other, "--explain-with", third, "--html", third).code == 4
    assert "one of the inputs" in cli("diff", one, other, "--html", one).err
    assert "no HTML file" in cli("diff", one, other, "--html", third).err
    assert cli("diff", one, tmp_path / "nothing", "--html", third).code == 4, "the highest code counts"
    assert {path: path.read_bytes() for path in before} == before
    page = tmp_path / "page.html"
    for content in (b"", b"<!DOCTYPE HTML><p>old"):
        page.write_bytes(content)
        assert cli("diff", one, other, "--html", page, "--quiet").code == 1
        read(page.read_text("utf-8"))
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- verify

MODEL = Path("/secret/folder/model <1>.safetensors")
IDS = Finding(
    "position-ids-wrong", "error", "76 is missing", str(MODEL), TEXT + "embeddings.position_ids", "text_encoder",
    "0 to 76", "0 to 75.9", mend=Mend(("sdsurgery", "fix-clip", "a b.safetensors"), safe=True),
)  # fmt: skip
ALLOWED = Finding("key-unknown", "warning", "a key that nobody knows", key=EVIL, allowed="kept for <training>")
NAN = [
    Finding("value-nan", "error", f"{place} NaN", key=f"k{place}", remedy="take another copy",
            mend=Mend(("sdsurgery", "replace", DONOR, f"k{place}")))
    for place in range(3)
]  # fmt: skip
EMA = [Finding("leftovers", "note", "EMA", key=f"model_ema.{place}", component="ema") for place in range(502)]
CHECKED = Verification(
    MODEL, "safetensors", "ldm", "sd1", "a1111",
    ("position-ids-wrong", "value-nan", "key-unknown", "leftovers", "pickle"),
    (IDS, *NAN, ALLOWED, *EMA), 2_132_000_000, Path("/secret/folder/model.fixed.safetensors"), (IDS,),
)  # fmt: skip
SOUND = Verification(Path("good.ckpt"), "torch-zip", "ldm", "sdxl", "strict", tuple(RULES)[:30], ())
BROKEN = Verification(
    Path("broken.safetensors"), None, None, None, "diffusers", ("container-corrupt",),
    (Finding("container-corrupt", "error", "truncated", "broken.safetensors", remedy="download it again"),),
)  # fmt: skip


def verdict(*found: Verification, fail_on: Any = "warning") -> str:
    return read(html.verification_page(found, fail_on)).all("h1")[0].text


def test_verdicts() -> None:
    assert verdict(SOUND) == "Passed"
    assert verdict(CHECKED, SOUND) == "Findings"
    assert verdict(CHECKED, fail_on="never") == "Passed"
    assert verdict(replace(CHECKED, findings=(ALLOWED, *EMA))) == "Passed"
    assert verdict(CHECKED, SOUND, BROKEN) == verdict(BROKEN, fail_on="never") == "Not everything could be checked"


def test_the_page_of_a_verification() -> None:
    page = html.verification_page([CHECKED, SOUND, BROKEN], "warning")
    root = read(page)
    assert page == html.verification_page([CHECKED, SOUND, BROKEN], "warning")
    assert "/secret" not in page
    summary = [[cell.text for cell in row.walk() if cell.tag in {"th", "td"}] for row in root.all("table")[0].all("tr")]
    assert summary[1:] == [
        ["model <1>.safetensors", "findings", "4", "0", "502", "1"],
        ["good.ckpt", "passed", "0", "0", "0", "0"],
        ["broken.safetensors", "could not be checked", "1", "0", "0", "0"],
    ]
    model, sound, broken = (node for node in root.all("section") if "model" in node.classes)
    facts = {node.all("dt")[0].text: node.all("dd")[0].text for node in model.all("div") if node.all("dt") and
             node.all("dt")[0] in node.children}  # fmt: skip
    assert facts == {
        "Container": "safetensors", "Layout": "ldm", "Family": "sd1", "Profile": "a1111", "Values read": "2.13 GB",
        "Rules applied": "5", "Written by --fix": "model.fixed.safetensors",
    }  # fmt: skip
    groups = [node for node in model.all("div") if "group" in node.classes]
    titles = [" ".join(node.all("h3")[0].text.split()) for node in groups]
    assert titles == [
        "Mended by --fix",
        "error Wrong CLIP position ids (1)",
        "error NaN in a weight (3)",
        "warning, allowed A key that the family doesn't have (1)",
        "note Training leftovers (502)",
    ]
    _, ids, nan, allowed, ema = groups
    commands = [node.text for node in ids.all("code") if "command" in node.classes]
    assert commands == ["sdsurgery fix-clip 'a b.safetensors'"]
    assert "verify --fix does it unasked" in ids.text
    assert all(text in ids.text for text in ("76 is missing", "0 to 76", "0 to 75.9", str(IDS.key), "text_encoder"))
    commands = [node.text for node in nan.all("code") if "command" in node.classes]
    assert commands == [f"sdsurgery replace DONOR k{place}" for place in range(3)]
    assert nan.text.count("take another copy") == 3
    assert "kept for <training>" in allowed.text
    assert "<script>alert(1)</script>" in allowed.text
    assert len(ema.all("tbody")[0].all("tr")) == 500
    assert "… and 2 more findings of this rule" in ema.text
    marks = {cells[1].text: (cells[0].text, cells[3].text)
             for cells in (row.all("td") for row in model.all("table")[-1].all("tbody")[0].all("tr"))}  # fmt: skip
    assert marks == {
        "position-ids-wrong": ("✗ fail", "1 finding"),
        "value-nan": ("✗ fail", "3 findings"),
        "key-unknown": ("\N{EN DASH} allowed", "1 finding"),
        "leftovers": ("• noted", "502 findings"),
        "pickle": ("✓ pass", "nothing"),
    }
    assert "Nothing was found." in sound.text
    assert all(f"{text}" in broken.text for text in ("could not be opened", "truncated", "download it again"))


def test_every_rule_can_be_shown() -> None:
    findings = tuple(Finding(name, rule.severity, "so it is") for name, rule in RULES.items())
    root = read(html.verification_page([replace(SOUND, rules=tuple(RULES), findings=findings)], "note"))
    assert all(rule.title in root.text and rule.help in root.text for rule in RULES.values())


def test_no_model_is_a_page_too() -> None:
    assert verdict() == "Passed"


@pytest.mark.parametrize("path", [".", "..", "/", "a/..", "x/y.safetensors"])
def test_names_have_no_folder(path: str) -> None:
    name = html.bare(Path(path))
    assert name
    assert "/" not in name.removeprefix("/")


# ---------------------------------------------------------------- the look


def _rgb(color: str) -> list[float]:
    return [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def _contrast(one: str, other: str) -> float:
    def light(color: str) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in _rgb(color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast(theme: int) -> None:
    """What WCAG asks of text, in both themes and on every step of the scale; and the scale has one direction."""
    (style,) = read(html.verification_page([SOUND], "note")).all("style")
    blocks = re.findall(r":root \{(.*?)\}", style.text, re.DOTALL)
    colors = {}
    for block in blocks[: theme + 1]:
        colors |= dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for ground in ("paper", "card", "tint"):
        for text in ("ink", "soft", "good", "bad", "warn", "note"):
            assert _contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    scale = [colors[f"s{place}"] for place in range(12)]
    for place, color in enumerate(scale):
        text = colors["low"] if place < 5 else "#000000" if place < 7 else colors["high"]
        assert _contrast(text, color) >= 4.5, place
    steps = [_contrast(color, colors["card"]) for color in scale]
    assert steps == sorted(steps)


def test_every_kind_of_layer_has_its_words() -> None:
    assert len({kind.words for kind in KINDS.values()}) == len(KINDS)
