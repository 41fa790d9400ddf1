"""verify on diffusers folders: tokenizers, index and configs that don't load, held against what the libraries do."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import synthetic
import transformers
from conftest import cli, write
from synthetic import NARROW

from sdsurgery.inspection.rules import RULES
from sdsurgery.models.configs import indented
from sdsurgery.models.tokenizer import tokenizer_files
from sdsurgery.models.tokenizer_reading import clip_tokens

Change = Callable[[Path], object]

INDEX, SINGLE = "model_index.json", "diffusion_pytorch_model.safetensors"
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
FAST, VOCABULARY, MERGES = "tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt"
SPECIAL = "tokenizer/special_tokens_map.json"
TELLING_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


# ---------------------------------------------------------------- folders


class Store:
    """Sound folders that are made once, and copies of them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.sound = cache(self._sound)
        self.is_sound = cache(self._is_sound)

    def _sound(self, family: str) -> Path:
        # As many tokens as CLIP has: narrow models else have fewer.
        tensors = synthetic.model(family, replace(NARROW[family], vocabulary=49408))
        if family == "sdxl":
            tensors = {
                key: value.astype(np.float32) if "first_stage" in key else value for key, value in tensors.items()
            }
        single = write(self._root / f"{family}.safetensors", tensors)
        assert cli("convert", single, self._root / family).code == 0
        return self._root / family

    def _is_sound(self, folder: Path) -> bool:
        return found(folder) == [] and loads(folder)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("folders"))


@dataclass(frozen=True)
class Place:
    store: Store
    root: Path

    def folder(self, change: Change = lambda _: None, family: str = "sd1", name: str = "model") -> Path:
        folder = Path(shutil.copytree(self.store.sound(family), self.root / name))
        change(folder)
        return folder


@pytest.fixture
def at(store: Store, tmp_path: Path) -> Place:
    return Place(store, tmp_path)


def document(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    return found


def put(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def edit(name: str, **fields: Any) -> Change:
    """Fields of a JSON file set; those that are ``...`` taken out."""

    def change(folder: Path) -> None:
        stated = document(folder, name) | fields
        kept = {key: value for key, value in stated.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept), "utf-8")

    return change


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def in_one_line(name: str) -> Change:
    """The same JSON, laid out otherwise."""
    return lambda folder: (folder / name).write_text(json.dumps(document(folder, name)), "utf-8")


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def weights(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    return lambda folder: write(folder / name, change(safetensors.numpy.load_file(folder / name)))


def found(folder: Path) -> list[dict[str, Any]]:
    result = cli("verify", folder, "--json")
    (entry,) = result.json["models"]
    findings: list[dict[str, Any]] = entry["findings"]
    return findings


def about(findings: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(each["id"], each["file"]) for each in findings}


def loads(folder: Path) -> bool:
    """Whether diffusers loads it as a pipeline."""
    diffusers.utils.logging.set_verbosity(50)
    transformers.utils.logging.set_verbosity(50)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    except Exception:
        return False
    return True


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    """A folder with something wrong.

    Attributes:
        rule: What is found.
        file: Where; the only file that anything is found in, unless there is more.
        change: Makes it wrong.
        twin: What may be done instead: nothing is found. Without one, the folder as it was.
        loads: Whether diffusers loads it all the same.
        mend: Whether converting it mends it.
        facts: Of the finding.
        more: What else is found.
        family: Of the model.
    """

    rule: str
    file: str | None
    change: Change
    twin: Change | None = None
    loads: bool = False
    mend: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    more: frozenset[tuple[str, str]] = frozenset()
    family: str = "sd1"


def extended(content: bytes) -> bytes:
    """A ``tokenizer.json`` with one more token."""
    stated = json.loads(content)
    entry = stated["added_tokens"][0] | {"id": 49408, "content": "<mine>"}
    return json.dumps(stated | {"added_tokens": [*stated["added_tokens"], entry]}).encode()


OURS = tokenizer_files("<|endoftext|>", 77)
FAST_OURS, CLIPS = OURS["tokenizer.json"], clip_tokens()
PRETTY = json.dumps(json.loads(FAST_OURS), indent=1).encode()
UNFIT = {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}
LONE = without(FAST)
SQUARE = "text_model.encoder.layers.0.self_attn.k_proj.weight"
TRUNCATED = b"\n".join(OURS["merges.txt"].split(b"\n")[:900])
CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]
EXTRACTOR = ["transformers", "CLIPImageProcessor"]
VISION = ["transformers", "CLIPVisionModelWithProjection"]
PIX2PIX = edit(INDEX, _class_name="StableDiffusionInstructPix2PixPipeline")
OTHER_SCHEDULER = edit(SCHEDULER, _class_name="DDIMScheduler")


def with_checker(folder: Path) -> None:
    """What most folders of SD1 have besides."""
    vision = transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                           num_attention_heads=2, projection_dim=8, image_size=32)  # fmt: skip
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), projection_dim=8)
    checker = diffusers.pipelines.stable_diffusion.StableDiffusionSafetyChecker(config)
    checker.save_pretrained(folder / "safety_checker")
    transformers.CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    edit(INDEX, safety_checker=CHECKER, feature_extractor=EXTRACTOR)(folder)


