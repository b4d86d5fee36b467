"""How a command behaves in a shell: its errors, signals and streams."""

import os
import shlex
import signal
import sys
import warnings
from typing import Any

import click

from bnnlib.errors import BnnlibError, Interrupted, InvalidValue
from bnnlib.runs.interrupts import signals_to


class Group(click.Group):
    """A command group that prints our errors in one line, and stops as a shell expects.

    SIGTERM, with which clusters stop a job, is as good as Ctrl-C.
    """

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As click's, but where the output cannot be written, that is one line and status 1.

        A pipe that its reader closed, as `head` does, is none of that: click keeps silent.
        """
        try:
            try:
                return super().main(*arguments, **options)
            finally:
                if sys.stdout:
                    sys.stdout.flush()
        except OSError as error:
            if not _output_is_lost():
                raise
            click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            sys.exit(1)

    def invoke(self, context: click.Context) -> Any:
        try:
            with warnings.catch_warnings(), signals_to(signal.default_int_handler):
                warnings.showwarning = _show_warning
                return super().invoke(context)
        except InvalidValue as error:
            raise click.UsageError(str(error)) from None
        except BnnlibError as error:
            raise click.ClickException(str(error)) from None
        except Interrupted as interrupt:
            same = f"{context.command_path} {shlex.join(sys.argv[1:])}"
            click.echo(f"{interrupt}\nto go on: {same}", err=True)
            sys.exit(130)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)


def _output_is_lost() -> bool:
    """Whether the standard output cannot be written; then Python does not try again at its exit."""
    try:
        print(flush=True)  # what failed before may be forgotten by now
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def _show_warning(message: Warning | str, *_: object) -> None:
    """A warning in one line, without the line of code that gave it."""
    click.echo(f"Warning: {message}", err=True)
