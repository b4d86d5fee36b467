"""The client of a sweep: hands tasks to workers, takes outcomes back, loses nothing.

A task is submitted only while it is not finished, and again only where it was stopped, held or
lost. What is finished is asked of the folders, so a sweep that is begun again goes on.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from distributed import Client, Future
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from bnnlib.errors import NoScheduler
from bnnlib.sweeps.books import Books
from bnnlib.sweeps.state import Sweep
from bnnlib.sweeps.tasks import Outcome, Task, in_a_line
from bnnlib.sweeps.worker import Attendant, Orders, is_working, perform, stop_working

LOOKS_EVERY = 0.2  # seconds between two looks at what has come back
COUNTS_EVERY = 1.0  # seconds between two questions to the scheduler who works
AGAIN_AFTER = 2.0  # seconds until a folder that another process holds is tried again
MOST_TRIES = 2  # of a task that fails, unless trying again cannot help
MOST_LOSSES = 3  # beginnings of a task that end with its worker, and bring it no further
MOST_DEATHS = 20  # of workers in a row, where it does not even begin
SAVES_WITHIN = 60.0  # seconds that workers have to answer, and to save where a sweep is stopped


def work(
    sweep: Sweep,
    client: Client,
    books: Books,
    how: dict[str, Any],
    threads: int = 1,
    uses: dict[str, str] | None = None,
    show: Callable[[Sweep], object] = lambda sweep: None,
) -> None:
    """Have the workers of `client` make what is left, until each task is finished or failed.

    `how` are arguments of `runs.run.run`, `uses` the user's files by path, with their SHA-256;
    `show` is called several times a second. A KeyboardInterrupt lets the workers save, and
    goes on. Raises NoScheduler where the scheduler is gone.
    """
    orders = Orders(f"bnnlib-{uuid.uuid4().hex[:12]}", how, threads, uses)
    for name in sweep.left:
        books.forget(sweep.tasks[name])
    sweep.dashboard = client.dashboard_link or ""
    work = _Client(sweep, client, books, orders)
    try:
        _ask_all(client, lambda: client.register_plugin(Attendant(orders.sweep)))
        work.until_done(show)
    except (CommClosedError, OSError) as error:
        raise NoScheduler(work.gone()) from error
    except KeyboardInterrupt:
        work.let_workers_save()
        raise
    finally:
        if client.status == "running":
            with suppress(CommClosedError, OSError):  # of a worker that died meanwhile
                client.unregister_worker_plugin(orders.sweep)


def _ask_all(client: Client, ask: Callable[[], Any]) -> Any:
    """What all workers answer; asked again where one of them died meanwhile."""
    until = time.monotonic() + SAVES_WITHIN
    while True:
        try:
            return ask()
        except (CommClosedError, OSError):
            if client.status != "running" or time.monotonic() > until:
                raise
            time.sleep(LOOKS_EVERY)


class _Client:
    """Submits as many tasks as workers can take now, and collects what comes back.

    What waits stays here: the scheduler would bind it to a busy worker while others fall idle.
    """

    def __init__(self, sweep: Sweep, client: Client, books: Books, orders: Orders):
        self.sweep, self.client, self.books, self.orders = sweep, client, books, orders
        left = sweep.left
        self.waiting = [name for name in sweep.tasks if name in left]
        self.under_way: dict[str, Future] = {}  # by the name of its task
        self.offers: list[dict[str, float]] = []  # the resources of each worker
        self.back: SimpleQueue[tuple[str, Future]] = SimpleQueue()

    def until_done(self, show: Callable[[Sweep], object]) -> None:
        counted = -COUNTS_EVERY  # so that the first look counts
        while self.waiting or self.under_way:
            if time.monotonic() - counted >= COUNTS_EVERY:
                self.count()
                counted = time.monotonic()
            self.submit_what_workers_can_take()
            with suppress(Empty):
                self.take(*self.back.get(timeout=LOOKS_EVERY))
            self.sweep.running = len(self.under_way)
            show(self.sweep)

    def submit_what_workers_can_take(self) -> None:
        sweep, now = self.sweep, time.monotonic()
        free = list(self.offers)
        for name in self.under_way:
            _take_offer(free, sweep.tasks[name])
        waiting, self.waiting = self.waiting, []
        for i, name in enumerate(waiting):
            if not free:
                self.waiting += waiting[i:]
                break
            task = sweep.tasks[name]
            if task.needs in sweep.failed:
                said = f"{task.needs}, which it needs, has failed"
                self.fail(name, Outcome("failed", said), "")
            elif self.can_begin(task, now) and _take_offer(free, task):
                self.submit(task)
            else:
                self.waiting.append(name)

    def can_begin(self, task: Task, now: float) -> bool:
        """Whether nothing that it needs is missing, and nobody has just held its folder."""
        needs, sweep = task.needs, self.sweep
        return (not needs or needs in sweep.finished) and sweep.wait_until.get(task.name, 0) <= now

    def submit(self, task: Task) -> None:
        self.sweep.tries[task.name] += 1
        future = self.client.submit(
            perform,
            task,
            self.orders,
            key=f"{task.name}-{uuid.uuid4().hex[:8]}",
            pure=False,
            resources=dict(task.resources) or None,
        )
        self.under_way[task.name] = future
        future.add_done_callback(lambda future: self.back.put((task.name, future)))

    def take(self, name: str, future: Future) -> None:
        """What came back of a task, or what became of its worker."""
        del self.under_way[name]
        if future.status == "finished":
            self.settle(name, *future.result())
        elif future.status == "error":
            error = future.exception()
            if isinstance(error, KilledWorker):
                self.lost(name, error.last_worker.address)
            else:  # not of the task, whose errors are outcomes: it did not get that far
                outcome = Outcome("failed", in_a_line(error))
                self.fail(name, outcome, "the worker could not begin")
        else:
            raise NoScheduler(self.gone())

    def settle(self, name: str, outcome: Outcome, worker: str) -> None:
        sweep = self.sweep
        if outcome.state == "finished":
            sweep.finished.add(name)
            sweep.outcomes[name] = outcome
        elif outcome.state == "failed" and (outcome.final or sweep.tries[name] >= MOST_TRIES):
            self.fail(name, outcome, worker)
        elif outcome.state != "failed":  # stopped or held, for which it is not to blame
            sweep.tries[name] -= 1
            sweep.wait_until[name] = time.monotonic() + AGAIN_AFTER
            sweep.look([name])  # another process may have finished it
        if name not in sweep.finished and name not in sweep.failed:
            self.waiting.append(name)

    def lost(self, name: str, worker: str) -> None:
        """A worker died under a task: nobody's fault, unless they die and it comes no further.

        Of deaths at the same place those count under which it had begun; many others count, too.
        """
        sweep, task = self.sweep, self.sweep.tasks[name]
        sweep.tries[name] -= 1
        begun, here = task.begun(), task.progress()
        before = [loss for loss in sweep.losses.get(name, ()) if loss[1] == here]
        sweep.losses[name] = [*before, (begun, here)]
        began = {begun for begun, _ in sweep.losses[name]} - {None}
        if len(began) >= MOST_LOSSES or len(sweep.losses[name]) >= MOST_DEATHS:
            deaths = len(sweep.losses[name])
            said = f"its worker died {deaths} times at the same place; is there enough memory?"
            self.fail(name, Outcome("failed", said), worker)
        else:
            self.waiting.insert(0, name)

    def fail(self, name: str, outcome: Outcome, worker: str) -> None:
        self.sweep.failed[name] = outcome
        self.books.failed(self.sweep.tasks[name], outcome, worker)

    def count(self) -> None:
        """Ask the scheduler who works; raises NoScheduler where it is gone."""
        if self.client.status != "running":
            raise NoScheduler(self.gone())
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        self.offers = [worker["resources"] for worker in workers]
        self.sweep.workers = len(self.offers)
        self.sweep.unmet = self.unmet()

    def unmet(self) -> str:
        """What no worker offers of what a waiting task asks for; "" where each finds one."""
        for asked in {tuple(self.sweep.tasks[name].resources.items()) for name in self.waiting}:
            if not any(_suffices(offer, dict(asked)) for offer in self.offers):
                return ", ".join(f"{k}={v:g}" for k, v in asked)
        return ""

    def let_workers_save(self) -> None:
        """Ask all workers to save and give back what they have of this sweep, and wait for it."""
        if self.client.status != "running":
            return
        own = {"sweep": self.orders.sweep, "on_error": "ignore"}
        _ask_all(self.client, lambda: self.client.run(stop_working, **own))
        self.client.cancel(list(self.under_way.values()))
        until = time.monotonic() + SAVES_WITHIN
        while time.monotonic() < until:
            if not any(_ask_all(self.client, lambda: self.client.run(is_working, **own)).values()):
                return
            time.sleep(LOOKS_EVERY)

    def gone(self) -> str:
        done, all_of_them = len(self.sweep.finished), len(self.sweep.tasks)
        return (
            f"the scheduler does not answer any more; {done:,} of {all_of_them:,} runs are "
            "finished, the others keep what they saved: the same command goes on"
        )


def _suffices(offer: Mapping[str, float], asked: Mapping[str, float]) -> bool:
    return all(offer.get(name, 0) >= amount for name, amount in asked.items())


def _take_offer(offers: list[dict[str, float]], task: Task) -> bool:
    """Take the poorest worker that suffices for a task off the list; False where there is none."""
    enough = [offer for offer in offers if _suffices(offer, task.resources)]
    if enough:
        offers.remove(min(enough, key=lambda offer: sorted(offer.items())))
    return bool(enough)
