"""Two training steps of a BinaryNet, against the same network written out in NumPy.

The network: conv1, norm, act | conv2, pool, norm, act | dense3, norm, act | dense4, norm.
`Twin` repeats forward pass, every gradient, the optimizer and the clip in float64, with no
automatic differentiation and no code of `bnnlib`.
"""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from bnnlib.losses import squared_hinge_loss
from bnnlib.models import binarynet
from bnnlib.optim import BinaryAdam, parameter_groups

LR = 0.02  # large enough for the clip to act
TOLERANCE = {"rtol": 0, "atol": 1e-10}


# Each forward function has its backward beneath it: gradients in the order of the arguments.


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def sign_backward(x, grad):
    return grad * (np.abs(x) <= 1)  # straight through


def windows(x, pad_value):
    """(B, C, H, W) -> (B, C, H, W, 3, 3), the neighbourhood of each pixel."""
    border = ((0, 0), (0, 0), (1, 1), (1, 1))
    return sliding_window_view(np.pad(x, border, constant_values=pad_value), (3, 3), axis=(2, 3))


def conv(x, w, b, pad_value):
    return np.einsum("bchwij,ocij->bohw", windows(x, pad_value), w) + b[:, None, None]


def conv_backward(x, w, grad, pad_value):
    grad_w = np.einsum("bchwij,bohw->ocij", windows(x, pad_value), grad)
    # a pixel reaches the outputs around it through the kernel turned by 180 degrees
    grad_x = np.einsum("bohwij,ocij->bchw", windows(grad, 0.0), w[:, :, ::-1, ::-1])
    return grad_x, grad_w, grad.sum((0, 2, 3))


def dense(x, w, b):
    return x @ w.T + b


def dense_backward(x, w, grad):
    return grad @ w, grad.T @ x, grad.sum(0)


def squares(x):
    """(B, C, H, W) -> (B, C, H/2, W/2, 4), each 2 x 2 square row by row."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).swapaxes(3, 4).reshape(b, c, h // 2, w // 2, 4)


def pool(x):
    return squares(x).max(-1)


def pool_backward(x, grad):
    b, c, h, w = x.shape
    first = np.eye(4)[squares(x).argmax(-1)]  # of equal pixels the first takes it all
    spread = (first * grad[..., None]).reshape(b, c, h // 2, w // 2, 2, 2)
    return spread.swapaxes(3, 4).reshape(x.shape)


def per_channel(v, x):
    return v.reshape((1, -1) + (1,) * (x.ndim - 2))


def moments(x):
    """Mean and 1 / std of each channel, with the biased variance."""
    axes = (0, *range(2, x.ndim))
    return x.mean(axes), 1 / np.sqrt(x.var(axes) + 1e-4)


def norm(x, gamma, beta, mean, inv_std):
    scale = per_channel(gamma * inv_std, x)
    return (x - per_channel(mean, x)) * scale + per_channel(beta, x)


def norm_backward(x, gamma, grad):
    mean, inv_std = moments(x)
    z = (x - per_channel(mean, x)) * per_channel(inv_std, x)
    axes = (0, *range(2, x.ndim))
    n = x.size // len(gamma)
    grad_gamma, grad_beta = (grad * z).sum(axes), grad.sum(axes)
    centred = grad - per_channel(grad_beta, x) / n - z * per_channel(grad_gamma, x) / n
    return centred * per_channel(gamma * inv_std, x), grad_gamma, grad_beta


def loss(y, labels):
    t = 2 * np.eye(10)[labels] - 1
    return np.mean(np.maximum(0, 1 - t * y) ** 2)


def loss_backward(y, labels):
    t = 2 * np.eye(10)[labels] - 1
    return -2 * t * np.maximum(0, 1 - t * y) / y.size


class Twin:
    """The network, its gradients and its optimizer; all state is in dicts named as the model's."""

    def __init__(self, state, pad_value):
        self.p = {k: v.numpy().copy() for k, v in state.items() if "running" not in k}
        self.averages = {k: v.numpy().copy() for k, v in state.items() if "running" in k}
        self.m = {k: np.zeros_like(v) for k, v in self.p.items()}
        self.v = {k: np.zeros_like(v) for k, v in self.p.items()}
        self.t = 0
        self.pad_value = pad_value

    def forward(self, x, training=True):
        """Scores, and in `self.at` the input of everything that has a backward pass."""
        self.at = {}
        for i in (1, 2, 3, 4):
            x = self.weighted(i, x)
            if i == 2:
                x = pool(self.keep("pool2", x))
            x = self.normalized(f"norm{i}", x, training)
            if i < 4:
                x = sign(self.keep(f"act{i}", x))
        return x

    def keep(self, name, x):
        self.at[name] = x
        return x

    def weighted(self, i, x):
        if i <= 2:
            w, b = sign(self.p[f"conv{i}.weight"]), self.p[f"conv{i}.bias"]
            return conv(self.keep(f"conv{i}", x), w, b, self.pad_value)
        w, b = sign(self.p[f"dense{i}.weight"]), self.p[f"dense{i}.bias"]
        return dense(self.keep(f"dense{i}", x.reshape(len(x), -1)), w, b)

    def normalized(self, name, x, training):
        self.keep(name, x)
        averages = [f"{name}.running_mean", f"{name}.running_inv_std"]
        if training:
            used = moments(x)
            for key, value in zip(averages, used, strict=True):
                self.averages[key] = 0.9 * self.averages[key] + 0.1 * value
        else:
            used = [self.averages[key] for key in averages]
        return norm(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], *used)

    def backward(self, grad):
        """The gradient of every parameter, from that of the scores; last layer first."""
        g = {}
        for i in (4, 3, 2, 1):
            if i < 4:
                grad = sign_backward(self.at[f"act{i}"], grad.reshape(self.at[f"act{i}"].shape))
            grad, g[f"norm{i}.weight"], g[f"norm{i}.bias"] = norm_backward(
                self.at[f"norm{i}"], self.p[f"norm{i}.weight"], grad
            )
            if i == 2:
                grad = pool_backward(self.at["pool2"], grad)
            name = f"conv{i}" if i <= 2 else f"dense{i}"
            x, w = self.at[name], sign(self.p[f"{name}.weight"])
            grad, g[f"{name}.weight"], g[f"{name}.bias"] = (
                conv_backward(x, w, grad, self.pad_value) if i <= 2 else dense_backward(x, w, grad)
            )
        return g

    def update(self, g):
        """Adam with an eps that is not bias-corrected; latent weights move further, and clip."""
        self.t += 1
        rate = LR * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        for key, p in self.p.items():
            self.m[key] = 0.9 * self.m[key] + 0.1 * g[key]
            self.v[key] = 0.999 * self.v[key] + 0.001 * g[key] ** 2
            move = rate * self.m[key] / (np.sqrt(self.v[key]) + 1e-8)
            latent = key.endswith("weight") and not key.startswith("norm")
            self.p[key] = np.clip(p - glorot(p.shape) * move, -1, 1) if latent else p - move


