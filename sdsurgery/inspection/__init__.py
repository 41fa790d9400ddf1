"""Questions that change nothing."""

from .inspecting import Inspection, inspect

__all__ = ["Inspection", "inspect"]
