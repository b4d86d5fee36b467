"""`python -m benchmarks.faults`: break runs and files on purpose, and write down what happened.

Out: `results/reliability.json`, one row for each kind of fault: how often it was tried, and how
often it ended as promised. Where that differs the exit status is 1.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch

from benchmarks.kills import EXPERIMENT, kill_until_done, live
from benchmarks.mutations import count_all_outcomes, mutations
from bnnlib.data.images import load_npz
from bnnlib.errors import BnnlibError, CannotWrite, NotFinite
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.profiles import smoke
from bnnlib.experiments.variants import named
from bnnlib.files import locked, write_json
from bnnlib.optim import BinaryAdam
from bnnlib.runs.folder import load_run
from bnnlib.runs.interrupts import SIGNALS
from bnnlib.runs.record import RESULTS
from bnnlib.runs.result import Run, differences, environment
from bnnlib.runs.run import run

SHORT = replace(EXPERIMENT, epochs=4, evaluate_every=2)  # of five steps
STEPS = 20
STEP = "step of the optimizer"


@dataclass
class Row:
    """What became of one kind of fault."""

    fault: str
    tried: int
    as_promised: int
    outcome: str


class Workshop:
    """An empty folder for each fault, and one uninterrupted run to compare with."""

    def __init__(self, folder: Path, scale: float):
        self.folder, self.scale, self.used = folder, scale, 0
        self.whole, _, _ = self.finish(self.new())

    def new(self) -> Path:
        """The name of a folder that is not there yet."""
        self.used += 1
        return self.folder / f"run{self.used}"

    def count(self, full: int) -> int:
        """So many faults at full scale; fewer, but one at least, in a trial."""
        return max(1, round(full * self.scale))

    def finish(self, out: Path) -> tuple[Run, int, list[str]]:
        """Run, or go on, to the end; with the number of steps it took, and the warnings."""
        taken, step = [], BinaryAdam.step
        BinaryAdam.step = lambda *args: taken.append(1) or step(*args)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(SHORT, out, device="cpu", progress="none", checkpoint_every=300)
        finally:
            BinaryAdam.step = step
        return load_run(out), len(taken), [str(warning.message) for warning in caught]

    def unfinished(self, step: int, number: int = signal.SIGTERM, every: float = 0.0) -> Path:
        """The folder of a run that was interrupted in a step."""
        out = self.new()
        life = live(SHORT, out, (STEP, step), number, every)
        if life.exit_code != 130:
            raise RuntimeError(f"an interrupted run ended with {life.exit_code}, not 130")
        return out

    def goes_on(self, out: Path, done: int | None = None, warning: str = "") -> bool:
        """Whether the run in a folder, continued, is the uninterrupted one, bit for bit.

        After `done` steps it must take only the others, and give a warning with these words.
        """
        ended, steps, told = self.finish(out)
        return (
            differences(self.whole, ended) == []
            and done in (None, STEPS - steps)
            and warning in " ".join(told)
        )


# ------------------------------------------------------------------------------------- kills


def killed_at_events(shop: Workshop) -> Row:
    """SIGKILL before a step, in the middle of a file, before it is flushed, renamed, deleted."""
    lives, same = [], 0
    for seed in range(shop.count(10)):
        out = shop.new()
        killed = kill_until_done(SHORT, out, seed)[:-1]
        lives += killed
        same += len(killed) * (differences(shop.whole, load_run(out)) == [])
    saving = sum(life.during_a_save for life in lives)
    told = f"{saving} of them in the middle of a save; every run ended as the same run, bit for bit"
    return Row("SIGKILL at a chosen point", len(lives), same, told)


def killed_at_random(shop: Workshop) -> Row:
    """SIGKILL of `python -m bnnlib run` at random moments of its life, starting up included."""
    tries = shop.count(40)
    e, out = replace(SHORT, epochs=60 * tries), shop.new()  # more than fit into so many lives
    whole = run(e, shop.new(), device="cpu", progress="none")
    rng, kills, ended = random.Random(0), 0, None
    while kills < tries and ended != 0:
        process = subprocess.Popen(_command(e, out), **_QUIET)
        time.sleep(rng.uniform(1.5, 4.5))
        process.kill()
        ended = process.wait()
        kills += ended == -signal.SIGKILL
    subprocess.run(_command(e, out), check=True, **_QUIET)
    same = differences(load_run(whole.folder), load_run(out)) == []
    told = "starting up included; the run ended as the same run, bit for bit"
    return Row("SIGKILL at a random moment", kills, kills * same, told)


_QUIET = {
    "stdout": subprocess.DEVNULL,
    "stderr": subprocess.DEVNULL,
    "env": {**os.environ, "OMP_NUM_THREADS": "1"},  # like the run it is compared with
}


def _command(e: Experiment, out: Path) -> list[str]:
    """The shell command that runs `e`."""
    command = [sys.executable, "-m", "bnnlib", "run", e.name, "--profile", "smoke"]
    command += ["--out", str(out), "--device", "cpu", "--checkpoint-every", "0.1"]
    base = smoke(named(e.name)).spec()
    for name, value in e.spec().items():
        if value != base[name]:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            command += ["--set", f"{name}={text}"]
    return command


def interrupted(shop: Workshop) -> Row:
    """SIGINT and SIGTERM in every step."""
    steps = range(1, shop.count(STEPS) + 1)
    tries = [(step, number) for step in steps for number in SIGNALS]
    same = sum(shop.goes_on(shop.unfinished(s, number, 300), done=s) for s, number in tries)
    told = "finished the step, saved, exit 130; continued from there, the same run, bit for bit"
    return Row("Ctrl-C and SIGTERM", len(tries), same, told)


# ----------------------------------------------------------------------------------- storage


def damaged_states(shop: Workshop) -> Row:
    """The newest checkpoint is truncated or one of its bits is turned."""
    rng, tried, same = random.Random(0), shop.count(200), 0
    base = shop.unfinished(8)
    for number in range(tried):
        out = Path(shutil.copytree(base, shop.new()))
        newest = max((out / "checkpoints").iterdir())
        content = bytearray(newest.read_bytes())
        place = rng.randrange(len(content))
        if number % 2:
            del content[place:]
        else:
            content[place] ^= 1 << rng.randrange(8)
        newest.write_bytes(content)
        same += shop.goes_on(out, done=7, warning=f"{newest} is damaged")
    told = "named in a warning, the state before it used; continued, the same run, bit for bit"
    return Row("damaged newest checkpoint", tried, same, told)


def full_disk(shop: Workshop) -> Row:
    """A run on a small disk of its own, which is full after a while."""
    sizes, good = [], 0
    for kilobytes in range(60, 60 + 10 * shop.count(20), 10):
        with small_disk(shop.new(), kilobytes) as disk:
            out = disk / "out"
            try:
                run(SHORT, out, device="cpu", progress="none", checkpoint_every=0)
            except CannotWrite as error:
                one_line = str(error).isprintable()
                kept = Path(shutil.copytree(out, shop.new())) if out.exists() else shop.new()
                sizes.append(kilobytes)
                good += one_line and shop.goes_on(kept)
    told = "ended with one line of error; what lay there went on, elsewhere, as the same run"
    return Row(f"disk of {sizes[0]} to {sizes[-1]} kB, full", len(sizes), good, told)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A disk in memory, which takes root to mount."""
    folder.mkdir()
    size = f"size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def two_processes(shop: Workshop) -> Row:
    """A second process wants the folder of a first one."""
    tried, good = shop.count(20), 0
    for _ in range(tried):
        out = shop.unfinished(3)
        with locked(out):
            refused = live(SHORT, out).exit_code
        good += refused == 1 and shop.goes_on(out, done=3)
    told = "the second refused, the first unharmed"
    return Row("two processes on one folder", tried, good, told)


