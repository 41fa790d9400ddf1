"""Statements and signatures, against OpenSSF's model_signing: each accepts what the other signs."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic
from conftest import FIXTURES, ROOT, Result, cli, write
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import sdsurgery as sd
from sdsurgery.errors import CorruptError, MismatchError, SurgeryError, UnreadableError, UnsupportedError, UsageError
from sdsurgery.inspection import manifests, signing

# sitecustomize of every process of model_signing: nothing may leave this machine.
OFFLINE = """
import socket


def refuse(*_):
    raise AssertionError("something wanted the network")


socket.socket.connect = socket.getaddrinfo = refuse
"""


def pem(key: Any, password: bytes | None = None) -> Any:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def public_pem(key: Any) -> Any:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def keys(folder: Path, name: str = "key", key: Any = None, password: bytes | None = None) -> tuple[Path, Path]:
    """A private and a public key as files."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(pem(key, password))
    public.write_bytes(public_pem(key))
    return private, public


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, Path]:
    return keys(tmp_path)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a diffusers folder, with what else lies in such folders."""
    place = tmp_path_factory.mktemp("converted")
    folder = place / "model"
    single = write(place / "single.safetensors", synthetic.model("sd1"))
    assert cli("convert", single, folder).code == 0
    (folder / "README.md").write_text("A model.")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("git's")
    (folder / ".cache" / "deep").mkdir(parents=True)
    (folder / ".cache" / "deep" / "file").write_text("hidden")
    (folder / "vae.txt").write_text("sorts between vae/ and what is in it, if names are compared as text")
    return folder


@pytest.fixture(params=["file", "folder"])
def model(request: pytest.FixtureRequest, converted: Path, tmp_path: Path) -> Path:
    if request.param == "file":
        return Path(shutil.copy(FIXTURES / "sd1-ids-ok.safetensors", tmp_path / "model.safetensors"))
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """model_signing's own command line, without a network."""
    customized = tmp_path / "customized"
    customized.mkdir()
    (customized / "sitecustomize.py").write_text(OFFLINE)

    def call(*words: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "model_signing", *map(os.fspath, words)],
            capture_output=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": str(customized)},
            cwd=tmp_path,
            check=False,
        )

    return call


def sign(model: Path, private: Path, *more: str | os.PathLike[str]) -> Result:
    return cli("manifest", model, "--sign", "--key", private, *more)


def payload(signature: Path) -> dict[str, Any]:
    envelope = json.loads(signature.read_text("utf-8"))["dsseEnvelope"]
    return json.loads(base64.b64decode(envelope["payload"]))  # type: ignore[no-any-return]


def ordered(statement: dict[str, Any]) -> dict[str, Any]:
    """With what model_signing leaves to chance in order."""
    statement["predicate"]["serialization"]["ignore_paths"].sort()
    return statement


def found(path: Path, signature: Path, public: Path) -> list[tuple[str, str | None]]:
    findings = signing.verify_signature(path, signature, public)
    assert all(each.severity == "error" for each in findings)
    return [(each.id, each.file) for each in findings]


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


VAE = "vae/diffusion_pytorch_model.safetensors"


def test_the_statement_is_what_model_signing_signs(model: Path, key: tuple[Path, Path], theirs: Any) -> None:
    signature = model.parent / "theirs.sig"
    done = theirs("sign", "key", model, "--private_key", key[0], "--signature", signature)
    assert done.returncode == 0, done.stderr
    ours = json.loads(cli("manifest", model, "--statement").out)
    assert ours == ordered(payload(signature))
    checkpoint = sd.open(model)
    assert signing.statement(checkpoint) == ours
    assert signing.statement(checkpoint, manifests.manifest(checkpoint)) == ours
    assert cli("manifest", model, "--statement").out == cli("manifest", model, "--statement").out


def test_a_statement_reads_no_file_that_a_manifest_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = sd.open(folder)
    listed, whole = manifests.manifest(checkpoint), signing.statement(checkpoint)
    read: list[str] = []
    digest = signing._digest

    def noted(path: Path, algorithm: str) -> str:
        read.append(path.name)
        return digest(path, algorithm)

    monkeypatch.setattr(signing, "_digest", noted)
    assert signing.statement(checkpoint, listed) == whole
    assert sorted(read) == ["file"]  # .cache/deep/file; a README at the top is a file of the model


