"""Image sets: what fits together, the splits of the real sets, and where files are looked for."""

import hashlib
import json
import math
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bnnlib.corruption import gaussian_inputs, random_labels, random_pixels, shuffled_pixels
from bnnlib.data import images
from bnnlib.data.images import CIFAR10_CLASSES, SVHN_CLASSES, ImageSet, load, scale_pixels
from bnnlib.data.published import write_svhn_subset
from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.names import SIZES, SVHN_SUBSET

PIXELS = torch.arange(48, dtype=torch.uint8).reshape(4, 3, 2, 2)
LABELS = torch.tensor([0, 1, 2, 1])
ABC = ("a", "b", "c")


def mine(pixels=PIXELS, labels=LABELS, classes=ABC, **more):
    return ImageSet(pixels, labels, "mine", "train", classes, **more)


# -------------------------------------------------------------------------------- ImageSet


def with_pixel(value):
    changed = PIXELS.double()
    changed[2, 1, 0, 1] = value
    return changed


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pixels": PIXELS.permute(0, 2, 3, 1)}, r"\(4, 2, 2, 3\); use images.permute\(0, 3, 1, 2"),
        ({"pixels": PIXELS.permute(0, 2, 3, 1).numpy()}, r"; use images.transpose\(0, 3, 1, 2\)"),
        ({"pixels": PIXELS[:, 0]}, r"got \(4, 2, 2\); use images\[:, None\]"),
        ({"pixels": PIXELS[:, :2]}, r"shape \(N, 3 or 1, H, W\), got \(4, 2, 2, 2\)"),
        ({"pixels": PIXELS.tolist()}, "must be an array or a tensor, got "),
        ({"pixels": PIXELS.long()}, "uint8 pixels or scaled floats, got torch.int64"),
        ({"pixels": PIXELS.half()}, "uint8 pixels or scaled floats, got torch.float16"),
        ({"pixels": PIXELS.numpy().astype(object)}, "images must be numbers, got array"),
        ({"pixels": with_pixel(1e300)}, "images must be finite, got .*inf"),
        ({"pixels": with_pixel(math.nan)}, "images must be finite, got nan"),
        ({"pixels": with_pixel(math.inf)}, "images must be finite, got .*inf"),
        ({"pixels": with_pixel(-math.inf)}, "images must be finite, got -inf"),
        ({"labels": LABELS.double()}, "labels must be int64 .*got torch.float64"),
        ({"labels": LABELS > 0}, "labels must be int64 .*got torch.bool"),
        ({"labels": list("abcb")}, "labels must be numbers, got"),
        ({"labels": 1}, r"labels must be int64 of shape \(4,\), got torch.int64 \(\)"),
        ({"labels": LABELS.numpy().astype(np.uint64) + 2**63}, "must be in 0..2, got -.* in row 0"),
        ({"labels": LABELS[:3]}, r"shape \(4,\), got torch.int64 \(3,\)"),
        ({"labels": LABELS - 1}, "labels must be in 0..2, got -1 in row 0"),
        ({"labels": LABELS + 1}, "labels must be in 0..2, got 3 in row 2"),
        ({"true_labels": LABELS + 1}, "true_labels must be in 0..2, got 3 in row 2"),
        ({"labels": LABELS * 10**9, "classes": ()}, r"in 0\.\.999, got 1000000000 in row 1"),
        ({"true_labels": LABELS + 1, "classes": ()}, r"true_labels must be in 0\.\.2, got 3"),
        ({"classes": ("a", "", "c")}, "class_names must be texts, none empty"),
        ({"classes": ("a", 1, "c")}, "class_names must be texts, none empty"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, text):
    with pytest.raises(InvalidValue, match=text):
        mine(**change)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int32, np.uint64])
@pytest.mark.parametrize("order", ["=", ">"])
def test_numpy_arrays_of_any_layout_are_taken_as_tensors_are(kind, order):
    pixels, labels = PIXELS.numpy()[::-1], LABELS.numpy().astype(np.dtype(kind).newbyteorder(order))
    labels.setflags(write=False)
    data = ImageSet(pixels, labels, true_labels=labels.tolist())
    assert torch.equal(data.images, PIXELS.flip(0))
    assert (data.labels.tolist(), data.labels.dtype) == (LABELS.tolist(), torch.int64)
    assert not data.corrupted.any()
    assert (data.name, data.split, data.class_names) == ("images", "train", ("0", "1", "2"))
    floats = ImageSet(pixels.astype(f"{order}f8"), labels).images
    assert torch.equal(floats, PIXELS.flip(0).float())


