"""verify: what each rule finds, whether the command that it names mends it, and what comes of it for whom."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import synthetic
import torch
from conftest import FIXTURES, Raw, cli, raw, shell, write
from container_support import library_bytes, mutants, random_state
from convert_support import FAMILIES, ODDITIES, made_odd, shallow, whole
from synthetic import SD1_IDS

import sdsurgery as sd
from sdsurgery.cli import verify as command_line
from sdsurgery.containers.saving import beside
from sdsurgery.dtypes import F32
from sdsurgery.inspection import known_components
from sdsurgery.inspection.checks import weights
from sdsurgery.inspection.findings import DONOR
from sdsurgery.inspection.rules import PROFILES, RULES
from sdsurgery.models.identify import identify
from sdsurgery.sources import InMemory

Arrays = dict[str, np.ndarray[Any, Any]]
Maker = Callable[["Workshop"], Path]

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
WEIGHT, BIAS = UNET + "out.2.weight", UNET + "out.2.bias"
VAE_WEIGHT, CLIP_WEIGHT = VAE + "decoder.conv_in.weight", CLIP + "text_model.encoder.layers.3.mlp.fc1.weight"
SINGLE = "diffusion_pytorch_model.safetensors"


# ---------------------------------------------------------------- models to verify


@functools.cache
def _model(family: str, dtype: str, seed: int) -> Arrays:
    return synthetic.model(family, dtype=dtype, seed=seed)


def model(family: str = "sd1", dtype: str = "float16", seed: int = 0) -> Arrays:
    """A narrow one; SDXL's has its VAE in fp32, as it should be."""
    half = _model(family, dtype, seed)
    return {
        key: value.astype(np.float32) if family.startswith("sdxl") and key.startswith(VAE) else value
        for key, value in half.items()
    }


