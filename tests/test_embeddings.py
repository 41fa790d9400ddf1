"""Embeddings: read in every format, converted without a changed bit, told, verified; and loaded by diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import cli, metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sdsurgery as sd
from sdsurgery.dtypes import BY_NAME
from sdsurgery.errors import HostileError, MismatchError, RefusedError, UnsupportedError, UsageError
from sdsurgery.inspection.checks.embedding import RULES_APPLIED
from sdsurgery.inspection.rules import RULES
from sdsurgery.models.embeddings import find
from sdsurgery.sources import InMemory

State = dict[str, torch.Tensor]
L, G = 8, 12
ABOUT: dict[str, Any] = {"name": "style", "step": 500, "sd_checkpoint": "4bdfc29c", "sd_checkpoint_name": "sd-v1-5"}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def webui(path: Path, vectors: Any, **about: Any) -> Path:
    """As A1111's webui saves one."""
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, **about}, path)
    return path


def put(path: Path, state: State, about: Mapping[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path, dict(about or {}) or None)
    return path


def plain(path: Path) -> Any:
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------- reading


def test_the_webuis_pickle(tmp_path: Path) -> None:
    vectors = numbers(4, 768)
    found = sd.open(webui(tmp_path / "style.pt", vectors, **ABOUT))
    assert [*found] == ["*"]
    assert torch.equal(found["*"].torch(), vectors)
    assert found.metadata == {key: str(value) for key, value in ABOUT.items()}
    assert found.aside == ()


def test_what_isnt_stated_is_nothing(tmp_path: Path) -> None:
    found = sd.open(webui(tmp_path / "style.pt", numbers(4, 768), **dict.fromkeys(ABOUT)))
    assert (found.metadata, found.aside) == ({}, ())


def test_the_authors_pickle_with_a_module_of_parameters(tmp_path: Path) -> None:
    vectors = numbers(2, 768)
    value = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)}),
    }
    torch.save(value, tmp_path / "cat.pt")
    found = sd.open(tmp_path / "cat.pt")
    assert torch.equal(found["*"].torch(), vectors)
    assert found.aside == ()
    written = tmp_path / "out.pt"
    found.pipe(sd.ConvertEmbedding()).save(written)
    assert torch.equal(plain(written)["string_to_param"]["*"], vectors)
    assert plain(written)["name"] == "cat"


def test_what_else_lies_in_the_pickle_is_told(tmp_path: Path) -> None:
    path = webui(tmp_path / "style.pt", numbers(4, 768), **ABOUT | {"step": 1.5, "loss": [1, 2], "notes": "text"})
    found = sd.open(path)
    assert {entry.name for entry in found.aside} == {"step", "loss", "notes"}
    out = cli("convert-embedding", path, "-o", tmp_path / "out.pt", "--json")
    assert out.code == 0
    assert {each["key"] for each in out.json["changes"] if each["kind"] == "dropped"} == {"step", "loss", "notes"}


def test_a_hostile_pickle_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    for number, state in enumerate(({"*": numbers(1, 768), "x": Attack()}, torch.nn.ParameterDict({"*": Attack()}))):
        path = tmp_path / f"{number}.pt"
        torch.save({"string_to_token": {"*": 265}, "string_to_param": state}, path)
        with pytest.raises(HostileError, match="system"):
            sd.open(path)


