"""bake-lora: against diffusers and PEFT at run time, against definitions in float64, and what it must not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import lora_support as loras
import numpy as np
import peft
import pytest
import synthetic
import torch
from conftest import FIXTURES, cli, metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_support import CONVOLUTION, LINEAR, Chance, State, assert_close, chosen, in_file, kohya
from oracle_support import Bench, Case, from_folder
from safetensors.torch import load_file, save_file

import sdsurgery as sd
from sdsurgery.adapters.fitting import fit
from sdsurgery.adapters.naming import KOHYA_PREFIXES, names_in
from sdsurgery.adapters.reading import read
from sdsurgery.errors import MismatchError, RefusedError, SurgeryError, UnsupportedError, UsageError
from sdsurgery.models.canonical import canonical
from sdsurgery.models.identify import identify

UNET, CLIP = "model.diffusion_model.", "cond_stage_model.transformer."
FAMILIES = ("sd1", "sd2", "sdxl")
QUERY = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
QUERY_LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("lora"))


def model(family: str = "sd1", dtype: str = "float32", inputs: int = 4) -> sd.Checkpoint:
    return sd.Checkpoint.from_state_dict(synthetic.model(family, dtype=dtype, inputs=inputs), {"format": "pt"})


def put(path: Path, state: State, about: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path, about)
    return path


def a_lora(checkpoint: sd.Checkpoint, seed: int = 0, alpha: float | None = 2.0) -> State:
    """A LoRA of one layer of each kind."""
    chance = Chance(seed)
    needles = (
        "attn1.to_q",
        "attn2.to_k",
        "resnets.0.conv1",
        "mlp.fc1",
    )
    groups = {kohya(checkpoint, m): loras.lora(chance, loras.shape_of(m)) for m in chosen(checkpoint, needles)}
    return in_file(groups, alpha)


# ---------------------------------------------------------------- diffusers and PEFT


def trained(model_: Any, config: Any) -> Any:
    """A module with an adapter whose matrices are random."""
    model_.add_adapter(config)
    chance = Chance(5)
    for name, value in model_.named_parameters():
        if "lora_" in name:
            value.data = chance(*value.shape)
    return model_


def config_of(targets: list[str], **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, **more)


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def kohya_file(pipe: Any, checkpoint: sd.Checkpoint, path: Path) -> Path:
    """All that kohya's trainer adapts, convolutions among it."""
    chance, groups = Chance(1), {}
    for module in loras.modules(checkpoint):
        shape = loras.shape_of(module)
        if len(shape) > 1 and any(f".{part}." in module.name for part in ("attentions", "resnets", "layers")):
            groups[kohya(checkpoint, module)] = loras.lora(chance, shape)
    return put(path, in_file(groups, 2.0))


def diffusers_file(pipe: Any, _checkpoint: sd.Checkpoint, path: Path) -> Path:
    """As diffusers itself writes one, with its metadata: an alpha that isn't the rank, and patterns."""
    more = {
        "rank_pattern": {"mid_block.attentions.0.proj_in": 2},
        "alpha_pattern": {"mid_block.attentions.0.proj_in": 7},
    }
    unet = trained(pipe.unet, config_of([*ATTENTION, "mid_block.attentions.0.proj_in"], **more))
    layers = {"unet_lora_layers": peft.get_peft_model_state_dict(unet)}
    about = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            encoder = trained(getattr(pipe, name), config_of(TEXT))
            layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(encoder)
            about[f"{name}_lora_adapter_metadata"] = encoder.peft_config["default"].to_dict()
    pipe.save_lora_weights(path.parent, **layers, **about, weight_name=path.name)
    return path


def old_diffusers_file(pipe: Any, checkpoint: sd.Checkpoint, path: Path) -> Path:
    """As diffusers wrote them before PEFT: names of attention processors, no alpha."""
    chance, found = Chance(2), {}
    for module in loras.modules(checkpoint):
        parent, _, last = module.name.rpartition(".to_")
        old = {"q": "to_q", "k": "to_k", "v": "to_v", "out.0": "to_out"}.get(last)
        if old and parent:
            tensors = loras.lora(chance, loras.shape_of(module))
            for part in ("down", "up"):
                found[f"unet.{parent}.processor.{old}_lora.{part}.weight"] = tensors[f"lora_{part}.weight"]
    return put(path, found)


@pytest.mark.parametrize("made", [kohya_file, diffusers_file, old_diffusers_file])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_baked_is_what_diffusers_fuses(bench: Bench, tmp_path: Path, family: str, made: Callable[..., Path]) -> None:
    folder = bench.folder(Case(family))
    file = made(from_folder(folder), sd.open(folder), tmp_path / "lora.safetensors")
    pipe = from_folder(folder)
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    done = cli("bake-lora", folder, file, "--scale", "0.7", "-o", tmp_path / "out", "--quiet")
    assert done.code == 0, done.err
    ours, before = loras.weights(sd.open(tmp_path / "out")), loras.weights(sd.open(folder))
    changed = 0
    for component in ("unet", "text_encoder", "text_encoder_2"):
        theirs = getattr(pipe, component).state_dict() if hasattr(pipe, component) else {}
        for name, expected in theirs.items():
            key = next(k for k in ((component, name), (component, f"text_model.{name}")) if k in ours)
            assert_close(ours[key], expected.double(), name=key)
            changed += not torch.equal(ours[key], before[key])
    groups = len({key.split(".lora")[0].split("_lora.")[0] for key in load_file(file) if not key.endswith(".alpha")})
    assert changed == groups > 30


