"""Layers with latent weights, and the batch normalization of the original.

A binary layer keeps a real-valued *latent* weight and computes with what its quantizer makes of it.
Layers take and give float tensors, (B, C, H, W) or (B, features).
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnlib.errors import InvalidValue, check_name, check_whole
from bnnlib.kernels import products
from bnnlib.kernels.geometry import MOST_PIXELS, Geometry
from bnnlib.names import STATISTICS, WEIGHT_MODES, parameters_of
from bnnlib.parallel import Shard, normalize
from bnnlib.quantizers import (
    approx_sign,
    binarize,
    binarize_stochastic,
    binary_sigmoid,
    binary_tanh,
    real,
    uniform_like,
)

Quantizer = Callable[..., Tensor]
SIGNS = (binarize, binarize_stochastic, binary_tanh, approx_sign)  # make +1 and -1 alone


def draws(quantizer: Quantizer) -> bool:
    """Whether a quantizer takes a generator to draw from, in a parameter of that name."""
    called = quantizer.forward if isinstance(quantizer, nn.Module) else quantizer
    return "generator" in parameters_of(called)


class BinaryLayer(nn.Module):
    """A layer with a latent weight W, which computes with `quantizer(W)`.

    - `quantizer`: any function or module from a latent weight to a weight of the same shape; one
      that has a parameter `generator` is given `self.generator`, which `seed_layers` sets (None:
      PyTorch's own).
    - `mode`: how it is evaluated, see `evaluating`; None: with its quantizer.
    - `lr_scale` = sqrt((fan_in + fan_out) / 1.5) multiplies the learning rate of W; the
      original calls it `W_LR_scale = "Glorot"` (`binary_net_random_labels.py:104,152`).

    Biases are real-valued and never quantized. W starts as U(-1, 1), drawn from `generator`
    (None: PyTorch's own).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        quantizer: Quantizer,
        generator: torch.Generator | None,
    ):
        super().__init__()
        if not callable(quantizer):
            raise InvalidValue(f"quantizer must be a function or a module, got {quantizer!r}")
        self.quantizer, self.draws = quantizer, draws(quantizer)
        self.mode: str | None = None
        self.generator: torch.Generator | None = None
        self.precision = "float32"  # or "mixed" or "half", set by `precision.set_precision`
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-1, 1, generator=generator))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        receptive_field = self.weight[0, 0].numel()  # 9 for a 3x3 convolution, else 1
        self.lr_scale = sqrt((shape[0] + shape[1]) * receptive_field / 1.5)

    def used_quantizer(self) -> tuple[Quantizer, bool]:
        """What this call computes with, and whether it draws."""
        own = self.quantizer not in (binarize_stochastic, real)
        if self.mode is None or (self.mode == "deterministic" and own):
            return self.quantizer, self.draws
        return {
            "deterministic": (binarize, False),
            "stochastic": (binarize_stochastic, True),
            "real": (real, False),
        }[self.mode]

    def effective_weight(self) -> Tensor:
        """The weight of this call: same shape as the latent weight, differentiable."""
        quantizer, drawn = self.used_quantizer()
        return quantizer(self.weight, generator=self.generator) if drawn else quantizer(self.weight)

    def operands(self) -> tuple[Tensor, Tensor | None, bool, str]:
        """Weight and bias of this call, whether signs are still to be taken, and the precision.

        The product takes plain signs itself, so as not to keep them; any other quantizer, and a
        subclass with an `effective_weight` of its own, gets that weight. Only sums of signs are
        taken in less than float32. In evaluation those of a first layer are rounded once.
        """
        own = getattr(self.effective_weight, "__func__", None) is BinaryLayer.effective_weight
        quantizer, _ = self.used_quantizer()
        signs = own and quantizer is binarize
        precision = self.precision if own and quantizer in SIGNS else "float32"
        if not self.training and quantizer in SIGNS and precision == "float32":
            few = self.weight.shape[1:].numel() <= MOST_PIXELS
            precision = "once" if few else precision
        return self.weight if signs else self.effective_weight(), self.bias, signs, precision

    def extra_repr(self) -> str:
        name = getattr(self.quantizer, "__name__", type(self.quantizer).__name__)
        bias = "" if self.bias is not None else ", bias=False"
        return f"{tuple(self.weight.shape)}, quantizer={name}{bias}"


