"""The fast training step against the plain one, and against its own recording."""

import pytest
import torch
import torch.nn.functional as F
from plain import PlainStep, Sign, binary_activation
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnnlib.batches import Batches, scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.layers import BinaryConv2d, seed_layers
from bnnlib.losses import l2_penalty
from bnnlib.models import Architecture, binarynet
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.precision import use_half
from bnnlib.quantizers import binary_tanh, sign
from bnnlib.steps import WARM_UP, Step

DEEP = Architecture((6, 8, 8, 10), pool_every=2, dense=(24, 16), image_size=8)
NOTHING = (torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def start(data, half=False, l2=0.0, device="cpu", **settings):
    """A `Step` of a small network on batches of 20, at the beginning of an epoch."""
    model = binarynet(DEEP, generator=seeded(), **settings)
    model.to(device, memory_format=torch.channels_last)
    seed_layers(model, 3)
    if half:
        use_half(model)
    penalized = [model.dense5.weight]
    penalty = (lambda: l2 * l2_penalty(penalized)) if l2 else None
    batches = Batches(data, 20, device)
    step = Step(model, BinaryAdam(parameter_groups(model), lr=1e-2), batches, penalty)
    step.begin_epoch(step.batches.order(seeded()), *NOTHING)
    return step


def begin_epoch(step, seed, lr):
    for group in step.optimizer.param_groups:
        group["lr"] = lr
    step.begin_epoch(step.batches.order(seeded(seed)), *NOTHING)


def assert_same_state(one, other):
    for (name, a), b in zip(
        one.model.state_dict().items(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for name, p in one.model.named_parameters():
        for kind, moment in one.optimizer.moments(p).items():
            twin = other.optimizer.moments(other.model.get_parameter(name))[kind]
            assert torch.equal(moment, twin), (name, kind)
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.wrong, other.wrong)


# ------------------------------------------------------------------------- against the plain step


def test_fifty_steps_end_at_the_weights_of_the_plain_step(noise):
    # In float64, where fifty steps do not yet make a rounding error into another sign.
    fast = start(noise(n=100))
    fast.model.double()
    fast.batches.images = scale_pixels(fast.batches.images).double()
    plain, losses = PlainStep(fast.model), []
    for epoch in range(10):
        lr = 1e-2 / (epoch + 1)
        begin_epoch(fast, epoch, lr)
        for index in fast.batches.order(seeded(epoch)):
            fast()
            losses.append(plain(*fast.batches.take(index), lr))
        torch.testing.assert_close(fast.losses, torch.tensor(losses[-5:]))
    assert plain.t == 50
    clipped = 0
    for name, tensor in fast.model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state[name].detach(), rtol=1e-5, atol=1e-9)
        clipped += (tensor.abs() == 1).sum().item()
    assert clipped > 100  # the clip was at work


def test_the_sign_is_that_of_where_bit_for_bit():
    edges = [0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38, torch.inf, -torch.inf]
    x = torch.cat([torch.tensor(edges), torch.randn(1000, generator=seeded())])
    assert torch.equal(sign(x), torch.where(x >= 0, 1.0, -1.0))


def test_the_gradient_of_the_activation_is_that_of_the_mask_bit_for_bit():
    edges = torch.tensor([1.0, -1.0, 1.0 + 2**-23, -1.0 - 2**-23, 0.0, torch.inf])
    x = torch.cat([edges, 2 * torch.randn(1000, generator=seeded())])
    grad = torch.randn(x.shape, generator=seeded(1))
    found, expected = (
        torch.autograd.grad(function(y := x.clone().requires_grad_()), y, grad)[0]
        for function in (binary_tanh, binary_activation)
    )
    assert torch.equal(found, expected)
    assert 0 < (expected == 0).sum() < len(x)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_gradients_of_a_convolution_are_pytorchs_bit_for_bit_but_for_the_bias(memory_format):
    layer = BinaryConv2d(8, 16, generator=seeded()).to(memory_format=memory_format)
    x, grad = (
        torch.randn(10, c, 12, 12, generator=seeded(c)).to(memory_format=memory_format)
        for c in (8, 16)
    )
    x.requires_grad_()
    with torch.no_grad():
        layer.bias.copy_(torch.randn(16, generator=seeded()))
    parameters = (x, layer.weight, layer.bias)
    y = layer(x)
    binary = Sign.apply(layer.weight, torch.ones_like(layer.weight, dtype=torch.bool))
    expected = F.conv2d(x, binary, layer.bias, padding=1)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y, parameters, grad)
    dx, dw, db = torch.autograd.grad(expected, parameters, grad)
    assert torch.equal(found[0], dx)
    assert torch.equal(found[1], dw)
    assert (found[2] - db).abs().max() <= 1e-5 * grad.abs().sum((0, 2, 3)).max()


