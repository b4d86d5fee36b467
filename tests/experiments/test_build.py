"""An experiment becomes data and a network, each random act with a seed of its own."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from bnnlib.corruption import random_labels
from bnnlib.data.images import ImageSet, scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.experiments.build import build_model, inputs_of, prepare_data, resolve_device
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.experiments.variants import named
from bnnlib.layers import derive_seed
from bnnlib.models import binarynet
from bnnlib.names import DATASETS
from bnnlib.runs.result import parameter_hash

BASE = smoke(published("svhn-random-labels"))


def test_each_seed_decides_its_own_random_acts():
    def made(**seeds):
        e = replace(BASE, **seeds)
        hashes = {"weights": parameter_hash(build_model(e))}
        for split, data in prepare_data(e).items():
            hashes |= {f"{split} images": data.image_hash(), f"{split} labels": data.label_hash()}
        return hashes

    def changed(**seeds):
        return {name for name, value in made(**seeds).items() if value != base[name]}

    base = made()
    assert changed() == set()
    assert changed(seed=1) == {"weights"}
    assert changed(corruption_seed=1) == {"train labels", "test labels"}
    assert changed(data_seed=1) == {"train images", "test images"}


def test_the_weights_of_the_twin_are_glorot_draws_in_the_order_of_its_layers():
    generator = torch.Generator().manual_seed(derive_seed(0, "initial weights"))
    model = build_model(replace(BASE, binary=False))
    for name in ("conv1", "conv2", "dense3", "dense4", "dense5"):
        layer = model.get_submodule(name)
        expected = torch.nn.init.xavier_uniform_(torch.empty(layer.weight.shape), 1, generator)
        assert torch.equal(layer.weight, expected)
        assert not layer.bias.any()


def test_the_network_is_the_one_that_the_fields_describe():
    how = {"width": 0.25, "activation": "binary_sigmoid", "weights": "stochastic"}
    how |= {"dropout": (0.25,), "dropout_position": "after_activation"}
    expected = binarynet("small", generator=torch.Generator(), **how)
    assert str(build_model(replace(BASE, **how))) == str(expected)


@pytest.mark.parametrize("name", ["meta", "cuda:", "cpu:0 ", None])
def test_a_device_that_bnnlib_cannot_use_is_refused_with_those_it_can(name):
    with pytest.raises(InvalidValue) as caught:
        resolve_device(name)
    assert str(caught.value).startswith(f"unknown device {name!r}")
    assert str(caught.value).endswith("(allowed: auto, cpu, cuda, cuda:N)")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_where_there_is_no_gpu_that_is_said(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValue, match=f"'{name}' cannot be used here: .*; use 'cpu'"):
        resolve_device(name)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "corrupted"),
    [
        ({}, (1, 1, 1)),
        ({"random_label_splits": ("train", "valid")}, (1, 1, 0)),
        ({"random_labels": 0.0}, (0, 0, 0)),
        ({"gaussian_variance": 0.1, "random_label_splits": ("test",)}, (1, 0, 1)),
        ({"gaussian_variance": 0.1, "gaussian_splits": ("train", "test")}, (2, 1, 2)),
    ],
)
def test_only_the_named_splits_are_corrupted(changes, corrupted):
    sets = prepare_data(replace(BASE, n_valid=20, **changes))
    assert list(sets) == ["train", "valid", "test"]
    assert tuple(len(data.provenance) for data in sets.values()) == corrupted


def test_matched_noise_has_the_mean_and_spread_of_the_images_it_replaces():
    e = smoke(named("cifar10-gaussian-matched"))
    images = prepare_data(replace(e, gaussian_variance=0.0, gaussian_matched=False))
    pixels, x = scale_pixels(images["train"].images), prepare_data(e)["train"].images
    assert abs(pixels.std().item() - 0.1**0.5) > 0.05  # not what the original's noise has
    assert x.mean().item() == pytest.approx(pixels.mean().item(), abs=0.005)
    assert x.std().item() == pytest.approx(pixels.std().item(), rel=0.01)


@pytest.fixture
def positions(npz):
    """The orders of the pixels that an experiment makes: (images, 1024), by split."""
    # The value of a pixel says to which square of 2 x 2 it belongs.
    image = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(2, 0).repeat(2, 1)
    images, labels = np.broadcast_to(image, (5, 3, 32, 32)), np.arange(5)
    path = npz(train_images=images, test_images=images, train_labels=labels, test_labels=labels)

    def orders(pixels, **changes):
        own = replace(BASE, dataset=str(path), random_labels=0.0, pixels=pixels, **changes)
        return [data.images[:, 0].flatten(1).tolist() for data in prepare_data(own).values()]

    return orders


def test_shuffled_pixels_have_one_order_in_all_splits_random_ones_each_its_own(positions):
    kept = positions("kept")[0][0]
    train, test = positions("shuffled")
    assert train == test == [train[0]] * 5
    assert sorted(train[0]) == sorted(kept)
    assert kept != train[0] != positions("shuffled", corruption_seed=1)[0][0]
    train, test = positions("random")
    assert len(set(map(tuple, train + test))) == 10
    assert positions("random") == [train, test] != positions("random", corruption_seed=1)


def test_labels_of_the_splits_are_drawn_independently():
    sets = prepare_data(replace(BASE, n_train=200, n_valid=200, n_test=200))
    labels = [data.labels for data in sets.values()]
    assert max((a == b).double().mean() for a, b in pairwise(labels)) < 0.2


def test_partly_random_labels_are_the_level_asked_for():
    true, half = (prepare_data(replace(BASE, n_train=500, random_labels=r)) for r in (0.0, 0.5))
    expected = random_labels(true["train"], 0.5, seed=derive_seed(0, "labels train"))
    assert torch.equal(half["train"].labels, expected.labels)


@pytest.mark.parametrize(("asked", "taken"), [(7, 7), (99, 30), (None, 30)])
def test_no_more_images_are_taken_than_asked_for_or_there(asked, taken, npz):
    path = npz(images=np.zeros((30, 3, 32, 32), np.uint8), labels=np.arange(30) % 2)
    own = replace(BASE, dataset=str(path), n_train=asked, n_test=0, batch_size=7)
    assert {split: len(data) for split, data in prepare_data(own).items()} == {"train": taken}


@pytest.mark.parametrize("network", ["small", "dense", "mlp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_takes_the_channels_size_and_classes_of_the_data(network, channels, npz):
    path = npz(images=np.zeros((60, channels, 12, 12), np.uint8), labels=np.arange(60) % 12)
    own = replace(BASE, dataset=str(path), network=network, n_test=0)
    inputs = inputs_of(prepare_data(own)["train"])
    assert inputs == (channels, 12, 12)
    model = build_model(own, inputs=inputs).eval()
    assert model(torch.zeros(2, channels, 12, 12)).shape == (2, 12)
    assert build_model(own).state_dict().keys() == model.state_dict().keys()


def test_without_data_a_network_is_the_usual_one():
    layers = {name: build_model(replace(BASE, network=name))[0] for name in ("small", "svhn")}
    assert {name: layer.weight.shape[1] for name, layer in layers.items()} == {
        "small": 3,
        "svhn": 3,
    }
    usual = build_model(replace(BASE, network="mlp"))
    assert usual(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_images_that_are_not_square_are_refused(npz):
    path = npz(images=np.zeros((60, 3, 6, 8), np.uint8), labels=np.arange(60) % 10)
    with pytest.raises(InvalidValue, match="must be square, those of mine are 6 x 8"):
        prepare_data(replace(BASE, dataset=str(path), n_test=0))


def two_splits(size=8, channels=3, classes=10, names=()):
    """A maker of a data set whose training images are 8 x 8 in three colours, of ten classes."""

    def make(split):
        own = {"train": (8, 3, 10, ())}.get(split, (size, channels, classes, names))
        pixels = np.zeros((60, own[1], own[0], own[0]), np.uint8)
        return ImageSet(pixels, np.arange(60) % own[2], class_names=own[3])

    return make


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"size": 12}, r"images alike: \(3, 8, 8\) in training, \(3, 12, 12\) in test"),
        ({"channels": 1}, r"images alike: \(3, 8, 8\) in training, \(1, 8, 8\) in test"),
        ({"classes": 11}, r"classes alike: \('0', .* in training, \('0', .* in test"),
        ({"classes": 2, "names": ("1", "0")}, r"\('0', '1'\) in training, \('1', '0'\) in test"),
    ],
)
def test_splits_that_differ_are_refused(other, text, monkeypatch):
    monkeypatch.setitem(DATASETS.data, "own", two_splits(**other))
    with pytest.raises(InvalidValue, match=f"the splits of own must have .*{text}"):
        prepare_data(replace(BASE, dataset="own"))


def test_a_split_that_lacks_classes_has_those_of_the_training_images(monkeypatch):
    monkeypatch.setitem(DATASETS.data, "own", two_splits(classes=4))
    sets = prepare_data(replace(BASE, dataset="own"))
    assert sets["test"].class_names == sets["train"].class_names == tuple("0123456789")
