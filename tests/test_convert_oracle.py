"""Single file to folder, against diffusers' own conversion of the same file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from conftest import cli, outline
from diffusers.loaders import single_file_utils
from oracle_support import (
    CASES,
    Case,
    assert_same,
    built_of,
    components,
    converted,
    document,
    draw,
    from_folder,
    from_single_file,
    module,
    named_as,
    state,
    weights,
)
from safetensors.torch import load_file, save_file

import sdsurgery as sd

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

# Published tensor counts by component; position ids, OpenCLIP-H's last layer and `logit_scale` have no place here.
COUNTS = {
    "sd1": {"text_encoder": 196, "unet": 686, "vae": 248},
    "sd2": {"text_encoder": 372, "unet": 686, "vae": 248},
    "sdxl": {"text_encoder": 196, "text_encoder_2": 517, "unet": 1680, "vae": 248},
    "sdxl-refiner": {"text_encoder_2": 517, "unet": 1220, "vae": 248},
}


class Made:
    """A single file, our folder of it, and what diffusers makes of the file."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case = case
        self.file = root / f"{case}.safetensors"
        self.state = state(case)
        save_file(self.state, self.file, {"format": "pt"})
        self.folder = converted(self.file, root / str(case))
        self.theirs: Any = from_single_file(self.file, self.folder)


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    root = tmp_path_factory.mktemp("oracle")
    yield Made(request.param, root)
    shutil.rmtree(root)


def test_modules_of_our_configs_have_just_our_tensors(made: Made) -> None:
    counts = {}
    for name in components(made.folder):
        built, ours = module(made.folder, name), weights(made.folder, name)
        loaded = built.load_state_dict(named_as(built, ours), strict=True, assign=True)
        assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
        assert not any(value.is_meta for value in built.parameters())
        counts[name] = len(ours)
    assert counts == COUNTS[made.case.family]


def test_every_tensor_is_the_one_that_diffusers_makes(made: Made) -> None:
    for name in components(made.folder):
        theirs = getattr(made.theirs, name)
        assert_same(named_as(theirs, weights(made.folder, name)), theirs.state_dict())


def test_our_folder_loads_whole(made: Made) -> None:
    """Loaders draw missing weights at random or leave them on ``meta``, and say nothing of those that they ignore."""
    if made.case.variant == "depth":
        with pytest.raises(ValueError, match="depth_estimator"):
            from_folder(made.folder)
        return
    pipe = from_folder(made.folder)
    for name in components(made.folder):
        network = getattr(pipe, name)
        assert not any(value.is_meta for value in (*network.parameters(), *network.buffers()))
        assert_same(named_as(network, weights(made.folder, name)), network.state_dict())


def test_file_and_folder_draw_the_same_picture(made: Made) -> None:
    if made.case.variant == "depth":
        return
    ours = draw(from_folder(made.folder), made.case)
    assert torch.equal(ours, draw(made.theirs, made.case))


def test_there_and_back_is_the_same_file(made: Made) -> None:
    back = converted(made.folder, made.folder.with_name("back.safetensors"))
    kept = {key: value for key, value in made.state.items() if not _unheld(made.case, key)}
    assert_same(load_file(back), kept)


def _unheld(case: Case, key: str) -> bool:
    """What diffusers has no place for: OpenCLIP's scale, and of H the projection and the last layer."""
    if key.endswith(".logit_scale"):
        return True
    return case.family == "sd2" and (key.endswith(".text_projection") or ".resblocks.23." in key)


def test_prediction_type_is_told(made: Made) -> None:
    scheduler = document(made.folder, "scheduler/scheduler_config.json")
    assert scheduler["prediction_type"] == made.case.prediction


@pytest.mark.parametrize("case", CASES, ids=str)
def test_published_widths(case: Case) -> None:
    """Without a byte of weights: the published configs, and the shapes of the modules that they describe."""
    shapes = synthetic.shapes(case.family, synthetic.FULL[case.family], inputs=case.inputs)
    folder = outline(shapes).pipe(sd.Convert("diffusers", prediction_type=case.prediction))  # type: ignore[arg-type]
    assert not [
        note
        for step in folder.steps
        for note in step.notes
        if note.level == "warning" and "no published" in note.message
    ]
    assert folder.folder is not None
    configs = {name.partition("/")[0]: json.loads(b"".join(data.chunks()))
               for name, data in folder.folder.files.items() if name.endswith("/config.json")}  # fmt: skip
    assert configs.keys() == COUNTS[case.family].keys()
    for name, config in configs.items():
        built = {key: tuple(value.shape) for key, value in built_of(config).state_dict().items()}
        ours = {key.removeprefix(f"{name}/"): tensor for key, tensor in folder.items() if key.startswith(f"{name}/")}
        plain = {key.removeprefix("text_model."): tensor.shape for key, tensor in ours.items()}
        assert plain == {key.removeprefix("text_model."): shape for key, shape in built.items()}


