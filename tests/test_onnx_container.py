"""Folders with graphs of ours: what runs, what is read back, and what broken and hostile graphs come to."""

from __future__ import annotations

import json
import random
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
import safetensors
import synthetic
import torch
from conftest import Result, cli, raw, raw_of, write
from folder_support import put
from hypothesis import strategies as st
from oracle_support import Case, assert_same, from_folder, named_as, state
from safetensors.torch import load_file, save_file

import sdsurgery as sd
from sdsurgery.containers import onnx as container
from sdsurgery.containers.wire import BYTES, FIXED32, FIXED64, VARINT, Wire
from sdsurgery.dtypes import BY_NAME
from sdsurgery.errors import CorruptError, UnsupportedError
from sdsurgery.graphs.files import Graphs, Weights, stored
from sdsurgery.graphs.networks import Style
from sdsurgery.sources import SourceFile

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

MODES: tuple[Weights, ...] = ("shared", "external", "embedded")
PARTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
COMPONENTS = {"vae_encoder": "vae", "vae_decoder": "vae"}


# ---------------------------------------------------------------- folders of ours


def with_graphs(checkpoint: sd.Checkpoint, weights: Weights, style: Style | None = None) -> sd.Checkpoint:
    """The same as a folder that is to have graphs."""
    model = checkpoint.pipe(sd.Convert("diffusers"))
    assert model.folder is not None
    return replace(model, folder=replace(model.folder, graphs=Graphs(style or Style(), weights)))


class Made:
    """A single file, and a folder with graphs for each way to keep weights."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "model.safetensors"
        save_file(halved(state(Case("sd1"))), self.file, {"format": "pt"})
        self.model = sd.open(self.file).pipe(sd.Convert("diffusers"))
        self.folders = {}
        for mode in MODES:
            self.folders[mode] = root / mode
            with_graphs(sd.open(self.file), mode).save(self.folders[mode])

    def copy(self, mode: Weights, target: Path) -> Path:
        shutil.copytree(self.folders[mode], target)
        return target


def halved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In fp16, but for position ids."""
    return {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Weights:
    found: Weights = request.param
    return found


def run(graph: Path, **more: Any) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
    sizes = {"batch": 1, "height": 8, "width": 16, "sequence": 5, "latent_height": 2, "latent_width": 3}
    feed = {}
    for value in session.get_inputs():
        shape = [sizes[size] if isinstance(size, str) else size for size in value.shape]
        chance = np.random.Generator(np.random.PCG64(0))
        feed[value.name] = chance.random(shape).astype(kinds[value.type])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))


def test_graphs_run_from_wherever_their_weights_lie(made: Made, tmp_path: Path) -> None:
    moved = Path(shutil.move(made.copy("shared", tmp_path / "copy"), tmp_path / "moved elsewhere"))
    for part in PARTS:
        first, *others = (run(folder / part / "model.onnx") for folder in (moved, *list(made.folders.values())[1:]))
        assert all(np.isfinite(value).all() for value in first.values())
        for other in others:
            assert first.keys() == other.keys()
            assert all(np.array_equal(first[key], other[key]) for key in first)


def test_the_onnx_package_loads_and_checks_them(made: Made, mode: Weights, tmp_path: Path) -> None:
    for part in PARTS:
        path = made.folders[mode] / part / "model.onnx"
        if mode == "shared":  # the package refuses files of two names
            shutil.copytree(path.parent, tmp_path / part)
            path = tmp_path / part / "model.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        component = COMPONENTS.get(part, part)
        for name, value in found.items():
            if not name.startswith("const/"):
                ours = made.model[f"{component}/{name}"]
                assert (value.shape, value.tobytes()) == (ours.shape, ours.tobytes()), name


def test_what_is_opened_is_what_was_converted(made: Made, mode: Weights) -> None:
    found = sd.open(made.folders[mode])
    assert found.origin is not None
    assert found.origin.container == "onnx"
    assert found.aside == ()
    assert raw_of(found) == raw_of(made.model)


def test_the_way_back_gives_the_file(made: Made, mode: Weights, tmp_path: Path) -> None:
    back = tmp_path / "back.safetensors"
    assert cli("convert", made.folders[mode], back, "--to", "ldm", "--quiet").code == 0
    assert raw(back) == raw(made.file)


def test_with_a_sidecar_the_way_back_gives_the_same_file(made: Made, mode: Weights, tmp_path: Path) -> None:
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    words = ("--to", "onnx", "--weights", mode, "--sidecar", "--quiet")
    for done in (cli("convert", made.file, folder, *words), cli("convert", folder, back, "--to", "ldm", "--quiet")):
        assert done.code == 0, done.err
    assert back.read_bytes() == made.file.read_bytes()


