"""Files that are written whole or not at all, and read without being trusted.

JSON and tables (CSV); nothing is pickled. A folder can be locked.
"""

import csv
import errno
import hashlib
import io
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan, nan
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from bnnlib.errors import CannotWrite, DamagedFile, FolderInUse, InvalidValue, shown

LOCK = ".lock"
TEMPORARY = ".part"  # ending of a file that is not whole yet
MAX_TEXT = 64 * 2**20  # bytes of JSON or CSV; ours are kilobytes, long histories megabytes

Row = dict[str, float]

# ----------------------------------------------------------------------------------- writing


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside the `with` block the system's errors become CannotWrite."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error


def atomic_write(path: str | Path, content: bytes) -> None:
    """Write a file so that at any moment, a power cut included, it is the old one or the new one.

    Raises CannotWrite where the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    part = path.with_name(path.name + TEMPORARY)
    with writing(path):
        part.unlink(missing_ok=True)  # never write through a link that lies in its place
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Wait until a folder's list of names is on the disk."""
    if os.name != "posix":
        return  # only POSIX can open a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise  # else a disk, often one in a network, that flushes no folders
    finally:
        os.close(handle)


def as_folder(name: str, value: str | Path) -> Path:
    """The path of a folder, "~" replaced; raises InvalidValue for what cannot be one."""
    if not isinstance(value, str | Path) or value == "" or "\0" in str(value):  # "" would be "."
        raise InvalidValue(f"{name} must be the path of a folder, got {shown(value)}")
    return Path(value).expanduser()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing; raises CannotWrite."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the `with` block no other process has this folder, which is made where it is missing.

    The lock dies with its holder. Raises FolderInUse at once where another process holds it.
    """
    make_folder(folder)
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(
            f"another process is writing to {folder}; wait for it, or stop it"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotWrite(f"{folder / LOCK} cannot be locked: {reason}") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a living process has a folder; looked at by taking its lock for a moment."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return True
    lock.release()
    return False


# ------------------------------------------------------------------------ text, JSON and TOML


@contextmanager
def reading(path: str | Path) -> Iterator[BinaryIO]:
    """The open file inside the `with` block, where the system's errors become DamagedFile."""
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; raises DamagedFile where it cannot be read."""
    with reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path) -> str:
    """A UTF-8 file of at most `MAX_TEXT` bytes; raises DamagedFile for another."""
    with reading(path) as file:  # memory for as much as there is, not for as much as may be
        content = file.read(min(os.fstat(file.fileno()).st_size, MAX_TEXT) + 1)
    if len(content) > MAX_TEXT:
        raise DamagedFile(f"{path} is longer than {MAX_TEXT:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is not text in UTF-8: {error.reason}") from error


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False)
    atomic_write(path, f"{text}\n".encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; raises DamagedFile for anything else."""
    return parse_json(read_text(path), path)


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file says, which somebody wrote by hand; raises InvalidValue for no TOML."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InvalidValue(f"{path} is not TOML: {error}") from error


def parse_json(text: str, source: object) -> dict[str, Any]:
    """The object that a JSON text describes; `source` names the text in errors.

    Raises DamagedFile for anything else, also for NaN and infinity, which JSON lacks.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{source} is not JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{source} holds no JSON object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


# ----------------------------------------------------------------------------------- tables


def write_table(path: str | Path, rows: Iterable[Row], columns: list[str], exact: bool) -> None:
    """Write a CSV file with a header, whole or not at all; what a row lacks stays empty.

    Numbers have nine digits, or all of them if `exact`; whole numbers always have all.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows({k: _cell(v, exact) for k, v in row.items()} for row in rows)
    atomic_write(path, text.getvalue().encode())


def _cell(value: float, exact: bool) -> str:
    if isinstance(value, Integral):
        return str(int(value))
    if isnan(value):
        return ""
    return repr(float(value)) if exact else f"{value:.9g}"


def parse_table(text: str, source: object) -> list[Row]:
    """The rows of a CSV text of numbers with a header; empty cells are NaN.

    `source` names the text in errors. Raises DamagedFile where a row is longer or shorter than the
    header, or no row of numbers.
    """
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        check_columns(header)
        return [dict(zip(header, map(_number, cells), strict=True)) for cells in lines]
    except (csv.Error, ValueError) as error:
        where = f"{source}, line {lines.line_num}"
        raise DamagedFile(f"{where}: this is no table of numbers: {shown(str(error))}") from error


def parse_columns(text: str, source: object, names: Iterable[str]) -> dict[str, list[float]]:
    """Some columns of `parse_table`, NaN where there is none; the other cells are only counted.

    For three columns of a history that takes a tenth of the time.
    """
    if '"' in text:  # a comma may be part of a name
        rows = parse_table(text, source)
        return {name: [row.get(name, nan) for row in rows] for name in names}
    first, *lines = text.splitlines() or [""]
    header = first.split(",") if first else []
    at = {name: header.index(name) for name in names if name in header}
    most = max(at.values(), default=0) + 1
    try:
        check_columns(header)
        if any(line.count(",") + 1 != len(header) for line in lines):
            raise ValueError("a row is longer or shorter than the header")
        cells = [line.split(",", most) for line in lines]
        columns = {name: [_number(row[i]) for row in cells] for name, i in at.items()}
    except ValueError as error:
        raise DamagedFile(f"{source} is no table of numbers: {shown(str(error))}") from error
    return {name: columns.get(name, [nan] * len(lines)) for name in names}


def check_columns(names: list[str]) -> None:
    """Raise ValueError unless these are different names, short and safe to show."""
    for name in names:
        if not (isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable()):
            raise ValueError(f"a column has the name {shown(name)}")
    if len(set(names)) < len(names):
        raise ValueError("two columns have one name")


def _number(cell: str) -> float:
    """A float, or an int where that would be another number, such as a large seed."""
    if not cell:
        return nan
    number = float(cell)
    return int(cell) if abs(number) >= 2**53 and cell.isdecimal() else number


def check_is_file(path: Path) -> None:
    """Raise DamagedFile where `path` is a folder, a pipe, a device or a link to nothing."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise DamagedFile(
            f"{path} is a folder, a device or a broken link, not a file; move it away"
        )
