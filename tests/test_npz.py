import io
import struct
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_BZIP2, ZipFile

import numpy as np
import pytest

import bnnlib.npz
from benchmarks.mutations import mutations
from bnnlib.data import load_npz
from bnnlib.errors import BnnlibError, DamagedFile, DataNotFound, InvalidValue, TooLarge
from bnnlib.npz import read_split

IMAGES = np.arange(5 * 3 * 2 * 2, dtype=np.uint8).reshape(5, 3, 2, 2)
LABELS = np.array([3, 1, 4, 1, 5])
PAIR = {"images": IMAGES, "labels": LABELS}


def bytes_of(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array))
    return file.getvalue()


def refusal(path, split="train", kind=InvalidValue):
    """The text of the error, after a look that it is one line that names the file."""
    with pytest.raises(kind) as caught:
        read_split(path, split)
    text = str(caught.value)
    assert str(path) in text
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    return text


# ------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, ">i4"])
def test_plain_images_and_labels_are_the_training_set(npz, dtype):
    images, labels, names = read_split(npz(images=IMAGES, labels=LABELS.astype(dtype)), "train")
    assert np.array_equal(images, IMAGES)
    assert (labels.dtype, labels.tolist()) == (np.int64, LABELS.tolist())
    assert names == tuple("0123456789")


def test_prefixed_arrays_are_splits(npz):
    path = npz(
        train_images=IMAGES, train_labels=LABELS, test_images=IMAGES[:2], test_labels=LABELS[:2]
    )
    assert [len(read_split(path, split)[0]) for split in ("train", "test")] == [5, 2]


@pytest.mark.parametrize("dtype", [np.int64, bool, np.float32])
def test_heldout_rows_are_the_test_set(npz, dtype):
    path = npz(**PAIR, heldout=np.array([0, 1, 0, 0, 1], dtype))
    assert read_split(path, "train")[1].tolist() == [3, 4, 1]
    assert read_split(path, "test")[1].tolist() == [1, 5]
    assert np.array_equal(read_split(path, "test")[0], IMAGES[[1, 4]])


def test_images_in_another_order_of_memory_are_read(npz):
    images = read_split(npz(images=np.asfortranarray(IMAGES), labels=LABELS), "train")[0]
    assert np.array_equal(images, IMAGES)
    assert images.flags.c_contiguous


def test_class_names_are_read_and_more_classes_are_numbered(npz):
    names = ["w", "x", "y", "z", "u", "v"]
    assert read_split(npz(**PAIR, class_names=names), "train")[2] == tuple(names)
    assert len(read_split(npz(images=IMAGES, labels=LABELS + 8), "train")[2]) == 14


def test_all_splits_have_the_classes_of_the_highest_label(npz):
    path = npz(**PAIR, test_images=IMAGES, test_labels=LABELS + 8)
    assert [len(read_split(path, split)[2]) for split in ("train", "test")] == [14, 14]


def test_other_arrays_are_left_alone(npz):
    path = npz(**PAIR, all_labels=LABELS, group=[1.5], notes="by hand")
    assert read_split(path, "train")[1].tolist() == LABELS.tolist()