CASES = [
    # ------------------------------------------------------------ tokenizer
    *(Case("tokenizer", FAST, put(FAST, content), put(FAST, PRETTY), mend=True)
      for content in (b"", b"[]", b"\xff\xfe", FAST_OURS[:5000], b"[" * 9999,
                      json.dumps(json.loads(FAST_OURS) | {"model": UNFIT}).encode())),
    *(Case("tokenizer", VOCABULARY, both(LONE, put(VOCABULARY, content)), LONE, mend=True)
      for content in (b"", b"[]", b'{"a": 1}', OURS["vocab.json"][:5000])),
    *(Case("tokenizer", MERGES, both(LONE, put(MERGES, content)), LONE, mend=True)
      for content in (b"[]", b"\xff", b"#version: 0.2\nq \xc4\xa0\n")),
    *(Case("tokenizer", MERGES, both(LONE, put(MERGES, content)), LONE, mend=True, loads=True)
      for content in (b"", b"#version: 0.2\n", TRUNCATED)),
    *(Case("tokenizer", name, put(name, content), in_one_line(name), mend=True)
      for name in (TOKENIZER, SPECIAL) for content in (b"", b"[]")),
    Case("tokenizer", FAST, put(FAST, b""), without(SPECIAL), mend=True),
    *(Case("tokenizer-old", name, put(name, b""), loads=True, mend=True) for name in (VOCABULARY, MERGES)),
    *(Case("tokenizer-length", TOKENIZER, edit(TOKENIZER, model_max_length=value),
           edit(TOKENIZER, model_max_length=50), loads=True, mend=True)
      for value in (1, -5, True, float("nan"), 77.0, "77", 78, ...)),
    Case("tokenizer-vocabulary", None, put(FAST, extended(FAST_OURS)), loads=True,
         facts={"expected": "49408", "seen": "49409", "component": "text_encoder"}),
    Case("tokenizer-vocabulary", None, both(LONE, put("tokenizer/added_tokens.json", b'{"<mine>": 49408}')),
         both(LONE, put("tokenizer/added_tokens.json", b'{"<|endoftext|>": 49407}')), loads=True,
         facts={"expected": "49408", "seen": "49409"}),
    # ------------------------------------------------------------ index
    *(Case("index-missing", name, edit(INDEX, **{name: pair}), edit(INDEX, **{name: [None, None]}))
      for name, pair in (("safety_checker", CHECKER), ("feature_extractor", EXTRACTOR),
                         ("image_encoder", VISION))),
    Case("index-missing", "image_encoder", edit(INDEX, image_encoder=VISION),
         edit(INDEX, text_encoder_3=VISION), family="sdxl"),
    Case("index-missing", "safety_checker", both(with_checker, without("safety_checker/model.safetensors")),
         with_checker, facts={"seen": "nothing", "expected": "stable_diffusion StableDiffusionSafetyChecker"}),
    Case("index-class", INDEX, edit(INDEX, unet=["diffusers", "UNet2DModel"]),
         edit(INDEX, foo=["diffusers", "UNet2DModel"]), facts={
         "expected": "diffusers UNet2DConditionModel", "seen": "diffusers UNet2DModel", "component": "unet"}),
    Case("index-class", INDEX, edit(INDEX, unet=["transformers", "UNet2DConditionModel"])),
    Case("index-class", INDEX, edit(INDEX, vae=["diffusers", "VQModel"])),
    Case("index-class", INDEX, edit(INDEX, vae=["diffusers", "UNet2DConditionModel"])),
    Case("index-class", INDEX, edit(INDEX, text_encoder=["transformers", "CLIPModel"])),
    Case("index-class", INDEX, edit(INDEX, text_encoder=["transformers", "CLIPTextModelWithProjection"]), loads=True),
    Case("index-class", INDEX, edit(INDEX, text_encoder_2=["transformers", "CLIPTextModel"]), loads=True, family="sdxl",
         facts={"expected": "transformers CLIPTextModelWithProjection"}),
    Case("index-class", INDEX, edit(INDEX, tokenizer=["transformers", "T5Tokenizer"]),
         edit(INDEX, tokenizer=["transformers", "CLIPTokenizerFast"]),
         facts={"expected": "transformers CLIPTokenizer"}),
    *(Case("index-class", INDEX, edit(INDEX, scheduler=value), more=frozenset({("file-unused", "scheduler")}))
      for value in (7, ["diffusers", None], ["diffusers"])),
    Case("index-class", INDEX, edit(INDEX, _class_name="StableDiffusionXLPipeline"),
         edit(INDEX, _class_name="StableDiffusionImg2ImgPipeline"), loads=True, facts={
         "expected": "StableDiffusionPipeline", "seen": "StableDiffusionXLPipeline"}),
    Case("index-class", INDEX, edit(INDEX, _class_name="StableDiffusionXLImg2ImgPipeline"),
         edit(INDEX, _class_name="LatentConsistencyModelPipeline"), loads=True),
    Case("index-class", INDEX, edit(INDEX, _class_name="StableDiffusionPipeline"),
         edit(INDEX, _class_name="StableDiffusionXLImg2ImgPipeline"), loads=True, family="sdxl"),
    *(Case("index-class", INDEX, edit(INDEX, _class_name=value), PIX2PIX)
      for value in (7, ["mine", "Mine"], ...)),
    Case("index-class", SCHEDULER, OTHER_SCHEDULER, both(OTHER_SCHEDULER,
         edit(INDEX, scheduler=["diffusers", "DDIMScheduler"])), loads=True,
         facts={"expected": "PNDMScheduler", "seen": "DDIMScheduler"}),
    Case("index-class", UNET, edit(UNET, _class_name="UNet3DConditionModel"), edit(UNET, _class_name=...), loads=True),
    Case("index-class", TEXT, edit(TEXT, architectures=["BertModel"]),
         edit(TEXT, architectures=["CLIPModel"]), loads=True),
    # ------------------------------------------------------------ configs
    *(Case("config-invalid", file, edit(file, _class_name=value), edit(file, _class_name=...))
      for file in (UNET, VAE, SCHEDULER) for value in (None, 7)),
    Case("config-invalid", INDEX, edit(INDEX, scheduler=["diffusers", "Nonsense"]), both(edit(INDEX,
         scheduler=["diffusers", "EulerDiscreteScheduler"]), edit(SCHEDULER, _class_name="EulerDiscreteScheduler")),
         facts={"seen": "diffusers Nonsense"}),
    Case("config-invalid", UNET, edit(UNET, norm_num_groups=3), edit(UNET, norm_num_groups=2),
         facts={"expected": "a divisor of 4, 8, 12, 12", "seen": "3", "component": "unet"}),
    Case("config-invalid", VAE, edit(VAE, norm_num_groups=4), edit(VAE, norm_num_groups=1), facts={"component": "vae"}),
    Case("config-invalid", UNET, edit(UNET, attention_head_dim=3), edit(UNET, attention_head_dim=2),
         facts={"expected": "a divisor of 4", "seen": "3"}),
    Case("config-invalid", UNET, edit(UNET, attention_head_dim=[4, 3, 4, 4]),
         edit(UNET, attention_head_dim=[4, 8, 6, 4]), facts={"expected": "a divisor of 8", "seen": "3"}),
    Case("config-invalid", UNET, edit(UNET, num_attention_heads=4), edit(UNET, num_attention_heads=None),
         facts={"expected": "null", "seen": "4"}),
    Case("config-invalid", TEXT, edit(TEXT, num_attention_heads=3), edit(TEXT, num_attention_heads=2),
         facts={"expected": "a divisor of 8", "seen": "3", "component": "text_encoder"}),
    Case("config-contradicts", TEXT, edit(TEXT, num_hidden_layers=11), edit(TEXT, num_hidden_layers=12), loads=True,
         facts={"expected": "num_hidden_layers 12", "seen": "num_hidden_layers 11", "component": "text_encoder"}),
    Case("config-contradicts", "text_encoder_2/config.json", edit("text_encoder_2/config.json", num_hidden_layers=20),
         loads=True, family="sdxl"),
]  # fmt: skip
NAMED = [pytest.param(case, id=f"{case.rule}-{number}") for number, case in enumerate(CASES)]


