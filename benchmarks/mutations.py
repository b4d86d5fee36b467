"""Damaged files of a run, and what reading them does.

In: the folder of a run, and what one of its files is to hold instead. Out: whether it was refused
or harmless; anything else is an error.
"""

import os
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from unittest.mock import patch

from bnnlib.errors import BnnlibError, BnnlibWarning
from bnnlib.experiments.variants import CAPACITY
from bnnlib.files import sha256
from bnnlib.optim import BinaryAdam
from bnnlib.runs.checkpoint import NAME
from bnnlib.runs.folder import load_run
from bnnlib.runs.ledger import read_row
from bnnlib.runs.run import run

LONGEST_MESSAGE = 2500  # characters

# --------------------------------------------------------------------------------- mutations


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of `content`, the same ones for the same seed; none equals it."""
    rng = random.Random(seed)
    while count:
        damaged = content
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            damaged = rng.choice(DAMAGES)(damaged, rng)
        if damaged != content:
            count -= 1
            yield damaged


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(content) + 1)
    flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in content[i : i + 1])
    return content[:i] + flipped + content[i + 1 :]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def delete(content: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(content) + 1)
    return content[:i] + content[i + rng.choice((1, 4, 30)) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(content) + 1)
    return content[:i] + rng.randbytes(rng.choice((1, 4, 30))) + content[i:]


def duplicate(content: bytes, rng: random.Random) -> bytes:
    i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:j] + content[i:j] + content[j:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    """A few bytes become 0xFF or zeros, or digits, which make numbers in a text absurd."""
    i, width = rng.randrange(len(content) + 1), rng.choice((1, 2, 4, 8))
    return content[:i] + rng.choice((b"\xff", b"\0", b"9")) * width + content[i + width :]


DAMAGES = (flip_bit, cut, delete, insert, duplicate, overwrite)


# --------------------------------------------------------------------------------- watching


class Harm(AssertionError):
    """A file did something that no file may do."""


class Watch:
    """Inside its `with` blocks nothing may be changed outside a folder, and nothing executed.

    Raises Harm at the end of a block in which it was. Python keeps an audit hook for good, so
    one watch should serve for many blocks.
    Events: https://docs.python.org/3/library/audit_events.html
    """

    CHANGES = ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.rename", "os.link")
    CHANGES += ("os.symlink", "os.truncate")
    NEVER = ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect")

    def __init__(self, folder: Path):
        self.folder, self.harm, self.on = folder.resolve(), [], False
        sys.addaudithook(self._look)

    def __enter__(self) -> "Watch":
        self.harm, self.on = [], True
        return self

    def __exit__(self, *error: object) -> None:
        self.on = False
        if self.harm:
            raise Harm("; ".join(self.harm[:5]))

    def _look(self, event: str, arguments: tuple) -> None:
        if self.on and self._is_harm(event, arguments):
            self.harm.append(f"{event} {arguments}")

    def _is_harm(self, event: str, arguments: tuple) -> bool:
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            return bool(writes) and self._outside(path)
        if event in self.CHANGES:
            return any(map(self._outside, arguments))
        return event in self.NEVER

    def _outside(self, path: object) -> bool:
        """Whether this is a path outside the folder; a link is where it lies."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        path = Path(os.fsdecode(path))
        return not (path.parent.resolve() / path.name).is_relative_to(self.folder)


# ---------------------------------------------------------------------------------- outcomes

# A run of milliseconds; its state has probes, too.
EXPERIMENT = replace(
    CAPACITY, width=0.125, n_train=60, n_test=50, epochs=3, batch_size=20, probes=("flips",)
)


def make_specimens(root: Path) -> list[Path]:
    """A finished run, and one that was stopped in its second epoch, with one checkpoint."""
    finished, unfinished = root / "finished", root / "unfinished"
    run(EXPERIMENT, finished, device="cpu", progress="none")
    step, calls = BinaryAdam.step, iter(range(5))

    def stopping(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*args)

    with patch.object(BinaryAdam, "step", stopping), suppress(KeyboardInterrupt):
        run(EXPERIMENT, unfinished, device="cpu", progress="none", checkpoint_every=0)
    older, _ = sorted(unfinished.glob("checkpoints/*"))
    older.unlink()
    return [finished, unfinished]


def count_all_outcomes(root: Path, count: int, seed: int) -> dict[str, Counter[str]]:
    """`count_outcomes` of so many mutations of each file of both specimens, made in `root`."""
    outcomes = {}
    for folder in make_specimens(root):
        for path in sorted(folder.rglob("?*.*")):  # not ".lock"
            name = str(path.relative_to(folder))
            contents = mutations(path.read_bytes(), count, seed)
            outcomes[f"{folder.name}/{name}"] = count_outcomes(folder, name, contents, root)
    return outcomes


def count_outcomes(
    folder: Path, name: str, contents: Iterable[bytes], workshop: Path
) -> Counter[str]:
    """How many of the `contents` were "refused" and how many "harmless" as file `name` of a run.

    `workshop` is a folder for the copies. Raises what got past the checks, Harm
    included, with the content in a note.
    """
    whole = (folder / name).read_bytes()
    if outcome(folder, name, whole, workshop) != "harmless":
        raise ValueError(f"{folder} is no valid run before its {name} is damaged")
    watch, counts = Watch(workshop / "run"), Counter()
    for content in contents:
        try:
            counts[outcome(folder, name, content, workshop, watch)] += 1
        except Exception as error:
            error.add_note(f"{name} held {len(content)} bytes: {content[:2000]!r}")
            raise
    return counts


def outcome(
    folder: Path,
    name: str,
    content: bytes,
    workshop: Path,
    watch: Watch | None = None,
) -> str:
    """Read a copy of a run with `content` in its file `name`: "refused" or "harmless".

    A checkpoint gets the hash of its new content into its name. An unfinished run is continued.
    """
    copy = workshop / "run"
    shutil.copytree(folder, copy)
    try:
        (copy / name).write_bytes(content)
        if NAME.fullmatch((copy / name).name):
            name_by_content(copy / name)
        with watch or nullcontext():
            refused = [_refuses(read, copy) for read in (_load, _continue)]
    finally:
        shutil.rmtree(copy)
    return "refused" if any(refused) else "harmless"


def name_by_content(checkpoint: Path) -> Path:
    """Give a checkpoint the name that says that its content is whole."""
    steps, digest = NAME.fullmatch(checkpoint.name)[1], sha256(checkpoint)[:16]
    return checkpoint.rename(checkpoint.with_name(f"checkpoint-{steps}-{digest}.safetensors"))


def _load(folder: Path) -> None:
    load_run(folder)
    read_row(folder)


def _continue(folder: Path) -> None:
    run(EXPERIMENT, folder, device="cpu", progress="none", checkpoint_every=inf)


def _refuses(read: Callable[[Path], None], folder: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", BnnlibWarning)
        try:
            read(folder)
        except BnnlibError as error:
            if not str(error).isprintable() or not 0 < len(str(error)) <= LONGEST_MESSAGE:
                raise Harm(f"an error is not one line of ordinary length: {error}") from error
            return True
    return False