# ------------------------------------------------------------------------- strangers' files


def strangers(shop: Workshop) -> Iterator[Row]:
    """Random damage to every file of a run, finished or not; each is loaded and run again."""
    root = shop.new()
    root.mkdir()
    for name, counts in count_all_outcomes(root, shop.count(4000), seed=0).items():
        kind = "unfinished/checkpoint" if "checkpoint" in name else name
        yield _refusals(f"altered file of a stranger, {kind}", **counts)


def user_data(shop: Workshop) -> Row:
    """Random damage to a `.npz` file of images."""
    path = shop.new().with_suffix(".npz")
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(20, 3, 8, 8), dtype=np.uint8)
    np.savez_compressed(path, images=images, labels=np.arange(20) % 10)
    refused = harmless = 0
    for content in mutations(path.read_bytes(), shop.count(10_000), seed=0):
        path.write_bytes(content)
        try:
            load_npz(path, "train")
            harmless += 1
        except BnnlibError:
            refused += 1
    return _refusals("altered .npz file", refused, harmless)


def _refusals(fault: str, refused: int = 0, harmless: int = 0) -> Row:
    told = f"{refused} refused by name, {harmless} without effect"
    return Row(fault, refused + harmless, refused + harmless, told)


# ----------------------------------------------------------------------------------- numbers


