"""Where the workers are: here, at the address of a scheduler, or on a SLURM cluster."""

import importlib
import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
import psutil
from distributed import Adaptive, Client, Nanny, Scheduler, SpecCluster

from bnnlib.errors import DataNotFound, InvalidValue, NoScheduler, NotInstalled, check_whole
from bnnlib.files import read_toml
from bnnlib.process import BRIEFLY

# A worker that dies is told to the sweep at once, which knows whether its run came further.
SCHEDULER = {"distributed.scheduler.allowed-failures": 0}
LOCAL = SCHEDULER | {
    # A SIGTERM that was meant for one worker here does not leave the sweep without it.
    "distributed.worker.lifetime.restart": True,
    # A busy machine is slow to begin the next one, whose nanny is not to be given up meanwhile.
    "distributed.deploy.lost-worker-timeout": "60s",
}
ANSWERS_WITHIN = 30  # seconds
BEGINS = 3  # times that local workers are started, where they do not begin


@contextmanager
def local(workers: int, threads: int = 1, gpus: int = 0) -> Iterator[Client]:
    """A client of workers on this machine, each a process with so many threads for PyTorch.

    Where there are GPUs the workers share them out, and each sees but its own.
    """
    options = [_worker_options(i, workers, threads, gpus) for i in range(workers)]
    with dask.config.set(LOCAL), _local_cluster(options) as cluster:
        adapt(cluster, lambda: workers, minimum=workers, maximum=workers)
        with Client(cluster) as client:
            yield client


def _local_cluster(options: Sequence[dict[str, Any]]) -> SpecCluster:
    """Workers with these options; once more, where one of them was killed as it began."""
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
    for attempt in range(BEGINS):
        try:
            return SpecCluster(
                workers={i: {"cls": Nanny, "options": own} for i, own in enumerate(options)},
                scheduler={"cls": Scheduler, "options": scheduler},
                silence_logs=logging.CRITICAL,
            )
        except RuntimeError as error:
            if attempt == BEGINS - 1:
                raise NoScheduler(f"no workers could be started here: {error}") from error


def resources(workers: int, gpus: int) -> dict[str, float]:
    """What each of so many workers here offers."""
    offered = {"memory": psutil.virtual_memory().total / workers}
    return offered | ({"GPU": min(1, gpus / workers)} if gpus else {})


def _worker_options(i: int, workers: int, threads: int, gpus: int) -> dict[str, Any]:
    environment = {**BRIEFLY, "OMP_NUM_THREADS": str(threads)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(i % gpus)
    return {
        "nthreads": 1,
        "memory_limit": 0,  # none: Dask would end a worker at 95 % of it
        "env": environment,
        "resources": resources(workers, gpus),
        "silence_logs": logging.CRITICAL,
    }


@contextmanager
def at_address(address: str) -> Iterator[Client]:
    """A client of the scheduler at an address, such as `tcp://host:8786`; raises NoScheduler."""
    try:
        client = Client(address, timeout=ANSWERS_WITHIN)
    except (OSError, ValueError) as error:
        raise NoScheduler(f"no scheduler answers at {address}: {error}") from error
    with client:
        yield client


class AsManyAsNeeded(Adaptive):
    """Asks for as many workers as there are tasks left, and again for those that were lost."""

    def __init__(self, cluster: Any, needed: Callable[[], int], **more: Any):
        self.needed = needed
        super().__init__(cluster, **more)

    async def target(self) -> int:
        self.cluster.scale(len(self.cluster.worker_spec))  # what is missing of these begins anew
        return self.needed()


@contextmanager
def slurm(path: str | Path, needed: Callable[[], int]) -> Iterator[Client]:
    """A client of workers that SLURM starts, as a file says: see `read_slurm`.

    There are as many as `needed` says, but for the jobs that the file allows. Jobs that SLURM
    takes back are asked for again.
    """
    check_slurm()
    settings, jobs = read_slurm(path)
    with dask.config.set(SCHEDULER), _slurm_cluster(settings) as cluster:
        adapt(cluster, needed, minimum_jobs=0, maximum_jobs=jobs)
        with Client(cluster) as client:
            yield client


def adapt(cluster: Any, needed: Callable[[], int], **bounds: int) -> None:
    """Let a cluster have the workers that are needed, within the bounds of its own `adapt`."""
    cluster.adapt(Adaptive=partial(AsManyAsNeeded, needed=needed), **bounds)


def job_script(path: str | Path) -> str:
    """The script that `slurm` hands to `sbatch` for each job."""
    with _slurm_cluster(read_slurm(path)[0]) as cluster:
        return cluster.job_script()


def read_slurm(path: str | Path) -> tuple[dict[str, Any], int]:
    """The arguments of `dask_jobqueue.SLURMCluster` in a TOML file, and its `jobs`, at most.

    Raises DataNotFound without such a file, and InvalidValue where a worker would have several
    threads: a worker makes one run at a time, with threads of PyTorch's own.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataNotFound(f"no file {path} that describes a SLURM cluster")
    settings = read_toml(path)
    jobs = check_whole(f"{path}: jobs", settings.pop("jobs", 1), 1)
    workers, in_all = settings.get("processes", 1), settings.get("cores", 1)
    if in_all != workers:
        raise InvalidValue(
            f"{path}: cores = {in_all} with processes = {workers} gives a worker several threads; "
            "set both to the number of workers in a job, and job_cpu to that of its cores"
        )
    return {"cores": workers, "processes": workers} | settings, jobs


def jobqueue() -> ModuleType:
    """The package dask_jobqueue; raises NotInstalled.

    As it is imported it makes Ctrl-C end the process at once; here that stays as it was.
    """
    answer = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module("dask_jobqueue")
    except ImportError:
        raise NotInstalled("--slurm needs dask-jobqueue: pip install '.[sweep]'") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, answer)


def check_slurm() -> None:
    """Raise NotInstalled where jobs cannot be handed to SLURM."""
    if shutil.which("sbatch") is None:
        raise NotInstalled("there is no sbatch here: --slurm is for a machine of a SLURM cluster")


def _slurm_cluster(settings: dict[str, Any]) -> Any:
    try:
        return jobqueue().SLURMCluster(**{"silence_logs": "critical"} | settings)
    except (TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise InvalidValue(f"dask_jobqueue.SLURMCluster refuses this: {said}") from error
