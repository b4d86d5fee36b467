"""The nine experiments of the original, each with its script."""

from collections.abc import Mapping
from dataclasses import replace

from bnnlib.errors import check_name
from bnnlib.experiments.experiment import Experiment

_SVHN = Experiment(
    name="svhn-random-labels",
    summary="SVHN with random labels, the base experiment",
    script="SVHN/svhn_random_labels.py",
    dataset="svhn",
    network="svhn",
    epochs=500,
    lr_final=1e-6,
    random_labels=1.0,
    original_seed=1234,
)
_CIFAR10 = Experiment(
    name="cifar10-random-labels",
    summary="CIFAR-10 with random labels, the base experiment",
    script="CIFAR-10/cifar10_random_labels.py",
    dataset="cifar10",
    network="cifar10",
    epochs=500,
    lr_final=3e-7,
    random_labels=1.0,
    original_seed=1234,
)
_STOCHASTIC = {"activation": "binary_sigmoid", "weights": "stochastic"}

_NINE = (
    _SVHN,
    replace(
        _SVHN,
        name="svhn-evaluation",
        summary="A saved SVHN memorizer, scored on its first 7,000 training rows with sign(W)",
        script="SVHN/svhn_evaluation_random_labels.py",
        epochs=0,  # the script sets 400 epochs and a batch of 30, and uses neither
        evaluates="svhn-random-labels",
        evaluation_rows=7000,
    ),
    replace(
        _SVHN,
        name="svhn-dropout",
        summary="SVHN with random labels and dropout before two dense layers' normalization",
        script="SVHN/svhn_random_labels_dropout.py",
        dropout=(0.25, 0.5),
    ),
    replace(
        _SVHN,
        name="svhn-l2",
        summary="SVHN with random labels and an L2 penalty that, as coded, penalizes nothing",
        script="SVHN/svhn_random_labels_l2_regularization.py",
        l2=5e-4,
    ),
    replace(
        _SVHN,
        name="svhn-stochastic",
        summary="SVHN with random labels, stochastic weights and 0/1 activations",
        script="SVHN/svhn_stochastic_sigmoid_random_labels.py",
        **_STOCHASTIC,
        evaluation_weights="stochastic",
        evaluation_statistics="batch",
        evaluation_classes="apart",
        epochs=1500,
        random_label_splits=("train", "valid"),
    ),
    _CIFAR10,
    replace(
        _CIFAR10,
        name="cifar10-dropout",
        summary="CIFAR-10 with random labels and dropout before two dense layers' normalization",
        script="CIFAR-10/cifar10_train_acc_dropout.py",
        dropout=(0.5, 0.5),
        epochs=1000,
        original_seed=None,
    ),
    replace(
        _CIFAR10,
        name="cifar10-stochastic",
        summary="CIFAR-10 with random labels, stochastic weights and 0/1 activations",
        script="CIFAR-10/cifar10_stochastic_sigmoid_random_labels.py",
        **_STOCHASTIC,
        evaluation_weights="real",
        epochs=1000,
    ),
    replace(
        _CIFAR10,
        name="cifar10-gaussian-inputs",
        summary="CIFAR-10's true labels on Gaussian noise",
        script="CIFAR-10/cifar10_randX_input.py",
        random_labels=0.0,
        random_label_splits=(),
        gaussian_variance=0.1,
        epochs=1000,
        original_seed=None,
    ),
)
PUBLISHED: Mapping[str, Experiment] = {e.name: e for e in _NINE}


def published(name: str) -> Experiment:
    """The one of the nine with that name; raises InvalidValue that names the nearest one."""
    check_name("experiment", name, PUBLISHED)
    return PUBLISHED[name]
