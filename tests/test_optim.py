import copy
import pickle
import subprocess
import sys
from math import nan

import numpy as np
import plain
import pytest
import torch
from torch import nn

from bnnlib.errors import InvalidValue
from bnnlib.layers import binary_layers
from bnnlib.models import binarynet
from bnnlib.optim import BinaryAdam, Bop, make_optimizer, parameter_groups

LATENT = ["conv1.weight", "conv2.weight", "dense3.weight", "dense4.weight"]


@pytest.fixture
def model(tiny, generator):
    return binarynet(tiny, generator=generator).double()


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
    (group,) = parameter_groups(binarynet(tiny, generator=generator, binary=False))
    assert (len(group["params"]), group["lr_scale"], group["clip"]) == (16, 1.0, None)


def test_six_steps_agree_with_numpy(model):
    rng, parameters = np.random.default_rng(0), dict(model.named_parameters())
    twin = plain.Twin(model)
    optimizer = BinaryAdam(parameter_groups(model))
    for lr in (1e-2, 1e-2, 5e-3, 5e-3, 1e-3, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in parameters.values():
            scale = 10.0 ** rng.uniform(-9, 0)
            p.grad = torch.from_numpy(scale * rng.standard_normal(p.shape))
        optimizer.step()
        twin.update({name: p.grad.numpy() for name, p in parameters.items()}, lr)
        for name, p in parameters.items():
            np.testing.assert_allclose(p.detach(), twin.p[name], rtol=1e-12, atol=1e-14)
    for name in LATENT:
        at_the_clip = (parameters[name].abs() == 1).double().mean()
        assert 0 < at_the_clip < 1
    assert parameters["norm1.weight"].max() > 1  # not clipped


@pytest.mark.parametrize("channels", [5, 1])
def test_a_step_of_float32_in_any_memory_format_is_numpys(channels, generator):
    start, grad = (torch.randn(6, channels, 3, 3, generator=generator) for _ in range(2))
    moved = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(start.clone(memory_format=torch.channels_last))
        p.grad = grad.contiguous(memory_format=memory_format)
        BinaryAdam([p], lr=0.1).step()
        moved.append(p.detach())
    assert torch.equal(*moved)
    expected = plain.Adam().step(start.double().numpy(), grad.double().numpy(), 0.1)
    np.testing.assert_allclose(moved[0], expected, rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_stay():
    p, q = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = BinaryAdam([p, q])
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() < 1
    assert q.item() == 1


def test_closure_is_called_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([2.0]))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert BinaryAdam([p], lr=0.1).step(closure).item() == 4.0
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


def test_pytorchs_compiler_whose_import_takes_long_is_left_alone():
    code = "import sys, torch; from bnnlib.optim import BinaryAdam; p = torch.ones(1);"
    code += "o = BinaryAdam([p.requires_grad_()]); p.sum().backward(); o.step(); o.zero_grad();"
    code += "o.load_state_dict(o.state_dict()); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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


# ----------------------------------------------------------------------------------------- Bop


def bop_by_numpy(w, gradients, gamma, threshold):
    """Algorithm 1 of Helwegen et al. 2019, weight by weight."""
    w, m = w.copy(), np.zeros_like(w)
    for g, rate in zip(gradients, gamma, strict=True):
        m = (1 - rate) * m + rate * g
        for i in np.ndindex(w.shape):
            if abs(m[i]) > threshold and np.sign(m[i]) == np.sign(w[i]):
                w[i] = -w[i]
    return w


def test_flips_are_those_of_the_paper_and_other_parameters_move_as_in_adam(model):
    rng, parameters = np.random.default_rng(1), dict(model.named_parameters())
    adam_model = copy.deepcopy(model)
    latent = {name: parameters[name].detach().numpy().copy() for name in LATENT}
    optimizer = Bop(parameter_groups(model), lr=1e-2, gamma=0.1, threshold=0.02)
    adam = BinaryAdam(parameter_groups(adam_model), lr=1e-2)
    before = {name: np.where(w >= 0, 1.0, -1.0) for name, w in latent.items()}
    for name in LATENT:  # the signs of the latent weights it was given
        np.testing.assert_array_equal(parameters[name].detach(), before[name])
    gradients = {name: [] for name in parameters}
    for lr in (1e-2, 1e-2, 5e-3, 1e-3, 1e-3, 0.0):  # gamma falls in proportion
        for one, other in ((model, optimizer), (adam_model, adam)):
            for group in other.param_groups:
                group["lr"] = lr
            for name, p in one.named_parameters():
                if one is model:
                    gradients[name].append(rng.standard_normal(p.shape))
                p.grad = torch.from_numpy(gradients[name][-1])
            other.step()
    gamma = [0.1, 0.1, 0.05, 0.01, 0.01, 0.0]
    for name in LATENT:
        found = parameters[name].detach().numpy()
        np.testing.assert_array_equal(
            found, bop_by_numpy(before[name], gradients[name], gamma, 0.02)
        )
        assert 0 < np.mean(found != before[name]) < 1
    for name, p in adam_model.named_parameters():
        if name not in LATENT:
            assert torch.equal(p, parameters[name])


def test_a_rate_of_zero_lets_nothing_flip_and_nothing_move(model):
    optimizer = Bop(parameter_groups(model), lr=0.0, gamma=1.0, threshold=0.0)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gamma": 0.0}, "gamma must be above 0 and at most 1"),
        ({"gamma": 1.5}, "gamma must be above 0 and at most 1"),
        ({"gamma": nan}, "gamma must be above 0 and at most 1"),
        ({"threshold": -1e-9}, "threshold 0 or more"),
        ({"lr": -1.0}, "lr must be a number, 0 or more"),
    ],
)
def test_what_bop_cannot_do_is_refused(settings, text, model):
    with pytest.raises(InvalidValue, match=text):
        Bop(parameter_groups(model), **settings)


def test_bop_without_binary_weights_is_refused(model):
    with pytest.raises(InvalidValue, match=r"give it parameter_groups\(model\)"):
        Bop(model.parameters())


def test_pytorchs_adam_with_the_rates_of_the_layers_is_ours_but_for_the_place_of_eps(model):
    other, rng = copy.deepcopy(model), np.random.default_rng(2)
    ours, theirs = make_optimizer("binary_adam", model, 1e-3), make_optimizer("Adam", other, 1e-3)
    for _ in range(3):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.from_numpy(rng.uniform(1, 2, p.shape))  # far above eps
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    clipped = [
        p.clamp(-1, 1) if p in {m.weight for m in binary_layers(other)} else p
        for p in other.parameters()
    ]
    for p, q in zip(model.parameters(), clipped, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
