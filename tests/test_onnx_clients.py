"""Folders with ONNX graphs as their clients run them: diffusers' own pipeline, and what optimum's needs of the names.

optimum-onnx itself can't be installed beside the transformers that the tests have; ``tests/interop/run.py`` runs it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch
from oracle_support import WIDTHS, Bench, Case, converted, document, draw, from_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore:`OnnxRuntimeModel` is deprecated:FutureWarning"),
]

SD1, SD2 = Case("sd1"), Case("sd2", prediction="v_prediction")
LEAST_PSNR = 80.0
FOR_DIFFUSERS = ("--to", "onnx", "--layout", "diffusers-onnx")
CPU = {"provider": "CPUExecutionProvider", "provider_options": [{}]}
"""diffusers looks the options up without asking whether they were given."""


class Clients:
    """Pipelines that diffusers saved, as single files that we made of them, as graphs, and as torch draws with them."""

    def __init__(self, root: Path) -> None:
        self.root, self.bench = root, Bench(root)
        self.single = cache(self._single)
        self.graphs = cache(self._graphs)
        self.picture = cache(self._picture)

    def _single(self, case: Case) -> Path:
        saved = self.root / f"{case}-saved"
        from_folder(self.bench.folder(case)).save_pretrained(saved)
        return converted(saved, self.root / f"{case}-single.safetensors")

    def _graphs(self, case: Case, *options: str) -> Path:
        return converted(self.single(case), self.root / "-".join((str(case), *options)), *options)

    def _picture(self, case: Case) -> np.ndarray[Any, Any]:
        """What torch draws in fp32, of what diffusers saved."""
        self.single(case)
        drawn: np.ndarray[Any, Any] = draw(from_folder(self.root / f"{case}-saved"), case).numpy()
        return drawn.transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return Clients(tmp_path_factory.mktemp("clients"))


@pytest.fixture(autouse=True)
def _heads_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD2's heads have 64 channels at every level, which is what the yaml beside a single file can state."""
    monkeypatch.setitem(WIDTHS, "sd2", replace(WIDTHS["sd2"], unet=(64, 128, 192, 192)))


def runtime(folder: Path) -> Any:
    found = diffusers.OnnxStableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True, **CPU)
    found.set_progress_bar_config(disable=True)
    return found


def drawn_by(pipe: Any) -> np.ndarray[Any, Any]:
    """What ``draw`` asks for, of diffusers' ONNX pipeline."""
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(2)).numpy()
    given = {"prompt": "a photo of a red cube, 4k!", "num_inference_steps": 2, "width": 64, "height": 64}
    found: np.ndarray[Any, Any] = pipe(**given, latents=latents, output_type="np").images
    return found


def psnr(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """Of pictures whose values go from 0 to 1."""
    error = float(np.sqrt(((ours.astype(np.float64) - theirs) ** 2).mean()))
    return float(20 * np.log10(1 / max(error, 1e-10)))


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (SD1, ()),
        (SD1, ("--weights", "external")),
        (SD1, ("--weights", "embedded")),
        (SD1, ("--opset", "17")),
        (SD2, ()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_diffusers_own_pipeline_draws_what_torch_draws(clients: Clients, case: Case, options: tuple[str, ...]) -> None:
    pipe = runtime(clients.graphs(case, *FOR_DIFFUSERS, *options))
    assert psnr(drawn_by(pipe), clients.picture(case)) > LEAST_PSNR


def test_diffusers_own_encoder_draws_latents_anew(clients: Clients) -> None:
    folder = clients.graphs(SD1, *FOR_DIFFUSERS)
    encoder = diffusers.OnnxRuntimeModel.from_pretrained(folder / "vae_encoder", **CPU)
    pixels = torch.rand((1, 3, 128, 128), generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
    with torch.no_grad():
        told = vae.encode(pixels).latent_dist
    first, second = ((encoder(sample=pixels.numpy())[0] - told.mean.numpy()) / told.std.numpy() for _again in range(2))
    assert float(abs(first - second).max()) > 0.1
    for noise in (first, second):
        assert noise.shape == (1, 4, 16, 16)
        assert abs(float(noise.mean())) < 0.2
        assert abs(float(noise.std()) - 1) < 0.15


def test_the_same_folder_is_a_pipeline_of_torch(clients: Clients) -> None:
    folder = clients.graphs(SD1, "--to", "onnx")
    assert document(folder, "model_index.json")["_class_name"] == "StableDiffusionPipeline"
    assert np.array_equal(draw(from_folder(folder), SD1).numpy().transpose(0, 2, 3, 1), clients.picture(SD1))


INPUTS = {"sample": (2, 4, 9, 10), "latent_sample": (2, 4, 9, 10), "timestep": (), "encoder_hidden_states": (2, 7, 64)}
PIXELS = (2, 3, 72, 88)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_optimum_can_tell_the_sizes_of_outputs_by_their_names(clients: Clients, part: str) -> None:
    """On a GPU its pipelines make room for outputs: they evaluate the axes' names with those of the inputs."""
    folder = clients.graphs(SD1, "--to", "onnx") / part
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    known: dict[str, int] = {}
    given = {}
    for value in session.get_inputs():
        ids = value.name == "input_ids"
        shape = (2, 7) if ids else PIXELS if part == "vae_encoder" else INPUTS[value.name]
        given[value.name] = np.ones(shape, np.int64 if ids else np.float32)
        known |= {name: size for name, size in zip(value.shape, shape, strict=True) if isinstance(name, str)}
    for value, made in zip(session.get_outputs(), session.run(None, given), strict=True):
        assert [axis if isinstance(axis, int) else int(eval(axis, {}, known)) for axis in value.shape] == [*made.shape]
    assert (folder / "config.json").is_file()
