"""A folder is there whole or not at all: kills, interrupts, full disks, renames that fail."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from container_support import ROOT, random_state, run_python
from folder_support import STATES, contents, put, put_folder, put_shards, put_weights
from test_folder_writing import UNET_FILE, VAE, VAE_FILE, changed
from test_saving import _can_mount, names

import sdsurgery as sd
from sdsurgery.containers import writing
from sdsurgery.errors import NoSpaceError, OutputError, OutputExistsError
from sdsurgery.sources import Computed

CASES = ["new", "force", "in place"]

_SAVE = """
import sys
import numpy as np
import sdsurgery as sd
def save(source, target, *flags):
    opened = sd.open(source)
    step = sd.Step("change", {}, (sd.Change("vae/block.0.weight", "replaced"),))
    tensors = {**opened, "vae/block.0.weight": sd.Tensor.of(np.ones((8, 4), np.float16))}
    return opened.evolve(tensors, step).save(target, **dict.fromkeys(flags, True))
"""


def arguments(case: str, folder: Path) -> list[Path | str]:
    """Source, target and flags of a save."""
    if case == "in place":
        return [folder, folder, "in_place"]
    return [folder, folder.with_name("out"), *(["force"] if case == "force" else [])]


def save(case: str, folder: Path) -> None:
    source, target, *flags = arguments(case, folder)
    changed(sd.open(source), VAE).save(target, **dict.fromkeys(map(str, flags), True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put_folder(tmp_path / "model")
    put(tmp_path / "model" / ".git" / "config", "x")
    return tmp_path / "model"


def prepare(case: str, folder: Path) -> dict[str, str]:
    """What lies in the tree before."""
    if case == "force":
        (put_folder(folder.with_name("out")) / "README.md").unlink()
    return contents(folder.parent)


# Kills and interrupts.


def _big(folder: Path) -> Path:
    """Some 50 MB."""
    put_folder(folder)
    (folder / UNET_FILE).unlink()
    put_shards(folder / "unet", "diffusion_pytorch_model", random_state(3, tensors=12, nbytes=1 << 22), 6)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_any_instant_leaves_all_or_nothing(case: str, tmp_path: Path) -> None:
    """Eight kills a case, spread over the whole run and a little more."""
    chance = random.Random(case)
    folder = _big(tmp_path / "model")
    target = Path(arguments(case, folder)[1])
    sources = contents(folder)
    whole, duration = 0, 0.0
    complete: dict[str, str] = {}
    for number in range(-1, 8):
        if case == "in place" and contents(folder) != sources:
            put_weights(folder / VAE_FILE, STATES["vae"])
        elif case != "in place" and target.exists():
            shutil.rmtree(target)
        if case == "force":
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("README.md"))
        before = contents(target) if target.exists() else None
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVE + "print('go', flush=True)\nsave(*sys.argv[1:])", *arguments(case, folder)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        begun = time.monotonic()
        try:
            code = process.wait(60 if number < 0 else duration * number * chance.uniform(0.5, 1.5) / 7)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        found = contents(target) if target.exists() else None
        if number < 0:
            assert code == 0
            duration, complete = time.monotonic() - begun, found or {}
            continue
        assert found in (before, complete)
        assert found == complete or code != 0
        whole += found == complete
        assert case == "in place" or contents(folder) == sources
        for name in names(tmp_path) - {"model", target.name}:
            assert name.startswith(".sdsurgery-")
            assert name.endswith(".partial")
            shutil.rmtree(tmp_path / name)
    assert whole < 8  # the first is killed at once


_SLOW = (
    _SAVE
    + """
import os, signal, time
from sdsurgery.cli.app import _ending_in_order
from sdsurgery.containers import writing
signal.signal(signal.SIGINT, signal.default_int_handler)
writing.COPY_CHUNK = 1 << 8
def slowly(original):
    def slow(*arguments):
        print("here", flush=True)
        time.sleep(0.05)
        return original(*arguments)
    return slow
where = sys.argv[1]
if where == "copying":
    writing.OutputFile._advance = slowly(writing.OutputFile._advance)
elif where == "flushing":
    writing.flush_to_disk = slowly(writing.flush_to_disk)
elif where == "removing":
    writing._remove_tree = slowly(writing._remove_tree)
else:
    writing._renameat2 = lambda *_: False
    writing.AtomicFolder._take_place = slowly(writing.AtomicFolder._take_place)
with _ending_in_order():
    save(*sys.argv[2:])