def numbers(shop: Workshop) -> Row:
    """A weight, an average, or a moment becomes NaN or infinite in some step."""
    rng, tried, good = random.Random(0), shop.count(50), 0
    for _ in range(tried):
        out, step = shop.new(), rng.randrange(2, STEPS)
        with spoiled_step(step, rng):
            try:
                run(SHORT, out, device="cpu", progress="none", checkpoint_every=0)
            except NotFinite as error:
                named = re.search(r"(conv|norm|dense)\d.* after step \d of epoch \d", str(error))
                good += named is not None and shop.goes_on(out, done=step - 1)
    told = "stopped with the epoch, the step and the layer; from the last good state the same run"
    return Row("NaN and infinity", tried, good, told)


@contextmanager
def spoiled_step(step: int, rng: random.Random) -> Iterator[None]:
    """The given step of the optimizer leaves one value that is not finite."""
    original, calls = BinaryAdam.step, 0

    def spoil(self, closure=None):
        nonlocal calls
        original(self, closure)
        calls += 1
        if calls == step:
            p = rng.choice([p for group in self.param_groups for p in group["params"]])
            tensor = rng.choice([p.data, *self.moments(p).values()])
            tensor[tuple(map(rng.randrange, tensor.shape))] = rng.choice((nan, inf, -inf))

    BinaryAdam.step = spoil
    try:
        yield
    finally:
        BinaryAdam.step = original


# ----------------------------------------------------------------------------------- command


def rows(scale: float) -> Iterator[Row]:
    """Every kind of fault, in turn; `scale` is the share of the full number of tries."""
    with TemporaryDirectory() as folder:
        shop = Workshop(Path(folder), scale)
        yield killed_at_events(shop)
        yield killed_at_random(shop)
        yield interrupted(shop)
        yield damaged_states(shop)
        if os.geteuid() == 0:
            yield full_disk(shop)
        else:
            click.echo("full disk: left out, because only root can mount one", err=True)
        yield two_processes(shop)
        yield from strangers(shop)
        yield user_data(shop)
        yield numbers(shop)


@click.command()
@click.option("--scale", default=1.0, show_default=True, help="Share of the tries.")
@click.option("--out", type=click.Path(path_type=Path), help="[results/reliability.json]")
def main(scale: float, out: Path | None) -> None:
    """Break runs and files on purpose, and write down what became of them."""
    if out is None and scale != 1:
        raise click.UsageError("a trial needs --out, to leave the published file alone")
    out = out or RESULTS / "reliability.json"
    torch.set_num_threads(1)
    about = {**environment(torch.device("cpu")), "scale": scale}
    start, found = time.perf_counter(), []
    for row in rows(scale):
        found.append(asdict(row))
        click.echo(f"{row.fault}: {row.as_promised} of {row.tried}; {row.outcome}")
    seconds = round(time.perf_counter() - start, 1)
    write_json(out, {**about, "seconds": seconds, "faults": found})
    if any(row["tried"] != row["as_promised"] for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
