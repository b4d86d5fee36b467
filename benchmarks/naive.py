"""A contender: BinaryNet in the style of common PyTorch ports, written anew.

It computes what bnnlib computes, the straightforward way: `where` and boolean masks, contiguous
images, PyTorch's default Adam, and copies of the old weights to scale the step.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import PlainLoop, assemble, draw
from benchmarks.settings import KERNEL, LEARNING_RATE


class NaiveBnn(PlainLoop):
    """BinaryNet as common PyTorch ports have it: `where`, boolean masks, copies of weights."""

    summary = "the same binary network in the style of common PyTorch ports"

    def build(self) -> None:
        self.model = assemble(self.setting, NaiveConv2d, NaiveLinear, NaiveSign)
        draw(self.model, lambda p, generator: nn.init.uniform_(p, -1, 1, generator=generator))
        self.model.to(self.setting.device)
        self.optimizer = CopyingAdam(self.model, lr=LEARNING_RATE)


class _SignOfActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class _SignOfWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class NaiveSign(nn.Module):
    """+1 or -1; the gradient passes where |x| <= 1."""

    def forward(self, x: Tensor) -> Tensor:
        return _SignOfActivation.apply(x)


class NaiveConv2d(nn.Conv2d):
    """A convolution with the signs of its weights."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, KERNEL, padding=KERNEL // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _SignOfWeight.apply(self.weight), self.bias, padding=self.padding)


class NaiveLinear(nn.Linear):
    """A dense layer with the signs of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _SignOfWeight.apply(self.weight), self.bias)


class CopyingAdam:
    """Adam; latent weights then move to clip(old + scale (new - old)), from copies of the old.

    The scale is Glorot's, sqrt((fan_in + fan_out) / 1.5), as in `bnnlib.layers`.
    """

    def __init__(self, model: nn.Module, lr: float):
        self.adam = torch.optim.Adam(model.parameters(), lr=lr)
        layers = [m for m in model.modules() if isinstance(m, NaiveConv2d | NaiveLinear)]
        self.scaled = [(layer.weight, _glorot(layer.weight)) for layer in layers]

    def zero_grad(self) -> None:
        self.adam.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        old = [weight.clone() for weight, _ in self.scaled]
        self.adam.step()
        for (weight, scale), before in zip(self.scaled, old, strict=True):
            weight.copy_((before + scale * (weight - before)).clamp(-1, 1))


def _glorot(weight: Tensor) -> float:
    fans = (len(weight) + weight.shape[1]) * weight[0, 0].numel()
    return sqrt(fans / 1.5)
