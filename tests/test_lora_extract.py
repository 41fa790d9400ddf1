"""extract-lora: what comes back is what was put in, as near as any LoRA comes, and read by others as by us."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lora_support as loras
import numpy as np
import pytest
import synthetic
import torch
from conftest import cli, metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_support import Chance, State, chosen, in_file, kohya
from oracle_support import Bench, Case, from_folder
from safetensors.torch import load_file, save_file

import sdsurgery as sd
from sdsurgery.adapters.extracting import Wanted, extracted
from sdsurgery.errors import MismatchError, RefusedError, SurgeryError, UnsupportedError, UsageError
from sdsurgery.merging.torch_engine import TorchEngine
from sdsurgery.models.identify import identify

UNET = "model.diffusion_model."


def model(family: str = "sd1", dtype: str = "float32", seed: int = 0) -> sd.Checkpoint:
    return sd.Checkpoint.from_state_dict(synthetic.model(family, dtype=dtype, seed=seed), {"format": "pt"})


def adapted(checkpoint: sd.Checkpoint, *, convolutions: bool) -> list[Any]:
    """What kohya's trainer adapts, by its own account: the layers of these classes of diffusers' and transformers'."""
    within = ("attentions", "resnets", "downsamplers", "upsamplers") if convolutions else ("attentions",)
    return [
        module
        for module in loras.modules(checkpoint)
        if len(loras.shape_of(module)) > 1
        and any(f".{part}." in module.name for part in (within if module.component == "unet" else ("layers",)))
    ]


def tuned(checkpoint: sd.Checkpoint, rank: int = 2, *, convolutions: bool = False) -> tuple[sd.Checkpoint, State]:
    """A model with a LoRA in it, and the LoRA."""
    chance = Chance(1)
    groups = {
        kohya(checkpoint, module): loras.lora(chance, loras.shape_of(module), rank)
        for module in adapted(checkpoint, convolutions=convolutions)
    }
    file = in_file(groups)
    baked = checkpoint.pipe(sd.BakeLora(sd.Checkpoint.from_state_dict(file)))
    return sd.Checkpoint.from_state_dict({key: tensor.torch() for key, tensor in baked.items()}), file


def groups_of(state: Mapping[str, torch.Tensor]) -> dict[str, State]:
    found: dict[str, State] = {}
    for key, value in state.items():
        module, _, part = key.partition(".")
        found.setdefault(module, {})[part] = value
    return found


@pytest.mark.parametrize(("family", "convolutions"), [("sd1", True), ("sd2", False), ("sdxl", False)])
def test_what_was_baked_comes_back(family: str, convolutions: bool) -> None:
    base = model(family)
    made, put = tuned(base, convolutions=convolutions)
    words: dict[str, Any] = {"conv_rank": 2} if convolutions else {}
    lora = made.pipe(sd.ExtractLora(base, rank=2, dtype="fp32", **words))
    found = groups_of({key: tensor.torch() for key, tensor in lora.items()})
    expected = groups_of(put)
    assert found.keys() == expected.keys()
    for module, tensors in found.items():
        shape = expected[module]["lora_up.weight"].shape[:1] + expected[module]["lora_down.weight"].shape[1:]
        alpha = tensors.pop("alpha").item()
        assert alpha == 2 == len(tensors["lora_down.weight"])
        assert {part: value.shape for part, value in tensors.items()} == {
            part: value.shape for part, value in expected[module].items()
        }
        product = loras.delta(tensors, shape)
        np.testing.assert_allclose(product, loras.delta(expected[module], shape), atol=2e-6, err_msg=module)
    baked = base.pipe(sd.BakeLora(lora))
    for key, value in made.items():
        torch.testing.assert_close(baked[key].torch(), value.torch(), atol=2e-6, rtol=1e-5)


