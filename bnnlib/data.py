"""Image sets: SVHN, CIFAR-10, your own `.npz`, and three drawn on the spot.

In: a name and a split. Out: an `ImageSet`. Next file: `corruption.py`.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bnnlib.downloads import read_published
from bnnlib.errors import DamagedFile, DataNotFound, InvalidValue, check_name, check_whole
from bnnlib.files import check_is_file, whole_or_absent
from bnnlib.glyphs import GLYPH_CLASSES, glyphs
from bnnlib.npz import read_npz, read_split
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
        _check_images(self.images)
        if not all(isinstance(name, str) and name for name in self.class_names):
            raise InvalidValue(f"class_names must be texts, none empty, got {self.class_names}")
        _check_labels("labels", self.labels, len(self.images), len(self.class_names))
        if self.true_labels is not None:
            _check_labels("true_labels", self.true_labels, len(self), len(self.class_names))

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int | None) -> "ImageSet":
        """The first n images; all of them for None."""
        if n is None:
            return self
        whole = isinstance(n, Integral) and not isinstance(n, bool)
        if not whole or not 0 < n <= len(self):
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


def _check_images(images: Tensor) -> None:
    shape, kind = tuple(images.shape), images.dtype
    if len(shape) != 4 or shape[1] != 3 or kind not in (torch.uint8, torch.float32):
        raise InvalidValue(
            f"images must be uint8 or float32 of shape (N, 3, H, W), got {kind} {shape}"
        )
    if images.is_floating_point() and images.numel():
        lowest, highest = (value.item() for value in images.aminmax())  # NaN passes through both
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise InvalidValue(f"images must be finite, got {lowest}..{highest}")


def _check_labels(what: str, labels: Tensor, count: int, classes: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise InvalidValue(
            f"{what} must be int64 of shape ({count},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InvalidValue(
            f"{what} must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )


def load(
    name: str | Path,
    split: str,
    root: str | Path | None = None,
    download: bool = False,
    n: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """The first `n` images (default: all) of one split of a data set.

    - `name`: "svhn" or "cifar10" (real, through torchvision, from files with the published
      checksums); "glyphs", "shapes" or "patterns" (drawn on the spot, no file needed); or the
      path of a `.npz` file, looked for here and in `root`, see `load_npz`.
    - `split`: see `SIZES`. CIFAR-10 "valid" is rows 45,000 to 49,999 of the training set;
      SVHN's splits are those of pylearn2.
    - `root`: folder of the files; default: the environment variable BNNLIB_DATA, or `data`.
    - `download`: fetch a real set that is not there.
    - `seed`: which drawing of a drawn set; real sets have none.

    Raises InvalidValue for unknown names, DataNotFound for missing files and DamagedFile for
    files that are not what they should be; with `download` also DownloadFailed and CannotWrite.
    """
    folder, name = data_folder(root), str(name)
    if name.endswith(".npz"):
        path = Path(name).expanduser()
        path = path if os.path.lexists(path) else folder / path
        if path.name == SVHN_SUBSET and not os.path.lexists(path):
            raise DataNotFound(
                f"no file {path.absolute()}; `python -m bnnlib svhn-subset` makes it from SVHN's "
                "train_32x32.mat, which --download fetches"
            )
        return load_npz(path, split).first(n)
    check_name("data set", name, DATASETS)
    check_name(f"{name} split", split, SIZES[name])
    if name in DRAWN:
        return _draw(name, split, SIZES[name][split] if n is None else n, seed)
    read = {"cifar10": _cifar10, "svhn": _svhn}[name]
    images, labels = read(split, lambda kind, **kw: read_published(kind, folder, download, **kw))
    classes = {"cifar10": CIFAR10_CLASSES, "svhn": SVHN_CLASSES}[name]
    data = ImageSet(torch.from_numpy(images), torch.from_numpy(labels), name, split, classes)
    return data.first(n)


def data_folder(root: str | Path | None = None) -> Path:
    """Where the files are: in `root`, or BNNLIB_DATA, or `data`; raises InvalidValue for ""."""
    if root == "":  # more likely an empty variable than a wish for the default
        raise InvalidValue("root must be the path of a folder, got ''")
    return Path(root or os.environ.get("BNNLIB_DATA") or "data").expanduser()


# ------------------------------------------------------------------------------ drawn sets


@lru_cache(maxsize=8)
def _drawn_arrays(name: str, split: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return DRAWN[name][0](split, n, seed)


def _draw(name: str, split: str, n: int, seed: int) -> ImageSet:
    n, seed = check_whole("n", n, 1), check_whole("seed", seed)
    images, labels = _drawn_arrays(name, split, n, seed)
    # A copy, so that nobody can write into the cache.
    return ImageSet(torch.tensor(images), torch.tensor(labels), name, split, DRAWN[name][1])


# ------------------------------------------------------------------------------- real sets


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


# ------------------------------------------------- the part of SVHN that the stored runs read

SVHN_SUBSET = "svhn_exact_subset.npz"
SUBSET_SHA256 = {  # of type, shape and bytes of each array
    "train_images": "6043a7c514ec6cc65ac7a82575d98aee7839dc8c9959a9170335a84e03a71cb7",
    "train_labels": "23e7f8febcfb2fa5f4b594cd6d41b87a7191f4d90fa733eae622a0aec2bdfa46",
    "heldout": "5efab80f457029b27c498639aefda61e98b384ad46f721a926fbab26b3a81507",
}


def write_svhn_subset(root: str | Path | None = None, download: bool = False) -> tuple[Path, bool]:
    """Write SVHN's first 1,083 training images to `SVHN_SUBSET` in `root`; profile `reduced`'s.

    `train_images` (1083, 3, 32, 32) uint8 is in the order of the official file, `train_labels`
    (1083,) int64 names the digits, 0 to 9, and `heldout` (1083,) uint8 is 1 for the last 202,
    which are of other photographs than the first 881. `root` and `download` are those of `load`.
    Returns the path, and whether it has been written: a right file that is there is left alone.
    Raises DamagedFile where an array, of the official file or of the one that is there, is not
    that of the stored runs; and what `downloads.read_published` raises.
    """
    folder, count = data_folder(root), 1083
    path = folder / SVHN_SUBSET
    if os.path.lexists(path):
        check_is_file(path)
        _check_subset(read_npz(path), path, "move it away")
        return path, False
    data = read_published("SVHN", folder, download, split="train")
    arrays = {
        "train_images": data.data[:count],
        "train_labels": np.asarray(data.labels[:count], dtype=np.int64),
        "heldout": (np.arange(count) >= 881).astype(np.uint8),
    }
    _check_subset(arrays, folder / "train_32x32.mat", "nothing was written")
    with whole_or_absent(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path, True


def _check_subset(arrays: dict[str, np.ndarray], source: Path, so: str) -> None:
    for name, expected in SUBSET_SHA256.items():
        array = arrays.get(name, np.zeros(0))
        content = f"{array.dtype} {array.shape}".encode() + array.tobytes()
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise DamagedFile(
                f"{source} holds other {name} than the stored runs read: the SHA-256 is "
                f"{found[:12]}..., not {expected[:12]}...; {so}"
            )


# -------------------------------------------------------------------------------- .npz files


def load_npz(path: str | Path, split: str) -> ImageSet:
    """One split of a `.npz` file of images (N, 3, H, W) uint8 and integer labels (N,).

    The arrays of split "train" are named `train_images` and `train_labels`, those of other
    splits likewise; plain `images` and `labels` count as "train". Optional: `heldout`, one
    0 or 1 for each training row, whose rows with 1 then are the split "test"; and
    `class_names`, a text for each class. Nothing in the file is unpickled.

    Raises DataNotFound; DamagedFile for another kind of file; TooLarge; and InvalidValue where
    an array is missing or does not fit.
    """
    images, labels, names = read_split(path, split)
    return ImageSet(
        torch.from_numpy(images), torch.from_numpy(labels), Path(path).stem, split, names
    )
