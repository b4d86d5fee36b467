"""How far a sweep is, in memory; what is finished is asked of the folders."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bnnlib.errors import BnnlibError
from bnnlib.sweeps.tasks import Outcome, Task, in_a_line


@dataclass
class Sweep:
    """How far a sweep is. The tasks of each state, by name."""

    tasks: dict[str, Task]
    finished: set[str] = field(default_factory=set)
    failed: dict[str, Outcome] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # of what was finished just now
    running: int = 0
    workers: int = 0
    dashboard: str = ""
    unmet: str = ""  # resources that no worker offers, for a reader
    tries: Counter = field(default_factory=Counter)
    losses: dict[str, list[tuple[object, object]]] = field(default_factory=dict)  # see `Task`
    wait_until: dict[str, float] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether each task is finished or failed."""
        return len(self.finished) + len(self.failed) == len(self.tasks)

    @property
    def left(self) -> set[str]:
        """The names of the tasks that are neither finished nor failed."""
        return self.tasks.keys() - self.finished - self.failed.keys()

    def look(self, names: Iterable[str]) -> None:
        """Ask the folders of these tasks whether they are finished."""
        for name in names:
            try:
                if self.tasks[name].is_finished():
                    self.finished.add(name)
            except BnnlibError as error:  # it never can be, in this folder
                self.failed[name] = Outcome("failed", in_a_line(error))


def begin(tasks: Sequence[Task]) -> Sweep:
    """A sweep of these tasks, of which some may be finished."""
    sweep = Sweep({task.name: task for task in tasks})
    sweep.look(list(sweep.tasks))
    return sweep
