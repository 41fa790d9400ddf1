"""Reading model folders: names, variants, shards, links, and folders that lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from container_support import State, library_bytes, random_state, raw_state
from folder_support import (
    INDEX,
    STATES,
    STEMS,
    all_states,
    hub_cache,
    module_state,
    modules,
    pipeline,
    put,
    put_folder,
    put_shards,
    put_weights,
)

import sdsurgery as sd
from sdsurgery import history
from sdsurgery.checkpoint import AsideFile
from sdsurgery.errors import CorruptError, HostileError, InputError, UnreadableError, UnsupportedError, UsageError

WEIGHT = "block.0.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put_folder(tmp_path / "model")


def asides(checkpoint: sd.Checkpoint) -> dict[str, str]:
    return {entry.name: entry.what for entry in checkpoint.aside}


def weight_files(checkpoint: sd.Checkpoint) -> list[str]:
    assert checkpoint.folder is not None
    return [file.name for file in checkpoint.folder.weights]


# What there is.


def test_components_become_prefixes(folder: Path) -> None:
    checkpoint = sd.open(folder)
    assert raw_state(checkpoint) == all_states()
    assert weight_files(checkpoint) == [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert checkpoint.folder is not None
    assert set(checkpoint.folder.files) == {
        "model_index.json", "README.md", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json", "vae/config.json",
    }  # fmt: skip
    assert b"".join(checkpoint.folder.files["README.md"].chunks()) == b"# A model\n"
    assert checkpoint.origin is not None
    assert (checkpoint.origin.container, checkpoint.origin.path, checkpoint.origin.file) == ("diffusers", folder, None)
    assert (checkpoint.aside, checkpoint.metadata) == ((), {"format": "pt"})
    assert all(file.tensors.items() <= checkpoint.items() for file in checkpoint.folder.weights)


@pytest.mark.parametrize("name", STEMS)
def test_a_lone_component_has_no_prefix(name: str, folder: Path) -> None:
    checkpoint = sd.open(folder / name)
    assert raw_state(checkpoint) == STATES[name]
    assert weight_files(checkpoint) == [f"{STEMS[name]}.safetensors"]


def test_a_folder_without_an_index_is_known_by_its_subfolders(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    put(folder / "samples" / "model.safetensors", b"")
    checkpoint = sd.open(folder)
    assert raw_state(checkpoint) == all_states()
    assert asides(checkpoint) == {"samples": "folder"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "fp16"},
        {"max_shard_size": "4KB"},
        {"max_shard_size": "4KB", "variant": "fp16"},
        {"safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "4KB"},
        {"safe_serialization": False, "max_shard_size": "4KB", "variant": "fp16"},
    ],
    ids=str,
)
def test_what_diffusers_and_transformers_write(options: dict[str, Any], tmp_path: Path) -> None:
    import torch

    pipeline().save_pretrained(tmp_path / "model", **options)
    # The pipeline passes no shard size on to transformers.
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    modules()["text_encoder"].save_pretrained(tmp_path / "model" / "text_encoder", **options)
    checkpoint = sd.open(tmp_path / "model", variant=options.get("variant"))
    expected = module_state()
    assert checkpoint.keys() == expected.keys()
    assert all(torch.equal(checkpoint[key].torch(), value) for key, value in expected.items())
    assert checkpoint.aside == ()


@pytest.mark.parametrize("place", ["model", "model/vae"])
def test_the_cache_of_the_hub(place: str, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", put_folder(tmp_path / "model"))
    checkpoint = sd.open(snapshot / place.removeprefix("model").lstrip("/"))
    assert raw_state(checkpoint) == (all_states() if place == "model" else STATES["vae"])
    assert all(file.known_sha256 for file in checkpoint.files)


def test_metadata_is_united_and_the_longest_history_wins(folder: Path) -> None:
    def record(steps: int) -> str:
        return json.dumps({"steps": [{"operation": "x"}] * steps})

    for name, steps in (("unet", 1), ("vae", 3), ("text_encoder", 2)):
        metadata = {"format": "pt", "title": name, name: "x", history.METADATA_KEY: record(steps)}
        put_weights(folder / name / f"{STEMS[name]}.safetensors", STATES[name], metadata)
    assert sd.open(folder).metadata == {
        "format": "pt", "title": "unet", "unet": "x", "vae": "x", "text_encoder": "x", history.METADATA_KEY: record(3),
    }  # fmt: skip


def test_what_isnt_taken_is_named(folder: Path) -> None:
    import torch

    torch.save({"a": torch.ones(2)}, put(folder / "unet" / "diffusion_pytorch_model.bin", b""))
    for name in (
        "model.ckpt", "model.fp16.safetensors", ".gitattributes", ".git/config", "samples/a.png", "vae/model.onnx",
        "vae/nested/config.json", "vae/.hidden", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_flax_model.msgpack", "text_encoder/model-00001-of-00002.fp16.safetensors",
    ):  # fmt: skip
        put(folder / name, b"")
    checkpoint = sd.open(folder)
    assert raw_state(checkpoint) == all_states()
    assert all(isinstance(entry, AsideFile) for entry in checkpoint.aside)
    assert asides(checkpoint) == {
        ".gitattributes": "hidden file",
        ".git": "folder",
        "model.ckpt": "weights in a single file",
        "model.fp16.safetensors": "weights in a single file",
        "samples": "folder",
        "vae/model.onnx": "weights in another format",
        "vae/nested": "folder",
        "vae/.hidden": "hidden file",
        "unet/diffusion_pytorch_model.bin": "the same weights as a pickle",
        "unet/diffusion_pytorch_model.fp16.safetensors": "weights of the variant fp16",
        "unet/diffusion_flax_model.msgpack": "weights in another format",
        "text_encoder/model-00001-of-00002.fp16.safetensors": "weights of the variant fp16",
    }


def test_a_pickle_tells_what_lies_beside_its_state_dict(folder: Path) -> None:
    import torch

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path.with_suffix(".bin"))
    path.unlink()
    checkpoint = sd.open(folder)
    assert checkpoint["unet/a"].torch().tolist() == [1, 1]
    (entry,) = checkpoint.aside
    assert (entry.name, entry.what, isinstance(entry, AsideFile)) == ("unet/epoch", "int 3", False)


def test_no_descriptor_is_kept(tmp_path: Path) -> None:
    folder = put_folder(tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    state = random_state(7, tensors=120)
    put_shards(folder / "unet", STEMS["unet"], state, 120)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = sd.open(folder)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(weight_files(checkpoint)) == 122
    assert raw_state(sd.open(folder / "unet")) == state


# Variants and shards.


def variant_file(folder: Path, name: str, variant: str, state: State) -> None:
    put_weights(folder / name / f"{STEMS[name]}.{variant}.safetensors", state)


def test_a_variant_is_taken_where_there_is_one(folder: Path) -> None:
    other = random_state(9)
    variant_file(folder, "unet", "fp16", other)
    assert raw_state(sd.open(folder)) == all_states()
    checkpoint = sd.open(folder, variant="fp16")
    assert raw_state(checkpoint) == {
        **{key: value for key, value in all_states().items() if not key.startswith("unet/")},
        **{f"unet/{key}": value for key, value in other.items()},
    }
    assert asides(checkpoint) == {"unet/diffusion_pytorch_model.safetensors": "other weights"}
    with pytest.raises(UnsupportedError, match=r"bf16.*fp16"):
        sd.open(folder, variant="bf16")
    with pytest.raises(UsageError):
        sd.open(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", variant="fp16")


def test_a_lone_variant_needs_no_naming_and_of_several_one_must_be_named(folder: Path) -> None:
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert raw_state(sd.open(folder)) == all_states()
    variant_file(folder, "unet", "non_ema", random_state(8))
    with pytest.raises(UnsupportedError, match="unet has only the variants fp16, non_ema"):
        sd.open(folder)
    assert sd.open(folder, variant="non_ema")[f"unet/{WEIGHT}"].tobytes() == random_state(8)[WEIGHT].content
    variant_file(folder, "vae", "ema", random_state(8))
    with pytest.raises(UnsupportedError, match="unet has only the variants fp16, non_ema"):
        sd.open(folder, variant="ema")


@pytest.mark.parametrize("old", ["today", "shards of before", "shards and index of before"])
def test_sharded_variants_in_every_naming(old: str, folder: Path) -> None:
    stem, state = STEMS["unet"], random_state(9)
    index = put_shards(folder / "unet", stem, state, 3, "fp16")
    if old != "today":
        document = json.loads(index.read_text())
        for name in set(document["weight_map"].values()):
            before = name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
            (folder / "unet" / name).rename(folder / "unet" / before)
            index.write_text(index.read_text().replace(name, before))
    if old == "shards and index of before":
        index.rename(index.with_name(f"{stem}.safetensors.fp16.index.json"))
    checkpoint = sd.open(folder / "unet", variant="fp16")
    assert raw_state(checkpoint) == state
    assert len(weight_files(checkpoint)) == 3
    assert asides(checkpoint) == {f"{stem}.safetensors": "other weights"}
    assert set(asides(sd.open(folder / "unet")).values()) == {"weights of the variant fp16"}


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_of_a_whole_file_and_an_index_the_one_that_the_library_reads_is_read(name: str, folder: Path) -> None:
    """diffusers looks for an index first, transformers for a whole file."""
    import torch

    whole = put_weights(folder / name / f"{STEMS[name]}.safetensors", STATES["vae"])
    put_shards(folder / name, STEMS[name], random_state(9))
    found = raw_state(sd.open(folder / name))
    assert found == (random_state(9) if name == "unet" else STATES["vae"])
    whole.unlink()
    torch.save({}, folder / name / "pytorch_model.bin")
    assert raw_state(sd.open(folder / name)) == random_state(9)


# Folders that are none, or lack something.


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    put_weights(tmp_path / "other" / "model.safetensors", STATES["vae"])
    put(tmp_path / "empty" / "model_index.json", {})
    put(tmp_path / "onnx" / "model_index.json", {"unet": ["diffusers", "OnnxRuntimeModel"]})
    put(tmp_path / "onnx" / "unet" / "model.onnx", b"")
    put(tmp_path / "config" / "config.json", {})
    for name in ("", "other", "empty", "onnx", "config"):
        with pytest.raises(CorruptError if name == "onnx" else UnsupportedError) as caught:
            sd.open(tmp_path / name)
        assert caught.value.remedy


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("how", ["the file", "the folder", "an index alone"])
def test_missing_weights_are_named(how: str, name: str, folder: Path) -> None:
    path = folder / name / f"{STEMS[name]}.safetensors"
    path.unlink()
    if how == "the folder":
        (folder / name / "config.json").unlink()
        (folder / name).rmdir()
    if how == "an index alone":
        put_shards(folder / name, STEMS[name], STATES[name])
        next((folder / name).glob("*-00002-of-*")).unlink()
        with pytest.raises(UnreadableError, match="-00002-of-00002"):
            sd.open(folder)
    else:
        with pytest.raises(CorruptError, match=f"{name}/{STEMS[name]}.safetensors is missing"):
            sd.open(folder)


# Folders that lie.


def _elsewhere(folder: Path) -> Path:
    return put_weights(folder.parent / "elsewhere" / "model.safetensors", STATES["vae"])


def _link_file(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").symlink_to(_elsewhere(folder))


def _link_folder(folder: Path) -> None:
    put(folder.parent / "elsewhere" / "config.json", {})
    (folder / "extra").symlink_to(_elsewhere(folder).parent)
    put(folder / "model_index.json", INDEX | {"extra": ["diffusers", "AutoencoderKL"]})


def _link_config(folder: Path) -> None:
    (folder / "tokenizer" / "secret.txt").symlink_to("/etc/passwd")


def _link_root(folder: Path) -> None:
    (folder / "NOTES").symlink_to("../../../../etc/passwd")


def _false_blob(folder: Path) -> None:
    """A link to a folder called blobs, but not to that of the cache that this is a snapshot of."""
    blob = put(folder.parent / "blobs" / ("0" * 64), library_bytes(STATES["vae"]))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").symlink_to(blob)


def _shard_name(name: str) -> Callable[[Path], None]:
    def install(folder: Path) -> None:
        _elsewhere(folder)
        index = put_shards(folder / "unet", STEMS["unet"], STATES["unet"])
        document = json.loads(index.read_text())
        document["weight_map"][WEIGHT] = name
        put(index, document)

    return install


def _component_name(name: str) -> Callable[[Path], None]:
    return lambda folder: put(folder / "model_index.json", INDEX | {name: ["diffusers", "AutoencoderKL"]}) and None


HOSTILE = {
    "a link to a file": _link_file,
    "a link to a folder": _link_folder,
    "a linked config": _link_config,
    "a linked note": _link_root,
    "a false blob": _false_blob,
    "an absolute shard": _shard_name("/etc/passwd"),
    "a shard above": _shard_name("../elsewhere/model.safetensors"),
    "a shard below": _shard_name("x/model.safetensors"),
    "a shard for Windows": _shard_name("..\\elsewhere\\model.safetensors"),
    "a shard of two dots": _shard_name(".."),
    "a shard that no system can name": _shard_name("\ud800"),
    "a component above": _component_name("../elsewhere"),
    "an absolute component": _component_name("/etc"),
    "a component of two dots": _component_name(".."),
    "a component for Windows": _component_name("..\\x"),
    "a hidden component": _component_name(".git"),
    "a component without a name": _component_name(""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_outside_is_read(case: str, folder: Path) -> None:
    HOSTILE[case](folder)
    with pytest.raises(HostileError) as caught:
        sd.open(folder)
    assert caught.value.file
    assert caught.value.remedy


def test_links_inside_are_followed_as_a_link_to_the_folder_is(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "vae" / "real")
    weights.symlink_to("real")
    (folder / "unet").rename(folder / "unet-2")
    (folder / "unet").symlink_to("unet-2")
    (folder.parent / "link").symlink_to(folder)
    assert raw_state(sd.open(folder.parent / "link")) == all_states()


def _edit_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def install(folder: Path) -> None:
        index = put_shards(folder / "unet", STEMS["unet"], STATES["unet"])
        document = json.loads(index.read_text())
        change(document)
        put(index, document)

    return install


def _twice(folder: Path) -> None:
    put_shards(folder / "unet", STEMS["unet"], STATES["unet"])
    first, second = sorted((folder / "unet").glob("*-of-*"))
    put_weights(second, raw_state(sd.open(second)) | {WEIGHT: raw_state(sd.open(first))[WEIGHT]})


def _index_text(text: str | bytes) -> Callable[[Path], None]:
    def install(folder: Path) -> None:
        put(put_shards(folder / "unet", STEMS["unet"], STATES["unet"]), text)

    return install


def _model_index(text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: put(folder / "model_index.json", text) and None


def _huge(folder: Path) -> None:
    os.truncate(folder / "model_index.json", 100_000_001)


CORRUPT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor that is missing": (_edit_index(lambda d: d["weight_map"].update(x=min(d["weight_map"].values()))), "'x'"),
    "a tensor that isn't named": (_edit_index(lambda d: d["weight_map"].pop(WEIGHT)), WEIGHT),
    "the wrong shard": (_edit_index(lambda d: d["weight_map"].update({WEIGHT: max(d["weight_map"].values())})), WEIGHT),
    "a tensor twice": (_twice, f"{WEIGHT}.*too"),
    "a shard that is a number": (_edit_index(lambda d: d["weight_map"].update({WEIGHT: 1})), "weight_map"),
    "no map": (_edit_index(lambda d: d.pop("weight_map")), "weight_map"),
    "an empty map": (_edit_index(lambda d: d["weight_map"].clear()), "weight_map"),
    "an index that is a list": (_index_text("[]"), "index.json"),
    "an index that is deep": (_index_text('{"a":' * 100_000), "index.json"),
    "an index with a key twice": (_index_text('{"weight_map": {"a": "x", "a": "y"}}'), "twice"),
    "an index that is no text": (_index_text(b"{\xff}"), "index.json"),
    "an empty index": (_index_text(""), "index.json"),
    "a model index that is a list": (_model_index("[1]"), "model_index.json"),
    "a model index with a key twice": (_model_index('{"a": 1, "a": 2}'), "twice"),
    "a model index that is deep": (_model_index('{"a":' + "[" * 100_000), "model_index.json"),
    "a model index of brackets": (_model_index('{"a":[' + "[]," * 3_000_000 + "[]]}"), "model_index.json"),
    "a model index of 100 MB": (_huge, "model_index.json"),
    "broken weights": (lambda f: put(f / "vae" / "diffusion_pytorch_model.safetensors", b"x" * 20) and None, "vae"),
    "empty weights": (lambda f: put(f / "vae" / "diffusion_pytorch_model.safetensors", b"") and None, "vae"),
}  # fmt: skip


@pytest.mark.parametrize("case", CORRUPT)
def test_what_contradicts_itself_is_refused_by_name(case: str, folder: Path) -> None:
    install, message = CORRUPT[case]
    install(folder)
    with pytest.raises(InputError, match=message) as caught:
        sd.open(folder)
    assert not isinstance(caught.value, HostileError)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["NOTES", "vae/notes", "vae/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_what_is_no_regular_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UnreadableError, match=name):
        sd.open(folder)


def test_a_lfs_pointer_and_a_key_with_a_slash(folder: Path) -> None:
    path = put(folder / "vae" / "diffusion_pytorch_model.safetensors", "version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UnsupportedError, match="LFS"):
        sd.open(folder)
    put_weights(path, {"a/b": STATES["vae"][WEIGHT]})
    assert "vae/a/b" in sd.open(folder)
    with pytest.raises(UnsupportedError, match="slash"):
        sd.open(folder / "vae")
