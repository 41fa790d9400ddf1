"""A LoRA file: its tensors grouped by the module that they change, and how much each group counts.

Only headers and the alphas, one number each, are read.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, Tensor
from ..errors import CorruptError, MismatchError, UnreadableError, UnsupportedError
from .naming import PEFT_PREFIX

CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the fields of PEFT's config, with the component's name in front of each."""


_LONGEST_CONFIG = 1 << 20

_NAMED = r"(?:\.[^.]+)?"
"""PEFT's name of an adapter, which it writes in some releases and not in others."""

_PARTS = tuple(
    (re.compile(rf"(?P<module>.+?){pattern}"), part)
    for pattern, part in (
        (r"(?P<old>[._]lora|\.lora_linear_layer)\.down\.weight", "down"),
        (r"(?P<old>[._]lora|\.lora_linear_layer)\.up\.weight", "up"),
        (rf"\.lora_(?:down|A){_NAMED}\.weight", "down"),
        (rf"\.lora_(?:up|B){_NAMED}\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"(?P<old>[._]lora|\.lora_linear_layer)?\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (rf"\.lora_magnitude_vector{_NAMED}(?:\.weight)?", "magnitude"),
        *((rf"\.{name}{_NAMED}", name) for name in (
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        )),
        *((rf"\.{name}", name) for name in ("diff", "diff_b", "w_norm", "b_norm")),
    )
)  # fmt: skip

_UNSUPPORTED = {
    "oft_diag": "OFT", "oft_blocks": "OFT", "oft_r": "OFT", "on_input": "IA3", "ia3_l": "IA3", "a1.weight": "GLoRA",
    "a2.weight": "GLoRA", "b1.weight": "GLoRA", "b2.weight": "GLoRA", "boft_": "BOFT", "lokr_t1": "LoKr with lokr_t1",
    "bias_indices": "LyCORIS' sparse bias", "bias_values": "LyCORIS' sparse bias", "bias_size": "LyCORIS' sparse bias",
    "lora_B.bias": "LoRA with a bias", "lora_up.bias": "LoRA with a bias", "lora_embedding_": "LoRA of an embedding",
    "bundle_emb.": "an embedding bundled with the LoRA", "vera_lambda": "VeRA", ".scale": "a stored scale",
}  # fmt: skip
"""What is known and not computed, by a mark in the key."""

_KINDS: Mapping[str, tuple[tuple[frozenset[str], ...], frozenset[str]]] = {
    kind: (tuple(frozenset(either.split()) for either in needed), frozenset((either + " " + more).split()))
    for kind, needed, either, more in (
        ("lora", ("up down",), "up down", "mid alpha dora_scale magnitude"),
        (
            "loha", ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b",), "hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
            "hada_t1 hada_t2 alpha dora_scale",
        ),
        (
            "lokr",
            (
                "lokr_w1 lokr_w2", "lokr_w1 lokr_w2_a lokr_w2_b", "lokr_w1_a lokr_w1_b lokr_w2",
                "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b",
            ),
            "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b", "lokr_t2 alpha dora_scale",
        ),
        ("full", ("diff", "diff_b"), "diff diff_b", "alpha"),
        ("norm", ("w_norm", "b_norm"), "w_norm b_norm", "alpha"),
    )
}  # fmt: skip
"""Of each kind, the sets of tensors one of which it needs, and all that it may have."""


@dataclass(frozen=True, slots=True)
class Group:
    """What a file has for one module.

    Attributes:
        module: The module as the file names it.
        keys: The keys, by the part that each is.
        tensors: The tensors, by the same; without the alpha.
        kind: ``lora`` (LoCon, too), ``loha``, ``lokr``, ``full`` or ``norm``; ``None`` if it can't be told.
        alpha: What stands under ``alpha``.
        fault: What is wrong with it.
    """

    module: str
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    kind: str | None
    alpha: float | None
    fault: str | None = None

    @property
    def rank(self) -> int | None:
        """Its rank, if it has one."""
        for part, axis in (("down", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("hada_w1_b", 0)):
            tensor = self.tensors.get(part)
            if tensor is not None and tensor.shape:
                return tensor.shape[axis]
        return None


@dataclass(frozen=True)
class Adapter:
    """A LoRA file.

    Attributes:
        checkpoint: The file.
        groups: By the module's name in the file.
        strange: Keys that are no part of any known kind, with what they are.
        folder: The folder that it lies in.
        config: PEFT's config of it, its own or as diffusers keeps it: fields by component, that of all under ``""``.
    """

    checkpoint: Checkpoint
    groups: Mapping[str, Group]
    strange: Mapping[str, str]
    folder: str = ""
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def kinds(self) -> Counter[str]:
        """How many modules it changes in which way."""
        return Counter(group.kind or "unknown" for group in self.groups.values())

    @property
    def naming(self) -> str:
        """Whose names it has: ``kohya``, ``diffusers`` or ``peft``."""
        first = next(iter(self.groups), "")
        return "kohya" if first.startswith("lora_") else "peft" if first.startswith(PEFT_PREFIX) else "diffusers"

    def scale(self, group: Group, component: str, module: str) -> float:
        """What a group's product is multiplied with: alpha / rank, or what PEFT's config says.

        Args:
            group: The group.
            component: The component that it is for.
            module: The module's name within that.

        Raises:
            UnsupportedError: If the config can't be understood.
        """
        if group.kind in {"full", "norm"}:
            return 1.0
        rank = group.rank
        if group.alpha is not None:
            # LyCORIS and A1111 both take a LoKr whose matrices are whole as it is, whatever its alpha.
            return group.alpha / rank if rank else 1.0
        config = self.config.get(component, self.config.get("", {}))
        return _configured(config, rank, module, self.checkpoint) if config else 1.0


def looks_like(checkpoint: Checkpoint) -> bool:
    """Whether a file is a LoRA: most of its keys are parts of one."""
    keys = list(checkpoint)
    return bool(keys) and sum(_part(key) is not None for key in keys) > len(keys) / 2


def read(checkpoint: Checkpoint) -> Adapter:
    """The LoRA that a checkpoint is.

    Raises:
        MismatchError: If it is none.
        UnsupportedError: If its config can't be understood.
    """
    found: dict[str, dict[str, str]] = {}
    strange: dict[str, str] = {}
    for key in checkpoint:
        told = _part(key)
        if told is None:
            strange[key] = next((what for mark, what in _UNSUPPORTED.items() if mark in key), "no part of a LoRA")
        elif told[1] in found.setdefault(told[0], {}):
            strange[key] = f"the same as {found[told[0]][told[1]]}"
        else:
            found[told[0]][told[1]] = key
    if not found:
        raise MismatchError(
            "it is no LoRA: no key is a part of one", file=checkpoint.path,
            remedy="name a LoRA's file; two models are computed into one by merge",
        )  # fmt: skip
    groups = {module: _group(checkpoint, module, keys) for module, keys in found.items()}
    path = checkpoint.path
    folder = path.resolve().parent if path else None
    return Adapter(checkpoint, groups, strange, folder.name if folder else "", _configs(checkpoint, folder))


def _part(key: str) -> tuple[str, str] | None:
    """The module that a key is for, and which part it is."""
    for pattern, part in _PARTS:
        match = pattern.fullmatch(key)
        if match:
            module = match["module"]
            if match.groupdict().get("old") == "_lora":
                module = module.replace(".processor.", ".")
            return module, part
    return None


def _group(checkpoint: Checkpoint, module: str, keys: Mapping[str, str]) -> Group:
    tensors = {part: checkpoint[key] for part, key in keys.items() if part != "alpha"}
    fitting = [kind for kind, (_, known) in _KINDS.items() if keys.keys() <= known and tensors.keys() & known]
    kind = fault = None
    if not tensors:
        fault = "it has an alpha and nothing else"
    elif not fitting:
        fault = f"it has tensors of several kinds: {', '.join(sorted(keys))}"
    else:
        kind = fitting[0]
        if not any(needed <= tensors.keys() for needed in _KINDS[kind][0]) or _torn(kind, tensors):
            fault = f"it has {', '.join(sorted(tensors))} and not all that goes with it"
    wrong = next((part for part, tensor in tensors.items() if tensor.dtype.kind != "float"), None)
    if wrong:
        fault = f"its {wrong} is {tensors[wrong].dtype}"
    return Group(module, keys, tensors, kind, _alpha(checkpoint, keys.get("alpha")), fault)


def _torn(kind: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a part is there that means nothing without another, or means the same as another."""
    has = tensors.keys()
    if kind == "loha":
        return ("hada_t1" in has) != ("hada_t2" in has)
    if kind == "lokr":
        both = any({f"lokr_{w}", f"lokr_{w}_a"} <= has or {f"lokr_{w}", f"lokr_{w}_b"} <= has for w in ("w1", "w2"))
        return both or ("lokr_t2" in has and "lokr_w2_a" not in has)
    return {"dora_scale", "magnitude"} <= has


def _alpha(checkpoint: Checkpoint, key: str | None) -> float | None:
    if key is None:
        return None
    tensor = checkpoint[key]
    if tensor.numel != 1 or tensor.dtype.numpy is None:
        message = f"{key} is {tensor} and no number"
        raise CorruptError(message, file=checkpoint.path, key=key, remedy="download or copy it again")
    value = float(tensor.numpy().reshape(()).astype("f8"))
    if not math.isfinite(value):
        raise CorruptError(f"{key} is {value}", file=checkpoint.path, key=key, remedy="download or copy it again")
    return value


# ---------------------------------------------------------------- PEFT's config


def _configs(checkpoint: Checkpoint, folder: Path | None) -> dict[str, dict[str, Any]]:
    """PEFT's config by component: what the metadata hold, or a file beside it."""
    if METADATA_KEY in checkpoint.metadata:
        fields = _json(checkpoint.metadata[METADATA_KEY], f"its metadata's {METADATA_KEY}", checkpoint.path)
        found: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            component, _, inner = name.partition(".")
            found.setdefault(component, {})[inner] = value
        return found
    if folder is None or not any(key.startswith(PEFT_PREFIX) for key in checkpoint):
        return {}
    file = folder / CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        text = file.read_bytes()[: _LONGEST_CONFIG + 1] if file.stat().st_size <= _LONGEST_CONFIG else b""
    except OSError as error:
        raise UnreadableError(f"it can't be read: {error.strerror}", file=file) from error
    return {"": _json(text.decode("utf-8", "replace"), "it", file)}


def _json(text: str, what: str, file: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptError(f"{what} is no JSON object", file=file, remedy="download or copy it again")
    return found


def _configured(config: Mapping[str, Any], rank: int | None, module: str, checkpoint: Checkpoint) -> float:
    """The scale that PEFT's config states: alpha over r, or over its root."""
    alpha = _pattern(config, "alpha_pattern", module, checkpoint)
    alpha = config.get("lora_alpha", config.get("alpha")) if alpha is None else alpha
    if rank is None:
        told = _pattern(config, "rank_pattern", module, checkpoint)
        rank = config.get("r") if told is None else told
    if alpha is None or rank is None:
        return 1.0
    given = tuple(map(_number, (alpha, rank)))
    if not all(map(math.isfinite, given)) or not given[1] > 0:
        message = f"its config has the alpha {alpha!r} and the rank {rank!r}"
        raise UnsupportedError(message, file=checkpoint.path, remedy="name one whose config has numbers")
    return given[0] / (math.sqrt(given[1]) if config.get("use_rslora") else given[1])


def _number(value: Any) -> float:
    """A number of a config; NaN for whatever else stands there, and for what is beyond all floats."""
    with contextlib.suppress(OverflowError):
        return float(value) if isinstance(value, int | float) else math.nan
    return math.nan


def _pattern(config: Mapping[str, Any], name: str, module: str, checkpoint: Checkpoint) -> Any:
    """What a pattern of the config says of a module.

    PEFT takes them for regular expressions; one that is no plain name is refused, for a file's regular expression may
    take forever.
    """
    patterns = config.get(name) or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            message = f"{pattern!r} in its {name} is no plain name of a module"
            raise UnsupportedError(message, file=checkpoint.path, remedy="spell the names out in its config")
        if module == plain or (module.endswith(f".{plain}") and not pattern.startswith("^")):
            return value
    return None
