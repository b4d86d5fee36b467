from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from bnnlib.catalogue import (
    PROFILES,
    PUBLISHED,
    at_profile,
    by_profile,
    full,
    published,
    quick,
    smoke,
)
from bnnlib.errors import InvalidValue

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


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("dataset", "cifar", "unknown dataset 'cifar'; did you mean 'cifar10'"),
        ("network", "smal", "did you mean 'small'"),
        ("schedule", "lin", "allowed: exponential, linear"),
        ("activation", "tanh", "did you mean 'binary_tanh'"),
        ("weights", "determinist", "did you mean 'deterministic'"),
        ("evaluation_weights", "reel", "did you mean 'real'"),
        ("evaluation_statistics", "runing", "did you mean 'running'"),
        ("l2_target", "latent", "unknown l2_target 'latent'"),
        ("random_label_splits", ("train", "tests"), "did you mean 'test'"),
        ("gaussian_splits", ("valdi",), "did you mean 'valid'"),
        ("epochs", -1, "epochs must be at least 0, got -1"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("evaluate_every", 0, "evaluate_every must be at least 1, got 0"),
        ("width", 0.0, "width must be above 0, got 0.0"),
        ("lr_start", 0.0, "lr_start must be above 0"),
        ("lr_final", -1e-9, "lr_final must be at least 0, got -1e-09"),
        ("random_labels", 1.01, "random_labels must be 0 to 1, got 1.01"),
        ("gaussian_variance", -0.1, "gaussian_variance must be at least 0, got -0.1"),
        ("l2", -1.0, "l2 must be at least 0, got -1.0"),
        ("dropout", (0.5, 1.0), "dropout must be at least 0 and below 1, got .0.5, 1.0."),
        ("dropout", (0.1,) * 4, "dropout must be at most three numbers"),
        ("n_train", 0, "n_train must be none or at least 1, got 0"),
        ("n_test", -1, "n_test must be none or at least 0, got -1"),
        ("seed", -1, "seed.*-1"),
        ("corruption_seed", -1, "corruption_seed.*-1"),
        ("data_seed", -1, "data_seed.*-1"),
        ("evaluation_rows", 0, "evaluation_rows.*0"),
    ],
)
def test_a_bad_field_is_refused_with_its_name_and_what_is_allowed(field, value, text):
    with pytest.raises(InvalidValue, match=text):
        replace(BASE, **{field: value})


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
    size |= {"n_train", "n_valid", "n_test"}
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


def test_unknown_profile_is_refused_with_the_nearest():
    with pytest.raises(InvalidValue, match="did you mean 'quick'"):
        at_profile(BASE, "quik")


def test_a_choice_by_profile():
    assert by_profile("quick", smoke=100, quick=2000, full=None) == 2000
    assert by_profile("full", smoke=100, quick=2000, full=None) is None
    with pytest.raises(InvalidValue, match="did you mean 'smoke'"):
        by_profile("smok", smoke=100, quick=2000)
