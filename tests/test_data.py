import hashlib
import math
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bnnlib.data
from bnnlib.batches import Batches
from bnnlib.corruption import gaussian_inputs, random_labels, random_pixels, shuffled_pixels
from bnnlib.data import CIFAR10_CLASSES, SIZES, SVHN_CLASSES, ImageSet, load, load_npz
from bnnlib.errors import DamagedFile, DataNotFound, InvalidValue

PIXELS = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 1])
ABC = ("a", "b", "c")


# -------------------------------------------------------------------------------- ImageSet


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (PIXELS.permute(0, 2, 3, 1), LABELS, r"torch.uint8 \(4, 2, 2, 3\)"),
        (PIXELS[0], LABELS, r"torch.uint8 \(3, 2, 2\)"),
        (PIXELS.double(), LABELS, "torch.float64"),
        (PIXELS.long(), LABELS, "torch.int64"),
        (PIXELS, LABELS.int(), "got torch.int32"),
        (PIXELS, LABELS[:3], r"shape \(4,\), got torch.int64 \(3,\)"),
        (PIXELS, LABELS[:, None], r"got torch.int64 \(4, 1\)"),
        (PIXELS, LABELS - 1, r"in 0..2, got -1..1"),
        (PIXELS, LABELS + 1, r"in 0..2, got 1..3"),
    ],
)
def test_what_does_not_fit_together_is_refused(images, labels, text):
    with pytest.raises(InvalidValue, match=text):
        ImageSet(images, labels, "mine", "train", ABC)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_refused(value):
    images = PIXELS.float()
    images[2, 1, 0, 1] = value
    with pytest.raises(InvalidValue, match="images must be finite, got"):
        ImageSet(images, LABELS, "mine", "train", ABC)


@pytest.mark.parametrize(
    ("true", "text"),
    [
        (LABELS.int(), "true_labels must be int64"),
        (LABELS[:3], r"true_labels must be int64 of shape \(4,\)"),
        (LABELS + 1, "true_labels must be in 0..2, got 1..3"),
    ],
)
def test_true_labels_are_checked_like_labels(true, text):
    with pytest.raises(InvalidValue, match=text):
        ImageSet(PIXELS, LABELS, "mine", "train", ABC, true_labels=true)


@pytest.mark.parametrize("names", [("a", "", "c"), ("a", 1, "c")])
def test_classes_without_a_name_are_refused(names):
    with pytest.raises(InvalidValue, match="class_names must be texts, none empty"):
        ImageSet(PIXELS, LABELS, "mine", "train", names)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_bytes_and_scaled_floats_are_images(dtype):
    assert len(ImageSet(PIXELS.to(dtype), LABELS, "mine", "train", ABC)) == 4


def test_first_images_keep_their_labels_and_the_record():
    data = ImageSet(PIXELS, LABELS, "mine", "train", ABC, ("noted",))
    assert data.first(3).labels.tolist() == [0, 1, 2]
    assert data.first(3).provenance == ("noted",)
    assert data.first(None) is data


@pytest.mark.parametrize("n", [0, -1, 5, True, 2.0])
def test_first_of_too_many_or_none_is_refused(n):
    with pytest.raises(InvalidValue, match=f"mine train has 4 images, asked for {n}"):
        ImageSet(PIXELS, LABELS, "mine", "train", ABC).first(n)


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_first_takes_numpys_numbers(kind):
    assert len(ImageSet(PIXELS, LABELS, "mine", "train", ABC).first(kind(3))) == 3


@pytest.mark.parametrize(("n", "count"), [(2, 2), (4, 4), (5, 4), (None, 4)])
def test_at_most_takes_what_there_is(n, count):
    data = ImageSet(PIXELS, LABELS, "mine", "train", ABC)
    assert data.at_most(n).labels.tolist() == LABELS.tolist()[:count]


def test_label_hash_is_that_of_little_endian_64_bit_integers():
    expected = hashlib.sha256(struct.pack("<4q", 0, 1, 2, 1)).hexdigest()
    assert ImageSet(PIXELS, LABELS, "mine", "train", ABC).label_hash() == expected


def test_corrupted_is_where_a_label_is_not_the_true_one():
    data = ImageSet(PIXELS, LABELS, "mine", "train", ABC, true_labels=torch.tensor([0, 2, 2, 0]))
    assert data.corrupted.tolist() == [False, True, False, True]
    assert data.first(3).true_labels.tolist() == [0, 2, 2]
    assert data.at_most(2).corrupted.tolist() == [False, True]
    assert ImageSet(PIXELS, LABELS, "mine", "train", ABC).corrupted.tolist() == [False] * 4


def hash_of(images, labels=LABELS):
    return ImageSet(images, labels, "mine", "train", ABC).image_hash()


