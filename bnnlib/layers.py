"""Layers with latent weights, and the batch normalization of the original.

In: a float tensor, (B, C, H, W) or (B, features). Out: the same kind of tensor. A binary
layer keeps a real-valued *latent* weight in [-1, 1] and computes with its binarization.
Next file: `precision.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnlib.errors import InvalidValue, check_name
from bnnlib.quantizers import binarize, binarize_stochastic, binary_sigmoid, binary_tanh, sign

MODES = ("deterministic", "stochastic", "real")
STATISTICS = ("running", "batch")


class BinaryLayer(nn.Module):
    """A layer with a latent weight; `mode` says what it computes with.

    - "deterministic": sign(W); "stochastic": a fresh sample of +1/-1 each call, drawn from
      `self.generator`; "real": W itself, which stays in [-1, 1].
    - `lr_scale` = sqrt((fan_in + fan_out) / 1.5) multiplies the learning rate of W; the
      original calls it `W_LR_scale = "Glorot"` (`binary_net_random_labels.py:104,152`).

    Biases are real-valued and never binarized. W starts as U(-1, 1), drawn from `generator`.
    """

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, mode: str = "deterministic"
    ):
        super().__init__()
        check_name("weight mode", mode, MODES)
        self.mode = mode
        self.generator: torch.Generator | None = None  # for sampling, set by `seed_layers`
        self.precision = "float32"  # or "mixed" or "half", set by `precision.use_half`
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-1, 1, generator=generator))
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        receptive_field = self.weight[0, 0].numel()  # 9 for a 3x3 convolution, else 1
        self.lr_scale = sqrt((shape[0] + shape[1]) * receptive_field / 1.5)

    def effective_weight(self) -> Tensor:
        """The weight of this call: same shape as the latent weight, differentiable."""
        if self.mode == "deterministic":
            return binarize(self.weight)
        if self.mode == "real":
            return self.weight
        if self.generator is None:
            raise InvalidValue("stochastic weights need a generator: call seed_layers(model, seed)")
        return binarize_stochastic(self.weight, self.generator)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, bool, str]:
        """Input, weight and bias of this call, whether signs are still to be taken, the precision.

        The product takes deterministic signs itself, so as not to keep them; a subclass, or a
        user, that has another `effective_weight` gets that one. Real weights are never rounded,
        but by `torch.autocast`, which is followed as `nn.Linear` and `nn.Conv2d` follow it.
        """
        own = getattr(self.effective_weight, "__func__", None) is BinaryLayer.effective_weight
        signs, precision = own and self.mode == "deterministic", self.precision
        casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if not own or self.mode == "real" or casts:
            precision = "float32"
        if not casts:
            return x, self.weight if signs else self.effective_weight(), self.bias, signs, precision
        # The sign comes first: a small negative number becomes -0.0 in half precision.
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), self.effective_weight().to(dtype), self.bias.to(dtype), False, precision

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, mode={self.mode!r}"


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


class _Convolution(torch.autograd.Function):
    """`F.conv2d` with stride 1, at the precision of its layer.

    Where `signs` is true it computes with the signs of the weight, and the gradient of the signs
    goes straight to the weight, as in `quantizers.binarize`; they are not kept in between.
    """

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
    """`F.linear`, with `signs` and `precision` as in `_Convolution`."""

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


class BinaryLinear(BinaryLayer):
    """y = x Wb^T + b: (..., in_features) -> (..., out_features), as `nn.Linear`.

    Source: `DenseLayer` in `binary_net_random_labels.py:92-131` of the original.
    """

    def __init__(self, in_features: int, out_features: int, *, generator, mode="deterministic"):
        super().__init__((out_features, in_features), generator, mode)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return _Linear.apply(*self._operands(x))
        flat = x.reshape(-1, x.shape[-1])  # the gradients are products of matrices
        return _Linear.apply(*self._operands(flat)).reshape(*x.shape[:-1], len(self.weight))


class BinaryConv2d(BinaryLayer):
    """Convolution with binary weights, stride 1: ([B,] in, H, W) -> ([B,] out, H, W).

    The border is filled with `pad_value`. The original pads with 0, a third value beside
    +1 and -1; 1.0 or -1.0 keeps every input of the sum binary.
    Source: `Conv2DLayer` in `binary_net_random_labels.py:134-177` of the original.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        pad_value: float = 0.0,
        *,
        generator: torch.Generator,
        mode: str = "deterministic",
    ):
        if kernel_size % 2 == 0:
            raise InvalidValue(f"kernel_size must be odd to keep the image size, got {kernel_size}")
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), generator, mode)
        self.padding = kernel_size // 2
        self.pad_value = pad_value

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        padding = self.padding
        if self.pad_value != 0:
            x, padding = F.pad(x, (padding,) * 4, value=self.pad_value), 0
        return _Convolution.apply(*self._operands(x), padding)