def test_what_a_statement_is_called_and_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder.parent / "statement.json"
    assert cli("manifest", folder, "--statement", "-o", output).out.startswith(f"wrote {output}: ")
    assert cli("manifest", folder, "--statement", "-o", output).code == 4
    monkeypatch.chdir(folder)
    assert json.loads(cli("manifest", ".", "--statement").out) == json.loads(output.read_text())
    inside = json.loads(cli("manifest", folder, "--statement", "--signature", folder / "README.md").out)
    assert "README.md" in inside["predicate"]["serialization"]["ignore_paths"]
    assert "README.md" not in [each["name"] for each in inside["predicate"]["resources"]]
    with pytest.raises(MismatchError):
        signing.statement(sd.Checkpoint({}))


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_model_signing_accepts_what_we_sign_and_so_do_we(model: Path, curve: Any, theirs: Any) -> None:
    private, public = keys(model.parent, key=ec.generate_private_key(curve()))
    result = sign(model, private)
    signature = model.with_name(model.name + ".sig")
    assert (result.code, result.out) == (0, f"wrote {signature}\n")
    done = theirs("verify", "key", model, "--public_key", public, "--signature", signature)
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr
    assert found(model, signature, public) == []
    statement = json.loads(cli("manifest", model, "--statement").out)
    assert ordered(payload(signature)) == statement


def test_we_accept_what_model_signing_signs(model: Path, key: tuple[Path, Path], theirs: Any) -> None:
    signature = model.parent / "model.sig"
    assert theirs("sign", "key", model, "--private_key", key[0]).returncode == 0
    assert found(model, signature, key[1]) == []
    moved = model.rename(model.parent / "another name")
    assert found(moved, signature, key[1]) == []


def test_a_signature_in_the_folder(folder: Path, key: tuple[Path, Path], theirs: Any) -> None:
    signature = folder / "model.sig"
    assert sign(folder, key[0], "--signature", signature).code == 0
    assert found(folder, signature, key[1]) == []
    assert theirs("verify", "key", folder, "--public_key", key[1], "--signature", signature).returncode == 0
    assert sign(folder, key[0], "--signature", signature).code == 4
    assert sign(folder, key[0], "--signature", signature, "--force").code == 0
    statement = json.loads(cli("manifest", folder, "--statement", "--signature", signature).out)
    assert ordered(payload(signature)) == statement
    assert theirs("sign", "key", folder, "--private_key", key[0], "--signature", signature).returncode == 0
    assert ordered(payload(signature)) == statement
    assert found(folder, signature, key[1]) == []
    copied = Path(shutil.copy(signature, folder.parent / "copied.sig"))
    assert found(folder, copied, key[1]) == []


def test_a_signature_that_was_moved_into_the_folder(folder: Path, key: tuple[Path, Path], theirs: Any) -> None:
    assert sign(folder, key[0]).code == 0
    signature = signing.beside(folder).rename(folder / "later.sig")
    assert found(folder, signature, key[1]) == []
    assert theirs("verify", "key", folder, "--public_key", key[1], "--signature", signature).returncode == 0
    assert found(folder, Path(shutil.copy(signature, folder.parent / "x")), key[1]) == [("signature-file", "later.sig")]


def test_a_folder_named_by_a_dot(folder: Path, key: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert sign(Path(), key[0]).code == 0
    assert found(Path(), folder.parent / "model.sig", key[1]) == []
    assert payload(folder.parent / "model.sig")["subject"][0]["name"] == "model"


@pytest.mark.parametrize("by", ["us", "them"])
def test_what_is_changed_is_named(folder: Path, key: tuple[Path, Path], by: str, theirs: Any) -> None:
    signature = folder.parent / "model.sig"
    if by == "us":
        assert sign(folder, key[0]).code == 0
    else:
        assert theirs("sign", "key", folder, "--private_key", key[0]).returncode == 0
    flip(folder / VAE)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "unet" / "extra.txt").write_text("new")
    (folder / ".hidden").write_text("new")
    (folder / ".git" / "config").write_text("git's own business")
    findings = signing.verify_signature(folder, signature, key[1])
    assert [(each.id, each.file) for each in findings] == [
        ("signature-file", ".hidden"),
        ("signature-file", "scheduler/scheduler_config.json"),
        ("signature-file", "unet/extra.txt"),
        ("signature-file", VAE),
    ]
    listed = {each["name"]: each["digest"] for each in payload(signature)["predicate"]["resources"]}
    assert findings[3].expected == listed[VAE] != findings[3].seen
    assert [each.message for each in findings] == [
        ".hidden wasn't there when the model was signed",
        "scheduler/scheduler_config.json was signed and is missing",
        "unet/extra.txt wasn't there when the model was signed",
        f"{VAE} isn't what was signed",
    ]
    assert theirs("verify", "key", folder, "--public_key", key[1], "--signature", signature).returncode == 1


