"""What the original lacks: controls, full-precision twins and corrected forms of the nine.

A variant states only what it changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from bnnlib.errors import InvalidValue, nearest
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.originals import PUBLISHED, published

TRUE_LABELS = {"random_labels": 0.0, "random_label_splits": ()}
JULY_2017 = {"svhn": (0.25, 0.5, 0.25), "cifar10": (0.5, 0.5, 0.5)}  # until commit 2e0f19e


def _variant(base: str, name: str, summary: str, **changes) -> Experiment:
    return replace(published(base), name=name, summary=summary, script="", **changes)


def _controls(data: str) -> Iterator[Experiment]:
    base = f"{data}-random-labels"
    # No validation: SVHN's shares 4,000 images with the training set, a leak for true labels.
    yield _variant(base, f"{data}-true-labels", "Control: true labels", **TRUE_LABELS, n_valid=0)
    yield _variant(base, f"{data}-float", "Full-precision twin, random labels", binary=False)
    yield _variant(
        base,
        f"{data}-float-true-labels",
        "Full-precision twin, true labels",
        **TRUE_LABELS,
        n_valid=0,
        binary=False,
    )


def _noise_levels(data: str) -> Iterator[Experiment]:
    for percent in (25, 50, 75, 100):
        yield _variant(
            f"{data}-random-labels",
            f"{data}-noise-{percent}",
            f"{percent} % of the training labels random, all others true",
            random_labels=percent / 100,
            random_label_splits=("train",),
            n_valid=0,
        )


def _dropouts(data: str) -> Iterator[Experiment]:
    base = f"{data}-dropout"
    july = "Dropout as the code had it in July 2017, on the scores too"
    yield _variant(base, f"{base}-july-2017", july, dropout=JULY_2017[data])
    after = "Dropout after the activation, where a dropped unit is 0"
    yield _variant(base, f"{base}-after-activation", after, dropout_position="after_activation")


def _penalties() -> Iterator[Experiment]:
    for coefficient in ("5e-4", "5e-5", "5e-6", "5e-7"):
        yield _variant(
            "svhn-l2",
            f"svhn-l2-weights-{coefficient}",
            f"L2 of {coefficient} that reaches the latent weights of the dense layers",
            l2=float(coefficient),
            l2_target="weights",
        )
    gamma = "L2 of 5e-4 on the scales of the dense layers' normalizations"
    yield _variant("svhn-l2", "svhn-l2-gamma", gamma, l2_target="gamma")
    yield _variant(
        "svhn-l2",
        "svhn-l2-weights-5e-4-true-labels",
        "Control of svhn-l2-weights-5e-4: true labels",
        **TRUE_LABELS,
        n_valid=0,
        l2=5e-4,
        l2_target="weights",
    )


def _two_by_two(data: str) -> Iterator[Experiment]:
    """The three other cells beside DATA-stochastic, tested as sign(W) with running averages."""
    cells = {
        "sigmoid-deterministic": ("binary_sigmoid", "deterministic", "0/1 activations, sign(W)"),
        "tanh-stochastic": ("binary_tanh", "stochastic", "+1/-1 activations, sampled weights"),
        "tanh-deterministic": ("binary_tanh", "deterministic", "+1/-1 activations, sign(W)"),
    }
    for name, (activation, weights, summary) in cells.items():
        yield _variant(
            f"{data}-stochastic",
            f"{data}-{name}",
            f"{summary}, as long as {data}-stochastic; true test labels",
            activation=activation,
            weights=weights,
            evaluation_weights="deterministic",
            evaluation_statistics="running",
            evaluation_classes="mixed",
            random_label_splits=("train", "valid"),
        )


def _inputs() -> Iterator[Experiment]:
    base = "cifar10-gaussian-inputs"
    images = {"gaussian_variance": 0.0, "gaussian_splits": ()}
    matched = "Gaussian noise with the mean and variance of the images, true labels"
    yield _variant(base, "cifar10-gaussian-matched", matched, gaussian_matched=True)
    both = "Random labels on Gaussian noise"
    labels = {"random_labels": 1.0, "random_label_splits": ("train",)}
    yield _variant(base, "cifar10-gaussian-random-labels", both, **labels)
    shuffled = "True labels, the pixels of all images in one random order"
    yield _variant(base, "cifar10-shuffled-pixels", shuffled, **images, pixels="shuffled")
    own = "True labels, the pixels of each image in a random order of its own"
    yield _variant(base, "cifar10-random-pixels", own, **images, pixels="random")


CAPACITY = Experiment(
    name="capacity",
    summary="Labels drawn by lot for images of coin tosses, to count memorized bits",
    dataset="patterns",
    network="dense",
    epochs=200,
    schedule="linear",
    lr_final=0.0,
    n_train=2000,
    n_valid=0,
    n_test=500,
    evaluate_every=1_000_000,  # after the last epoch only
    probes=("bits",),
)

_EACH = (_controls, _noise_levels, _dropouts, _two_by_two)
_ALL = (
    *(variant for make in _EACH for data in ("svhn", "cifar10") for variant in make(data)),
    *_penalties(),
    *_inputs(),
    CAPACITY,
)
VARIANTS: Mapping[str, Experiment] = {variant.name: variant for variant in _ALL}
EXPERIMENTS: Mapping[str, Experiment] = {**PUBLISHED, **VARIANTS}


def named(name: str) -> Experiment:
    """One of the nine or of the variants; raises InvalidValue that names the nearest."""
    if name not in EXPERIMENTS:
        raise InvalidValue(
            f"unknown experiment {name!r}; {nearest(name, EXPERIMENTS)}(allowed: "
            f"{', '.join(PUBLISHED)}, and the variants that `python -m bnnlib list --variants` "
            "shows)"
        )
    return EXPERIMENTS[name]
