"""Nothing is lost in silence: what an output can't hold is said before and after, and in place it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from safetensors.numpy import save_file

import sdsurgery as sd
from sdsurgery.cli import run
from sdsurgery.operations.grafts import same_bytes

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TRAINING = FIXTURES / "sd1-full-ema.ckpt"
VAE = FIXTURES / "vae.vae.pt"


def answer(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, dict[str, Any]]:
    code = run([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "words", [["merge-vae", TRAINING, VAE], ["cast", TRAINING, "bf16"], ["prune", TRAINING], ["fix-clip", TRAINING]]
)
def test_a_dry_run_says_what_the_run_does(words: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.safetensors"
    planned, plan = answer(capsys, *words, "-o", output, "--dry-run")
    assert not output.exists()
    done, result = answer(capsys, *words, "-o", output)
    assert (planned, done) == (0, 0)
    assert plan["changes"] == result["changes"]
    lost = {change["key"] for change in plan["changes"] if change["kind"] == "dropped"}
    assert {"optimizer_states", "callbacks", "epoch"} <= lost


def test_a_dry_run_tells_of_hashes_that_become_false(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.safetensors"
    save_file(synthetic.model("sd1"), model, metadata={"sshs_model_hash": "0" * 64})
    _, plan = answer(capsys, "merge-vae", model, VAE, "--dry-run")
    assert {"key": "sshs_model_hash", "kind": "metadata", "before": "0" * 64, "after": None} in plan["changes"]


@pytest.mark.parametrize(("name", "code"), [("out.txt", 2), ("taken.safetensors", 4), ("model.ckpt", 4)])
def test_a_dry_run_refuses_what_the_run_refuses(name: str, code: int, tmp_path: Path) -> None:
    model = tmp_path / "model.ckpt"
    shutil.copy(FIXTURES / "merged.ckpt", model)
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    assert run(["fix-clip", str(model), "-o", str(tmp_path / name), "--dry-run"]) == code
    assert run(["fix-clip", str(model), "-o", str(tmp_path / name)]) == code
    assert (tmp_path / "taken.safetensors").read_bytes() == b"precious"


def test_training_state_is_not_lost_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "training.ckpt"
    shutil.copy(TRAINING, model)
    before = model.read_bytes()
    code, failure = answer(capsys, "merge-vae", model, VAE, "--in-place")
    assert code == 4
    assert "optimizer_states" in failure["error"]["message"]
    assert model.read_bytes() == before
    assert run(["prune", str(model), "--in-place"]) == 0, "prune was asked to drop it"
    assert sd.open(model).aside == ()


def test_losing_tensors_is_a_warning_even_when_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge-vae", str(TRAINING), str(VAE), "-o", str(tmp_path / "o.safetensors"), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "optimizer_states" in printed.err
    assert "epoch" not in printed.err


@pytest.mark.parametrize(
    "words", [["extract", "{}", "--component", "vae"], ["pipe", "{}", "extract", "--component", "vae"]]
)
def test_a_part_never_takes_the_models_place(words: list[str], tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    shutil.copy(FIXTURES / "sd1-ids-ok.safetensors", model)
    given = [word.replace("{}", str(model)) for word in words]
    given.insert(2, "--in-place")
    assert run(given) == 2
    assert len(sd.open(model)) == 1131


@pytest.mark.parametrize("name", ["model.ckpt", "model", "model.safetensors"])
@pytest.mark.parametrize("fixture", ["sd1-ids-wrong-values.safetensors", "sd1-ids-missing.safetensors"])
def test_in_place_keeps_the_container_whatever_the_name(fixture: str, name: str, tmp_path: Path) -> None:
    model = tmp_path / name
    shutil.copy(FIXTURES / fixture, model)
    assert run(["fix-clip", str(model), "--in-place"]) == 0
    fixed = sd.open(model)
    assert fixed.origin is not None
    assert fixed.origin.container == "safetensors"
    assert run(["fix-clip", str(model), "--check"]) == 0


def test_in_place_replaces_no_other_file(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"precious")
    checkpoint = sd.open(FIXTURES / "sd1-ids-missing.safetensors").pipe(sd.FixClip())
    with pytest.raises(sd.SurgeryError) as caught:
        checkpoint.save(other, in_place=True)
    assert caught.value.exit_code == 4
    assert other.read_bytes() == b"precious"


def test_a_donor_that_is_cast_is_protected_too(tmp_path: Path) -> None:
    donor = tmp_path / "donor.safetensors"
    shutil.copy(FIXTURES / "vae.safetensors", donor)
    before = donor.read_bytes()
    words = ["merge-vae", str(FIXTURES / "sd1-ids-ok.safetensors"), str(donor), "--dtype", "fp32"]
    assert run([*words, "-o", str(donor), "--force"]) == 4
    assert donor.read_bytes() == before


def test_equal_tensors_are_equal_whatever_their_pieces(tmp_path: Path) -> None:
    """More than one piece, of other sizes on the two sides: computed against read."""
    values = np.linspace(-1, 1, 700_001, dtype=np.float32)
    save_file({"a": values, "b": values.astype(np.float16)}, tmp_path / "two.safetensors")
    read = sd.open(tmp_path / "two.safetensors")
    computed = sd.Checkpoint({"a": read["a"]}).pipe(sd.Cast("fp16"))["a"]
    assert same_bytes(computed, read["b"])
    assert same_bytes(read["b"], computed)
    other = values.astype(np.float16)
    other[-1] += np.float16(1)
    assert not same_bytes(computed, sd.Tensor.of(other))


def test_the_record_of_a_swapped_vae_is_believed_before_that_of_its_extraction(tmp_path: Path) -> None:
    """An SD1 VAE file into which SDXL's was merged holds SDXL's."""
    sd1, sdxl = tmp_path / "sd1.safetensors", tmp_path / "sdxl.safetensors"
    save_file(synthetic.model("sd1"), sd1)
    save_file(synthetic.model("sdxl", seed=3), sdxl)
    sd.open(sd1).pipe(sd.Extract(("vae",))).save(tmp_path / "vae.safetensors")
    sd.open(tmp_path / "vae.safetensors").pipe(sd.MergeVae(sdxl)).save(tmp_path / "swapped.safetensors")
    with pytest.raises(sd.SurgeryError, match="latents have another scale"):
        sd.open(sd1).pipe(sd.MergeVae(tmp_path / "swapped.safetensors"))
    sd.open(sdxl).pipe(sd.MergeVae(tmp_path / "swapped.safetensors"))


def test_a_ruin_at_clips_own_place_is_a_broken_clip(tmp_path: Path) -> None:
    whole = synthetic.model("sd1")
    ruin = {
        key: value
        for key, value in whole.items()
        if not key.startswith("cond_stage_model.") or key == synthetic.SD1_IDS or ".layers.0." in key
    }
    save_file(ruin | {synthetic.SD1_IDS: 2 * whole[synthetic.SD1_IDS]}, tmp_path / "ruin.safetensors")
    assert run(["fix-clip", "--check", str(tmp_path / "ruin.safetensors")]) == 1


def test_the_hash_of_a_cached_file_is_known_and_recorded(tmp_path: Path) -> None:
    blob = tmp_path / "hub" / "blobs" / ("0123456789abcdef" * 4)
    blob.parent.mkdir(parents=True)
    shutil.copy(FIXTURES / "merged.ckpt", blob)
    snapshot = tmp_path / "hub" / "snapshots" / "main" / "model.ckpt"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(blob)
    sd.open(snapshot).pipe(sd.FixClip()).save(tmp_path / "out.safetensors")
    record = json.loads(sd.open(tmp_path / "out.safetensors").metadata["sdsurgery"])
    assert record["steps"][0]["source"]["sha256"] == blob.name