def test_shared_weights_lie_where_the_graph_says(made: Made) -> None:
    """Read with the safetensors library, and by offset and length."""
    for part in PARTS:
        folder = made.folders["shared"] / part
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
        assert outside
        for tensor in outside:
            place = {entry.key: entry.value for entry in tensor.external_data}
            content = (folder / place["location"]).read_bytes()
            begin, length = int(place["offset"]), int(place["length"])
            with safetensors.safe_open(folder / place["location"], "numpy") as file:
                value = file.get_tensor(tensor.name)
            assert list(value.shape) == list(tensor.dims)
            assert value.dtype == np.float16
            assert content[begin : begin + length] == value.tobytes()


def test_external_weights_begin_on_pages(made: Made) -> None:
    for part in PARTS:
        folder = made.folders["external"] / part
        assert not list(folder.glob("*.safetensors"))
        places = []
        for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                assert place["location"] == "model.onnx_data"
                places.append((int(place["offset"]), int(place["length"])))
        assert all(offset % 4096 == 0 for offset, length in places if length >= 4096)
        assert max(map(sum, places)) == (folder / "model.onnx_data").stat().st_size


def test_embedded_graphs_need_nothing_beside_them(made: Made) -> None:
    for part in PARTS:
        names = {path.name for path in (made.folders["embedded"] / part).iterdir()}
        assert names == {"model.onnx", "config.json"}


def fused_in(folder: Path) -> set[str]:
    """The parts whose graph has an operator of ONNX Runtime's own."""
    graphs = {part: onnx.load(folder / part / "model.onnx", load_external_data=False).graph for part in PARTS}
    return {part for part, graph in graphs.items() if any(node.domain == "com.microsoft" for node in graph.node)}


def test_fused_graphs_are_read_back_drawn_anew_and_linked_again(made: Made, tmp_path: Path) -> None:
    folder, back = tmp_path / "fused", tmp_path / "back.safetensors"
    done = cli("convert", made.file, folder, "--to", "onnx", "--optimize")
    assert done.code == 0, done.err
    assert "nothing else runs them" in done.out
    assert fused_in(folder) == set(PARTS)
    assert cli("convert", folder, back, "--quiet").code == 0
    assert cli("diff", made.file, back, "--json").json["identical"]
    assert cli("convert", folder, tmp_path / "plain", "--to", "onnx", "--quiet").code == 0
    assert fused_in(tmp_path / "plain") == set()
    assert cli("cast", folder, "fp32", "--in-place", "--quiet").code == 0
    assert fused_in(folder) == set(PARTS)
    (file,) = (folder / "unet").glob("*.safetensors")
    rewritten(file, {"format": "pt", "note": "x" * 77})
    assert cli("convert", "--relink", folder, "--quiet").code == 0
    assert fused_in(folder) == set(PARTS)
    for part in PARTS:
        run(folder / part / "model.onnx")


def fingerprints(path: Path) -> dict[str, tuple[str, str]]:
    done = cli("fingerprint", path, "--json")
    assert done.code == 0, done.err
    return {entry["component"]: (entry["exact"], entry["fp16"]) for entry in done.json["fingerprints"]}


@pytest.mark.parametrize(("mode", "interface"), [*((mode, "optimum") for mode in MODES), ("external", "diffusers")])
def test_every_command_that_asks_takes_them(made: Made, tmp_path: Path, mode: Weights, interface: Any) -> None:
    folder = tmp_path / "folder"
    if interface == "optimum":
        made.copy(mode, folder)
    else:
        with_graphs(sd.open(made.file), mode, Style(interface=interface)).save(folder)
    inspected = cli("inspect", folder, "--json")
    assert inspected.code == 0, inspected.err
    assert {"unet", "vae", "text_encoder"} <= set(inspected.json["components"])
    assert cli("diff", made.file, folder, "--json").json["identical"]
    assert fingerprints(folder) == fingerprints(made.file)
    assert len(fingerprints(folder)) == 3
    checked = cli("verify", folder)
    if interface == "optimum":
        assert checked.code == 0, checked.out
    manifest = tmp_path / "manifest.json"
    written = cli("manifest", folder, "-o", manifest)
    assert written.code == 0, written.err
    assert cli("verify", folder, "--manifest", manifest).code == 0
    with (folder / "unet" / "model.onnx").open("ab") as file:
        file.write(field(14, field(1, b"note") + field(2, b"more")))
    changed = cli("verify", folder, "--manifest", manifest)
    assert changed.code == 1
    assert "unet/model.onnx has another SHA-256" in changed.out


def test_diffusers_loads_a_folder_whose_weights_are_shared(made: Made) -> None:
    plain = made.root / "plain"
    made.model.save(plain)
    ours, theirs = from_folder(made.folders["shared"]), from_folder(plain)
    for name in ("unet", "vae", "text_encoder"):
        assert_same(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict())
    files = {path.name for path in (made.folders["shared"] / "unet").glob("*.safetensors")}
    (file,) = files
    assert_same(
        {key: value.float() for key, value in named_as(ours.unet, load_file(plain / "unet" / file)).items()},
        {key: value.float() for key, value in ours.unet.state_dict().items()},
    )


