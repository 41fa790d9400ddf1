"""manifest and verify --manifest: what a model is, and whether it still is that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import FIXTURES, cli, validator, write
from hypothesis import given, settings
from hypothesis import strategies as st

import sdsurgery as sd
from sdsurgery.inspection import manifests
from sdsurgery.sources import FileSlice

UNET = "model.diffusion_model."


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.safetensors", synthetic.model("sd1"))


@pytest.fixture
def listed(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "weights.json"
    assert cli("manifest", model, "-o", path).code == 0
    return path


def findings(path: Path, listed: Path) -> list[tuple[str, str | None]]:
    result = cli("verify", path, "--manifest", listed, "--json")
    (entry,) = result.json["models"]
    found = [(each["id"], each["key"] or each["file"]) for each in entry["findings"]]
    assert all(each["severity"] == "error" and entry["complete"] for each in entry["findings"])
    assert entry["profile"] == "manifest"
    assert result.code == (1 if found else 0)
    assert result.json["verified"] == (not found)
    return found


def test_it_is_what_its_schema_says_and_the_same_each_time(model: Path, listed: Path, tmp_path: Path) -> None:
    document = json.loads(listed.read_text())
    validator("manifest").validate(document)
    assert cli("manifest", model).out == listed.read_text()
    shutil.copy(model, tmp_path / "sub.safetensors")
    other = json.loads(cli("manifest", tmp_path / "sub.safetensors").out)
    assert other["tensors"] == document["tensors"]
    assert str(tmp_path) not in listed.read_text()
    assert len(document["tensors"]) == 1131
    assert cli("manifest", model, "-o", listed).code == 4
    assert cli("manifest", model, "-o", listed, "--force").code == 0


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_a_conversion_verifies_both_ways(family: str, tmp_path: Path) -> None:
    single = write(tmp_path / "a.safetensors", synthetic.model(family))
    folder = tmp_path / "folder"
    assert cli("convert", single, folder).code == 0
    for one, other in ((single, folder), (folder, single)):
        path = tmp_path / "m.json"
        assert cli("manifest", one, "-o", path, "--force").code == 0
        assert findings(one, path) == findings(other, path) == []
    raw = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(raw.read_bytes())
    content[-1] ^= 1
    raw.write_bytes(content)
    ((kind, key),) = findings(folder, _made(single, tmp_path))
    assert (kind, str(key)[:4]) == ("tensor-changed", "vae/")


def _made(model: Path, folder: Path) -> Path:
    path = folder / "made.json"
    assert cli("manifest", model, "-o", path, "--force").code == 0
    return path


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_one_flipped_bit_is_found_in_its_tensor(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bit")
    path = write(folder / "model.safetensors", synthetic.model("sd1"))
    listed = manifests.manifest(sd.open(path))
    opened = sd.open(path)
    key = data.draw(st.sampled_from(sorted(opened)))
    place = opened[key].data
    assert isinstance(place, FileSlice)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(place.offset, place.offset + place.nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    found = manifests.verify(sd.open(path), listed)
    assert [(each.id, each.key) for each in found if each.key] == [("tensor-changed", key)]
    assert [each.id for each in found if not each.key] == ["file-changed"]


def test_what_is_missing_added_or_of_another_type(listed: Path, tmp_path: Path) -> None:
    tensors = synthetic.model("sd1")
    gone, cast, shaped = UNET + "out.2.bias", UNET + "out.2.weight", UNET + "out.0.bias"
    changed = {key: value for key, value in tensors.items() if key != gone} | {
        "extra": np.zeros(2, np.float32),
        cast: tensors[cast].astype(np.float32),
        shaped: tensors[shaped].reshape(2, 2),
    }
    other = write(tmp_path / "other.safetensors", changed)
    assert sorted(findings(other, listed), key=str) == sorted(
        [
            ("file-changed", None),
            ("tensor-added", "extra"),
            ("tensor-missing", "conv_out.bias"),
            ("tensor-type", cast),
            ("tensor-type", shaped),
        ]
    )
    text = cli("verify", other, "--manifest", listed)
    assert text.code == 1
    assert "tensor-missing: conv_out.bias of the unet is missing" in text.out


def test_a_renamed_copy_is_the_model_and_metadata_count(model: Path, listed: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "copy.safetensors")
    assert findings(tmp_path / "copy.safetensors", listed) == []
    tagged = write(tmp_path / "tagged.safetensors", synthetic.model("sd1"), {"title": "x"})
    assert findings(tagged, listed) == [("file-changed", None)]


def test_several_models_and_one_that_cant_be_read(model: Path, listed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(model.read_bytes()[:-5])
    result = cli("verify", model, broken, FIXTURES / "vae.safetensors", "--manifest", listed, "--json")
    assert result.code == 3
    first, second, third = result.json["models"]
    assert (first["findings"], first["complete"]) == ([], True)
    assert [each["id"] for each in second["findings"]] == ["container-corrupt"]
    assert not second["complete"]
    assert third["findings"]
    assert "could not be fully checked" in cli("verify", broken, "--manifest", listed).out
    assert cli("verify", model, "--manifest", listed).out.startswith(f"{model}: as it should be (")


BAD: list[Any] = ["", "[]", "{}", {"schema_version": 2}, {"schema_version": 1, "tensors": 3}]


@pytest.mark.parametrize("content", BAD, ids=str)
def test_what_is_no_manifest(content: Any, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    result = cli("verify", model, "--manifest", path, "--json")
    assert (result.code, result.json["error"]["file"]) == (3, str(path))
    assert cli("manifest", path).code == 3
