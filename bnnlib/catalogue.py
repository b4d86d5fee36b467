"""An experiment as data: the nine of the original, and three lengths for each.

In: a name, a profile, settings. Out: an `Experiment`. Next file: `experiments.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bnnlib.data import DATASETS, DRAWN, SIZES
from bnnlib.errors import InvalidValue, check_name
from bnnlib.layers import MODES
from bnnlib.models import ACTIVATIONS, ARCHITECTURES
from bnnlib.train import SCHEDULES

EVERY_SPLIT = ("train", "valid", "test")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run. Variants: `dataclasses.replace(experiment, field=...)`.

    Raises InvalidValue for a name or number outside what the field allows.
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
    dropout: tuple[float, ...] = ()  # drop probability after each dense layer, before its norm
    l2: float = 0.0  # coefficient of the penalty
    l2_target: str = "nothing"  # what the penalty reaches; the original's reached nothing

    random_labels: float = 0.0  # share of the labels drawn anew
    random_label_splits: tuple[str, ...] = EVERY_SPLIT
    gaussian_variance: float = 0.0  # of inputs that replace the images; 0 keeps the images
    gaussian_splits: tuple[str, ...] = ("train",)

    n_train: int | None = None  # images at most, the first ones; None: the whole split
    n_valid: int | None = None  # 0: no validation
    n_test: int | None = None  # 0: no test
    evaluate_every: int = 1  # epochs

    seed: int = 0  # initial weights, order of batches, dropout, stochastic weights
    corruption_seed: int = 0  # random labels, Gaussian inputs
    data_seed: int = 0  # which drawing of "glyphs" or "shapes"
    original_seed: int | None = None  # the script's NumPy seed; its labels were never seeded

    evaluates: str = ""  # the experiment whose run is evaluated; "": this one trains
    evaluation_rows: int | None = None  # first training rows that are evaluated
    run_folder: str = ""  # the run to evaluate

    def __post_init__(self):
        if not self.dataset.endswith(".npz"):
            check_name("dataset", self.dataset, DATASETS)
        check_name("network", self.network, ARCHITECTURES)
        check_name("schedule", self.schedule, SCHEDULES)
        check_name("activation", self.activation, ACTIVATIONS)
        check_name("weights", self.weights, MODES)
        check_name("evaluation_weights", self.evaluation_weights, MODES)
        check_name("evaluation_statistics", self.evaluation_statistics, ("running", "batch"))
        check_name("l2_target", self.l2_target, ("nothing",))
        for split in (*self.random_label_splits, *self.gaussian_splits):
            check_name("split", split, EVERY_SPLIT)
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("epochs", "l2", "gaussian_variance", "seed", "corruption_seed", "data_seed"):
            self._check(name, lambda value: value >= 0, "at least 0")
        for name in ("batch_size", "evaluate_every"):
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in ("width", "lr_start"):
            self._check(name, lambda value: value > 0, "above 0")
        for name in ("n_train", "evaluation_rows"):
            self._check(name, lambda value: value is None or value >= 1, "none or at least 1")
        for name in ("n_valid", "n_test"):
            self._check(name, lambda value: value is None or value >= 0, "none or at least 0")
        self._check("random_labels", lambda value: 0 <= value <= 1, "0 to 1")
        self._check("dropout", lambda value: len(value) <= 3, "at most three numbers")
        self._check(
            "dropout", lambda value: all(0 <= p < 1 for p in value), "at least 0 and below 1"
        )
        if self.schedule == "linear":
            self._check("lr_final", lambda value: value >= 0, "at least 0")
        else:
            self._check("lr_final", lambda value: value > 0, "above 0, or the schedule linear")

    def _check(self, name: str, is_good: Callable[[Any], bool], allowed: str) -> None:
        value = getattr(self, name)
        if not is_good(value):
            raise InvalidValue(f"{name} must be {allowed}, got {value}")

    @property
    def lr_decay(self) -> float | None:
        """Factor on the learning rate after each epoch; None where it is no constant."""
        if self.schedule != "exponential" or self.epochs == 0:
            return None
        return (self.lr_final / self.lr_start) ** (1 / self.epochs)

    @property
    def steps(self) -> int | None:
        """Mini-batches trained on in all; None where the size of the set is not known yet."""
        whole = SIZES.get(self.dataset, {}).get("train")  # None for a .npz file
        n = self.n_train or whole
        if n and whole and self.dataset not in DRAWN:
            n = min(n, whole)
        return n and n // self.batch_size * self.epochs

    @property
    def missing(self) -> str:
        """What this version lacks to run the experiment; "" if nothing."""
        if (self.weights, self.evaluation_weights) != ("deterministic", "deterministic"):
            return "training and testing with other weights than sign(W) is not built yet"
        if self.evaluation_statistics == "batch":
            return "evaluation with batch statistics is not built yet"
        return ""


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
    """The experiment of that name; raises InvalidValue that names the nearest one."""
    check_name("experiment", name, PUBLISHED)
    return PUBLISHED[name]


# --------------------------------------------------------------------------- three lengths

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
        network="small",
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


PROFILES: Mapping[str, Callable[[Experiment], Experiment]] = {
    "smoke": smoke,
    "quick": quick,
    "full": full,
}


def at_profile(experiment: Experiment, profile: str) -> Experiment:
    """`smoke`, `quick` or `full` applied by name; raises InvalidValue for another."""
    check_name("profile", profile, PROFILES)
    return PROFILES[profile](experiment)


def by_profile(profile: str, **choices: Any) -> Any:
    """The choice for this profile: `by_profile("quick", smoke=100, quick=2000, full=None)`."""
    check_name("profile", profile, choices)
    return choices[profile]
