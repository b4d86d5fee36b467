"""Image sets: SVHN, CIFAR-10, three that are drawn on the spot, and your own images."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bnnlib.data.drawn import DRAWERS, draw_set
from bnnlib.data.npz import MAX_CLASSES, find_npz, layout_hint, read_split
from bnnlib.data.published import data_folder, read_published
from bnnlib.errors import InvalidValue, check_name, check_whole, shown
from bnnlib.names import DATASETS, DRAWN, SIZES, accepted, check_dataset

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# Class index = .mat label - 1, as in pylearn2, so digit 0 is the last class. (torchvision: first.)
SVHN_CLASSES = tuple("1234567890")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their labels, with a record of where they came from.

    Takes NumPy arrays or tensors. As a `torch.utils.data.Dataset` it gives one image at a time, as
    a network takes it, and its label. Raises InvalidValue where shapes, types or label range do not
    fit together.
    """

    images: Tensor  # (N, C, H, W), C = 3 or 1: uint8 pixels, or float32 that is already scaled
    labels: Tensor  # (N,) int64, 0 <= label < len(class_names)
    name: str = "images"
    split: str = "train"
    class_names: tuple[str, ...] = ()  # none given: "0", "1", ... up to the largest label
    provenance: tuple[str, ...] = ()  # one line for each corruption applied
    true_labels: Tensor | None = None  # (N,) int64, where `labels` were drawn anew

    def __post_init__(self):
        object.__setattr__(self, "images", _as_images(self.images))
        if not all(isinstance(name, str) and name for name in self.class_names):
            raise InvalidValue(f"class_names must be texts, none empty, got {self.class_names}")
        classes = len(self.class_names)
        self._take_labels("labels", classes or MAX_CLASSES)
        if not classes and len(self):
            classes = int(self.labels.max()) + 1
            object.__setattr__(self, "class_names", tuple(map(str, range(classes))))
        if self.true_labels is not None:
            self._take_labels("true_labels", classes)

    def _take_labels(self, what: str, classes: int) -> None:
        labels = _as_labels(what, getattr(self, what))
        object.__setattr__(self, what, labels)
        shape, top = (len(self.images),), classes - 1
        if labels.dtype != torch.int64 or labels.shape != shape:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise InvalidValue(f"{what} must be int64 of shape {shape}, got {got}")
        for row in ((labels < 0) | (labels > top)).nonzero()[:1].flatten().tolist():
            raise InvalidValue(f"{what} must be in 0..{top}, got {labels[row]} in row {row}")

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, name: str = "images", split: str = "train"
    ) -> "ImageSet":
        """The pairs of image and label of a `torch.utils.data.Dataset`, all in memory.

        Images are what PIL or NumPy has, (H, W) or (H, W, C) uint8, or tensors (C, H, W): uint8
        pixels, or floats, which are taken to be scaled already. `classes` of the data set, as
        torchvision's have it, becomes the class names.
        """
        pairs = [dataset[i] for i in range(len(dataset))]
        images, labels = [_as_image(image) for image, _ in pairs], [label for _, label in pairs]
        if len(shapes := {tuple(image.shape) for image in images}) != 1:
            raise InvalidValue(f"images must be of one shape, got {shown(sorted(shapes))}")
        names = tuple(map(str, getattr(dataset, "classes", ())))
        return cls(torch.stack(images), labels, name, split, names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return scale_pixels(self.images[row]), int(self.labels[row])

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


def scale_pixels(images: Tensor) -> Tensor:
    """x * (2 / 255) - 1: uint8 pixels to float32 in [-1, 1]; float images pass unchanged.

    Any shape. Source: `svhn_random_labels.py:109-111` of the original.
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32).mul_(2 / 255).sub_(1)
    return images


def _as_images(images: Tensor | np.ndarray) -> Tensor:
    if not isinstance(images, Tensor | np.ndarray):
        raise InvalidValue(f"images must be an array or a tensor, got {shown(images)}")
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        hint = layout_hint("images", shape)
        hint = hint.replace("transpose", "permute") if isinstance(images, Tensor) else hint
        raise InvalidValue(f"images must be of shape (N, 3 or 1, H, W), got {shape}{hint}")
    images = _as_tensor("images", images)
    if images.dtype == torch.float64:
        images = images.float()
    if images.dtype not in (torch.uint8, torch.float32):
        raise InvalidValue(f"images must be uint8 pixels or scaled floats, got {images.dtype}")
    if images.dtype == torch.float32 and images.numel():
        low, high = images.aminmax()  # both NaN if any is
        if not (low.isfinite() and high.isfinite()):
            raise InvalidValue(f"images must be finite, got {low}..{high}")
    return images


def _as_labels(what: str, labels: Tensor | np.ndarray | Sequence[int]) -> Tensor:
    """Integers of any kind as int64; what else there is stays, to be refused."""
    labels = _as_tensor(what, labels)
    other = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    return labels if other else labels.long()


def _as_tensor(what: str, values: object) -> Tensor:
    if isinstance(values, np.ndarray):  # a tensor's memory is writable, and in this byte order
        values = np.require(values, values.dtype.newbyteorder("="), ("C", "W"))
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValue(f"{what} must be numbers, got {shown(values)}") from error


def _as_image(image: object) -> Tensor:
    """One image of a `Dataset` as (C, H, W)."""
    if isinstance(image, Tensor):
        return image
    pixels = np.asarray(image)
    if pixels.ndim not in (2, 3):
        raise InvalidValue(f"an image must be (H, W) or (H, W, C), got {shown(image)}")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return _as_tensor("images", pixels.transpose(2, 0, 1))


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
      "shapes" or "patterns" (drawn on the spot); one that you have added to `DATASETS`; or the
      path of a `.npz` file, looked for here and in `root`, see `load_npz`.
    - `split`: one of `SIZES`, which are those of pylearn2, or of your own data.
    - `root`: folder of the files; default: the environment variable BNNLIB_DATA, or `data`.
    - `download`: fetch a real set that is not there.
    - `seed`: which drawing of a drawn set; real sets have none.

    Raises InvalidValue for unknown names, DataNotFound for missing files and DamagedFile for
    files that are not what they should be; with `download` also DownloadFailed and CannotWrite.
    """
    folder, name = data_folder(root), str(name)
    if name.endswith(".npz"):
        return load_npz(find_npz(name, folder), split).first(n)
    check_dataset("data set", name)
    make = DATASETS[name]
    offered = {"split": split, "n": n, "seed": seed, "root": folder, "download": download}
    data = make(**accepted(make, offered))
    if not isinstance(data, ImageSet):
        raise InvalidValue(f"data set {name!r} must give an ImageSet, got {shown(data)}")
    return replace(data, name=name, split=split).first(n)


def load_npz(path: str | Path, split: str) -> ImageSet:
    """One split of a `.npz` file of images (N, 3 or 1, H, W) uint8 and integer labels (N,).

    The arrays of split "train" are named `train_images` and `train_labels`, those of other
    splits likewise; plain `images` and `labels` count as "train". Optional: `heldout`, one
    0 or 1 for each training row, whose rows with 1 then are the split "test"; and
    `class_names`, a text for each class. Nothing in the file is unpickled.

    Raises DataNotFound, DamagedFile for another kind of file, and InvalidValue where an array
    is missing or does not fit.
    """
    path = find_npz(path, Path())
    images, labels, names = read_split(path, split)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), path.stem, split, names)


