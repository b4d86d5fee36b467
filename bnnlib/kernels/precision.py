"""Which layers may take their sums in half precision: those whose sums it holds exactly.

A product of +1 and -1 is exact in every format, and so are sums of them in float32, in which a
GPU's matrix units add; what can round is the sum, as it is written. fp16 has every integer up to
2048, and every even one up to 4096; bf16 has them up to 256 and 512 only. The bias is added in
float32. Kernels that do not add products of the operands themselves, such as Winograd's, are not
covered; `tests/kernels/test_precision.py` looks at those of a GPU where there is one.
"""

import torch
from torch import nn

from bnnlib.errors import check_name

PRECISIONS = ("auto", "float32", "half")
EVERY_INTEGER = 2048  # up to here, in fp16


def resolve_precision(name: str, device: torch.device) -> str:
    """ "float32" or "half"; "auto" is "half" on a GPU and "float32" on a CPU, where it is slower.

    Raises InvalidValue for other names. This concerns binary layers; a full-precision twin is
    computed as PyTorch's defaults have it.
    """
    check_name("precision", name, PRECISIONS)
    return {"auto": "half" if device.type == "cuda" else "float32"}.get(name, name)


def set_precision(model: nn.Sequential, precision: str) -> nn.Sequential:
    """Let layers that are fed with signs compute in half precision, if it is "half".

    Those whose sums fp16 holds exactly take them there; the others take sums in float32, or TF32,
    which is exact too ("mixed"). All of them take their gradients in bf16, whose range is that of
    float32. Weights, moments, normalization and loss stay in float32, and so does a layer that is
    fed with pixels.
    """
    if precision == "half":
        for layer, values in fed_with_signs(model).items():
            layer.precision = "half" if is_exact(layer, values) else "mixed"
    return model


def fed_with_signs(model: nn.Sequential) -> dict[nn.Module, tuple[int, int]]:
    """The binary layers whose inputs come from an activation of two values, with those, in order.

    An activation says which in its attribute `values`; what has a `precision` is a binary layer.
    """
    found, values = {}, None
    for module in model:
        if hasattr(module, "precision") and values is not None:
            found[module] = values
        if not isinstance(module, nn.Flatten):
            values = getattr(module, "values", None)  # dropout, say, makes other numbers of them
    return found


def is_exact(layer: nn.Module, values: tuple[int, int]) -> bool:
    """Whether fp16 has all sums of a layer, without the bias, whose inputs are these two values.

    With inputs of +1 and -1 a sum has the parity of its terms; at a border of zeros whole taps
    drop out, so that an even number of channels keeps it even. Inputs of 0 and 1 have no parity.
    """
    if getattr(layer, "pad_value", 0) not in (-1, 0, 1):
        return False
    terms, channels = layer.weight[0].numel(), layer.weight.shape[1]
    return is_exact_in_half(terms, even=values == (-1, 1) and channels % 2 == 0)


def is_exact_in_half(terms: int, even: bool) -> bool:
    """Whether fp16 has every sum of so many terms, each +1, 0 or -1.

    `even`: whether it is known that all sums are even, because no odd number of terms is not 0.
    """
    return terms <= (2 * EVERY_INTEGER if even else EVERY_INTEGER)
