"""Drawn graphs against the networks themselves: diffusers' and transformers' modules in torch, ONNX Runtime beside."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from sdsurgery.checkpoint import Tensor
from sdsurgery.dtypes import BF16, BY_NAME, BY_TORCH, F16, F32, DType
from sdsurgery.errors import CorruptError, MismatchError, UnsupportedError
from sdsurgery.graphs.drawing import Drawing
from sdsurgery.graphs.encoding import Place
from sdsurgery.graphs.networks import Drawn, Style, draw
from sdsurgery.sources import InMemory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

OPSETS = (17, 18, 21, 23)
CLOSE = 1e-5
"""The largest difference in fp32, as a share of the largest value."""

HALF = 2e-3
"""The same in fp16, against torch in fp32 with the same weights."""

CONTEXT, POOLED, WAVES = 24, 20, 8
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_UP = {_CROSS: "CrossAttnUpBlock2D", _PLAIN: "UpBlock2D"}

State = dict[str, torch.Tensor]
Feed = dict[str, np.ndarray[Any, Any]]


def unet_config(attends: str, channels: Sequence[int], **more: Any) -> dict[str, Any]:
    """A UNet's config; a letter a level, ``x`` where it attends."""
    downs = [_CROSS if letter == "x" else _PLAIN for letter in attends]
    return {
        "block_out_channels": list(channels), "cross_attention_dim": CONTEXT, "norm_num_groups": 8,
        "down_block_types": downs, "up_block_types": [_UP[kind] for kind in reversed(downs)],
    } | more  # fmt: skip


def vector(numbers: int) -> dict[str, Any]:
    """What SDXL's config says of its further conditions."""
    return {
        "addition_embed_type": "text_time", "addition_time_embed_dim": WAVES,
        "projection_class_embeddings_input_dim": numbers * WAVES + POOLED, "use_linear_projection": True,
    }  # fmt: skip


_SD, _SMALL = (32, 64, 96, 96), (16, 32)
_SD2 = {"attention_head_dim": [2, 4, 6, 6], "use_linear_projection": True}
UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("sd1", unet_config("xxx-", _SD)),
    "sd1-inpainting": ("sd1", unet_config("x-", _SMALL, in_channels=9)),
    "sd1-pix2pix": ("sd1", unet_config("x-", _SMALL, in_channels=8)),
    "sd2": ("sd2", unet_config("xxx-", _SD, **_SD2)),
    "sd2-upcast": ("sd2", unet_config("x-", _SMALL, upcast_attention=True, attention_head_dim=[2, 4])),
    "sd2-depth": ("sd2", unet_config("x-", _SMALL, in_channels=5, attention_head_dim=[2, 4])),
    "sdxl": (
        "sdxl",
        unet_config("-xx", (32, 64, 96), attention_head_dim=[2, 4, 6], **vector(6))
        | {"transformer_layers_per_block": [1, 2, 3]},
    ),
    "sdxl-inpainting": ("sdxl", unet_config("-x", _SMALL, in_channels=9, attention_head_dim=[2, 4], **vector(6))),
    "sdxl-refiner": (
        "sdxl-refiner",
        unet_config("-xx-", _SD, attention_head_dim=[2, 4, 6, 6], **vector(5)) | {"transformer_layers_per_block": 2},
    ),
    "other-depths": (
        "sd1",
        unet_config("-xx", (16, 24, 40), layers_per_block=1, attention_head_dim=[1, 3, 5])
        | {"transformer_layers_per_block": [1, 3, 2], "flip_sin_to_cos": False, "freq_shift": 1}
        | {"center_input_sample": True, "norm_eps": 1e-4, "out_channels": 8},
    ),
}
SIZES = ((1, 8, 8, 7), (2, 9, 15, 77), (2, 16, 3, 1), (1, 5, 12, 154))
"""Batch, height, width and sequence."""

TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("sd1", {"hidden_act": "quick_gelu", "eos_token_id": 2}),
    "sd1-other-end": ("sd1", {"hidden_act": "quick_gelu", "eos_token_id": 90}),
    "sd2": ("sd2", {"hidden_act": "gelu", "eos_token_id": 2, "num_hidden_layers": 5}),
    "sdxl": ("sdxl", {"hidden_act": "quick_gelu", "eos_token_id": 2}),
    "sdxl-second": ("sdxl", {"hidden_act": "gelu", "eos_token_id": 90, "projected": True}),
    "projected": ("sd1", {"hidden_act": "gelu", "eos_token_id": 2, "projected": True, "layer_norm_eps": 1e-3}),
}


# ---------------------------------------------------------------- both sides


@functools.cache
def unet(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(1)
    found = diffusers.UNet2DConditionModel(**UNETS[name][1]).eval()
    return lively(found), dict(found.config)


@functools.cache
def vae(levels: int = 4) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(2)
    config: dict[str, Any] = {
        "block_out_channels": [16, 24, 32, 40][:levels], "norm_num_groups": 8, "layers_per_block": 4 - levels or 2,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip
    found = diffusers.AutoencoderKL(**config).eval()
    return lively(found), dict(found.config)


@functools.cache
def text(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(3)
    given = {"num_hidden_layers": 3} | TEXTS[name][1]
    kind = transformers.CLIPTextModelWithProjection if given.pop("projected", False) else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_attention_heads=4, max_position_embeddings=77,
        projection_dim=24, bos_token_id=89, pad_token_id=1, **given,
    )  # fmt: skip
    found = kind(config).eval()
    return lively(found), config.to_dict() | {"architectures": [kind.__name__]}


def lively(module: torch.nn.Module) -> Any:
    """With no weight that a layer begins with, such as 1 and 0, so that none is there in vain."""
    with torch.no_grad():
        for value in module.parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value), alpha=0.2)
    return module


