"""`.npz` files: which arrays are a split, what is refused and how, and what damage does."""

import io
import random
from zipfile import ZipFile

import numpy as np
import pytest

from bnnlib.data.images import load_npz
from bnnlib.data.npz import read_npz
from bnnlib.errors import BnnlibError, DamagedFile, DataNotFound, InvalidValue

IMAGES = np.arange(5 * 3 * 2 * 2, dtype=np.uint8).reshape(5, 3, 2, 2)
LABELS = np.array([3, 1, 4, 1, 5])
PAIR = {"images": IMAGES, "labels": LABELS}
TRAIN = {"train_images": IMAGES, "train_labels": LABELS}
TEST = {"test_images": IMAGES, "test_labels": LABELS}
WHOLE = PAIR | {"heldout": np.array([0, 1, 0, 0, 1]), "class_names": np.array(list("uvwxyz"))}


def bytes_of(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array))
    return file.getvalue()


def write_zip(path, contents):
    with ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)


# ------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:, :1], IMAGES[..., :1]])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, ">i4"])
def test_plain_images_and_labels_are_the_training_set(npz, dtype, images):
    other = np.asfortranarray(images)  # in another order in memory
    data = load_npz(npz(images=other, labels=LABELS.astype(dtype), notes="by hand"), "train")
    assert np.array_equal(data.images.numpy(), images)
    assert data.images.is_contiguous()
    assert data.labels.tolist() == LABELS.tolist()
    assert (data.name, data.split, data.class_names) == ("mine", "train", tuple("0123456789"))


def test_prefixed_arrays_are_splits_with_the_classes_of_the_highest_label(npz):
    path = npz(**TRAIN, test_images=IMAGES[:2], test_labels=[999, 8])
    train, test = load_npz(path, "train"), load_npz(path, "test")
    assert (len(train), test.labels.tolist()) == (5, [999, 8])
    assert train.class_names == test.class_names == tuple(str(label) for label in range(1000))


@pytest.mark.parametrize("dtype", [np.int64, bool, np.float32])
def test_heldout_rows_are_the_test_set(npz, dtype):
    path = npz(**WHOLE | {"heldout": WHOLE["heldout"].astype(dtype)})
    train, test = load_npz(path, "train"), load_npz(path, "test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([3, 4, 1], [1, 5])
    assert np.array_equal(test.images.numpy(), IMAGES[[1, 4]])
    assert train.class_names == test.class_names == tuple("uvwxyz")


def test_any_numbers_and_texts_are_read_by_name(npz):
    kinds = {"a": [1.5], "b": 3, "c": "text", "d": [1j], "e": [True], "f": [b"bytes"]}
    assert {name: array.tolist() for name, array in read_npz(npz(**kinds)).items()} == kinds


# -------------------------------------------------------------------------- what does not fit


NO_PAIR = "no arrays train_images and train_labels (the split 'train': or images and labels)"


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": IMAGES}, f"{NO_PAIR}; (arrays: images)"),
        ({"train_labels": LABELS, "x": IMAGES}, f"{NO_PAIR}; (arrays: train_labels, x)"),
        ({}, f"{NO_PAIR}; (arrays: none)"),
        (PAIR | TRAIN, "images and train_images are both split 'train'; keep one"),
        (WHOLE | TEST, "heldout and test_images are both split 'test'; keep one"),
        (
            PAIR | TEST | {"test_images": np.zeros((5, 3, 4, 4), np.uint8)},
            "the splits have images of different sizes: [(3, 2, 2), (3, 4, 4)]",
        ),
        (
            PAIR | TEST | {"test_images": IMAGES[:, :1]},
            "the splits have images of different sizes: [(1, 2, 2), (3, 2, 2)]",
        ),
        (PAIR | TEST | {"test_labels": -LABELS}, "test_labels must be in 0..999, got -3 in row 0"),
        (WHOLE | {"labels": LABELS + 1}, "labels must be in 0..5 (class_names), got 6 in row 4"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "split 'train' holds no images"),
        (PAIR | {"heldout": [1] * 5}, "split 'train' holds no images"),
    ],
)
def test_arrays_that_make_no_training_set_are_refused(npz, refusal, arrays, text):
    path = npz(**arrays)
    assert refusal(InvalidValue, load_npz, path, "train") == f"{path}: {text}"


