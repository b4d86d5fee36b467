"""What a busy neighbour costs a training step, by how long threads spin before they sleep.

In: nothing but this machine. Out: `benchmarks/results/contention.json`. The threads of OpenMP wait
for each other after every operation; `bnnlib.process` says how long they spin, and this is what its
number rests on. The numbers of turns are those of GNU's library, which is PyTorch's on Linux.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click

from benchmarks.records import recorded, save
from benchmarks.rounds import PAUSE, Row, paired, quartiles, rotated
from benchmarks.settings import Setting
from benchmarks.timings import CONTENTION
from benchmarks.workers import Worker
from bnnlib.errors import BnnlibError
from bnnlib.process import BRIEFLY

LIBRARY = 300_000  # turns of GNU's library where nobody says anything (libgomp's env.c)
OURS = int(BRIEFLY["GOMP_SPINCOUNT"])
SPINS = (LIBRARY, 30_000, OURS, 0)
SETTINGS = (
    Setting("small", steps=5),  # of the quick runs
    Setting("cifar10", 1 / 8, steps=4),
    Setting("cifar10", 1 / 4, steps=2),
    Setting("cifar10", 1, steps=1),
)
# Ends when its parent is gone.
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
ALONE = 3.0  # seconds of a turn at least; a difference of a few per cent is to be seen


@dataclass(frozen=True)
class Way:
    """How many threads compute, and how long they spin."""

    threads: int
    spin: int

    def start(self, setting: Setting) -> Worker:
        """A process that trains so."""
        spin = {"GOMP_SPINCOUNT": str(self.spin)}
        return Worker("bnnlib", replace(setting, threads=self.threads), spin)


def ways(spins: Sequence[int]) -> list[Way]:
    """Two threads with each spin, and one thread, which has nobody to wait for."""
    return [Way(2, spin) for spin in spins] + [Way(1, OURS)]


class Neighbour:
    """A process that computes without end, while it is let."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", BUSY])
        self.process.send_signal(signal.SIGSTOP)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Inside the `with` block it computes."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(setting: Setting, spins: Sequence[int], rounds: int) -> list[Row]:
    """A row for each way: quartiles of the milliseconds of a step, alone and beside the neighbour.

    In each round every way takes its turn, first all of them alone, for `ALONE` seconds, then
    all beside the neighbour, while the others are idle; the first round is not kept.
    `alone_to_library` is the time alone in relation to that of the library's own spin in the
    same round, and `beside_to_alone` what the neighbour makes of it.
    """
    with ExitStack() as stack:
        neighbour = Neighbour()
        stack.callback(neighbour.close)
        workers = {way: way.start(setting) for way in ways(spins)}
        for worker in workers.values():
            stack.callback(worker.close)
        for worker in workers.values():
            worker.about()
        taken = [_round(workers, neighbour, setting.steps, n) for n in range(rounds + 1)][1:]
    return [_row(setting, way, taken, reference=Way(2, spins[0])) for way in workers]


def _round(workers: dict[Way, Worker], neighbour: Neighbour, steps: int, number: int) -> Row:
    """Milliseconds of a step of each way, by "alone" and "beside"."""
    order = rotated(list(workers), number)

    def turn(way: Way, seconds: float = 0.0) -> float:
        time.sleep(PAUSE)
        taken = [workers[way].ask("epoch")]
        while sum(taken) < seconds:
            taken.append(workers[way].ask("epoch"))
        return 1000 * median(taken) / steps

    alone = {way: turn(way, ALONE) for way in order}
    with neighbour.busy():
        return {"alone": alone, "beside": {way: turn(way) for way in order}}


def _row(setting: Setting, way: Way, taken: Sequence[Row], reference: Way) -> Row:
    alone, beside = ([r[when][way] for r in taken] for when in ("alone", "beside"))
    library = [r["alone"][reference] for r in taken]
    return {
        "network": setting.network,
        "width": setting.width,
        "threads": way.threads,
        "spin": way.spin,
        "alone": quartiles(alone),
        "beside": quartiles(beside),
        "alone_to_library": paired(alone, library),
        "beside_to_alone": paired(beside, alone),
    }


def told(row: Row) -> str:
    """One row in a line."""
    threads = "1 thread" if row["threads"] == 1 else f"2 threads, spin {row['spin']:,}"
    alone, beside = row["alone"]["median"], row["beside"]["median"]
    name = f"{row['network']} x {row['width']:g}, {threads}:"
    return f"{name:44} {alone:8.1f} ms alone, {beside:8.1f} ms beside a busy process"


@click.command()
@click.option("--quick", is_flag=True, help="One network and few rounds.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="[benchmarks/results/contention.json; none for --quick]",
)
def main(quick: bool, out: Path | None) -> None:
    """Time training steps alone and beside a busy process, for each time that threads spin."""
    if out is None and not quick:
        out = CONTENTION
    settings, rounds = (SETTINGS[:1], 2) if quick else (SETTINGS, 4)
    try:
        results = run(settings, SPINS[::2] if quick else SPINS, rounds)
        if out:
            save(results, out)
    except BnnlibError as error:
        raise click.ClickException(str(error)) from error


def run(settings: Sequence[Setting], spins: Sequence[int], rounds: int) -> Row:
    """All rows, told as they come, with what they were measured on."""

    def measured() -> Row:
        rows = []
        for setting in settings:
            rows += measure(setting, spins, rounds)
            click.echo("\n".join(map(told, rows[-len(ways(spins)) :])))
        return {
            "rounds": rounds,
            "batch_size": settings[0].batch_size,
            "ours": OURS,
            "library": spins[0],
            "contention": rows,
        }

    return recorded(measured)


if __name__ == "__main__":
    main()
