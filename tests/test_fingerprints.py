"""fingerprint: the same component is the same wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from conftest import FIXTURES, cli, write
from hypothesis import given, settings
from hypothesis import strategies as st

import sdsurgery as sd
from sdsurgery.inspection import registry
from sdsurgery.inspection.fingerprints import fingerprints

UNET, VAE = "model.diffusion_model.", "first_stage_model."


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    place = tmp_path / "home" / "registry.json"
    monkeypatch.setenv(registry.VARIABLE, str(place))
    return place


def prints(path: Path | str, kind: str = "exact") -> dict[str, str]:
    return {each.component: getattr(each, kind) for each in fingerprints(sd.open(path))}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_layout_container_and_order_make_no_difference(family: str, tmp_path: Path) -> None:
    tensors = synthetic.model(family)
    single = write(tmp_path / "a.safetensors", tensors)
    folder = tmp_path / "folder"
    assert cli("convert", single, folder).code == 0
    torch.save({key: torch.from_numpy(tensors[key]) for key in sorted(tensors, reverse=True)}, tmp_path / "a.ckpt")
    assert prints(single) == prints(folder) == prints(tmp_path / "a.ckpt")
    assert set(prints(single)) == {"text_encoder", "text_encoder_2", "unet", "vae"} & set(prints(single))
    for name in prints(single):
        alone = tmp_path / f"{name}.safetensors"
        assert cli("extract", folder, "--component", name, "-o", alone).code == 0
        assert prints(alone)[name] == prints(single)[name]


def test_dialects_make_no_difference() -> None:
    expected = prints(FIXTURES / "sd1-ids-ok.safetensors")
    for other in ("sd1-flat-text-encoder", "sd1-wrapped", "sd1-ids-fractional", "sd1-ids-missing"):
        assert prints(FIXTURES / f"{other}.safetensors") == expected


def test_fp16_is_the_same_for_wide_storage(tmp_path: Path) -> None:
    wide = {key: value.astype(np.float32) * np.float32(1.0001) if value.dtype == np.float16 else value
            for key, value in synthetic.model("sd1").items()}  # fmt: skip
    half = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in wide.items()}
    one, other = write(tmp_path / "a.safetensors", wide), write(tmp_path / "b.safetensors", half)
    assert prints(one, "fp16") == prints(other, "fp16")
    assert not prints(one).items() & prints(other).items()


@given(st.data())
@settings(max_examples=30)
def test_a_flipped_bit_changes_its_component_alone(data: st.DataObject) -> None:
    tensors = synthetic.model("sd1")
    before = {each.component: each for each in fingerprints(sd.Checkpoint.from_state_dict(tensors))}
    key = data.draw(st.sampled_from(sorted(key for key in tensors if not key.endswith("position_ids"))))
    changed = tensors[key].copy()
    raw = changed.reshape(-1).view(np.uint8)
    raw[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    after = {each.component: each for each in fingerprints(sd.Checkpoint.from_state_dict(tensors | {key: changed}))}
    component = {"model.": "unet", "first_": "vae", "cond_s": "text_encoder"}[key[:6]]
    assert {name for name in before if before[name] != after[name]} == {component}


def test_names_and_shapes_count() -> None:
    tensors = synthetic.model("sd1")
    key, other = UNET + "out.0.weight", UNET + "out.0.bias"
    swapped = tensors | {key: tensors[other], other: tensors[key]}
    assert fingerprints(sd.Checkpoint.from_state_dict(swapped)) != fingerprints(sd.Checkpoint.from_state_dict(tensors))
    assert len({each.exact for each in fingerprints(sd.Checkpoint.from_state_dict(tensors))}) == 3


def told(*words: Any) -> dict[str, Any]:
    result = cli("fingerprint", *words, "--json")
    assert result.code == 0
    return {each["component"]: each for each in result.json["fingerprints"]}


def test_the_registry_knows_a_vae_again(own_registry: Path, tmp_path: Path) -> None:
    vae, model = FIXTURES / "vae.safetensors", FIXTURES / "sd1-ids-ok.safetensors"
    assert told(vae)["vae"]["known_as"] is None
    assert f"registered as mine in {own_registry}" in cli("fingerprint", vae, "--register", "mine").out
    merged = tmp_path / "merged.safetensors"
    assert cli("merge-vae", model, vae, "-o", merged).code == 0
    found = told(merged)
    assert [found[name]["known_as"] for name in ("vae", "unet")] == ["mine", None]
    assert "vae: 248 tensors, known as mine" in cli("fingerprint", merged).out
    result = cli("diff", model, merged, "--json")
    assert result.json["known"] == {"vae": "mine"}
    assert "the vae of merged.safetensors is known as mine" in cli("diff", model, merged, "--stat").out
    wide = tmp_path / "wide.safetensors"
    assert cli("cast", merged, "fp32", "-o", wide).code == 0
    assert told(wide, "--component", "vae")["vae"]["known_as"] == "mine, rounded to fp16"
    assert cli("fingerprint", model, "--register", "base").code == 0
    assert told(model)["unet"]["known_as"] == "base (unet)"
    assert told(merged)["vae"]["known_as"] == "mine"


def test_a_broken_registry_is_said_so(own_registry: Path) -> None:
    own_registry.parent.mkdir()
    for text in (
        "",
        "[]",
        "{",
        '{"schema_version": 2, "fingerprints": {}}',
        '{"schema_version": 1, "fingerprints": 1}',
    ):
        own_registry.write_text(text)
        result = cli("fingerprint", FIXTURES / "vae.safetensors", "--register", "x", "--json")
        assert (result.code, result.json["error"]["file"]) == (3, str(own_registry))
        assert own_registry.read_text() == text


def test_what_has_no_component(tmp_path: Path) -> None:
    assert cli("fingerprint", FIXTURES / "vae.safetensors", "--component", "unet").code == 3
    assert cli("fingerprint", write(tmp_path / "x.safetensors", {"x": np.zeros(3)})).code == 3
    lacking = {key: value for key, value in synthetic.model("sd1").items() if key != VAE + "decoder.conv_in.bias"}
    assert "vae: 247 tensors, not complete" in cli("fingerprint", write(tmp_path / "a.safetensors", lacking)).out
