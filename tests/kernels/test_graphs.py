"""The fast training step against the plain one, and against its own recording."""

from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnnlib.batches import Batches
from bnnlib.data.images import scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.kernels.graphs import WARM_UP, GraphedStep
from bnnlib.kernels.precision import set_precision
from bnnlib.layers import seed_layers
from bnnlib.losses import l2_penalty
from bnnlib.models import Architecture, binarynet
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.training import Step, TrainingState

DEEP = Architecture((6, 8, 8, 10), pool_every=2, dense=(24, 16), image_size=8)
RANDOM = {"weights": "stochastic", "dropout": (0.3,)}
SETTINGS = [{}, {"half": True}, {"l2": 1e-3}, {"activation": "binary_sigmoid"}, {"binary": False}]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def start(data, half=False, l2=0.0, device="cpu", **settings):
    """A `Step` of a small network on batches of 20, at the beginning of an epoch."""
    model = binarynet(DEEP, generator=seeded(), **settings)
    model.to(device, memory_format=torch.channels_last)
    seed_layers(model, 3)
    if half:
        set_precision(model, torch.randn(8, 3, 8, 8, generator=seeded()).to(device))
    penalized = [model.dense5.weight]
    penalty = (lambda: l2 * l2_penalty(penalized)) if l2 else None
    state = TrainingState(model, BinaryAdam(parameter_groups(model), lr=1e-2), seeded())
    step = Step(state, Batches(data, 20, device), penalty)
    step.looks = False  # as on a GPU
    step.begin_epoch()
    return step


def begin_epoch(step, seed, lr):
    state = step.state
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.generator, state.epoch_start, state.done = seeded(seed), None, 0
    step.begin_epoch()


def numbers(step):
    """All that a step moves: weights, averages, moments, losses and mistakes, by name."""
    model, optimizer = step.state.model, step.state.optimizer
    found = dict(model.state_dict()) | {"losses": step.losses, "wrong": step.wrong}
    for name, p in model.named_parameters():
        found |= {f"{kind} of {name}": m for kind, m in optimizer.moments(p).items()}
    return found


def assert_same(one, other):
    one, other = numbers(one), numbers(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ------------------------------------------------------------------------- against the plain step


def test_fifty_steps_are_those_of_the_plain_step(noise):
    # In float64, where fifty steps do not yet make a rounding error into another sign.
    fast = start(noise(n=100))
    fast.state.model.double()
    fast.batches.images = scale_pixels(fast.batches.images).double()
    twin = plain.Twin(fast.state.model)
    for epoch in range(10):
        lr = 1e-2 / (epoch + 1)
        begin_epoch(fast, epoch, lr)
        batches = [fast.batches.take(index) for index in fast.batches.order(seeded(epoch))]
        for _ in batches:
            fast()
        expected = [twin.train(x.numpy(), labels.numpy(), lr) for x, labels in batches]
        losses, wrong = zip(*expected, strict=True)
        np.testing.assert_allclose(fast.losses, losses, rtol=1e-5)
        assert fast.wrong.tolist() == list(wrong)
    numbers, clipped = twin.p | twin.averages, 0
    for name, tensor in fast.state.model.state_dict().items():
        np.testing.assert_allclose(tensor, numbers[name], rtol=1e-5, atol=1e-9, err_msg=name)
        clipped += (tensor.abs() == 1).sum().item()
    assert clipped > 100  # the clip was at work


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


@pytest.mark.parametrize("settings", [*SETTINGS, RANDOM], ids=str)
def test_a_recorded_step_is_the_step(noise, settings, kernels):
    """Also as the learning rate and the order change, which it must find on the device.

    A recorded random layer goes on drawing; its order of draws is that of the steps.
    """
    kernels("off")  # as where operations are recorded
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
        assert_same(alone, recorded)
        for step in (alone, recorded):
            begin_epoch(step, epoch, 1e-2 / (epoch + 2))


def test_a_recording_notices_a_step_that_looks_at_its_loss(noise):
    step = start(noise())
    step.looks = True
    with pytest.raises(AssertionError, match="waits for a number"), Recording():
        step()


class WithoutStream(GraphedStep):
    """On a CPU, where there is none; `done` says what a GPU would have been given."""

    def __init__(self):
        self.graph, self.warmed_up, self.done = None, 0, []

    def _warm_up(self):
        self.warmed_up += 1
        self.done.append("step")

    def _capture(self):  # records, and does nothing
        self.graph = SimpleNamespace(replay=lambda: self.done.append("replay"))
        self.done.append("capture")


def test_the_first_steps_on_a_gpu_are_done_and_the_others_repeated():
    step = WithoutStream()
    for _ in range(6):
        step()
    assert step.done == ["step"] * WARM_UP + ["capture"] + ["replay"] * (6 - WARM_UP)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("settings", [*SETTINGS, RANDOM], ids=str)
def test_on_a_gpu_the_graph_is_the_step(noise, settings):
    captured, uncaptured = (start(noise(n=200), device="cuda", **settings) for _ in range(2))
    uncaptured._call = uncaptured._train
    for epoch in range(2):
        for step in (captured, uncaptured):
            begin_epoch(step, epoch, 1e-2 / (epoch + 1))
            for _ in range(len(step.order)):
                step()
    assert captured._call.graph is not None
    assert_same(captured, uncaptured)
    assert captured.next.item() == uncaptured.next.item() == len(captured.order)


# ------------------------------------------------------------------------------------- an epoch


def test_an_epoch_goes_on_after_the_steps_that_are_done(noise):
    whole, rest = (start(noise(n=100)) for _ in range(2))
    for step in (whole, rest):
        step()
        step()
    state = rest.state
    state.losses, state.wrong = state.losses[:2].clone(), state.wrong[:2].clone()
    rest.losses.zero_()
    rest.begin_epoch()
    for _ in range(3):
        whole()
        rest()
    assert_same(whole, rest)
    assert whole.next.item() == whole.state.done == 5


def test_more_steps_than_an_epoch_has_are_refused(noise):
    step = start(noise())
    step.state.done = 4
    with pytest.raises(InvalidValue, match="4 steps are done of an epoch that has 3"):
        step.begin_epoch()
