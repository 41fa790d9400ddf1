"""``sdsurgery parity``: sound formats agree, and of a damaged one the first stage and layer that differ are named."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import FIXTURES, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from oracle_support import Case, State, converted
from parity_support import (
    SD1,
    SDXL,
    Change,
    Models,
    another,
    compared,
    put,
    rolled,
    run,
    scaled,
    transposed,
    zeroed,
)
from skimage.metrics import peak_signal_noise_ratio
from synthetic import SD1_IDS

from sdsurgery.parity.locating import _feeds
from sdsurgery.parity.metrics import as_bytes, compare, compare_pictures, what_is_wrong
from sdsurgery.parity.results import Stage
from sdsurgery.parity.runtimes import Conditioning
from sdsurgery.parity.sampling import Step, Trace
from sdsurgery.parity.tolerances import PROFILES

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
]

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
STAGES = [
    "settings",
    "token ids",
    "text encoder",
    "UNet, step 1 of 2",
    "UNet, step 2 of 2",
    "VAE decoder",
    "VAE encoder",
]
KINDS = {"ldm", "diffusers", "onnx"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("parity"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever becomes of a comparison, its temporary folders go."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def psnrs(found: dict[str, Any]) -> list[float]:
    """Of the stages and pictures that differ at all."""
    return [each["psnr"] for each in (*found["stages"], *found["pictures"]) if each.get("psnr") is not None]


# Agreement


def lone(models: Models, container: str, tmp_path: Path) -> Path:
    file = models.file(SD1)
    if container == "ckpt":
        torch.save(
            {"state_dict": {key: value.half() for key, value in models_state(file).items()}}, tmp_path / "a.ckpt"
        )
        return tmp_path / "a.ckpt"
    return file if container == "ldm" else models.made(file, container)


def models_state(file: Path) -> State:
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("container", ["ldm", "diffusers", "onnx", "ckpt"])
def test_a_lone_model_agrees_with_its_other_formats(models: Models, container: str, tmp_path: Path) -> None:
    given_path = lone(models, container, tmp_path)
    found = compared(given_path)
    assert (found.code, found.document["agrees"]) == (0, True)
    formats = found.document["formats"]
    assert {each["kind"] for each in formats} == KINDS
    assert [each["kind"] for each in formats if each["reference"]] == ["diffusers"]
    kind = "ldm" if container == "ckpt" else container
    assert {each["kind"]: each["path"] for each in formats} == dict.fromkeys(KINDS) | {kind: str(given_path)}
    for each in formats:
        assert each["diverges"] is each["located"] is None
        assert each["ran_on"]
        assert len(each["pictures"]) == 1
        if not each["reference"]:
            assert [stage["stage"] for stage in each["stages"]] == STAGES
            assert min(psnrs(each), default=math.inf) > 100
            assert len(each["pictures"][0]["curve"]) == 2
    assert psnrs(found.of("onnx")), "ONNX Runtime rounds otherwise than torch: figures of no difference are none"


@pytest.mark.parametrize(
    "case",
    [
        Case("sd1", "inpainting"),
        Case("sd1", "pix2pix"),
        Case("sd2", prediction="v_prediction"),
        SDXL,
        Case("sdxl-refiner"),
    ],
    ids=str,
)
def test_every_family_agrees(models: Models, case: Case) -> None:
    found = compared(models.file(case))
    assert found.code == 0, found.document["verdict"]
    pooled = ["text encoder, pooled"] if case.family.startswith("sdxl") else []
    wanted = [*STAGES[:3], *pooled, *STAGES[3:]]
    for kind in ("ldm", "onnx"):
        assert [stage["stage"] for stage in found.of(kind)["stages"]] == wanted


def test_half_precision_agrees_within_its_own_bounds(models: Models) -> None:
    pair = (models.made(models.file(SD1), "diffusers"), models.made(models.file(SD1), "onnx", "--compute", "fp16"))
    found = compared(*pair, "--dtype", "fp16", "--steps", "1")
    assert found.code == 0, found.document["verdict"]
    assert found.document["profile"] == "fp16"
    assert {each["precision"] for each in found.document["formats"]} == {"fp16"}
    assert min(psnrs(found.of("onnx"))) > 35
    strict = compared(*pair, "--dtype", "fp16", "--steps", "1", "--tolerance", "fp32")
    assert (strict.code, strict.component("onnx")) == (1, "text_encoder")


@pytest.mark.parametrize("scheduler", ["euler", "dpmsolver++", "pndm", "model"])
def test_schedulers(models: Models, scheduler: str) -> None:
    file = models.file(SD1)
    found = compared(file, models.made(file, "diffusers"), "--scheduler", scheduler)
    assert found.code == 0, found.document["verdict"]
    assert found.document["settings"]["scheduler"] == scheduler


def test_sizes_prompts_and_the_reference(models: Models, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n  a dog \n\n", "utf-8")
    file = models.file(SD1)
    words = ("--size", "64x72", "--prompt", "a cat", "--prompts", prompts, "--reference", "onnx")
    found = compared(file, models.made(file, "onnx"), *words)
    assert found.code == 0, found.document["verdict"]
    assert [each["kind"] for each in found.document["formats"]] == ["onnx", "ldm"]
    assert [each["reference"] for each in found.document["formats"]] == [True, False]
    told = found.document["settings"]
    assert (told["prompts"], told["width"], told["height"]) == (["a cat", "a dog"], 64, 72)
    assert {stage["picture"] for stage in found.of("ldm")["stages"] if stage["stage"] == "VAE decoder"} == {0, 1}
    assert [each["picture"] for each in found.of("ldm")["pictures"]] == [0, 1]


# Sabotage

BLOCK = "transformer_blocks.0."
LAYERS: dict[str, tuple[Change, str, str]] = {
    "to_q": (
        transposed(f"{UNET}input_blocks.4.1.{BLOCK}attn1.to_q.weight"),
        "unet",
        f"down_blocks.1.attentions.0.{BLOCK}attn1.to_q",
    ),
    "to_k-of-text": (
        zeroed(f"{UNET}input_blocks.4.1.{BLOCK}attn2.to_k.weight"),
        "unet",
        f"down_blocks.1.attentions.0.{BLOCK}attn2.to_k",
    ),
    "norm": (zeroed(f"{UNET}output_blocks.5.0.in_layers.0.weight"), "unet", "up_blocks.1.resnets.2.norm1"),
    "time": (zeroed(f"{UNET}time_embed.2.weight"), "unet", "time_embedding.linear_2"),
    "bias": (rolled(f"{UNET}output_blocks.7.0.out_layers.3.bias"), "unet", "up_blocks.2.resnets.1.conv2"),
    "vae": (another(VAE), "vae_decoder", "post_quant_conv"),
    "vae-attention": (
        transposed(f"{VAE}decoder.mid.attn_1.q.weight"),
        "vae_decoder",
        "decoder.mid_block.attentions.0.to_q",
    ),
    "vae-encoder": (
        rolled(f"{VAE}encoder.down.1.block.0.conv1.weight"),
        "vae_encoder",
        "encoder.down_blocks.1.resnets.0.conv1",
    ),
    "clip": (
        transposed(f"{CLIP}encoder.layers.3.self_attn.q_proj.weight"),
        "text_encoder",
        "encoder.layers.3.self_attn.q_proj",
    ),
    "clip-norm": (zeroed(f"{CLIP}final_layer_norm.weight"), "text_encoder", "final_layer_norm"),
    "places": (rolled(f"{CLIP}embeddings.position_embedding.weight"), "text_encoder", "embeddings.position_embedding"),
    "words": (rolled(f"{CLIP}embeddings.token_embedding.weight"), "text_encoder", "embeddings.token_embedding"),
}
IN_ONNX = ("to_q", "vae-attention", "vae-encoder", "clip", "words")


@pytest.mark.parametrize("fault", LAYERS)
def test_a_damaged_layer_is_named(models: Models, fault: str) -> None:
    change, component, layer = LAYERS[fault]
    bad = models.damaged(SD1, fault, change)
    found = compared(bad, models.made(models.file(SD1), "diffusers"), "--locate")
    assert found.code == 1
    assert (found.component("ldm"), found.located("ldm")) == (component, layer)
    assert found.component("diffusers") is None
    assert layer in found.document["verdict"][0]


@pytest.mark.parametrize("fault", IN_ONNX)
def test_a_damaged_layer_of_a_graph_is_named(models: Models, fault: str) -> None:
    change, component, layer = LAYERS[fault]
    bad = models.made(models.damaged(SD1, fault, change), "onnx")
    found = compared(bad, models.file(SD1), "--reference", "ldm", "--locate")
    assert found.code == 1
    assert (found.component("onnx"), found.located("onnx")) == (component, layer)
    assert found.component("ldm") is None


@pytest.mark.parametrize("fault", ["to_q", "clip", "vae-encoder"])
def test_a_damaged_layer_is_named_between_graphs(models: Models, fault: str) -> None:
    change, component, layer = LAYERS[fault]
    pair = [models.made(file, "onnx") for file in (models.damaged(SD1, fault, change), models.file(SD1))]
    found = compared(*pair, "--reference", pair[1], "--locate")
    _, first = found.document["formats"]
    assert (found.code, first["diverges"]["component"], first["located"]) == (1, component, layer)


SECOND = "conditioner.embedders.1.model."
SDXL_LAYERS: dict[str, tuple[Change, str, str, str]] = {
    "projection": (
        transposed(f"{SECOND}text_projection"),
        "text_encoder",
        "text encoder, pooled",
        "text_encoder_2.text_projection",
    ),
    "second": (
        transposed(f"{SECOND}transformer.resblocks.20.attn.out_proj.weight"),
        "text_encoder",
        "text encoder",
        "text_encoder_2.encoder.layers.20.self_attn.out_proj",
    ),
    "sizes": (transposed(f"{UNET}label_emb.0.2.weight"), "unet", "UNet, step 1 of 2", "add_embedding.linear_2"),
}


@pytest.mark.parametrize(
    ("fault", "kind"), [("projection", "ldm"), ("second", "ldm"), ("sizes", "ldm"), ("projection", "onnx")]
)
def test_a_damaged_layer_of_sdxl_is_named(models: Models, fault: str, kind: str) -> None:
    change, component, stage, layer = SDXL_LAYERS[fault]
    bad, good = models.damaged(SDXL, fault, change), models.file(SDXL)
    pair = (bad, models.made(good, "diffusers")) if kind == "ldm" else (models.made(bad, "onnx"), good)
    found = compared(*pair, *(() if kind == "ldm" else ("--reference", "ldm")), "--locate")
    assert found.code == 1
    assert found.of(kind)["diverges"] == {"component": component, "stage": stage}
    assert found.located(kind) == layer


IDS = torch.arange(77)[None]
BROKEN_IDS = {
    "fractional": IDS * 0.999,
    "zeroed": IDS * 0,
    "out-of-range": IDS * 2,
    "not-a-number": IDS * math.nan,
}


@pytest.mark.parametrize("fault", BROKEN_IDS)
def test_broken_position_ids_are_named(models: Models, fault: str) -> None:
    bad = models.damaged(SD1, f"ids-{fault}", put(SD1_IDS, BROKEN_IDS[fault]))
    found = compared(bad, models.made(models.file(SD1), "diffusers"), "--locate")
    assert (found.code, found.component("ldm")) == (1, "text_encoder")
    assert found.located("ldm") == "embeddings.position_embedding"


def test_position_ids_that_are_only_of_another_type_agree(models: Models) -> None:
    file = models.damaged(SD1, "ids-half", put(SD1_IDS, IDS.half()))
    assert compared(file, models.made(models.file(SD1), "diffusers")).code == 0


def test_position_ids_of_a_wrong_count_cannot_be_run(models: Models) -> None:
    bad = models.damaged(SD1, "ids-short", put(SD1_IDS, IDS[:, :60]))
    done = run(bad, models.made(models.file(SD1), "diffusers"))
    refused(done, 3, "it has 60 position ids", "fix-clip")


@pytest.mark.parametrize(
    ("place", "fields", "told"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("vae/config.json", {"scaling_factor": 0.13025}, "scaling_factor"),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" not in value else "",
)
def test_another_setting_is_named(models: Models, place: str, fields: dict[str, Any], told: str) -> None:
    folder = models.edited(SD1, told, place, **fields)
    found = compared(folder, models.file(SD1), "--reference", "ldm", "--locate")
    assert (found.code, found.component("diffusers"), found.located("diffusers")) == (1, "settings", None)
    assert told in found.document["verdict"][0]
    (picture,) = found.of("diffusers")["pictures"]
    assert picture["refusal"], "the setting has no part in the picture"


def test_the_last_step_is_the_last_that_the_scheduler_takes(models: Models) -> None:
    """PNDM asks the network once more than it has steps."""
    found = compared(
        models.file(SD1), models.made(models.file(SD1), "diffusers"), "--scheduler", "pndm", "--steps", "4"
    )
    names = [stage["stage"] for stage in found.of("ldm")["stages"] if stage["component"] == "unet"]
    assert names == ["UNet, step 1 of 5", "UNet, step 3 of 5", "UNet, step 5 of 5"]


def test_the_step_that_differs_is_the_one_looked_into() -> None:
    steps = [
        Step(number, 100.0 - number, torch.full((2, 4, 8, 8), float(number)), torch.zeros(1)) for number in range(5)
    ]
    record = cast("Any", SimpleNamespace(traces=[Trace(steps)], given=[Conditioning(torch.zeros(2, 77, 8))]))
    for number in (0, 2, 4):
        feed = _feeds(record, record, Stage("unet", "UNet", 0, step=number))["unet"]
        assert (float(feed["timestep"]), float(feed["sample"].mean())) == (100.0 - number, number)


def test_which_steps_a_scheduler_takes_is_no_fault(models: Models) -> None:
    """No single file tells: all take the reference's."""
    fields = {"timestep_spacing": "trailing", "steps_offset": 0}
    folder = models.edited(SD1, "spacing", "scheduler/scheduler_config.json", **fields)
    for reference in ("ldm", "diffusers"):
        assert compared(folder, models.file(SD1), "--reference", reference).code == 0


