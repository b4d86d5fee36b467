"""From real numbers to +1/-1 (or 1/0) and back: quantizers with straight-through gradients.

A quantizer takes a float tensor of any shape and returns the same shape and dtype, two values
only. The formulas are those of Hubara et al., "Binarized Neural Networks", NeurIPS 2016
(arXiv:1602.02830), as coded in `binary_net_random_labels.py` of the original.
"""

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1; never 0, and -0.0 counts as 0. NaN becomes +1.

    1 - 2 [x < 0], with the comparison written as numbers: masks of type bool and `torch.where`
    take many times as long on a CPU.
    """
    negative = torch.empty_like(x, requires_grad=False)
    torch.lt(x.detach(), 0, out=negative)
    return torch.sub(torch.ones((), dtype=x.dtype), negative, alpha=2, out=negative)


def hard_sigmoid(x: Tensor) -> Tensor:
    """clip((x + 1) / 2, 0, 1): the probability of +1 in stochastic binarization."""
    return ((x + 1) / 2).clamp(0, 1)


def _inside(grad: Tensor, x: Tensor) -> Tensor:
    """grad where |x| <= 1, else 0.

    `hardtanh_backward` is strict, so its bound is the next number above 1.
    """
    bound = 1 + torch.finfo(x.dtype).eps
    return torch.ops.aten.hardtanh_backward(grad, x, -bound, bound)


class _BinaryTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _inside(grad, *ctx.saved_tensors)


class _BinarySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x).add_(1).div_(2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _inside(grad, *ctx.saved_tensors) / 2


class _SignOfWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return sign(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _SampleOfWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, uniform: Tensor) -> Tensor:
        return sign(hard_sigmoid(weight) - uniform)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def binary_tanh(x: Tensor) -> Tensor:
    """Activation with the two values +1 and -1.

    Forward: y = +1 if x >= 0 else -1. Backward: dL/dx = dL/dy if |x| <= 1 else 0.
    Source: Hubara et al. 2016, eqs. (1) and (4); `binary_tanh_unit` of the original.
    """
    return _BinaryTanh.apply(x)


def binary_sigmoid(x: Tensor) -> Tensor:
    """Activation with the two values 1 and 0.

    Forward: y = 1 if x >= 0 else 0. Backward: dL/dx = dL/dy / 2 if |x| <= 1 else 0,
    the slope of `hard_sigmoid`. Source: `binary_sigmoid_unit` of the original.
    """
    return _BinarySigmoid.apply(x)


def binarize(weight: Tensor) -> Tensor:
    """Deterministic binary weights.

    Forward: Wb = +1 if W >= 0 else -1. Backward: dL/dW = dL/dWb, with no mask, because
    the optimizer keeps |W| <= 1. Source: Hubara et al. 2016, eq. (1).
    """
    return _SignOfWeight.apply(weight)


def binarize_stochastic(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Stochastic binary weights, one draw of the whole tensor from `generator`.

    Forward: Wb = +1 with probability hard_sigmoid(W), else -1. Backward: dL/dW = dL/dWb.
    `generator` must live on the device of `weight`. Source: Hubara et al. 2016, eq. (2).
    """
    # torch.rand is in [0, 1): W = -1 would draw +1 at u = 0. 1 - u is in (0, 1], and then
    # p >= 1 - u happens with probability p exactly: never at p = 0, always at p = 1.
    uniform = 1 - torch.rand(
        weight.shape, generator=generator, device=weight.device, dtype=weight.dtype
    )
    return _SampleOfWeight.apply(weight, uniform)
