"""diff, fingerprint, manifest and verify against cmp, hashlib, NumPy, model-signing and tensortracker.

    python benchmarks/truth.py FOLDER [--rounds 5] [--only NAME]...

FOLDER gets about 7 GB of made-up checkpoints; how it is measured stands in racing.py. tensortracker wants packages that
nothing else here does: it takes part if TENSORTRACKER_PYTHON names a Python that has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from racing import SDSURGERY, Contender, Race, command, make, today

TENSORTRACKER = "import sys, tensortracker; tensortracker.resolve_diff(*sys.argv[1:])"
SIGNING = [sys.executable, "-m", "model_signing"]


def tensortracker(one: Path, other: Path) -> list[Contender]:
    python = os.environ.get("TENSORTRACKER_PYTHON")
    return [Contender("tensortracker", [python, "-c", TENSORTRACKER, str(one), str(other)])] if python else []


def key_pair(folder: Path) -> tuple[str, str]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = folder / "private.pem", folder / "public.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return str(private), str(public)


def signing(folder: Path, model: Path) -> list[Contender]:
    private, public = key_pair(folder)
    theirs, ours, path = str(folder / "theirs.sig"), str(folder / "ours.sig"), str(model)
    sign = [*SIGNING, "sign", "key", path, "--private_key", private, "--signature"]
    check = [*SIGNING, "verify", "key", path, "--public_key", public, "--signature", theirs]
    subprocess.run([*sign, theirs], check=True)
    own = [*SDSURGERY, "manifest", path, "--sign", "--key", private, "--signature", ours, "--force"]
    return [
        Contender("model_signing sign", [*sign, ours]),
        Contender("sdsurgery manifest --sign", own),
        Contender("model_signing verify", check),
        Contender("sdsurgery verify --signature", [*SDSURGERY, "verify", path, "--signature", theirs, "--key", public]),
    ]


def races(folder: Path) -> list[Race]:
    one = make(folder, "sd1", "fp16", "sd1-fp16.safetensors", "--ids", "right")
    other = make(folder, "sd1", "fp16", "sd1-other.safetensors", "--ids", "right", "--seed", "3")
    twin, listed, model = folder / "sd1-twin.safetensors", folder / "sd1.manifest.json", folder / "sd1-truth"
    if not twin.exists():
        shutil.copy(one, twin)
    if not model.exists():
        subprocess.run([*SDSURGERY, "convert", str(one), str(model), "--quiet"], check=True)
    subprocess.run([*SDSURGERY, "manifest", str(one), "-o", str(listed), "--force", "--quiet"], check=True)
    warm, digests = [one, other, twin], " ".join(today("digests", one))
    return [
        Race("diff of equal files, 2.1 GB each", [
            Contender("cmp", ["cmp", str(one), str(twin)]),
            Contender("sdsurgery diff", [*SDSURGERY, "diff", str(one), str(twin)]),
            Contender("sdsurgery diff, against the diffusers folder", [*SDSURGERY, "diff", str(one), str(model)]),
        ], warm),
        Race("diff of different files with all figures, 2.1 GB each", [
            Contender("NumPy, mapped, two threads", today("diff", one, other)),
            Contender("sdsurgery diff", ["sh", "-c", f"{' '.join(SDSURGERY)} diff {one} {other} || true"]),
            *tensortracker(one, other),
        ], warm),
        Race("digests, 2.1 GB", [
            Contender("hashlib and blake3, mapped, two threads", today("digests", one)),
            Contender("sdsurgery manifest", [*SDSURGERY, "manifest", str(one)]),
            Contender("sdsurgery verify --manifest", [*SDSURGERY, "verify", str(one), "--manifest", str(listed)]),
            Contender("sdsurgery fingerprint", [*SDSURGERY, "fingerprint", str(one)]),
        ], warm),
        Race("all checks, values included, 2.1 GB", [
            Contender("plain read, then the digests", ["sh", "-c", f"cat {one} > /dev/null && {digests}"]),
            Contender("sdsurgery verify", [*SDSURGERY, "verify", str(one)]),
        ], warm),
        Race("signing, 2.1 GB", signing(folder, one), warm),
    ]  # fmt: skip


if __name__ == "__main__":
    command(races)()
