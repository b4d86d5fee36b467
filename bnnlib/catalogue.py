"""An experiment as data: the nine of the original, and four lengths for each.

In: a name, a profile, settings. Out: an `Experiment`. Next file: `variants.py`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from bnnlib.data import DRAWN, SIZES, SVHN_SUBSET
from bnnlib.errors import check_name
from bnnlib.limits import EVERY_SPLIT, check_fields, defaults_of, fitting, refusing_wrong_names


@refusing_wrong_names
@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run. Variants: `dataclasses.replace(experiment, field=...)`.

    NumPy's numbers become Python's, an int a float where the field is one, a list a tuple.
    Raises InvalidValue for a name, type or number outside what the field allows, and for
    fields that contradict each other.
    """

    name: str
    summary: str  # one sentence
    dataset: str  # "svhn", "cifar10", "glyphs", "shapes" or the path of a .npz file
    network: str  # one of `models.ARCHITECTURES`
    epochs: int
    lr_final: float
    script: str = ""  # the original's file
    lr_start: float = 1e-3
    schedule: str = "exponential"  # one of `train.SCHEDULES`
    batch_size: int = 50

    width: float = 1.0  # multiplies channels and hidden units
    binary: bool = True  # False: the full-precision twin
    activation: str = "binary_tanh"  # +1/-1; "binary_sigmoid" is 1/0
    weights: str = "deterministic"  # in training: sign(W), or "stochastic" samples
    evaluation_weights: str = "deterministic"  # or "stochastic", or "real": W itself
    evaluation_statistics: str = "running"  # or "batch": those of the evaluated batch
    evaluation_samples: int = 1  # stochastic passes whose scores are averaged
    dropout: tuple[float, ...] = ()  # drop probability after each dense layer
    dropout_position: str = "before_norm"  # or "after_activation"
    l2: float = 0.0  # coefficient of the penalty on the dense layers
    l2_target: str = "nothing"  # what it reaches: as in the original, or "weights" or "gamma"

    random_labels: float = 0.0  # share of the labels drawn anew
    random_label_splits: tuple[str, ...] = EVERY_SPLIT
    gaussian_variance: float = 0.0  # of inputs that replace the images; 0 keeps the images
    gaussian_splits: tuple[str, ...] = ("train",)
    gaussian_matched: bool = False  # True: mean and variance are the images' own
    pixels: str = "kept"  # or "shuffled", all images alike, or "random", each its own order

    n_train: int | None = None  # images at most, the first ones; None: the whole split
    n_valid: int | None = None  # 0: no validation
    n_test: int | None = None  # 0: no test
    evaluate_every: int = 1  # epochs
    probes: tuple[str, ...] = ()  # more columns for the history, see `probes.PROBES`

    seed: int = 0  # initial weights, order of batches, dropout, stochastic weights
    corruption_seed: int = 0  # random labels, Gaussian inputs
    data_seed: int = 0  # which drawing of "glyphs" or "shapes"
    original_seed: int | None = None  # the script's NumPy seed; its labels were never seeded

    evaluates: str = ""  # the experiment whose run is evaluated; "": this one trains
    evaluation_rows: int | None = None  # first training rows that are evaluated
    run_folder: str = ""  # the run to evaluate

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, fitting(name, getattr(self, name), hint))
        check_fields(self)

    @property
    def lr_decay(self) -> float | None:
        """Factor on the learning rate after each epoch; None where it is no constant."""
        if self.schedule != "exponential" or self.epochs == 0:
            return None
        return (self.lr_final / self.lr_start) ** (1 / self.epochs)

    @property
    def steps(self) -> int | None:
        """Mini-batches trained on in all; None where the size of the set is not known yet."""
        n = self.images("train")
        return n and n // self.batch_size * self.epochs

    def images(self, split: str) -> int | None:
        """Images taken from a split; None where only a `.npz` file knows. It may hold fewer."""
        n, whole = getattr(self, f"n_{split}"), SIZES.get(self.dataset, {}).get(split)
        if n is None or (whole is not None and self.dataset not in DRAWN and n > whole):
            return whole
        return n

    def decisive(self) -> dict[str, Any]:
        """The fields that decide a run: all but the texts for readers."""
        return {k: v for k, v in vars(self).items() if k not in ("summary", "script")}

    def digest(self) -> str:
        """SHA-256 of the fields that decide a run and differ from their defaults.

        So a field that is added later, with a default, leaves the digests of old runs alone.
        """
        defaults = defaults_of(self)
        differing = {k: v for k, v in self.decisive().items() if v != defaults[k]}
        return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------ the nine of the original

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