def test_a_bit_in_a_single_file(tmp_path: Path, key: tuple[Path, Path]) -> None:
    model = Path(shutil.copy(FIXTURES / "sdxl-ids-fractional.safetensors", tmp_path / "m.safetensors"))
    assert sign(model, key[0]).code == 0
    for place in (-1, 20, model.stat().st_size // 2):
        flip(model, place)
        (finding,) = signing.verify_signature(model, tmp_path / "m.safetensors.sig", key[1])
        assert (finding.id, finding.file, finding.message) == (
            "signature-file", None, "m.safetensors isn't what was signed",
        )  # fmt: skip
        flip(model, place)
    model.write_bytes(model.read_bytes() + b"\0")  # which no checkpoint can be opened with, and no matter
    assert found(model, tmp_path / "m.safetensors.sig", key[1]) == [("signature-file", None)]


def test_another_models_signature(folder: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    one = Path(shutil.copy(FIXTURES / "sd1-ids-ok.safetensors", tmp_path))
    other = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    for path in (one, other, folder):
        assert sign(path, key[0]).code == 0
    signature = tmp_path / "sd1-ids-ok.safetensors.sig"
    assert found(other, signature, key[1]) == [("signature-file", None)]
    assert signing.verify_signature(folder, signature, key[1])[0].message == (
        "the signature is that of a file, and this is a folder"
    )
    assert found(one, tmp_path / "model.sig", key[1]) == [("signature-file", None)]
    with pytest.raises(UnreadableError):
        signing.verify_signature(tmp_path / "nothing", signature, key[1])


@pytest.mark.parametrize("hinted", [True, False])
def test_another_key(model: Path, key: tuple[Path, Path], hinted: bool, capsys: pytest.CaptureFixture[str]) -> None:
    _, other = keys(model.parent, "other")
    assert sign(model, key[0]).code == 0
    signature = signing.beside(model)
    if not hinted:  # as signatures of former releases are
        bundle = json.loads(signature.read_text())
        del bundle["verificationMaterial"]["publicKey"]["hint"]
        signature.write_text(json.dumps(bundle))
    assert found(model, signature, other) == [("signature-invalid", None)]
    assert found(model, signature, key[1]) == []
    assert capsys.readouterr().out == ""


def test_an_altered_payload(folder: Path, key: tuple[Path, Path]) -> None:
    """The list says what the changed model is; only the signature doesn't."""
    assert sign(folder, key[0]).code == 0
    signature = signing.beside(folder)
    flip(folder / VAE)
    bundle = json.loads(signature.read_text())
    changed = cli("manifest", folder, "--statement").out
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(changed.encode()).decode()
    signature.write_text(json.dumps(bundle))
    assert found(folder, signature, key[1]) == [("signature-invalid", None)]


def test_a_bundle_with_two_payloads(folder: Path, key: tuple[Path, Path]) -> None:
    """Whichever a reader takes, it isn't one that lies under a signature of the other."""
    assert sign(folder, key[0]).code == 0
    signature = signing.beside(folder)
    bundle = json.loads(signature.read_text())
    flip(folder / VAE)
    changed = base64.b64encode(cli("manifest", folder, "--statement").out.encode()).decode()
    good = json.dumps(bundle["dsseEnvelope"])
    bad = json.dumps(bundle["dsseEnvelope"] | {"payload": changed})
    material = json.dumps(bundle["verificationMaterial"])
    outcomes = []
    for name, first, second in [
        ("dsseEnvelope", good, bad),
        ("dsseEnvelope", bad, good),
        ("dsse_envelope", good, bad),
        ("dsse_envelope", bad, good),
    ]:
        signature.write_text(
            f'{{"mediaType": "{bundle["mediaType"]}", "verificationMaterial": {material}, '
            f'"{name}": {first}, "dsseEnvelope": {second}}}'
        )
        try:
            outcomes += found(folder, signature, key[1])
        except CorruptError:
            outcomes.append(("refused", None))
    assert outcomes == [
        ("signature-invalid", None),
        ("signature-file", VAE),
        ("refused", None),
        ("refused", None),
    ]


def test_a_truncated_bundle(folder: Path, key: tuple[Path, Path]) -> None:
    assert sign(folder, key[0]).code == 0
    signature = signing.beside(folder)
    content = signature.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        signature.write_bytes(content[:length])
        with pytest.raises(CorruptError) as caught:
            signing.verify_signature(folder, signature, key[1])
        assert (caught.value.file, caught.value.exit_code, bool(caught.value.remedy)) == (str(signature), 3, True)


def test_every_byte_of_a_bundle_counts_or_changes_nothing(tmp_path: Path, key: tuple[Path, Path]) -> None:
    model = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    assert sign(model, key[0]).code == 0
    signature = signing.beside(model)
    content = signature.read_bytes()
    flip(model)
    for place in range(0, len(content), 7):
        signature.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            outcome = str(found(model, signature, key[1]))
        except SurgeryError as error:
            outcome = f"{error.exit_code} {error.file}"
        assert outcome in {str([("signature-invalid", None)]), str([("signature-file", None)]), f"3 {signature}"}


def bundles(bundle: dict[str, Any]) -> dict[str, Any]:
    """What else a file could be that is called a signature, by what we say of it."""
    envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
    certificate = {"rawBytes": "AAAA"}
    return {
        "by Sigstore": bundle | {"verificationMaterial": {"certificate": certificate, "tlogEntries": []}},
        "with a certificate": bundle | {"verificationMaterial": {"x509CertificateChain": {"certificates": []}}},
        "no list of files": {name: value for name, value in bundle.items() if name != "dsseEnvelope"},
        "no Sigstore bundle": {},
        "it is no Sigstore bundle": [],
        "no signature of a model": bundle | {"dsseEnvelope": envelope | {"signatures": []}},
        "it is no signature": bundle | {"mediaType": "text/plain"},
        "is no signature of": bundle | {"verificationMaterial": material | {"publicKey": "what?"}},
        "it is no signature of a model": bundle | {"verificationMaterial": material | {"publicKey": {"hint": 5}}},
        "it isn't JSON": "[" * 100_000,
    }


def test_what_is_no_signature_by_a_key(tmp_path: Path, key: tuple[Path, Path]) -> None:
    model = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    assert sign(model, key[0]).code == 0
    signature = signing.beside(model)
    for words, content in bundles(json.loads(signature.read_text())).items():
        signature.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises((CorruptError, UnsupportedError), match=words) as caught:
            signing.verify_signature(model, signature, key[1])
        assert (caught.value.file, caught.value.exit_code) == (str(signature), 3)
    signature.unlink()
    with pytest.raises(UnreadableError):
        signing.verify_signature(model, signature, key[1])


def envelope(statement: Any, private: Path, kind: str = "application/vnd.in-toto+json") -> dict[str, Any]:
    """A bundle that signs anything at all, and rightly."""
    from cryptography.hazmat.primitives import hashes

    key = serialization.load_pem_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    raw = json.dumps(statement).encode()
    signed = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(raw) + raw
    made = key.sign(signed, ec.ECDSA(hashes.SHA256()))
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {}},
        "dsseEnvelope": {
            "payload": base64.b64encode(raw).decode(),
            "payloadType": kind,
            "signatures": [{"sig": base64.b64encode(made).decode()}],
        },
    }


