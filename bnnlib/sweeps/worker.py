"""What a Dask worker does with a task, and how it is told to stop."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Worker, get_worker
from distributed.diagnostics.plugin import WorkerPlugin

from bnnlib.errors import InvalidValue
from bnnlib.names import USED, use
from bnnlib.sweeps.tasks import Outcome, Task, attempt, failure

HELD_FOR = 1.0  # seconds in which a folder may be held by one that only looks at it
ASKS_EVERY = 0.05  # seconds between two looks whether a run is saved
LEAVES_WITHIN = 30.0  # seconds, as long as Dask waits; a chapter goes on to its end


@dataclass(frozen=True)
class Orders:
    """What all tasks of a sweep have in common."""

    sweep: str  # the name of its `Attendant` on each worker
    how: Mapping[str, Any]  # arguments of `runs.run.run`
    threads: int = 1  # of PyTorch, the same on each worker: results depend on it in their last bits
    uses: Mapping[str, str] | None = None  # SHA-256 of the user's files, by path


class Attendant(WorkerPlugin):
    """Stops the run of a worker that closes, so that its state is saved and others go on with it.

    SIGTERM, with which clusters take a machine back, closes a worker; Ctrl-C is the client's.
    One run at a time: two in one process would share PyTorch's own generators.
    """

    def __init__(self, sweep: str):
        self.name = sweep

    def setup(self, worker: Worker) -> None:
        self.stop, self.busy = threading.Event(), threading.Lock()
        if threading.current_thread() is threading.main_thread() and worker.nanny:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, self._leave, worker)

    def _leave(self, worker: Worker) -> None:
        self.stop.set()
        # Kept, because the loop itself keeps no task that it runs.
        self.leaving = asyncio.ensure_future(self._saved_and_closed(worker))

    async def _saved_and_closed(self, worker: Worker) -> None:
        """Take no new task, give back what is saved, and close; a nanny may begin another worker.

        `Worker.close_gracefully` lets the scheduler remove the worker before it closes; where it
        notices that first, it ends its nanny, too, and nobody takes its place.
        """
        try:
            await worker.scheduler.retire_workers(
                workers=[worker.address], close_workers=False, remove=False
            )
            until = time.monotonic() + LEAVES_WITHIN
            while self.busy.locked() and time.monotonic() < until:
                await asyncio.sleep(ASKS_EVERY)
        finally:  # the scheduler may be gone
            await worker.close(nanny=not worker.lifetime_restart, reason="SIGTERM")

    def teardown(self, worker: Worker) -> None:
        self.stop.set()


def perform(task: Task, orders: Orders) -> tuple[Outcome, str]:
    """Work on a task, on a worker; returns what became of it, and the worker's address."""
    worker = get_worker()
    attendant = worker.plugins[orders.sweep]
    with attendant.busy:
        if attendant.stop.is_set():
            return Outcome("stopped"), worker.address
        try:
            prepare_process(orders)
        except Exception as error:  # of a user's file: it is this task's, not the worker's
            return failure(error), worker.address
        held_until = time.monotonic() + HELD_FOR
        while True:
            outcome = attempt(task, orders.how, attendant.stop.is_set)
            if outcome.state != "held" or time.monotonic() > held_until:
                return outcome, worker.address
            time.sleep(HELD_FOR / 10)


def prepare_process(orders: Orders) -> None:
    """Threads and the user's files, as the one who began the sweep has them."""
    import torch

    torch.set_num_threads(orders.threads)
    for path, sha256 in (orders.uses or {}).items():
        name = Path(path).name
        if USED.get(name) != sha256:
            use(path)
        if USED[name] != sha256:
            raise InvalidValue(f"{path} is another file here, on {os.uname().nodename}")


def stop_working(sweep: str, dask_worker: Worker) -> None:
    """Ask a worker to save and give back what it has of a sweep."""
    if attendant := dask_worker.plugins.get(sweep):
        attendant.stop.set()


def is_working(sweep: str, dask_worker: Worker) -> bool:
    """Whether a worker is still busy with a sweep."""
    attendant = dask_worker.plugins.get(sweep)
    return attendant is not None and attendant.busy.locked()
