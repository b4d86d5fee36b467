"""Networks: BinaryNets, a residual one, and their real-valued twins.

The layers of a BinaryNet are numbered as in the original: `conv1` ... `dense9`, each followed by
[pool], [dropout], batch normalization and, but for the last, the activation.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnlib.errors import InvalidValue, check_name, check_whole, shown
from bnnlib.layers import Activation, BatchNorm, BinaryConv2d, BinaryLinear, Dropout, binary_layers
from bnnlib.names import (
    ACTIVATIONS,
    DROPOUT_POSITIONS,
    NETWORKS,
    PENALTY_TARGETS,
    QUANTIZERS,
    accepted,
)


class Inputs(NamedTuple):
    """What a network takes, and how many classes it tells apart."""

    in_channels: int  # 3, or 1 for grey images
    image_size: int  # height and width, in pixels
    classes: int


# ------------------------------------------------------------------------ what a layer is made of


def make_part(entry: Callable) -> Callable:
    """A quantizer or activation for one layer: a class of modules gives each layer its own."""
    return entry() if isinstance(entry, type) else entry


def make_activation(name: str, binary: bool = True) -> nn.Module:
    """The activation of this name in `ACTIVATIONS`, as a module.

    `binary`: False gives what the shipped ones round; any other activation serves both.
    """
    if not binary and name in REAL_ACTIVATIONS:
        return REAL_ACTIVATIONS[name]()
    part = make_part(ACTIVATIONS[name])
    return part if isinstance(part, nn.Module) else Activation(part)


class HardSigmoid(nn.Module):
    """clip((x + 1) / 2, 0, 1): what `BinarySigmoid` rounds. (`nn.Hardsigmoid` divides by 6.)"""

    def forward(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2).clamp(0, 1)


REAL_ACTIVATIONS = {
    "binary_tanh": nn.Hardtanh,
    "binary_sigmoid": HardSigmoid,
    "straight_through": nn.Hardtanh,
    "approx_sign": nn.Hardtanh,
    "approx_step": HardSigmoid,
}


def _real_layer(kind: type[nn.Module], generator: torch.Generator, *sizes: int, **kwargs):
    """An ordinary layer with Glorot weights, made without PyTorch's global generator."""
    device = torch.empty(0).device  # "meta" inside `with torch.device("meta")`
    layer = nn.utils.skip_init(kind, *sizes, device=device, **kwargs)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _scaled(width: float, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if width <= 0:
        raise InvalidValue(f"width must be positive, got {width}")
    return tuple(max(1, round(width * size)) for size in sizes)


# ------------------------------------------------------------------------------- BinaryNets


@dataclass(frozen=True)
class Architecture:
    """Sizes of a BinaryNet: 3x3 convolutions, a 2x2 pool after every few, then dense layers.

    Raises InvalidValue unless each is a whole number, at least 1, and leaves a pixel to pool.
    """

    convolutions: tuple[int, ...]  # output channels
    pool_every: int  # a pool after every so many convolutions
    dense: tuple[int, ...]  # hidden units; the classes come on top
    image_size: int = 32  # height and width, in pixels
    classes: int = 10
    in_channels: int = 3  # 1 for grey images

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            for size in value if isinstance(value, tuple | list) else (value,):
                check_whole(field.name, size, 1)
        pools = len(self.convolutions) // self.pool_every
        if self.image_size < 2**pools:
            raise InvalidValue(
                f"{pools} pools leave nothing of {self.image_size} x {self.image_size} pixels; "
                f"pool_every must be larger than {self.pool_every}"
            )


ARCHITECTURES = {
    # cifar10_random_labels.py: the network of Hubara et al. 2016 for CIFAR-10
    "cifar10": Architecture((128, 128, 256, 256, 512, 512), pool_every=2, dense=(1024, 1024)),
    # svhn_random_labels.py: half the channels (its comments say otherwise)
    "svhn": Architecture((64, 64, 128, 128, 256, 256), pool_every=2, dense=(1024, 1024)),
    # ours: wide and shallow, because narrow deep ones memorize too little in a quick run
    "small": Architecture((32, 64), pool_every=1, dense=(512, 512)),
    # ours: dense layers only, for the patterns whose labels are counted in bits
    "linear": Architecture((), pool_every=1, dense=(), image_size=8),
    "dense_one": Architecture((), pool_every=1, dense=(64,), image_size=8),
    "dense": Architecture((), pool_every=1, dense=(64, 64), image_size=8),
    # Hubara et al. 2016 for MNIST
    "mlp": Architecture((), pool_every=1, dense=(4096,) * 3, image_size=28, in_channels=1),
}


def binarynet(
    architecture: str | Architecture,
    *,
    generator: torch.Generator | None = None,
    width: float = 1.0,
    binary: bool = True,
    activation: str = "binary_tanh",
    weights: str = "deterministic",
    dropout: tuple[float, ...] = (),
    dropout_position: str = "before_norm",
    pad_value: float = 0.0,
    in_channels: int | None = None,
    image_size: int | None = None,
    classes: int | None = None,
) -> nn.Sequential:
    """A BinaryNet: images (B, in_channels, H, W) in [-1, 1] -> scores (B, classes).

    - `architecture`: a name in `ARCHITECTURES`, or an `Architecture`.
    - `generator`: draws the initial weights; everything else starts as a constant. None:
      PyTorch's own.
    - `width`: multiplies channels and hidden units.
    - `binary`: False gives the full-precision twin, the same layers with real weights and
      the activation that the binary one rounds.
    - `activation`, `weights`: names in `ACTIVATIONS` and `QUANTIZERS`.
    - `dropout`: drop probabilities after the hidden dense layers, in order, then after the
      last one. `dropout_position` is "before_norm", as in the original, or
      "after_activation", where the last layer has no place for it.
    - `in_channels`, `image_size`, `classes`: None for those of the architecture.

    Raises InvalidValue for unknown names and sizes that are not positive.
    """
    if isinstance(architecture, str):
        check_name("architecture", architecture, ARCHITECTURES)
        architecture = ARCHITECTURES[architecture]
    inputs = {"in_channels": in_channels, "image_size": image_size, "classes": classes}
    given = {name: size for name, size in inputs.items() if size is not None}
    architecture = replace(architecture, **given)
    if not binary and (weights != "deterministic" or pad_value != 0):
        raise InvalidValue("weights and pad_value are settings of binary layers only")
    check_name("dropout position", dropout_position, DROPOUT_POSITIONS)
    before_norm = dropout_position == "before_norm"
    if len(dropout) > len(architecture.dense) + before_norm:
        raise InvalidValue(
            f"dropout {dropout} {dropout_position} has more numbers than there are places"
        )

    conv, dense = _layer_makers(binary, weights, pad_value, generator)
    act = partial(make_activation, activation, binary)
    return _assemble(architecture, width, conv, dense, act, dropout, before_norm)


def _layer_makers(binary: bool, weights: str, pad_value: float, generator):
    """How convolutions (in, out) and dense layers (in, out) are made."""
    if not binary:
        conv = partial(_real_layer, nn.Conv2d, generator, kernel_size=3, padding=1)
        return conv, partial(_real_layer, nn.Linear, generator)

    def conv(channels: int, out: int) -> BinaryConv2d:
        part = make_part(QUANTIZERS[weights])
        return BinaryConv2d(
            channels, out, 3, quantizer=part, generator=generator, pad_value=pad_value
        )

    def dense(features: int, out: int) -> BinaryLinear:
        part = make_part(QUANTIZERS[weights])
        return BinaryLinear(features, out, quantizer=part, generator=generator)

    return conv, dense


def _assemble(a: Architecture, width, conv, dense, act, dropout, before_norm) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    size, channels = a.image_size, a.in_channels
    for i, out in enumerate(_scaled(width, a.convolutions), start=1):
        layers[f"conv{i}"] = conv(channels, out)
        if i % a.pool_every == 0:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            size //= 2
        layers[f"norm{i}"], layers[f"act{i}"] = BatchNorm(out), act()
        channels = out
    layers["flatten"] = nn.Flatten()
    features, first = channels * size * size, len(a.convolutions) + 1
    for k, out in enumerate((*_scaled(width, a.dense), a.classes)):
        drop = {f"dropout{first + k}": Dropout(p) for p in dropout[k : k + 1] if p}
        layers[f"dense{first + k}"] = dense(features, out)
        layers |= drop if before_norm else {}
        layers[f"norm{first + k}"] = BatchNorm(out)
        layers[f"act{first + k}"] = act()
        layers |= {} if before_norm else drop
        features = out
    layers.popitem()  # the scores are the last batch normalization, with no activation
    return nn.Sequential(layers)


cifar10, svhn, small, linear, dense_one, dense, mlp = (
    partial(binarynet, name) for name in ARCHITECTURES
)

# ------------------------------------------------------------------------ a residual network


class ResidualUnit(nn.Module):
    """Half a block of Bi-Real Net: norm(conv(act(x))) + shortcut(x), (B, C, H, W) -> same.

    Where channels grow, by a stride of 2, the shortcut is a mean over 2x2 pixels and a real
    convolution of 1x1. It carries real numbers past every binary convolution.
    """

    def __init__(self, channels: int, out: int, stride: int, conv, act, generator):
        super().__init__()
        self.act, self.conv, self.norm = act(), conv(channels, out, stride), BatchNorm(out)
        self.shortcut = nn.Identity()
        if stride > 1:
            project = _real_layer(nn.Conv2d, generator, channels, out, kernel_size=1, bias=False)
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), project, BatchNorm(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.act(x))) + self.shortcut(x)


