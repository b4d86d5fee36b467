"""Image sets: SVHN, CIFAR-10, your own `.npz`, and three drawn on the spot.

In: a name and a split. Out: an `ImageSet`. Next file: `corruption.py`.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from bnnlib.errors import DataNotFound, InvalidValue, check_name
from bnnlib.glyphs import GLYPH_CLASSES, glyphs
from bnnlib.patterns import PATTERN_CLASSES, patterns
from bnnlib.shapes import SHAPE_CLASSES, shapes

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# Class index = .mat label - 1, as in pylearn2, so digit 0 is the last class. (torchvision: first.)
SVHN_CLASSES = tuple("1234567890")

DRAWN = {
    "glyphs": (glyphs, GLYPH_CLASSES),
    "shapes": (shapes, SHAPE_CLASSES),
    "patterns": (patterns, PATTERN_CLASSES),
}
# Images in each split. The real ones: `pylearn2/datasets/cifar10.py` and `svhn.py:135-136`.
DRAWN_SIZES = {"train": 10_000, "valid": 2_000, "test": 2_000}
SIZES = {
    "cifar10": {"train": 45_000, "valid": 5_000, "test": 10_000},
    "svhn": {
        "train": 73_257,
        "valid": 6_000,
        "test": 26_032,
        "extra": 531_131,
        "splitted_train": 598_388,
        "train_all": 604_388,
    },
    "glyphs": DRAWN_SIZES,
    "shapes": DRAWN_SIZES,
    "patterns": DRAWN_SIZES,
}
DATASETS = (*SIZES, "a path ending in .npz")  # as error messages name them


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their labels, with a record of where they came from.

    Raises InvalidValue where shapes, types or label range do not fit together.
    """

    images: Tensor  # (N, 3, H, W) uint8 pixels, or float32 that is already scaled
    labels: Tensor  # (N,) int64, 0 <= label < len(class_names)
    name: str
    split: str
    class_names: tuple[str, ...]
    provenance: tuple[str, ...] = ()  # one line for each corruption applied
    true_labels: Tensor | None = None  # (N,) int64, where `labels` were drawn anew

    def __post_init__(self):
        shape, kind = tuple(self.images.shape), self.images.dtype
        if len(shape) != 4 or shape[1] != 3 or kind not in (torch.uint8, torch.float32):
            raise InvalidValue(
                f"images must be uint8 or float32 of shape (N, 3, H, W), got {kind} {shape}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]:
            raise InvalidValue(
                f"labels must be int64 of shape ({shape[0]},), "
                f"got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        classes = len(self.class_names)
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            raise InvalidValue(
                f"labels must be in 0..{classes - 1}, "
                f"got {int(self.labels.min())}..{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int | None) -> "ImageSet":
        """The first n images; all of them for None."""
        if n is None:
            return self
        if not 0 < n <= len(self):
            raise InvalidValue(f"{self.name} {self.split} has {len(self)} images, asked for {n}")
        true = None if self.true_labels is None else self.true_labels[:n]
        return replace(self, images=self.images[:n], labels=self.labels[:n], true_labels=true)

    def at_most(self, n: int | None) -> "ImageSet":
        """The first n images, or all of them for None and where there are fewer."""
        return self if n is None or n >= len(self) else self.first(n)

    @property
    def corrupted(self) -> Tensor:
        """(N,) bool: where the label is not the true one."""
        return self.labels != (self.labels if self.true_labels is None else self.true_labels)

    def label_hash(self) -> str:
        """SHA-256 of the labels as little-endian int64: equal exactly when the labels are."""
        return hashlib.sha256(self.labels.cpu().numpy().astype("<i8").tobytes()).hexdigest()

    def image_hash(self) -> str:
        """SHA-256 of the images, in order: equal exactly when type, shape and pixels are."""
        pixels = self.images.cpu().contiguous().numpy()
        digest = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
        digest.update(pixels)
        return digest.hexdigest()


def load(
    name: str | Path,
    split: str,
    root: str | Path | None = None,
    download: bool = False,
    n: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """The first `n` images (default: all) of one split of a data set.

    - `name`: "svhn" or "cifar10" (real, through torchvision, checked against the published
      MD5 sums); "glyphs", "shapes" or "patterns" (drawn on the spot, no file needed); or the
      path of a `.npz` file, looked for here and in `root`, see `load_npz`.
    - `split`: see `SIZES`. CIFAR-10 "valid" is rows 45,000 to 49,999 of the training set;
      SVHN's splits are those of pylearn2.
    - `root`: folder of the files; default: the environment variable BNNLIB_DATA, or `data`.
    - `download`: fetch a real set that is not there.
    - `seed`: which drawing of a drawn set; real sets have none.

    Raises InvalidValue for unknown names and DataNotFound for missing files.
    """
    folder = Path(root or os.environ.get("BNNLIB_DATA") or "data")
    name = str(name)
    if name.endswith(".npz"):
        path = Path(name)
        return load_npz(path if path.is_file() else folder / path, split).first(n)
    check_name("data set", name, DATASETS)
    check_name(f"{name} split", split, SIZES[name])
    if name in DRAWN:
        return _draw(name, split, SIZES[name][split] if n is None else n, seed)
    read = {"cifar10": _cifar10, "svhn": _svhn}[name]
    images, labels = read(split, lambda kind, **kw: _torchvision(kind, folder, download, **kw))
    classes = {"cifar10": CIFAR10_CLASSES, "svhn": SVHN_CLASSES}[name]
    data = ImageSet(torch.from_numpy(images), torch.from_numpy(labels), name, split, classes)
    return data.first(n)


# ------------------------------------------------------------------------------ drawn sets


@lru_cache(maxsize=8)
def _drawn_arrays(name: str, split: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return DRAWN[name][0](split, n, seed)


def _draw(name: str, split: str, n: int, seed: int) -> ImageSet:
    if n < 1:
        raise InvalidValue(f"n must be at least 1, got {n}")
    images, labels = _drawn_arrays(name, split, n, seed)
    # A copy, so that nobody can write into the cache.
    return ImageSet(torch.tensor(images), torch.tensor(labels), name, split, DRAWN[name][1])


# ------------------------------------------------------------------------------- real sets


def _import_torchvision_datasets() -> ModuleType:
    """`torchvision.datasets`, also where torchvision's compiled operators cannot load.

    A torchvision built for CUDA beside a CPU-only torch fails on import, while it registers
    fake versions of operators that are not there ("operator torchvision::nms does not
    exist"). Its data sets need none of them, so only after that failure the registering
    module is replaced by an empty one. A matching pair is left alone.
    """
    try:
        import torchvision.datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        registrations = "torchvision._meta_registrations"
        sys.modules[registrations] = ModuleType(registrations)
        import torchvision.datasets
    return torchvision.datasets


def _torchvision(kind: str, folder: Path, download: bool, **which):
    """One of torchvision's data sets, or DataNotFound with what to do."""
    try:
        return getattr(_import_torchvision_datasets(), kind)(folder, download=download, **which)
    except RuntimeError as error:
        if "not found or corrupted" not in str(error):
            raise
        raise DataNotFound(
            f"{kind} is not in {folder.resolve()}, or its files do not match the published "
            "MD5 sums; download it (--download, download=True), or set BNNLIB_DATA to the folder "
            "that holds cifar-10-batches-py or SVHN's .mat files"
        ) from error


Reader = Callable[..., object]


def _cifar10(split: str, read: Reader) -> tuple[np.ndarray, np.ndarray]:
    """pylearn2's split: the first 45,000 rows train, the last 5,000 validate (file order)."""
    data = read("CIFAR10", train=split != "test")
    rows = {"train": slice(45_000), "valid": slice(45_000, None), "test": slice(None)}[split]
    images = data.data[rows].transpose(0, 3, 1, 2)  # (N, 3, 32, 32) uint8
    return np.ascontiguousarray(images), np.asarray(data.targets, dtype=np.int64)[rows]


def _svhn(split: str, read: Reader) -> tuple[np.ndarray, np.ndarray]:
    """One of pylearn2's SVHN sets, in the order of its HDF5 files.

    "valid" takes 400 images a class from the training file and 200 from the extra file, and
    "splitted_train" is the rest of both; "train" is the whole training file, so it holds
    4,000 of the 6,000 validation images. Every set is shuffled once with RandomState(322).
    For "valid" and "splitted_train" the members are pylearn2's, the order is not: there it
    went through a Python 2 set. Source: `pylearn2/datasets/svhn.py:135-136,168-247,273-282`.
    """
    rng = np.random.RandomState(322)
    if split in ("train", "test", "extra"):
        images, labels = _svhn_file(split, read)
    else:
        parts = [_svhn_file(file, read) for file in ("train", "extra")]
        if split == "train_all":
            parts = parts[::-1]  # pylearn2 puts the training file behind the extra one
        else:
            chosen = [_valid_rows(parts[0][1], 400, rng), _valid_rows(parts[1][1], 200, rng)]
            rows = [mask if split == "valid" else ~mask for mask in chosen]
            parts = [(x[r], y[r]) for (x, y), r in zip(parts, rows, strict=True)]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.arange(len(labels))
    rng.shuffle(order)
    return images[order], labels[order]


def _svhn_file(file: str, read: Reader) -> tuple[np.ndarray, np.ndarray]:
    data = read("SVHN", split=file)
    return data.data, (np.asarray(data.labels, dtype=np.int64) - 1) % 10  # digit 0 -> class 9


def _valid_rows(labels: np.ndarray, per_class: int, rng: np.random.RandomState) -> np.ndarray:
    """A mask (N,) of `per_class` random rows of each class."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        rng.shuffle(rows)
        chosen[rows[:per_class]] = True
    return chosen


# -------------------------------------------------------------------------------- .npz files


def load_npz(path: str | Path, split: str) -> ImageSet:
    """One split of a `.npz` file of images (N, 3, H, W) uint8 and integer labels (N,).

    The arrays of split "train" are named `train_images` and `train_labels`, those of other
    splits likewise; plain `images` and `labels` count as "train". Optional: `heldout`, one
    0 or 1 for each training row, whose rows with 1 then are the split "test"; and
    `class_names`. Nothing in the file is unpickled.

    Raises DataNotFound, or InvalidValue where an array is missing or does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise DataNotFound(f"no file {path.resolve()}")
    arrays = _read_npz(path)
    splits = _npz_splits(arrays)
    check_name(f"split of {path.name}", split, splits)
    images, labels = splits[split]
    if images.dtype != np.uint8:
        raise InvalidValue(f"{path}: images must be uint8, got {images.dtype}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InvalidValue(f"{path}: labels must be integers, got {labels.dtype}")
    count = max(10, int(labels.max(initial=0)) + 1)
    names = tuple(str(name) for name in arrays.get("class_names", range(count)))
    labels = torch.tensor(labels.astype(np.int64))
    return ImageSet(torch.tensor(images), labels, path.stem, split, names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise InvalidValue(f"{path} is not a .npz file of plain arrays: {error}") from error


def _npz_splits(arrays: dict) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every split that the arrays of a file hold, by name."""
    names = [key.removesuffix("images") for key in arrays if key.endswith("images")]
    splits = {
        prefix.removesuffix("_") or "train": (arrays[prefix + "images"], arrays[prefix + "labels"])
        for prefix in names
        if prefix + "labels" in arrays
    }
    if "heldout" in arrays and "train" in splits:
        images, labels = splits["train"]
        heldout = arrays["heldout"].astype(bool)
        if not len(images) == len(labels) == len(heldout):
            raise InvalidValue(
                f"{len(images)} images, {len(labels)} labels and {len(heldout)} values of "
                "heldout do not fit together"
            )
        splits["train"] = images[~heldout], labels[~heldout]
        splits["test"] = images[heldout], labels[heldout]
    return splits
