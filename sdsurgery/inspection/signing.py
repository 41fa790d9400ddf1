"""Signatures of models in OpenSSF's format, as the package model-signing makes and checks them.

What is signed is a list of files with their digests: an in-toto statement, here made without that package and exactly
as it makes it. Keys and signatures are the package's business alone. A list is believed only after it said so, and only
as it read it, so that no second reader can be shown another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from .. import progress
from ..checkpoint import Checkpoint
from ..containers import open as open_checkpoint
from ..containers.folders import weight_name
from ..containers.writing import AtomicFile
from ..errors import (
    CorruptError,
    InputError,
    MismatchError,
    OutputError,
    OutputExistsError,
    SurgeryError,
    UnreadableError,
    UnsupportedError,
    UsageError,
)
from ..sources import FileSlice, SourceFile, sweep
from .findings import Finding
from .manifests import Manifest, files_of
from .rules import RULES

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
SUFFIX = ".sig"

_GIT = (".git", ".gitattributes", ".github", ".gitignore")
"""What model-signing leaves out of every folder."""

_ALONE = "."
"""What it calls a model that is a single file."""

_LARGEST = 256 << 20
_THREADS = 2
_CHUNK = 1 << 20
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What model-signing raises for a bundle or a key that isn't as it expects."""

_AGAIN = "fetch it again from where the model was published"
_ASK = "don't trust the model before you have the key and the signature from whoever published it"
_CURVES = "the curves P-256, P-384 and P-521"


# ---------------------------------------------------------------- what is signed


