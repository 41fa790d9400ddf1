"""Small model folders: made by hand, and by diffusers and transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from container_support import State, library_bytes, random_state

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
STATES = {name: random_state(number, nbytes=64) for number, name in enumerate(("unet", "text_encoder", "vae"))}
FORMAT = {"format": "pt"}


def put(path: Path, content: bytes | str | Mapping[str, Any]) -> Path:
    """Write a file, whatever folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Mapping):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_weights(path: Path, state: State, metadata: Mapping[str, str] | None = None) -> Path:
    return put(path, library_bytes(state, FORMAT if metadata is None else metadata))


def put_shards(folder: Path, stem: str, state: State, count: int = 2, variant: str = "") -> Path:
    """A sharded component as diffusers writes it; the index's path."""
    keys, weight_map = sorted(state), {}
    for number in range(count):
        name = f"{stem}{variant and '.' + variant}-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: state[key] for key in keys[number::count]}
        weight_map |= dict.fromkeys(part, name)
        put_weights(folder / name, part)
    size = sum(len(tensor.content) for tensor in state.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return put(folder / f"{stem}.safetensors.index{variant and '.' + variant}.json", text)


def put_folder(path: Path, *, weights: bool = True) -> Path:
    """A pipeline's folder with three components of a few tensors each."""
    put(path / "model_index.json", INDEX)
    put(path / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    put(path / "tokenizer" / "vocab.json", {"a": 1})
    put(path / "tokenizer" / "merges.txt", "#version: 0.2\n")
    put(path / "README.md", "# A model\n")
    for name, stem in STEMS.items():
        put(path / name / "config.json", {"_class_name": INDEX[name][1]} if name != "text_encoder" else {})  # type: ignore[index]
        if weights:
            put_weights(path / name / f"{stem}.safetensors", STATES[name])
    return path


def all_states() -> State:
    """What :func:`put_folder` holds, under the model's keys."""
    return {f"{name}/{key}": tensor for name, state in STATES.items() for key, tensor in state.items()}


def contents(folder: Path) -> dict[str, str]:
    """Every file, link and folder in a folder, with a digest of what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.blake2b(path.read_bytes()).hexdigest()
    return found


def hub_cache(root: Path, folder: Path) -> Path:
    """The same folder as the Hugging Face cache keeps it: links to blobs that are named by their hashes."""
    model = root / "models--someone--model"
    snapshot = model / "snapshots" / ("0" * 40)
    (model / "blobs").mkdir(parents=True)
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        blob = model / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@cache
def pipeline() -> Any:
    """A tiny pipeline of the real classes."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, merges=[]),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def modules() -> dict[str, Any]:
    """The tiny pipeline's components that have weights."""
    return {name: getattr(pipeline(), name) for name in STEMS}


def module_state() -> dict[str, Any]:
    """Their tensors under the model's keys."""
    return {f"{name}/{key}": value for name, module in modules().items() for key, value in module.state_dict().items()}
