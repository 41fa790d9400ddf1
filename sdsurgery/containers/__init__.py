"""Bytes on disk to checkpoints and back: one file a container, and the two verbs for all of them."""

from .opening import open_checkpoint as open  # noqa: A004 - sdsurgery.open is the verb
from .saving import Saved, container_for, save

__all__ = ["Saved", "container_for", "open", "save"]
