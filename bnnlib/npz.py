"""The arrays of a `.npz` file, each checked before it is used; nothing is unpickled.

In: a path, and a split of a data set. Out: arrays; images, labels and class names.
Next file: `data.py`.
"""

import os
import struct
import sys
import zlib
from collections.abc import Iterable
from math import prod
from pathlib import Path
from tokenize import TokenError
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import psutil

from bnnlib.errors import (
    DamagedFile,
    DataNotFound,
    InvalidValue,
    TooLarge,
    nearest,
    unknown_name,
)
from bnnlib.files import check_is_file, in_words

MAX_ARRAYS = 100  # in a `.npz` file; data sets have a handful
MAX_CLASSES = 1000  # a network has an output for each, so one stray label must not make 10^9

# What NumPy and zipfile raise for files that are not what they should be.
_BAD_ARRAYS = (ValueError, LookupError, OverflowError, TypeError, SyntaxError, TokenError)
_BAD_ARCHIVES = (BadZipFile, zlib.error, struct.error, EOFError, RuntimeError)

Arrays = dict[str, np.ndarray]


def read_split(path: str | Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images (N, 3, H, W) uint8, labels (N,) int64 and class names of one split of a file.

    `data.load_npz` says which arrays the file holds. All of its splits are checked, so that all
    have the same classes. Without `class_names` the classes are numbered: ten, or more where a
    label needs it. Raises DataNotFound, DamagedFile, TooLarge, and InvalidValue where an array
    is missing or does not fit.
    """
    path = Path(path).absolute()
    check_is_file(path)
    if not os.path.isfile(path):
        raise DataNotFound(
            f"no file {path}; a relative path is looked for in the current folder, then in the "
            "data folder (--data, BNNLIB_DATA)"
        )
    arrays = read_npz(path)
    try:
        names = _checked(arrays)
        images, labels = _rows_of(arrays, split)
    except InvalidValue as error:
        raise InvalidValue(f"{path}: {error}") from error
    return np.ascontiguousarray(images), labels.astype(np.int64), names


# ------------------------------------------------------------------------------------ splits


def _pairs(arrays: Arrays) -> dict[str, tuple[str, str]]:
    """The names of the images and labels of each split; arrays without a partner are left out."""
    pairs = {}
    for images in arrays:
        labels = images.removesuffix("images") + "labels"
        if labels not in arrays or not (images == "images" or images.endswith("_images")):
            continue
        split = images.removesuffix("images").removesuffix("_") or "train"
        if split in pairs:
            raise InvalidValue(f"{pairs[split][0]} and {images} are both split {split!r}; keep one")
        pairs[split] = images, labels
    return pairs


def _rows_of(arrays: Arrays, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split, which must have some."""
    pairs = _pairs(arrays)
    by_heldout = "heldout" in arrays and "train" in pairs
    if by_heldout and "test" in pairs:
        raise InvalidValue(f"heldout and {pairs['test'][0]} are both split 'test'; keep one")
    splits = [*pairs, "test"] if by_heldout else list(pairs)
    if split not in splits:
        raise _no_split(arrays, split, splits)
    if by_heldout and split in ("train", "test"):
        images, labels = (arrays[name] for name in pairs["train"])
        rows = arrays["heldout"] == (split == "test")
        images, labels = images[rows], labels[rows]
    else:
        images, labels = (arrays[name] for name in pairs[split])
    if len(labels) == 0:
        raise InvalidValue(f"split {split!r} holds no images")
    return images, labels


def _no_split(arrays: Arrays, split: str, splits: list[str]) -> InvalidValue:
    for prefix in ("", "train_") if split == "train" else (f"{split}_",):
        names = {prefix + "images", prefix + "labels"}
        if there := names & set(arrays):
            (present,), (absent,) = there, names - there
            hint = nearest(absent, [name for name in arrays if name != present])
            return InvalidValue(f"{present} is there, {absent} is not; {hint}{_held(arrays)}")
    if splits:
        return unknown_name("split", split, splits)
    return InvalidValue(f"no 'images' with 'labels', with or without a prefix; {_held(arrays)}")


def _held(arrays: Iterable[str]) -> str:
    names = sorted(arrays)
    return f"(arrays: {', '.join(names[:8]) or 'none'}{', ...' if len(names) > 8 else ''})"


# ------------------------------------------------------------------------------------ checks


def _checked(arrays: Arrays) -> tuple[str, ...]:
    """Check the arrays of every split, and `heldout`; return the class names."""
    pairs = _pairs(arrays)
    names = _class_names(arrays["class_names"]) if "class_names" in arrays else ()
    for images, labels in pairs.values():
        _check_images(images, arrays[images])
        _check_labels(labels, arrays[labels], len(arrays[images]), len(names))
    sizes = {arrays[images].shape[2:] for images, _ in pairs.values()}
    if len(sizes) > 1:
        raise InvalidValue(f"the splits have images of different sizes: {sorted(sizes)}")
    if "heldout" in arrays and "train" in pairs:
        _check_heldout(arrays["heldout"], len(arrays[pairs["train"][0]]))
    highest = max((int(arrays[labels].max(initial=0)) for _, labels in pairs.values()), default=0)
    return names or tuple(str(label) for label in range(max(10, highest + 1)))


def _check_images(name: str, images: np.ndarray) -> None:
    shape = images.shape
    if len(shape) != 4 or shape[1] != 3 or 0 in shape[2:]:
        turned = len(shape) == 4 and shape[3] == 3
        hint = f"; use {name}.transpose(0, 3, 1, 2)" if turned else ""
        raise InvalidValue(f"{name} must have shape (N, 3, H, W), got {shape}{hint}")
    if images.dtype != np.uint8:
        raise InvalidValue(f"{name} must be uint8, pixels from 0 to 255, got {images.dtype}")


def _check_labels(name: str, labels: np.ndarray, count: int, classes: int) -> None:
    if labels.dtype.kind not in "iu":
        nan = ", with NaN" if labels.dtype.kind in "fc" and np.isnan(labels).any() else ""
        raise InvalidValue(f"{name} must be integers, got {labels.dtype}{nan}")
    if labels.shape != (count,):
        raise InvalidValue(
            f"{name} must have shape ({count},), one for each image, got {labels.shape}"
        )
    limit, why = (classes, " (class_names)") if classes else (MAX_CLASSES, "")
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        row = wrong[0]
        raise InvalidValue(f"{name} must be in 0..{limit - 1}{why}, got {labels[row]} in row {row}")


def _check_heldout(heldout: np.ndarray, count: int) -> None:
    if heldout.shape != (count,) or heldout.dtype.kind not in "biuf":
        raise InvalidValue(
            f"heldout must be a 0 or 1 for each of the {count} images, "
            f"got {heldout.dtype} {heldout.shape}"
        )
    wrong = np.flatnonzero(~np.isin(heldout, (0, 1)))
    if len(wrong):
        raise InvalidValue(f"heldout must be 0 or 1, got {heldout[wrong[0]]} in row {wrong[0]}")


def _class_names(array: np.ndarray) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind != "U" or not 0 < len(array) <= MAX_CLASSES:
        raise InvalidValue(
            f"class_names must be 1 to {MAX_CLASSES} texts in a row, "
            f"got {array.dtype} {array.shape}"
        )
    letters = array.view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
    if letters.max(initial=0) > sys.maxunicode:  # NumPy takes any 32 bits, Python does not
        raise InvalidValue("class_names must be text, got what is no Unicode")
    names = tuple(array.tolist())
    for i, name in enumerate(names):
        if not name or not name.isprintable():  # a terminal obeys some of the others
            raise InvalidValue(f"class_names must be printable, got {name[:50]!r} for class {i}")
        if name in names[:i]:
            raise InvalidValue(f"class_names must differ, got {name[:50]!r} twice")
    return names


# ---------------------------------------------------------------------------------- the archive


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
