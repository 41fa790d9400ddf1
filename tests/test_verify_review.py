"""What an adversarial review of verify found, so that it stays mended."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from conftest import FIXTURES, cli, raw, shell, write

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
BROKEN = FIXTURES / "sd1-ids-fractional.safetensors"


def ids(path: Path, *options: str | Path) -> set[str]:
    (entry,) = cli("verify", path, *options, "--json").json["models"]
    # A narrow model has fewer tokens than CLIP's tokenizer.
    return {each["id"] for each in entry["findings"]} - {"tokenizer-vocabulary"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    single = write(tmp_path / "model.safetensors", synthetic.model("sd1"))
    assert cli("convert", single, tmp_path / "folder").code == 0
    return tmp_path / "folder"


# ---------------------------------------------------------------- nothing is lost


def test_pruning_unknown_keys_leaves_other_parts_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "safety_checker").mkdir()
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker" / "config.json").write_text("{}")
    write(folder / "safety_checker" / "model.safetensors", {"concept_embeds": np.ones((17, 8), np.float32)})
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: np.frombuffer(content, np.float16).reshape(shape) for key, (_, shape, content) in raw(unet).items()}
    write(unet, tensors | {"foo": np.ones(2, np.float16)}, {"format": "pt"})
    assert ids(folder) == {"key-unknown"}
    assert cli("prune", folder, "--unknown", "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "safety_checker" / "model.safetensors").exists()
    assert "foo" not in raw(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert ids(tmp_path / "out") == set()


def test_where_nothing_is_known_nothing_is_unknown(tmp_path: Path) -> None:
    lora = write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": np.ones((4, 4), np.float16)})
    result = cli("prune", lora, "--unknown", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")


@pytest.mark.parametrize("key", ["depth_model.model.pretrained.x", "denoiser.sigmas", "scaled_fp8"])
def test_what_published_files_carry_besides_is_known(key: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model.safetensors", synthetic.model("sd1") | {key: np.ones(2, np.float32)})
    assert ids(model) == set()
    assert cli("prune", model, "--unknown", "-o", tmp_path / "out.safetensors").code == 0
    assert key in raw(tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["vae/config.json", "model_index.json", "new.sarif", "vae/new.sarif"])
def test_no_report_is_written_into_a_model(name: str, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for option in ("--sarif", "--html", "--junit", "--markdown"):
        result = cli("verify", folder, option, folder / name, "--json")
        assert (result.code, result.json["error"]["kind"]) == (4, "exists")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_report_replaces_neither_json_nor_what_fix_writes_nor_another(tmp_path: Path) -> None:
    model = Path(shutil.copy(BROKEN, tmp_path / "model.safetensors"))
    other = tmp_path / "config.json"
    other.write_text('{"a": 1}')
    assert cli("verify", model, "--sarif", other).code == 4
    assert other.read_text() == '{"a": 1}'
    mended = tmp_path / "model.fixed.safetensors"
    assert cli("verify", model, "--fix", "--html", mended).code == 4
    assert ids(mended) == set()
    twice = cli("verify", model, "--html", tmp_path / "x", "--junit", tmp_path / "x", "--json")
    assert (twice.code, twice.json["error"]["kind"]) == (2, "usage")


def test_what_fix_leaves_behind_is_told(tmp_path: Path) -> None:
    tensors = {key: torch.from_numpy(value) for key, value in synthetic.model("sd1").items()}
    tensors[CLIP + "text_model.embeddings.position_ids"] = torch.zeros(1, 77)
    model = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "callbacks": {"a": torch.ones(3)}, "epoch": 2}, model)
    result = cli("verify", model, "--fix")
    assert "not carried over: callbacks" in result.err
    assert (tmp_path / "model.fixed.safetensors").exists()


def test_an_allowed_finding_that_fix_removed_was_found(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1") | {CLIP + "text_model.embeddings.position_ids": np.zeros((1, 77), np.int64)}
    model = write(tmp_path / "model.safetensors", tensors, {"modelspec.hash_sha256": "0x" + "0" * 64})
    result = cli("verify", model, "--fix", "--allow", "metadata-hash")
    assert "allowed, but not found" not in result.err
    assert result.code == 0


# ---------------------------------------------------------------- what is broken isn't sound


@pytest.mark.parametrize("dtype", ["int8", "bool", "uint64", "complex64"])
def test_weights_are_floats(dtype: str, tmp_path: Path) -> None:
    tensors = synthetic.model("sd1")
    vae = {key: np.zeros(value.shape, dtype) for key, value in tensors.items() if key.startswith(VAE)}
    model = write(tmp_path / "model.safetensors", tensors | vae)
    assert "weight-kind" in ids(model)
    assert cli("verify", model, "--dtype", "fp16").code == 1


def test_a_dtype_is_asked_for_besides_a_manifest(tmp_path: Path) -> None:
    model = write(tmp_path / "model.safetensors", synthetic.model("sd1"))
    assert cli("manifest", model, "-o", tmp_path / "m.json").code == 0
    assert cli("verify", model, "--manifest", tmp_path / "m.json").code == 0
    assert cli("verify", model, "--manifest", tmp_path / "m.json", "--dtype", "fp16").code == 0
    assert ids(model, "--manifest", tmp_path / "m.json", "--dtype", "fp32") == {"dtype-asked"}


# ---------------------------------------------------------------- what is sound isn't broken


@pytest.mark.parametrize(
    "stated",
    ["Stable-Diffusion-v1", "sd-v1", "playground-v2-5", "stable-diffusion-v1-inpainting", "stable-diffusion-v1/x"],
)
def test_a_name_that_isnt_known_is_no_other_familys(stated: str, tmp_path: Path) -> None:
    assert ids(write(tmp_path / "a.safetensors", synthetic.model("sd1"), {"modelspec.architecture": stated})) == set()


@pytest.mark.parametrize(("profile", "code"), [("ldm", 0), ("comfyui", 0), ("a1111", 1), ("kohya", 1), ("strict", 1)])
def test_a_unet_alone_under_its_prefix(profile: str, code: int, tmp_path: Path) -> None:
    unet = {key: value for key, value in synthetic.model("sd1").items() if key.startswith(UNET)}
    model = write(tmp_path / "model.safetensors", unet)
    assert cli("verify", model, "--profile", profile).code == code


def test_right_ids_in_a_folder_are_a_note(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {key: np.frombuffer(content, np.float16).reshape(shape) for key, (_, shape, content) in raw(file).items()}
    write(file, tensors | {"text_model.embeddings.position_ids": np.arange(77)[None]}, {"format": "pt"})
    assert cli("verify", folder).code == 0
    assert ids(folder) == {"position-ids-unneeded"}
    wrong = write(file, tensors | {"text_model.embeddings.position_ids": np.zeros((1, 77))}, {"format": "pt"})
    assert wrong.exists()
    assert ids(folder) == {"position-ids-wrong"}


# ---------------------------------------------------------------- the process


def test_without_a_stdout() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m sdsurgery verify "$1" >&-', sys.executable, str(BROKEN)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_NOFILE"), reason="the system has no such limit")
def test_many_models_need_few_descriptors(tmp_path: Path) -> None:
    names = [tmp_path / f"m{number}.safetensors" for number in range(120)]
    for name in names:
        os.link(Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path / "one.sft")), name)
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 40; "$0" -m sdsurgery verify "$@" -q', sys.executable, *map(str, names)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_file_is_named_where_the_message_doesnt(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{")
    result = shell("verify", folder)
    assert result.code == 3
    assert "vae/config.json" in result.out


def test_an_allow_list_with_a_mark_and_a_key_with_a_hash(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1") | {"junk#1": np.ones(2, np.float16), "junk[2]": np.ones(2, np.float16)}
    model = write(tmp_path / "model.safetensors", tensors)
    assert cli("verify", model, "--allow", "key-unknown:junk#1", "--allow", "key-unknown:junk[2]").code == 0
    listed = tmp_path / "allow.txt"
    listed.write_bytes("﻿key-unknown junk*\n".encode())
    assert cli("verify", model, "--allow-list", listed).code == 0
