"""Pickles that attack: by what they name, by what they would call, by what they cost."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from container_support import FIXTURES, command, refusal, run_python

import sdsurgery as sd
from sdsurgery.containers import pickles
from sdsurgery.errors import HostileError

# Opcodes, and small assemblies of them.

PROTO, STOP, MARK, TUPLE, TUPLE1, TUPLE2 = b"\x80\x02", b".", b"(", b"t", b"\x85", b"\x86"
REDUCE, OBJ, NEWOBJ, NEWOBJ_EX, BUILD, POP, SETITEM = b"R", b"o", b"\x81", b"\x92", b"b", b"0", b"s"
EMPTY_LIST, EMPTY_DICT, EMPTY_TUPLE, EMPTY_SET, NONE, APPEND, APPENDS = b"]", b"}", b")", b"\x8f", b"N", b"a", b"e"
STACK_GLOBAL, MEMOIZE, BINPERSID = b"\x93", b"\x94", b"Q"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def reference(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_reference(module: str, name: str) -> bytes:
    return text(module) + text(name) + STACK_GLOBAL


def call(module: str, name: str, argument: bytes) -> bytes:
    return reference(module, name) + argument + TUPLE1 + REDUCE


def item(key: bytes, value: bytes) -> bytes:
    return key + value + SETITEM


def program(*parts: bytes) -> bytes:
    """A pickle of one dict that these items were set in."""
    return PROTO + EMPTY_DICT + b"".join(parts) + STOP


TENSOR = item(
    text("weight"),
    reference("torch._utils", "_rebuild_tensor_v2")
    + MARK
    + MARK + text("storage") + reference("torch", "FloatStorage") + text("0") + text("cpu") + number(1) + TUPLE
    + BINPERSID + number(0) + number(1) + TUPLE1 + number(1) + TUPLE1 + b"\x89"
    + reference("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE + TUPLE + REDUCE,
)  # fmt: skip


def as_zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (("data.pkl", content), ("data/0", struct.pack("<f", 2.5)), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


LEGACY_HEAD = (
    pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    + pickle.dumps(1001, protocol=2)
    + pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, protocol=2)
)


def as_legacy(content: bytes, keys: bytes | None = None) -> bytes:
    if keys is None:
        keys = pickle.dumps(["0"] if TENSOR in content else [], protocol=2)
    return LEGACY_HEAD + content + keys + struct.pack("<qf", 1, 2.5)


ENVELOPES: dict[str, Callable[[bytes], bytes]] = {"zip": as_zip, "legacy": as_legacy}
IN_ENVELOPES = pytest.mark.parametrize("envelope", ENVELOPES)

_COMMAND = text("touch executed")


def _nested(begin: bytes, step: bytes, depth: int = 100_000, end: bytes = b"") -> bytes:
    return PROTO + begin + step * depth + end * depth + STOP


def _doubling(empty: bytes, twice: Callable[[int], bytes], levels: int = 64) -> bytes:
    """Levels of a value that holds the level below twice; the last is memo 999."""
    return empty + put(0) + b"".join(twice(n) + put(n + 1) for n in range(levels)) + put(999) + POP


_LISTS = _doubling(EMPTY_LIST, lambda n: POP + EMPTY_LIST + MARK + get(n) + get(n) + APPENDS)
_TUPLES = _doubling(EMPTY_TUPLE, lambda n: POP + get(n) + get(n) + TUPLE2)
_CALLS = _doubling(reference("a", "b"), lambda n: POP + get(n) + get(n) + get(n) + TUPLE2 + REDUCE)
# Each runs something when it is loaded, or names it; with what must be found in the message.
HOSTILE: dict[str, tuple[bytes, str]] = {
    f"{module}.{name}": (program(item(text("x"), call(module, name, _COMMAND))), f"{module}.{name}")
    for module, name in [
        ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("os", "execv"), ("os.path", "join"),
        ("subprocess", "Popen"), ("subprocess", "check_output"), ("_posixsubprocess", "fork_exec"), ("pty", "spawn"),
        ("commands", "getoutput"), ("popen2", "popen3"), ("builtins", "eval"), ("builtins", "exec"),
        ("builtins", "compile"), ("builtins", "open"), ("builtins", "getattr"), ("builtins", "setattr"),
        ("builtins", "__import__"), ("builtins", "globals"), ("builtins", "vars"), ("builtins", "breakpoint"),
        ("__builtin__", "eval"), ("__builtin__", "execfile"), ("__builtin__", "apply"), ("__builtin__", "file"),
        ("__builtin__", "getattr"), ("runpy", "_run_code"), ("runpy", "run_path"), ("importlib", "import_module"),
        ("importlib._bootstrap", "_load"), ("imp", "load_source"), ("ctypes", "CDLL"), ("sys", "setprofile"),
        ("shutil", "rmtree"), ("socket", "socket"), ("webbrowser", "open"), ("code", "interact"), ("pdb", "run"),
        ("timeit", "timeit"), ("cProfile", "run"), ("pickle", "loads"), ("_pickle", "loads"), ("cPickle", "loads"),
        ("dill", "loads"), ("cloudpickle", "loads"), ("marshal", "loads"), ("joblib", "load"), ("torch", "load"),
        ("torch.hub", "load"), ("torch.serialization", "load"), ("torch.jit", "load"), ("numpy", "load"),
        ("torch.utils.collect_env", "run"), ("numpy.testing._private.utils", "runstring"), ("operator", "attrgetter"),
        ("_operator", "methodcaller"), ("pip", "main"), ("pip._internal", "main"), ("urllib.request", "urlopen"),
        ("requests", "get"), ("http.client", "HTTPSConnection"), ("multiprocessing", "Process"), ("io", "open"),
        ("_io", "FileIO"), ("codecs", "open"), ("types", "CodeType"), ("types", "FunctionType"), ("winreg", "SetValue"),
    ]
} | {
    "never called": (program(item(text("x"), reference("posix", "system"))), "posix.system"),
    "named and dropped": (PROTO + reference("posix", "system") + POP + program()[2:], "posix.system"),
    "as a key": (program(item(reference("posix", "system"), NONE)), "posix.system"),
    "in a list": (program(item(text("x"), EMPTY_LIST + reference("os", "system") + APPEND)), "os.system"),
    "before any tensor": (PROTO + reference("os", "system") + POP + EMPTY_DICT + TENSOR + STOP, "os.system"),
    "after all tensors": (program(TENSOR, item(text("x"), call("os", "system", _COMMAND))), "os.system"),
    "by the stack": (
        program(item(text("x"), stack_reference("os", "system") + _COMMAND + TUPLE1 + REDUCE)), "os.system"),
    "by the stack from the memo": (
        program(item(text("system"), text("os") + put(1)), item(text("s"), text("system") + put(2)),
                item(text("x"), get(1) + get(2) + STACK_GLOBAL)), "os.system"),
    "dotted through torch": (
        program(item(text("x"), stack_reference("torch", "serialization.os.system") + _COMMAND + TUPLE1 + REDUCE)),
        "torch.serialization.os.system"),
    "dotted through numpy": (
        program(item(text("x"), stack_reference("numpy", "core.multiarray.sys.modules"))), "sys.modules"),
    "dotted through builtins": (
        program(item(text("x"), stack_reference("builtins", "object.__subclasses__"))),
        "builtins.object.__subclasses__"),
    "dotted to builtins": (
        program(item(text("x"), stack_reference("collections", "__builtins__.eval"))), "collections.__builtins__.eval"),
    "GLOBAL with dots in the name": (program(item(text("x"), reference("torch", "os.system"))), "torch.os.system"),
    "INST": (program(item(text("x"), MARK + _COMMAND + b"iposix\nsystem\n")), "posix.system with 'touch executed'"),
    "OBJ": (program(item(text("x"), MARK + reference("posix", "system") + _COMMAND + OBJ)),
            "posix.system with 'touch executed'"),
    "NEWOBJ": (program(item(text("x"), reference("subprocess", "Popen") + _COMMAND + TUPLE1 + NEWOBJ)),
               "subprocess.Popen with 'touch executed'"),
    "NEWOBJ_EX": (
        program(item(text("x"), reference("subprocess", "Popen") + _COMMAND + TUPLE1 + EMPTY_DICT + NEWOBJ_EX)),
        "subprocess.Popen"),
    "a pickle in a pickle": (
        program(item(text("x"), call("pickle", "loads", b"B" + struct.pack("<I", 30) + bytes(30)))), "pickle.loads"),
    "in a persistent id": (
        program(item(text("x"), MARK + text("storage") + call("os", "system", _COMMAND) + TUPLE + BINPERSID)),
        "os.system"),
    "in the state of an object": (
        program(item(text("x"), reference("a", "B") + EMPTY_TUPLE + NEWOBJ + call("os", "system", _COMMAND) + BUILD)),
        "os.system"),
    "as an argument of something honest": (
        program(item(text("x"), call("functools", "partial", reference("os", "system")))), "os.system"),
    "with an argument that is shared exponentially": (
        PROTO + _LISTS + call("os", "system", get(999)) + STOP, "os.system with <list>"),
    "then truncated": (PROTO + EMPTY_DICT + text("x") + reference("posix", "system") + _COMMAND, "posix.system"),
    "then an opcode that doesn't exist": (PROTO + reference("posix", "system") + b"\xff", "posix.system"),
    "then nonsense": (PROTO + reference("posix", "system") + SETITEM + SETITEM, "posix.system"),
    "then an extension": (PROTO + reference("posix", "system") + b"\x82\x01", "posix.system"),
    "then too much": (PROTO + reference("posix", "system") + b"N0" * pickles.MAX_OPCODES, "posix.system"),
}  # fmt: skip


@IN_ENVELOPES
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_with_what_they_want(name: str, envelope: str, scratch: Path) -> None:
    content, wanted = HOSTILE[name]
    path = scratch / "model.ckpt"
    path.write_bytes(ENVELOPES[envelope](content))
    error = refusal(path)
    assert isinstance(error, HostileError)
    assert wanted in error.message
    assert error.remedy
    assert len(error.message) < 500


@pytest.mark.parametrize("name", ["os.system", "INST", "by the stack", "never called"])
@pytest.mark.parametrize("place", ["alone", "first", "second", "third", "keys"])
def test_every_pickle_of_a_legacy_file_is_guarded(name: str, place: str, scratch: Path) -> None:
    attack = HOSTILE[name][0]
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    contents = {
        "alone": attack,
        "first": attack + as_legacy(program(TENSOR)),
        "second": magic + attack,
        "third": magic + pickle.dumps(1001, protocol=2) + attack,
        "keys": as_legacy(program(TENSOR), attack),
    }
    path = scratch / "model.pt"
    path.write_bytes(contents[place])
    assert isinstance(refusal(path), HostileError)


@pytest.mark.parametrize("name", ["hostile-legacy.ckpt", "hostile-zip.ckpt"])
def test_the_committed_hostile_files_stop_every_command(name: str, tmp_path: Path) -> None:
    wanted = {
        "hostile-legacy.ckpt": "posix.system with 'echo hacked'",
        "hostile-zip.ckpt": "builtins.eval with '1 + 1'",
    }
    for arguments in (
        ["inspect", FIXTURES / name],
        ["fix-clip", FIXTURES / name, "-o", tmp_path / "out.safetensors"],
        ["merge-vae", FIXTURES / "sd1-ids-ok.safetensors", FIXTURES / name, "-o", tmp_path / "out.safetensors"],
    ):
        done = command(*arguments)
        assert done.returncode == 3
        assert wanted[name] in done.stderr
        assert "Traceback" not in done.stderr
        assert "hacked\n" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_nothing_is_imported_and_nothing_is_run(scratch: Path) -> None:
    """Every attack, and honest-looking names of a module that tells when it is imported, in a process of its own."""
    package = scratch / "modules"
    package.mkdir()
    (package / "sentinel.py").write_text(
        "open('imported', 'w').close()\nrun = lambda *_: open('executed', 'w').close()\n"
    )
    folder = scratch / "files"
    folder.mkdir()
    innocent = {
        "GLOBAL": program(TENSOR, item(text("x"), call("sentinel", "run", NONE))),
        "STACK_GLOBAL": program(TENSOR, item(text("x"), stack_reference("sentinel", "run") + EMPTY_TUPLE + REDUCE)),
        "INST": program(TENSOR, item(text("x"), MARK + b"isentinel\nrun\n")),
        "OBJ": program(TENSOR, item(text("x"), MARK + reference("sentinel", "run") + OBJ)),
        "NEWOBJ": program(TENSOR, item(text("x"), reference("sentinel", "run") + EMPTY_TUPLE + NEWOBJ)),
        "BUILD": program(TENSOR, item(text("x"), call("sentinel", "run", NONE) + EMPTY_DICT + BUILD)),
        "a key": program(TENSOR, item(call("sentinel", "run", NONE), NONE)),
    }  # fmt: skip
    for envelope, wrap in ENVELOPES.items():
        for group, contents in (("hostile", {k: v[0] for k, v in HOSTILE.items()}), ("innocent", innocent)):
            for place, content in enumerate(contents.values()):
                (folder / f"{group}-{envelope}-{place}.ckpt").write_bytes(wrap(content))
    code = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import sdsurgery as sd
from sdsurgery.containers import torch_legacy, torch_zip
before = set(sys.modules)
outcomes = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        opened = sd.open(path)
        outcomes[path.name] = [len(opened), opened["weight"].tobytes().hex(), [e.what for e in opened.aside]]
    except sd.SurgeryError as error:
        outcomes[path.name] = error.kind
print(json.dumps([outcomes, sorted(set(sys.modules) - before), os.listdir(".")]))
"""
    here = scratch / "here"
    here.mkdir()
    done = run_python(code, folder, package, cwd=here)
    assert done.returncode == 0, done.stderr
    outcomes, imported, files = json.loads(done.stdout)
    assert files == []
    assert "sentinel" not in imported
    assert not {name.partition(".")[0] for name in imported} & {"torch", "subprocess", "pty", "pickle", "runpy", "imp"}
    assert {outcome for name, outcome in outcomes.items() if name.startswith("hostile")} == {"hostile"}
    read = [outcome for name, outcome in outcomes.items() if name.startswith("innocent")]
    assert len(read) == 2 * len(innocent)
    assert all(outcome[:2] == [1, struct.pack("<f", 2.5).hex()] for outcome in read)
    assert {what for outcome in read for what in outcome[2]} == {"object sentinel.run", "NoneType None"}


