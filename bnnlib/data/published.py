"""The published files of CIFAR-10 and SVHN: downloaded, validated, and only then read."""

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np

from bnnlib.data.npz import Arrays, read_npz
from bnnlib.errors import CannotWrite, DamagedFile, DataNotFound, DownloadFailed, shown
from bnnlib.files import as_folder, atomic_write, check_is_file, locked, make_folder
from bnnlib.names import SVHN_SUBSET

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
RETRIES = 3
SUBSET_SHA256 = {  # of type, shape and bytes of each array
    "train_images": "6043a7c514ec6cc65ac7a82575d98aee7839dc8c9959a9170335a84e03a71cb7",
    "train_labels": "23e7f8febcfb2fa5f4b594cd6d41b87a7191f4d90fa733eae622a0aec2bdfa46",
    "heldout": "5efab80f457029b27c498639aefda61e98b384ad46f721a926fbab26b3a81507",
}


def data_folder(root: str | Path | None = None) -> Path:
    """Where the files are: in `root`, or BNNLIB_DATA, or `data`; raises InvalidValue for ""."""
    if root is None:
        root = os.environ.get("BNNLIB_DATA") or "data"
    return as_folder("root", root)


def read_published(kind: str, folder: Path, download: bool, **which):
    """torchvision's data set `kind`, "CIFAR10" or "SVHN", from files with the published checksums.

    `which` is `train=True` or `False` for CIFAR-10, `split="train"`, "test" or "extra" for SVHN.
    With `download`, what is missing is fetched first. Raises DataNotFound for a missing file,
    DamagedFile for one that is not the published one, DownloadFailed, and CannotWrite.
    """
    published = getattr(import_torchvision_datasets(), kind)
    if kind == "SVHN":
        url, file, md5 = published.split_list[which["split"]]
        needed = {file: f"md5:{md5}"}
    else:
        url, file, md5 = published.url, published.filename, published.tgz_md5
        # All seven, because torchvision looks at all of them, whichever part is asked for.
        needed = {f"{published.base_folder}/{k}": f"sha256:{v}" for k, v in CIFAR10_SHA256.items()}
    if missing := _missing(folder, needed):
        if not download:
            raise DataNotFound(
                f"{kind} is not in {folder.absolute()}: no file {next(iter(missing))}; download it "
                "(--download, download=True), or set BNNLIB_DATA to the folder that holds "
                "cifar-10-batches-py or SVHN's .mat files"
            )
        with locked(folder):
            if missing := _missing(folder, needed):  # none, where another process has just been
                if _missing(folder, {file: f"md5:{md5}"}):
                    fetch(url, folder / file, f"md5:{md5}")
                if kind == "CIFAR10":
                    _unpack(folder / file, folder, missing)
    return published(folder, **which)


def import_torchvision_datasets() -> ModuleType:
    """`torchvision.datasets`, also where torchvision's compiled operators cannot load.

    A torchvision built for CUDA beside a CPU-only torch fails on import, in the module that
    registers those operators. Data sets need none, so an empty module then takes its place.
    """
    try:
        import torchvision.datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        name = "torchvision._meta_registrations"
        sys.modules[name] = ModuleType(name)
        import torchvision.datasets
    return torchvision.datasets


def _missing(folder: Path, checksums: dict[str, str]) -> dict[str, str]:
    """The files that are not there; raises DamagedFile for one that is, but is another."""
    there = [name for name in checksums if os.path.lexists(folder / name)]
    for name in there:
        path, expected = (folder / name).absolute(), checksums[name]
        check_is_file(path)
        try:
            with path.open("rb") as file:
                algorithm = expected.split(":")[0]
                found = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
        except OSError as error:
            raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error
        if found != expected:
            raise DamagedFile(
                f"{path} is not the published file: its checksum is {found}, not {expected}; move "
                "it away or delete it, then download again (--download, download=True)"
            )
    return {name: checksum for name, checksum in checksums.items() if name not in there}


def fetch(url: str, path: Path, checksum: str) -> None:
    """Download a file that is not there yet; it has a temporary name until its checksum is right.

    Raises DownloadFailed, after `RETRIES` more attempts, and CannotWrite where the disk is full.
    """
    import pooch  # here, because nothing but a download needs it

    name, folder = path.name, path.parent.absolute()
    store = pooch.create(folder, "", registry={name: checksum}, retry_if_failed=RETRIES)
    store.urls[name] = url
    try:
        store.fetch(name, downloader=pooch.HTTPDownloader(progressbar=True, chunk_size=2**16))
        path.chmod(0o644)  # pooch leaves it to its owner alone, but data folders are shared
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None):  # an OSError of a connection has no number
            raise CannotWrite(f"{path} cannot be written: {error.strerror}") from error
        reason = shown(str(error).split(". ")[0])  # pooch says more after a wrong checksum
        raise DownloadFailed(
            f"{url} could not be fetched in {RETRIES + 1} attempts: {reason}; try again later, or "
            f"get {name} elsewhere and put it into {folder}"
        ) from error


def _unpack(archive: Path, folder: Path, left: dict[str, str]) -> None:
    """Write files from a `.tar.gz`, none but those that are `left`, by name and SHA-256."""
    with tarfile.open(archive) as entries:
        for entry in entries:
            if entry.isreg() and entry.name in left:
                content = entries.extractfile(entry).read()
                if f"sha256:{hashlib.sha256(content).hexdigest()}" == left[entry.name]:
                    make_folder((folder / entry.name).parent)
                    atomic_write(folder / entry.name, content)
                    del left[entry.name]
    if left:
        names = ", ".join(left)
        raise DamagedFile(f"{archive} holds no {names} as published; delete it, download again")


def write_svhn_subset(root: str | Path | None = None, download: bool = False) -> tuple[Path, bool]:
    """Write SVHN's first 1,083 training images to `SVHN_SUBSET` in `root`, for profile `reduced`.

    `train_images` (1083, 3, 32, 32) uint8 is in the order of the official file, `train_labels`
    (1083,) int64 are the digits, and `heldout` (1083,) uint8 is 1 for the last 202, which are of
    other photographs. Returns the path, and whether it was written: a right file is left alone.
    Raises DamagedFile where an array, of the official file or of the one that is there, is not
    that of the stored runs; and what `read_published` raises.
    """
    folder = data_folder(root)
    path = folder / SVHN_SUBSET
    if os.path.lexists(path):
        check_is_file(path)
        _check_subset(read_npz(path), path, "move it away")
        return path, False
    data = read_published("SVHN", folder, download, split="train")
    arrays = {
        "train_images": data.data[:1083],
        "train_labels": np.asarray(data.labels[:1083], dtype=np.int64),
        "heldout": (np.arange(1083) >= 881).astype(np.uint8),
    }
    _check_subset(arrays, folder / "train_32x32.mat", "nothing was written")
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    atomic_write(path, file.getvalue())
    return path, True


def _check_subset(arrays: Arrays, source: Path, advice: str) -> None:
    for name, expected in SUBSET_SHA256.items():
        array = arrays.get(name, np.zeros(0))
        content = f"{array.dtype} {array.shape}".encode() + array.tobytes()
        if hashlib.sha256(content).hexdigest() != expected:
            raise DamagedFile(f"{source} holds other {name} than the stored runs read; {advice}")
