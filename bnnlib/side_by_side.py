"""Several runs at once on one machine, each in a process of its own.

In: the arguments of `python -m bnnlib` for each run. Out: their exit statuses.
Next file: `__main__.py`.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

import torch

from bnnlib.interrupts import signals_to


def run_side_by_side(commands: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Run `python -m bnnlib ARGUMENTS` for each label at once; returns the exit statuses.

    What a process writes appears line by line with its label in front. The processors are
    shared out, unless OMP_NUM_THREADS says how many threads each has. A SIGINT or SIGTERM is
    passed on to all, which save and end with status 130; one that is ended by a signal has
    128 and its number, as in a shell. None outlives this call,
    unless this process is killed.
    """
    processes: dict[str, subprocess.Popen] = {}
    threads = str(max(1, torch.get_num_threads() // len(commands)))
    surroundings = {"OMP_NUM_THREADS": threads, **os.environ}

    def pass_on(number: int, frame: object) -> None:
        for process in processes.values():
            process.send_signal(number)  # nothing where it has ended

    with signals_to(pass_on):
        try:
            for label, arguments in commands.items():
                processes[label] = _start(arguments, surroundings)
            echoes = [echo for item in processes.items() for echo in _echo(*item)]
            for part in [*echoes, *processes.values()]:
                part.join() if isinstance(part, threading.Thread) else part.wait()
        finally:
            for process in processes.values():
                process.kill()  # nothing where it has ended
                process.wait()
    return {label: _status(process.returncode) for label, process in processes.items()}


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _start(arguments: Sequence[str], surroundings: Mapping[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bnnlib", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=surroundings,
        start_new_session=True,  # a Ctrl-C in the terminal comes once, through this process
    )


def _echo(label: str, process: subprocess.Popen) -> list[threading.Thread]:
    """Threads that copy what a process writes, until it ends."""

    def copy(source: IO[str], target: IO[str]) -> None:
        for line in source:
            with suppress(OSError, ValueError):  # nobody listens any more; go on reading
                print(f"{label}: {line}", end="", file=target, flush=True)

    pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    return threads
