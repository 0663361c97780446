"""How commands end: an error of ours is one red line and exit status 2, Ctrl-C is 130, warnings are yellow.

RAE_TRACEBACK=1 shows where an error came from.
"""

import errno
import functools
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import click

LEFT_ALONE = "another process of this job has ended, or cannot be reached; what it said is the reason."


class Rae(click.Group):
    """Commands in the order of their definition; errors without a traceback, warnings without a place in the code."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, context: click.Context):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
                return super().invoke(context)
        except KeyboardInterrupt as interrupt:
            click.secho(f"interrupted; {str(interrupt) or 'the same command may be run again'}", fg="red", err=True)
            context.exit(130)
        except Exception as error:
            left_alone = _is_left_alone(error)
            if os.environ.get("RAE_TRACEBACK") or not (left_alone or _is_ours(error)):
                raise
            message = f"error: {LEFT_ALONE if left_alone else error}{_remedy(error)}"
            if not left_alone:
                _tell_launcher(message)
            click.secho(message, fg="red", err=True)
            context.exit(2)


def _is_ours(error: Exception) -> bool:
    """Whether the message is meant for the user: a class of ours, the system's, or a ValueError that we raised."""
    if type(error).__module__.startswith("rae.") or isinstance(error, OSError) or _is_full(error):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError | FloatingPointError) and raised_in.is_relative_to(Path(__file__).parents[1])


def _is_left_alone(error: Exception) -> bool:
    """Whether this process waited for one that has ended: gloo and NCCL say so where they notice it."""
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exit")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return started > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _tell_launcher(message: str) -> None:
    """torchrun ends with a traceback of its own, and a table of its processes with what each of them wrote here."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": about}))


def _show_warning(others, message, category, *where) -> None:
    """A warning of ours as a yellow line, by one process for all; others as ever."""
    if not category.__module__.startswith("rae."):
        others(message, category, *where)
    elif os.environ.get("RANK", "0") == "0":
        click.secho(str(message), fg="yellow", err=True)


def _remedy(error: Exception) -> str:
    return ". Make room and run the same command again; what was finished before is whole." if _is_full(error) else ""


def _is_full(error: Exception) -> bool:
    """Whether the disk was full; safetensors says so in words."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    told = any(f"(os error {code})" in str(error) for code in codes)
    return told or (isinstance(error, OSError) and error.errno in codes)


def leave(status: int | str | None) -> None:
    """End one of several processes on CPUs now: an ordinary end sometimes aborts it (exit status 134), since threads of
    gloo are still about when the interpreter goes."""
    distributed = sys.modules.get("torch.distributed")
    together = distributed and distributed.is_available() and distributed.is_initialized()
    if together and distributed.get_backend() == "gloo" and isinstance(status, int | None):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
