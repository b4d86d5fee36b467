"""What a sweep takes beside its runs: time, and memory of its client with the scheduler.

In: how many runs, how many workers. Out: rows. Each is measured in a process of its own, so that
its peak of memory is its own; so is the reading of a ledger.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.rounds import Row, rotated
from benchmarks.workers import peak_memory
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.profiles import quick, smoke
from bnnlib.experiments.variants import named
from bnnlib.files import make_folder, write_json
from bnnlib.runs.folder import load_run
from bnnlib.runs.ledger import LEDGER, results, write_ledger
from bnnlib.runs.record import HISTORY, RECORD, RESULTS
from bnnlib.runs.result import differences
from bnnlib.runs.run import run
from bnnlib.sweeps.books import Books
from bnnlib.sweeps.launch import run_arguments
from bnnlib.sweeps.state import begin
from bnnlib.sweeps.tasks import Outcome, RunTask, Task, run_name
from bnnlib.sweeps.where import Where

# The smallest run there is: one step of the narrowest network.
TINY = replace(smoke(named("svhn-random-labels")), epochs=1, n_train=50, n_test=0, width=1 / 16)
LONG = replace(quick(named("svhn-random-labels")), evaluate_every=10)  # with epochs to choose
SWEEP, LOOPS, FILES = "sweep", "plain loops", "sweep of files"
WRITTEN = "written.json"


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def many(e: Experiment, n: int) -> list[Experiment]:
    """The same with n seeds."""
    return [replace(e, seed=seed) for seed in range(n)]


# ------------------------------------------------------------------------------ what is swept


@dataclass(frozen=True)
class FileTask:
    """A task that only writes a file, so that what is left is the sweep's own work."""

    folder: Path
    name: str
    label: str = "a file"
    needs: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)

    def is_finished(self) -> bool:
        """Whether it was written."""
        return (self.folder / WRITTEN).is_file()

    def begun(self) -> object:
        """It begins and ends at once."""
        return None

    def progress(self) -> object:
        """It has no parts."""
        return None

    def work(self, how: Mapping[str, Any], stop: Callable[[], bool]) -> Outcome:
        """Write it."""
        make_folder(self.folder)
        write_json(self.folder / WRITTEN, {"name": self.name})
        return Outcome("finished")


def file_tasks(n: int, out: Path) -> list[Task]:
    """n tasks of a file each."""
    return [FileTask(out / f"file/{i:05d}", f"file/{i:05d}") for i in range(n)]


def run_tasks(experiments: Sequence[Experiment], out: Path) -> list[Task]:
    """A task for each experiment, in the folder where a sweep has it."""
    names = [run_name(e) for e in experiments]
    return [
        RunTask(e, out / name, name, f"{e.name} seed={e.seed}")
        for e, name in zip(experiments, names, strict=True)
    ]


def swept(tasks: Sequence[Task], workers: int, out: Path) -> Row:
    """Make all tasks on so many new workers: seconds, and the peaks of memory.

    To be called by `alone`: client and scheduler are this process. "seconds" begin when each
    worker has made a first run, "start_seconds" end there.
    """
    from bnnlib.sweeps.client import work

    imported, start = peak_memory(), time.perf_counter()
    sweep, books = begin(tasks), Books(out)
    looked = time.perf_counter()
    books.plan(tasks)
    with Where(workers=workers, device="cpu").client(sweep) as client:
        client.wait_for_workers(min(workers, len(tasks)))
        client.run(warm_up)
        started, cpu = time.perf_counter(), time.process_time()
        work(sweep, client, books, run_arguments("cpu", None, "auto", 300.0))
        ended, cpu = time.perf_counter(), time.process_time() - cpu
        peaks = client.run(peak_memory)
    if sweep.failed:
        raise RuntimeError(f"{len(sweep.failed)} tasks failed: {next(iter(sweep.failed.items()))}")
    return {
        "runs": len(tasks),
        "workers": len(peaks),
        "look_seconds": looked - start,
        "start_seconds": started - looked,
        "seconds": ended - started,
        "client_cpu_seconds": cpu,
        "imports_bytes": imported,
        "client_bytes": peak_memory(),
        "worker_bytes": max(peaks.values()),
    }


def warm_up() -> None:
    """Make one run, after which libraries are loaded and kernels built."""
    with TemporaryDirectory() as folder:
        run(TINY, folder, device="cpu", progress="none")


