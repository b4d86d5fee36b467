"""BinaryNet's training step as one would first write it, with which the library must agree.

In NumPy, float64, with no automatic differentiation and no code of `bnnlib`. Only the names of
the layers, and the numbers they begin with, come from a model.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Each layer gives its output, and its backward pass: from the gradient of the output to those of
# the layer's own arguments, in their order.


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def activation(x):
    return sign(x), lambda grad: [grad * (np.abs(x) <= 1)]  # straight through


def windows(x, pad_value):
    """(B, C, H, W) -> (B, C, H, W, 3, 3), the neighbourhood of each pixel."""
    border = ((0, 0), (0, 0), (1, 1), (1, 1))
    return sliding_window_view(np.pad(x, border, constant_values=pad_value), (3, 3), axis=(2, 3))


def conv(x, w, b, pad_value):
    def backward(grad):
        grad_w = np.einsum("bchwij,bohw->ocij", windows(x, pad_value), grad, optimize=True)
        # a pixel reaches the outputs around it through the kernel turned by 180 degrees
        turned = w[:, :, ::-1, ::-1]
        grad_x = np.einsum("bohwij,ocij->bchw", windows(grad, 0.0), turned, optimize=True)
        return grad_x, grad_w, grad.sum((0, 2, 3))

    products = np.einsum("bchwij,ocij->bohw", windows(x, pad_value), w, optimize=True)
    return products + b[:, None, None], backward


def dense(x, w, b):
    return x @ w.T + b, lambda grad: (grad @ w, grad.T @ x, grad.sum(0))


def flatten(x):
    return x.reshape(len(x), -1), lambda grad: [grad.reshape(x.shape)]


def pool(x):
    b, c, h, w = x.shape
    rows = x.reshape(b, c, h // 2, 2, w // 2, 2).swapaxes(3, 4)
    squares = rows.reshape(b, c, h // 2, w // 2, 4)  # each 2 x 2 square row by row

    def backward(grad):
        first = np.eye(4)[squares.argmax(-1)]  # of equal pixels the first takes it all
        spread = (first * grad[..., None]).reshape(rows.shape)
        return [spread.swapaxes(3, 4).reshape(x.shape)]

    return squares.max(-1), backward


def per_channel(v, x):
    return v.reshape((1, -1) + (1,) * (x.ndim - 2))


def moments(x):
    """Mean and 1 / std of each channel, with the biased variance."""
    axes = (0, *range(2, x.ndim))
    return x.mean(axes), 1 / np.sqrt(x.var(axes) + 1e-4)


def norm(x, gamma, beta, mean, inv_std):
    """With the moments of the batch, or with averages, which have no backward pass."""
    z = (x - per_channel(mean, x)) * per_channel(inv_std, x)

    def backward(grad):
        axes, n = (0, *range(2, x.ndim)), x.size // len(gamma)
        grad_gamma, grad_beta = (grad * z).sum(axes), grad.sum(axes)
        centred = grad - per_channel(grad_beta, x) / n - z * per_channel(grad_gamma, x) / n
        return centred * per_channel(gamma * inv_std, x), grad_gamma, grad_beta

    return z * per_channel(gamma, x) + per_channel(beta, x), backward


def loss(scores, labels):
    """The squared hinge, and its gradient."""
    t = 2 * np.eye(scores.shape[1])[labels] - 1
    hinge = np.maximum(0, 1 - t * scores)
    return np.mean(hinge**2), -2 * t * hinge / scores.size


class Adam:
    """Kingma & Ba, section 2, last paragraph, on one array; then the original's stretch and clip.

    The eps of this form is not divided by the bias correction.
    """

    def __init__(self, scale=1.0, clip=np.inf):
        self.scale, self.clip = scale, clip
        self.m = self.v = self.t = 0

    def step(self, p, grad, lr):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        rate = lr * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        new = p - rate * self.m / (np.sqrt(self.v) + 1e-8)
        return np.clip(p + self.scale * (new - p), -self.clip, self.clip)


def adam_of(name, p):
    """The optimizer of a parameter; a latent weight moves by Glorot's scale, and is clipped."""
    if not name.endswith("weight") or name.startswith("norm"):
        return Adam()
    outputs, inputs, *kernel = p.shape
    return Adam(np.sqrt((outputs + inputs) * np.prod(kernel) / 1.5), clip=1.0)


class Twin:
    """Network, gradients and optimizer; all numbers are in dicts with the names of the model's."""

    def __init__(self, model, pad_value=0.0):
        self.layers = [name for name, _ in model.named_children()]
        state = {k: v.numpy().astype(np.float64) for k, v in model.state_dict().items()}
        self.p = {k: v for k, v in state.items() if "running" not in k}
        self.averages = {k: v for k, v in state.items() if "running" in k}
        self.optimizers = {k: adam_of(k, v) for k, v in self.p.items()}
        self.pad_value = pad_value

    def forward(self, x, training=True):
        """The scores; for `backward` it keeps how each layer goes back."""
        self.ways_back = {}
        for name in self.layers:
            x, self.ways_back[name] = self.layer(name, x, training)
        return x

    def layer(self, name, x, training):
        w, b = self.p.get(f"{name}.weight"), self.p.get(f"{name}.bias")
        match name.rstrip("0123456789"):
            case "conv":
                return conv(x, sign(w), b, self.pad_value)
            case "dense":
                return dense(x, sign(w), b)
            case "norm":
                return norm(x, w, b, *self.statistics(name, x, training))
            case "pool":
                return pool(x)
            case "act":
                return activation(x)
            case "flatten":
                return flatten(x)

    def statistics(self, name, x, training):
        keys = [f"{name}.running_mean", f"{name}.running_inv_std"]
        if not training:
            return [self.averages[key] for key in keys]
        for key, value in zip(keys, moments(x), strict=True):
            self.averages[key] = 0.9 * self.averages[key] + 0.1 * value
        return moments(x)

    def backward(self, grad):
        """The gradient of every parameter, from that of the scores; last layer first."""
        grads = {}
        for name in reversed(self.layers):
            grad, *own = self.ways_back[name](grad)
            grads |= zip((f"{name}.weight", f"{name}.bias")[: len(own)], own, strict=True)
        return grads

    def update(self, grads, lr):
        for name, grad in grads.items():
            self.p[name] = self.optimizers[name].step(self.p[name], grad, lr)

    def train(self, x, labels, lr):
        """One step; returns the loss and the number of mistakes before it."""
        scores = self.forward(x)
        value, grad = loss(scores, labels)
        self.update(self.backward(grad), lr)
        return value, int((scores.argmax(1) != labels).sum())
