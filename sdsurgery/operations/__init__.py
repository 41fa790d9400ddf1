"""Operations: checkpoint to checkpoint, each declared once."""

from .base import Operation, Param
from .cast import Cast
from .convert import Convert, sidecar_of
from .fix_clip import FixClip
from .grafts import Extract, MergeVae, Replace
from .merge import Merge
from .metadata import Metadata
from .prune import Prune

OPERATIONS: dict[str, type[Operation]] = {
    operation.name: operation
    for operation in (FixClip, MergeVae, Merge, Extract, Replace, Prune, Cast, Metadata, Convert)
}
"""Every operation by the name that the command line and the records use."""

__all__ = [
    "OPERATIONS",
    "Cast",
    "Convert",
    "Extract",
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