def binary_resnet18(
    *,
    generator: torch.Generator | None = None,
    in_channels: int = 3,
    classes: int = 10,
    width: float = 1.0,
    binary: bool = True,
    activation: str = "binary_tanh",
    weights: str = "deterministic",
) -> nn.Sequential:
    """ResNet-18 with binary convolutions, for images of about 32x32: -> scores (B, classes).

    As in Bi-Real Net every one of its 16 binary convolutions has a real-valued shortcut; the
    first convolution, the 1x1 ones and the last layer are real. `binary`: False makes all
    convolutions real, and each activation the one that it rounds. The other arguments are those
    of `binarynet`.

    Source: Liu et al., "Bi-Real Net", ECCV 2018 (arXiv:1808.00278); for small images, without the
    first stride and pool: He et al. 2016, section 4.2.
    """
    real = partial(_real_layer, nn.Conv2d, generator, kernel_size=3, padding=1, bias=False)

    def conv(channels: int, out: int, stride: int) -> nn.Module:
        if not binary:
            return real(channels, out, stride=stride)
        part = make_part(QUANTIZERS[weights])
        return BinaryConv2d(
            channels, out, 3, stride, bias=False, quantizer=part, generator=generator
        )

    act = partial(make_activation, activation, binary)
    channels = first = _scaled(width, (64,))[0]
    layers = OrderedDict(conv1=real(in_channels, first), norm1=BatchNorm(first))
    for stage, out in enumerate(_scaled(width, (64, 128, 256, 512)), start=1):
        for unit in range(1, 5):
            stride = 2 if stage > 1 and unit == 1 else 1
            made = ResidualUnit(channels, out, stride, conv, act, generator)
            layers[f"unit{stage}_{unit}"], channels = made, out
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["dense"] = _real_layer(nn.Linear, generator, channels, classes)
    return nn.Sequential(layers)


