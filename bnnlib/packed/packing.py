"""From a network to packed words and integer thresholds."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bnnlib.errors import InvalidValue
from bnnlib.kernels.definitions import pack_bits
from bnnlib.kernels.geometry import MOST_PIXELS
from bnnlib.layers import (
    Activation,
    BatchNorm,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    BinarySigmoid,
    BinaryTanh,
    Dropout,
    evaluating,
)
from bnnlib.models import ResidualUnit
from bnnlib.packed.fold import Ask, asking, fold, pixel_thresholds, switches
from bnnlib.packed.network import PackedNetwork
from bnnlib.packed.steps import (
    REAL,
    First,
    Flatten,
    Flip,
    Layer,
    Pool,
    Real,
    Residual,
    Signs,
    Sums,
    is_last,
)
from bnnlib.quantizers import approx_sign, approx_step, binarize, binary_sigmoid, binary_tanh

LOWS = {binarize: -1, binary_tanh: -1, approx_sign: -1, binary_sigmoid: 0, approx_step: 0}
NORMS = (BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d)
POSSIBLE = (
    "an nn.Sequential of BinaryConv2d and BinaryLinear with weights of +1 and -1, MaxPool2d, "
    "dropout, one batch normalization a layer, the activations "
    f"{', '.join(f.__name__ for f in LOWS)}, and ResidualUnit; before the first and after the last "
    f"of them real layers: {', '.join(kind.__name__ for kind in REAL)}"
)


class Bits(NamedTuple):
    """What is known of the words between two layers."""

    low: int  # the activations are `low` or 1
    channels: int | None
    lie: str = "image"  # since an nn.Flatten "flattened", after a dense layer "dense"


def pack(model: nn.Module) -> PackedNetwork:
    """The network as a `PackedNetwork`: its signs as bits, the rest folded into thresholds.

    Every activation and every score is equal, bit for bit, to what the network itself gives in
    evaluation, `evaluating(model, "deterministic")`, in float32 on the CPU, for the same batch,
    memory format and number of threads. Weights that are stochastic or real in training become
    their signs. In a network with `ResidualUnit`s only the binary convolutions are packed; batch
    normalization, shortcuts, first and last layer stay real, and take the whole batch at once.
    The model stays as it is.

    Raises InvalidValue, with the name of the layer and what can be packed, for another network.
    Source: Courbariaux et al. 2016 (arXiv:1602.02830), section 3; Umuroglu et al., "FINN",
    FPGA 2017 (arXiv:1612.07119).
    """
    if types := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise InvalidValue(f"networks are packed in float32, got {types.pop()}; see model.float()")
    model = copy.deepcopy(model).cpu().requires_grad_(False).eval()
    with evaluating(model, "deterministic"), torch.no_grad():
        steps = _steps(list(_layers("", model)))
    if not any(isinstance(step, Layer | Sums | First | Residual) for step in steps):
        raise InvalidValue(f"this network has no binary layers; what can be packed: {POSSIBLE}")
    return PackedNetwork(steps)


def _layers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested Sequentials in order, by name, without those that change nothing."""
    if type(module).forward is nn.Sequential.forward:
        for key, child in module.named_children():
            yield from _layers(f"{name}.{key}" if name else key, child)
    elif not isinstance(module, Dropout | nn.Dropout | nn.Dropout2d | nn.Identity):
        yield name or "the network", module


def _steps(layers: list[tuple[str, nn.Module]]) -> list:
    """The steps of a list of layers with their names."""
    steps: list = []
    known: Bits | None = None  # None: real numbers
    while layers:
        (name, module), layers = layers[0], layers[1:]
        if type(module) is ResidualUnit and known is None:
            steps.append(_residual(name, module))
            continue
        try:
            if _is_binary(module):
                tail = _tail([module for _, module in layers])
                made, known = _binary(module, tail, known, first=not steps)
                steps, layers = steps + made, layers[len(tail) :]
            elif known is None:
                if (low := _low(module)) is not None:
                    known = Bits(low, _channels(steps))
                # A dense layer that is fed with real numbers flattens them by itself.
                if not (isinstance(module, nn.Flatten) and layers and _is_dense(layers[0][1])):
                    steps.append(_real(module))
            elif isinstance(module, nn.MaxPool2d) and known.lie == "image":
                steps.append(_pool(module))
            elif isinstance(module, nn.Flatten):
                known = known._replace(lie="dense" if known.lie == "dense" else "flattened")
            else:
                raise InvalidValue(f"{type(module).__name__} after an activation")
        except InvalidValue as error:
            what = f"{name} cannot be packed: {error}; what can be packed: {POSSIBLE}"
            raise InvalidValue(what) from error
    if known is not None:
        raise InvalidValue("a network whose scores are an activation cannot be packed")
    return steps


def _residual(name: str, unit: ResidualUnit) -> Residual:
    body = [(f"{name}.{part}", getattr(unit, part)) for part in ("act", "conv", "norm")]
    shortcut = list(_layers(f"{name}.shortcut", unit.shortcut))
    return Residual(tuple(_steps(body)), tuple(_steps(shortcut)))


def _is_binary(module: nn.Module) -> bool:
    own = getattr(type(module), "forward", None)
    return isinstance(module, BinaryLayer) and own in (BinaryConv2d.forward, BinaryLinear.forward)


def _is_dense(module: nn.Module) -> bool:
    return _is_binary(module) and isinstance(module, BinaryLinear)


def _low(module: nn.Module) -> int | None:
    """The lower value of an activation, the higher one of which is 1; None for other modules."""
    if isinstance(module, BinaryTanh | BinarySigmoid):
        return module.values[0]
    return LOWS.get(module.function) if isinstance(module, Activation) else None


