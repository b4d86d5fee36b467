"""How long a user waits before the first step: whole processes, from their start to their end.

In: nothing. Out: a row for each program. The runs take one training step and test little, so
they take longer than it does to the end of the first step, which is in them.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.rounds import Row, quartiles
from benchmarks.workers import REPOSITORY

RUN = ["-m", "bnnlib", "run", "--device", "cpu", "--out", "run"]
ONE_STEP = ["--set", "epochs=1", "--set", "n_train=50", "--set", "n_test=50"]
PROGRAMS = {
    "import torch": ["-c", "import torch"],
    "from bnnlib import run": ["-c", "from bnnlib import run"],
    "a run of one step, drawn digits": [*RUN, "svhn-random-labels", *ONE_STEP],
    "a run of one step, CIFAR-10 at full width": [
        *(*RUN, "cifar10-random-labels", "--profile", "full", *ONE_STEP, "--set", "n_valid=50"),
    ],
    "CIFAR-10 from disk": [
        "-c",
        "import time; from bnnlib import load; start = time.perf_counter(); "
        "load('cifar10', 'train'); print(time.perf_counter() - start)",
    ],
}


def startup(rounds: int, programs: dict[str, list[str]] = PROGRAMS) -> tuple[list[Row], Row]:
    """Quartiles of the seconds of each program, and why others are missing, by name.

    A program that prints a number has timed itself. Each runs once before the rounds, so that
    its files are in the system's cache.
    """
    taken: dict[str, list[float]] = {name: [] for name in programs}
    missing: Row = {}
    for number in range(rounds + 1):
        for name, arguments in programs.items():
            if name in missing:
                continue
            try:
                seconds = _seconds(arguments)
            except subprocess.CalledProcessError as error:
                said = error.stderr.strip().splitlines() or ["it said nothing"]
                missing[name] = said[-1].replace(str(data_folder()), "the data folder")
                continue
            if number:
                taken[name].append(seconds)
    rows = [{"program": name, "seconds": quartiles(taken[name])} for name in taken if taken[name]]
    return rows, missing


def _seconds(arguments: list[str]) -> float:
    """Run Python with these arguments in an empty folder."""
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "BNNLIB_DATA": str(data_folder())},
            capture_output=True,
            text=True,
            check=True,
        )
    seconds = time.perf_counter() - start
    try:
        return float(done.stdout)
    except ValueError:
        return seconds


def data_folder() -> Path:
    """Where real images are looked for, whatever the current folder."""
    return Path(os.environ.get("BNNLIB_DATA") or "data").absolute()