@pytest.mark.parametrize(
    ("place", "fields", "component"),
    [
        ("unet/config.json", {"attention_head_dim": 4}, "unet"),
        ("text_encoder/config.json", {"num_attention_heads": 2}, "text_encoder"),
        ("text_encoder/config.json", {"num_hidden_layers": 11}, "text_encoder"),
    ],
    ids=["unet-heads", "clip-heads", "clip-layers"],
)
def test_a_config_that_no_weight_contradicts_is_found(
    models: Models, place: str, fields: dict[str, Any], component: str
) -> None:
    folder = models.edited(SD1, next(iter(fields)), place, **fields)
    found = compared(folder, models.file(SD1), "--reference", "ldm")
    assert (found.code, found.component("diffusers")) == (1, component)


@pytest.mark.parametrize("kind", ["diffusers", "onnx"])
def test_overflow_in_half_precision_is_named(models: Models, kind: str) -> None:
    """In torch: ONNX Runtime computes in fp32 on a CPU whatever a graph wants, and nothing overflows."""
    bad = models.damaged(SD1, "overflow", scaled(f"{UNET}middle_block.0.in_layers.2.weight", 1e6))
    found = compared(
        bad, models.made(models.file(SD1), kind), "--dtype", "fp16", "--steps", "1", "--reference", kind, "--locate"
    )
    assert (found.code, found.component("ldm")) == (1, "unet")
    assert found.located("ldm") == "mid_block.resnets.0.conv1"
    (picture,) = found.of("ldm")["pictures"]
    assert "NaN or Inf" in picture["refusal"]