HONEST = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": reference(
        "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    "numpy.core.multiarray.scalar": reference("numpy.core.multiarray", "scalar") + reference("numpy", "dtype")
        + text("f8") + b"\x89\x88\x87" + REDUCE + MARK + number(3) + text("<") + NONE * 3 + number(-1) + number(-1)
        + number(0) + TUPLE + BUILD + b"U\x08" + bytes(8) + TUPLE2 + REDUCE,
    "numpy._core.multiarray._reconstruct": reference("numpy._core.multiarray", "_reconstruct")
        + reference("numpy", "ndarray") + number(0) + TUPLE1 + b"C\x01b" + b"\x87" + REDUCE,
    "argparse.Namespace": reference("argparse", "Namespace") + EMPTY_TUPLE + NEWOBJ + EMPTY_DICT
        + item(text("lr"), b"G" + struct.pack(">d", 1e-4)) + BUILD,
    "pathlib.PosixPath": reference("pathlib", "PosixPath") + MARK + text("/") + text("home") + TUPLE + REDUCE,
    "collections.defaultdict": reference("collections", "defaultdict") + reference("builtins", "dict") + TUPLE1 + REDUCE
        + MARK + text("state") + EMPTY_DICT + b"u",
    "collections.Counter": reference("collections", "Counter") + EMPTY_DICT + TUPLE1 + REDUCE,
    "builtins.set": reference("builtins", "set") + EMPTY_LIST + TUPLE1 + REDUCE,
    "datetime.datetime": call("datetime", "datetime", b"C\x0a" + bytes(10)),
    "omegaconf.dictconfig.DictConfig": reference("omegaconf.dictconfig", "DictConfig") + EMPTY_TUPLE + NEWOBJ
        + EMPTY_DICT + BUILD,
    "copy_reg._reconstructor": reference("copy_reg", "_reconstructor")
        + reference("ldm.models.diffusion.ddpm", "LatentDiffusion") + reference("__builtin__", "object") + NONE
        + b"\x87" + REDUCE,
    "functools.partial": call("functools", "partial", reference("torch.optim", "AdamW")),
    "torch.device": call("torch", "device", text("cuda")),
    "_codecs.encode": reference("_codecs", "encode") + text("x") + text("latin1") + TUPLE2 + REDUCE,
    "torch.optim.lr_scheduler.LambdaLR": reference("torch.optim.lr_scheduler", "LambdaLR") + EMPTY_TUPLE
        + EMPTY_DICT + NEWOBJ_EX,
}  # fmt: skip


