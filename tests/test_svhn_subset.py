"""The part of SVHN that the profile `reduced` reads, made from the published training file."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.io import savemat

import bnnlib.data
from bnnlib import downloads
from bnnlib.__main__ import main
from bnnlib.data import SVHN_SUBSET, load, write_svhn_subset
from bnnlib.errors import CannotWrite, DamagedFile, DataNotFound, InvalidValue
from bnnlib.experiments import RESULTS, named, prepare_data, reduced

FOLDERS = (os.environ.get("BNNLIB_DATA"), Path(__file__).parents[2] / "shared/data/svhn")
REAL = [Path(folder) / SVHN_SUBSET for folder in FOLDERS if folder]
REAL = next((path for path in REAL if path.is_file()), None)


def make(folder):
    return CliRunner().invoke(main, ["svhn-subset", "--data", str(folder)])


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Puts a training file of these images and digits into a folder, as if it were published."""

    def put(images, digits):
        labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        path = tmp_path / "train_32x32.mat"
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels})
        svhn = downloads.import_torchvision_datasets().SVHN
        entry = ["nowhere", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
        monkeypatch.setitem(svhn.split_list, "train", entry)
        return tmp_path

    return put


@pytest.fixture
def noise():
    """More images than are taken, and their digits."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(1100, 3, 32, 32), dtype=np.uint8)
    return images, rng.integers(10, size=1100)


@pytest.fixture
def right(noise, monkeypatch):
    """Lets the subset of that noise be the right one; returns its arrays."""
    images, digits = noise
    held_out = np.array([0] * 881 + [1] * 202, dtype=np.uint8)
    arrays = {"train_images": images[:1083], "train_labels": digits[:1083], "heldout": held_out}
    forms = ("uint8 (1083, 3, 32, 32)", "int64 (1083,)", "uint8 (1083,)")
    for form, (name, array) in zip(forms, arrays.items(), strict=True):
        digest = hashlib.sha256(form.encode() + array.tobytes()).hexdigest()
        monkeypatch.setitem(bnnlib.data.SUBSET_SHA256, name, digest)
    return arrays


def test_it_is_the_first_1083_images_with_the_last_202_held_out(publish, noise, right):
    folder = publish(*noise)
    done = make(folder)
    assert (done.exit_code, done.stdout) == (0, f"{folder / SVHN_SUBSET}\n")
    with np.load(folder / SVHN_SUBSET) as file:
        written = dict(file)
    assert set(written) == set(right)
    for name, array in right.items():
        assert written[name].dtype == array.dtype
        assert np.array_equal(written[name], array)
    train, test = (load(SVHN_SUBSET, split, folder) for split in ("train", "test"))
    assert (len(train), len(test)) == (881, 202)
    assert torch.equal(test.images, torch.from_numpy(noise[0][881:1083]))


def test_a_right_one_is_left_alone_and_needs_no_other_file(publish, noise, right):
    folder = publish(*noise)
    np.savez(folder / SVHN_SUBSET, **right, more=np.arange(3))
    (folder / "train_32x32.mat").unlink()
    before = (folder / SVHN_SUBSET).read_bytes()
    done = make(folder)
    assert done.stdout == f"{folder / SVHN_SUBSET} is there already, and right\n"
    assert (folder / SVHN_SUBSET).read_bytes() == before


@pytest.mark.parametrize("name", ["train_images", "train_labels", "heldout"])
@pytest.mark.parametrize("change", ["one value", "another type", "nothing there"])
def test_another_file_in_its_place_is_refused_and_kept(name, change, publish, noise, right):
    folder, array = publish(*noise), right[name].copy()
    array.flat[-1] ^= 1
    changed = {"one value": array, "another type": right[name].astype(np.int32)}
    arrays = right | {name: changed.get(change)}
    np.savez(folder / SVHN_SUBSET, **{k: v for k, v in arrays.items() if v is not None})
    before = (folder / SVHN_SUBSET).read_bytes()
    refused = make(folder)
    assert refused.exit_code == 1
    assert f"{SVHN_SUBSET} holds other {name} than the stored runs read: " in refused.stderr
    assert refused.stderr.endswith("; move it away\n")
    assert (folder / SVHN_SUBSET).read_bytes() == before


@pytest.mark.parametrize("name", ["train_images", "train_labels"])
def test_a_training_file_that_gives_another_subset_gives_none(name, publish, noise, right):
    images, digits = noise
    (images if name == "train_images" else digits).flat[1] ^= 1
    folder = publish(images, digits)
    with pytest.raises(DamagedFile, match=rf"train_32x32\.mat holds other {name} .*; nothing was"):
        write_svhn_subset(folder)
    assert [path.name for path in folder.iterdir()] == ["train_32x32.mat"]


def test_a_training_file_that_is_not_the_published_one_is_refused(publish, noise, right):
    folder = publish(*noise)
    with (folder / "train_32x32.mat").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedFile, match=r"train_32x32\.mat is not the published file"):
        write_svhn_subset(folder)
    assert not (folder / SVHN_SUBSET).exists()


def test_a_full_disk_leaves_nothing_behind(publish, noise, right, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    folder = publish(*noise)
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(CannotWrite, match="No space left on device"):
        write_svhn_subset(folder)
    assert [path.name for path in folder.iterdir()] == ["train_32x32.mat"]


def test_where_it_is_missing_the_command_that_makes_it_is_named(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataNotFound, match=r"no file .*`python -m bnnlib svhn-subset` makes"):
            load(SVHN_SUBSET, "train", root)
    with pytest.raises(
        DataNotFound, match=r"SVHN is not in .*: no file train_32x32\.mat; download"
    ):
        write_svhn_subset(tmp_path)


def test_an_empty_text_is_no_folder():
    for use in (write_svhn_subset, lambda root: load("glyphs", "train", root)):
        with pytest.raises(InvalidValue, match="root must be the path of a folder, got ''"):
            use("")


@pytest.mark.skipif(REAL is None, reason=f"no {SVHN_SUBSET} in BNNLIB_DATA or ../shared/data/svhn")
class TestRealSubset:
    @pytest.fixture
    def made(self, publish):
        """A folder with the subset, made from a training file that begins as the real one does."""
        with np.load(REAL) as file:
            images, digits = file["train_images"], file["train_labels"]
        more = np.random.default_rng(0)
        rest = more.integers(256, size=(17, 3, 32, 32), dtype=np.uint8)
        folder = publish(
            np.concatenate([images, rest]), np.append(digits, more.integers(10, size=17))
        )
        assert write_svhn_subset(folder) == (folder / SVHN_SUBSET, True)
        return folder

    @pytest.mark.parametrize("name", ["svhn-random-labels", "svhn-true-labels"])
    def test_images_and_labels_are_those_of_the_stored_runs(self, name, made):
        sets = prepare_data(reduced(named(name)), made)
        stored = json.loads((RESULTS / name / "reduced-seed0" / "experiment.json").read_text())
        assert {split: data.image_hash() for split, data in sets.items()} == stored["image_sha256"]
        assert {split: data.label_hash() for split, data in sets.items()} == stored["label_sha256"]

    def test_every_array_is_that_of_the_file_that_the_stored_runs_read(self, made):
        with np.load(REAL) as kept, np.load(made / SVHN_SUBSET) as written:
            for name in written:
                assert written[name].dtype == kept[name].dtype
                assert np.array_equal(written[name], kept[name])
