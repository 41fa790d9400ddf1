"""Graphs that other programs made, opened: every weight under diffusers' name, in diffusers' shape, to the last bit.

What the exporters do to weights: torch's legacy one with folding transposes those of linear layers and gives those of
group norms two more dimensions, both under numbers; torch's new one with optimization the same. Without, names and
shapes stay. All four merge weights that are equal. None of them rounds anything, so nothing here may differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
        "cross_attention_dim": 56, "attention_head_dim": (2, 4), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}  # fmt: skip
IDS = "text_model.embeddings.position_ids"
KINDS = (*UNETS, "vae_encoder", "vae_decoder", "text_encoder", "text_encoder_2")


def filled(module: Any) -> Any:
    """No weight but a few is like another, nor like itself transposed; of each shape the second is the fifth too."""
    import torch

    torch.manual_seed(7)
    alike: dict[tuple[int, ...], list[Any]] = {}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
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
    wrong = [name for name, tensor in state.items() if tuple(tensor.shape) != found[name].shape]
    wrong += [name for name, tensor in state.items() if not torch.equal(found[name].torch(), tensor)]
    assert not wrong


def opened(path: Path) -> Checkpoint:
    return read(SourceFile(path))


def with_data_outside(path: Path, target: Path, location: str, *, one_file: bool = True) -> None:
    import onnx

    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        onnx.load(path), target, save_as_external_data=True, all_tensors_to_one_file=one_file, location=location,
        size_threshold=0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_weight_is_found(tmp_path: Path, kind: str, mode: str) -> None:
    module, values = exportable(kind, mode)
    path = export(module, values, tmp_path / "in" / "model.onnx", mode)
    state = expected(module, kind)
    check(opened(path), state)
    with_data_outside(path, tmp_path / "out" / "model.onnx", "weights.pb")
    check(opened(tmp_path / "out" / "model.onnx"), state)