@pytest.mark.parametrize("case", NAMED)
def test_what_is_wrong_is_found_and_its_twin_is_sound(case: Case, at: Place) -> None:
    folder = at.folder(case.change, case.family)
    findings = found(folder)
    assert about(findings) == {(case.rule, case.file), *case.more}
    first = next(each for each in findings if each["id"] == case.rule)
    assert first["severity"] == RULES[case.rule].severity
    assert {name: first[name] for name in case.facts} == case.facts
    assert (first["mend"] is not None) == case.mend
    assert loads(folder) == case.loads
    twin = at.folder(case.twin, case.family, "twin") if case.twin else at.store.sound(case.family)
    assert at.store.is_sound(twin)
    # What diffusers loads is no error, unless it draws something else without a word.
    assert not case.loads or first["severity"] != "error" or case.rule == "config-contradicts" or case.file == MERGES


@pytest.mark.parametrize("case", [each for each in NAMED if each.values[0].mend])  # type: ignore[union-attr]
def test_converting_it_mends_it(case: Case, at: Place) -> None:
    folder = at.folder(case.change, case.family)
    (command,) = {tuple(each["mend"]["command"]) for each in found(folder)}
    before = (folder / (case.file or "")).read_bytes()
    assert command[:3] == ("sdsurgery", "convert", str(folder))
    done = cli(*command[1:])
    assert done.code == 0, done.err
    assert found(Path(command[3])) == []
    assert (folder / (case.file or "")).read_bytes() == before