def glorot(shape):
    units_out, units_in, *kernel = shape
    return np.sqrt((units_out + units_in) * np.prod(kernel) / 1.5)


# --------------------------------------------------------------------------------- the test


def start(architecture, pad_value):
    """A model in float64 whose norms and biases are not at their special start values."""
    generator = torch.Generator().manual_seed(0)
    model = binarynet(architecture, generator=generator, pad_value=pad_value).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("norm"):
                p.add_(torch.empty_like(p).uniform_(-0.4, 0.4, generator=generator))
            elif name.endswith("bias"):
                p.copy_(torch.randint(-4, 5, p.shape, generator=generator) / 4)
    return model


def batches(count, size=10):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.uniform(-1, 1, (size, 3, 8, 8)), rng.integers(10, size=size)


def remove_noise_from_biases(model, twin):
    """Undo what rounding did to the biases before a norm, whose true gradient is zero.

    Equal pixels of a pool's square must stay equal, or the two networks could disagree on
    which of them is the largest.
    """
    for name, p in model.named_parameters():
        if name.endswith("bias") and not name.startswith("norm"):
            clean = np.round(twin.p[name] * 4) / 4
            np.testing.assert_allclose(twin.p[name], clean, **TOLERANCE)
            twin.p[name] = clean
            p.data.copy_(torch.from_numpy(clean))


def assert_equal(model_values, twin_values):
    assert {name for name, _ in model_values} == set(twin_values)
    for name, value in model_values:
        np.testing.assert_allclose(value.detach(), twin_values[name], err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("pad_value", [0.0, 1.0])
def test_two_training_steps_agree_with_numpy(tiny, pad_value):
    model = start(tiny, pad_value)
    twin = Twin(model.state_dict(), pad_value)
    optimizer = BinaryAdam(parameter_groups(model), lr=LR)
    for images, labels in batches(2):
        scores = model(torch.from_numpy(images))
        value = squared_hinge_loss(scores, torch.from_numpy(labels))
        optimizer.zero_grad()
        value.backward()

        expected = twin.forward(images)
        np.testing.assert_allclose(scores.detach(), expected, **TOLERANCE)
        np.testing.assert_allclose(value.item(), loss(expected, labels), **TOLERANCE)
        gradients = twin.backward(loss_backward(expected, labels))
        assert_equal([(n, p.grad) for n, p in model.named_parameters()], gradients)

        optimizer.step()
        twin.update(gradients)
        assert_equal(list(model.named_parameters()), twin.p)
        assert_equal(list(model.named_buffers()), twin.averages)
        remove_noise_from_biases(model, twin)

    for name in ("conv1", "conv2", "dense3", "dense4"):
        clipped = np.abs(twin.p[f"{name}.weight"]) == 1
        assert 0 < clipped.mean() < 1, name
    images, _ = next(batches(1))
    with torch.no_grad():
        scores = model.eval()(torch.from_numpy(images))
    np.testing.assert_allclose(scores, twin.forward(images, training=False), **TOLERANCE)