@given(
    st.integers(0, 2**32), st.integers(1, 24), st.integers(1, 24), st.integers(1, 30), st.none() | st.floats(0.01, 1.0)
)
@settings(max_examples=60)
def test_no_matrix_of_that_rank_is_nearer(seed: int, rows: int, columns: int, rank: int, energy: float | None) -> None:
    """NumPy's decomposition in float64 tells the best there is (Eckart and Young), and the least rank for a share."""
    difference = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    zero, whole = (sd.Tensor.of(value) for value in (np.zeros_like(difference), difference))
    bound = min(rank, rows, columns)
    (found,) = extracted([Wanted(whole, zero, bound, energy)], TorchEngine())
    values = np.linalg.svd(difference.astype(np.float64), compute_uv=False)
    squares = np.cumsum(values**2)
    count = bound
    if energy is not None:
        reached = np.nonzero(squares[:bound] >= energy * squares[-1] * (1 - 1e-12))[0]
        count = int(reached[0]) + 1 if len(reached) else bound
    assert abs(found.rank - count) <= (energy is not None and abs(energy - 1) < 1e-9)
    product = (found.up @ found.down).numpy()
    left = np.sqrt((values[found.rank :] ** 2).sum())
    assert np.linalg.norm(difference - product) == pytest.approx(left, abs=1e-5 * values[0])
    assert found.kept == pytest.approx(squares[found.rank - 1], rel=1e-6)
    assert found.total == pytest.approx(squares[-1], rel=1e-9)
    # Both halves carry the root of each value, so that neither is small in fp16.
    np.testing.assert_allclose(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_share_is_kept_with_the_least_rank(rank: int | None) -> None:
    base, other = model(), model(seed=4)
    lora = other.pipe(sd.ExtractLora(base, energy=0.9, rank=rank, component=("text_encoder",)))
    ours, theirs = loras.weights(other), loras.weights(base)
    for module in adapted(other, convolutions=False):
        if module.component == "text_encoder":
            key = (module.component, f"{module.name}.weight")
            squares = torch.linalg.svdvals((ours[key].double() - theirs[key].double()).flatten(1)).square()
            needed = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
            name = kohya(other, module)
            assert len(lora[f"{name}.lora_down.weight"].torch()) == min(needed, rank or needed)
    ranks = {tensor.shape[0] for key, tensor in lora.items() if key.endswith(".lora_down.weight")}
    assert any(key.endswith(".alpha") for key in lora) == (len(ranks) == 1)
    assert lora.metadata["ss_network_dim"] == lora.metadata["ss_network_alpha"] == "Dynamic"


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_reads_it_as_we_do(tmp_path: Path, family: str, naming: str) -> None:
    """Of ranks that differ from layer to layer, too."""
    bench = Bench(tmp_path)
    file, folder = bench.file(Case(family)), bench.folder(Case(family))
    state, chance = load_file(file), Chance(3)
    for key, value in state.items():
        if value.dim() > 1 and value.is_floating_point():
            state[key] = value + 0.02 * chance(*value.shape)
    save_file(state, tmp_path / "tuned.safetensors")
    words = [
        "--energy",
        "0.8",
        "--rank",
        "24",
        "--conv-rank",
        "8",
        "--naming",
        naming,
        "-o",
        tmp_path / "lora.safetensors",
    ]
    done = cli("extract-lora", tmp_path / "tuned.safetensors", folder, *words, "--quiet")
    assert done.code == 0, done.err
    downs = [
        value
        for key, value in load_file(tmp_path / "lora.safetensors").items()
        if ".lora_down" in key or ".lora_A" in key
    ]
    assert len({len(value) for value in downs}) > 3
    assert cli("bake-lora", folder, tmp_path / "lora.safetensors", "-o", tmp_path / "baked", "--quiet").code == 0
    pipe = from_folder(folder)
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    ours, before = loras.weights(sd.open(tmp_path / "baked")), loras.weights(sd.open(folder))
    changed = 0
    for component in ("unet", "text_encoder", "text_encoder_2"):
        theirs = getattr(pipe, component).state_dict() if hasattr(pipe, component) else {}
        for name, expected in theirs.items():
            key = next(k for k in ((component, name), (component, f"text_model.{name}")) if k in ours)
            loras.assert_close(ours[key], expected.double(), bits=20, name=key)
            changed += not torch.equal(ours[key], before[key])
    assert changed == len(downs)


def test_what_is_alike_is_left_out_and_what_cant_be_held_is_told() -> None:
    base = model()
    (layer,) = chosen(base, ("mlp.fc1",))
    key, norm = layer.spots["weight"].key, f"{UNET}out.0.weight"
    state = {name: tensor.torch() for name, tensor in base.items()}
    state[key], state[norm] = state[key] + torch.ones_like(state[key]), state[norm] + 1
    found = sd.Checkpoint.from_state_dict(state).pipe(sd.ExtractLora(base))
    assert {name.partition(".")[0] for name in found} == {kohya(base, layer)}
    (note,) = [note for note in found.notes if note.level == "warning"]
    assert norm in note.message
    assert note.message.startswith("1 weights")


def test_layouts_mix(tmp_path: Path) -> None:
    base = model("sdxl")
    made, _ = tuned(base)
    base.save(tmp_path / "base.safetensors")
    assert cli("convert", tmp_path / "base.safetensors", tmp_path / "base", "--quiet").code == 0
    parts = ("text_encoder", "text_encoder_2")  # whose layers lie differently in the two
    one = made.pipe(sd.ExtractLora(base, rank=2, component=parts))
    two = made.pipe(sd.ExtractLora(tmp_path / "base", rank=2, component=parts))
    assert list(one) == list(two) != []
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_the_file_is_a_lora_for_others_and_the_same_each_time(tmp_path: Path) -> None:
    base = model("sdxl", "float16")
    made, _ = tuned(base)
    base.save(tmp_path / "base.safetensors")
    made.save(tmp_path / "tuned.safetensors")
    for name in ("one", "two"):
        words = ["--rank", "2", "--conv-rank", "1", "-o", tmp_path / f"{name}.safetensors"]
        done = cli("extract-lora", tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", *words)
        assert done.code == 0, done.err
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    about = metadata(tmp_path / "one.safetensors")
    (step,) = json.loads(about.pop("sdsurgery"))["steps"]
    assert step["family"] == "sdxl"
    assert [source["name"] for source in step["inputs"]] == ["base.safetensors"]
    assert json.loads(about.pop("ss_network_args")) == {"conv_dim": "1", "conv_alpha": "1"}
    assert about == {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "1024x1024",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "tuned since base",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_alpha": "2",
        "ss_network_dim": "2",
        "ss_network_module": "networks.lora",
        "ss_v2": "False",
    }
    tensors = load_file(tmp_path / "one.safetensors")
    assert {value.dtype for key, value in tensors.items() if not key.endswith(".alpha")} == {torch.float16}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight" in tensors
    assert "lora_te2_text_model_encoder_layers_31_self_attn_q_proj.lora_down.weight" in tensors
    assert "lora_unet_input_blocks_0_0.lora_down.weight" not in tensors  # which kohya's trainer doesn't adapt


def test_neither_model_is_ever_written_over(tmp_path: Path) -> None:
    base = model()
    made, _ = tuned(base)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("base", "tuned")}
    base.save(files["base"])
    made.save(files["tuned"])
    before = {name: file.read_bytes() for name, file in files.items()}
    for file in files.values():
        assert cli("extract-lora", files["tuned"], files["base"], "-o", file, "--force").code == 4
    assert cli("extract-lora", files["tuned"], files["base"], "--in-place").code == 2
    assert {name: file.read_bytes() for name, file in files.items()} == before
    assert cli("extract-lora", files["tuned"], files["base"]).code == 0
    assert (tmp_path / "tuned.lora.safetensors").exists()


def refused(kind: type[SurgeryError], checkpoint: sd.Checkpoint, *given: Any, **words: Any) -> SurgeryError:
    with pytest.raises(kind) as error:
        checkpoint.pipe(sd.ExtractLora(*given, **words))
    return error.value


def test_models_that_dont_fit_are_refused() -> None:
    base = model()
    assert "in nothing that a LoRA would hold" in refused(MismatchError, base, base).message
    assert "it is sdxl" in refused(MismatchError, base, model("sdxl")).message
    wide = synthetic.model("sd1", synthetic.Widths((8, 8, 12, 12), 8, vae=(2, 4, 6, 6), clip=8, vocabulary=64))
    assert (
        "in the first model, and has the shape"
        in refused(MismatchError, base, sd.Checkpoint.from_state_dict(wide)).message
    )
    vae = sd.Checkpoint({key: tensor for key, tensor in base.items() if key.startswith("first_stage_model.")})
    assert "it has no" in refused(MismatchError, vae, base).message
    assert "it has no text_encoder_2" in refused(MismatchError, base, base, component=("text_encoder_2",)).message
    unet = sd.Checkpoint({key: tensor for key, tensor in base.items() if key.startswith(UNET)})
    lora = unet.pipe(sd.ExtractLora(model(seed=1), rank=1))
    assert all(key.startswith("lora_unet_") for key in lora)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_difference_that_is_no_number_is_refused(value: float) -> None:
    base = model()
    (layer,) = chosen(base, ("mlp.fc1",))
    state = {name: tensor.torch() for name, tensor in base.items()}
    state[layer.spots["weight"].key][0, 0] = value
    message = refused(RefusedError, sd.Checkpoint.from_state_dict(state), base).message
    assert layer.spots["weight"].key in message


def test_what_fp16_cant_hold_is_refused() -> None:
    base = model()
    (layer,) = chosen(base, ("mlp.fc1",))
    key = layer.spots["weight"].key
    state = {name: tensor.torch() for name, tensor in base.items()}
    state[key] = state[key] + 1e12
    other = sd.Checkpoint.from_state_dict(state)
    assert "can't hold" in refused(RefusedError, other, base).message
    assert len(other.pipe(sd.ExtractLora(base, dtype="fp32"))) == 3


def test_elements_that_cant_be_computed_with() -> None:
    base = model()
    (layer,) = chosen(base, ("mlp.fc1",))
    state = {name: tensor.torch() for name, tensor in base.items()}
    state[layer.spots["weight"].key] = torch.zeros(32, 8, dtype=torch.int64)
    refused(UnsupportedError, base, sd.Checkpoint.from_state_dict(state))


@pytest.mark.parametrize("words", [{"rank": 0}, {"conv_rank": -1}, {"energy": 0.0}, {"energy": 1.1}])
def test_numbers_that_make_no_sense(words: dict[str, Any]) -> None:
    refused(UsageError, model(), model(), **words)


def test_a_family_that_isnt_told_gets_no_version() -> None:
    base, other = ({key: t for key, t in model(seed=seed).items() if key.startswith(UNET)} for seed in (0, 1))
    bare = [sd.Checkpoint({key.removeprefix(UNET): tensor for key, tensor in each.items()}) for each in (base, other)]
    lora = bare[1].pipe(sd.ExtractLora(bare[0], rank=1))
    known = identify(bare[1]).base_family != "unknown"
    assert ("ss_base_model_version" in lora.metadata) == known