# ---------------------------------------------------------------- tokenizers that aren't CLIP's


def small(folder: Path) -> None:
    """Another tokenizer than CLIP's, as transformers saves it."""
    ids = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "b</w>": 4, "ab</w>": 5}
    saved = transformers.CLIPTokenizer(vocab=ids, merges=[("a", "b</w>")], model_max_length=77)
    shutil.rmtree(folder / "tokenizer")
    saved.save_pretrained(folder / "tokenizer")


def test_another_tokenizer_is_left_to_its_maker(at: Place) -> None:
    folder = at.folder(small)
    assert about(found(folder)) == {
        ("tokenizer-vocabulary", None),
        ("tokenizer-old", VOCABULARY),
        ("tokenizer-old", MERGES),
    }
    put(VOCABULARY, b"[")(folder)
    broken = [each for each in found(folder) if each["file"] == VOCABULARY]
    assert [(each["id"], each["mend"]) for each in broken] == [("tokenizer-old", None)]
    done = cli("convert", folder, at.root / "out", "--json")
    notes = [note["message"] for note in done.json["steps"][-1]["notes"]] if "steps" in done.json else [done.out]
    assert any("can't be loaded" in note and "isn't CLIP's" in note for note in notes)
    assert any("it is in diffusers' layout already" in note for note in notes)
    assert (at.root / "out" / VOCABULARY).read_bytes() == b"["


