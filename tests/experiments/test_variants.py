"""Every experiment at every length is, to the last digit, the one that was ever run."""

import hashlib

import pytest

from bnnlib.errors import InvalidValue
from bnnlib.experiments.originals import PUBLISHED
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.experiments.variants import EXPERIMENTS, VARIANTS, named

# The beginning of the SHA-256 of an experiment's digests at the five lengths. A change makes
# all stored runs of it another experiment.
DIGESTS = """
svhn-random-labels:830a3ecd svhn-evaluation:842d8c73 svhn-dropout:be720512 svhn-l2:cc34cfb5
svhn-stochastic:7ed786b7 cifar10-random-labels:6e781465 cifar10-dropout:152af3c4
cifar10-stochastic:270a7886 cifar10-gaussian-inputs:2a8a9641
svhn-true-labels:e5a98fa5 svhn-float:bc3bdc6b svhn-float-true-labels:74d8c8cf
cifar10-true-labels:f2791a65 cifar10-float:806d53fd cifar10-float-true-labels:b7d70daa
svhn-noise-25:fe1a27b9 svhn-noise-50:05948bbc svhn-noise-75:975b9213 svhn-noise-100:34294825
cifar10-noise-25:16e61574 cifar10-noise-50:346b02a2 cifar10-noise-75:305735a9
cifar10-noise-100:b699f624 svhn-dropout-july-2017:5802a347
svhn-dropout-after-activation:8c96ee23 cifar10-dropout-july-2017:4775f211
cifar10-dropout-after-activation:f22d2f9c svhn-sigmoid-deterministic:50b3d2f6
svhn-tanh-stochastic:6a9a167b svhn-tanh-deterministic:3617d512
cifar10-sigmoid-deterministic:156151d3 cifar10-tanh-stochastic:d9f9ce47
cifar10-tanh-deterministic:da2b9e47 svhn-l2-weights-5e-4:873e3592 svhn-l2-weights-5e-5:ec8035e5
svhn-l2-weights-5e-6:8938754e svhn-l2-weights-5e-7:119060a6 svhn-l2-gamma:551e953b
svhn-l2-weights-5e-4-true-labels:7125cc9f
cifar10-gaussian-matched:ef113f8f cifar10-gaussian-random-labels:9051a4b0
cifar10-shuffled-pixels:87022b2b cifar10-random-pixels:229982a7 capacity:53a9dd2a
"""
DIGESTS = dict(entry.split(":") for entry in DIGESTS.split())


def test_the_experiments_are_the_nine_and_these_variants():
    assert list(EXPERIMENTS) == [*PUBLISHED, *VARIANTS] == list(DIGESTS)
    assert {name: e.name for name, e in EXPERIMENTS.items()} == {name: name for name in DIGESTS}


@pytest.mark.parametrize("name", DIGESTS)
def test_an_experiment_is_what_it_always_was_at_every_length(name):
    digests = "".join(at_profile(named(name), profile).digest() for profile in PROFILES)
    assert hashlib.sha256(digests.encode()).hexdigest()[:8] == DIGESTS[name]


@pytest.mark.parametrize(
    ("name", "hint"), [("cifar10-nois-25", "did you mean 'cifar10-noise-25'? "), ("x", "")]
)
def test_an_unknown_name_is_refused_with_the_nearest_and_where_to_look(name, hint):
    with pytest.raises(InvalidValue) as caught:
        named(name)
    assert str(caught.value) == (
        f"unknown experiment {name!r}; {hint}(allowed: {', '.join(PUBLISHED)}, and the variants "
        "that `python -m bnnlib list --variants` shows)"
    )
