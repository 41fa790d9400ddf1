"""Questions that change nothing."""

from .inspecting import ComponentReport, Inspection, inspect

__all__ = ["ComponentReport", "Inspection", "inspect"]
