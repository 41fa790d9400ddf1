"""Operations: checkpoint to checkpoint, each declared once."""

from .bake_lora import BakeLora
from .base import Operation, Param
from .cast import Cast
from .convert import Convert, sidecar_of
from .convert_embedding import ConvertEmbedding
from .extract_lora import ExtractLora
from .fix_clip import FixClip
from .grafts import Extract, MergeVae, Replace
from .merge import Merge
from .metadata import Metadata
from .prune import Prune

_ALL: tuple[type[Operation], ...] = (
    FixClip, MergeVae, Merge, BakeLora, ExtractLora, Extract, Replace, Prune, Cast, Metadata, Convert, ConvertEmbedding,
)  # fmt: skip

OPERATIONS: dict[str, type[Operation]] = {operation.name: operation for operation in _ALL}
"""Every operation by the name that the command line and the records use."""

__all__ = [
    "OPERATIONS",
    "BakeLora",
    "Cast",
    "Convert",
    "ConvertEmbedding",
    "Extract",
    "ExtractLora",
    "FixClip",
    "Merge",
    "MergeVae",
    "Metadata",
    "Operation",
    "Param",
    "Prune",
    "Replace",
    "sidecar_of",
]
