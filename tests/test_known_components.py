"""inspect --known: what the registry names, and the published figures, beside the rule as torch computes it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import synthetic
import torch
from conftest import FIXTURES, cli, outline, validator, write
from hypothesis import given
from hypothesis import strategies as st

import sdsurgery as sd
from sdsurgery.inspection import known_components, registry
from sdsurgery.inspection.known_components import Known, Match, Published, figures, known, published_vae
from sdsurgery.models.identify import identify

VAE, CLIP, OPEN_CLIP = "first_stage_model.", "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
Arrays = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    place = tmp_path / "home" / "registry.json"
    monkeypatch.setenv(registry.VARIABLE, str(place))
    return place


# ---------------------------------------------------------------- the rule, as it is published

BASES = {"vae": (17870.7051, 10_000), "clip": (-2097.8596, 1_000_000), "open_clip": (-8757.5630, 10_000)}


def takes_part(kind: str, key: str) -> bool:
    """Of the keys of a single file, under the kind's prefix."""
    if kind == "vae":
        return "encoder." in key or "decoder." in key
    return "mlp." in key and ".23." not in key


def published_sum(kind: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Everything in torch's fp32: the sigmoid, the sum over a tensor, the sum of those."""
    total = torch.zeros(())
    for key, tensor in tensors.items():
        if takes_part(kind, key):
            total += (torch.sigmoid(tensor.half().float()) - 0.5).sum()
    return total


def published_figure(kind: str, total: torch.Tensor | float) -> int:
    base, scale = BASES[kind]
    figure = int(abs(total / base - 1) * scale)
    while figure >= 10_000:
        figure -= 5_000
    return figure


def torch_part(tensors: Arrays, prefix: str) -> dict[str, torch.Tensor]:
    def tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    return {key: tensor(value) for key, value in tensors.items() if key.startswith(prefix)}


def our_sums(checkpoint: sd.Checkpoint) -> dict[str, float]:
    measurable = known_components._measurable(checkpoint, identify(checkpoint))
    return known_components._totals({name: tensors for name, (_, tensors) in measurable.items()})


def full_size(prefix: str, make: Callable[[str, tuple[int, ...]], np.ndarray[Any, Any]], kind: str) -> sd.Checkpoint:
    """A lone component of SD1 in its published shapes; what doesn't take part can't be read."""
    shapes = synthetic.shapes("sd1", synthetic.FULL["sd1"])
    own = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
    read = sd.Checkpoint.from_state_dict({key: make(key, own[key]) for key in own if takes_part(kind, key)})
    return sd.Checkpoint({**outline(own).tensors, **read.tensors})


def trained(seed: int, offset: float = 0.0) -> Callable[[str, tuple[int, ...]], np.ndarray[Any, Any]]:
    """Random values of the size that trained weights have; norms are about 1."""
    generator = np.random.default_rng(seed)

    def make(key: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02) + np.float32(offset)
        return (values + np.float32("norm" in key and key.endswith("weight"))).astype(np.float16)

    return make


def arrays(checkpoint: sd.Checkpoint, kind: str) -> dict[str, np.ndarray[Any, Any]]:
    return {
        key: np.frombuffer(bytearray(tensor.tobytes()), np.float16).reshape(tensor.shape)
        for key, tensor in checkpoint.tensors.items()
        if takes_part(kind, key)
    }


def test_a_full_size_vae_has_the_figure_that_torch_gives() -> None:
    checkpoint = full_size(VAE, trained(1), "vae")
    expected = published_sum("vae", torch_part(arrays(checkpoint, "vae"), VAE))
    assert our_sums(checkpoint)["vae"] == pytest.approx(float(expected), rel=1e-6)
    assert abs(figures(checkpoint)["vae"] - published_figure("vae", expected)) <= 1
    assert sum(tensor.numel for key, tensor in checkpoint.tensors.items() if takes_part("vae", key)) == 83_653_771


def test_a_full_size_clip_has_the_figure_that_torch_gives() -> None:
    """Its figure counts millionths: a sum of exact sigmoids is some 14 of them off."""
    checkpoint = full_size(CLIP, trained(2, -0.000148), "clip")
    expected = float(published_sum("clip", torch_part(arrays(checkpoint, "clip"), CLIP)))
    ours = our_sums(checkpoint)["text_encoder"]
    assert abs(ours - expected) / 2097.8596 * 1_000_000 < 0.5
    assert abs(figures(checkpoint)["text_encoder"] - published_figure("clip", expected)) <= 1
    assert known_components.rules()["clip"].elements == sum(array.size for array in arrays(checkpoint, "clip").values())


def test_every_fp16_value_weighs_what_torch_gives_it() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    expected = (torch.sigmoid(torch.from_numpy(values.copy()).float()) - 0.5).numpy().astype(np.float64)
    table = known_components._table()
    assert np.array_equal(np.isnan(table), np.isnan(values))
    assert np.nanmax(np.abs(table - expected)) <= 2.0**-23
    usual = np.abs(values.astype(np.float64)) < 0.3
    assert np.count_nonzero(table[usual] != expected[usual]) < 20
    assert table[np.float16(0).view(np.uint16)] == 0
    whole = table[~np.isnan(table)] * 2.0**26
    assert np.array_equal(whole, np.rint(whole)), "sums would depend on the order"
    assert [table[np.float16(sign * np.inf).view(np.uint16)] for sign in (1, -1)] == [0.5, -0.5]


@pytest.mark.parametrize(("family", "kind", "prefix", "component"), [
    ("sd1", "vae", VAE, "vae"), ("sd1", "clip", CLIP, "text_encoder"), ("sd2", "open_clip", OPEN_CLIP, "text_encoder"),
    ("sdxl", "vae", VAE, "vae"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_narrow_models_have_the_figures_that_torch_gives(
    family: str, kind: str, prefix: str, component: str, dtype: str
) -> None:
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {
        key: value if value.dtype == np.int64 else np.asarray(value * np.float32(1.37)).astype(stored)
        for key, value in synthetic.model(family, dtype="float32").items()
    }
    checkpoint = sd.Checkpoint.from_state_dict(tensors)
    expected = published_sum(kind, torch_part(tensors, prefix))
    assert our_sums(checkpoint)[component] == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    assert abs(figures(checkpoint)[component] - published_figure(kind, expected)) <= 1
    assert "unet" not in figures(checkpoint)


@given(
    st.sampled_from(sorted(BASES)), st.floats(-500, 500).filter(lambda share: abs(share) > 1e-9), st.integers(0, 20_000)
)
def test_figures_are_folded_as_published(kind: str, share: float, figure: int) -> None:
    base, scale = BASES[kind]
    rule = known_components.rules()[kind]
    assert (rule.base, rule.scale) == (base, scale)
    assert rule.figure(share * base) == published_figure(kind, share * base)
    for sign in (1, -1):
        total = base * (1 + sign * (figure + 0.5) / scale)
        assert rule.figure(total) == (figure if figure < 10_000 else 5_000 + figure % 5_000)


def test_no_figure_of_nothing() -> None:
    tensors = synthetic.model("sd1")
    for value, figure in ((0.0, None), (math.nan, None), (math.inf, 9), (1e6, 9)):
        changed = {key: array.astype(np.float32) for key, array in tensors.items()}
        changed |= {key: np.zeros_like(array) for key, array in changed.items() if key.startswith(VAE)}
        changed[VAE + "decoder.conv_in.bias"][0] = value
        found = figures(sd.Checkpoint.from_state_dict(changed))
        assert "text_encoder" in found
        assert found.get("vae") == (figure and published_figure("vae", 0.5)), value
    whole = {key: (value * 100).astype(np.int8) if key.startswith(VAE) else value for key, value in tensors.items()}
    assert "vae" not in figures(sd.Checkpoint.from_state_dict(whole))
    assert figures(sd.Checkpoint.from_state_dict({"a": np.ones(3)})) == {}


# ---------------------------------------------------------------- wherever it lies


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_layout_container_and_storage_make_no_difference(family: str, tmp_path: Path) -> None:
    wide = {key: value if value.dtype == np.int64 else np.asarray(value.astype(np.float32) * np.float32(1.0001))
            for key, value in synthetic.model(family).items()}  # fmt: skip
    half = {key: value if value.dtype == np.int64 else value.astype(np.float16) for key, value in wide.items()}
    places = [write(tmp_path / "wide.safetensors", wide), write(tmp_path / "half.safetensors", half)]
    for name, tensors in (("wide", wide), ("half", half)):
        torch.save({key: torch.from_numpy(tensors[key]) for key in sorted(tensors, reverse=True)}, tmp_path / name)
        assert cli("convert", tmp_path / f"{name}.safetensors", tmp_path / f"{name}-folder").code == 0
        places += [tmp_path / name, tmp_path / f"{name}-folder"]
    sums = [our_sums(sd.open(place)) for place in places]
    assert all(each == sums[0] for each in sums)
    assert set(sums[0]) == set(identify(sd.open(places[0])).networks) - {"unet"}
    alone = tmp_path / "vae.safetensors"
    assert cli("extract", places[-1], "--component", "vae", "-o", alone).code == 0
    assert our_sums(sd.open(alone)) == {"vae": sums[0]["vae"]}


def test_dialects_and_what_lies_beside_make_no_difference(tmp_path: Path) -> None:
    expected = our_sums(sd.open(FIXTURES / "sd1-ids-ok.safetensors"))
    for other in ("sd1-flat-text-encoder", "sd1-wrapped", "sd1-ids-fractional", "sd1-ids-missing"):
        assert our_sums(sd.open(FIXTURES / f"{other}.safetensors")) == expected
    tensors = synthetic.model("sd2")
    stray = tensors | {OPEN_CLIP + "transformer.resblocks.7.mlp.more": np.ones(3, np.float16)}
    ends = ("text_projection", "logit_scale")
    lacking = {key: value for key, value in tensors.items() if ".resblocks.23." not in key and not key.endswith(ends)}
    sums = [our_sums(sd.Checkpoint.from_state_dict(each)) for each in (tensors, stray, lacking)]
    assert sums[0] == sums[1] == sums[2]


@pytest.mark.parametrize(("part", "changes"), [
    ("decoder.conv_in.bias", True), ("encoder.down.0.block.0.norm1.weight", True), ("quant_conv.weight", False),
    ("post_quant_conv.bias", False),
])  # fmt: skip
def test_encoder_and_decoder_alone_count(part: str, changes: bool) -> None:
    tensors = synthetic.model("sd1")
    changed = tensors | {VAE + part: tensors[VAE + part] + np.float16(3)}
    one, other = (our_sums(sd.Checkpoint.from_state_dict(each)) for each in (tensors, changed))
    assert (one["vae"] != other["vae"]) == changes
    assert one["text_encoder"] == other["text_encoder"]


# ---------------------------------------------------------------- what is published


def of_figure(figure: int, kind: str = "vae", prefix: str = VAE) -> sd.Checkpoint:
    """A full-size component of that figure: zeros, and as many ones in one weight as that takes."""
    base, scale = BASES[kind]
    wanted = abs(base) * (1 + (figure + 0.5) / scale)
    left = round(wanted / (1 / (1 + math.exp(-1)) - 0.5))

    def make(_key: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        nonlocal left
        array = np.zeros(shape, np.float16)
        if array.size > left > 0:
            array.reshape(-1)[:left] = math.copysign(1, base)
            left = 0
        return array

    return full_size(prefix, make, kind)


@pytest.mark.parametrize(("name", "figure"), [
    ("SD-v1", 0), ("SD-v2", 869), ("NAI", 2982), ("WD-VAE-v1", 155), ("WD-VAE-v2", 41)
])  # fmt: skip
def test_published_vaes(name: str, figure: int) -> None:
    assert published_vae(of_figure(figure)) == Match(name, figure, "sd")


@pytest.mark.parametrize("figure", [2980, 2981, 2983, 2984, 2, 7982])
def test_a_figure_at_most_one_off_matches(figure: int) -> None:
    found = published_vae(of_figure(figure))
    assert found == (Match("NAI", figure, "sd") if abs(figure - 2982) == 1 else None)


def test_published_text_encoders() -> None:
    """The text encoders' rules and figures; SD1's is matched with weights, in the wild millionths of it."""
    found = known_components.rules()
    assert [(each.name, each.figure) for each in found["clip"].published] == [("SD-v1", 0)]
    assert [(each.name, each.figure) for each in found["open_clip"].published] == [("SD-v2", 1141), ("WD-v1-4", 2543)]
    shapes = synthetic.shapes("sd2", synthetic.FULL["sd2"])
    for last in ("", ".resblocks.23."):  # some of SD2's were published without it
        sd2 = outline({key: shape for key, shape in shapes.items() if not last or last not in key})
        rule, tensors = known_components._measurable(sd2, identify(sd2))["text_encoder"]
        assert rule is found["open_clip"]
        assert sum(tensor.numel for tensor in tensors) == rule.elements == 23 * (2 * 4096 * 1024 + 4096 + 1024)
    weight = of_sum(2097.8596)
    assert known(weight)["text_encoder"] == (Known("SD-v1", "published figure", exact=False, figure=0),)
    assert known(of_sum(2097.8596 * 1.00001))["text_encoder"] == ()


def of_sum(wanted: float) -> sd.Checkpoint:
    """A full-size CLIP-L whose sum is minus that, to a few millionths of a unit."""
    table = known_components._table()
    coarse, fine = (float(table[np.float16(value).view(np.uint16)]) for value in (1, 2.0**-12))
    many = int(wanted / coarse)
    few = round((wanted - many * coarse) / fine)

    def make(key: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        array = np.zeros(shape, np.float16)
        if key.endswith("layers.0.mlp.fc1.weight"):
            array.reshape(-1)[:many] = -1
            array.reshape(-1)[many : many + few] = -(2.0**-12)
        return array

    return full_size(CLIP, make, "clip")


def test_the_data_file_says_where_it_comes_from() -> None:
    document = known_components._document()
    assert "arenasys/stable-diffusion-webui-model-toolkit" in document["source"]
    assert "MIT" in document["licence"]
    assert document["tolerance"] == 1
    assert {each.latents for each in known_components.rules()["vae"].published} == {"sd"}


def test_other_sizes_and_incomplete_ones_are_not_read() -> None:
    """A narrow model, SDXL's CLIP-G, and a VAE without one weight have no published figure."""
    assert published_vae(outline(synthetic.shapes("sd1", synthetic.NARROW["sd1"]))) is None
    refiner = synthetic.shapes("sdxl-refiner", synthetic.FULL["sdxl-refiner"])
    found = known(outline({key: shape for key, shape in refiner.items() if not key.startswith(VAE)}))
    assert found == {"text_encoder_2": (), "unet": ()}
    shapes = synthetic.shapes("sd1", synthetic.FULL["sd1"])
    vae = {key: shape for key, shape in shapes.items() if key.startswith(VAE)}
    del vae[VAE + "decoder.conv_in.bias"]
    assert known(outline(vae)) == {"vae": ()}
    with pytest.raises(AssertionError, match="a weight was read"):
        known(outline(vae | {VAE + "decoder.conv_in.bias": (512,)}))


# ---------------------------------------------------------------- inspect --known


def publish(monkeypatch: pytest.MonkeyPatch, model: Path, *published: Published) -> None:
    """Publish figures for VAEs of the size of this one."""
    rule = known_components.rules()["vae"]
    elements = sum(
        tensor.numel for key, tensor in sd.open(model).tensors.items() if VAE not in key or takes_part("vae", key)
    )
    changed = {"vae": replace(rule, elements=elements, published=published)}
    monkeypatch.setattr(known_components, "rules", lambda: changed)


def vae_alone(tmp_path: Path) -> Path:
    """A narrow VAE of encoder, decoder and what belongs to neither."""
    return write(tmp_path / "vae.safetensors", {
        key: value for key, value in synthetic.model("sd1").items() if key.startswith(VAE)
    })  # fmt: skip


def told(*words: Any) -> dict[str, Any]:
    result = cli("inspect", *words, "--known", "--json")
    assert (result.code, result.err) == (0, "")
    return result.json["known"]


def test_a_figure_is_said_to_match(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = vae_alone(tmp_path)
    figure = figures(sd.open(path))["vae"]
    near = (Published("near", figure - 1, "sd"), Published("same", figure, "sdxl"), Published("far", figure + 2, "sd"))
    publish(monkeypatch, path, *near)
    entry = {"by": "published figure", "exact": False, "figure": figure}
    assert told(path) == {"vae": [{"name": "same"} | entry, {"name": "near"} | entry]}
    assert published_vae(sd.open(path)) == Match("same", figure, "sdxl")
    lines = cli("inspect", path, "--known").out.splitlines()
    matched = [line for line in lines if line.startswith("vae matches the figure published for ")]
    assert [line.split(" by ")[0].split()[-1] for line in matched] == ["same", "near"]
    assert all(f"webui-model-toolkit: {figure}; evidence and no proof, for the figure is no hash" in x for x in matched)
    publish(monkeypatch, path, Published("far", figure + 2), Published("further", figure - 2))
    assert told(path) == {"vae": []}
    assert "vae is not known" in cli("inspect", path, "--known").out.splitlines()
    publish(monkeypatch, path, Published("same", figure))
    lacking = {key: value for key, value in synthetic.model("sd1").items() if key.startswith(VAE)}
    del lacking[VAE + "decoder.conv_in.bias"]
    assert told(write(tmp_path / "lacking.safetensors", lacking)) == {"vae": []}


def test_the_registry_is_asked(monkeypatch: pytest.MonkeyPatch, own_registry: Path, tmp_path: Path) -> None:
    path, model = FIXTURES / "vae.safetensors", FIXTURES / "sd1-ids-ok.safetensors"
    assert told(model) == {"text_encoder": [], "unet": [], "vae": []}
    assert cli("fingerprint", path, "--register", "my own").code == 0
    mine = {"name": "my own", "by": "registry", "exact": True, "figure": None}
    assert told(path) == {"vae": [mine]}
    assert "vae is known as my own (your registry)" in cli("inspect", path, "--known").out.splitlines()
    merged, wide = tmp_path / "merged", tmp_path / "wide.safetensors"
    assert cli("merge-vae", model, path, "-o", tmp_path / "merged.safetensors").code == 0
    assert cli("convert", tmp_path / "merged.safetensors", merged).code == 0
    assert told(merged) == {"text_encoder": [], "unet": [], "vae": [mine]}
    assert cli("cast", tmp_path / "merged.safetensors", "fp32", "-o", wide).code == 0
    assert told(wide)["vae"] == [mine | {"exact": False}]
    lines = cli("inspect", wide, "--known", "--hash", "--tensors").out.splitlines()
    assert "vae is known as my own, rounded to fp16 (your registry)" in lines
    assert "unet is not known" in lines
    figure = figures(sd.open(wide))["vae"]
    publish(monkeypatch, vae_alone(tmp_path), Published("theirs", figure, "sd"))
    by_figure = {"name": "theirs", "by": "published figure", "exact": False, "figure": figure}
    assert told(wide)["vae"] == [mine | {"exact": False}, by_figure]


def test_names_cannot_draw_on_the_terminal(own_registry: Path) -> None:
    path = FIXTURES / "vae.safetensors"
    assert cli("fingerprint", path, "--register", "a\x1b[2Jb [bold]c[/bold]").code == 0
    out = cli("inspect", path, "--known").out
    assert r"vae is known as a\x1b[2Jb [bold]c[/bold] (your registry)" in out
    assert "\x1b" not in out


def test_a_broken_registry_is_said_so(own_registry: Path) -> None:
    own_registry.parent.mkdir()
    own_registry.write_text("{")
    result = cli("inspect", FIXTURES / "vae.safetensors", "--known", "--json")
    assert (result.code, result.json["error"]["file"]) == (3, str(own_registry))
    assert cli("inspect", FIXTURES / "vae.safetensors").code == 0


@pytest.mark.parametrize("registered", [False, True])
def test_what_has_no_component(registered: bool, own_registry: Path, tmp_path: Path) -> None:
    if registered:
        own_registry.parent.mkdir()
        own_registry.write_text(json.dumps({"schema_version": 1, "fingerprints": {"0" * 64: "x"}}))
    path = write(tmp_path / "x.safetensors", {"x": np.zeros(3)})
    assert told(path) == {}
    assert "known" in cli("inspect", path, "--known").out


def test_without_the_option_nothing_is_known_nor_read() -> None:
    path = FIXTURES / "sd1-ids-ok.safetensors"
    assert "known" not in cli("inspect", path, "--json").json
    assert "is not known" not in cli("inspect", path).out
    code = (
        "import sys; from sdsurgery.cli import run; run(['inspect', sys.argv[1], '--json', *sys.argv[2:]]); heavy = "
        "[name for name in sys.modules if name == 'numpy' or 'known_comp' in name]; print(*heavy, file=sys.stderr)"
    )
    assert modules(code, path) == []
    assert modules(code, path, "--known") == ["sdsurgery.inspection.known_components"]


def modules(code: str, *words: Any) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    return done.stderr.split()


def test_the_schema_is_strict() -> None:
    found = cli("inspect", FIXTURES / "vae.safetensors", "--known", "--json").json
    check = validator("inspect")
    ours = {"name": "x", "by": "registry", "exact": True, "figure": None}
    theirs = {"name": "x", "by": "published figure", "exact": False, "figure": 3}
    for entry, valid in (
        (ours, True), (theirs, True), (ours | {"exact": False}, True), (theirs | {"exact": True}, False),
        (theirs | {"figure": None}, False), (theirs | {"figure": 10_000}, False), (ours | {"figure": 3}, False),
        (ours | {"by": "hearsay"}, False), (ours | {"more": 1}, False), ({"name": "x"}, False),
    ):  # fmt: skip
        assert check.is_valid(found | {"known": {"vae": [entry]}}) == valid, entry
    assert not check.is_valid(found | {"known": {"ema": []}})
    assert not check.is_valid(found | {"known": None})