def test_a_good_signature_of_something_else(tmp_path: Path, key: tuple[Path, Path]) -> None:
    model = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    signature = tmp_path / "x.sig"
    sound = signing.statement(sd.open(model))
    predicate = sound["predicate"]

    def outcome(statement: Any, kind: str = "application/vnd.in-toto+json") -> Any:
        signature.write_text(json.dumps(envelope(statement, key[0], kind)))
        return found(model, signature, key[1])

    assert outcome(sound) == []
    shards = {"method": "shards", "hash_type": "sha256", "shard_size": 1000, "allow_symlinks": False}
    other = [each | {"algorithm": "md5"} for each in predicate["resources"]]
    for wrong, kind in [
        (sound | {"predicateType": "https://slsa.dev/provenance/v1"}, CorruptError),
        (sound | {"_type": "x"}, CorruptError),
        (sound | {"subject": []}, CorruptError),
        (sound | {"subject": [{"name": "x", "digest": {"sha256": "00"}}]}, CorruptError),
        ({}, CorruptError),
        ([], CorruptError),
        (sound | {"predicate": predicate | {"serialization": shards}}, CorruptError),
        (sound | {"predicate": predicate | {"resources": other}}, UnsupportedError),
    ]:
        with pytest.raises(kind):
            outcome(wrong)
    with pytest.raises(CorruptError):
        outcome(sound, "text/plain")


