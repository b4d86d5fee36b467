"""The nine as their scripts have them, and what a profile makes of an experiment."""

from dataclasses import asdict, replace

import pytest

from bnnlib.errors import InvalidValue
from bnnlib.experiments.originals import PUBLISHED, published
from bnnlib.experiments.profiles import PROFILES, at_profile, by_profile, quick, reduced, smoke
from bnnlib.experiments.variants import EXPERIMENTS

# Typed from a reading of the scripts: file, epochs, last learning rate, its factor per epoch, steps
# in all, NumPy's seed; what differs from the settings that all others have in common.
STOCHASTIC = {"activation": "binary_sigmoid", "weights": "stochastic"}
SVHN_STOCHASTIC = STOCHASTIC | {
    "evaluation_weights": "stochastic",
    "evaluation_statistics": "batch",
    "evaluation_classes": "apart",
    "random_label_splits": ("train", "valid"),
}
NOISE = {"random_labels": 0.0, "random_label_splits": (), "gaussian_variance": 0.1}
EVALUATION = {"evaluates": "svhn-random-labels", "evaluation_rows": 7000}
# fmt: off
COMMON = {
    "batch_size": 50, "lr_start": 1e-3, "schedule": "exponential", "loss": "squared_hinge",
    "optimizer": "binary_adam", "width": 1.0, "binary": True,
    "activation": "binary_tanh", "weights": "deterministic", "evaluation_weights": "deterministic",
    "evaluation_statistics": "running", "evaluation_classes": "mixed", "evaluation_samples": 1,
    "dropout": (),
    "dropout_position": "before_norm", "l2": 0.0, "l2_target": "nothing", "random_labels": 1.0,
    "random_label_splits": ("train", "valid", "test"), "gaussian_variance": 0.0,
    "gaussian_splits": ("train",), "gaussian_matched": False, "gaussian_shape": "white",
    "pixels": "kept", "n_train": None, "n_valid": None, "n_test": None,
    "evaluate_every": 1, "probes": (), "seed": 0,
    "corruption_seed": 0, "data_seed": 0, "evaluates": "", "evaluation_rows": None,
    "run_folder": "",
}
SCRIPTS = {
    "svhn-random-labels": ("random_labels", 500, 1e-6, 0.986279486, 732_500, 1234, {}),
    "svhn-evaluation": ("evaluation_random_labels", 0, 1e-6, None, 0, 1234, EVALUATION),
    "svhn-dropout": (
        "random_labels_dropout", 500, 1e-6, 0.986279486, 732_500, 1234, {"dropout": (0.25, 0.5)},
    ),
    "svhn-l2": (
        "random_labels_l2_regularization", 500, 1e-6, 0.986279486, 732_500, 1234, {"l2": 5e-4},
    ),
    "svhn-stochastic": (
        "stochastic_sigmoid_random_labels", 1500, 1e-6, 0.995405417, 2_197_500, 1234,
        SVHN_STOCHASTIC,
    ),
    "cifar10-random-labels": ("random_labels", 500, 3e-7, 0.983907435, 450_000, 1234, {}),
    "cifar10-dropout": (
        "train_acc_dropout", 1000, 3e-7, 0.991921083, 900_000, None, {"dropout": (0.5, 0.5)},
    ),
    "cifar10-stochastic": (
        "stochastic_sigmoid_random_labels", 1000, 3e-7, 0.991921083, 900_000, 1234,
        STOCHASTIC | {"evaluation_weights": "real"},
    ),
    "cifar10-gaussian-inputs": ("randX_input", 1000, 3e-7, 0.991921083, 900_000, None, NOISE),
}
# fmt: on


def test_the_nine_are_published_under_their_names():
    assert list(PUBLISHED) == list(SCRIPTS)
    assert [published(name).name for name in SCRIPTS] == list(SCRIPTS)
    with pytest.raises(InvalidValue, match="did you mean 'svhn-dropout'"):
        published("svhn-dropuot")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_experiment_is_that_of_its_script(name):
    file, epochs, lr_final, decay, steps, seed, differing = SCRIPTS[name]
    e, data = published(name), name.split("-")[0]
    folder = {"svhn": "SVHN", "cifar10": "CIFAR-10"}[data]
    assert e.script == f"{folder}/{data}_{file}.py"
    assert (e.lr_decay, e.steps) == (pytest.approx(decay, abs=5e-10), steps)
    stated = {"name": name, "dataset": data, "network": data, "epochs": epochs}
    stated |= {"lr_final": lr_final, "original_seed": seed}
    assert e.spec() == COMMON | stated | differing


# ------------------------------------------------------------------------------ the profiles


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_changes_the_size_and_nothing_else(name, profile):
    size = {"dataset", "network", "epochs", "schedule", "lr_final", "width", "evaluate_every"}
    size |= {"n_train", "n_valid", "n_test"} | (
        {"probes"} if profile in ("reduced", "large") else set()
    )
    original, changed = (
        asdict(e) for e in (EXPERIMENTS[name], at_profile(EXPERIMENTS[name], profile))
    )
    differing = {k for k in original if original[k] != changed[k]}
    assert differing <= (set() if profile == "full" else size)


def test_small_profiles_draw_a_look_alike_of_the_published_sets_alone():
    for name, drawn in (("svhn-l2", "glyphs"), ("cifar10-dropout", "shapes")):
        assert quick(published(name)).dataset == smoke(published(name)).dataset == drawn
    assert quick(replace(published("svhn-l2"), dataset="mine.npz")).dataset == "mine.npz"
    patterns = replace(published("svhn-l2"), dataset="patterns", network="dense")
    assert (quick(patterns).dataset, smoke(patterns).network) == ("patterns", "dense")
    assert reduced(patterns) == patterns


def test_a_choice_by_profile_is_that_of_the_next_shorter_one_that_has_one():
    choices = {"smoke": 100, "quick": 2000, "full": None}
    found = {profile: by_profile(profile, **choices) for profile in PROFILES}
    assert found == {"smoke": 100, "quick": 2000, "reduced": 2000, "large": 2000, "full": None}
    with pytest.raises(InvalidValue, match="did you mean 'quick'"):
        by_profile("full", smoke=100, quik=2000)
    with pytest.raises(InvalidValue, match="did you mean 'smoke'"):
        by_profile("smok", smoke=100, quick=2000)
