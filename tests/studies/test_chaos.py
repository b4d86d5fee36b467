"""What neighbours in a batch decide, against NumPy, and convolutions that stay as drawn."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

from bnnlib.errors import Interrupted, InvalidValue
from bnnlib.experiments.build import build_model
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.layers import BatchNorm, BinaryConv2d, BinaryTanh, evaluating
from bnnlib.models import binarynet, cifar10
from bnnlib.names import NETWORKS
from bnnlib.runs.result import differences
from bnnlib.runs.run import run
from bnnlib.studies.chaos import (
    SETTLES_AFTER,
    FirstSigns,
    frozen,
    frozen_batch,
    signs_that_depend_on_the_batch,
)

BASE = replace(smoke(published("cifar10-random-labels")), network="frozen", batch_size=50)
BUILDERS = {"frozen": frozen, "frozen_batch": frozen_batch}
each_network = pytest.mark.parametrize("name", BUILDERS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def depends(model, images, batch_size=20, seed=1):
    return signs_that_depend_on_the_batch(model, images, batch_size, generator=seeded(seed))


def quietly(experiment, out=None, **options):
    return run(experiment, out, device="cpu", progress="none", **options)


def small(name, **settings):
    """The network of this name with few channels, for images of 8 x 8."""
    return BUILDERS[name](generator=seeded(), width=0.0625, image_size=8, **settings)


# ------------------------------------------------------------------------- what neighbours decide


def test_the_share_is_that_of_signs_that_differ_between_two_random_batches():
    x, shift = torch.randn(82, 3, generator=seeded(2)), [0.3, -0.7, 0.0]
    model = nn.Sequential()
    model.norm1, model.act1 = BatchNorm(3), BinaryTanh()
    model.norm1.bias.data.copy_(torch.tensor(shift))
    draw, signs = seeded(1), []
    for _ in range(2):
        order, positive = torch.randperm(80, generator=draw).numpy(), np.zeros((80, 3), bool)
        for rows in order.reshape(20, 4):
            z = x.numpy()[rows]
            positive[rows] = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-4) + shift > 0
        signs.append(positive)
    share = (signs[0] != signs[1]).mean()
    assert 0.1 < share < 0.4
    assert depends(model, x, batch_size=4) == {"act1": pytest.approx(share, abs=1e-12)}


class DrawnAnew(nn.Module):
    def forward(self, x):
        return torch.randn(x.shape, generator=self.generator)

    generator = seeded(5)


def test_nothing_depends_where_nothing_is_normalized_and_one_half_where_signs_are_drawn():
    model = nn.Sequential()
    model.conv1 = BinaryConv2d(3, 16, 3, generator=seeded())
    model.act1, model.act2 = BinaryTanh(), DrawnAnew()
    found = depends(model, torch.randn(60, 3, 8, 8, generator=seeded(2)))
    assert found["act1"] == 0
    assert found["act2"] == pytest.approx(0.5, abs=0.01)  # 61,440 signs: five sd


def test_each_activation_has_its_share_and_the_network_stays_as_it_was(tiny, generator, noise):
    model, images = binarynet(tiny, generator=generator), noise(n=60).images / 127.5 - 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = depends(model, images)
    assert list(found) == ["act1", "act2", "act3"]
    assert all(0 < share < 0.5 for share in found.values())
    assert found["act2"] > found["act1"]
    assert found == depends(model, images) != depends(model, images, seed=2)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_last_images_that_fill_no_batch_are_left_out(tiny, generator, noise):
    model, images = binarynet(tiny, generator=generator), noise(n=60).images / 127.5 - 1
    assert depends(model, images, 25) == depends(model, images[:50], 25)


def test_a_batch_that_has_no_neighbours_or_is_not_filled_is_refused(tiny, generator):
    model, images = binarynet(tiny, generator=generator), torch.zeros(10, 3, 8, 8)
    with pytest.raises(InvalidValue, match="batch_size must be a whole number, 2 or more, got 1"):
        depends(model, images, 1)
    with pytest.raises(InvalidValue, match="10 images do not fill one batch of 11"):
        depends(model, images, 11)


# ------------------------------------------------------------------------------- frozen networks


@each_network
def test_a_frozen_network_is_that_of_the_original_with_the_same_numbers(name):
    model, twin = small(name), cifar10(generator=seeded(), width=0.0625, image_size=8)
    images = torch.randn(20, 3, 8, 8, generator=seeded(2))
    assert torch.equal(model(images), twin(images))
    assert isinstance(model.first, FirstSigns)
    assert [n for n, _ in model.first.named_children()][-1] == "act6"
    movable = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert movable == {"dense7", "norm7", "dense8", "norm8", "dense9", "norm9"}
    assert NETWORKS[name] is BUILDERS[name]


def outputs_in_two_batches(model):
    """Of 10 images among others, in training mode."""
    few, others, more = torch.randn(3, 10, 3, 8, 8, generator=seeded(3))
    with torch.no_grad():
        return [model.train().first(torch.cat([few, rest]))[:10] for rest in (others, more)]


def settle(model, batches):
    draw = seeded(4)
    with torch.no_grad():
        for _ in range(batches):
            model.train()(torch.randn(20, 3, 8, 8, generator=draw))


def test_after_a_while_fixed_statistics_give_an_image_one_output_in_any_batch():
    model = small("frozen")
    settle(model, SETTLES_AFTER - 2)
    one, other = outputs_in_two_batches(model)  # the last two that are normalized by themselves
    assert not torch.equal(one, other)
    before = model.first.state_dict()["norm3.running_mean"].clone()
    one, other = outputs_in_two_batches(model)
    assert torch.equal(one, other)
    assert model.first.training  # it only computes as in evaluation
    assert torch.equal(before, model.first.norm3.running_mean)
    few = torch.randn(3, 10, 3, 8, 8, generator=seeded(3))[0]
    with evaluating(model), torch.no_grad():
        assert torch.equal(model.first(few), one)
    assert model.first.seen == SETTLES_AFTER + 2


def test_statistics_of_the_batch_stay_those_of_the_batch():
    model = small("frozen_batch")
    settle(model, SETTLES_AFTER + 3)
    one, other = outputs_in_two_batches(model)
    assert 0.02 < (one != other).double().mean() < 0.5


def test_evaluation_is_not_counted():
    model = small("frozen")
    with evaluating(model), torch.no_grad():
        model(torch.zeros(2, 3, 8, 8))
    assert model.first.seen == 0


# ----------------------------------------------------------------------------------------- runs


@each_network
def test_a_run_moves_no_weight_of_the_convolutions(name):
    e = replace(BASE, network=name, width=0.0625)
    start, trained = build_model(e).state_dict(), quietly(e).model.state_dict()
    moved = {key for key in start if not torch.equal(start[key], trained[key])}
    first = {key for key in moved if key.startswith("first.")}
    averages = {
        f"first.norm{i}.running_{kind}" for i in range(1, 7) for kind in ("mean", "inv_std")
    }
    assert first == averages | {"first.seen"}
    assert {"dense7.weight", "norm7.weight", "dense9.bias"} <= moved
    assert trained["first.seen"] == e.steps == 4


def test_a_run_that_goes_on_settles_when_one_without_a_break_does(tmp_path):
    e = replace(BASE, width=0.0625, batch_size=4, n_test=0)  # 25 batches in each of 2 epochs
    whole = quietly(e)
    assert whole.model.first.seen == 50 > SETTLES_AFTER
    asked = count(1)
    with pytest.raises(Interrupted):
        quietly(e, tmp_path, stop=lambda: next(asked) == 30)
    resumed = quietly(e, tmp_path)
    assert resumed.model.first.seen == 50
    assert differences(resumed, whole) == []