def test_a_grey_image_has_one_channel_and_a_set_gives_what_a_network_takes():
    data = mine(PIXELS[:, :1])
    x, label = data[2]
    assert torch.equal(x, PIXELS[2, :1] * (2 / 255) - 1)
    assert (x.dtype, label, type(label)) == (torch.float32, 2, int)
    assert torch.equal(mine(PIXELS[:, :1].float())[2][0], PIXELS[2, :1].float())  # scaled already


class Listed(Dataset):
    """Some images with their labels, as a `Dataset`."""

    def __init__(self, images, labels=(0, 1, 2, 1), classes=()):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], self.labels[row]


def pictures(pixels):
    """Images (C, H, W) as PIL has them."""
    pixels = pixels.permute(0, 2, 3, 1).squeeze(3).numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[:, :1]], ids=["colour", "grey"])
@pytest.mark.parametrize("kind", [pictures, lambda p: list(map(np.asarray, pictures(p))), list])
def test_the_images_of_a_dataset_are_those_of_the_set(kind, pixels):
    data = ImageSet.from_dataset(Listed(kind(pixels), classes=["a", 1, "c"]), "mine", "valid")
    assert torch.equal(data.images, pixels)
    assert torch.equal(data.labels, LABELS)
    assert (data.name, data.split, data.class_names) == ("mine", "valid", ("a", "1", "c"))


def test_a_set_is_a_dataset_and_again_the_same_set():
    again = ImageSet.from_dataset(mine())
    assert torch.equal(again.images, scale_pixels(PIXELS))
    assert (again.labels.tolist(), again.class_names) == (LABELS.tolist(), ("0", "1", "2"))
    (x, labels), *_ = DataLoader(mine(), batch_size=3)
    assert torch.equal(x, scale_pixels(PIXELS[:3]))
    assert torch.equal(labels, LABELS[:3])


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        (Listed([]), r"images must be of one shape, got \[\]"),
        (Listed([PIXELS[0], PIXELS[0, :1]]), r"one shape, got \[\(1, 2, 2\), \(3, 2, 2\)\]"),
        (Listed([PIXELS[0, 0, 0].numpy()]), r"an image must be \(H, W\) or \(H, W, C\), got array"),
        (Listed(PIXELS, ["a"] * 4), "labels must be numbers, got"),
    ],
)
def test_a_dataset_that_makes_no_set_is_refused(dataset, text):
    with pytest.raises(InvalidValue, match=text):
        ImageSet.from_dataset(dataset)


@pytest.mark.parametrize(("n", "count"), [(2, 2), (np.uint8(3), 3), (4, 4), (None, 4)])
def test_first_images_keep_their_labels_and_the_record(n, count):
    first = mine(provenance=("noted",), true_labels=LABELS.flip(0)).first(n)
    assert torch.equal(first.images, PIXELS[:count])
    assert torch.equal(first.labels, LABELS[:count])
    assert torch.equal(first.true_labels, LABELS.flip(0)[:count])
    assert first.provenance == ("noted",)


@pytest.mark.parametrize("n", [0, -1, 5, True, 2.0])
def test_first_of_too_many_or_none_is_refused(n):
    with pytest.raises(InvalidValue, match=f"mine train has 4 images, asked for {n}"):
        mine().first(n)


def test_at_most_takes_what_there_is():
    assert [len(mine().at_most(n)) for n in (2, 4, 5, None)] == [2, 4, 4, 4]


def test_corrupted_is_where_a_label_is_not_the_true_one():
    data = mine(true_labels=torch.tensor([0, 2, 2, 0]))
    assert data.corrupted.tolist() == [False, True, False, True]
    assert mine().corrupted.tolist() == [False] * 4


def test_hashes_are_of_little_endian_labels_and_of_type_shape_and_pixels():
    expected = hashlib.sha256(b"uint8 (4, 3, 2, 2)" + bytes(range(48))).hexdigest()
    assert mine().image_hash() == expected
    assert mine(PIXELS.to(memory_format=torch.channels_last)).image_hash() == expected
    assert mine().label_hash() == hashlib.sha256(struct.pack("<4q", 0, 1, 2, 1)).hexdigest()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("pixels", [PIXELS, PIXELS.float()])
def test_a_set_of_one_image_or_none_can_be_corrupted(n, pixels):
    data = mine(pixels[:n], LABELS[:n])
    for corrupt in (random_labels, shuffled_pixels, random_pixels, gaussian_inputs):
        assert len(corrupt(data, seed=0)) == n


# ------------------------------------------------------------------------- names and splits


