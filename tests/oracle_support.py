"""Narrow models of every family with values a pipeline can draw with, and diffusers' own reading of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import synthetic
import torch
import transformers
from conftest import cli
from safetensors.torch import load_file, save_file
from synthetic import Widths

NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
TELLING_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"

_BASE = Widths((32, 64, 96, 96), 64, vae=(32, 64, 96, 96), clip=64, open_clip=64)
WIDTHS = {
    "sd1": _BASE,
    "sd2": _BASE,
    "sdxl": replace(_BASE, unet=(32, 64, 96), context=160, conditions=96 + 6 * 32, open_clip=96),
    "sdxl-refiner": replace(_BASE, context=96, conditions=96 + 5 * 32, open_clip=96),
}

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A family, its variant and what its UNet predicts."""

    family: str
    variant: str = ""
    prediction: str = "epsilon"

    @property
    def inputs(self) -> int:
        return {"": 4, "inpainting": 9, "pix2pix": 8, "depth": 5}[self.variant]

    def __str__(self) -> str:
        return "-".join(filter(None, (self.family, self.variant, self.prediction.removesuffix("epsilon"))))


CASES = (
    Case("sd1"),
    Case("sd1", "inpainting"),
    Case("sd1", "pix2pix"),
    Case("sd2"),
    Case("sd2", prediction="v_prediction"),
    Case("sd2", "inpainting"),
    Case("sd2", "depth"),
    Case("sdxl"),
    Case("sdxl", "inpainting"),
    Case("sdxl", "pix2pix"),
    Case("sdxl-refiner"),
)


def trained_like(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values of the size that keeps a signal alive through a network; the same for a key."""
    value = torch.from_numpy(synthetic.values(key, shape, "float32")) * 20
    if key.endswith("weight") and len(shape) == 1:
        return 1 + 0.2 * value
    if len(shape) < 2 or "embedding" in key:
        return 0.05 * value
    fan_in = shape[0] if key.endswith("text_projection") else int(np.prod(shape[1:]))
    return value * (3 / fan_in) ** 0.5


def state(case: Case) -> State:
    """A single file's tensors in fp32."""
    shapes = synthetic.shapes(case.family, WIDTHS[case.family], inputs=case.inputs)
    tensors = {key: trained_like(key, shape) for key, shape in shapes.items()}
    if case.family in {"sd1", "sdxl"}:
        key = synthetic.SD1_IDS if case.family == "sd1" else synthetic.SDXL_IDS
        tensors[key] = torch.arange(77)[None]
    if case.prediction == "v_prediction":
        tensors[TELLING_BIAS] *= 20
    return tensors


def converted(source: Path, target: Path, *options: str | Path) -> Path:
    """What our command makes of a file or folder."""
    done = cli("convert", source, target, "--quiet", *options)
    assert done.code == 0, done.err
    return target


def document(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    return found


def weights(folder: Path, name: str) -> State:
    """A component's tensors as they lie in our folder."""
    (file,) = (folder / name).glob("*.safetensors")
    return load_file(file)


def components(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in NETWORKS if (folder / name).is_dir())


def module(folder: Path, name: str) -> torch.nn.Module:
    """The module that a config of our folder describes, without weights."""
    return built_of(document(folder, f"{name}/config.json"))


def built_of(config: dict[str, Any]) -> torch.nn.Module:
    """The module that a config describes, without weights."""
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)  # type: ignore[no-any-return]
        (kind,) = config["architectures"]
        return getattr(transformers, kind)(transformers.CLIPTextConfig(**config))  # type: ignore[no-any-return]


def named_as(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> State:
    """Ours under the names that the installed transformers has: since 5.6, CLIPTextModel has no ``text_model.``."""
    if isinstance(module, transformers.CLIPTextModel) and not hasattr(module, "text_model"):
        assert all(key.startswith("text_model.") for key in tensors)
        return {key.removeprefix("text_model."): value for key, value in tensors.items()}
    return dict(tensors)


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    unlike = [
        key
        for key, value in theirs.items()
        if value.is_meta or ours[key].dtype != value.dtype or not torch.equal(ours[key], value)
    ]
    assert unlike == []


def pipeline_class(folder: Path) -> Any:
    return getattr(diffusers, document(folder, "model_index.json")["_class_name"])


def from_single_file(file: Path, config: Path) -> Any:
    """diffusers' own conversion; depth has no such method of its own, and the plain pipeline's does the same."""
    kind = pipeline_class(config)
    if kind is diffusers.StableDiffusionDepth2ImgPipeline:
        kind = diffusers.StableDiffusionPipeline
    found = kind.from_single_file(str(file), config=str(config), local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def from_folder(folder: Path) -> Any:
    found = pipeline_class(folder).from_pretrained(str(folder), local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


class Bench:
    """Files and folders that are made once and read by many tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = cache(self._file)
        self.folder = cache(self._folder)

    def _file(self, case: Case) -> Path:
        path = self.root / f"{case}.safetensors"
        save_file(state(case), path, {"format": "pt"})
        return path

    def _folder(self, case: Case) -> Path:
        return converted(self.file(case), self.root / str(case))


def draw(pipe: Any, case: Case, *, steps: int = 2) -> torch.Tensor:
    """A picture of 64 x 64 pixels from the same prompt and the same noise."""
    noise = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"prompt": "a photo of a red cube, 4k!", "num_inference_steps": steps, "generator": noise}
    photo = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    if case.variant or case.family == "sdxl-refiner":
        given["image"] = photo
    if case.variant == "inpainting":
        given["mask_image"] = (photo[:, :1] > 0.5).float()
    if case.family == "sdxl-refiner":
        given["strength"] = 1.0
    elif case.variant == "pix2pix":
        given |= {"width": 64, "height": 64} if case.family == "sdxl" else {}
    else:
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(2))
        given |= {"latents": latents, "width": 64, "height": 64}
    # Where in memory a mapped weight lies decides which kernel multiplies it, and that the last bit of the result.
    for network in (getattr(pipe, name, None) for name in NETWORKS):
        for value in network.parameters() if network else ():
            value.data = value.data.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
    try:
        with torch.no_grad():
            found: torch.Tensor = pipe(**given, output_type="pt").images
    finally:
        torch.set_num_threads(threads)
    assert found.shape == (1, 3, 64, 64)
    assert bool(found.isfinite().all())
    assert float(found.std()) > 0.01
    return found