def configs() -> dict[str, Any]:
    convolutions = [*ATTENTION, "conv1", "mid_block.attentions.0.proj_in"]
    return {
        "lora": config_of(convolutions, rank_pattern={"conv1": 2}, alpha_pattern={"mid_block.attentions.0.proj_in": 7}),
        "rslora": config_of(convolutions, use_rslora=True),
        "dora": config_of(convolutions, use_dora=True),
        "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=convolutions, init_weights=False),
        "loha tucker": peft.LoHaConfig(
            r=3, alpha=5, target_modules=convolutions, init_weights=False, use_effective_conv2d=True
        ),
        "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=convolutions, init_weights=False),
        "lokr both": peft.LoKrConfig(
            r=1, alpha=5, target_modules=convolutions, init_weights=False, decompose_both=True, decompose_factor=4
        ),
        "lokr tucker": peft.LoKrConfig(
            r=2, alpha=5, target_modules=convolutions, init_weights=False, use_effective_conv2d=True
        ),
        "lokr whole": peft.LoKrConfig(r=64, alpha=16, target_modules=convolutions, init_weights=False),
    }


@pytest.mark.parametrize("kind", configs())
def test_baked_is_what_peft_merges(bench: Bench, tmp_path: Path, kind: str) -> None:
    file = bench.file(Case("sd1"))
    unet = from_folder(bench.folder(Case("sd1"))).unet
    torch.manual_seed(3)
    adapted = peft.get_peft_model(unet, configs()[kind])
    for name, value in adapted.named_parameters():
        if "magnitude" in name:
            value.data *= 1 + 0.2 * torch.rand_like(value)
    adapted.save_pretrained(tmp_path / "unet")
    done = cli("bake-lora", file, tmp_path / "unet", "-o", tmp_path / "out.safetensors")
    assert (done.code, done.err) == (0, "")
    ours, before = loras.weights(sd.open(tmp_path / "out.safetensors")), loras.weights(sd.open(file))
    merged = adapted.merge_and_unload().state_dict()
    for name, expected in merged.items():
        assert_close(ours["unet", name], expected.double(), name=name, bits=21)
    changed = [name for name in merged if not torch.equal(ours["unet", name], before["unet", name])]
    assert len(changed) == 16 * 8 + 22 + 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT, of transformers
def test_a_text_encoder_is_told_by_what_fits_it(bench: Bench, tmp_path: Path) -> None:
    """PEFT's files don't say whose they are, and two encoders have modules of the same names."""
    folder = bench.folder(Case("sdxl"))
    pipe = from_folder(folder)
    for name in ("text_encoder", "text_encoder_2"):
        adapted = peft.get_peft_model(getattr(pipe, name), config_of(TEXT))
        adapted.save_pretrained(tmp_path / "anything" / name[-1])
        found = sd.open(folder).pipe(sd.BakeLora(tmp_path / "anything" / name[-1]))
        assert {change.key.partition("/")[0] for change in found.changes} == {name}


def test_without_its_config_a_peft_file_counts_as_alpha_of_the_rank(tmp_path: Path) -> None:
    tensors = {f"base_model.model.mid_block.attentions.0.proj_in.lora_{part}.weight": value for part, value in (
        ("A", torch.ones(2, 12, 1, 1)), ("B", torch.ones(12, 2, 1, 1)),
    )}  # fmt: skip
    checkpoint = model()
    found = checkpoint.pipe(sd.BakeLora(put(tmp_path / "adapter.safetensors", tensors)))
    (change,) = found.changes
    assert torch.allclose(found[change.key].torch(), checkpoint[change.key].torch() + 2)
    assert any(note.level == "warning" and "alpha" in note.message for note in found.notes)


def test_the_config_of_a_named_adapter_counts(tmp_path: Path) -> None:
    stem = "base_model.model.mid_block.attentions.0.proj_in.lora"
    tensors = {f"{stem}_A.default.weight": torch.ones(4, 12, 1, 1), f"{stem}_B.default.weight": torch.ones(12, 4, 1, 1)}
    put(tmp_path / "adapter_model.safetensors", tensors)
    checkpoint = model()
    for config, factor in (
        ({"r": 4, "lora_alpha": 8}, 2),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4),
        ({"r": 8, "lora_alpha": 1, "alpha_pattern": {"^mid_block.attentions.0.proj_in": 2}}, 0.5),
        ({"r": 8, "lora_alpha": 1, "alpha_pattern": {"attentions.0.proj_in": 12, "proj_out": 7}}, 3),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found = checkpoint.pipe(sd.BakeLora(tmp_path))
        (change,) = found.changes
        assert torch.allclose(found[change.key].torch(), checkpoint[change.key].torch() + 4 * factor), config


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"(a+)+x": 1}},
        {"r": 4, "lora_alpha": "much"},
        {"r": 0, "lora_alpha": 1, "rank_pattern": {"proj_in": 0}, "alpha_pattern": {"proj_in": float("inf")}},
    ],
)
def test_a_config_that_cant_be_understood_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    stem = "base_model.model.mid_block.attentions.0.proj_in.lora"
    tensors = {f"{stem}_A.weight": torch.ones(4, 12, 1, 1), f"{stem}_B.weight": torch.ones(12, 4, 1, 1)}
    put(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError):
        model().pipe(sd.BakeLora(tmp_path))