MUST = {
    "images": "images must be uint8 of shape (N, 3 or 1, H, W), got ",
    "labels": "labels must be ",
    "heldout": "heldout must be 0 or 1 for each of 5 images, got ",
    "class_names": "class_names must be 1 to 1000 printable texts that differ, got ",
}


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("images", IMAGES.astype(np.float32), "float32 (5, 3, 2, 2)"),
        (
            *("images", IMAGES.transpose(0, 2, 3, 1)),
            "uint8 (5, 2, 2, 3); use images.transpose(0, 3, 1, 2)",
        ),
        (
            *("images", IMAGES[:, :1].transpose(0, 2, 3, 1)),
            "uint8 (5, 2, 2, 1); use images.transpose(0, 3, 1, 2)",
        ),
        ("images", IMAGES[:, 0], "uint8 (5, 2, 2); use images[:, None]"),
        ("images", IMAGES[0, 0], "uint8 (2, 2)"),
        ("images", IMAGES[:, :2], "uint8 (5, 2, 2, 2)"),
        ("images", IMAGES[..., :0], "uint8 (5, 3, 2, 0)"),
        ("labels", LABELS.astype(float), "5 integers, one for each image, got float64 (5,)"),
        ("labels", LABELS > 3, "5 integers, one for each image, got bool (5,)"),
        ("labels", LABELS.astype(str), "5 integers, one for each image, got <U21 (5,)"),
        ("labels", LABELS[:4], "5 integers, one for each image, got int64 (4,)"),
        ("labels", LABELS[:, None], "5 integers, one for each image, got int64 (5, 1)"),
        ("labels", LABELS.astype(np.uint64) + 2**63, f"in 0..999, got {2**63 + 3} in row 0"),
        ("labels", LABELS + 996, "in 0..999, got 1000 in row 2"),
        ("heldout", [0, 1], "array([0, 1]) (2,)"),
        ("heldout", [[0, 1, 0, 1, 0]], "array([[0, 1, 0, 1, 0]]) (1, 5)"),
        ("heldout", list("01010"), "array(['0', '1', '0', '1', '0'], dtype='<U1') (5,)"),
        ("heldout", [0, 1, 2, 0, 0], "array([0, 1, 2, 0, 0]) (5,)"),
        ("heldout", [0, 1, 0, 0, np.nan], "array([ 0., 1., 0., 0., nan]) (5,)"),
        ("class_names", [3, 4, 5, 6, 7, 8], "int64 (6,)"),
        ("class_names", [list("abcdef")], "<U1 (1, 6)"),
        ("class_names", np.zeros(0, "U3"), "<U3 (0,)"),
        ("class_names", [str(i) for i in range(1001)], "<U4 (1001,)"),
        ("class_names", list("abcdea"), "'a' for class 5"),
        ("class_names", ["a", "", "c", "d", "e", "f"], "'' for class 1"),
        ("class_names", ["a", "b", "c\033[2J", "d", "e", "f"], r"'c\x1b[2J' for class 2"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(npz, refusal, name, array, text):
    path = npz(**PAIR | {name: array})
    assert refusal(InvalidValue, load_npz, path, "train") == f"{path}: {MUST[name]}{text}"


def test_an_unknown_split_is_refused_with_the_nearest(npz, refusal):
    text = refusal(InvalidValue, load_npz, npz(**WHOLE), "trian")
    assert text.endswith("; did you mean 'train'? (arrays: class_names, heldout, images, labels)")


# --------------------------------------------------------------------------- strangers' files


def test_pickled_objects_are_not_unpickled(npz, refusal, intruder):
    for array in np.array([intruder]), np.array([(1, intruder)], [("a", "i4"), ("b", "O")]):
        path = npz(images=array, labels=LABELS)
        text = refusal(DamagedFile, load_npz, path, "train")
        assert "Object arrays cannot be loaded" in text
    np.array([intruder]).dump(path)
    refusal(DamagedFile, load_npz, path, "train")
    assert not intruder.trace.exists()
    np.load(path, allow_pickle=True)
    assert intruder.trace.exists()  # so this test would notice


def test_what_is_no_file_is_refused(tmp_path, refusal):
    path = tmp_path / "mine.npz"
    assert f"no file {path}" in refusal(DataNotFound, load_npz, path, "train")
    path.symlink_to(path)
    text = refusal(DamagedFile, load_npz, path, "train")
    assert text.startswith(f"{path} is a folder, a device or a broken link")
    path.unlink()
    path.mkdir()
    refusal(DamagedFile, load_npz, path, "train")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short", bytes_of(IMAGES)])
def test_a_file_that_is_no_npz_is_refused_with_the_remedy(tmp_path, refusal, content):
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    text = refusal(DamagedFile, load_npz, path, "train")
    assert text.startswith(f"{path} is not a whole .npz file: ")
    assert text.endswith("; write it again with numpy.savez")


def header(shape, descr="|u1"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("images", header((10**12, 3, 32, 32))),
        ("images", header((10**400,))),
        ("images", header((-1, 3, 32, 32))),
        ("images", header((5,), "|V8") + bytes(40)),
        ("images", header((5,), "(" * 500)),
        ("images", b"\x93NUMPY\7\0"),
        ("images", b"no array"),
        ("class_names", bytes_of(np.array([0x110000] * 6, "<u4").view("<U1"))),  # no Unicode
        ("\033[2J_images", bytes_of(IMAGES)),  # a terminal would obey
        ("x" * 101, bytes_of(IMAGES)),
    ],
)
def test_what_no_honest_program_writes_is_refused(tmp_path, refusal, name, content):
    path = tmp_path / "mine.npz"
    write_zip(path, {name: content, "labels": bytes_of(LABELS)})
    assert "is not a whole .npz file" in refusal(DamagedFile, load_npz, path, "train")


