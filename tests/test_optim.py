import copy
import pickle
from math import nan

import numpy as np
import pytest
import torch
from torch import nn

from bnnlib.errors import InvalidValue
from bnnlib.models import binarynet
from bnnlib.optim import BinaryAdam, parameter_groups

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class NumpyAdam:
    """Section 2 of Kingma & Ba, last paragraph, then the clip; one array, float64."""

    def __init__(self, p, scale=1.0, clip=np.inf):
        self.p, self.scale, self.clip = p.copy(), scale, clip
        self.m, self.v, self.t = np.zeros_like(p), np.zeros_like(p), 0

    def step(self, g, lr):
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g**2
        rate = lr * np.sqrt(1 - BETA2**self.t) / (1 - BETA1**self.t)
        adam = self.p - rate * self.m / (np.sqrt(self.v) + EPS)
        # the form of the original: Adam's move, stretched, then the clip
        self.p = np.clip(self.p + self.scale * (adam - self.p), -self.clip, self.clip)


@pytest.fixture
def model(tiny, generator):
    return binarynet(tiny, generator=generator).double()


LATENT = ["conv1.weight", "conv2.weight", "dense3.weight", "dense4.weight"]


def test_each_latent_weight_has_its_group_and_the_rest_share_one(model):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        ([names[id(p)] for p in g["params"]], g["lr_scale"], g["clip"])
        for g in parameter_groups(model)
    ]
    assert groups[:-1] == [([n], model.get_submodule(n[:-7]).lr_scale, 1.0) for n in LATENT]
    rest, scale, clip = groups[-1]
    assert (scale, clip) == (1.0, None)
    assert sorted(rest + LATENT) == sorted(names.values())


def test_full_precision_twin_has_ordinary_parameters_only(tiny, generator):
    twin = binarynet(tiny, generator=generator, binary=False)
    ((group),) = parameter_groups(twin)
    assert (len(group["params"]), group["lr_scale"], group["clip"]) == (16, 1.0, None)


def test_six_steps_agree_with_numpy(model):
    rng = np.random.default_rng(0)
    scales = {n: model.get_submodule(n[:-7]).lr_scale for n in LATENT}
    parameters = dict(model.named_parameters())
    expected = {
        name: NumpyAdam(
            p.detach().numpy(), scales.get(name, 1.0), 1.0 if name in scales else np.inf
        )
        for name, p in parameters.items()
    }
    optimizer = BinaryAdam(parameter_groups(model))
    for lr in (1e-2, 1e-2, 5e-3, 5e-3, 1e-3, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in parameters.items():
            g = 10.0 ** rng.uniform(-9, 0) * rng.standard_normal(p.shape)
            p.grad = torch.from_numpy(g)
            expected[name].step(g, lr)
        optimizer.step()
        for name, p in parameters.items():
            np.testing.assert_allclose(p.detach(), expected[name].p, rtol=1e-12, atol=1e-14)
    for name in LATENT:
        at_the_clip = (parameters[name].abs() == 1).double().mean()
        assert 0 < at_the_clip < 1
    assert parameters["norm1.weight"].max() > 1  # not clipped


def first_move(optimizer_class, gradient):
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optimizer_class([p], lr=1.0)
    p.grad = torch.full_like(p, gradient)
    optimizer.step()
    return p.item()


def test_eps_is_not_divided_by_the_bias_correction():
    # sqrt(1 - beta2) |g| = eps halves the first step; in PyTorch's form |g| = eps does
    gradient = EPS / (1 - BETA2) ** 0.5
    assert first_move(BinaryAdam, gradient) == pytest.approx(-0.5)
    assert first_move(torch.optim.Adam, gradient) == pytest.approx(-0.969, abs=1e-3)
    assert first_move(torch.optim.Adam, EPS) == pytest.approx(-0.5)


def test_large_gradients_move_by_the_rate_and_the_scale():
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [p], "lr_scale": 28.0, "clip": 1.0}, {"params": [q]}]
    optimizer = BinaryAdam(groups, lr=1e-3)
    p.grad, q.grad = torch.ones(1), torch.full((1,), -3.0)
    optimizer.step()
    assert p.item() == pytest.approx(-0.028, rel=1e-5)
    assert q.item() == pytest.approx(1e-3, rel=1e-5)


def test_clip_holds_on_both_sides_and_only_where_asked():
    p, free = (nn.Parameter(torch.tensor([0.99, -0.99])) for _ in range(2))
    optimizer = BinaryAdam([{"params": [p], "clip": 1.0}, {"params": [free]}], lr=0.5)
    p.grad = free.grad = torch.tensor([-1.0, 1.0])
    optimizer.step()
    assert p.tolist() == [1, -1]
    assert free.abs().min() > 1.4


def test_parameters_without_a_gradient_stay():
    p, q = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = BinaryAdam([p, q])
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() < 1
    assert q.item() == 1


def test_closure_is_called_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = BinaryAdam([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == pytest.approx(1.9)


def through_state_dict(pair, fresh):
    """The new pair, with the numbers of the other."""
    for part, source in zip(fresh, pair, strict=True):
        part.load_state_dict(source.state_dict())
    return fresh


COPIES = {
    "state_dict": through_state_dict,
    "deepcopy": lambda pair, fresh: copy.deepcopy(pair),
    "pickle": lambda pair, fresh: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("way", COPIES)
def test_a_copied_optimizer_continues_as_if_never_stopped(way, done, tiny):
    def start():
        model = binarynet(tiny, generator=torch.Generator().manual_seed(0))
        return model, BinaryAdam(parameter_groups(model), lr=1e-2)

    def steps(pair, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for p in pair[0].parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            pair[1].step()

    whole, stopped = start(), start()
    steps(whole, range(3))
    steps(stopped, range(done))
    resumed = COPIES[way](stopped, start())
    steps(resumed, range(done, 3))
    assert all(map(torch.equal, resumed[0].parameters(), whole[0].parameters()))
    assert int(resumed[1].updates) == 3
    assert int(stopped[1].updates) == done  # the copy is one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, r"lr must be a number, 0 or more, got -0\.1"),
        ({"lr": nan}, "lr must be a number, 0 or more, got nan"),
        ({"eps": -1}, "eps must be a number, 0 or more, got -1"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers.*below 1, got \(1\.0, 0\.9\)"),
        ({"betas": (0.9, -0.1)}, "betas must be two numbers, at least 0"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
    ],
)
def test_settings_without_a_step_are_refused_also_in_a_group(settings, message):
    with pytest.raises(InvalidValue, match=message):
        BinaryAdam([nn.Parameter(torch.zeros(1))], **settings)
    with pytest.raises(InvalidValue, match=message):
        BinaryAdam([{"params": [nn.Parameter(torch.zeros(1))], **settings}])