@IN_ENVELOPES
@pytest.mark.parametrize("name", HONEST)
def test_honest_unknown_names_are_inert(name: str, envelope: str, scratch: Path) -> None:
    path = scratch / "model.ckpt"
    path.write_bytes(ENVELOPES[envelope](program(item(text("before"), HONEST[name]), TENSOR, item(text("x"), NONE))))
    opened = sd.open(path)
    assert opened["weight"].tobytes() == struct.pack("<f", 2.5)
    assert [entry.name for entry in opened.aside] == ["before", "x"]
    assert opened.aside[0].what == f"object {name}"


def test_a_name_is_hostile_part_by_part() -> None:
    for module, name in [
        ("myos", "system"), ("torch", "Size"), ("os2", "x"), ("builtins", "list"), ("codecs", "encode"),
        ("torch.nn.modules.sparse", "Embedding"), ("io", "BytesIO"), ("models.code", "Net"),
        ("types", "SimpleNamespace"),
    ]:  # fmt: skip
        assert not pickles.is_hostile(pickles.Global(module, name)), (module, name)


# Cost. Each is read in a process that may use a gigabyte of addresses and twenty seconds of a processor.


_MILLION = EMPTY_LIST + MARK + NONE * 1_000_000 + APPENDS + put(7) + POP
_MILLION_TUPLE = MARK + NONE * 1_000_000 + TUPLE + put(7) + POP
_MILLION_DICT = (
    EMPTY_DICT + MARK + b"".join(number(n) + NONE for n in range(300_000)) + b"u" + put(7) + POP
)  # fmt: skip
_MERSENNE = (1 << 61) - 1  # Python's hash of an integer is its rest of this


