"""merge-vae, replace, extract and fix-clip on diffusers folders, and with donors under diffusers' names."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import synthetic
from conftest import cli
from conftest import raw as raw_file
from container_support import Raw, library_bytes
from convert_support import CLIP, UNET, VAE, put_strange, whole
from folder_support import contents
from synthetic import IDS, NARROW

import sdsurgery as sd
from sdsurgery.errors import MismatchError
from sdsurgery.operations import Convert, MergeVae

DONORS = ("file", "folder", "lone file", "lone folder", "lone file of diffusers")
PREFIX = {"vae": VAE, "unet": UNET, "text_encoder": CLIP["sd1"]}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, each as a file and as a folder, and the parts of the second."""
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("model", "donor")):
        chance = random.Random(number)
        state = whole(synthetic.configs("sd1", NARROW["sd1"]), chance, ("F16", "F32"))
        put_strange(root / f"{name}.safetensors", state, chance)
        assert cli("convert", root / f"{name}.safetensors", root / name).code == 0
    for part in PREFIX:
        file = root / f"{part}.safetensors"
        assert cli("extract", root / "donor.safetensors", "--component", part, "-o", file).code == 0
        assert cli("convert", file, root / f"{part}.folder").code == 0
        assert cli("convert", file, root / f"{part}.diffusers.safetensors", "--to", "diffusers").code == 0
    return root


@pytest.fixture
def made(made_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(made_once, tmp_path / "models")
    return tmp_path / "models"


def donor(folder: Path, kind: str, part: str) -> Path:
    return (
        folder
        / {
            "file": "donor.safetensors",
            "folder": "donor",
            "lone file": f"{part}.safetensors",
            "lone folder": f"{part}.folder",
            "lone file of diffusers": f"{part}.diffusers.safetensors",
        }[kind]
    )


def edited(path: Path, **fields: Any) -> bytes:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields, indent=1), "utf-8")
    return path.read_bytes()


@pytest.mark.parametrize("kind", DONORS)
@pytest.mark.parametrize("part", PREFIX)
def test_a_part_goes_from_any_layout_into_a_file(kind: str, part: str, made: Path) -> None:
    prefix, output = PREFIX[part], made / "out.safetensors"
    before, theirs = raw_file(made / "model.safetensors"), raw_file(made / "donor.safetensors")
    words = ["replace", made / "model.safetensors", "--component", part, "--from", donor(made, kind, part)]
    result = cli(*words, "-o", output, "--json")
    assert result.code == 0
    weights = {key for key in before if key.startswith(prefix) and not key.endswith("position_ids")}
    assert raw_file(output) == before | {key: theirs[key] for key in weights}
    assert {change["key"] for change in result.json["changes"]} == weights


@pytest.mark.parametrize("kind", DONORS)
@pytest.mark.parametrize("part", PREFIX)
def test_a_part_goes_from_any_layout_into_a_folder(kind: str, part: str, made: Path) -> None:
    """Into ``NAME.fixed``; every other file stays as it was to the byte."""
    before, theirs = contents(made / "model"), raw_state_of(made / "donor", part)
    result = cli("replace", made / "model", "--component", part, "--from", donor(made, kind, part), "--json")
    output = made / "model.fixed"
    assert (result.code, result.json["output"]) == (0, str(output))
    assert raw_state_of(output, part) == theirs
    after = contents(output)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == weights_of(part)
    assert contents(made / "model") == before
    # Once more, there is nothing left to do.
    again = cli("replace", output, "--component", part, "--from", donor(made, kind, part), "--json")
    assert (again.code, again.json["changed"], again.json["output"]) == (0, False, None)


def weights_of(part: str) -> set[str]:
    return {f"{part}/{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors"}


def raw_state_of(folder: Path, part: str) -> Any:
    (file,) = (folder / part).glob("*.safetensors")
    return raw_file(file)


@pytest.mark.parametrize("kind", DONORS)
def test_merge_vae_brings_the_config_of_a_folders_vae(kind: str, made: Path) -> None:
    """What the VAE computes is told there, as far as shapes don't tell it; a file has none to bring."""
    for config in (made / "donor" / "vae" / "config.json", made / "vae.folder" / "config.json"):
        edited(config, scaling_factor=0.18215, sample_size=77, norm_num_groups=1)
    old = json.loads((made / "model" / "vae" / "config.json").read_text("utf-8"))
    result = cli("merge-vae", made / "model", donor(made, kind, "vae"), "--json")
    assert result.code == 0
    new = json.loads((made / "model.fixed" / "vae" / "config.json").read_text("utf-8"))
    brings = "folder" in kind
    assert (new == old | {"sample_size": 77, "norm_num_groups": 1}) == brings
    assert (new == old) != brings
    changed = {change["key"] for change in result.json["changes"]}
    assert ("vae/config.json" in changed) == brings