def test_several_placeholders_are_no_embedding(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": numbers(1, 768), "@": numbers(1, 768)}}, tmp_path / "two.pt")
    assert find(sd.open(tmp_path / "two.pt")) is None


SHAPES: list[tuple[dict[str, tuple[int, ...]], dict[str, str], Any]] = [
    ({"*": (4, 768)}, {}, ("a1111", None, (4,), "sd1")),
    ({"*": (4, 768)}, {"name": "x"}, ("a1111", "x", (4,), "sd1")),
    ({"emb_params": (2, 1024)}, {}, ("kohya", None, (2,), "sd2")),
    ({"emb_params": (2, 8)}, {}, ("kohya", None, (2,), "unknown")),
    ({"<cat>": (768,)}, {}, ("diffusers", "<cat>", (1,), "sd1")),
    ({"<cat>": (3, 8)}, {}, ("diffusers", "<cat>", (3,), "unknown")),
    ({"cat toy": (75, 768)}, {}, ("diffusers", "cat toy", (75,), "sd1")),
    ({"cat": (8,)}, {"name": "cat"}, ("diffusers", "cat", (1,), "unknown")),
    ({"clip_l": (4, 768), "clip_g": (4, 1280)}, {}, ("sdxl", None, (4, 4), "sdxl")),
    ({"clip_g": (4, 1280)}, {}, ("sdxl", None, (4,), "sdxl-refiner")),
    ({"text_encoders_1": (2, 1280), "text_encoders_0": (2, 768)}, {}, ("pti", None, (2, 2), "sdxl")),
    ({"cat": (8,)}, {}, None),
    ({"cat": (76, 768)}, {}, None),
    ({"weight": (4, 768)}, {}, None),
    ({"a.b": (4, 768)}, {}, None),
    ({"*": (1, 4, 768)}, {}, None),
    ({"<cat>": (768,), "<dog>": (768,)}, {}, None),
    ({"clip_l": (4, 768), "emb_params": (4, 768)}, {}, None),
    ({}, {}, None),
]


@pytest.mark.parametrize(("shapes", "about", "expected"), SHAPES, ids=str)
def test_formats(shapes: Any, about: dict[str, str], expected: Any) -> None:
    found = find(sd.Checkpoint.from_state_dict({key: numbers(*shape) for key, shape in shapes.items()}, about))
    assert (found and (found.format, found.token, found.counts, found.family)) == expected


def test_integers_are_no_vectors() -> None:
    assert find(sd.Checkpoint.from_state_dict({"emb_params": np.zeros((2, 768), np.int64)})) is None


# ---------------------------------------------------------------- any format to any other, and back

SINGLE = ("a1111", "kohya", "diffusers", "diffusers.bin")


def made(kind: str, folder: Path, vectors: torch.Tensor, token: str) -> Path:
    """A file of that format, made by others' libraries."""
    if kind == "a1111":
        return webui(folder / "first.pt", vectors, **ABOUT | {"name": token})
    if kind == "kohya":
        return put(folder / "first.safetensors", {"emb_params": vectors}, {"name": token})
    bare = vectors[0].clone() if len(vectors) == 1 else vectors
    if kind == "diffusers":
        return put(folder / "first.safetensors", {token: bare}, {"name": token})
    torch.save({token: bare}, folder / "first.bin")
    return folder / "first.bin"


def same(path: Path, vectors: torch.Tensor) -> sd.Checkpoint:
    """The checkpoint, whose only tensor must be those vectors, to the bit."""
    found = sd.open(path)
    (tensor,) = found.values()
    assert tensor.tobytes() == bytes(vectors.contiguous().view(torch.uint8).numpy())
    assert tensor.dtype is BY_NAME[sd.Tensor.of(vectors).dtype.name]
    assert tensor.shape in {tuple(vectors.shape), tuple(vectors.shape)[1:] if len(vectors) == 1 else ()}
    return found


FIRST = st.sampled_from(SINGLE)
TARGETS = st.tuples(st.sampled_from(["a1111", "diffusers"]), st.sampled_from([".pt", ".safetensors"]))
TOKENS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and text not in {"__metadata__", "*", "emb_params", "clip_l", "clip_g"}
)


