"""What runs take of a disk, and what they ask of its file system.

In: experiments. Out: rows. Requests are the system calls that name a folder of runs, counted by
`strace`, which only Linux has.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import inf, isnan
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.overhead import TINY, many, run_tasks
from benchmarks.rounds import Row
from bnnlib.data.images import ImageSet
from bnnlib.experiments.build import build_model, derive_seed
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.profiles import at_profile
from bnnlib.experiments.variants import named
from bnnlib.history import History
from bnnlib.models import count_parameters, usual_inputs
from bnnlib.optim import make_optimizer
from bnnlib.probes import Recorder
from bnnlib.runs import run as running
from bnnlib.runs.checkpoint import Checkpoints
from bnnlib.runs.ledger import results, write_ledger
from bnnlib.runs.record import HISTORY, LABELS, PARAMETERS, RECORD, RESULTS
from bnnlib.sweeps.books import Books
from bnnlib.sweeps.launch import status_lines
from bnnlib.sweeps.state import begin
from bnnlib.tensors import tensor_bytes
from bnnlib.training import TrainingState

FOLDERS = (
    ("svhn-random-labels", "quick"),
    ("svhn-random-labels", "reduced"),
    ("cifar10-random-labels", "reduced"),
    ("cifar10-random-labels", "full"),
)
OF_SUBSET = {"train": 881, "test": 202}  # images of SVHN's subset, which no name tells
CLASSES = tuple("0123456789")

# ---------------------------------------------------------------------------------- the folder


def folders() -> Iterator[Row]:
    """The bytes of each file of a finished run, and of a checkpoint, of each of `FOLDERS`."""
    for name, profile in FOLDERS:
        yield {"experiment": name, "profile": profile, **sizes(at_profile(named(name), profile))}


def sizes(e: Experiment) -> Row:
    """The same of one experiment, without training: they depend on no number that is learnt.

    Record and history are those of its stored reduced run, the history as long as this one's.
    """
    model = build_model(e)
    order = torch.Generator().manual_seed(derive_seed(e.seed, "order of batches"))
    state = TrainingState(model, make_optimizer(e.optimizer, model, e.lr_start), order)
    Recorder(e.probes, _noise(e), derive_seed(e.seed, "probes")).begin(state)
    stored = RESULTS / e.name / "reduced-seed0"
    with TemporaryDirectory() as folder:
        kept = Path(folder)
        Checkpoints(kept, state, e.digest(), inf).save()
        (checkpoint,) = kept.glob("checkpoints/*")
        _history(e, History.load(stored / HISTORY)).save(kept / HISTORY)
        files = {
            RECORD: (stored / RECORD).stat().st_size,
            LABELS: len(_labels(e)),
            HISTORY: (kept / HISTORY).stat().st_size,
            PARAMETERS: len(tensor_bytes(model.state_dict())),
        }
        counts = count_parameters(model)
        about = {"parameters": counts.binary + counts.real, "epochs": e.epochs}
        return {**about, "files": files, "checkpoint_bytes": checkpoint.stat().st_size}


def _noise(e: Experiment) -> ImageSet:
    """Two batches of the images that a network of this kind takes."""
    inputs, n = usual_inputs(e.network), 2 * e.batch_size
    generator = torch.Generator().manual_seed(0)
    shape = (n, inputs.in_channels, inputs.image_size, inputs.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(len(CLASSES), (n,), generator=generator)
    return ImageSet(images, labels, "noise", "train", CLASSES)


def _labels(e: Experiment) -> bytes:
    """`labels.npz` with labels drawn by lot."""
    generator, content = np.random.default_rng(0), io.BytesIO()
    counts = {split: e.images(split) for split in ("train", "valid", "test")}
    counts = {split: OF_SUBSET.get(split, 0) if n is None else n for split, n in counts.items()}
    splits = {s: generator.integers(len(CLASSES), size=n) for s, n in counts.items() if n}
    np.savez_compressed(content, **splits)
    return content.getvalue()


def _history(e: Experiment, stored: History) -> History:
    """A history as long as this experiment's, of rows that are in the stored one."""
    probed = ("flips_", "saturation_", "critical_", "train_error_random", "train_error_true")
    left_out = () if e.probes else probed
    columns = [name for name in stored.columns if not name.startswith(left_out or "-")]
    evaluated = next(r for r in reversed(stored.rows) if not isnan(r["train_error"]))
    between = next((r for r in stored.rows if isnan(r["train_error"])), evaluated)
    if e.images("valid"):
        for name in [name for name in columns if name.startswith("test_error")]:
            valid = name.replace("test", "valid")
            evaluated[valid], between[valid] = evaluated[name], between[name]
            columns += [valid] * (valid not in columns)
    return History(
        [
            {n: (between if epoch % e.evaluate_every else evaluated)[n] for n in columns}
            | {"epoch": epoch}
            for epoch in range(1, e.epochs + 1)
        ]
    )


