"""inspect: what it tells, beside what the libraries of each container and of each hash tell."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
import synthetic
from conftest import FIXTURES, Raw, cli, metadata, outline, raw, raw_pickle, shell, validator, write
from hypothesis import given, settings
from hypothesis import strategies as st

import sdsurgery as sd
from sdsurgery.inspection import hashes, inspect
from sdsurgery.reports import documents
from sdsurgery.sources import SourceFile

READABLE = sorted(
    path.name
    for path in FIXTURES.iterdir()
    if path.suffix in {".safetensors", ".ckpt", ".pt"} and not path.name.startswith("hostile")
)
BROKEN = sorted([*FIXTURES.glob("broken/*"), *FIXTURES.glob("hostile-*")])

UNET, VAE, CLIP, EMA, SCHEDULE = 686, 248, 197, 688, 12
EXPECTED: dict[str, tuple[str, str, str, dict[str, int], str]] = {
    "clip-ids-unexpected.safetensors": ("safetensors", "diffusers", "unknown", {"text_encoder": CLIP}, "unexpected"),
    "merged.ckpt": ("torch-zip", "ldm", "sd1", {"text_encoder": CLIP, "unet": UNET, "vae": VAE}, "fractional"),
    "sd1-full-ema.ckpt": (
        "torch-zip", "ldm", "sd1",
        {"text_encoder": CLIP, "unet": UNET, "vae": VAE, "ema": EMA, "schedule": SCHEDULE}, "ok",
    ),
    "sd1-legacy.ckpt": ("torch-legacy", "ldm", "sd1", {"text_encoder": CLIP, "unet": UNET, "vae": VAE}, "ok"),
    "sd1-ids-missing.safetensors": (
        "safetensors", "ldm", "sd1", {"text_encoder": CLIP - 1, "unet": UNET, "vae": VAE}, "missing",
    ),
    "sd2-stray-ids.safetensors": (
        "safetensors", "ldm", "sd2", {"text_encoder": 295, "unet": UNET, "vae": VAE}, "not-applicable",
    ),
    "sdxl-ids-fractional.safetensors": (
        "safetensors", "ldm", "sdxl", {"text_encoder": CLIP, "text_encoder_2": 390, "unet": 1680, "vae": VAE},
        "fractional",
    ),
    "miniature.safetensors": ("safetensors", "ldm", "sd1", {"text_encoder": CLIP, "unet": UNET, "vae": VAE}, "ok"),
    "washed-out.vae.safetensors": ("safetensors", "ldm", "unknown", {"vae": VAE}, "not-applicable"),
    "vae-partial.safetensors": ("safetensors", "ldm", "unknown", {"vae": 222}, "not-applicable"),
    "vae-sdxl.safetensors": ("safetensors", "ldm", "unknown", {"vae": VAE}, "not-applicable"),
    "vae.safetensors": ("safetensors", "ldm", "unknown", {"vae": VAE}, "not-applicable"),
    "vae.vae.pt": ("torch-zip", "ldm", "unknown", {"vae": VAE, "other": 2}, "not-applicable"),
}  # fmt: skip
for _name, _status in (
    ("flat-text-encoder", "ok"), ("wrapped", "ok"), ("ids-ok", "ok"), ("ids-fractional", "fractional"),
    ("ids-fractional-fp16", "fractional"), ("ids-wrong-dtype", "wrong-dtype"), ("ids-wrong-values", "wrong-values"),
    ("ids-wrong-shape", "wrong-shape"),
):  # fmt: skip
    EXPECTED[f"sd1-{_name}.safetensors"] = (
        "safetensors", "ldm", "sd1", {"text_encoder": CLIP, "unet": UNET, "vae": VAE}, _status,
    )  # fmt: skip


def as_the_library_has_it(path: Path) -> dict[str, Raw]:
    return raw(path) if path.suffix == ".safetensors" else raw_pickle(path)


def parameters(tensors: dict[str, Raw]) -> int:
    return sum(math.prod(shape) for _, shape, _ in tensors.values())


def nbytes(tensors: dict[str, Raw]) -> int:
    return sum(len(content) for _, _, content in tensors.values())


def test_every_fixture_is_tried() -> None:
    assert sorted(EXPECTED) == READABLE


@pytest.mark.parametrize("name", READABLE)
def test_fixtures(name: str) -> None:
    path = FIXTURES / name
    result = cli("inspect", path, "--json")
    found, tensors = result.json, as_the_library_has_it(path)
    container, layout, family, components, status = EXPECTED[name]
    assert (result.code, result.err) == (0, "")
    assert (found["path"], found["container"], found["layout"], found["family"]) == (
        str(path), container, layout, family,
    )  # fmt: skip
    assert {part: report["tensors"] for part, report in found["components"].items()} == components
    assert found["position_ids"]["status"] == status
    assert found["tensors"] == len(tensors) == sum(components.values())
    assert found["parameters"] == parameters(tensors)
    assert found["parameters"] == sum(report["parameters"] for report in found["components"].values())
    assert found["bytes"] == nbytes(tensors) == sum(report["bytes"] for report in found["components"].values())
    assert found["file_bytes"] == path.stat().st_size
    dtypes: Counter[str] = Counter()
    for report in found["components"].values():
        dtypes.update(report["dtypes"])
        assert sum(report["dtypes"].values()) == report["tensors"]
    assert dtypes == Counter(dtype for dtype, _, _ in tensors.values())
    assert found["metadata"] == (metadata(path) if container == "safetensors" else {})
    trained = name.startswith(("miniature", "washed-out"))
    assert [step["operation"] for step in found["history"]] == (["convert", "cast"] if trained else [])
    assert all(report["complete"] for part, report in found["components"].items()) == (
        name != "vae-partial.safetensors"
    )


def test_the_fields_are_those_of_the_contract() -> None:
    found = cli("inspect", FIXTURES / "merged.ckpt", "--json").json
    contract = {
        "path", "container", "layout", "family", "tensors", "parameters", "bytes", "components", "position_ids",
        "metadata", "history",
    }  # fmt: skip
    assert contract <= found.keys()
    assert "hashes" not in found
    assert "keys" not in found
    assert found["position_ids"].keys() == {"status", "wrong", "dtype", "key"}
    assert len(found["position_ids"]["wrong"]) == 22
    fields = {"tensors", "parameters", "dtypes", "complete", "missing", "unexpected"}
    assert all(fields <= report.keys() for report in found["components"].values())


def test_faults_are_listed_where_they_are() -> None:
    stray = cli("inspect", FIXTURES / "sd2-stray-ids.safetensors", "--json").json["components"]["text_encoder"]
    assert stray["unexpected"] == ["cond_stage_model.model.transformer.text_model.embeddings.position_ids"]
    assert (stray["complete"], stray["missing"]) == (True, [])
    partial = cli("inspect", FIXTURES / "vae-partial.safetensors", "--json").json["components"]["vae"]
    whole, there = raw(FIXTURES / "vae.safetensors"), raw(FIXTURES / "vae-partial.safetensors")
    assert set(partial["missing"]) == whole.keys() - there.keys()
    assert (partial["complete"], len(partial["missing"])) == (False, 26)
    losses = cli("inspect", FIXTURES / "vae.vae.pt", "--json").json["components"]["other"]
    assert sorted(losses["unexpected"]) == ["loss.discriminator.main.0.weight", "loss.logvar"]


def test_what_is_no_tensor_is_listed() -> None:
    found = cli("inspect", FIXTURES / "sd1-full-ema.ckpt", "--json").json["non_tensors"]
    assert {entry["name"] for entry in found} == {
        "epoch", "global_step", "pytorch-lightning_version", "callbacks", "optimizer_states",
    }  # fmt: skip
    assert {entry["name"]: entry["what"] for entry in found}["epoch"] == "int 3"


@pytest.mark.parametrize("name", ["sdxl-ids-fractional.safetensors", "sd1-legacy.ckpt", "vae.vae.pt"])
def test_tensors_are_listed(name: str) -> None:
    keys = cli("inspect", FIXTURES / name, "--json", "--tensors").json["keys"]
    tensors = as_the_library_has_it(FIXTURES / name)
    assert keys == {
        key: {"dtype": dtype, "shape": list(shape), "bytes": len(content)}
        for key, (dtype, shape, content) in tensors.items()
    }
    lines = cli("inspect", FIXTURES / name, "--tensors").out.splitlines()
    listed = {line.split("  ")[0]: line.split()[1:] for line in lines if line.split("  ")[0] in tensors}
    assert listed == {
        key: [dtype, *(" x ".join(map(str, shape)) or "scalar").split()] for key, (dtype, shape, _) in tensors.items()
    }


def test_history_is_shown(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    words = ["merge-vae", FIXTURES / "vae.vae.pt", "+", "fix-clip", "--target", "a1111", "+", "cast", "bf16"]
    assert cli("pipe", FIXTURES / "merged.ckpt", "-o", output, *words).code == 0
    found = cli("inspect", output, "--json").json
    assert [step["operation"] for step in found["history"]] == ["merge-vae", "fix-clip", "cast"]
    assert found["history"] == json.loads(metadata(output)["sdsurgery"])["steps"]
    text = cli("inspect", output).out
    assert "── merge-vae: 248 replaced\n│   └── vae.vae.pt" in text
    assert "── fix-clip target=a1111: 1 replaced" in text
    assert "── cast dtype=bf16: 1130 cast" in text


def test_steps_that_are_not_saved_yet_are_history_too() -> None:
    found = inspect(sd.open(FIXTURES / "merged.ckpt").pipe(sd.FixClip()))
    assert [step["operation"] for step in found.history] == ["fix-clip"]
    assert found.position_ids.status == "ok"


def test_a_checkpoint_in_memory() -> None:
    found = inspect(sd.Checkpoint.from_state_dict(synthetic.model("sd2")))
    assert (found.container, found.path, found.family) == ("memory", "", "sd2")
    validator("inspect").validate(documents.inspection(found, None, with_tensors=True))


def test_full_size_is_told_from_the_header_alone() -> None:
    """No weight of an outline can be read."""
    found = inspect(outline(synthetic.shapes("sdxl", synthetic.FULL["sdxl"])))
    assert (found.family, found.components["unet"].parameters) == ("sdxl", 2_567_463_684)
    assert found.components["vae"].parameters == 83_653_863
    assert found.components["text_encoder"].parameters == 123_060_480


# ---------------------------------------------------------------- hashes


def expected_hashes(content: bytes, *, safetensors: bool) -> dict[str, Any]:
    """The rules in the facts of the field, section 4, by the libraries themselves."""
    whole = hashlib.sha256(content).hexdigest()
    data = None
    if safetensors:
        (length,) = struct.unpack("<Q", content[:8])
        data = hashlib.sha256(content[8 + length :]).hexdigest()
    return {
        "sha256": whole,
        "autov1": hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8],
        "autov2": whole[:10],
        "autov3": data and data[:12],
        "tensor_data_sha256": data,
        "crc32": struct.pack("<L", zlib.crc32(content)).hex().upper(),
        "blake3": blake3.blake3(content).hexdigest(),
    }


@pytest.mark.parametrize("name", ["vae.safetensors", "sd1-legacy.ckpt", "merged.ckpt"])
def test_hashes_of_fixtures(name: str) -> None:
    path = FIXTURES / name
    found = cli("inspect", path, "--hash", "--json").json["hashes"]
    assert found == expected_hashes(path.read_bytes(), safetensors=path.suffix == ".safetensors")
    text = cli("inspect", path, "--hash").out
    assert all((value or "-") in text for value in found.values())


SIZES = [
    0,
    1,
    0xFFFFF,
    0x100000,
    0x100001,
    0x10FFFF,
    0x110000,
    0x110001,
    (4 << 20) - 1,
    4 << 20,
    (4 << 20) + 1,
    9 << 20,
]


@pytest.mark.parametrize("size", SIZES)
def test_hashes_of_files_of_any_size(size: int, tmp_path: Path) -> None:
    numbers = np.arange(size, dtype=np.uint32) * np.uint32(2654435761)
    model = write(tmp_path / "model.safetensors", {"a": (numbers >> np.uint32(24)).astype(np.uint8)})
    found = cli("inspect", model, "--hash", "--json").json["hashes"]
    assert found == expected_hashes(model.read_bytes(), safetensors=True)
    other = tmp_path / "bytes"
    other.write_bytes(model.read_bytes()[-size:] if size else b"")
    hashed = hashes.hash_file(SourceFile(other))
    assert vars_of(hashed) == expected_hashes(other.read_bytes(), safetensors=False)


def vars_of(found: hashes.FileHashes) -> dict[str, Any]:
    return {name: getattr(found, name) for name in found.__slots__}


def test_known_values() -> None:
    """CRC32 as Civitai shows it, and the AutoV1 of everything that is too small for one."""
    path = FIXTURES / "vae.safetensors"
    assert cli("inspect", path, "--hash", "--json").json["hashes"]["autov1"] == "e3b0c442"


def test_crc32_has_civitais_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"hello world")
    assert hashes.hash_file(SourceFile(path)).crc32 == "85114A0D"


@given(st.integers(1, 300_000), st.integers(0, 300_000))
@settings(max_examples=30)
def test_the_size_of_pieces_means_nothing(piece: int, header: int) -> None:
    """The header may end anywhere in a piece."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashes, "_CHUNK", max(piece, 1000))
        path = Path(folder) / "x"
        content = bytes(range(256)) * 800
        path.write_bytes(content)
        header %= len(content) + 1
        found = hashes.hash_file(SourceFile(path), header)
        assert found.tensor_data_sha256 == hashlib.sha256(content[header:]).hexdigest()
        assert found.sha256 == hashlib.sha256(content).hexdigest()


