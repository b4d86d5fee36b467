"""Downloads from a server of our own, checksums, and the part of SVHN that stored runs read."""

import hashlib
import io
import os
import pickle
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from scipy.io import savemat

from bnnlib.data import published
from bnnlib.data.images import load
from bnnlib.data.npz import read_npz
from bnnlib.data.published import RETRIES, fetch, import_torchvision_datasets, write_svhn_subset
from bnnlib.errors import CannotWrite, DamagedFile, DataNotFound, DownloadFailed, FolderInUse
from bnnlib.files import locked
from bnnlib.names import SVHN_SUBSET

CONTENT = bytes(range(256)) * 300


def md5(content):
    return hashlib.md5(content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


class Server(ThreadingHTTPServer):
    """Serves `files` by name; those in `broken` end early, so many times."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.broken, self.asked = {}, {}, []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        self.server.asked.append(name)
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        breaks_off = self.server.broken.get(name, 0) > 0
        self.server.broken[name] = self.server.broken.get(name, 0) - 1
        self.wfile.write(content[: len(content) // 2] if breaks_off else content)

    def log_message(self, *args):
        """Nothing on the terminal."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# ---------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("breaks", [0, 1])
def test_a_file_is_fetched_in_a_second_attempt_too_and_nothing_else_is_left(
    server, tmp_path, breaks
):
    server.files["a.mat"], server.broken["a.mat"] = CONTENT, breaks
    fetch(server.url("a.mat"), tmp_path / "a.mat", f"md5:{md5(CONTENT)}")
    assert (tmp_path / "a.mat").read_bytes() == CONTENT
    assert (tmp_path / "a.mat").stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mat"]
    assert server.asked == ["a.mat"] * (breaks + 1)


@pytest.mark.parametrize(
    ("files", "broken", "reason"),
    [
        ({"a.mat": CONTENT}, 99, "Connection broken"),
        ({"a.mat": CONTENT[:-1]}, 0, f"but got {md5(CONTENT[:-1])}"),
        ({}, 0, "404 Client Error"),
    ],
)
def test_what_does_not_arrive_whole_is_not_kept(server, tmp_path, refusal, files, broken, reason):
    server.files, server.broken = files, {"a.mat": broken}
    url, path = server.url("a.mat"), tmp_path / "a.mat"
    text = refusal(DownloadFailed, fetch, url, path, f"md5:{md5(CONTENT)}")
    assert text.startswith(f"{url} could not be fetched in {RETRIES + 1} attempts: ")
    assert reason in text
    assert text.endswith(f"; try again later, or get a.mat elsewhere and put it into {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    assert len(server.asked) == RETRIES + 1


def test_where_no_server_answers_that_is_said(server, tmp_path, refusal):
    url = server.url("a.mat")
    server.server_close()
    text = refusal(DownloadFailed, fetch, url, tmp_path / "a.mat", f"md5:{md5(CONTENT)}")
    assert "Connection refused" in text


def test_a_full_disk_is_said_and_nothing_is_left(server, tmp_path, refusal, monkeypatch):
    server.files["a.mat"] = CONTENT
    monkeypatch.setattr("pooch.core.shutil.move", full)
    path = tmp_path / "a.mat"
    text = refusal(CannotWrite, fetch, server.url("a.mat"), path, f"md5:{md5(CONTENT)}")
    assert text == f"{path} cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------- CIFAR-10 and SVHN of our own, served


TRAIN, TEST, META = "data_batch_1", "test_batch", "batches.meta"
BASE = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"


def tar(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def publish(server, monkeypatch):
    """Lets torchvision's tables, and ours, say that these are CIFAR-10's files."""
    cifar10 = import_torchvision_datasets().CIFAR10

    def say(files, archive):
        server.files[ARCHIVE] = archive
        monkeypatch.setattr(cifar10, "url", server.url(ARCHIVE))
        monkeypatch.setattr(cifar10, "tgz_md5", md5(archive))
        monkeypatch.setattr(cifar10, "train_list", [[TRAIN, md5(files[TRAIN])]])
        monkeypatch.setattr(cifar10, "test_list", [[TEST, md5(files[TEST])]])
        monkeypatch.setitem(cifar10.meta, "md5", md5(files[META]))
        sums = {name: sha256(content) for name, content in files.items()}
        monkeypatch.setattr(published, "CIFAR10_SHA256", sums)

    return say


@pytest.fixture
def cifar10(publish):
    """Three files of a CIFAR-10 with 7 images in all, by name; they are published."""

    def batch(n):
        pixels = np.arange(n * 3072, dtype=np.uint32).astype(np.uint8).reshape(n, 3072)
        return pickle.dumps({"data": pixels, "labels": list(range(n))})

    files = {TRAIN: batch(4), TEST: batch(3), META: pickle.dumps({"label_names": []})}
    inside = {f"{BASE}/{name}": content for name, content in files.items()}
    publish(files, tar(inside | {"../climbs.out": b"x", f"{BASE}/readme.html": b"x"}))
    return files


def test_cifar10_is_fetched_once_and_then_read(cifar10, server, tmp_path):
    folder = tmp_path / "data"
    assert load("cifar10", "train", folder, download=True).labels.tolist() == [0, 1, 2, 3]
    assert load("cifar10", "test", folder, download=True).labels.tolist() == [0, 1, 2]
    assert load("cifar10", "test", folder).images.shape == (3, 3, 32, 32)
    assert server.asked == [ARCHIVE]
    assert {path.name for path in (folder / BASE).iterdir()} == set(cifar10)
    assert not (tmp_path / "climbs.out").exists()


def test_only_what_is_missing_is_taken_from_an_archive_that_is_there(cifar10, server, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(server.files[ARCHIVE])
    (tmp_path / BASE).mkdir()
    kept = tmp_path / BASE / TRAIN
    kept.write_bytes(cifar10[TRAIN])
    before = kept.stat().st_ino
    load("cifar10", "train", tmp_path, download=True)
    assert kept.stat().st_ino == before
    assert server.asked == []


@pytest.mark.parametrize("name", [ARCHIVE, f"{BASE}/{TRAIN}"])
def test_what_lies_there_is_never_overwritten(cifar10, server, tmp_path, refusal, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    found, expected = f"sha256:{sha256(b'mine')}", f"sha256:{sha256(cifar10[TRAIN])}"
    if name == ARCHIVE:
        found, expected = f"md5:{md5(b'mine')}", f"md5:{md5(server.files[ARCHIVE])}"
    assert refusal(DamagedFile, load, "cifar10", "train", tmp_path, True) == (
        f"{path} is not the published file: its checksum is {found}, not {expected}; move it away "
        "or delete it, then download again (--download, download=True)"
    )
    assert path.read_bytes() == b"mine"
    assert server.asked == []


def test_what_is_no_file_or_cannot_be_read_is_refused(cifar10, tmp_path, refusal, monkeypatch):
    path = tmp_path / BASE / TRAIN
    path.parent.mkdir()
    path.symlink_to(tmp_path / "nothing")
    text = refusal(DamagedFile, load, "cifar10", "train", tmp_path, True)
    assert text.startswith(f"{path} is a folder, a device or a broken link")
    path.unlink()
    path.write_bytes(cifar10[TRAIN])
    monkeypatch.setattr(Path, "open", full)
    text = refusal(DamagedFile, load, "cifar10", "train", tmp_path, True)
    assert text == f"{path} cannot be read: No space left on device"


def test_an_unpacking_that_was_stopped_is_finished(cifar10, server, tmp_path, refusal, monkeypatch):
    def killed(path, content):
        if path.name == TEST:
            raise KeyboardInterrupt
        path.write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr(published, "atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            load("cifar10", "train", tmp_path, download=True)
    assert [path.name for path in (tmp_path / BASE).iterdir()] == [TRAIN]
    text = refusal(DataNotFound, load, "cifar10", "train", tmp_path)
    assert f"no file {BASE}/{TEST}; download it" in text
    assert len(load("cifar10", "train", tmp_path, download=True)) == 4
    assert server.asked == [ARCHIVE]


def test_an_archive_without_the_published_files_gives_none(cifar10, publish, tmp_path, refusal):
    publish(cifar10, tar({f"{BASE}/{TRAIN}": b"another", f"{BASE}/{TEST}": cifar10[TEST]}))
    text = refusal(DamagedFile, load, "cifar10", "train", tmp_path, True)
    assert text.startswith(f"{tmp_path / ARCHIVE} holds no {BASE}/{TRAIN}, {BASE}/{META} as")
    assert [path.name for path in (tmp_path / BASE).iterdir()] == [TEST]


def test_two_downloads_into_one_folder_do_not_mix(cifar10, tmp_path, refusal):
    with locked(tmp_path):
        refusal(FolderInUse, load, "cifar10", "train", tmp_path, True)


@pytest.mark.parametrize("name", [TRAIN, TEST, META])
def test_an_altered_pickle_of_the_right_md5_is_never_unpickled(
    cifar10, publish, tmp_path, refusal, intruder, monkeypatch, name
):
    load("cifar10", "train", tmp_path, download=True)
    evil = pickle.dumps(intruder)
    (tmp_path / BASE / name).write_bytes(evil)
    ours = published.CIFAR10_SHA256
    publish(cifar10 | {name: evil}, b"")  # as if somebody had made two files of one MD5 sum
    with monkeypatch.context() as patched:
        patched.setattr(published, "CIFAR10_SHA256", ours)
        text = refusal(DamagedFile, load, "cifar10", "train", tmp_path)
    assert f"its checksum is sha256:{sha256(evil)}, not sha256:{ours[name]}" in text
    assert not intruder.trace.exists()
    if name == META:  # without our sums it would have been, so this test would notice
        with pytest.raises(TypeError):
            load("cifar10", "train", tmp_path)
        assert intruder.trace.exists()


def test_svhn_is_fetched_a_file_at_a_time(server, tmp_path, refusal, monkeypatch):
    file = io.BytesIO()
    images = np.arange(32 * 32 * 3 * 2, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3, 2)
    savemat(file, {"X": images, "y": np.array([[10], [1]], np.uint8)})
    server.files["test_32x32.mat"] = file.getvalue()
    entry = [server.url("test_32x32.mat"), "test_32x32.mat", md5(file.getvalue())]
    monkeypatch.setitem(import_torchvision_datasets().SVHN.split_list, "test", entry)
    data = load("svhn", "test", tmp_path, download=True)
    assert sorted(data.labels.tolist()) == [0, 9]
    assert server.asked == ["test_32x32.mat"]
    (tmp_path / "test_32x32.mat").write_bytes(file.getvalue()[:-1])
    text = refusal(DamagedFile, load, "svhn", "test", tmp_path, True)
    assert f"checksum is md5:{md5(file.getvalue()[:-1])}, not md5:{md5(file.getvalue())}" in text


def test_a_missing_file_is_named_with_the_remedy(tmp_path, refusal):
    assert refusal(DataNotFound, load, "cifar10", "train", tmp_path) == (
        f"CIFAR10 is not in {tmp_path}: no file {BASE}/{TRAIN}; download it (--download, "
        "download=True), or set BNNLIB_DATA to the folder that holds cifar-10-batches-py or "
        "SVHN's .mat files"
    )
    assert list(tmp_path.iterdir()) == []


def test_our_table_names_the_files_that_torchvision_reads():
    cifar10 = import_torchvision_datasets().CIFAR10
    names = [name for name, _ in (*cifar10.train_list, *cifar10.test_list)]
    assert {*names, cifar10.meta["filename"]} == set(published.CIFAR10_SHA256)


# ---------------------------------------------------------------------- importing torchvision


@pytest.fixture
def torchvision_of(tmp_path, monkeypatch):
    """Puts a torchvision with this `_meta_registrations` in place of the installed one."""
    package = tmp_path / "torchvision"
    (package / "datasets").mkdir(parents=True)
    (package / "__init__.py").write_text("from torchvision import _meta_registrations\n")
    (package / "datasets" / "__init__.py").write_text("made_up = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        yield (package / "_meta_registrations.py").write_text


@pytest.mark.parametrize(
    ("registrations", "left_alone"),
    [
        ("registered = True", True),
        ('raise RuntimeError("operator torchvision::nms does not exist")', False),
    ],
)
def test_operators_that_are_not_there_are_passed_over(torchvision_of, registrations, left_alone):
    torchvision_of(registrations)
    assert import_torchvision_datasets().made_up
    module = sys.modules["torchvision._meta_registrations"]
    assert hasattr(module, "registered") == left_alone


def test_other_failures_of_the_import_are_shown(torchvision_of):
    torchvision_of('raise RuntimeError("something else")')
    with pytest.raises(RuntimeError, match="something else"):
        import_torchvision_datasets()


# ------------------------------------------------- the part of SVHN that the stored runs read


@pytest.fixture
def right(tmp_path, monkeypatch):
    """The right subset, and in `tmp_path` a training file of more, as if both were published."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(1100, 3, 32, 32), dtype=np.uint8)
    digits = rng.integers(10, size=1100)
    path = tmp_path / "train_32x32.mat"
    labels = np.where(digits == 0, 10, digits).astype(np.uint8)
    savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]})
    entry = ["nowhere", path.name, md5(path.read_bytes())]
    monkeypatch.setitem(import_torchvision_datasets().SVHN.split_list, "train", entry)
    held_out = np.array([0] * 881 + [1] * 202, dtype=np.uint8)
    arrays = {"train_images": images[:1083], "train_labels": digits[:1083], "heldout": held_out}
    for name, form in SUBSET_FORMS.items():
        digest = sha256(form.encode() + arrays[name].tobytes())
        monkeypatch.setitem(published.SUBSET_SHA256, name, digest)
    return arrays


SUBSET_FORMS = {
    "train_images": "uint8 (1083, 3, 32, 32)",
    "train_labels": "int64 (1083,)",
    "heldout": "uint8 (1083,)",
}


def test_the_subset_is_the_first_1083_images_with_the_last_202_held_out(right, tmp_path):
    path = tmp_path / SVHN_SUBSET
    assert write_svhn_subset(tmp_path) == (path, True)
    written = read_npz(path)
    assert set(written) == set(right)
    for name, form in SUBSET_FORMS.items():
        assert f"{written[name].dtype} {written[name].shape}" == form
        assert np.array_equal(written[name], right[name])
    before = path.read_bytes()
    (tmp_path / "train_32x32.mat").unlink()
    assert write_svhn_subset(tmp_path) == (path, False)  # a right one needs no other file
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train_images", lambda array: array ^ 1),
        ("train_labels", lambda array: array.astype(np.int32)),
        ("heldout", None),
    ],
)
def test_another_file_in_place_of_the_subset_is_refused_and_kept(
    right, name, change, tmp_path, refusal
):
    path, array = tmp_path / SVHN_SUBSET, right.pop(name)
    np.savez(path, **right | ({name: change(array)} if change else {}))
    before = path.read_bytes()
    text = refusal(DamagedFile, write_svhn_subset, tmp_path)
    assert text == f"{path} holds other {name} than the stored runs read; move it away"
    assert path.read_bytes() == before


def test_a_training_file_with_another_beginning_gives_no_subset(
    right, tmp_path, refusal, monkeypatch
):
    monkeypatch.setitem(published.SUBSET_SHA256, "train_labels", "another")
    text = refusal(DamagedFile, write_svhn_subset, tmp_path)
    assert text.startswith(f"{tmp_path / 'train_32x32.mat'} holds other train_labels than")
    assert [path.name for path in tmp_path.iterdir()] == ["train_32x32.mat"]


def test_a_subset_for_which_the_disk_has_no_room_is_not_begun(
    right, tmp_path, refusal, monkeypatch
):
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refusal(CannotWrite, write_svhn_subset, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train_32x32.mat"]
