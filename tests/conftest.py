"""What several test files share: one thread, sets of noise, a small network, a finished run."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bnnlib.data.images import ImageSet
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.experiments.variants import named
from bnnlib.files import write_json
from bnnlib.history import History
from bnnlib.kernels import bits, compiled
from bnnlib.models import Architecture
from bnnlib.runs.record import HISTORY, RECORD
from bnnlib.runs.run import run

DIGITS = tuple("0123456789")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors lose more by a second thread than they gain, also in what a test starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels(monkeypatch):
    """Takes the compiled kernels of this instruction set from now on, or none for "off"."""

    def choose(name):
        monkeypatch.setattr(bits, "library", lambda: compiled.library(name))

    return choose


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def noise():
    """Makes an `ImageSet` of uniform noise: nothing to learn, everything to memorize."""

    def make(n=60, size=8, seed=0, classes=DIGITS, split="train"):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(len(classes), (n,), generator=generator)
        return ImageSet(images, labels, "noise", split, classes)

    return make


@pytest.fixture
def tiny():
    """Two convolutions, a pool after the second, one hidden dense layer; images of 8 x 8."""
    return Architecture((4, 6), pool_every=2, dense=(12,), image_size=8)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The base experiment at its smallest, in a folder; tests may read it, not write."""
    out = tmp_path_factory.mktemp("runs") / "base"
    return run(smoke(published("svhn-random-labels")), out, device="cpu", progress="none")


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


@pytest.fixture
def npz(tmp_path):
    """Writes arrays to a file and returns its path."""

    def write(**arrays):
        np.savez(tmp_path / "mine.npz", **arrays)
        return tmp_path / "mine.npz"

    return write


BASE = smoke(published("svhn-random-labels"))
EACH_KIND = {
    "binary": BASE,
    "float": replace(BASE, binary=False),
    "dropout": smoke(named("svhn-dropout-after-activation")),
    "stochastic": smoke(published("svhn-stochastic")),
    "real weights": replace(BASE, network="svhn", weights="real"),
    "dense": smoke(named("capacity")),
}


@pytest.fixture(params=EACH_KIND.values(), ids=EACH_KIND)
def each_kind(request):
    """An experiment of each kind that differs in its network."""
    return request.param


@pytest.fixture
def write_run():
    """Writes the two files of a run that never took place; without `seconds` it is unfinished."""

    def write(folder, experiment, rows, **record):
        folder.mkdir(parents=True, exist_ok=True)
        History(rows).save(folder / HISTORY)
        splits = {"train": 881, "test": 100}
        about = {
            "experiment_sha256": experiment.digest(),
            "versions": {"bnnlib": "0.2.0"},
            "device": "a computer",
            "threads": 1,
            "started": "2026-01-01T00:00:00+00:00",
            "images": splits,
            "corruptions": {split: [] for split in splits},
            **dict.fromkeys(("image_sha256", "label_sha256"), dict.fromkeys(splits, "0" * 64)),
        }
        write_json(folder / RECORD, {"experiment": asdict(experiment), **about, **record})
        return folder

    return write