def test_recorded_hashes_agree_with_ours(tmp_path: Path) -> None:
    """What kohya calls sshs_model_hash is our tensor data hash: the same for two headers over the same data."""
    tensors = synthetic.part(synthetic.model("sd1"), "first_stage_model.")
    one = write(tmp_path / "one.safetensors", tensors)
    two = write(tmp_path / "two.safetensors", tensors, {"title": "two"})
    found = [cli("inspect", path, "--hash", "--json").json["hashes"] for path in (one, two)]
    assert found[0]["tensor_data_sha256"] == found[1]["tensor_data_sha256"]
    assert found[0]["sha256"] != found[1]["sha256"]


# ---------------------------------------------------------------- for people


@pytest.mark.parametrize("name", [*READABLE, "sd1-odd"])
def test_text_is_readable_at_80_columns(name: str, tmp_path: Path) -> None:
    path = FIXTURES / name
    if name == "sd1-odd":
        tensors = {**synthetic.model("sd1"), "v_pred": np.zeros(0, np.float16), "\x1b[2Jkey\n": np.ones(2)}
        del tensors["first_stage_model.quant_conv.bias"]
        tensors["model.diffusion_model.out.0.bias"] = np.ones(3, np.float16)
        path = write(tmp_path / "model.safetensors", tensors, {"title\x1b[31m": "[bold]x[/bold]\n" * 20})
    result = shell("inspect", path, "--hash", COLUMNS="80")
    assert (result.code, result.err) == (0, "")
    found = inspect(sd.open(path))
    lines = result.out.splitlines()
    # The table fits and loses nothing; single lines may be longer, so that keys and hashes can be copied.
    table = [line for line in lines if line.startswith(" ") and not line.startswith("  ")]
    assert all(len(line) <= 80 for line in table)
    assert "…" not in "".join(table)
    for part, report in found.components.items():
        (row,) = (line for line in table if line.split()[0] == part)
        assert f"{report.tensors:,}" in row
        assert f"{report.parameters:,}" in row
    assert found.family in result.out
    assert f"position ids: {found.position_ids.status}" in result.out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in result.out
    assert "Traceback" not in result.out
    assert "\x1b" not in result.out
    if name == "sd1-odd":
        assert "first_stage_model.quant_conv.bias" in result.out
        assert "model.diffusion_model.out.0.bias should be [4]" in result.out
        assert r"other, unexpected: \x1b[2Jkey\n" in result.out
        assert r"metadata title\x1b[31m: [bold]x[/bold]\n" in result.out


