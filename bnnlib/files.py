"""Files that are written whole or not at all, and read without being trusted.

In: a path. Out: JSON and text of bounded length, a folder that is locked, a file that is whole.
Next file: `tensors.py`.
"""

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from bnnlib.errors import (
    BnnlibError,
    CannotWrite,
    DamagedFile,
    FolderInUse,
    InvalidValue,
    shown,
)

LOCK = ".lock"
MAX_TEXT = 64 * 2**20  # bytes of JSON or CSV; ours are kilobytes, long histories megabytes
MAX_VALUES = 8_000_000  # in it; each takes far more memory than its text, up to 240 bytes

# ----------------------------------------------------------------------------------- writing


@contextmanager
def whole_or_absent(path: str | Path) -> Iterator[Path]:
    """A path to write to; renamed to `path`, flushed to disk, when the block has ended well.

    At any moment, a power cut included, `path` is the old file or the whole new one. Raises
    CannotWrite where the disk is full, the folder cannot be written to, or another process
    writes the same file.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)  # never write through a link that lies in its place
        with part.open("xb") as held:
            yield part
            flush(part)
            if not os.path.samestat(os.fstat(held.fileno()), part.stat()):
                raise FileExistsError("another process writes it too")
        part.replace(path)
        flush(path.parent)
    except BnnlibError:
        raise  # some of ours are an OSError too
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(part)


def flush(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise  # else a disk, often one in a network, that flushes no folders
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # it is incomplete and never read; the first error is the one to report


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with whole_or_absent(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"{folder} cannot be made: {error.strerror}") from error
    except ValueError as error:
        raise InvalidValue(f"{str(folder)!r} is no name for a folder: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the `with` block no other process has this folder; the lock dies with its holder.

    Raises FolderInUse at once where another process holds it.
    """
    path = folder / LOCK
    if path.is_symlink():
        raise DamagedFile(f"{path} is a link, which bnnlib never makes; remove it")
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(
            f"another process is writing to {folder}; wait for it, or stop it"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotWrite(f"{path} cannot be locked: {reason}") from error
    try:
        yield
    finally:
        lock.release()


def check_free_disk(folder: Path, needed: int) -> None:
    """Raise CannotWrite where the disk of an existing `folder` has fewer than `needed` bytes."""
    free = psutil.disk_usage(str(folder)).free
    if free < needed:
        raise CannotWrite(
            f"{folder} needs about {in_words(needed)} of disk, {in_words(free)} are free; "
            "free some, or choose a folder on another disk"
        )


def in_words(size: int) -> str:
    """A number of bytes for people: `in_words(1_500_000)` is '1.5 MB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


# ----------------------------------------------------------------------------------- reading


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str, source: object) -> dict[str, Any]:
    """The object that a JSON text describes; `source` names the text in errors.

    Raises DamagedFile for anything else, also for NaN and infinity, which JSON lacks, a name
    that occurs twice, and more values than `check_length` allows.
    """
    check_length(text, source)
    try:
        content = json.loads(
            text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique
        )
    except RecursionError as error:
        raise DamagedFile(f"{source} is not JSON that can be read: nested too deep") from error
    except ValueError as error:
        raise DamagedFile(f"{source} is not JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{source} holds no JSON object")
    return content


def _finite(number: str) -> float:
    if isfinite(value := float(number)):
        return value
    raise ValueError(f"it holds {shown(number)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)} occurs twice in one object")
    return names


def check_length(text: str, source: object) -> None:
    """Raise DamagedFile where a JSON or CSV text holds more than is reasonable to read."""
    if len(text) > MAX_TEXT:
        raise DamagedFile(f"{source} is longer than {in_words(MAX_TEXT)}")
    if sum(map(text.count, "[{,\n")) > MAX_VALUES:
        raise DamagedFile(f"{source} holds more than {MAX_VALUES:,} values")


def read_text(path: str | Path) -> str:
    """A UTF-8 file of at most `MAX_TEXT` bytes; raises DamagedFile for another."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT + 1)
        if len(content) > MAX_TEXT:
            raise DamagedFile(f"{path} is longer than {in_words(MAX_TEXT)}")
        return content.decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is not text in UTF-8: {error.reason}") from error
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; raises DamagedFile for anything else."""
    return parse_json(read_text(path), path)


def check_is_file(path: Path) -> None:
    """Raise DamagedFile where `path` is a folder, a pipe, a device or a link to nothing."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise DamagedFile(
            f"{path} is a folder, a device or a broken link, not a file; move it away"
        )
