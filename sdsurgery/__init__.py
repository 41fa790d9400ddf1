"""Checkpoint surgery for Stable Diffusion.

import sdsurgery as sd
sd.open("anything-v3.ckpt").pipe(sd.FixClip()).save("anything-v3-1.safetensors")
"""

__version__ = "0.1.0"

from .checkpoint import Change, Checkpoint, Note, Step, Tensor
from .containers import Saved, open, save  # noqa: A004 - sd.open is the verb
from .errors import SurgeryError
from .operations import (
    BakeLora,
    Cast,
    Convert,
    ConvertEmbedding,
    Extract,
    ExtractLora,
    FixClip,
    Merge,
    MergeVae,
    Metadata,
    Prune,
    Replace,
    sidecar_of,
)

__all__ = [
    "BakeLora",
    "Cast",
    "Change",
    "Checkpoint",
    "Convert",
    "ConvertEmbedding",
    "Extract",
    "ExtractLora",
    "FixClip",
    "Merge",
    "MergeVae",
    "Metadata",
    "Note",
    "Prune",
    "Replace",
    "Saved",
    "Step",
    "SurgeryError",
    "Tensor",
    "open",
    "save",
    "sidecar_of",
]