# ---------------------------------------------------------------- definitions


@pytest.mark.parametrize("kind", CONVOLUTION)
@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("compute", ["fp32", "fp64"])
def test_a_kind_is_its_definition(tmp_path: Path, kind: str, alpha: float | None, compute: Any) -> None:
    checkpoint, chance = model("sdxl"), Chance(4)
    where = chosen(checkpoint, ("resnets.0.conv1", "downsamplers.0.conv"))
    if kind in LINEAR:
        where += chosen(checkpoint, ("ff.net.0.proj", "text_encoder.text_model.encoder.layers.3.mlp.fc2", "proj_in"))
    groups = [(m, CONVOLUTION[kind](chance, loras.shape_of(m))) for m in where]
    file = in_file({kohya(checkpoint, module): tensors for module, tensors in groups}, alpha)
    found = checkpoint.pipe(sd.BakeLora(put(tmp_path / "lora.safetensors", file), scale=(0.6,), compute_dtype=compute))
    before, after = loras.weights(checkpoint), loras.weights(found)
    expected = {key: value.double().numpy() for key, value in before.items()}
    for module, tensors in groups:
        weight, bias = (module.component, f"{module.name}.weight"), (module.component, f"{module.name}.bias")
        expected[weight] = expected[weight] + 0.6 * loras.scaled(tensors, loras.shape_of(module), alpha)
        if "diff_b" in tensors:
            expected[bias] = expected[bias] + 0.6 * tensors["diff_b"].double().numpy()
    for key, value in after.items():
        assert_close(value, expected[key], name=key)
    assert sum(not torch.equal(after[key], before[key]) for key in after) == len(where) * (2 if kind == "full" else 1)


def test_norms_are_added_as_they_are(tmp_path: Path) -> None:
    checkpoint, chance = model(), Chance(1)
    (norm,) = chosen(checkpoint, ("down_blocks.0.resnets.0.norm1",))
    size = loras.shape_of(norm)[0]
    tensors = {"w_norm": chance(size), "b_norm": chance(size)}
    found = checkpoint.pipe(sd.BakeLora(put(tmp_path / "n.safetensors", in_file({kohya(checkpoint, norm): tensors}))))
    for parameter, part in (("weight", "w_norm"), ("bias", "b_norm")):
        key = norm.spots[parameter].key
        assert torch.equal(found[key].torch(), checkpoint[key].torch() + tensors[part])


@pytest.mark.parametrize("by", ["output", "input", "flat output"])
def test_dora_normalises_by_what_its_magnitude_tells(tmp_path: Path, by: str) -> None:
    checkpoint, chance = model(), Chance(7)
    groups, expected = {}, {}
    for module in chosen(checkpoint, ("resnets.0.conv1", "attn1.to_q", "ff.net.0.proj")):
        shape, key = loras.shape_of(module), module.spots["weight"].key
        tensors, ones = loras.lora(chance, shape), [1] * (len(shape) - 2)
        magnitude = chance(*((1, shape[1]) if by == "input" else (shape[0], 1)), *ones).abs() + 1
        axes = tuple(axis for axis in range(len(shape)) if axis != (1 if by == "input" else 0))
        before = checkpoint[key].torch().double().numpy()
        moved = before + loras.scaled(tensors, shape, 1.5)
        moved *= magnitude.double().numpy() / np.sqrt((moved**2).sum(axis=axes, keepdims=True))
        expected[key] = before + 0.6 * (moved - before)
        groups[kohya(checkpoint, module)] = tensors | {
            "dora_scale": magnitude.flatten() if by == "flat output" else magnitude
        }
    file = put(tmp_path / "dora.safetensors", in_file(groups, 1.5))
    found = checkpoint.pipe(sd.BakeLora(file, scale=(0.6,)))
    for key, value in expected.items():
        assert_close(found[key].torch(), value, bits=21, name=key)