def statement(
    checkpoint: Checkpoint, listed: Manifest | None = None, *, signature: Path | None = None
) -> dict[str, Any]:
    """What a signature of a model says: an in-toto statement that lists its files, as model-signing makes it.

    Of a folder that is every file in it, whether the model is made of it or not, except git's. Each is read once.

    Args:
        checkpoint: The model as it was opened.
        listed: Its manifest, whose SHA-256 need not be computed again.
        signature: Where the signature is going to be; it is left out if that is in the folder.

    Raises:
        MismatchError: If the checkpoint is no file or folder.
        UnsupportedError: If there is a link in the folder, or the model is one.
    """
    path = checkpoint.path
    if path is None:
        raise MismatchError("only what lies on a disk can be signed", remedy="save it first")
    names = _signable(path)
    ignored = _ignored(path, signature)
    names = [name for name in names if not _is_within(name, ignored)]
    alone = not path.is_dir()
    known = {_ALONE if alone else entry.name: entry.sha256 for entry in listed.files} if listed else {}
    digests = _digests(path, {name: "sha256" for name in names if name not in known})
    digests |= {name: known[name] for name in names if name in known}
    whole = hashlib.sha256()
    for name in names:
        whole.update(bytes.fromhex(digests[name]))
    return {
        "_type": STATEMENT,
        "subject": [{"name": _model_name(path), "digest": {"sha256": whole.hexdigest()}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted(ignored),
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": digests[name]} for name in names],
        },
    }


def _model_name(path: Path) -> str:
    return Path(os.path.realpath(path)).name if path.name in {"", ".."} else path.name


def _signable(path: Path) -> list[str]:
    """The files of a model by their names, in the order in which they are signed.

    What model-signing refuses is refused here too, and what it would pass over, such as a folder that can't be read.
    """
    if path.is_symlink():
        raise _link(path)
    names = list(_members(path, refuse_links=True))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UnsupportedError(
                f"a name in it can't be signed: {name!r}", file=path, remedy="rename the file"
            ) from error
    return sorted(names, key=lambda name: PurePosixPath(name).parts)


def _link(path: Path) -> UnsupportedError:
    return UnsupportedError(
        "it is a link, and only files can be signed",
        file=path,
        remedy="sign a copy without links; a download into a folder of its own, not into a cache, has none",
    )


def _members(path: Path, *, refuse_links: bool = False) -> Iterator[str]:
    """Names of all files in a folder, hidden ones too, with ``/``; a link to a folder counts as a file."""
    if not path.is_dir():
        yield _ALONE
        return
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(path / folder) as entries:
                found = [(folder + entry.name, entry.is_symlink(), entry.is_dir()) for entry in entries]
        except OSError as error:
            raise UnreadableError(
                f"it can't be listed: {error.strerror}", file=path / folder, remedy="check its permissions"
            ) from error
        for name, is_link, is_folder in found:
            if is_link and refuse_links:
                raise _link(path / name)
            if is_folder and not is_link:
                pending.append(name + "/")
            else:
                yield name


def _ignored(path: Path, signature: Path | None) -> list[str]:
    """What the signature of a model doesn't cover: git's files, and the signature itself."""
    if signature is not None:
        real, root = Path(os.path.realpath(signature)), Path(os.path.realpath(path))
        if real != root and real.is_relative_to(root):
            return [*_GIT, real.relative_to(root).as_posix()]
    return list(_GIT)


def _is_within(name: str, folders: Iterable[str]) -> bool:
    return any(PurePosixPath(name).is_relative_to(folder) for folder in folders)


def _digests(path: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """Digests of files of a model by their names; what algorithm each should have is given."""
    sizes = {name: _size(path / name) for name in wanted}
    with progress.task(f"reading {len(sizes)} files", sum(sizes.values())) as advance:
        with ThreadPoolExecutor(_THREADS) as pool:
            made = pool.map(lambda name: _digest(path / name, wanted[name]), sizes)
            found = {}
            for name, digest in zip(sizes, made, strict=True):
                found[name] = digest
                advance(sizes[name])
        return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error


def _digest(path: Path, algorithm: str) -> str:
    digest = _hashers()[algorithm]()
    file = SourceFile(path)
    try:
        for piece in sweep((FileSlice(file, 0, file.size),), _CHUNK):
            digest.update(piece)
        file.check_unchanged()
    finally:
        file.close()
    return str(digest.hexdigest())


def _hashers() -> dict[str, Callable[[], Any]]:
    """What model-signing hashes files with, by the names that it gives them."""
    from blake3 import blake3

    return {"sha256": hashlib.sha256, "blake2b": hashlib.blake2b, "blake3": blake3}


# ---------------------------------------------------------------- signing


def beside(model: Path) -> Path:
    """Where a model's signature goes unless somebody says otherwise: beside it, under its whole name and ``.sig``.

    Beside and not in a folder, because another file in it is another model to everybody who has an older signature.
    """
    if model.name in {"", ".."}:
        model = Path(os.path.realpath(model))
    return model.with_name(model.name + SUFFIX)


def needs_password(private_key: Path) -> bool:
    """Whether a private key is encrypted."""
    return b"ENCRYPTED" in _content(private_key, "name a private key in PEM")


def sign(path: Path, private_key: Path, signature: Path, *, password: str | None = None, replace: bool = False) -> None:
    """Sign a model with an elliptic-curve key, for :func:`verify_signature` and ``model_signing verify key``.

    Args:
        path: The file or the folder.
        private_key: A private key in PEM.
        signature: The file to write.
        password: The key's, if it has one.
        replace: Whether the signature may replace a file, though never one of the model's or the key.

    Raises:
        OutputExistsError: If the signature would replace something that it may not.
        UnsupportedError: If the key is none that can sign, or the model can't be signed.
        UsageError: If the package model-signing isn't installed, or the key lies in the model's folder.
    """
    check_target(path, private_key, signature, replace=replace)
    signing, hashing = _library("model_signing.signing"), _library("model_signing.hashing")
    needed = needs_password(private_key)
    if needed and password is None:
        raise UnsupportedError(
            "the key is encrypted", file=private_key, remedy="give its password: SDSURGERY_KEY_PASSWORD=..."
        )
    # Bytes, whatever the package says: it hands the password on to cryptography, which takes nothing else.
    secret = password.encode() if needed and password is not None else None
    config = signing.Config()
    with _key_errors(private_key, "private", "make one: openssl ecparam -name prime256v1 -genkey -noout -out NEW.pem"):
        config.use_elliptic_key_signer(private_key=private_key, password=secret)
    _signable(path)
    inside = [name for name in _ignored(path, signature) if name not in _GIT]
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=inside, ignore_git_paths=True))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "signature"
        try:
            config.sign(path, made)
        except OSError as error:
            raise _unreadable(path, error) from error
        except ValueError as error:
            raise UnsupportedError(f"it can't be signed: {error}", file=path, remedy="see what it says") from error
        raw = made.read_bytes()
    with AtomicFile(signature, replace=replace, size=len(raw), advance=lambda _count: None) as out:
        out.write(raw)


def check_target(path: Path, private_key: Path, signature: Path, *, replace: bool) -> None:
    """Refuse to write over the model or the key, whatever is forced, and to sign a folder that gives the key away."""
    if path.is_dir() and Path(os.path.realpath(private_key)).is_relative_to(os.path.realpath(path)):
        raise UsageError(
            "the private key lies in the folder that is to be signed, and would be published with it",
            remedy="move the key elsewhere",
        )
    if not signature.parent.is_dir():
        raise OutputError("there is no such folder", file=signature, remedy="make the folder first")
    if not signature.exists():
        return
    if not replace:
        raise _taken(signature)
    if private_key.exists() and signature.samefile(private_key):
        raise OutputExistsError("it is the key", file=signature, remedy="choose another name")
    if not _is_bundle(signature) and any(_is_same(path / name, signature) for name in _members(path)):
        raise OutputExistsError("it is a file of the model", file=signature, remedy="choose another name")


