"""A training step as one would first write it, which the fast one must agree with.

`torch.where`, masks of type bool, normalization written out, copies of the old weights, Adam line
by line, tensors in PyTorch's usual order, numbers on the host. Only the sizes of the network and
its first weights come from `bnnlib`.
"""

from math import sqrt

import torch
import torch.nn.functional as F

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Sign(torch.autograd.Function):
    """+1 where x >= 0, else -1; the gradient passes where `inside` is true."""

    @staticmethod
    def forward(ctx, x, inside):
        ctx.inside = inside
        return torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x))

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.inside, grad, torch.zeros_like(grad)), None


def binary_activation(x):
    return Sign.apply(x, x.abs() <= 1)


def binary_weight(w):
    return Sign.apply(w, torch.ones_like(w, dtype=torch.bool))


def normalize(x, weight, bias, eps=1e-4):
    """The normalized batch, its means and its inverse standard deviations."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    inv_std = 1 / torch.sqrt(var + eps)
    y = (x - mean.view(shape)) * inv_std.view(shape) * weight.view(shape) + bias.view(shape)
    return y, mean.detach(), inv_std.detach()


class PlainStep:
    """Trains a copy of a binary network with deterministic weights and binary_tanh."""

    def __init__(self, model):
        self.layers = [name for name, _ in model.named_children()]
        self.scales = {
            f"{name}.weight": layer.lr_scale
            for name, layer in model.named_children()
            if hasattr(layer, "lr_scale")
        }
        self.state = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
        }
        trained = [name for name, _ in model.named_parameters()]
        self.parameters = {name: self.state[name].requires_grad_() for name in trained}
        self.m = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.t = 0

    def forward(self, x):
        for name in self.layers:
            weight, bias = self.state.get(f"{name}.weight"), self.state.get(f"{name}.bias")
            if name.startswith("conv"):
                x = F.conv2d(x, binary_weight(weight), bias, padding=1)
            elif name.startswith("dense"):
                x = F.linear(x, binary_weight(weight), bias)
            elif name.startswith("pool"):
                x = F.max_pool2d(x, 2)
            elif name.startswith("act"):
                x = binary_activation(x)
            elif name == "flatten":
                x = x.flatten(1)
            else:
                x, mean, inv_std = normalize(x, weight, bias)
                self.average(f"{name}.running_mean", mean)
                self.average(f"{name}.running_inv_std", inv_std)
        return x

    def average(self, name, new):
        self.state[name] = 0.9 * self.state[name] + 0.1 * new

    def __call__(self, x, labels, lr):
        logits = self.forward(x)
        targets = 2 * F.one_hot(labels, logits.shape[1]) - 1
        loss = torch.clamp(1 - targets * logits, min=0).pow(2).mean()
        grads = torch.autograd.grad(loss, list(self.parameters.values()))
        self.t += 1
        with torch.no_grad():
            for (name, p), grad in zip(self.parameters.items(), grads, strict=True):
                self.update(name, p, grad, lr)
        return loss.item()

    def update(self, name, p, grad, lr):
        old = p.clone()
        self.m[name] = BETA1 * self.m[name] + (1 - BETA1) * grad
        self.v[name] = BETA2 * self.v[name] + (1 - BETA2) * grad**2
        rate = lr * sqrt(1 - BETA2**self.t) / (1 - BETA1**self.t)
        p -= rate * self.m[name] / (self.v[name].sqrt() + EPS)
        if name in self.scales:  # the original's form: stretch the move, then clip
            p.copy_(torch.clamp(old + self.scales[name] * (p - old), -1, 1))