@given(st.integers(0, 2**32), st.sampled_from(FAMILIES), st.lists(st.floats(-2, 2), min_size=1, max_size=3))
@settings(max_examples=25)
def test_a_sum_of_any_is_the_sum(seed: int, family: str, scales: list[float]) -> None:
    """Any kinds, of any layers, in any number of files; fp16 is rounded to once, and their order means nothing."""
    random = np.random.default_rng(seed)
    checkpoint, chance = model(family, "float16"), Chance(seed, torch.float16)
    expected = {key: value.double().numpy() for key, value in loras.weights(checkpoint).items()}
    listed = [module for module in loras.modules(checkpoint) if len(loras.shape_of(module)) > 1]
    files = []
    for scale in scales:
        groups = {}
        for index in random.choice(len(listed), 4, replace=False):
            module = listed[index]
            shape = loras.shape_of(module)
            kinds = CONVOLUTION if len(shape) == 4 else LINEAR
            tensors = kinds[random.choice(sorted(kinds))](chance, shape)
            if "bias" not in module.spots:
                tensors.pop("diff_b", None)
            groups[kohya(checkpoint, module)] = tensors
            parameters = {"weight": loras.scaled(tensors, shape, 1.0)}
            if "diff_b" in tensors:
                parameters["bias"] = tensors["diff_b"].double().numpy()
            for parameter, difference in parameters.items():
                expected[module.component, f"{module.name}.{parameter}"] += scale * difference
        files.append(sd.Checkpoint.from_state_dict(in_file(groups, 1.0)))
    found = loras.weights(checkpoint.pipe(sd.BakeLora(tuple(files), scale=tuple(scales))))
    turned = loras.weights(checkpoint.pipe(sd.BakeLora(tuple(files[::-1]), scale=tuple(scales[::-1]))))
    before = loras.weights(checkpoint)
    for key, value in found.items():
        if value.dtype == torch.float16:
            assert_close(value, expected[key], bits=11, name=key)
            assert_close(turned[key], expected[key], bits=11, name=key)
        else:
            assert torch.equal(value, before[key])


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("family", [*FAMILIES, "sdxl-refiner"])
def test_every_name_means_one_layer(family: str) -> None:
    """Names of all conventions, for every layer there is: each is found again, and no two layers share one."""
    names = names_in(model(family), identify(model(family)))
    seen: dict[str, tuple[str, str]] = {}
    for module in names.modules:
        dotted = {module.name, module.ldm or module.name, module.name.removeprefix("text_model.")}
        said = {f"{module.component}.{name}" for name in dotted}
        said |= {start + n.replace(".", "_") for start in KOHYA_PREFIXES[module.component] for n in dotted}
        for name in said:
            assert names.of(name) == [module], name
            assert seen.setdefault(name, (module.component, module.name)) == (module.component, module.name)
    assert len({(module.component, module.name) for module in names.modules}) == len(names.modules)
    portable = canonical(model(family), identify(model(family))).values()
    every = {(item.component, item.name) for item in portable if item.portable and item.component in KOHYA_PREFIXES}
    assert {(m.component, f"{m.name}.{parameter}") for m in names.modules for parameter in m.spots} == every


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_give_the_same_values(tmp_path: Path, family: str) -> None:
    """q, k and v that lie in one tensor, and a projection that lies transposed, among them."""
    checkpoint, chance = model(family), Chance(3)
    groups = {}
    for module in loras.modules(checkpoint):
        if len(loras.shape_of(module)) > 1:
            groups[kohya(checkpoint, module)] = loras.lora(chance, loras.shape_of(module))
    file = put(tmp_path / "lora.safetensors", in_file(groups, 2.0))
    checkpoint.save(tmp_path / "m.safetensors")
    assert cli("convert", tmp_path / "m.safetensors", tmp_path / "folder", "--quiet").code == 0
    both = []
    for source, target in (("m.safetensors", "one.safetensors"), ("folder", "two")):
        done = cli("bake-lora", tmp_path / source, file, "-o", tmp_path / target)
        assert (done.code, done.err) == (0, "")
        both.append(loras.weights(sd.open(tmp_path / target)))
    before, shared = loras.weights(checkpoint), both[0].keys() & both[1].keys()
    for key in shared:
        assert torch.allclose(both[0][key], both[1][key], rtol=1e-6, atol=1e-7), key
    assert sum(not torch.equal(both[0][key], before[key]) for key in shared) == len(groups) > 250


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("style", ["diffusers", "ldm"])
def test_kohya_names_of_either_layout_are_known(tmp_path: Path, family: str, style: str) -> None:
    checkpoint, chance = model(family), Chance(0)
    groups = {}
    for module in loras.modules(checkpoint):
        if module.component == "unet" and len(loras.shape_of(module)) > 1:
            name = module.name if style == "diffusers" else str(module.ldm)
            groups[f"lora_unet_{name.replace('.', '_')}"] = loras.lora(chance, loras.shape_of(module))
    found = checkpoint.pipe(sd.BakeLora(put(tmp_path / "l.safetensors", in_file(groups))))
    assert len(found.changes) == len(groups)


def test_a_pickle_is_read_like_any_other(tmp_path: Path) -> None:
    checkpoint = model()
    file = put(tmp_path / "l.safetensors", a_lora(checkpoint))
    torch.save(load_file(file), tmp_path / "l.pt")
    one, two = (checkpoint.pipe(sd.BakeLora(tmp_path / name)) for name in ("l.safetensors", "l.pt"))
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


