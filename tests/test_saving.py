"""An output appears whole under its name or not at all, whatever happens meanwhile; inputs stay as they are."""

from __future__ import annotations

import errno
import gc
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from container_support import (
    ROOT,
    Raw,
    State,
    command,
    header_of,
    in_memory,
    library_bytes,
    random_state,
    raw_state,
    run_python,
)

import sdsurgery as sd
from sdsurgery import history, progress
from sdsurgery.containers import saving, writing
from sdsurgery.containers.patching import patch_in_place
from sdsurgery.dtypes import BY_NAME
from sdsurgery.errors import NoSpaceError, OutputError, OutputExistsError
from sdsurgery.sources import Computed, FileSlice

IDS = synthetic.SD1_IDS
ONE_FILE = [".safetensors", ".ckpt"]


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def has_nameless_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_RDWR | os.O_TMPFILE))
    except OSError:
        return False
    return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some 80 MB whose ids want fixing, with its ids right in ``right.safetensors`` beside it."""
    folder = tmp_path_factory.mktemp("large")
    widths = synthetic.Widths((64, 96, 160, 160), 64, vae=(16, 32, 48, 48), clip=64, vocabulary=20000)
    tensors = synthetic.model("sd1", widths, dtype="float32")
    sd.Checkpoint.from_state_dict(tensors, {"format": "pt"}).save(folder / "right.safetensors")
    tensors[IDS] = synthetic.merged_ids(0.1, "float32")
    sd.Checkpoint.from_state_dict(tensors, {"format": "pt"}).save(folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of model, in half a megabyte."""
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    tensors = synthetic.model("sd1") | {IDS: synthetic.merged_ids(0.1, "float32")}
    sd.Checkpoint.from_state_dict(tensors, {"format": "pt"}).save(path)
    return path


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may do anything to."""
    return Path(shutil.copy(small, tmp_path / "model.safetensors"))


# The bytes are the same in whatever way they were written.


def _without(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.delattr(os, name)


def _copy_that(behave: Callable[[int, Callable[[int], int], int], int]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replace ``copy_file_range``; ``behave`` gets the number of the call, the real one and the wanted count."""

    def install(patch: pytest.MonkeyPatch) -> None:
        real, calls = os.copy_file_range, iter(range(1 << 30))

        def fake(source: int, target: int, count: int, offset: int) -> int:
            return behave(next(calls), lambda wanted: real(source, target, wanted, offset), count)

        patch.setattr(os, "copy_file_range", fake)

    return install


def _raising(number: int, when: Callable[[int], bool]) -> Callable[[pytest.MonkeyPatch], None]:
    def behave(call: int, real: Callable[[int], int], count: int) -> int:
        if when(call):
            raise OSError(number, os.strerror(number))
        return real(min(count, 1000))

    return _copy_that(behave)


SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "this one": lambda _: None,
    "no nameless files": _without("O_TMPFILE"),
    "no copying in the kernel": _without("copy_file_range"),
    "no advice": _without("posix_fadvise"),
    "another file system": _raising(errno.EXDEV, lambda _: True),
    "copying fails halfway": _raising(errno.EINVAL, lambda call: call > 20),
    "copies are short": _copy_that(lambda _, real, count: real(min(count, 777))),
    "copies end early": _copy_that(lambda call, real, count: real(min(count, 777)) if call < 9 else 0),
    "copies are interrupted": _raising(errno.EINTR, lambda call: call % 2 == 0),
    "small chunks": lambda patch: patch.setattr(writing, "COPY_CHUNK", 1000),
}


