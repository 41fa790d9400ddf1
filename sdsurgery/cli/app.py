"""The group of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import FrameType

import click

from .. import __version__
from ..errors import OutputError, SurgeryError, UsageError

INTERRUPTED = 130
TERMINATED = 143


class _TerminatedError(BaseException):
    """The process was asked to end; what is half written is removed on the way out."""


class _Commands(click.Group):
    """A group whose commands are imported when they are asked for: each alone, so that small ones start fast."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(_PLACES)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _PLACES:
            return None
        module, attribute = _PLACES[name]
        found = getattr(import_module(f".{module}", __package__), attribute)
        return found if isinstance(found, click.Command) else found(name)


_PLACES = {
    "inspect": ("inspect", "inspect_command"),
    "diff": ("diff", "diff_command"),
    "fingerprint": ("fingerprint", "fingerprint_command"),
    "manifest": ("manifest", "manifest_command"),
    "verify": ("verify", "verify_command"),
    "fix-clip": ("fix_clip", "fix_clip_command"),
    "merge": ("surgery", "surgery_command"),
    "bake-lora": ("surgery", "surgery_command"),
    "extract-lora": ("surgery", "surgery_command"),
    "merge-vae": ("surgery", "surgery_command"),
    "extract": ("surgery", "surgery_command"),
    "replace": ("surgery", "surgery_command"),
    "prune": ("surgery", "surgery_command"),
    "cast": ("surgery", "surgery_command"),
    "metadata": ("surgery", "surgery_command"),
    "convert": ("convert", "convert_command"),
    "convert-embedding": ("surgery", "surgery_command"),
    "parity": ("parity", "parity_command"),
    "pipe": ("pipe", "pipe_command"),
    "run": ("run", "run_command"),
    "recipe": ("recipe", "recipe_command"),
}
"""Each command's module, and what makes it there: the command itself, or a function that is told its name."""


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sdsurgery")
def sdsurgery() -> None:
    """Checkpoint surgery for Stable Diffusion: repair, swap, prune, cast, convert and inspect weights.

    The input is never touched without --in-place, and an output appears whole or not at all. Exit codes: 0 done,
    or yes; 1 the answer is no; 2 wrong usage; 3 an input is at fault; 4 the output can't be written.
    """


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; prints every error as one message."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        with _ending_in_order():
            result = sdsurgery.main(args=list(arguments), prog_name="sdsurgery", standalone_mode=False)
    except SurgeryError as error:
        return _fail(error, as_json=as_json, debug=debug)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    except click.ClickException as error:
        return _fail(_usage(error), as_json=as_json, debug=debug)
    except (KeyboardInterrupt, click.Abort):
        click.echo("sdsurgery: interrupted; nothing was written", err=True)
        return INTERRUPTED
    except _TerminatedError:
        return TERMINATED
    except OSError as error:  # those of files are ours by now: it is stdout that can't be written
        return _fail(OutputError(f"printing failed: {error.strerror}"), as_json=False, debug=debug)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_internal(error), as_json=as_json, debug=False)
    return result if isinstance(result, int) else 0


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Turn the request to end into an exception while a command runs; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if before is not None:  # whoever set it outside of Python can't be put back from here
            signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


def _fail(error: SurgeryError, *, as_json: bool, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    from ..reports import documents, terminal  # which a command that succeeds may never need

    if as_json:
        click.echo(documents.text(documents.error(error)))
    else:
        click.echo(terminal.error(error), err=True)
    return error.exit_code


def _usage(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "sdsurgery"
    return UsageError(" ".join(error.format_message().split()), remedy=f"see {command} --help")


def _internal(error: Exception) -> SurgeryError:
    return SurgeryError(
        f"a fault in sdsurgery itself: {type(error).__name__}: {error}",
        remedy="run it again with --debug, and report what it prints",
    )
