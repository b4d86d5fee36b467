"""A task of a sweep: one run in one folder, or one executed chapter; and what became of it."""

import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any, Protocol

from bnnlib.errors import (
    BnnlibError,
    BnnlibWarning,
    CannotWrite,
    DownloadFailed,
    FolderInUse,
    Interrupted,
)
from bnnlib.experiments.experiment import Experiment
from bnnlib.runs.record import HISTORY, RECORD, holds_finished

DIGITS = 16  # of an experiment's SHA-256, in the name of its folder


@dataclass(frozen=True)
class Outcome:
    """What became of a task, as its worker reports it.

    `state`: "finished"; "failed", by a fault of its own; "stopped", its state saved; "held", where
    another process has its folder.
    """

    state: str
    error: str = ""  # in one line
    trace: str = ""
    final: bool = True  # false: trying once more may help
    train_error: float = nan  # shares, after the last epoch
    test_error: float = nan
    warnings: tuple[str, ...] = ()


class Task(Protocol):
    """What a sweep asks of a task. It travels to workers, so it is plain data."""

    name: str  # unique in its sweep: a path below the sweep's folder
    label: str  # for a reader
    needs: str  # the name of the task that must be finished before; "" for none
    resources: Mapping[str, float]  # what a worker must offer

    def is_finished(self) -> bool: ...

    def begun(self) -> object:
        """Something that is another object each time the work has begun."""

    def progress(self) -> object:
        """Something that is another object wherever the work came further."""

    def work(self, how: Mapping[str, Any], stop: Callable[[], bool]) -> Outcome: ...


def label(name: str, point: Mapping[str, Any]) -> str:
    """A task in the words of its grid: `svhn-l2 width=0.5 seed=1`."""
    return " ".join([name, *(f"{field}={value}" for field, value in point.items())])


def run_name(e: Experiment) -> str:
    """The folder of an experiment, by its digest: wherever it comes from, it is the same one."""
    return f"{e.name}/{e.digest()[:DIGITS]}"


@dataclass(frozen=True)
class RunTask:
    """One experiment, to be run in one folder."""

    experiment: Experiment
    folder: Path  # absolute: workers may have begun elsewhere
    name: str
    label: str
    needs: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)

    def is_finished(self) -> bool:
        """Whether its folder holds it, finished; raises as `holds_finished` where it never can."""
        return holds_finished(self.folder, self.experiment)

    def begun(self) -> object:
        """When its record was written: at each beginning."""
        record = self.folder / RECORD
        return record.stat().st_mtime_ns if record.is_file() else None

    def progress(self) -> object:
        """The names of its checkpoints, and the size of its history."""
        history = self.folder / HISTORY
        size = history.stat().st_size if history.is_file() else 0
        return sorted(path.name for path in self.folder.glob("checkpoints/*")), size

    def work(self, how: Mapping[str, Any], stop: Callable[[], bool]) -> Outcome:
        """Run it, or go on with it; `how` are arguments of `runs.run.run`."""
        from bnnlib.runs.run import run  # which loads PyTorch: for workers alone

        history = run(self.experiment, self.folder, progress="none", stop=stop, **how).history
        last = history.rows[-1] if len(history) else {}  # one of no epochs has none
        errors = {f"{k}_error": last.get(f"{k}_error", nan) for k in ("train", "test")}
        return Outcome("finished", **errors)


def attempt(task: Task, how: Mapping[str, Any], stop: Callable[[], bool]) -> Outcome:
    """Work on a task; whatever happens to it becomes its outcome, warnings included."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BnnlibWarning)
        outcome = _attempt(task, how, stop)
    told = tuple(str(w.message) for w in caught if issubclass(w.category, BnnlibWarning))
    return replace(outcome, warnings=told)


def _attempt(task: Task, how: Mapping[str, Any], stop: Callable[[], bool]) -> Outcome:
    try:
        return task.work(how, stop)
    except Interrupted:
        return Outcome("stopped")
    except FolderInUse as error:
        return Outcome("held", error=in_a_line(error))
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> Outcome:
    """The outcome of an error that is being handled.

    One of bnnlib's own would come again; of a full disk or a busy machine nobody knows.
    """
    unknown = not isinstance(error, BnnlibError)
    again = unknown or isinstance(error, CannotWrite | DownloadFailed)
    return Outcome("failed", in_a_line(error), traceback.format_exc(), final=not again)


def in_a_line(error: Exception) -> str:
    """An error in one line: the last of several, which a notebook's failure has."""
    lines = str(error).splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    return " ".join(f"{type(error).__name__}: {last}".split())