@pytest.mark.parametrize("there", ["model", "model.safetensors"])
def test_a_vae_of_another_latent_scale_is_told_by_its_config(there: str, made: Path) -> None:
    # Without a record of where it came from, which would count more.
    chance, config = random.Random(5), {VAE: synthetic.configs("sd1", NARROW["sd1"])[VAE]}
    shutil.rmtree(made / "vae.folder")
    assert (
        cli("convert", put_strange(made / "new.safetensors", whole(config, chance), chance), made / "vae.folder").code
        == 0
    )
    edited(made / "vae.folder" / "config.json", scaling_factor=0.13025)
    before = contents(made)
    result = cli("merge-vae", made / there, made / "vae.folder", "--json")
    assert (result.code, result.json["error"]["kind"]) == (3, "mismatch")
    assert "0.13025" in result.json["error"]["message"]
    assert contents(made) == before
    assert cli("merge-vae", made / there, made / "vae.folder", "--force").code == 0


def test_in_place_only_the_component_is_written(made: Path) -> None:
    before = contents(made / "model")
    assert cli("merge-vae", made / "model", made / "vae.safetensors", "--in-place").code == 0
    after = contents(made / "model")
    assert {name for name in after if after[name] != before[name]} == weights_of("vae")
    assert raw_state_of(made / "model", "vae") == raw_state_of(made / "donor", "vae")


def test_a_dry_run_and_a_taken_name_write_nothing(made: Path) -> None:
    before = contents(made)
    assert cli("merge-vae", made / "model", made / "donor", "--dry-run").code == 0
    assert contents(made) == before
    (made / "model.fixed").mkdir()
    (made / "model.fixed" / "mine").write_text("x")
    before = contents(made)
    for more in ([], ["--force"]):
        assert cli("merge-vae", made / "model", made / "donor", *more).code == 4
    assert contents(made) == before


@pytest.mark.parametrize("there", ["model", "model.safetensors"])
def test_types_can_be_cast_on_the_way(there: str, made: Path) -> None:
    """With NaN of every kind in them, which are told and no reason to fail."""
    output = made / ("out" if there == "model" else "out.safetensors")
    words = ["merge-vae", made / there, made / "vae.folder", "--dtype", "fp32", "-o", output]
    assert cli(*words).code == 0
    part = {key: tensor for key, tensor in sd.open(output).items() if key.startswith(("vae/", VAE))}
    assert len(part) == 248
    assert {tensor.dtype.name for tensor in part.values()} == {"F32"}


def test_a_donor_without_the_part_is_refused(made: Path) -> None:
    donated = Convert("diffusers")(sd.open(made / "unet.safetensors"))
    with pytest.raises(MismatchError, match="no vae"):
        MergeVae(donated)(sd.open(made / "model.safetensors"))


@pytest.mark.parametrize("part", PREFIX)
def test_extract_from_a_folder_to_a_file_and_to_a_folder(part: str, made: Path) -> None:
    file, folder = made / "part.safetensors", made / "part"
    for output in (file, folder):
        result = cli("extract", made / "model", "--component", part, "-o", output, "--json")
        assert (result.code, result.json["output"]) == (0, str(output))
    assert raw_file(file) == raw_state_of(made / "model", part)
    names = {name.removeprefix(f"{part}/") for name in weights_of(part)}
    assert set(contents(folder)) == {"config.json", *names}
    assert (folder / "config.json").read_bytes() == (made / "model" / part / "config.json").read_bytes()
    # Either is a donor again, for the model it came from and under ldm's names.
    for output in (file, folder):
        result = cli("replace", made / "model.safetensors", "--component", part, "--from", output, "--json")
        assert (result.code, result.json["changed"]) == (0, False)


def test_extract_names_its_output_by_itself(made: Path) -> None:
    result = cli("extract", made / "model", "--component", "vae", "--component", "unet", "--json")
    assert result.json["output"] == str(made / "model.vae-unet")
    assert {path.name for path in (made / "model.vae-unet").iterdir()} == {"vae", "unet"}
    result = cli("extract", made / "model", "--component", "vae", "--component", "unet", "-o", made / "x.safetensors")
    assert result.code == 3
    assert not (made / "x.safetensors").exists()


# ---------------------------------------------------------------- fix-clip


