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
svhn-random-labels:b2cb07f6 svhn-evaluation:842d8c73 svhn-dropout:617ae4dc svhn-l2:c367a344
svhn-stochastic:cea8cf01 cifar10-random-labels:27a64e49 cifar10-dropout:8895f6aa
cifar10-stochastic:00fcc641 cifar10-gaussian-inputs:32050a3b
svhn-true-labels:a1488643 svhn-float:686d077b svhn-float-true-labels:fb8d41aa
cifar10-true-labels:58aff40e cifar10-float:2caaf2fb cifar10-float-true-labels:02ca7fa8
svhn-noise-25:76d0b929 svhn-noise-50:82859388 svhn-noise-75:7d036b49 svhn-noise-100:b9aacc2e
cifar10-noise-25:e54e3cd6 cifar10-noise-50:fc801574 cifar10-noise-75:37f5a730
cifar10-noise-100:5f636c6b svhn-dropout-july-2017:94f16d4a
svhn-dropout-after-activation:469fe468 cifar10-dropout-july-2017:da21f56e
cifar10-dropout-after-activation:8944a9a4 svhn-sigmoid-deterministic:24f846fc
svhn-tanh-stochastic:12d050e2 svhn-tanh-deterministic:fec95519
cifar10-sigmoid-deterministic:3898e7e0 cifar10-tanh-stochastic:36320881
cifar10-tanh-deterministic:6e2f540e svhn-l2-weights-5e-4:41ea578a svhn-l2-weights-5e-5:c8cc9576
svhn-l2-weights-5e-6:05eef4da svhn-l2-weights-5e-7:b1ab84af svhn-l2-gamma:58672d53
svhn-l2-weights-5e-4-true-labels:a5ccf72a
cifar10-gaussian-matched:43d214bd cifar10-gaussian-random-labels:0d371b28
cifar10-shuffled-pixels:5238744b cifar10-random-pixels:78064c23 capacity:b6972516
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
