"""The products of binary layers, with the sign of the weight taken inside.

`linear` and `conv2d` are the ones that layers call; the precision of a layer is one of
"float32", "mixed" (sums in float32, gradients in bf16) and "half" (sums in fp16 too, which
`precision.py` allows where that is exact).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from bnnlib.errors import InvalidValue
from bnnlib.quantizers import binarize, sign


def linear(x: Tensor, weight: Tensor, bias: Tensor, signs: bool, precision: str) -> Tensor:
    """x W^T + b: (..., in) -> (..., out). `signs`: with the signs of the weight.

    The gradient of the signs goes straight to the weight, as in `quantizers.binarize`; the signs
    are not kept in between. `torch.autocast` is followed as `F.linear` follows it.
    """
    flat = x.reshape(-1, x.shape[-1])  # the gradients are products of matrices
    product = _Linear.apply(*_as_autocast(flat, weight, bias, signs, precision))
    return product.reshape(*x.shape[:-1], len(weight))


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, signs: bool, precision: str, padding: int
) -> Tensor:
    """`F.conv2d` with stride 1, ([B,] in, H, W) -> ([B,] out, H, W); the rest as in `linear`."""
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), weight, bias, signs, precision, padding).squeeze(0)
    return _Convolution.apply(*_as_autocast(x, weight, bias, signs, precision), padding)


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor, signs: bool, precision: str) -> tuple:
    """The operands in the type that `torch.autocast` asks for, where it is on."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, weight, bias, signs, precision
    # The sign comes first: a small negative number becomes -0.0 in half precision.
    weight = binarize(weight) if signs else weight
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), False, "float32"


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, signs: bool, precision: str, padding: int) -> Tensor:
        ctx.padding, ctx.signs, ctx.precision = padding, signs, precision
        if precision == "half":
            x = x.half()
        ctx.save_for_backward(x, weight)
        if signs:
            weight = sign(weight)
        if precision == "half":
            return F.conv2d(x, weight.half(), padding=padding) + bias.view(-1, 1, 1)
        with _without_tf32(x.is_cuda and precision == "float32"):
            return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # A sum of its own takes much less time than oneDNN's convolution takes for it.
        grad_bias, kind = grad.sum((0, 2, 3)), grad.dtype
        grad, x, weight = _factors(ctx, grad)
        one, border = [1, 1], [ctx.padding, ctx.padding]
        needed = [*ctx.needs_input_grad[:2], False]
        with _without_tf32(grad.is_cuda and ctx.precision == "float32"):
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, one, border, one, False, [0, 0], 1, needed
            )
        grad_x, grad_weight = (g if g is None else g.to(kind) for g in (grad_x, grad_weight))
        return grad_x, grad_weight, grad_bias, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, signs: bool, precision: str) -> Tensor:
        ctx.signs, ctx.precision = signs, precision
        if precision == "half":
            x = x.half()
        ctx.save_for_backward(x, weight)
        if signs:
            weight = sign(weight)
        if precision == "half":
            return F.linear(x, weight.half()) + bias
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_bias, grad_x = grad.sum(0), None
        grad, x, weight = _factors(ctx, grad)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).to(grad_bias.dtype)
        del weight  # as large as the gradient that is next
        return grad_x, (grad.T @ x).to(grad_bias.dtype), grad_bias, None, None


def _factors(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward pass multiplies: the gradient, the inputs and the weight, or its signs.

    Signs are taken by `binarize`, so that second derivatives go straight through them as well.
    """
    x, weight = ctx.saved_tensors
    if ctx.signs:
        weight = binarize(weight)
    if ctx.precision == "float32":
        return grad, x, weight
    if torch.is_grad_enabled():  # x was rounded where nobody saw it
        raise InvalidValue(
            "second derivatives are taken at precision 'float32' only, got a layer at "
            f"{ctx.precision!r}"
        )
    return grad.bfloat16(), x.bfloat16(), weight.bfloat16()


@contextmanager
def _without_tf32(wanted: bool) -> Iterator[None]:
    """Inside the `with` block cuDNN does not round float32 to the 11 bits of TF32, if `wanted`.

    By default it does. That keeps +1 and -1, and changes pixels, real weights and gradients.
    """
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision if wanted else "ieee"
    if before == "ieee":
        yield
        return
    inherited = before == torch.backends.cudnn.fp32_precision  # it follows that one later, too
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = "none" if inherited else before