def rewritten(path: Path, metadata: Mapping[str, str]) -> None:
    """As another program writes it anew: the same tensors, after a header of another length."""
    tensors = load_file(path)
    copies = {key: value.clone() for key, value in tensors.items()}
    path.unlink()
    save_file(copies, path, dict(metadata))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_that_were_written_anew_make_the_graph_refused(made: Made, tmp_path: Path, part: str) -> None:
    folder = made.copy("shared", tmp_path / "model")
    for other in ("vae", "vae_encoder", "vae_decoder") if part == "vae" else (part,):
        (file,) = (folder / other).glob("*.safetensors")
        rewritten(file, {"format": "pt", "note": "x" * 77})
    done = cli("inspect", folder, "--json")
    assert_refused(done, {"corrupt"})
    assert "--relink" in done.json["error"]["remedy"]
    assert "sdsurgery convert" in done.json["error"]["remedy"]
    assert str(folder) in done.json["error"]["remedy"]
    with pytest.raises(CorruptError, match="written anew"):
        sd.open(folder)
    done = cli("convert", "--relink", folder, "--quiet")
    assert done.code == 0, done.err
    assert raw_of(sd.open(folder)) == raw_of(made.model)
    run(folder / ("vae_decoder" if part == "vae" else part) / "model.onnx")