_CATALOGUE = (
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
PUBLISHED: Mapping[str, Experiment] = {e.name: e for e in _CATALOGUE}


def published(name: str) -> Experiment:
    """The one of the nine with that name; raises InvalidValue that names the nearest one."""
    check_name("experiment", name, PUBLISHED)
    return PUBLISHED[name]


# ---------------------------------------------------------------------------- four lengths

LOOK_ALIKE = {"svhn": "glyphs", "cifar10": "shapes"}


def full(experiment: Experiment) -> Experiment:
    """The original, to the digit."""
    return experiment


def quick(experiment: Experiment) -> Experiment:
    """Under a minute on two cores: 500 drawn images, two wide convolutions, linear decay to 0.

    The rates must end near 0: while signs still flip, errors jump by points from one epoch to
    the next. A narrow copy of the deep network is far from memorizing after this time.
    """
    return replace(
        experiment,
        dataset=LOOK_ALIKE.get(experiment.dataset, experiment.dataset),
        network="dense" if experiment.network == "dense" else "small",
        epochs=60 if experiment.epochs else 0,
        schedule="linear",
        lr_final=0.0,
        n_train=500,
        n_valid=0,
        n_test=1000,
        evaluate_every=5,
    )


def smoke(experiment: Experiment) -> Experiment:
    """Seconds: every line of the run is executed, and nothing can be learned from it."""
    epochs = 2 if experiment.epochs else 0
    return replace(
        quick(experiment), epochs=epochs, n_train=100, n_test=100, width=0.125, evaluate_every=1
    )


def reduced(experiment: Experiment) -> Experiment:
    """Minutes on one core: some real images, and the original's network at reduced width.

    The lengths are the shortest tried at which random labels were memorized. The history
    gets the probes that say something about the experiment.
    """
    e, on_svhn = experiment, experiment.dataset == "svhn"
    if e.dataset in DRAWN:
        return e
    epochs = 100 if on_svhn else 60
    return replace(
        e,
        dataset=SVHN_SUBSET if on_svhn else e.dataset,
        width=0.5 if on_svhn else 0.25,
        epochs=epochs if e.epochs else 0,
        schedule="linear",
        lr_final=0.0,
        n_train=None if on_svhn else 2000,
        n_valid=0,
        n_test=None if on_svhn else 2000,
        evaluate_every=5,
        probes=_telling_probes(e),
    )


def _telling_probes(e: Experiment) -> tuple[str, ...]:
    names = {
        "flips": e.binary,
        "saturation": e.binary,
        "parts": 0 < e.random_labels < 1,
        "modes": e.weights == "stochastic",
        "critical": e.binary and e.weights == "deterministic" and e.dataset == "cifar10",
    }
    return tuple(name for name, tells in names.items() if tells)


PROFILES: Mapping[str, Callable[[Experiment], Experiment]] = {
    "smoke": smoke,
    "quick": quick,
    "reduced": reduced,
    "full": full,
}


def at_profile(experiment: Experiment, profile: str) -> Experiment:
    """`smoke`, `quick`, `reduced` or `full` applied by name; raises InvalidValue for another."""
    check_name("profile", profile, PROFILES)
    return PROFILES[profile](experiment)


def by_profile(profile: str, smoke: Any, **longer: Any) -> Any:
    """The choice for this profile, or for the next shorter one that has a choice.

    `by_profile("full", smoke=100, quick=2000)` is 2000.
    """
    check_name("profile", profile, PROFILES)
    choices = {"smoke": smoke, **longer}
    for name in choices:
        check_name("profile", name, PROFILES)
    names = list(PROFILES)
    shorter = names[: names.index(profile) + 1]
    return next(choices[name] for name in reversed(shorter) if name in choices)