@pytest.mark.parametrize(
    ("name", "split", "text"),
    [
        ("glyph", "train", "unknown data set 'glyph'; did you mean 'glyphs'"),
        ("cifar10", "validation", "unknown cifar10 split 'validation'; did you mean 'valid'"),
        ("glyphs", "extra", r"unknown glyphs split 'extra'.*allowed: train, valid, test"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, split, text):
    with pytest.raises(InvalidValue, match=text):
        load(name, split)


def test_sizes_are_those_of_pylearn2():
    assert SIZES["cifar10"] == {"train": 45_000, "valid": 5_000, "test": 10_000}
    assert SIZES["svhn"] == {
        "train": 73_257,
        "valid": 10 * (400 + 200),
        "test": 26_032,
        "extra": 531_131,
        "splitted_train": 73_257 + 531_131 - 6_000,
        "train_all": 73_257 + 531_131,
    }


# ------------------------------------------------------------------------------ drawn sets


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("glyphs", "0 1 2 3 4 5 6 7 8 9"),
        ("shapes", "arrow bowtie crescent cross disc heart ring square star triangle"),
        ("patterns", "0 1 2 3 4 5 6 7 8 9"),
    ],
)
def test_a_drawn_set_needs_no_file_and_follows_n_seed_and_split(name, classes, tmp_path):
    data = load(name, "train", root=tmp_path, n=20, seed=3)
    assert (len(data), data.name, data.split) == (20, name, "train")
    assert data.class_names == tuple(classes.split())
    others = [load(name, "train", n=20, seed=4), load(name, "test", n=20, seed=3)]
    assert len({each.image_hash() for each in (data, *others)}) == 3


def test_writing_into_a_drawn_set_does_not_reach_the_next_one():
    spoiled = load("glyphs", "train", n=20)
    before = spoiled.image_hash(), spoiled.label_hash()
    spoiled.images.fill_(1)
    spoiled.labels.fill_(1)
    again = load("glyphs", "train", n=20)
    assert (again.image_hash(), again.label_hash()) == before


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"n": 0}, "n must be a whole number, 1 or more, got 0"),
        ({"n": 1, "seed": -3}, "seed must be a whole number, 0 or more, got -3"),
        ({"n": 1, "seed": 0.5}, "seed must be a whole number, 0 or more, got 0.5"),
    ],
)
def test_bad_numbers_are_refused(argument, text):
    with pytest.raises(InvalidValue, match=text):
        load("glyphs", "train", **argument)


def test_a_drawn_split_has_its_stated_size():
    stated = {"train": 10_000, "valid": 2_000, "test": 2_000}
    assert SIZES["glyphs"] == SIZES["shapes"] == SIZES["patterns"] == stated
    assert {split: len(load("patterns", split)) for split in stated} == stated


# ------------------------------------------------------------- real sets, from a small double


FILES = {  # so many images each, in place of the published ones
    ("CIFAR10", True): 50_000,
    ("CIFAR10", False): 10_000,
    ("SVHN", "train"): 5_000,
    ("SVHN", "extra"): 3_000,
    ("SVHN", "test"): 200,
}


@pytest.fixture
def asked(monkeypatch):
    """Lets each image say in its first pixel from which file and row it is; what was read."""
    asked = []

    def read(kind, folder, download, **which):
        asked.append((kind, folder, download))
        (part,) = which.values()
        row = np.arange(FILES[kind, part])
        pixels = np.zeros((len(row), 1, 2, 3), np.uint8)
        pixels[:, 0, 0, 0] = list(FILES).index((kind, part))
        pixels[:, 0, 0, 1], pixels[:, 0, 0, 2] = np.divmod(row, 256)
        if kind == "CIFAR10":
            return SimpleNamespace(data=pixels, targets=(row % 10).tolist())
        return SimpleNamespace(data=pixels.transpose(0, 3, 1, 2), labels=row % 10)

    monkeypatch.setattr(images, "read_published", read)
    return asked


def file_of(data):
    return data.images[:, 0, 0, 0]


def row_of(data):
    return data.images[:, 1, 0, 0].long() * 256 + data.images[:, 2, 0, 0]


@pytest.mark.parametrize(
    ("split", "file", "first", "last"),
    [("train", 0, 0, 44_999), ("valid", 0, 45_000, 49_999), ("test", 1, 0, 9_999)],
)
def test_cifar10_is_split_by_row_in_the_order_of_the_files(asked, split, file, first, last):
    data = load("cifar10", split)
    assert data.images.shape == (SIZES["cifar10"][split], 3, 1, 2)
    assert torch.equal(row_of(data), torch.arange(first, last + 1))
    assert torch.equal(row_of(data) % 10, data.labels)
    assert file_of(data).unique().tolist() == [file]
    assert data.class_names == CIFAR10_CLASSES


