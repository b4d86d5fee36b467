"""A variant changes what its name says, and nothing else."""

from dataclasses import asdict

import pytest

from bnnlib.catalogue import PUBLISHED, published
from bnnlib.errors import InvalidValue
from bnnlib.variants import CAPACITY, VARIANTS, named

TRUE = {"random_labels": 0.0, "random_label_splits": (), "n_valid": 0}
TRAIN_ONLY = {"random_label_splits": ("train",), "n_valid": 0}
AFTER = {"dropout_position": "after_activation"}
IMAGES = {"gaussian_variance": 0.0, "gaussian_splits": ()}
# Cells of a 2 x 2 beside the original's stochastic scripts, all tested as sign(W) with averages.
CELL = {"evaluation_weights": "deterministic"}
CELL_SVHN = CELL | {"evaluation_statistics": "running"}
CELL_CIFAR10 = CELL | {"random_label_splits": ("train", "valid")}
TANH, DETERMINISTIC = {"activation": "binary_tanh"}, {"weights": "deterministic"}

# Base of each variant, and every field in which they differ, typed by hand.
CHANGES = {
    "svhn-true-labels": ("svhn-random-labels", TRUE),
    "svhn-float": ("svhn-random-labels", {"binary": False}),
    "svhn-float-true-labels": ("svhn-random-labels", TRUE | {"binary": False}),
    "cifar10-true-labels": ("cifar10-random-labels", TRUE),
    "cifar10-float": ("cifar10-random-labels", {"binary": False}),
    "cifar10-float-true-labels": ("cifar10-random-labels", TRUE | {"binary": False}),
    "svhn-noise-25": ("svhn-random-labels", TRAIN_ONLY | {"random_labels": 0.25}),
    "svhn-noise-50": ("svhn-random-labels", TRAIN_ONLY | {"random_labels": 0.5}),
    "svhn-noise-75": ("svhn-random-labels", TRAIN_ONLY | {"random_labels": 0.75}),
    "svhn-noise-100": ("svhn-random-labels", TRAIN_ONLY),
    "cifar10-noise-25": ("cifar10-random-labels", TRAIN_ONLY | {"random_labels": 0.25}),
    "cifar10-noise-50": ("cifar10-random-labels", TRAIN_ONLY | {"random_labels": 0.5}),
    "cifar10-noise-75": ("cifar10-random-labels", TRAIN_ONLY | {"random_labels": 0.75}),
    "cifar10-noise-100": ("cifar10-random-labels", TRAIN_ONLY),
    "svhn-dropout-july-2017": ("svhn-dropout", {"dropout": (0.25, 0.5, 0.25)}),
    "svhn-dropout-after-activation": ("svhn-dropout", AFTER),
    "cifar10-dropout-july-2017": ("cifar10-dropout", {"dropout": (0.5, 0.5, 0.5)}),
    "cifar10-dropout-after-activation": ("cifar10-dropout", AFTER),
    "svhn-sigmoid-deterministic": ("svhn-stochastic", CELL_SVHN | DETERMINISTIC),
    "svhn-tanh-stochastic": ("svhn-stochastic", CELL_SVHN | TANH),
    "svhn-tanh-deterministic": ("svhn-stochastic", CELL_SVHN | TANH | DETERMINISTIC),
    "cifar10-sigmoid-deterministic": ("cifar10-stochastic", CELL_CIFAR10 | DETERMINISTIC),
    "cifar10-tanh-stochastic": ("cifar10-stochastic", CELL_CIFAR10 | TANH),
    "cifar10-tanh-deterministic": ("cifar10-stochastic", CELL_CIFAR10 | TANH | DETERMINISTIC),
    "svhn-l2-weights-5e-4": ("svhn-l2", {"l2_target": "weights"}),
    "svhn-l2-weights-5e-5": ("svhn-l2", {"l2_target": "weights", "l2": 5e-5}),
    "svhn-l2-weights-5e-6": ("svhn-l2", {"l2_target": "weights", "l2": 5e-6}),
    "svhn-l2-weights-5e-7": ("svhn-l2", {"l2_target": "weights", "l2": 5e-7}),
    "svhn-l2-gamma": ("svhn-l2", {"l2_target": "gamma"}),
    "cifar10-gaussian-matched": ("cifar10-gaussian-inputs", {"gaussian_matched": True}),
    "cifar10-gaussian-random-labels": (
        "cifar10-gaussian-inputs",
        {"random_labels": 1.0, "random_label_splits": ("train",)},
    ),
    "cifar10-shuffled-pixels": ("cifar10-gaussian-inputs", IMAGES | {"pixels": "shuffled"}),
    "cifar10-random-pixels": ("cifar10-gaussian-inputs", IMAGES | {"pixels": "random"}),
}


def test_the_variants_are_these_and_the_capacity_experiment():
    assert list(VARIANTS) == [*CHANGES, "capacity"]
    assert not set(VARIANTS) & set(PUBLISHED)
    assert all(variant.name == name for name, variant in VARIANTS.items())


@pytest.mark.parametrize("name", CHANGES)
def test_a_variant_differs_from_its_base_in_the_fields_named(name):
    base, changes = CHANGES[name]
    here, there = asdict(published(base)), asdict(VARIANTS[name])
    found = {field: there[field] for field in here if there[field] != here[field]}
    assert set(found) >= {"name", "summary", "script"}
    assert {k: v for k, v in found.items() if k not in ("name", "summary", "script")} == changes
    assert there["script"] == ""  # no script of the original does this


def test_each_variant_says_something_of_its_own():
    texts = [variant.summary for variant in VARIANTS.values() if "-" in variant.name]
    by_data = {(text, name.split("-")[0]) for text, name in zip(texts, CHANGES, strict=True)}
    assert len(by_data) == len(CHANGES)


def test_the_capacity_experiment_has_nothing_but_random_labels_to_learn():
    assert (CAPACITY.dataset, CAPACITY.network, CAPACITY.n_valid) == ("patterns", "dense", 0)
    assert (CAPACITY.random_labels, CAPACITY.schedule, CAPACITY.lr_final) == (0, "linear", 0)


@pytest.mark.parametrize("name", ["svhn-l2", "svhn-l2-gamma", "capacity"])
def test_the_nine_and_the_variants_are_found_by_name(name):
    assert named(name).name == name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("svhn-droput", "svhn-dropout"), ("cifar10-nois-25", "cifar10-noise-25"), ("x", None)],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_where_to_look(name, nearest):
    with pytest.raises(InvalidValue) as caught:
        named(name)
    text = str(caught.value)
    assert text.startswith(f"unknown experiment {name!r}; ")
    assert (f"did you mean {nearest!r}?" in text) is (nearest is not None)
    assert all(published in text for published in PUBLISHED)
    assert "list --variants" in text
