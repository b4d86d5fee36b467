"""How far a sweep is, for a person: a live table in a terminal or notebook, few lines in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan

from bnnlib.runs.record import as_duration
from bnnlib.sweeps.state import Sweep

REFRESHED_EVERY = 0.5  # seconds
LINES_EVERY = 60.0  # seconds, in a log

Errors = Mapping[str, tuple[float, float]]  # training and test error of a run, by name


class Progress:
    """Tells about a sweep: `costs` are the estimated seconds of each task, by name.

    `known`: the errors of runs that were finished before.
    """

    def __init__(self, title: str, costs: Mapping[str, float], known: Errors):
        self.title, self.costs, self.errors = title, costs, dict(known)
        self.start, self.done_before = time.monotonic(), 0.0

    def begin(self, sweep: Sweep) -> None:
        """Note what was finished before: it says nothing about how fast this goes."""
        self.start, self.done_before = time.monotonic(), self._cost(sweep.finished)

    def _cost(self, names: Iterable[str]) -> float:
        return sum(self.costs.get(name, 1.0) for name in names)

    def seconds_left(self, sweep: Sweep) -> float | None:
        """By the pace so far; None before anything was finished."""
        done = self._cost(sweep.finished) - self.done_before
        if not done:
            return None
        return self._cost(sweep.left) * (time.monotonic() - self.start) / done

    def counts(self, sweep: Sweep) -> str:
        """The states of all tasks in one line."""
        ended = len(sweep.finished) + len(sweep.failed)
        waiting = len(sweep.tasks) - ended - sweep.running
        each = {"done": len(sweep.finished), "running": sweep.running, "failed": len(sweep.failed)}
        said = [f"{name} {n:,}" for name, n in (each | {"waiting": waiting}).items()]
        if left := self.seconds_left(sweep):
            said.append(f"about {as_duration(left)} left")
        return "   ".join(said)

    def table(self, sweep: Sweep) -> list[str]:
        """All that is to be said, in a few lines."""
        found = {name: (o.train_error, o.test_error) for name, o in sweep.outcomes.items()}
        lines = [self.title, self.counts(sweep)]
        lines += [f"dashboard   {sweep.dashboard}"] if sweep.dashboard else []
        labels = {name: task.label for name, task in sweep.tasks.items()}
        lines += best_and_worst(labels, self.errors | found)
        return lines + self.missing(sweep)

    def missing(self, sweep: Sweep) -> list[str]:
        """A line that says for which worker the sweep waits, if it does."""
        if not (sweep.is_over or sweep.workers):
            return ["waiting for a worker"]
        offers = f"waiting for a worker that offers {sweep.unmet} (dask worker --resources)"
        return [offers] if sweep.unmet else []


def best_and_worst(labels: Mapping[str, str], errors: Errors) -> list[str]:
    """The runs with the smallest and the largest training error, a line each.

    `labels` are the tasks that are meant, by name; those without an error are left out.
    """
    ranked = sorted((errors[n], n) for n in labels if n in errors and not isnan(errors[n][0]))
    ends = ranked[:1] + ranked[1:][-1:]
    return [
        f"{word:<8}{_describe(labels[name], *found)}"
        for word, (found, name) in zip(("best", "worst"), ends, strict=False)
    ]


def _describe(label: str, *errors: float) -> str:
    """A run and its last errors in one line."""
    train, test = (f"{100 * e:.2f} %" if not isnan(e) else "-" for e in errors)
    return f"{label}: train error {train}, test error {test}"


@contextmanager
def showing(progress: Progress) -> Iterator[Callable[[Sweep], None]]:
    """Yields what is to be called often with a sweep, to show how far it is."""
    if _is_notebook():
        yield _seldom(REFRESHED_EVERY, _notebook(progress))
    elif sys.stderr.isatty():
        with _terminal(progress) as show:
            yield show
    else:
        yield _seldom(LINES_EVERY, lambda s: _lines(progress.counts(s), *progress.missing(s)))


def _is_notebook() -> bool:
    """Whether what is shown appears below a cell."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def _seldom(every: float, show: Callable[[Sweep], object]) -> Callable[[Sweep], None]:
    last = time.monotonic()  # a log needs no line before something has happened

    def act(sweep: Sweep) -> None:
        nonlocal last
        if time.monotonic() - last >= every or sweep.is_over:
            show(sweep)
            last = time.monotonic()

    return act


def _lines(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def _notebook(progress: Progress) -> Callable[[Sweep], None]:
    from IPython.display import display

    def bundle(sweep: Sweep) -> dict[str, str]:
        return {"text/plain": "\n".join(progress.table(sweep))}

    handle = display({"text/plain": progress.title}, raw=True, display_id=True)
    return lambda sweep: handle.update(bundle(sweep), raw=True)


@contextmanager
def _terminal(progress: Progress) -> Iterator[Callable[[Sweep], None]]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=1 / REFRESHED_EVERY) as live:
        yield lambda sweep: live.update(
            Text("\n".join(progress.table(sweep)), no_wrap=True, overflow="ellipsis")
        )
