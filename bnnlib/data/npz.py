"""The arrays of a `.npz` file, validated before they are used; nothing is unpickled."""

import os
from pathlib import Path

import numpy as np

from bnnlib.errors import DamagedFile, DataNotFound, InvalidValue, nearest, shown
from bnnlib.files import check_is_file
from bnnlib.names import SVHN_SUBSET

MAX_CLASSES = 1000  # a network has an output for each, so one stray label must not make 10^9
Arrays = dict[str, np.ndarray]


def find_npz(path: str | Path, folder: Path) -> Path:
    """The absolute path of a file that lies here or in `folder`, the one of the data sets.

    Raises DataNotFound.
    """
    path = Path(path).expanduser()
    path = (path if os.path.lexists(path) else folder / path).absolute()
    if not os.path.lexists(path):
        remedy = "a relative path is looked for here, then in the data folder (--data, BNNLIB_DATA)"
        if path.name == SVHN_SUBSET:
            remedy = "`python -m bnnlib svhn-subset` makes it (with --download from nothing)"
        raise DataNotFound(f"no file {path}; {remedy}")
    return path


def read_npz(path: str | Path) -> Arrays:
    """The arrays of a `.npz` file by name, only numbers and text; raises DamagedFile for others."""
    try:
        # Opened here, because NumPy leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        for name, array in arrays.items():
            if array.dtype.kind not in "biufcUS" or not name.isprintable() or len(name) > 100:
                raise ValueError(f"{name[:100]!r} of {array.dtype} is neither numbers nor text")
            if array.dtype.kind == "U":
                array.tolist()  # raises for what is no Unicode
        return arrays
    except Exception as error:  # what a parser raises for damage is not a closed list
        reason = f"{shown(error)}; write it again with numpy.savez"
        raise DamagedFile(f"{path} is not a whole .npz file: {reason}") from error


def read_split(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images (N, 3 or 1, H, W) uint8, labels (N,) int64 and class names of one split of a file.

    `images.load_npz` says which arrays the file holds. All splits are validated, so that all have
    the same classes: without `class_names` ten, or more where a label needs it.
    """
    check_is_file(path)
    arrays = read_npz(path)
    try:
        names = _class_names(arrays["class_names"]) if "class_names" in arrays else ()
        splits = _splits(arrays, len(names))
        if split not in splits:
            pair = f"{split}_images and {split}_labels (the split 'train': or images and labels)"
            held = ", ".join(sorted(arrays)[:8]) or "none"
            raise InvalidValue(f"no arrays {pair}; {nearest(split, splits)}(arrays: {held})")
        images, labels = splits[split]
        if len(labels) == 0:
            raise InvalidValue(f"split {split!r} holds no images")
    except InvalidValue as error:
        raise InvalidValue(f"{path}: {error}") from error
    highest = max(int(labels.max(initial=9)) for _, labels in splits.values())
    return images, labels, names or tuple(str(label) for label in range(highest + 1))


def _class_names(array: np.ndarray) -> tuple[str, ...]:
    allowed = f"class_names must be 1 to {MAX_CLASSES} printable texts that differ"
    if array.ndim != 1 or array.dtype.kind != "U" or not 0 < len(array) <= MAX_CLASSES:
        raise InvalidValue(f"{allowed}, got {array.dtype} {array.shape}")
    names = tuple(array.tolist())
    for i, name in enumerate(names):  # a terminal obeys what is not printable
        if not name or not name.isprintable() or name in names[:i]:
            raise InvalidValue(f"{allowed}, got {shown(name)} for class {i}")
    return names


def _splits(arrays: Arrays, classes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each split; arrays without a partner are left out."""
    splits = {}
    for name in arrays:
        split = "train" if name == "images" else name.removesuffix("_images")
        partner = name.removesuffix("images") + "labels"
        if split == name or partner not in arrays:
            continue
        if split in splits:
            raise InvalidValue("images and train_images are both split 'train'; keep one")
        _check_pair(arrays, name, partner, classes)
        splits[split] = np.ascontiguousarray(arrays[name]), arrays[partner].astype(np.int64)
    if len(sizes := {images.shape[1:] for images, _ in splits.values()}) > 1:
        raise InvalidValue(f"the splits have images of different sizes: {sorted(sizes)}")
    if "heldout" in arrays and "train" in splits:
        if "test" in splits:
            raise InvalidValue("heldout and test_images are both split 'test'; keep one")
        (images, labels), test = splits["train"], arrays["heldout"]
        if test.shape != labels.shape or not np.isin(test, (0, 1)).all():
            allowed, got = f"0 or 1 for each of {len(labels)} images", f"{shown(test)} {test.shape}"
            raise InvalidValue(f"heldout must be {allowed}, got {got}")
        splits["train"] = images[test == 0], labels[test == 0]
        splits["test"] = images[test == 1], labels[test == 1]
    return splits


def _check_pair(arrays: Arrays, name: str, partner: str, classes: int) -> None:
    images, labels, shape = arrays[name], arrays[partner], arrays[name].shape
    if len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape[2:] or images.dtype != np.uint8:
        kind = f"{images.dtype} {shape}{layout_hint(name, shape)}"
        raise InvalidValue(f"{name} must be uint8 of shape (N, 3 or 1, H, W), got {kind}")
    if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
        kind = f"{labels.dtype} {labels.shape}"
        raise InvalidValue(f"{partner} must be {shape[0]} integers, one for each image, got {kind}")
    top, why = (classes - 1, " (class_names)") if classes else (MAX_CLASSES - 1, "")
    for row in np.flatnonzero((labels < 0) | (labels > top))[:1]:
        raise InvalidValue(f"{partner} must be in 0..{top}{why}, got {labels[row]} in row {row}")


def layout_hint(name: str, shape: tuple[int, ...]) -> str:
    """How to bring images in another common layout into ours; '' for a shape that is none."""
    if shape[3:] in ((1,), (3,)):
        return f"; use {name}.transpose(0, 3, 1, 2)"
    return f"; use {name}[:, None]" if len(shape) == 3 else ""