@pytest.mark.parametrize("algorithm", ["sha256", "blake2", "blake3"])
def test_all_their_digests(folder: Path, key: tuple[Path, Path], algorithm: Any) -> None:
    from model_signing import hashing
    from model_signing import signing as theirs

    signature = folder.parent / "x.sig"
    config = theirs.Config().use_elliptic_key_signer(private_key=key[0])
    config.set_hashing_config(hashing.Config().use_file_serialization(hashing_algorithm=algorithm))
    config.sign(folder, signature)
    assert found(folder, signature, key[1]) == []
    flip(folder / VAE)
    assert found(folder, signature, key[1]) == [("signature-file", VAE)]


def test_shards_are_refused(folder: Path, key: tuple[Path, Path]) -> None:
    from model_signing import hashing
    from model_signing import signing as theirs

    signature = folder.parent / "x.sig"
    config = theirs.Config().use_elliptic_key_signer(private_key=key[0])
    config.set_hashing_config(hashing.Config().use_shard_serialization(shard_size=1000)).sign(folder, signature)
    with pytest.raises(UnsupportedError, match="whole files"):
        signing.verify_signature(folder, signature, key[1])


def test_what_a_signature_leaves_out(folder: Path, key: tuple[Path, Path], theirs: Any) -> None:
    """A README may be left out; a weight may too, and then it is said that nobody answers for it."""
    signature = folder.parent / "model.sig"
    words = ["sign", "key", folder, "--private_key", key[0], "--ignore-paths", folder / "README.md"]
    assert theirs(*words).returncode == 0
    (folder / "README.md").write_text("Another.")
    assert found(folder, signature, key[1]) == []
    assert theirs(*words, "--ignore-paths", folder / "vae").returncode == 0
    left = [("signature-file", "vae/config.json"), ("signature-file", VAE)]
    assert found(folder, signature, key[1]) == left
    assert theirs(*words, "--ignore-paths", folder).returncode == 0
    assert ("signature-file", "model_index.json") in found(folder, signature, key[1])


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links(folder: Path, key: tuple[Path, Path], theirs: Any) -> None:
    signature = folder.parent / "model.sig"
    assert sign(folder, key[0]).code == 0
    kept = folder / "kept"
    kept.mkdir()
    (folder / VAE).rename(kept / "weights")
    (folder / VAE).symlink_to(kept / "weights")
    (folder / "other").symlink_to(folder / "unet")
    assert found(folder, signature, key[1]) == [("signature-file", "kept/weights"), ("signature-file", "other")]
    for result in (sign(folder, key[0], "--force"), cli("manifest", folder, "--statement")):
        assert (result.code, result.out) == (3, "")
        assert "it is a link, and only files can be signed" in result.err
    assert theirs("sign", "key", folder, "--private_key", key[0]).returncode == 1
    (folder / "other").unlink()
    (folder / "other").symlink_to(folder / "nowhere")
    assert ("signature-file", "other") in found(folder, signature, key[1])
    linked = folder.parent / "linked.safetensors"
    linked.symlink_to(FIXTURES / "vae.safetensors")
    assert sign(linked, key[0]).code == 3
    assert sign(FIXTURES / "vae.safetensors", key[0], "--signature", folder.parent / "l.sig").code == 0
    assert found(linked, folder.parent / "l.sig", key[1]) == []


def test_keys_that_are_none(tmp_path: Path, key: tuple[Path, Path]) -> None:
    model = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    text = tmp_path / "text.pem"
    text.write_text("no key")
    pairs = [
        keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048)),
        keys(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate()),
        keys(tmp_path, "k1", ec.generate_private_key(ec.SECP256K1())),
        (key[1], key[0]),
        (text, text),
        (tmp_path / "none", tmp_path / "none"),
        (tmp_path, tmp_path),
    ]
    for private, _ in pairs:
        result = sign(model, private)
        assert (result.code, result.out) == (3, ""), private
        assert str(private) in result.err
        assert "BEGIN" not in result.err
    signature = signing.beside(model)
    assert not signature.exists()
    assert sign(model, key[0]).code == 0
    for _, public in pairs:
        with pytest.raises((UnsupportedError, UnreadableError)) as caught:
            signing.verify_signature(model, signature, public)
        assert (caught.value.file, caught.value.exit_code) == (str(public), 3)


