"""Layers with latent weights, and the batch normalization of the original.

A binary layer keeps a real-valued *latent* weight in [-1, 1] and computes with its binarization.
Layers take and give float tensors, (B, C, H, W) or (B, features).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnlib.errors import InvalidValue, check_name
from bnnlib.kernels import products
from bnnlib.quantizers import binarize, binarize_stochastic, binary_sigmoid, binary_tanh

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
        self.precision = "float32"  # or "mixed" or "half", set by `precision.set_precision`
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

    def operands(self) -> tuple[Tensor, Tensor, bool, str]:
        """Weight and bias of this call, whether signs are still to be taken, and the precision.

        The product takes deterministic signs itself, so as not to keep them; a subclass, or a
        user, that has another `effective_weight` gets that one. Real weights are never rounded.
        """
        own = getattr(self.effective_weight, "__func__", None) is BinaryLayer.effective_weight
        signs = own and self.mode == "deterministic"
        precision = self.precision if own and self.mode != "real" else "float32"
        return self.weight if signs else self.effective_weight(), self.bias, signs, precision

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, mode={self.mode!r}"


class BinaryLinear(BinaryLayer):
    """y = x Wb^T + b: (..., in_features) -> (..., out_features), as `nn.Linear`.

    Source: `DenseLayer` in `binary_net_random_labels.py:92-131` of the original.
    """

    def __init__(self, in_features: int, out_features: int, *, generator, mode="deterministic"):
        super().__init__((out_features, in_features), generator, mode)

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(x, *self.operands())


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
        padding = self.padding
        if self.pad_value != 0:
            x, padding = F.pad(x, (padding,) * 4, value=self.pad_value), 0
        return products.conv2d(x, *self.operands(), padding)


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
