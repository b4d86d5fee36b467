"""Training steps of a BinaryNet, against the same network written out in NumPy."""

import numpy as np
import plain
import pytest
import torch

from bnnlib.losses import squared_hinge_loss
from bnnlib.models import binarynet
from bnnlib.optim import BinaryAdam, parameter_groups

LR = 0.02  # large enough for the clip to act


def start(architecture, pad_value):
    """A model in float64 whose norms and biases are not at their special start values."""
    generator = torch.Generator().manual_seed(0)
    model = binarynet(architecture, generator=generator, pad_value=pad_value).double()
    for name, p in model.named_parameters():
        if name.startswith("norm"):
            p.data.add_(torch.empty_like(p).uniform_(-0.4, 0.4, generator=generator))
        elif name.endswith("bias"):
            p.data.copy_(torch.randint(-4, 5, p.shape, generator=generator) / 4)
    return model


def assert_equal(model_values, twin_values):
    found = {name: value.detach().numpy() for name, value in model_values}
    assert set(found) == set(twin_values)
    for name, value in found.items():
        np.testing.assert_allclose(value, twin_values[name], rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("pad_value", [0.0, 1.0])
def test_two_training_steps_agree_with_numpy(tiny, pad_value):
    model = start(tiny, pad_value)
    twin = plain.Twin(model, pad_value)
    optimizer = BinaryAdam(parameter_groups(model), lr=LR)
    rng = np.random.default_rng(0)
    biases = {n: p for n, p in twin.p.items() if n.endswith("bias") and "norm" not in n}
    for _ in range(2):
        images, labels = rng.uniform(-1, 1, (10, 3, 8, 8)), rng.integers(10, size=10)
        scores = model(torch.from_numpy(images))
        loss = squared_hinge_loss(scores, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        expected = twin.forward(images)
        expected_loss, grad = plain.loss(expected, labels)
        gradients = twin.backward(grad)
        twin.update(gradients, LR)

        assert_equal([("scores", scores)], {"scores": expected})
        assert loss.item() == pytest.approx(expected_loss, abs=1e-10)
        assert_equal([(name, p.grad) for name, p in model.named_parameters()], gradients)
        assert_equal(model.named_parameters(), twin.p)
        assert_equal(model.named_buffers(), twin.averages)
        # Rounding moves a bias before a norm, whose true gradient is zero. As short fractions
        # again they keep equal pixels equal in both networks, which a pool has to choose from.
        for name, bias in biases.items():
            np.testing.assert_allclose(twin.p[name], bias, rtol=0, atol=1e-10)
            twin.p[name] = bias
            model.get_parameter(name).data.copy_(torch.from_numpy(bias))

    for name in ("conv1", "conv2", "dense3", "dense4"):
        clipped = np.abs(twin.p[f"{name}.weight"]) == 1
        assert 0 < clipped.mean() < 1, name
    scores = model.eval()(torch.from_numpy(images))
    assert_equal([("scores", scores)], {"scores": twin.forward(images, training=False)})
