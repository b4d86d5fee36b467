"""From real numbers to +1/-1 (or 1/0) and back: quantizers with straight-through gradients.

A quantizer takes a float tensor of any shape and returns the same shape and dtype. One formula is
its value, another the slope that stands in for its own, which is 0 almost everywhere. Each is a
plain function, of latent weights and of activations alike. The first formulas are those of
Hubara et al., "Binarized Neural Networks", NeurIPS 2016 (arXiv:1602.02830), as coded in
`binary_net_random_labels.py` of the original.
"""

from typing import Any

import torch
from torch import Tensor

from bnnlib.errors import InvalidValue


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1; never 0, and -0.0 counts as 0. NaN becomes +1. No gradient.

    1 - 2 [x < 0], with the comparison written as numbers: masks of type bool and `torch.where`
    take many times as long on a CPU.
    """
    x = x.detach()
    if torch.compiler.is_compiling():  # which takes no `out` in channels_last
        return 1 - 2 * (x < 0).to(x.dtype)
    negative = torch.empty_like(x)
    try:
        torch.lt(x, 0, out=negative)
    except RuntimeError:  # nor does `torch.func.vmap`
        return 1 - 2 * (x < 0).to(x.dtype)
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


# ---------------------------------------------------------------- values with another slope


# Where PyTorch no longer tells, its own `apply` is right as well.
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def traced() -> bool:
    """Whether PyTorch compiles or transforms what is called now, and does not simply do it."""
    return torch.compiler.is_compiling() or _transformed()


def call(function: type[torch.autograd.Function], *inputs: object) -> Any:
    """`function.apply(*inputs)`, of one that `torch.func` can transform.

    PyTorch reads the signature of its `forward` at every call, for arguments that we never leave
    out; that takes longer than a small product. Here it does where it has to.
    """
    if traced():
        return function.apply(*inputs)
    return super(torch.autograd.Function, function).apply(*inputs)


class _Sign(torch.autograd.Function):
    """sign(x), whose gradient passes as it is."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return sign(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad

    @classmethod
    def vmap(cls, info, in_dims, x: Tensor):  # for torch.func: each number by itself
        return cls.apply(x), in_dims[0]


class _ClippedSign(_Sign):
    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _inside(grad, *ctx.saved_tensors)


class _ClippedStep(_ClippedSign):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _Sign.forward(x).add_(1).div_(2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _inside(grad, *ctx.saved_tensors) / 2


class _ApproxSign(_ClippedSign):
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (2 - 2 * ctx.saved_tensors[0].abs()).clamp(min=0)


def binary_tanh(x: Tensor) -> Tensor:
    """+1 or -1, with the clipped straight-through slope.

    Forward: y = +1 if x >= 0 else -1. Backward: dL/dx = dL/dy if |x| <= 1 else 0.
    Source: Hubara et al. 2016, eqs. (1) and (4); `binary_tanh_unit` of the original.
    """
    return call(_ClippedSign, x)


def binary_sigmoid(x: Tensor) -> Tensor:
    """1 or 0, with the clipped straight-through slope.

    Forward: y = 1 if x >= 0 else 0. Backward: dL/dx = dL/dy / 2 if |x| <= 1 else 0,
    the slope of `hard_sigmoid`. Source: `binary_sigmoid_unit` of the original.
    """
    return call(_ClippedStep, x)


def approx_sign(x: Tensor) -> Tensor:
    """+1 or -1, with the slope of two parabolas.

    Forward: y = +1 if x >= 0 else -1. Backward: dL/dx = dL/dy max(0, 2 - 2 |x|), the slope of
    x (2 - |x|), which lies closer to the sign than the line of `binary_tanh` does.
    Source: Liu et al., "Bi-Real Net", ECCV 2018 (arXiv:1808.00278), its ApproxSign.
    """
    return call(_ApproxSign, x)


def approx_step(x: Tensor) -> Tensor:
    """1 or 0: (`approx_sign`(x) + 1) / 2, with half its slope."""
    return (approx_sign(x) + 1) / 2


def binarize(weight: Tensor) -> Tensor:
    """+1 or -1, with the plain straight-through slope: deterministic binary weights.

    Forward: Wb = +1 if W >= 0 else -1. Backward: dL/dW = dL/dWb, with no mask, because
    the optimizer keeps |W| <= 1. Source: Hubara et al. 2016, eq. (1).
    """
    return call(_Sign, weight)


def scaled_sign(weight: Tensor) -> Tensor:
    """Signs times one positive number for each output channel: (out, ...) -> same.

    Forward: Wb = a sign(W), a = mean |W| over all but the first dimension. Backward: through the
    sign as in `binary_tanh`, and through a, which all weights of a channel share. (The paper's
    gradient leaves out what a weight does to the others through a.)
    Source: Rastegari et al., "XNOR-Net", ECCV 2016 (arXiv:1603.05279), section 3.1.
    """
    scale = weight.abs().mean(tuple(range(1, weight.dim())), keepdim=True)
    return scale * binary_tanh(weight)


def real(weight: Tensor) -> Tensor:
    """The weight itself, for what is not to be quantized."""
    return weight


class _SampledSign(torch.autograd.Function):
    """A sample of +1/-1 from uniform numbers, whose gradient passes as it is."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(weight: Tensor, uniform: Tensor) -> Tensor:
        return sign(hard_sigmoid(weight) - uniform)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def binarize_stochastic(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Stochastic binary weights, one draw of the whole tensor from `generator`.

    Forward: Wb = +1 with probability hard_sigmoid(W), else -1. Backward: dL/dW = dL/dWb.
    `generator` must live on the device of `weight`; None is PyTorch's own, as for `torch.rand`.
    Where `torch.compile` meets a generator, it leaves this to Python, or, with `fullgraph=True`,
    refuses; `torch.export` raises InvalidValue.
    Source: Hubara et al. 2016, eq. (2).
    """
    # torch.rand is in [0, 1): W = -1 would draw +1 at u = 0. 1 - u is in (0, 1], and then
    # p >= 1 - u happens with probability p exactly: never at p = 0, always at p = 1.
    return call(_SampledSign, weight, 1 - uniform_like(weight, generator, weight.dtype))


def uniform_like(
    x: Tensor, generator: torch.Generator | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers from [0, 1) in the shape of `x`, drawn from `generator`; None: PyTorch's own."""
    if generator is None:
        return torch.rand(x.shape, device=x.device, dtype=dtype)
    if torch.compiler.is_compiling():
        raise InvalidValue(
            "a compiled or exported graph can draw from PyTorch's own generator only; "
            "call seed_layers(model, None) first"
        )
    return torch.rand(x.shape, generator=generator, device=x.device, dtype=dtype)
