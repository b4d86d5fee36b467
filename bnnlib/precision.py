"""Which layers may take their sums in half precision: those whose sums it holds exactly.

In: a model. Out: the same model, in which such layers do. A product of +1 and -1 is exact in
every format, and so are sums of them in float32, in which a GPU's matrix units add; what can round
is the sum, as it is written. fp16 has every integer up to 2048, and every even one up to 4096; bf16
has them up to 256 and 512 only. The bias is added in float32. Kernels that do not add products of
the operands themselves, such as Winograd's, are not covered; `tests/test_precision.py` looks at
those of a GPU where there is one. Next file: `models.py`.
"""

import torch
from torch import nn

from bnnlib.errors import check_name
from bnnlib.layers import BinaryLayer, BinarySigmoid, BinaryTanh

PRECISIONS = ("auto", "float32", "half")
EVERY_INTEGER = 2048  # up to here, in fp16


def is_exact_in_half(terms: int, even: bool) -> bool:
    """Whether fp16 has every sum of so many terms, each +1, 0 or -1.

    `even`: whether it is known that all sums are even, because no odd number of terms is not 0.
    """
    return terms <= (2 * EVERY_INTEGER if even else EVERY_INTEGER)


def fed_with_signs(model: nn.Sequential) -> dict[BinaryLayer, nn.Module]:
    """The layers whose inputs come from a binary activation, with that activation, in order."""
    found, values = {}, None
    for module in model:
        if isinstance(module, BinaryTanh | BinarySigmoid):
            values = module
        elif isinstance(module, BinaryLayer) and values is not None:
            found[module] = values
        if not isinstance(module, BinaryTanh | BinarySigmoid | nn.Flatten):
            values = None  # dropout, say, makes other numbers of them
    return found


def is_exact(layer: BinaryLayer, values: nn.Module) -> bool:
    """Whether fp16 has all sums of a layer, without the bias, that is fed by this activation.

    With inputs of +1 and -1 a sum has the parity of its terms; at a border of zeros whole taps
    drop out, so that an even number of channels keeps it even. Inputs of 0 and 1 have no parity.
    """
    terms, channels = layer.weight[0].numel(), layer.weight.shape[1]
    if getattr(layer, "pad_value", 0) not in (-1, 0, 1):
        return False
    return is_exact_in_half(terms, isinstance(values, BinaryTanh) and channels % 2 == 0)


def uses_half(precision: str, device: torch.device) -> bool:
    """Whether a network on this device is to take sums in half precision.

    "half" and "float32" say so; "auto" is "half" on a GPU and "float32" on a CPU, which
    computes in half precision more slowly. Raises InvalidValue for other names. This concerns
    binary layers; a full-precision twin is computed as PyTorch's defaults have it.
    """
    check_name("precision", precision, PRECISIONS)
    return precision == "half" or (precision == "auto" and device.type == "cuda")


def use_half(model: nn.Sequential) -> nn.Sequential:
    """Let layers that are fed with signs take their sums in fp16, where that is exact.

    The others among them take sums in float32, or TF32, which is exact too. All of them take
    their gradients in bf16, whose range is that of float32. Weights, moments, normalization
    and loss stay in float32, and so does a layer that is fed with pixels.
    """
    for layer, values in fed_with_signs(model).items():
        layer.precision = "half" if is_exact(layer, values) else "mixed"
    return model