def _long(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw)) + raw


def _many(step: Callable[[int], bytes], count: int = 100_000) -> bytes:
    return b"".join(map(step, range(count)))


BOMBS: dict[str, bytes] = {
    "a memo index of two billion": PROTO + b"r\xff\xff\xff\x7f" + STOP,
    "a value under a memo index of four billion": PROTO + EMPTY_DICT + b"r\xff\xff\xff\xff" + STOP,
    "a text memo index without end": PROTO + EMPTY_DICT + b"p" + b"9" * 4000 + b"\n" + STOP,
    "half a million memo entries": PROTO + EMPTY_DICT + _many(put, 500_000) + STOP,
    "memo indices that collide": PROTO + EMPTY_DICT + _many(lambda n: b"p%d\n" % (n * _MERSENNE), 200_000) + STOP,
    "bytes of four exabytes": PROTO + b"\x8e" + struct.pack("<Q", 1 << 62) + STOP,
    "a bytearray of four exabytes": PROTO + b"\x96" + struct.pack("<Q", 1 << 62) + STOP,
    "a text of four exabytes": PROTO + b"\x8d" + struct.pack("<Q", 1 << 62) + STOP,
    "a text of four gigabytes": PROTO + b"X" + struct.pack("<I", (1 << 32) - 1) + STOP,
    "an integer of two gigabytes": PROTO + b"\x8b" + struct.pack("<i", (1 << 31) - 1) + STOP,
    "a negative length": PROTO + b"\x8b" + struct.pack("<i", -1) + STOP,
    "a frame of four exabytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + EMPTY_DICT + STOP,
    "an integer of ten million digits": program(item(text("x"), _long(1 << 33_000_000))),
    "an integer of a thousand digits": program(TENSOR, item(text("x"), _long(10**1000))),
    "an integer of six hundred digits": program(TENSOR, item(text("x"), _long(10**600))),
    "a decimal integer of a million digits": PROTO + b"L" + b"9" * 1_000_000 + b"L\n" + STOP,
    "wide integers as keys": PROTO + _long(1 << 8_000_000) + put(1) + POP + EMPTY_DICT
        + _many(lambda _: get(1) + NONE + SETITEM) + STOP,
    "integer keys that collide": program(_many(lambda n: _long(n * _MERSENNE) + NONE + SETITEM, 200_000)),
    "float keys": program(_many(lambda n: b"G" + struct.pack(">d", float(n)) + NONE + SETITEM, 200_000)),
    "nested lists": _nested(EMPTY_LIST, EMPTY_LIST, end=APPEND),
    "nested tuples": _nested(EMPTY_TUPLE, TUPLE1),
    "nested marks": _nested(b"", MARK, end=TUPLE),
    "marks without end": PROTO + MARK * 1_000_000 + STOP,
    "nested dicts": _nested(EMPTY_DICT, text("a") + EMPTY_DICT, end=SETITEM),
    "nested calls": _nested(reference("a", "b"), EMPTY_TUPLE + REDUCE),
    "nested objects": _nested(reference("a", "b"), EMPTY_TUPLE + NEWOBJ),
    "nested arguments": PROTO + reference("a", "b") + put(0) + POP + EMPTY_TUPLE
        + (TUPLE1 + put(1) + POP + get(0) + get(1) + REDUCE) * 50_000 + STOP,
    "nested states": _nested(reference("a", "b") + EMPTY_TUPLE + REDUCE, NONE + BUILD),
    "nested state dicts": _nested(EMPTY_DICT, text("state_dict") + EMPTY_DICT, end=SETITEM),
    "a list that doubles": PROTO + _LISTS + program(TENSOR, item(text("x"), get(999)))[2:],
    "a tuple that doubles": PROTO + _TUPLES + program(TENSOR, item(text("x"), get(999)))[2:],
    "a call that doubles": PROTO + _CALLS + program(TENSOR, item(text("x"), get(999)))[2:],
    "a key that doubles": PROTO + _TUPLES + program(TENSOR, item(get(999), NONE))[2:],
    "a global's name that doubles": PROTO + _TUPLES + get(999) + get(999) + STACK_GLOBAL + STOP,
    "a function that doubles": PROTO + _LISTS + program(TENSOR, item(text("x"), get(999) + EMPTY_TUPLE + REDUCE))[2:],
    "a shape that doubles": PROTO + _TUPLES + call("torch", "Size", get(999)) + STOP,
    "a persistent id that doubles": PROTO + _TUPLES + get(999) + BINPERSID + STOP,
    "a whole value that doubles": PROTO + _LISTS + get(999) + STOP,
    "shapes copied from a list": PROTO + _MILLION + reference("torch", "Size") + put(8) + POP + get(7) + TUPLE1 + put(9)
        + _many(lambda _: get(8) + get(9) + REDUCE) + STOP,
    "a call with a million arguments, often": PROTO + _MILLION_TUPLE
        + reference("torch._utils", "_rebuild_parameter") + put(8) + POP + EMPTY_LIST
        + _many(lambda _: get(8) + get(7) + REDUCE + APPEND) + STOP,
    "one list under many keys": PROTO + _MILLION
        + program(TENSOR, _many(lambda n: number(n) + get(7) + SETITEM))[2:],
    "tuples of one list under many keys": PROTO + _MILLION
        + program(TENSOR, _many(lambda n: number(n) + get(7) + TUPLE1 + SETITEM))[2:],
    "one dict under many keys": PROTO + _MILLION_DICT + program(_many(lambda n: number(n) + get(7) + SETITEM))[2:],
    "a long name, often": PROTO + text("a." * 5_000_000) + put(1) + POP
        + _many(lambda _: get(1) + get(1) + STACK_GLOBAL + POP) + EMPTY_DICT + STOP,
    "names of many parts": PROTO + text("a." * 120) + put(1) + POP
        + _many(lambda n: get(1) + text(str(n)) + STACK_GLOBAL + EMPTY_TUPLE + REDUCE + POP) + EMPTY_DICT + STOP,
    "a key of ten million letters": program(TENSOR, item(text("a" * 10_000_000), NONE)),
    "a key of ten million bytes": program(TENSOR, item(b"B" + struct.pack("<I", 10_000_000) + bytes(10_000_000), NONE)),
    "opcodes without end": PROTO + b"N0" * 5_000_000 + EMPTY_DICT + STOP,
    "millions of sets": PROTO + MARK + EMPTY_SET * 4_000_000 + TUPLE + STOP,
    "millions of dicts": PROTO + MARK + EMPTY_DICT * 4_000_000 + TUPLE + STOP,
    "millions of calls": PROTO + reference("a", "b") + put(0) + POP + MARK + (get(0) + EMPTY_TUPLE + REDUCE) * 600_000
        + TUPLE + STOP,
    "millions of shapes": PROTO + reference("torch", "Size") + put(8) + POP + MARK
        + EMPTY_LIST + MARK + NONE * 32 + APPENDS + TUPLE1 + put(9) + (get(8) + get(9) + REDUCE) * 600_000
        + TUPLE + STOP,
    "a list in itself": PROTO + EMPTY_LIST + put(1) + get(1) + APPEND + STOP,
    "a dict in itself": program(put(1), item(text("x"), get(1))),
    "a state dict in itself": program(put(1), item(text("state_dict"), get(1))),
    "a lone entry in itself": program(put(1), TENSOR[:0], item(text("only"), get(1))),
    "a list in itself beside a tensor": program(TENSOR, item(text("x"), EMPTY_LIST + put(1) + get(1) + APPEND)),
    "a call on itself": PROTO + reference("a", "b") + EMPTY_TUPLE + REDUCE + put(1) + get(1) + APPEND + STOP,
    "a storage that is larger than the file": program(TENSOR.replace(number(1) + TUPLE + BINPERSID,
        _long(1 << 62) + TUPLE + BINPERSID)),
    "a storage of negative size": program(TENSOR.replace(number(1) + TUPLE + BINPERSID,
        number(-1) + TUPLE + BINPERSID)),
    "a storage's key that is a wide integer": program(TENSOR.replace(text("0"), _long(10**5000))),
    "storage keys without end": program(_many(lambda n: TENSOR.replace(text("0"), text(str(n))), 30_000)),
    "text with broken escapes": PROTO + b"S'\\q\\x'\n" + STOP,
    "an empty pickle": b"",
    "only a protocol": PROTO,
    "a future protocol": b"\x80\x09" + EMPTY_DICT + STOP,
}  # fmt: skip

