"""Writing model folders: names, shards, what stays as it was, and what may be replaced."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from container_support import command, random_state, raw_state
from folder_support import (
    STATES,
    STEMS,
    all_states,
    contents,
    hub_cache,
    module_state,
    modules,
    pipeline,
    put,
    put_folder,
    put_shards,
    put_weights,
)
from test_saving import names, open_files

import sdsurgery as sd
from sdsurgery import history, progress
from sdsurgery.checkpoint import Folder
from sdsurgery.containers import writing
from sdsurgery.containers.patching import patch_in_place
from sdsurgery.containers.saving import losses
from sdsurgery.errors import (
    OutputError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)  # fmt: skip

KEY = "block.0.weight"
UNET, VAE = f"unet/{KEY}", f"vae/{KEY}"
UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put_folder(tmp_path / "model")


def changed(checkpoint: sd.Checkpoint, *keys: str) -> sd.Checkpoint:
    """The checkpoint with other values under these keys."""
    ones = {key: sd.Tensor.of(np.ones((8, 4), np.float16)) for key in keys}
    step = sd.Step("change", {}, tuple(sd.Change(key, "replaced") for key in keys))
    return checkpoint.evolve({**checkpoint, **ones}, step)


def metadata_of(path: Path) -> dict[str, str]:
    return dict(sd.open(path).metadata)


# The same files as diffusers and transformers write.

OPTIONS: list[dict[str, Any]] = [
    {}, {"variant": "fp16"}, {"shard_size": 3000}, {"shard_size": 3000, "variant": "fp16"}, {"shard_size": 100},
    {"shard_size": 10**9},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_new_folder_is_what_diffusers_and_transformers_write(options: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    kwargs = {"max_shard_size" if name == "shard_size" else name: value for name, value in options.items()}
    pipeline().save_pretrained(theirs, **kwargs)
    shutil.rmtree(theirs / "text_encoder")  # the pipeline passes no shard size on to transformers
    modules()["text_encoder"].save_pretrained(theirs / "text_encoder", **kwargs)
    opened = sd.open(theirs, variant=options.get("variant"))
    assert opened.folder is not None
    made = sd.Checkpoint.from_state_dict(module_state(), {"format": "pt"})
    new = sd.Checkpoint(made.tensors, made.metadata, folder=Folder(opened.folder.files))
    saved = new.save(ours, **options)
    assert contents(ours) == contents(theirs)
    assert saved.nbytes == sum(path.stat().st_size for path in ours.rglob("*") if path.is_file())
    loaded = StableDiffusionPipeline.from_pretrained(ours, variant=options.get("variant"))
    for name in STEMS:
        state = getattr(loaded, name).state_dict()
        expected = modules()[name].state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_a_lone_component_is_written_as_its_config_says(folder: Path, tmp_path: Path) -> None:
    for name, stem in STEMS.items():
        put(folder / name / "config.json", {"architectures": ["X"]} if stem == "model" else {"_class_name": "X"})
        sd.open(folder / name).save(tmp_path / name, variant="fp16")
        assert names(tmp_path / name) == {"config.json", f"{stem}.fp16.safetensors"}
        assert raw_state(sd.open(tmp_path / name)) == STATES[name]
    put(tmp_path / "none" / "config.json", {})
    put_weights(tmp_path / "none" / "diffusion_pytorch_model.safetensors", STATES["vae"])
    sd.open(tmp_path / "none").save(tmp_path / "out", shard_size=10**6)
    assert names(tmp_path / "out") == {"config.json", "model.safetensors"}


# What isn't touched stays as it was.


@pytest.mark.parametrize("cached", [False, True])
def test_an_untouched_folder_is_copied(cached: bool, folder: Path, tmp_path: Path) -> None:
    put_weights(folder / VAE_FILE, STATES["vae"], {"kept": "as it is", "without": "a format"})
    before = contents(folder)
    source = hub_cache(tmp_path / "hub", folder) if cached else folder
    for target in ("one", "two"):
        saved = sd.open(source).save(tmp_path / target)
        assert contents(tmp_path / target) == before == contents(folder)
        assert (saved.path, saved.container, saved.changes) == (tmp_path / target, "diffusers", ())
    assert not any(path.is_symlink() for path in (tmp_path / "one").rglob("*"))


def test_a_change_reaches_only_its_own_file(folder: Path, tmp_path: Path) -> None:
    put_weights(folder / UNET_FILE, STATES["unet"], {"sshs_model_hash": "of unet"})
    put_weights(folder / VAE_FILE, STATES["vae"], {"sshs_model_hash": "of vae", "title": "x"})
    saved = changed(sd.open(folder), VAE).save(tmp_path / "out")
    after, before = contents(tmp_path / "out"), contents(folder)
    assert {name for name in before if before[name] != after[name]} == {VAE_FILE}
    assert after.keys() == before.keys()
    metadata = metadata_of(tmp_path / "out" / VAE_FILE)
    assert (metadata["format"], metadata["title"]) == ("pt", "x")
    assert [step["operation"] for step in history.recorded(metadata)] == ["change"]
    assert [(change.key, change.kind, change.before) for change in saved.changes] == [
        ("sshs_model_hash", "metadata", "of unet")
    ]
    assert history.recorded(sd.open(tmp_path / "out").metadata)


def test_a_change_reaches_only_its_own_shard(folder: Path, tmp_path: Path) -> None:
    state = random_state(5, tensors=12)
    (folder / UNET_FILE).unlink()
    put_shards(folder / "unet", STEMS["unet"], state, 4, "fp16")
    opened = sd.open(folder)
    changed(opened, UNET).save(tmp_path / "out")
    after, before = contents(tmp_path / "out"), contents(folder)
    assert [name for name in before if before[name] != after[name]] == [
        "unet/diffusion_pytorch_model.fp16-00001-of-00004.safetensors"
    ]
    # Renamed tensors stay in their shards, new ones go to the last, and a shard without any is gone.
    renamed = {key.replace("unet/", "unet/x."): tensor for key, tensor in opened.items()}
    shard = opened.folder.weights[1].tensors if opened.folder else {}
    kept = {key: tensor for key, tensor in renamed.items() if key.replace("x.", "") not in shard}
    new = {**kept, "unet/new": sd.Tensor.of(np.ones(3))}
    opened.evolve(new, sd.Step("rename", {})).save(tmp_path / "renamed")
    found = sd.open(tmp_path / "renamed", variant="fp16")
    assert raw_state(found) == raw_state(new)
    assert found.folder is not None
    assert [len(file.checkpoint) for file in found.folder.weights if file.prefix == "unet/"] == [3, 3, 4]


def test_a_changed_size_makes_a_new_index(folder: Path, tmp_path: Path) -> None:
    put_shards(folder / "unet", STEMS["unet"], STATES["unet"])
    opened = sd.open(folder)
    opened.evolve({**opened, UNET: sd.Tensor.of(np.ones((8, 4), np.float64))}, sd.Step("cast", {})).save(tmp_path / "o")
    index = json.loads((tmp_path / "o" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    size = sum(len(tensor.content) for tensor in STATES["unet"].values())
    assert index["metadata"]["total_size"] == size + 8 * 4 * 6


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}, {"variant": "fp16"}], ids=str)
def test_pickles_become_safetensors_of_the_same_names(options: dict[str, Any], tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path / "pickles", safe_serialization=False, **options)
    pipeline().save_pretrained(tmp_path / "expected", **options)
    sd.open(tmp_path / "pickles", variant=options.get("variant")).save(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    import torch

    component = put(tmp_path / "clip" / "config.json", {}).parent
    torch.save({"a": torch.ones(2)}, component / "pytorch_model.fp16.bin")
    sd.open(component).save(tmp_path / "clip-out")
    assert names(tmp_path / "clip-out") == {"config.json", "model.fp16.safetensors"}


def test_metadata_that_were_edited_reach_every_file(folder: Path, tmp_path: Path) -> None:
    opened = sd.open(folder)
    step = sd.Step("edit", {}, (sd.Change("title", "metadata", None, "x"),))
    opened.evolve(opened.tensors, step, metadata={"title": "x"}).save(tmp_path / "out")
    assert [metadata_of(tmp_path / "out" / name)["title"] for name in (UNET_FILE, VAE_FILE)] == ["x", "x"]


def test_what_isnt_carried_over_is_named(folder: Path, tmp_path: Path) -> None:
    for name in (".git/config", "vae/model.onnx", "samples/a.png", "unet/diffusion_pytorch_model.fp16.safetensors"):
        put(folder / name, b"")
    opened = sd.open(folder)
    saved = opened.save(tmp_path / "out")
    assert {change.kind for change in saved.changes} == {"dropped"}
    assert [change.key for change in saved.changes] == [
        ".git", "samples", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/model.onnx"
    ]  # fmt: skip
    assert losses(opened, tmp_path / "x") == saved.changes
    assert losses(opened, folder, in_place=True) == ()


def test_progress_descriptors_and_many_shards(folder: Path, tmp_path: Path) -> None:
    (folder / UNET_FILE).unlink()
    put_shards(folder / "unet", STEMS["unet"], random_state(7, tensors=120), 120)
    told: list[int] = []
    totals: list[int] = []

    @contextmanager
    def listener(_: str, total: int, _unit: str) -> Iterator[progress.Advance]:
        totals.append(total)
        yield told.append

    before = open_files()
    with progress.told_to(listener):
        saved = changed(sd.open(folder), UNET).save(tmp_path / "out")
    assert open_files() == before
    assert [sum(told)] == totals == [saved.nbytes]


# Folders and single files.


def test_only_a_lone_component_is_simply_a_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="several components"):
        sd.open(folder).save(tmp_path / "out.safetensors")
    for suffix in (".safetensors", ".ckpt"):
        saved = sd.open(folder / "vae").save(tmp_path / f"out{suffix}")
        assert [change.key for change in saved.changes] == ["config.json"]
        file = sd.open(saved.path)
        assert raw_state(file) == STATES["vae"]
        with pytest.raises(UsageError, match="folder"):
            file.save(tmp_path / "out")
        with pytest.raises(UsageError):
            file.save(tmp_path / "out", in_place=False, variant="fp16")
        for options in ({"variant": "fp16"}, {"shard_size": 10}):
            with pytest.raises(UsageError):
                file.save(tmp_path / "other.safetensors", **options)
    for options in ({"variant": "a/b"}, {"variant": ""}, {"shard_size": 0}):
        with pytest.raises(UsageError):
            sd.open(folder).save(tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not patch_in_place(changed(sd.open(folder), VAE))
    assert names(tmp_path) == {"model", "out.safetensors", "out.ckpt"}


@pytest.mark.parametrize("key", ["plain", "../x/a", "/a", "unet\\..\\..\\x/a", "./a", "unet/"])
def test_keys_that_name_no_component_are_refused(key: str, folder: Path, tmp_path: Path) -> None:
    opened = sd.open(folder)
    with pytest.raises(OutputError):
        opened.evolve({**opened, key: opened[VAE]}, sd.Step("t", {})).save(tmp_path / "out")
    for name in ("../x", "/x", "a/../../x", "a//x", "a\\x"):
        files = Folder({**(opened.folder or Folder({})).files, name: opened[VAE].data})
        with pytest.raises(OutputError):
            sd.Checkpoint(opened.tensors, folder=files).save(tmp_path / "out")
    assert names(tmp_path) == {"model"}


# Names that are taken.


def test_force_replaces_model_folders_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    new = changed(sd.open(folder), VAE)
    new.save(tmp_path / "expected")
    target = put_folder(tmp_path / "target")
    (target / "README.md").unlink()
    put(target / "unet" / "diffusion_pytorch_model.fp16.safetensors", b"")
    put(target / "old_component" / "config.json", {})
    (target / "old_component" / "config.json").unlink()
    (target / "old_component").rmdir()
    target.chmod(0o750)
    with pytest.raises(OutputExistsError, match="exists already"):
        new.save(target)
    new.save(target, force=True)
    assert contents(target) == contents(tmp_path / "expected")
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    (tmp_path / "empty").mkdir()
    new.save(tmp_path / "empty", force=True)
    (tmp_path / "link").symlink_to("target")
    new.save(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "empty") == contents(target) == contents(tmp_path / "expected")
    assert not [name for name in names(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    "name",
    [".git/config", "LICENSE", "vae/picture.png", "notes.json", "model.ckpt", "sub/a.txt", "unet/.hidden", "unet/x/a"],
)
def test_force_spares_what_would_be_lost(name: str, folder: Path, tmp_path: Path) -> None:
    target = put_folder(tmp_path / "target")
    put(target / name, b"precious")
    before = contents(target)
    with pytest.raises(OutputExistsError, match="more than weights"):
        sd.open(folder).save(target, force=True)
    assert contents(target) == before
    assert names(tmp_path) == {"model", "target"}


def test_names_that_no_folder_may_take(folder: Path, tmp_path: Path) -> None:
    opened = sd.open(folder)
    put(tmp_path / "file", b"x")
    put(tmp_path / "other" / "a.txt", b"x")
    put_folder(tmp_path / "outer" / "model")
    donor = put_folder(tmp_path / "donor")
    snapshot = hub_cache(tmp_path / "hub", folder)
    mixed = opened.evolve({**opened, VAE: sd.open(donor)[VAE]}, sd.Step("graft", {}))
    cases: list[tuple[sd.Checkpoint, Path]] = [
        (opened, tmp_path / "file"),
        (opened, tmp_path / "other"),
        (opened, folder),
        (opened, folder / "sub"),
        (opened, folder / "unet"),
        (opened, tmp_path),
        (mixed, donor),
        (opened, snapshot),
        (sd.open(tmp_path / "outer" / "model"), tmp_path / "outer"),
    ]
    before = contents(tmp_path)
    for checkpoint, target in cases:
        for force in (False, True):
            with pytest.raises(OutputError):
                checkpoint.save(target, force=force)
    for target in (tmp_path / "missing" / "out", tmp_path / ("x" * 300), tmp_path / "nul\0byte"):
        with pytest.raises(OutputError):
            opened.save(target)
    single = sd.open(folder / VAE_FILE)
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(OutputError):
        single.save(tmp_path / "dir.safetensors", force=True)
    (tmp_path / "dir.safetensors").rmdir()
    assert contents(tmp_path) == before


# In place.


@pytest.fixture
def lived_in(folder: Path) -> Path:
    """A folder with much else in it."""
    import torch

    for name in (".git/objects/ab", "samples/a.png", "vae/model.onnx", "LICENSE", "vae/.keep", "model.ckpt"):
        put(folder / name, name)
    put_weights(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", STATES["vae"])
    for name in ("unet", "vae"):
        torch.save({"a": torch.ones(2)}, folder / name / "diffusion_pytorch_model.bin")
        torch.save({"a": torch.ones(2)}, folder / name / "diffusion_pytorch_model.fp16.bin")
    (folder / "samples" / "link").symlink_to("/nowhere/./at/all/")
    os.mkfifo(folder / "samples" / "pipe")
    (folder / VAE_FILE).chmod(0o640)
    (folder / "vae").chmod(0o750)
    return folder


SWAPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "exchange": lambda _: None,
    "two renames": lambda patch: patch.setattr(writing, "_renameat2", lambda *_: False),
    "no links": lambda patch: patch.setattr(os, "link", _refusing(errno.EPERM)),
    "no calls": lambda patch: patch.setattr(sys, "platform", "unknown"),
}


def _refusing(number: int) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("how", SWAPS)
def test_in_place_keeps_everything_else(
    how: str, lived_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "no links":
        (lived_in / "samples" / "pipe").unlink()
    before = contents_of(lived_in)
    inodes = {name: (lived_in / name).stat().st_ino for name in (UNET_FILE, ".git/objects/ab", "README.md")}
    checkpoint = changed(sd.open(lived_in), VAE)
    told = losses(checkpoint, lived_in, in_place=True)
    SWAPS[how](monkeypatch)
    saved = checkpoint.save(lived_in, in_place=True)
    monkeypatch.undo()
    after = contents_of(lived_in)
    assert [name for name in before if before[name] != after.get(name)] == [
        "vae/diffusion_pytorch_model.bin", VAE_FILE
    ]  # fmt: skip
    assert not after.keys() - before.keys()
    assert [(change.key, change.kind) for change in saved.changes] == [("vae/diffusion_pytorch_model.bin", "dropped")]
    assert told == saved.changes
    if how != "no links":
        assert {name: (lived_in / name).stat().st_ino for name in inodes} == inodes
    assert stat.S_IMODE((lived_in / VAE_FILE).stat().st_mode) == 0o640
    assert stat.S_IMODE((lived_in / "vae").stat().st_mode) == 0o750
    assert names(tmp_path) == {"model"}
    assert raw_state(sd.open(lived_in)) == all_states() | raw_state({VAE: checkpoint[VAE]})


def contents_of(folder: Path) -> dict[str, str]:
    """As :func:`contents`, without pipes, which nothing can be read from."""
    pipe = folder / "samples" / "pipe"
    if not pipe.exists():
        return contents(folder)
    aside = pipe.rename(folder.parent / "pipe")
    found = contents(folder)
    aside.rename(pipe)
    return found


def test_in_place_leaves_untouched_pickles(folder: Path) -> None:
    import torch

    for name in ("unet", "vae"):
        (folder / name / "diffusion_pytorch_model.safetensors").unlink()
        state = {"state_dict": {KEY: torch.zeros(8, 4)}, "epoch": 3}
        torch.save(state, folder / name / "diffusion_pytorch_model.bin")
    before = contents(folder)
    saved = changed(sd.open(folder), VAE).save(folder, in_place=True)
    after = contents(folder)
    assert set(before) - set(after) == {"vae/diffusion_pytorch_model.bin"}
    assert set(after) - set(before) == {VAE_FILE}
    assert after["unet/diffusion_pytorch_model.bin"] == before["unet/diffusion_pytorch_model.bin"]
    assert [change.key for change in saved.changes] == ["vae/epoch"]


def test_in_place_is_about_the_input_and_not_about_a_cache(folder: Path, tmp_path: Path) -> None:
    other = put_folder(tmp_path / "other")
    snapshot = hub_cache(tmp_path / "hub", folder)
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError):
        sd.open(folder).save(other, in_place=True)
    with pytest.raises(OutputError, match="cache"):
        changed(sd.open(snapshot), VAE).save(snapshot, in_place=True)
    with pytest.raises(UsageError):
        sd.Checkpoint(sd.open(folder).tensors, origin=sd.open(folder).origin).save(folder, in_place=True)
    assert contents(tmp_path) == before


def test_in_place_through_links(folder: Path, tmp_path: Path) -> None:
    """A link to the folder stays; one inside becomes what it led to, where that is rewritten or needed."""
    (tmp_path / "link").symlink_to("model")
    for name in (UNET_FILE, VAE_FILE, "tokenizer/vocab.json"):
        (folder / name).rename(folder / "shared" if name == VAE_FILE else (folder / name).with_suffix(".real"))
        (folder / name).symlink_to("../shared" if name == VAE_FILE else Path(name).with_suffix(".real").name)
    expected = changed(sd.open(folder), VAE)
    expected.save(tmp_path / "link", in_place=True)
    assert (tmp_path / "link").is_symlink()
    assert (
        raw_state(sd.open(folder))
        == raw_state(sd.open(tmp_path / "link"))
        == raw_state(sd.open(folder)) | raw_state({VAE: expected[VAE]})
    )
    assert not (folder / UNET_FILE).is_symlink()
    assert names(tmp_path) == {"model", "link"}


def test_shards_that_would_get_one_name_are_not_mixed_up(folder: Path, tmp_path: Path) -> None:
    index = put_shards(folder / "unet", STEMS["unet"], STATES["unet"])
    for number, name in ((1, "a.safetensors"), (2, "a")):
        old = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        (folder / "unet" / old).rename(folder / "unet" / name)
        index.write_text(index.read_text().replace(old, name))
    with pytest.raises(OutputError, match="one name"):
        changed(sd.open(folder), UNET).save(tmp_path / "out")
    changed(sd.open(folder), UNET).save(tmp_path / "out", shard_size=100)
    assert sd.open(tmp_path / "out").keys() == all_states().keys()


# The command line.


def test_commands_work_on_folders(tmp_path: Path) -> None:
    model = tmp_path / "model"
    pipeline().save_pretrained(model)
    before = contents(tmp_path)
    assert command("cast", model, "fp16", "--dry-run").returncode == 0
    assert contents(tmp_path) == before
    done = command("cast", model, "fp16")
    size = sum(path.stat().st_size for path in (tmp_path / "model.fixed").rglob("*") if path.is_file())
    assert (done.returncode, f"({size / 1000:.0f} kB)" in done.stdout) == (0, True), done.stderr
    assert {tensor.dtype.name for tensor in sd.open(tmp_path / "model.fixed").values()} == {"F16"}
    assert command("cast", model, "fp16", "-o", tmp_path / "model.fixed").returncode == 4
    assert command("cast", model, "fp16", "-o", tmp_path / "model.fixed", "--force").returncode == 0
    assert command("cast", model, "fp16", "-o", model / "vae").returncode == 4
    assert command("cast", model, "fp16", "-o", tmp_path / "out.safetensors").returncode == 3
    assert command("cast", model / "vae", "fp16", "-o", tmp_path / "vae.safetensors").returncode == 0
    assert command("cast", tmp_path / "vae.safetensors", "fp32", "-o", tmp_path / "x").returncode == 2
    assert command("cast", model, "fp16", "--in-place").returncode == 0
    assert contents(model) == contents(tmp_path / "model.fixed")
    assert names(tmp_path) == {"model", "model.fixed", "vae.safetensors"}