# -------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": IMAGES}, "images is there, labels is not; (arrays: images)"),
        ({"labels": LABELS}, "labels is there, images is not; (arrays: labels)"),
        (
            {"train_images": IMAGES, "train_lables": LABELS},
            "train_images is there, train_labels is not; did you mean 'train_lables'? "
            "(arrays: train_images, train_lables)",
        ),
        (
            {"x": IMAGES, "y": LABELS},
            "no 'images' with 'labels', with or without a prefix; (arrays: x, y)",
        ),
        ({}, "no 'images' with 'labels', with or without a prefix; (arrays: none)"),
        (
            PAIR | {"train_images": IMAGES, "train_labels": LABELS},
            "images and train_images are both split 'train'; keep one",
        ),
        (
            PAIR | {"test_images": IMAGES, "test_labels": LABELS, "heldout": [0, 0, 0, 1, 1]},
            "heldout and test_images are both split 'test'; keep one",
        ),
        (
            PAIR | {"test_images": np.zeros((1, 3, 4, 4), np.uint8), "test_labels": [0]},
            "the splits have images of different sizes: [(2, 2), (4, 4)]",
        ),
    ],
)
def test_names_that_do_not_fit_are_refused(npz, arrays, text):
    assert refusal(npz(**arrays)).endswith(f"mine.npz: {text}")


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (IMAGES.astype(np.float64), "must be uint8, pixels from 0 to 255, got float64"),
        (IMAGES.astype(np.float32), "must be uint8, pixels from 0 to 255, got float32"),
        (IMAGES.astype(np.int64), "must be uint8, pixels from 0 to 255, got int64"),
        (IMAGES.astype("U1"), "must be uint8, pixels from 0 to 255, got <U1"),
        (
            IMAGES.transpose(0, 2, 3, 1),
            "must have shape (N, 3, H, W), got (5, 2, 2, 3); use images.transpose(0, 3, 1, 2)",
        ),
        (IMAGES[0], "must have shape (N, 3, H, W), got (3, 2, 2)"),
        (IMAGES[:, :1], "must have shape (N, 3, H, W), got (5, 1, 2, 2)"),
        (IMAGES[..., :0], "must have shape (N, 3, H, W), got (5, 3, 2, 0)"),
        (np.uint8(3), "must have shape (N, 3, H, W), got ()"),
    ],
)
def test_images_that_do_not_fit_are_refused(npz, images, text):
    assert refusal(npz(images=images, labels=LABELS)).endswith(f"mine.npz: images {text}")


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (LABELS.astype(float), "must be integers, got float64"),
        (np.array([0, 1, np.nan, 1, 0]), "must be integers, got float64, with NaN"),
        (LABELS > 3, "must be integers, got bool"),
        (LABELS.astype(str), "must be integers, got <U21"),
        (LABELS[:4], "must have shape (5,), one for each image, got (4,)"),
        (LABELS[:, None], "must have shape (5,), one for each image, got (5, 1)"),
        (LABELS - 2, "must be in 0..999, got -1 in row 1"),
        (LABELS * 10**9, "must be in 0..999, got 3000000000 in row 0"),
        (LABELS.astype(np.uint64) + 2**63, "must be in 0..999, got 9223372036854775811 in row 0"),
        (LABELS + 996, "must be in 0..999, got 1000 in row 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(npz, labels, text):
    assert refusal(npz(images=IMAGES, labels=labels)).endswith(f"mine.npz: labels {text}")


@pytest.mark.parametrize(
    ("heldout", "text"),
    [
        ([0, 1], "must be a 0 or 1 for each of the 5 images, got int64 (2,)"),
        ([[0, 1, 0, 1, 0]], "must be a 0 or 1 for each of the 5 images, got int64 (1, 5)"),
        (list("01010"), "must be a 0 or 1 for each of the 5 images, got <U1 (5,)"),
        ([0, 1, 2, 0, 0], "must be 0 or 1, got 2 in row 2"),
        ([0, 1, 0.5, 0, 0], "must be 0 or 1, got 0.5 in row 2"),
        ([0, 1, 0, 0, np.nan], "must be 0 or 1, got nan in row 4"),
    ],
)
def test_heldout_that_does_not_fit_is_refused(npz, heldout, text):
    assert refusal(npz(**PAIR, heldout=heldout)).endswith(f"mine.npz: heldout {text}")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([3, 4, 5, 6, 7, 8], "class_names must be 1 to 1000 texts in a row, got int64 (6,)"),
        ([list("abcdef")], "class_names must be 1 to 1000 texts in a row, got <U1 (1, 6)"),
        (np.zeros(0, "U3"), "class_names must be 1 to 1000 texts in a row, got <U3 (0,)"),
        (list("abcdea"), "class_names must differ, got 'a' twice"),
        (["a", "", "c", "d", "e", "f"], "class_names must be printable, got '' for class 1"),
        (
            ["a", "b", "c\033[2J", "d", "e", "f"],
            r"class_names must be printable, got 'c\x1b[2J' for class 2",
        ),
        (["a", "b"], "labels must be in 0..1 (class_names), got 3 in row 0"),
        (
            np.array([0x110000] * 6, "<u4").view("<U1"),
            "class_names must be text, got what is no Unicode",
        ),
        (
            np.array([0x110000] * 6, ">u4").view(">U1"),
            "class_names must be text, got what is no Unicode",
        ),
    ],
)
def test_class_names_that_do_not_fit_are_refused(npz, names, text):
    assert refusal(npz(**PAIR, class_names=names)).endswith(f"mine.npz: {text}")


