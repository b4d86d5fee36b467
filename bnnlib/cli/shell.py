"""How a command behaves in a shell: its errors, signals and streams."""

import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn

import click

from bnnlib.errors import BnnlibError, Interrupted, InvalidValue, RankLost
from bnnlib.process import place
from bnnlib.runs.interrupts import signals_to

PATIENCE = 5.0  # seconds that other ranks leave to the first to say an error that all have met


class Group(click.Group):
    """A command group that prints our errors in one line, and stops as a shell expects.

    SIGTERM, with which clusters stop a job, is as good as Ctrl-C. Of several ranks the first
    speaks for all.
    """

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As click's, but where the output cannot be written, that is one line and status 1.

        A pipe that its reader closed, as `head` does, is none of that: click keeps silent.
        """
        try:
            try:
                with _silent_but_for_the_first():
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
        except BnnlibError as error:
            if place()[0] or isinstance(error, RankLost):
                _say_what_the_first_does_not(error)
            usage = isinstance(error, InvalidValue)
            raise (click.UsageError if usage else click.ClickException)(str(error)) from None
        except Interrupted as interrupt:
            start = context.command_path
            if place()[1] > 1:
                start = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m bnnlib"
            same = f"{start} {shlex.join(sys.argv[1:])}"
            click.echo(f"{interrupt}\nto go on: {same}", err=True)
            sys.exit(130)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)


@contextmanager
def _silent_but_for_the_first() -> Iterator[None]:
    """Inside the `with` block all ranks but the first print to nowhere."""
    if place()[0] == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _say_what_the_first_does_not(error: BnnlibError) -> NoReturn:
    """End a rank, with the error, unless the first one has met it, too.

    Then `torchrun` ends this one while it waits. A lost rank may be the first; as what is
    left of the exchange with it may wait for ever, nothing else is asked to end.
    """
    told = str(error)
    if not isinstance(error, RankLost):
        time.sleep(PATIENCE)
        told = f"rank {place()[0]}: {told}"
    print(f"Error: {told}", file=sys.__stderr__, flush=True)
    if isinstance(error, RankLost):
        os._exit(1)
    sys.exit(1)


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