def with_text_encoder(folder: Path, change: Any) -> None:
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    state = {name: Raw(*value) for name, value in raw_file(file).items()}
    file.write_bytes(library_bytes(change(state), {"format": "pt"}))


def flat(state: dict[str, Raw]) -> dict[str, Raw]:
    """As transformers 5 saves it."""
    return {key.removeprefix("text_model."): tensor for key, tensor in state.items()}


def with_ids(state: dict[str, Raw]) -> dict[str, Raw]:
    """As transformers before 4.31 saved it, and a merge then spoiled it."""
    return state | {IDS: Raw("F16", (1, 77), bytes(154))}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("spoil", [flat, with_ids, lambda state: flat(with_ids(state))])
def test_fix_clip_mends_a_folder(spoil: Any, in_place: bool, made: Path) -> None:
    sound, untouched = raw_state_of(made / "model", "text_encoder"), contents(made / "model")
    with_text_encoder(made / "model", spoil)
    before = contents(made / "model")
    assert cli("fix-clip", made / "model", "--check").code == 1
    result = cli("fix-clip", made / "model", *(["--in-place"] if in_place else []), "--json")
    output = made / ("model" if in_place else "model.fixed")
    assert (result.code, result.json["output"]) == (0, str(output))
    assert raw_state_of(output, "text_encoder") == sound
    after = contents(output)
    assert {name for name in after if after[name] != before[name]} == weights_of("text_encoder")
    assert after.keys() == untouched.keys()
    assert cli("fix-clip", output, "--check").code == 0
    assert cli("fix-clip", output, "--json").json["changed"] is False


@pytest.mark.parametrize("spoil", [flat, with_ids])
def test_a_spoiled_folder_converts_to_a_sound_file(spoil: Any, made: Path) -> None:
    with_text_encoder(made / "model", spoil)
    result = cli("convert", made / "model", made / "out.safetensors", "--json")
    assert result.code == 0
    assert raw_file(made / "out.safetensors") == raw_file(made / "model.safetensors")
    (told,) = [change for change in result.json["changes"] if change["key"].endswith("position_ids")]
    assert told["kind"] == ("added" if spoil is flat else "replaced")


def test_pipe_composes_over_a_folder(made: Path) -> None:
    with_text_encoder(made / "model", flat)
    words = ["merge-vae", made / "vae.safetensors", "+", "fix-clip"]
    assert cli("pipe", made / "model", "-o", made / "out", *words).code == 0
    assert raw_state_of(made / "out", "vae") == raw_state_of(made / "donor", "vae")
    assert all(key.startswith("text_model.") for key in raw_state_of(made / "out", "text_encoder"))
    (source,) = (made / "model" / "unet").glob("*.safetensors")
    assert (made / "out" / "unet" / source.name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("family", ["sdxl", "sd2"])
def test_a_text_encoder_of_open_clip_crosses_layouts(family: str, tmp_path: Path) -> None:
    """Split and joined, turned and turned back; what diffusers leaves out stays the model's own."""
    states = []
    for number, name in enumerate(("model", "donor")):
        chance = random.Random(number)
        states.append(whole(synthetic.configs(family, NARROW[family]), chance))
        put_strange(tmp_path / f"{name}.safetensors", states[-1], chance)
        assert cli("convert", tmp_path / f"{name}.safetensors", tmp_path / name).code == 0
    part, prefix = {
        "sdxl": ("text_encoder_2", "conditioner.embedders.1.model."),
        "sd2": ("text_encoder", "cond_stage_model.model."),
    }[family]
    words = ["replace", tmp_path / "model.safetensors", "--component", part, "--from", tmp_path / "donor"]
    result = cli(*words, "-o", tmp_path / "out.safetensors", "--json")
    assert result.code == 0
    changed = {change["key"] for change in result.json["changes"]}
    kept = {key for key in states[0] if key.startswith(prefix)} - changed
    unheld = {key.removeprefix(prefix) for key in kept}
    assert unheld == {"logit_scale"} | (
        {name for name in unheld if name == "text_projection" or ".23." in name} if family == "sd2" else set()
    )
    assert len(unheld) == (14 if family == "sd2" else 1)
    after = raw_file(tmp_path / "out.safetensors")
    expected = states[0] | {key: states[1][key] for key in changed}
    assert after == {key: (tensor.dtype, tensor.shape, tensor.content) for key, tensor in expected.items()}
    words = ["replace", tmp_path / "model", "--component", part, "--from", tmp_path / "donor.safetensors"]
    assert cli(*words, "-o", tmp_path / "f").code == 0
    assert raw_state_of(tmp_path / "f", part) == raw_state_of(tmp_path / "donor", part)