def test_what_holds_in_single_precision_overflows_in_half(models: Models) -> None:
    bad = models.damaged(SD1, "overflow", scaled(f"{UNET}middle_block.0.in_layers.2.weight", 1e6))
    pair = (bad, models.made(bad, "diffusers"), "--steps", "1")
    assert compared(*pair).code == 0
    half = compared(*pair, "--dtype", "fp16")
    assert half.code == 1
    assert all("NaN or Inf" in each["pictures"][0]["refusal"] for each in half.document["formats"])


def test_two_models_are_told_apart_by_their_names(models: Models) -> None:
    bad = models.damaged(SD1, "to_q", LAYERS["to_q"][0])
    found = compared(models.file(SD1), bad, "--locate", "--reference", models.file(SD1))
    assert found.code == 1
    assert [each["reference"] for each in found.document["formats"]] == [True, False]
    assert [bool(each["diverges"]) for each in found.document["formats"]] == [False, True]
    assert bad.name in found.document["verdict"][0]
    assert found.document["formats"][1]["located"] == LAYERS["to_q"][2]


# Bad input


def refused(done: Result, code: int, *told: str) -> None:
    """It ends with a message of ours and that exit code."""
    assert done.code == code, done.err or done.out[-500:]
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "a fault in sdsurgery itself" not in done.err
    for each in told:
        assert each in done.err, done.err