@pytest.mark.parametrize(
    ("arrays", "split"),
    [
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "train"),
        (PAIR | {"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "test"),
        (PAIR | {"heldout": [0] * 5}, "test"),
        (PAIR | {"heldout": [1] * 5}, "train"),
    ],
)
def test_a_split_without_images_is_refused_by_name(npz, arrays, split):
    assert refusal(npz(**arrays), split).endswith(f"split '{split}' holds no images")


def test_an_unknown_split_names_those_of_the_file(npz):
    path = npz(train_images=IMAGES, train_labels=LABELS, heldout=[0, 0, 0, 0, 1])
    assert refusal(path, "trian").endswith(
        "unknown split 'trian'; did you mean 'train'? (allowed: train, test)"
    )


# --------------------------------------------------------------------------- strangers' files


class Intruder:
    """Unpickling it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_pickled_objects_are_not_unpickled(npz, tmp_path):
    intruder = Intruder(tmp_path / "executed")
    path = npz(images=np.array([intruder]), labels=LABELS)
    assert "only numbers and text are read" in refusal(path, kind=DamagedFile)
    mixed = np.array([(1, intruder)], [("a", "i4"), ("b", "O")])
    refusal(npz(images=mixed, labels=LABELS), kind=DamagedFile)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short", bytes_of(IMAGES)])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    assert "is not a whole .npz file of arrays: File is not a zip file" in refusal(
        path, kind=DamagedFile
    )


def test_where_no_file_is_the_places_are_named(tmp_path):
    assert "no file" in refusal(tmp_path / "mine.npz", kind=DataNotFound)


def test_a_folder_and_a_loop_of_links_are_refused(tmp_path):
    (tmp_path / "mine.npz").mkdir()
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    for name in ("mine.npz", "loop.npz"):
        assert "a folder, a device or a broken link" in refusal(tmp_path / name, kind=DamagedFile)


def test_a_file_that_cannot_be_read_is_refused(npz, monkeypatch):
    def no_access(*args):
        raise PermissionError(13, "Permission denied")

    path = npz(**PAIR)
    monkeypatch.setattr(bnnlib.npz, "ZipFile", no_access)
    assert "cannot be read: Permission denied" in refusal(path, kind=DamagedFile)


def header(shape, descr="|u1"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (header((10**12, 3, 32, 32)), "has not the size that it says"),
        (header((10**400,)), "has not the size that it says"),
        (header((-1, 3, 32, 32)), "has not the size that it says"),
        (header((5,), "|S0"), "only numbers and text are read"),
        (header((5,), "|V8") + bytes(40), "only numbers and text are read"),
        (header((5,), "(" * 500), "'images.npy'|descr"),
        (header("(" * 9000), "header"),
        (b"\x93NUMPY\1\0\xff\xff" + b"{" * 0xFFFF, "Header info length"),
        (b"\x93NUMPY\7\0", "version"),
        (b"no array", "magic"),
    ],
)
def test_headers_with_absurd_sizes_are_refused_before_memory_is_taken(tmp_path, content, text):
    path = tmp_path / "mine.npz"
    with ZipFile(path, "w") as archive:
        archive.writestr("images.npy", content)
        archive.writestr("labels.npy", bytes_of(LABELS))
    assert any(part in refusal(path, kind=DamagedFile) for part in text.split("|"))


def test_what_would_not_fit_into_memory_is_refused(npz, tmp_path, monkeypatch):
    path = tmp_path / "mine.npz"
    with ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header((10**13, 1, 1, 1)))
        archive.infolist()[0].file_size = 10**13 + len(header((10**13, 1, 1, 1)))
    assert "it unpacks to 10 TB" in refusal(path, kind=TooLarge)
    memory = SimpleNamespace(available=100)
    monkeypatch.setattr(bnnlib.npz.psutil, "virtual_memory", lambda: memory)
    assert "100 bytes are free" in refusal(npz(**PAIR), kind=TooLarge)


def write_zip(path, members, **options):
    with ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("images.npy", "images.npy"), ("images.npy", "images")])
def test_two_arrays_of_one_name_are_refused(tmp_path, names):
    path = write_zip(tmp_path / "mine.npz", [(name, bytes_of(IMAGES)) for name in names])
    assert "two arrays have the same name" in refusal(path, kind=DamagedFile)


def test_names_that_a_terminal_obeys_are_refused(tmp_path):
    path = write_zip(tmp_path / "mine.npz", [("\033[2J_images.npy", bytes_of(IMAGES))])
    assert r"an array has the name '\x1b[2J_images'" in refusal(path, kind=DamagedFile)


def test_thousands_of_arrays_are_refused(tmp_path):
    path = write_zip(tmp_path / "mine.npz", [(f"{i}.npy", bytes_of(0)) for i in range(101)])
    assert "it holds 101 arrays, at most 100" in refusal(path, kind=DamagedFile)


def test_only_what_numpy_packs_is_unpacked(tmp_path):
    path = write_zip(tmp_path / "mine.npz", [("a.npy", bytes_of(0))], compression=ZIP_BZIP2)
    assert "packed in a way that NumPy does not write" in refusal(path, kind=DamagedFile)


# ------------------------------------------------------------------------------------ damage


def survivor(path, content):
    """The split "test" of a file with this content, or None where it is refused."""
    path.write_bytes(content)
    try:
        return load_npz(path, "test")
    except BnnlibError as error:
        return None if str(error).isprintable() else error


WHOLE = PAIR | {"heldout": np.array([0, 1, 0, 0, 1]), "class_names": np.array(list("uvwxyz"))}


@pytest.mark.filterwarnings("ignore")  # NumPy warns of some headers
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path, save):
    path = tmp_path / "mine.npz"
    save(path, **WHOLE)
    whole = load_npz(path, "test")
    read = [survivor(path, content) for content in mutations(path.read_bytes(), 300, seed=0)]
    for data in filter(None, read):
        assert data.image_hash() == whole.image_hash()
        assert (data.label_hash(), data.class_names) == (whole.label_hash(), whole.class_names)
    assert read.count(None) > 250


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_array_in_a_whole_archive_does_no_harm(tmp_path, name):
    path, others = tmp_path / "mine.npz", {key: WHOLE[key] for key in WHOLE if key != name}
    for content in mutations(bytes_of(WHOLE[name]), 100, seed=0):
        members = [(f"{key}.npy", bytes_of(array)) for key, array in others.items()]
        write_zip(path, [*members, (f"{name}.npy", content)])
        data = survivor(path, path.read_bytes())
        assert data is None or len(data) == len(data.images) > 0
    assert list(tmp_path.iterdir()) == [path]


def test_an_array_that_the_directory_has_lost_is_missed(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **WHOLE)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"heldout.npy") - 46  # its comment is made to swallow the next entry
    content[entry + 32] = 46 + len("class_names.npy")
    path.write_bytes(content)
    assert "class_names.npy" not in ZipFile(path).namelist()
    assert "its directory is damaged" in refusal(path, kind=DamagedFile)