def _taken(signature: Path) -> OutputExistsError:
    return OutputExistsError(
        "it exists already", file=signature, remedy="use --force, or choose another name with --signature"
    )


def _is_bundle(path: Path) -> bool:
    """Whether a file is a signature, of whatever kind."""
    try:
        _document(path)
    except InputError:
        return False
    return True


def _library(name: str) -> Any:
    """A module of model-signing, or of what that needs."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            "signatures need the packages model-signing and pyOpenSSL, and they can't be imported",
            remedy="pip install 'sdsurgery[signing]'",
        ) from error


def _content(path: Path, remedy: str) -> bytes:
    file = SourceFile(path)
    try:
        if file.size > _LARGEST:
            raise CorruptError(f"it is too large: {file.size} bytes", file=path, remedy=remedy)
        return file.read(0, file.size)
    finally:
        file.close()


@contextlib.contextmanager
def _key_errors(path: Path, kind: str, remedy: str) -> Iterator[None]:
    """Turn what is wrong with a key into our errors."""
    unsupported = _library("cryptography.exceptions").UnsupportedAlgorithm
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error
    except (*_BROKEN, unsupported) as error:
        if "password" in str(error).lower():
            message = "its password is another one"
            raise UnsupportedError(message, file=path, remedy="give the right one") from error
        raise UnsupportedError(
            f"it is no {kind} key in PEM of {_CURVES}, which are what can be used", file=path, remedy=remedy
        ) from error


# ---------------------------------------------------------------- checking


@dataclass(frozen=True, slots=True)
class _Signed:
    """What a signature that was found good says.

    Attributes:
        files: Algorithm and digest of each file, by name.
        ignored: What it leaves out.
    """

    files: Mapping[str, tuple[str, str]]
    ignored: tuple[str, ...]


class _Asked:
    """Stands in for what model-signing compares a signature with, and tells what it was given to compare.

    It takes the place of the configuration that would hash the model, and of the list that this would make: the
    package asks for one and compares it with the signed one, after the signature was found good and not before. So
    the list is had exactly as the package read it, through nothing but its documented interface.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.signed: Any = None

    def add_ignored_paths(self, **_arguments: object) -> None:
        """Nothing: the list says what is ignored."""

    def hash(self, *_arguments: object, **_options: object) -> _Asked:
        """The list to compare with."""
        return self

    def __eq__(self, signed: object) -> bool:
        self.signed = signed
        return True


def verify_signature(path: Path, signature: Path, public_key: Path) -> list[Finding]:
    """Check a model against a signature that was made with a key, by us or by ``model_signing sign key``.

    Args:
        path: The file or the folder.
        signature: The signature.
        public_key: The public key in PEM.

    Returns:
        ``signature-invalid`` alone where the key didn't sign what the signature says; else ``signature-file`` for each
        file that isn't as it was signed.

    Raises:
        CorruptError: If the signature is none.
        UnreadableError: If something can't be read.
        UnsupportedError: If the signature was made in another way, or the key is of another kind.
        UsageError: If the package model-signing isn't installed.
    """
    signed = _signed(signature, public_key)
    if isinstance(signed, Finding):
        return [signed]
    return sorted(_differences(path, signature, signed), key=lambda found: PurePosixPath(found.file or "").parts)


def _finding(rule: str, message: str, **facts: str | None) -> Finding:
    return Finding(rule, RULES[rule].severity, message, **facts)  # type: ignore[arg-type]


def _signed(signature: Path, public_key: Path) -> _Signed | Finding:
    """What a signature says, if the key made it."""
    verifying = _library("model_signing.verifying")
    invalid = _library("cryptography.exceptions").InvalidSignature
    hint = _hint(_document(signature), signature)
    config, asked = verifying.Config(), _Asked()
    with _key_errors(public_key, "public", "make it of the private one: openssl pkey -pubout -in PRIVATE -out PUBLIC"):
        config.use_elliptic_key_verifier(public_key=public_key)
        ours = _key_hash(public_key)
    if hint and hint != ours:
        message = "the signature was made with another key"
        return _finding("signature-invalid", message, expected=hint, seen=ours, remedy=_ASK)
    config.set_hashing_config(asked)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where the package prints a warning about old signatures
            config.verify(Path(), signature)
        return _read(asked.signed, signature)
    except invalid:
        return _finding("signature-invalid", "the key did not sign what the signature says", remedy=_ASK)
    except OSError as error:
        raise _unreadable(signature, error) from error
    except _BROKEN as error:
        raise _no_signature(signature, str(error).partition("\n")[0]) from error


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(f"it can't be read: {error.strerror}", file=path, remedy="check its permissions")


