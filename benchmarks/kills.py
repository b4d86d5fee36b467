"""Runs that are killed on purpose, again and again, until they reach their end."""

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from threading import RLock

import numpy as np
import torch
from tqdm import tqdm

from bnnlib.errors import BnnlibError, Interrupted
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.profiles import smoke
from bnnlib.experiments.variants import named
from bnnlib.optim import BinaryAdam
from bnnlib.runs.run import run

# Every kind of state that a run has: two generators, moments, averages, signs, half an epoch.
EXPERIMENT = replace(
    smoke(named("svhn-tanh-stochastic")),
    epochs=30,
    batch_size=20,
    width=0.1,
    random_labels=0.5,
    dropout=(0.2,),
    probes=("flips", "parts", "modes"),
    evaluate_every=4,
)

# Where a process may be killed: just before a call of one of these functions. The number is
# about how often three saves call it.
EVENTS = {
    "step of the optimizer": (BinaryAdam, "step", 3),
    "flush to disk": (os, "fsync", 8),
    "renaming": (Path, "replace", 8),
    "deletion": (Path, "unlink", 8),
}


@dataclass
class Life:
    """The end of one process: its exit code, and whether it was writing."""

    exit_code: int  # minus the signal that killed it
    during_a_save: bool


def live(
    experiment: Experiment,
    folder: Path,
    fuse: tuple[str, int] | None = None,
    number: int = signal.SIGKILL,
    every: float = 0.0,
) -> Life:
    """Run in a process of its own, which sends itself the signal `number` as its fuse burns down.

    The fuse is one of `EVENTS` and how many calls of it there are to be; None: no signal. An
    interrupted run exits with 130, a refused one with 1.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.kills"])
    process = context.Process(target=_run, args=(experiment, folder, fuse, number, every))
    for part in folder.rglob("*.part"):
        part.unlink()  # so that one found later is of this life
    process.start()
    process.join()
    return Life(process.exitcode, any(folder.rglob("*.part")))


def _run(experiment, folder, fuse, number, every) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs behind a shell
    tqdm.set_lock(RLock())  # its own is shared between processes, and outlives a killed one
    if fuse:
        _light(*fuse, number)
    try:
        run(experiment, folder, device="cpu", progress="none", checkpoint_every=every)
    except Interrupted:
        sys.exit(130)
    except BnnlibError:
        sys.exit(1)


def _light(event: str, calls: int, number: int) -> None:
    """Let the last of so many calls send a signal to this process before it begins."""
    owner, name, _ = EVENTS[event]
    function, left = getattr(owner, name), iter(range(calls - 1, -1, -1))

    @wraps(function)
    def counted(*args, **kwargs):
        if next(left, None) == 0:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def kill_until_done(
    experiment: Experiment, folder: Path, seed: int, lives: int = 300
) -> list[Life]:
    """Kill a run at random events until it is finished.

    Returns every life; only the last one has exit code 0. Raises RuntimeError where a process
    ends in another way, or after so many lives.
    """
    rng, ended = np.random.default_rng(seed), []
    while not ended or ended[-1].exit_code:
        if len(ended) == lives or (ended and ended[-1].exit_code != -signal.SIGKILL):
            raise RuntimeError(f"not finished after {len(ended)} lives: {ended[-1]}")
        event = rng.choice(list(EVENTS))
        ended.append(live(experiment, folder, (event, int(rng.integers(1, EVENTS[event][2])))))
    return ended
