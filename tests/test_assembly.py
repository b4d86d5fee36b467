"""An experiment becomes data and a network, each random act from its own stream of a seed."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from bnnlib.assembly import (
    build_model,
    check_size,
    model_forms,
    prepare_data,
    resolve_device,
    stream,
)
from bnnlib.batches import scale_pixels
from bnnlib.catalogue import published, smoke
from bnnlib.corruption import random_labels
from bnnlib.errors import InvalidValue
from bnnlib.tensors import forms
from bnnlib.variants import named

BASE = smoke(published("svhn-random-labels"))


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# ------------------------------------------------------------------------- seeds and devices


def test_corruption_seed_changes_the_labels_only():
    here, there = (prepare_data(replace(BASE, corruption_seed=seed)) for seed in (0, 1))
    for split in ("train", "test"):
        assert torch.equal(here[split].images, there[split].images)
        assert not torch.equal(here[split].labels, there[split].labels)
    models = [build_model(replace(BASE, corruption_seed=seed)) for seed in (0, 1)]
    assert same_weights(*models)


def test_seed_decides_the_initial_weights():
    one, same, other = (build_model(replace(BASE, seed=seed)) for seed in (0, 0, 1))
    assert same_weights(one, same)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_the_weights_of_the_twin_are_glorot_draws_in_the_order_of_its_layers():
    generator = torch.Generator().manual_seed(stream(0, "initial weights"))
    model = build_model(replace(BASE, binary=False))
    for name in ("conv1", "conv2", "dense3", "dense4", "dense5"):
        layer = model.get_submodule(name)
        expected = torch.nn.init.xavier_uniform_(torch.empty(layer.weight.shape), 1, generator)
        assert torch.equal(layer.weight, expected)
        assert not layer.bias.any()


def test_data_seed_draws_other_images():
    here, there = (prepare_data(replace(BASE, data_seed=seed))["train"] for seed in (0, 1))
    assert not torch.equal(here.images, there.images)
    assert torch.equal(here.labels, there.labels)  # random, by another seed


def test_streams_differ_by_seed_and_purpose_and_fit_a_generator():
    seeds = [stream(seed, purpose) for seed in range(5) for purpose in ("a", "b", "labels train")]
    assert len(set(seeds)) == 15
    assert seeds == [stream(s, p) for s in range(5) for p in ("a", "b", "labels train")]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("name", "nearest"), [("cud", "cuda"), ("cpux", "cpu"), ("tpu", "cpu"), ("cuda:x", "cuda:N")]
)
def test_a_device_that_bnnlib_cannot_use_is_refused_with_those_it_can(name, nearest):
    with pytest.raises(InvalidValue) as caught:
        resolve_device(name)
    assert str(caught.value) == (
        f"unknown device '{name}'; did you mean '{nearest}'? (allowed: auto, cpu, cuda, cuda:N)"
    )


@pytest.mark.parametrize("name", ["meta", "cuda:", "cpu:0 ", "CPU", ""])
def test_other_devices_of_pytorch_and_other_spellings_are_refused(name):
    with pytest.raises(InvalidValue, match=f"unknown device '{name}'"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_where_there_is_no_gpu_that_is_said(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValue) as caught:
        resolve_device(name)
    assert str(caught.value) == (
        f"device '{name}' cannot be used here: PyTorch finds no CUDA here; use 'cpu'"
    )


def test_device_auto_is_one_that_works():
    assert resolve_device("cpu") == torch.device("cpu")
    assert torch.zeros(2, device=resolve_device("auto")).sum() == 0


# ----------------------------------------------------------------------- preparing the data


@pytest.mark.parametrize(
    ("changes", "corrupted"),
    [
        ({}, {"train": 1, "valid": 1, "test": 1}),
        ({"random_label_splits": ("train", "valid")}, {"train": 1, "valid": 1, "test": 0}),
        ({"random_labels": 0.0}, {"train": 0, "valid": 0, "test": 0}),
        (
            {"gaussian_variance": 0.1, "random_label_splits": ("test",)},
            {"train": 1, "valid": 0, "test": 1},
        ),
        ({"gaussian_variance": 0.1}, {"train": 2, "valid": 1, "test": 1}),
    ],
)
def test_only_the_named_splits_are_corrupted(changes, corrupted):
    sets = prepare_data(replace(BASE, n_valid=20, **changes))
    assert {split: len(data.provenance) for split, data in sets.items()} == corrupted


def test_gaussian_inputs_keep_the_true_labels():
    true = prepare_data(replace(BASE, random_labels=0.0))
    sets = prepare_data(replace(smoke(published("cifar10-gaussian-inputs")), dataset="glyphs"))
    assert sets["train"].images.dtype == torch.float32
    assert sets["train"].images.std().item() == pytest.approx(0.1**0.5, rel=0.01)
    assert sets["test"].images.dtype == torch.uint8
    for split in ("train", "test"):
        assert torch.equal(sets[split].labels, true[split].labels)


def test_matched_noise_has_the_mean_and_variance_of_the_images_it_replaces():
    e = smoke(named("cifar10-gaussian-matched"))
    pixels = scale_pixels(
        prepare_data(replace(e, gaussian_variance=0.0, gaussian_matched=False))["train"].images
    )
    x = prepare_data(e)["train"].images
    assert abs(pixels.std().item() - 0.1**0.5) > 0.05  # not what the original's noise has
    # five standard deviations of a mean and a variance of 307,200 values
    assert (x.mean() - pixels.mean()).abs() < 5 * pixels.std() / 307_200**0.5
    assert abs(x.var() / pixels.var() - 1) < 5 * (2 / 307_200) ** 0.5


@pytest.fixture
def positions(tmp_path):
    """The orders of the pixels that an experiment makes: (images, 256), by split."""
    images = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (5, 3, 16, 16))
    arrays = {"images": images, "labels": np.arange(5)}
    named_by_split = {f"{s}_{k}": v for s in ("train", "test") for k, v in arrays.items()}
    np.savez(tmp_path / "positions.npz", **named_by_split)

    def orders(pixels, **changes):
        own = replace(BASE, dataset="positions.npz", random_labels=0.0, pixels=pixels, **changes)
        sets = prepare_data(own, tmp_path)
        return [data.images[:, 0].flatten(1).tolist() for data in sets.values()]

    return orders


def test_shuffled_pixels_have_one_order_in_all_splits(positions):
    train, test = positions("shuffled")
    assert train == test == [train[0]] * 5
    assert sorted(train[0]) == list(range(256)) != train[0]
    assert positions("shuffled", corruption_seed=1)[0] != train


def test_random_pixels_have_an_order_for_each_image_of_each_split(positions):
    train, test = positions("random")
    assert len(set(map(tuple, train + test))) == 10
    assert all(sorted(order) == list(range(256)) for order in train + test)
    assert positions("random") == [train, test]
    assert positions("kept") == [[list(range(256))] * 5] * 2


def test_labels_of_the_splits_come_from_independent_streams():
    sets = prepare_data(replace(BASE, n_train=200, n_valid=200, n_test=200))
    labels = [data.labels for data in sets.values()]
    agreement = [(a == b).double().mean() for a, b in pairwise(labels)]
    assert max(agreement) < 0.2


def test_no_more_images_are_taken_than_asked_for_or_there(tmp_path):
    images = np.zeros((30, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(30) % 10)
    own = replace(BASE, dataset="mine.npz", n_test=0, batch_size=7)
    sizes = {
        n: len(prepare_data(replace(own, n_train=n), tmp_path)["train"]) for n in (7, 99, None)
    }
    assert sizes == {7: 7, 99: 30, None: 30}


def test_a_split_of_no_images_is_left_out():
    assert list(prepare_data(replace(BASE, n_valid=0, n_test=0))) == ["train"]
    assert list(prepare_data(replace(BASE, n_valid=5))) == ["train", "valid", "test"]


def test_partly_random_labels_are_the_level_asked_for():
    true, half = (prepare_data(replace(BASE, n_train=500, random_labels=r)) for r in (0.0, 0.5))
    expected = random_labels(true["train"], 0.5, seed=stream(0, "labels train"))
    assert torch.equal(half["train"].labels, expected.labels)


# ----------------------------------------------------------------------- before any work


def test_images_of_another_size_and_too_many_classes_are_refused(noise):
    check_size("small", noise(size=32))
    with pytest.raises(InvalidValue, match="images of 32 x 32 pixels, those of noise are 8 x 8"):
        check_size("small", noise(size=8))
    many = noise(size=32, classes=tuple("abcdefghijkl"))
    with pytest.raises(InvalidValue, match="'small' tells 10 classes apart, noise has 12"):
        check_size("small", many)
    check_size("small", noise(size=32, classes=("a", "b")))


def test_the_forms_of_a_model_are_known_before_it_is_built(each_kind):
    assert model_forms(each_kind) == forms(build_model(each_kind).state_dict())
