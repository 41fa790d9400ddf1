"""The pickle of a textual inversion embedding, as the webui and the method's own authors write it.

``{"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name", "step", "sd_checkpoint",
"sd_checkpoint_name"}``: the vectors are the checkpoint's one tensor, what is a text or a number is metadata. The webui,
ComfyUI, diffusers and kohya's trainer read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import UnsupportedError
from .pickles import Call

VECTORS = "string_to_param"
PLACEHOLDER = "*"
"""What the vectors are called in it; diffusers takes no other name."""

PLACEHOLDER_ID = 265
"""The id of ``*`` in CLIP's vocabulary."""

NAME, STEP = "name", "step"
TEXTS = (NAME, "sd_checkpoint", "sd_checkpoint_name")
NAMES = (*TEXTS, STEP)
"""What it says of the vectors, in metadata under the same names."""

TWO_ENCODERS = ("clip_l", "clip_g")
"""Names of vectors that say which text encoder they are for, which the pickle has no place for."""

_TOKENS = "string_to_token"
_PARAMETERS = "torch.nn.modules.container.ParameterDict"
_STEPS = re.compile("0|[1-9][0-9]{0,8}")

Entry = tuple[str, Any]
Value = str | int | dict[str, int] | None


def unnested(value: Any) -> tuple[Entry, dict[str, str], list[tuple[Any, Any]]] | None:
    """The vectors with their name, the metadata, and what else lies in an unpickled value; ``None`` if it is no such.

    A file of several placeholders, which no loader takes, isn't one either.
    """
    vectors = _vectors(value.get(VECTORS)) if isinstance(value, dict) else None
    if vectors is None or len(vectors) != 1 or not isinstance(next(iter(vectors)), str):
        return None
    metadata: dict[str, str] = {}
    left = []
    for key, entry in value.items():
        if key in TEXTS and isinstance(entry, str):
            metadata[key] = entry
        elif key == STEP and type(entry) is int and _STEPS.fullmatch(str(entry)):
            metadata[key] = str(entry)
        elif not (key == VECTORS or (key == _TOKENS and isinstance(entry, dict)) or (key in NAMES and entry is None)):
            left.append((key, entry))
    return next(iter(vectors.items())), metadata, left


def _vectors(entry: Any) -> dict[Any, Any] | None:
    """The dict of vectors, which old files have as a module's parameters."""
    if isinstance(entry, Call) and str(entry) == _PARAMETERS and isinstance(entry.state, dict):
        entry = entry.state.get("_parameters")
    return entry if isinstance(entry, dict) else None


def nested(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> tuple[dict[str, Value], dict[str, str]]:
    """What a checkpoint's pickle holds beside the vectors, by name, and the metadata that it has no place for.

    Raises:
        UnsupportedError: If the vectors aren't those of one text encoder.
    """
    keys = [*checkpoint]
    if len(keys) != 1 or keys[0] in TWO_ENCODERS:
        raise UnsupportedError(
            "the pickle of an embedding holds the vectors of one text encoder, without saying of which",
            file=checkpoint.path,
            remedy="write a .safetensors, which the same programs read",
        )
    rest = dict(metadata)
    fields: dict[str, Value] = {_TOKENS: {PLACEHOLDER: PLACEHOLDER_ID}}
    fields |= {key: rest.pop(key, None) for key in TEXTS}
    fields[STEP] = int(rest.pop(STEP)) if _STEPS.fullmatch(rest.get(STEP, "")) else None
    return fields, rest
