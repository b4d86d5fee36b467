"""Chapters side by side, each in a thread that waits for its own kernel.

In: chapters, as functions that execute them. Out: a line for each that is
done; the error of the first that fails. Next file: `build.py`.
"""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import suppress
from pathlib import Path

import click
import psutil

TICK = 0.5  # seconds between two looks


class Progress:
    """A line for each chapter that is done; on a terminal, a live one."""

    def __init__(self, names: Sequence[str]) -> None:
        self.done, self.total = 0, len(names)
        self.width = max(map(len, names), default=0)
        self.live = ""

    def finished(self, name: str, took: str) -> None:
        """Print that a chapter is done, and how long it took."""
        self.done += 1
        self.under_way({})
        label = f"[{self.done}/{self.total}] {name:<{self.width}}"
        click.echo(f"{label} {took:>8}")

    def under_way(self, seconds: Mapping[str, float]) -> None:
        """Show on a terminal which chapters run for how long, if any do."""
        each = [f"{Path(n).name} {s:.0f} s" for n, s in seconds.items()]
        done = f"[{self.done}/{self.total}] "
        live = done + ", ".join(each) if each else ""
        if live != self.live and sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns
            click.echo(f"\r\033[K{live[: columns - 1]}", nl=False)
            self.live = live


def run_together(
    work: Mapping[str, Callable[[], object]], jobs: int, progress: Progress
) -> None:
    """Call these functions, `jobs` at a time; each is named.

    The first that raises, like Ctrl-C, stops the others; then this raises
    the same.
    """
    started: dict[str, float] = {}

    def act(name: str) -> None:
        started[name] = time.monotonic()
        work[name]()

    def seconds(name: str) -> float:
        return time.monotonic() - started[name]

    pool = ThreadPoolExecutor(jobs)
    running = {pool.submit(act, name): name for name in work}
    try:
        while running:
            for future in wait(running, TICK, FIRST_COMPLETED).done:
                name = running.pop(future)
                future.result()
                progress.finished(name, f"{seconds(name):.1f} s")
            now = [n for n in running.values() if n in started]
            progress.under_way({name: seconds(name) for name in now})
    finally:
        progress.under_way({})
        pool.shutdown(wait=False, cancel_futures=True)
        stop_kernels_of(running)


def stop_kernels_of(threads: Mapping[Future, str]) -> None:
    """End what these threads have started, until they end too.

    A thread may be about to start a kernel, hence again and again. What
    they log of their dead kernels is no news.
    """
    logging.disable()
    while not all(future.done() for future in threads):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(TICK)
    logging.disable(logging.NOTSET)