def test_somebody_elses_graph_beside_weights_is_left_aside(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    made.model.save(folder)
    theirs = model_of([tensor_proto(name="anything")], ours=False)
    for content in (theirs.SerializeToString(), b"garbage"):
        (folder / "unet" / "model.onnx").write_bytes(content)
        found = sd.open(folder)
        assert found.origin is not None
        assert found.origin.container == "diffusers"
        assert [entry.name for entry in found.aside] == ["unet/model.onnx"]
        assert raw_of(found) == raw_of(made.model)


def test_saving_again_draws_the_same_graphs(made: Made, mode: Weights, tmp_path: Path) -> None:
    sd.open(made.folders[mode]).save(tmp_path / "again")
    for part in PARTS:
        name = f"{part}/model.onnx"
        assert (tmp_path / "again" / name).read_bytes() == (made.folders[mode] / name).read_bytes()


STYLE = {"opset": 23, "interface": "optimum", "family": "sd1", "compute": None, "weights": "shared", "hard_links": True}


@pytest.mark.parametrize(
    "change",
    [
        {"opset": 99}, {"opset": "23"}, {"opset": 23.5}, {"opset": True}, {"opset": []}, {"interface": "mine"},
        {"interface": []}, {"compute": "I64"}, {"compute": "nothing"}, {"compute": [1]}, {"compute": 7},
        {"weights": "elsewhere"}, {"weights": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_graph_that_tells_nonsense_of_its_making_is_not_drawn_anew(change: dict[str, Any]) -> None:
    assert stored(STYLE) == Graphs(Style())
    with pytest.raises(UnsupportedError):
        stored(STYLE | change)
    for name in STYLE:
        with pytest.raises(UnsupportedError, match="makes no sense"):
            stored({key: value for key, value in STYLE.items() if key != name})


# ---------------------------------------------------------------- hostile and broken graphs


def tensor_proto(name: str = "weight", dims: Sequence[int] = (2, 3), **more: Any) -> onnx.TensorProto:
    """Six halves, unless told otherwise."""
    made = onnx.TensorProto(name=name, data_type=more.pop("data_type", onnx.TensorProto.FLOAT16), dims=dims)
    made.raw_data = more.pop("raw_data", bytes(range(12)))
    assert not more
    return made


def outside(name: str = "weight", *, dims: Sequence[int] = (2, 3), **entries: str) -> onnx.TensorProto:
    """A tensor whose bytes lie beside the graph."""
    made = tensor_proto(name, dims)
    made.ClearField("raw_data")
    made.data_location = onnx.TensorProto.EXTERNAL
    for key, value in ({"location": "data.bin", "offset": "0", "length": "12"} | entries).items():
        made.external_data.add(key=key, value=value)
    return made


def model_of(tensors: Sequence[onnx.TensorProto], *, ours: bool = True) -> onnx.ModelProto:
    nodes = [onnx.helper.make_node("Identity", [tensor.name], [f"out_{index}"]) for index, tensor in enumerate(tensors)]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=list(tensors))
    made = onnx.helper.make_model(graph, producer_name="test")
    if ours:
        made.metadata_props.add(key=container.STYLE, value="{}")
    return made


def folder_of(path: Path, content: onnx.ModelProto | bytes, data: bytes = bytes(64)) -> Path:
    """A model's folder that has a UNet's graph and no other weights."""
    put(
        path / "model_index.json", {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "OnnxRuntimeModel"]}
    )
    put(path / "unet" / "data.bin", data)
    put(path / "unet" / "model.onnx", content if isinstance(content, bytes) else content.SerializeToString())
    return path


class HangError(BaseException):
    """No ``except Exception`` may swallow this."""


def _alarm(_number: int, _frame: FrameType | None) -> None:
    raise HangError


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A minute is long for all tests here."""
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def assert_refused(done: Result, kinds: set[str]) -> None:
    assert done.code == 3, (done.code, done.out, done.err)
    error = done.json["error"]
    assert error["kind"] in kinds, error
    assert error["remedy"]
    assert len(json.dumps(error)) < 4000


def test_a_graph_alone_is_read(tmp_path: Path) -> None:
    """What the refusals below are measured against."""
    folder = folder_of(tmp_path / "m", model_of([tensor_proto("a"), outside("b"), outside("c", offset="12")]))
    found = sd.open(folder)
    assert {key: tensor.tobytes() for key, tensor in found.items()} == {
        "unet/a": bytes(range(12)), "unet/b": bytes(12), "unet/c": bytes(12)
    }  # fmt: skip
    assert cli("inspect", folder).code == 0


@pytest.mark.parametrize(
    "location",
    [
        "", ".", "..", "/etc/passwd", "../data.bin", "../../x", "a/../data.bin", "sub/data.bin", "..\\data.bin",
        "C:\\x", "C:x", "data.bin\0", "\\\\server\\share", "./data.bin", "data.bin:stream",
    ],
)  # fmt: skip
def test_a_place_that_is_no_plain_name_is_hostile(tmp_path: Path, location: str) -> None:
    folder = folder_of(tmp_path / "m", model_of([outside(location=location)]))
    assert_refused(cli("inspect", folder, "--json"), {"hostile"})


def test_no_place_at_all_is_refused(tmp_path: Path) -> None:
    tensor = outside()
    del tensor.external_data[:]
    assert_refused(cli("inspect", folder_of(tmp_path / "m", model_of([tensor])), "--json"), {"hostile", "corrupt"})


def test_a_file_beside_that_is_missing_or_a_folder_is_unreadable(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", model_of([outside(location="nowhere.bin")]))
    assert_refused(cli("inspect", folder, "--json"), {"unreadable"})
    (folder / "unet" / "nowhere.bin").mkdir()
    assert_refused(cli("inspect", folder, "--json"), {"unreadable"})
    long = folder_of(tmp_path / "n", model_of([outside(location="x" * 5000)]))
    assert_refused(cli("inspect", long, "--json"), {"hostile"})


def test_links_that_lead_out_are_hostile(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.bin", bytes(64))
    folder = folder_of(tmp_path / "m", model_of([outside()]))
    (folder / "unet" / "data.bin").unlink()
    (folder / "unet" / "data.bin").symlink_to(secret)
    assert_refused(cli("inspect", folder, "--json"), {"hostile"})
    (folder / "unet" / "data.bin").unlink()
    (folder / "data.bin").write_bytes(bytes(64))
    (folder / "unet" / "data.bin").symlink_to("../data.bin")
    assert cli("inspect", folder).code == 0  # within the folder it may lead anywhere
    graph = shutil.move(folder / "unet" / "model.onnx", tmp_path / "model.onnx")
    (folder / "unet" / "model.onnx").symlink_to(graph)
    assert_refused(cli("inspect", folder, "--json"), {"hostile"})


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "53"}, {"offset": "64"}, {"offset": "-1"}, {"offset": "-12"}, {"length": "-12"}, {"length": "13"},
        {"length": "11"}, {"length": "0"}, {"offset": "abc"}, {"length": ""}, {"offset": "1.5"}, {"offset": "0x10"},
        {"offset": "9" * 30}, {"offset": "9" * 5000}, {"length": "9" * 5000}, {"length": str(1 << 63)},
        {"offset": str((1 << 64) - 12)}, {"offset": "nan"}, {"offset": "1e3"}, {"offset": "--1"}, {"offset": "\0"},
    ],
    ids=lambda entries: " ".join(f"{key} {value[:12]!r}" for key, value in entries.items()),
)  # fmt: skip
def test_offsets_and_lengths_that_make_no_sense_are_corrupt(tmp_path: Path, entries: dict[str, str]) -> None:
    folder = folder_of(tmp_path / "m", model_of([outside(**entries)]))
    assert_refused(cli("inspect", folder, "--json"), {"corrupt"})


_HUGE = ((1 << 62,), (1 << 62, 0), (0, 1 << 62), (1 << 32, 1 << 32), (-1,), (-1, 0), (-2, -3), (1,) * 17, (1,) * 500)


@pytest.mark.parametrize("dims", [*_HUGE, (2, 4), (5,), (0,), ()], ids=lambda dims: "x".join(map(str, dims))[:40])
@pytest.mark.parametrize("make", [tensor_proto, outside], ids=["within", "outside"])
def test_shapes_that_are_absurd_or_contradict_the_bytes_are_corrupt(
    tmp_path: Path, dims: tuple[int, ...], make: Callable[..., onnx.TensorProto]
) -> None:
    folder = folder_of(tmp_path / "m", model_of([make(dims=dims)]))
    assert_refused(cli("inspect", folder, "--json"), {"corrupt"})


@pytest.mark.parametrize("kind", [0, 8, 21, 22, 25, 99, 2**31 - 1, -1])
def test_types_that_no_weight_has_are_refused(tmp_path: Path, kind: int) -> None:
    folder = folder_of(tmp_path / "m", model_of([tensor_proto(data_type=kind)]))
    assert_refused(cli("inspect", folder, "--json"), {"corrupt", "unsupported"})


def test_halves_of_bytes_must_fill_them(tmp_path: Path) -> None:
    odd = tensor_proto(dims=(3,), data_type=onnx.TensorProto.FLOAT4E2M1, raw_data=bytes(2))
    assert_refused(cli("inspect", folder_of(tmp_path / "m", model_of([odd])), "--json"), {"corrupt", "unsupported"})
    even = tensor_proto(dims=(4,), data_type=onnx.TensorProto.FLOAT4E2M1, raw_data=b"\x12\x34")
    assert sd.open(folder_of(tmp_path / "n", model_of([even])))["unet/weight"].tobytes() == b"\x12\x34"


def test_two_of_one_name_are_corrupt(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", model_of([tensor_proto("a"), tensor_proto("b"), tensor_proto("a")]))
    assert_refused(cli("inspect", folder, "--json"), {"corrupt"})


@pytest.mark.parametrize(
    ("places", "sound"),
    [
        (((0, 12), (12, 12)), True),
        (((0, 12), (0, 12)), True),
        (((0, 12), (0, 12), (12, 12)), True),
        (((0, 12), (6, 12)), False),
        (((0, 48), (12, 12)), False),
        (((0, 48), (12, 12), (40, 12)), False),
        (((0, 12), (0, 48)), False),
        (((12, 12), (0, 12), (23, 12)), False),
        (((0, 0), (0, 12)), True),
    ],
)
def test_no_weight_is_a_part_of_another(tmp_path: Path, places: Any, sound: bool) -> None:
    tensors = [
        outside(f"t{index}", dims=[length // 2], offset=str(offset), length=str(length))
        for index, (offset, length) in enumerate(places)
    ]
    done = cli("inspect", folder_of(tmp_path / "m", model_of(tensors)), "--json")
    if sound:
        assert done.code == 0, done.err
    else:
        assert_refused(done, {"corrupt"})


def field(number: int, content: bytes | int) -> bytes:
    """A field of the wire format."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int, *, least: int = 1) -> bytes:
    """A number; with superfluous zeros if that many bytes are wanted."""
    parts = bytearray()
    while value > 0x7F or len(parts) < least - 1:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


OURS = field(14, field(1, container.STYLE.encode()) + field(2, b"{}"))
DEEP = b""
for _ in range(3000):
    DEEP = field(7, DEEP)

GARBAGE = {
    "empty": b"",
    "text": b"this is no graph, but a text that somebody called so\n",
    "page": b"<!DOCTYPE html><html></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "no graph": OURS,
    "an empty graph": OURS + field(7, b""),
    "long varint": OURS + b"\xff" * 19 + b"\x01",
    "long varint of zeros": OURS + b"\x80" * 19 + b"\x00",
    "long length": OURS + b"\x3a" + b"\xff" * 9 + b"\x7f",
    "length beyond": OURS + b"\x3a" + varint(1 << 40) + b"x",
    "length of all there could be": OURS + b"\x3a" + varint((1 << 63) - 1),
    "field zero": OURS + field(0, 1),
    "group": OURS + b"\x3b" * 500,
    "wire type 6": OURS + varint(7 << 3 | 6),
    "deep": OURS + DEEP,
    "deep nodes": OURS + field(7, field(1, field(5, field(6, DEEP)))),
    "cut fixed": OURS + b"\x3d\x01\x02",
    "a tensor of text": OURS + field(7, field(5, b"weight, but not a message")),
    "bad letters": OURS + field(7, field(5, field(8, b"\xff\xfe") + field(2, 1) + field(9, b"\0\0\0\0"))),
    "raw data as a number": OURS + field(7, field(5, field(8, b"a") + field(2, 1) + field(9, 7))),
    "values as numbers": OURS + field(7, field(5, field(8, b"a") + field(2, 1) + field(4, 7))),
    "values of eight bytes": OURS + field(7, field(5, field(2, 1) + varint(4 << 3 | 1) + b"\xff" * 8)),
    "name as a number": OURS + field(7, field(5, field(8, 9) + field(2, 1))),
    "links of nonsense": OURS + field(14, field(1, container.LINKS.encode()) + field(2, b"[" * 9999)) + field(7, b""),
    "links of numbers": OURS + field(14, field(1, container.LINKS.encode()) + field(2, b"7")) + field(7, b""),
    "links out": OURS
    + field(14, field(1, container.LINKS.encode()) + field(2, b'{"../../model_index.json": "0"}'))
    + field(7, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_graph_is_refused(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "m", GARBAGE[name])
    assert_refused(cli("inspect", folder, "--json"), {"corrupt", "hostile", "unsupported"})


def test_a_folder_called_as_a_graph_is_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", b"")
    (folder / "unet" / "model.onnx").unlink()
    (folder / "unet" / "model.onnx").mkdir()
    assert_refused(cli("inspect", folder, "--json"), {"unsupported"})


def test_a_lone_file_that_is_called_a_graph_and_is_none(tmp_path: Path) -> None:
    for name, content in GARBAGE.items():
        path = put(tmp_path / f"{name}.onnx", content)
        assert_refused(cli("inspect", path, "--json"), {"corrupt", "hostile", "unsupported"})


@pytest.mark.parametrize(
    "content",
    [
        field(7, field(5, field(1, 1) * 1_000_000)),
        field(7, field(5, field(1, b"\x01" * 2_000_000))),
        field(7, field(5, field(2, 1) + field(8, b"a") * 200_000)),
        field(7, field(5, field(2, 1) + field(8, b"a") + field(4, b"\0" * 4_000_000))),
        field(7, field(5, field(2, 7) + field(8, b"a") + field(7, b"\0" * 1_000_000))),
        field(7, field(5, field(2, 7) + field(8, b"a") + field(7, 0) * 100_000)),
        field(7, field(5, field(8, b"a" * 20_000_000))),
    ],
    ids=["sizes", "packed sizes", "names", "floats", "packed integers", "integers", "a name"],
)
def test_small_files_take_no_large_memory(scratch: Path, content: bytes) -> None:
    folder = folder_of(scratch / "m", OURS + content)
    tracemalloc.start(1)
    try:
        assert_refused(cli("inspect", folder, "--json"), {"corrupt"})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 32 << 20


def test_more_nodes_than_any_graph_has_are_corrupt(scratch: Path) -> None:
    folder = folder_of(scratch / "m", OURS + field(7, field(1, b"") * 300_000))
    assert_refused(cli("inspect", folder, "--json"), {"corrupt"})


def whole_graph() -> bytes:
    """A graph that has a bit of everything."""
    typed = onnx.TensorProto(name="typed", data_type=onnx.TensorProto.FLOAT16, dims=[3], int32_data=[1, 2, 60000])
    floats = onnx.TensorProto(name="floats", data_type=onnx.TensorProto.FLOAT, dims=[2], float_data=[1.5, -2])
    model = model_of([tensor_proto("raw"), outside("out"), outside("next", offset="12"), typed, floats])
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor_proto("held"))
    constant.metadata_props.add(key="k", value="v")
    model.graph.node.append(constant)
    model.metadata_props.add(key=container.LINKS, value="{}")
    return model.SerializeToString()


def looked_at(folder: Path) -> bool:
    """Whether it is accepted; a refusal must be the input's fault, and acceptance mean that all can be read."""
    try:
        found = sd.open(folder)
        for tensor in found.values():
            assert len(tensor.tobytes()) == tensor.dtype.nbytes(tensor.shape)
        json.dumps(list(found)).encode()
    except sd.SurgeryError as caught:
        error = caught
    else:
        return True
    assert error.exit_code == 3, repr(error)
    assert error.remedy
    assert len(str(error)) < 2000
    return False


def test_a_file_that_ends_early_is_refused_everywhere(scratch: Path) -> None:
    content = whole_graph()
    folder = folder_of(scratch / "m", content)
    assert looked_at(folder)
    graph = folder / "unet" / "model.onnx"
    top = {0}  # where a field of the model ends, what is before it is a whole message
    for place in range(len(content)):
        graph.write_bytes(content[:place])
        accepted = looked_at(folder)
        if accepted:
            top.add(place)
            model = onnx.load_model_from_string(content[:place])
            assert model.HasField("graph")
    assert len(top) < 10


def test_no_damage_is_a_fault_of_ours(scratch: Path) -> None:
    content, chance = whole_graph(), random.Random(5)
    folder = folder_of(scratch / "m", content)
    graph, accepted = folder / "unet" / "model.onnx", 0
    for _ in range(4000):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
            place = chance.randrange(len(damaged))
            how = chance.random()
            if how < 0.6:
                damaged[place] ^= 1 << chance.randrange(8)
            elif how < 0.8:
                damaged[place] = chance.choice((0, 0x7F, 0x80, 0xFF))
            elif how < 0.9:
                del damaged[place : place + chance.randint(1, 8)]
            else:
                damaged[place:place] = chance.randbytes(chance.randint(1, 12))
        graph.write_bytes(damaged)
        accepted += looked_at(folder)
    assert 0 < accepted < 3000


def test_a_sparse_file_of_a_terabyte_costs_nothing(scratch: Path) -> None:
    size = 1 << 40
    head = OURS + varint(7 << 3 | 2) + varint(size) + field(5, tensor_proto().SerializeToString())
    folder = folder_of(scratch / "m", head)
    graph = folder / "unet" / "model.onnx"
    for content in (
        OURS + varint(7 << 3 | 2) + varint(size) + varint(5 << 3 | 2) + varint(size - 99) + varint(8 << 3 | 2)
        + varint(size - 999),
        OURS + varint(14 << 3 | 2) + varint(size) + varint(2 << 3 | 2) + varint(size - 99),
        head,
    ):  # fmt: skip
        graph.write_bytes(content)
        with graph.open("r+b") as file:
            file.truncate(len(content) + size)
        assert not looked_at(folder)


# ---------------------------------------------------------------- values, against the onnx package

_KINDS = onnx.TensorProto
INT32 = {
    "F16": (_KINDS.FLOAT16, 0, 0xFFFF), "BF16": (_KINDS.BFLOAT16, 0, 0xFFFF), "I8": (_KINDS.INT8, -128, 127),
    "U8": (_KINDS.UINT8, 0, 255), "I16": (_KINDS.INT16, -(1 << 15), (1 << 15) - 1), "U16": (_KINDS.UINT16, 0, 0xFFFF),
    "I32": (_KINDS.INT32, -(1 << 31), (1 << 31) - 1), "BOOL": (_KINDS.BOOL, 0, 1),
    "F8_E4M3": (_KINDS.FLOAT8E4M3FN, 0, 255), "F8_E5M2": (_KINDS.FLOAT8E5M2, 0, 255),
    "F8_E4M3FNUZ": (_KINDS.FLOAT8E4M3FNUZ, 0, 255), "F8_E5M2FNUZ": (_KINDS.FLOAT8E5M2FNUZ, 0, 255),
}  # fmt: skip
WHOLE = {
    "I64": (_KINDS.INT64, 7, -(1 << 63), (1 << 63) - 1), "U64": (_KINDS.UINT64, 11, 0, (1 << 64) - 1),
    "U32": (_KINDS.UINT32, 11, 0, (1 << 32) - 1),
}  # fmt: skip
FIXED = {"F32": (_KINDS.FLOAT, 4, 4, 1), "F64": (_KINDS.DOUBLE, 10, 8, 1), "C64": (_KINDS.COMPLEX64, 4, 4, 2)}
NAMES = sorted([*INT32, *WHOLE, *FIXED])


@st.composite
def chunked(draw: Any, number: int, wire: int, items: list[bytes]) -> bytes:
    """A repeated field: packed, in one piece or several, or one by one."""
    made, place = b"", 0
    while place < len(items) or draw(st.integers(0, 9)) == 0:
        count = draw(st.sampled_from((len(items), 1, 2, 0)))
        piece = items[place : place + count]
        if len(piece) == 1 and draw(st.booleans()):
            made += varint(number << 3 | wire) + piece[0]
        else:
            made += field(number, b"".join(piece))
        place += len(piece)
    return made


@st.composite
def protos(draw: Any, name: str) -> tuple[bytes, str, bytes]:
    """A tensor on the wire, its type, and the bytes that are to lie beside the graph."""
    dtype_name = draw(st.sampled_from(NAMES))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    count = int(np.prod(shape, dtype=np.int64))
    if dtype_name in INT32:
        kind, least, most = INT32[dtype_name]
        number, wire = 5, VARINT
    elif dtype_name in WHOLE:
        kind, number, least, most = WHOLE[dtype_name]
        wire = VARINT
    else:
        kind, number, size, times = FIXED[dtype_name]
        wire = FIXED32 if size == 4 else FIXED64
        count *= times
    order: list[bytes] = [field(8, name.encode()), field(2, kind)]
    order.append(draw(chunked(1, VARINT, [varint(size) for size in shape])))
    beside = b""
    if draw(st.booleans()) and wire == VARINT:
        values = draw(st.lists(st.integers(least, most), min_size=count, max_size=count))
        items = [varint(value & (1 << 64) - 1, least=draw(st.sampled_from((1, 1, 1, 10)))) for value in values]
        order.append(draw(chunked(number, wire, items)))
    elif wire != VARINT and draw(st.booleans()):
        items = [draw(st.binary(min_size=size, max_size=size)) for _ in range(count)]
        order.append(draw(chunked(number, wire, items)))
    else:
        nbytes = BY_NAME[dtype_name].nbytes(tuple(shape))
        content = draw(st.binary(min_size=nbytes, max_size=nbytes))
        if dtype_name == "BOOL":
            content = bytes(byte & 1 for byte in content)
        if draw(st.booleans()):
            order.append(field(9, content))
            order += draw(st.sampled_from(([], [field(14, 0)])))
        else:
            before = draw(st.integers(0, 20))
            beside = bytes(before) + content + b"end"
            place = {"location": "data.bin", "offset": str(before), "length": str(nbytes)}
            order.append(field(14, 1))
            order += [field(13, field(1, key.encode()) + field(2, value.encode())) for key, value in place.items()]
    order.append(draw(st.sampled_from((b"", field(12, b"a word"), field(77, 5), varint(99 << 3 | 5) + b"1234"))))
    return b"".join(draw(st.permutations(order))), dtype_name, beside


@hypothesis.settings(max_examples=250, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.data())
def test_values_are_those_that_the_onnx_package_reads(scratch: Path, data: st.DataObject) -> None:
    wire, dtype, beside = data.draw(protos("a"))
    (scratch / "data.bin").write_bytes(beside)
    path = put(scratch / "model.onnx", OURS + field(7, field(5, wire)))
    theirs = onnx.load(path).graph.initializer[0]
    expected = onnx.numpy_helper.to_array(theirs)
    graph = container.read_graph(SourceFile(path), lambda name: SourceFile(path.parent / name))
    ((name, found),) = graph.initializers.items()
    assert (name, found.dtype.name, found.shape) == ("a", dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@hypothesis.settings(max_examples=150, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(1, 1 << 28), st.just(VARINT), st.integers(0, (1 << 64) - 1)),
            st.tuples(st.integers(1, 1 << 28), st.just(FIXED32), st.integers(0, (1 << 32) - 1)),
            st.tuples(st.integers(1, 1 << 28), st.just(FIXED64), st.integers(0, (1 << 64) - 1)),
            st.tuples(st.integers(1, 1 << 28), st.just(BYTES), st.binary(max_size=300)),
        ),
        max_size=8,
    )
)
def test_fields_are_those_that_were_written(scratch: Path, given: list[tuple[int, int, Any]]) -> None:
    content = b""
    for number, wire, value in given:
        content += varint(number << 3 | wire)
        if wire == BYTES:
            content += varint(len(value)) + value
        else:
            content += varint(value) if wire == VARINT else value.to_bytes(4 if wire == FIXED32 else 8, "little")
    path = put(scratch / "wire", content)
    wired = Wire(SourceFile(path))
    found = [
        (each.number, each.wire, wired.read(each.start, each.end) if each.wire == BYTES else each.value)
        for each in wired.fields(0, len(content))
    ]
    assert found == given
    for end in range(len(content)):
        try:
            fewer = list(wired.fields(0, end))
        except CorruptError:
            continue
        assert len(fewer) < len(given) or not given


def test_a_lone_graph_follows_no_link_out_of_its_folder(tmp_path: Path) -> None:
    single = write(tmp_path / "model.safetensors", synthetic.model("sd1"))
    folder = tmp_path / "onnx"
    assert cli("convert", single, folder, "--to", "onnx", "--weights", "external").code == 0
    assert cli("inspect", folder / "unet" / "model.onnx").code == 0
    data = folder / "unet" / "model.onnx_data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    result = cli("inspect", folder / "unet" / "model.onnx", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "hostile")


@pytest.mark.parametrize("weights", ["shared", "external", "embedded"])
def test_the_folder_of_diffusers_own_pipeline_is_sound(weights: str, tmp_path: Path) -> None:
    single = write(tmp_path / "model.safetensors", synthetic.model("sd1"))
    folder = tmp_path / "onnx"
    words = ("--to", "onnx", "--layout", "diffusers-onnx", "--weights", weights)
    assert cli("convert", single, folder, *words).code == 0
    (entry,) = cli("verify", folder, "--json").json["models"]
    assert {each["id"] for each in entry["findings"]} <= {"tokenizer-vocabulary"}


def test_graphs_of_other_parts_are_left_alone(tmp_path: Path) -> None:
    """Published folders for diffusers' pipeline have a safety checker's graph, which nobody here looks into."""
    single = write(tmp_path / "model.safetensors", synthetic.model("sd1"))
    folder = tmp_path / "onnx"
    assert cli("convert", single, folder, "--to", "onnx", "--weights", "external").code == 0
    put(folder / "safety_checker" / "model.onnx", b"no graph at all")
    assert raw_of(sd.open(folder)).keys() == raw_of(sd.open(folder).pipe(sd.Convert("diffusers"))).keys()
    assert cli("diff", single, folder, "--json").json["identical"]