# ------------------------------------------------------------------------------------ damage


def damaged(content, count):
    """`count` copies of `content`: cut short, with a byte changed, or a part gone or doubled."""
    rng = random.Random(0)
    for _ in range(count):
        start, end = sorted(rng.sample(range(len(content)), 2))
        other = bytes([content[start] ^ rng.randrange(1, 256)])
        yield rng.choice(
            [
                content[:start],
                content[:start] + other + content[start + 1 :],
                content[:start] + content[end:],
                content[:end] + content[start:],
            ]
        )


def survivor(path):
    """The split "test" of a file, or None where it is refused."""
    try:
        return load_npz(path, "test")
    except BnnlibError:
        return None


@pytest.mark.filterwarnings("ignore")  # NumPy warns of some headers
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path, save):
    path = tmp_path / "mine.npz"
    save(path, **WHOLE)
    whole, refused = load_npz(path, "test"), 0
    for content in damaged(path.read_bytes(), 300):
        path.write_bytes(content)
        if (data := survivor(path)) is None:
            refused += 1
        else:
            assert data.image_hash() == whole.image_hash()
            assert data.label_hash() == whole.label_hash()
    assert refused > 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_array_in_a_whole_archive_does_no_harm(tmp_path, name):
    contents = {key: bytes_of(array) for key, array in WHOLE.items()}
    for content in damaged(contents[name], 100):
        write_zip(tmp_path / "mine.npz", contents | {name: content})
        data = survivor(tmp_path / "mine.npz")
        assert data is None or len(data) == len(data.images) > 0