def _tail(modules: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """What follows a binary layer up to its activation; none where there is no such activation."""
    norms = 0
    for i, module in enumerate(modules):
        if _low(module) is not None:
            return modules[: i + 1]
        norms += isinstance(module, NORMS)
        if norms > 1 or not isinstance(module, (*NORMS, nn.MaxPool2d)):
            break
    return []


def _real(module: nn.Module) -> Real | Signs:
    """The step of a module between real numbers, or of an activation of them."""
    if _low(module) is not None:
        return Signs()
    if type(module) not in REAL:
        raise InvalidValue(f"{type(module).__name__} of real numbers")
    if getattr(module, "running_mean", True) is None:
        raise InvalidValue("it has no running averages")
    return Real(module)


def _channels(steps: Sequence) -> int | None:
    """The channels that come out of real layers, where one of them says so."""
    for step in reversed(steps):
        module = getattr(step, "module", step)
        for name in ("out_channels", "num_features"):
            if hasattr(module, name):
                return getattr(module, name)
        if isinstance(module, BatchNorm):
            return module.weight.numel()
    return None


def _pool(module: nn.MaxPool2d) -> Pool:
    if module.padding or module.dilation != 1 or module.ceil_mode or module.return_indices:
        raise InvalidValue("a pool with padding, dilation, ceil_mode or indices")
    return Pool(
        *(v if isinstance(v, tuple) else (v, v) for v in (module.kernel_size, module.stride))
    )


def _binary(
    layer: BinaryLayer, tail: Sequence[nn.Module], known: Bits | None, first: bool
) -> tuple[list, Bits | None]:
    """The steps of a binary layer and of what follows up to the activation, which are in `tail`.

    A pool of sums and a pool of what normalization makes of them differ where that turns the
    order around, so the flip has the place of the normalization.
    """
    conv, weight = isinstance(layer, BinaryConv2d), _signs(layer)
    folded = [module for module in tail if not isinstance(module, nn.MaxPool2d)]
    ask, form, flips = asking(folded, layer.bias, conv), _form(layer, weight, known), None
    if known is None:
        made, flips = _first(layer, form, folded, ask, first)
    elif tail:
        thresholds, flips = fold(ask, len(weight), weight[0].numel())
        made = Layer(**form, low=known.low, thresholds=thresholds)
    else:
        made = Sums(**form, low=known.low, bias=_array(layer.bias))
    steps = [Flatten(known.channels)] if known and known.lie == "flattened" else []
    steps.append(made)
    flip = [Flip(pack_bits(flips))] if flips is not None and flips.any() else []
    for module in tail:
        if isinstance(module, nn.MaxPool2d):
            steps.append(_pool(module))
        else:
            steps, flip = steps + flip, []
    lie = "image" if conv else "dense"
    return steps, Bits(_low(tail[-1]), len(weight), lie) if tail else None


def _signs(layer: BinaryLayer) -> Tensor:
    """The weight of a layer in evaluation; raises InvalidValue unless all of it is +1 or -1."""
    weight = layer.effective_weight()
    if layer.used_quantizer()[1] or not (weight.abs() == 1).all():
        raise InvalidValue("its weights are not +1 and -1")
    return weight.detach()


def _form(layer: BinaryLayer, weight: Tensor, known: Bits | None) -> dict[str, Any]:
    """What a step keeps of the weights and how they move."""
    if known and (known.lie == "image") is isinstance(layer, BinaryLinear):
        raise InvalidValue("a dense layer takes what nn.Flatten gives, a convolution an image")
    if isinstance(layer, BinaryLinear):
        if known and known.lie == "flattened":
            if known.channels is None:
                raise InvalidValue("the number of channels before the flatten is not known")
            if weight.shape[1] % known.channels:
                raise InvalidValue(f"{weight.shape[1]} columns of {known.channels} channels")
            weight = weight.view(len(weight), known.channels, -1).transpose(1, 2).flatten(1)
        words = pack_bits(weight.numpy() > 0)[:, None, None]
        return {"words": words, "channels": weight.shape[1], "dense": True}
    geometry = layer.geometry
    if geometry.groups != 1:
        raise InvalidValue(f"it has {geometry.groups} groups")
    if layer.pad_value not in (-1, 0, 1) or (known and layer.pad_value < known.low):
        raise InvalidValue(f"pad_value is {layer.pad_value}")
    return {
        "words": pack_bits(weight.permute(0, 2, 3, 1).numpy() > 0),
        "channels": weight.shape[1],
        "dense": False,
        "stride": tuple(geometry.stride),
        "padding": tuple(geometry.padding),
        "pad_value": int(layer.pad_value),
    }


def _first(
    layer: BinaryLayer, form: dict[str, Any], folded: list[nn.Module], ask: Ask, pixels: bool
) -> tuple[First, np.ndarray | None]:
    """The step of a binary layer that is fed with real numbers, or with pixels, and its flips."""
    form |= {
        "bias": _array(layer.bias),
        "channels_last": not form["dense"] and is_last(layer.weight),
    }
    if not folded:
        return First(**form), None
    channels = len(layer.weight)
    t, flips = switches(asking(folded, None, not form["dense"]), channels)
    thresholds, terms = None, layer.weight[0].numel()
    if pixels and terms <= MOST_PIXELS:  # what the sum has to reach before the bias is added
        thresholds = pixel_thresholds(switches(ask, channels)[0], terms)
    return First(**form, switches=t, thresholds=thresholds), flips


def _array(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().numpy().copy()