# ---------------------------------------------------------------- how much


def test_a_scale_of_zero_copies_bits(tmp_path: Path) -> None:
    checkpoint = model(dtype="float16")
    checkpoint.save(tmp_path / "m.safetensors")
    file = put(tmp_path / "l.safetensors", a_lora(checkpoint))
    opened = sd.open(tmp_path / "m.safetensors")
    for words in ({"scale": (0.0,)}, {"at": ("unet=0", "text_encoder=0")}):
        found = opened.pipe(sd.BakeLora(file, **words))
        assert dict(found) == dict(opened)  # the very same slices
        assert found.changes == ()
        assert any("as it is" in note.message for note in found.notes)


def test_what_no_lora_changes_is_the_same_slice(tmp_path: Path) -> None:
    model(dtype="float16").save(tmp_path / "m.safetensors")
    opened = sd.open(tmp_path / "m.safetensors")
    found = opened.pipe(sd.BakeLora(put(tmp_path / "l.safetensors", a_lora(opened))))
    changed = {change.key for change in found.changes}
    assert len(changed) == 4
    assert all((found[key] is tensor) == (key not in changed) for key, tensor in opened.items())


def difference(found: sd.Checkpoint, before: sd.Checkpoint) -> dict[str, torch.Tensor]:
    return {
        change.key: found[change.key].torch().double() - before[change.key].torch().double()
        for change in found.changes
        if change.kind == "replaced"
    }


def test_scales_and_factors_multiply(tmp_path: Path) -> None:
    """A block's number is a factor, as in LoRA block weight; of --at the last that fits counts."""
    checkpoint = model()
    chance, modules = Chance(0), loras.modules(checkpoint)
    groups = {
        kohya(checkpoint, m): loras.lora(chance, loras.shape_of(m))
        for m in modules
        if m.name.endswith((".attn1.to_q", ".mlp.fc1"))
    }
    file = put(tmp_path / "l.safetensors", in_file(groups))
    whole = difference(checkpoint.pipe(sd.BakeLora(file)), checkpoint)
    numbers = [0.1 + place / 20 for place in range(26)]
    listed = ",".join(map(str, numbers))
    baked = checkpoint.pipe(sd.BakeLora(file, scale=(0.5,), blocks=listed, at=("M00=3", "*.layers.7.*=-1")))
    parts = difference(baked, checkpoint)
    blocks = {
        "input_blocks.1.": numbers[2], "input_blocks.8.": numbers[9], "middle_block.": 3.0,
        "output_blocks.3.": numbers[17], "output_blocks.11.": numbers[25], ".layers.0.": numbers[0], ".layers.7.": -1,
    }  # fmt: skip
    for mark, factor in blocks.items():
        key = next(key for key in whole if mark in key)
        assert torch.allclose(parts[key], whole[key] * factor * 0.5, atol=1e-6), mark


@pytest.mark.parametrize(
    ("family", "skipped"),
    [
        ("sd1", {0, 3, 6, 9, 10, 11, 13, 14, 15}),
        ("sdxl", {0, 1, 2, 3, 6, 9, 10, 11, *range(19, 25)}),
    ],
)
def test_the_short_lists_of_lora_block_weight(tmp_path: Path, family: str, skipped: set[int]) -> None:
    """17 numbers for SD1 and 12 for SDXL name the blocks that have attention."""
    checkpoint = model(family)
    count = 25 - len(skipped) + 1
    short = ",".join(str(1 + place / 10) for place in range(count))
    rest = iter(f"{1 + place / 10}" for place in range(1, count))
    long = ",".join(["1.0", *("0" if place in skipped else next(rest) for place in range(25))])
    assert (sd.BakeLora("x", blocks=short).factors, sd.BakeLora("x", blocks=long).factors) == (long, long)
    groups = {
        kohya(checkpoint, m): loras.lora(Chance(0), loras.shape_of(m))
        for m in loras.modules(checkpoint)
        if m.component == "unet" and m.name.endswith(".attn1.to_q")
    }
    found = checkpoint.pipe(sd.BakeLora(put(tmp_path / "l.safetensors", in_file(groups)), blocks=short))
    assert len(found.changes) == len(groups)  # so that none of them took nothing


def test_one_scale_for_each(tmp_path: Path) -> None:
    checkpoint = model()
    files = tuple(put(tmp_path / f"{n}.safetensors", a_lora(checkpoint, n)) for n in range(2))
    one, two = (difference(checkpoint.pipe(sd.BakeLora(file)), checkpoint) for file in files)
    both = difference(checkpoint.pipe(sd.BakeLora(files, scale=(0.5, -1.0))), checkpoint)
    assert all(torch.allclose(both[key], 0.5 * one[key] - two[key], atol=1e-6) for key in both)
    same = difference(checkpoint.pipe(sd.BakeLora(files, scale=(0.5,))), checkpoint)
    assert all(torch.allclose(same[key], 0.5 * (one[key] + two[key]), atol=1e-6) for key in both)