@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_bytes_on_every_system(
    system: str, suffix: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = sd.open(model).pipe(sd.FixClip())
    expected = tmp_path / f"expected{suffix}"
    fixed.save(expected)
    SYSTEMS[system](monkeypatch)
    target = tmp_path / f"out{suffix}"
    saved = fixed.save(target)
    assert target.read_bytes() == expected.read_bytes()
    assert saved.nbytes == target.stat().st_size
    fixed.save(target, force=True)
    assert target.read_bytes() == expected.read_bytes()
    assert names(tmp_path) == {"model.safetensors", expected.name, target.name}


@pytest.mark.parametrize("suffix", ONE_FILE)
def test_progress_counts_every_byte_once(suffix: str, model: Path, tmp_path: Path) -> None:
    told: list[int] = []
    totals: list[int] = []

    @contextmanager
    def listener(_: str, total: int, _unit: str) -> Iterator[progress.Advance]:
        totals.append(total)
        yield told.append

    with progress.told_to(listener):
        saved = sd.open(model).pipe(sd.FixClip()).save(tmp_path / f"out{suffix}")
    assert len(totals) == 1
    if suffix == ".safetensors":
        assert sum(told) == totals[0] == saved.nbytes
    else:
        assert saved.nbytes <= totals[0]
        assert sum(told) >= saved.nbytes  # headers are written twice


def test_untouched_tensors_are_copied_by_the_kernel_in_one_call_each_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counting(_: int, real: Callable[[int], int], count: int) -> int:
        counts.append(count)
        return real(count)

    _copy_that(counting)(monkeypatch)
    checkpoint = sd.open(model)
    checkpoint.save(tmp_path / "same.safetensors")
    assert counts == [sum(tensor.nbytes for tensor in checkpoint.values())]
    counts.clear()
    checkpoint.pipe(sd.FixClip()).save(tmp_path / "fixed.safetensors")
    assert 1 <= len(counts) <= 2
    assert sum(counts) == sum(tensor.nbytes for key, tensor in checkpoint.items() if key != IDS)


@pytest.mark.parametrize("source", ONE_FILE)
@pytest.mark.parametrize("suffix", ONE_FILE)
def test_memory_is_bounded_whatever_the_size(source: str, suffix: str, large: Path, tmp_path: Path) -> None:
    path = large
    if source == ".ckpt":
        path = tmp_path / "model.ckpt"
        sd.open(large).save(path)
    code = """
import sys
import container_support
from sdsurgery.cli import run
code = run(sys.argv[1:])
print(code, container_support.peak_memory())
"""
    done = run_python(code, "fix-clip", path, "-o", tmp_path / f"out{suffix}", "--quiet")
    assert done.returncode == 0, done.stderr
    code_and_peak = [int(word) for word in done.stdout.split()]
    assert code_and_peak[0] == 0
    assert code_and_peak[1] < 56 < path.stat().st_size >> 20


def test_no_descriptor_is_left_open(model: Path, tmp_path: Path) -> None:
    def once(target: Path) -> None:
        checkpoint = sd.open(model).pipe(sd.FixClip())
        checkpoint.save(target, force=True)
        with pytest.raises(OutputExistsError):
            checkpoint.save(target)
        with pytest.raises(OutputError):
            checkpoint.save(tmp_path / "missing" / target.name)
        for file in checkpoint.files:
            file.close()

    for suffix in ONE_FILE:
        once(tmp_path / f"out{suffix}")
    gc.collect()  # what other tests left open is closed when it is collected
    before = open_files()
    for suffix in ONE_FILE * 20:
        once(tmp_path / f"out{suffix}")
    gc.collect()
    assert open_files() == before


# Names.


@pytest.mark.parametrize("nameless", [True, False])
def test_an_existing_output_is_kept_without_force_and_replaced_with_it(
    nameless: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    target.chmod(0o640)
    done = command("fix-clip", model, "-o", target)
    assert (done.returncode, target.read_bytes()) == (4, b"precious")
    assert "--force" in done.stderr
    checkpoint = sd.open(model).pipe(sd.FixClip())
    with pytest.raises(OutputExistsError):
        checkpoint.save(target)
    assert target.read_bytes() == b"precious"
    checkpoint.save(target, force=True)
    assert raw_state(sd.open(target)) == raw_state(checkpoint)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(tmp_path) == {"model.safetensors", "out.safetensors"}


@pytest.mark.parametrize("nameless", [True, False])
def test_a_new_output_has_the_permissions_that_the_umask_leaves(
    nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    old = os.umask(0o027)
    try:
        in_memory(random_state()).save(tmp_path / "out.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out.safetensors").stat().st_mode) == 0o640


def _other_names(model: Path) -> dict[str, Path]:
    folder = model.parent
    (folder / "sub").mkdir()
    (folder / "link.safetensors").symlink_to(model.name)
    os.link(model, folder / "hard.safetensors")
    return {
        "itself": model,
        "relative": Path(os.path.relpath(model)),
        "roundabout": folder / "sub" / ".." / model.name,
        "symbolic link": folder / "link.safetensors",
        "hard link": folder / "hard.safetensors",
    }


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["itself", "relative", "roundabout", "symbolic link", "hard link"])
def test_the_input_is_no_output_under_any_name(name: str, force: bool, model: Path) -> None:
    before = digest(model)
    target = _other_names(model)[name]
    checkpoint = sd.open(model).pipe(sd.FixClip())
    with pytest.raises(OutputExistsError, match="inputs") as caught:
        checkpoint.save(target, force=force)
    assert "--in-place" in str(caught.value.remedy)
    done = command("fix-clip", model, "-o", target, *(["--force"] if force else []))
    assert done.returncode == 4
    assert digest(model) == before
    assert model.stat().st_nlink == 2


@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize("how", ["as it is", "strided", "cast"])
def test_a_donor_is_no_output(how: str, suffix: str, tmp_path: Path) -> None:
    import torch

    from sdsurgery.operations.cast import cast_tensor

    donor = tmp_path / f"donor{suffix}"
    tensor = torch.arange(12.0).reshape(3, 4)
    if suffix == ".ckpt":
        torch.save({"a": tensor.t() if how == "strided" else tensor}, donor)
    else:
        sd.Checkpoint.from_state_dict({"a": tensor}).save(donor)
    before = digest(donor)
    mixed = in_memory(random_state())
    given = sd.open(donor)["a"]
    given = cast_tensor(given, BY_NAME["F16"]) if how == "cast" else given
    mixed = mixed.evolve({**mixed, "a": given}, sd.Step("graft", {}))
    for force, in_place in ((False, False), (True, False), (True, True)):
        with pytest.raises(OutputExistsError):
            mixed.save(donor, force=force, in_place=in_place)
    assert digest(donor) == before
    mixed.save(tmp_path / "out.safetensors")
    assert sd.open(tmp_path / "out.safetensors")["a"].tobytes() == mixed["a"].tobytes()


def test_in_place_is_about_the_input_and_nothing_else(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"precious")
    with pytest.raises(OutputExistsError):
        sd.open(model).pipe(sd.FixClip()).save(other, in_place=True)
    with pytest.raises(OutputExistsError):
        in_memory(random_state()).save(other, in_place=True)
    assert other.read_bytes() == b"precious"


def test_what_can_be_no_file_is_refused(model: Path, tmp_path: Path) -> None:
    before = digest(model)
    (tmp_path / "null.safetensors").symlink_to("/dev/null")
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "file").write_bytes(b"")
    listed = names(tmp_path)
    for name in (
        "null.safetensors",
        "folder.safetensors",
        "pipe.safetensors",
        "loop.safetensors",
        "missing/out.safetensors",
        "file/out.safetensors",
        "x" * 300 + ".safetensors",
        "nul\0byte.safetensors",
    ):
        for force in (False, True):
            if force and name.startswith("loop"):
                continue  # a link to nowhere may be replaced
            with pytest.raises(sd.SurgeryError) as caught:
                sd.open(model).save(tmp_path / name, force=force)
            assert caught.value.exit_code == 4, name
            assert caught.value.remedy
            if not name.startswith(("nul\0", "loop")):
                done = command("fix-clip", model, "-o", tmp_path / name, *(["--force"] if force else []))
                assert done.returncode == 4
                assert "Traceback" not in done.stderr
                assert "fault in sdsurgery" not in done.stderr
    done = command("fix-clip", model, "-o", "/dev/null", "--force")
    assert done.returncode in {2, 4}
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert names(tmp_path) == listed
    assert digest(model) == before


