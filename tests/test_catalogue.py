from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace

import pytest

from bnnlib.catalogue import (
    PROFILES,
    PUBLISHED,
    Experiment,
    at_profile,
    by_profile,
    full,
    published,
    quick,
    reduced,
    smoke,
)
from bnnlib.errors import InvalidValue
from bnnlib.variants import VARIANTS

NAMES = [
    "svhn-random-labels",
    "svhn-evaluation",
    "svhn-dropout",
    "svhn-l2",
    "svhn-stochastic",
    "cifar10-random-labels",
    "cifar10-dropout",
    "cifar10-stochastic",
    "cifar10-gaussian-inputs",
]
BASE = smoke(published("svhn-random-labels"))


def test_an_experiment_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        BASE.epochs = 3


@pytest.mark.parametrize("profile", PROFILES)
def test_every_experiment_can_be_made_at_every_profile(profile):
    for experiment in (*PUBLISHED.values(), *VARIANTS.values()):
        assert at_profile(experiment, profile).name == experiment.name


def test_an_exponential_schedule_cannot_end_at_zero():
    with pytest.raises(InvalidValue, match="lr_final"):
        replace(published("svhn-random-labels"), lr_final=0.0)


@pytest.mark.parametrize(
    ("changes", "decay", "steps"),
    [
        ({}, 1e-3 ** (1 / 500), 732_500),
        ({"epochs": 0}, None, 0),
        ({"schedule": "linear"}, None, 732_500),
        ({"n_train": 120}, 1e-3 ** (1 / 500), 1_000),
        ({"n_train": 10**6}, 1e-3 ** (1 / 500), 732_500),  # there are 73,257 images
        ({"dataset": "mine.npz"}, 1e-3 ** (1 / 500), None),
        ({"dataset": "glyphs"}, 1e-3 ** (1 / 500), 100_000),  # 10,000 are drawn by default
        ({"dataset": "glyphs", "n_train": 20_000}, 1e-3 ** (1 / 500), 200_000),
    ],
)
def test_numbers_that_follow_from_the_fields(changes, decay, steps):
    experiment = replace(published("svhn-random-labels"), **changes)
    assert experiment.lr_decay == pytest.approx(decay)
    assert experiment.steps == steps


# ------------------------------------------------------------------ the nine and the profiles


def test_the_nine_are_published_under_their_names():
    assert list(PUBLISHED) == NAMES
    assert [published(name).name for name in NAMES] == NAMES
    with pytest.raises(InvalidValue, match="did you mean 'svhn-dropout'"):
        published("svhn-dropuot")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_changes_the_size_and_nothing_else(name, profile):
    size = {"dataset", "network", "epochs", "schedule", "lr_final", "width", "evaluate_every"}
    size |= {"n_train", "n_valid", "n_test"} | ({"probes"} if profile == "reduced" else set())
    original, changed = asdict(published(name)), asdict(at_profile(published(name), profile))
    assert {k for k in original if original[k] != changed[k]} <= (
        set() if profile == "full" else size
    )


@pytest.mark.parametrize(("name", "drawn"), [("svhn-l2", "glyphs"), ("cifar10-dropout", "shapes")])
def test_small_profiles_draw_a_look_alike_and_full_is_the_original(name, drawn):
    assert quick(published(name)).dataset == smoke(published(name)).dataset == drawn
    assert full(published(name)) == published(name)
    own = replace(published(name), dataset="mine.npz")
    assert quick(own).dataset == "mine.npz"


SVHN_REDUCED = {"dataset": "svhn_exact_subset.npz", "width": 0.5, "epochs": 100}
CIFAR10_REDUCED = {"width": 0.25, "epochs": 60, "n_train": 2000, "n_test": 2000}
FOR_ALL = {"schedule": "linear", "lr_final": 0.0, "n_valid": 0, "evaluate_every": 5}


@pytest.mark.parametrize(
    ("name", "changes", "probes"),
    [
        ("svhn-random-labels", SVHN_REDUCED, ("flips", "saturation")),
        ("svhn-stochastic", SVHN_REDUCED, ("flips", "saturation", "modes")),
        ("svhn-evaluation", SVHN_REDUCED | {"epochs": 0}, ("flips", "saturation")),
        ("cifar10-dropout", CIFAR10_REDUCED, ("flips", "saturation", "critical")),
        ("cifar10-stochastic", CIFAR10_REDUCED, ("flips", "saturation", "modes")),
    ],
)
def test_reduced_trains_the_originals_network_on_some_real_images(name, changes, probes):
    expected = replace(published(name), **FOR_ALL, **changes, probes=probes)
    assert reduced(published(name)) == expected


