"""A sweep from its plan to finished runs, and how far one is."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bnnlib.data.published import data_folder
from bnnlib.errors import Interrupted, InvalidValue, NotInstalled
from bnnlib.files import as_folder
from bnnlib.names import used_files
from bnnlib.process import place
from bnnlib.runs.ledger import results, write_ledger
from bnnlib.runs.record import counted
from bnnlib.sweeps.books import STATES, Books, state_of
from bnnlib.sweeps.chapters import ChapterTask, write_index
from bnnlib.sweeps.plan import Plan, planned_grid
from bnnlib.sweeps.progress import Progress, best_and_worst, showing
from bnnlib.sweeps.state import Sweep
from bnnlib.sweeps.where import Where


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
    if sweep.is_over:
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
    lines = ["   ".join(f"{s} {sum(v == s for v in states.values()):,}" for s in STATES)]
    lines += best_and_worst(labels, _known(out))
    lines += [f"running: {labels[name]}" for name, state in states.items() if state == "running"]
    for name in (name for name, state in states.items() if state == "failed"):
        note = notes.get(books.note(name).name, {"task": labels[name], "error": "?"})
        lines.append(f"failed: {note['task']}: {note['error']}")
    return lines
