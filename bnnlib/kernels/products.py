"""The products of binary layers, with the sign of the weight taken inside.

`linear` and `conv2d` are the ones that layers call; the precision of a layer is one of
"float32", "once" (the same, and on a CPU a sum is rounded once), "mixed" (sums in float32,
gradients in bf16) and "half" (sums in fp16 too, which `precision.py` allows where that is exact).

On a CPU, in float32, where both factors have two values only, the sums and their gradients are
those of `bits.py`; else they are PyTorch's. Sums of signs are exact in both, and the bias is added
once, to the whole sum, so they are equal to the last bit; gradients are sums of real numbers, and
differ by how those are rounded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnlib.errors import InvalidValue
from bnnlib.kernels.bits import Operands, channels_last
from bnnlib.kernels.geometry import Geometry
from bnnlib.quantizers import binarize, call, sign, traced

FLOAT32 = ("float32", "once")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, signs: bool, precision: str) -> Tensor:
    """x W^T + b: (..., in) -> (..., out). `signs`: with the signs of the weight.

    The gradient of the signs goes straight to the weight, as in `quantizers.binarize`; the signs
    are not kept in between. `torch.autocast` is followed as `F.linear` follows it.
    """
    flat = x.reshape(-1, x.shape[-1])  # the gradients are products of matrices
    if words := _as_words(flat, weight, bias, signs, precision, Geometry()):
        images, taps = flat[:, :, None, None], weight[:, :, None, None]
        product = call(_WordProduct, images, taps, bias, signs, words, Geometry())
    else:
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
    if words := _as_words(x, weight, bias, signs, precision, geometry):
        return call(_WordProduct, x, weight, bias, signs, words, geometry)
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


# ------------------------------------------------------------------------------- words


def _as_words(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    signs: bool,
    precision: str,
    geometry: Geometry,
) -> Operands | None:
    """Images (N, C[, H, W]) and weights (O, C[, height, width]) as words; None: take PyTorch's.

    So it is where a factor has more than two values, or is no plain float32 tensor on a CPU, and
    where PyTorch traces what it is given.
    """
    plain = all(_is_plain(factor) for factor in (x, weight, bias) if factor is not None)
    if not plain or precision not in FLOAT32 or geometry.groups > 1:
        return None
    if _watched() or torch.is_autocast_enabled("cpu"):
        return None
    return Operands.packed(x, weight, signs, geometry)


# Where PyTorch no longer tells, its own products are right as well.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def _watched() -> bool:
    """Whether something records PyTorch's operations, and would miss what is not one of them."""
    return traced() or torch.jit.is_tracing() or _modes() > 0


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"


class _WordProduct(torch.autograd.Function):
    """The product of images (N, C, H, W) and weights (O, C, height, width) that came as words."""

    @staticmethod
    def forward(x, weight, bias, signs: bool, words: Operands, geometry: Geometry):
        y = words.sums(bias).permute(0, 3, 1, 2)
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, bias, ctx.signs, ctx.words, ctx.geometry = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        factors, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for second derivatives
            y, _ = call(_Convolution, *factors, ctx.signs, "float32", ctx.geometry)
            wanted = [factor for factor, need in zip(factors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(found) if need else None for need in needed), None, None, None
        lying = channels_last(grad)
        grad_x = grad_weight = grad_bias = None
        if needed[2]:
            grad_bias = grad.sum((0, 2, 3))
        if needed[1]:
            grad_weight = ctx.words.weight_gradient(lying).permute(0, 3, 1, 2)
        if needed[0] and ctx.words.gives_input_gradient:
            grad_x = ctx.words.input_gradient(lying).permute(0, 3, 1, 2)
        elif needed[0]:
            x, weight, _ = factors
            weight = sign(weight) if ctx.signs else weight
            grad_x, *_ = _gradients(grad, x, weight, ctx.geometry, (True, False))
        return grad_x, grad_weight, grad_bias, None, None, None


# --------------------------------------------------------------------------- PyTorch's own


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


def _sums(product: Callable[[Tensor], Tensor], x: Tensor, precision: str) -> Tensor:
    """The product; for "once" as that of 12 bits behind the point and that of what is left.

    Scaled pixels are whole numbers of 2^-24. Each of the two sums is then exact in float32, in any
    order, and their sum is rounded once, so that it depends on no batch, layout or thread.
    """
    if precision != "once" or x.device.type != "cpu" or _watched():
        return product(x)
    high = (x * 2**12).round_().div_(2**12)
    low = x - high
    return product(high).add_(product(low)) if low.any() else product(high)


def _plus(sums: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Sums and a bias, added last: a product that begins with it rounds at every step."""
    return sums if bias is None else sums.add_(bias.view(shape))


class _Convolution(_Product):
    @staticmethod
    def forward(x, weight, bias, signs: bool, precision: str, geometry: Geometry):
        weight, form = sign(weight) if signs else weight, geometry._asdict()
        if precision == "half":
            x = x.half()
            y = F.conv2d(x, weight.half(), **form)
            return (y.float() if bias is None else y + bias.view(-1, 1, 1)), x
        with _without_tf32(x.is_cuda and precision in FLOAT32):
            sums = _sums(lambda x: F.conv2d(x, weight, **form), x, precision)
        return _plus(sums, bias, (-1, 1, 1)), None

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        kind = grad.dtype
        # A sum of its own takes much less time than oneDNN's convolution takes for it.
        grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None
        grad, x, weight = _factors(ctx, grad)
        (geometry,) = ctx.geometry
        with _without_tf32(grad.is_cuda and ctx.precision in FLOAT32):
            found = _gradients(grad, x, weight, geometry, ctx.needs_input_grad[:2])
        grad_x, grad_weight = (g if g is None else g.to(kind) for g in found)
        return grad_x, grad_weight, grad_bias, None, None, None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Of a convolution's images and weights, those that are needed."""
    stride, padding, groups = geometry
    return torch.ops.aten.convolution_backward(
        *(grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], groups),
        [*needed, False],
    )[:2]


class _Linear(_Product):
    @staticmethod
    def forward(x, weight, bias, signs: bool, precision: str):
        weight = sign(weight) if signs else weight
        if precision == "half":
            x = x.half()
            y = F.linear(x, weight.half())
            return (y.float() if bias is None else y + bias), x
        sums = _sums(lambda x: F.linear(x, weight), x, precision)
        return _plus(sums, bias, (-1,)), None

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
    if ctx.precision in FLOAT32:
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