def test_an_encrypted_key(tmp_path: Path, key: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    private, public = keys(tmp_path, "locked", password=b"secret")
    monkeypatch.delenv("SDSURGERY_KEY_PASSWORD", raising=False)
    assert sign(model, private).code == 3
    monkeypatch.setenv("SDSURGERY_KEY_PASSWORD", "wrong")
    result = sign(model, private)
    assert (result.code, "wrong" in result.err) == (3, False)
    monkeypatch.setenv("SDSURGERY_KEY_PASSWORD", "secret")
    assert sign(model, private).code == 0
    assert found(model, signing.beside(model), public) == []
    assert sign(model, key[0], "--force").code == 0  # which has none, and no matter


def test_what_a_signature_may_replace(folder: Path, key: tuple[Path, Path]) -> None:
    assert sign(folder, key[0]).code == 0
    assert sign(folder, key[0]).code == 4
    assert sign(folder, key[0], "--force").code == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {key[0]: key[0].read_bytes()}
    for target in (key[0], folder / "model_index.json", folder / VAE, folder / "README.md"):
        assert sign(folder, key[0], "--signature", target, "--force").code == 4
    weight = folder / VAE
    assert sign(weight, key[0], "--signature", weight, "--force").code == 4
    assert {path: path.read_bytes() for path in before} == before
    assert sign(folder, key[0], "--signature", folder / "no" / "where.sig").code == 4
    assert sign(FIXTURES / "make_fixtures.py", key[0], "--signature", folder.parent / "no.sig").code == 3


def test_a_key_in_the_folder(folder: Path, key: tuple[Path, Path]) -> None:
    inside = Path(shutil.copy(key[0], folder / "unet"))
    assert sign(folder, inside).code == 2
    assert not signing.beside(folder).exists()


def test_options_that_contradict_each_other(tmp_path: Path, key: tuple[Path, Path]) -> None:
    model = FIXTURES / "vae.safetensors"
    for words in (
        ["--sign"],
        ["--key", key[0]],
        ["--signature", tmp_path / "x"],
        ["--sign", "--key", key[0], "--statement"],
        ["--sign", "--key", key[0], "-o", tmp_path / "x"],
    ):
        assert cli("manifest", model, *words).code == 2
    assert not (tmp_path / "x").exists()


def test_without_the_package(tmp_path: Path, key: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    assert sign(model, key[0]).code == 0
    for name in ("model_signing.signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, name, None)
    result = sign(model, key[0], "--force")
    assert result.code == 2
    assert "pip install 'sdsurgery[signing]'" in result.err
    with pytest.raises(UsageError):
        signing.verify_signature(model, signing.beside(model), key[1])
    assert cli("manifest", model, "--statement").code == 0


def test_a_package_that_asks_nothing_is_not_believed(
    tmp_path: Path, key: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_signing import verifying

    model = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    assert sign(model, key[0]).code == 0
    monkeypatch.setattr(verifying.Config, "verify", lambda *_: None)
    with pytest.raises(UsageError, match="doesn't tell"):
        signing.verify_signature(model, signing.beside(model), key[1])


def test_nothing_is_fetched_and_nothing_needed_at_start(tmp_path: Path, key: tuple[Path, Path]) -> None:
    model = Path(shutil.copy(FIXTURES / "vae.safetensors", tmp_path))
    code = (
        "import sys\nfrom pathlib import Path\n" + OFFLINE + "import sdsurgery.inspection.signing as signing\n"
        "assert not any(name.startswith(('model_signing', 'sigstore', 'cryptography')) for name in sys.modules)\n"
        "model, private, public = map(Path, sys.argv[1:])\n"
        "signing.sign(model, private, signing.beside(model))\n"
        "assert signing.verify_signature(model, signing.beside(model), public) == []\n"
    )
    words = [sys.executable, "-W", "error", "-c", code, model, *key]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_graph_that_the_signature_leaves_out_is_loaded(tmp_path: Path, key: tuple[Path, Path], theirs: Any) -> None:
    folder, signature = tmp_path / "onnx", tmp_path / "onnx.sig"
    words = ("--to", "onnx", "--no-hard-links")
    assert cli("convert", FIXTURES / "sd1-ids-ok.safetensors", folder, *words).code == 0
    sign = ["sign", "key", folder, "--private_key", key[0], "--signature", signature]
    assert theirs(*sign, "--ignore-paths", folder / "unet" / "model.onnx").returncode == 0
    assert [found.file for found in signing.verify_signature(folder, signature, key[1])] == ["unet/model.onnx"]
