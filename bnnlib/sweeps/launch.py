"""From a grid to finished runs: expanded, counted, measured, and only then begun."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from bnnlib.data.published import data_folder
from bnnlib.errors import FolderInUse, Interrupted, InvalidValue, NotInstalled, shown
from bnnlib.files import as_folder
from bnnlib.names import check_device, used_files
from bnnlib.process import place
from bnnlib.runs.ledger import results, write_ledger
from bnnlib.runs.record import as_duration, counted
from bnnlib.sweeps.books import STATES, Books, state_of
from bnnlib.sweeps.chapters import ChapterTask, write_index
from bnnlib.sweeps.grid import read_grid
from bnnlib.sweeps.progress import Progress, describe, showing
from bnnlib.sweeps.state import Sweep, begin
from bnnlib.sweeps.tasks import RunTask, Task

ADDRESS = re.compile(r"\w+://.+")


@dataclass(frozen=True)
class Where:
    """Where the workers of a sweep are: at `scheduler`, as the file `slurm` says, or here."""

    scheduler: str | None = None  # an address such as tcp://host:8786
    slurm: str | None = None
    workers: int | None = None  # here; None: one for each GPU, or for each `threads` of the cores
    threads: int = 1  # of each worker; results depend on it in their last bits
    device: str = "auto"

    def __post_init__(self):
        check_device(self.device)
        given = [n for n in ("scheduler", "workers", "slurm") if getattr(self, n) is not None]
        if len(given) > 1:
            raise InvalidValue(f"{' and '.join(given)} exclude each other: name one of them")
        if self.scheduler and not ADDRESS.fullmatch(self.scheduler):
            raise InvalidValue(
                f"scheduler must be an address such as tcp://host:8786, got {shown(self.scheduler)}"
            )

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise InvalidValue where workers here can never take one of these tasks.

        And where the file of a SLURM cluster is none: before anything is measured.
        """
        if self.slurm:
            check_installed()
            from bnnlib.sweeps.clusters import read_slurm

            read_slurm(self.slurm)
        asked = [task for task in tasks if task.resources]
        if self.scheduler or self.slurm or not asked:
            return
        check_installed()
        from bnnlib.sweeps.clusters import resources

        offered = resources(self.count(len(asked)), self.gpus())
        for task in asked:
            for name, amount in task.resources.items():
                if offered.get(name, 0) < amount:
                    raise InvalidValue(
                        f"{task.label} asks for {name}={amount:g}, and a worker here offers "
                        f"{offered.get(name, 0):g}"
                    )

    def count(self, tasks: int) -> int:
        """How many workers there are here for so many tasks."""
        usual = self.gpus() or max(1, cores() // self.threads)
        return min(self.workers or usual, max(1, tasks))

    def gpus(self) -> int:
        """The GPUs that workers here share out, each of which sees its own."""
        if self.device not in ("auto", "cuda"):
            return 0
        import torch

        return torch.cuda.device_count()

    def client(self, sweep: Sweep) -> AbstractContextManager:
        """A Dask client for what is left of a sweep, inside its `with` block.

        Raises NotInstalled.
        """
        check_installed()
        from bnnlib.sweeps import clusters

        if self.scheduler:
            return clusters.at_address(self.scheduler)
        if self.slurm:
            return clusters.slurm(self.slurm, lambda: len(sweep.left))
        return clusters.local(self.count(len(sweep.left)), self.threads, self.gpus())


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_installed() -> bool:
    """Whether Dask is there, which has the workers of a sweep."""
    return importlib.util.find_spec("distributed") is not None


def check_installed() -> None:
    """Raise NotInstalled where Dask is missing."""
    if not is_installed():
        raise NotInstalled("a sweep needs Dask: pip install 'bnnlib[sweep]'")


# ---------------------------------------------------------------------------- before it begins


@dataclass(frozen=True)
class Plan:
    """A sweep that has not begun: its tasks, and the estimated seconds of those that are left."""

    sweep: Sweep
    named_twice: int = 0
    steps: Mapping[str, int] = field(default_factory=dict)  # by name, where known
    step_seconds: Mapping[str, float] = field(default_factory=dict)  # by name, where known
    costs: Mapping[str, float] = field(default_factory=dict)  # by name, where known

    def table(self, where: Where) -> list[str]:
        """The runs of each experiment, what is left of them, and what that costs, as lines."""
        groups: dict[str, list[Task]] = {}
        for task in self.sweep.tasks.values():
            groups.setdefault(task.name.partition("/")[0], []).append(task)
        rows = [("", "runs", "left", "steps left", "s/step", "core time")]
        rows += [self._row(name, tasks) for name, tasks in groups.items()]
        everything = list(self.sweep.tasks.values())
        rows += [self._row("in all", everything)] if len(groups) > 1 else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows = [(row[0].ljust(widths[0]), *row[1:]) for row in rows]
        lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
        if self.named_twice:
            lines.append(f"{counted(self.named_twice, 'point')} of the grid named a run again")
        if (seconds := sum(self.costs.values())) and not (where.scheduler or where.slurm):
            workers = where.count(len(self.sweep.left))
            on = counted(workers, "worker")
            lines.append(f"about {as_duration(seconds / workers)} on {on}, training alone")
        return lines

    def _row(self, name: str, tasks: Sequence[Task]) -> tuple[str, ...]:
        left = [task for task in tasks if task.name in self.sweep.left]
        steps = [self.steps[task.name] for task in left if task.name in self.steps]
        paces = sorted({f"{self.step_seconds.get(task.name, nan):.2g}" for task in left} - {"nan"})
        pace = "-" if not paces else " to ".join(dict.fromkeys((paces[0], paces[-1])))
        unknown = [task for task in left if task.name not in self.costs]
        seconds = as_duration(sum(self.costs.get(task.name, 0) for task in left))
        cost = f"{'over ' * bool(unknown)}{seconds}" if len(unknown) < len(left) else "unknown"
        counted_steps = f"{sum(steps):,}" if steps or not left else "-"
        return (
            name,
            f"{len(tasks):,}",
            f"{len(left):,}",
            counted_steps,
            pace,
            cost if left else "-",
        )


def planned_grid(
    grid: str | Path, out: Path, profile: str | None, where: Where, root: str | Path | None
) -> Plan:
    """The plan of a grid: see `read_grid` and `plan`."""
    if out.exists() and not out.is_dir():
        raise FolderInUse(f"{out} is not a folder; choose another")
    tasks, twice = read_grid(grid, out, profile)
    where.check(tasks)
    here = "auto" if where.scheduler or where.slurm else where.device
    return plan(tasks, twice, where.threads, here, root)


def plan(
    tasks: Sequence[Task],
    named_twice: int = 0,
    threads: int = 1,
    device: str = "auto",
    root: str | Path | None = None,
) -> Plan:
    """What there is to do, and what it costs: the steps that are left, and the seconds of each.

    A training step is timed here, with so many threads; evaluations and chapters are not in it.
    PyTorch is loaded where something is left to be trained.
    """
    sweep = begin(tasks)
    left = {t.name: t.experiment for t in tasks if isinstance(t, RunTask) and t.name in sweep.left}
    if not any(e.epochs for e in left.values()):
        return Plan(sweep, named_twice, dict.fromkeys(left, 0), {}, dict.fromkeys(left, 0.0))
    from bnnlib.experiments.build import resolve_device
    from bnnlib.sweeps.cost import kind, seconds_a_step, steps_in_all

    steps = steps_in_all(left, root)
    trained = {name: e for name, e in left.items() if steps.get(name)}
    paces = seconds_a_step(trained.values(), threads, resolve_device(device))
    known = {name: paces[k] for name, e in trained.items() if (k := kind(e)) in paces}
    costs = {name: n * known.get(name, 0.0) for name, n in steps.items() if name in known or not n}
    return Plan(sweep, named_twice, steps, known, costs)


# ------------------------------------------------------------------------------------ begun


def launch(
    planned: Plan,
    out: Path,
    title: str,
    where: Where,
    how: Mapping[str, Any],
    tell: Callable[[str], object] = lambda text: None,
) -> Sweep:
    """Make what is left, and tell in lines what became of it; returns the sweep at its end.

    `how` are arguments of `runs.run.run`. Runs that take longest begin first. Raises Interrupted
    where it was stopped, with what is saved, NoScheduler where the scheduler is gone, and
    NotInstalled.
    """
    if place()[1] > 1:
        raise InvalidValue("a sweep is begun by one process, not by several of torchrun's")
    sweep, books = planned.sweep, Books(out)
    if not sweep.left:
        _end(sweep, books, tell)
        return sweep
    by_cost = sorted(sweep.tasks.values(), key=lambda t: -planned.costs.get(t.name, 0))
    sweep.tasks = {task.name: task for task in by_cost}
    books.plan(sweep.tasks.values())
    progress = Progress(f"{title}: {counted(len(sweep.tasks), 'run')}", planned.costs, _known(out))
    with where.client(sweep) as client, showing(progress) as show:
        from bnnlib.sweeps.client import work

        progress.begin(sweep)
        try:
            work(sweep, client, books, dict(how), where.threads, used_files(), show)
        except KeyboardInterrupt:
            done, in_all = len(sweep.finished), len(sweep.tasks)
            said = (
                f"stopped; {done:,} of {in_all:,} runs finished, what had begun is saved in {out}"
            )
            raise Interrupted(said) from None
    _end(sweep, books, tell)
    return sweep


def _known(out: Path) -> dict[str, tuple[float, float]]:
    """The last errors of the runs that `out` holds already, by name."""
    if not out.is_dir():
        return {}
    rows = results(out)
    pairs = zip(rows["train_error"], rows["test_error"], strict=True) if len(rows) else ()
    return dict(zip(rows.index, pairs, strict=True))


def _end(sweep: Sweep, books: Books, tell: Callable[[str], object]) -> None:
    """Write the ledger and the page of chapters, and tell what failed and what was warned of."""
    if books.folder.is_dir():
        with suppress(NotInstalled):
            write_ledger(books.folder)
    if chapters := [t for t in sweep.tasks.values() if isinstance(t, ChapterTask)]:
        tell(f"chapters: {write_index(books.folder, chapters)}")
    for name, outcome in sweep.outcomes.items():
        for warning in outcome.warnings:
            tell(f"Warning: {sweep.tasks[name].label}: {warning}")
    for name, outcome in sweep.failed.items():
        note = f"  (traceback: {books.note(name)})" if outcome.trace else ""
        tell(f"failed: {sweep.tasks[name].label}: {outcome.error}{note}")


def sweep(
    grid: str | Path,
    out: str | Path = "runs",
    *,
    profile: str | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    slurm: str | None = None,
    threads: int = 1,
    device: str = "auto",
    root: str | Path | None = None,
    precision: str = "auto",
    checkpoint_every: float = 300.0,
) -> Any:
    """Make every run of a grid that `out` does not hold yet; returns the table of all of them.

    `grid` is a TOML file, see `read_grid`. Without `scheduler` (the address of a Dask scheduler)
    or `slurm` (a file, see `read_slurm`) there are `workers` on this machine, each with `threads`.
    `root`, `precision` and `checkpoint_every` are those of `run`. Each run has the folder
    OUT/NAME/DIGEST: a finished one is left alone, an unfinished one goes on. A run that fails is
    told, and stops no other. Returns the rows of `results`. Raises as `read_grid` and `launch`.
    """
    out = as_folder("out", out).absolute()
    where = Where(scheduler, slurm, workers, threads, device)
    planned = planned_grid(grid, out, profile, where, root)
    print("\n".join(planned.table(where)))
    how = run_arguments(device, root, precision, checkpoint_every)
    launch(planned, out, str(grid), where, how, print)
    rows = results(out)
    return rows[rows.index.isin(list(planned.sweep.tasks))]


def run_arguments(
    device: str, root: str | Path | None, precision: str, checkpoint_every: float
) -> dict[str, Any]:
    """What each run of a sweep is given, wherever its worker began."""
    return {
        "device": device,
        "root": str(data_folder(root).absolute()),
        "precision": precision,
        "checkpoint_every": checkpoint_every,
    }


# ----------------------------------------------------------------------------------- looked at


def status_lines(out: Path) -> list[str]:
    """How far the sweeps in a folder are, told by the folder alone: counts, errors, failures.

    Raises DataNotFound where there was none.
    """
    books = Books(out)
    labels, notes = books.planned(), books.failures()
    states = {name: state_of(out, name, books.note(name).name in notes) for name in labels}
    known = _known(out)
    lines = ["   ".join(f"{s} {sum(v == s for v in states.values()):,}" for s in STATES)]
    errors = sorted((known[name], name) for name in labels if name in known)
    ends = errors[:1] + errors[1:][-1:]
    for word, (found, name) in zip(("best", "worst"), ends, strict=False):
        lines.append(f"{word:<8}{describe(labels[name], found)}")
    lines += [f"running: {labels[name]}" for name, state in states.items() if state == "running"]
    failed = [
        note
        for name, state in states.items()
        if state == "failed"
        for note in [notes.get(books.note(name).name, {"task": labels[name], "error": "?"})]
    ]
    return lines + [f"failed: {note['task']}: {note['error']}" for note in failed]