def looped(experiments: Sequence[Experiment], out: Path, processes: int) -> Row:
    """The same runs without a sweep: plain loops, each in a process, side by side."""
    context = get_context("spawn")
    barrier = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, _ready, (barrier,)) as pool:
        parts = [experiments[i::processes] for i in range(processes)]
        seconds = list(pool.map(_loop, parts, [out] * processes))
    return {"runs": len(experiments), "workers": processes, "seconds": max(seconds)}


def _ready(barrier: Any) -> None:
    torch.set_num_threads(1)
    warm_up()
    barrier.wait()


def _loop(experiments: Sequence[Experiment], out: Path) -> float:
    start = time.perf_counter()
    for e in experiments:
        run(e, out / run_name(e), device="cpu", progress="none")
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------ measured


def overhead(sizes: Sequence[int], most_looped: int, rounds: Mapping[int, int]) -> Iterator[Row]:
    """Seconds of so many of the smallest runs: in a sweep, and in plain loops up to `most_looped`.

    `rounds`: how often each size is measured, where that is not once.
    """
    for n in sizes:
        for number in range(rounds.get(n, 1)):
            ways = [(SWEEP, 2), (FILES, 2), *[(LOOPS, 1), (LOOPS, 2)] * (n <= most_looped)]
            for way, workers in rotated(ways, number):
                with TemporaryDirectory() as folder:
                    yield {"way": way, **_overhead(way, n, workers, Path(folder))}


def _overhead(way: str, n: int, workers: int, out: Path) -> Row:
    if way == LOOPS:
        return looped(many(TINY, n), out, workers)
    tasks = file_tasks(n, out) if way == FILES else run_tasks(many(TINY, n), out)
    return alone(swept, tasks, workers, out)


def speed_up(epochs: int, runs: int, rounds: int) -> Iterator[Row]:
    """The seconds of equal runs on one worker and on two, in turn; the results must be the same.

    "equal": how many of the runs are those of the first sweep, bit for bit.
    """
    experiments = many(replace(LONG, epochs=epochs), runs)
    with TemporaryDirectory() as folder:
        first = None
        for number in range(rounds):
            for workers in rotated([1, 2], number):
                out = Path(folder) / f"{number}-{workers}"
                row = alone(swept, run_tasks(experiments, out), workers, out)
                first = first or out
                names = [run_name(e) for e in experiments]
                equal = sum(same(first / name, out / name) for name in names)
                yield {"round": number, "epochs": epochs, **row, "equal": equal}


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold one run, bit for bit."""
    return differences(load_run(one), load_run(other)) == []


# ---------------------------------------------------------------------------------- the ledger


def ledger(sizes: Sequence[int]) -> Iterator[Row]:
    """Seconds and memory of `results` without and with a ledger, for copies of the stored runs."""
    for n in sizes:
        with TemporaryDirectory() as folder:
            out = Path(folder)
            copy_stored(n, out)
            cold, cold_peak, imported = alone(timed_results, out, n)
            start = time.perf_counter()
            path = write_ledger(out)
            written = time.perf_counter() - start
            warm, warm_peak, _ = alone(timed_results, out, n)
            yield {
                "runs": n,
                "cold_seconds": cold,
                "warm_seconds": warm,
                "write_seconds": written,
                "cold_bytes": cold_peak,
                "warm_bytes": warm_peak,
                "imports_bytes": imported,
                "ledger_bytes": path.stat().st_size,
                "history_bytes": sum(p.stat().st_size for p in out.rglob(HISTORY)),
            }


def copy_stored(n: int, out: Path) -> None:
    """n folders, each a copy of a stored run, in turn."""
    runs = cycle(sorted(path.parent for path in RESULTS.rglob(RECORD)))
    for i, source in zip(range(n), runs, strict=False):
        target = out / source.parent.name / f"{i:016x}"
        make_folder(target)
        for name in (RECORD, HISTORY):
            shutil.copyfile(source / name, target / name)


def timed_results(out: Path, n: int) -> tuple[float, int, int]:
    """Seconds of `results`, the peak of memory, and that before; of a folder with n runs."""
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    imported, start = peak_memory(), time.perf_counter()
    found = len(results(out))
    seconds = time.perf_counter() - start
    if found != n:
        raise RuntimeError(f"{out / LEDGER}: {found} rows for {n} runs")
    return seconds, peak_memory(), imported
