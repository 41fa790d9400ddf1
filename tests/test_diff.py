"""diff: what changed between two models, told from values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import FIXTURES, cli, write
from hypothesis import given, settings
from hypothesis import strategies as st

import sdsurgery as sd
from sdsurgery.inspection.comparing import compare, statistics
from sdsurgery.inspection.diffing import diff

UNET, VAE = "model.diffusion_model.", "first_stage_model."
BIAS = UNET + "out.2.bias"


def put(path: Path, family: str = "sd1", seed: int = 0, **more: Any) -> Path:
    return write(path, synthetic.model(family, seed=seed, **more))


def told(one: Path, other: Path, *words: Any) -> dict[str, Any]:
    result = cli("diff", one, other, "--json", *words)
    document: dict[str, Any] = result.json
    assert result.code == (0 if document["identical"] else 1)
    return document


# ---------------------------------------------------------------- across layouts


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_a_file_and_its_folder_are_identical(family: str, tmp_path: Path) -> None:
    """What a folder can't hold doesn't count, whichever side it is on."""
    single, folder = put(tmp_path / "a.safetensors", family), tmp_path / "folder"
    assert cli("convert", single, folder).code == 0
    for pair in ((single, folder), (folder, single)):
        document = told(*pair)
        assert document["identical"]
        assert document["changed"] == document["added"] == document["removed"] == document["renamed"] == []
        lost = {entry["key"] for entry in document["not_comparable"]}
        assert all("position_ids" in key or "resblocks.23" in key or "text_projection" in key or "logit_scale" in key
                   for key in lost)  # fmt: skip
        assert bool(lost) == any(key.endswith(("ids", "logit_scale")) for key in sd.open(single))


def test_names_of_a_dialect_are_told_and_dont_count(tmp_path: Path) -> None:
    document = told(FIXTURES / "sd1-ids-ok.safetensors", FIXTURES / "sd1-flat-text-encoder.safetensors")
    assert document["identical"]
    assert len(document["renamed"]) >= 196
    assert told(FIXTURES / "sd1-ids-ok.safetensors", FIXTURES / "sd1-wrapped.safetensors")["renamed"] == []
    folder = tmp_path / "folder"
    assert cli("convert", FIXTURES / "sd1-flat-text-encoder.safetensors", folder).code == 0
    assert told(FIXTURES / "sd1-ids-ok.safetensors", folder)["identical"]


def test_a_change_behind_a_join_is_found_in_its_part(tmp_path: Path) -> None:
    """One element of the k rows of an in_proj_weight, against the folder of the original."""
    tensors = synthetic.model("sd2")
    single, folder = write(tmp_path / "a.safetensors", tensors), tmp_path / "folder"
    assert cli("convert", single, folder).code == 0
    key = "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"
    rows = tensors[key].shape[0]
    tensors[key][rows // 2, 1] += np.float16(1)
    (change,) = told(write(tmp_path / "b.safetensors", tensors), folder)["changed"]
    assert (change["key"], change["component"]) == (key, "text_encoder")
    assert change["name"] == "text_model.encoder.layers.3.self_attn.k_proj.weight"


# ---------------------------------------------------------------- one bit


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_one_flipped_bit_is_found_wherever_it_lies(data: st.DataObject) -> None:
    tensors = synthetic.model("sd1")
    key = data.draw(st.sampled_from(sorted(tensors)))
    before = sd.Checkpoint.from_state_dict(tensors)
    changed = tensors[key].copy()
    raw = changed.reshape(-1).view(np.uint8)
    raw[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found = diff(before, sd.Checkpoint.from_state_dict(tensors | {key: changed}))
    assert [entry.key for entry in found.changed] == [key]
    assert not found.identical
    component = {"model.": "unet", "first_": "vae", "cond_s": "text_encoder"}[key[:6]]
    assert found.changed[0].component == component


# ---------------------------------------------------------------- kinds and figures

NUMBERS = st.floats(width=16, allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_figures_are_numpys(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(column, dtype=np.float16) for column in zip(*pairs, strict=True))
    found = statistics(sd.Tensor.of(a), sd.Tensor.of(b))
    sound = np.isfinite(a) & np.isfinite(b)
    x, y = a[sound].astype(np.float64), b[sound].astype(np.float64)
    assert found.special == int(a.size - sound.sum())
    assert found.max_abs == pytest.approx(float(np.abs(x - y).max(initial=0)), rel=1e-6)
    assert found.mean_abs == pytest.approx(float(np.abs(x - y).mean()) if x.size else 0, rel=1e-5, abs=1e-12)
    assert found.share == pytest.approx(float((a != b).mean()))
    if np.linalg.norm(x) > 1e-3:
        assert found.relative_l2 == pytest.approx(float(np.linalg.norm(x - y) / np.linalg.norm(x)), rel=1e-4, abs=1e-6)
        if np.linalg.norm(y) > 1e-3:
            assert found.cosine == pytest.approx(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), abs=1e-5)


def kind(a: Any, b: Any) -> str:
    return compare(sd.Tensor.of(a), sd.Tensor.of(b)).kind


def test_kinds() -> None:
    wide = np.linspace(-1, 1, 999, dtype=np.float32)
    half = wide.astype(np.float16)
    assert kind(wide, wide.copy()) == "equal"
    assert kind(half, half.astype(np.float32)) == kind(half.astype(np.float32), half) == "dtype"
    assert kind(wide, half) == kind(half, wide) == "rounded"
    assert kind(wide + np.float32(0.01), half) == kind(wide, wide + np.float32(0.01)) == "changed"
    assert kind(wide, wide.reshape(3, 333)) == "shape"
    assert kind(np.arange(9), np.arange(9).astype(np.float32)) == "dtype"
    assert kind(np.array([np.nan, 1], np.float32), np.array([np.nan, 1], np.float16)) == "dtype"
    assert kind(np.zeros(0, np.float32), np.zeros(0, np.float32)) == "equal"
    assert kind(np.array([0.0]), np.array([-0.0])) == "changed"  # other bits, though they compare as equal


def test_more_than_one_piece(tmp_path: Path) -> None:
    """Tensors of many pieces, of other dtypes and from files that hold them at odd places."""
    generator = np.random.default_rng(1)
    a = generator.normal(size=3_000_001).astype(np.float32)
    b = a.copy()
    b[2_999_999] += 1
    one = sd.open(write(tmp_path / "a.safetensors", {"a": np.zeros(3, np.int8), "x": a}))["x"]
    other = sd.open(write(tmp_path / "b.safetensors", {"b": np.zeros(1, np.int8), "x": b}))["x"]
    found = compare(one, other)
    assert found.kind == "changed"
    assert found.statistics is not None
    assert found.statistics.max_abs == 1
    assert found.statistics.share == pytest.approx(1 / a.size)
    assert compare(one, sd.Tensor.of(a)).kind == "equal"
    assert compare(one, sd.Tensor.of(a.astype(np.float16))).kind == "rounded"


# ---------------------------------------------------------------- the command


def test_what_the_report_says(tmp_path: Path) -> None:
    model = put(tmp_path / "a.safetensors")
    other = tmp_path / "b.safetensors"
    assert cli("merge-vae", model, FIXTURES / "vae.safetensors", "-o", other).code == 0
    result = cli("diff", model, other)
    assert result.code == 1
    assert "only the vae differs" in result.out
    assert "unet: identical (686 tensors)" in result.out
    assert "relative L2" in result.out
    assert len(cli("diff", model, other, "--stat").out.splitlines()) == 5
    assert cli("diff", model, other, "--component", "unet").code == 0
    assert cli("diff", model, other, "--quiet").out == ""
    assert cli("diff", model, model).out.splitlines()[-1] == "identical"


def test_atol(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1", dtype="float32")
    model = write(tmp_path / "a.safetensors", tensors)
    near = write(tmp_path / "b.safetensors", tensors | {BIAS: tensors[BIAS] + np.float32(0.01)})
    less = write(tmp_path / "c.safetensors", {key: value for key, value in tensors.items() if key != BIAS})
    assert [cli("diff", model, near, "--atol", value).code for value in ("0.1", "0.001")] == [0, 1]
    assert cli("diff", model, less, "--atol", "9").code == 1
    assert told(model, less)["removed"] == [{"key": BIAS, "component": "unet", "tensor": "F32[4]"}]
    assert told(less, model)["added"][0]["key"] == BIAS


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.05])
@pytest.mark.parametrize("how", ["computed in fp32", "by lerp in fp32"])
def test_a_merge_is_explained(alpha: float, how: str, tmp_path: Path) -> None:
    import torch

    a, c = synthetic.model("sd1"), synthetic.model("sd1", seed=9)
    b = dict(a)
    for key in (key for key in a if key.startswith(UNET)):
        low, high = torch.from_numpy(a[key]).float(), torch.from_numpy(c[key]).float()
        mixed = torch.lerp(low, high, alpha) if "lerp" in how else (1 - alpha) * low + alpha * high
        b[key] = mixed.half().numpy()
    files = [write(tmp_path / f"{name}.safetensors", tensors) for name, tensors in (("a", a), ("b", b), ("c", c))]
    (found,) = told(files[0], files[1], "--explain-with", files[2])["explanations"]
    assert (found["component"], found["alpha"], found["exact"]) == ("unet", alpha, True)
    text = cli("diff", files[0], files[1], "--explain-with", files[2], "--stat").out
    assert f"the unet is {1 - alpha:.4g} x a.safetensors + {alpha:.4g} x c.safetensors" in text
    assert "every element" in text


def test_what_is_no_merge_isnt_explained(tmp_path: Path) -> None:
    files = [put(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(3)]
    assert told(files[0], files[1], "--explain-with", files[2])["explanations"] == []
    assert told(files[0], files[0], "--explain-with", files[2])["explanations"] == []


def test_values_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1")
    model = write(tmp_path / "a.safetensors", tensors | {BIAS: np.zeros(4, np.float16)})
    other = write(tmp_path / "b.safetensors", tensors | {BIAS: np.array([1, np.nan, np.inf, 0], np.float16)})
    (change,) = told(model, other)["changed"]
    assert (change["special"], change["max_abs"], change["relative_l2"], change["cosine"]) == (2, 1, None, None)
    assert math.isfinite(json.loads(cli("diff", model, other, "--json").out)["changed"][0]["mean_abs"])


def test_what_cant_be_read_is_3(tmp_path: Path) -> None:
    good = FIXTURES / "sd1-ids-ok.safetensors"
    for pair in ((good, tmp_path / "no"), (tmp_path / "no", good)):
        assert cli("diff", *pair).code == 3
    assert cli("diff", good, FIXTURES / "vae.safetensors", "--component", "text_encoder_2").code == 3
    assert cli("diff", good).code == 2
