"""Five lengths of an experiment: smoke (seconds), quick, reduced (minutes), large and full."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bnnlib.errors import check_name
from bnnlib.experiments.experiment import Experiment
from bnnlib.names import DRAWN, SVHN_SUBSET

LOOK_ALIKE = {"svhn": "glyphs", "cifar10": "shapes"}


def full(experiment: Experiment) -> Experiment:
    """The experiment as it is: the original's data, network and epochs, and every image tested.

    The original drops the last partial batch of a set when it tests, as both do in training.
    """
    return experiment


def quick(experiment: Experiment) -> Experiment:
    """Under a minute on two cores: 500 drawn images, two wide convolutions, linear decay to 0.

    The rates must end near 0: while signs still flip, errors jump by points from one epoch to
    the next. A narrow copy of the deep network is far from memorizing after this time.
    """
    return replace(
        experiment,
        dataset=LOOK_ALIKE.get(experiment.dataset, experiment.dataset),
        network=experiment.network if experiment.dataset == "patterns" else "small",
        epochs=40 if experiment.epochs else 0,
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


def large(experiment: Experiment) -> Experiment:
    """Half an hour on one core: the network of `reduced`, five times as many images of CIFAR-10.

    Of SVHN the 10,000 images are from the complete file. All images of the test set are tested.
    """
    e = experiment
    if e.dataset in DRAWN:
        return e
    epochs = 120 if e.epochs else 0
    return replace(reduced(e), dataset=e.dataset, epochs=epochs, n_train=10_000, n_test=None)


PROFILES: Mapping[str, Callable[[Experiment], Experiment]] = {
    "smoke": smoke,
    "quick": quick,
    "reduced": reduced,
    "large": large,
    "full": full,
}


def at_profile(experiment: Experiment, profile: str) -> Experiment:
    """`smoke`, `quick`, `reduced`, `large` or `full` by name; InvalidValue for another."""
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