def test_what_is_no_model_is_refused(models: Models, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no model", "utf-8")
    refused(run(FIXTURES / "vae.safetensors"), 3, "only whole models draw pictures")
    refused(run(text), 3, "notes.txt")
    refused(run(tmp_path / "missing.safetensors"), 3, "missing.safetensors")
    refused(run(models.file(SD1), tmp_path / "missing.safetensors"), 3, "missing.safetensors")


def test_models_that_cannot_be_compared_are_refused(models: Models) -> None:
    file = models.file(SD1)
    refused(run(file, models.file(SDXL)), 3, "different families: sd1, sdxl")
    refused(run(file, file), 2, "named twice")
    refused(run(file, models.made(file, "diffusers"), "--reference", "onnx"), 2, "'onnx' is none of what is compared")


def test_settings_that_make_no_sense_are_refused(models: Models, tmp_path: Path) -> None:
    file = models.file(SD1)
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n", "utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    refused(run(file, "--size", "63x64"), 2, "a width of 63 pixels", "multiple of 8")
    refused(run(file, "--size", "64x0"), 2, "a height of 0 pixels")
    refused(run(file, "--size", "large"), 2, "'large' is no size")
    refused(run(file, "--steps", "0"), 2, "0 steps draw nothing")
    refused(run(file, "--prompts", empty), 2, "there is no prompt")
    refused(run(file, "--prompts", binary), 2, "binary.txt can't be read")
    refused(run(file, "--prompts", tmp_path / "none.txt"), 2, "none.txt can't be read")


def test_a_missing_gpu_is_named(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run(models.file(SD1), "--device", "cuda")
    refused(done, 3, "leave --device cuda out")
    assert "without CUDA" in done.err or "no GPU" in done.err


def replaced(place: Path, content: str) -> None:
    """Write a file of a folder whose files are links."""
    place.unlink()
    place.write_text(content, "utf-8")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_tokenizer_files_are_named(models: Models, content: str) -> None:
    folder = models.edited(SD1, f"tokenizer-{len(content)}", "vae/config.json")
    for name in ("tokenizer.json", "vocab.json"):  # which of them is read is up to the version of transformers
        replaced(folder / "tokenizer" / name, content)
    refused(run(folder, models.file(SD1)), 3, f"{folder.name}/tokenizer: it can't be read")


@pytest.mark.parametrize("content", ["{", "[]", "null"])
@pytest.mark.parametrize("place", ["scheduler/scheduler_config.json", "vae/config.json"])
def test_a_config_that_is_no_json_is_named(models: Models, place: str, content: str) -> None:
    folder = models.edited(SD1, f"broken-{content[:1]}-{place[0]}", "unet/config.json")
    replaced(folder / place, content)
    refused(run(folder, models.file(SD1)), 3, Path(place).name)


def test_other_tokens_are_a_stage_of_their_own(models: Models) -> None:
    folder = models.edited(SD1, "tokens", "vae/config.json")
    for name in ("tokenizer.json", "vocab.json"):
        document = json.loads((folder / "tokenizer" / name).read_text("utf-8"))
        words = document if name == "vocab.json" else document["model"]["vocab"]
        words["red</w>"], words["blue</w>"] = words["blue</w>"], words["red</w>"]
        replaced(folder / "tokenizer" / name, json.dumps(document))
    found = compared(folder, models.file(SD1), "--reference", "ldm", "--prompt", "a red circle")
    assert (found.code, found.component("diffusers")) == (1, "tokens")
    stages = {stage["stage"]: stage["refusal"] for stage in found.of("diffusers")["stages"]}
    assert {name for name, refusal in stages.items() if refusal} == {"token ids"}, "what follows is fed the same"


def test_a_damaged_graph_is_named(models: Models, tmp_path: Path) -> None:
    folder = converted(models.file(SD1), tmp_path / "graphs", "--to", "onnx")
    graph = folder / "unet/model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[: len(content) // 2])
    refused(run(folder, models.file(SD1)), 3, "unet")


def test_weights_that_a_folder_lacks_are_named(models: Models) -> None:
    folder = models.edited(SD1, "widths", "unet/config.json", cross_attention_dim=32)
    refused(run(folder, models.file(SD1)), 3)


def test_a_failure_inside_every_runtime_is_told() -> None:
    """The fixture knows 64 tokens, and prompts have others."""
    done = run(FIXTURES / "sd1-ids-ok.safetensors")
    assert done.code == 1
    assert "diverges at: text encoder: it fails" in done.out
    assert "Traceback" not in done.err


# Figures

VALUES = st.floats(-1e6, 1e6, width=32)
SHAPES = arrays.array_shapes(min_dims=1, max_dims=4, max_side=5)
ARRAYS = arrays.arrays(np.float32, SHAPES, elements=VALUES)
PAIRS = SHAPES.flatmap(
    lambda shape: st.tuples(*[arrays.arrays(np.float32, shape, elements=VALUES) for _each in range(2)])
)


@given(ARRAYS)
def test_an_array_equals_itself(array: np.ndarray[Any, Any]) -> None:
    found = compare(array, array.copy())
    assert (found.finite, found.relative_l2, found.psnr, found.maximum) == (True, 0, math.inf, 0)
    assert found.correlation == pytest.approx(1)
    assert PROFILES["fp32"].refusal(found) is None


@given(PAIRS)
def test_figures_against_their_definitions(pair: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> None:
    a, b = (each.astype(np.float64) for each in pair)
    found, back = compare(*pair), compare(*pair[::-1])
    assert found.maximum == back.maximum == np.abs(a - b).max()
    assert found.correlation == pytest.approx(back.correlation)
    assert -1.000001 <= found.correlation <= 1.000001
    gap = np.sqrt(((a - b) ** 2).sum())
    if gap and b.any():
        assert found.relative_l2 == pytest.approx(gap / np.sqrt((b**2).sum()), rel=1e-9)
        theirs = peak_signal_noise_ratio(b, a, data_range=np.abs(b).max())
        assert found.psnr == pytest.approx(theirs, abs=1e-6)


@given(PAIRS, st.floats(2**-10, 2**10))
def test_figures_know_no_unit(pair: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], factor: float) -> None:
    a, b = (each.astype(np.float64) for each in pair)
    one, other = compare(a, b), compare(a * factor, b * factor)
    assert other.relative_l2 == pytest.approx(one.relative_l2, rel=1e-6)
    assert other.psnr == pytest.approx(one.psnr, abs=1e-4)
    assert other.maximum == pytest.approx(one.maximum * factor)


def test_known_figures() -> None:
    found = compare(np.array([1.0, 2.0, 2.5]), np.array([1.0, 2.0, 2.0]))
    assert found.relative_l2 == pytest.approx(0.5 / 3)
    assert found.maximum == 0.5
    assert found.psnr == pytest.approx(20 * math.log10(2 / (0.5 / math.sqrt(3))))
    assert compare(np.array([1.0, 2.0]), np.array([2.0, 1.0])).correlation == pytest.approx(-1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_figures(value: float) -> None:
    good, bad = np.ones(4), np.array([1, 1, 1, value])
    for pair in ((good, bad), (bad, good), (bad, bad)):
        found = compare(*pair)
        assert not found.finite
        assert all(map(math.isnan, (found.relative_l2, found.correlation, found.psnr, found.maximum)))
        assert PROFILES["bf16"].refusal(found) == "NaN or Inf"


def test_constant_arrays() -> None:
    zeros, ones = np.zeros(4), np.ones(4)
    assert compare(zeros, zeros).correlation == 1
    assert compare(zeros, ones) == compare(zeros, ones)
    off = compare(ones, zeros)
    assert off.correlation == 0
    assert (off.relative_l2, off.psnr) == (math.inf, -math.inf)
    assert PROFILES["bf16"].refusal(off)
    with pytest.raises(ValueError, match="can't be compared"):
        compare(zeros, np.zeros(5))


PICTURES = st.integers(1, 3).flatmap(
    lambda side: st.tuples(
        *[arrays.arrays(np.float64, (8 * side, 8, 3), elements=st.floats(0, 1)) for _each in range(2)]
    )
)


@settings(max_examples=40)
@given(PICTURES)
def test_figures_of_pictures(pair: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> None:
    found, back = compare_pictures(*pair), compare_pictures(*pair[::-1])
    assert found == back
    a, b = pair
    if (a - b).any() and ((a - b) ** 2).mean():
        assert found.psnr == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.0))
    assert (found.maximum > 0) == (found.differing > 0) == (as_bytes(a) != as_bytes(b)).any()
    same = compare_pictures(a, a)
    assert (same.psnr, same.differing, same.maximum) == (math.inf, 0, 0)
    assert same.ssim == pytest.approx(1)


def test_known_figures_of_pictures() -> None:
    black, marked = np.zeros((8, 8, 3)), np.zeros((8, 8, 3))
    marked[0, 0, 1] = 1
    found = compare_pictures(marked, black)
    assert (found.maximum, found.differing) == (255, 1 / 64)
    assert found.psnr == pytest.approx(10 * math.log10(192))
    assert compare_pictures(np.ones((8, 8, 3)), black).psnr == 0
    assert list(as_bytes(np.array([-1, 0, 0.5, 1, 2]))) == [0, 0, 128, 255, 255]


def test_what_is_no_picture() -> None:
    grey = np.full((8, 8, 3), 0.5)
    assert what_is_wrong(np.zeros((8, 8, 3))) == "it is black"
    assert what_is_wrong(np.full((8, 8, 3), -3.0)) == "it is black"
    assert what_is_wrong(grey) == what_is_wrong(np.full((8, 8, 3), [0.1, 0.5, 0.9])) == "it is of one colour"
    assert what_is_wrong(np.where(np.arange(192).reshape(8, 8, 3) < 3, math.inf, grey)) == (
        "3 of its 192 values are NaN or Inf"
    )
    assert what_is_wrong(np.linspace(0, 1, 192).reshape(8, 8, 3)) is None


def test_coarser_profiles_allow_more() -> None:
    fine, half, coarse = (PROFILES[name] for name in ("fp32", "fp16", "bf16"))
    assert fine.tensor > half.tensor > coarse.tensor
    assert fine.picture > half.picture > coarse.picture
    assert fine.relative < half.relative < coarse.relative
    reference = np.linspace(-1, 1, 1000)
    for profile in (fine, half, coarse):
        noise = 10 ** (-profile.tensor / 20) * np.where(np.arange(1000) % 2, 1, -1)
        assert profile.refusal(compare(reference + 0.9 * noise, reference)) is None
        assert "dB" in (profile.refusal(compare(reference + 1.1 * noise, reference)) or "")
