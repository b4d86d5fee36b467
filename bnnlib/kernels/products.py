"""The products of binary layers, with the sign of the weight taken inside.

`linear` and `conv2d` are the ones that layers call; the precision of a layer is one of
"float32", "mixed" (sums in float32, gradients in bf16) and "half" (sums in fp16 too, which
`precision.py` allows where that is exact).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnnlib.errors import InvalidValue
from bnnlib.quantizers import binarize, call, sign


class Geometry(NamedTuple):
    """How a kernel moves over an image, height first."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, signs: bool, precision: str) -> Tensor:
    """x W^T + b: (..., in) -> (..., out). `signs`: with the signs of the weight.

    The gradient of the signs goes straight to the weight, as in `quantizers.binarize`; the signs
    are not kept in between. `torch.autocast` is followed as `F.linear` follows it.
    """
    flat = x.reshape(-1, x.shape[-1])  # the gradients are products of matrices
    product, _ = call(_Linear, *_as_autocast(flat, weight, bias, signs, precision))
    return product.reshape(*x.shape[:-1], len(weight))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    signs: bool,
    precision: str,
    geometry: Geometry,
) -> Tensor:
    """`F.conv2d`, ([B,] in, H, W) -> ([B,] out, H', W'); the rest as in `linear`."""
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), weight, bias, signs, precision, geometry).squeeze(0)
    return call(_Convolution, *_as_autocast(x, weight, bias, signs, precision), geometry)[0]


def _as_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, signs: bool, precision: str
) -> tuple:
    """The operands in the type that `torch.autocast` asks for, where it is on."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, weight, bias, signs, precision
    # The sign comes first: a small negative number becomes -0.0 in half precision.
    weight = binarize(weight) if signs else weight
    dtype = torch.get_autocast_dtype(x.device.type)
    bias = None if bias is None else bias.to(dtype)
    return x.to(dtype), weight.to(dtype), bias, False, "float32"


class _Product(torch.autograd.Function):
    """A product of inputs and weights: its value, and the inputs where they had to be rounded."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, bias, ctx.signs, ctx.precision, *geometry = inputs
        rounded, ctx.geometry, ctx.has_bias = output[1], geometry, bias is not None
        if rounded is not None:
            ctx.mark_non_differentiable(rounded)
        ctx.save_for_backward(x if rounded is None else rounded, weight)


class _Convolution(_Product):
    @staticmethod
    def forward(x, weight, bias, signs: bool, precision: str, geometry: Geometry):
        weight, form = sign(weight) if signs else weight, geometry._asdict()
        if precision == "half":
            x = x.half()
            y = F.conv2d(x, weight.half(), **form)
            return (y.float() if bias is None else y + bias.view(-1, 1, 1)), x
        with _without_tf32(x.is_cuda and precision == "float32"):
            return F.conv2d(x, weight, bias, **form), None

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        kind = grad.dtype
        # A sum of its own takes much less time than oneDNN's convolution takes for it.
        grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None
        grad, x, weight = _factors(ctx, grad)
        (geometry,) = ctx.geometry
        needed = [*ctx.needs_input_grad[:2], False]
        with _without_tf32(grad.is_cuda and ctx.precision == "float32"):
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                None,
                geometry.stride,
                geometry.padding,
                [1, 1],
                False,
                [0, 0],
                geometry.groups,
                needed,
            )
        grad_x, grad_weight = (g if g is None else g.to(kind) for g in (grad_x, grad_weight))
        return grad_x, grad_weight, grad_bias, None, None, None


class _Linear(_Product):
    @staticmethod
    def forward(x, weight, bias, signs: bool, precision: str):
        weight = sign(weight) if signs else weight
        if precision == "half":
            x = x.half()
            y = F.linear(x, weight.half())
            return (y.float() if bias is None else y + bias), x
        return F.linear(x, weight, bias), None

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        kind, grad_x = grad.dtype, None
        grad_bias = grad.sum(0) if ctx.has_bias else None
        grad, x, weight = _factors(ctx, grad)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).to(kind)
        del weight  # as large as the gradient that is next
        return grad_x, (grad.T @ x).to(kind), grad_bias, None, None


def _factors(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward pass multiplies: the gradient, the inputs and the weight, or its signs.

    For second derivatives signs are taken by `binarize`, to go straight through them as well.
    """
    x, weight = ctx.saved_tensors
    if ctx.signs:
        weight = binarize(weight) if torch.is_grad_enabled() else sign(weight)
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
