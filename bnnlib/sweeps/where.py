"""Where the workers of a sweep are."""

import importlib.util
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from bnnlib.errors import InvalidValue, NotInstalled, shown
from bnnlib.names import check_device
from bnnlib.process import cores
from bnnlib.sweeps.state import Sweep
from bnnlib.sweeps.tasks import Task

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


def is_installed() -> bool:
    """Whether Dask is there, which has the workers of a sweep."""
    return importlib.util.find_spec("distributed") is not None


def check_installed() -> None:
    """Raise NotInstalled where Dask is missing."""
    if not is_installed():
        raise NotInstalled("a sweep needs Dask: pip install '.[sweep]'")
