"""Graphs that other programs made, opened: every weight under diffusers' name, in diffusers' shape, to the last bit.

What the exporters do to weights: torch's legacy one with folding transposes those of linear layers and gives those of
group norms two more dimensions, both under numbers; torch's new one with optimization the same. Without, names and
shapes stay. All merge weights that are equal. None of them rounds anything, so nothing here may differ. Of a model in
half precision, the legacy one with folding stores as fp32 what the graph uses in fp32: the values are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import sdsurgery as sd
from sdsurgery.checkpoint import Checkpoint
from sdsurgery.containers.onnx import read
from sdsurgery.errors import UnsupportedError
from sdsurgery.sources import SourceFile

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporters warn about themselves

MODES = {
    "legacy, folded": {"dynamo": False, "do_constant_folding": True, "opset_version": 17},
    "legacy": {"dynamo": False, "do_constant_folding": False, "opset_version": 17},
    "dynamo, optimized": {"dynamo": True, "optimize": True, "verbose": False, "external_data": False},
    "dynamo": {"dynamo": True, "optimize": False, "verbose": False, "external_data": False},
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 32, "attention_head_dim": 4},
    "sd2": {"cross_attention_dim": 24, "attention_head_dim": (2, 4), "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 64, "attention_head_dim": (2, 4), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}  # fmt: skip
IDS = "text_model.embeddings.position_ids"
TWINS = ("attn2.to_k.weight", "attn2.to_v.weight")
"""What is multiplied with the same text: if two of these are equal, optimizers drop one product with its name."""
KINDS = (*UNETS, "vae_encoder", "vae_decoder", "text_encoder", "text_encoder_2")


def filled(module: Any) -> Any:
    """No weight but a few is like another, nor like itself transposed; of each shape the second is the fifth too."""
    import torch

    torch.manual_seed(7)
    alike: dict[tuple[int, ...], list[Any]] = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.1)
            if not name.endswith(TWINS):
                alike.setdefault(tuple(parameter.shape), []).append(parameter)
        for parameters in alike.values():
            if len(parameters) > 4:
                parameters[4].copy_(parameters[1])
    return module.eval()


def unet_of(family: str, **settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    small = {
        "sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    if family == "sdxl":
        small["down_block_types"] = small["down_block_types"][::-1]
        small["up_block_types"] = small["up_block_types"][::-1]
    return filled(UNet2DConditionModel(**{**small, **UNETS[family], **settings}))


@cache
def vae(channels: tuple[int, ...] = (16, 32)) -> Any:
    from diffusers import AutoencoderKL

    levels = len(channels)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return filled(AutoencoderKL(block_out_channels=channels, norm_num_groups=4, sample_size=16, **kinds))


@cache
def text_encoder(*, projected: bool = False, layers: int = 2) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=layers, vocab_size=100,
        projection_dim=24, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return filled((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def calling(module: Any, name: str, forward: Callable[..., Any]) -> Any:
    """A wrapper around a module, as scripts have it to choose what goes in and comes out."""
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, module)

        def forward(self, *values: Any) -> Any:
            return forward(module, *values)

    return Wrapper().eval()


def unet_input(unet: Any) -> tuple[Any, ...]:
    import torch

    width = unet.config.cross_attention_dim
    values = (torch.randn(1, 4, 18, 14), torch.tensor([3.0]), torch.randn(1, 7, width))
    return (*values, torch.randn(1, 24), torch.randn(1, 6)) if unet.config.addition_embed_type else values


def run_unet(unet: Any, sample: Any, time: Any, states: Any, *more: Any) -> Any:
    conditions = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), more, strict=True))} if more else {}
    return unet(sample, time, states, return_dict=False, **conditions)[0]


def exportable(kind: str, mode: str) -> tuple[Any, tuple[Any, ...]]:
    """A module as people export it, and what goes in."""
    import torch

    if kind in UNETS:
        unet = unet_of(kind)
        plain = unet if kind == "sd1" else calling(unet, "unet", run_unet)
        return plain, unet_input(unet)
    if kind.startswith("text_encoder"):
        return text_encoder(projected=kind.endswith("2")), (torch.randint(0, 99, (1, 77)),)
    wrapped = "dynamo" in mode
    if kind == "vae_encoder":
        wrapper = calling(vae(), "vae" if wrapped else "model", lambda vae, pixels: vae.quant_conv(vae.encoder(pixels)))
        return wrapper, (torch.randn(1, 3, 18, 14),)
    wrapper = calling(vae(), "vae", lambda vae, latents: vae.decode(latents, return_dict=False)[0])
    return wrapper, (torch.randn(1, 4, 9, 7),)


def export(module: Any, values: tuple[Any, ...], path: Path, mode: str) -> Path:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        torch.onnx.export(module, values, str(path), **MODES[mode])
    return path


def expected(module: Any, part: str = "") -> dict[str, Any]:
    """What a module has under the names that the package gives it."""
    state = {name.removeprefix("unet."): tensor for name, tensor in module.state_dict().items()}
    if part.startswith("vae_"):
        own = ("encoder.", "quant_conv.") if part == "vae_encoder" else ("decoder.", "post_quant_conv.")
        return {name: tensor for name, tensor in vae().state_dict().items() if name.startswith(own)}
    lacks = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(lacks) else name: tensor for name, tensor in state.items()}


def check(found: Any, state: dict[str, Any]) -> None:
    """The same names, but for the position ids that some exporters keep; the same shapes and bits."""
    import torch

    assert set(found) - {IDS} == set(state)
    for name, tensor in state.items():
        assert (found[name].torch().dtype, found[name].shape) == (tensor.dtype, tuple(tensor.shape)), name
        assert torch.equal(found[name].torch(), tensor), name


def opened(path: Path) -> Checkpoint:
    return read(SourceFile(path))


def with_data_outside(path: Path, target: Path, location: str, *, one_file: bool = True) -> None:
    import onnx

    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        onnx.load(path), target, save_as_external_data=True, all_tensors_to_one_file=one_file, location=location,
        size_threshold=0,
    )  # fmt: skip


Exported = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The graph of a kind by a mode, made once."""

    @cache
    def made(kind: str, mode: str) -> Path:
        return export(*exportable(kind, mode), tmp_path_factory.mktemp("graph") / "model.onnx", mode)

    return made


