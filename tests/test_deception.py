"""Archives that two readers read differently: what torch would load is what we look at, or the file is refused."""

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch

import sdsurgery as sd
from sdsurgery.errors import CorruptError

Records = list[tuple[str, bytes]]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def records(content: bytes) -> Records:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def packed(entries: Records) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


@pytest.fixture
def good() -> bytes:
    return saved({"good": torch.ones(2)})


@pytest.fixture
def other_pickle() -> bytes:
    return dict(records(saved({"evil": torch.ones(2)})))["archive/data.pkl"]


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptError):
        sd.open(path)


def test_repacked_without_tricks_is_read(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "plain.ckpt"
    path.write_bytes(packed(records(good)))
    assert list(sd.open(path)) == ["good"]


@pytest.mark.parametrize("name", ["archive/DATA.PKL", "archive/Data.pkl", "ARCHIVE/data.pkl", "archive/data.pkl\0x"])
def test_a_second_pickle_under_a_name_that_some_take_for_the_same(
    tmp_path: Path, good: bytes, other_pickle: bytes, name: str
) -> None:
    entries = records(good)
    blank = "archive/" + "q" * (len(name) - len("archive/"))
    content = packed([entries[0], (blank, other_pickle), *entries[1:]])
    refused(tmp_path / "twice.ckpt", content.replace(blank.encode(), name.encode()))


def test_two_indices(tmp_path: Path, good: bytes) -> None:
    """The end record points to one index, and another lies where zipfile looks for it: in front of that record."""
    evil = packed(records(saved({"evil": torch.ones(2)})))
    end = evil[-22:]
    size, offset = struct.unpack("<II", end[12:20])
    second = packed(records(good))
    second_size, second_offset = struct.unpack("<II", second[-10:-2])
    index = second[second_offset : second_offset + second_size]
    refused(tmp_path / "two.ckpt", evil[: offset + size] + index + end)


@pytest.mark.parametrize("where", ["before", "behind", "comment"])
def test_bytes_around_the_archive(tmp_path: Path, good: bytes, where: str) -> None:
    content = {
        "before": packed(records(good))[:4] + good,
        "behind": good + b"tail",
        "comment": good[:-2] + struct.pack("<H", 4) + b"tail",
    }[where]
    refused(tmp_path / "around.ckpt", content)


def test_an_index_that_names_a_record_otherwise_than_the_record_itself(tmp_path: Path, good: bytes) -> None:
    content = packed(records(good))
    first = content.index(b"archive/data.pkl")
    refused(tmp_path / "local.ckpt", content[:first] + b"archive/dada.pkl" + content[first + 16 :])