def test_image_hash_is_that_of_type_shape_and_pixels():
    pixels = torch.arange(48, dtype=torch.uint8).reshape(4, 3, 2, 2)
    expected = hashlib.sha256(b"uint8 (4, 3, 2, 2)" + bytes(range(48))).hexdigest()
    assert hash_of(pixels) == expected
    assert hash_of(pixels.to(memory_format=torch.channels_last)) == expected
    assert hash_of(pixels, LABELS.flip(0)) == expected


def test_image_hash_changes_with_a_pixel_the_order_the_shape_and_the_type():
    pixels = torch.arange(48, dtype=torch.uint8).reshape(4, 3, 2, 2)
    one_off = pixels.clone()
    one_off[3, 2, 1, 1] += 1
    others = [one_off, pixels.flip(0), pixels.reshape(4, 3, 1, 4), pixels.float()]
    assert len({hash_of(images) for images in (pixels, *others)}) == 5
    zeros = torch.zeros(4, 3, 2, 2)
    assert hash_of(zeros) != hash_of(torch.zeros(4, 3, 2, 8, dtype=torch.uint8))  # equal bytes


# ------------------------------------------------------------------------- names and splits


@pytest.mark.parametrize(
    ("name", "split", "text"),
    [
        ("glyph", "train", "unknown data set 'glyph'; did you mean 'glyphs'"),
        ("cifar", "train", "did you mean 'cifar10'"),
        ("cifar10", "validation", "unknown cifar10 split 'validation'; did you mean 'valid'"),
        ("glyphs", "extra", r"unknown glyphs split 'extra'.*allowed: train, valid, test"),
        ("svhn", "split_train", "did you mean 'splitted_train'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, split, text):
    with pytest.raises(InvalidValue, match=text):
        load(name, split)


def test_sizes_are_those_of_pylearn2():
    assert SIZES["cifar10"] == {"train": 45_000, "valid": 5_000, "test": 10_000}
    assert SIZES["svhn"]["train"] == 73_257
    assert SIZES["svhn"]["test"] == 26_032
    assert SIZES["svhn"]["extra"] == 531_131
    assert SIZES["svhn"]["train_all"] == 73_257 + 531_131
    assert SIZES["svhn"]["splitted_train"] == 73_257 + 531_131 - SIZES["svhn"]["valid"]


# ------------------------------------------------------------------------------ drawn sets


@pytest.mark.parametrize("name", ["glyphs", "shapes", "patterns"])
class TestDrawnSets:
    def test_needs_no_file(self, name, tmp_path):
        data = load(name, "test", root=tmp_path, n=20)
        assert (len(data), data.name, data.split) == (20, name, "test")
        side = 8 if name == "patterns" else 32
        assert data.images.shape == (20, 3, side, side)
        assert len(data.class_names) == 10

    def test_same_arguments_same_bytes_and_others_differ(self, name):
        data = load(name, "train", n=20, seed=3)
        again, other_seed, other_split = (
            load(name, "train", n=20, seed=3),
            load(name, "train", n=20, seed=4),
            load(name, "test", n=20, seed=3),
        )
        assert torch.equal(data.images, again.images)
        assert torch.equal(data.labels, again.labels)
        assert not torch.equal(data.images, other_seed.images)
        assert not torch.equal(data.images, other_split.images)

    def test_writing_into_a_set_does_not_reach_the_next_one(self, name):
        spoiled = load(name, "train", n=20)
        images, labels = spoiled.images.clone(), spoiled.labels.clone()
        spoiled.images.zero_()
        spoiled.labels.zero_()
        assert torch.equal(load(name, "train", n=20).images, images)
        assert torch.equal(load(name, "train", n=20).labels, labels)

    @pytest.mark.parametrize("n", [0, -3])
    def test_without_images_it_is_refused(self, name, n):
        with pytest.raises(InvalidValue, match=f"n must be a whole number, 1 or more, got {n}"):
            load(name, "train", n=n)


def test_a_drawn_split_has_its_stated_size(monkeypatch):
    monkeypatch.setitem(bnnlib.data.SIZES, "glyphs", {"train": 7, "valid": 3, "test": 3})
    assert len(load("glyphs", "train")) == 7


# ------------------------------------------------------------- real sets, from a small double


class Disk:
    """Stands for torchvision, and keeps what it was asked for."""

    def __init__(self, files):
        self.files = files
        self.asked = []

    def read(self, kind, folder, download, **which):
        (file,) = which.values()
        self.asked.append((kind, folder, download))
        return self.files[file]


def traced(file, labels):
    """Images (N, 1, 2, 3) whose colours say file and label, and whose second pixel the row."""
    row = np.arange(len(labels))
    columns = [np.full_like(row, file), labels, 0 * row, row // 256, row % 256, 0 * row]
    return np.stack(columns, axis=1).astype(np.uint8).reshape(-1, 1, 2, 3)


def file_of(data):
    return data.images[:, 0, 0, 0].long()


def label_of(data):
    return data.images[:, 1, 0, 0].long()


def row_of(data):
    return data.images[:, 0, 0, 1].long() * 256 + data.images[:, 1, 0, 1]


@pytest.fixture
def cifar10(monkeypatch):
    labels = np.arange(50_000) % 10
    train = SimpleNamespace(data=traced(0, labels), targets=labels.tolist())
    test = SimpleNamespace(data=traced(1, labels[:10_000]), targets=labels[:10_000].tolist())
    disk = Disk({True: train, False: test})
    monkeypatch.setattr(bnnlib.data, "read_published", disk.read)


@pytest.mark.parametrize(
    ("split", "file", "first", "last"),
    [("train", 0, 0, 44_999), ("valid", 0, 45_000, 49_999), ("test", 1, 0, 9_999)],
)
def test_cifar10_is_split_by_row_in_the_order_of_the_files(cifar10, split, file, first, last):
    data = load("cifar10", split)
    assert torch.equal(row_of(data), torch.arange(first, last + 1))
    assert torch.equal(label_of(data), data.labels)
    assert set(file_of(data).tolist()) == {file}
    assert data.class_names == CIFAR10_CLASSES
    assert len(data) == SIZES["cifar10"][split]


FILES = ("train", "extra", "test")


@pytest.fixture
def svhn(monkeypatch):
    """500, 300 and 20 images of each digit; like torchvision's, the label of digit 0 is 0."""
    digits = [np.tile(np.arange(10), per_class) for per_class in (500, 300, 20)]
    images = [traced(i, labels).transpose(0, 3, 1, 2) for i, labels in enumerate(digits)]
    files = [SimpleNamespace(data=x, labels=y) for x, y in zip(images, digits, strict=True)]
    disk = Disk(dict(zip(FILES, files, strict=True)))
    monkeypatch.setattr(bnnlib.data, "read_published", disk.read)
    return disk


def members(data):
    return set(zip(file_of(data).tolist(), row_of(data).tolist(), strict=True))


@pytest.mark.parametrize(
    ("split", "of_train", "of_extra", "of_test"),
    [
        ("train", 500, 0, 0),
        ("extra", 0, 300, 0),
        ("test", 0, 0, 20),
        ("train_all", 500, 300, 0),
        ("valid", 400, 200, 0),
        ("splitted_train", 100, 100, 0),
    ],
)
def test_svhn_split_has_so_many_of_each_class_of_each_file(
    svhn, split, of_train, of_extra, of_test
):
    data = load("svhn", split)
    for file, count in enumerate((of_train, of_extra, of_test)):
        labels = data.labels[file_of(data) == file]
        assert torch.bincount(labels, minlength=10).tolist() == [count] * 10
    assert len(members(data)) == len(data)  # no image twice


def test_svhn_class_is_digit_minus_one_so_that_zero_comes_last(svhn):
    data = load("svhn", "test")
    assert [SVHN_CLASSES[label] for label in data.labels] == [str(d.item()) for d in label_of(data)]
    assert tuple("1234567890") == SVHN_CLASSES


def test_svhn_train_holds_4000_of_the_6000_validation_images(svhn):
    train, valid, rest = (members(load("svhn", s)) for s in ("train", "valid", "splitted_train"))
    assert len(valid) == 6_000
    assert len(valid & train) == 4_000
    assert not valid & rest
    assert valid | rest == members(load("svhn", "train_all"))


def test_svhn_is_shuffled_once_by_the_seed_of_pylearn2(svhn):
    order = np.arange(5_000)
    np.random.RandomState(322).shuffle(order)
    expected = svhn.files["train"].data[order]
    assert np.array_equal(load("svhn", "train").images.numpy(), expected)


def test_root_and_download_reach_the_reader(svhn, tmp_path, monkeypatch):
    load("svhn", "test", root=tmp_path / "a", download=True)
    monkeypatch.setenv("BNNLIB_DATA", str(tmp_path / "b"))
    load("svhn", "test")
    monkeypatch.delenv("BNNLIB_DATA")
    load("svhn", "test", n=3)
    assert svhn.asked == [
        ("SVHN", tmp_path / "a", True),
        ("SVHN", tmp_path / "b", False),
        ("SVHN", Path("data"), False),
    ]


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_missing_files_are_reported_with_the_folder_and_the_remedy(name, tmp_path):
    with pytest.raises(DataNotFound) as caught:
        load(name, "train", root=tmp_path)
    for word in (str(tmp_path), "--download", "download=True", "BNNLIB_DATA"):
        assert word in str(caught.value)


# ------------------------------------------------------------------------------- .npz files


IMAGES = np.arange(5 * 3 * 2 * 2, dtype=np.uint8).reshape(5, 3, 2, 2)
CLASSES = np.array([3, 1, 4, 1, 5])


def test_a_split_of_an_npz_is_an_image_set(npz):
    path = npz(images=IMAGES, labels=CLASSES, heldout=[0, 0, 0, 1, 1], class_names=list("uvwxyz"))
    data = load_npz(path, "test")
    assert torch.equal(data.images, torch.from_numpy(IMAGES[3:]))
    assert (data.labels.dtype, data.labels.tolist()) == (torch.int64, [1, 5])
    assert (data.name, data.split, data.class_names) == ("mine", "test", tuple("uvwxyz"))


def test_npz_is_looked_for_here_and_then_in_root(npz, tmp_path, monkeypatch):
    npz(images=IMAGES, labels=CLASSES)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert len(load("mine.npz", "train", root=tmp_path)) == 5
    monkeypatch.setenv("BNNLIB_DATA", str(tmp_path))
    assert len(load("mine.npz", "train", n=2)) == 2
    np.savez("mine.npz", images=IMAGES[:1], labels=CLASSES[:1])
    assert len(load("mine.npz", "train")) == 1
    with pytest.raises(DataNotFound, match=r"yours\.npz"):
        load("yours.npz", "train")


def test_a_folder_named_as_the_data_set_is_refused(tmp_path):
    (tmp_path / "mine.npz").mkdir()
    with pytest.raises(DamagedFile, match=r"mine\.npz is a folder"):
        load("mine.npz", "train", root=tmp_path)


# ------------------------------------------------------------------------------- small sets


@pytest.mark.parametrize("labels", [[3], [3, 3, 3], [9, 0]])
def test_one_image_one_class_and_absent_classes_work(npz, labels):
    data = load_npz(npz(images=IMAGES[: len(labels)], labels=labels), "train")
    assert data.labels.tolist() == labels
    assert len(data.class_names) == 10
    assert random_labels(data, seed=0).true_labels.tolist() == labels
    for corrupt in (shuffled_pixels, random_pixels, gaussian_inputs):
        assert len(corrupt(data, seed=0)) == len(labels)


def test_the_last_batch_holds_what_is_left(npz):
    data = load_npz(npz(images=IMAGES, labels=CLASSES), "train")
    batches = Batches(data, 2)
    assert [len(labels) for _, labels in batches.in_order()] == [2, 2, 1]
    assert [len(labels) for _, labels in batches.shuffled(torch.Generator())] == [2, 2]


@pytest.mark.parametrize("n", [6, 0, -1, 2.5])
def test_more_images_than_there_are_are_refused_by_name(npz, n):
    path = npz(images=IMAGES, labels=CLASSES)
    with pytest.raises(InvalidValue, match=f"mine train has 5 images, asked for {n}"):
        load(path, "train", n=n)


def test_an_empty_set_may_exist_but_makes_no_batches():
    empty = ImageSet(PIXELS[:0], LABELS[:0], "mine", "train", ABC)
    assert len(random_labels(empty, seed=0)) == 0
    with pytest.raises(InvalidValue, match="mine train: no images to make batches of"):
        Batches(empty, 2)


# ------------------------------------------------------------- real sets, where they are kept


DATA = Path(os.environ.get("BNNLIB_DATA") or "no data folder")


@pytest.mark.skipif(
    not (DATA / "cifar-10-batches-py").is_dir(), reason="no CIFAR-10 in the folder BNNLIB_DATA"
)
class TestRealCifar10:
    @pytest.mark.parametrize(
        ("split", "count", "labels"),
        [
            ("train", 45_000, [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]),
            ("valid", 5_000, None),
            ("test", 10_000, [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]),
        ],
    )
    def test_counts_and_first_labels_are_the_published_ones(self, split, count, labels):
        data = load("cifar10", split)
        assert data.images.shape == (count, 3, 32, 32)
        assert data.images.dtype == torch.uint8
        assert labels in (None, data.labels[:10].tolist())

    def test_training_and_validation_make_5000_of_each_class(self):
        both = torch.cat([load("cifar10", split).labels for split in ("train", "valid")])
        assert torch.bincount(both).tolist() == [5_000] * 10


@pytest.mark.skipif(
    not (DATA / "svhn_exact_subset.npz").is_file(),
    reason="no svhn_exact_subset.npz in the folder BNNLIB_DATA",
)
def test_subset_of_svhn_is_881_images_and_202_held_out():
    sets = [load("svhn_exact_subset.npz", split) for split in ("train", "test")]
    assert [len(data) for data in sets] == [881, 202]
    assert all(data.images.shape[1:] == (3, 32, 32) for data in sets)
