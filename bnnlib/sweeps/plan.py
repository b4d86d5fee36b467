"""A sweep before it begins: what is left to do, and what that costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

from bnnlib.errors import FolderInUse
from bnnlib.runs.record import as_duration, counted
from bnnlib.sweeps.grid import read_grid
from bnnlib.sweeps.state import Sweep, begin
from bnnlib.sweeps.tasks import RunTask, Task
from bnnlib.sweeps.where import Where


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
        not_over = self.sweep.left
        left = [task for task in tasks if task.name in not_over]
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
    names = sweep.left
    left = {t.name: t.experiment for t in tasks if isinstance(t, RunTask) and t.name in names}
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
