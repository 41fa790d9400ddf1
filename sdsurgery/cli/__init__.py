"""The command line: parse, call, render, exit."""

from .app import run

__all__ = ["run"]