"""
)


@pytest.mark.parametrize("case", ["new", "in place"])
@pytest.mark.parametrize("where", ["copying", "flushing", "removing", "renaming"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_leaves_nothing(number: signal.Signals, where: str, case: str, folder: Path) -> None:
    if case == "new" and where == "renaming":
        return
    before = prepare(case, folder)
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, where, *arguments(case, folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    after = contents(folder.parent)
    assert not [name for name in names(folder.parent) if name.startswith(".")]
    if where == "removing":  # it was done, but for what was there before
        save(case, folder) if case == "in place" else None
        assert sd.open(arguments(case, folder)[1])[VAE].numpy().min() == 1
    else:
        assert after == before


# Errors of the system.


def _refusing(number: int, when: Callable[[tuple[Any, ...]], Any], real: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        if when(arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "copy_file_range", "fsync", "mkdir"])
@pytest.mark.parametrize("case", CASES)
def test_errors_of_the_system_become_one_message(
    case: str, call: str, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare(case, folder)
    monkeypatch.setattr(os, call, _refusing(number, lambda _: True, getattr(os, call)))
    with pytest.raises(OutputError) as caught:
        save(case, folder)
    monkeypatch.undo()
    assert isinstance(caught.value, NoSpaceError) == (number != errno.EROFS)
    assert os.strerror(number) in caught.value.message
    assert contents(folder.parent) == before


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("exchange", [True, False])
def test_a_rename_that_fails_leaves_what_was_there(
    exchange: bool, case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare(case, folder)

    def exchanging(*_: Any) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    new = [True]  # the first to leave a hidden name is the new folder; if it fails, the old one goes back
    monkeypatch.setattr(writing, "_renameat2", exchanging if exchange else lambda *_: False)
    if not exchange:
        refused = _refusing(
            errno.EACCES, lambda names: new and names[0].name.endswith(".partial") and new.pop(), os.rename
        )
        monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(OutputError):
        save(case, folder)
    monkeypatch.undo()
    assert contents(folder.parent) == before


@pytest.mark.parametrize("case", CASES)
def test_a_computation_that_fails_leaves_nothing(case: str, folder: Path) -> None:
    def produce(_: int) -> Any:
        yield bytes(100)
        raise ZeroDivisionError

    before = prepare(case, folder)
    source, target, *flags = arguments(case, folder)
    opened = sd.open(source)
    broken = sd.Tensor(sd.open(source)[VAE].dtype, (100,), Computed(200, produce))
    with pytest.raises(ZeroDivisionError):
        opened.evolve({**opened, VAE: broken}, sd.Step("t", {})).save(target, **dict.fromkeys(map(str, flags), True))
    assert contents(folder.parent) == before


@pytest.mark.parametrize("case", CASES)
def test_an_input_that_changes_meanwhile_is_noticed(case: str, folder: Path) -> None:
    prepare(case, folder)
    source, target, *flags = arguments(case, folder)
    for name in (UNET_FILE, "tokenizer/vocab.json", VAE_FILE):
        before = contents(folder.parent)
        mended = changed(sd.open(source), VAE)
        path, old = folder / name, (folder / name).stat()
        os.utime(path, ns=(0, old.st_mtime_ns + 1_000_000_000))
        with pytest.raises(sd.SurgeryError) as caught:
            mended.save(target, **dict.fromkeys(map(str, flags), True))
        assert caught.value.exit_code == 3
        assert contents(folder.parent) == before


def test_of_two_writers_of_one_name_one_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)
    publish = writing.AtomicFolder._publish

    def at_once(self: writing.AtomicFolder) -> None:
        together.wait(30)
        publish(self)

    monkeypatch.setattr(writing.AtomicFolder, "_publish", at_once)
    outcomes: list[str] = []

    def write() -> None:
        try:
            save("new", folder)
            outcomes.append("saved")
        except OutputExistsError:
            outcomes.append("exists")

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["exists", "saved"]
    assert names(folder.parent) == {"model", "out"}


def test_a_folder_that_came_meanwhile_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there was looked at; what is there now, nobody knows."""
    target = put_folder(folder.with_name("out"))
    (target / "README.md").unlink()
    flush = writing.AtomicFolder._flush

    def meanwhile(self: writing.AtomicFolder) -> None:
        target.rename(target.with_name("moved"))
        put(target / "precious", "x")
        flush(self)

    monkeypatch.setattr(writing.AtomicFolder, "_flush", meanwhile)
    with pytest.raises(OutputExistsError):
        save("force", folder)
    assert contents(target).keys() == {"precious"}
    assert names(folder.parent) == {"model", "out", "moved"}


_ON_SMALL_DISK = (
    _SAVE
    + """
import collections, json, os, pathlib, shutil
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
if how == "unaware":  # as if the space went while the files were written
    shutil.disk_usage = lambda _: collections.namedtuple("U", "free")(1 << 40)
before = sorted(os.listdir(folder)), os.statvfs(folder).f_bavail
try:
    save(sys.argv[3], folder / "out")
except sd.SurgeryError as error:
    print(json.dumps([error.kind, error.message, before == (sorted(os.listdir(folder)), os.statvfs(folder).f_bavail)]))
"""
)


@pytest.mark.skipif(not _can_mount(), reason="this user may not mount a file system of their own")
@pytest.mark.parametrize("how", ["aware", "unaware"])
def test_a_full_disk_leaves_nothing(how: str, tmp_path: Path) -> None:
    put_folder(tmp_path / "model")
    put_weights(tmp_path / "model" / UNET_FILE, random_state(3, nbytes=1 << 17))
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=500000 none "$1" && exec "$0" -c "$2" "$1" "$3" "$4"'
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            script,
            sys.executable,
            tmp_path / "disk",
            _ON_SMALL_DISK,
            how,
            tmp_path / "model",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )  # fmt: skip
    kind, message, same = json.loads(done.stdout or done.stderr)
    assert (kind, same) == ("no-space", True)
    assert ("are free" in message) == (how == "aware")


def test_a_limit_on_file_sizes_is_a_full_disk(folder: Path) -> None:
    put_weights(folder / UNET_FILE, random_state(3, nbytes=1 << 17))
    before = contents(folder.parent)
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + _SAVE
    done = run_python(code + "save(*sys.argv[1:])", *arguments("new", folder))
    assert "NoSpaceError" in done.stderr
    assert contents(folder.parent) == before


def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    folder = _big(tmp_path / "model")
    code = _SAVE + "import container_support\nsave(*sys.argv[1:])\nprint(container_support.peak_memory())"
    done = run_python(code, folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50