def state(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> State:
    """Its weights under the names that folders have: older transformers called them so, and newer ones read them."""
    found = {key: value.to(dtype) for key, value in module.state_dict().items() if "position_ids" not in key}
    if isinstance(module, transformers.CLIPTextModel):
        found = {"text_model." + key.removeprefix("text_model."): value for key, value in found.items()}
    return found


def tensors(weights: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in weights.items():
        dtype = BY_TORCH[str(value.dtype).removeprefix("torch.")]
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[key] = Tensor(dtype, tuple(value.shape), InMemory(content))
    return found


def rounded(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The same network with its weights rounded, still in fp32."""
    import copy

    found = copy.deepcopy(module)
    found.load_state_dict({key: value.to(dtype).float() for key, value in module.state_dict().items()})
    return found


def content(drawn: Drawn, weights: Mapping[str, Tensor]) -> bytes:
    """The graph with its weights within it."""
    return b"".join(chunk for part in drawn.graph.embedding(weights, {}) for chunk in part.chunks())


class Running:
    """A drawn graph, checked and ready to run."""

    def __init__(self, drawn: Drawn, weights: Mapping[str, Tensor], *, full_check: bool = True) -> None:
        self.drawn = drawn
        whole = content(drawn, weights)
        if full_check:
            onnx.checker.check_model(whole, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, feed: Feed) -> dict[str, np.ndarray[Any, Any]]:
        return dict(zip(self.outputs, self.session.run(None, feed), strict=True))


def running(
    component: str, document: Mapping[str, Any], weights: Mapping[str, torch.Tensor], style: Style
) -> dict[str, Running]:
    found = tensors(weights)
    return {drawn.folder: Running(drawn, found) for drawn in draw(component, document, found, style)}


def apart(ours: np.ndarray[Any, Any], theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert ours.shape == tuple(theirs.shape)
    return float(np.abs(ours.astype(np.float64) - theirs.double().numpy()).max() / theirs.abs().max())


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """The networks are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def unet_inputs(config: Mapping[str, Any], size: Sequence[int], dtype: Any = np.float32) -> tuple[Feed, dict[str, Any]]:
    """What a graph and what the module is given."""
    batch, height, width, sequence = size
    chance = torch.Generator().manual_seed(sum(size))
    sample = torch.randn(batch, config["in_channels"], height, width, generator=chance)
    states = torch.randn(batch, sequence, CONTEXT, generator=chance)
    given: dict[str, Any] = {"sample": sample, "timestep": torch.tensor(431.0), "encoder_hidden_states": states}
    added: dict[str, Any] = {}
    if config["addition_embed_type"]:
        numbers = (config["projection_class_embeddings_input_dim"] - POOLED) // WAVES
        added = {
            "text_embeds": torch.randn(batch, POOLED, generator=chance),
            "time_ids": torch.randint(0, 1024, (batch, numbers), generator=chance).float(),
        }
    rounded = {key: value.numpy().astype(dtype) for key, value in (given | added).items()}
    back = {key: torch.from_numpy(value.astype(np.float32)) for key, value in rounded.items()}
    theirs = {key: back[key] for key in given} | (
        {"added_cond_kwargs": {key: back[key] for key in added}} if added else {}
    )
    return rounded, theirs


def token_ids(batch: int, sequence: int, end: int = 90) -> torch.Tensor:
    """Prompts that end at different places, padded with the end token or with what comes first."""
    chance = torch.Generator().manual_seed(batch + sequence)
    found = torch.randint(3, 89, (batch, sequence), generator=chance)
    for row in range(batch):
        place = int(torch.randint(0, sequence, (1,), generator=chance))
        found[row, place:] = end if row % 2 else 1
        found[row, place] = end
    return found


# ---------------------------------------------------------------- UNets


def model_of(drawn: Drawn) -> onnx.ModelProto:
    """The graph as the onnx package reads it, which writes the same bytes; its weights lie in a row in one file."""
    sizes = {weight.name: weight.dtype.nbytes(weight.shape) for weight in drawn.graph.weights}
    begins = itertools.accumulate(sizes.values(), initial=0)
    places = {name: Place("weights", begin, size) for (name, size), begin in zip(sizes.items(), begins, strict=False)}
    written = b"".join(drawn.graph.linked(places, {"key": "value"}).chunks())
    model = onnx.ModelProto.FromString(written)
    assert model.SerializeToString(deterministic=True) == written
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("key", "value")]
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            found = {entry.key: entry.value for entry in tensor.external_data}
            place = places[tensor.name]
            assert found == {"location": "weights", "offset": str(place.offset), "length": str(place.nbytes)}
    return model


def told(drawn: Drawn) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The initializers that are weights; what is ours lies within the graph and says so in its name."""
    found = {}
    for tensor in model_of(drawn).graph.initializer:
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert outside != tensor.name.startswith("const/"), tensor.name
        if outside:
            assert tensor.name not in found
            found[tensor.name] = (tensor.data_type, tuple(tensor.dims))
    assert list(found) == [weight.name for weight in drawn.graph.weights]
    return found


def used(drawn: Drawn) -> set[str]:
    """The names that nodes read."""
    return {name for node in model_of(drawn).graph.node for name in node.input}


def assert_weights(drawn: Drawn, weights: Mapping[str, torch.Tensor], dtype: DType = F32) -> None:
    assert told(drawn) == {key: (dtype.onnx, tuple(value.shape)) for key, value in weights.items()}
    assert {tensor.name for tensor in model_of(drawn).graph.initializer} <= used(drawn)


@pytest.mark.parametrize("fused", [False, True], ids=["onnx", "fused"])
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_computes_what_torch_does_at_every_size(name: str, opset: int, fused: bool) -> None:
    module, config = unet(name)
    weights = state(module)
    ((folder, graph),) = running("unet", config, weights, Style(opset, family=UNETS[name][0], fused=fused)).items()
    assert folder == "unet"
    assert_weights(graph.drawn, weights)
    for size in SIZES:
        feed, given = unet_inputs(config, size)
        assert graph.outputs == ["out_sample"]
        assert apart(graph(feed)["out_sample"], module(**given).sample) <= CLOSE, size


@pytest.mark.parametrize("name", ["sd1", "sdxl-refiner"])
def test_the_time_step_of_diffusers_own_pipeline_is_a_list(name: str) -> None:
    module, config = unet(name)
    style = Style(interface="diffusers", family=UNETS[name][0])
    (graph,) = running("unet", config, state(module), style).values()
    feed, given = unet_inputs(config, (2, 8, 7, 5))
    assert apart(graph(feed | {"timestep": feed["timestep"][None]})["out_sample"], module(**given).sample) <= CLOSE
    given["timestep"] = torch.tensor([17.0, 900.0])
    steps = given["timestep"].numpy()
    assert apart(graph(feed | {"timestep": steps})["out_sample"], module(**given).sample) <= CLOSE
    with pytest.raises(Exception, match="timestep"):
        graph(feed)


@pytest.mark.parametrize("fused", [False, True], ids=["onnx", "fused"])
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", ["sd1-inpainting", "sd2-upcast", "sdxl-inpainting"])
def test_a_unet_stored_in_halves_computes_in_fp32_or_in_halves(name: str, opset: int, fused: bool) -> None:
    module, config = unet(name)
    weights, family = state(module, torch.float16), UNETS[name][0]
    theirs = rounded(module, torch.float16)
    (full,) = running("unet", config, weights, Style(opset, compute=F32, family=family, fused=fused)).values()
    (half,) = running("unet", config, weights, Style(opset, family=family, fused=fused)).values()
    for graph, dtype, bound in ((full, np.float32, CLOSE), (half, np.float16, HALF)):
        assert_weights(graph.drawn, weights, F16)
        for size in SIZES[:3]:
            feed, given = unet_inputs(config, size, dtype)
            found = graph(feed)["out_sample"]
            assert found.dtype == dtype
            assert apart(found, theirs(**given).sample) <= bound, size


def test_brain_floats_are_weights_for_fp32() -> None:
    module, config = unet("sd1-inpainting")
    weights = state(module, torch.bfloat16)
    (graph,) = running("unet", config, weights, Style(compute=F32)).values()
    assert_weights(graph.drawn, weights, BF16)
    feed, given = unet_inputs(config, (2, 9, 7, 5))
    assert apart(graph(feed)["out_sample"], rounded(module, torch.bfloat16)(**given).sample) <= CLOSE


@pytest.mark.parametrize("opset", OPSETS)
def test_brain_floats_are_computed_in_where_the_opset_knows_how(opset: int) -> None:
    """ONNX Runtime has no kernels for them on a CPU, but the graph is one."""
    for component, (module, config) in (
        ("unet", unet("sd1-inpainting")),
        ("vae", vae(2)),
        ("text_encoder", text("sd2")),
    ):
        found = tensors(state(module, torch.bfloat16))
        knows = opset >= 22 or component == "text_encoder"
        for drawn in draw(component, config, found, Style(opset)):
            onnx.checker.check_model(content(drawn, found), full_check=True)
            kinds = {value.type.tensor_type.elem_type for value in model_of(drawn).graph.output}
            assert kinds == {BF16.onnx if knows else F32.onnx}
        explicit = Style(opset, compute=BF16)
        if knows:
            assert list(draw(component, config, found, explicit))
        else:
            with pytest.raises(UnsupportedError, match="bf16"):
                list(draw(component, config, found, explicit))


def test_what_most_weights_are_in_is_computed_in() -> None:
    module, config = unet("sd1-inpainting")
    weights = state(module, torch.float16)
    mixed = weights | {key: weights[key].float() for key in list(weights)[:5]}
    found = tensors(mixed)
    (drawn,) = draw("unet", config, found, Style())
    kinds = told(drawn)
    assert {key: kind for key, (kind, _) in kinds.items()} == {key: found[key].dtype.onnx for key in mixed}
    assert model_of(drawn).graph.input[0].type.tensor_type.elem_type == F16.onnx
    onnx.checker.check_model(content(drawn, found), full_check=True)
    feed, given = unet_inputs(config, (2, 9, 7, 5), np.float16)
    found_sample = Running(drawn, found)(feed)["out_sample"]
    assert apart(found_sample, rounded(module, torch.float16)(**given).sample) <= HALF


# ---------------------------------------------------------------- VAEs

_ENDS = {"vae_encoder": ("encoder.", "quant_conv."), "vae_decoder": ("decoder.", "post_quant_conv.")}
PIXELS = ((1, 64, 64), (2, 72, 40), (1, 8, 24), (3, 56, 8))
"""Batch, height and width; odd multiples of the 8 pixels of a latent among them."""


def assert_vae_weights(graphs: Mapping[str, Running], weights: Mapping[str, torch.Tensor], dtype: DType = F32) -> None:
    """Each half has its own weights and nothing of the other; together they have all."""
    assert list(graphs) == list(_ENDS)
    for folder, graph in graphs.items():
        own = {key: value for key, value in weights.items() if key.startswith(_ENDS[folder])}
        assert_weights(graph.drawn, own, dtype)
    assert {weight.name for graph in graphs.values() for weight in graph.drawn.graph.weights} == weights.keys()


@pytest.mark.parametrize("fused", [False, True], ids=["onnx", "fused"])
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("levels", [4, 2])
def test_a_vae_computes_what_torch_does_at_every_size(levels: int, opset: int, fused: bool) -> None:
    module, config = vae(levels)
    weights = state(module)
    graphs = running("vae", config, weights, Style(opset, fused=fused))
    assert_vae_weights(graphs, weights)
    for batch, height, width in PIXELS:
        pixels = torch.rand(batch, 3, height, width) * 2 - 1
        latents = torch.randn(batch, 4, height // 8, width // 8)
        encoded = graphs["vae_encoder"]({"sample": pixels.numpy()})["latent_parameters"]
        assert apart(encoded, module.encode(pixels).latent_dist.parameters) <= CLOSE
        decoded = graphs["vae_decoder"]({"latent_sample": latents.numpy()})["sample"]
        assert apart(decoded, module.decode(latents).sample) <= CLOSE


@pytest.mark.parametrize("opset", OPSETS)
def test_a_vae_stored_in_halves(opset: int) -> None:
    module, config = vae()
    weights, theirs = state(module, torch.float16), rounded(module, torch.float16)
    pixels, latents = torch.rand(2, 3, 40, 24).half().float(), torch.randn(2, 4, 5, 3).half().float()
    encoded, decoded = theirs.encode(pixels).latent_dist.parameters, theirs.decode(latents).sample
    styles = (
        (Style(opset, compute=F32), np.float32),
        (Style(opset), np.float16),
        (Style(opset, family="sdxl"), np.float32),  # which overflows in fp16
    )
    for style, dtype in styles:
        graphs = running("vae", config, weights, style)
        assert_vae_weights(graphs, weights, F16)
        for name, given, output, expected in (
            ("vae_encoder", {"sample": pixels}, "latent_parameters", encoded),
            ("vae_decoder", {"latent_sample": latents}, "sample", decoded),
        ):
            found = graphs[name]({key: value.numpy().astype(dtype) for key, value in given.items()})[output]
            assert found.dtype == dtype
            assert apart(found, expected) <= (CLOSE if dtype is np.float32 else HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_latents_are_drawn_within_the_graph(dtype: torch.dtype) -> None:
    module, config = vae(2)
    theirs = rounded(module, dtype)
    graph = running("vae", config, state(module, dtype), Style(interface="diffusers"))["vae_encoder"]
    assert graph.outputs == ["latent_sample"]
    pixels = torch.rand(1, 3, 8, 12) * 2 - 1
    known = theirs.encode(pixels).latent_dist
    feed = {"sample": np.repeat(pixels.numpy(), 32, axis=0).astype(graph_dtype(dtype))}
    draws = np.concatenate([graph(feed)["latent_sample"] for _ in range(64)]).astype(np.float64)
    count = len(draws)
    assert len(np.unique(draws[:, 0, 0, 0])) > count / 10  # neither in a batch nor from run to run the same noise
    deviation = known.std.double().numpy()[0]
    slack = 0 if dtype is torch.float32 else 0.02
    away = np.abs(draws.mean(axis=0) - known.mean.double().numpy()[0])
    assert (away <= 6 * deviation / count**0.5 + slack).all()
    assert np.abs(draws.std(axis=0) / deviation - 1).max() <= 6 / (2 * count) ** 0.5 + slack


def graph_dtype(dtype: torch.dtype) -> Any:
    return {torch.float32: np.float32, torch.float16: np.float16}[dtype]


@pytest.mark.parametrize(("bias", "deviation"), [(-1e4, np.exp(-15.0)), (1e4, np.exp(10.0))])
def test_a_log_variance_out_of_bounds_is_clamped(bias: float, deviation: float) -> None:
    module, config = vae(2)
    weights = state(module)
    weights["quant_conv.bias"] = weights["quant_conv.bias"].clone()
    weights["quant_conv.bias"][4:] = bias
    graph = running("vae", config, weights, Style(interface="diffusers"))["vae_encoder"]
    pixels = np.zeros((64, 3, 8, 8), np.float32)
    found = graph({"sample": pixels})["latent_sample"].astype(np.float64)
    means = graph_means(config, weights, pixels)
    if bias < 0:
        assert np.abs(found - means).max() < 1e-5
    else:
        assert (found - means).std() == pytest.approx(deviation, rel=0.1)


def graph_means(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], pixels: Any) -> Any:
    graph = running("vae", config, weights, Style())["vae_encoder"]
    return graph({"sample": pixels})["latent_parameters"][:, :4]


# ---------------------------------------------------------------- text encoders


def pooled_of(name: str) -> str:
    return "text_embeds" if TEXTS[name][1].get("projected") else "pooler_output"


def assert_text(name: str, graph: Running, module: Any, bound: float, ids: Any = np.int64) -> None:
    states = TEXTS[name][0] == "sdxl"
    layers = module.config.num_hidden_layers
    hidden = [f"hidden_states.{index}" for index in range(layers + 1)] if states else []
    assert set(graph.outputs) == {"last_hidden_state", pooled_of(name), *hidden}
    for batch, sequence in ((1, 77), (2, 11), (3, 1), (2, 77)):
        tokens = token_ids(batch, sequence)
        theirs = module(input_ids=tokens, output_hidden_states=True)
        ours = graph({"input_ids": tokens.numpy().astype(ids)})
        assert apart(ours["last_hidden_state"], theirs.last_hidden_state) <= bound
        assert apart(ours[pooled_of(name)], getattr(theirs, pooled_of(name))) <= bound
        for key, value in zip(hidden, theirs.hidden_states, strict=states):
            assert apart(ours[key], value) <= bound


@pytest.mark.parametrize("fused", [False, True], ids=["onnx", "fused"])
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_encoder_computes_what_torch_does_at_every_length(name: str, opset: int, fused: bool) -> None:
    module, config = text(name)
    component = "text_encoder_2" if name == "sdxl-second" else "text_encoder"
    weights = state(module)
    for interface, ids in (("optimum", np.int64), ("diffusers", np.int32)):
        style = Style(opset, interface, family=TEXTS[name][0], fused=fused)  # type: ignore[arg-type]
        ((folder, graph),) = running(component, config, weights, style).items()
        assert folder == component
        assert_weights(graph.drawn, weights)
        assert_text(name, graph, module, CLOSE, ids)


@pytest.mark.parametrize("fused", [False, True], ids=["onnx", "fused"])
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", ["sd1-other-end", "sdxl-second"])
def test_a_text_encoder_stored_in_halves(name: str, opset: int, fused: bool) -> None:
    module, config = text(name)
    weights, theirs = state(module, torch.float16), rounded(module, torch.float16)
    for compute, bound in ((F32, CLOSE), (None, HALF)):
        style = Style(opset, compute=compute, family=TEXTS[name][0], fused=fused)
        (graph,) = running("text_encoder_2", config, weights, style).values()
        assert_weights(graph.drawn, weights, F16)
        assert_text(name, graph, theirs, bound)


def test_weights_that_nothing_computes_with_are_no_part_of_a_graph() -> None:
    """Old files hold position ids, and SDXL's first text encoder is published with a projection that nobody reads."""
    module, config = text("sd1")
    needless = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.zeros(24, 32),
    }
    (drawn,) = draw("text_encoder", config, tensors(state(module) | needless), Style())
    assert {weight.name for weight in drawn.graph.weights} == state(module).keys()


# ---------------------------------------------------------------- all of them


def all_of(style: Style) -> Iterator[tuple[Drawn, dict[str, Tensor]]]:
    for component, (module, config) in (
        ("unet", unet("sdxl-inpainting")), ("vae", vae(2)), ("text_encoder", text("sdxl-second")),
    ):  # fmt: skip
        found = tensors(state(module))
        for drawn in draw(component, config, found, style):
            yield drawn, found


@pytest.mark.parametrize("opset", range(17, 24))
def test_every_opset_gives_the_same_bytes_twice_and_has_free_sizes(opset: int) -> None:
    style = Style(opset, family="sdxl")
    first = [(drawn.folder, content(drawn, found)) for drawn, found in all_of(style)]
    again = [(drawn.folder, content(drawn, found)) for drawn, found in all_of(style)]
    assert first == again
    for drawn, found in all_of(style):
        onnx.checker.check_model(content(drawn, found), full_check=True)
        (default,) = model_of(drawn).opset_import
        assert (default.domain, default.version) == ("", opset)
        assert model_of(drawn).ir_version == onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
        free = {
            dim.dim_param
            for value in model_of(drawn).graph.input
            for dim in value.type.tensor_type.shape.dim
            if dim.dim_param
        }
        assert (
            free
            == {
                "unet": {"batch", "height", "width", "sequence"},
                "vae_encoder": {"batch", "height", "width"},
                "vae_decoder": {"batch", "latent_height", "latent_width"},
                "text_encoder": {"batch", "sequence"},
            }[drawn.folder]
        )
        names = [node.name for node in model_of(drawn).graph.node]
        assert len(set(names)) == len(names)
        assert {name for node in model_of(drawn).graph.node for name in node.output} - used(drawn) == {
            value.name for value in model_of(drawn).graph.output
        }


@pytest.mark.parametrize("name", ["sd1-inpainting", "sd2-upcast"])
def test_attention_is_one_node_where_the_opset_has_it_and_nothing_is_upcast(name: str) -> None:
    module, config = unet(name)
    for opset in (22, 23):
        (drawn,) = draw("unet", config, tensors(state(module)), Style(opset))
        kinds = [node.op_type for node in model_of(drawn).graph.node]
        fused = opset == 23 and not config["upcast_attention"]
        attentions = sum(key.endswith("to_q.weight") for key in state(module))
        assert (kinds.count("Attention"), kinds.count("Softmax")) == ((attentions, 0) if fused else (0, attentions))


@pytest.mark.parametrize(("component", "kind"), [("text_encoder", "clip"), ("unet", "unet")])
def test_as_much_is_fused_as_onnx_runtimes_optimizer_would(component: str, kind: str) -> None:
    """It is given the graph without fused operators; attention it knows only with turned weights as constants."""
    module, config = text("sd1") if component == "text_encoder" else unet("sd1-inpainting")
    found = tensors(state(module))
    plain, fused = (next(draw(component, config, found, Style(17, fused=each))) for each in (False, True))
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimize = importlib.import_module("onnxruntime.transformers.optimizer").optimize_by_fusion
        theirs = optimize(onnx.ModelProto.FromString(content(plain, found)), kind).model
    graphs = (theirs.graph, model_of(fused).graph)
    expected, counts = (Counter(node.op_type for node in graph.node if node.domain) for graph in graphs)
    for operator in ("SkipLayerNormalization", "QuickGelu", "Gelu"):
        assert counts[operator] == expected[operator], operator
    attentions = sum(key.endswith(("to_q.weight", "q_proj.weight")) for key in found)
    assert counts["MultiHeadAttention"] == attentions
    assert counts.keys() <= {"SkipLayerNormalization", "QuickGelu", "Gelu", "MultiHeadAttention"}


def test_where_scores_are_wanted_in_fp32_attention_is_not_fused() -> None:
    module, config = unet("sd2-upcast")
    (drawn,) = draw("unet", config, tensors(state(module)), Style(fused=True))
    assert not any(node.op_type == "MultiHeadAttention" for node in model_of(drawn).graph.node)


@pytest.mark.parametrize("opset", [16, 24, 0, -1])
def test_other_opsets_are_refused(opset: int) -> None:
    with pytest.raises(UnsupportedError, match="opsets 17 to 23"):
        Style(opset)


@pytest.mark.parametrize("key", ["conv_in.weight", "mid_block.attentions.0.proj_in.bias", "conv_norm_out.weight"])
def test_a_weight_that_is_missing_is_named(key: str) -> None:
    module, config = unet("sd1-inpainting")
    found = tensors(state(module))
    del found[key]
    with pytest.raises(MismatchError, match=key):
        list(draw("unet", config, found, Style()))


@pytest.mark.parametrize(
    ("component", "field", "value"),
    [
        ("unet", "act_fn", "gelu"),
        ("unet", "downsample_padding", 0),
        ("unet", "mid_block_scale_factor", 2),
        ("unet", "resnet_out_scale_factor", 1.5),
        ("unet", "time_embedding_act_fn", "silu"),
        ("unet", "timestep_post_act", "silu"),
        ("vae", "act_fn", "relu"),
        ("text_encoder", "hidden_act", "gelu_new"),
        ("text_encoder", "hidden_act", "relu"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(component: str, field: str, value: Any) -> None:
    """Fields that change nothing about which weights there are, and everything about the picture."""
    module, config = {"unet": unet("sd1-inpainting"), "vae": vae(2), "text_encoder": text("sd1")}[component]
    found = tensors(state(module))
    assert list(draw(component, config, found, Style()))
    with pytest.raises(UnsupportedError, match=field):
        list(draw(component, config | {field: value}, found, Style()))


def test_constants_that_differ_a_little_stay_two() -> None:
    drawing = Drawing("g", {}, compute=F32, opset=23)
    assert drawing.scalar(0.1234567) != drawing.scalar(0.1234568)
    assert drawing.ints(1234567) != drawing.ints(1234568)
    assert drawing.scalar(0.5) == drawing.scalar(0.5)


@pytest.mark.parametrize(
    ("component", "field", "value"),
    [
        ("text_encoder", "eos_token_id", None),
        ("text_encoder", "eos_token_id", [2, 3]),
        ("text_encoder", "eos_token_id", 1 << 70),
        ("text_encoder", "layer_norm_eps", "small"),
        ("text_encoder", "num_attention_heads", 0),
        ("text_encoder", "num_attention_heads", "4"),
        ("unet", "freq_shift", 8),
        ("unet", "norm_eps", [1]),
        ("unet", "norm_num_groups", None),
        ("vae", "norm_num_groups", {}),
    ],
)
@pytest.mark.parametrize("opset", [17, 23])
def test_values_that_make_no_sense_are_the_configs_fault(component: str, field: str, value: Any, opset: int) -> None:
    module, config = {"unet": unet("sd1-inpainting"), "vae": vae(2), "text_encoder": text("sd1")}[component]
    with pytest.raises(CorruptError, match="makes no sense"):
        list(draw(component, config | {field: value}, tensors(state(module)), Style(opset)))


def test_nothing_is_computed_in_integers_or_doubles() -> None:
    for name in ("I64", "F64", "F8_E4M3", "BOOL"):
        with pytest.raises(UnsupportedError, match=name):
            Style(compute=BY_NAME[name])
