"""The published files of CIFAR-10 and SVHN: fetched, checked, and only then read.

In: the name of a torchvision data set and a folder. Out: that data set, from files that have the
published checksums; nothing that lay in the folder is overwritten. Next file: `npz.py`.
"""

import gzip
import hashlib
import os
import sys
import tarfile
import zlib
from pathlib import Path
from types import ModuleType

from bnnlib.errors import CannotWrite, DamagedFile, DataNotFound, DownloadFailed
from bnnlib.files import check_free_disk, check_is_file, locked, make_folder, whole_or_absent

# CIFAR-10's files are pickles, and reading a pickle runs what it says. torchvision compares only
# their MD5 sums, and two files of one MD5 sum can be made. These sums are of the same files.
CIFAR10_SHA256 = {
    "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
    "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
    "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
    "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
    "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
    "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
    "batches.meta": "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb",
}
# Bytes that a download takes; CIFAR-10's archive stays beside what was unpacked from it.
DISK = {
    "cifar-10-python.tar.gz": 170_498_071 + 186_214_026,
    "train_32x32.mat": 182_040_794,
    "test_32x32.mat": 64_275_384,
    "extra_32x32.mat": 1_329_278_602,
}
RETRIES = 3

Checksums = dict[str, str]  # path below the data folder: "md5:" or "sha256:" and the sum


def read_published(kind: str, folder: Path, download: bool, **which):
    """torchvision's data set `kind`, "CIFAR10" or "SVHN", read from `folder`.

    `which` is `train=True` or `False` for CIFAR-10, `split="train"`, "test" or "extra" for SVHN.
    With `download`, what is missing is fetched first. Raises DataNotFound for a missing file,
    DamagedFile for one that is not the published one, DownloadFailed, and CannotWrite.
    """
    published = getattr(import_torchvision_datasets(), kind)
    needed = _cifar10_files(published) if kind == "CIFAR10" else _svhn_files(published, **which)
    missing = _missing(folder, needed)
    if missing and not download:
        raise DataNotFound(
            f"{kind} is not in {folder.absolute()}: no file {next(iter(missing))}; download it "
            "(--download, download=True), or set BNNLIB_DATA to the folder that holds "
            "cifar-10-batches-py or SVHN's .mat files"
        )
    if missing:
        make_folder(folder)
        with locked(folder):
            missing = _missing(folder, needed)  # fewer, where another process has just been here
            (_fetch_cifar10 if kind == "CIFAR10" else _fetch_svhn)(published, folder, missing)
    return published(folder, **which)


def import_torchvision_datasets() -> ModuleType:
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


# -------------------------------------------------------------------------------- checksums


def _cifar10_files(published: type) -> Checksums:
    """All seven files: torchvision looks at all of them, whichever part is asked for."""
    names = [name for name, _ in (*published.train_list, *published.test_list)]
    names.append(published.meta["filename"])
    return {f"{published.base_folder}/{name}": f"sha256:{CIFAR10_SHA256[name]}" for name in names}


def _svhn_files(published: type, split: str) -> Checksums:
    _, name, md5 = published.split_list[split]
    return {name: f"md5:{md5}"}


def _missing(folder: Path, needed: Checksums) -> Checksums:
    """The files that are not there; raises DamagedFile for one that is, but is another."""
    missing = {}
    for name, checksum in needed.items():
        if os.path.lexists(folder / name):
            check_published(folder / name, checksum)
        else:
            missing[name] = checksum
    return missing


def check_published(path: Path, checksum: str) -> None:
    """Raise DamagedFile unless `path` is a file with the checksum "md5:..." or "sha256:..."."""
    path = path.absolute()
    check_is_file(path)
    algorithm, expected = checksum.split(":")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise DamagedFile(
            f"{path} is not the published file: its {algorithm.upper()} is {found}, not "
            f"{expected}; move it away or delete it, then download again (--download, "
            "download=True)"
        )


# ---------------------------------------------------------------------------------- fetching


def _fetch_svhn(published: type, folder: Path, missing: Checksums) -> None:
    for url, name, _ in published.split_list.values():
        if name in missing:
            fetch(url, folder / name, missing[name])


def _fetch_cifar10(published: type, folder: Path, missing: Checksums) -> None:
    """Take what is missing from the archive, which is fetched unless it is there."""
    archive, checksum = folder / published.filename, f"md5:{published.tgz_md5}"
    if _missing(folder, {published.filename: checksum}):
        fetch(published.url, archive, checksum)
    make_folder(folder / published.base_folder)
    _unpack(archive, folder, missing)


def fetch(url: str, path: Path, checksum: str) -> None:
    """Fetch a file that is not there yet, trying `RETRIES` times again.

    It has a temporary name until its checksum ("md5:..." or "sha256:...") is found right.
    Raises DownloadFailed, and CannotWrite where the disk is full.
    """
    import pooch  # here, because nothing but a download needs it

    check_free_disk(path.parent, DISK.get(path.name, 0))
    store = pooch.create(
        path=path.parent,
        base_url="",
        registry={path.name: checksum},
        urls={path.name: url},
        retry_if_failed=RETRIES,
        allow_updates=False,
    )
    try:
        store.fetch(path.name, downloader=pooch.HTTPDownloader(progressbar=True, chunk_size=2**16))
        path.chmod(0o644)  # pooch leaves it to its owner alone, but data folders are shared
    except (OSError, ValueError) as error:
        raise _failure(url, path, error) from error


def _failure(url: str, path: Path, error: OSError | ValueError) -> DownloadFailed | CannotWrite:
    """The error to raise for one of pooch."""
    from requests import HTTPError, RequestException  # pooch has loaded it

    if isinstance(error, HTTPError):
        reason = f"the server answered {error.response.status_code}"
    elif isinstance(error, RequestException):
        reason = f"the connection failed ({type(error).__name__})"
    elif isinstance(error, ValueError):
        reason = str(error).split(". ")[0]  # pooch names both sums
    else:
        return CannotWrite(f"{path} cannot be written: {error.strerror or error}")
    return DownloadFailed(
        f"{url} could not be fetched in {RETRIES + 1} attempts: {reason}; try again later, or get "
        f"{path.name} elsewhere and put it into {path.parent.absolute()}"
    )


def _unpack(archive: Path, folder: Path, missing: Checksums) -> None:
    """Write the missing files from a `.tar.gz`, each whole or not at all.

    Only files of these names and checksums are taken, so no other entry can do anything.
    """
    left = dict(missing)
    try:
        with tarfile.open(archive, "r:gz") as entries:
            for entry in entries:
                if entry.isreg() and entry.name in left:
                    content = entries.extractfile(entry).read()
                    if _is_published(content, left[entry.name]):
                        _write(folder / entry.name, content)
                        del left[entry.name]
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedFile(f"{archive} cannot be unpacked: {error}") from error
    if left:
        raise DamagedFile(
            f"{archive} holds no {', '.join(left)} as published; delete it, then download again"
        )


def _is_published(content: bytes, checksum: str) -> bool:
    algorithm, expected = checksum.split(":")
    return hashlib.new(algorithm, content).hexdigest() == expected


def _write(path: Path, content: bytes) -> None:
    with whole_or_absent(path) as part:
        part.write_bytes(content)