def test_a_tokenizer_of_transformers_own_making_is_sound(at: Place) -> None:
    def saved(folder: Path) -> None:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
        shutil.rmtree(folder / "tokenizer")
        tokenizer.save_pretrained(folder / "tokenizer")

    assert {each["severity"] for each in found(at.folder(saved))} == {"note"}  # transformers 5 leaves the old files out


def test_the_broken_file_is_replaced_with_the_models_own_settings(at: Place) -> None:
    folder = at.folder(both(edit(TOKENIZER, pad_token="!"), put(SPECIAL, b"")))
    assert cli("convert", folder, at.root / "out").code == 0
    assert document(at.root / "out", SPECIAL)["pad_token"] == "!"
    assert document(at.root / "out", TOKENIZER)["pad_token"] == "!"


# ---------------------------------------------------------------- sound as the libraries save them


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
def test_what_diffusers_saves_is_sound(options: dict[str, Any], at: Place) -> None:
    loaded = diffusers.DiffusionPipeline.from_pretrained(str(at.folder(with_checker)), local_files_only=True)
    saved = at.root / "saved"
    loaded.save_pretrained(str(saved), **options)
    findings = found(saved)
    assert {each["id"] for each in findings} <= {"tokenizer-old", "pickle", "key-dialect"}
    assert not any(each["severity"] == "error" and each["id"] != "key-dialect" for each in findings)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_whole_folders_are_sound(family: str, at: Place) -> None:
    assert {each["id"] for each in found(at.folder(family=family))} <= {"vae-half"}


# ---------------------------------------------------------------- v-prediction


def sd2(spread: float, at: Place) -> Path:
    tensors = synthetic.model("sd2", replace(NARROW["sd2"], vocabulary=49408), dtype="float32")
    size = tensors[TELLING_BIAS].shape[0]
    tensors[TELLING_BIAS] = np.linspace(-spread, spread, size, dtype=np.float32)
    single = write(at.root / "sd2.safetensors", tensors)
    assert cli("convert", single, at.root / "made").code == 0
    return at.root / "made"


@pytest.mark.parametrize(("spread", "predicts"), [(1.0, "v_prediction"), (0.01, "epsilon")])
def test_a_folder_of_sd2_tells_what_it_predicts(spread: float, predicts: str, at: Place) -> None:
    folder = sd2(spread, at)
    whole = document(folder, SCHEDULER)
    without(SCHEDULER)(folder)
    assert about(found(folder)) == {("config-missing", SCHEDULER)}
    assert cli("convert", folder, at.root / "out").code == 0
    assert whole == document(at.root / "out", SCHEDULER)
    assert whole["prediction_type"] == predicts


def test_what_a_scheduler_states_counts_more_than_a_bias(at: Place) -> None:
    folder = sd2(1.0, at)
    edit(SCHEDULER, prediction_type="epsilon")(folder)
    without(UNET)(folder)
    assert cli("convert", folder, at.root / "out").code == 0
    assert document(at.root / "out", SCHEDULER)["prediction_type"] == "epsilon"


# ---------------------------------------------------------------- weights beyond the config


def test_a_spare_projection_is_no_contradiction(at: Place) -> None:
    spare = weights("text_encoder/model.safetensors",
                    lambda own: own | {"text_projection.weight": own[SQUARE]})  # fmt: skip
    assert {each["id"] for each in found(at.folder(spare))} == {"key-unknown"}


def test_the_layer_of_sd2_that_diffusers_leaves_out_is_no_contradiction(at: Place) -> None:
    def longer(own: dict[str, Any]) -> dict[str, Any]:
        last = {key: value for key, value in own.items() if ".layers.22." in key}
        return own | {key.replace(".22.", ".23."): value for key, value in last.items()}

    folder = at.folder(weights("text_encoder/model.safetensors", longer), "sd2")
    assert {each["id"] for each in found(folder)} == {"key-unknown"}
    assert about(found(at.folder(edit(TEXT, num_hidden_layers=22), "sd2", "other"))) == {("config-contradicts", TEXT)}


