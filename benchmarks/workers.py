"""Processes in which contenders live, each alone with its library and its memory.

In: the name of a contender and a `Setting`. Out: a `Worker`, which is asked to train, or measure,
and is idle in between. `python -m benchmarks.workers NAME SETTING` is the other end: it reads
one word a line and answers in JSON.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
import torch

from benchmarks.contenders import (
    Bnnlib,
    FloatTwin,
    HalfFloatTwin,
    TunedFloatTwin,
    forced,
    on_each_set,
)
from benchmarks.engines import ENGINES, Reference
from benchmarks.limits import Limits, Rates
from benchmarks.naive import NaiveBnn
from benchmarks.peers import Brevitas, Larq, versions
from benchmarks.settings import Setting
from bnnlib.errors import BnnlibError, check_name
from bnnlib.kernels.compiled import VARIABLE
from bnnlib.process import keep_freed_memory

CONTENDERS = {
    **on_each_set("bnnlib", Bnnlib),
    "bnnlib, no kernels": forced(Bnnlib, "off"),
    "float twin": FloatTwin,
    "float twin, tuned": TunedFloatTwin,
    "float twin, bfloat16": HalfFloatTwin,
    "naive BNN": NaiveBnn,
    "Brevitas": Brevitas,
    "Larq": Larq,
}
LIMIT, RATES, REFERENCE = "limit", "rates", "reference"
SUBJECTS = {**CONTENDERS, **ENGINES, LIMIT: Limits, RATES: Rates, REFERENCE: Reference}
TEST_IMAGES = 500
REPOSITORY = Path(__file__).parents[1]


class WorkerDied(BnnlibError, RuntimeError):
    """A worker ended before it was asked to; the message names its contender."""


class Worker:
    """A process of its own for one contender, or for the machine's limit.

    It is in a process group of its own, so Ctrl-C reaches the benchmark alone, which then ends it.
    """

    def __init__(self, name: str, setting: Setting, environment: Mapping[str, str] | None = None):
        """`environment`: variables in addition to those of this process."""
        check_name("contender", name, SUBJECTS)
        kernels = SUBJECTS[name].kernels
        own = {VARIABLE: kernels} if kernels else {}
        self.name, self.errors = name, TemporaryFile()  # noqa: SIM115 - `close` closes it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", name, json.dumps(asdict(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | own | (environment or {}),
            start_new_session=True,
        )

    def about(self) -> dict[str, Any]:
        """Wait until it has been built: its memory after imports, and versions.

        Or only the reason why it could not be, as "missing". To be called first, and once.
        """
        return self._answer()

    def ask(self, what: str) -> Any:
        """Have it do one of `Subject`'s acts, and wait; raises WorkerDied."""
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._death() from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise self._death()
        return json.loads(line)

    def _death(self) -> WorkerDied:
        status = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        return WorkerDied(f"{self.name}: its process ended with status {status}: {last}")


@dataclass
class Crew:
    """Workers at the same setting, and what each said when it was built."""

    workers: dict[str, Worker] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def working(names: Iterable[str], setting: Setting) -> Iterator[Crew]:
    """Inside the `with` block every contender that is installed is built, and idle."""
    crew = Crew()
    try:
        for name in names:
            crew.workers[name] = Worker(name, setting)
        crew.about = {name: worker.about() for name, worker in crew.workers.items()}
        for name, about in crew.about.items():
            if "missing" in about:
                crew.workers.pop(name).close()
        yield crew
    finally:
        for worker in crew.workers.values():
            worker.close()


# ---------------------------------------------------------------------------- the other end


class Subject:
    """What a worker can be asked for."""

    def __init__(self, name: str, setting: Setting):
        self.subject = SUBJECTS[name](setting)
        self.device = torch.device(setting.device)

    def epoch(self) -> float:
        """Train for an epoch, or evaluate; the seconds it took."""
        self.subject.warm_up()
        start = time.perf_counter()
        self.subject.epoch()
        self._wait()
        return time.perf_counter() - start

    def measure(self) -> Any:
        """Measure the machine's limit."""
        return self.subject.measure()

    def evaluate(self) -> float:
        """The error on test images."""
        return self.subject.evaluate(TEST_IMAGES)

    def scores(self) -> Any:
        """What an engine makes of its images."""
        return self.subject.scores()

    def memory(self) -> int:
        """The most memory that was taken so far, in bytes; on a GPU, by PyTorch's tensors."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_memory()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux's `ru_maxrss` begins with what the parent held when it started this process, so the
    peak of the process alone is read from /proc where there is one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _serve(name: str, setting: Setting) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    about = prepare(name, setting)
    if "missing" not in about:
        subject = Subject(name, setting)
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        print(json.dumps(getattr(subject, line.strip())()), file=answers)


def prepare(name: str, setting: Setting) -> dict[str, Any]:
    """Import a contender's libraries: their versions, and the memory taken; or what is missing."""
    kind = SUBJECTS[name]
    if torch.device(setting.device).type not in kind.devices:
        return {"missing": f"it is compared on {' and '.join(kind.devices)} only"}
    if reason := kind.missing():
        return {"missing": reason}
    torch.set_num_threads(setting.threads)
    keep_freed_memory()  # as `bnnlib.experiments.run` does; here for every contender
    try:
        for library in kind.requires:
            import_module(library)
    except ImportError:
        return {"missing": f"{library} cannot be imported"}
    on_gpu = torch.device(setting.device).type == "cuda"  # whose memory imports leave alone
    memory = 0 if on_gpu else psutil.Process().memory_info().rss
    return {"imports_bytes": memory, "versions": versions(kind.requires)}


if __name__ == "__main__":
    _serve(sys.argv[1], Setting(**json.loads(sys.argv[2])))