def test_an_unknown_file_tells_what_was_tried(tmp_path: Path) -> None:
    result = cli("inspect", write(tmp_path / "model.safetensors", {"a": np.ones(3)}))
    assert "family unknown" in result.out
    assert "no component of Stable Diffusion is in it" in result.out


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.name)
def test_broken_files_are_one_message(path: Path) -> None:
    result = cli("inspect", path)
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith(f"sdsurgery: {path}: ")
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) == 2
    error = cli("inspect", path, "--json").json["error"]
    assert error["file"] == str(path)
    assert error["kind"] in {"corrupt", "hostile", "unsupported"}
    assert error["remedy"]


def test_the_name_means_nothing(tmp_path: Path) -> None:
    """What is in a file is told by its first bytes."""
    for source, name, container in (
        ("vae.safetensors", "vae.ckpt", "safetensors"),
        ("merged.ckpt", "merged.safetensors", "torch-zip"),
        ("sd1-legacy.ckpt", "legacy", "torch-legacy"),
    ):
        path = Path(shutil.copy(FIXTURES / source, tmp_path / name))
        assert cli("inspect", path, "--json").json["container"] == container


def test_quiet_is_understood() -> None:
    assert cli("inspect", FIXTURES / "vae.safetensors", "--hash", "--quiet", "--json").code == 0


def test_schemas_are_strict() -> None:
    """An unknown field, a bad status or a wrong type is no valid document."""
    found = cli("inspect", FIXTURES / "merged.ckpt", "--hash", "--tensors", "--json").json
    check = validator("inspect")
    for path, value in (
        (("more",), 1), (("family",), "sd4"), (("layout",), None), (("tensors",), -1), (("components", "clip"), {}),
        (("components", "vae", "dtypes"), {"F17": 1}), (("position_ids", "status"), "fine"),
        (("components", "vae", "missing"), ["x"]), (("metadata",), {"a": 1}), (("hashes", "crc32"), "85114a0d"),
        (("hashes", "sha256"), "00"), (("keys", "x"), {"dtype": "F16", "shape": [-1], "bytes": 0}),
    ):  # fmt: skip
        changed = json.loads(json.dumps(found))
        inner = changed
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        assert not check.is_valid(changed), path
    for name in found.keys() - {"hashes", "keys"}:
        assert not check.is_valid({key: value for key, value in found.items() if key != name}), name
