"""Which layers may take their sums in half precision: those whose sums it holds exactly.

In: a model. Out: the same model, in which such layers do. A product of +1 and -1 is exact in
every format; GPUs add such products in float32, which is exact too; what can round is the sum, as
it is written. fp16 has every integer up to 2048, and every even one up to 4096; bf16 has them up
to 256 and 512 only. The bias is added in float32. Next file: `models.py`.
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


def exact_layers(model: nn.Sequential) -> list[BinaryLayer]:
    """The layers of `model` whose sums are exact in fp16, from input to output.

    A layer is among them if its inputs are those of a binary activation, and few enough. With
    inputs of +1 and -1 a sum has the parity of its terms; at a border of zeros whole channels of
    terms drop out, so that an even number of channels keeps it even.
    """
    found, inputs = [], None
    for module in model:
        if isinstance(module, BinaryTanh | BinarySigmoid):
            inputs = module
        elif isinstance(module, BinaryLayer):
            terms, channels = module.weight[0].numel(), module.weight.shape[1]
            even = isinstance(inputs, BinaryTanh) and channels % 2 == 0
            if inputs is not None and is_exact_in_half(terms, even):
                found.append(module)
            inputs = None
        elif not isinstance(module, nn.Flatten):
            inputs = None  # dropout after an activation makes other numbers of its values
    return found


def uses_half(precision: str, device: torch.device) -> bool:
    """Whether a network on this device is to take sums in half precision.

    "half" and "float32" say so; "auto" is "half" on a GPU and "float32" on a CPU, which
    computes in half precision more slowly. Raises InvalidValue for other names.
    """
    check_name("precision", precision, PRECISIONS)
    return precision == "half" or (precision == "auto" and device.type == "cuda")


def use_half(model: nn.Sequential) -> nn.Sequential:
    """Let all `exact_layers` take their sums in fp16, and their gradients in bf16.

    Weights, moments, normalization and loss stay in float32.
    """
    for layer in exact_layers(model):
        layer.half = True
    return model
