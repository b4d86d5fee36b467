"""What a sweep keeps beside its runs: what it is to do, and what failed. No database.

All else stands in the folders of the runs, so nothing here can be wrong about them: what is
finished says so itself, and what is running holds a lock that dies with its holder.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnnlib.errors import BnnlibError, DamagedFile, DataNotFound
from bnnlib.files import is_locked, make_folder, read_json, write_json
from bnnlib.runs.record import is_finished
from bnnlib.sweeps.tasks import Outcome, Task

BOOKS = ".sweep"  # no experiment's name begins with a dot
STATES = ("done", "running", "failed", "stopped", "waiting")


@dataclass(frozen=True)
class Books:
    """The files of the sweeps in one folder: a plan for each grid, a note for each failure."""

    folder: Path  # of the runs

    def plan(self, tasks: Iterable[Task]) -> None:
        """Write down what is to be done, so that others can count what is missing."""
        named = {task.name: task.label for task in tasks}
        digest = hashlib.sha256(json.dumps(sorted(named)).encode()).hexdigest()
        self._write(f"plan-{digest[:16]}.json", {"tasks": named})

    def planned(self) -> dict[str, str]:
        """The label of each task of all plans, by name. Raises DataNotFound without any."""
        if not self.folder.is_dir():
            raise DataNotFound(f"there is no folder {self.folder}")
        plans = sorted((self.folder / BOOKS).glob("plan-*.json"))
        if not plans:
            raise DataNotFound(f"{self.folder} holds no sweep: there is no plan in it")
        named: dict[str, str] = {}
        for path in plans:
            tasks = read_json(path).get("tasks")
            if not (isinstance(tasks, dict) and all(isinstance(v, str) for v in tasks.values())):
                raise DamagedFile(f"{path} is no plan of a sweep")
            named |= tasks
        return named

    def failed(self, task: Task, outcome: Outcome, worker: str) -> None:
        """Write down a failure, with its traceback."""
        note = {"task": task.label, "error": outcome.error, "worker": worker}
        note |= {"when": time.strftime("%Y-%m-%d %H:%M:%S"), "traceback": outcome.trace}
        self._write(self.note(task.name).name, note)

    def forget(self, task: Task) -> None:
        """A task that begins anew has not failed."""
        self.note(task.name).unlink(missing_ok=True)

    def failures(self) -> dict[str, dict[str, Any]]:
        """The notes of what failed, by the name of its file."""
        paths = sorted((self.folder / BOOKS).glob("failed-*.json"))
        return {path.name: read_json(path) for path in paths}

    def note(self, name: str) -> Path:
        """Where the failure of a task is written down."""
        return self.folder / BOOKS / f"failed-{name.replace('/', '-')}.json"

    def _write(self, name: str, content: dict[str, Any]) -> None:
        make_folder(self.folder / BOOKS)
        write_json(self.folder / BOOKS / name, content)


def state_of(folder: Path, name: str, failed: bool) -> str:
    """One of `STATES`, as the folders alone tell it."""
    path = folder / name
    if name.endswith(".ipynb"):
        return "done" if path.is_file() else "failed" if failed else "waiting"
    try:
        if is_finished(path):
            return "done"
    except BnnlibError:
        return "failed"
    if is_locked(path):
        return "running"
    if failed:
        return "failed"
    return "stopped" if path.exists() else "waiting"