@settings(max_examples=60)
@given(
    first=FIRST, targets=st.lists(TARGETS, min_size=1, max_size=3), token=TOKENS, bits=st.randoms(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_any_to_any_and_back_keeps_the_bits(
    first: str, targets: list[tuple[str, str]], token: str, dtype: Any, bits: Any, scratch_folder: Path
) -> None:
    """Whatever the bits are, NaN among them; and name and facts come along."""
    size, count = torch.empty((), dtype=dtype).element_size(), bits.randint(1, 4)
    content = bytearray(bits.randbytes(count * 5 * size))
    vectors = torch.frombuffer(content, dtype=dtype).reshape(count, 5)
    name = f"<{token}>"
    path = made(first, scratch_folder, vectors, name)
    own = "diffusers" if first.startswith("diffusers") else "a1111"
    for number, (to, suffix) in enumerate([*targets, (own, path.suffix)]):
        out = scratch_folder / f"{number}{suffix}"
        same(path, vectors).pipe(sd.ConvertEmbedding(to=to)).save(out, force=True)  # type: ignore[arg-type]
        path = out
    found = same(path, vectors)
    assert found.metadata["name"] == name
    if first == "a1111":
        assert {key: found.metadata[key] for key in ABOUT} == {**{k: str(v) for k, v in ABOUT.items()}, "name": name}
        value = plain(path)
        assert {key: value[key] for key in ABOUT} == ABOUT | {"name": name}
        assert value["string_to_token"] == {"*": 265}
        assert value["string_to_param"]["*"].shape == (count, 5)
    elif path.suffix == ".safetensors":
        assert load_file(path).keys() == {"emb_params"} if own == "a1111" else {name}


@pytest.fixture(scope="module")
def scratch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


def test_vectors_for_two_text_encoders_stay_under_their_names(tmp_path: Path) -> None:
    state = {"text_encoders_0": numbers(2, 768), "text_encoders_1": numbers(2, 1280)}
    out = tmp_path / "out.safetensors"
    assert cli("convert-embedding", put(tmp_path / "x.pti", state), "-o", out).code == 0
    assert {key: value.tolist() for key, value in load_file(out).items()} == {
        "clip_l": state["text_encoders_0"].tolist(),
        "clip_g": state["text_encoders_1"].tolist(),
    }
    for words in (["-o", tmp_path / "out.pt"], ["--to", "diffusers", "-o", tmp_path / "other.safetensors"]):
        refused = cli("convert-embedding", out, *words, "--json")
        kind = "mismatch" if "diffusers" in words else "unsupported"
        assert (refused.code, refused.json["error"]["kind"]) == (3, kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "x.pti"]


def test_other_operations_leave_the_webuis_pickle_one(tmp_path: Path) -> None:
    path = webui(tmp_path / "style.pt", numbers(2, 768), **ABOUT)
    assert cli("cast", path, "fp16", "-o", tmp_path / "half.pt").code == 0
    value = plain(tmp_path / "half.pt")
    assert value["string_to_param"]["*"].dtype is torch.float16
    assert {key: value[key] for key in ABOUT} == ABOUT


def test_a_step_that_is_no_number_stays_in_the_metadata(tmp_path: Path) -> None:
    path = put(tmp_path / "x.safetensors", {"emb_params": numbers(1, 768)}, {"step": "many", "author": "me"})
    cli("convert-embedding", path, "-o", tmp_path / "out.pt")
    value = plain(tmp_path / "out.pt")
    assert (value["step"], value["metadata"]["step"], value["metadata"]["author"]) == (None, "many", "me")
    assert sd.open(tmp_path / "out.pt").metadata["step"] == "many"


def test_tokens_dtypes_and_what_changed_are_recorded(tmp_path: Path) -> None:
    path, out = webui(tmp_path / "style.pt", numbers(1, 768), **ABOUT), tmp_path / "out.safetensors"
    told = cli("convert-embedding", path, "--to", "diffusers", "--token", "<s>", "--dtype", "bf16", "-o", out, "--json")
    assert [(each["key"], each["kind"], each["before"], each["after"]) for each in told.json["changes"]] == [
        ("<s>", "renamed", "*", "<s>"),
        ("<s>", "replaced", "F32[1, 768]", "F32[768]"),
        ("<s>", "cast", "F32", "BF16"),
        ("name", "metadata", "style", "<s>"),
    ]
    assert torch.equal(load_file(out)["<s>"], numbers(1, 768)[0].to(torch.bfloat16))
    (step,) = sd.open(out).pipe(sd.ConvertEmbedding(to="diffusers")).steps
    assert (step.changes, step.notes[0].message) == ((), "it is as diffusers reads it already")
    assert metadata(out)["step"] == "500"


def test_refusals(tmp_path: Path) -> None:
    wide = put(tmp_path / "wide.safetensors", {"emb_params": torch.full((1, 768), 1e6)})
    with pytest.raises(RefusedError, match="beyond F16"):
        sd.open(wide).pipe(sd.ConvertEmbedding(dtype="fp16"))
    with pytest.raises(MismatchError, match="no embedding"):
        sd.Checkpoint.from_state_dict({"a.weight": numbers(2, 2)}).pipe(sd.ConvertEmbedding())
    with pytest.raises(UsageError, match="token"):
        sd.open(wide).pipe(sd.ConvertEmbedding(token=" "))
    with pytest.raises(UsageError, match="comfy"):
        sd.ConvertEmbedding(to="comfy")  # type: ignore[arg-type]
    odd = sd.Checkpoint({"emb_params": sd.Tensor(BY_NAME["F4"], (2, 8), InMemory(bytes(8)))})
    with pytest.raises(UnsupportedError, match="torch can't hold"):
        odd.pipe(sd.ConvertEmbedding()).save(tmp_path / "odd.pt")


# ---------------------------------------------------------------- inspect and verify


def test_inspect_tells_an_embedding(tmp_path: Path) -> None:
    path = webui(tmp_path / "style.pt", numbers(4, 768), **ABOUT)
    evidence = cli("inspect", path, "--json").json["evidence"]
    assert evidence[1:] == [
        "a textual inversion embedding in A1111's format; vectors: 4 of width 768",
        "its token is style",
        "made for sd1",
    ]
    sdxl = put(tmp_path / "sdxl.safetensors", {"clip_l": numbers(2, 768), "clip_g": numbers(2, 1280)})
    text = cli("inspect", sdxl).out
    assert "in SDXL's format; vectors: 2 of width 768 for clip_l, 2 of width 1280 for clip_g" in text
    assert "it says no token" in text
    assert "made for sdxl" in text


SOUND: dict[str, State] = {
    "one": {"emb_params": numbers(4, 768)},
    "two": {"clip_l": numbers(4, 768), "clip_g": numbers(4, 1280)},
    "token": {"<cat>": numbers(1024)},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_embedding_is_sound(name: str, tmp_path: Path) -> None:
    told = cli("verify", put(tmp_path / "x.safetensors", SOUND[name]), "--json")
    assert (told.code, told.json["models"][0]["findings"]) == (0, [])
    assert told.json["models"][0]["family"] == {"one": "sd1", "two": "sdxl", "token": "sd2"}[name]
    assert {*told.json["models"][0]["rules"]} >= {*RULES_APPLIED} - {"dtype-asked", "metadata-hash"}
    assert {rule.id for rule in RULES.values() if rule.group == "embedding"} <= {*RULES_APPLIED}


def _with(value: float) -> torch.Tensor:
    vectors = numbers(4, 768)
    vectors[1, 3] = value
    return vectors


def _zero() -> torch.Tensor:
    vectors = numbers(4, 768)
    vectors[2] = 0
    return vectors


FAULTS: list[tuple[State, str, dict[str, str], int]] = [
    ({"emb_params": _with(float("nan"))}, "value-nan", {"key": "emb_params", "seen": "1"}, 1),
    ({"emb_params": _with(float("-inf"))}, "value-infinite", {"key": "emb_params", "seen": "1"}, 1),
    ({"<cat>": _with(1e6)}, "value-overflow", {"key": "<cat>", "seen": "1"}, 1),
    ({"emb_params": _zero()}, "embedding-zero", {"key": "emb_params", "seen": "1"}, 1),
    ({"emb_params": numbers(4, 320)}, "embedding-width", {"expected": "768 or 1024 or 1280", "seen": "320"}, 1),
    ({"clip_l": numbers(4, 1280), "clip_g": numbers(4, 1280)}, "embedding-width", {"key": "clip_l", "seen": "1280"}, 1),
    ({"clip_l": numbers(3, 768), "clip_g": numbers(4, 1280)}, "embedding-vectors", {"seen": "clip_l 3, clip_g 4"}, 1),
    ({"emb_params": numbers(0, 768)}, "embedding-vectors", {"seen": "emb_params 0"}, 1),
]


@pytest.mark.parametrize(("state", "rule", "facts", "code"), FAULTS, ids=[each[1] for each in FAULTS])
def test_faults(state: State, rule: str, facts: dict[str, str], code: int, tmp_path: Path) -> None:
    told = cli("verify", put(tmp_path / "x.safetensors", state), "--json")
    (finding,) = told.json["models"][0]["findings"]
    assert (told.code, finding["id"]) == (code, rule)
    assert finding["remedy"]
    assert {name: finding[name] for name in facts} == facts


def test_a_pickle_is_mended_by_the_command_that_is_named(tmp_path: Path) -> None:
    path = webui(tmp_path / "style.pt", numbers(4, 768), **ABOUT, extra=[1])
    (entry,) = cli("verify", path, "--dtype", "fp16", "--json").json["models"]
    mends = {each["id"]: each["mend"]["command"] for each in entry["findings"]}
    assert mends.keys() == {"pickle", "non-tensors", "dtype-asked"}
    assert cli(*mends["pickle"][1:]).code == 0
    assert cli("verify", mends["pickle"][-1], "--fail-on", "note").code == 0
    assert cli(*mends["dtype-asked"][1:], "-o", tmp_path / "half.safetensors").code == 0
    assert cli("verify", tmp_path / "half.safetensors", "--dtype", "fp16", "--fail-on", "note").code == 0


def test_a_pickle_of_diffusers_stays_diffusers(tmp_path: Path) -> None:
    torch.save({"<cat>": numbers(768)}, tmp_path / "learned_embeds.bin")
    (finding,) = cli("verify", tmp_path / "learned_embeds.bin", "--json").json["models"][0]["findings"]
    assert cli(*finding["mend"]["command"][1:]).code == 0
    assert load_file(tmp_path / "learned_embeds.fixed.safetensors").keys() == {"<cat>"}


# ---------------------------------------------------------------- diffusers


def _text(width: int, kind: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=16, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return kind(config)


def _tokenizer() -> Any:
    return transformers.CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, merges=[])


def _parts() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4,), layers_per_block=1, cross_attention_dim=8, norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    return {"unet": unet, "vae": vae, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return _parts()


def sd1(parts: Mapping[str, Any]) -> Any:
    text = _text(L, transformers.CLIPTextModel)
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, text_encoder=text, tokenizer=_tokenizer(), **rest)


def learned(tokenizer: Any, encoder: Any, token: str, count: int) -> torch.Tensor:
    """What the text encoder has for the token's vectors."""
    names = [token, *(f"{token}_{number}" for number in range(1, count))]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert len(set(ids)) == count
    assert tokenizer(token, add_special_tokens=False).input_ids == ids[:1]
    found: torch.Tensor = encoder.get_input_embeddings().weight.data[ids]
    return found


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("to", "suffix"), [("a1111", ".pt"), ("diffusers", ".safetensors"), ("diffusers", ".bin")])
def test_diffusers_loads_what_is_written(
    to: str, suffix: str, count: int, parts: Mapping[str, Any], tmp_path: Path
) -> None:
    vectors = numbers(count, L)
    path = webui(tmp_path / "in.pt", vectors, **ABOUT | {"name": "<style>"})
    out = tmp_path / f"out{suffix}"
    assert cli("convert-embedding", path, "--to", to, "-o", out).code == 0
    pipe = sd1(parts)
    pipe.load_textual_inversion(str(tmp_path), weight_name=out.name, local_files_only=True)
    assert torch.equal(learned(pipe.tokenizer, pipe.text_encoder, "<style>", count), vectors)


def test_diffusers_and_we_agree_about_its_own_file(parts: Mapping[str, Any], tmp_path: Path) -> None:
    """From diffusers' format to the webui's: both files teach diffusers the same."""
    vectors = numbers(2, L, seed=3)
    source = put(tmp_path / "learned_embeds.safetensors", {"<cat>": vectors})
    assert cli("convert-embedding", source, "-o", tmp_path / "cat.pt").code == 0
    results = []
    for name in (source.name, "cat.pt"):
        pipe = sd1(parts)
        pipe.load_textual_inversion(str(tmp_path), weight_name=name, local_files_only=True)
        results.append(learned(pipe.tokenizer, pipe.text_encoder, "<cat>", 2))
    assert torch.equal(results[0], results[1])


def test_diffusers_takes_sdxls_vectors_one_by_one(parts: Mapping[str, Any], tmp_path: Path) -> None:
    state = {"text_encoders_0": numbers(2, L), "text_encoders_1": numbers(2, G)}
    out = tmp_path / "out.safetensors"
    assert cli("convert-embedding", put(tmp_path / "x.safetensors", state), "-o", out).code == 0
    pipe = diffusers.StableDiffusionXLPipeline(
        **parts, text_encoder=_text(L, transformers.CLIPTextModel), tokenizer=_tokenizer(),
        text_encoder_2=_text(G, transformers.CLIPTextModelWithProjection), tokenizer_2=_tokenizer(),
    )  # fmt: skip
    vectors = load_file(out)
    pairs = (
        ("clip_l", pipe.text_encoder, pipe.tokenizer, state["text_encoders_0"]),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2, state["text_encoders_1"]),
    )
    for key, encoder, tokenizer, expected in pairs:
        pipe.load_textual_inversion(vectors[key], token="style", text_encoder=encoder, tokenizer=tokenizer)
        assert torch.equal(learned(tokenizer, encoder, "style", 2), expected)