# ------------------------------------------------------------------------------- its requests

KINDS = {  # system calls, by what they ask for
    "open": ("open", "openat", "creat"),
    "look": (
        "stat",
        "lstat",
        "fstat",
        "newfstatat",
        "statx",
        "access",
        "faccessat",
        "faccessat2",
        "readlink",
        "readlinkat",
    ),
    "list": ("getdents", "getdents64"),
    "read": ("read", "pread64"),
    "write": ("write", "pwrite64"),
    "flush": ("fsync", "fdatasync"),
    "rename": ("rename", "renameat", "renameat2"),
    "delete": ("unlink", "unlinkat", "rmdir"),
    "make": ("mkdir", "mkdirat"),
    "lock": ("flock", "fcntl"),
}
KIND = {call: kind for kind, calls in KINDS.items() for call in calls}
CALL = re.compile(r"(?:\[pid +\d+\] |\d+ +)?(\w+)\(")
FEW, MORE = 4, 8


def missing() -> str | None:
    """Why requests cannot be counted here."""
    return None if shutil.which("strace") else "strace is not installed"


def requests() -> Iterator[Row]:
    """Requests by kind: of a run, of each further checkpoint and writing of its history, and of
    each run where a sweep, its status and the table of results look at it.

    Each difference is between two processes that do it `FEW` and `MORE` times.
    """
    a_run = _of_a_run(epochs=1)
    few, more = (_of_a_run(epochs=n, histories=True) for n in (FEW, MORE))
    yield _row("a run, from begin to end", a_run)
    yield _row("each further writing of the history", _each(few, more))
    few, more = (_of_a_run(epochs=n, checkpoints=True) for n in (FEW, MORE))
    each = _each(few, more)
    rest = {kind: n - a_run[kind] - FEW * each.get(kind, 0) for kind, n in few.items()}
    yield _row("each checkpoint", each)
    yield _row("once, where there are checkpoints", rest)
    for what, say in LOOKS.items():
        few, more = (_looked(what, n) for n in (FEW, MORE))
        yield _row(say, _each(few, more))


def _row(what: str, counts: Row) -> Row:
    return {"what": what, **{kind: counts.get(kind, 0) for kind in KINDS}}


def _each(few: Row, more: Row) -> Row:
    return {kind: (more.get(kind, 0) - few.get(kind, 0)) / (MORE - FEW) for kind in more | few}


def _of_a_run(epochs: int, histories: bool = False, checkpoints: bool = False) -> Counter:
    """Those of one run of so many steps, each an epoch, in a process of its own."""
    with TemporaryDirectory() as folder:
        return counted(Path(folder), "run", epochs, int(histories), int(checkpoints))


def _looked(what: str, n: int) -> Counter:
    """Those of one look at n finished runs."""
    with TemporaryDirectory() as folder:
        out = Path(folder)
        for task in run_tasks(many(TINY, n), out):
            task.work({"device": "cpu"}, lambda: False)
        Books(out).plan(run_tasks(many(TINY, n), out))
        if "ledger" in what:
            write_ledger(out)
        return counted(out, what, n)


def counted(folder: Path, what: str, *numbers: int) -> Counter:
    """Requests by kind of `python -m benchmarks.storage WHAT FOLDER NUMBERS...` to a folder."""
    log = folder.parent / f"{folder.name}.strace"
    calls = ",".join(f"?{call}" for call in KIND)
    command = ["strace", "-f", "-qq", "-y", "-s", "0", "-e", f"trace={calls}", "-o", log]
    command += [sys.executable, "-m", "benchmarks.storage", what, folder, *map(str, numbers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        subprocess.run(command, check=True, cwd=RESULTS.parent, env=environment)
        lines = log.read_text(errors="replace").splitlines()
    finally:
        log.unlink(missing_ok=True)
    named = [CALL.match(line) for line in lines if str(folder) in line and "execve" not in line]
    return Counter(KIND[match[1]] for match in named if match)


def _run(folder: Path, epochs: int, histories: int, checkpoints: int) -> None:
    running.HISTORY_EVERY = 0.0 if histories else 1e9
    every = 0.0 if checkpoints else 1e9
    e = replace(TINY, epochs=epochs)
    running.run(e, folder / "run", device="cpu", progress="none", checkpoint_every=every)


LOOKS = {
    "begin": "each finished run, as a sweep begins again",
    "status": "each finished run, in the status of a sweep",
    "results": "each run, in the table of results, without a ledger",
    "results with ledger": "each run, in the table of results, with a ledger",
}
ACTS = {
    "run": _run,
    "begin": lambda out, n: begin(run_tasks(many(TINY, n), out)),
    "status": lambda out, n: status_lines(out),
    "results": lambda out, n: results(out),
    "results with ledger": lambda out, n: results(out),
}

if __name__ == "__main__":
    ACTS[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