class BatchNorm(nn.Module):
    """Batch normalization that averages 1/std, as Lasagne did: (B, C[, H, W]) -> same.

    Training: y = (x - mean) * inv_std * weight + bias over the batch, with the biased
    variance and inv_std = 1 / sqrt(var + eps); both averages then move by `alpha`.
    Evaluation: the same with the averages; or, where `statistics` is "batch", with the mean and
    std of the evaluated batch. The averages stay as they are.
    `nn.BatchNorm2d` averages the unbiased variance instead, and cannot express this.
    Source: Lasagne `layers/normalization.py:272-326`; Ioffe & Szegedy 2015.
    """

    def __init__(self, features: int, eps: float = 1e-4, alpha: float = 0.1):
        super().__init__()
        self.eps, self.alpha = eps, alpha
        self.statistics = "running"  # of evaluation, one of `STATISTICS`
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_inv_std", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.statistics == "running":
            return self._normalize_with_averages(x)
        y, mean, inv_std = torch.native_batch_norm(
            x, self.weight, self.bias, None, None, True, 0.0, self.eps
        )
        if self.training:
            self.running_mean.lerp_(mean.detach(), self.alpha)
            self.running_inv_std.lerp_(inv_std.detach(), self.alpha)
        return y

    def _normalize_with_averages(self, x: Tensor) -> Tensor:
        channel = (1, -1) + (1,) * (x.dim() - 2)
        scale = self.weight * self.running_inv_std
        centred = x - self.running_mean.view(channel)
        return torch.addcmul(self.bias.view(channel), centred, scale.view(channel))

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, alpha={self.alpha}"


class BinaryTanh(nn.Module):
    """`quantizers.binary_tanh` as a module: any shape, values +1 and -1."""

    def forward(self, x: Tensor) -> Tensor:
        return binary_tanh(x)


class BinarySigmoid(nn.Module):
    """`quantizers.binary_sigmoid` as a module: any shape, values 1 and 0."""

    def forward(self, x: Tensor) -> Tensor:
        return binary_sigmoid(x)


class Dropout(nn.Module):
    """In training, zeroes each entry with probability p and scales the rest by 1 / (1 - p).

    Draws from `self.generator`, set by `seed_layers`; `nn.Dropout` would draw from PyTorch's
    global one. Source: Srivastava et al. 2014; Lasagne `DropoutLayer`.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise InvalidValue(f"dropout probability must be in [0, 1), got {p}")
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.generator is None:
            raise InvalidValue("dropout needs a generator: call seed_layers(model, seed)")
        keep = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.p
        return x * keep.to(x.dtype).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def seed_layers(model: nn.Module, seed: int) -> nn.Module:
    """Give all random layers of `model` one new generator with this seed, on the model's device."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for layer in model.modules():
        if hasattr(layer, "generator"):
            layer.generator = generator
    return model


def random_generator(model: nn.Module) -> torch.Generator | None:
    """The generator that `seed_layers` gave to the random layers; None where there are none."""
    generators = (getattr(layer, "generator", None) for layer in model.modules())
    return next((generator for generator in generators if generator is not None), None)


def binary_layers(model: nn.Module) -> list[BinaryLayer]:
    """The layers of `model` with latent weights, from input to output."""
    return [layer for layer in model.modules() if isinstance(layer, BinaryLayer)]


@contextmanager
def evaluating(
    model: nn.Module, weights: str | None = None, statistics: str = "running", seed: int = 0
) -> Iterator[nn.Module]:
    """Inside the `with` block `model` is in evaluation mode; afterwards it is as it was before.

    - `weights`: what binary layers compute with, one of `MODES`; None: as in training.
    - `statistics`: what batch normalization uses, the "running" averages or those of the
      evaluated "batch". Neither changes the averages.
    - `seed`: of stochastic weights, drawn anew at each forward pass. The generator that
      trains the model does not move.
    """
    check_name("weight mode", weights or "deterministic", MODES)
    check_name("statistics", statistics, STATISTICS)
    device = next(model.parameters(), torch.empty(0)).device
    generator = torch.Generator(device).manual_seed(seed)
    changes = [(module, "training", False) for module in model.modules()]
    for layer in binary_layers(model):
        changes += [(layer, "generator", generator), (layer, "mode", weights or layer.mode)]
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    changes += [(norm, "statistics", statistics) for norm in norms]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield model
    finally:
        for change in before:
            setattr(*change)


@torch.no_grad()
def binarize_parameters_(model: nn.Module) -> nn.Module:
    """Replace every latent weight by its sign, in place.

    A network with deterministic weights computes the same function afterwards.
    Source: `svhn_evaluation_random_labels.py:321-325` of the original.
    """
    for layer in binary_layers(model):
        layer.weight.copy_(binarize(layer.weight))
    return model