@cache
def module_of(kind: str) -> Any:
    return exportable(kind, "")[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_weight_is_found(tmp_path: Path, exported: Exported, kind: str, mode: str) -> None:
    path, state = exported(kind, mode), expected(module_of(kind), kind)
    check(opened(path), state)
    with_data_outside(path, tmp_path / "model.onnx", "weights.pb")
    check(opened(tmp_path / "model.onnx"), state)


PARTS = {
    "sd1": {"unet": "sd1", "text_encoder": "text_encoder", "vae_encoder": "vae_encoder", "vae_decoder": "vae_decoder"},
    "sdxl": {"unet": "sdxl", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    | {"vae_encoder": "vae_encoder", "vae_decoder": "vae_decoder"},
}


def config_of(kind: str) -> str:
    module = vae() if kind.startswith("vae_") else module_of(kind)
    module = getattr(module, "unet", module)
    return str((module if hasattr(module, "to_json_string") else module.config).to_json_string())


def folder_of(folder: Path, family: str, mode: str, exported: Exported, location: str | None) -> dict[str, Any]:
    """A folder as optimum lays it out; its weights by key."""
    index: dict[str, Any] = {"_class_name": "OnnxStableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    state: dict[str, Any] = {}
    for part, kind in PARTS[family].items():
        target = folder / part / "model.onnx"
        target.parent.mkdir(parents=True)
        if location:
            with_data_outside(exported(kind, mode), target, location)
        else:
            target.write_bytes(exported(kind, mode).read_bytes())
        (target.parent / "config.json").write_text(config_of(kind))
        index[part] = ["diffusers", "OnnxRuntimeModel"]
        component = "vae" if part.startswith("vae_") else part
        state |= {f"{component}/{name}": value for name, value in expected(module_of(kind), kind).items()}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return state


def without_ids(found: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in found.items() if not name.endswith(IDS)}


@pytest.mark.parametrize(
    ("family", "mode", "location"),
    [
        ("sd1", "legacy, folded", None), ("sd1", "legacy", "model.onnx_data"),
        ("sd1", "dynamo, optimized", "model.onnx_data"), ("sd1", "dynamo", None),
        ("sdxl", "legacy, folded", "weights.pb"), ("sdxl", "dynamo, optimized", None),
    ],
)  # fmt: skip
def test_a_folder_converts(tmp_path: Path, exported: Exported, family: str, mode: str, location: str | None) -> None:
    folder = tmp_path / "model"
    state = folder_of(folder, family, mode, exported, location)
    checkpoint = sd.open(folder)
    check(without_ids(checkpoint), state)
    single = checkpoint.pipe(sd.Convert("ldm"))
    assert "model.diffusion_model.input_blocks.0.0.weight" in single
    single.save(tmp_path / "single.safetensors")
    back = sd.open(tmp_path / "single.safetensors").pipe(sd.Convert("diffusers", config=folder))
    check(without_ids(back), state)


def test_the_depth_of_a_published_model(tmp_path: Path) -> None:
    unet = unet_of(
        "sd1", block_out_channels=(16, 32, 40, 40), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    path = export(unet, unet_input(unet), tmp_path / "model.onnx", "legacy, folded")
    state = expected(unet)
    assert len(state) == 686
    check(opened(path), state)


@pytest.mark.parametrize("mode", ["legacy, folded", "dynamo, optimized"])
def test_half_precision(tmp_path: Path, mode: str) -> None:
    import copy

    import torch

    module = copy.deepcopy(text_encoder(projected=True)).half()
    path = export(module, (torch.randint(0, 99, (1, 77)),), tmp_path / "model.onnx", mode)
    found, state = opened(path), expected(module)
    widened = {name for name, tensor in found.items() if tensor.dtype.name == "F32"}
    assert bool(widened) == (mode == "legacy, folded")
    check(found, {name: tensor.float() if name in widened else tensor for name, tensor in state.items()})


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_vae_exported_alone_gets_its_name_back(tmp_path: Path, half: str) -> None:
    import torch

    values = (torch.randn(1, 3, 18, 14) if half == "encoder" else torch.randn(1, 4, 9, 7),)
    path = export(getattr(vae(), half), values, tmp_path / "model.onnx", "legacy, folded")
    check(opened(path), {name: value for name, value in vae().state_dict().items() if name.startswith(f"{half}.")})


def test_a_weight_whose_product_was_dropped_is_missing_and_no_other_is_wrong(tmp_path: Path) -> None:
    """Of two equal products an optimizer keeps one, and with the other the only trace of its weight's name."""
    import torch

    pair = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in ("to_k", "to_v")})
    wrapper = calling(pair, "attn2", lambda pair, value: pair["to_k"](value).exp() + pair["to_v"](value))
    with torch.no_grad():
        pair["to_v"].weight.copy_(pair["to_k"].weight)
    found = opened(export(wrapper, (torch.randn(1, 3, 4),), tmp_path / "model.onnx", "dynamo, optimized"))
    check(found, {"attn2.to_k.weight": pair["to_k"].weight})


def test_a_file_for_each_tensor(tmp_path: Path, exported: Exported) -> None:
    with_data_outside(exported("text_encoder", "legacy, folded"), tmp_path / "model.onnx", "", one_file=False)
    assert len(list(tmp_path.iterdir())) > 20
    check(opened(tmp_path / "model.onnx"), expected(text_encoder()))


# ---------------------------------------------------------------- graphs that were worked on


def changed(path: Path, target: Path, change: Callable[[Any], None]) -> Path:
    import onnx

    model = onnx.load(path)
    change(model.graph)
    onnx.save_model(model, target)
    return target


def as_constants(graph: Any) -> None:
    from onnx import helper

    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer]
    nodes = [*constants, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)


@pytest.mark.parametrize("kind", ["text_encoder_2", "vae_decoder"])
def test_weights_in_nodes(tmp_path: Path, exported: Exported, kind: str) -> None:
    path = changed(exported(kind, "dynamo, optimized"), tmp_path / "model.onnx", as_constants)
    check(opened(path), expected(module_of(kind), kind))


def test_the_old_names_of_attention_stay_what_they_are(tmp_path: Path, exported: Exported) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(text: str) -> str:
        for new, name in old.items():
            text = text.replace(new, name)
        return text

    def change(graph: Any) -> None:
        for node in graph.node:
            node.name = renamed(node.name)
            node.input[:], node.output[:] = map(renamed, node.input), map(renamed, node.output)
        for tensor in graph.initializer:
            tensor.name = renamed(tensor.name)

    path = changed(exported("vae_decoder", "legacy, folded"), tmp_path / "model.onnx", change)
    state = {renamed(name): value for name, value in expected(module_of("vae_decoder"), "vae_decoder").items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    check(opened(path), state)


def hand_made(path: Path, nodes: list[Any], tensors: dict[str, Any]) -> Path:
    import numpy as np
    from onnx import helper, numpy_helper, save_model

    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    save_model(helper.make_model(helper.make_graph(nodes, "graph", [], [], initializers)), path)
    return path


def node(op: str, inputs: str, name: str, output: str = "out", **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(op, inputs.split(), [output], name=name, **attributes)


def test_operators_tell_how_a_weight_lies(tmp_path: Path) -> None:
    import numpy as np

    chance = np.random.default_rng(1)
    lies = {name: chance.standard_normal((2, 3)).astype("f") for name in ("a", "b", "c", "d", "conv_out.weight")}
    ones = np.ones((3, 1, 1), "f")
    nodes = [
        node("Gemm", "x a", "/block/linear_1/Gemm", "1"),
        node("Gemm", "x b", "/block/linear_2/Gemm", "2", transB=1),
        node("Transpose", "c", "/block/proj_in/Transpose", "turned", perm=[1, 0]),
        node("MatMul", "x turned", "/block/proj_in/MatMul", "3"),
        node("Identity", "d", "", "same"),
        node("MatMul", "x same", "/block/proj_out/MatMul", "4"),
        node("Mul", "3 norm", "/block/norm1/Mul", "5"),
        node("Add", "5 scale", "/block/norm1/Add_1", "6"),
        node("MatMul", "x conv_out.weight", "", "7"),
        node("Add", "7 mask", "/block/attn1/Add", "8"),
    ]
    tensors = {**lies, "norm": ones, "scale": np.float32(2), "mask": np.ones((3, 3), "f")}
    found = opened(hand_made(tmp_path / "model.onnx", nodes, tensors))
    expect = {
        "block.linear_1.weight": lies["a"].T, "block.linear_2.weight": lies["b"], "block.proj_in.weight": lies["c"],
        "block.proj_out.weight": lies["d"].T, "block.norm1.weight": ones.reshape(3), "conv_out.weight":
        lies["conv_out.weight"].T,
    }  # fmt: skip
    assert set(found) == set(expect)
    for name, value in expect.items():
        assert np.array_equal(found[name].numpy(), value), name


def test_a_circle_ends(tmp_path: Path) -> None:
    import numpy as np

    nodes = [node("Identity", "b", "", "a"), node("Identity", "a", "", "b"), node("Gather", "", "/x/Gather")]
    nodes += [node("MatMul", "x a", "/conv_in/MatMul"), node("MatMul", "x w", "/conv_out/MatMul")]
    found = opened(hand_made(tmp_path / "model.onnx", nodes, {"w": np.ones((2, 3), "f")}))
    assert list(found) == ["conv_out.weight"]


def test_a_graph_without_names_is_refused(tmp_path: Path) -> None:
    import numpy as np

    path = hand_made(tmp_path / "model.onnx", [node("MatMul", "x w", "MatMul_1")], {"w": np.ones((2, 3), "f")})
    with pytest.raises(UnsupportedError, match="none of its weights can be told"):
        opened(path)


# ---------------------------------------------------------------- graphs for one runtime only


def test_what_an_optimizer_fused_is_refused_with_what_it_holds(tmp_path: Path, exported: Exported) -> None:
    from onnxruntime.transformers import optimizer

    path = exported("text_encoder", "legacy, folded")
    model = optimizer.optimize_model(str(path), model_type="clip", num_heads=2, hidden_size=32, opt_level=0)
    model.save_model_to_file(str(tmp_path / "text_encoder" / "model.onnx"))
    holding = r"4 SkipLayerNormalization.*held by such nodes: .*layers\.0\.layer_norm2\.weight"
    with pytest.raises(UnsupportedError, match=holding):
        opened(tmp_path / "text_encoder" / "model.onnx")
    (tmp_path / "model_index.json").write_text(json.dumps({"text_encoder": ["diffusers", "OnnxRuntimeModel"]}))
    with pytest.raises(UnsupportedError, match=holding) as refused:
        sd.open(tmp_path)
    assert refused.value.file == str(tmp_path / "text_encoder" / "model.onnx")


def test_packed_attention_is_refused_with_what_is_gone(tmp_path: Path) -> None:
    import numpy as np

    block = "/text_model/encoder/layers.0"
    nodes = [
        node("LayerNormalization", "x n n", f"{block}/layer_norm1/LayerNormalization", "1"),
        node("Attention", "1 qkv qkv_bias", "Attention_0", "2", domain="com.microsoft", num_heads=2),
        node("MatMul", "2 w", f"{block}/self_attn/out_proj/MatMul", "3"),
    ]
    tensors = {
        "n": np.ones(4, "f"),
        "qkv": np.ones((4, 12), "f"),
        "qkv_bias": np.ones(12, "f"),
        "w": np.ones((4, 4), "f"),
    }
    with pytest.raises(UnsupportedError) as refused:
        opened(hand_made(tmp_path / "model.onnx", nodes, tensors))
    assert "1 Attention" in refused.value.message
    for name in "qkv":
        assert f"text_model.encoder.layers.0.self_attn.{name}_proj.weight" in refused.value.message
    assert "self_attn.out_proj.weight" not in refused.value.message
    assert "held by such nodes: qkv, qkv_bias" in refused.value.message


def test_a_product_packed_before_an_attention_without_weights_is_refused(tmp_path: Path) -> None:
    import numpy as np

    block = "/down_blocks.0/attentions.0/transformer_blocks.0/attn1"
    nodes = [
        node("MatMul", "x packed", "MatMul_QKV_0", "1"),
        node("MultiHeadAttention", "1", "MultiHeadAttention_0", "2", domain="com.microsoft", num_heads=2),
        node("MatMul", "2 w", f"{block}/to_out.0/MatMul", "3"),
    ]
    tensors = {"packed": np.ones((4, 12), "f"), "w": np.ones((4, 4), "f")}
    with pytest.raises(UnsupportedError, match=r"1 MultiHeadAttention.*not found: .*attn1\.to_q\.weight"):
        opened(hand_made(tmp_path / "model.onnx", nodes, tensors))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    import numpy as np

    nodes = [node("DequantizeLinear", "q s", "", "w"), node("MatMul", "x w", "/down_blocks.0/resnets.0/conv1/MatMul")]
    path = hand_made(tmp_path / "model.onnx", nodes, {"q": np.ones((4, 4), "i1"), "s": np.ones((), "f")})
    with pytest.raises(UnsupportedError, match="1 DequantizeLinear"):
        opened(path)