@pytest.mark.parametrize("target", ["fp32", "bf16", "fp16"])
def test_the_type_of_what_is_changed(tmp_path: Path, target: Any) -> None:
    checkpoint = model(dtype="float16")
    found = checkpoint.pipe(sd.BakeLora(put(tmp_path / "l.safetensors", a_lora(checkpoint)), dtype=target))
    wide = model().pipe(sd.BakeLora(tmp_path / "l.safetensors"))
    for change in found.changes:
        ours = found[change.key].torch()
        expected = (checkpoint[change.key].torch().double() + difference(wide, model())[change.key]).numpy()
        assert_close(ours, expected, bits={"fp32": 22, "bf16": 8, "fp16": 11}[target])


def test_an_inpainting_model_takes_a_lora_for_four_channels(tmp_path: Path) -> None:
    checkpoint, plain = model(inputs=9), model()
    (conv,) = chosen(plain, ("unet.conv_in",))
    tensors = loras.lora(Chance(0), loras.shape_of(conv))
    file = put(tmp_path / "l.safetensors", in_file({"lora_unet_conv_in": tensors}))
    found, key = checkpoint.pipe(sd.BakeLora(file)), conv.spots["weight"].key
    moved = found[key].torch() - checkpoint[key].torch()
    assert_close(moved[:, :4], loras.delta(tensors, loras.shape_of(conv)), bits=18)
    assert torch.equal(found[key].torch()[:, 4:], checkpoint[key].torch()[:, 4:])


# ---------------------------------------------------------------- what doesn't fit


def refused(kind: type[SurgeryError], checkpoint: sd.Checkpoint, *given: Any, **words: Any) -> SurgeryError:
    with pytest.raises(kind) as error:
        checkpoint.pipe(sd.BakeLora(*given, **words))
    return error.value


@pytest.mark.parametrize(
    ("told", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"width": 2048}, "sdxl"),
        ({"width": 1024}, "sd2"),
        ({"prefix": "lora_te2_text_model_encoder_layers_0_mlp_fc1"}, "sdxl"),
    ],
)
def test_another_family_is_named(tmp_path: Path, told: dict[str, Any], family: str) -> None:
    name = told.get("prefix", QUERY_LORA.replace("attn1_to_q", "attn2_to_k"))
    tensors = loras.lora(Chance(0), (4, told.get("width", 99)))
    about = {key: value for key, value in told.items() if key.startswith("ss_")}
    file = put(tmp_path / "l.safetensors", in_file({name: tensors}), about or None)
    error = refused(MismatchError, model(), file)
    assert f"made for {family}, and the model is sd1" in error.message
    assert error.key in load_file(file)
    assert error.file == str(file)


STRANGE: dict[str, State] = {
    "nothing in the model is called": in_file({"lora_unet_mid_block_9": loras.lora(Chance(0), (4, 4))}),
    "not all that goes with it": {f"{QUERY_LORA}.lora_down.weight": torch.ones(2, 4)},
    "is for a weight of 5 x 4": in_file({QUERY_LORA: loras.lora(Chance(0), (5, 4))}),
    "don't fit each other": {
        f"{QUERY_LORA}.lora_down.weight": torch.ones(2, 4), f"{QUERY_LORA}.lora_up.weight": torch.ones(4, 3),
    },
    "of no dimensions: don't fit each other": {
        f"{QUERY_LORA}.lora_down.weight": torch.ones(()), f"{QUERY_LORA}.lora_up.weight": torch.ones(()),
    },
    "of rank 0: don't fit each other": in_file({QUERY_LORA: loras.lora(Chance(0), (4, 4), 0)}),
    "tensors of several kinds": in_file({QUERY_LORA: loras.lora(Chance(0), (4, 4)) | loras.loha(Chance(0), (4, 4))}),
    "an alpha and nothing else": {f"{QUERY_LORA}.alpha": torch.tensor(1.0)},
    "its down is I64": in_file({QUERY_LORA: {k: v.long() for k, v in loras.lora(Chance(0), (4, 4)).items()}}),
    "OFT": {f"{QUERY_LORA}.oft_blocks": torch.ones(1)},
    "GLoRA": {f"{QUERY_LORA}.a1.weight": torch.ones(1)},
    "an embedding bundled": {"bundle_emb.x.string_to_param.*": torch.ones(1)},
    "no part of a LoRA": {"anything.else": torch.ones(1)},
    "doesn't fit the model's": in_file({QUERY_LORA: loras.lora(Chance(0), (4, 4)) | {"dora_scale": torch.ones(9)}}),
    "lacks the bias": in_file({QUERY_LORA: {"diff_b": torch.ones(4)}}),
    "changes the same weight": in_file({f"unet.{QUERY_LORA[10:].replace('_', '.')}": {}}) | in_file({
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": loras.lora(Chance(0), (4, 4)),
        QUERY_LORA: loras.lora(Chance(0), (4, 4)),
    }),
}  # fmt: skip