# ------------------------------------------------------------------------------- shipped sets

_drawn = lru_cache(maxsize=8)(draw_set)  # a training set takes seconds


def _draw(name: str, split: str, n: int | None, seed: int) -> ImageSet:
    check_name(f"{name} split", split, SIZES[name])
    n = check_whole("n", SIZES[name][split] if n is None else n, 1)
    arrays, classes = _drawn(name, split, n, check_whole("seed", seed)), DRAWERS[name][1]
    images, labels = map(np.copy, arrays)  # so that nobody can write into the cache
    return ImageSet(images, labels, name, split, classes)


glyphs, shapes, patterns = (partial(_draw, name) for name in DRAWN)


def cifar10(split: str, root: Path, download: bool) -> ImageSet:
    """pylearn2's split: the first 45,000 rows train, the last 5,000 validate (file order)."""
    check_name("cifar10 split", split, SIZES["cifar10"])
    data = read_published("CIFAR10", folder=root, download=download, train=split != "test")
    rows = {"train": slice(45_000), "valid": slice(45_000, None), "test": slice(None)}[split]
    images = np.ascontiguousarray(data.data[rows].transpose(0, 3, 1, 2))  # (N, 3, 32, 32) uint8
    labels = np.asarray(data.targets, dtype=np.int64)[rows]
    return ImageSet(images, labels, "cifar10", split, CIFAR10_CLASSES)


def svhn(split: str, root: Path, download: bool) -> ImageSet:
    """One of pylearn2's SVHN sets, in the order of its HDF5 files.

    "valid" takes 400 images a class from the training file and 200 from the extra file, and
    "splitted_train" is the rest of both; "train" is the whole training file, so it holds
    4,000 of the 6,000 validation images. Every set is shuffled once with RandomState(322).
    For "valid" and "splitted_train" the members are pylearn2's, the order is not: there it
    went through a Python 2 set. Source: `pylearn2/datasets/svhn.py:135-136,168-247,273-282`.
    """
    check_name("svhn split", split, SIZES["svhn"])
    read, rng = partial(read_published, folder=root, download=download), np.random.RandomState(322)
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
    return ImageSet(images[order], labels[order], "svhn", split, SVHN_CLASSES)


def _svhn_file(file: str, read: Callable) -> tuple[np.ndarray, np.ndarray]:
    data = read("SVHN", split=file)
    return data.data, (np.asarray(data.labels, dtype=np.int64) - 1) % 10  # digit 0 -> class 9


def _valid_rows(labels: np.ndarray, per_class: int, rng: np.random.RandomState) -> np.ndarray:
    """A mask (N,) of `per_class` random rows of each class."""
    rows = [rng.permutation(np.flatnonzero(labels == k))[:per_class] for k in range(10)]
    return np.isin(np.arange(len(labels)), np.concatenate(rows))
