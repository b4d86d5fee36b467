"""Every experiment at every length is, to the last digit, the one that was ever run."""

import hashlib

import pytest

from bnnlib.errors import InvalidValue
from bnnlib.experiments.originals import PUBLISHED
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.experiments.variants import EXPERIMENTS, VARIANTS, named

# The beginning of the SHA-256 of an experiment's digests at the four lengths. A change makes
# all stored runs of it another experiment.
DIGESTS = """
svhn-random-labels:8b7ab705 svhn-evaluation:c72e982d svhn-dropout:6d8afe7c svhn-l2:c729bd72
svhn-stochastic:04c49a1a cifar10-random-labels:2ccab7dc cifar10-dropout:82213b8c
cifar10-stochastic:7782810e cifar10-gaussian-inputs:4dea2e9e
svhn-true-labels:0fc5a61b svhn-float:d4006aef svhn-float-true-labels:9c55df50
cifar10-true-labels:650ff72b cifar10-float:66d030a1 cifar10-float-true-labels:4bd9cfc2
svhn-noise-25:2a34c6ff svhn-noise-50:508f29c5 svhn-noise-75:0516ede7 svhn-noise-100:c4dda861
cifar10-noise-25:0e570816 cifar10-noise-50:a19b701c cifar10-noise-75:3bfa9d2c
cifar10-noise-100:17dc7729 svhn-dropout-july-2017:072e5abe
svhn-dropout-after-activation:5b051687 cifar10-dropout-july-2017:edafa173
cifar10-dropout-after-activation:1ab82a81 svhn-sigmoid-deterministic:0e30942f
svhn-tanh-stochastic:24f8edaf svhn-tanh-deterministic:8bac7c66
cifar10-sigmoid-deterministic:5416520a cifar10-tanh-stochastic:019d682c
cifar10-tanh-deterministic:18624954 svhn-l2-weights-5e-4:fd6e628e svhn-l2-weights-5e-5:c51113f5
svhn-l2-weights-5e-6:4294c2b3 svhn-l2-weights-5e-7:33e42da2 svhn-l2-gamma:635f5d2f
svhn-l2-weights-5e-4-true-labels:3e38fc4f
cifar10-gaussian-matched:1c11aec7 cifar10-gaussian-random-labels:9453e2fc
cifar10-shuffled-pixels:1c40b563 cifar10-random-pixels:f8aeda77 capacity:18d05401
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