# ---------------------------------------------------------------- known traps


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path, {"format": "pt"})
    return path


def test_open_clips_projection_is_transposed(tmp_path: Path) -> None:
    """It is square, so that no check of shapes sees it."""
    case = Case("sdxl-refiner")
    tensors = state(case)
    ldm = tensors["conditioner.embedders.0.model.text_projection"]
    assert ldm.shape[0] == ldm.shape[1]
    assert not torch.equal(ldm, ldm.T)
    folder = converted(saved(tmp_path / "a.safetensors", tensors), tmp_path / "a")
    ours = weights(folder, "text_encoder_2")["text_projection.weight"]
    assert torch.equal(ours, ldm.T)
    # What it is for: open_clip multiplies by the parameter, transformers applies a linear layer.
    pooled = torch.rand(2, ldm.shape[0])
    assert torch.allclose(pooled @ ldm, torch.nn.functional.linear(pooled, ours), atol=1e-6)


def test_query_key_and_value_keep_their_order(tmp_path: Path) -> None:
    case = Case("sdxl-refiner")
    tensors = state(case)
    packed = tensors["conditioner.embedders.0.model.transformer.resblocks.7.attn.in_proj_weight"]
    folder = converted(saved(tmp_path / "a.safetensors", tensors), tmp_path / "a")
    ours = weights(folder, "text_encoder_2")
    for part, name in zip(packed.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
        assert torch.equal(ours[f"text_model.encoder.layers.7.self_attn.{name}.weight"], part)


@pytest.mark.parametrize("without", ["nothing", "last layer"])
def test_sd2_leaves_the_last_layer_out(tmp_path: Path, without: str) -> None:
    """Some SD2 models were published without layer 23 and the projection; diffusers' folder is the same."""
    case = Case("sd2")
    tensors = state(case)
    tail = {key for key in tensors if _unheld(case, key)}
    assert len(tail) == 12 + 2
    whole = converted(saved(tmp_path / "whole.safetensors", tensors), tmp_path / "whole")
    if without == "last layer":
        tensors = {key: value for key, value in tensors.items() if key not in tail}
    folder = converted(saved(tmp_path / "a.safetensors", tensors), tmp_path / "a")
    assert document(folder, "text_encoder/config.json")["num_hidden_layers"] == 23
    assert_same(weights(folder, "text_encoder"), weights(whole, "text_encoder"))


def test_sd2_turbos_text_encoder_is_sd2s(tmp_path: Path) -> None:
    """It lies where the refiner's does, and ``from_single_file`` takes it for that: hence the function beneath it."""
    case = Case("sd2")
    prefix, turbo = "cond_stage_model.model.", "conditioner.embedders.0.model."
    tensors = {key.replace(prefix, turbo): value for key, value in state(case).items()}
    folder = converted(saved(tmp_path / "a.safetensors", tensors), tmp_path / "a")
    built = module(folder, "text_encoder")
    theirs = single_file_utils.convert_open_clip_checkpoint(built, state(case), prefix=prefix)
    assert_same(weights(folder, "text_encoder"), theirs)
    built.load_state_dict(named_as(built, theirs), strict=True, assign=True)


def test_decoder_levels_are_counted_from_the_other_end(tmp_path: Path) -> None:
    tensors = state(Case("sd1"))
    folder = converted(saved(tmp_path / "a.safetensors", tensors), tmp_path / "a")
    ours = weights(folder, "vae")
    for level in range(4):
        ldm = tensors[f"first_stage_model.decoder.up.{level}.block.0.conv1.weight"]
        assert torch.equal(ours[f"decoder.up_blocks.{3 - level}.resnets.0.conv1.weight"], ldm)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_wrong_position_ids_are_warned_of(tmp_path: Path, family: str) -> None:
    tensors = state(Case(family))
    (key,) = (key for key in tensors if key.endswith("position_ids"))
    tensors[key] = (tensors[key].float() * 0.95 + 0.01).half()
    done = cli("convert", saved(tmp_path / "a.safetensors", tensors), tmp_path / "a", "--json")
    assert done.code == 0
    said = [note for note in json.loads(done.out)["notes"] if "position ids" in note["message"]]
    assert [note["level"] for note in said] == ["warning"]
    assert "fix-clip" in said[0]["message"]
    assert not any("position_ids" in key for key in weights(tmp_path / "a", "text_encoder"))
    back = converted(tmp_path / "a", tmp_path / "back.safetensors")
    assert torch.equal(load_file(back)[key], torch.arange(77)[None])


def test_markers_of_sdxl_tell_the_prediction(tmp_path: Path) -> None:
    tensors = state(replace(Case("sdxl"), prediction="epsilon"))
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    folder = converted(saved(tmp_path / "a.safetensors", tensors | marks), tmp_path / "a")
    scheduler = document(folder, "scheduler/scheduler_config.json")
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    back = converted(folder, tmp_path / "back.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(back).keys()
