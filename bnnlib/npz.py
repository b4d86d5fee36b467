"""One split of a `.npz` file of the user's; every array is checked before it is used.

In: a path and a split. Out: images, labels and class names. Next file: `data.py`.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bnnlib.errors import DataNotFound, InvalidValue, nearest, unknown_name
from bnnlib.files import check_is_file, read_npz

MAX_CLASSES = 1000  # a network has an output for each, so one stray label must not make 10^9

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