_READ = """
import json, sys, traceback
import container_support
container_support.limited(1 << 30, cpu=20)
error = container_support.refusal(container_support.Path(sys.argv[1]))
print(json.dumps([str(error), container_support.peak_memory()]))
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon_and_in_bounded_memory(name: str, scratch: Path) -> None:
    for envelope, wrap in ENVELOPES.items():
        path = scratch / f"{envelope}.ckpt"
        path.write_bytes(wrap(BOMBS[name]))
        done = run_python(_READ, path, timeout=100)
        assert done.returncode == 0, done.stderr[-2000:]
        message, peak = json.loads(done.stdout)
        assert len(message) < 1000
        assert "memory" not in message  # the limit itself is not what saves us
        assert peak < 256 + 5 * (path.stat().st_size >> 20), message


def test_the_tensor_that_the_bombs_hide_is_readable(scratch: Path) -> None:
    """The assembly above is right: otherwise every bomb that holds it would be refused for a reason of its own."""
    for envelope, wrap in ENVELOPES.items():
        path = scratch / f"{envelope}.ckpt"
        path.write_bytes(wrap(program(TENSOR)))
        assert sd.open(path)["weight"].numpy().tolist() == [2.5]


_SURVIVORS = [
    "half a million memo entries", "an integer of six hundred digits", "a list that doubles", "a tuple that doubles",
    "a call that doubles", "a key that doubles", "a function that doubles", "one list under many keys",
    "tuples of one list under many keys", "a list in itself beside a tensor", "a key of ten million letters",
]  # fmt: skip


@pytest.mark.parametrize("name", _SURVIVORS)
@IN_ENVELOPES
def test_what_is_odd_but_sound_is_read(name: str, envelope: str, scratch: Path) -> None:
    path = scratch / "model.ckpt"
    path.write_bytes(ENVELOPES[envelope](BOMBS[name]))
    opened = sd.open(path)
    assert sum(len(entry.name) + len(entry.what) for entry in opened.aside[:3]) < 1000
    assert list(opened) == (["weight"] if TENSOR in BOMBS[name] else [])