def test_a_key_too_many_is_no_contradiction(at: Place) -> None:
    junk = weights("unet/" + SINGLE, lambda own: own | {"junk": np.ones(3, np.float16)})
    assert {each["id"] for each in found(at.folder(junk))} == {"key-unknown"}


# ---------------------------------------------------------------- nothing is a fault of ours


def test_a_scheduler_without_a_class_is_loaded_by_the_index(at: Place) -> None:
    folder = at.folder(edit(SCHEDULER, _class_name=...))
    assert found(folder) == []
    assert loads(folder)
    without(INDEX)(folder)
    assert about(found(folder)) == {("config-missing", INDEX)}
    assert cli("convert", folder, at.root / "out").code == 0
    assert document(at.root / "out", INDEX)["scheduler"] == ["diffusers", "PNDMScheduler"]


@pytest.mark.parametrize("types", ["x", ["AttnDownEncoderBlock2D"] * 4, [None] * 4])
def test_a_vae_of_an_unknown_kind_is_a_gap(types: Any, at: Place) -> None:
    folder = at.folder(edit(VAE, down_block_types=types))
    result = cli("verify", folder, "--json")
    assert result.code == 3
    assert {each["id"] for each in result.json["models"][0]["findings"]} == {"component-unknown"}
    assert "fault" not in cli("convert", folder, at.root / "out").err


@pytest.mark.parametrize(
    ("file", "change"),
    [(TOKENIZER, {"pad_token": "\ud800"}), (SCHEDULER, {"_class_name": "\ud800Scheduler"}), (INDEX, {"x": "\udfff"})],
)
def test_half_a_surrogate_pair_is_written_escaped(file: str, change: dict[str, Any], at: Place) -> None:
    folder = at.folder(both(edit(file, **change), edit(INDEX, scheduler=...), without(SPECIAL)))
    assert cli("verify", folder, "--json").code == 1
    done = cli("convert", folder, at.root / "out")
    assert done.code == 0, done.err
    for name in (file, INDEX):
        json.loads((at.root / "out" / name).read_text("utf-8"))


def test_text_is_written_as_it_is_and_escaped_only_where_it_must() -> None:
    assert indented({"a": "ü</w>"}) == '{\n  "a": "ü</w>"\n}\n'.encode()
    assert indented({"a": "ü\ud800"}) == b'{\n  "a": "\\u00fc\\ud800"\n}\n'


def test_a_folder_of_a_unet_alone_lacks_the_rest(at: Place) -> None:
    folder = at.folder(edit(INDEX, vae=[None, None], text_encoder=[None, None]))
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder")
    assert {each["id"] for each in found(folder)} == {"component-missing"}


DEEP = "@deep"
VALUES: tuple[Any, ...] = (None, [], {}, "x", 1e308, -1, True, DEEP, "\ud800", 0, [None, 1], ["a", "b"], ...)
FUZZED = (INDEX, SCHEDULER, TOKENIZER, SPECIAL, UNET, VAE, TEXT, FAST, VOCABULARY)


def mutations(folder: Path) -> Iterator[tuple[str, str | None, Any]]:
    for file in FUZZED:
        fields = [None, *([] if file == VOCABULARY else document(folder, file))]
        yield from ((file, field, value) for field in fields for value in VALUES)


def mutated(folder: Path, file: str, field: str | None, value: Any) -> bytes:
    stated = document(folder, file) | {field or "": value}
    told = None if value is ... else value
    whole = told if field is None else {key: each for key, each in stated.items() if each is not ...}
    return json.dumps(whole).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).encode()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_no_config_is_a_fault_of_ours(family: str, at: Place, scratch: Path) -> None:
    folder = at.folder(family=family)
    chance = random.Random(family)
    for file, name, value in chance.sample(list(mutations(folder)), 12):
        original = (folder / file).read_bytes()
        (folder / file).write_bytes(mutated(folder, file, name, value))
        for words in (("verify", folder), ("convert", folder, scratch / "out", "--force")):
            result = cli(*words, "--json")
            assert result.code in {0, 1, 3}, (file, name, value, result)
            assert result.json.get("error", {}).get("kind") != "error", (file, name, value, result.out)
        (folder / file).write_bytes(original)
