"""BinaryNet for CIFAR-10 and for SVHN, a small one for laptops, and their real-valued twins.

Layers are numbered as in the original: `conv1` ... `dense9`, each followed by [pool], [dropout],
batch normalization and, but for the last, the activation.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import nn

from bnnlib.errors import InvalidValue, check_name, check_whole
from bnnlib.layers import (
    BatchNorm,
    BinaryConv2d,
    BinaryLinear,
    BinarySigmoid,
    BinaryTanh,
    Dropout,
    binary_layers,
)


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
    "dense": Architecture((), pool_every=1, dense=(64, 64), image_size=8),
}

DROPOUT_POSITIONS = ("before_norm", "after_activation")
ACTIVATIONS = {"binary_tanh": BinaryTanh, "binary_sigmoid": BinarySigmoid}


class HardSigmoid(nn.Module):
    """clip((x + 1) / 2, 0, 1): what `BinarySigmoid` rounds. (`nn.Hardsigmoid` divides by 6.)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x + 1) / 2).clamp(0, 1)


REAL_ACTIVATIONS = {"binary_tanh": nn.Hardtanh, "binary_sigmoid": HardSigmoid}


def _scaled(width: float, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, round(width * size)) for size in sizes)


def _real_layer(kind: type[nn.Module], generator: torch.Generator, *sizes: int, **kwargs):
    """An ordinary layer with Glorot weights, made without PyTorch's global generator."""
    device = torch.empty(0).device  # "meta" inside `with torch.device("meta")`
    layer = nn.utils.skip_init(kind, *sizes, device=device, **kwargs)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def binarynet(
    architecture: str | Architecture,
    *,
    generator: torch.Generator,
    width: float = 1.0,
    binary: bool = True,
    activation: str = "binary_tanh",
    weights: str = "deterministic",
    dropout: tuple[float, ...] = (),
    dropout_position: str = "before_norm",
    pad_value: float = 0.0,
) -> nn.Sequential:
    """A BinaryNet: images (B, 3, H, W) in [-1, 1] -> scores (B, classes).

    - `architecture`: "cifar10", "svhn", "small" or "dense", or an `Architecture`.
    - `generator`: draws the initial weights; everything else starts as a constant.
    - `width`: multiplies channels and hidden units.
    - `binary`: False gives the full-precision twin, the same layers with real weights and
      the activation that the binary one rounds.
    - `dropout`: drop probabilities after the hidden dense layers, in order, then after the
      last one. `dropout_position` is "before_norm", as in the original, or
      "after_activation", where the last layer has no place for it.

    Raises InvalidValue for unknown names and sizes that are not positive.
    """
    if isinstance(architecture, str):
        check_name("network", architecture, ARCHITECTURES)
        architecture = ARCHITECTURES[architecture]
    check_name("activation", activation, ACTIVATIONS)
    if width <= 0:
        raise InvalidValue(f"width must be positive, got {width}")
    if not binary and (weights != "deterministic" or pad_value != 0):
        raise InvalidValue("weights and pad_value are settings of binary layers only")
    check_name("dropout position", dropout_position, DROPOUT_POSITIONS)
    before_norm = dropout_position == "before_norm"
    if len(dropout) > len(architecture.dense) + before_norm:
        raise InvalidValue(
            f"dropout {dropout} {dropout_position} has more numbers than there are places"
        )

    if binary:
        conv = partial(BinaryConv2d, pad_value=pad_value, generator=generator, mode=weights)
        dense = partial(BinaryLinear, generator=generator, mode=weights)
        act = ACTIVATIONS[activation]
    else:
        conv = partial(_real_layer, nn.Conv2d, generator, kernel_size=3, padding=1)
        dense = partial(_real_layer, nn.Linear, generator)
        act = REAL_ACTIVATIONS[activation]
    return _assemble(architecture, width, conv, dense, act, dropout, before_norm)


def _assemble(a: Architecture, width, conv, dense, act, dropout, before_norm) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    size, channels = a.image_size, 3
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


PENALTY_TARGETS = ("nothing", "weights", "gamma")


def penalized_parameters(model: nn.Module, target: str) -> list[nn.Parameter]:
    """What an L2 penalty on the dense layers reaches.

    - "nothing": what the original's reached. Its binary layers replace the tag by which
      Lasagne finds parameters to penalize (`binary_net_random_labels.py:115,163`).
    - "weights": the latent weights of the dense layers, or the weights of the twin.
    - "gamma": the scales of the dense layers' batch normalizations.
    """
    check_name("l2_target", target, PENALTY_TARGETS)
    prefix = {"nothing": None, "weights": "dense", "gamma": "norm"}[target]
    if prefix is None:
        return []
    layers = dict(model.named_children())
    numbers = [name.removeprefix("dense") for name in layers if name.startswith("dense")]
    return [layers[prefix + number].weight for number in numbers]


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
    statistics = sum(b.numel() for b in model.buffers())
    return ParameterCount(binary, trained - binary, statistics)
