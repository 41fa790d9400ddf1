"""merge-vae, replace, extract: whole components between checkpoints, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import synthetic
import torch
from conftest import FIXTURES, Raw, cli, metadata, raw, raw_array, raw_pickle, shell, write
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import NARROW, SD1_IDS, merged_ids

import sdsurgery as sd
from sdsurgery.models import known

VAE, UNET = "first_stage_model.", "model.diffusion_model."
OK = FIXTURES / "sd1-ids-ok.safetensors"
DONOR = FIXTURES / "vae.safetensors"

Arrays = dict[str, np.ndarray[Any, Any]]


def under(prefix: str, tensors: Mapping[str, Raw]) -> dict[str, Raw]:
    return {key: value for key, value in tensors.items() if key.startswith(prefix)}


def outside(prefix: str, tensors: Mapping[str, Raw]) -> dict[str, Raw]:
    return {key: value for key, value in tensors.items() if not key.startswith(prefix)}


def stripped(prefix: str, tensors: Mapping[str, Raw]) -> dict[str, Raw]:
    return {key.removeprefix(prefix): value for key, value in under(prefix, tensors).items()}


def prefixed(prefix: str, tensors: Mapping[str, Raw]) -> dict[str, Raw]:
    return {prefix + key: value for key, value in tensors.items()}


def other_vae(family: str = "sd1", seed: int = 5, **more: Any) -> Arrays:
    return synthetic.part(synthetic.model(family, seed=seed, **more), VAE)


def ruin(vae: Arrays, what: str) -> None:
    if what == "partial":
        for key in [key for key in vae if key.startswith("decoder.mid.")]:
            del vae[key]
    elif what == "one missing":
        del vae["decoder.norm_out.bias"]
    elif what == "misshapen":
        vae["decoder.norm_out.bias"] = np.zeros(3, np.float16)
    elif what == "linear attention":  # what a convertor leaves that squeezes blindly
        vae["decoder.mid.attn_1.q.weight"] = vae["decoder.mid.attn_1.q.weight"][:, :, 0, 0].copy()


# ---------------------------------------------------------------- merge-vae: donors


def donor_file(kind: str, folder: Path) -> tuple[Path, dict[str, Raw]]:
    """A donor, and its VAE under bare names, as its library sees it."""
    if kind == "bare":
        return DONOR, raw(DONOR)
    vae = other_vae()
    if kind == "prefixed":
        path = write(folder / "vae.safetensors", {VAE + key: value for key, value in vae.items()})
    elif kind == "wrapped":
        path = write(folder / "vae.safetensors", {"module." + key: value for key, value in vae.items()})
        return path, {key.removeprefix("module."): value for key, value in raw(path).items()}
    elif kind == "whole checkpoint":
        path = write(folder / "model.safetensors", synthetic.model("sd1", seed=5))
    elif kind == "sd2's":
        path = write(folder / "model.safetensors", synthetic.model("sd2", seed=5))
    elif kind == "pickle with losses":
        vaes = {key: value for key, value in raw_pickle(FIXTURES / "vae.vae.pt").items() if not key.startswith("loss.")}
        return FIXTURES / "vae.vae.pt", vaes
    elif kind == "legacy pickle of a whole checkpoint":
        return FIXTURES / "sd1-legacy.ckpt", stripped(VAE, raw_pickle(FIXTURES / "sd1-legacy.ckpt"))
    elif kind == "pickle with EMA of its own":
        path = folder / "vae.pt"
        more = {f"model_ema.{key.replace('.', '')}": value for key, value in vae.items()}
        torch.save({key: torch.from_numpy(value.copy()) for key, value in (vae | more).items()}, path)
        return path, {key: value for key, value in raw_pickle(path).items() if not key.startswith("model_ema.")}
    return path, stripped(VAE, raw(path)) or raw(path)


DONORS = (
    "bare", "prefixed", "wrapped", "whole checkpoint", "sd2's", "pickle with losses",
    "legacy pickle of a whole checkpoint", "pickle with EMA of its own",
)  # fmt: skip


@pytest.mark.parametrize("kind", DONORS)
def test_merge_vae_takes_the_vae_and_nothing_else(kind: str, tmp_path: Path) -> None:
    donor, vae = donor_file(kind, tmp_path)
    assert len(vae) == 248
    model = write(tmp_path / "target.safetensors", synthetic.model("sd1", seed=9))
    before, donated = model.read_bytes(), donor.read_bytes()
    result = cli("merge-vae", model, donor, "--json")
    output = tmp_path / "target.fixed.safetensors"
    assert (result.code, result.json["output"]) == (0, str(output))
    assert raw(output) == outside(VAE, raw(model)) | prefixed(VAE, vae)
    assert {change["kind"] for change in result.json["changes"]} == {"replaced"}
    assert all(change["key"].startswith(VAE) for change in result.json["changes"])
    assert (model.read_bytes(), donor.read_bytes()) == (before, donated)


@pytest.mark.parametrize(
    "model", ["merged.ckpt", "sd1-legacy.ckpt", "sd1-wrapped.safetensors", "sd1-flat-text-encoder.safetensors"]
)
def test_merge_vae_into_every_kind_of_model(model: str, tmp_path: Path) -> None:
    path, output = FIXTURES / model, tmp_path / "out.safetensors"
    assert cli("merge-vae", path, DONOR, "-o", output).code == 0
    before = raw(path) if path.suffix == ".safetensors" else raw_pickle(path)
    prefix = "module." + VAE if "wrapped" in model else VAE
    assert raw(output) == outside(prefix, before) | prefixed(prefix, raw(DONOR))


def test_merge_vae_writes_a_ckpt(tmp_path: Path) -> None:
    output = tmp_path / "out.ckpt"
    assert cli("merge-vae", OK, FIXTURES / "vae.vae.pt", "-o", output).code == 0
    assert raw_pickle(output) == outside(VAE, raw(OK)) | prefixed(VAE, raw(DONOR))


def test_a_model_without_a_vae_gets_one(tmp_path: Path) -> None:
    tensors = {key: value for key, value in synthetic.model("sd1").items() if not key.startswith(VAE)}
    model, output = write(tmp_path / "model.safetensors", tensors), tmp_path / "out.safetensors"
    result = cli("merge-vae", model, DONOR, "-o", output, "--json")
    assert raw(output) == raw(model) | prefixed(VAE, raw(DONOR))
    assert {change["kind"] for change in result.json["changes"]} == {"added"}
    assert len(result.json["changes"]) == 248


def test_a_model_with_half_a_vae_gets_the_rest(tmp_path: Path) -> None:
    tensors = synthetic.model("sd1")
    gone = [key for key in tensors if key.startswith(VAE + "decoder.")]
    for key in gone:
        del tensors[key]
    model, output = write(tmp_path / "model.safetensors", tensors), tmp_path / "out.safetensors"
    result = cli("merge-vae", model, DONOR, "-o", output, "--json")
    assert result.code == 0
    assert raw(output) == outside(VAE, raw(model)) | prefixed(VAE, raw(DONOR))
    assert {change["key"] for change in result.json["changes"] if change["kind"] == "added"} == set(gone)


def test_what_else_lies_under_the_models_vae_stays(tmp_path: Path) -> None:
    tensors = {**synthetic.model("sd1"), VAE + "loss.logvar": np.array(1.5, np.float32)}
    model, output = write(tmp_path / "model.safetensors", tensors), tmp_path / "out.safetensors"
    assert cli("merge-vae", model, FIXTURES / "vae.vae.pt", "-o", output).code == 0
    expected = outside(VAE, raw(model)) | prefixed(VAE, raw(DONOR))
    assert raw(output) == expected | {VAE + "loss.logvar": raw_array(np.array(1.5, np.float32), "F32")}


def test_into_a_file_of_a_vae_alone(tmp_path: Path) -> None:
    model = write(tmp_path / "old.vae.safetensors", other_vae())
    output = tmp_path / "out.safetensors"
    assert cli("merge-vae", model, DONOR, "-o", output).code == 0
    assert raw(output) == raw(DONOR)


@pytest.mark.parametrize("target", ["clip-ids-unexpected.safetensors", "unet", "unknown"])
def test_into_what_can_hold_no_vae(target: str, tmp_path: Path) -> None:
    if target == "unet":
        path = write(tmp_path / "unet.safetensors", synthetic.part(synthetic.model("sd1"), UNET))
    elif target == "unknown":
        path = write(tmp_path / "unknown.safetensors", {"a": np.ones(3)})
    else:
        path = FIXTURES / target
    result = cli("merge-vae", path, DONOR, "-o", tmp_path / "out.safetensors", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_donors_dtype_is_kept(tmp_path: Path) -> None:
    donor = write(tmp_path / "vae.safetensors", other_vae(dtype="float32"))
    output = tmp_path / "out.safetensors"
    assert cli("merge-vae", OK, donor, "-o", output).code == 0
    assert raw(output) == outside(VAE, raw(OK)) | prefixed(VAE, raw(donor))
    assert {dtype for dtype, _, _ in under(VAE, raw(output)).values()} == {"F32"}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("donors", ["float16", "float32"])
def test_dtype_casts_the_vae_and_nothing_else(dtype: str, donors: str, tmp_path: Path) -> None:
    vae = other_vae(dtype=donors)
    donor, output = write(tmp_path / "vae.safetensors", vae), tmp_path / "out.safetensors"
    assert cli("merge-vae", OK, donor, "--dtype", dtype, "-o", output).code == 0
    numpy = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}[dtype]
    name = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[dtype]
    expected = {VAE + key: raw_array(value.astype(numpy), name) for key, value in vae.items()}
    assert raw(output) == outside(VAE, raw(OK)) | expected


def test_dtype_that_overflows_is_refused_and_names_the_tensor(tmp_path: Path) -> None:
    vae = other_vae(dtype="float32")
    vae["decoder.conv_in.bias"][2] = 1e5
    donor = write(tmp_path / "vae.safetensors", vae)
    result = cli("merge-vae", OK, donor, "--dtype", "fp16", "-o", tmp_path / "out.safetensors", "--json")
    assert (result.code, result.json["error"]["kind"]) == (1, "refused")
    assert (result.json["error"]["key"], result.json["error"]["file"]) == ("decoder.conv_in.bias", str(donor))
    assert not (tmp_path / "out.safetensors").exists()


# ---------------------------------------------------------------- merge-vae: nothing to do, and not fit to do


@pytest.mark.parametrize("what", ["whole", "extracted"])
def test_the_same_vae_again_changes_nothing(what: str, tmp_path: Path) -> None:
    donor = OK
    if what == "extracted":
        donor = tmp_path / "vae.safetensors"
        cli("extract", OK, "--component", "vae", "-o", donor)
    result = cli("merge-vae", OK, donor, "--json")
    assert (result.code, result.json["changed"], result.json["output"]) == (0, False, None)
    assert "already" in result.json["notes"][-1]["message"]


def test_twice_is_once(tmp_path: Path) -> None:
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    assert cli("merge-vae", OK, DONOR, "-o", once).code == 0
    again = cli("merge-vae", once, DONOR, "-o", twice, "--json")
    assert (again.code, again.json["changed"]) == (0, False)
    assert twice.read_bytes() == once.read_bytes()


def test_only_what_differs_is_called_replaced(tmp_path: Path) -> None:
    vae = {key: value.copy() for key, value in synthetic.part(synthetic.model("sd1"), VAE).items()}
    vae["decoder.conv_out.bias"] += np.float16(1)
    donor = write(tmp_path / "vae.safetensors", vae)
    result = cli("merge-vae", OK, donor, "--dry-run", "--json")
    assert [change["key"] for change in result.json["changes"]] == [VAE + "decoder.conv_out.bias"]


def test_a_linear_layer_becomes_the_convolution_that_it_is(tmp_path: Path) -> None:
    """The same numbers, whatever squeezed them; the model's shape is kept."""
    flat = other_vae()
    ruin(flat, "linear attention")
    written = []
    for name, vae in (("sound", other_vae()), ("flat", flat)):
        donor = write(tmp_path / f"{name}.safetensors", vae)
        assert cli("merge-vae", OK, donor, "-o", tmp_path / f"{name}.out.safetensors").code == 0
        written.append(raw(tmp_path / f"{name}.out.safetensors"))
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("partial", "decoder.mid.block_1.norm1.weight"),
        ("one missing", "decoder.norm_out.bias"),
        ("misshapen", "decoder.norm_out.bias [3] instead of [2]"),
    ],
)
@pytest.mark.parametrize("prefix", ["", VAE])
def test_a_donor_that_isnt_whole_is_refused_and_says_why(what: str, words: str, prefix: str, tmp_path: Path) -> None:
    vae = other_vae()
    ruin(vae, what)
    donor = write(tmp_path / "vae.safetensors", {prefix + key: value for key, value in vae.items()})
    result = cli("merge-vae", OK, donor, "-o", tmp_path / "out.safetensors", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert words in result.json["error"]["message"]
    assert result.json["error"]["file"] == str(donor)
    assert result.json["error"]["key"].startswith(prefix + "decoder.")
    assert cli("merge-vae", OK, donor, "--force", "--dry-run").code == 3
    assert not (tmp_path / "out.safetensors").exists()


def test_the_partial_fixture_is_refused_with_the_count(tmp_path: Path) -> None:
    result = cli("merge-vae", OK, FIXTURES / "vae-partial.safetensors")
    assert result.code == 3
    assert "lacks 26 of 248 weights: decoder.up.3.block.0.norm1.weight" in result.err
    assert "and 21 more" in result.err


@pytest.mark.parametrize("name", ["clip-ids-unexpected.safetensors", "unknown"])
def test_a_donor_without_a_vae_is_refused(name: str, tmp_path: Path) -> None:
    donor = FIXTURES / name
    if name == "unknown":
        donor = write(tmp_path / "x.safetensors", {"layer.weight": np.ones(3, np.float32)})
    result = cli("merge-vae", OK, donor, "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert "no vae" in result.json["error"]["message"]


def test_a_vae_of_another_width_doesnt_fit(tmp_path: Path) -> None:
    widths = NARROW["sd1"]
    wide = synthetic.part(
        synthetic.model("sd1", type(widths)(widths.unet, widths.context, vae=(4, 8, 12, 12), vocabulary=64)), VAE
    )
    donor = write(tmp_path / "vae.safetensors", wide)
    result = cli("merge-vae", OK, donor, "--force", "-o", tmp_path / "out.safetensors", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert "doesn't fit" in result.json["error"]["message"]


def test_a_hostile_donor_is_refused(tmp_path: Path) -> None:
    result = cli("merge-vae", OK, FIXTURES / "hostile-zip.ckpt", "-o", tmp_path / "out.safetensors", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "hostile")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_donor_is_never_replaced(tmp_path: Path) -> None:
    donor = Path(shutil.copy(DONOR, tmp_path))
    before = donor.read_bytes()
    assert cli("merge-vae", OK, donor, "-o", donor, "--force").code == 4
    assert donor.read_bytes() == before


# ---------------------------------------------------------------- merge-vae: another family's latents


def sdxl_vae(kind: str, folder: Path) -> Path:
    """SDXL's VAE, which has SD1's names and shapes, in a file that tells what it is."""
    model = synthetic.model("sdxl", seed=3)
    if kind == "whole checkpoint":
        return write(folder / "xl.safetensors", model)
    if kind == "inpainting checkpoint":
        return write(folder / "xl.safetensors", synthetic.model("sdxl", seed=3, inputs=9))
    if kind == "refiner":
        return write(folder / "xl.safetensors", synthetic.model("sdxl-refiner", seed=3))
    if kind == "modelspec":
        return FIXTURES / "vae-sdxl.safetensors"
    whole, part = write(folder / "xl.safetensors", model), folder / "vae.safetensors"
    words = ["--keep-prefix"] if kind == "extracted with its prefix" else []
    assert cli("extract", whole, "--component", "vae", "-o", part, *words).code == 0
    if kind == "extracted and fixed":
        assert cli("cast", part, "fp32", "-o", folder / "cast.safetensors").code == 0
        return folder / "cast.safetensors"
    return part


KINDS = (
    "whole checkpoint", "inpainting checkpoint", "refiner", "modelspec", "extracted", "extracted with its prefix",
    "extracted and fixed",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_sdxls_vae_is_refused_without_force(kind: str, model: str, tmp_path: Path) -> None:
    donor, output = sdxl_vae(kind, tmp_path), tmp_path / "out.safetensors"
    target = write(tmp_path / "target.safetensors", synthetic.model(model))
    result = cli("merge-vae", target, donor, "-o", output, "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert "another scale" in result.json["error"]["message"]
    assert "--force" in result.json["error"]["remedy"]
    assert not output.exists()

    forced = cli("merge-vae", target, donor, "-o", output, "--force", "--json")
    assert forced.code == 0
    assert any("another scale" in note["message"] for note in forced.json["notes"] if note["level"] == "warning")
    bare = stripped(VAE, raw(donor)) or raw(donor)
    assert raw(output) == outside(VAE, raw(target)) | prefixed(VAE, bare)


@pytest.mark.parametrize("kind", ["whole checkpoint", "modelspec", "extracted"])
def test_sdxls_vae_fits_sdxl(kind: str, tmp_path: Path) -> None:
    target = write(tmp_path / "target.safetensors", synthetic.model("sdxl", seed=8))
    result = cli("merge-vae", target, sdxl_vae(kind, tmp_path), "--dry-run", "--json")
    assert (result.code, len(result.json["changes"])) == (0, 248)
    assert any("the VAE is of sdxl" in note["message"] for note in result.json["notes"])


def test_sd1s_vae_is_refused_by_sdxl(tmp_path: Path) -> None:
    target = write(tmp_path / "target.safetensors", synthetic.model("sdxl"))
    assert cli("merge-vae", target, OK, "--dry-run").code == 3
    assert cli("merge-vae", target, OK, "--dry-run", "--force").code == 0


def test_sd2s_vae_fits_sd1(tmp_path: Path) -> None:
    """Their latents have the same scale."""
    donor = write(tmp_path / "sd2.safetensors", synthetic.model("sd2", seed=4))
    assert cli("merge-vae", OK, donor, "--dry-run").code == 0


def test_a_vae_of_nobody_knows_whom_fits_with_a_note() -> None:
    result = cli("merge-vae", OK, DONOR, "--dry-run", "--json")
    assert any("isn't known" in note["message"] for note in result.json["notes"])


def test_an_extract_in_memory_is_known_too() -> None:
    """The record is in the steps, not yet in metadata."""
    vae = sd.Checkpoint.from_state_dict(synthetic.model("sdxl", seed=3)).pipe(sd.Extract("vae"))
    target = sd.open(OK)
    with pytest.raises(sd.SurgeryError, match="another scale"):
        sd.MergeVae(vae)(target)
    assert len(sd.MergeVae(vae, force=True)(target).changes) == 248


def test_a_published_file_is_known_by_its_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file of a published one's size is hashed, and looked up among them."""
    donor = write(tmp_path / "vae.safetensors", other_vae())
    content = donor.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    published = known.KnownFile("sdxl_vae.safetensors", digest, len(content), "sdxl")
    monkeypatch.setattr(known, "_files", lambda: {digest: published})
    result = cli("merge-vae", OK, donor, "--dry-run", "--json")
    assert result.code == 3
    assert "it is sdxl_vae.safetensors" in result.json["error"]["message"]
    target, output = write(tmp_path / "xl.safetensors", synthetic.model("sdxl")), tmp_path / "out.safetensors"
    assert cli("merge-vae", target, donor, "-o", output).code == 0
    (step,) = json.loads(metadata(output)["sdsurgery"])["steps"]
    assert step["inputs"] == [{"name": "vae.safetensors", "sha256": digest}]


def test_the_known_files_are_those_of_the_field() -> None:
    """Section 4 of the facts of the field, SD1's and SDXL's."""
    digests = {
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": "sd1",
        "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": "sd1",
        "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75": "sd1",
        "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab": "sd1",
        "f921fb3f29891d2a77a6571e56b8b5052420d2884129517a333c60b1b4816cdf": "sd1",
        "df3c506e51b7ee1d7b5a6a2bb7142d47d488743c96aa778afb0f53a2cdc2d38d": "sd1",
        "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e": "sdxl",
        "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1": "sdxl",
    }
    data = json.loads(resources.files("sdsurgery.data").joinpath("known_files.json").read_text("utf-8"))
    assert {entry["sha256"]: entry["family"] for entry in data["files"]} == digests
    assert {digest: file.family for digest, file in known._files().items()} == digests


def test_a_file_of_another_size_is_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(_: Any) -> str:
        raise AssertionError("it was hashed")

    monkeypatch.setattr(known, "sha256_of", unread)
    assert cli("merge-vae", OK, DONOR, "--dry-run").code == 0


# ---------------------------------------------------------------- extract and replace

PARTS = {
    ("sd1", "unet"): UNET,
    ("sd1", "vae"): VAE,
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd2", "unet"): UNET,
    ("sd2", "vae"): VAE,
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "unet"): UNET,
    ("sdxl", "vae"): VAE,
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
    ("sdxl-refiner", "unet"): UNET,
    ("sdxl-refiner", "vae"): VAE,
    ("sdxl-refiner", "text_encoder_2"): "conditioner.embedders.0.model.",
}


@pytest.mark.parametrize(("family", "component"), PARTS)
def test_extract_and_replace_back_is_the_identity(family: str, component: str, tmp_path: Path) -> None:
    prefix = PARTS[family, component]
    model = write(tmp_path / "model.safetensors", synthetic.model(family), {"format": "pt"})
    taken = tmp_path / f"model.{component}.safetensors"
    result = cli("extract", model, "--component", component, "--json")
    assert (result.code, result.json["output"]) == (0, str(taken))
    assert raw(taken) == stripped(prefix, raw(model))
    # Back where it came from nothing changes; into another model it goes whole, and back again.
    back = cli("replace", model, "--component", component, "--from", taken, "--json")
    assert (back.code, back.json["changed"], back.json["output"]) == (0, False, None)
    other = write(tmp_path / "other.safetensors", synthetic.model(family, seed=6))
    changed, restored = tmp_path / "changed.safetensors", tmp_path / "restored.safetensors"
    assert cli("replace", other, "--component", component, "--from", taken, "-o", changed).code == 0
    assert raw(changed) == outside(prefix, raw(other)) | under(prefix, raw(model))
    assert cli("replace", changed, "--component", component, "--from", other, "-o", restored).code == 0
    assert raw(restored) == raw(other)


@given(st.sampled_from(["unet", "vae", "text_encoder"]), st.integers(0, 1 << 30))
@settings(max_examples=6)
def test_replace_takes_from_a_whole_model(component: str, seed: int) -> None:
    prefix = PARTS["sd1", component]
    model = sd.Checkpoint.from_state_dict(synthetic.model("sd1"))
    donor = sd.Checkpoint.from_state_dict(synthetic.model("sd1", seed=seed + 1))
    result = sd.Replace(component, donor)(model)
    for key, tensor in result.items():
        assert tensor.tobytes() == (donor if key.startswith(prefix) else model)[key].tobytes()
    assert result.keys() == model.keys()


def test_replace_leaves_the_position_ids_alone(tmp_path: Path) -> None:
    """They are no weights: neither the donor's damage nor the donor's health comes over."""
    broken = write(
        tmp_path / "broken.safetensors", {**synthetic.model("sd1", seed=4), SD1_IDS: merged_ids(0.1, "float32")}
    )
    output = tmp_path / "out.safetensors"
    for model, donor in ((OK, broken), (broken, OK)):
        words = ["replace", model, "--component", "text_encoder", "--from", donor, "-o", output, "--force"]
        assert cli(*words).code == 0
        assert raw(output)[SD1_IDS] == raw(model)[SD1_IDS]
        prefix = PARTS["sd1", "text_encoder"]
        ours, theirs = raw(output), raw(donor)
        assert all(ours[key] == theirs[key] for key in ours if key.startswith(prefix) and key != SD1_IDS)


def test_replace_finds_the_weights_by_their_canonical_names(tmp_path: Path) -> None:
    """A flat text encoder takes a prefixed one's weights under its own keys."""
    output = tmp_path / "out.safetensors"
    donor = write(tmp_path / "donor.safetensors", synthetic.model("sd1", seed=4))
    flat = FIXTURES / "sd1-flat-text-encoder.safetensors"
    assert cli("replace", flat, "--component", "text_encoder", "--from", donor, "-o", output).code == 0
    result, given_ = raw(output), raw(donor)
    assert result.keys() == raw(flat).keys()
    key = "cond_stage_model.transformer.final_layer_norm.bias"
    assert result[key] == given_[key.replace("transformer.", "transformer.text_model.")]


def test_replace_casts_on_request(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    donor = write(tmp_path / "donor.safetensors", synthetic.model("sd1", seed=4, dtype="float32"))
    assert cli("replace", OK, "--component", "unet", "--from", donor, "--dtype", "bf16", "-o", output).code == 0
    result, given_ = raw(output), raw(donor)
    assert outside(UNET, result) == outside(UNET, raw(OK))
    for key, (_, shape, content) in under(UNET, given_).items():
        wide = np.frombuffer(content, np.float32).reshape(shape)
        assert result[key] == raw_array(wide.astype(ml_dtypes.bfloat16), "BF16")


@pytest.mark.parametrize(
    ("component", "family", "inputs", "words"),
    [
        ("unet", "sd2", 4, "another structure|doesn't fit"),
        ("unet", "sdxl", 4, "another structure"),
        ("unet", "sd1", 9, r"input_blocks.0.0.weight \[4, 9, 3, 3\] instead of \[4, 4, 3, 3\]"),
        ("text_encoder", "sd2", 4, "another structure"),
        ("text_encoder_2", "sdxl", 4, "no text_encoder_2 is in it"),
    ],
)
def test_replace_by_what_doesnt_fit(component: str, family: str, inputs: int, words: str, tmp_path: Path) -> None:
    donor = sd.Checkpoint.from_state_dict(synthetic.model(family, inputs=inputs))
    with pytest.raises(sd.SurgeryError, match=words) as caught:
        sd.Replace(component, donor, force=True)(sd.open(OK))  # type: ignore[arg-type]
    assert caught.value.exit_code == 3


def test_replace_vae_by_another_familys(tmp_path: Path) -> None:
    words = ["replace", OK, "--component", "vae", "--from", FIXTURES / "vae-sdxl.safetensors", "--dry-run"]
    assert cli(*words).code == 3
    assert cli(*words, "--force").code == 0


def test_replace_says_which_weights_the_donor_couldnt_give(tmp_path: Path) -> None:
    """WD 1.4 lacks the last layer, which SD2 doesn't use: the model's own stays, and the report says so."""
    tensors = synthetic.model("sd2", seed=4)
    tail = ("transformer.resblocks.23.", "text_projection", "logit_scale")
    prefix = "cond_stage_model.model."
    lacking = {key: value for key, value in tensors.items() if not key.removeprefix(prefix).startswith(tail)}
    donor = write(tmp_path / "wd.safetensors", lacking)
    model, output = write(tmp_path / "sd2.safetensors", synthetic.model("sd2")), tmp_path / "out.safetensors"
    result = cli("replace", model, "--component", "text_encoder", "--from", donor, "-o", output, "--json")
    assert result.code == 0
    kept = {key: value for key, value in raw(model).items() if key not in lacking}
    assert raw(output) == outside(prefix, raw(model)) | under(prefix, raw(donor)) | kept
    (note,) = (note for note in result.json["notes"] if "stay the model's own" in note["message"])
    assert "14" in note["message"]
    assert "resblocks.23." in note["message"]
    # The other way round the model gets them.
    result = cli("replace", donor, "--component", "text_encoder", "--from", model, "--dry-run", "--json")
    assert sum(change["kind"] == "added" for change in result.json["changes"]) == 14


def test_extract_several_keeps_their_prefixes(tmp_path: Path) -> None:
    result = cli("extract", OK, "--component", "vae", "--component", "text_encoder", "-o", tmp_path / "out.safetensors")
    assert result.code == 0
    both = under(VAE, raw(OK)) | under("cond_stage_model.", raw(OK))
    assert raw(tmp_path / "out.safetensors") == both


def test_extract_of_several_has_a_name_of_its_own(tmp_path: Path) -> None:
    model = Path(shutil.copy(OK, tmp_path / "m.safetensors"))
    assert cli("extract", model, "--component", "vae", "--component", "unet").code == 0
    assert (tmp_path / "m.vae-unet.safetensors").exists()


def test_extract_keeps_the_prefix_on_request(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert cli("extract", OK, "--component", "vae", "--keep-prefix", "-o", output).code == 0
    assert raw(output) == under(VAE, raw(OK))


def test_extract_from_a_pickle_and_a_wrapper(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = cli("extract", FIXTURES / "sd1-full-ema.ckpt", "--component", "unet", "-o", output, "--json")
    assert raw(output) == stripped(UNET, raw_pickle(FIXTURES / "sd1-full-ema.ckpt"))
    dropped = {change["key"] for change in result.json["changes"] if change["kind"] == "dropped"}
    assert {"epoch", "model_ema.decay", "betas", SD1_IDS} <= dropped
    wrapped = FIXTURES / "sd1-wrapped.safetensors"
    assert cli("extract", wrapped, "--component", "unet", "-o", output, "--force").code == 0
    assert raw(output) == stripped("module." + UNET, raw(wrapped))


def test_extract_takes_along_what_belongs_to_it(tmp_path: Path) -> None:
    """Position ids, and what nobody knows but lies under its prefix."""
    tensors = {**synthetic.model("sd1"), VAE + "loss.logvar": np.ones(3, np.float32)}
    model, output = write(tmp_path / "model.safetensors", tensors), tmp_path / "out.safetensors"
    assert cli("extract", model, "--component", "vae", "-o", output).code == 0
    assert raw(output) == stripped(VAE, raw(model))
    assert cli("extract", OK, "--component", "text_encoder", "-o", output, "--force").code == 0
    assert synthetic.IDS in raw(output)


def test_extract_records_the_family(tmp_path: Path) -> None:
    model = write(tmp_path / "xl.safetensors", synthetic.model("sdxl", inputs=9), {"modelspec.title": "XL"})
    output = tmp_path / "out.safetensors"
    assert cli("extract", model, "--component", "vae", "-o", output).code == 0
    found = metadata(output)
    (step,) = json.loads(found["sdsurgery"])["steps"]
    assert (step["operation"], step["family"]) == ("extract", "sdxl")
    assert step["parameters"] == {"component": ["vae"]}
    assert found["modelspec.title"] == "XL"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["extract", OK, "--component", "text_encoder_2"], 3),
        (["extract", DONOR, "--component", "unet"], 3),
        (["extract", OK], 2),
        (["extract", OK, "--component", "ema"], 2),
        (["extract", OK, "--component", "clip"], 2),
        (["replace", OK, "--component", "vae"], 2),
        (["replace", OK, "--from", DONOR], 2),
        (["replace", OK, "--component", "vae", "--from", "nothing"], 3),
        (["replace", DONOR, "--component", "unet", "--from", OK], 3),
        (["merge-vae", OK], 2),
        (["merge-vae", OK, DONOR, "--dtype", "fp8"], 2),
        (["merge-vae", OK, "nothing"], 3),
        (["merge-vae", "nothing", DONOR], 3),
    ],
)
def test_exit_codes(words: list[Any], code: int, tmp_path: Path) -> None:
    before = sorted(FIXTURES.iterdir())
    result = cli(*words, "-o", tmp_path / "out.safetensors", "--json")
    assert result.code == code
    assert result.json["error"]["kind"] == ("usage" if code == 2 else result.json["error"]["kind"])
    assert list(tmp_path.iterdir()) == []
    assert sorted(FIXTURES.iterdir()) == before


def test_extract_from_python_takes_a_name_or_several() -> None:
    model = sd.open(OK)
    assert dict(sd.Extract("vae")(model)) == dict(sd.Extract(("vae",))(model))
    assert len(sd.Extract(["vae", "unet"])(model)) == 248 + 686  # type: ignore[arg-type]
    with pytest.raises(sd.SurgeryError, match="no component"):
        sd.Extract(())(model)
    with pytest.raises(sd.SurgeryError, match="vea"):
        sd.Extract("vea")  # type: ignore[arg-type]


def test_merge_vae_in_place_and_in_the_shell(tmp_path: Path) -> None:
    model = Path(shutil.copy(OK, tmp_path / "model.safetensors"))
    result = shell("merge-vae", "--in-place", "model.safetensors", FIXTURES / "vae.vae.pt", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert raw(model) == outside(VAE, raw(OK)) | prefixed(VAE, raw(DONOR))
    assert list(tmp_path.iterdir()) == [model]
    again = shell("merge-vae", "model.safetensors", FIXTURES / "vae.vae.pt", cwd=tmp_path)
    assert again.code == 0
    assert "already" in again.out
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("words", [["merge-vae", OK, DONOR], ["extract", OK, "--component", "unet"]])
def test_dry_run_and_quiet(words: list[Any], tmp_path: Path) -> None:
    dry = cli(*words, "--dry-run", "--json").json
    output = tmp_path / "out.safetensors"
    wet = cli(*words, "-o", output, "--json").json
    assert (dry["changes"], dry["notes"]) == (wet["changes"], wet["notes"])
    assert (dry["output"], wet["output"]) == (None, str(output))
    quiet = cli(*words, "-o", output, "--force", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


# ---------------------------------------------------------------- what no shape tells of a VAE


def groups_stated(folder: Path) -> int | None:
    found = json.loads((folder / "vae" / "config.json").read_text("utf-8"))["norm_num_groups"]
    assert isinstance(found, int)
    return found


def odd_groups(tmp_path: Path) -> Path:
    """A single file whose record tells of norm groups that nobody would assume."""
    folder, path = tmp_path / "odd", tmp_path / "odd.safetensors"
    assert cli("convert", OK, folder, "--quiet").code == 0
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"norm_num_groups": 1}), "utf-8")
    assert cli("convert", folder, path, "--quiet").code == 0
    return path


@pytest.mark.parametrize("words", [("merge-vae",), ("replace", "--component", "vae", "--from")])
@pytest.mark.parametrize("lone", [False, True])
def test_what_a_donor_states_goes_with_its_vae(tmp_path: Path, words: tuple[str, ...], lone: bool) -> None:
    write(tmp_path / "model.safetensors", synthetic.model("sd1", seed=9))
    donor = odd_groups(tmp_path)
    if lone:
        assert cli("extract", donor, "--component", "vae", "-o", tmp_path / "vae.pt", "--quiet").code == 0
        donor = tmp_path / "vae.pt"
    assert cli("convert", tmp_path / "model.safetensors", tmp_path / "before", "--quiet").code == 0
    assert groups_stated(tmp_path / "before") != 1
    for model, result in (("model.safetensors", "new.safetensors"), ("before", "new")):
        command, *options = words
        done = cli(command, tmp_path / model, *options, donor, "-o", tmp_path / result, "--quiet")
        assert done.code == 0, done.err
    assert cli("convert", tmp_path / "new.safetensors", tmp_path / "after", "--quiet").code == 0
    assert groups_stated(tmp_path / "after") == groups_stated(tmp_path / "new") == 1


def test_what_was_stated_of_a_vae_that_is_gone_does_not_stay(tmp_path: Path) -> None:
    write(tmp_path / "donor.safetensors", synthetic.model("sd1", seed=9))
    model = odd_groups(tmp_path)
    assert cli("merge-vae", model, tmp_path / "donor.safetensors", "-o", tmp_path / "new.safetensors").code == 0
    assert cli("convert", tmp_path / "new.safetensors", tmp_path / "after", "--quiet").code == 0
    assert groups_stated(tmp_path / "after") != 1


def test_what_was_stated_stays_where_the_vae_is_the_same_already(tmp_path: Path) -> None:
    model = odd_groups(tmp_path)
    assert cli("extract", model, "--component", "vae", "-o", tmp_path / "vae.pt", "--quiet").code == 0
    fixed = sd.open(model).pipe(sd.MergeVae(tmp_path / "vae.pt"), sd.Convert("diffusers"))
    fixed.save(tmp_path / "after")
    assert groups_stated(tmp_path / "after") == 1