def test_moments_are_those_of_separate_operations_bit_for_bit_and_weights_nearly():
    generator = seeded()
    p = torch.nn.Parameter(torch.empty(40, 25).uniform_(-1, 1, generator=generator))
    optimizer = BinaryAdam([{"params": [p], "lr_scale": 13.7, "clip": 1.0}], lr=1e-3)
    q, m, v = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 51):
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** -(t % 7)
        p.grad = grad.clone()
        optimizer.step()
        m.lerp_(grad, 0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
        rate = 1e-3 * 13.7 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        q.addcdiv_(m, v.sqrt().add_(1e-8), value=-rate).clamp_(-1, 1)
        assert torch.equal(optimizer.moments(p)["exp_avg"], m)
        assert torch.equal(optimizer.moments(p)["exp_avg_sq"], v)
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (6, 1, 3, 3)])
def test_a_gradient_in_another_memory_format_moves_the_same_weights(shape):
    start, grad = (torch.randn(shape, generator=seeded(seed)) for seed in (0, 1))
    moved = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(start.contiguous(memory_format=torch.channels_last))
        p.grad = grad.contiguous(memory_format=memory_format)
        BinaryAdam([p], lr=0.1).step()
        moved.append(p.detach())
    assert torch.equal(*moved)


# --------------------------------------------------------------------------- as a graph would run


class Recording(TorchDispatchMode):
    """What a CUDA graph keeps of a step: the operations on tensors, and nothing of the host.

    Called, it does them again, on the same tensors and into the same results.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the step waits for a number from the device")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(tree_leaves(result), again, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


SETTINGS = [
    {},
    {"half": True},
    {"l2": 1e-3},
    {"activation": "binary_sigmoid"},
    {"binary": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_recorded_step_is_the_step(noise, settings):
    """Also as the learning rate and the order change, which it must find on the device."""
    alone, recorded = (start(noise(n=100), **settings) for _ in range(2))
    graph = Recording()
    for _ in range(2):
        alone()
    recorded()
    with graph:
        recorded()
    for epoch in range(3):
        for _ in range(3 if epoch == 0 else 5):
            alone()
            graph.replay()
        assert_same_state(alone, recorded)
        for step in (alone, recorded):
            begin_epoch(step, epoch, 1e-2 / (epoch + 2))


def test_random_layers_go_on_drawing_where_a_recorded_step_is_repeated(noise):
    settings = {"weights": "stochastic", "dropout": (0.3,)}
    alone, recorded = (start(noise(n=100), **settings) for _ in range(2))
    graph = Recording()
    recorded()
    with graph:
        recorded()
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        alone()
    assert_same_state(alone, recorded)


def test_a_recording_notices_a_step_that_looks_at_its_loss(noise):
    step = start(noise())
    step.before_update = lambda x, loss: loss.item()
    with pytest.raises(AssertionError, match="waits for a number"), Recording():
        step()


def test_the_first_steps_on_a_gpu_are_done_and_the_others_repeated(noise, monkeypatch):
    step, plain = start(noise(n=200)), start(noise(n=200))
    done = []

    class Graph:
        def replay(self):
            done.append("replay")
            step._step()

    def beside():
        done.append("step")
        step._step()

    def capture():  # records, and does nothing
        done.append("capture")
        step.graph = Graph()

    monkeypatch.setattr(step, "captures", True)
    monkeypatch.setattr(step, "_step_beside", beside)
    monkeypatch.setattr(step, "_capture", capture)
    for _ in range(6):
        step()
        plain()
    assert done == ["step"] * WARM_UP + ["capture"] + ["replay"] * (6 - WARM_UP)
    assert_same_state(step, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("settings", [*SETTINGS, {"weights": "stochastic", "dropout": (0.3,)}])
def test_on_a_gpu_the_graph_is_the_step(noise, settings):
    captured, plain = (start(noise(n=200), device="cuda", **settings) for _ in range(2))
    plain.captures = False
    for epoch in range(2):
        for step in (captured, plain):
            begin_epoch(step, epoch, 1e-2 / (epoch + 1))
            for _ in range(step.count):
                step()
    assert captured.graph is not None
    torch.testing.assert_close(captured.losses, plain.losses, rtol=1e-3, atol=1e-3)
    assert captured.next.item() == plain.next.item() == captured.count


# ------------------------------------------------------------------------------------- an epoch


def test_an_epoch_goes_on_after_the_steps_that_are_done(noise):
    whole, rest = (start(noise(n=100)) for _ in range(2))
    order = whole.batches.order(seeded(5))
    for step in (whole, rest):
        step.begin_epoch(order, *NOTHING)
        step()
        step()
    losses, wrong = rest.losses[:2].clone(), rest.wrong[:2].clone()
    rest.losses.zero_()
    rest.begin_epoch(order, losses, wrong)
    for _ in range(3):
        whole()
        rest()
    assert_same_state(whole, rest)
    assert whole.next.item() == whole.count == 5


def test_more_steps_than_an_epoch_has_are_refused(noise):
    step = start(noise())
    with pytest.raises(InvalidValue, match="4 steps are done of an epoch that has 3"):
        step.begin_epoch(step.order, torch.zeros(4), torch.zeros(4, dtype=torch.int64))


def test_losses_and_mistakes_are_those_of_each_batch_before_its_update(noise):
    step = start(noise())
    twin = PlainStep(step.model)
    order = step.batches.order(seeded())
    expected = []
    for index in order:
        x, labels = step.batches.take(index)
        wrong = (twin.forward(x).argmax(1) != labels).sum().item()
        expected.append(wrong)
        step()
        twin = PlainStep(step.model)
    assert step.wrong.tolist() == expected
    assert 0 < sum(expected) < order.numel()