@pytest.mark.parametrize("reason", STRANGE)
def test_what_fits_nothing_is_refused_and_left_out_only_if_one_insists(tmp_path: Path, reason: str) -> None:
    checkpoint = model()
    other = kohya(checkpoint, chosen(checkpoint, ("mlp.fc1",))[0])
    sound = in_file({other: loras.lora(Chance(0), (32, 8))})
    file = put(tmp_path / "l.safetensors", STRANGE[reason] | sound)
    error = refused(MismatchError, checkpoint, file)
    assert reason.rpartition(": ")[2] in error.message
    assert error.key in STRANGE[reason]
    found = checkpoint.pipe(sd.BakeLora(file, force=True))
    assert any(".mlp.fc1." in change.key for change in found.changes)
    assert [note.level for note in found.notes if reason.rpartition(": ")[2] in note.message] == ["warning"]


def test_nothing_baked_is_an_error_whatever_is_forced(tmp_path: Path) -> None:
    file = put(tmp_path / "l.safetensors", STRANGE["nothing in the model is called"])
    assert "nothing of it fits" in refused(MismatchError, model(), file, force=True).message
    model().save(tmp_path / "m.safetensors")
    assert "no LoRA" in refused(MismatchError, model(), tmp_path / "m.safetensors").message


def test_a_model_without_a_place_for_it_is_refused(tmp_path: Path) -> None:
    file = put(tmp_path / "l.safetensors", a_lora(model()))
    assert "no text encoder or UNet" in refused(MismatchError, sd.open(FIXTURES / "vae.safetensors"), file).message


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "dora_scale", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_a_lora_are_refused(tmp_path: Path, part: str, value: float) -> None:
    checkpoint = model()
    tensors = loras.lora(Chance(0), (4, 4)) | {"dora_scale": torch.ones(4, 1), "alpha": torch.tensor(1.0)}
    tensors[part] = tensors[part].clone()
    tensors[part].view(-1)[0] = value
    file = put(tmp_path / "l.safetensors", in_file({QUERY_LORA: tensors}))
    if part == "alpha":
        with pytest.raises(SurgeryError, match="alpha is"):
            checkpoint.pipe(sd.BakeLora(file))
        return
    assert "NaN or Inf" in refused(RefusedError, checkpoint, file).message
    found = checkpoint.pipe(sd.BakeLora(file, force=True))
    assert not found[QUERY].torch().isfinite().all()
    assert any("NaN or Inf" in note.message and note.level == "warning" for note in found.notes)


def test_nan_in_the_model_is_told(tmp_path: Path) -> None:
    arrays = synthetic.model("sd1")
    arrays[QUERY][0, 0] = np.nan
    checkpoint = sd.Checkpoint.from_state_dict(arrays)
    found = checkpoint.pipe(sd.BakeLora(put(tmp_path / "l.safetensors", a_lora(checkpoint))))
    assert [note.key for note in found.notes if note.level == "warning"] == [QUERY]


def test_overflow_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model(dtype="float16").save(tmp_path / "m.safetensors")
    file = put(tmp_path / "l.safetensors", in_file({QUERY_LORA: {"diff": torch.full((4, 4), 70000.0)}}))
    done = cli("bake-lora", tmp_path / "m.safetensors", file, "-o", tmp_path / "o.safetensors", "--json")
    assert (done.code, done.json["error"]["kind"], done.json["error"]["key"]) == (1, "refused", QUERY)
    assert not (tmp_path / "o.safetensors").exists()
    done = cli("bake-lora", tmp_path / "m.safetensors", file, "-o", tmp_path / "o.safetensors", "--dtype", "fp32")
    assert done.code == 0
    assert load_file(tmp_path / "o.safetensors")[QUERY].max() > 69999
    # What only may overflow, by the bound of its matrices, is computed to find out.
    ones = {"lora_down.weight": torch.eye(4) * 300, "lora_up.weight": torch.eye(4).flip(0) * 210}
    file = put(tmp_path / "near.safetensors", in_file({QUERY_LORA: ones}))
    assert cli("bake-lora", tmp_path / "m.safetensors", file, "-o", tmp_path / "near-out.safetensors").code == 0


@pytest.mark.parametrize(
    "words",
    [
        {"scale": (1.0, 2.0)},
        {"scale": (float("nan"),)},
        {"blocks": "1,2,3"},
        {"blocks": "NO_SUCH"},
        {"at": ("IN99=1",)},
        {"at": ("unet",)},
    ],
)
def test_wrong_numbers_are_wrong_usage(tmp_path: Path, words: dict[str, Any]) -> None:
    refused(UsageError, model(), put(tmp_path / "l.safetensors", a_lora(model())), **words)


def test_elements_that_cant_be_computed_with(tmp_path: Path) -> None:
    file = put(tmp_path / "l.safetensors", a_lora(model()))
    checkpoint = sd.Checkpoint.from_state_dict(synthetic.model("sd1") | {QUERY: np.zeros((4, 4), "i8")})
    assert refused(UnsupportedError, checkpoint, file).key == QUERY


def test_a_missing_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = put(tmp_path / "l.safetensors", a_lora(model()))
    assert "no GPU" in refused(UnsupportedError, model(), file, device="cuda").message