# ------------------------------------------------------------------------- networks by name

USUAL_SETTINGS = {
    "width": 1.0,
    "binary": True,
    "activation": "binary_tanh",
    "weights": "deterministic",
    "dropout": (),
    "dropout_position": "before_norm",
}


def usual_inputs(name: str) -> Inputs:
    """What the network of this name takes where no data says otherwise."""
    a = ARCHITECTURES.get(name, ARCHITECTURES["cifar10"])
    return Inputs(a.in_channels, a.image_size, a.classes)


def build_network(
    name: str, inputs: Inputs, generator: torch.Generator, **settings: Any
) -> nn.Module:
    """The network of this name in `NETWORKS`, made from what its builder takes.

    A builder is given, by name, those of in_channels, image_size, classes, generator, width,
    binary, activation, weights, dropout and dropout_position that its signature has.
    Raises InvalidValue where it does not take a setting that is not as usual.
    """
    build = NETWORKS[name]
    offered = {**inputs._asdict(), "generator": generator, **settings}
    taken = accepted(build, offered)
    for setting, usual in USUAL_SETTINGS.items():
        if setting not in taken and settings.get(setting, usual) != usual:
            raise InvalidValue(
                f"network {name!r} takes no {setting}, so that can only be {usual!r}, got "
                f"{shown(settings[setting])}; it takes {', '.join(taken) or 'nothing'}"
            )
    model = build(**taken)
    if not isinstance(model, nn.Module):
        raise InvalidValue(f"network {name!r} must be built as an nn.Module, got {shown(model)}")
    return model


# ------------------------------------------------------------------------- about any network


def penalized_parameters(model: nn.Module, target: str) -> list[nn.Parameter]:
    """What an L2 penalty on the dense layers reaches.

    - "nothing": what the original's reached. Its binary layers replace the tag by which
      Lasagne finds parameters to penalize (`binary_net_random_labels.py:115,163`).
    - "weights": the latent weights of the dense layers, or the weights of the twin.
    - "gamma": the scales of the batch normalizations that follow dense layers.

    Raises InvalidValue for another target, and for one of which the network has none.
    """
    check_name("l2_target", target, PENALTY_TARGETS)
    dense, norms, last = [], [], None
    for module in model.modules():
        if isinstance(module, BinaryLinear | nn.Linear):
            dense.append(module.weight)
        if isinstance(module, BatchNorm | nn.BatchNorm1d) and isinstance(
            last, BinaryLinear | nn.Linear
        ):
            norms.append(module.weight)
        if any(True for _ in module.parameters(recurse=False)):
            last = module
    found = {"nothing": [], "weights": dense, "gamma": norms}[target]
    if not found and target != "nothing":
        raise InvalidValue(f"this network has no {target} of dense layers to penalize")
    return found


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers of each kind a model holds."""

    binary: int  # weights stored as one bit after training
    real: int  # trained real numbers: biases, and batch normalization's scale and shift
    statistics: int  # batch normalization's running averages

    @property
    def trained(self) -> int:
        return self.binary + self.real


def count_parameters(model: nn.Module) -> ParameterCount:
    """The `ParameterCount` of any model; a full-precision one has no binary weights."""
    binary = sum(layer.weight.numel() for layer in binary_layers(model))
    trained = sum(p.numel() for p in model.parameters())
    statistics = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    return ParameterCount(binary, trained - binary, statistics)
