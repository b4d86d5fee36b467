"""Files that are written whole or not at all, and read without being trusted.

In: a path. Out: JSON, arrays and tensors whose form was checked before anything was built from
them; nothing is ever unpickled. Next file: `drawing.py`.
"""

import hashlib
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from math import isfinite, prod
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bnnlib.errors import (
    BnnlibError,
    CannotWrite,
    DamagedFile,
    FolderInUse,
    InvalidValue,
    TooLarge,
    shown,
)

LOCK = ".lock"
MAX_TEXT = 64 * 2**20  # bytes of JSON or CSV; ours are kilobytes, long histories megabytes
MAX_VALUES = 6_000_000  # in it; each takes far more memory than its text, up to 240 bytes
MAX_ARRAYS = 100  # in a `.npz` file; data sets have a handful
SHOWN = 20  # differences in one message

# The types that we write, as safetensors names them.
_TYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
# What NumPy and zipfile raise for files that are not what they should be.
_BAD_ARRAYS = (ValueError, LookupError, OverflowError, TypeError, SyntaxError, TokenError)
_BAD_ARCHIVES = (BadZipFile, zlib.error, struct.error, EOFError, RuntimeError)


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
            _flush(part)
            if not os.path.samestat(os.fstat(held.fileno()), part.stat()):
                raise FileExistsError("another process writes it too")
        part.replace(path)
        _flush(path.parent)
    except BnnlibError:
        raise  # some of ours are an OSError too
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(part)


def _flush(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
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


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors by name, and texts beside them, as a safetensors file; returns its SHA-256.

    The library's own `save_file` maps the file into memory: where the disk is full the
    process dies of it (SIGBUS), and a killed save leaves its copy behind. So the bytes,
    https://github.com/huggingface/safetensors#format, are written here in plain order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        kind = _NAMES[t.dtype]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, start = hashlib.sha256(), (len(text).to_bytes(8, "little"), text)
    with whole_or_absent(path) as part, part.open("wb") as file:
        for block in chain(start, map(_bytes_of, tensors.values())):  # one tensor at a time
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The values of a tensor in row-major order, as bytes."""
    return tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8)


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


Form = tuple[tuple[int, ...], torch.dtype]  # what a tensor must be: shape and type


def forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """Shape and type of each tensor."""
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def read_tensors(path: str | Path, expected: Mapping[str, Form]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be exactly the `expected` ones.

    Names, shapes and types are compared with the file's header before any tensor is read.
    Raises DamagedFile with all differences.
    """
    with _opened(path) as file:
        _check_header(path, file, expected)
        # A copy, because what the library returns is a view of the file.
        return {name: file.get_tensor(name).clone() for name in expected}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in a safetensors file's header."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A safetensors file, whose header the library has checked: it describes exactly the rest."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = shown(getattr(error, "strerror", None) or str(error))
        raise DamagedFile(f"{path} is not a whole safetensors file: {reason}") from error


def _check_header(path: str | Path, file: Any, expected: Mapping[str, Form]) -> None:
    names = set(file.keys())
    found = {name: _form_in(file, name) for name in expected if name in names}
    wrong = [f"no {name}" for name in expected if name not in names]
    wrong += [f"unknown {shown(name)}" for name in sorted(names - set(expected))]
    wrong += [
        f"{name} is {_form_in_words(found[name])}, not {_form_in_words(form)}"
        for name, form in expected.items()
        if name in found and found[name] != form
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DamagedFile(
            f"{path} does not hold the tensors it should: {'; '.join(wrong[:SHOWN])}{more}"
        )


def _form_in(file: Any, name: str) -> Form:
    part = file.get_slice(name)
    return tuple(part.get_shape()), _TYPES.get(part.get_dtype(), part.get_dtype())


def _form_in_words(form: Form) -> str:
    shape, dtype = form
    return f"{str(dtype).removeprefix('torch.')} {shown(shape)}"


def check_is_file(path: Path) -> None:
    """Raise DamagedFile where `path` is a folder, a pipe, a device or a link to nothing."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise DamagedFile(
            f"{path} is a folder, a device or a broken link, not a file; move it away"
        )


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file, by name. Nothing in it is unpickled.

    Every header is compared with the size of its data before memory is taken. Raises
    DamagedFile for other files and for arrays that are neither numbers nor text, TooLarge for
    what does not fit into memory.
    """
    try:
        with ZipFile(path) as archive:
            members = _checked_members(archive)
            return {name: _array(archive, member) for name, member in members.items()}
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror or error}") from error
    except (*_BAD_ARRAYS, *_BAD_ARCHIVES) as error:
        raise DamagedFile(
            f"{path} is not a whole .npz file of arrays: {_in_short(error)}; "
            "write it again with numpy.savez"
        ) from error
    except MemoryError as error:
        raise TooLarge(f"{path} does not fit into memory: {_in_short(error)}") from error


def _checked_members(archive: ZipFile) -> dict[str, ZipInfo]:
    members = archive.infolist()
    if len(members) > MAX_ARRAYS:
        raise ValueError(f"it holds {len(members)} arrays, at most {MAX_ARRAYS} are allowed")
    if len(members) != _stated_count(archive):
        raise ValueError("its directory is damaged")
    total, free = sum(m.file_size for m in members), psutil.virtual_memory().available
    if total > free:
        raise MemoryError(f"it unpacks to {in_words(total)}, {in_words(free)} are free")
    named = {member.filename.removesuffix(".npy"): member for member in members}
    if len(named) < len(members):
        raise ValueError("two arrays have the same name")
    for name, member in named.items():
        if not name.isprintable() or len(name) > 100:
            raise ValueError(f"an array has the name {name[:100]!r}")
        _check_member(archive, member)
    return named


def _stated_count(archive: ZipFile) -> int:
    """How many files a ZIP says at its end that it holds; `zipfile` may find fewer, silently."""
    archive.fp.seek(-22 - len(archive.comment), os.SEEK_END)
    return struct.unpack_from("<H", archive.fp.read(), 10)[0]


def _check_member(archive: ZipFile, member: ZipInfo) -> None:
    """Raise ValueError unless a member is one array of numbers or text that fills it exactly."""
    name = repr(member.filename)
    if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in a way that NumPy does not write")
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"{name} has the unknown version {version}")
        shape, _, dtype = readers[version](file)
        if dtype.kind not in "biufcUS" or dtype.itemsize == 0:
            raise ValueError(f"{name} holds {dtype}, only numbers and text are read")
        size = file.tell() + prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != member.file_size:
            raise ValueError(f"{name} has not the size that it says: {shape} of {dtype}")


def _array(archive: ZipFile, member: ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _in_short(error: Exception) -> str:
    """The start of an error's first line, fit for a terminal; its type where it has no text."""
    line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "".join(letter if letter.isprintable() else "?" for letter in line)
