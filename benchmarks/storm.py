"""A sweep that is killed again and again, its workers and its client, until nothing is left to do.

In: how many kills, how many runs. Out: one row. What is killed is `python -m bnnlib sweep`, by
SIGKILL; where that ended the client, or where it told a failure, the same command begins again.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import psutil

from benchmarks.overhead import same, warm_up
from benchmarks.rounds import Row
from bnnlib.errors import BnnlibError
from bnnlib.runs.ledger import results
from bnnlib.runs.record import RECORD, is_finished, read_record
from bnnlib.sweeps.books import state_of
from bnnlib.sweeps.grid import read_grid

# Two kinds of run: one draws its weights, so that generators are part of the state.
GRID = """
[[runs]]
experiments = ["svhn-random-labels", "svhn-tanh-stochastic"]
profile = "smoke"
seeds = "0-{last}"
set = {{ epochs = {epochs}, n_train = 500, evaluate_every = 20 }}
"""
WORKERS = 2
CHECKPOINT_EVERY = 0.2  # seconds
PAUSE = (2.0, 6.0)  # seconds between two kills, at least and at most
CLIENTS = 0.1  # the share of kills that hit the client
MOST_COMMANDS = 10  # after the last kill
TRIAL_EPOCHS = 40
MARGIN = 1.1
TOLD = 300  # characters of a message that are kept
WORKER = "spawn_main"  # what the command line of a worker holds, and that of no other child


def storm(kills: int, runs: int, seed: int = 0) -> Row:
    """Kill a sweep so often at random moments, and let it come to its end.

    The row counts the runs that are finished, those that still seem to run, those whose record
    was written again after they had been finished, and those that are equal, bit for bit, to the
    ones of a sweep that nobody disturbs.
    """
    epochs = long_enough(kills, runs)
    with TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.toml"
        grid.write_text(GRID.format(last=runs // 2 - 1, epochs=epochs), encoding="utf-8")
        calm, wild = Path(folder) / "calm", Path(folder) / "wild"
        start = time.perf_counter()
        with open(Path(folder) / "calm.log", "w+b") as log:
            _command(grid, calm, log).wait()
        middle = time.perf_counter()
        with open(Path(folder) / "wild.log", "w+b") as log:
            victims, commands, again = _kill(grid, wild, kills, random.Random(seed), log)
            log.seek(0)
            words = log.read().decode(errors="replace").splitlines()
        end = time.perf_counter()
        names = [task.name for task in read_grid(grid, wild)[0]]
        states = [state_of(wild, name, False) for name in names]
        records = [read_record(wild / name)[1] for name in names if is_finished(wild / name)]
        return {
            "kills": len(victims),
            "workers_killed": victims.count("worker"),
            "clients_killed": victims.count("client"),
            "commands": commands,
            "runs": len(names),
            "epochs": epochs,
            "finished": states.count("done"),
            "running": states.count("running"),
            "rows": len(results(wild)),
            "written_again": len(again),
            "equal": sum(_equal(calm / name, wild / name) for name in names),
            "continued": sum(len(record.get("continued", [])) for record in records),
            "told": _last_words(words),
            "calm_seconds": middle - start,
            "seconds": end - middle,
        }


def long_enough(kills: int, runs: int) -> int:
    """Epochs of each run with which the sweep is not over before the last kill.

    A worker that is killed so often makes runs for less than half of the time.
    """
    warm_up()
    with TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.toml"
        grid.write_text(GRID.format(last=0, epochs=TRIAL_EPOCHS), encoding="utf-8")
        tasks, _ = read_grid(grid, Path(folder))
        how, start = {"device": "cpu", "checkpoint_every": CHECKPOINT_EVERY}, time.perf_counter()
        for task in tasks:
            task.work(how, lambda: False)
        seconds = (time.perf_counter() - start) / len(tasks)
    storms = kills * sum(PAUSE) / 2
    return max(1, round(TRIAL_EPOCHS * MARGIN * storms * WORKERS / 2 / (runs * seconds)))


def _last_words(lines: list[str]) -> list[str]:
    """What commands said, each once: without where they were, and how far the sweep was."""
    left_out = (" ", "/", "Traceback", "done ")  # "/": warnings of Python, by their file
    said = [line[:TOLD] for line in lines if line and not line.startswith(left_out)]
    return list(dict.fromkeys(said))


def _command(grid: Path, out: Path, log: BinaryIO) -> subprocess.Popen:
    """The sweep, begun or begun again; `log` takes its messages."""
    command = [sys.executable, "-m", "bnnlib", "sweep", grid, "--out", out]
    command += ["--workers", str(WORKERS), "--checkpoint-every", str(CHECKPOINT_EVERY)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": log}
    return subprocess.Popen([*command, "--device", "cpu"], **streams)


def _kill(
    grid: Path, out: Path, kills: int, rng: random.Random, log: BinaryIO
) -> tuple[list[str], int, set[Path]]:
    """Who was killed, how many commands it took, and which finished runs were written again."""
    victims: list[str] = []
    client, commands, after, finished, again = _command(grid, out, log), 1, 0, {}, set()
    try:
        while True:
            again |= _written_again(out, finished)
            if len(victims) < kills and client.poll() is None:
                time.sleep(rng.uniform(*PAUSE))
                victims += _strike(client, rng)
            elif client.wait() == 0:
                return victims, commands, again | _written_again(out, finished)
            else:
                after += len(victims) >= kills
                if after > MOST_COMMANDS:
                    return victims, commands, again
                client, commands = _command(grid, out, log), commands + 1
    finally:
        client.kill()
        client.wait()


def _strike(client: subprocess.Popen, rng: random.Random) -> list[str]:
    """Kill a worker or the client; who it was, nobody where there is no worker just now."""
    if rng.random() < CLIENTS:
        client.kill()
        client.wait()
        return ["client"]
    workers = _workers(client.pid)
    if not workers:
        return []
    try:
        os.kill(rng.choice(workers), signal.SIGKILL)
    except ProcessLookupError:
        return []
    return ["worker"]


def _workers(client: int) -> list[int]:
    """The processes of a client's workers."""
    try:
        children = psutil.Process(client).children(recursive=True)
        return [child.pid for child in children if WORKER in " ".join(child.cmdline())]
    except psutil.Error:  # one has just ended
        return []


def _written_again(out: Path, finished: dict[Path, int]) -> set[Path]:
    """The runs that were known as finished, and whose record is another file now.

    `finished`: the time of the record of each, to which the new ones are added.
    """
    changed = set()
    for path in out.glob(f"*/*/{RECORD}"):
        try:
            stamp = path.stat().st_mtime_ns
            if path in finished:
                changed |= {path} if finished[path] != stamp else set()
            elif is_finished(path.parent):
                finished[path] = stamp
        except (BnnlibError, OSError):  # it is being written
            continue
    return changed


def _equal(calm: Path, wild: Path) -> bool:
    return is_finished(calm) and is_finished(wild) and same(calm, wild)