def _no_signature(path: Path, why: str) -> CorruptError:
    remedy = "name a signature that sdsurgery manifest --sign or model_signing sign key wrote, and fetch it again"
    return CorruptError(f"it is no signature of a model: {why}", file=path, remedy=remedy)


def _document(path: Path) -> dict[str, Any]:
    """A bundle as JSON, for telling what kind it is, and for nothing else."""
    try:
        document = json.loads(_content(path, "name a signature"))
    except (ValueError, RecursionError) as error:
        raise _no_signature(path, "it isn't JSON") from error
    if not isinstance(document, dict) or not isinstance(document.get("verificationMaterial"), dict):
        raise _no_signature(path, "it is no Sigstore bundle")
    return document


def _hint(document: Mapping[str, Any], signature: Path) -> str | None:
    """Which key a bundle says that it was made with; refuses one that was made in another way."""
    material = document["verificationMaterial"]
    if "publicKey" not in material:
        keyless = "x509CertificateChain" not in material
        made = "without a key of its own, by Sigstore" if keyless else "with a certificate"
        raise UnsupportedError(
            f"it was made {made}, and only signatures by a key can be checked",
            file=signature,
            remedy=f"use model_signing verify {'sigstore' if keyless else 'certificate'}",
        )
    if "dsseEnvelope" not in document:
        raise UnsupportedError(
            "it signs a file as such, and no list of files",
            file=signature,
            remedy="name a signature that model_signing made",
        )
    key = material["publicKey"]
    hint = key.get("hint") if isinstance(key, dict) else None
    return hint if isinstance(hint, str) else None


def _key_hash(public_key: Path) -> str:
    """What a bundle calls a key: the SHA-256 of its PEM."""
    serialization = _library("cryptography.hazmat.primitives.serialization")
    key = serialization.load_pem_public_key(_content(public_key, "name a public key in PEM"))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.PEM, form)).hexdigest()


def _read(signed: Any, signature: Path) -> _Signed:
    """The list that model-signing found good."""
    if signed is None:
        raise UsageError(
            "this version of the package model-signing doesn't tell what was signed",
            remedy="pip install 'sdsurgery[signing]'",
        )
    method = signed.serialization_type
    files = {
        str(each.identifier): (str(each.digest.algorithm), str(each.digest.digest_hex))
        for each in signed.resource_descriptors()
    }
    unknown = sorted({algorithm for algorithm, _ in files.values()} - _hashers().keys())
    if method["method"] != "files" or unknown:
        raise UnsupportedError(
            f"it signs {', '.join(unknown) or 'parts'} of files, and not whole files by SHA-256, BLAKE2 or BLAKE3",
            file=signature,
            remedy="sign again with one digest a file, as is usual",
        )
    return _Signed(files, (*_GIT, *map(str, method.get("ignore_paths", ()))))


def _differences(path: Path, signature: Path, signed: _Signed) -> Iterator[Finding]:
    """What of a model isn't as it was signed. No name that the signature gives is ever opened unless it was found."""
    if not path.exists():
        raise UnreadableError("there is no such file", file=path, remedy="check the name")
    there = set(_members(path))
    if (there == {_ALONE}) != (signed.files.keys() == {_ALONE}):
        one, other = ("file", "folder") if there == {_ALONE} else ("folder", "file")
        message = f"the signature is that of a {other}, and this is a {one}"
        yield _finding("signature-file", message, expected=other, seen=one)
        return
    for name in signed.files.keys() - there:
        yield _finding("signature-file", f"{name} was signed and is missing", file=name, remedy=_AGAIN)
    seen = _digests(path, {name: signed.files[name][0] for name in signed.files.keys() & there})
    for name, digest in seen.items():
        wanted = signed.files[name][1]
        if digest != wanted:
            called, file = (path.name, None) if name == _ALONE else (name, name)
            message = f"{called} isn't what was signed"
            yield _finding("signature-file", message, file=file, expected=wanted, seen=digest, remedy=_AGAIN)
    rest = there - signed.files.keys()
    added = {name for name in rest if not _is_within(name, signed.ignored) and not _is_same(path / name, signature)}
    for name in added:
        yield _finding("signature-file", f"{name} wasn't there when the model was signed", file=name)
    for name in _made_of(path) - signed.files.keys() - added if path.is_dir() else ():
        if "/" in name or name.endswith(".json") or weight_name(name):
            yield _finding("signature-file", f"{name} is left out by the signature, and loaded", file=name)


def _is_same(path: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.samefile(other)
    return False


def _made_of(path: Path) -> set[str]:
    """The files that a folder's model is made of, so far as it can be opened: whoever loads it reads those."""
    try:
        return {name for name, _ in files_of(open_checkpoint(path))}
    except SurgeryError:
        return set()