def test_a_link_is_followed_and_stays(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("there", "not-yet"):
        (tmp_path / f"{name}.safetensors").symlink_to(elsewhere / f"{name}.safetensors")
    (elsewhere / "there.safetensors").write_bytes(b"old")
    checkpoint = sd.open(model).pipe(sd.FixClip())
    with pytest.raises(OutputExistsError):
        checkpoint.save(tmp_path / "there.safetensors")
    checkpoint.save(tmp_path / "there.safetensors", force=True)
    checkpoint.save(tmp_path / "not-yet.safetensors")
    for name in ("there", "not-yet"):
        assert (tmp_path / f"{name}.safetensors").is_symlink()
        assert raw_state(sd.open(elsewhere / f"{name}.safetensors")) == raw_state(checkpoint)
    assert names(elsewhere) == {"there.safetensors", "not-yet.safetensors"}


def test_relative_names(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    checkpoint = sd.open("model.safetensors")
    for name in ("out.safetensors", "./sub/out.safetensors", "sub/../other.ckpt"):
        checkpoint.save(name)
        assert raw_state(sd.open(name)) == raw_state(checkpoint)


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("force", [False, True])
def test_of_two_writers_of_one_name_the_second_fails_unless_forced(
    force: bool, nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked, found nothing and written all: the name itself decides."""
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    together = threading.Barrier(2)
    publish = writing.AtomicFile._publish

    def at_once(self: writing.AtomicFile) -> None:
        together.wait(30)
        publish(self)

    monkeypatch.setattr(writing.AtomicFile, "_publish", at_once)
    target = tmp_path / "out.safetensors"
    states = [random_state(1), random_state(2)]
    outcomes: dict[int, str] = {}

    def write(number: int) -> None:
        try:
            in_memory(states[number]).save(target, force=force)
            outcomes[number] = "saved"
        except sd.SurgeryError as error:
            outcomes[number] = error.kind

    for _ in range(20):
        outcomes.clear()
        target.unlink(missing_ok=True)
        threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes.values()) == (["saved", "saved"] if force else ["exists", "saved"])
        winners = [states[number] for number, outcome in outcomes.items() if outcome == "saved"]
        assert raw_state(sd.open(target)) in winners
        assert names(tmp_path) == {"out.safetensors"}


def test_of_two_commands_for_one_name_one_fails(small: Path, tmp_path: Path) -> None:
    inputs = []
    for number in range(2):
        inputs.append(Path(shutil.copy(small, tmp_path / f"{number}.safetensors")))
        checkpoint = sd.open(inputs[-1])
        checkpoint.evolve({**checkpoint, f"only.{number}": checkpoint[IDS]}, sd.Step("mark", {})).save(
            inputs[-1], in_place=True
        )
    target = tmp_path / "out.safetensors"
    for _ in range(5):
        target.unlink(missing_ok=True)
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "sdsurgery", "fix-clip", path, "-o", target],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
            )
            for path in inputs
        ]
        codes = [process.wait(60) for process in running]
        assert sorted(codes) == [0, 4]
        assert f"only.{codes.index(0)}" in sd.open(target)
    assert names(tmp_path) == {"0.safetensors", "1.safetensors", "out.safetensors"}


# Failures while writing.


@pytest.mark.parametrize(
    "how",
    [
        *itertools.product(["write", "fsync", "replace"], ONE_FILE, [True, False]),
        # A file that has a name is renamed where it can't be linked; in a pickle, nothing is copied by the kernel.
        *itertools.product(["link"], ONE_FILE, [True]),
        *itertools.product(["copy_file_range"], [".safetensors"], [True, False]),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_errors_of_the_system_become_one_message(
    number: int, how: tuple[str, str, bool], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, suffix, nameless = how
    fixed = sd.open(model).pipe(sd.FixClip())

    real, trials = getattr(os, call), [call == "link"]  # whether a nameless file can be named is tried out first

    def failing(*arguments: Any, **options: Any) -> Any:
        if trials and trials.pop():
            return real(*arguments, **options)
        raise OSError(number, os.strerror(number))

    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    target = tmp_path / f"out{suffix}"
    if call == "replace":
        target.write_bytes(b"old")
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OutputError) as caught:
        fixed.save(target, force=True)
    assert caught.value.exit_code == 4
    assert isinstance(caught.value, NoSpaceError) == (number != errno.EROFS)
    assert os.strerror(number) in caught.value.message
    if call == "replace":
        assert target.read_bytes() == b"old"
        target.unlink()
    assert names(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_system_without_hard_links_gets_the_same_file(
    nameless: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    checkpoint = sd.open(model)
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(os, "link", failing)
    checkpoint.save(tmp_path / "out.safetensors")
    assert raw_state(sd.open(tmp_path / "out.safetensors")) == raw_state(checkpoint)
    with pytest.raises(OutputExistsError):
        checkpoint.save(tmp_path / "out.safetensors")
    assert names(tmp_path) == {"model.safetensors", "out.safetensors"}


@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize("force", [False, True])
def test_a_computation_that_fails_leaves_nothing(suffix: str, force: bool, tmp_path: Path) -> None:
    def produce(_: int) -> Iterator[bytes]:
        yield bytes(100)
        raise ZeroDivisionError

    tensors = {"a": sd.Tensor(BY_NAME["U8"], (200,), Computed(200, produce)), "b": sd.Tensor.of(np.ones(3))}
    target = tmp_path / f"out{suffix}"
    if force:
        target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        sd.Checkpoint(tensors).save(target, force=force)
    assert names(tmp_path) == ({target.name} if force else set())
    assert not force or target.read_bytes() == b"old"


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
import os
if sys.argv.pop(1) == "named":
    del os.O_TMPFILE
from sdsurgery.cli import run
sys.exit(run(sys.argv[1:]))
"""


def _is_one_message(stderr: str) -> bool:
    lines = stderr.splitlines()
    return lines[0].startswith("sdsurgery: ") and all(line.startswith("  ") for line in lines[1:])


@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize("nameless", ["nameless", "named"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_limit_on_file_sizes_is_a_full_disk(
    existing: bool, nameless: str, suffix: str, model: Path, tmp_path: Path
) -> None:
    target = tmp_path / f"out{suffix}"
    if existing:
        target.write_bytes(b"old")
    before = digest(model), names(tmp_path)
    done = run_python(_LIMITED, nameless, "fix-clip", model, "-o", target, *(["--force"] if existing else []))
    assert done.returncode == 4, done.stderr
    assert _is_one_message(done.stderr), done.stderr
    assert "File too large" in done.stderr
    assert done.stdout == ""
    assert (digest(model), names(tmp_path)) == before
    assert not existing or target.read_bytes() == b"old"


def _can_mount() -> bool:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


_ON_SMALL_DISK = """
import hashlib, json, os, pathlib, shutil, subprocess, sys
folder, model, suffix, how = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
inside = shutil.copy(model, folder / "model.safetensors") if how.startswith("inside") else model
digest = lambda: hashlib.sha256(open(inside, "rb").read()).hexdigest()
state = lambda: [sorted(os.listdir(folder)), os.statvfs(folder).f_bavail, digest()]
code = "import os, sys, shutil, collections\\n"
if "unaware" in how:  # as if the space went while the file was written
    code += "shutil.disk_usage = lambda _: collections.namedtuple('U', 'free')(1 << 40)\\n"
if "named" in how:
    code += "del os.O_TMPFILE\\n"
code += "from sdsurgery.cli import run\\nsys.exit(run(sys.argv[1:]))"
before = state()
done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", code, "fix-clip", inside, "-o",
                       str(folder / ("out" + suffix))], capture_output=True, text=True)
print(json.dumps([done.returncode, done.stderr, before, state()]))
"""


@pytest.mark.skipif(not _can_mount(), reason="this user may not mount a file system of their own")
@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize(
    "how", ["aware", "inside aware", "unaware", "inside unaware", "unaware named", "inside unaware named"]
)
def test_a_full_disk_leaves_nothing(how: str, suffix: str, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    size = 300_000 + (model.stat().st_size if how.startswith("inside") else 0)
    script = f'mount -t tmpfs -o size={size} none "$1" && exec "$0" -c "$2" "$1" "$3" "$4" "$5"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, folder, _ON_SMALL_DISK, model, suffix, how],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, message, before, after = json.loads(done.stdout)
    assert code == 4, message
    assert _is_one_message(message), message
    assert "No space left" in message if "unaware" in how else "bytes are needed" in message
    assert after == before


def test_more_than_is_free_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    huge = sd.Tensor(BY_NAME["U8"], (1 << 60,), Computed(1 << 60, lambda _: pytest.fail("a weight was computed")))
    for suffix in ONE_FILE:
        with pytest.raises(NoSpaceError):
            sd.Checkpoint({"a": huge}).save(tmp_path / f"out{suffix}")
    assert names(tmp_path) == set()


# Inputs that change meanwhile.


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _truncate(path: Path) -> None:
    os.truncate(path, 2000)


def _overwrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize("damage", [_append, _truncate, _overwrite])
@pytest.mark.parametrize("kernel", [True, False])
def test_an_input_that_changes_meanwhile_is_noticed(
    kernel: bool,
    damage: Callable[[Path], None],
    suffix: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    todo = [damage]

    @contextmanager
    def listener(_: str, __: int, _unit: str) -> Iterator[progress.Advance]:
        yield lambda _: todo.pop()(model) if todo else None

    checkpoint = sd.open(model).pipe(sd.FixClip())
    with progress.told_to(listener), pytest.raises(sd.SurgeryError) as caught:
        checkpoint.save(tmp_path / f"out{suffix}")
    assert caught.value.exit_code == 3
    assert caught.value.file == str(model)
    assert names(tmp_path) == {"model.safetensors"}


def test_an_input_that_is_replaced_meanwhile_is_read_as_it_was(model: Path, tmp_path: Path) -> None:
    checkpoint = sd.open(model)
    expected = raw_state(checkpoint)
    other = tmp_path / "other.safetensors"
    other.write_bytes(library_bytes(random_state()))
    other.replace(model)
    checkpoint.save(tmp_path / "out.safetensors")
    assert raw_state(sd.open(tmp_path / "out.safetensors")) == expected


# Signals.

_SLOW = """
import os, signal, sys, time
# A shell that runs in the background has its children ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
how, where = sys.argv[1:3]
if how == "named":
    del os.O_TMPFILE
from sdsurgery.containers import writing
writing.COPY_CHUNK = 1 << 14
def slowly(original):
    def slow(*arguments):
        print("here", flush=True)
        time.sleep(0.05)
        return original(*arguments)
    return slow
if where == "copying":
    writing.AtomicFile._advance = slowly(writing.AtomicFile._advance)
else:
    writing.flush_to_disk = slowly(writing.flush_to_disk)
    writing.AtomicFile._publish = slowly(writing.AtomicFile._publish)
from sdsurgery.cli import run
sys.exit(run(sys.argv[3:]))
"""


@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize("where", ["copying", "flushing"])
@pytest.mark.parametrize("how", ["nameless", "named"])
@pytest.mark.parametrize("interrupt", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_leaves_nothing(
    interrupt: tuple[signal.Signals, int], how: str, where: str, suffix: str, model: Path, tmp_path: Path
) -> None:
    number, code = interrupt
    before = digest(model)
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, how, where, "fix-clip", model, "-o", tmp_path / f"out{suffix}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert names(tmp_path) == {"model.safetensors"}
    assert digest(model) == before


def _kill_after(seconds: float, *arguments: str | Path) -> int:
    """Run a command and kill it after a while, wherever it may be."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sdsurgery", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


def _reset(case: str, source: Path, target: Path, large: Path) -> str | None:
    """Bring the folder into the state before a run, and tell what then lies under the output's name."""
    if case == "in place":
        if not source.exists() or digest(source) != digest(large):
            shutil.copy(large, source)
        return digest(large)
    if not source.exists():
        os.link(large, source)
    target.unlink(missing_ok=True)
    if case == "replaced":
        target.write_bytes(b"old")
        return digest(target)
    return None


def _check_leftovers(case: str, folder: Path, known: set[str]) -> None:
    """A hidden name exists for an instant where naming is tried out, and before a replacement; nothing else may."""
    for name in names(folder) - known:
        assert name.startswith(".")
        assert name.endswith(".partial")
        if case in {"new", "pickle"} and has_nameless_files(folder):
            assert (folder / name).stat().st_size == 0
        (folder / name).unlink()


@pytest.mark.parametrize("case", ["new", "replaced", "pickle", "in place"])
def test_a_kill_at_any_instant_leaves_all_or_nothing(case: str, large: Path, tmp_path: Path) -> None:
    """Twenty-five kills a case, spread over the whole run and a little more."""
    chance = random.Random(case)
    source = tmp_path / "model.safetensors"
    target = tmp_path / {"pickle": "out.ckpt", "in place": source.name}.get(case, "out.safetensors")
    options = ["--in-place"] if case == "in place" else ["-o", target, "--force"][: 3 if case == "replaced" else 2]
    untouched, written = digest(large), large.stat().st_mtime_ns

    before = _reset(case, source, target, large)
    begun = time.monotonic()
    assert _kill_after(120, "fix-clip", source, *options) == 0
    duration = time.monotonic() - begun
    complete = digest(target)
    assert complete != before

    whole = 0
    for number in range(25):
        _reset(case, source, target, large)
        code = _kill_after(duration * (number + chance.random()) / 22, "fix-clip", source, *options)
        found = digest(target) if target.exists() else None
        assert found in {before, complete}
        assert found == complete or code != 0
        whole += found == complete
        assert large.stat().st_mtime_ns == written
        _check_leftovers(case, tmp_path, {source.name, target.name})
    assert whole < 25  # some were killed in time
    assert digest(large) == untouched


# In place.


def changed_bytes(before: bytes, after: bytes) -> list[int]:
    assert len(before) == len(after)
    return [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


@pytest.fixture
def patchable(small: Path, tmp_path: Path) -> Path:
    """Ids of the right type and size with wrong values."""
    checkpoint = sd.open(small)
    wrong = sd.Tensor.of(2 * np.arange(77, dtype=np.int64)[None])
    path = tmp_path / "model.safetensors"
    sd.Checkpoint({**checkpoint, IDS: wrong}, {"format": "pt"}).save(path)
    return path


def test_right_sized_ids_are_patched_where_they_lie(patchable: Path, tmp_path: Path) -> None:
    before, inode = patchable.read_bytes(), patchable.stat().st_ino
    slice_ = sd.open(patchable)[IDS].data
    assert isinstance(slice_, FileSlice)
    done = command("fix-clip", patchable, "--in-place")
    assert done.returncode == 0, done.stderr
    after = patchable.read_bytes()
    assert patchable.stat().st_ino == inode
    changed = changed_bytes(before, after)
    assert changed
    assert {place for place in changed if not slice_.offset <= place < slice_.offset + 77 * 8} == set()
    assert sd.open(patchable)[IDS].numpy().tolist() == [list(range(77))]
    assert history.recorded(sd.open(patchable).metadata) == []
    assert names(tmp_path) == {"model.safetensors"}
    again = command("fix-clip", patchable, "--in-place")
    assert again.returncode == 0
    assert patchable.read_bytes() == after


def test_a_patch_goes_through_a_symbolic_link(patchable: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(patchable.name)
    assert patch_in_place(sd.open(link).pipe(sd.FixClip()))
    assert link.is_symlink()
    assert sd.open(patchable)[IDS].numpy().tolist() == [list(range(77))]


def test_a_file_with_two_names_is_rewritten_and_the_other_name_keeps_the_old(patchable: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    os.link(patchable, other)
    before = patchable.read_bytes()
    done = command("fix-clip", patchable, "--in-place")
    assert done.returncode == 0, done.stderr
    assert other.read_bytes() == before
    assert patchable.stat().st_ino != other.stat().st_ino
    assert sd.open(patchable)[IDS].numpy().tolist() == [list(range(77))]
    assert [entry["operation"] for entry in history.recorded(sd.open(patchable).metadata)] == ["fix-clip"]


@pytest.mark.parametrize("key", history.HASH_KEYS)
def test_a_recorded_hash_forces_a_rewrite_that_drops_it(key: str, patchable: Path) -> None:
    path = patchable.with_name("hashed.safetensors")
    _in_any_order(path, raw_state(sd.open(patchable)), {"format": "pt", key: "0x00"})
    inode = path.stat().st_ino
    assert not patch_in_place(sd.open(path).pipe(sd.FixClip()))
    done = command("fix-clip", path, "--in-place", "--json")
    assert done.returncode == 0, done.stderr
    assert path.stat().st_ino != inode
    assert key not in sd.open(path).metadata
    assert key in {change["key"] for change in json.loads(done.stdout)["changes"]}


def _renamed(checkpoint: sd.Checkpoint) -> dict[str, sd.Tensor]:
    return {key.replace("vae", "VAE") + ("x" if key == IDS else ""): value for key, value in checkpoint.items()}


def in_memory_copy(tensor: sd.Tensor) -> sd.Tensor:
    from sdsurgery.sources import InMemory

    return sd.Tensor(tensor.dtype, tensor.shape, InMemory(tensor.tobytes()))


def _swapped(c: sd.Checkpoint) -> sd.Checkpoint:
    first, second = [key for key, tensor in c.items() if tensor.shape == (8,)][:2]
    return sd.Checkpoint({**c, first: c[second], second: c[first]}, c.metadata, origin=c.origin)


NOT_PATCHABLE: dict[str, Callable[[sd.Checkpoint], sd.Checkpoint]] = {
    "another type": lambda c: sd.Checkpoint(
        {**c, IDS: sd.Tensor.of(np.arange(77, dtype=np.int32)[None])}, c.metadata, origin=c.origin
    ),
    "another shape": lambda c: sd.Checkpoint(
        {**c, IDS: sd.Tensor.of(np.arange(77, dtype=np.int64))}, c.metadata, origin=c.origin
    ),
    "another key": lambda c: sd.Checkpoint(_renamed(c), c.metadata, origin=c.origin),
    "other metadata": lambda c: sd.Checkpoint(c.tensors, {**c.metadata, "a": "b"}, origin=c.origin),
    "two tensors": lambda c: sd.Checkpoint(
        {**c, **{key: in_memory_copy(c[key]) for key in list(c)[-2:]}}, c.metadata, origin=c.origin
    ),
    "two that changed places": _swapped,
    "nothing in common": lambda c: sd.Checkpoint(c.tensors, c.metadata),
}


@pytest.mark.parametrize("case", NOT_PATCHABLE)
def test_whatever_is_more_than_one_small_tensor_is_not_patched(case: str, patchable: Path) -> None:
    before = patchable.read_bytes()
    fixed = sd.open(patchable).pipe(sd.FixClip())
    assert not patch_in_place(NOT_PATCHABLE[case](fixed))
    assert patchable.read_bytes() == before


def test_a_file_that_was_replaced_since_is_not_patched(patchable: Path, tmp_path: Path) -> None:
    fixed = sd.open(patchable).pipe(sd.FixClip())
    other = tmp_path / "other.safetensors"
    sd.Checkpoint(sd.open(patchable).tensors, {"format": "pt"}).save(other)
    other.replace(patchable)
    before = patchable.read_bytes()
    with pytest.raises(sd.SurgeryError) as caught:
        patch_in_place(fixed)
    assert caught.value.exit_code == 3
    assert patchable.read_bytes() == before


def test_a_lone_tensor_of_a_file_that_was_replaced_is_not_patched(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    in_memory({"a": Raw("I64", (2,), bytes(16))}).save(path)
    opened = sd.open(path)
    edited = sd.Checkpoint({"a": in_memory_copy(sd.Tensor.of(np.arange(2)))}, origin=opened.origin)
    in_memory({"a": Raw("I64", (2,), bytes(range(16)))}).save(tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(path)
    with pytest.raises(sd.SurgeryError):
        patch_in_place(edited)
    assert sd.open(path)["a"].tobytes() == bytes(range(16))


def test_a_file_that_may_not_be_written_is_an_output_error(patchable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = sd.open(patchable).pipe(sd.FixClip())
    real = os.open

    def denying(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_WRONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", denying)
    with pytest.raises(OutputError) as caught:
        patch_in_place(fixed)
    assert caught.value.exit_code == 4


def test_wrong_sized_ids_are_rewritten_in_place(model: Path, tmp_path: Path) -> None:
    others = {key: value for key, value in raw_state(sd.open(model)).items() if key != IDS}
    model.chmod(0o600)
    done = command("fix-clip", model, "--in-place")
    assert done.returncode == 0, done.stderr
    after = raw_state(sd.open(model))
    assert after.pop(IDS) == Raw("I64", (1, 77), np.arange(77, dtype="<i8").tobytes())
    assert after == others
    assert stat.S_IMODE(model.stat().st_mode) == 0o600
    assert names(tmp_path) == {"model.safetensors"}


# Hashes and history in the metadata.


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def _in_any_order(path: Path, state: State, metadata: dict[str, str]) -> None:
    """A sound file whose data lie in the order of the mapping, as other programs write them."""
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for key, tensor in state.items():
        end = place + len(tensor.content)
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t.content for t in state.values()))


def _drop_first(c: sd.Checkpoint) -> dict[str, sd.Tensor]:
    return dict(list(c.items())[1:])


SAVES: dict[str, tuple[bool, Callable[[sd.Checkpoint], sd.Checkpoint]]] = {
    "as it is": (True, lambda c: c),
    "another order": (True, lambda c: c.evolve(dict(reversed(list(c.items()))), sd.Step("t", {}))),
    "with history": (True, lambda c: c.evolve(c.tensors, sd.Step("t", {}, (sd.Change("a", "metadata"),)))),
    "renamed alike": (True, lambda c: c.evolve({"x" + key: t for key, t in c.items()}, sd.Step("t", {}))),
    "renamed to another order": (
        False,
        lambda c: c.evolve({str(9999 - n): t for n, t in enumerate(c.values())}, sd.Step("t", {})),
    ),
    "a tensor less": (False, lambda c: c.evolve(_drop_first(c), sd.Step("t", {}))),
    "a tensor more": (False, lambda c: c.evolve({**c, "new": sd.Tensor.of(np.ones(3))}, sd.Step("t", {}))),
    "an empty tensor more": (
        True,
        lambda c: c.evolve({**c, "new": sd.Tensor.of(np.ones((0, 3)))}, sd.Step("t", {})),
    ),
    "another value": (
        False,
        lambda c: c.evolve({**c, "block.0.weight": sd.Tensor.of(np.ones((8, 4), np.float16))}, sd.Step("t", {})),
    ),
    "another shape": (
        True,
        lambda c: c.evolve(
            {**c, "block.0.weight": sd.Tensor(BY_NAME["F16"], (4, 8), c["block.0.weight"].data)}, sd.Step("t", {})
        ),
    ),
}


@pytest.mark.parametrize("case", SAVES)
def test_a_hash_is_dropped_exactly_when_it_became_false(case: str, tmp_path: Path) -> None:
    true, change = SAVES[case]
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    metadata = dict.fromkeys(history.HASH_KEYS, "recorded") | {"modelspec.title": "kept"}
    source.write_bytes(library_bytes(random_state()))
    _in_any_order(source, raw_state(sd.open(source)), metadata)
    saved = change(sd.open(source)).save(target)
    assert (data_of(source) == data_of(target)) == true
    written = sd.open(target).metadata
    assert written["modelspec.title"] == "kept"
    assert {key: key in written for key in history.HASH_KEYS} == dict.fromkeys(history.HASH_KEYS, true)
    dropped = {entry.key for entry in saved.changes if entry.kind == "metadata"}
    assert dropped == (set() if true else set(history.HASH_KEYS))


def test_a_file_in_another_order_loses_its_hash_because_its_data_move(tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    _in_any_order(source, dict(reversed(random_state().items())), {"sshs_model_hash": "recorded"})
    saved = sd.open(source).save(target)
    assert raw_state(sd.open(target)) == random_state()
    assert data_of(source) != data_of(target)
    assert "sshs_model_hash" not in sd.open(target).metadata
    assert [entry.key for entry in saved.changes] == ["sshs_model_hash"]


def test_a_pickle_holds_no_hash_of_a_safetensors_file(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    source.write_bytes(library_bytes(random_state(), {"sshs_model_hash": "recorded"}))
    saved = sd.open(source).save(tmp_path / "out.ckpt")
    assert sd.open(tmp_path / "out.ckpt").metadata == {}
    assert [entry.key for entry in saved.changes] == ["sshs_model_hash"]


def test_a_file_without_data_keeps_its_hash(tmp_path: Path) -> None:
    for number, state in enumerate([{}, {"a": Raw("F32", (0,), b"")}]):
        source = tmp_path / f"{number}.safetensors"
        source.write_bytes(library_bytes(state, {"sshs_model_hash": "recorded"}))
        sd.open(source).save(tmp_path / f"out{number}.safetensors")
        assert sd.open(tmp_path / f"out{number}.safetensors").metadata == {"sshs_model_hash": "recorded"}


_STEP = sd.Step("test", {"name": "x"}, (sd.Change("a", "replaced", "1", "2"),))


@pytest.mark.parametrize(
    "record",
    [
        "not json",
        "[]",
        '{"steps": 5}',
        '{"steps": [1, "x", null]}',
        "{}",
        '{"steps": [{"a": NaN}]}',
        '{"steps": [{"operation": "\\ud800"}]}',
        '{"steps": [{"a": ' + "[" * 5000 + "]" * 5000 + "}]}",
        '{"steps": [{"a": ' + "[" * 900 + "]" * 900 + "}]}",
        '{"steps": [{"a": 1' + "0" * 5000 + "}]}",
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("suffix", ONE_FILE)
def test_a_strange_record_of_history_is_survived(record: str, suffix: str, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    source.write_bytes(library_bytes(random_state(), {history.METADATA_KEY: record}))
    opened = sd.open(source)
    opened.evolve(opened.tensors, _STEP).save(tmp_path / f"out{suffix}")
    written = sd.open(tmp_path / f"out{suffix}")
    assert raw_state(written) == random_state()
    steps = history.recorded(written.metadata)
    assert steps[-1]["operation"] == "test"
    json.loads(written.metadata[history.METADATA_KEY])


def test_a_file_name_that_is_no_text_can_stand_in_the_history(tmp_path: Path) -> None:
    step = sd.Step("test", {"vae": "f\udcffle.pt"}, (sd.Change("a", "replaced"),))
    start = in_memory(random_state())
    start.evolve(start.tensors, step).save(tmp_path / "out.safetensors")
    assert history.recorded(sd.open(tmp_path / "out.safetensors").metadata)[0]["parameters"] == {"vae": "f\udcffle.pt"}


def test_history_is_appended_and_a_format_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    start = in_memory(random_state())
    start.save(path)
    assert "__metadata__" not in header_of(path.read_bytes())
    for number in range(3):
        opened = sd.open(path)
        opened.evolve(opened.tensors, _STEP).save(tmp_path / f"{number}.safetensors")
        path = tmp_path / f"{number}.safetensors"
    metadata = sd.open(path).metadata
    assert metadata["format"] == "pt"
    assert [entry["operation"] for entry in history.recorded(metadata)] == ["test"] * 3
    assert str(tmp_path) not in metadata[history.METADATA_KEY]


def test_nothing_is_recorded_of_steps_that_changed_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    source.write_bytes(library_bytes(random_state(), {"a": "b"}))
    opened = sd.open(source)
    opened.evolve(opened.tensors, sd.Step("looked", {})).save(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == source.read_bytes()


def test_what_lay_beside_the_state_dict_is_reported_as_dropped(tmp_path: Path) -> None:
    import torch

    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "in.ckpt")
    saved = saving.save(sd.open(tmp_path / "in.ckpt"), tmp_path / "out.safetensors")
    assert [(entry.key, entry.kind, entry.before) for entry in saved.changes] == [("epoch", "dropped", "int 3")]
