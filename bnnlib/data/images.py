"""Image sets: SVHN, CIFAR-10, your own `.npz` file, and three that are drawn on the spot."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bnnlib.data.drawn import DRAWN, draw_set
from bnnlib.data.npz import read_split
from bnnlib.data.published import SVHN_SUBSET, data_folder, read_published
from bnnlib.errors import DataNotFound, InvalidValue, check_name, check_whole

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# Class index = .mat label - 1, as in pylearn2, so digit 0 is the last class. (torchvision: first.)
SVHN_CLASSES = tuple("1234567890")
# Images in each split. The real ones: `pylearn2/datasets/cifar10.py` and `svhn.py:135-136`.
SIZES = {
    "cifar10": {"train": 45_000, "valid": 5_000, "test": 10_000},
    "svhn": {
        "train": 73_257, "valid": 6_000, "test": 26_032, "extra": 531_131,
        "splitted_train": 598_388, "train_all": 604_388,
    },
} | {name: {"train": 10_000, "valid": 2_000, "test": 2_000} for name in DRAWN}  # fmt: skip
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
            got = f"{kind} {shape}"
            raise InvalidValue(f"images must be uint8 or float32 of shape (N, 3, H, W), got {got}")
        if kind == torch.float32 and self.images.numel():
            low, high = self.images.aminmax()  # both NaN if any is
            if not (low.isfinite() and high.isfinite()):
                raise InvalidValue(f"images must be finite, got {low}..{high}")
        if not all(isinstance(name, str) and name for name in self.class_names):
            raise InvalidValue(f"class_names must be texts, none empty, got {self.class_names}")
        self._check_labels("labels", self.labels)
        if self.true_labels is not None:
            self._check_labels("true_labels", self.true_labels)

    def _check_labels(self, what: str, labels: Tensor) -> None:
        shape, top = (len(self.images),), len(self.class_names) - 1
        if labels.dtype != torch.int64 or labels.shape != shape:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise InvalidValue(f"{what} must be int64 of shape {shape}, got {got}")
        for row in ((labels < 0) | (labels > top)).nonzero()[:1].flatten().tolist():
            raise InvalidValue(f"{what} must be in 0..{top}, got {labels[row]} in row {row}")

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int | None) -> "ImageSet":
        """The first n images, all of them for None; raises InvalidValue where there are fewer."""
        if n is None:
            return self
        if isinstance(n, bool) or not isinstance(n, Integral) or not 0 < n <= len(self):
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

    - `name`: "svhn" or "cifar10" (real, from files with the published checksums); "glyphs",
      "shapes" or "patterns" (drawn on the spot); or the path of a `.npz` file, looked for here
      and in `root`, see `load_npz`.
    - `split`: one of `SIZES`, which are those of pylearn2, or of the `.npz` file.
    - `root`: folder of the files; default: the environment variable BNNLIB_DATA, or `data`.
    - `download`: fetch a real set that is not there.
    - `seed`: which drawing of a drawn set; real sets have none.

    Raises InvalidValue for unknown names, DataNotFound for missing files and DamagedFile for
    files that are not what they should be; with `download` also DownloadFailed and CannotWrite.
    """
    folder, name = data_folder(root), str(name)
    if name.endswith(".npz"):
        path = Path(name).expanduser()
        return load_npz(path if os.path.lexists(path) else folder / path, split).first(n)
    check_name("data set", name, DATASETS)
    check_name(f"{name} split", split, SIZES[name])
    if name in DRAWN:
        n = check_whole("n", SIZES[name][split] if n is None else n, 1)
        arrays, classes = _drawn(name, split, n, check_whole("seed", seed)), DRAWN[name][1]
        images, labels = map(np.copy, arrays)  # so that nobody can write into the cache
    else:
        read = partial(read_published, folder=folder, download=download)
        images, labels = (_svhn if name == "svhn" else _cifar10)(split, read)
        classes = SVHN_CLASSES if name == "svhn" else CIFAR10_CLASSES
    data = ImageSet(torch.from_numpy(images), torch.from_numpy(labels), name, split, classes)
    return data.first(n)


def load_npz(path: str | Path, split: str) -> ImageSet:
    """One split of a `.npz` file of images (N, 3, H, W) uint8 and integer labels (N,).

    The arrays of split "train" are named `train_images` and `train_labels`, those of other
    splits likewise; plain `images` and `labels` count as "train". Optional: `heldout`, one
    0 or 1 for each training row, whose rows with 1 then are the split "test"; and
    `class_names`, a text for each class. Nothing in the file is unpickled.

    Raises DataNotFound, DamagedFile for another kind of file, and InvalidValue where an array
    is missing or does not fit.
    """
    path = Path(path).absolute()
    if not os.path.lexists(path):
        remedy = "a relative path is looked for here, then in the data folder (--data, BNNLIB_DATA)"
        if path.name == SVHN_SUBSET:
            remedy = "`python -m bnnlib svhn-subset` makes it (with --download from nothing)"
        raise DataNotFound(f"no file {path}; {remedy}")
    images, labels, names = read_split(path, split)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), path.stem, split, names)


_drawn = lru_cache(maxsize=8)(draw_set)  # a training set takes seconds


def _cifar10(split: str, read: Callable) -> tuple[np.ndarray, np.ndarray]:
    """pylearn2's split: the first 45,000 rows train, the last 5,000 validate (file order)."""
    data = read("CIFAR10", train=split != "test")
    rows = {"train": slice(45_000), "valid": slice(45_000, None), "test": slice(None)}[split]
    images = data.data[rows].transpose(0, 3, 1, 2)  # (N, 3, 32, 32) uint8
    return np.ascontiguousarray(images), np.asarray(data.targets, dtype=np.int64)[rows]


def _svhn(split: str, read: Callable) -> tuple[np.ndarray, np.ndarray]:
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
            parts.reverse()  # pylearn2 puts the training file behind the extra one
        else:
            chosen = [_valid_rows(parts[0][1], 400, rng), _valid_rows(parts[1][1], 200, rng)]
            rows = [mask if split == "valid" else ~mask for mask in chosen]
            parts = [(x[r], y[r]) for (x, y), r in zip(parts, rows, strict=True)]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = rng.permutation(len(labels))
    return images[order], labels[order]


def _svhn_file(file: str, read: Callable) -> tuple[np.ndarray, np.ndarray]:
    data = read("SVHN", split=file)
    return data.data, (np.asarray(data.labels, dtype=np.int64) - 1) % 10  # digit 0 -> class 9


def _valid_rows(labels: np.ndarray, per_class: int, rng: np.random.RandomState) -> np.ndarray:
    """A mask (N,) of `per_class` random rows of each class."""
    rows = [rng.permutation(np.flatnonzero(labels == k))[:per_class] for k in range(10)]
    return np.isin(np.arange(len(labels)), np.concatenate(rows))
