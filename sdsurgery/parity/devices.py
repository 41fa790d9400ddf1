"""Which device the runtimes share, and what is missing where one was asked for that doesn't work."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from ..dtypes import F32
from ..errors import UnsupportedError
from .settings import Device

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime-gpu",
    "onnxruntime",
    "numpy",
    "safetensors",
    "sdsurgery",
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The device that everything runs on.

    Attributes:
        device: ``cpu`` or ``cuda``.
        name: The GPU's, or the processor's.
        why_not_cuda: Why a GPU wasn't taken, if ``auto`` looked for one.
        versions: Of the libraries and the driver.
    """

    device: str
    name: str
    why_not_cuda: str | None
    versions: Mapping[str, str]


def why_no_gpu() -> str | None:
    """Why no GPU can be used by all runtimes; ``None`` where one can."""
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU: there is none, or its driver doesn't work"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "ONNX Runtime has no CUDA provider: onnxruntime-gpu isn't installed, or onnxruntime lies over it"
    onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(_copying(), providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return (
            "ONNX Runtime's CUDA provider can't be loaded: CUDA or cuDNN of the versions it was built for are missing"
        )
    return None


def choose(wanted: Device) -> Chosen:
    """The device; ``auto`` takes a GPU where torch and ONNX Runtime both work on it.

    Raises:
        UnsupportedError: If a GPU was asked for, and one of them doesn't work on it.
    """
    missing = None if wanted == "cpu" else why_no_gpu()
    if wanted == "cuda" and missing:
        raise UnsupportedError(missing, remedy="install what is missing, or leave --device cuda out")
    device = "cpu" if wanted == "cpu" or missing else "cuda"
    return Chosen(device, _name(device), missing if wanted == "auto" else None, _versions(device))


def _copying() -> bytes:
    """The smallest graph: an input that is an output."""
    from ..graphs.drawing import OLDEST, Drawing

    drawing = Drawing("copy", {}, compute=F32, opset=OLDEST)
    drawing.output("output", drawing.input("input", F32, [1]), [1])
    return b"".join(drawing.graph().linked({}, {}).chunks())


def _name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    import torch

    return str(torch.cuda.get_device_name())


def _versions(device: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        import torch

        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["driver"] = _driver()
    return found


def _driver() -> str:
    """The version of the GPU's driver, which no library tells."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown"
    words = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)  # noqa: S603 - fixed words
    told = done.stdout.splitlines()
    return told[0].strip() if told else "unknown"