class BinaryLinear(BinaryLayer):
    """y = x Wb^T + b: (..., in_features) -> (..., out_features), as `nn.Linear`.

    Source: `DenseLayer` in `binary_net_random_labels.py:92-131` of the original.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quantizer: Quantizer = binarize,
        generator: torch.Generator | None = None,
    ):
        super().__init__((out_features, in_features), bias, quantizer, generator)

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(x, *self.operands())


class BinaryConv2d(BinaryLayer):
    """Convolution with binary weights, as `nn.Conv2d`: ([B,] in, H, W) -> ([B,] out, H', W').

    - `kernel_size`, `stride`, `padding`: a number, or one for the height and one for the width.
    - `padding`: "same" lays half a kernel around the image, so H' = ceil(H / stride), for odd
      kernels; "valid" is 0.
    - `pad_value` fills the border. The original pads with 0, a third value beside +1 and -1; 1.0
      or -1.0 keeps every input of the sum binary.

    Raises InvalidValue for sizes and groups with which no convolution is defined.
    Source: `Conv2DLayer` in `binary_net_random_labels.py:134-177` of the original.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        bias: bool = True,
        groups: int = 1,
        quantizer: Quantizer = binarize,
        generator: torch.Generator | None = None,
        *,
        pad_value: float = 0.0,
    ):
        kernel, stride = _pair("kernel_size", kernel_size, 1), _pair("stride", stride, 1)
        if check_whole("groups", groups, 1) and (in_channels % groups or out_channels % groups):
            raise InvalidValue(
                f"groups must divide in_channels and out_channels, got {groups} for "
                f"{in_channels} and {out_channels}"
            )
        super().__init__((out_channels, in_channels // groups, *kernel), bias, quantizer, generator)
        self.geometry = Geometry(stride, _padding(padding, kernel), groups)
        self.pad_value = pad_value

    def forward(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        if self.pad_value != 0:
            vertical, horizontal = geometry.padding
            x = F.pad(x, (horizontal, horizontal, vertical, vertical), value=self.pad_value)
            geometry = geometry._replace(padding=(0, 0))
        return products.conv2d(x, *self.operands(), geometry)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.geometry.stride}"


def _pair(name: str, value: int | tuple[int, int], low: int) -> tuple[int, int]:
    """A size as a number for the height and one for the width."""
    parts = value if isinstance(value, tuple | list) else (value, value)
    if len(parts) != 2:
        raise InvalidValue(f"{name} must be a number or two, got {value!r}")
    return check_whole(name, parts[0], low), check_whole(name, parts[1], low)


def _padding(padding: str | int | tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(padding, str):
        return _pair("padding", padding, 0)
    check_name("padding", padding, ("same", "valid"))
    if padding == "valid":
        return 0, 0
    if not kernel[0] % 2 or not kernel[1] % 2:
        raise InvalidValue(f"kernel_size must be odd for padding 'same', got {kernel}")
    return kernel[0] // 2, kernel[1] // 2


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
        self.shard: Shard | None = None  # of the batch in training, set by `sharing`
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_inv_std", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.statistics == "running":
            return self._normalize_with_averages(x)
        if self.training and self.shard:
            y, mean, inv_std = normalize(x, self.weight, self.bias, self.eps, self.shard)
        else:
            y, mean, inv_std = torch.native_batch_norm(
                x, self.weight, self.bias, None, None, True, 0.0, self.eps
            )
        if self.training:
            kind = self.running_mean.dtype  # autocast has another one
            self.running_mean.lerp_(mean.detach().to(kind), self.alpha)
            self.running_inv_std.lerp_(inv_std.detach().to(kind), self.alpha)
        return y

    def _normalize_with_averages(self, x: Tensor) -> Tensor:
        channel = (1, -1) + (1,) * (x.dim() - 2)
        scale = self.weight * self.running_inv_std
        centred = x - self.running_mean.view(channel)
        return torch.addcmul(self.bias.view(channel), centred, scale.view(channel))

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, alpha={self.alpha}"


class BinaryTanh(nn.Module):
    """`quantizers.binary_tanh` as a module, any shape."""

    values = (-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return binary_tanh(x)


class BinarySigmoid(nn.Module):
    """`quantizers.binary_sigmoid` as a module, any shape."""

    values = (0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return binary_sigmoid(x)


class Dropout(nn.Module):
    """In training, zeroes each entry with probability p and scales the rest by 1 / (1 - p).

    Draws from `self.generator`, set by `seed_layers`; None is PyTorch's own, as for `nn.Dropout`.
    Source: Srivastava et al. 2014; Lasagne `DropoutLayer`.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise InvalidValue(f"dropout probability must be in [0, 1), got {p}")
        self.p = p
        self.generator: torch.Generator | None = None
        self.shard: Shard | None = None  # of the batch, set by `sharing`

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.shard is None:
            uniform = uniform_like(x, self.generator)
        else:  # for the rows of all ranks, as one process draws
            whole = x[:1].expand(self.shard.rows, *x.shape[1:])
            uniform = uniform_like(whole, self.generator)[self.shard.own]
        keep = uniform >= self.p
        return x * keep.to(x.dtype).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Activation(nn.Module):
    """Any function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function
        if function in SIGNS:
            self.values = (-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def derive_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, so that no two random acts of a run share their numbers."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


def seed_layers(model: nn.Module, seed: int | None) -> nn.Module:
    """Give all random layers of `model` one new generator with this seed, on the model's device.

    None: they draw from PyTorch's own generator, as they do at first.
    """
    generator = None
    if seed is not None:
        device = next(model.parameters(), torch.empty(0)).device
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


NEEDS_THE_BATCH = {  # layers of PyTorch that see or draw for whole batches, and what to use
    nn.modules.batchnorm._BatchNorm: "bnnlib's BatchNorm",
    nn.modules.dropout._DropoutNd: "bnnlib's Dropout",
    nn.RReLU: "another activation",
}


def check_can_share(model: nn.Module) -> None:
    """Raise InvalidValue for a layer that cannot do on some rows what it does on the whole batch.

    So it is with those of `torch.nn` that draw or have averages of their own, and with those of
    somebody else's that take a generator. Functions that draw are not seen.
    """
    for name, layer in model.named_modules():
        known = hasattr(layer, "generator") and not isinstance(layer, BinaryLayer | Dropout)
        advice = "train in one process" if known else None
        for kind, instead in NEEDS_THE_BATCH.items():
            advice = f"use {instead}" if isinstance(layer, kind) else advice
        if advice:
            raise InvalidValue(
                f"layer {name!r}, a {type(layer).__name__}, needs the whole batch, which several "
                f"ranks share; {advice}"
            )


@contextmanager
def sharing(model: nn.Module, shard: Shard | None) -> Iterator[None]:
    """Inside the `with` block `model` trains on these rows of each batch, other ranks on others.

    None: on all of them. Raises what `check_can_share` raises.
    """
    if shard:
        check_can_share(model)
    layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm | Dropout)]
    for layer in layers:
        layer.shard = shard
    try:
        yield
    finally:
        for layer in layers:
            layer.shard = None


@contextmanager
def evaluating(
    model: nn.Module, weights: str | None = None, statistics: str = "running", seed: int = 0
) -> Iterator[nn.Module]:
    """Inside the `with` block `model` is in evaluation mode; afterwards it is as it was before.

    - `weights`: what binary layers compute with. None: as in training; "deterministic": sign(W)
      in place of samples of it and of W itself, and what any other quantizer makes of W;
      "stochastic": samples of +1/-1; "real": W itself.
    - `statistics`: what batch normalization uses, the "running" averages or those of the
      evaluated "batch". Neither changes the averages.
    - `seed`: of stochastic weights, drawn anew at each forward pass. The generator that
      trains the model does not move.
    """
    check_name("weight mode", weights or "deterministic", WEIGHT_MODES)
    check_name("statistics", statistics, STATISTICS)
    device = next(model.parameters(), torch.empty(0)).device
    generator = torch.Generator(device).manual_seed(seed)
    changes = [(module, "training", False) for module in model.modules()]
    for layer in binary_layers(model):
        changes += [(layer, "generator", generator), (layer, "mode", weights or layer.mode)]
    for module in model.modules():
        if isinstance(module, BatchNorm):
            changes.append((module, "statistics", statistics))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and statistics == "batch":
            changes += [(module, "running_mean", None), (module, "running_var", None)]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield model
    finally:
        for change in before:
            setattr(*change)