@pytest.mark.parametrize(
    ("changes", "probes"),
    [
        ({"random_labels": 0.5}, ("flips", "saturation", "parts", "critical")),
        ({"random_labels": 0.0}, ("flips", "saturation", "critical")),
        ({"binary": False}, ()),
    ],
)
def test_reduced_records_what_tells_something(changes, probes):
    assert reduced(replace(published("cifar10-random-labels"), **changes)).probes == probes


def test_reduced_leaves_a_drawn_set_as_it_is():
    drawn = replace(published("svhn-l2"), dataset="patterns", network="dense")
    assert reduced(drawn) == drawn
    assert (quick(drawn).dataset, smoke(drawn).network) == ("patterns", "dense")


def test_unknown_profile_is_refused_with_the_nearest():
    with pytest.raises(InvalidValue, match="did you mean 'quick'"):
        at_profile(BASE, "quik")


def test_a_choice_by_profile():
    assert by_profile("quick", smoke=100, quick=2000, full=None) == 2000
    assert by_profile("full", smoke=100, quick=2000, full=None) is None
    assert by_profile("reduced", smoke=100, quick=2000, full=None) == 2000
    assert by_profile("full", smoke=100) == 100
    with pytest.raises(InvalidValue, match="did you mean 'quick'"):
        by_profile("full", smoke=100, quik=2000)
    with pytest.raises(InvalidValue, match="did you mean 'smoke'"):
        by_profile("smok", smoke=100, quick=2000)


# ---------------------------------------------------------------------------------- the digest

# For each field that decides a run, a value that differs from `BASE`.
OTHER = {
    "name": "svhn-l2",
    "dataset": "shapes",
    "network": "svhn",
    "epochs": 3,
    "lr_final": 1e-9,
    "lr_start": 1e-2,
    "schedule": "exponential",
    "batch_size": 25,
    "width": 0.25,
    "binary": False,
    "activation": "binary_sigmoid",
    "weights": "stochastic",
    "evaluation_weights": "real",
    "evaluation_statistics": "batch",
    "evaluation_samples": 2,
    "dropout": (0.5,),
    "dropout_position": "after_activation",
    "l2": 1e-3,
    "l2_target": "gamma",
    "random_labels": 0.5,
    "random_label_splits": ("train",),
    "gaussian_variance": 0.1,
    "gaussian_splits": (),
    "gaussian_matched": True,
    "pixels": "random",
    "n_train": 99,
    "n_valid": 1,
    "n_test": 0,
    "evaluate_every": 2,
    "probes": ("flips",),
    "seed": 1,
    "corruption_seed": 1,
    "data_seed": 1,
    "original_seed": None,
    "evaluates": "svhn-random-labels",
    "evaluation_rows": 7,
    "run_folder": "somewhere",
}
NEEDS = {
    "schedule": {"lr_final": 1e-9},
    "evaluation_samples": {"evaluation_weights": "stochastic"},
    "dropout_position": {"dropout": (0.5,)},
    "l2_target": {"l2": 1e-3},
    "gaussian_matched": {"gaussian_variance": 0.1},
    "evaluation_rows": {"evaluates": "svhn-random-labels"},
    "run_folder": {"evaluates": "svhn-random-labels"},
}


def test_every_field_decides_but_the_two_texts():
    assert set(OTHER) == {field.name for field in fields(Experiment)} - {"summary", "script"}
    assert set(BASE.decisive()) == set(OTHER)


@pytest.mark.parametrize("field", OTHER)
def test_the_digest_changes_with_every_field_that_decides(field):
    here = replace(BASE, **NEEDS.get(field, {}))
    there = replace(here, **{field: OTHER[field]})
    assert there.digest() != here.digest()
    assert len(here.digest()) == 64


def test_the_digest_ignores_the_texts():
    assert replace(BASE, summary="other words", script="other.py").digest() == BASE.digest()


def test_a_field_added_later_leaves_old_digests_alone():
    @dataclass(frozen=True)
    class Later(Experiment):
        added: int = 3

    values = {field.name: getattr(BASE, field.name) for field in fields(BASE)}
    assert Later(**values).digest() == BASE.digest()
    assert Later(**values, added=4).digest() != BASE.digest()