def without(tensors: Arrays, *prefixes: str) -> Arrays:
    return {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


def spoilt(key: str, value: float, dtype: str = "float16", *, whole_tensor: bool = False) -> Arrays:
    """A model of which one weight has that value: one element of it, or all."""
    tensors = model(dtype=dtype)
    changed = tensors[key].copy()
    changed.reshape(-1)[slice(None) if whole_tensor else slice(2, 3)] = value
    return tensors | {key: changed}


def by_hand(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """A safetensors file of any type."""
    header, data = {}, b""
    for key, (dtype, shape, content) in tensors.items():
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def raw_arrays(tensors: Arrays) -> dict[str, Raw]:
    names = {"float16": "F16", "float32": "F32", "int64": "I64"}
    return {key: (names[str(value.dtype)], value.shape, value.tobytes()) for key, value in tensors.items()}


def flat(tensors: Arrays) -> Arrays:
    return {key.replace(CLIP + "text_model.", CLIP): value for key, value in tensors.items()}


def sha256_of_data(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content[8 + struct.unpack("<Q", content[:8])[0] :]).hexdigest()


@dataclass(frozen=True)
class Workshop:
    """Makes models in a folder of its own."""

    place: Path
    store: Path

    def file(
        self, tensors: Arrays | None = None, metadata: Mapping[str, str] | None = None, name: str = "model.safetensors"
    ) -> Path:
        return write(self.place / name, model() if tensors is None else tensors, metadata)

    def pickle(self, tensors: Arrays | None = None, name: str = "model.ckpt", **more: Any) -> Path:
        arrays = model() if tensors is None else tensors
        torch.save({"state_dict": {key: torch.from_numpy(array) for key, array in arrays.items()}, **more},
                   self.place / name)  # fmt: skip
        return self.place / name

    def folder(self, family: str = "sd1", *, seed: int = 0, name: str = "model") -> Path:
        """As ``convert`` makes one, which is made once."""
        made = self.store / f"{family}-{seed}"
        if not made.exists():
            self.store.mkdir(exist_ok=True)
            single = write(self.store / f"{family}-{seed}.safetensors", model(family, seed=seed))
            assert cli("convert", single, made).code == 0
        return Path(shutil.copytree(made, self.place / name))

    def edited(self, name: str, change: Callable[[dict[str, Any]], object], family: str = "sd1") -> Path:
        """A folder with a JSON file that says something else."""
        folder = self.folder(family)
        document = json.loads((folder / name).read_text("utf-8"))
        change(document)
        (folder / name).write_text(json.dumps(document), "utf-8")
        return folder

    def lacking(self, *names: str, family: str = "sd1") -> Path:
        """A folder without some of its files."""
        folder = self.folder(family)
        for name in names:
            (folder / name).unlink()
        return folder

    def rewritten(self, name: str, change: Callable[[Arrays], Arrays], metadata: dict[str, str] | None = None) -> Path:
        """A folder with one file of weights changed."""
        folder = self.folder()
        write(folder / name, change(safetensors.numpy.load_file(folder / name)), metadata)
        return folder


@pytest.fixture
def at(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path, tmp_path_factory.getbasetemp() / "sound")


def contents(place: Path) -> dict[str, bytes]:
    paths = place.rglob("*") if place.is_dir() else [place] if place.exists() else []
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def verified(*words: str | Path, code: int | None = None) -> list[Any]:
    """What the document says of each model; its exit code is what the findings make it, for --fail-on warning."""
    result = cli("verify", *words, "--json")
    document = result.json
    assert "models" in document, document
    assert all(("container" in each) and each["findings"] is not None for each in document["models"])
    expected = max((_code(each) for each in document["models"]), default=0)
    assert result.code == (expected if code is None else code), document
    assert document["verified"] == (result.code == 0)
    assert result.err == ""
    models: list[Any] = document["models"]
    return models


def _code(entry: Any) -> int:
    if any(RULES[found["id"]].gap for found in entry["findings"]):
        assert not entry["complete"]
        return 3
    assert entry["complete"]
    return int(any(found["severity"] != "note" and not found["allowed"] for found in entry["findings"]))


def one(*words: str | Path, code: int | None = None) -> Any:
    (entry,) = verified(*words, code=code)
    return entry


NARROW = {"tokenizer-vocabulary"}
"""What every narrow model in a folder trips: it has fewer tokens than CLIP's tokenizer."""


def ids(entry: Any) -> set[str]:
    return {found["id"] for found in entry["findings"]} - NARROW


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    """A model that trips one rule.

    Attributes:
        rule: Which.
        make: Makes it.
        facts: Of the finding; of the first where there are several.
        twin: Makes a sound model of the same kind.
        also: Other rules that such a model must trip.
        count: How many findings.
        options: Of the command.
        mend: Whether a command is named.
        donor: Makes what stands for DONOR.
        patch: Changes what is known of published models, which are of full size.
    """

    rule: str
    make: Maker
    facts: Mapping[str, Any] = field(default_factory=dict)
    twin: Maker = Workshop.file
    also: frozenset[str] = frozenset()
    count: int = 1
    options: tuple[str, ...] = ()
    mend: bool = True
    donor: Maker | None = None
    patch: Callable[[pytest.MonkeyPatch], None] = lambda _: None


def other(family: str = "sd1") -> Maker:
    """Another sound model of the family."""
    return lambda at: at.file(model(family, seed=5), name="donor.safetensors")


def other_folder(at: Workshop) -> Path:
    return at.folder(seed=5, name="donor")


PICKLE = frozenset({"pickle"})
NO_MEND = {
    "container-unreadable", "container-corrupt", "container-hostile", "container-unsupported", "family-unknown",
    "component-unknown", "value-unread", "value-denormal", "config-contradicts",
}  # fmt: skip
"""Rules whose findings no command mends."""


def _linked_out(at: Workshop) -> Path:
    folder = at.folder()
    weights = folder / "unet" / SINGLE
    weights.rename(at.place / "elsewhere.safetensors")
    weights.symlink_to(at.place / "elsewhere.safetensors")
    return folder


def _lying_index(at: Workshop) -> Path:
    folder = at.folder()
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "vae" / SINGLE).rename(folder / "vae" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    (folder / "vae" / (SINGLE + ".index.json")).write_text(json.dumps(index))
    return folder


def _pickled_part(at: Workshop) -> Path:
    folder = at.folder()
    arrays = safetensors.numpy.load_file(folder / "vae" / SINGLE)
    torch.save({key: torch.from_numpy(value) for key, value in arrays.items()},
               folder / "vae" / "diffusion_pytorch_model.bin")  # fmt: skip
    (folder / "vae" / SINGLE).unlink()
    return folder


def _with_file(name: str, content: bytes = b"") -> Maker:
    def make(at: Workshop) -> Path:
        folder = at.folder()
        (folder / name).write_bytes(content)
        return folder

    return make


def _without_part(name: str) -> Maker:
    def make(at: Workshop) -> Path:
        folder = at.edited("model_index.json", lambda index: index.update({name: [None, None]}))
        shutil.rmtree(folder / name)
        return folder

    return make


def _mixed_families() -> Arrays:
    return without(model("sd2"), "cond_stage_model.") | {
        key: value for key, value in model().items() if key.startswith("cond_stage_model.")
    }


def _strange_vae() -> Arrays:
    strange = {f"{VAE}encoder.down_blocks.{index}.norm.weight": np.ones(4, np.float16) for index in range(30)}
    return without(model(), VAE) | strange


def _strange_unet() -> Arrays:
    return {f"down_blocks.0.strange.{index}.weight": np.ones(4, np.float16) for index in range(9)}


def _with_schedule(change: Callable[[Arrays], Arrays]) -> Arrays:
    return model() | change(synthetic.schedule())


def _half_schedule(at: Workshop) -> Path:
    halves = {key: value.astype(np.float16) for key, value in synthetic.schedule().items()}
    return at.file(model() | halves)


def _bf16_schedule(at: Workshop) -> Path:
    halves = {
        key: ("BF16", value.shape, value.astype(ml_dtypes.bfloat16).tobytes())
        for key, value in synthetic.schedule().items()
    }
    return by_hand(at.place / "model.safetensors", raw_arrays(model()) | halves)


def _foreign_vae(at: Workshop) -> Path:
    made = at.place / "model.safetensors"
    assert cli("merge-vae", at.file(name="own.safetensors"), FIXTURES / "vae-sdxl.safetensors", "--force", "-o", made,
               "-q").code == 0  # fmt: skip
    return made


def _own_vae(at: Workshop) -> Path:
    made = at.place / "model.safetensors"
    donor = at.file(model(seed=3), name="own-donor.safetensors")
    assert cli("merge-vae", at.file(name="own.safetensors"), donor, "-o", made, "-q").code == 0
    return made


def _four_bits(at: Workshop) -> Path:
    """CLIP in F4: two elements a byte."""
    tensors = raw_arrays(model())
    for key, (dtype, shape, content) in tensors.items():
        if key.startswith(CLIP) and dtype == "F16":
            tensors[key] = ("F4", shape, bytes(len(content) // 4))
    return by_hand(at.place / "model.safetensors", tensors)


def _hashed(name: str, change: Callable[[str], str]) -> Maker:
    def make(at: Workshop) -> Path:
        right = sha256_of_data(at.file())
        return at.file(metadata={name: change(right)})

    return make


def _as_if_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if SDXL's narrow VAE were known as one of SD."""
    tensors = {
        key: sd.Tensor(F32, value.shape, InMemory(value.tobytes()))
        for key, value in model("sdxl").items()
        if key.startswith(VAE)
    }
    rule, taking_part = known_components._measurable(sd.Checkpoint(tensors), identify(sd.Checkpoint(tensors)))["vae"]
    total = known_components._totals({"vae": taking_part})["vae"]
    published = (known_components.Published("SD-v1", 0, "sd"),)
    elements = sum(tensor.numel for tensor in taking_part)
    rules = {"vae": replace(rule, base=total, elements=elements, published=published)}
    for module in (known_components, weights):
        monkeypatch.setattr(module, "rules", lambda: rules)


FULL_SPEC = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
    "modelspec.title": "Mine",
    "modelspec.resolution": "512x512",
}
BARE_SPEC = {"modelspec.sai_model_spec": "1.0.1"}


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.update({name: value})


CASES = [
    # ------------------------------------------------------------ container
    Case("container-unreadable", lambda at: at.place / "none.safetensors", {"file": None, "key": None}),
    Case("container-corrupt", lambda _: FIXTURES / "broken" / "data-truncated.safetensors", {"file": None}),
    Case("container-corrupt", lambda _: FIXTURES / "broken" / "overlap.safetensors", {"key": "b"}),
    Case("container-corrupt", _lying_index, {"file": "vae/diffusion_pytorch_model-00001-of-00002.safetensors"},
         Workshop.folder),
    Case("container-corrupt", lambda at: at.lacking("unet/" + SINGLE), {}, Workshop.folder),
    Case("container-hostile", lambda _: FIXTURES / "hostile-zip.ckpt"),
    Case("container-hostile", lambda _: FIXTURES / "hostile-legacy.ckpt"),
    Case("container-hostile", _linked_out, {"file": "unet/" + SINGLE}, Workshop.folder),
    Case("container-unsupported", lambda _: FIXTURES / "broken" / "web-page.safetensors"),
    Case("container-unsupported", lambda at: at.place, {"file": None}),
    Case("container-suffix", lambda at: at.pickle(name="model.safetensors"),
         {"expected": "safetensors", "seen": "torch-zip"}, also=PICKLE),
    Case("container-suffix", lambda at: at.file(name="model.ckpt"), {"expected": "torch-zip", "seen": "safetensors"}),
    Case("pickle", Workshop.pickle, {"file": None}),
    Case("pickle", lambda _: FIXTURES / "sd1-legacy.ckpt"),
    Case("pickle", lambda at: at.pickle(without(model(), BIAS)), also=frozenset({"weight-missing"})),
    Case("pickle", lambda at: at.pickle({"a": np.ones(3, np.float32)}), also=frozenset({"family-unknown"})),
    Case("pickle", lambda at: at.pickle(without(synthetic.part(model(), CLIP), "text_model.embeddings.position_ids"))),
    Case("pickle", _pickled_part, {"file": "vae/diffusion_pytorch_model.bin"}, Workshop.folder),
    Case("non-tensors", lambda at: at.pickle(epoch=3), {"key": "epoch"}, Workshop.pickle, also=PICKLE),
    Case("non-tensors", lambda at: at.pickle(without(model(), BIAS), optimizer_states=[{"a": torch.ones(3)}]),
         {"key": "optimizer_states"}, Workshop.pickle, also=frozenset({"pickle", "weight-missing"})),
    Case("file-unused", _with_file(".DS_Store"), {"file": ".DS_Store"}, Workshop.folder),
    Case("file-unused", _with_file("vae/diffusion_pytorch_model.fp16.safetensors"),
         {"file": "vae/diffusion_pytorch_model.fp16.safetensors"}, Workshop.folder),
    # ------------------------------------------------------------ structure
    Case("family-unknown", lambda at: at.file({"a.weight": np.ones((3, 3), np.float32)})),
    Case("family-unknown", lambda at: at.file(_mixed_families()), {"component": None}),
    Case("family-unknown", lambda at: at.file(synthetic.model("sd1", inputs=7))),
    Case("family-unknown", lambda at: at.file({"epoch": np.array(1)}), twin=lambda _: FIXTURES / "vae.safetensors"),
    Case("component-unknown", lambda at: at.file(_strange_vae()), {"component": "vae"}),
    Case("component-unknown", lambda at: at.file(_strange_unet()), {"component": "unet"}),
    Case("component-missing", lambda at: at.file(without(model(), VAE)), {"component": "vae", "key": None},
         donor=lambda _: FIXTURES / "vae.safetensors"),
    Case("component-missing", lambda at: at.pickle(without(model(), CLIP)), {"component": "text_encoder"},
         Workshop.pickle, also=PICKLE, donor=other()),
    Case("component-missing", lambda at: at.file(without(model("sd2"), UNET)), {"component": "unet"},
         donor=other("sd2")),
    Case("component-missing", lambda at: at.file(without(model("sdxl"), UNET, VAE)), {"component": "unet"},
         count=2, donor=other("sdxl")),
    Case("component-missing", _without_part("vae"), {"component": "vae"}, Workshop.folder, mend=False),
    Case("component-missing", _without_part("text_encoder"), {"component": "text_encoder"}, Workshop.folder,
         mend=False),
    Case("weight-missing", lambda at: at.file(without(model(), BIAS)), {"key": BIAS, "component": "unet"},
         donor=other()),
    Case("weight-missing", lambda at: at.file(without(model(), VAE_WEIGHT)), {"key": VAE_WEIGHT, "component": "vae"},
         donor=lambda _: FIXTURES / "vae.safetensors"),
    Case("weight-missing", lambda at: at.file(without(model(), CLIP_WEIGHT)),
         {"key": CLIP_WEIGHT, "component": "text_encoder"}, donor=other()),
    Case("weight-missing", lambda at: Path(shutil.copy(FIXTURES / "vae-partial.safetensors", at.place)),
         {"component": "vae"}, lambda _: FIXTURES / "vae.safetensors", count=26,
         donor=lambda _: FIXTURES / "vae.safetensors"),
    Case("weight-missing", lambda at: at.rewritten("unet/" + SINGLE, lambda own: without(own, "conv_out.bias")),
         {"key": "unet/conv_out.bias", "component": "unet"}, Workshop.folder, donor=other()),
    Case("weight-shape", lambda at: at.file(model() | {WEIGHT: np.zeros((4, 4, 1, 1), np.float16)}),
         {"key": WEIGHT, "component": "unet", "expected": "[4, 4, 3, 3]", "seen": "[4, 4, 1, 1]"}, donor=other()),
    Case("weight-shape", lambda at: at.rewritten("vae/" + SINGLE, lambda own: own | {"conv_out.bias": np.ones(
         5, np.float16)} if "conv_out.bias" in own else own | {"decoder.conv_out.bias": np.ones(5, np.float16)}),
         {"key": "vae/decoder.conv_out.bias", "component": "vae", "expected": "[3]", "seen": "[5]",
          "file": "vae/" + SINGLE}, Workshop.folder, donor=other()),
    Case("key-wrapped", lambda _: FIXTURES / "sd1-wrapped.safetensors", {"seen": "module.", "key": None}),
    Case("key-wrapped", lambda at: at.file({"module.state_dict." + key: value for key, value in synthetic.part(
         model(), VAE).items()}), {"seen": "module.state_dict."}, lambda _: FIXTURES / "vae.safetensors"),
    Case("key-wrapped", lambda at: at.file({"module." + key: value for key, value in model("sd2").items()}),
         twin=lambda at: at.file(model("sd2"))),
    Case("key-duplicate", lambda at: at.file(flat(without(model(), SD1_IDS)) | model()),
         {"component": "text_encoder", "key": CLIP + "embeddings.position_embedding.weight",
          "expected": CLIP + "text_model.embeddings.position_embedding.weight"}, count=196),
    Case("key-duplicate", lambda at: at.file(model() | {"unet.out.2.bias": np.ones(4, np.float16)}),
         {"key": "unet.out.2.bias", "expected": BIAS, "component": "other"}),
    Case("key-unknown", lambda at: at.file(model() | {"junk": np.ones(3, np.float16)}),
         {"key": "junk", "component": "other"}),
    Case("key-unknown", lambda at: at.file(model() | {UNET + "junk.weight": np.ones(3, np.float16)}),
         {"key": UNET + "junk.weight", "component": "unet"}),
    Case("key-unknown", lambda at: at.file(model() | {"embedding_manager.position_ids": np.arange(3)}),
         {"key": "embedding_manager.position_ids"}),
    Case("key-unknown", lambda at: at.file(without(synthetic.part(model(), CLIP),
         "text_model.embeddings.position_ids") | {"vision_model.embeddings.position_ids": np.arange(5)}),
         {"key": "vision_model.embeddings.position_ids"}),
    Case("key-unknown", lambda at: at.rewritten("unet/" + SINGLE, lambda own: own | {"junk": np.ones(3, np.float16)}),
         {"key": "unet/junk", "file": "unet/" + SINGLE, "component": "unet"}, Workshop.folder),
    Case("key-dialect", lambda _: FIXTURES / "sd1-flat-text-encoder.safetensors",
         {"component": "text_encoder", "key": CLIP + "embeddings.position_ids", "expected": SD1_IDS,
          "seen": CLIP + "embeddings.position_ids"}),
    Case("key-dialect", lambda at: at.rewritten("text_encoder/model.safetensors", lambda own: {
         key.removeprefix("text_model."): value for key, value in own.items()}),
         {"component": "text_encoder"}, Workshop.folder),
    Case("ema-incomplete", lambda at: at.file(model() | dict(list(synthetic.ema(model()))[5:])), {"component": "ema"},
         also=frozenset({"leftovers"})),
    Case("leftovers", lambda at: at.file(model() | dict(synthetic.ema(model()))), {"component": "ema"}),
    Case("leftovers", lambda at: at.file(model() | {VAE + "loss.logvar": np.zeros((), np.float32)}),
         {"component": "training"}),
    Case("leftovers", lambda at: at.pickle(synthetic.part(model(), VAE) | {"loss.logvar": np.zeros((), np.float32)}),
         {"component": "training"}, also=PICKLE),
    Case("vae-family", _foreign_vae, {"component": "vae", "expected": "sd", "seen": "sdxl"}, _own_vae, donor=other()),
    Case("vae-family", lambda at: at.edited("vae/config.json", _set("scaling_factor", 0.13025)),
         {"component": "vae", "expected": "sd", "seen": "sdxl"}, Workshop.folder, donor=other_folder),
    Case("vae-half", lambda at: at.file(_model("sdxl", "float16", 0)), {"component": "vae", "seen": "F16"},
         lambda at: at.file(model("sdxl"))),
    Case("vae-half", lambda at: at.file(_model("sdxl-refiner", "float16", 0)), {"component": "vae"},
         lambda at: at.file(model("sdxl-refiner"))),
    Case("vae-figure", lambda at: at.file(model("sdxl")), {"component": "vae", "expected": "sdxl", "seen": "sd"},
         other("sdxl"), donor=other("sdxl"), patch=_as_if_published),
    # ------------------------------------------------------------ position ids
    Case("position-ids-missing", lambda _: FIXTURES / "sd1-ids-missing.safetensors",
         {"key": SD1_IDS, "component": "text_encoder", "expected": "I64[1, 77], 0 to 76", "seen": "nothing"}),
    Case("position-ids-missing", lambda at: at.file(without(model(), SD1_IDS)), options=("--profile", "a1111")),
    *(Case("position-ids-wrong", lambda _, name=name: FIXTURES / f"sd1-ids-{name}.safetensors",  # type: ignore[misc]
           {"key": SD1_IDS, "seen": seen}, options=options)
      for name, seen in [("fractional", "F32[1, 77]"), ("wrong-values", "I64[1, 77]"), ("wrong-shape", "I64[77]"),
                         ("fractional-fp16", "F16[1, 77]")]
      for options in [(), ("--profile", "a1111"), ("--profile", "comfyui"), ("--profile", "strict")]),
    Case("position-ids-wrong", lambda at: at.file(model() | {SD1_IDS: np.full((1, 77), np.nan, np.float32)})),
    Case("position-ids-dtype", lambda _: FIXTURES / "sd1-ids-wrong-dtype.safetensors",
         {"key": SD1_IDS, "seen": "F16[1, 77]"}),
    *(Case("position-ids-unneeded", lambda _: FIXTURES / "clip-ids-unexpected.safetensors",
           {"key": "text_model.embeddings.position_ids", "expected": "nothing"},
           lambda at: at.file(without(synthetic.part(model(), CLIP), "text_model.embeddings.position_ids")),
           options=options)
      for options in [(), ("--profile", "a1111"), ("--profile", "comfyui"), ("--profile", "strict")]),
    Case("position-ids-stray", lambda _: FIXTURES / "sd2-stray-ids.safetensors", {"component": "text_encoder"},
         lambda at: at.file(model("sd2"))),
    # ------------------------------------------------------------ dtypes
    *(Case("weight-kind", lambda at, kind=kind: at.file(model() | {BIAS: np.zeros(4, kind)}),
           {"key": BIAS, "component": "unet", "expected": "a float"}, donor=other())
      for kind in ("int8", "bool", "uint64", "complex64")),
    Case("dtype-asked", Workshop.file, {"expected": "F32", "seen": "F16"}, lambda at: at.file(model(dtype="float32")),
         count=1130, options=("--dtype", "fp32")),
    Case("dtype-asked", lambda at: at.file(model() | {WEIGHT: model(dtype="float32")[WEIGHT]}),
         {"key": WEIGHT, "component": "unet", "expected": "F16", "seen": "F32"}, also=frozenset({"dtype-mixed"}),
         options=("--dtype", "fp16")),
    Case("dtype-asked", _four_bits, {"expected": "F16", "seen": "F4", "component": "text_encoder"}, count=196,
         also=frozenset({"value-unread"}), options=("--dtype", "fp16"), mend=False),
    Case("dtype-mixed", lambda at: at.file(model() | {WEIGHT: model(dtype="float32")[WEIGHT]}),
         {"key": None, "component": "unet", "seen": "685 F16, 1 F32"}),
    Case("schedule-dtype", _half_schedule, {"expected": "F32", "seen": "F16"},
         lambda at: at.file(model() | synthetic.schedule()), count=12),
    Case("schedule-dtype", _bf16_schedule, {"seen": "BF16"}, count=12),
    Case("schedule-dtype", lambda at: at.file(_with_schedule(lambda own: own | {
         "betas": own["betas"].astype(np.float16)})), {"key": "betas"}),
    # ------------------------------------------------------------ values
    Case("value-nan", lambda at: at.file(spoilt(WEIGHT, np.nan)), {"key": WEIGHT, "component": "unet", "seen": "1"},
         donor=other()),
    Case("value-nan", lambda at: at.file(spoilt(VAE_WEIGHT, np.nan)), {"key": VAE_WEIGHT, "component": "vae"},
         donor=lambda _: FIXTURES / "vae.safetensors"),
    Case("value-nan", lambda at: at.file(model() | {"junk": np.array([np.nan], np.float32)}),
         {"key": "junk", "component": "other", "severity": "note"}, also=frozenset({"key-unknown"})),
    Case("value-nan", lambda at: at.file(model() | {UNET + "junk": np.array([np.nan], np.float32)}),
         {"key": UNET + "junk", "component": "unet"}, also=frozenset({"key-unknown"}), donor=other()),
    Case("value-nan", lambda at: at.file(_strange_vae() | {VAE + "encoder.x": np.array([np.nan], np.float16)}),
         {"component": "vae"}, also=frozenset({"component-unknown"}), mend=False),
    Case("value-infinite", lambda at: at.file(spoilt(WEIGHT, -np.inf)),
         {"key": WEIGHT, "component": "unet", "seen": "1"}, donor=other()),
    Case("value-infinite", lambda at: at.file(model() | dict(synthetic.ema(model())) | {
         "model_ema.decay": np.array(np.inf, np.float32)}),
         {"key": "model_ema.decay", "component": "ema", "severity": "note"}, also=frozenset({"leftovers"})),
    Case("value-infinite", lambda at: at.file(model() | {"loss.logvar": np.array(np.inf, np.float32)}),
         {"key": "loss.logvar", "severity": "note"}, also=frozenset({"leftovers"})),
    Case("value-unread", _four_bits, {"component": "text_encoder"}, count=196),
    Case("value-unread", lambda at: by_hand(at.place / "model.safetensors", raw_arrays(model()) | {
         "loss.six": ("F6_E3M2", (4,), bytes(3))}), {"key": "loss.six"}, also=frozenset({"leftovers"})),
    Case("value-overflow", lambda at: at.file(spoilt(WEIGHT, 7e4, "float32")),
         {"key": WEIGHT, "component": "unet", "seen": "1"}, lambda at: at.file(spoilt(WEIGHT, 65519.0, "float32"))),
    Case("value-constant", lambda at: at.file(spoilt(WEIGHT, 0.5, whole_tensor=True)),
         {"key": WEIGHT, "component": "unet", "seen": "0.5"}, donor=other()),
    Case("value-denormal", lambda at: at.file(spoilt(WEIGHT, 1e-6) | {WEIGHT: (model()[WEIGHT] * np.float16(1e-4))}),
         {"key": WEIGHT, "component": "unet"}),
    Case("schedule-values", lambda at: at.file(_with_schedule(lambda own: own | {
         "alphas_cumprod": own["alphas_cumprod"][::-1].copy()})), {"key": "alphas_cumprod"},
         lambda at: at.file(model() | synthetic.schedule())),
    Case("schedule-values", lambda at: at.file(_with_schedule(lambda own: own | {
         "alphas_cumprod": own["alphas_cumprod"] * 2})), {"key": "alphas_cumprod"}),
    Case("schedule-values", lambda at: at.file(_with_schedule(lambda own: own | {
         "alphas_cumprod": np.full(1000, np.nan, np.float32)})), also=frozenset({"value-nan"})),
    *(Case("schedule-values", lambda at, key=key, made=made: at.file(_with_schedule(lambda own: own | {
           key: made.astype(np.float32)})), {"key": key})
      for key, made in [
          ("alphas_cumprod", np.linspace(0.5, 0.4, 1000)),
          ("alphas_cumprod", synthetic.schedule()["alphas_cumprod"] * 0.5),
          ("betas", np.zeros(1000)),
          ("sqrt_alphas_cumprod", np.full(1000, 7)),
          ("alphas_cumprod_prev", synthetic.schedule()["alphas_cumprod"]),
      ]),
    # ------------------------------------------------------------ metadata
    Case("metadata-hash", _hashed("modelspec.hash_sha256", lambda _: "0x" + "ab" * 32),
         {"key": "modelspec.hash_sha256", "seen": "ab" * 32}, _hashed("modelspec.hash_sha256", "0x{}".format)),
    Case("metadata-hash", _hashed("sshs_model_hash", lambda right: right[:-1] + "xy"[right[-1] == "x"]),
         {"key": "sshs_model_hash"}, _hashed("sshs_model_hash", str.upper)),
    Case("metadata-hash", _hashed("sshs_model_hash", lambda right: right[:11]), {"key": "sshs_model_hash"},
         _hashed("sshs_model_hash", lambda right: right[:12])),
    Case("metadata-architecture", lambda at: at.file(metadata={
         "modelspec.architecture": "stable-diffusion-xl-v1-base"}),
         {"key": "modelspec.architecture", "expected": "stable-diffusion-v1", "seen": "stable-diffusion-xl-v1-base"},
         lambda at: at.file(metadata={"modelspec.architecture": "stable-diffusion-v1"})),
    Case("metadata-architecture", lambda at: at.file(model("sd2"), {"modelspec.architecture": "stable-diffusion-v1"}),
         {"expected": "stable-diffusion-v2-512", "seen": "stable-diffusion-v1"},
         lambda at: at.file(model("sd2"), {"modelspec.architecture": "stable-diffusion-v2-768-v"})),
    Case("metadata-architecture", lambda at: at.rewritten("unet/" + SINGLE, dict, {
         "modelspec.architecture": "stable-diffusion-xl-v1-base"}), {}, Workshop.folder),
    Case("metadata-modelspec", lambda at: at.file(metadata=BARE_SPEC), twin=lambda at: at.file(metadata=FULL_SPEC)),
    Case("metadata-modelspec", lambda at: at.file(synthetic.part(model(), VAE), BARE_SPEC),
         twin=lambda at: at.file(synthetic.part(model(), VAE), FULL_SPEC)),
    # ------------------------------------------------------------ folder
    *(Case("config-missing", lambda at, name=name: at.lacking(name), {"file": name},  # type: ignore[misc]
           Workshop.folder)
      for name in ["unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json",
                   "scheduler/scheduler_config.json"]),
    Case("config-contradicts", lambda at: at.edited("unet/config.json", _set("cross_attention_dim", 768)),
         {"file": "unet/config.json", "component": "unet", "expected": "cross_attention_dim 8",
          "seen": "cross_attention_dim 768"}, Workshop.folder),
    Case("config-contradicts", lambda at: at.edited("vae/config.json", _set("block_out_channels", [2, 4, 6, 8])),
         {"file": "vae/config.json", "component": "vae", "expected": "block_out_channels [2, 4, 6, 6]",
          "seen": "block_out_channels [2, 4, 6, 8]"}, Workshop.folder),
    Case("tokenizer", lambda at: at.lacking("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
         {"file": "tokenizer/vocab.json"}, Workshop.folder, count=2),
    Case("tokenizer", lambda at: at.lacking(*(f"tokenizer_2/{name}" for name in [
         "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]), family="sdxl"), {},
         lambda at: at.folder("sdxl"), count=4),
    Case("tokenizer-old", lambda at: at.lacking("tokenizer/vocab.json", "tokenizer/merges.txt"),
         {"file": "tokenizer/vocab.json"}, Workshop.folder, count=2),
    Case("tokenizer-length", lambda at: at.edited("tokenizer/tokenizer_config.json", _set("model_max_length", None)),
         {"file": "tokenizer/tokenizer_config.json"}, Workshop.folder),
    Case("tokenizer-length", lambda at: at.edited("tokenizer/tokenizer_config.json", _set("model_max_length", 10**30)),
         {}, Workshop.folder),
]  # fmt: skip

NAMED = [pytest.param(case, id=f"{case.rule}-{number}") for number, case in enumerate(CASES)]


def test_the_table_has_every_rule() -> None:
    others = {rule.id for rule in RULES.values() if rule.group in {"manifest", "signature", "embedding"}}
    others |= {"tokenizer-vocabulary", "config-invalid", "index-missing", "index-class"}  # test_verify_folders.py
    assert {case.rule for case in CASES} == RULES.keys() - others
    mended = {case.rule for case in CASES if case.mend} - NO_MEND
    assert RULES.keys() - others - mended == NO_MEND


@pytest.mark.parametrize("case", NAMED)
def test_a_rule_finds_what_it_is_for(case: Case, at: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    case.patch(monkeypatch)
    entry = one(case.make(at), *case.options)
    assert ids(entry) == {case.rule} | case.also
    found = [each for each in entry["findings"] if each["id"] == case.rule]
    assert len(found) == case.count
    severity = case.facts.get("severity", RULES[case.rule].severity_in(entry["profile"]))
    assert {name: found[0][name] for name in case.facts} == case.facts
    assert {each["severity"] for each in found} == {severity}
    assert case.rule in entry["rules"] or RULES[case.rule].group == "container"


@pytest.mark.parametrize("case", NAMED)
def test_a_sound_twin_is_sound(case: Case, at: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    case.patch(monkeypatch)
    entry = one(case.twin(at), *case.options, code=0)
    assert ids(entry) == ({"pickle"} if case.twin is Workshop.pickle else set())


@pytest.mark.parametrize("case", [each for each in NAMED if each.values[0].rule not in NO_MEND])  # type: ignore[union-attr]
def test_the_command_that_is_named_mends_it(case: Case, at: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    case.patch(monkeypatch)
    made = case.make(at)
    path = made
    if made.is_relative_to(FIXTURES):
        path = Path(shutil.copy(made, at.place / made.name))
    before, entry = contents(path), one(path, *case.options)
    found = [each for each in entry["findings"] if each["id"] == case.rule]
    assert all(bool(each["mend"]) == case.mend for each in found)
    commands = {tuple(each["mend"]["command"]) for each in found if each["mend"]}
    donor = case.donor(at) if case.donor else None
    for words in commands:
        assert words[0] == "sdsurgery"
        assert (DONOR in words) <= (donor is not None)
        command = [str(donor) if word == DONOR else word for word in words[1:]]
        result = cli(*command)
        assert result.code == 0, result.err
        output = written_by(command)
        after = one(output, *case.options)
        gone = {each["key"] for each in found if each["mend"] and tuple(each["mend"]["command"]) == words}
        left = {(each["id"], each["key"], each["file"]) for each in after["findings"]}
        assert not {(case.rule, each["key"], each["file"]) for each in found if each["key"] in gone} & left
        assert ids(after) <= ids(entry)
    assert contents(path) == before


def written_by(command: list[str]) -> Path:
    """Where a command puts its result."""
    if "-o" in command:
        return Path(command[command.index("-o") + 1])
    if command[0] == "convert":
        return Path(command[2])
    model = Path(command[1])
    label = command[command.index("--component") + 1] if command[0] == "extract" else "fixed"
    return beside(model, label, folder=model.is_dir())


# ---------------------------------------------------------------- containers and odd parts


@pytest.mark.parametrize("path", sorted((FIXTURES / "broken").iterdir()), ids=lambda path: path.stem)
def test_what_cannot_be_opened_is_a_gap(path: Path) -> None:
    entry = one(path)
    (found,) = entry["findings"]
    assert found["id"] in {"container-corrupt", "container-unsupported"}
    assert (entry["container"], entry["family"], found["severity"], found["mend"]) == (None, None, "error", None)
    assert set(entry["rules"]) == {rule.id for rule in RULES.values() if rule.gap and rule.group == "container"}


def test_a_unet_of_no_family_in_a_model(at: Workshop) -> None:
    """SSD-1B: SDXL without attention in the middle, and with fewer transformer blocks."""
    gone = tuple(f"transformer_blocks.{index}." for index in range(4, 10))
    ssd = {
        key: value
        for key, value in model("sdxl").items()
        if not (key.startswith(UNET) and (".middle_block.1." in key or any(block in key for block in gone)))
    }
    entry = one(at.file(ssd), code=3)
    assert ids(entry) == {"family-unknown", "component-unknown"}
    assert [found["component"] for found in entry["findings"]] == [None, "unet"]


def test_a_folder_of_another_kind_of_model(at: Workshop) -> None:
    folder = at.edited("model_index.json", _set("transformer", ["diffusers", "FluxTransformer2DModel"]))
    (folder / "transformer").mkdir()
    write(folder / "transformer" / SINGLE, {"x": np.ones(3, np.float32)})
    assert ids(one(folder, code=3)) == {"family-unknown"}


@pytest.mark.parametrize("spoil", [False, True])
def test_a_safety_checker_belongs_to_its_folder(spoil: bool, at: Workshop) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    folder = at.edited("model_index.json", _set("safety_checker", checker))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    concepts = np.full((17, 8), np.nan if spoil else 1, np.float32)
    position_ids = {"vision_model.vision_model.embeddings.position_ids": np.arange(50)[None]}
    write(folder / "safety_checker" / "model.safetensors", {"concept_embeds": concepts} | position_ids)
    entry = one(folder, code=int(spoil))
    found = [each for each in entry["findings"] if each["id"] not in NARROW]
    assert [(each["id"], each["key"], each["mend"]) for each in found] == (
        [("value-nan", "safety_checker/concept_embeds", None)] if spoil else []
    )


def test_the_whole_of_clip_has_no_weight_twice(at: Workshop) -> None:
    text = without(synthetic.part(model(), CLIP), "text_model.embeddings.position_ids")
    vision = {key.replace("text_model", "vision_model"): value for key, value in text.items() if "encoder" in key}
    entry = one(at.file(text | vision))
    assert ids(entry) == {"key-unknown"}
    assert len(entry["findings"]) == len(vision)


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_are_sound_whatever_the_layout(family: str, at: Workshop) -> None:
    entries = verified(at.file(model(family)), at.folder(family, name="folder"), at.pickle(model(family)))
    assert [ids(entry) for entry in entries] == [set(), set(), {"pickle"}]
    assert [entry["layout"] for entry in entries] == ["ldm", "diffusers", "ldm"]
    assert [entry["profile"] for entry in entries] == ["ldm", "diffusers", "ldm"]
    assert {entry["family"] for entry in entries} == {family}
    strict = one(at.place / "model.ckpt", "--profile", "strict")
    assert [(each["id"], each["severity"]) for each in strict["findings"]] == [("pickle", "warning")]


@pytest.mark.parametrize("seed", range(24))
def test_odd_models_never_surprise(seed: int, tmp_path: Path) -> None:
    """Random bytes, NaN and all, with what is found in the wild: always a report, for everybody."""
    chance = random.Random(seed)
    configs = shallow(chance.choice(FAMILIES), chance)
    state = whole(configs, chance, ("F16", "BF16", "F32", "F64", "F8_E4M3", "I8"), ids=chance.random() < 0.5)
    state = made_odd(state, configs, chance.sample(ODDITIES, chance.randint(0, 5)), chance)
    path = tmp_path / "model.safetensors"
    path.write_bytes(library_bytes(state, {"modelspec.sai_model_spec": "1", "sshs_model_hash": "0x"}))
    entry = one(path, "--profile", chance.choice(PROFILES))
    assert entry["container"] == "safetensors"
    keys = set(state)
    for found in entry["findings"]:
        about_weights = not found["id"].startswith(("weight-missing", "position-ids-missing", "metadata"))
        assert found["key"] is None or not about_weights or found["key"] in keys


def test_damaged_files_are_reported(tmp_path: Path) -> None:
    base = library_bytes(random_state(1, tensors=5))
    paths = []
    for number, content in enumerate(mutants([base], 150, 3, focus=300)):
        paths.append(tmp_path / f"{number:03}.safetensors")
        paths[-1].write_bytes(content)
    entries = verified(*paths, code=3)
    assert [entry["path"] for entry in entries] == [str(path) for path in paths]
    assert {"container-corrupt", "family-unknown"} <= set().union(*map(ids, entries))


def test_a_file_that_shrinks_while_it_is_read(at: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdsurgery.inspection import verifying

    path, sound = at.file(), at.file(name="sound.safetensors")
    read_values = verifying._read_values

    def shrunk(cases: Any) -> None:
        path.write_bytes(path.read_bytes()[:-20_000])
        read_values(cases)

    monkeypatch.setattr(verifying, "_read_values", shrunk)
    first, second = verified(path, sound, code=3)
    assert [each["id"].rpartition("-")[0] for each in first["findings"]] == ["container"]
    assert second["findings"] == []


# ---------------------------------------------------------------- for whom

SEVERE = {
    "missing": {"ldm": "warning", "a1111": "warning", "strict": "error"},
    "fractional": dict.fromkeys(PROFILES, "error") | {"diffusers": "warning"},
    "wrong-dtype": dict.fromkeys(PROFILES, "warning") | {"comfyui": "note", "diffusers": "note", "strict": "error"},
    "ok": {},
} | dict.fromkeys(["fractional-fp16", "wrong-values", "wrong-shape"], dict.fromkeys(PROFILES, "error") | {
    "diffusers": "warning"})  # fmt: skip
RULE_OF = {"missing": "position-ids-missing", "wrong-dtype": "position-ids-dtype"}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("status", SEVERE)
def test_position_ids_matter_to_some(status: str, profile: str) -> None:
    entry = one(FIXTURES / f"sd1-ids-{status}.safetensors", "--profile", profile)
    severity = SEVERE[status].get(profile)
    rule = RULE_OF.get(status, "position-ids-wrong")
    assert [(each["id"], each["severity"]) for each in entry["findings"]] == ([(rule, severity)] if severity else [])
    assert entry["profile"] == profile
    assert (rule in entry["rules"]) == (status != "missing" or severity is not None)


def test_rules_list_every_severity_and_where_it_differs() -> None:
    result = cli("verify", "--rules")
    assert (result.code, result.err) == (0, "")
    lines = {line.split()[0]: line for line in result.out.splitlines()}
    assert list(lines) == list(RULES)
    for name, rule in RULES.items():
        assert lines[name].split()[1] == rule.severity
        others = [profile for profile in PROFILES if rule.severity_in(profile) != rule.severity]
        assert all(f"{profile}: {rule.severity_in(profile) or 'off'}" in lines[name] for profile in others)
    assert "comfyui: off" in lines["position-ids-missing"]
    assert "strict" not in lines["value-nan"]


CODES = {"note": (1, 0, 0, 0), "warning": (1, 1, 0, 0), "error": (1, 1, 1, 0), "sound": (0, 0, 0, 0)}
"""By the worst finding, for --fail-on note, warning, error, never."""


@pytest.mark.parametrize("worst", CODES)
def test_exit_codes(worst: str, at: Workshop) -> None:
    paths = {
        "note": at.pickle,
        "warning": lambda: FIXTURES / "sd1-ids-missing.safetensors",
        "error": lambda: FIXTURES / "sd1-ids-fractional.safetensors",
        "sound": lambda: FIXTURES / "sd1-ids-ok.safetensors",
    }
    path = paths[worst]()
    for level, code in zip(("note", "warning", "error", "never"), CODES[worst], strict=True):
        result = cli("verify", path, "--fail-on", level, "--json")
        assert (result.code, result.json["verified"], result.json["fail_on"]) == (code, code == 0, level)
        assert cli("verify", path, "--fail-on", level).code == code


@pytest.mark.parametrize("level", ["note", "warning", "error", "never"])
def test_what_could_not_be_checked_wins(level: str, at: Workshop) -> None:
    broken = FIXTURES / "broken" / "overlap.safetensors"
    wrong = FIXTURES / "sd1-ids-fractional.safetensors"
    result = cli("verify", wrong, broken, FIXTURES / "sd1-ids-ok.safetensors", "--fail-on", level, "--json")
    assert result.code == 3
    assert [(each["complete"], len(each["findings"])) for each in result.json["models"]] == [
        (True, 1), (False, 1), (True, 0),
    ]  # fmt: skip
    assert cli("verify", _four_bits(at), "--fail-on", level).code == 3


def test_dtypes_are_asked_for(at: Workshop) -> None:
    half, single = at.file(), at.file(model(dtype="float32"), name="single.safetensors")
    assert one(half, "--dtype", "fp16", code=0)["findings"] == []
    assert one(single, "--dtype", "fp32", code=0)["findings"] == []
    asked = one(half, "--dtype", "bf16", code=1)
    assert {(each["expected"], each["seen"]) for each in asked["findings"]} == {("BF16", "F16")}
    assert "dtype-asked" in asked["rules"]
    assert "dtype-asked" not in one(half, code=0)["rules"]
    text = cli("verify", half, "--dtype", "bf16").out
    assert "and 683 more" in text
    assert text.count("mend with") == 3


# ---------------------------------------------------------------- several models


def test_a_folder_stands_for_the_models_in_it(at: Workshop, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    write(outside / "linked.safetensors", model())
    root = at.place / "models"
    for folder in ("sub/deep", ".hidden"):
        (root / folder).mkdir(parents=True)
    for name in ("b.safetensors", "sub/deep/c.safetensors", ".hidden/d.safetensors", ".e.safetensors", "x.bin"):
        shutil.copy(FIXTURES / "vae.safetensors", root / name)
    shutil.copy(FIXTURES / "sd1-legacy.ckpt", root / "sub" / "A.CKPT")
    shutil.copy(FIXTURES / "broken" / "overlap.safetensors", root / "sub" / "broken.sft")
    shutil.copytree(at.folder(name="made"), root / "a-pipeline")
    (at.place / "made" / "model_index.json").unlink()
    shutil.copytree(at.place / "made", root / "sub" / "unlisted")
    (root / "notes.txt").write_text("no model")
    (root / "file-link.safetensors").symlink_to(outside / "linked.safetensors")
    (root / "folder-link").symlink_to(outside)
    (root / "dead.safetensors").symlink_to(outside / "gone")
    (root / "loop").symlink_to(root)
    entries = verified(root, code=3)
    assert [Path(entry["path"]).relative_to(root).as_posix() for entry in entries] == [
        "a-pipeline", "b.safetensors", "dead.safetensors", "file-link.safetensors", "sub/A.CKPT", "sub/broken.sft",
        "sub/deep/c.safetensors", "sub/unlisted",
    ]  # fmt: skip
    assert [entry["container"] for entry in entries] == [
        "diffusers", "safetensors", None, "safetensors", "torch-legacy", None, "safetensors", "diffusers",
    ]  # fmt: skip
    text = cli("verify", root)
    assert text.code == 3
    assert text.out.splitlines()[-1] == "8 models: 5 sound, 1 with findings, 2 not fully checked"


def test_a_lone_component_in_its_folder_is_one_model(at: Workshop) -> None:
    folder = at.folder() / "vae"
    assert one(folder, code=0)["path"] == str(folder)
    assert [entry["path"] for entry in verified(at.place / "model", code=0)] == [str(at.place / "model")]


def test_a_model_that_is_named_twice_is_checked_twice(at: Workshop) -> None:
    path = at.file()
    assert len(verified(path, path, code=0)) == 2


def test_a_name_like_an_option(at: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(at.place)
    at.pickle(without(model(), SD1_IDS), "-o.ckpt")
    result = cli("verify", "--json", "--", "-o.ckpt")
    for found in result.json["models"][0]["findings"]:
        assert cli(*found["mend"]["command"][1:]).code == 0
        Path("-o.fixed.safetensors").unlink()
    assert cli("verify", "--fix", "--", "-o.ckpt").code == 0
    assert names(at.place) == ["-o.ckpt", "-o.fixed.safetensors"]


# ---------------------------------------------------------------- --fix


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def fixture(name: str, at: Workshop, called: str = "model.safetensors") -> Path:
    return Path(shutil.copy(FIXTURES / name, at.place / called))


@pytest.mark.parametrize(
    ("name", "mended"),
    [
        ("sd1-ids-missing.safetensors", "position-ids-missing"),
        ("sd1-ids-fractional.safetensors", "position-ids-wrong"),
        ("sd1-flat-text-encoder.safetensors", "key-dialect"),
        ("sd1-wrapped.safetensors", "key-wrapped"),
        ("clip-ids-unexpected.safetensors", "position-ids-unneeded"),
    ],
)
def test_fix_mends_beside_the_model(name: str, mended: str, at: Workshop) -> None:
    path = fixture(name, at)
    before = path.read_bytes()
    output = at.place / "model.fixed.safetensors"
    entry = one(path, "--fix", code=0)
    assert (entry["path"], entry["output"]) == (str(path), str(output))
    assert [each["id"] for each in entry["mended"]] == [mended]
    assert entry["findings"] == []
    assert path.read_bytes() == before
    assert names(at.place) == ["model.fixed.safetensors", "model.safetensors"]
    assert one(output, code=0)["findings"] == []
    assert cli("fix-clip", path, "-o", at.place / "same.safetensors").code == 0
    assert raw(at.place / "same.safetensors") == raw(output)


def test_fix_leaves_what_isnt_safe(at: Workshop) -> None:
    broken = spoilt(WEIGHT, np.nan) | {SD1_IDS: np.arange(77, dtype=np.float32)[None] * np.float32(0.99)}
    path = at.file(broken, {"sshs_model_hash": "0" * 64, "modelspec.architecture": "stable-diffusion-v2-512"})
    entry = one(path, "--fix", code=1)
    assert {each["id"] for each in entry["mended"]} == {
        "position-ids-wrong", "metadata-hash", "metadata-architecture",
    }  # fmt: skip
    assert ids(entry) == {"value-nan"}
    tensors = raw(entry["output"])
    assert {key: tensors[key] for key in tensors if key != SD1_IDS} == {
        key: value for key, value in raw(path).items() if key != SD1_IDS
    }
    assert tensors[SD1_IDS] == raw(FIXTURES / "sd1-ids-ok.safetensors")[SD1_IDS]
    text = cli("verify", path, "--fix", "--force").out
    assert "mended  position-ids-wrong" in text
    assert f"wrote {entry['output']}" in text
    assert "value-nan" in text


@pytest.mark.parametrize("options", [("--fix",), ("--fix", "--in-place"), ("--fix", "--force")])
def test_without_anything_safe_to_do_nothing_is_written(options: tuple[str, ...], at: Workshop) -> None:
    path = at.file(spoilt(WEIGHT, np.nan))
    before = contents(at.place)
    entry = one(path, *options, code=1)
    assert (entry["output"], entry["mended"], ids(entry)) == (None, [], {"value-nan"})
    assert contents(at.place) == before
    sound = at.file(name="sound.safetensors")
    assert one(sound, *options, code=0)["output"] is None


def test_fix_in_place(at: Workshop) -> None:
    path = fixture("sd1-ids-missing.safetensors", at)
    entry = one(path, "--fix", "--in-place", code=0)
    assert (entry["output"], names(at.place)) == (str(path), ["model.safetensors"])
    assert one(path, code=0)["findings"] == []


def test_fix_replaces_an_output_only_when_it_is_told_to(at: Workshop) -> None:
    path = fixture("sd1-ids-fractional.safetensors", at)
    taken = at.place / "model.fixed.safetensors"
    taken.write_bytes(b"mine")
    result = cli("verify", path, "--fix", "--json")
    (found,) = result.json["models"]
    assert (result.code, found["error"]["kind"], found["output"], taken.read_bytes()) == (4, "exists", None, b"mine")
    assert [each["id"] for each in found["findings"]] == ["position-ids-wrong"]
    other = fixture("sd1-ids-missing.safetensors", at, "other.safetensors")
    failed, mended = cli("verify", path, other, "--fix", "--json").json["models"]
    assert (failed["error"]["kind"], mended["error"], Path(mended["output"]).name) == (
        "exists",
        None,
        "other.fixed.safetensors",
    )
    assert one(path, "--fix", "--force", code=0)["output"] == str(taken)
    assert one(taken, code=0)["findings"] == []


def test_fix_takes_a_folder_and_a_pickle(at: Workshop) -> None:
    flat_folder = at.rewritten(
        "text_encoder/model.safetensors",
        lambda own: {key.removeprefix("text_model."): value for key, value in own.items()},
    )
    before = contents(flat_folder)
    merged = Path(shutil.copy(FIXTURES / "merged.ckpt", at.place))
    folder, file = verified(flat_folder, merged, "--fix", code=0)
    assert (folder["output"], ids(folder)) == (str(at.place / "model.fixed"), set())
    assert (file["output"], file["container"]) == (str(at.place / "merged.fixed.safetensors"), "safetensors")
    assert [each["id"] for each in file["mended"]] == ["position-ids-wrong"]
    assert contents(flat_folder) == before


def test_what_was_written_is_verified_from_the_disk(at: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fixture("sd1-ids-missing.safetensors", at)
    carry_out = command_line.carry_out

    def damaging(*arguments: Any, **options: Any) -> Any:
        report = carry_out(*arguments, **options)
        report.target.write_bytes(report.target.read_bytes()[:-1])
        return report

    monkeypatch.setattr(command_line, "carry_out", damaging)
    assert ids(one(path, "--fix", code=3)) == {"container-corrupt"}


def test_what_is_allowed_isnt_mended(at: Workshop) -> None:
    path = fixture("sd1-ids-missing.safetensors", at)
    entry = one(path, "--fix", "--allow", "position-ids-missing", code=0)
    assert (entry["output"], entry["mended"]) == (None, [])
    assert [each["allowed"] for each in entry["findings"]] == ["allowed"]


# ---------------------------------------------------------------- what is allowed


@pytest.mark.parametrize(
    ("allowed", "covers"),
    [
        ("value-nan", True),
        ("value-nan:*", True),
        (f"value-nan:{WEIGHT}", True),
        ("value-nan:*.out.?.weight", True),
        ("value-nan:unet", True),
        ("value-nan:vae", False),
        ("value-nan:*.bias", False),
        ("value-infinite", False),
    ],
)
def test_allowed_findings_dont_count(allowed: str, covers: bool, at: Workshop) -> None:
    path = at.file(spoilt(WEIGHT, np.nan))
    result = cli("verify", path, "--allow", allowed, "--json")
    assert result.code == (0 if covers else 1)
    (found,) = result.json["models"][0]["findings"]
    assert found["allowed"] == ("allowed" if covers else None)
    assert ("warning: allowed, but not found: " + allowed.partition(":")[0] in result.err) != covers
    assert cli("verify", path, "--allow", allowed, "--quiet").err == ""
    assert ("1 allowed" in cli("verify", path, "--allow", allowed).out) == covers


def test_an_allow_list(at: Workshop) -> None:
    path = at.file(spoilt(WEIGHT, np.nan) | {"junk": np.ones(3, np.float16)})
    listed = at.place / "allow.txt"
    listed.write_text("# ours\n\nvalue-nan *.weight  # a known fault\n  key-unknown junk\nvae-half\n")
    result = cli("verify", path, "--allow-list", listed, "--json")
    assert result.code == 0
    found = {each["id"]: each["allowed"] for each in result.json["models"][0]["findings"]}
    assert found == {"value-nan": "a known fault", "key-unknown": "allowed"}
    assert result.err == "warning: allowed, but not found: vae-half\n"
    listed.write_text("value-nan\nvalue-nam\n")
    failed = cli("verify", path, "--allow-list", listed, "--json")
    assert (failed.code, failed.json["error"]["file"]) == (2, str(listed))


@pytest.mark.parametrize("level", ["note", "never"])
def test_an_allowed_gap_is_a_gap(level: str) -> None:
    broken = FIXTURES / "broken" / "overlap.safetensors"
    result = cli("verify", broken, "--allow", "container-corrupt", "--fail-on", level, "--json")
    assert (result.code, result.json["models"][0]["findings"][0]["allowed"]) == (3, "allowed")


def test_a_baseline_made_elsewhere(at: Workshop) -> None:
    (at.place / "a").mkdir()
    (at.place / "b").mkdir()
    old = at.file(spoilt(WEIGHT, np.nan), name="a/model.safetensors")
    baseline = at.place / "baseline.json"
    baseline.write_text(cli("verify", old, "--json").out)
    same = at.file(spoilt(WEIGHT, np.nan), name="b/model.safetensors")
    entry = one(same, "--baseline", baseline, code=0)
    assert [each["allowed"] for each in entry["findings"]] == ["in the baseline"]
    worse = at.file(spoilt(WEIGHT, np.nan) | {VAE_WEIGHT: spoilt(VAE_WEIGHT, np.inf)[VAE_WEIGHT]},
                    name="b/model.safetensors")  # fmt: skip
    entry = one(worse, "--baseline", baseline, code=1)
    assert {each["id"]: each["allowed"] for each in entry["findings"]} == {
        "value-nan": "in the baseline", "value-infinite": None,
    }  # fmt: skip
    more = spoilt(WEIGHT, np.nan)
    more[WEIGHT] = np.full_like(more[WEIGHT], np.nan)
    assert one(at.file(more, name="b/model.safetensors"), "--baseline", baseline, code=1)["findings"]
    other_name = at.file(spoilt(WEIGHT, np.nan), name="b/other.safetensors")
    assert one(other_name, "--baseline", baseline, code=1)["findings"][0]["allowed"] is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"models": 3}', '{"models": [{"findings": [{}]}]}', "\ud800"])
def test_what_is_no_baseline(content: str, at: Workshop) -> None:
    path = at.place / "baseline.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    result = cli("verify", FIXTURES / "vae.safetensors", "--baseline", path, "--json")
    assert (result.code, result.json["error"]["kind"], result.json["error"]["file"]) == (3, "corrupt", str(path))


# ---------------------------------------------------------------- what is printed


def test_the_report_for_a_person(at: Workshop) -> None:
    path = at.file(without(model(), *(f"{UNET}out.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias"))))
    text = cli("verify", path)
    assert text.code == 1
    assert text.err == ""
    lines = text.out.splitlines()
    assert lines[0].startswith(f"{path}: has findings (sd1, ldm, safetensors; profile ldm;")
    assert lines[0].endswith("4 errors")
    assert sum("weight-missing" in line for line in lines) == 4
    assert "and 1 more; --json names all" in text.out
    assert text.out.count("mend with: sdsurgery replace") == 1
    sound = at.file(name="sound.safetensors")
    assert cli("verify", sound, "--quiet").out == ""
    assert cli("verify", sound, at.pickle(), "--quiet").out == ""
    assert "2 models: 2 sound" in cli("verify", sound, sound).out


HOSTILE = "\x1b[31mred\x07\u202e\u2066\r\n]8;;http://x\x9b"


def test_hostile_names_are_printed_harmlessly(at: Workshop) -> None:
    tensors = model() | {HOSTILE: np.array([np.nan], np.float32), UNET + HOSTILE: np.ones(2, np.float16)}
    path = at.file(tensors, {"modelspec.architecture": HOSTILE})
    result = cli("verify", path)
    assert result.code == 1
    assert "value-nan" in result.out
    assert all(line.isprintable() for line in result.out.split("\n"))
    assert cli("verify", path, "--json").out.isascii()
    assert {each["key"] for each in one(path)["findings"]} == {HOSTILE, UNET + HOSTILE}
    stale = cli("verify", path, "--allow", "value-nan:\x1b[31m\u202e")
    assert all(line.isprintable() for line in stale.err.split("\n"))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("MODEL", "--profile", "nobody"),
        ("MODEL", "--dtype", "int8"),
        ("MODEL", "--fail-on", "always"),
        ("MODEL", "--allow", "no-such-rule"),
        ("MODEL", "--allow", ""),
        ("MODEL", "--in-place"),
        ("MODEL", "--force"),
        ("MODEL", "--signature", "MODEL"),
        ("MODEL", "--key", "MODEL"),
        ("MODEL", "--fix", "--manifest", "MODEL"),
        ("MODEL", "--fix", "--signature", "MODEL", "--key", "MODEL"),
    ],
)
def test_wrong_usage(words: tuple[str, ...]) -> None:
    sound = str(FIXTURES / "vae.safetensors")
    result = cli("verify", *(sound if word == "MODEL" else word for word in words), "--json")
    assert (result.code, result.json["error"]["kind"]) == (2, "usage")


@pytest.mark.parametrize("option", ["--allow-list", "--baseline", "--manifest"])
def test_files_that_arent_there(option: str, tmp_path: Path) -> None:
    result = cli("verify", FIXTURES / "vae.safetensors", option, tmp_path / "none", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "unreadable")


def test_as_a_process(tmp_path: Path) -> None:
    result = shell("verify", FIXTURES / "sd1-ids-wrong-dtype.safetensors", "--profile", "kohya", cwd=tmp_path)
    assert result.code == 1
    assert "warning position-ids-dtype" in result.out
    assert result.err == ""
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- docs


def test_the_docs_list_the_rules() -> None:
    from docs import make_tables

    page, schema = make_tables.VERIFY.read_text("utf-8"), json.loads(make_tables.SCHEMA.read_text("utf-8"))
    assert make_tables.with_rules(page) == page, "run: python docs/make_tables.py"
    assert make_tables.with_ids(json.loads(json.dumps(schema))) == schema, "run: python docs/make_tables.py"