# Images of each class from each file, and how the SHA-256 of all in their order begins.
SVHN_SPLITS = {
    "train": (500, 0, 0, "c9b0268f827f9d62"),
    "extra": (0, 300, 0, "acc5067dba996206"),
    "test": (0, 0, 20, "a6cadcbc27f125c0"),
    "train_all": (500, 300, 0, "9f859e1d62868304"),
    "valid": (400, 200, 0, "cb67f8c5c211f31e"),
    "splitted_train": (100, 100, 0, "68eb7d415f6280cb"),
}


def members(data):
    return set(zip(file_of(data).tolist(), row_of(data).tolist(), strict=True))


@pytest.mark.parametrize("split", SVHN_SPLITS)
def test_svhn_split_has_so_many_of_each_class_of_each_file_in_a_fixed_order(asked, split):
    data = load("svhn", split)
    *counts, digest = SVHN_SPLITS[split]
    for file, count in enumerate(counts, start=2):
        labels = data.labels[file_of(data) == file]
        assert torch.bincount(labels, minlength=10).tolist() == [count] * 10
    assert len(members(data)) == len(data)  # no image twice
    assert data.image_hash()[:16] == digest


def test_svhn_class_is_digit_minus_one_so_that_zero_comes_last(asked):
    data = load("svhn", "test")
    digits = (row_of(data) % 10).tolist()
    assert [SVHN_CLASSES[label] for label in data.labels] == [str(digit) for digit in digits]
    assert tuple("1234567890") == SVHN_CLASSES == data.class_names


def test_svhn_validation_images_are_4000_of_train_and_none_of_splitted_train(asked):
    train, valid, rest = (members(load("svhn", s)) for s in ("train", "valid", "splitted_train"))
    assert len(valid & train) == 4_000
    assert not valid & rest


def test_svhn_is_shuffled_once_by_the_seed_of_pylearn2(asked):
    order = np.arange(5_000)
    np.random.RandomState(322).shuffle(order)
    assert row_of(load("svhn", "train")).tolist() == order.tolist()


def test_root_download_and_n_reach_the_reader(asked, tmp_path, monkeypatch):
    load("svhn", "test", root=tmp_path / "a", download=True)
    monkeypatch.setenv("BNNLIB_DATA", str(tmp_path / "b"))
    load("svhn", "test")
    monkeypatch.delenv("BNNLIB_DATA")
    assert len(load("svhn", "test", n=3)) == 3
    assert asked == [
        ("SVHN", tmp_path / "a", True),
        ("SVHN", tmp_path / "b", False),
        ("SVHN", Path("data"), False),
    ]
    with pytest.raises(InvalidValue, match="root must be the path of a folder, got ''"):
        load("svhn", "test", root="")


# ------------------------------------------------------------------------------- .npz files


def test_npz_is_looked_for_here_and_then_in_root(npz, tmp_path, monkeypatch):
    npz(images=PIXELS, labels=LABELS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert len(load("mine.npz", "train", root=tmp_path)) == 4
    monkeypatch.setenv("BNNLIB_DATA", str(tmp_path))
    assert len(load("mine.npz", "train", n=2)) == 2
    np.savez("mine.npz", images=PIXELS[:1], labels=LABELS[:1])
    assert len(load("mine.npz", "train")) == 1
    with pytest.raises(DataNotFound, match=r"no file .*yours\.npz; .* then in the data folder"):
        load("yours.npz", "train")
    with pytest.raises(DataNotFound, match=r"no file .*`python -m bnnlib svhn-subset` makes it"):
        load(SVHN_SUBSET, "train")


# ------------------------------------------------------------- real sets, where they are kept


DATA = Path(os.environ.get("BNNLIB_DATA") or "no data folder")


@pytest.mark.skipif(
    not (DATA / "cifar-10-batches-py").is_dir(), reason="no CIFAR-10 in the folder BNNLIB_DATA"
)
def test_real_cifar10_has_the_published_counts_and_first_labels():
    train, valid, test = (load("cifar10", split) for split in ("train", "valid", "test"))
    assert [data.images.shape[0] for data in (train, valid, test)] == [45_000, 5_000, 10_000]
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert torch.bincount(torch.cat([train.labels, valid.labels])).tolist() == [5_000] * 10


@pytest.mark.skipif(
    not (DATA / SVHN_SUBSET).is_file(), reason=f"no {SVHN_SUBSET} in the folder BNNLIB_DATA"
)
def test_real_subset_of_svhn_is_what_the_stored_runs_read():
    assert write_svhn_subset() == (DATA / SVHN_SUBSET, False)  # its checksums are compared
    run = Path(__file__).parents[2] / "results/svhn-true-labels/reduced-seed0/experiment.json"
    record = json.loads(run.read_text())
    for split, count in (("train", 881), ("test", 202)):
        data = load(SVHN_SUBSET, split)
        assert len(data) == count
        assert data.image_hash() == record["image_sha256"][split]
        assert data.label_hash() == record["label_sha256"][split]