# ---------------------------------------------------------------- the result


def test_averages_go_with_the_unet_alone(tmp_path: Path) -> None:
    full = sd.open(FIXTURES / "sd1-full-ema.ckpt")
    for needle, dropped in (("unet.down_blocks.0.resnets.0.conv1", 688), ("mlp.fc1", 0)):
        (module,) = chosen(full, (needle,))
        tensors = loras.lora(Chance(0), loras.shape_of(module))
        found = full.pipe(
            sd.BakeLora(put(tmp_path / f"{dropped}.safetensors", in_file({kohya(full, module): tensors})))
        )
        assert sum(change.kind == "dropped" for change in found.changes) == dropped


def test_the_record_names_files_without_folders_and_runs_are_alike(tmp_path: Path) -> None:
    checkpoint = model(dtype="float16")
    checkpoint.save(tmp_path / "m.safetensors")
    file = put(tmp_path / "l.safetensors", a_lora(checkpoint))
    for name in ("one", "two"):
        words = ["--scale", "0.5", "--at", "unet=0.5", "-o", tmp_path / f"{name}.safetensors"]
        assert cli("bake-lora", tmp_path / "m.safetensors", file, *words).code == 0
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    about = metadata(tmp_path / "one.safetensors")["sdsurgery"]
    (step,) = json.loads(about)["steps"]
    assert step["operation"] == "bake-lora"
    assert step["parameters"] == {"loras": ["l.safetensors"], "scale": [0.5], "at": ["unet=0.5"]}
    assert [source["name"] for source in step["inputs"]] == ["l.safetensors"]
    assert str(tmp_path) not in about


def test_reading_a_lora_reads_no_matrix(tmp_path: Path) -> None:
    """What it changes is told by its header and its alphas."""
    checkpoint = model()
    tensors = sd.open(put(tmp_path / "l.safetensors", a_lora(checkpoint)))

    def unread(size: int) -> Any:
        raise AssertionError("a matrix was read")

    blind = {
        key: tensor
        if key.endswith("alpha")
        else sd.Tensor(tensor.dtype, tensor.shape, sd.sources.Computed(tensor.nbytes, unread))
        for key, tensor in tensors.items()
    }
    found = fit(read(sd.Checkpoint(blind)), names_in(checkpoint, identify(checkpoint)))
    assert (len(found.patches), found.faults) == (4, [])


def test_a_pipe_bakes(tmp_path: Path) -> None:
    checkpoint = model()
    checkpoint.save(tmp_path / "m.safetensors")
    file = put(tmp_path / "l.safetensors", a_lora(checkpoint))
    words = ["bake-lora", file, "--scale", "0.5", "+", "cast", "fp16"]
    assert cli("pipe", tmp_path / "m.safetensors", "-o", tmp_path / "o.safetensors", *words).code == 0
    direct = checkpoint.pipe(sd.BakeLora(file, scale=(0.5,)), sd.Cast("fp16"))
    assert all(torch.equal(value, direct[key].torch()) for key, value in load_file(tmp_path / "o.safetensors").items())


def test_a_row_of_zeros_has_no_length_to_divide_by(tmp_path: Path) -> None:
    arrays = synthetic.model("sd1", dtype="float32")
    arrays[QUERY][1] = 0
    checkpoint = sd.Checkpoint.from_state_dict(arrays)
    tensors = loras.lora(Chance(0), (4, 4))
    tensors["lora_up.weight"][1] = 0
    file = put(tmp_path / "l.safetensors", in_file({QUERY_LORA: tensors | {"dora_scale": torch.ones(4, 1)}}))
    found = checkpoint.pipe(sd.BakeLora(file))[QUERY].torch()
    assert torch.equal(found[1], torch.zeros(4))
    torch.testing.assert_close(found[[0, 2, 3]].norm(dim=1), torch.ones(3))


def test_inspect_says_what_a_lora_is(tmp_path: Path) -> None:
    checkpoint = model("sdxl")
    (layer,) = chosen(checkpoint, ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1",))
    more = in_file({kohya(checkpoint, layer): loras.loha(Chance(0), loras.shape_of(layer))}, 8.0)
    found = cli("inspect", put(tmp_path / "l.safetensors", a_lora(checkpoint) | more), "--json").json
    assert found["family"] == "unknown"
    assert found["evidence"][1:] == [
        "a LoRA in kohya naming: 4 lora, 1 loha; layers: 3 of the unet, 1 of the text_encoder, 1 of the text_encoder_2",
        "rank 3, alpha 2, 8",
        "made for sdxl",
    ]
    spoilt = put(tmp_path / "l.safetensors", a_lora(checkpoint), {"lora_adapter_metadata": "{"})
    assert "can't be used" in cli("inspect", spoilt, "--json").json["evidence"][1]
    assert not any("LoRA" in line for line in cli("inspect", FIXTURES / "vae.safetensors", "--json").json["evidence"])


def test_diffusers_is_the_one_that_is_installed() -> None:
    assert diffusers.utils.USE_PEFT_BACKEND  # else load_lora_weights of the tests above would prove nothing
