"""Recipes: a file of operations, from which anyone with the same inputs gets the same bytes."""

from .locking import Lock, read_lock
from .recipe import Recipe, load
from .running import Ran, plan, run

__all__ = ["Lock", "Ran", "Recipe", "load", "plan", "read_lock", "run"]
