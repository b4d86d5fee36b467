import hashlib
import io
import pickle
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import savemat

from bnnlib import downloads
from bnnlib.data import load
from bnnlib.downloads import RETRIES, check_published, fetch, read_published
from bnnlib.errors import CannotWrite, DamagedFile, DataNotFound, DownloadFailed, FolderInUse
from bnnlib.files import locked

CONTENT = bytes(range(256)) * 300


def md5(content):
    return hashlib.md5(content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# ------------------------------------------------------------------------ a server of our own


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


def refusal(kind, function, *args):
    with pytest.raises(kind) as caught:
        function(*args)
    text = str(caught.value)
    assert text.isprintable()
    return text


# ---------------------------------------------------------------------------------- one file


def test_a_file_is_fetched_and_nothing_else_is_left(server, tmp_path):
    server.files["a.mat"] = CONTENT
    fetch(server.url("a.mat"), tmp_path / "a.mat", f"md5:{md5(CONTENT)}")
    assert (tmp_path / "a.mat").read_bytes() == CONTENT
    assert (tmp_path / "a.mat").stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mat"]
    assert server.asked == ["a.mat"]


def test_a_connection_that_breaks_off_is_tried_again(server, tmp_path):
    server.files["a.mat"] = CONTENT
    server.broken["a.mat"] = 1
    fetch(server.url("a.mat"), tmp_path / "a.mat", f"md5:{md5(CONTENT)}")
    assert (tmp_path / "a.mat").read_bytes() == CONTENT
    assert server.asked == ["a.mat"] * 2


@pytest.mark.parametrize(
    ("content", "broken", "reason"),
    [
        (CONTENT, 99, "the connection failed (ChunkedEncodingError)"),
        (CONTENT[:-1], 0, f"expected md5:{md5(CONTENT)} but got {md5(CONTENT[:-1])}"),
        (b"x" + CONTENT[1:], 0, f"but got {md5(b'x' + CONTENT[1:])}"),
        (b"", 0, f"but got {md5(b'')}"),
        (None, 0, "the server answered 404"),
    ],
)
def test_what_does_not_arrive_whole_is_not_kept(server, tmp_path, content, broken, reason):
    if content is not None:
        server.files["a.mat"], server.broken["a.mat"] = content, broken
    url, path = server.url("a.mat"), tmp_path / "a.mat"
    text = refusal(DownloadFailed, fetch, url, path, f"md5:{md5(CONTENT)}")
    assert text.startswith(f"{url} could not be fetched in {RETRIES + 1} attempts: ")
    assert f"{reason}; try again later, or get a.mat elsewhere and put it into {tmp_path}" in text
    assert list(tmp_path.iterdir()) == []
    assert len(server.asked) == RETRIES + 1


def test_where_no_server_answers_that_is_said(server, tmp_path):
    url = server.url("a.mat")
    server.server_close()
    text = refusal(DownloadFailed, fetch, url, tmp_path / "a.mat", f"md5:{md5(CONTENT)}")
    assert "the connection failed (ConnectionError)" in text


def test_a_full_disk_is_said_before_and_during_a_download(server, tmp_path, monkeypatch):
    server.files["a.mat"] = CONTENT
    arguments = server.url("a.mat"), tmp_path / "a.mat", f"md5:{md5(CONTENT)}"
    monkeypatch.setitem(downloads.DISK, "a.mat", 10**18)
    assert "needs about 1e+06 TB of disk" in refusal(CannotWrite, fetch, *arguments)
    assert server.asked == []
    monkeypatch.delitem(downloads.DISK, "a.mat")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pooch.core.shutil.move", full)
    text = refusal(CannotWrite, fetch, *arguments)
    assert text == f"{tmp_path / 'a.mat'} cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- checksums


def test_another_file_is_refused_with_both_sums_and_the_remedy(tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(CONTENT)
    check_published(path, f"md5:{md5(CONTENT)}")
    check_published(path, f"sha256:{sha256(CONTENT)}")
    text = refusal(DamagedFile, check_published, path, f"sha256:{sha256(b'')}")
    assert text == (
        f"{path} is not the published file: its SHA256 is {sha256(CONTENT)}, not {sha256(b'')}; "
        "move it away or delete it, then download again (--download, download=True)"
    )
    assert path.read_bytes() == CONTENT


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nothing").symlink_to(tmp_path / "away")
    for name in ("folder", "loop", "nothing"):
        text = refusal(DamagedFile, check_published, tmp_path / name, f"md5:{md5(CONTENT)}")
        assert text.startswith(f"{tmp_path / name} is a folder, a device or a broken link")


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def no_access(*args):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.mat"
    path.write_bytes(CONTENT)
    monkeypatch.setattr(Path, "open", no_access)
    text = refusal(DamagedFile, check_published, path, f"md5:{md5(CONTENT)}")
    assert text == f"{path} cannot be read: Permission denied"


# ------------------------------------------------------- CIFAR-10 and SVHN of our own, served


TRAIN, TEST = "data_batch_1", "test_batch"
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


def publish(monkeypatch, server, files, archive):
    """Let torchvision's and our tables say that these are CIFAR-10's files."""
    cifar10 = downloads.import_torchvision_datasets().CIFAR10
    sums = {name: md5(content) for name, content in files.items()}
    monkeypatch.setattr(cifar10, "url", server.url(ARCHIVE))
    monkeypatch.setattr(cifar10, "tgz_md5", md5(archive))
    monkeypatch.setattr(cifar10, "train_list", [[TRAIN, sums[TRAIN]]])
    monkeypatch.setattr(cifar10, "test_list", [[TEST, sums[TEST]]])
    monkeypatch.setitem(cifar10.meta, "md5", sums["batches.meta"])
    ours = {name: sha256(content) for name, content in files.items()}
    monkeypatch.setattr(downloads, "CIFAR10_SHA256", ours)
    server.files[ARCHIVE] = archive


@pytest.fixture
def cifar10(server, monkeypatch):
    """Five files of a CIFAR-10 with 7 images in all; returns them by name."""

    def batch(n):
        pixels = np.arange(n * 3072, dtype=np.uint32).astype(np.uint8).reshape(n, 3072)
        return pickle.dumps({"data": pixels, "labels": list(range(n))})

    files = {TRAIN: batch(4), TEST: batch(3), "batches.meta": pickle.dumps({"label_names": []})}
    inside = {f"{BASE}/{name}": content for name, content in files.items()}
    inside |= {"../climbs.out": b"x", f"{BASE}/readme.html": b"x"}
    publish(monkeypatch, server, files, tar(inside))
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


@pytest.mark.parametrize("name", [ARCHIVE, f"{BASE}/{TRAIN}", f"{BASE}/batches.meta"])
def test_what_lies_there_is_never_overwritten(cifar10, server, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    text = refusal(DamagedFile, load, "cifar10", "train", tmp_path, True)
    assert text.startswith(f"{path} is not the published file")
    assert path.read_bytes() == b"mine"
    assert server.asked == []


def test_an_unpacking_that_was_stopped_is_finished(cifar10, server, tmp_path, monkeypatch):
    def killed(path, content):
        if path.name == TEST:
            raise KeyboardInterrupt
        path.write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr(downloads, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            load("cifar10", "train", tmp_path, download=True)
    assert [path.name for path in (tmp_path / BASE).iterdir()] == [TRAIN]
    text = refusal(DataNotFound, load, "cifar10", "train", tmp_path)
    assert f"no file {BASE}/{TEST}; download it" in text
    assert len(load("cifar10", "train", tmp_path, download=True)) == 4
    assert server.asked == [ARCHIVE]


def test_an_archive_without_the_published_files_gives_none(cifar10, server, tmp_path, monkeypatch):
    publish(monkeypatch, server, cifar10, tar({f"{BASE}/{TRAIN}": b"another", "x": b""}))
    text = refusal(DamagedFile, load, "cifar10", "train", tmp_path, True)
    assert text.startswith(f"{tmp_path / ARCHIVE} holds no {BASE}/{TRAIN}, {BASE}/{TEST}")
    assert list((tmp_path / BASE).iterdir()) == []
    publish(monkeypatch, server, cifar10, b"no archive")
    (tmp_path / ARCHIVE).unlink()
    text = refusal(DamagedFile, load, "cifar10", "train", tmp_path, True)
    assert text.startswith(f"{tmp_path / ARCHIVE} cannot be unpacked: not a gzip file")


def test_two_downloads_into_one_folder_do_not_mix(cifar10, tmp_path):
    with locked(tmp_path):
        refusal(FolderInUse, load, "cifar10", "train", tmp_path, True)


class Intruder:
    """Unpickling it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", [TRAIN, TEST, "batches.meta"])
@pytest.mark.parametrize("same_md5", [False, True])
def test_an_altered_pickle_is_never_unpickled(
    cifar10, server, tmp_path, monkeypatch, name, same_md5
):
    load("cifar10", "train", tmp_path, download=True)
    evil = pickle.dumps(Intruder(tmp_path / "executed"))
    (tmp_path / BASE / name).write_bytes(evil)
    if same_md5:  # as if somebody had made two files of one MD5
        ours = downloads.CIFAR10_SHA256
        publish(monkeypatch, server, cifar10 | {name: evil}, server.files[ARCHIVE])
        monkeypatch.setattr(downloads, "CIFAR10_SHA256", ours)
    text = refusal(DamagedFile, load, "cifar10", "train", tmp_path)
    assert f"its SHA256 is {sha256(evil)}, not {sha256(cifar10[name])}" in text
    assert not (tmp_path / "executed").exists()


def test_without_our_sums_that_pickle_would_have_been_executed(
    cifar10, server, tmp_path, monkeypatch
):
    """So the test above would notice."""
    evil = pickle.dumps(Intruder(tmp_path / "executed"))
    load("cifar10", "train", tmp_path, download=True)
    (tmp_path / BASE / "batches.meta").write_bytes(evil)
    publish(monkeypatch, server, cifar10 | {"batches.meta": evil}, b"")
    with pytest.raises(TypeError):  # torchvision finds no label names in what came of it
        load("cifar10", "train", tmp_path)
    assert (tmp_path / "executed").exists()


def test_svhn_is_fetched_a_file_at_a_time(server, tmp_path, monkeypatch):
    file = io.BytesIO()
    images = np.arange(32 * 32 * 3 * 2, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3, 2)
    savemat(file, {"X": images, "y": np.array([[10], [1]], np.uint8)})
    server.files["test_32x32.mat"] = file.getvalue()
    svhn = downloads.import_torchvision_datasets().SVHN
    entry = [server.url("test_32x32.mat"), "test_32x32.mat", md5(file.getvalue())]
    monkeypatch.setitem(svhn.split_list, "test", entry)
    data = load("svhn", "test", tmp_path, download=True)
    assert sorted(data.labels.tolist()) == [0, 9]
    assert server.asked == ["test_32x32.mat"]
    (tmp_path / "test_32x32.mat").write_bytes(file.getvalue()[:-1])
    text = refusal(DamagedFile, load, "svhn", "test", tmp_path, True)
    assert f"its MD5 is {md5(file.getvalue()[:-1])}, not {md5(file.getvalue())}" in text


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    text = refusal(DataNotFound, read_published, "CIFAR10", tmp_path, False)
    assert text == (
        f"CIFAR10 is not in {tmp_path}: no file {BASE}/{TRAIN}; download it (--download, "
        "download=True), or set BNNLIB_DATA to the folder that holds cifar-10-batches-py or "
        "SVHN's .mat files"
    )
    assert list(tmp_path.iterdir()) == []


def test_our_tables_name_the_files_that_torchvision_reads():
    datasets = downloads.import_torchvision_datasets()
    cifar10, svhn = datasets.CIFAR10, datasets.SVHN.split_list.values()
    names = [name for name, _ in (*cifar10.train_list, *cifar10.test_list)]
    assert {*names, cifar10.meta["filename"]} == set(downloads.CIFAR10_SHA256)
    assert {cifar10.filename, *(name for _, name, _ in svhn)} == set(downloads.DISK)


# ---------------------------------------------------------------------- importing torchvision


@pytest.fixture
def torchvision_of(tmp_path, monkeypatch):
    """Puts a torchvision with this `_meta_registrations` in place of the installed one."""

    def is_torchvision(module):
        return module.split(".")[0] == "torchvision"

    before = {name: module for name, module in sys.modules.items() if is_torchvision(name)}
    package = tmp_path / "torchvision"
    (package / "datasets").mkdir(parents=True)
    (package / "__init__.py").write_text("from torchvision import _meta_registrations\n")
    (package / "datasets" / "__init__.py").write_text("made_up = True\n")

    def install(registrations):
        (package / "_meta_registrations.py").write_text(registrations)
        monkeypatch.syspath_prepend(tmp_path)
        for name in before:
            del sys.modules[name]

    yield install
    for name in [name for name in sys.modules if is_torchvision(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def test_torchvision_is_importable_beside_this_torch():
    datasets = downloads.import_torchvision_datasets()
    assert issubclass(datasets.CIFAR10, torch.utils.data.Dataset)
    assert issubclass(datasets.SVHN, torch.utils.data.Dataset)


def test_operators_that_are_not_there_are_passed_over(torchvision_of):
    torchvision_of('raise RuntimeError("operator torchvision::nms does not exist")')
    assert downloads.import_torchvision_datasets().made_up


def test_a_matching_torchvision_is_left_alone(torchvision_of):
    torchvision_of("registered = True")
    assert downloads.import_torchvision_datasets().made_up
    assert sys.modules["torchvision._meta_registrations"].registered


def test_other_failures_of_the_import_are_shown(torchvision_of):
    torchvision_of('raise RuntimeError("something else")')
    with pytest.raises(RuntimeError, match="something else"):
        downloads.import_torchvision_datasets()
