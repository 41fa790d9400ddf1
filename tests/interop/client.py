"""Draws with a folder of ONNX graphs and with torch, and says how far the pictures are apart.

Runs in the environment of the client that it is about, so it imports nothing of this project.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}

PROMPT = "a photo of a red cube, 4k!"
STEPS = 4
SIZE = 64
PACKAGES = ("diffusers", "optimum-onnx", "optimum", "transformers", "torch", "onnxruntime", "onnxruntime-gpu", "numpy")


def installed() -> dict[str, str]:
    """The versions that the figures are about."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def given(task: str) -> dict[str, Any]:
    """The same prompt and the same noise for both sides."""
    import torch

    arguments: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "np"}
    if task == "image":
        photo = torch.rand((1, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
        return arguments | {"image": photo, "strength": 0.75, "generator": torch.Generator().manual_seed(0)}
    latents = torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=torch.Generator().manual_seed(2))
    return arguments | {"latents": latents, "width": SIZE, "height": SIZE}


def drawn(pipe: Any, arguments: dict[str, Any]) -> Any:
    """A picture as an array of numbers from 0 to 1."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(**arguments).images


def by_torch(folder: str, task: str) -> Any:
    """What diffusers draws, in fp32."""
    import diffusers
    import torch

    kind = diffusers.AutoPipelineForImage2Image if task == "image" else diffusers.AutoPipelineForText2Image
    pipe = kind.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    return drawn(pipe, given(task))


def by_diffusers(folder: str) -> Any:
    """What diffusers' own ONNX pipeline draws."""
    from diffusers import OnnxStableDiffusionPipeline

    pipe = OnnxStableDiffusionPipeline.from_pretrained(
        folder, provider="CPUExecutionProvider", provider_options=[{}], local_files_only=True
    )
    arguments = given("text")
    taken = next(value.type for value in pipe.unet.model.get_inputs() if value.name == "sample")
    dtype = "float16" if taken == "tensor(float16)" else "float32"
    return drawn(pipe, arguments | {"latents": arguments["latents"].numpy().astype(dtype)})


def by_optimum(folder: str, task: str, *, bind: bool) -> Any:
    """What optimum-onnx draws; which pipeline is chosen by the folder's index."""
    from optimum import onnxruntime

    kind = onnxruntime.ORTPipelineForImage2Image if task == "image" else onnxruntime.ORTDiffusionPipeline
    pipe = kind.from_pretrained(folder, provider="CPUExecutionProvider", use_io_binding=bind, local_files_only=True)
    return drawn(pipe, given(task))


def apart(ours: Any, theirs: Any) -> dict[str, float]:
    """How far two pictures are apart, and whether there is anything in them."""
    import numpy as np

    if ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape} is no {theirs.shape}")
    difference = ours.astype("float64") - theirs.astype("float64")
    error = float(np.sqrt((difference**2).mean()))
    psnr = float(20 * np.log10(1 / max(error, 1e-10)))
    return {"largest": float(abs(difference).max()), "psnr": psnr, "spread": float(theirs.std())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("client", choices=("diffusers", "optimum"))
    parser.add_argument("task", choices=("text", "image"))
    parser.add_argument("graphs")
    parser.add_argument("torch")
    parser.add_argument("--bind", action="store_true", help="bind inputs and outputs, as optimum does on a GPU")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        if asked.client == "diffusers":
            ours = by_diffusers(asked.graphs)
        else:
            ours = by_optimum(asked.graphs, asked.task, bind=asked.bind)
        figures = apart(ours, by_torch(asked.torch, asked.task))
    print(json.dumps(figures | {"installed": installed()}))


if __name__ == "__main__":
    main()
